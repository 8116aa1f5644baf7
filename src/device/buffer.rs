//! The one module that allocates memory for direct I/O.
//!
//! An [`AlignedBuf`] is a fixed-length, zero-initialised byte buffer whose start is aligned to
//! 4096 bytes, as O_DIRECT wants it. Frozen into [`Bytes`] it can be shared by several writes.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use bytes::Bytes;

/// Alignment of every buffer, in bytes.
pub const BUFFER_ALIGN: usize = 4096;

/// Owned, zero-initialised, 4096-byte aligned memory of fixed length.
///
/// # Invariant
/// `start` points to `layout(length)` bytes allocated with that layout and owned by this value
/// alone; every byte is initialised. For `length` 0 nothing is allocated and `start` dangles.
pub struct AlignedBuf {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: by the invariant the memory is owned by this value alone, like a `Box<[u8]>`.
unsafe impl Send for AlignedBuf {}
// SAFETY: shared access only reads plain bytes.
unsafe impl Sync for AlignedBuf {}

fn layout(length: usize) -> Layout {
    Layout::from_size_align(length, BUFFER_ALIGN).expect("I/O buffers are far below isize::MAX")
}

impl AlignedBuf {
    /// Allocates `length` zero bytes.
    #[must_use]
    pub fn zeroed(length: usize) -> Self {
        if length == 0 {
            return Self { start: NonNull::dangling(), length };
        }
        // SAFETY: the layout's size is not zero.
        let start = unsafe { alloc_zeroed(layout(length)) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout(length)) };
        Self { start, length }
    }

    /// A buffer of `length` bytes that starts with `content`; the rest is zero.
    #[must_use]
    pub fn padded(content: &[u8], length: usize) -> Self {
        let mut buf = Self::zeroed(length);
        buf[..content.len()].copy_from_slice(content);
        buf
    }

    /// Shares the buffer, read-only, without copying.
    #[must_use]
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }

    /// Where the kernel reads or writes.
    pub(super) fn start_mut(&mut self) -> *mut u8 {
        self.start.as_ptr()
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: by the invariant `length` initialised bytes live at `start`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }
}

impl AsRef<[u8]> for AlignedBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        if self.length > 0 {
            // SAFETY: by the invariant `start` was allocated with this very layout.
            unsafe { dealloc(self.start.as_ptr(), layout(self.length)) };
        }
    }
}

impl std::fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.length)
    }
}

/// Whether `data` may be handed to a device as it is.
#[must_use]
pub fn is_aligned(data: &[u8]) -> bool {
    data.as_ptr().addr().is_multiple_of(BUFFER_ALIGN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_zeroed_and_shareable() {
        for length in [0, 1, 512, 4096, 70_000] {
            let mut buf = AlignedBuf::zeroed(length);
            assert!(buf.iter().all(|&byte| byte == 0));
            buf.fill(7);
            let bytes = buf.freeze();
            assert!(length == 0 || is_aligned(&bytes));
            assert_eq!(bytes.len(), length);
            assert!(bytes.iter().all(|&byte| byte == 7));
        }
    }
}
