//! What the GPU tests share: the device or a stated reason to skip, random data, and the measure
//! of an error.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use half::bf16;
use nano_kernels::cuda::compile::Compiler;
use nano_kernels::cuda::spec::KERNELS;
use nano_kernels::cuda::{Device, DeviceBuffer, Error, Kernels};

/// All kernels on the first GPU, or `None` with the reason printed.
pub(crate) fn kernels() -> Option<Kernels> {
    let loaded = Device::new(0).and_then(|device| {
        let compiler = Compiler::new(Compiler::default_cache_dir())?;
        Kernels::load(&device, &compiler, &KERNELS)
    });
    match loaded {
        Ok(kernels) => Some(kernels),
        Err(error @ (Error::NoDevice(_) | Error::NoCompiler(_))) => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// The same where that is a Hopper GPU.
pub(crate) fn hopper() -> Option<Kernels> {
    let kernels = kernels()?;
    if !kernels.device().is_hopper() {
        println!("skipped: the GPU is no Hopper");
        return None;
    }
    Some(kernels)
}

/// A small generator with a fixed seed (xorshift64*).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32
    }

    /// In [0, bound).
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.next() as usize % bound
    }

    /// In [-1.7, 1.7): a variance near 1.
    pub(crate) fn value(&mut self) -> f32 {
        (self.next() as f32 / u32::MAX as f32 * 2.0 - 1.0) * 1.7
    }

    pub(crate) fn values(&mut self, len: usize) -> Vec<bf16> {
        (0..len).map(|_| bf16::from_f32(self.value())).collect()
    }

    pub(crate) fn shuffled(&mut self, len: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..len).collect();
        for i in (1..len).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}

pub(crate) fn floats(values: &[bf16]) -> Vec<f32> {
    values.iter().map(|value| value.to_f32()).collect()
}

/// Memory for `len` bf16 values, all NaN: what a kernel leaves out shows.
pub(crate) fn poisoned(device: &Device, len: usize) -> DeviceBuffer {
    let buffer = device.allocate(len * size_of::<bf16>()).unwrap();
    buffer.fill(0xff).unwrap();
    buffer
}

pub(crate) fn download(buffer: &DeviceBuffer) -> Vec<f32> {
    let mut values = vec![bf16::ZERO; buffer.num_bytes() / size_of::<bf16>()];
    buffer.download(0, &mut values).unwrap();
    floats(&values)
}

/// |out - reference| / |reference|; NaN if any of it is.
pub(crate) fn relative_error(out: &[f32], reference: &[f32]) -> f64 {
    assert_eq!(out.len(), reference.len());
    let square = |x: f64| x * x;
    let pairs = || out.iter().zip(reference).map(|(&a, &b)| (f64::from(a), f64::from(b)));
    let difference: f64 = pairs().map(|(a, b)| square(a - b)).sum();
    let norm: f64 = pairs().map(|(_, b)| square(b)).sum();
    if norm == 0.0 { difference.sqrt() } else { (difference / norm).sqrt() }
}

pub(crate) fn assert_close(what: &str, out: &[f32], reference: &[f32], bound: f64) {
    let error = relative_error(out, reference);
    println!("{what}: relative error {error:.2e}");
    assert!(error < bound, "{what}: relative error {error:.2e} is not below {bound:.0e}");
}
