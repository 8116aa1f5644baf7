//! The one module that allocates memory for direct I/O.
//!
//! An [`AlignedBuf`] is a fixed-length, zero-initialised byte buffer whose start is aligned to
//! 4096 bytes, as O_DIRECT wants it. Frozen into [`Bytes`] it can be shared by several writes.
//!
//! Each thread keeps some of the memory it drops for the buffers it makes next: allocators give
//! large aligned memory back to the kernel, and to fault it in again costs more than to clear it.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use bytes::Bytes;

/// Alignment of every buffer, in bytes.
pub const BUFFER_ALIGN: usize = 4096;

/// What a thread keeps of the memory it drops: two groups of rows of the default geometry.
const SPARE_BYTES_MAX: usize = 8 << 20;

/// Owned, zero-initialised, 4096-byte aligned memory of fixed length.
pub struct AlignedBuf {
    memory: Memory,
    length: usize,
}

/// # Invariant
/// `start` points to `layout(capacity)` bytes allocated with that layout and owned by this value
/// alone; every byte is initialised. For `capacity` 0 nothing is allocated and `start` dangles.
struct Memory {
    start: NonNull<u8>,
    capacity: usize,
}

// SAFETY: by the invariant the memory is owned by this value alone, like a `Box<[u8]>`.
unsafe impl Send for Memory {}
// SAFETY: shared access only reads plain bytes.
unsafe impl Sync for Memory {}

fn layout(capacity: usize) -> Layout {
    Layout::from_size_align(capacity, BUFFER_ALIGN).expect("I/O buffers are far below isize::MAX")
}

impl Memory {
    fn zeroed(capacity: usize) -> Self {
        if capacity == 0 {
            return Self { start: NonNull::dangling(), capacity };
        }
        // SAFETY: the layout's size is not zero.
        let start = unsafe { alloc_zeroed(layout(capacity)) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout(capacity)) };
        Self { start, capacity }
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: by the invariant `capacity` initialised bytes live at `start`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.capacity) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.capacity) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.capacity > 0 {
            // SAFETY: by the invariant `start` was allocated with this very layout.
            unsafe { dealloc(self.start.as_ptr(), layout(self.capacity)) };
        }
    }
}

thread_local! {
    static SPARE: RefCell<Spare> = const { RefCell::new(Spare { kept: VecDeque::new(), bytes: 0 }) };
}

/// Memory kept for later, the oldest first.
struct Spare {
    kept: VecDeque<Memory>,
    /// Together; at most [`SPARE_BYTES_MAX`].
    bytes: usize,
}

impl Spare {
    /// Memory of at least `length` bytes, and less than twice as many, with any content.
    fn take(&mut self, length: usize) -> Option<Memory> {
        let fits = |memory: &Memory| (length..2 * length).contains(&memory.capacity);
        let memory = self.kept.remove(self.kept.iter().rposition(fits)?)?;
        self.bytes -= memory.capacity;
        Some(memory)
    }

    fn keep(&mut self, memory: Memory) {
        if !(BUFFER_ALIGN..=SPARE_BYTES_MAX).contains(&memory.capacity) {
            return;
        }
        self.bytes += memory.capacity;
        self.kept.push_back(memory);
        while self.bytes > SPARE_BYTES_MAX
            && let Some(oldest) = self.kept.pop_front()
        {
            self.bytes -= oldest.capacity;
        }
    }
}

impl AlignedBuf {
    /// Makes `length` zero bytes.
    #[must_use]
    pub fn zeroed(length: usize) -> Self {
        // A thread that ends has none any more.
        let spare = SPARE.try_with(|spare| spare.borrow_mut().take(length)).ok().flatten();
        let memory = match spare {
            Some(mut memory) => {
                memory.bytes_mut()[..length].fill(0);
                memory
            }
            None => Memory::zeroed(length),
        };
        Self { memory, length }
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
        self.memory.start.as_ptr()
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory.bytes()[..self.length]
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory.bytes_mut()[..self.length]
    }
}

impl AsRef<[u8]> for AlignedBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        let nothing = Memory { start: NonNull::dangling(), capacity: 0 };
        let memory = std::mem::replace(&mut self.memory, nothing);
        let _ = SPARE.try_with(|spare| spare.borrow_mut().keep(memory));
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

    #[test]
    fn memory_is_used_again_cleared_and_not_hoarded() {
        let mut first = AlignedBuf::zeroed(70_000);
        first.fill(7);
        let address = first.as_ptr();
        drop(first);
        let second = AlignedBuf::zeroed(65_536);
        assert_eq!(second.as_ptr(), address);
        assert!(second.len() == 65_536 && second.iter().all(|&byte| byte == 0));
        // Too large for a small one, which would hold on to it.
        drop(second);
        assert_ne!(AlignedBuf::zeroed(4096).as_ptr(), address);

        let many: Vec<_> = (0..3).map(|_| AlignedBuf::zeroed(SPARE_BYTES_MAX / 2)).collect();
        drop(many);
        drop(AlignedBuf::zeroed(SPARE_BYTES_MAX + 1));
        SPARE.with_borrow(|spare| {
            assert_eq!(spare.bytes, SPARE_BYTES_MAX);
            assert_eq!(spare.kept.iter().map(|memory| memory.capacity).sum::<usize>(), spare.bytes);
        });
    }
}
