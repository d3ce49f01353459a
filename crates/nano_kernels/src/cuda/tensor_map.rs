//! How matrices lie in memory, as Hopper's copies of boxes read it.

use std::ffi::c_void;

use cudarc::driver::{DeviceRepr, sys};

use super::Result;

/// A parameter of a kernel: where and how a bf16 tensor lies, and the box of a copy.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(super) struct TensorMap(sys::CUtensorMap);

// SAFETY: plain bytes, which the kernel takes as the copy instructions define them.
unsafe impl DeviceRepr for TensorMap {}

impl TensorMap {
    /// Of a contiguous tensor, the innermost size first; a box is swizzled by rows of 128 bytes.
    pub(super) fn new<const N: usize>(
        address: u64,
        sizes: [usize; N],
        copied: [usize; N],
    ) -> Result<Self> {
        let (mut strides, mut stride) = ([0; N], 1);
        for (to, size) in strides.iter_mut().zip(sizes) {
            stride *= size;
            *to = stride;
        }
        Self::strided(address, sizes, strides, copied)
    }

    /// The same of a tensor with so many elements between two entries of each size but the
    /// innermost; the last stride is not used.
    pub(super) fn strided<const N: usize>(
        address: u64,
        sizes: [usize; N],
        strides: [usize; N],
        copied: [usize; N],
    ) -> Result<Self> {
        // SAFETY: all zeros are a value of this plain structure.
        let mut map: sys::CUtensorMap = unsafe { std::mem::zeroed() };
        let strides = strides.map(|stride| stride as u64 * 2);
        let (sizes, copied) = (sizes.map(|size| size as u64), copied.map(|size| size as u32));
        let steps = [1; N];
        // SAFETY: the arrays have as many entries as N dimensions ask for, or one more, and are
        // read before the call returns.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                N as u32,
                address as *mut c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                copied.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()?;
        Ok(Self(map))
    }
}
