//! Bytes waiting to be sent, as a gather list: headers in one buffer, payload by reference.
//!
//! Payload is not copied and, once the buffers have grown to the size of a batch, nothing is
//! allocated. The protocols' outboxes put whole messages into one, so bytes of two never mix.
//!
//! # Invariants
//! * `parts[first..]`, the first of them from `first_sent` on, are the bytes not yet sent, and
//!   they are `bytes` in all.
//! * `kept` is what short pieces keep alive beyond their own bytes, of parts not yet sent.
//! * [`Gather::is_full`] bounds a batch; the connection stops parsing then, so what gathers is at
//!   most that plus the replies of requests already in flight.

use std::io::IoSlice;
use std::ops::Range;

use bytes::Bytes;
use bytes::BytesMut;

use crate::units::bytes_u64;
use crate::volume::Piece;
use crate::volume::READ_BYTES_MIN;

/// Vectors the kernel takes in one send (UIO_MAXIOV).
const PARTS_PER_SEND_MAX: usize = 1024;
/// Bytes of reply that end a batch. Larger ones make server and client take turns (runtime.md).
pub const BATCH_BYTES: u64 = 1 << 20;
/// Room for headers that is kept for the next batch, as is that for twice the parts of a send: more
/// than one of small reads and writes needs.
const HEADS_KEPT_BYTES: usize = 64 * 1024;
/// A piece shorter than this may keep alive what is more than twice as long: up to
/// [`READ_BYTES_MIN`].
const SHORT_PIECE_BYTES: u64 = READ_BYTES_MIN / 2;
/// What zero pieces point into.
static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

enum Part {
    /// A range of `heads`.
    Head(Range<usize>),
    Data(Bytes),
    /// What was copied out of data.
    Copy(Bytes),
    Zero(usize),
}

/// The gather list.
#[derive(Default)]
pub struct Gather {
    heads: Vec<u8>,
    parts: Vec<Part>,
    /// Index of the first part not wholly sent.
    first: usize,
    /// Bytes of it that are sent.
    first_sent: usize,
    /// Bytes not yet sent.
    bytes: u64,
    /// See [`Gather::sent_bytes`].
    sent: u64,
    /// See [`Gather::kept_bytes`].
    kept: u64,
}

impl Gather {
    /// Whether everything was sent.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Whether it is time to send before taking more requests.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.parts.len() >= PARTS_PER_SEND_MAX || self.bytes >= BATCH_BYTES
    }

    /// Bytes not yet sent.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes that were sent, ever.
    #[must_use]
    pub fn sent_bytes(&self) -> u64 {
        self.sent
    }

    /// Memory that short pieces keep alive beyond [`Gather::bytes`], such as a decoded chunk of which
    /// one block was wanted.
    #[must_use]
    pub fn kept_bytes(&self) -> u64 {
        self.kept
    }

    /// Lets go of that memory by copying those pieces.
    pub fn copy_short(&mut self) {
        let is_short = |bytes: &Bytes| kept_beyond(bytes) > 0;
        let waiting = &mut self.parts[self.first..];
        let lengths = waiting.iter().map(|part| match part {
            Part::Data(bytes) if is_short(bytes) => bytes.len(),
            _ => 0,
        });
        let mut copies = BytesMut::with_capacity(lengths.sum());
        for part in waiting {
            if let Part::Data(bytes) = part
                && is_short(bytes)
            {
                copies.extend_from_slice(bytes);
                *part = Part::Copy(copies.split().freeze());
            }
        }
        self.kept = 0;
    }

    /// Appends header bytes, to the last part if that is a header too.
    pub fn head(&mut self, put: impl FnOnce(&mut Vec<u8>)) {
        let start = self.heads.len();
        put(&mut self.heads);
        let end = self.heads.len();
        self.bytes += bytes_u64(end - start);
        match self.parts.last_mut() {
            Some(Part::Head(range)) if range.end == start => {
                range.end = end;
            }
            _ => self.parts.push(Part::Head(start..end)),
        }
    }

    /// Appends payload.
    pub fn piece(&mut self, piece: Piece) {
        self.bytes += bytes_u64(piece.len());
        match piece {
            Piece::Zero(0) => {}
            Piece::Zero(bytes) => self.parts.push(Part::Zero(bytes)),
            Piece::Data(bytes) if bytes.is_empty() => {}
            Piece::Data(bytes) => {
                self.kept += kept_beyond(&bytes);
                self.parts.push(Part::Data(bytes));
            }
        }
    }

    /// The next bytes to send, as many vectors as one send takes.
    #[must_use]
    pub fn slices(&self) -> Vec<IoSlice<'_>> {
        let waiting = self.parts.len() - self.first;
        let mut slices = Vec::with_capacity(waiting.min(PARTS_PER_SEND_MAX));
        let mut skip = self.first_sent;
        for part in &self.parts[self.first..] {
            if slices.len() >= PARTS_PER_SEND_MAX {
                break;
            }
            match part {
                Part::Head(range) => {
                    slices.push(IoSlice::new(&self.heads[range.start + skip..range.end]));
                }
                Part::Data(bytes) | Part::Copy(bytes) => {
                    slices.push(IoSlice::new(&bytes[skip..]));
                }
                Part::Zero(bytes) => {
                    let mut left = bytes - skip;
                    while left > 0 && slices.len() < PARTS_PER_SEND_MAX {
                        let part = left.min(ZEROES.len());
                        slices.push(IoSlice::new(&ZEROES[..part]));
                        left -= part;
                    }
                    if left > 0 {
                        break;
                    }
                }
            }
            skip = 0;
        }
        slices
    }

    /// Takes note that the first `sent` bytes left.
    pub fn sent(&mut self, sent: usize) {
        self.bytes -= bytes_u64(sent);
        self.sent += bytes_u64(sent);
        if self.bytes == 0 {
            self.heads.clear();
            self.heads.shrink_to(HEADS_KEPT_BYTES);
            self.parts.clear();
            self.parts.shrink_to(2 * PARTS_PER_SEND_MAX);
            self.first = 0;
            self.first_sent = 0;
            self.kept = 0;
            return;
        }
        let mut left = self.first_sent + sent;
        while let Some(part) = self.parts.get_mut(self.first) {
            let length = match part {
                Part::Head(range) => range.len(),
                Part::Data(bytes) | Part::Copy(bytes) => bytes.len(),
                Part::Zero(bytes) => *bytes,
            };
            if left < length {
                break;
            }
            if let Part::Data(bytes) = part {
                self.kept -= kept_beyond(bytes);
            }
            // Lets go of the payload now, not when the whole batch is out.
            *part = Part::Zero(0);
            left -= length;
            self.first += 1;
        }
        self.first_sent = left;
    }
}

/// What a piece of that length may keep alive besides itself, if it is much.
fn kept_beyond(piece: &Bytes) -> u64 {
    let bytes = bytes_u64(piece.len());
    if bytes < SHORT_PIECE_BYTES { READ_BYTES_MIN - bytes } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::bytes_usize;

    #[test]
    fn short_pieces_keep_memory_until_they_are_sent_or_copied() {
        let chunk = Bytes::from(vec![7; bytes_usize(READ_BYTES_MIN)]);
        let mut gather = Gather::default();
        gather.head(|heads| heads.extend_from_slice(b"head"));
        for _ in 0..3 {
            gather.piece(Piece::Data(chunk.slice(..4096)));
        }
        gather.piece(Piece::Data(chunk.clone()));
        gather.piece(Piece::Zero(100));
        let each = READ_BYTES_MIN - 4096;
        assert_eq!(gather.kept_bytes(), 3 * each);
        gather.sent(4 + 4096 + 10);
        assert_eq!(gather.sent_bytes(), 4 + 4096 + 10);
        assert_eq!(gather.kept_bytes(), 2 * each);
        let before: Vec<u8> = gather.slices().iter().flat_map(|slice| slice.to_vec()).collect();
        gather.copy_short();
        assert_eq!(gather.kept_bytes(), 0);
        let after: Vec<u8> = gather.slices().iter().flat_map(|slice| slice.to_vec()).collect();
        assert!(before == after);
        gather.sent(4086 + 4096);
        gather.piece(Piece::Data(chunk.slice(..512)));
        assert_eq!(gather.kept_bytes(), READ_BYTES_MIN - 512);
        let rest = gather.bytes();
        gather.sent(bytes_usize(rest));
        drop(gather);
        assert!(chunk.try_into_mut().is_ok(), "nothing refers to the chunk any more");
    }
}
