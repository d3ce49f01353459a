//! Kernels from the text inside the binary to machine code, by NVRTC, and kept on disk.
//!
//! No GPU is needed: any architecture can be compiled for. The cache is a convenience: a file
//! that is missing, corrupt or from another version is made again, and a folder that cannot be
//! written is done without.

use std::ffi::{CStr, CString, c_char, c_int};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::ptr;

use cudarc::nvrtc::result::{self, NvrtcError};
use cudarc::nvrtc::sys;

use super::product::NORM_SQUARES;
use super::spec::{HEADERS, KernelSpec};
use super::{Error, Result};

/// Opens a cache file; a change of its form changes it.
const MAGIC: &[u8; 8] = b"nbcubin2";

/// NVRTC, and where its results are kept.
#[derive(Debug)]
pub struct Compiler {
    version: (i32, i32),
    cache_dir: Option<PathBuf>,
}

/// Machine code of one kernel for one architecture.
#[derive(Clone, Debug)]
pub struct Cubin {
    /// The file that the driver loads.
    pub image: Vec<u8>,
    /// What the compiler said: resources on success. Empty when it came from the cache.
    pub log: String,
}

impl Compiler {
    /// Loads NVRTC and proves that it works; `cache_dir` of `None` caches nothing.
    ///
    /// # Errors
    /// [`Error::NoCompiler`] if the library or a part of it is missing.
    pub fn new(cache_dir: Option<PathBuf>) -> Result<Self> {
        // SAFETY: the probe loads the library, as the first call below would.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::NoCompiler(
                "NVRTC (libnvrtc) cannot be loaded: pip install nvidia-cuda-nvrtc".to_owned(),
            ));
        }
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the library is present, and both pointers are valid for the call.
        let status = unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) };
        let probe = "extern \"C\" __global__ void probe(float* x) { *x = rsqrtf(*x); }";
        status
            .result()
            .map_err(|error| format!("{:?}", error.0))
            .and_then(|()| build(probe, "probe", &["--gpu-architecture=sm_80".to_owned()]))
            .map_err(|why| Error::NoCompiler(format!("NVRTC {major}.{minor}: {why}")))?;
        Ok(Self { version: (major, minor), cache_dir })
    }

    /// Where results are kept.
    pub fn cache_dir(&self) -> Option<&Path> {
        self.cache_dir.as_deref()
    }

    /// The user's cache folder for this project: `$XDG_CACHE_HOME/nano_batch` or
    /// `~/.cache/nano_batch`.
    pub fn default_cache_dir() -> Option<PathBuf> {
        let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
        let home = || absolute("HOME").map(|home| home.join(".cache"));
        Some(absolute("XDG_CACHE_HOME").or_else(home)?.join("nano_batch"))
    }

    /// The kernel's machine code, from the cache if it is there.
    pub fn cubin(&self, spec: &KernelSpec, architecture: &str) -> Result<Cubin> {
        let path = self.cache_path(spec, architecture);
        if let Some(image) = path.as_deref().and_then(read_cached) {
            return Ok(Cubin { image, log: String::new() });
        }
        self.compile(spec, architecture)
    }

    /// Compiles the kernel anew and replaces what the cache holds of it.
    pub fn compile(&self, spec: &KernelSpec, architecture: &str) -> Result<Cubin> {
        let built = build(spec.source, spec.name, &options(spec, architecture));
        let cubin = built.map_err(|log| Error::Compile {
            kernel: spec.name.to_owned(),
            architecture: architecture.to_owned(),
            log,
        })?;
        if let Some(path) = self.cache_path(spec, architecture)
            && let Err(error) = write_cached(&path, &cubin.image)
        {
            tracing::debug!("kernel cache {} is not written: {error}", path.display());
        }
        Ok(cubin)
    }

    /// One file for each text, set of options and version of the compiler.
    fn cache_path(&self, spec: &KernelSpec, architecture: &str) -> Option<PathBuf> {
        let hash = hash_of(&(HEADERS, spec.source, options(spec, architecture), self.version));
        let file = format!("{}-{architecture}-{hash:016x}.cubin", spec.name);
        Some(self.cache_dir.as_ref()?.join(file))
    }
}

fn options(spec: &KernelSpec, architecture: &str) -> Vec<String> {
    // NVRTC's own cache, where there is a driver, would give the code without the log.
    let fixed = ["--std=c++17", "--no-cache", "--ptxas-options=-v"];
    let mut options: Vec<String> = fixed.iter().map(|&option| option.to_owned()).collect();
    options.push(format!("--gpu-architecture={architecture}"));
    options.push(format!("-DNORM_SQUARES={NORM_SQUARES}"));
    options.extend(spec.defines.iter().map(|&define| define.to_owned()));
    options
}

/// Machine code of a source, or why there is none.
fn build(source: &str, name: &str, options: &[String]) -> std::result::Result<Cubin, String> {
    let source = CString::new(source).map_err(|error| error.to_string())?;
    let program = Program::new(&source, name)
        .map_err(|error| format!("NVRTC refused the source: {:?}", error.0))?;
    // SAFETY: the program is alive.
    let compiled = unsafe { result::compile_program(program.0, options) };
    compiled.map_err(|error| format!("{:?} {}", error.0, program.log()))?;
    let image = program.cubin().map_err(|error| format!("{:?}", error.0))?;
    Ok(Cubin { image, log: program.log() })
}

/// The image in a cache file, if it is whole.
pub(super) fn read_cached(path: &Path) -> Option<Vec<u8>> {
    let bytes = fs::read(path).ok()?;
    let (magic, rest) = bytes.split_at_checked(MAGIC.len())?;
    let (checksum, image) = rest.split_at_checked(size_of::<u64>())?;
    let whole = magic == MAGIC && checksum == hash_of(&image).to_le_bytes();
    whole.then(|| image.to_vec())
}

/// Writes beside the target and renames, so that a reader never sees half a file.
pub(super) fn write_cached(path: &Path, image: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let unfinished = path.with_extension(format!("{}.unfinished", std::process::id()));
    let content = [&MAGIC[..], &hash_of(&image).to_le_bytes(), image].concat();
    let written = fs::write(&unfinished, content).and_then(|()| fs::rename(&unfinished, path));
    if written.is_err() {
        // The first error is the one to tell.
        let _ = fs::remove_file(&unfinished);
    }
    written
}

/// The same in every process; should another version of the standard library have another, a cache
/// begins anew.
pub(super) fn hash_of(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// A program of NVRTC, destroyed on drop.
struct Program(sys::nvrtcProgram);

impl Program {
    fn new(source: &CStr, name: &str) -> std::result::Result<Self, NvrtcError> {
        let owned = |text: &str| CString::new(text).unwrap_or_default();
        let name = owned(name);
        let (names, texts): (Vec<_>, Vec<_>) =
            HEADERS.iter().map(|(name, text)| (owned(name), owned(text))).unzip();
        let names: Vec<*const c_char> = names.iter().map(|name| name.as_ptr()).collect();
        let texts: Vec<*const c_char> = texts.iter().map(|text| text.as_ptr()).collect();
        let mut program = ptr::null_mut();
        // SAFETY: every string is null-terminated and outlives the call, which copies them; both
        // arrays have HEADERS.len() entries.
        unsafe {
            sys::nvrtcCreateProgram(
                &raw mut program,
                source.as_ptr(),
                name.as_ptr(),
                HEADERS.len() as c_int,
                texts.as_ptr(),
                names.as_ptr(),
            )
        }
        .result()?;
        Ok(Self(program))
    }

    fn log(&self) -> String {
        // SAFETY: the program is alive.
        let log = unsafe { result::get_program_log(self.0) }.unwrap_or_default();
        let log: Vec<u8> = log.into_iter().flat_map(c_char::to_ne_bytes).collect();
        String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_owned()
    }

    fn cubin(&self) -> std::result::Result<Vec<u8>, NvrtcError> {
        let mut size = 0;
        // SAFETY: the program is alive, and so is the target.
        unsafe { sys::nvrtcGetCUBINSize(self.0, &raw mut size) }.result()?;
        let mut image = vec![0_u8; size];
        // SAFETY: the image has the size just asked for.
        unsafe { sys::nvrtcGetCUBIN(self.0, image.as_mut_ptr().cast()) }.result()?;
        Ok(image)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the program came from nvrtcCreateProgram and is destroyed once.
        unsafe { sys::nvrtcDestroyProgram(&raw mut self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_file_comes_back_and_a_corrupt_one_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep").join("kernel.cubin");
        assert_eq!(read_cached(&path), None);
        write_cached(&path, b"machine code").unwrap();
        assert_eq!(read_cached(&path).unwrap(), b"machine code");
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut corrupt = whole.clone();
            corrupt[at] ^= 1;
            fs::write(&path, corrupt).unwrap();
            assert_eq!(read_cached(&path), None, "byte {at}");
        }
        for len in 0..whole.len() {
            fs::write(&path, &whole[..len]).unwrap();
            assert_eq!(read_cached(&path), None, "{len} bytes");
        }
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_an_error_not_a_crash() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(write_cached(&file.join("kernel.cubin"), b"machine code").is_err());
    }
}
