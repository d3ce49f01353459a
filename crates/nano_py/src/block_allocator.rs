//! The block allocator, for tests and study.

use nano_core::BlockId;
use nano_core::kv_cache;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

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
    fn new(num_blocks: u32) -> Self {
        Self(kv_cache::BlockAllocator::new(num_blocks))
    }

    #[getter]
    fn num_blocks(&self) -> u32 {
        self.0.num_blocks()
    }

    #[getter]
    fn num_free(&self) -> u32 {
        self.0.num_free()
    }

    fn ref_count(&self, block: u32) -> PyResult<u32> {
        let num_blocks = self.0.num_blocks();
        if block >= num_blocks {
            let message = format!("block {block} does not exist: num_blocks is {num_blocks}");
            return Err(PyValueError::new_err(message));
        }
        Ok(self.0.ref_count(BlockId(block)))
    }

    fn allocate(&mut self) -> Option<u32> {
        self.0.allocate().map(|block| block.0)
    }

    fn retain(&mut self, block: u32) -> PyResult<()> {
        let block = self.in_use(block)?;
        self.0.retain(block);
        Ok(())
    }

    fn free(&mut self, block: u32) -> PyResult<bool> {
        let block = self.in_use(block)?;
        Ok(self.0.free(block))
    }

    fn __repr__(&self) -> String {
        let (num_blocks, num_free) = (self.0.num_blocks(), self.0.num_free());
        format!("BlockAllocator(num_blocks={num_blocks}, num_free={num_free})")
    }
}
