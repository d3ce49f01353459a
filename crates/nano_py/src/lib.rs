//! `nano_batch._native`: what Python cannot do itself.
//!
//! Values are extracted with the GIL held and everything that waits runs without it. Default
//! models, progress bars and result objects are Python's business.

mod block_allocator;
mod engine;
mod error;
mod sampling_params;
mod signals;
mod stream;

use pyo3::prelude::*;

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    // A second import in one process keeps the first logger.
    let _ = pyo3_log::try_init();
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<block_allocator::BlockAllocator>()?;
    module.add_class::<engine::Engine>()?;
    module.add_class::<engine::Tokenizer>()?;
    module.add_class::<stream::RequestStream>()?;
    module.add_function(wrap_pyfunction!(sampling_params::check_sampling_params, module)?)?;
    Ok(())
}
