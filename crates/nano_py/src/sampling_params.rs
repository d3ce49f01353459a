//! `SamplingParams`: vLLM's names and defaults, checked at construction.

use nano_core::TokenId;
use nano_engine::TextOptions;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyInt, PyString, PyTuple};

use crate::error::{invalid, plain_text, to_py};

/// One string or several.
#[derive(FromPyObject)]
enum Stop<'py> {
    One(Bound<'py, PyString>),
    Many(Vec<Bound<'py, PyString>>),
}

/// How tokens are chosen and when a request ends.
#[pyclass(frozen, eq, skip_from_py_object, module = "nano_batch._native")]
#[derive(Clone, PartialEq)]
pub(crate) struct SamplingParams {
    pub(crate) core: nano_core::SamplingParams,
    pub(crate) text: TextOptions,
    #[pyo3(get)]
    pub(crate) detokenize: bool,
    /// As they were given: 0.7 has no exact float32.
    #[pyo3(get)]
    pub(crate) temperature: f64,
    #[pyo3(get)]
    pub(crate) top_p: f64,
    #[pyo3(get)]
    pub(crate) min_p: f64,
}

impl SamplingParams {
    pub(crate) fn new(
        core: nano_core::SamplingParams,
        text: TextOptions,
        detokenize: bool,
    ) -> Self {
        let [temperature, top_p, min_p] = [core.temperature, core.top_p, core.min_p].map(f64::from);
        Self { core, text, detokenize, temperature, top_p, min_p }
    }
}

/// A whole number in [`least`, 2³²), of which the message names the value, however large.
fn count(name: &str, least: u32, value: &Bound<'_, PyAny>) -> PyResult<u32> {
    if !value.is_instance_of::<PyInt>() || value.is_instance_of::<PyBool>() {
        let message = format!("{name} must be an integer, got {}", value.repr()?);
        return Err(PyTypeError::new_err(message));
    }
    value.extract().ok().filter(|count| *count >= least).ok_or_else(|| {
        let message = format!("{name} must be in [{least}, {}], got {value}", u32::MAX);
        invalid(value.py(), &message, "invalid_sampling_params")
    })
}

#[pymethods]
impl SamplingParams {
    #[new]
    #[pyo3(signature = (*, n=None, temperature=1.0, top_p=1.0, top_k=None, min_p=0.0, seed=None,
        stop=None, stop_token_ids=None, ignore_eos=false, max_tokens=Some(16), min_tokens=None, detokenize=true,
        skip_special_tokens=true, include_stop_str_in_output=false, **unsupported))]
    #[expect(clippy::too_many_arguments, reason = "the keywords of a Python constructor")]
    #[expect(clippy::fn_params_excessive_bools, reason = "vLLM's flags")]
    fn py_new(
        py: Python<'_>,
        n: Option<&Bound<'_, PyAny>>,
        temperature: f64,
        top_p: f64,
        top_k: Option<&Bound<'_, PyAny>>,
        min_p: f64,
        seed: Option<&Bound<'_, PyAny>>,
        stop: Option<Stop<'_>>,
        stop_token_ids: Option<Vec<Bound<'_, PyAny>>>,
        ignore_eos: bool,
        max_tokens: Option<i128>,
        min_tokens: Option<&Bound<'_, PyAny>>,
        detokenize: bool,
        skip_special_tokens: bool,
        include_stop_str_in_output: bool,
        unsupported: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        if let Some(n) = n
            && count("n", 1, n)? != 1
        {
            let message = format!("n is not supported yet beyond 1, got {n}");
            return Err(invalid(py, &message, "unsupported_parameter"));
        }
        refuse_unsupported(py, unsupported)?;
        let top_k = match top_k {
            None => None,
            // vLLM's two words for all tokens.
            Some(all) if matches!(all.extract::<i64>(), Ok(0 | -1)) => None,
            Some(top_k) => Some(count("top_k (0 or -1 for all tokens)", 1, top_k)?),
        };
        let stop_token_ids = stop_token_ids.unwrap_or_default();
        let stop_token_ids = stop_token_ids
            .iter()
            .map(|token| count("each of stop_token_ids", 0, token).map(TokenId));
        let core = nano_core::SamplingParams {
            temperature: temperature as f32,
            top_p: top_p as f32,
            top_k,
            min_p: min_p as f32,
            seed: seed.map(|seed| seed_bits(seed)).transpose()?,
            stop_token_ids: stop_token_ids.collect::<PyResult<Vec<_>>>()?.into(),
            ignore_eos,
            // vLLM's None: as many as max_model_len leaves.
            max_tokens: match max_tokens {
                None => u32::MAX,
                Some(value) => {
                    u32::try_from(value).ok().filter(|count| *count >= 1).ok_or_else(|| {
                        let most = u32::MAX;
                        let message = format!("max_tokens must be in [1, {most}], got {value}");
                        invalid(py, &message, "invalid_sampling_params")
                    })?
                }
            },
            min_tokens: min_tokens.map_or(Ok(0), |value| count("min_tokens", 0, value))?,
        };
        core.validate().map_err(|error| to_py(py, &error.into()))?;
        let stop = match stop {
            None => Vec::new(),
            Some(Stop::One(stop)) => vec![stop],
            Some(Stop::Many(stops)) => stops,
        };
        let stop = stop.iter().enumerate().map(|(position, stop)| {
            let name = format!("stop string {position}");
            plain_text(stop, &name, "invalid_sampling_params").map(str::to_owned)
        });
        let stop = stop.collect::<PyResult<Vec<_>>>()?;
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
        Ok(Self { core, text, detokenize, temperature, top_p, min_p })
    }

    #[getter]
    #[expect(clippy::unused_self, reason = "a getter of Python has a self")]
    fn n(&self) -> u32 {
        1
    }

    #[getter]
    fn top_k(&self) -> u32 {
        self.core.top_k.unwrap_or(0)
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

    /// Frozen: a copy is the thing itself.
    fn __copy__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __deepcopy__(slf: Py<Self>, _memo: &Bound<'_, PyAny>) -> Py<Self> {
        slf
    }

    /// For pickle: the keywords that make it again.
    fn __getnewargs_ex__<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<(Bound<'py, PyTuple>, Bound<'py, PyDict>)> {
        let keywords = PyDict::new(py);
        keywords.set_item("temperature", self.temperature)?;
        keywords.set_item("top_p", self.top_p)?;
        keywords.set_item("top_k", self.top_k())?;
        keywords.set_item("min_p", self.min_p)?;
        keywords.set_item("seed", self.seed())?;
        keywords.set_item("stop", self.stop())?;
        keywords.set_item("stop_token_ids", self.stop_token_ids())?;
        keywords.set_item("ignore_eos", self.core.ignore_eos)?;
        keywords.set_item("max_tokens", self.core.max_tokens)?;
        keywords.set_item("min_tokens", self.core.min_tokens)?;
        keywords.set_item("detokenize", self.detokenize)?;
        keywords.set_item("skip_special_tokens", self.text.skip_special_tokens)?;
        keywords.set_item("include_stop_str_in_output", self.text.include_stop_str_in_output)?;
        Ok((PyTuple::empty(py), keywords))
    }

    fn __repr__(&self) -> String {
        let seed = self.seed().map_or("None".to_owned(), |seed| seed.to_string());
        let python = |flag| if flag { "True" } else { "False" };
        format!(
            "SamplingParams(temperature={}, top_p={}, top_k={}, min_p={}, seed={seed}, stop={:?}, \
             stop_token_ids={:?}, ignore_eos={}, max_tokens={}, min_tokens={}, detokenize={}, \
             skip_special_tokens={}, include_stop_str_in_output={})",
            self.temperature,
            self.top_p,
            self.top_k(),
            self.min_p,
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

/// A seed is 64 bits, with or without a sign.
fn seed_bits(seed: &Bound<'_, PyAny>) -> PyResult<u64> {
    let signed = seed.extract::<i64>().map(|seed| seed as u64);
    signed.or_else(|_| seed.extract::<u64>()).map_err(|_| {
        if seed.is_instance_of::<PyInt>() {
            let message = format!("seed must be in [-2**63, 2**64), got {seed}");
            return invalid(seed.py(), &message, "invalid_sampling_params");
        }
        PyTypeError::new_err(format!("seed must be an integer, got {seed:?}"))
    })
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
