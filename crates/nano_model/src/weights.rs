//! The checkpoint: safetensors, whole or sharded, mapped from disk.
//!
//! The map is read once, matrix by matrix, into memory that the back end owns, and dropped when the
//! model is loaded. The pages of a matrix are given back when all of it is packed: until then that
//! one is in memory twice.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::{Advice, Mmap, UncheckedAdvice};
use safetensors::{Dtype, SafeTensorError, SafeTensors};

use crate::config::{CheckpointDtype, read_json};
use crate::error::{Error, Result};

/// What a layer may have, after `model.layers.0.` and so on.
const LAYER_TENSORS: [&str; 10] = [
    "input_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.rotary_emb.inv_freq",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
];

/// Where a tensor lies.
#[derive(Clone, Debug)]
struct Entry {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Byte range in the shard's file.
    start: usize,
    end: usize,
}

/// The mapped files of a checkpoint.
#[derive(Debug)]
pub struct WeightMap {
    dir: PathBuf,
    shards: Vec<Mmap>,
    entries: HashMap<String, Entry>,
}

/// The bytes of one tensor, row-major and little-endian.
#[derive(Clone, Copy, Debug)]
pub struct TensorBytes<'a> {
    /// Their type.
    pub dtype: CheckpointDtype,
    /// As many as the shape says.
    pub bytes: &'a [u8],
}

impl WeightMap {
    /// Maps `model.safetensors`, or every shard that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// A missing, truncated or malformed file; other formats are named and refused.
    pub fn open(dir: &Path) -> Result<Self> {
        let mut map = Self { dir: dir.into(), shards: Vec::new(), entries: HashMap::new() };
        for path in shard_paths(dir)? {
            map.add_shard(&path)?;
        }
        Ok(map)
    }

    fn add_shard(&mut self, path: &Path) -> Result<()> {
        let bad = |reason: String| Error::BadFile { path: path.into(), reason };
        let file = File::open(path).map_err(|error| bad(error.to_string()))?;
        // SAFETY: the map is read only. Like every mapped checkpoint it relies on nobody changing
        // the file while the model is loaded.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| bad(error.to_string()))?;
        let _ = map.advise(Advice::Sequential);
        let (header_len, metadata) =
            SafeTensors::read_metadata(&map).map_err(|error| bad(explained(&error, &map)))?;
        let data_start = 8 + header_len;
        let shard = self.shards.len();
        for name in metadata.offset_keys() {
            let Some(info) = metadata.info(&name) else { continue };
            let (start, end) = (data_start + info.data_offsets.0, data_start + info.data_offsets.1);
            let entry = Entry { shard, dtype: info.dtype, shape: info.shape.clone(), start, end };
            self.entries.insert(name, entry);
        }
        self.shards.push(map);
        Ok(())
    }

    /// The tensor called `name`, which must have the given shape.
    ///
    /// # Errors
    /// Names the tensor and what is wrong with it.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<TensorBytes<'_>> {
        let entry = self
            .entries
            .get(name)
            .ok_or_else(|| Error::MissingTensor { name: name.to_owned(), dir: self.dir.clone() })?;
        if entry.shape != shape {
            let (found, expected) = (entry.shape.clone(), shape.to_vec());
            return Err(Error::TensorShape { name: name.to_owned(), found, expected });
        }
        let dtype = supported(entry.dtype).ok_or_else(|| {
            let dtype = format!("{:?}", entry.dtype);
            Error::TensorDtype { name: name.to_owned(), dtype }
        })?;
        Ok(TensorBytes { dtype, bytes: &self.shards[entry.shard][entry.start..entry.end] })
    }

    /// Refuses what a model of `num_layers` layers would leave out without a word: layers from there
    /// on, biases, and parts of a layer that it does not have. Other tensors that nobody asks for,
    /// such as rotary frequencies or an output matrix that is the embedding, are allowed.
    ///
    /// # Errors
    /// Names the first such tensor by name.
    pub fn check_names(&self, num_layers: usize) -> Result<()> {
        let is_unexpected = |name: &&String| {
            let rest = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
            rest.map_or(name.strip_suffix(".bias").is_some(), |(index, part)| {
                index.parse::<usize>().map_or(true, |index| index >= num_layers)
                    || !LAYER_TENSORS.contains(&part)
            })
        };
        match self.entries.keys().filter(is_unexpected).min() {
            Some(name) => Err(Error::UnexpectedTensor { name: name.clone(), num_layers }),
            None => Ok(()),
        }
    }

    /// The data type of the checkpoint's first tensor by name, for a config that names none.
    pub fn dtype(&self) -> Option<CheckpointDtype> {
        let first = self.entries.iter().min_by_key(|(name, _)| name.as_str());
        first.and_then(|(_, entry)| supported(entry.dtype))
    }

    /// Tells the system that the pages of a tensor are not needed again.
    pub fn release(&self, name: &str) {
        let Some(entry) = self.entries.get(name) else { return };
        let page = 4096;
        let start = entry.start.next_multiple_of(page);
        let end = entry.end / page * page;
        if start < end {
            let map = &self.shards[entry.shard];
            // SAFETY: the map is private to this type, read only and backed by a file, so a page
            // that is dropped is read again with the same content if it is touched.
            let dropped = unsafe {
                map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start)
            };
            // Advice that is not taken costs memory, nothing else.
            drop(dropped);
        }
    }
}

fn supported(dtype: Dtype) -> Option<CheckpointDtype> {
    match dtype {
        Dtype::F32 => Some(CheckpointDtype::Float32),
        Dtype::F16 => Some(CheckpointDtype::Float16),
        Dtype::BF16 => Some(CheckpointDtype::BFloat16),
        _ => None,
    }
}

/// What is wrong with a file, whose bytes begin with the header's length.
fn explained(error: &SafeTensorError, file: &[u8]) -> String {
    let len = file.len();
    match (error, file.first_chunk().map(|claimed| u64::from_le_bytes(*claimed))) {
        (_, None) => {
            format!("is truncated: a safetensors file has at least 8 bytes, this one {len}")
        }
        (_, Some(claimed)) if claimed > len as u64 => {
            format!("claims a safetensors header of {claimed} bytes, but has {len} in all")
        }
        (SafeTensorError::MetadataIncompleteBuffer, _) => format!(
            "is truncated or has bytes too many: its tensors do not end at byte {len}, where the \
             file does"
        ),
        _ => format!("has a malformed safetensors header: {error}"),
    }
}

fn shard_paths(dir: &Path) -> Result<Vec<PathBuf>> {
    let single = dir.join("model.safetensors");
    if single.exists() {
        return Ok(vec![single]);
    }
    let index_path = dir.join("model.safetensors.index.json");
    let Some(index) = read_json(&index_path)? else {
        return Err(Error::NoModel { path: dir.into(), reason: no_weights(dir) });
    };
    let bad = |reason: &str| Error::BadFile { path: index_path.clone(), reason: reason.into() };
    let map = index.get("weight_map").and_then(|map| map.as_object());
    let map = map.ok_or_else(|| bad("has no weight_map"))?;
    let mut names: Vec<&str> = map.values().filter_map(|name| name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    // A name is a file beside the index, never a path that leads elsewhere.
    if let Some(name) = names.iter().find(|name| name.contains(['/', '\\'])) {
        return Err(bad(&format!("names the shard {name:?}, which is not beside it")));
    }
    Ok(names.into_iter().map(|name| dir.join(name)).collect())
}

/// Says what is there instead of safetensors.
fn no_weights(dir: &Path) -> String {
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let names: Vec<String> =
        files.map(|file| file.file_name().to_string_lossy().into_owned()).collect();
    let found = |extension: &str| {
        let is_it = |name: &&String| Path::new(name).extension().is_some_and(|it| it == extension);
        names.iter().filter(is_it).min()
    };
    let instead = found("bin").or(found("gguf")).or(found("pt")).or(found("pth"));
    match instead {
        Some(name) => format!(
            "has {name} but no model.safetensors: convert it with transformers' save_pretrained"
        ),
        None => "has no model.safetensors (load_format=\"dummy\" needs none)".to_owned(),
    }
}
