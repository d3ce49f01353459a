//! Waiting without the GIL and with an eye on Ctrl-C.

use std::panic::resume_unwind;
use std::thread;
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, bounded};
use pyo3::prelude::*;

use crate::error::to_py;

/// Bytes of a text from which on it takes tens of milliseconds and more to encode.
const LONG_TEXT: usize = 1 << 16;

/// Between two looks at signals.
pub(crate) const SIGNAL_INTERVAL: Duration = Duration::from_millis(50);

/// How long to wait before the next look at signals. They are the main thread's alone: no other has
/// a reason to wake.
pub(crate) fn interval(py: Python<'_>) -> PyResult<Duration> {
    // Of Linux: what `threading` calls so is the thread that imported it first.
    let thread: u32 = py.import("threading")?.call_method0("get_native_id")?.extract()?;
    let is_main = thread == std::process::id();
    Ok(if is_main { SIGNAL_INTERVAL } else { Duration::from_secs(3600) })
}

/// Works on a thread of its own, so that Ctrl-C ends the wait. What is ready only after that is
/// dropped there.
pub(crate) fn interruptible<T: Send + 'static>(
    py: Python<'_>,
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> PyResult<T> {
    let (ended, end) = bounded::<()>(0);
    let main = move || {
        let _ended = ended;
        work()
    };
    let worker = thread::Builder::new().name(name.to_owned()).spawn(main);
    let worker = worker.map_err(|error| to_py(py, &error.into()))?;
    let interval = interval(py)?;
    while py.detach(|| end.recv_timeout(interval)) == Err(RecvTimeoutError::Timeout) {
        py.check_signals()?;
    }
    py.detach(|| worker.join()).or_else(|panic| resume_unwind(panic))
}

/// Works without the GIL; Ctrl-C interrupts what encodes a long text.
pub(crate) fn encoding<T: Send + 'static>(
    py: Python<'_>,
    num_bytes: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> PyResult<T> {
    if num_bytes < LONG_TEXT { Ok(py.detach(work)) } else { interruptible(py, "nano-encode", work) }
}
