//! Compression of chunks: one zstd frame each, without dictionary or frame checksum.
//!
//! A chunk's length is known from its record, and its bytes are covered by the record's checksum;
//! the frame repeats neither, except for zstd's own content size, which zstd compares itself. One
//! compression and one decompression context live in each thread, so that a call neither allocates
//! nor initialises tables anew.
//!
//! The decoder is given bytes from devices: whatever they are, it answers with the chunk or with
//! [`CorruptFrame`], and writes nowhere but into the buffer it was given. It never allocates by
//! what a frame claims.

use std::cell::RefCell;
use std::error;
use std::fmt;

use zstd_safe::CCtx;
use zstd_safe::DCtx;

thread_local! {
    static COMPRESSOR: RefCell<CCtx<'static>> = RefCell::new(CCtx::create());
    /// Frames are made here, so that what is kept is exactly as long as they are.
    static FRAME: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    static DECOMPRESSOR: RefCell<DCtx<'static>> = RefCell::new(DCtx::create());
}

/// The bytes are not one whole zstd frame of the expected size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CorruptFrame;

impl fmt::Display for CorruptFrame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("compressed bytes are not one whole zstd frame of the expected size")
    }
}

impl error::Error for CorruptFrame {}

/// Appends `input`, compressed at zstd `level`, to `out`.
///
/// Returns false, with `out` as it was, if the result would not be smaller than `input`: store it
/// raw then.
pub fn compress(input: &[u8], level: i32, out: &mut Vec<u8>) -> bool {
    let Some(room) = input.len().checked_sub(1) else { return false };
    FRAME.with_borrow_mut(|frame| {
        if frame.len() < room {
            frame.resize(room, 0);
        }
        // zstd gives up as soon as the frame would need more room than this.
        let written = COMPRESSOR
            .with_borrow_mut(|compressor| compressor.compress(&mut frame[..room], input, level))
            .unwrap_or(0);
        out.extend_from_slice(&frame[..written]);
        // No frame is empty, so no byte written means that it did not fit.
        written > 0
    })
}

/// Fills `out` exactly with what the frame `input` holds.
///
/// # Errors
/// [`CorruptFrame`] if `input` is anything but one whole frame of `out.len()` bytes; `out` then
/// holds arbitrary bytes.
pub fn decompress(input: &[u8], out: &mut [u8]) -> Result<(), CorruptFrame> {
    // The library would go on with a second frame.
    let frame_bytes = zstd_safe::find_frame_compressed_size(input).map_err(|_| CorruptFrame)?;
    if frame_bytes != input.len() {
        return Err(CorruptFrame);
    }
    let filled = DECOMPRESSOR
        .with_borrow_mut(|decompressor| decompressor.decompress(out, input))
        .map_err(|_| CorruptFrame)?;
    if filled == out.len() { Ok(()) } else { Err(CorruptFrame) }
}

/// Whether every byte is zero. Stops at the first 128 bytes that are not.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    let (lines, rest) = bytes.as_chunks::<128>();
    lines.iter().all(is_zero_line) && rest.iter().all(|&byte| byte == 0)
}

/// One step of [`is_zero`], without a branch inside.
fn is_zero_line(line: &[u8; 128]) -> bool {
    let (words, _) = line.as_chunks::<16>();
    words.iter().fold(0, |sum, word| sum | u128::from_ne_bytes(*word)) == 0
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::Just;
    use proptest::prelude::Strategy;
    use proptest::prelude::any;
    use proptest::prop_oneof;
    use proptest::proptest;
    use proptest::sample::Index;

    use super::*;

    /// Bytes from incompressible to all alike, up to the largest chunk.
    fn chunk() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            vec(any::<u8>(), 0..5000),
            vec(0..4_u8, 0..33_000),
            (vec(any::<u8>(), 1..64), 1..500_usize).prop_map(|(text, times)| text.repeat(times)),
            (any::<u8>(), 0..33_000_usize).prop_map(|(byte, length)| vec![byte; length]),
        ]
    }

    fn level() -> impl Strategy<Value = i32> {
        prop_oneof![Just(-1), Just(1), Just(3), Just(9)]
    }

    fn compressible() -> (Vec<u8>, Vec<u8>) {
        let input = b"one row of a table, and the next; ".repeat(241);
        let mut frame = Vec::new();
        assert!(compress(&input, -1, &mut frame));
        (input, frame)
    }

    #[test]
    fn tiny_inputs_stay_raw() {
        let mut out = b"kept".to_vec();
        for length in 0..8 {
            assert!(!compress(&vec![7; length], -1, &mut out));
            assert_eq!(out, b"kept");
        }
    }

    #[test]
    fn frame_of_another_size_is_refused() {
        let (input, frame) = compressible();
        for length in [0, 1, input.len() - 1, input.len() + 1, input.len() * 2] {
            assert_eq!(decompress(&frame, &mut vec![0; length]), Err(CorruptFrame));
        }
    }

    #[test]
    fn two_frames_in_a_row_are_refused() {
        let (input, frame) = compressible();
        assert_eq!(decompress(&frame.repeat(2), &mut vec![0; input.len() * 2]), Err(CorruptFrame));
        assert_eq!(decompress(&frame.repeat(2), &mut vec![0; input.len()]), Err(CorruptFrame));
    }

    #[test]
    fn every_truncation_is_refused() {
        let (input, frame) = compressible();
        for length in 0..frame.len() {
            assert_eq!(decompress(&frame[..length], &mut vec![0; input.len()]), Err(CorruptFrame));
        }
        assert_eq!(
            decompress(&[&frame[..], b"x"].concat(), &mut vec![0; input.len()]),
            Err(CorruptFrame)
        );
    }

    #[test]
    fn damage_leaves_the_thread_able_to_go_on() {
        let (input, frame) = compressible();
        let mut out = vec![0; input.len()];
        for at in 0..frame.len() {
            let mut damaged = frame.clone();
            damaged[at] ^= 0xFF;
            let _ = decompress(&damaged, &mut out);
            assert_eq!(decompress(&frame, &mut out), Ok(()));
            assert_eq!(out, input);
        }
    }

    proptest! {
        #[test]
        fn what_is_compressed_comes_back(input in chunk(), level in level(), before in vec(any::<u8>(), 0..40)) {
            let mut out = before.clone();
            if compress(&input, level, &mut out) {
                assert!(out.starts_with(&before));
                assert!(out.len() - before.len() < input.len());
                let mut back = vec![0xAA; input.len()];
                assert_eq!(decompress(&out[before.len()..], &mut back), Ok(()));
                assert_eq!(back, input);
            } else {
                assert_eq!(out, before);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..300), length in 0..5000_usize) {
            let _ = decompress(&bytes, &mut vec![0; length]);
            // With a valid magic more of the decoder is reached.
            let framed = [&[0x28, 0xB5, 0x2F, 0xFD][..], &bytes].concat();
            let _ = decompress(&framed, &mut vec![0; length]);
        }

        #[test]
        fn damaged_frames_never_panic(input in chunk(), at in any::<Index>(), byte in any::<u8>()) {
            let mut frame = Vec::new();
            if compress(&input, -1, &mut frame) {
                let at = at.index(frame.len());
                frame[at] = byte;
                let _ = decompress(&frame, &mut vec![0; input.len()]);
            }
        }

        #[test]
        fn one_byte_anywhere_is_not_zero(length in 1..5000_usize, at in any::<Index>(), byte in 1..=255_u8) {
            let mut bytes = vec![0; length];
            assert!(is_zero(&bytes));
            bytes[at.index(length)] = byte;
            assert!(!is_zero(&bytes));
        }
    }
}
