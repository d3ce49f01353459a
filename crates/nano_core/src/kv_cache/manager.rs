//! Blocks for sequences, and the rule for steps in flight.
//!
//! A block freed while a step in flight names it is not handed out again until that step is
//! collected: the device may still be writing to it.

use std::collections::VecDeque;

use crate::ids::BlockId;
use crate::kv_cache::block_allocator::BlockAllocator;

/// The blocks of one sequence, in the order of its positions: position `p` lives in entry
/// `p / block_size`.
pub type BlockTable = Vec<BlockId>;

/// Allocates and frees the blocks of sequences.
#[derive(Debug)]
pub struct KvCacheManager {
    allocator: BlockAllocator,
    block_size: u32,
    /// Blocks that become free once a step is collected, ascending by that step.
    pending: VecDeque<(u64, BlockTable)>,
    last_collected: u64,
}

impl KvCacheManager {
    /// A cache of `num_blocks` free blocks with `block_size` token slots each.
    pub fn new(num_blocks: u32, block_size: u32) -> Self {
        Self {
            allocator: BlockAllocator::new(num_blocks),
            block_size,
            pending: VecDeque::new(),
            last_collected: 0,
        }
    }

    /// The allocator underneath.
    pub fn allocator(&self) -> &BlockAllocator {
        &self.allocator
    }

    /// Blocks that become free once the steps in flight are collected.
    pub fn num_pending(&self) -> u32 {
        self.pending.iter().map(|(_, blocks)| blocks.len() as u32).sum()
    }

    /// Blocks that `table` lacks to hold `num_tokens` tokens.
    pub fn num_missing(&self, table: &BlockTable, num_tokens: u32) -> u32 {
        num_tokens.div_ceil(self.block_size).saturating_sub(table.len() as u32)
    }

    /// Extends `table` to hold `num_tokens` tokens; returns false, and changes nothing, when the
    /// free blocks do not suffice.
    #[must_use]
    pub fn allocate(&mut self, table: &mut BlockTable, num_tokens: u32) -> bool {
        let missing = self.num_missing(table, num_tokens);
        if missing > self.allocator.num_free() {
            return false;
        }
        table.extend((0..missing).map_while(|_| self.allocator.allocate()));
        true
    }

    /// Gives the blocks of `table` back, the tail first, once step `last_step` (the last one that
    /// names them) is collected; at once if it has been.
    pub fn free(&mut self, table: BlockTable, last_step: u64) {
        let place = self.pending.partition_point(|(step, _)| *step <= last_step);
        self.pending.insert(place, (last_step, table));
        self.release();
    }

    /// Notes that the results of `step` are in; steps are collected in order.
    pub fn step_collected(&mut self, step: u64) {
        self.last_collected = step;
        self.release();
    }

    fn release(&mut self) {
        let collected = self.pending.partition_point(|(step, _)| *step <= self.last_collected);
        for block in
            self.pending.drain(..collected).flat_map(|(_, blocks)| blocks.into_iter().rev())
        {
            self.allocator.free(block);
        }
    }

    /// Checks that every block is held exactly as often as `tables` and the pending blocks say.
    ///
    /// # Panics
    /// If one is not. For tests; costs a pass over all blocks.
    pub fn check_invariants<'a>(&'a self, tables: impl Iterator<Item = &'a BlockTable>) {
        self.allocator.check_invariants();
        let mut holders = vec![0; self.allocator.num_blocks() as usize];
        let pending = self.pending.iter().map(|(_, blocks)| blocks);
        for block in tables.chain(pending).flatten() {
            holders[block.index()] += 1;
        }
        for (index, &holders) in holders.iter().enumerate() {
            let counted = self.allocator.ref_count(BlockId(index as u32));
            assert_eq!(counted, holders, "block {index}: counted and actual holders differ");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_grows_by_whole_blocks_only_when_a_token_needs_one() {
        let mut cache = KvCacheManager::new(4, 4);
        let mut table = BlockTable::new();
        for (num_tokens, num_blocks) in [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)] {
            assert!(cache.allocate(&mut table, num_tokens));
            assert_eq!(table.len(), num_blocks, "{num_tokens} tokens");
        }
        cache.check_invariants(std::iter::once(&table));
    }

    #[test]
    fn a_failed_allocation_changes_nothing() {
        let mut cache = KvCacheManager::new(2, 4);
        let mut table = BlockTable::new();
        assert!(cache.allocate(&mut table, 4));
        assert!(!cache.allocate(&mut table, 13));
        assert_eq!((table.len(), cache.allocator().num_free()), (1, 1));
        assert!(cache.allocate(&mut table, 8));
    }

    #[test]
    fn a_block_named_by_a_step_in_flight_stays_taken_until_it_is_collected() {
        let mut cache = KvCacheManager::new(3, 4);
        let (mut first, mut second) = (BlockTable::new(), BlockTable::new());
        assert!(cache.allocate(&mut first, 4) && cache.allocate(&mut second, 8));
        cache.free(second, 2);
        cache.free(first, 1);
        assert_eq!((cache.allocator().num_free(), cache.num_pending()), (0, 3));
        cache.check_invariants(std::iter::empty());
        cache.step_collected(1);
        assert_eq!((cache.allocator().num_free(), cache.num_pending()), (1, 2));
        cache.step_collected(2);
        assert_eq!((cache.allocator().num_free(), cache.num_pending()), (3, 0));
        cache.check_invariants(std::iter::empty());
    }

    #[test]
    fn a_block_of_a_collected_step_is_free_at_once_and_the_head_is_reused_first() {
        let mut cache = KvCacheManager::new(3, 4);
        let mut table = BlockTable::new();
        assert!(cache.allocate(&mut table, 12));
        let head = table[0];
        cache.step_collected(7);
        cache.free(table, 7);
        assert_eq!((cache.allocator().num_free(), cache.num_pending()), (3, 0));
        let mut next = BlockTable::new();
        assert!(cache.allocate(&mut next, 1));
        assert_eq!(next, [head]);
    }

    #[test]
    #[should_panic(expected = "counted and actual holders differ")]
    fn the_check_sees_a_block_that_no_table_holds() {
        let mut cache = KvCacheManager::new(1, 4);
        assert!(cache.allocate(&mut BlockTable::new(), 1));
        cache.check_invariants(std::iter::empty());
    }
}
