//! A product's shape, what our own products are told, and which kernel has which shape.

use cudarc::driver::DeviceRepr;

use super::{Kernels, Result, batch_product, check, skinny};

/// Rows at most of a product that shares a norm with another one.
pub const NORM_ROWS: usize = 192;
/// Sums of squares of a row at most.
pub(super) const NORM_SQUARES: usize = 1024;
/// Bytes of the sums of squares between two products that share a norm.
pub const SQUARES_BYTES: usize = NORM_ROWS * NORM_SQUARES * size_of::<f32>();

/// What becomes of a product, as the kernels count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Epilogue {
    /// Written in bf16.
    Bf16,
    /// Added to what is there in bf16, rounded once.
    AddBf16,
    /// Written in f32.
    F32,
    /// `silu(first half) * second half` of the features, rounded once to bf16.
    Gated,
}

/// A product's shape: `out = input [num_rows, in_features] × weight [out_features, in_features]ᵀ`,
/// bf16 in, summed in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Product {
    /// Rows of input and output.
    pub num_rows: usize,
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the input.
    pub in_features: usize,
    /// What becomes of it.
    pub epilogue: Epilogue,
}

/// One launch with what is around the product; addresses on the device.
#[derive(Clone, Copy, Debug)]
pub struct FusedProduct {
    /// The shape.
    pub product: Product,
    /// `[num_rows, out_features]`, written; half as wide if gated.
    pub out: u64,
    /// `[num_rows, in_features]` bf16.
    pub input: u64,
    /// `[out_features, in_features]` bf16; gated, the gate first.
    pub weight: u64,
    /// The norm of the input or of the output.
    pub norm: Norm,
}

/// The norm on one side of a product, which those of several rows share.
#[derive(Clone, Copy, Debug)]
pub enum Norm {
    /// There is none.
    None,
    /// Of the input, of one row: all of it.
    Whole {
        /// `[in_features]` bf16.
        weight: u64,
        /// Added to the mean square.
        eps: f32,
    },
    /// Of the output, with [`Epilogue::AddBf16`], of 2 to [`NORM_ROWS`] rows: its beginning.
    Behind {
        /// `[out_features]` bf16.
        weight: u64,
        /// `[num_rows, out_features]` bf16, written: the output times the weight.
        scaled: u64,
        /// [`SQUARES_BYTES`], written.
        squares: u64,
    },
    /// Of the input, of as many rows: what a product with that norm behind it has left to do.
    Begun {
        /// [`SQUARES_BYTES`], as that product left them.
        squares: u64,
        /// Of a row: [`Kernels::num_squares`] of that product.
        num_squares: usize,
        /// Added to the mean square.
        eps: f32,
    },
}

/// Which kernel a product has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProductKernel {
    /// `kernels/row_product.cu`.
    Row,
    /// `kernels/skinny_product.cu`.
    Skinny,
    /// `kernels/batch_product.cu`.
    Batch,
    /// `kernels/gated_product.cu`.
    Gated,
}

/// `SharedNorm` of `kernels/shared_norm.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct SharedNorm {
    weight: u64,
    scaled: u64,
    squares: u64,
    num_squares: i32,
    eps: f32,
}

// SAFETY: plain numbers, laid out as the source's structure is.
unsafe impl DeviceRepr for SharedNorm {}

impl Kernels {
    /// The kernel of ours that such products have on this device, if there is one; else they are
    /// [`Gemm`](super::Gemm)'s.
    pub fn product_kernel(&self, product: &Product) -> Option<ProductKernel> {
        let Product { num_rows, out_features, in_features, epilogue } = *product;
        let is_gated = epilogue == Epilogue::Gated;
        let has_whole = |size| out_features.is_multiple_of(if is_gated { 2 * size } else { size });
        let is_wgmma = self.device().is_hopper() && (!is_gated || has_whole(8));
        let is_skinny = num_rows <= skinny::MAX_ROWS && in_features.is_multiple_of(skinny::CHUNK);
        Some(match epilogue {
            _ if self.has_row_product(num_rows, in_features) && has_whole(1) => ProductKernel::Row,
            _ if is_wgmma && is_skinny => ProductKernel::Skinny,
            _ if !is_wgmma || !has_whole(8) || !in_features.is_multiple_of(8) => return None,
            Epilogue::Gated => ProductKernel::Gated,
            _ if num_rows <= batch_product::MAX_ROWS => ProductKernel::Batch,
            _ => return None,
        })
    }

    /// Sums of squares of a row that a product leaves for a norm behind it, if its kernel can.
    pub fn num_squares(&self, product: &Product) -> Option<usize> {
        let Product { num_rows, out_features, epilogue, .. } = *product;
        match self.product_kernel(product)? {
            _ if epilogue != Epilogue::AddBf16 => None,
            ProductKernel::Skinny => {
                Some(self.skinny_tiling(num_rows, out_features).num_squares(out_features))
            }
            ProductKernel::Batch => Some(out_features.div_ceil(batch_product::TILE_ROWS)),
            ProductKernel::Row | ProductKernel::Gated => None,
        }
    }

    /// The norm of a product of several rows, as the kernels take it.
    pub(super) fn shared_norm(&self, launch: &FusedProduct) -> Result<SharedNorm> {
        let num_rows = launch.product.num_rows;
        let is_held = |num_squares: usize| (1..=NORM_SQUARES).contains(&num_squares);
        let none = SharedNorm { weight: 0, scaled: 0, squares: 0, num_squares: 0, eps: 0.0 };
        match launch.norm {
            Norm::None => Ok(none),
            Norm::Whole { .. } => {
                check(false, "num_rows", "1 with a whole norm before", num_rows).map(|()| none)
            }
            Norm::Behind { weight, scaled, squares } => {
                let num_squares = self.num_squares(&launch.product).unwrap_or(0);
                check(is_held(num_squares), "sums of squares", "1 to 1024 of a row", num_squares)?;
                Ok(SharedNorm { weight, scaled, squares, ..none })
            }
            Norm::Begun { squares, num_squares, eps } => {
                check(num_rows <= NORM_ROWS, "num_rows", "at most 192 with a norm", num_rows)?;
                check(is_held(num_squares), "num_squares", "1 to 1024", num_squares)?;
                Ok(SharedNorm { squares, num_squares: num_squares as i32, eps, ..none })
            }
        }
    }

    /// Enqueues a product by its [`product_kernel`](Self::product_kernel); one of no rows is none.
    ///
    /// # Safety
    /// Every address names as much memory as the shape says, 16-byte aligned, alive until the
    /// stream has come to the launch; what is written overlaps nothing else, and nothing that is
    /// still in the stream writes the weight.
    pub unsafe fn fused_product(&self, launch: &FusedProduct) -> Result<()> {
        let num_rows = launch.product.num_rows;
        if num_rows == 0 {
            return Ok(());
        }
        // SAFETY: the caller's word.
        unsafe {
            match self.product_kernel(&launch.product) {
                Some(ProductKernel::Row) => self.row_product(launch),
                Some(ProductKernel::Skinny) => self.skinny_product(launch),
                Some(ProductKernel::Batch) => self.batch_product(launch),
                Some(ProductKernel::Gated) => self.gated_product(launch),
                None => check(false, "num_rows", "what a kernel has with these features", num_rows),
            }
        }
    }
}
