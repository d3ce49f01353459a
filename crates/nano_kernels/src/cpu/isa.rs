//! Which vector instructions the processor has, found at run time.
//!
//! One plain source is compiled once for each set: code that is inlined into a function with more
//! instructions may use them.

/// The variable that asks for less than the processor has: `avx512`, `avx2` or `portable`.
pub const ISA_VARIABLE: &str = "NANO_BATCH_CPU_ISA";

/// A set of vector instructions that this processor has: nobody else can make one, so code that is
/// compiled for the set may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Set);

/// From few to many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Set {
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
    /// The largest set that the processor has and [`ISA_VARIABLE`] allows.
    ///
    /// # Errors
    /// What the variable says, if that is no set's name.
    pub fn asked() -> Result<Self, String> {
        let most = match std::env::var(ISA_VARIABLE).as_deref() {
            Ok("portable") => Set::Portable,
            Ok("avx2") => Set::Avx2,
            Ok("avx512") | Err(_) => Set::Avx512,
            Ok(name) => return Err(name.to_owned()),
        };
        Ok(Self(most.min(Self::of_processor())))
    }

    /// All sets that the processor has.
    pub fn available() -> Vec<Self> {
        let found = Self::of_processor();
        let sets = [Set::Portable, Set::Avx2, Set::Avx512].into_iter();
        sets.filter(|it| *it <= found).map(Self).collect()
    }

    /// Whether an instruction multiplies pairs of bfloat16.
    pub fn has_bf16_products(self) -> bool {
        self.0 == Set::Avx512
    }

    #[cfg(target_arch = "x86_64")]
    fn of_processor() -> Set {
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bf16");
        match (avx2, avx512) {
            (true, true) => Set::Avx512,
            (true, false) => Set::Avx2,
            (false, _) => Set::Portable,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn of_processor() -> Set {
        Set::Portable
    }

    /// Runs what was compiled for this set.
    #[inline]
    pub(crate) fn run(self, kernel: impl Kernel) {
        match self.0 {
            Set::Portable => kernel.run::<false>(),
            // SAFETY: the processor has the set, see `Isa`.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => unsafe { run_avx2(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => unsafe { run_avx512(kernel) },
            #[cfg(not(target_arch = "x86_64"))]
            Set::Avx2 | Set::Avx512 => kernel.run::<false>(),
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
