//! Replies waiting to be sent, in their dialect; see [`Gather`] for how they wait.
//!
//! Each method appends one whole message, so bytes of two messages never mix. (proto.md, "Simple
//! reply message", "Structured reply chunk message".)

use crate::target::gather::Gather;
use crate::target::nbd::options::BASE_ALLOCATION_ID;
use crate::target::nbd::status::NbdError;
use crate::target::nbd::wire;
use crate::target::nbd::wire::ChunkKind;
use crate::target::nbd::wire::Dialect;
use crate::target::nbd::wire::Tag;
use crate::target::nbd::wire::put_u16;
use crate::target::nbd::wire::put_u32;
use crate::target::nbd::wire::put_u64;
use crate::units::bytes_u64;
use crate::volume::Extent;
use crate::volume::Piece;

/// Smallest run of zeroes sent as a hole. (proto.md recommends holes from 4 KiB.)
const HOLE_BYTES_MIN: usize = 4096;
/// Longest error text we send; qemu refuses error chunks above 1000 bytes.
const ERROR_TEXT_BYTES_MAX: usize = 256;
/// The replies of one connection.
#[derive(Default)]
pub struct Outbox {
    /// Whole messages.
    pub gather: Gather,
}

impl Outbox {
    /// Replies that a request succeeded and has no data to return.
    pub fn done(&mut self, dialect: Dialect, tag: Tag) {
        self.gather.head(|heads| match dialect {
            Dialect::Simple => wire::put_simple_reply(heads, tag.cookie, 0),
            Dialect::Structured | Dialect::Extended => {
                wire::put_chunk(heads, dialect == Dialect::Extended, tag, ChunkKind::None, 0, true);
            }
        });
    }

    /// Replies that a request failed. `text` is for people and sent only where it fits.
    pub fn error(&mut self, dialect: Dialect, tag: Tag, error: NbdError, text: &str) {
        let text = text.as_bytes();
        let text = text.get(..ERROR_TEXT_BYTES_MAX).unwrap_or(text);
        let text_bytes = u16::try_from(text.len()).expect("cut to 256 bytes");
        self.gather.head(|heads| match dialect {
            Dialect::Simple => wire::put_simple_reply(heads, tag.cookie, error.value()),
            Dialect::Structured | Dialect::Extended => {
                let extended = dialect == Dialect::Extended;
                let payload_bytes = 6 + u32::from(text_bytes);
                wire::put_chunk(heads, extended, tag, ChunkKind::Error, payload_bytes, true);
                put_u32(heads, error.value());
                put_u16(heads, text_bytes);
                heads.extend_from_slice(text);
            }
        });
    }

    /// Replies to a READ with `pieces`, leaving it empty for the next one.
    ///
    /// `whole` forbids more than one content chunk (DF).
    pub fn read(&mut self, dialect: Dialect, tag: Tag, whole: bool, pieces: &mut Vec<Piece>) {
        match dialect {
            Dialect::Simple => {
                self.gather.head(|heads| wire::put_simple_reply(heads, tag.cookie, 0));
                for piece in pieces.drain(..) {
                    self.gather.piece(piece);
                }
            }
            Dialect::Structured | Dialect::Extended => {
                self.read_chunks(dialect == Dialect::Extended, tag, whole, pieces);
            }
        }
    }

    /// One chunk per hole and per run of anything else, the last of them closing the reply: no
    /// error can follow, since all pieces are at hand.
    fn read_chunks(&mut self, extended: bool, tag: Tag, whole: bool, pieces: &mut Vec<Piece>) {
        let hole_bytes = |piece: &Piece| match piece {
            Piece::Zero(bytes) if *bytes >= HOLE_BYTES_MIN && !whole => Some(*bytes),
            _ => None,
        };
        let mut rest = pieces.as_slice();
        let mut offset = tag.offset;
        while let Some(piece) = rest.first() {
            let hole = hole_bytes(piece);
            let run = match hole {
                Some(_) => 1,
                None => rest.iter().take_while(|piece| hole_bytes(piece).is_none()).count(),
            };
            let (chunk, after) = rest.split_at(run);
            rest = after;
            let bytes: usize = chunk.iter().map(Piece::len).sum();
            let bytes_u32 = u32::try_from(bytes).expect("a read is at most 32 MiB");
            let last = rest.is_empty();
            self.gather.head(|heads| {
                if hole.is_some() {
                    wire::put_chunk(heads, extended, tag, ChunkKind::OffsetHole, 12, last);
                    put_u64(heads, offset);
                    put_u32(heads, bytes_u32);
                } else {
                    let payload_bytes = 8 + bytes_u32;
                    let kind = ChunkKind::OffsetData;
                    wire::put_chunk(heads, extended, tag, kind, payload_bytes, last);
                    put_u64(heads, offset);
                }
            });
            if hole.is_none() {
                for piece in chunk {
                    self.gather.piece(piece.clone());
                }
            }
            offset += bytes_u64(bytes);
        }
        pieces.clear();
    }

    /// Replies to a BLOCK_STATUS for base:allocation. `extents` must not be empty.
    pub fn extents(&mut self, dialect: Dialect, tag: Tag, extents: &[Extent]) {
        const STATE_HOLE: u32 = 1 << 0;
        const STATE_ZERO: u32 = 1 << 1;

        assert!(!extents.is_empty(), "a volume names at least one extent");
        let flags = |extent: &Extent| {
            (if extent.hole { STATE_HOLE } else { 0 }) | (if extent.zero { STATE_ZERO } else { 0 })
        };
        let count = u32::try_from(extents.len()).expect("bounded by the session");
        self.gather.head(|heads| {
            if dialect == Dialect::Extended {
                let payload_bytes = 8 + 16 * count;
                wire::put_chunk(heads, true, tag, ChunkKind::BlockStatusExt, payload_bytes, true);
                put_u32(heads, BASE_ALLOCATION_ID);
                put_u32(heads, count);
                for extent in extents {
                    put_u64(heads, extent.bytes);
                    put_u64(heads, u64::from(flags(extent)));
                }
            } else {
                let payload_bytes = 4 + 8 * count;
                wire::put_chunk(heads, false, tag, ChunkKind::BlockStatus, payload_bytes, true);
                put_u32(heads, BASE_ALLOCATION_ID);
                for extent in extents {
                    // The request's own length is 32 bits, and extents lie within the request.
                    put_u32(heads, u32::try_from(extent.bytes).unwrap_or(u32::MAX));
                    put_u32(heads, flags(extent));
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;

    const TAG: Tag = Tag { cookie: 9, offset: 8192 };

    fn drain(out: &mut Outbox, step: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while !out.gather.is_empty() {
            let flat: Vec<u8> =
                out.gather.slices().iter().flat_map(|slice| slice.to_vec()).collect();
            assert!(!flat.is_empty());
            let sent = flat.len().min(step);
            bytes.extend_from_slice(&flat[..sent]);
            out.gather.sent(sent);
        }
        bytes
    }

    // spec: nbd-read-hole
    #[test]
    fn long_zeroes_become_holes_unless_the_client_wants_one_chunk() {
        let pieces = || {
            vec![
                Piece::Data(Bytes::from(vec![1; 512])),
                Piece::Zero(512),
                Piece::Zero(4096),
                Piece::Data(Bytes::from(vec![2; 16])),
            ]
        };
        let mut out = Outbox::default();
        out.read(Dialect::Structured, TAG, false, &mut pieces());
        let bytes = drain(&mut out, 100);
        assert_eq!(bytes.len(), (20 + 8 + 1024) + (20 + 12) + (20 + 8 + 16));
        assert_eq!(bytes[4..8], [0, 0, 0, 1]);
        let hole = &bytes[1052..];
        assert_eq!(hole[4..8], [0, 0, 0, 2]);
        assert_eq!(hole[20..32], [0, 0, 0, 0, 0, 0, 0x24, 0, 0, 0, 0x10, 0]);
        assert_eq!(hole[36..40], [0, 1, 0, 1], "the last chunk closes the reply");

        out.read(Dialect::Structured, TAG, true, &mut pieces());
        assert_eq!(drain(&mut out, 7).len(), 20 + 8 + 512 + 512 + 4096 + 16);
        out.read(Dialect::Simple, TAG, false, &mut pieces());
        assert_eq!(drain(&mut out, 1000).len(), 16 + 512 + 512 + 4096 + 16);
    }

    #[test]
    fn error_texts_stay_short() {
        let mut out = Outbox::default();
        out.error(Dialect::Extended, TAG, NbdError::Io, &"x".repeat(5000));
        assert_eq!(drain(&mut out, 1000).len(), 32 + 6 + ERROR_TEXT_BYTES_MAX);
        out.error(Dialect::Simple, TAG, NbdError::Io, "text");
        assert_eq!(drain(&mut out, 1000).len(), 16);
    }

    // spec: nbd-block-status-ext
    #[test]
    fn extents_take_the_form_of_the_dialect() {
        let extents = [
            Extent { bytes: 4096, hole: false, zero: false },
            Extent { bytes: 1 << 40, hole: true, zero: true },
        ];
        let mut out = Outbox::default();
        out.extents(Dialect::Extended, TAG, &extents);
        let bytes = drain(&mut out, 1000);
        assert_eq!(bytes.len(), 32 + 8 + 32);
        assert_eq!(bytes[6..8], [0, 6]);
        assert_eq!(bytes[56..72], [0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3]);
        out.extents(Dialect::Structured, TAG, &extents[..1]);
        assert_eq!(drain(&mut out, 1000).len(), 20 + 4 + 8);
    }

    proptest! {
        #[test]
        fn partial_sends_lose_nothing(
            pieces in prop::collection::vec((any::<bool>(), 0..70_000_usize), 0..6),
            step in 1..200_000_usize,
        ) {
            let mut out = Outbox::default();
            let mut expected = Vec::new();
            out.done(Dialect::Simple, TAG);
            wire::put_simple_reply(&mut expected, TAG.cookie, 0);
            let mut list = Vec::new();
            wire::put_simple_reply(&mut expected, TAG.cookie, 0);
            for (zero, length) in pieces {
                expected.resize(expected.len() + length, if zero { 0 } else { 7 });
                list.push(if zero { Piece::Zero(length) } else { vec![7; length].into() });
            }
            out.read(Dialect::Simple, TAG, false, &mut list);
            prop_assert_eq!(drain(&mut out, step), expected);
        }
    }

    impl From<Vec<u8>> for Piece {
        fn from(bytes: Vec<u8>) -> Self {
            Self::Data(bytes.into())
        }
    }
}
