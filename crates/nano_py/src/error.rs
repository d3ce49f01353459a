//! Rust's errors as the exceptions of `nano_batch.exceptions`.

use nano_engine::Error;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyString;

/// The exception of an error, with its stable word as `code`.
pub(crate) fn to_py(py: Python<'_>, error: &Error) -> PyErr {
    let class = match error {
        Error::Core(nano_core::Error::ExecutorFailed { .. })
        | Error::EngineFailed { .. }
        | Error::Thread(_) => "EngineFailedError",
        Error::Text(
            nano_text::Error::TokenizerUnreadable { .. }
            | nano_text::Error::TokenizerInvalid { .. },
        ) => "ModelLoadError",
        Error::Core(nano_core::Error::LogitsNotFinite { .. })
        | Error::Text(nano_text::Error::DecodeFailed { .. })
        | Error::TextFailed { .. } => "RequestFailedError",
        Error::Core(_)
        | Error::Text(_)
        | Error::Model(nano_model::Error::BadOption { .. })
        | Error::TextTooLong { .. }
        | Error::LogitsTooLarge { .. }
        | Error::UnknownRequest { .. } => "InvalidRequestError",
        Error::Model(_) => "ModelLoadError",
        Error::EngineClosed | Error::UsedAfterFork { .. } => "EngineClosedError",
        _ => "NanoBatchError",
    };
    exception(py, class, &error.to_string(), error.code())
}

/// An `InvalidRequestError` for what never reached the engine.
pub(crate) fn invalid(py: Python<'_>, message: &str, code: &str) -> PyErr {
    exception(py, "InvalidRequestError", message, code)
}

/// What a `str` says. One with lone surrogates, as undecodable bytes become on a command line,
/// has no UTF-8 and is refused by position.
pub(crate) fn plain_text<'a>(
    text: &'a Bound<'_, PyString>,
    name: &str,
    code: &str,
) -> PyResult<&'a str> {
    text.to_str().map_err(|error| {
        let py = text.py();
        let Ok(position) = error.value(py).getattr("start") else { return error };
        let message = format!("{name} has a lone surrogate, no character, at position {position}");
        invalid(py, &message, code)
    })
}

fn exception(py: Python<'_>, class: &str, message: &str, code: &str) -> PyErr {
    let made = py
        .import("nano_batch.exceptions")
        .and_then(|module| module.getattr(class))
        .and_then(|class| class.call1((message, code)));
    match made {
        Ok(exception) => PyErr::from_value(exception),
        Err(_) => PyRuntimeError::new_err(message.to_owned()),
    }
}
