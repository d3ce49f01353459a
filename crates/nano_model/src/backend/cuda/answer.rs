//! What the host hears of a step, and says about its choices.

use nano_kernels::cuda::{Device, Event, PinnedBuffer};

use crate::error::Result;

/// Memory of the host that the kernels of one step at a time read and write themselves.
#[derive(Debug)]
pub struct Answer {
    /// The choices, `[num_sampled]` u32.
    pub(super) chosen: PinnedBuffer,
    /// What may not be chosen, `[num_banned, 2]` u32: a row and a token. Grows as needed.
    pub(super) banned: PinnedBuffer,
    pub(super) done: Event,
}

impl Answer {
    /// For steps of up to so many rows that are sampled.
    pub fn new(device: &Device, max_sampled: usize) -> Result<Self> {
        Ok(Self {
            chosen: device.allocate_pinned(max_sampled * size_of::<u32>())?,
            banned: device.allocate_pinned(0)?,
            done: device.new_event()?,
        })
    }

    /// Waits for the step's choices: each row's, as bytes.
    pub fn wait(&self) -> Result<&[[u8; 4]]> {
        self.done.wait()?;
        Ok(self.chosen.as_slice().as_chunks().0)
    }

    /// Writes what may not be chosen, once the step before is done with it.
    pub(super) fn ban(&mut self, device: &Device, banned: &[u32]) -> Result<()> {
        self.done.wait()?;
        if self.banned.num_bytes() < size_of_val(banned) {
            self.banned = device.allocate_pinned(2 * size_of_val(banned))?;
        }
        self.banned.write(0, banned);
        Ok(())
    }
}
