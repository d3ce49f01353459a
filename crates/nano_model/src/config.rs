//! From `config.json` to [`DecoderSpec`], whatever family and version wrote it.

mod fields;
mod generation;
mod mistral;
mod rope;

use std::path::{Path, PathBuf};

use nano_core::TokenId;
use serde_json::Value;

use crate::error::{Error, Result};
use fields::Fields;
pub use generation::GenerationDefaults;
pub use rope::RopeSpec;

/// One layer, as far as layers differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerSpec {
    /// Tokens that attention reaches back, the token itself included; `None` is all of them.
    pub window: Option<u32>,
}

/// The shapes and constants of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderSpec {
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated layer.
    pub intermediate_size: usize,
    /// Heads of queries.
    pub num_heads: usize,
    /// Heads of keys and values.
    pub num_kv_heads: usize,
    /// Elements of a head; its own number, not always `hidden_size / num_heads`.
    pub head_dim: usize,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f32,
    /// The layers, first to last.
    pub layers: Vec<LayerSpec>,
    /// Rotary position embedding.
    pub rope: RopeSpec,
    /// Whether the output projection is the embedding.
    pub tied: bool,
}

impl DecoderSpec {
    /// Rows of the merged projection to queries, keys and values.
    pub fn qkv_size(&self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }

    /// Elements of all parameters.
    pub fn num_parameters(&self) -> u128 {
        let wide = |size: usize| size as u128;
        let hidden = wide(self.hidden_size);
        let attention = wide(self.qkv_size() + self.num_heads * self.head_dim) * hidden;
        let layer = attention + 3 * wide(self.intermediate_size) * hidden + 2 * hidden;
        let embeddings = if self.tied { 1 } else { 2 } * wide(self.vocab_size) * hidden;
        layer * wide(self.layers.len()) + embeddings + hidden
    }

    /// Elements of keys and values that one token keeps over all layers.
    pub fn kv_elements_per_token(&self) -> usize {
        self.layers.len() * 2 * self.num_kv_heads * self.head_dim
    }
}

/// The data types of checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckpointDtype {
    /// IEEE single precision.
    Float32,
    /// IEEE half precision.
    Float16,
    /// Brain floating point.
    BFloat16,
}

impl CheckpointDtype {
    /// Bytes of one element.
    pub fn num_bytes(self) -> usize {
        match self {
            Self::Float32 => 4,
            Self::Float16 | Self::BFloat16 => 2,
        }
    }
}

/// Everything that the JSON files of a model directory say.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// Where they lie.
    pub dir: PathBuf,
    /// The decoder.
    pub spec: DecoderSpec,
    /// The longest sequence that the model was made for.
    pub max_position_embeddings: u32,
    /// The checkpoint's own data type, if the config names it.
    pub dtype: Option<CheckpointDtype>,
    /// The end-of-sequence tokens.
    pub eos_token_ids: Vec<TokenId>,
    /// The sampling defaults.
    pub generation: GenerationDefaults,
    /// What `generation_config.json` asks for beside them and is not supported, as `name value`.
    pub unsupported_generation: Vec<String>,
}

impl ModelConfig {
    /// Reads `config.json` and, if it is there, `generation_config.json`.
    ///
    /// # Errors
    /// Names the file, the field and its value.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let missing = |reason: &str| Error::NoModel { path: dir.into(), reason: reason.into() };
        if dir.extension().is_some_and(|extension| extension == "gguf") {
            return Err(missing("is a GGUF file: a directory with safetensors is needed"));
        }
        if !dir.is_dir() {
            return Err(missing("is not a directory"));
        }
        let config = read_json(&dir.join("config.json"))?
            .ok_or_else(|| missing("has no config.json: is it a model directory?"))?;
        let fields = Fields::new(&config, "")?;
        if fields.has("quantization_config") {
            let field = "quantization_config".to_owned();
            let reason = "is not supported yet: float checkpoints are".to_owned();
            return Err(Error::BadConfig { field, reason });
        }
        let spec = match architecture(&fields)? {
            "MistralForCausalLM" => mistral::parse(&fields, mistral::Layers::Alike)?,
            "MinistralForCausalLM" => mistral::parse(&fields, mistral::Layers::ByType)?,
            other => return Err(Error::UnknownArchitecture { architecture: other.to_owned() }),
        };
        let mut config = Self {
            dir: dir.to_path_buf(),
            max_position_embeddings: fields.count("max_position_embeddings")? as u32,
            dtype: dtype(&fields)?,
            eos_token_ids: fields.tokens("eos_token_id")?,
            generation: GenerationDefaults::default(),
            unsupported_generation: Vec::new(),
            spec,
        };
        let path = dir.join("generation_config.json");
        if let Some(generation) = read_json(&path)? {
            config.add_generation(&generation).map_err(|error| match error {
                Error::BadConfig { field, reason } => {
                    Error::BadFile { path, reason: format!("{field} {reason}") }
                }
                error => error,
            })?;
        }
        Ok(config)
    }

    /// Adds what `generation_config.json` says.
    fn add_generation(&mut self, generation: &Value) -> Result<()> {
        let fields = Fields::new(generation, "")?;
        let eos_token_ids = fields.tokens("eos_token_id")?;
        if !eos_token_ids.is_empty() {
            self.eos_token_ids = eos_token_ids;
        }
        self.generation = generation::defaults(&fields)?;
        self.unsupported_generation = generation::unsupported(&fields);
        Ok(())
    }
}

/// The file's content, `None` if there is no file.
pub(crate) fn read_json(path: &Path) -> Result<Option<Value>> {
    let bad = |reason: String| Error::BadFile { path: path.into(), reason };
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(bad(error.to_string())),
    };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| bad(format!("is no JSON: {error}")))
}

fn architecture<'a>(fields: &Fields<'a>) -> Result<&'a str> {
    let named = match fields.get("architectures") {
        Some(list) => list.get(0).and_then(Value::as_str),
        None => match fields.get("model_type").and_then(Value::as_str) {
            Some("mistral") => Some("MistralForCausalLM"),
            Some("ministral") => Some("MinistralForCausalLM"),
            other => other,
        },
    };
    named.ok_or_else(|| {
        let reason = "is missing or empty: the file names no architecture, where \
                      MistralForCausalLM and MinistralForCausalLM are supported";
        fields.bad("architectures", reason)
    })
}

/// `torch_dtype` as transformers 4 wrote it, or `dtype` as 5 does.
fn dtype(fields: &Fields<'_>) -> Result<Option<CheckpointDtype>> {
    let name = if fields.has("dtype") { "dtype" } else { "torch_dtype" };
    match fields.get(name).and_then(Value::as_str) {
        None => Ok(None),
        Some("float32") => Ok(Some(CheckpointDtype::Float32)),
        Some("float16") => Ok(Some(CheckpointDtype::Float16)),
        Some("bfloat16") => Ok(Some(CheckpointDtype::BFloat16)),
        Some(other) => {
            let reason = format!("must be float32, float16 or bfloat16, got {other:?}");
            Err(Error::BadConfig { field: name.to_owned(), reason })
        }
    }
}
