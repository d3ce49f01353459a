//! `nano_batch._native`: what Python cannot do itself.
//!
//! Values are extracted with the GIL held and everything that waits runs without it. Default
//! models, progress bars and result objects are Python's business.

mod block_allocator;
mod engine;
mod error;
mod log_thread;
mod sampling_params;
mod signals;
mod stream;

use pyo3::prelude::*;

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    log_thread::install(module.py())?;
    let end = wrap_pyfunction!(log_thread::end, module)?;
    module.py().import("atexit")?.call_method1("register", (end,))?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<block_allocator::BlockAllocator>()?;
    module.add_class::<engine::Engine>()?;
    module.add_class::<engine::Tokenizer>()?;
    module.add_class::<stream::RequestStream>()?;
    module.add_function(wrap_pyfunction!(sampling_params::check_sampling_params, module)?)?;
    Ok(())
}
