//! Bytes waiting to be sent, as a gather list: headers in one buffer, payload by reference.
//!
//! Payload is not copied and, once the buffers have grown to the size of a batch, nothing is
//! allocated. The protocols' outboxes put whole messages into one, so bytes of two never mix.
//!
//! # Invariants
//! * `parts[first..]`, the first of them from `first_sent` on, are the bytes not yet sent, and
//!   they are `bytes` in all.
//! * [`Gather::is_full`] bounds a batch; the connection stops parsing then, so what gathers is at
//!   most that plus the replies of requests already in flight.

use std::io::IoSlice;
use std::ops::Range;

use bytes::Bytes;

use crate::units::bytes_u64;
use crate::volume::Piece;

/// Vectors the kernel takes in one send (UIO_MAXIOV).
const PARTS_PER_SEND_MAX: usize = 1024;
/// Bytes of reply that end a batch. Larger ones make server and client take turns (runtime.md).
const BATCH_BYTES: u64 = 1 << 20;
/// What zero pieces point into.
static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

enum Part {
    /// A range of `heads`.
    Head(Range<usize>),
    Data(Bytes),
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
            Piece::Data(bytes) => self.parts.push(Part::Data(bytes)),
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
                Part::Data(bytes) => slices.push(IoSlice::new(&bytes[skip..])),
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
        if self.bytes == 0 {
            self.heads.clear();
            self.parts.clear();
            self.first = 0;
            self.first_sent = 0;
            return;
        }
        let mut left = self.first_sent + sent;
        while let Some(part) = self.parts.get_mut(self.first) {
            let length = match part {
                Part::Head(range) => range.len(),
                Part::Data(bytes) => bytes.len(),
                Part::Zero(bytes) => *bytes,
            };
            if left < length {
                break;
            }
            // Lets go of the payload now, not when the whole batch is out.
            *part = Part::Zero(0);
            left -= length;
            self.first += 1;
        }
        self.first_sent = left;
    }
}
