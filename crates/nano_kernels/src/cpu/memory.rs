//! Zeroed memory for what is large, taken from the system page by page as it is written.

use std::sync::Arc;

use memmap2::{Advice, MmapMut, MmapRaw};

/// Bytes of a line of any cache: what is handed out starts with one.
const LINE: usize = 64;
/// Bytes of a large page.
const LARGE_PAGE: usize = 2 << 20;
/// Bytes that an arena asks for at once, at least. What is never written takes none.
const ARENA_BYTES: usize = 64 << 20;

/// `len` words, in large pages, where the system has them: a walk through gigabytes misses the
/// table of small ones all the time.
#[derive(Debug)]
pub struct Memory {
    map: Arc<MmapRaw>,
    /// Bytes before the first word, a multiple of [`LINE`].
    start: usize,
    len: usize,
}

impl Memory {
    /// All of it.
    #[inline]
    pub fn as_slice(&self) -> &[u32] {
        // SAFETY: the map holds `len` words there that are this memory's alone, zeroed or written
        // through `as_mut_slice`; any bits are a value.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().add(self.start).cast(), self.len) }
    }

    /// All of it.
    #[inline]
    pub fn as_mut_slice(&mut self) -> &mut [u32] {
        // SAFETY: as in `as_slice`, and the borrow is exclusive.
        unsafe {
            std::slice::from_raw_parts_mut(self.map.as_mut_ptr().add(self.start).cast(), self.len)
        }
    }
}

/// Hands out memory for what lives as long as a model, side by side: large pages have no room in
/// what is smaller, nor at the ends of what is not.
#[derive(Debug, Default)]
pub struct Arena {
    map: Option<Arc<MmapRaw>>,
    /// Bytes of it that are given out.
    used: usize,
}

impl Arena {
    /// Zeros.
    ///
    /// # Errors
    /// The system's, if it has no such range.
    pub fn zeroed(&mut self, len: usize) -> std::io::Result<Memory> {
        let num_bytes = num_bytes(len)?;
        let map = match &self.map {
            Some(map) if map.len() - self.used >= num_bytes => map,
            _ => {
                let new = map(num_bytes.saturating_add(LARGE_PAGE).max(ARENA_BYTES))?;
                self.used = new.as_ptr().align_offset(LARGE_PAGE);
                self.map.insert(new)
            }
        };
        let (map, start) = (Arc::clone(map), self.used);
        self.used += num_bytes;
        Ok(Memory { map, start, len })
    }

    /// Takes back what it gave last.
    ///
    /// # Panics
    /// If it was not the last, or another's.
    pub(super) fn take_back(&mut self, mut last: Memory) {
        let is_own = self.map.as_ref().is_some_and(|map| Arc::ptr_eq(map, &last.map));
        let end = num_bytes(last.len).map(|len| last.start + len).ok();
        assert!(is_own && end == Some(self.used), "the arena's last memory");
        last.as_mut_slice().fill(0);
        self.used = last.start;
    }
}

/// Bytes of `len` words, whole lines.
fn num_bytes(len: usize) -> std::io::Result<usize> {
    let num_bytes = len.checked_mul(size_of::<u32>());
    let lines = num_bytes.and_then(|it| it.max(1).checked_next_multiple_of(LINE));
    lines.ok_or_else(|| std::io::ErrorKind::OutOfMemory.into())
}

fn map(num_bytes: usize) -> std::io::Result<Arc<MmapRaw>> {
    let map = MmapMut::map_anon(num_bytes)?;
    #[cfg(target_os = "linux")]
    // Advice that is not taken costs time, nothing else.
    drop(map.advise(Advice::HugePage));
    Ok(Arc::new(map.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arena_hands_out_zeros_that_are_nobody_elses() {
        let mut arena = Arena::default();
        let lens = [0, 1, 17, 1000, ARENA_BYTES / 4 + 1, 3];
        let mut all: Vec<Memory> = lens.map(|len| arena.zeroed(len).unwrap()).into();
        for (index, memory) in all.iter_mut().enumerate() {
            assert!(memory.as_slice().iter().all(|&it| it == 0));
            memory.as_mut_slice().fill(index as u32 + 1);
        }
        for (index, (memory, len)) in all.iter().zip(lens).enumerate() {
            assert_eq!(memory.as_slice().len(), len);
            assert!(memory.as_slice().iter().all(|&it| it == index as u32 + 1));
            assert!(memory.as_slice().as_ptr().addr().is_multiple_of(LINE));
        }
        let last = all.pop().unwrap();
        let place = last.as_slice().as_ptr();
        arena.take_back(last);
        let again = arena.zeroed(3).unwrap();
        assert_eq!((again.as_slice(), again.as_slice().as_ptr()), (&[0; 3][..], place));
        assert!(arena.zeroed(usize::MAX / 2).is_err());
        let not_last = || {
            let mut arena = Arena::default();
            let first = arena.zeroed(3).unwrap();
            let _last = arena.zeroed(3).unwrap();
            arena.take_back(first);
        };
        assert!(std::panic::catch_unwind(not_last).is_err());
    }
}
