//! The one place where tensors, slices and mapped memory meet: every pointer that changes hands
//! does so here, behind checked lengths and types.

use half::bf16;
use memmap2::MmapMut;
use tch::{Device, Kind, Tensor};

use crate::config::CheckpointDtype;
use crate::error::{Error, Result};
use crate::weights::TensorBytes;

/// An element type that tensors and slices share.
pub(super) trait Element: nano_kernels::cpu::Element {
    /// libtorch's name of it.
    const KIND: Kind;
}

impl Element for f32 {
    const KIND: Kind = Kind::Float;
}

impl Element for bf16 {
    const KIND: Kind = Kind::BFloat16;
}

/// The elements of a tensor.
///
/// # Errors
/// If the tensor is not contiguous, not on the CPU or of another type.
pub(super) fn elements<E: Element>(tensor: &Tensor) -> Result<&[E]> {
    check::<E>(tensor)?;
    // SAFETY: `check` proves that `numel` elements of this type lie at `data_ptr`, which libtorch
    // aligns and initialises, as every operator that made the tensor has ended. They live as long
    // as the borrow of the tensor, and nobody writes to a tensor of this back end while it is lent.
    Ok(unsafe { std::slice::from_raw_parts(data::<E>(tensor), tensor.numel()) })
}

/// The elements of a tensor.
///
/// # Errors
/// As [`elements`].
///
/// # Safety
/// No other tensor may share its memory: views and shallow clones do.
pub(super) unsafe fn elements_mut<E: Element>(tensor: &mut Tensor) -> Result<&mut [E]> {
    check::<E>(tensor)?;
    // SAFETY: as in `elements`; any bits are a value of these types. The caller vouches that this is
    // the only tensor with this memory, so its exclusive borrow makes the slice exclusive.
    Ok(unsafe { std::slice::from_raw_parts_mut(data::<E>(tensor), tensor.numel()) })
}

fn check<E: Element>(tensor: &Tensor) -> Result<()> {
    let (found, device) = (tensor.f_kind()?, tensor.device());
    if found == E::KIND && device == Device::Cpu && tensor.is_contiguous() {
        return Ok(());
    }
    let message = format!("a contiguous {:?} tensor was expected, not {tensor:?}", E::KIND);
    Err(Error::Torch(tch::TchError::Shape(message)))
}

/// Never null, so that slices of no elements can be made of it.
fn data<E>(tensor: &Tensor) -> *mut E {
    let data = tensor.data_ptr().cast::<E>();
    if data.is_null() { std::ptr::NonNull::dangling().as_ptr() } else { data }
}

/// A tensor over the bytes of a checkpoint, given to `read`.
///
/// # Errors
/// That of `read`, or bytes that are no whole number of rows.
pub(super) fn with_rows<T>(
    part: TensorBytes<'_>,
    columns: i64,
    read: impl FnOnce(&Tensor) -> Result<T>,
) -> Result<T> {
    let kind = match part.dtype {
        CheckpointDtype::Float32 => Kind::Float,
        CheckpointDtype::Float16 => Kind::Half,
        CheckpointDtype::BFloat16 => Kind::BFloat16,
    };
    let num_rows = part.bytes.len() / kind.elt_size_in_bytes() / columns.max(1) as usize;
    let shape = [num_rows as i64, columns];
    // SAFETY: the shape covers no more than `bytes`, which outlive the tensor, as it does not leave
    // this function; it is lent for reading only. An element may lie at any address: the processors
    // that libtorch runs on load unaligned values.
    let rows = unsafe {
        Tensor::f_from_blob(part.bytes.as_ptr(), &shape, &[columns, 1], kind, Device::Cpu)?
    };
    read(&rows)
}

/// Zeroed memory for the KV cache, taken from the system page by page as it is written.
#[derive(Debug)]
pub(super) struct CacheMemory {
    map: MmapMut,
}

impl CacheMemory {
    pub(super) fn new(num_bytes: usize) -> std::io::Result<Self> {
        Ok(Self { map: MmapMut::map_anon(num_bytes)? })
    }

    pub(super) fn elements<E: Element>(&self) -> &[E] {
        // SAFETY: any bits are a value of these types.
        let (before, elements, _) = unsafe { self.map.align_to::<E>() };
        debug_assert!(before.is_empty(), "a map starts at a page");
        elements
    }

    pub(super) fn elements_mut<E: Element>(&mut self) -> &mut [E] {
        // SAFETY: as in `elements`.
        let (before, elements, _) = unsafe { self.map.align_to_mut::<E>() };
        debug_assert!(before.is_empty(), "a map starts at a page");
        elements
    }
}
