//! Paged attention of one token a sequence against its reference on a GPU; skips where there is
//! none.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by a panic and says what it measured"
)]

mod cuda_case;
mod cuda_fixture;
mod oracle;

use cuda_case::{BLOCK_SIZE, BOUND, Case, MANY_HEADS, Sequence, cache_rows, heads};
use cuda_fixture::{Random, assert_close, download, kernels, poisoned};
use half::bf16;
use nano_kernels::cuda::attention::{AttentionInput, DecodePlan, DecodeRows, Heads};
use nano_kernels::cuda::rope::RopeWriteKv;
use nano_kernels::cuda::{DeviceBuffer, Graph, Kernels};

impl Case {
    /// Each sequence's query, and its newest keys and values as the cache has them.
    fn qkv(&self) -> Vec<bf16> {
        let queries = self.query.chunks(self.heads.num_heads * self.heads.head_dim);
        let mut qkv = Vec::new();
        for ((query, table), length) in queries.zip(&self.tables).zip(self.lengths()) {
            qkv.extend_from_slice(query);
            for row in cache_rows(self.heads, table, length as usize - 1) {
                qkv.extend_from_slice(&self.cache[row]);
            }
        }
        qkv
    }

    /// The cache without the newest rows.
    fn older(&self) -> Vec<bf16> {
        let mut cache = self.cache.clone();
        for (table, length) in self.tables.iter().zip(self.lengths()) {
            for row in cache_rows(self.heads, table, length as usize - 1) {
                cache[row].fill(bf16::NAN);
            }
        }
        cache
    }

    /// The bits of the output, and of the cache that was the older one.
    fn decode_bits(
        &self,
        kernels: &Kernels,
        plan: &DecodePlan,
        qkv: &[bf16],
        cos_sin: &[f32],
        lengths: &[u32],
    ) -> (Vec<u16>, Vec<u16>) {
        let device = kernels.device();
        let cache = device.allocate_from(&self.older()).unwrap();
        let qkv = device.allocate_from(qkv).unwrap();
        let cos_sin = device.allocate_from(cos_sin).unwrap();
        let parts = device.allocate_from(&plan.parts(lengths, lengths.len())).unwrap();
        let out = poisoned(device, self.query.len());
        let input = AttentionInput { cache: cache.address(), ..self.input() };
        let rows = DecodeRows {
            qkv: qkv.address(),
            cos_sin: cos_sin.address(),
            parts: parts.address(),
            num_sequences: lengths.len(),
        };
        // SAFETY: every buffer was allocated with the size of its shape; lengths fit the tables.
        unsafe { kernels.decode_attention(plan, &input, &rows, out.address()) }.unwrap();
        (bits(&out), bits(&cache))
    }

    /// By angles of zero, so that queries and keys are what they were.
    fn decode(&self, kernels: &Kernels, plan: &DecodePlan) -> Vec<f32> {
        let still = no_angles(self.max_blocks * BLOCK_SIZE, self.heads.head_dim);
        let (out, cache) = self.decode_bits(kernels, plan, &self.qkv(), &still, &self.lengths());
        assert!(cache.iter().zip(&self.cache).all(|(&a, b)| a == b.to_bits()), "newest rows");
        out.into_iter().map(|bits| bf16::from_bits(bits).to_f32()).collect()
    }
}

fn no_angles(num_positions: usize, head_dim: usize) -> Vec<f32> {
    (0..num_positions * head_dim).map(|i| f32::from(i % head_dim < head_dim / 2)).collect()
}

fn bits(buffer: &DeviceBuffer) -> Vec<u16> {
    let mut bits = vec![0; buffer.num_bytes() / size_of::<bf16>()];
    buffer.download(0, &mut bits).unwrap();
    bits
}

fn lengths(lengths: &[usize]) -> Vec<Sequence> {
    lengths.iter().map(|&length| Sequence { prefix: length - 1, num_tokens: 1 }).collect()
}

#[test]
fn one_token_sees_all_keys_of_its_sequence() {
    let Some(kernels) = kernels() else { return };
    let mut random = Random(8);
    for heads in MANY_HEADS {
        let plan = DecodePlan::new(kernels.device(), heads, 70, None).unwrap();
        for batch in
            [vec![1], vec![16], vec![17], vec![513], vec![3000], vec![1, 16, 31, 2, 700, 64]]
        {
            let case = Case::new(&kernels, &mut random, heads, None, &lengths(&batch));
            let what = format!("decode {batch:?}, {heads:?}");
            assert_close(&what, &case.decode(&kernels, &plan), &case.expected(), BOUND);
        }
    }
    let heads = heads(32, 8, 128);
    let plan = DecodePlan::new(kernels.device(), heads, 70, None).unwrap();
    let batch: Vec<usize> = (0..70).map(|_| 1 + random.below(200)).collect();
    let case = Case::new(&kernels, &mut random, heads, None, &lengths(&batch));
    assert_close("decode 70 sequences", &case.decode(&kernels, &plan), &case.expected(), BOUND);
}

#[test]
fn one_token_sees_its_window_alone() {
    let Some(kernels) = kernels() else { return };
    let mut random = Random(9);
    for heads in [heads(32, 8, 128), heads(6, 2, 64)] {
        let plan = DecodePlan::new(kernels.device(), heads, 8, None).unwrap();
        for window in [1, 15, 16, 17, 100, 4096] {
            let batch = [1, 15, 16, 17, 99, 1000, 4500];
            let case = Case::new(&kernels, &mut random, heads, Some(window), &lengths(&batch));
            let what = format!("decode, window {window}, {heads:?}");
            assert_close(&what, &case.decode(&kernels, &plan), &case.expected(), BOUND);
        }
    }
}

#[test]
fn a_context_of_32k_is_read_to_the_end() {
    let Some(kernels) = kernels() else { return };
    let mut random = Random(10);
    for (heads, window) in
        [(heads(32, 8, 128), None), (heads(32, 8, 64), None), (heads(32, 8, 128), Some(4096))]
    {
        let plan = DecodePlan::new(kernels.device(), heads, 2, None).unwrap();
        let case = Case::new(&kernels, &mut random, heads, window, &lengths(&[32_768, 32_767]));
        let what = format!("decode 32k, window {window:?}, {heads:?}");
        assert_close(&what, &case.decode(&kernels, &plan), &case.expected(), BOUND);
    }
}

/// Decode attention of unrotated rows, against the kernel for prompts and then angles of zero.
#[test]
fn decoding_turns_and_writes_as_the_kernel_for_prompts_does() {
    let Some(kernels) = kernels() else { return };
    let mut random = Random(15);
    for heads in MANY_HEADS {
        let plan = DecodePlan::new(kernels.device(), heads, 70, None).unwrap();
        for window in [None, Some(1), Some(17), Some(4096)] {
            for batch in [vec![1], vec![16], vec![17], vec![1, 16, 17, 2000, 64, 4097], vec![9; 70]]
            {
                check_turned(&kernels, &mut random, &plan, heads, window, &batch);
            }
        }
    }
    let heads = heads(32, 8, 128);
    let plan = DecodePlan::new(kernels.device(), heads, 2, None).unwrap();
    for batch in [[32_768, 32_753], [1024, 1025], [513, 512], [8193, 16]] {
        check_turned(&kernels, &mut random, &plan, heads, None, &batch);
    }
}

/// The third sequence, if there is one, is a padding row.
fn check_turned(
    kernels: &Kernels,
    random: &mut Random,
    plan: &DecodePlan,
    heads: Heads,
    window: Option<u32>,
    batch: &[usize],
) {
    let device = kernels.device();
    let case = Case::new(kernels, random, heads, window, &lengths(batch));
    let Heads { num_heads, num_kv_heads, head_dim } = heads;
    let (query_len, row_len) = (num_heads * head_dim, (num_heads + 2 * num_kv_heads) * head_dim);
    let qkv = random.values(batch.len() * row_len);
    let num_positions = case.max_blocks * BLOCK_SIZE;
    let cos_sin: Vec<f32> = (0..num_positions * head_dim).map(|_| random.value()).collect();
    let position: Vec<i32> = batch.iter().map(|&length| length as i32 - 1).collect();
    let mut slot: Vec<i32> = Vec::new();
    for (table, &position) in case.tables.iter().zip(&position) {
        slot.push(table[position as usize / BLOCK_SIZE] as i32 * 16 + position % 16);
    }
    let mut length = case.lengths();
    if batch.len() > 2 {
        (slot[2], length[2]) = (-1, 0);
    }

    let (query_on, cache_on) =
        (poisoned(device, case.query.len()), device.allocate_from(&case.older()).unwrap());
    let (qkv_on, cos_sin_on) =
        (device.allocate_from(&qkv).unwrap(), device.allocate_from(&cos_sin).unwrap());
    let (position_on, slot_on) =
        (device.allocate_from(&position).unwrap(), device.allocate_from(&slot).unwrap());
    let launch = RopeWriteKv {
        query: query_on.address(),
        cache: cache_on.address(),
        qkv: qkv_on.address(),
        cos_sin: cos_sin_on.address(),
        position: position_on.address(),
        slot: slot_on.address(),
        num_tokens: batch.len(),
        heads,
    };
    // SAFETY: every buffer was allocated above with the size of its shape.
    unsafe { kernels.rope_write_kv(&launch) }.unwrap();
    let (query, cache) = (bits(&query_on), bits(&cache_on));

    let mut turned = Vec::new();
    for ((query, table), &position) in query.chunks(query_len).zip(&case.tables).zip(&position) {
        turned.extend_from_slice(query);
        for row in cache_rows(heads, table, position as usize) {
            turned.extend_from_slice(&cache[row]);
        }
    }
    let turned: Vec<bf16> = turned.into_iter().map(bf16::from_bits).collect();
    let still = no_angles(num_positions, head_dim);
    let (expected, _) = case.decode_bits(kernels, plan, &turned, &still, &length);
    let (found, written) = case.decode_bits(kernels, plan, &qkv, &cos_sin, &length);
    let what = format!("{batch:?}, window {window:?}, {heads:?}");
    assert!(found == expected, "attention of {what}");
    assert!(written == cache, "the cache of {what}");
}

#[test]
fn one_graph_serves_any_lengths_and_a_padding_row_gets_zeros() {
    let Some(kernels) = kernels() else { return };
    let device = kernels.device();
    let mut random = Random(13);
    let heads = heads(32, 8, 128);
    let longest = [2000; 5];
    let mut case = Case::new(&kernels, &mut random, heads, None, &lengths(&longest));
    let plan = DecodePlan::new(device, heads, 5, None).unwrap();
    let parts_on = device.allocate_from(&plan.parts(&[], 5)).unwrap();
    let qkv_on = device.allocate_from(&case.qkv()).unwrap();
    let cos_sin_on = device.allocate_from(&no_angles(2000, heads.head_dim)).unwrap();
    let out = poisoned(device, case.query.len());
    let rows = DecodeRows {
        qkv: qkv_on.address(),
        cos_sin: cos_sin_on.address(),
        parts: parts_on.address(),
        num_sequences: 5,
    };
    let graph = Graph::capture(device, || {
        // SAFETY: every buffer was allocated with the size of its shape and outlives the graph.
        unsafe { kernels.decode_attention(&plan, &case.input(), &rows, out.address()) }
    })
    .unwrap();
    for batch in [[2000, 1, 16, 500, 1999], [3, 700, 2, 33, 64], [1, 1, 1, 1, 1]] {
        let mut on_device: Vec<u32> = batch.iter().map(|&length| length as u32).collect();
        on_device[3] = 0;
        parts_on.upload(0, &plan.parts(&on_device, 5)).unwrap();
        case.sequences = lengths(&batch);
        qkv_on.upload(0, &case.qkv()).unwrap();
        let mut expected = case.expected();
        let row_len = heads.num_heads * heads.head_dim;
        expected[3 * row_len..4 * row_len].fill(0.0);
        out.fill(0xff).unwrap();
        graph.launch().unwrap();
        assert_close(&format!("graph at {on_device:?}"), &download(&out), &expected, BOUND);
        let first = download(&out);
        graph.launch().unwrap();
        assert_eq!(download(&out), first, "equal launches give equal bits");
    }
}
