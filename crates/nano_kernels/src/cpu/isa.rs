//! Which vector instructions the processor has, found at run time.
//!
//! One plain source is compiled once for each set: code that is inlined into a function with more
//! instructions may use them.

use std::sync::OnceLock;

/// The variable that asks for less than the processor has: `avx512`, `avx2` or `portable`.
pub const ISA_VARIABLE: &str = "NANO_BATCH_CPU_ISA";

/// A set of vector instructions, from few to many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// What every processor of the target has.
    Portable,
    /// AVX2 with fused multiply-add.
    Avx2,
    /// AVX-512 with products of bfloat16.
    Avx512,
}

/// Code that is compiled for each set of instructions. Everything that `run` calls must be inlined
/// into it, or it runs as portable code.
pub(crate) trait Kernel {
    /// `FMA` says that `f32::mul_add` is one instruction; elsewhere it is a slow call.
    fn run<const FMA: bool>(self);
}

impl Isa {
    /// The largest set that the processor has and the environment allows.
    pub fn detect() -> Self {
        static DETECTED: OnceLock<Isa> = OnceLock::new();
        *DETECTED.get_or_init(|| {
            let found = Self::of_processor();
            match std::env::var(ISA_VARIABLE).as_deref() {
                Ok("portable") => Self::Portable,
                Ok("avx2") => found.min(Self::Avx2),
                _ => found,
            }
        })
    }

    /// What the environment asks for, if it is no set's name.
    pub fn unknown_name() -> Option<String> {
        let name = std::env::var(ISA_VARIABLE).ok()?;
        (!["avx512", "avx2", "portable"].contains(&name.as_str())).then_some(name)
    }

    /// All sets that the processor has.
    pub fn available() -> Vec<Self> {
        let found = Self::of_processor();
        [Self::Portable, Self::Avx2, Self::Avx512].into_iter().filter(|it| *it <= found).collect()
    }

    #[cfg(target_arch = "x86_64")]
    fn of_processor() -> Self {
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bf16");
        match (avx2, avx512) {
            (true, true) => Self::Avx512,
            (true, false) => Self::Avx2,
            (false, _) => Self::Portable,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn of_processor() -> Self {
        Self::Portable
    }

    /// Runs what was compiled for this set.
    #[inline]
    pub(crate) fn run(self, kernel: impl Kernel) {
        match self {
            Self::Portable => kernel.run::<false>(),
            // SAFETY: a set is made by `of_processor` alone, or is less than what that found.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { run_avx2(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { run_avx512(kernel) },
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 => kernel.run::<false>(),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_avx2(kernel: impl Kernel) {
    kernel.run::<true>();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
fn run_avx512(kernel: impl Kernel) {
    kernel.run::<true>();
}

/// `a * b + c`, rounded once where that is one instruction.
#[inline(always)]
pub(crate) fn mul_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// Asks for memory that is read soon, where there is an instruction for it.
#[inline(always)]
pub(crate) fn prefetch<T>(elements: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for element in elements.iter().step_by((64 / size_of::<T>()).max(1)) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: the instruction is part of the target, and advice: it reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(element).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = elements;
}
