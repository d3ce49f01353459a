//! The answer to one request, as Python reads it.

use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use nano_engine::{Delta, Error, Finish, StopReason};
use pyo3::prelude::*;
use pyo3::types::PyByteArray;

use crate::error::to_py;

/// How often a waiting thread looks whether Ctrl-C was pressed.
pub(crate) const SIGNAL_INTERVAL: Duration = Duration::from_millis(50);

/// `(token_ids, text, finish_reason, stop_reason, first_token_s, last_token_s)`.
type DeltaTuple = (Vec<u32>, String, Option<&'static str>, Option<Py<PyAny>>, f64, f64);

/// Reads deltas; dropping it aborts the request.
#[pyclass(frozen, module = "nano_batch._native")]
pub(crate) struct RequestStream(nano_engine::RequestStream);

impl RequestStream {
    pub(crate) fn new(stream: nano_engine::RequestStream) -> Self {
        Self(stream)
    }

    /// Waits for `read` without the GIL and lets Ctrl-C through, which takes nothing away.
    fn wait<T: Send>(
        &self,
        py: Python<'_>,
        read: impl Fn(&nano_engine::RequestStream, Instant) -> Result<Poll<T>, Arc<Error>> + Sync,
    ) -> PyResult<T> {
        loop {
            match py.detach(|| read(&self.0, Instant::now() + SIGNAL_INTERVAL)) {
                Ok(Poll::Ready(it)) => return Ok(it),
                Ok(Poll::Pending) => py.check_signals()?,
                Err(error) => return Err(to_py(py, &error)),
            }
        }
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
        let delta = self.wait(py, nano_engine::RequestStream::next)?;
        delta.map(|delta| to_tuple(py, delta)).transpose()
    }

    /// Everything up to the end as one delta.
    fn collect(&self, py: Python<'_>) -> PyResult<DeltaTuple> {
        let all = self.wait(py, nano_engine::RequestStream::collect)?;
        to_tuple(py, all)
    }

    /// Ends the request, if it has not ended.
    fn abort(&self) {
        self.0.abort();
    }

    /// All logits of a request of logits, `[num_tokens, vocab_size]` as little-endian float32.
    fn collect_logits<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyByteArray>> {
        let logits = self.wait(py, nano_engine::RequestStream::collect)?.logits;
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
