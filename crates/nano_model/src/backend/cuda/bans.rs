//! Banned tokens on their way to the device.

use nano_kernels::cuda::{Device, DeviceBuffer, Event, PinnedBuffer};

use crate::error::Result;

/// The buffer on the device, and two on the host in turn: the host need not wait for the forward
/// pass that the bans come after. All grow as needed.
#[derive(Debug)]
pub(super) struct Bans {
    device: DeviceBuffer,
    staging: [(PinnedBuffer, Event); 2],
    turn: usize,
}

impl Bans {
    pub(super) fn new(device: &Device) -> Result<Self> {
        let staging = || -> Result<_> { Ok((device.allocate_pinned(0)?, device.new_event()?)) };
        let staging = [staging()?, staging()?];
        Ok(Self { device: device.allocate(0)?, staging, turn: 0 })
    }

    /// Enqueues the copy of `banned` and says where it goes: `[num_banned, 2]` u32.
    pub(super) fn upload(&mut self, device: &Device, banned: &[u32]) -> Result<u64> {
        let num_bytes = size_of_val(banned);
        self.turn = 1 - self.turn;
        let (staging, copied) = &mut self.staging[self.turn];
        copied.wait()?;
        if staging.as_slice().len() < num_bytes {
            *staging = device.allocate_pinned(2 * num_bytes)?;
        }
        if self.device.num_bytes() < num_bytes {
            // The one before is given back when the device has come to the end of its work.
            self.device = device.allocate(2 * num_bytes)?;
        }
        staging.write(0, banned);
        // SAFETY: the staging buffer is not written before `copied` has passed, and both buffers
        // live until the device has ended.
        unsafe { self.device.enqueue_upload(staging, num_bytes) }?;
        copied.record()?;
        Ok(self.device.address())
    }
}
