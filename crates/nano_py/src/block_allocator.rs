//! The block allocator, for tests and study.

use nano_core::BlockId;
use nano_core::kv_cache;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// Its books take four bytes a block.
const MAX_BLOCKS: u32 = 1 << 24;

/// Hands out the blocks `0 .. num_blocks` of a KV cache, each with a reference count.
#[pyclass(module = "nano_batch._native")]
pub(crate) struct BlockAllocator(kv_cache::BlockAllocator);

impl BlockAllocator {
    fn in_use(&self, block: u32) -> PyResult<BlockId> {
        match self.ref_count(block)? {
            0 => Err(PyValueError::new_err(format!("block {block} is free"))),
            _ => Ok(BlockId(block)),
        }
    }
}

#[pymethods]
impl BlockAllocator {
    #[new]
    fn new(num_blocks: i64) -> PyResult<Self> {
        match u32::try_from(num_blocks) {
            Ok(num_blocks) if num_blocks <= MAX_BLOCKS => {
                Ok(Self(kv_cache::BlockAllocator::new(num_blocks)))
            }
            _ => {
                let message = format!("num_blocks must be in [0, {MAX_BLOCKS}], got {num_blocks}");
                Err(PyValueError::new_err(message))
            }
        }
    }

    #[getter]
    fn num_blocks(&self) -> u32 {
        self.0.num_blocks()
    }

    #[getter]
    fn num_free(&self) -> u32 {
        self.0.num_free()
    }

    /// How many hold a block; 0 if it is free.
    fn ref_count(&self, block: u32) -> PyResult<u32> {
        let num_blocks = self.0.num_blocks();
        if block >= num_blocks {
            let message = format!("block {block} does not exist: num_blocks is {num_blocks}");
            return Err(PyValueError::new_err(message));
        }
        Ok(self.0.ref_count(BlockId(block)))
    }

    /// A free block, held once; None if there is none.
    fn allocate(&mut self) -> Option<u32> {
        self.0.allocate().map(|block| block.0)
    }

    /// Holds a block once more.
    fn retain(&mut self, block: u32) -> PyResult<()> {
        let block = self.in_use(block)?;
        self.0.retain(block);
        Ok(())
    }

    /// Holds a block once less; True if it became free.
    fn free(&mut self, block: u32) -> PyResult<bool> {
        let block = self.in_use(block)?;
        Ok(self.0.free(block))
    }

    fn __repr__(&self) -> String {
        let (num_blocks, num_free) = (self.0.num_blocks(), self.0.num_free());
        format!("BlockAllocator(num_blocks={num_blocks}, num_free={num_free})")
    }
}
