//! The answer to one request, as Python reads it.

use std::ffi::c_int;
use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use nano_engine::{Delta, Error, Finish, StopReason};
use pyo3::ffi;
use pyo3::prelude::*;

use crate::error::to_py;
use crate::signals::interval;

/// `(token_ids, text, finish_reason, stop_reason, first_token_s, last_token_s)`.
type DeltaTuple = (Vec<u32>, String, Option<&'static str>, Option<Py<PyAny>>, f64, f64);

/// Reads deltas; dropping it aborts the request.
#[pyclass(frozen, module = "nano_batch._native")]
pub(crate) struct RequestStream(pub(crate) nano_engine::RequestStream);

/// What waits for `T`, or takes it, until a deadline.
type Read<T> = fn(&nano_engine::RequestStream, Instant) -> Result<Poll<T>, Arc<Error>>;

impl RequestStream {
    /// Waits without the GIL and lets Ctrl-C through before anything is taken: what is taken is lost
    /// if Python raises next.
    fn take<T>(&self, py: Python<'_>, wait: Read<()>, take: Read<T>) -> PyResult<T> {
        let interval = interval(py)?;
        loop {
            let ready = py.detach(|| wait(&self.0, Instant::now() + interval));
            py.check_signals()?;
            if ready.map_err(|error| to_py(py, &error))?.is_pending() {
                continue;
            }
            // Pending too where another reader was quicker.
            let taken = take(&self.0, Instant::now());
            if let Poll::Ready(it) = taken.map_err(|error| to_py(py, &error))? {
                return Ok(it);
            }
        }
    }

    fn take_all(&self, py: Python<'_>) -> PyResult<Delta> {
        self.take(py, nano_engine::RequestStream::await_end, nano_engine::RequestStream::collect)
    }
}

#[pymethods]
impl RequestStream {
    #[getter]
    fn request_id(&self) -> String {
        self.0.id().to_string()
    }

    #[getter]
    fn prompt_token_ids(&self) -> Vec<u32> {
        self.0.prompt_token_ids().iter().map(|token| token.0).collect()
    }

    /// The next delta, or `None` after the last.
    fn next(&self, py: Python<'_>) -> PyResult<Option<DeltaTuple>> {
        let (wait, take) =
            (nano_engine::RequestStream::await_news, nano_engine::RequestStream::next);
        let delta = self.take(py, wait, take)?;
        delta.map(|delta| to_tuple(py, delta)).transpose()
    }

    /// Everything up to the end as one delta.
    fn collect(&self, py: Python<'_>) -> PyResult<DeltaTuple> {
        to_tuple(py, self.take_all(py)?)
    }

    /// Ends the request, if it has not ended.
    fn abort(&self) {
        self.0.abort();
    }

    /// All logits of a request of logits, `[num_tokens, vocab_size]`.
    fn collect_logits(&self, py: Python<'_>) -> PyResult<Logits> {
        Ok(Logits(self.take_all(py)?.logits))
    }
}

/// Float32 numbers that Python reads and writes where they lie: gigabytes, at times, whose copy would
/// hold the GIL.
#[pyclass(module = "nano_batch._native")]
pub(crate) struct Logits(Vec<f32>);

#[pymethods]
impl Logits {
    /// # Safety
    /// Python's: `view` is one to fill.
    unsafe fn __getbuffer__(
        slf: &Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let mut logits = slf.borrow_mut();
        let len = size_of_val(&logits.0[..]) as ffi::Py_ssize_t;
        let start = logits.0.as_mut_ptr().cast();
        // SAFETY: the view holds on to the object, whose numbers nothing in Rust touches or moves
        // until it is dropped.
        let filled = unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), start, len, 0, flags) };
        if filled == 0 { Ok(()) } else { Err(PyErr::fetch(slf.py())) }
    }
}

fn to_tuple(py: Python<'_>, delta: Delta) -> PyResult<DeltaTuple> {
    let stop_reason = match &delta.finish {
        Some(Finish::Stop(Some(StopReason::Token(token)))) => {
            Some(token.0.into_pyobject(py)?.into_any().unbind())
        }
        Some(Finish::Stop(Some(StopReason::Text(stop)))) => {
            Some(stop.into_pyobject(py)?.into_any().unbind())
        }
        _ => None,
    };
    Ok((
        delta.token_ids.into_iter().map(|token| token.0).collect(),
        delta.text,
        delta.finish.as_ref().map(Finish::name),
        stop_reason,
        delta.timing.first_token.as_secs_f64(),
        delta.timing.last_token.as_secs_f64(),
    ))
}
