//! `SamplingParams`: vLLM's names and defaults, checked at construction.

use nano_core::TokenId;
use nano_engine::TextOptions;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::error::{invalid, to_py};

/// One string or several.
#[derive(FromPyObject)]
enum Stop {
    One(String),
    Many(Vec<String>),
}

/// How tokens are chosen and when a request ends.
#[pyclass(frozen, eq, skip_from_py_object, module = "nano_batch._native")]
#[derive(Clone, PartialEq)]
pub(crate) struct SamplingParams {
    pub(crate) core: nano_core::SamplingParams,
    pub(crate) text: TextOptions,
    #[pyo3(get)]
    pub(crate) detokenize: bool,
}

#[pymethods]
impl SamplingParams {
    #[new]
    #[pyo3(signature = (*, n=1, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, seed=None, stop=None,
        stop_token_ids=None, ignore_eos=false, max_tokens=16, min_tokens=0, detokenize=true,
        skip_special_tokens=true, include_stop_str_in_output=false, **unsupported))]
    #[expect(clippy::too_many_arguments, reason = "the keywords of a Python constructor")]
    #[expect(clippy::fn_params_excessive_bools, reason = "vLLM's flags")]
    fn new(
        py: Python<'_>,
        n: i64,
        temperature: f32,
        top_p: f32,
        top_k: i64,
        min_p: f32,
        seed: Option<i64>,
        stop: Option<Stop>,
        stop_token_ids: Option<Vec<i64>>,
        ignore_eos: bool,
        max_tokens: i64,
        min_tokens: i64,
        detokenize: bool,
        skip_special_tokens: bool,
        include_stop_str_in_output: bool,
        unsupported: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        if n != 1 {
            let message = format!("n is not supported yet beyond 1, got {n}");
            return Err(invalid(py, &message, "unsupported_parameter"));
        }
        refuse_unsupported(py, unsupported)?;
        let checked = |name: &str, least: i64, value: i64| {
            u32::try_from(value).ok().filter(|_| value >= least).ok_or_else(|| {
                let most = u32::MAX;
                let message = format!("{name} must be in [{least}, {most}], got {value}");
                invalid(py, &message, "invalid_sampling_params")
            })
        };
        let top_k = match top_k {
            -1 | 0 => None,
            some => Some(checked("top_k (-1 or 0 for all tokens)", 1, some)?),
        };
        let stop_token_ids = stop_token_ids.unwrap_or_default();
        let stop_token_ids: PyResult<Vec<_>> = stop_token_ids
            .into_iter()
            .map(|token| Ok(TokenId(checked("every one of stop_token_ids", 0, token)?)))
            .collect();
        let core = nano_core::SamplingParams {
            temperature,
            top_p,
            top_k,
            min_p,
            // A negative seed is as good as any: its bits are the key of the noise.
            seed: seed.map(|seed| seed as u64),
            stop_token_ids: stop_token_ids?.into(),
            ignore_eos,
            max_tokens: checked("max_tokens", 1, max_tokens)?,
            min_tokens: checked("min_tokens", 0, min_tokens)?,
        };
        core.validate().map_err(|error| to_py(py, &error.into()))?;
        let stop = match stop {
            None => Vec::new(),
            Some(Stop::One(stop)) => vec![stop],
            Some(Stop::Many(stops)) => stops,
        };
        if let Some(position) = stop.iter().position(String::is_empty) {
            let message = format!("stop string {position} is empty and would match everywhere");
            return Err(invalid(py, &message, "invalid_sampling_params"));
        }
        if !detokenize && !stop.is_empty() {
            let message = format!("{} stop strings need detokenize=True", stop.len());
            return Err(invalid(py, &message, "invalid_sampling_params"));
        }
        let min_tokens = core.min_tokens;
        let text =
            TextOptions { stop, include_stop_str_in_output, skip_special_tokens, min_tokens };
        Ok(Self { core, text, detokenize })
    }

    #[getter]
    fn n(&self) -> u32 {
        1
    }

    #[getter]
    fn temperature(&self) -> f32 {
        self.core.temperature
    }

    #[getter]
    fn top_p(&self) -> f32 {
        self.core.top_p
    }

    #[getter]
    fn top_k(&self) -> u32 {
        self.core.top_k.unwrap_or(0)
    }

    #[getter]
    fn min_p(&self) -> f32 {
        self.core.min_p
    }

    #[getter]
    fn seed(&self) -> Option<i64> {
        self.core.seed.map(|seed| seed as i64)
    }

    #[getter]
    fn stop(&self) -> Vec<String> {
        self.text.stop.clone()
    }

    #[getter]
    fn stop_token_ids(&self) -> Vec<u32> {
        self.core.stop_token_ids.iter().map(|token| token.0).collect()
    }

    #[getter]
    fn ignore_eos(&self) -> bool {
        self.core.ignore_eos
    }

    #[getter]
    fn max_tokens(&self) -> u32 {
        self.core.max_tokens
    }

    #[getter]
    fn min_tokens(&self) -> u32 {
        self.core.min_tokens
    }

    #[getter]
    fn skip_special_tokens(&self) -> bool {
        self.text.skip_special_tokens
    }

    #[getter]
    fn include_stop_str_in_output(&self) -> bool {
        self.text.include_stop_str_in_output
    }

    fn __repr__(&self) -> String {
        let seed = self.seed().map_or("None".to_owned(), |seed| seed.to_string());
        let python = |flag| if flag { "True" } else { "False" };
        format!(
            "SamplingParams(temperature={}, top_p={}, top_k={}, min_p={}, seed={seed}, stop={:?}, \
             stop_token_ids={:?}, ignore_eos={}, max_tokens={}, min_tokens={}, detokenize={}, \
             skip_special_tokens={}, include_stop_str_in_output={})",
            self.core.temperature,
            self.core.top_p,
            self.top_k(),
            self.core.min_p,
            self.text.stop,
            self.stop_token_ids(),
            python(self.core.ignore_eos),
            self.core.max_tokens,
            self.core.min_tokens,
            python(self.detokenize),
            python(self.text.skip_special_tokens),
            python(self.text.include_stop_str_in_output),
        )
    }
}

/// vLLM's further parameters with the values that ask for nothing.
const NEUTRAL: [(&str, &str); 11] = [
    ("presence_penalty", "0"),
    ("frequency_penalty", "0"),
    ("repetition_penalty", "1"),
    ("logprobs", "None"),
    ("prompt_logprobs", "None"),
    ("logit_bias", "None"),
    ("allowed_token_ids", "None"),
    ("bad_words", "None"),
    ("output_kind", "None"),
    ("structured_outputs", "None"),
    ("truncate_prompt_tokens", "None"),
];

/// Nothing is accepted and then ignored: a name without its feature takes its neutral value only.
fn refuse_unsupported(py: Python<'_>, unsupported: Option<&Bound<'_, PyDict>>) -> PyResult<()> {
    let Some(unsupported) = unsupported else { return Ok(()) };
    for (name, value) in unsupported.iter() {
        let name: String = name.extract()?;
        let Some((_, neutral)) = NEUTRAL.iter().find(|(known, _)| *known == name) else {
            let message = format!("SamplingParams has no parameter {name:?}");
            return Err(invalid(py, &message, "unknown_parameter"));
        };
        let is_neutral = match *neutral {
            "None" => value.is_none(),
            number => value.extract::<f64>().ok() == number.parse().ok(),
        };
        if !is_neutral {
            let message = format!("{name} is not supported yet beyond {neutral}, got {value}");
            return Err(invalid(py, &message, "unsupported_parameter"));
        }
    }
    Ok(())
}
