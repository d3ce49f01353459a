//! Zeroed memory for what is large, taken from the system page by page as it is written.

use std::fmt::Debug;
use std::marker::PhantomData;

use half::bf16;
use memmap2::{Advice, MmapMut};

/// A type of which any bits are a value.
///
/// # Safety
/// They are, and it needs no more than a page's alignment.
pub unsafe trait AnyBits: Copy + Default + Debug + Send + Sync + 'static {}

// SAFETY: numbers.
unsafe impl AnyBits for f32 {}
// SAFETY: numbers.
unsafe impl AnyBits for bf16 {}
// SAFETY: numbers.
unsafe impl AnyBits for u32 {}

/// `len` elements at the start of a page; in large pages, where the system has them, for a walk
/// through gigabytes misses the table of small ones all the time.
#[derive(Debug)]
pub struct Memory<T> {
    map: MmapMut,
    len: usize,
    elements: PhantomData<T>,
}

impl<T: AnyBits> Memory<T> {
    /// Zeros.
    ///
    /// # Errors
    /// The system's, if it has no such range.
    pub fn zeroed(len: usize) -> std::io::Result<Self> {
        let num_bytes = len.checked_mul(size_of::<T>()).ok_or(std::io::ErrorKind::OutOfMemory)?;
        let map = MmapMut::map_anon(num_bytes.max(1))?;
        #[cfg(target_os = "linux")]
        // Advice that is not taken costs time, nothing else.
        drop(map.advise(Advice::HugePage));
        Ok(Self { map, len, elements: PhantomData })
    }

    /// All of it.
    #[inline]
    pub fn as_slice(&self) -> &[T] {
        // SAFETY: the map holds `len` elements from the start of a page, zeroed or written through
        // `as_mut_slice`; any bits are a value.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().cast(), self.len) }
    }

    /// All of it.
    #[inline]
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as in `as_slice`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.map.as_mut_ptr().cast(), self.len) }
    }
}
