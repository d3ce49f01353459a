//! cuBLASLt's own objects, each destroyed with its owner.

use cudarc::cublaslt::{result, sys};

use super::Result;

pub(super) const BF16: sys::cudaDataType = sys::cudaDataType::CUDA_R_16BF;
pub(super) const F32: sys::cudaDataType = sys::cudaDataType::CUDA_R_32F;

/// Declares an owner of one of cuBLASLt's objects, destroyed on drop.
macro_rules! owner {
    ($name:ident, $inner:ty, $destroy:path) => {
        #[derive(Debug)]
        pub(super) struct $name(pub(super) $inner);

        impl Drop for $name {
            fn drop(&mut self) {
                // SAFETY: made by the library and destroyed once.
                let _ = unsafe { $destroy(self.0) };
            }
        }
    };
}

owner!(Handle, sys::cublasLtHandle_t, result::destroy_handle);
owner!(Descriptor, sys::cublasLtMatmulDesc_t, result::destroy_matmul_desc);
owner!(Layout, sys::cublasLtMatrixLayout_t, result::destroy_matrix_layout);
owner!(Preference, sys::cublasLtMatmulPreference_t, result::destroy_matmul_pref);

impl Descriptor {
    /// Sums in f32, the first operand transposed.
    pub(super) fn new() -> Result<Self> {
        let sums = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let descriptor = Self(result::create_matmul_desc(sums, F32)?);
        let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        let transpose = 1_i32;
        let pointer = (&raw const transpose).cast();
        // SAFETY: the attribute is of this size, and read before the call returns.
        unsafe { result::set_matmul_desc_attribute(descriptor.0, attribute, pointer, 4) }?;
        Ok(descriptor)
    }
}

impl Layout {
    /// A column-major matrix without gaps.
    pub(super) fn new(element: sys::cudaDataType, rows: usize, columns: usize) -> Result<Self> {
        let layout =
            result::create_matrix_layout(element, rows as u64, columns as u64, rows as i64);
        Ok(Self(layout?))
    }
}

impl Preference {
    /// Of algorithms with a workspace of up to `most` bytes.
    pub(super) fn new(most: usize) -> Result<Self> {
        let preference = Self(result::create_matmul_pref()?);
        let attribute =
            sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let pointer = (&raw const most).cast();
        // SAFETY: the attribute is of this size, and read before the call returns.
        unsafe {
            result::set_matmul_pref_attribute(preference.0, attribute, pointer, size_of::<usize>())
        }?;
        Ok(preference)
    }
}

/// The algorithm with its sum cut into `split` parts, which are added up in f32.
pub(super) fn split_variant(
    mut algorithm: sys::cublasLtMatmulAlgo_t,
    split: u32,
) -> Option<sys::cublasLtMatmulAlgo_t> {
    use sys::cublasLtMatmulAlgoConfigAttributes_t as Attribute;
    let in_f32 = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
    for (attribute, value) in [
        (Attribute::CUBLASLT_ALGO_CONFIG_SPLITK_NUM, split),
        (Attribute::CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, in_f32),
    ] {
        let value = (&raw const value).cast();
        // SAFETY: both attributes are of this size, and read before the call returns.
        let status = unsafe {
            sys::cublasLtMatmulAlgoConfigSetAttribute(&raw mut algorithm, attribute, value, 4)
        };
        status.result().ok()?;
    }
    Some(algorithm)
}
