//! Blocks and their reference counts.
//!
//! The allocator knows neither sequences nor tokens. A block is free exactly when its reference
//! count is 0.

use crate::ids::BlockId;

/// Hands out the blocks `0 .. num_blocks`, each with a reference count.
#[derive(Clone, Debug)]
pub struct BlockAllocator {
    ref_counts: Vec<u32>,
    /// The free blocks; the one freed last is handed out first, while it is still warm in caches.
    free: Vec<BlockId>,
}

impl BlockAllocator {
    /// An allocator with all of its `num_blocks` blocks free.
    pub fn new(num_blocks: u32) -> Self {
        Self {
            ref_counts: vec![0; num_blocks as usize],
            free: (0..num_blocks).rev().map(BlockId).collect(),
        }
    }

    /// Blocks in all.
    pub fn num_blocks(&self) -> u32 {
        self.ref_counts.len() as u32
    }

    /// Blocks that nobody holds.
    pub fn num_free(&self) -> u32 {
        self.free.len() as u32
    }

    /// Holders of `block`.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn ref_count(&self, block: BlockId) -> u32 {
        self.ref_counts[block.index()]
    }

    /// A free block with its reference count set to 1, or `None` when none is left.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let block = self.free.pop()?;
        self.ref_counts[block.index()] = 1;
        Some(block)
    }

    /// Adds a holder to a block in use.
    ///
    /// # Panics
    /// If the block is free: whoever shares a block must know one of its holders.
    pub fn retain(&mut self, block: BlockId) {
        let count = &mut self.ref_counts[block.index()];
        assert!(*count > 0, "block {} is free and cannot be shared", block.0);
        *count += 1;
    }

    /// Takes a holder away and returns whether the block became free.
    ///
    /// # Panics
    /// If the block is free already: a block freed twice would soon be owned twice.
    pub fn free(&mut self, block: BlockId) -> bool {
        let count = &mut self.ref_counts[block.index()];
        assert!(*count > 0, "block {} is freed twice", block.0);
        *count -= 1;
        let is_free = *count == 0;
        if is_free {
            self.free.push(block);
        }
        is_free
    }

    /// Checks that the free list holds each block with reference count 0 exactly once.
    ///
    /// # Panics
    /// If it does not. For tests; costs a pass over all blocks.
    pub fn check_invariants(&self) {
        let mut listed = vec![false; self.ref_counts.len()];
        for block in &self.free {
            assert!(!listed[block.index()], "block {} is in the free list twice", block.0);
            listed[block.index()] = true;
        }
        for (index, (&count, &listed)) in self.ref_counts.iter().zip(&listed).enumerate() {
            assert_eq!(count == 0, listed, "block {index} has {count} holders, free: {listed}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_blocks_are_handed_out_once_and_then_none() {
        let mut allocator = BlockAllocator::new(3);
        let mut blocks: Vec<_> = std::iter::from_fn(|| allocator.allocate()).collect();
        blocks.sort_unstable();
        assert_eq!(blocks, [BlockId(0), BlockId(1), BlockId(2)]);
        assert_eq!((allocator.num_free(), allocator.num_blocks()), (0, 3));
        allocator.check_invariants();
    }

    #[test]
    fn a_shared_block_is_free_after_its_last_holder() {
        let mut allocator = BlockAllocator::new(1);
        let block = allocator.allocate().unwrap();
        allocator.retain(block);
        assert_eq!(allocator.ref_count(block), 2);
        assert!(!allocator.free(block));
        assert_eq!(allocator.num_free(), 0);
        assert!(allocator.free(block));
        assert_eq!((allocator.ref_count(block), allocator.num_free()), (0, 1));
        allocator.check_invariants();
    }

    #[test]
    fn the_block_freed_last_is_handed_out_first() {
        let mut allocator = BlockAllocator::new(4);
        let first = allocator.allocate().unwrap();
        let second = allocator.allocate().unwrap();
        allocator.free(second);
        allocator.free(first);
        assert_eq!(allocator.allocate(), Some(first));
    }

    #[test]
    #[should_panic(expected = "block 0 is freed twice")]
    fn freeing_twice_panics() {
        let mut allocator = BlockAllocator::new(1);
        let block = allocator.allocate().unwrap();
        allocator.free(block);
        allocator.free(block);
    }

    #[test]
    #[should_panic(expected = "block 0 is free and cannot be shared")]
    fn sharing_a_free_block_panics() {
        BlockAllocator::new(1).retain(BlockId(0));
    }

    #[test]
    #[should_panic(expected = "in the free list twice")]
    fn the_check_sees_a_block_listed_twice() {
        let mut allocator = BlockAllocator::new(2);
        allocator.free.push(BlockId(0));
        allocator.check_invariants();
    }

    #[test]
    #[should_panic(expected = "block 1 has 0 holders")]
    fn the_check_sees_a_lost_block() {
        let mut allocator = BlockAllocator::new(2);
        allocator.free.retain(|block| block.0 == 0);
        allocator.check_invariants();
    }
}
