//! One GPU: its context, its one stream, and memory on both sides.
//!
//! Memory is raw: a [`DeviceBuffer`] is an address and a size, because kernels and captured graphs
//! know addresses alone. Everything else in `cuda` builds on this module.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUdevice_attribute};
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DeviceRepr, DriverError, result};

use super::{Error, Result};

/// The unit in which host memory is locked.
const PAGE_BYTES: usize = 4096;

/// A GPU with the one stream that all work of its owner goes through.
#[derive(Clone, Debug)]
pub struct Device {
    stream: Arc<CudaStream>,
    architecture: String,
    num_multiprocessors: usize,
    max_shared_bytes: usize,
    /// Whether a kernel can begin before the one in front of it has ended.
    pub(super) overlaps_kernels: bool,
}

/// Shared memory that a kernel of the table declares in its source at most.
const DECLARED_SHARED_BYTES: usize = 1024;

/// The device's memory at one moment, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// What an allocation can still get.
    pub free_bytes: usize,
    /// What the device has.
    pub total_bytes: usize,
}

impl Device {
    /// Whether the driver shows this process a GPU, or fails to look for another reason.
    pub fn is_present() -> bool {
        // SAFETY: the probe loads the driver's library, as the call below would.
        let has_driver = unsafe { sys::is_culib_present() };
        let none = [Ok(0), Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE))];
        has_driver && !none.contains(&CudaContext::device_count())
    }

    /// Opens the GPU numbered `ordinal` and makes it current on this thread.
    ///
    /// # Errors
    /// [`Error::NoDevice`] without a driver or such a GPU, or with one older than compute
    /// capability 8.0.
    pub fn new(ordinal: usize) -> Result<Self> {
        // SAFETY: the probe loads the driver's library, as the first call below would.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::NoDevice("the driver (libcuda) is not installed".to_owned()));
        }
        let context = CudaContext::new(ordinal).map_err(|error| {
            Error::NoDevice(format!("GPU {ordinal} cannot be opened: {}", Error::from(error)))
        })?;
        // SAFETY: no allocation exists yet whose events could be missed. Order on the one stream
        // is all that is needed, and event calls would break a capture.
        unsafe { context.disable_event_tracking() };
        let (major, minor) = context.compute_capability()?;
        if major < 8 {
            return Err(Error::NoDevice(format!(
                "GPU {ordinal} has compute capability {major}.{minor}, but 8.0 is needed"
            )));
        }
        let multiprocessors = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let shared = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        Ok(Self {
            architecture: architecture(major, minor),
            overlaps_kernels: major >= 9,
            num_multiprocessors: context.attribute(multiprocessors)? as usize,
            max_shared_bytes: context.attribute(shared)? as usize - DECLARED_SHARED_BYTES,
            stream: context.new_stream()?,
        })
    }

    /// The GPU's name.
    pub fn name(&self) -> Result<String> {
        Ok(self.context().name()?)
    }

    /// The target of the compiler, such as `sm_90a`.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// Whether it is of the one generation that has `wgmma`.
    pub fn is_hopper(&self) -> bool {
        self.architecture == "sm_90a"
    }

    /// Multiprocessors, over which a launch spreads its thread blocks.
    pub fn num_multiprocessors(&self) -> usize {
        self.num_multiprocessors
    }

    /// Dynamic shared memory that a thread block can have.
    pub fn max_shared_bytes(&self) -> usize {
        self.max_shared_bytes
    }

    /// Free and total memory now.
    pub fn memory(&self) -> Result<Memory> {
        let (free_bytes, total_bytes) = self.context().mem_get_info()?;
        Ok(Memory { free_bytes, total_bytes })
    }

    /// Waits until all work enqueued so far is done, and says if any of it failed.
    pub fn synchronize(&self) -> Result<()> {
        Ok(self.stream.synchronize()?)
    }

    /// Memory of the device, not initialised.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] with what is free.
    pub fn allocate(&self, num_bytes: usize) -> Result<DeviceBuffer> {
        self.context().bind_to_thread()?;
        // SAFETY: a context is current, and no size is invalid: 0 is raised to 1.
        let address = unsafe { result::malloc_sync(num_bytes.max(1)) }.map_err(|error| {
            if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                let free_bytes = self.memory().map_or(0, |memory| memory.free_bytes);
                return Error::OutOfMemory { needed_bytes: num_bytes, free_bytes };
            }
            error.into()
        })?;
        Ok(DeviceBuffer { address, num_bytes, stream: Arc::clone(&self.stream) })
    }

    /// Memory of the device that holds a copy of `data`.
    pub fn allocate_from<T: DeviceRepr>(&self, data: &[T]) -> Result<DeviceBuffer> {
        let buffer = self.allocate(size_of_val(data))?;
        buffer.upload(0, data)?;
        Ok(buffer)
    }

    /// Host memory that the device reads and writes at full speed and in the background.
    pub fn allocate_pinned(&self, num_bytes: usize) -> Result<PinnedBuffer> {
        self.context().bind_to_thread()?;
        // SAFETY: a context is current; flags 0 is plain cached memory.
        let pointer = unsafe { result::malloc_host(num_bytes.max(1), 0) }?;
        // SAFETY: the allocation has at least num_bytes; after this every byte is initialised.
        unsafe { pointer.cast::<u8>().write_bytes(0, num_bytes) };
        Ok(PinnedBuffer { pointer, num_bytes, context: Arc::clone(self.context()) })
    }

    /// A point in the stream, recorded nowhere yet.
    pub fn new_event(&self) -> Result<Event> {
        let event = self.context().new_event(None)?;
        Ok(Event { event, stream: Arc::clone(&self.stream) })
    }

    pub(super) fn context(&self) -> &Arc<CudaContext> {
        self.stream.context()
    }

    pub(super) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }
}

/// The compiler's name of a compute capability. From 9.0 on, the `a` gives the instructions that
/// one generation alone has.
fn architecture(major: i32, minor: i32) -> String {
    let suffix = if major >= 9 { "a" } else { "" };
    format!("sm_{major}{minor}{suffix}")
}

/// Memory of the device, given back on drop.
#[derive(Debug)]
pub struct DeviceBuffer {
    address: u64,
    num_bytes: usize,
    stream: Arc<CudaStream>,
}

impl DeviceBuffer {
    /// The address on the device.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// The size.
    pub fn num_bytes(&self) -> usize {
        self.num_bytes
    }

    /// Sets every byte, in the order of the stream.
    pub fn fill(&self, byte: u8) -> Result<()> {
        let stream = self.stream.cu_stream();
        // SAFETY: the buffer owns these bytes.
        unsafe { result::memset_d8_async(self.address, byte, self.num_bytes, stream) }?;
        Ok(())
    }

    /// Copies `data` to `offset_bytes`, after the work enqueued so far, and waits.
    ///
    /// # Panics
    /// If `data` reaches past the end.
    pub fn upload<T: DeviceRepr>(&self, offset_bytes: usize, data: &[T]) -> Result<()> {
        let target = self.interval(offset_bytes, size_of_val(data));
        let stream = self.stream.cu_stream();
        // SAFETY: `interval` checked the bounds; `data` outlives the copy, which is waited for.
        unsafe { result::memcpy_htod_async(target, data, stream) }?;
        Ok(self.stream.synchronize()?)
    }

    /// As [`upload`](Self::upload), for data too large to pass through a staging buffer: the
    /// driver reads its pages in place, at several times the speed, where it can lock them.
    ///
    /// # Panics
    /// If `data` reaches past the end.
    pub fn upload_large(&self, offset_bytes: usize, data: &[u8]) -> Result<()> {
        let start = data.as_ptr() as usize / PAGE_BYTES * PAGE_BYTES;
        let end = (data.as_ptr() as usize + data.len()).next_multiple_of(PAGE_BYTES);
        self.stream.context().bind_to_thread()?;
        // SAFETY: these are the pages that hold `data`. They are locked for reading alone, and
        // unlocked below, before the borrow ends.
        let locked = unsafe {
            sys::cuMemHostRegister_v2(
                start as *mut c_void,
                end - start,
                sys::CU_MEMHOSTREGISTER_READ_ONLY,
            )
        };
        let uploaded = self.upload(offset_bytes, data);
        if locked == sys::CUresult::CUDA_SUCCESS {
            // SAFETY: locked above, and the copy has ended.
            unsafe { sys::cuMemHostUnregister(start as *mut c_void) }.result()?;
        }
        uploaded
    }

    /// Copies from `offset_bytes` into `data`, after the work enqueued so far, and waits.
    ///
    /// # Panics
    /// If `data` reaches past the end.
    pub fn download<T: DeviceRepr>(&self, offset_bytes: usize, data: &mut [T]) -> Result<()> {
        let source = self.interval(offset_bytes, size_of_val(data));
        let stream = self.stream.cu_stream();
        // SAFETY: `interval` checked the bounds; `data` outlives the copy, which is waited for.
        unsafe { result::memcpy_dtoh_async(data, source, stream) }?;
        Ok(self.stream.synchronize()?)
    }

    /// Enqueues a copy of the first `num_bytes` of `source`.
    ///
    /// # Panics
    /// If either buffer is shorter.
    ///
    /// # Safety
    /// Until the stream has come to the copy, and to every replay of a graph that holds it, both
    /// buffers live and `source` is not written.
    pub unsafe fn enqueue_upload(&self, source: &PinnedBuffer, num_bytes: usize) -> Result<()> {
        let target = self.interval(0, num_bytes);
        let bytes = &source.as_slice()[..num_bytes];
        // SAFETY: both bounds are checked; the time until the copy is the caller's word.
        unsafe { result::memcpy_htod_async(target, bytes, self.stream.cu_stream()) }?;
        Ok(())
    }

    /// Enqueues a copy of the first `width` bytes of each of `num_rows` rows of `pitch` bytes, the
    /// first of which begins at `offset_bytes` in both buffers.
    ///
    /// # Panics
    /// If either buffer is shorter than the rows, or a row than `width`.
    ///
    /// # Safety
    /// As for [`enqueue_upload`](Self::enqueue_upload).
    pub unsafe fn enqueue_upload_rows(
        &self,
        source: &PinnedBuffer,
        offset_bytes: usize,
        (num_rows, pitch): (usize, usize),
        width: usize,
    ) -> Result<()> {
        assert!(width <= pitch, "{width} bytes of rows of {pitch}");
        let target = self.interval(offset_bytes, num_rows * pitch);
        let rows = &source.as_slice()[offset_bytes..][..num_rows * pitch];
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
            srcHost: rows.as_ptr().cast(),
            srcDevice: 0,
            srcArray: std::ptr::null_mut(),
            srcPitch: pitch,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstHost: std::ptr::null_mut(),
            dstDevice: target,
            dstArray: std::ptr::null_mut(),
            dstPitch: pitch,
            WidthInBytes: width,
            Height: num_rows,
        };
        // SAFETY: both bounds are checked; the time until the copy is the caller's word.
        Ok(unsafe { sys::cuMemcpy2DAsync_v2(&raw const copy, self.stream.cu_stream()) }.result()?)
    }

    fn interval(&self, offset_bytes: usize, num_bytes: usize) -> u64 {
        let end = offset_bytes.checked_add(num_bytes);
        assert!(
            end.is_some_and(|end| end <= self.num_bytes),
            "{num_bytes} bytes at {offset_bytes} reach past the {} of the buffer",
            self.num_bytes
        );
        self.address + offset_bytes as u64
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        let freed = self.stream.context().bind_to_thread().and_then(|()| {
            // SAFETY: the address came from malloc_sync and is freed once. The driver waits for
            // work that uses it.
            unsafe { result::free_sync(self.address) }
        });
        if let Err(error) = freed {
            tracing::warn!("GPU memory was not given back: {}", Error::from(error));
        }
    }
}

/// Page-locked host memory, given back on drop.
#[derive(Debug)]
pub struct PinnedBuffer {
    pointer: *mut c_void,
    num_bytes: usize,
    context: Arc<CudaContext>,
}

impl PinnedBuffer {
    /// The address, which is the same for kernels.
    pub fn address(&self) -> u64 {
        self.pointer as u64
    }

    /// The size.
    pub fn num_bytes(&self) -> usize {
        self.num_bytes
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: the allocation has num_bytes, initialised when it was made.
        unsafe { std::slice::from_raw_parts(self.pointer.cast(), self.num_bytes) }
    }

    /// The bytes, to write.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.cast(), self.num_bytes) }
    }

    /// Copies `data` to `offset_bytes`.
    ///
    /// # Panics
    /// If `data` reaches past the end.
    pub fn write<T: DeviceRepr>(&mut self, offset_bytes: usize, data: &[T]) {
        let num_bytes = size_of_val(data);
        // SAFETY: these are the bytes of `data`, which types for the device have no padding in.
        let bytes = unsafe { std::slice::from_raw_parts(data.as_ptr().cast::<u8>(), num_bytes) };
        self.as_mut_slice()[offset_bytes..offset_bytes + num_bytes].copy_from_slice(bytes);
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        let freed = self.context.synchronize().and_then(|()| {
            // SAFETY: the pointer came from malloc_host and is freed once; the device is idle.
            unsafe { result::free_host(self.pointer) }
        });
        if let Err(error) = freed {
            tracing::warn!("pinned memory was not given back: {}", Error::from(error));
        }
    }
}

/// A point in the stream that the host can wait for.
#[derive(Debug)]
pub struct Event {
    event: CudaEvent,
    stream: Arc<CudaStream>,
}

impl Event {
    /// Moves it behind the work enqueued so far.
    pub fn record(&self) -> Result<()> {
        Ok(self.event.record(&self.stream)?)
    }

    /// Waits until the stream has come to it, and says if any work failed.
    pub fn wait(&self) -> Result<()> {
        Ok(self.event.synchronize()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_architecture_is_the_compilers_name() {
        assert_eq!(architecture(8, 0), "sm_80");
        assert_eq!(architecture(9, 0), "sm_90a");
        assert_eq!(architecture(12, 0), "sm_120a");
    }
}
