//! A slice that threads write parts of.

use std::marker::PhantomData;

/// A mutable slice that is lent to several threads in parts that do not overlap.
#[derive(Debug)]
pub(super) struct SharedMut<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: a thread gets parts through `slice` alone, whose caller answers for them.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), borrow: PhantomData }
    }

    /// `len` elements from `start` on.
    ///
    /// # Panics
    /// If the slice does not have them.
    ///
    /// # Safety
    /// No two parts that live at the same time overlap.
    #[inline]
    #[expect(clippy::mut_from_ref, reason = "the caller answers for it")]
    pub(super) unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "a part within the slice");
        // SAFETY: within the slice that `self` borrows exclusively; the caller vouches that no
        // other part overlaps.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}
