//! `SamplingParams`, Python's class, as the engine takes it.

use nano_core::TokenId;
use nano_engine::TextOptions;
use pyo3::prelude::*;
use pyo3::types::PyString;

use crate::error::{plain_text, to_py};

/// The attributes that are read. Python has given them these types and checked whole numbers.
#[derive(FromPyObject)]
#[expect(clippy::struct_excessive_bools, reason = "vLLM's flags")]
pub(crate) struct SamplingParams<'py> {
    temperature: f64,
    top_p: f64,
    top_k: i64,
    min_p: f64,
    seed: Option<i128>,
    stop: Vec<Bound<'py, PyString>>,
    stop_token_ids: Vec<u32>,
    ignore_eos: bool,
    max_tokens: Option<u32>,
    min_tokens: u32,
    detokenize: bool,
    skip_special_tokens: bool,
    include_stop_str_in_output: bool,
}

impl SamplingParams<'_> {
    /// What the sampler reads and, for requests that want text, what the detokenizer reads.
    pub(crate) fn checked(
        self,
        py: Python<'_>,
    ) -> PyResult<(nano_core::SamplingParams, Option<TextOptions>)> {
        let core = nano_core::SamplingParams {
            temperature: self.temperature,
            top_p: self.top_p,
            // vLLM's two words for all tokens are 0 and -1.
            top_k: u32::try_from(self.top_k).ok().filter(|top_k| *top_k > 0),
            min_p: self.min_p,
            // 64 bits, with or without a sign.
            seed: self.seed.map(|seed| seed as u64),
            stop_token_ids: self.stop_token_ids.into_iter().map(TokenId).collect(),
            ignore_eos: self.ignore_eos,
            // vLLM's None: as many as max_model_len leaves.
            max_tokens: self.max_tokens.unwrap_or(u32::MAX),
            min_tokens: self.min_tokens,
        };
        core.validate().map_err(|error| to_py(py, &error.into()))?;
        let stop = self.stop.iter().enumerate().map(|(position, stop)| {
            let name = format!("stop string {position}");
            plain_text(stop, &name, "invalid_sampling_params").map(str::to_owned)
        });
        let text = TextOptions {
            stop: stop.collect::<PyResult<Vec<_>>>()?,
            include_stop_str_in_output: self.include_stop_str_in_output,
            skip_special_tokens: self.skip_special_tokens,
            min_tokens: self.min_tokens,
        };
        Ok((core, self.detokenize.then_some(text)))
    }
}

/// Raises what is out of range.
#[pyfunction]
pub(crate) fn check_sampling_params(py: Python<'_>, params: SamplingParams<'_>) -> PyResult<()> {
    params.checked(py).map(drop)
}
