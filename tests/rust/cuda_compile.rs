//! Every kernel compiles for every architecture, without a GPU; skips where there is no NVRTC.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by a panic and says what it measured"
)]

use nano_kernels::cuda::Error;
use nano_kernels::cuda::compile::Compiler;
use nano_kernels::cuda::spec::{KERNELS, KernelSpec};

const ARCHITECTURES: [&str; 3] = ["sm_80", "sm_90", "sm_90a"];

/// NVRTC, or the reason why the test is skipped, printed.
fn compiler(cache_dir: Option<std::path::PathBuf>) -> Option<Compiler> {
    match Compiler::new(cache_dir) {
        Ok(compiler) => Some(compiler),
        Err(Error::NoCompiler(reason)) => {
            println!("skipped: {reason}; LD_LIBRARY_PATH may name its folder");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Of a thread, as the compiler's log reports them.
fn registers_and_spill_bytes(log: &str) -> (u32, u32) {
    let (mut registers, mut spill_bytes) = (0, 0);
    for line in log.lines().filter(|line| !line.contains("Compiling")) {
        let before = |unit: &str| -> u32 {
            let text =
                line.split_once(unit).and_then(|(text, _)| text.split_whitespace().next_back());
            text.and_then(|number| number.parse().ok()).unwrap_or(0)
        };
        registers = before(" registers").max(registers);
        spill_bytes += before(" bytes spill stores") + before(" bytes spill loads");
    }
    (registers, spill_bytes)
}

#[test]
fn the_log_gives_registers_and_spills() {
    let log = "ptxas info    : 0 bytes gmem\n\
        ptxas info    : Compiling entry function 'sample' for 'sm_90a'\n\
        ptxas info    : Function properties for sample\n\
        ptxas         .     8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n\
        ptxas info    : Used 40 registers, used 1 barriers, 256 bytes smem";
    assert_eq!(registers_and_spill_bytes(log), (40, 16));
    assert_eq!(registers_and_spill_bytes(""), (0, 0));
}

#[test]
fn every_kernel_compiles_for_every_architecture_and_spills_nothing() {
    let Some(compiler) = compiler(None) else { return };
    println!("{:24} {:8} {:>9} {:>11}", "kernel", "target", "registers", "spill bytes");
    let mut spilling = Vec::new();
    for spec in &KERNELS {
        for architecture in ARCHITECTURES {
            let cubin = compiler.cubin(spec, architecture).unwrap();
            let (registers, spill_bytes) = registers_and_spill_bytes(&cubin.log);
            assert!(registers > 0, "log: {}", cubin.log);
            println!("{:24} {architecture:8} {registers:9} {spill_bytes:11}", spec.name);
            if spill_bytes > 0 {
                spilling.push((spec.name, architecture));
            }
            // The compiler may say that it waits after each wgmma.
            assert!(
                !cubin.log.contains("serialized"),
                "{} {architecture}: {}",
                spec.name,
                cubin.log
            );
        }
    }
    assert!(spilling.is_empty(), "kernels spill: {spilling:?}");
}

#[test]
fn a_corrupt_cache_file_is_made_again_and_a_read_only_folder_is_done_without() {
    let folder = tempfile::tempdir().unwrap();
    let Some(compiler) = compiler(Some(folder.path().to_owned())) else { return };
    let spec = &KERNELS[0];
    let fresh = compiler.cubin(spec, "sm_90a").unwrap();
    assert!(!fresh.log.is_empty());
    let files: Vec<_> =
        folder.path().read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
    let [file] = &files[..] else { panic!("one file expected: {files:?}") };

    let cached = compiler.cubin(spec, "sm_90a").unwrap();
    assert!(cached.log.is_empty(), "the second time nothing is compiled");
    assert_eq!(cached.image, fresh.image);

    std::fs::write(file, "not a cubin").unwrap();
    let remade = compiler.cubin(spec, "sm_90a").unwrap();
    assert_eq!(remade.image, fresh.image);
    assert!(!remade.log.is_empty());
    assert_eq!(compiler.cubin(spec, "sm_90a").unwrap().log, "");

    // A file where the folder should be cannot be written, even by root.
    let nowhere = Compiler::new(Some(file.clone())).unwrap();
    assert_eq!(nowhere.cubin(spec, "sm_90a").unwrap().image, fresh.image);
}

#[test]
fn a_source_that_does_not_compile_says_where() {
    let Some(compiler) = compiler(None) else { return };
    let spec = KernelSpec { source: "__global__ void f() { int x = y; }", ..KERNELS[0] };
    let error = compiler.cubin(&spec, "sm_90a").unwrap_err().to_string();
    assert!(error.contains("rms_norm") && error.contains("sm_90a"), "{error}");
    assert!(error.contains("identifier \"y\" is undefined"), "{error}");
}
