//! Sparse bytes of a simulated disk, in pages of 4096.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::units::bytes_u64;
use crate::units::bytes_usize;

const PAGE_BYTES: usize = 4096;
/// Bytes in a page.
pub(super) const PAGE_BYTES_U64: u64 = 4096;

/// Sparse bytes; what was never written reads as zero.
#[derive(Clone, Default)]
pub(super) struct Pages(BTreeMap<u64, Box<[u8; PAGE_BYTES]>>);

/// The parts of a range that lie in one page each: page, range in the page, range in the buffer.
fn parts(offset: u64, length: usize) -> impl Iterator<Item = (u64, Range<usize>, Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == length {
            return None;
        }
        let at = offset + bytes_u64(done);
        let start = bytes_usize(at % PAGE_BYTES_U64);
        let count = (PAGE_BYTES - start).min(length - done);
        done += count;
        Some((at / PAGE_BYTES_U64, start..start + count, done - count..done))
    })
}

impl Pages {
    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) {
        for (page, within, target) in parts(offset, buf.len()) {
            match self.0.get(&page) {
                Some(bytes) => buf[target].copy_from_slice(&bytes[within]),
                None => buf[target].fill(0),
            }
        }
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        for (page, within, source) in parts(offset, data.len()) {
            self.page(page)[within].copy_from_slice(&data[source]);
        }
    }

    pub(super) fn flip(&mut self, offset: u64, bit: u8) {
        self.page(offset / PAGE_BYTES_U64)[bytes_usize(offset % PAGE_BYTES_U64)] ^= bit;
    }

    /// Pages that are stored.
    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    /// Offset of the page that has `n` stored ones before it.
    pub(super) fn nth(&self, n: u64) -> Option<u64> {
        self.0.keys().nth(bytes_usize(n)).map(|page| page * PAGE_BYTES_U64)
    }

    fn page(&mut self, page: u64) -> &mut [u8; PAGE_BYTES] {
        self.0.entry(page).or_insert_with(|| Box::new([0; PAGE_BYTES]))
    }

    /// Whether every page of the range was written before.
    pub(super) fn holds(&self, offset: u64, length: usize) -> bool {
        parts(offset, length).all(|(page, ..)| self.0.contains_key(&page))
    }

    /// Gives whole pages back and zeroes the rest of the range.
    pub(super) fn discard(&mut self, offset: u64, length: u64) {
        let end = offset + length;
        let pages = offset / PAGE_BYTES_U64..end.div_ceil(PAGE_BYTES_U64);
        let stored: Vec<u64> = self.0.range(pages).map(|(&page, _)| page).collect();
        for page in stored {
            let start = page * PAGE_BYTES_U64;
            let (from, to) = (offset.max(start), end.min(start + PAGE_BYTES_U64));
            if to - from == PAGE_BYTES_U64 {
                self.0.remove(&page);
            } else {
                self.page(page)[bytes_usize(from - start)..bytes_usize(to - start)].fill(0);
            }
        }
    }
}
