//! `Engine`: a running engine behind Python's wrapper of the same name.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nano_core::{RequestId, TokenId};
use nano_engine::Error;
use nano_model::{DeviceChoice, Dtype, ModelOptions};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};

use crate::error::{invalid, plain_text, to_py};
use crate::log_thread;
use crate::sampling_params::SamplingParams;
use crate::signals::{encoding, interruptible};
use crate::stream::RequestStream;

/// A prompt as Python spells it.
#[derive(FromPyObject)]
enum PyPrompt<'py> {
    Text(Bound<'py, PyString>),
    Tokens(Vec<i64>),
}

/// A running engine.
#[pyclass(frozen, module = "nano_batch._native")]
pub(crate) struct Engine(Arc<nano_engine::Engine>);

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (model_dir, *, device, dtype, max_model_len, gpu_memory_utilization, max_num_seqs,
        max_num_batched_tokens, block_size, num_blocks, kv_cache_bytes, num_threads, max_itl_ns,
        deterministic, seed, dummy_weights))]
    #[expect(clippy::too_many_arguments, reason = "the keywords of a Python constructor")]
    fn new(
        py: Python<'_>,
        model_dir: PathBuf,
        device: &str,
        dtype: &str,
        max_model_len: Option<u32>,
        gpu_memory_utilization: f64,
        max_num_seqs: u32,
        max_num_batched_tokens: Option<u32>,
        block_size: u32,
        num_blocks: Option<u32>,
        kv_cache_bytes: Option<u64>,
        num_threads: Option<usize>,
        max_itl_ns: Option<u64>,
        deterministic: bool,
        seed: i64,
        dummy_weights: bool,
    ) -> PyResult<Self> {
        let dtype = match dtype {
            "float32" => Some(Dtype::Float32),
            "bfloat16" => Some(Dtype::BFloat16),
            _ => None,
        };
        let numbered = || device.strip_prefix("cuda:")?.parse().ok().map(DeviceChoice::Cuda);
        let device = match device {
            "auto" => DeviceChoice::Auto,
            "cpu" => DeviceChoice::Cpu,
            "cuda" => DeviceChoice::Cuda(0),
            _ => numbered().ok_or_else(|| {
                let message = format!("device must be auto, cpu, cuda or cuda:N, got {device:?}");
                invalid(py, &message, "invalid_config")
            })?,
        };
        let options = ModelOptions {
            device,
            gpu_memory_utilization,
            deterministic,
            max_num_seqs,
            max_num_batched_tokens,
            max_itl: max_itl_ns.map(Duration::from_nanos),
            dtype,
            dummy_weights,
            block_size,
            num_blocks,
            kv_cache_bytes,
            num_threads,
            seed: seed as u64,
            max_model_len,
        };
        // An engine that is ready only after Ctrl-C is dropped by its loader.
        log_thread::start().map_err(|error| to_py(py, &error.into()))?;
        let load = move || nano_engine::Engine::load(model_dir, options);
        let engine = interruptible(py, "nano-load", load)?;
        log_thread::flush(py)?;
        let engine = engine.map_err(|error| to_py(py, &error))?;
        Ok(Self(Arc::new(engine)))
    }

    /// Submits a request and returns at once.
    fn submit(
        &self,
        py: Python<'_>,
        prompt: PyPrompt<'_>,
        params: SamplingParams<'_>,
    ) -> PyResult<RequestStream> {
        let (params, text_options) = params.checked(py)?;
        let prompt = match prompt {
            PyPrompt::Text(text) => {
                let text = plain_text(&text, "prompt", "invalid_prompt")?.to_owned();
                let engine = Arc::clone(&self.0);
                let tokens = encoding(py, text.len(), move || engine.encode(&text))?;
                tokens.map_err(|error| to_py(py, &error))?
            }
            PyPrompt::Tokens(tokens) => checked(py, &tokens, self.vocab_size())?,
        };
        let stream = py.detach(|| self.0.submit(prompt, params, text_options.as_ref()));
        stream.map(RequestStream).map_err(|error| to_py(py, &error))
    }

    /// Submits a request for the logits at every position.
    #[expect(clippy::needless_pass_by_value, reason = "what pyo3 extracts")]
    fn submit_logits(&self, py: Python<'_>, token_ids: Vec<i64>) -> PyResult<RequestStream> {
        let token_ids = checked(py, &token_ids, self.vocab_size())?;
        let stream = py.detach(|| self.0.logits(token_ids));
        stream.map(RequestStream).map_err(|error| to_py(py, &error))
    }

    /// Aborts a request by the id of its stream.
    fn abort(&self, py: Python<'_>, request_id: &str) -> PyResult<()> {
        let aborted = match request_id.parse() {
            Ok(id) if RequestId(id).to_string() == request_id => self.0.abort(RequestId(id)),
            _ => Err(Error::UnknownRequest { id: request_id.to_owned() }),
        };
        aborted.map_err(|error| to_py(py, &error))
    }

    /// `(num_running, num_waiting, num_free_blocks, num_preemptions)`.
    fn stats(&self, py: Python<'_>) -> PyResult<(u32, u32, u32, u64)> {
        let stats = self.0.stats().map_err(|error| to_py(py, &error))?;
        Ok((stats.num_running, stats.num_waiting, stats.num_free_blocks, stats.num_preemptions))
    }

    /// The tokenizer; raises if the model has none.
    fn tokenizer(&self, py: Python<'_>) -> PyResult<Tokenizer> {
        let inner = self.0.tokenizer().map_err(|error| to_py(py, &error))?.clone();
        let num_tokens = self.vocab_size().max(inner.vocab_size() as u32);
        Ok(Tokenizer { inner, num_tokens })
    }

    /// What holds when no sampling parameters are given: those of `generation_config.json`.
    fn default_sampling_params<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let defaults = PyDict::new(py);
        let found = &self.0.model().generation;
        let numbers =
            [("temperature", found.temperature), ("top_p", found.top_p), ("min_p", found.min_p)];
        for (name, value) in numbers {
            value.map_or(Ok(()), |value| defaults.set_item(name, value))?;
        }
        for (name, value) in [("top_k", found.top_k), ("max_tokens", found.max_tokens)] {
            value.map_or(Ok(()), |value| defaults.set_item(name, value))?;
        }
        Ok(defaults)
    }

    #[getter]
    fn vocab_size(&self) -> u32 {
        self.0.model().request_limits.vocab_size
    }

    #[getter]
    fn max_model_len(&self) -> u32 {
        self.0.model().request_limits.max_model_len
    }

    #[getter]
    fn num_blocks(&self) -> u32 {
        self.0.model().request_limits.num_blocks
    }

    #[getter]
    fn block_size(&self) -> u32 {
        self.0.model().request_limits.block_size
    }

    #[getter]
    fn device(&self) -> &str {
        &self.0.model().device
    }

    #[getter]
    fn dtype(&self) -> &'static str {
        self.0.model().dtype
    }

    #[getter]
    fn weight_bytes(&self) -> u64 {
        self.0.model().weight_bytes
    }

    /// Ends every stream, stops the threads and gives the memory back.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.0.close());
        log_thread::flush(py)
    }
}

/// Token ids below `vocab_size`.
fn checked(py: Python<'_>, tokens: &[i64], vocab_size: u32) -> PyResult<Vec<TokenId>> {
    let checked = tokens.iter().enumerate().map(|(position, &token)| {
        let known = u32::try_from(token).ok().filter(|token| *token < vocab_size);
        known.map(TokenId).ok_or_else(|| {
            let message = format!(
                "token {token} at position {position} is outside the vocabulary of {vocab_size}"
            );
            invalid(py, &message, "token_outside_vocabulary")
        })
    });
    checked.collect()
}

/// Text to tokens and back, as the engine does it.
#[pyclass(frozen, module = "nano_batch._native")]
pub(crate) struct Tokenizer {
    inner: nano_text::Tokenizer,
    /// The model's and the tokenizer's vocabulary: either may have ids that the other has not.
    num_tokens: u32,
}

#[pymethods]
impl Tokenizer {
    #[getter]
    fn vocab_size(&self) -> usize {
        self.inner.vocab_size()
    }

    /// The token ids of a text.
    #[pyo3(signature = (text, *, add_special_tokens=true))]
    #[expect(clippy::needless_pass_by_value, reason = "what pyo3 extracts")]
    fn encode(
        &self,
        py: Python<'_>,
        text: Bound<'_, PyString>,
        add_special_tokens: bool,
    ) -> PyResult<Vec<u32>> {
        let text = plain_text(&text, "text", "invalid_prompt")?.to_owned();
        let inner = self.inner.clone();
        let tokens = encoding(py, text.len(), move || inner.encode(&text, add_special_tokens))?
            .map_err(|error| to_py(py, &error.into()))?;
        Ok(tokens.into_iter().map(|token| token.0).collect())
    }

    /// The text of token ids; those that are the model's alone have none.
    #[pyo3(signature = (token_ids, *, skip_special_tokens=true))]
    #[expect(clippy::needless_pass_by_value, reason = "what pyo3 extracts")]
    fn decode(
        &self,
        py: Python<'_>,
        token_ids: Vec<i64>,
        skip_special_tokens: bool,
    ) -> PyResult<String> {
        let tokens = checked(py, &token_ids, self.num_tokens)?;
        py.detach(|| self.inner.decode(&tokens, skip_special_tokens))
            .map_err(|error| to_py(py, &error.into()))
    }
}
