//! Who owns which block of the KV cache.

pub mod block_allocator;
pub mod manager;

pub use block_allocator::BlockAllocator;
pub use manager::{BlockTable, KvCacheManager};
