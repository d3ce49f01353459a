//! A step on its way to the device: packed into one pinned buffer and sent with a copy or two.

use nano_kernels::cuda::attention::{DecodePart, DecodePlan, Heads, PrefillTile, prefill_tiles};
use nano_kernels::cuda::sampling::RowSampling;
use nano_kernels::cuda::{Device, DeviceBuffer, Event, PinnedBuffer};

use crate::batch::Batch;
use crate::error::Result;

/// Copies begin where the widest load may.
const ALIGNMENT: usize = 16;
/// Unused bytes of block tables that are worth a copy of their own of what is used.
const MIN_UNUSED_BYTES: usize = 256 << 10;
/// The slot of a row that writes nothing.
const NO_SLOT: u32 = u32::MAX;

/// What a step is made of.
#[derive(Debug, Default)]
pub struct StepInput {
    /// Its rows. Leading sequences of one row decode, all others prefill.
    pub batch: Batch,
    /// How the first logit rows are sampled.
    pub sampling: Vec<RowSampling>,
    /// The rows of the graph that the step is for: all decode, and every row has logits.
    pub graph_rows: Option<usize>,
    /// Whether the logits go to the host.
    pub keeps_logits: bool,
}

/// A step on the device: sizes and addresses, which alone a captured graph knows.
#[derive(Clone, Copy, Debug)]
pub struct CudaStep {
    pub(super) counts: Counts,
    pub(super) num_decodes: usize,
    pub(super) num_sampled: usize,
    pub(super) keeps_logits: bool,
    /// All of whose rows have logits.
    pub(super) is_graph: bool,
    pub(super) at: Layout,
}

/// The buffer on the device, and two on the host in turn: one is filled while the other is read.
#[derive(Debug)]
pub(super) struct StepBuffers {
    device: DeviceBuffer,
    staging: [(PinnedBuffer, Event); 2],
    turn: usize,
    heads: Heads,
    /// Entries of a block table.
    pub(super) max_blocks: usize,
    /// Whether every row goes through prefill attention, whose sums no batch changes.
    only_tiles: bool,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Counts {
    pub(super) tokens: usize,
    sequences: usize,
    parts: usize,
    pub(super) tiles: usize,
    pub(super) logit_rows: usize,
}

/// Where each part of a step begins.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) token: u64,
    pub(super) from_sampled: u64,
    pub(super) position: u64,
    pub(super) slot: u64,
    pub(super) parts: u64,
    pub(super) logit_row: u64,
    pub(super) sampling: u64,
    pub(super) tiles: u64,
    pub(super) block_table: u64,
    end: u64,
}

impl Layout {
    /// One behind the other from an address on.
    fn new(mut end: u64, counts: Counts, max_blocks: usize) -> Self {
        let mut take = |num_bytes: usize| {
            let start = end;
            end += num_bytes.next_multiple_of(ALIGNMENT) as u64;
            start
        };
        Self {
            token: take(counts.tokens * 4),
            from_sampled: take(counts.tokens * 4),
            position: take(counts.tokens * 4),
            slot: take(counts.tokens * 4),
            parts: take(counts.parts * size_of::<DecodePart>()),
            logit_row: take(counts.logit_rows * 4),
            sampling: take(counts.logit_rows * size_of::<RowSampling>()),
            tiles: take(counts.tiles * size_of::<PrefillTile>()),
            block_table: take(counts.sequences * max_blocks * 4),
            end,
        }
    }
}

impl StepBuffers {
    /// For steps of up to so many tokens and sequences.
    pub(super) fn new(
        device: &Device,
        plan: &DecodePlan,
        heads: Heads,
        max_tokens: usize,
        max_sequences: usize,
        max_blocks: usize,
        only_tiles: bool,
    ) -> Result<Self> {
        // At worst every sequence begins a tile, and one token follows the other.
        let counts = Counts {
            tokens: max_tokens,
            sequences: max_sequences,
            parts: plan.parts(&[], max_sequences).len(),
            tiles: max_sequences + max_tokens,
            logit_rows: max_tokens,
        };
        let num_bytes = Layout::new(0, counts, max_blocks).end as usize;
        let staging = || -> Result<(PinnedBuffer, Event)> {
            Ok((device.allocate_pinned(num_bytes)?, device.new_event()?))
        };
        Ok(Self {
            device: device.allocate(num_bytes)?,
            staging: [staging()?, staging()?],
            turn: 0,
            heads,
            max_blocks,
            only_tiles,
        })
    }

    /// Enqueues the copy of a step: all at once, or of long block tables only what is used.
    pub(super) fn upload(&mut self, input: &StepInput, plan: &DecodePlan) -> Result<CudaStep> {
        let StepInput { batch, sampling, graph_rows, keeps_logits } = input;
        let decodes = batch.sequences.iter().take_while(|it| it.num_rows == 1 && !self.only_tiles);
        let lengths: Vec<u32> = decodes.map(|it| it.context_len() as u32).collect();
        let mut num_decodes = lengths.len();
        let prefills = batch.sequences.iter().enumerate().skip(num_decodes);
        let prefills = prefills.map(|(sequence, it)| PrefillTile {
            sequence: sequence as i32,
            first_token: it.first_row as i32,
            num_tokens: it.num_rows as i32,
            first_position: it.first_position as i32,
        });
        let mut tiles = prefill_tiles(self.heads, prefills.collect());
        if let Some(rows) = *graph_rows {
            let num_tiles = if self.only_tiles { rows } else { 0 };
            tiles.resize(num_tiles, PrefillTile::default());
            num_decodes = rows - num_tiles;
        }
        let parts = plan.parts(&lengths, num_decodes);
        let counts = Counts {
            tokens: graph_rows.unwrap_or(batch.token_ids.len()),
            sequences: graph_rows.unwrap_or(batch.sequences.len()),
            parts: parts.len(),
            tiles: tiles.len(),
            logit_rows: graph_rows.unwrap_or(batch.logit_rows.len()),
        };
        let at = Layout::new(self.device.address(), counts, self.max_blocks);
        let offset = |address: u64| (address - self.device.address()) as usize;

        self.turn = 1 - self.turn;
        let (staging, copied) = &mut self.staging[self.turn];
        copied.wait()?;
        // A row that only fills a graph's shape: token 0 at position 0, which writes no slot.
        let filled = |values: &[u32], len: usize, filler: u32| {
            let mut values = values.to_vec();
            values.resize(len, filler);
            values
        };
        let mut from_sampled = vec![0_u32; counts.tokens];
        for &row in &batch.previous_rows {
            from_sampled[row as usize] = 1;
        }
        staging.write(offset(at.token), &filled(&batch.token_ids, counts.tokens, 0));
        staging.write(offset(at.from_sampled), &from_sampled);
        staging.write(offset(at.position), &filled(&batch.positions, counts.tokens, 0));
        staging.write(offset(at.slot), &filled(&batch.slot_mapping, counts.tokens, NO_SLOT));
        staging.write(offset(at.parts), &parts);
        staging.write(offset(at.logit_row), &batch.logit_rows);
        staging.write(offset(at.sampling), sampling);
        staging.write(offset(at.tiles), &tiles);
        for (index, sequence) in batch.sequences.iter().enumerate() {
            let row = offset(at.block_table) + index * self.max_blocks * 4;
            staging.write(row, &batch.block_ids[sequence.block_table.clone()]);
        }
        let tables = batch.sequences.iter().map(|it| &it.block_table);
        let used_bytes = tables.map(|it| it.end - it.start).max().unwrap_or(0).max(1) * 4;
        let table_bytes = self.max_blocks * 4;
        // SAFETY: the staging buffer is not written before `copied` has passed, and both buffers
        // live as long as this value, whose drop waits for the device.
        unsafe {
            if counts.sequences * (table_bytes - used_bytes) < MIN_UNUSED_BYTES {
                self.device.enqueue_upload(staging, offset(at.end))?;
            } else {
                let rows = (counts.sequences, table_bytes);
                let tables = offset(at.block_table);
                self.device.enqueue_upload(staging, tables)?;
                self.device.enqueue_upload_rows(staging, tables, rows, used_bytes)?;
            }
        }
        copied.record()?;

        Ok(CudaStep {
            counts,
            num_decodes,
            num_sampled: sampling.len(),
            keeps_logits: *keeps_logits,
            is_graph: graph_rows.is_some(),
            at,
        })
    }
}
