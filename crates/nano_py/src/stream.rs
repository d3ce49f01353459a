//! The answer to one request, as Python reads it.

use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use nano_engine::{Delta, Error, Finish, StopReason};
use pyo3::prelude::*;
use pyo3::types::PyByteArray;

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

    /// All logits of a request of logits, `[num_tokens, vocab_size]` as little-endian float32.
    fn collect_logits<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyByteArray>> {
        let logits = self.take_all(py)?.logits;
        PyByteArray::new_with(py, logits.len() * size_of::<f32>(), |bytes| {
            for (to, from) in bytes.chunks_exact_mut(size_of::<f32>()).zip(&logits) {
                to.copy_from_slice(&from.to_le_bytes());
            }
            Ok(())
        })
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
