//! Kernels from the text inside the binary to machine code, by NVRTC, and kept on disk.
//!
//! No GPU is needed: any architecture can be compiled for. The cache is a convenience: a file
//! that is missing, corrupt or from another version is made again, and a folder that cannot be
//! written is done without.

use std::ffi::{CStr, CString, c_char, c_int};
use std::fs;
use std::path::{Path, PathBuf};
use std::ptr;

use cudarc::nvrtc::sys;

use super::product::NORM_SQUARES;
use super::spec::{HEADERS, KernelSpec};
use super::{Error, Result};

/// Opens a cache file; a change of its form changes it.
const MAGIC: &[u8; 8] = b"nbcubin1";

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

/// What one kernel takes of a multiprocessor, as the compiler reports it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// Registers of a thread.
    pub num_registers: u32,
    /// Bytes that a thread's registers spill, stores and loads together.
    pub spill_bytes: u32,
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
        let mut version = (0, 0);
        // SAFETY: the library is present, and both pointers are valid for the call.
        let status = unsafe { sys::nvrtcVersion(&raw mut version.0, &raw mut version.1) };
        let compiler = Self { version, cache_dir };
        let probe = c"extern \"C\" __global__ void probe(float* x) { *x = rsqrtf(*x); }";
        let program = Program::new(probe, "probe").map_err(|status| no_compiler(version, status));
        status.result().map_err(|error| no_compiler(version, error.0))?;
        let mut program = program?;
        match program.compile(&["--gpu-architecture=sm_80".to_owned()]) {
            Ok(()) => Ok(compiler),
            Err(status) => Err(Error::NoCompiler(format!(
                "NVRTC {}.{}: {status:?} {}",
                version.0,
                version.1,
                program.log()
            ))),
        }
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
        let failed = |log: String| Error::Compile {
            kernel: spec.name.to_owned(),
            architecture: architecture.to_owned(),
            log,
        };
        let source = CString::new(spec.source).map_err(|error| failed(error.to_string()))?;
        let mut program = Program::new(&source, spec.name)
            .map_err(|status| failed(format!("NVRTC refused the source: {status:?}")))?;
        if let Err(status) = program.compile(&options(spec, architecture)) {
            return Err(failed(format!("{status:?} {}", program.log())));
        }
        let image = program.cubin().map_err(|status| failed(format!("{status:?}")))?;
        if let Some(path) = self.cache_path(spec, architecture)
            && let Err(error) = write_cached(&path, &image)
        {
            tracing::debug!("kernel cache {} is not written: {error}", path.display());
        }
        Ok(Cubin { image, log: program.log() })
    }

    /// One file for each text, set of options and version of the compiler.
    fn cache_path(&self, spec: &KernelSpec, architecture: &str) -> Option<PathBuf> {
        let mut hash = Fnv::new();
        for (_, header) in HEADERS {
            hash.add(header.as_bytes());
        }
        hash.add(spec.source.as_bytes());
        for option in options(spec, architecture) {
            hash.add(option.as_bytes());
        }
        hash.add(&self.version.0.to_le_bytes());
        hash.add(&self.version.1.to_le_bytes());
        let file = format!("{}-{architecture}-{:016x}.cubin", spec.name, hash.0);
        Some(self.cache_dir.as_ref()?.join(file))
    }
}

impl Cubin {
    /// What the compiler's log says of the kernel's resources; `None` if it came from the cache.
    pub fn resources(&self) -> Option<Resources> {
        let mut found = None;
        for line in self.log.lines().filter(|line| !line.contains("Compiling")) {
            let before = |unit: &str| -> u32 {
                let text = line.split(unit).next().filter(|text| text.len() < line.len());
                let number = text.and_then(|text| text.split_whitespace().next_back());
                number.and_then(|number| number.parse().ok()).unwrap_or(0)
            };
            let resources = found.get_or_insert_with(Resources::default);
            resources.num_registers = resources.num_registers.max(before(" registers"));
            resources.spill_bytes += before(" bytes spill stores") + before(" bytes spill loads");
        }
        found.filter(|resources| resources.num_registers > 0)
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

fn no_compiler(version: (i32, i32), status: sys::nvrtcResult) -> Error {
    Error::NoCompiler(format!("NVRTC {}.{}: {status:?}", version.0, version.1))
}

/// The image in a cache file, if it is whole.
pub(super) fn read_cached(path: &Path) -> Option<Vec<u8>> {
    let bytes = fs::read(path).ok()?;
    let (magic, rest) = bytes.split_at_checked(MAGIC.len())?;
    let (checksum, image) = rest.split_at_checked(size_of::<u64>())?;
    let whole = magic == MAGIC && checksum == Fnv::of(image).to_le_bytes();
    whole.then(|| image.to_vec())
}

/// Writes beside the target and renames, so that a reader never sees half a file.
pub(super) fn write_cached(path: &Path, image: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let unfinished = path.with_extension(format!("{}.unfinished", std::process::id()));
    let content = [&MAGIC[..], &Fnv::of(image).to_le_bytes(), image].concat();
    let written = fs::write(&unfinished, content).and_then(|()| fs::rename(&unfinished, path));
    if written.is_err() {
        // The first error is the one to tell.
        let _ = fs::remove_file(&unfinished);
    }
    written
}

/// The FNV-1a hash, the same in every process and version.
pub(super) struct Fnv(u64);

impl Fnv {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    pub(super) fn of(bytes: &[u8]) -> u64 {
        let mut hash = Self::new();
        hash.add(bytes);
        hash.0
    }

    fn add(&mut self, bytes: &[u8]) {
        // The length keeps ("a", "bc") and ("ab", "c") apart.
        for &byte in (bytes.len() as u64).to_le_bytes().iter().chain(bytes) {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

/// A program of NVRTC, destroyed on drop.
struct Program(sys::nvrtcProgram);

type Status<T> = std::result::Result<T, sys::nvrtcResult>;

fn status(result: sys::nvrtcResult) -> Status<()> {
    result.result().map_err(|error| error.0)
}

impl Program {
    fn new(source: &CStr, name: &str) -> Status<Self> {
        let owned = |text: &str| CString::new(text).unwrap_or_default();
        let name = owned(name);
        let (names, texts): (Vec<_>, Vec<_>) =
            HEADERS.iter().map(|(name, text)| (owned(name), owned(text))).unzip();
        let names: Vec<*const c_char> = names.iter().map(|name| name.as_ptr()).collect();
        let texts: Vec<*const c_char> = texts.iter().map(|text| text.as_ptr()).collect();
        let mut program = ptr::null_mut();
        // SAFETY: every string is null-terminated and outlives the call, which copies them; both
        // arrays have HEADERS.len() entries.
        status(unsafe {
            sys::nvrtcCreateProgram(
                &raw mut program,
                source.as_ptr(),
                name.as_ptr(),
                HEADERS.len() as c_int,
                texts.as_ptr(),
                names.as_ptr(),
            )
        })?;
        Ok(Self(program))
    }

    fn compile(&mut self, options: &[String]) -> Status<()> {
        let options: Vec<CString> =
            options.iter().map(|option| CString::new(&option[..]).unwrap_or_default()).collect();
        let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: the program is alive; the options are null-terminated and outlive the call.
        status(unsafe {
            sys::nvrtcCompileProgram(self.0, pointers.len() as c_int, pointers.as_ptr())
        })
    }

    fn log(&self) -> String {
        let mut size = 0;
        // SAFETY: the program is alive, and so is the target.
        let sized = unsafe { sys::nvrtcGetProgramLogSize(self.0, &raw mut size) };
        let mut log = vec![0_u8; size];
        // SAFETY: the log has the size just asked for.
        let got = unsafe { sys::nvrtcGetProgramLog(self.0, log.as_mut_ptr().cast()) };
        if status(sized).and(status(got)).is_err() {
            return String::new();
        }
        String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_owned()
    }

    fn cubin(&self) -> Status<Vec<u8>> {
        let mut size = 0;
        // SAFETY: the program is alive, and so is the target.
        status(unsafe { sys::nvrtcGetCUBINSize(self.0, &raw mut size) })?;
        let mut image = vec![0_u8; size];
        // SAFETY: the image has the size just asked for.
        status(unsafe { sys::nvrtcGetCUBIN(self.0, image.as_mut_ptr().cast()) })?;
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

    #[test]
    fn the_log_gives_registers_and_spills() {
        let log = "ptxas info    : 0 bytes gmem\n\
            ptxas info    : Compiling entry function 'sample' for 'sm_90a'\n\
            ptxas info    : Function properties for sample\n\
            ptxas         .     8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n\
            ptxas info    : Used 40 registers, used 1 barriers, 256 bytes smem";
        let cubin = Cubin { image: Vec::new(), log: log.to_owned() };
        assert_eq!(cubin.resources(), Some(Resources { num_registers: 40, spill_bytes: 16 }));
        assert_eq!(Cubin { image: Vec::new(), log: String::new() }.resources(), None);
    }
}
