//! Paged attention against its reference on a GPU; skips where there is none.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by a panic and says what it measured"
)]

mod cuda_fixture;

use std::ops::Range;

use cuda_fixture::{Random, assert_close, download, floats, kernels, poisoned};
use half::bf16;
use nano_kernels::cuda::attention::{
    AttentionInput, DecodePlan, DecodeRows, Heads, PrefillRows, PrefillSequence, prefill_tiles,
};
use nano_kernels::cuda::rope::RopeWriteKv;
use nano_kernels::cuda::{DeviceBuffer, Graph, Kernels};
use nano_kernels::reference::attention::{PagedCache, paged_attention};

const BLOCK_SIZE: usize = 16;
/// Operands and weights are bf16, sums f32.
const BOUND: f64 = 5e-3;

/// New tokens of one sequence and the length of its cached prefix.
#[derive(Clone, Copy, Debug)]
struct Sequence {
    prefix: usize,
    num_tokens: usize,
}

/// A batch on both sides: scattered blocks, NaN wherever no key may be read.
struct Case {
    heads: Heads,
    window: Option<u32>,
    sequences: Vec<Sequence>,
    max_blocks: usize,
    tables: Vec<Vec<u32>>,
    cache: Vec<bf16>,
    query: Vec<bf16>,
    cache_on: DeviceBuffer,
    query_on: DeviceBuffer,
    table_on: DeviceBuffer,
}

impl Case {
    fn new(
        kernels: &Kernels,
        random: &mut Random,
        heads: Heads,
        window: Option<u32>,
        sequences: &[Sequence],
    ) -> Self {
        let num_blocks_of =
            |sequence: &Sequence| (sequence.prefix + sequence.num_tokens).div_ceil(BLOCK_SIZE);
        let max_blocks = sequences.iter().map(num_blocks_of).max().unwrap() + 1;
        let num_blocks: usize = sequences.iter().map(num_blocks_of).sum();
        let mut free = random.shuffled(num_blocks + 1);
        let tables: Vec<Vec<u32>> = sequences
            .iter()
            .map(|sequence| free.split_off(free.len() - num_blocks_of(sequence)))
            .map(|table| table.into_iter().map(|block| block as u32).collect())
            .collect();

        let row_len = heads.head_dim;
        let block_len = 2 * heads.num_kv_heads * BLOCK_SIZE * row_len;
        let mut cache = random.values((num_blocks + 1) * block_len);
        for (sequence, table) in sequences.iter().zip(&tables) {
            let len = sequence.prefix + sequence.num_tokens;
            for position in len..len.next_multiple_of(BLOCK_SIZE) {
                for row in cache_rows(heads, table, position) {
                    cache[row].fill(bf16::NAN);
                }
            }
        }
        let num_tokens: usize = sequences.iter().map(|sequence| sequence.num_tokens).sum();
        let query = random.values(num_tokens * heads.num_heads * row_len);

        // Blocks that every token's window has left behind are gone from the table.
        let visible_from = |sequence: &Sequence| {
            window.map_or(0, |window| (sequence.prefix + 1).saturating_sub(window as usize))
        };
        let flat: Vec<i32> = sequences
            .iter()
            .zip(&tables)
            .flat_map(|(sequence, table)| {
                let first_block = visible_from(sequence) / BLOCK_SIZE;
                (0..max_blocks).map(move |i| match table.get(i) {
                    Some(&block) if i >= first_block => block as i32,
                    _ => i32::MAX,
                })
            })
            .collect();
        let device = kernels.device();
        Self {
            cache_on: device.allocate_from(&cache).unwrap(),
            query_on: device.allocate_from(&query).unwrap(),
            table_on: device.allocate_from(&flat).unwrap(),
            heads,
            window,
            sequences: sequences.to_vec(),
            max_blocks,
            tables,
            cache,
            query,
        }
    }

    fn input(&self) -> AttentionInput {
        AttentionInput {
            cache: self.cache_on.address(),
            block_table: self.table_on.address(),
            max_blocks: self.max_blocks,
            heads: self.heads,
            window: self.window,
        }
    }

    fn expected(&self) -> Vec<f32> {
        let Heads { num_heads, num_kv_heads, head_dim } = self.heads;
        let data = floats(&self.cache);
        let cache = PagedCache { data: &data, block_size: BLOCK_SIZE, num_kv_heads, head_dim };
        let query = floats(&self.query);
        let mut rows = query.chunks(num_heads * head_dim);
        let mut expected = Vec::with_capacity(query.len());
        for (sequence, table) in self.sequences.iter().zip(&self.tables) {
            for token in 0..sequence.num_tokens {
                let position = sequence.prefix + token;
                let window = self.window.map(|window| window as usize);
                let row = rows.next().unwrap();
                expected.extend(paged_attention(row, cache, table, position, window));
            }
        }
        expected
    }

    fn lengths(&self) -> Vec<i32> {
        self.sequences.iter().map(|s| (s.prefix + s.num_tokens) as i32).collect()
    }

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
        lengths: &[i32],
    ) -> (Vec<u16>, Vec<u16>) {
        let device = kernels.device();
        let cache = device.allocate_from(&self.older()).unwrap();
        let qkv = device.allocate_from(qkv).unwrap();
        let cos_sin = device.allocate_from(cos_sin).unwrap();
        let length = device.allocate_from(lengths).unwrap();
        let out = poisoned(device, self.query.len());
        let input = AttentionInput { cache: cache.address(), ..self.input() };
        let rows = DecodeRows {
            qkv: qkv.address(),
            cos_sin: cos_sin.address(),
            length: length.address(),
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

    /// By each kernel that this device has; the one for any device first.
    fn prefill(&self, kernels: &Kernels) -> Vec<Vec<f32>> {
        let device = kernels.device();
        let mut first_token = 0;
        let sequences: Vec<PrefillSequence> = self
            .sequences
            .iter()
            .enumerate()
            .map(|(sequence, &Sequence { prefix, num_tokens })| {
                first_token += num_tokens;
                PrefillSequence {
                    sequence,
                    first_token: first_token - num_tokens,
                    num_tokens,
                    first_position: prefix,
                }
            })
            .collect();
        let tiles = prefill_tiles(self.heads, &sequences);
        let tiles_on = device.allocate_from(&tiles).unwrap();
        let (out, input) = (poisoned(device, self.query.len()), self.input());
        let rows = PrefillRows {
            query: self.query_on.address(),
            tiles: tiles_on.address(),
            num_tiles: tiles.len(),
            num_tokens: first_token,
        };
        // SAFETY: every buffer was allocated with the size of its shape; positions fit the tables.
        unsafe { kernels.prefill_attention(&input, &rows, out.address()) }.unwrap();
        let mut found = vec![download(&out)];
        // Twice: what the first launch leaves behind does not change the second.
        for round in 0..2 {
            if !kernels.has_prefill_attention_wgmma() {
                break;
            }
            out.fill(0xff).unwrap();
            // SAFETY: as above.
            unsafe { kernels.prefill_attention_wgmma(&input, &rows, out.address()) }.unwrap();
            if round == 0 {
                found.push(download(&out));
            } else {
                assert_eq!(download(&out), found[1], "equal launches give equal bits");
            }
        }
        found
    }

    fn check_prefill(&self, what: &str, kernels: &Kernels) {
        let expected = self.expected();
        for (number, found) in self.prefill(kernels).iter().enumerate() {
            assert_close(&format!("{what}, kernel {number}"), found, &expected, BOUND);
        }
    }
}

/// Where the keys of a position lie in the cache, head by head, and then its values.
fn cache_rows(
    heads: Heads,
    table: &[u32],
    position: usize,
) -> impl Iterator<Item = Range<usize>> + use<> {
    let Heads { num_kv_heads, head_dim, .. } = heads;
    let block = table[position / BLOCK_SIZE] as usize;
    (0..2 * num_kv_heads).map(move |head| {
        let tile = block * 2 * num_kv_heads + head;
        let row = (tile * BLOCK_SIZE + position % BLOCK_SIZE) * head_dim;
        row..row + head_dim
    })
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

const fn heads(num_heads: usize, num_kv_heads: usize, head_dim: usize) -> Heads {
    Heads { num_heads, num_kv_heads, head_dim }
}

const MANY_HEADS: [Heads; 8] = [
    heads(32, 8, 128),
    heads(32, 8, 64),
    heads(8, 1, 128),
    heads(4, 4, 64),
    heads(6, 2, 128),
    heads(10, 2, 64),
    heads(14, 2, 128),
    heads(12, 2, 64),
];

#[test]
fn one_token_sees_all_keys_of_its_sequence() {
    let Some(kernels) = kernels() else { return };
    let mut random = Random(8);
    for heads in MANY_HEADS {
        let plan = DecodePlan::new(kernels.device(), heads, 70).unwrap();
        for batch in
            [vec![1], vec![16], vec![17], vec![513], vec![3000], vec![1, 16, 31, 2, 700, 64]]
        {
            let case = Case::new(&kernels, &mut random, heads, None, &lengths(&batch));
            let what = format!("decode {batch:?}, {heads:?}");
            assert_close(&what, &case.decode(&kernels, &plan), &case.expected(), BOUND);
        }
    }
    let heads = heads(32, 8, 128);
    let plan = DecodePlan::new(kernels.device(), heads, 70).unwrap();
    let batch: Vec<usize> = (0..70).map(|_| 1 + random.below(200)).collect();
    let case = Case::new(&kernels, &mut random, heads, None, &lengths(&batch));
    assert_close("decode 70 sequences", &case.decode(&kernels, &plan), &case.expected(), BOUND);
}

#[test]
fn one_token_sees_its_window_alone() {
    let Some(kernels) = kernels() else { return };
    let mut random = Random(9);
    for heads in [heads(32, 8, 128), heads(6, 2, 64)] {
        let plan = DecodePlan::new(kernels.device(), heads, 8).unwrap();
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
        let plan = DecodePlan::new(kernels.device(), heads, 2).unwrap();
        let case = Case::new(&kernels, &mut random, heads, window, &lengths(&[32_768, 32_767]));
        let what = format!("decode 32k, window {window:?}, {heads:?}");
        assert_close(&what, &case.decode(&kernels, &plan), &case.expected(), BOUND);
        let chunk = [Sequence { prefix: 32_768 - 70, num_tokens: 70 }];
        let case = Case::new(&kernels, &mut random, heads, window, &chunk);
        let what = format!("prefill at 32k, window {window:?}, {heads:?}");
        case.check_prefill(&what, &kernels);
    }
}

#[test]
fn new_tokens_see_the_prefix_and_each_other_causally() {
    let Some(kernels) = kernels() else { return };
    let mut random = Random(11);
    for heads in MANY_HEADS {
        for batch in [
            &[(0, 1)][..],
            &[(0, 16)],
            &[(0, 33)],
            &[(15, 17)],
            &[(0, 70), (100, 33), (45, 1), (0, 128), (511, 2)],
            &[(640, 300)],
        ] {
            let sequences: Vec<Sequence> =
                batch.iter().map(|&(prefix, num_tokens)| Sequence { prefix, num_tokens }).collect();
            let case = Case::new(&kernels, &mut random, heads, None, &sequences);
            let what = format!("prefill {batch:?}, {heads:?}");
            case.check_prefill(&what, &kernels);
        }
    }
}

/// More pieces of work than the device takes at once, and long ones.
#[test]
fn many_new_tokens_are_the_same_to_both_kernels() {
    let Some(kernels) = kernels() else { return };
    let mut random = Random(14);
    for (heads, window) in [
        (heads(32, 8, 128), None),
        (heads(32, 8, 64), None),
        (heads(32, 8, 128), Some(1000)),
        (heads(12, 4, 128), None),
        (heads(16, 16, 64), Some(130)),
    ] {
        let sequences = [(0, 2048), (4096, 512), (3, 1), (777, 901), (0, 16), (1000, 5)]
            .map(|(prefix, num_tokens)| Sequence { prefix, num_tokens });
        let case = Case::new(&kernels, &mut random, heads, window, &sequences);
        let found = case.prefill(&kernels);
        for other in &found[1..] {
            let what = format!("3483 tokens by both kernels, window {window:?}, {heads:?}");
            assert_close(&what, other, &found[0], BOUND);
        }
    }
}

#[test]
fn new_tokens_see_their_windows_alone() {
    let Some(kernels) = kernels() else { return };
    let mut random = Random(12);
    for heads in [heads(32, 8, 128), heads(6, 2, 64), heads(2, 2, 128)] {
        for window in [1, 16, 17, 100, 1000] {
            let sequences = [(0, 1), (0, 300), (900, 150), (2000, 40)]
                .map(|(prefix, num_tokens)| Sequence { prefix, num_tokens });
            let case = Case::new(&kernels, &mut random, heads, Some(window), &sequences);
            let what = format!("prefill, window {window}, {heads:?}");
            case.check_prefill(&what, &kernels);
        }
    }
}

/// Decode attention of unrotated rows, against the kernel for prompts and then angles of zero.
#[test]
fn decoding_turns_and_writes_as_the_kernel_for_prompts_does() {
    let Some(kernels) = kernels() else { return };
    let mut random = Random(15);
    for heads in MANY_HEADS {
        let plan = DecodePlan::new(kernels.device(), heads, 70).unwrap();
        for window in [None, Some(1), Some(17), Some(4096)] {
            for batch in [vec![1], vec![16], vec![17], vec![1, 16, 17, 2000, 64, 4097], vec![9; 70]]
            {
                check_turned(&kernels, &mut random, &plan, heads, window, &batch);
            }
        }
    }
    let heads = heads(32, 8, 128);
    let plan = DecodePlan::new(kernels.device(), heads, 2).unwrap();
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
        num_heads,
        num_kv_heads,
        head_dim,
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
    let plan = DecodePlan::new(device, heads, 5).unwrap();
    let length_on = device.allocate_from(&[0_i32; 5]).unwrap();
    let qkv_on = device.allocate_from(&case.qkv()).unwrap();
    let cos_sin_on = device.allocate_from(&no_angles(2000, heads.head_dim)).unwrap();
    let out = poisoned(device, case.query.len());
    let rows = DecodeRows {
        qkv: qkv_on.address(),
        cos_sin: cos_sin_on.address(),
        length: length_on.address(),
        num_sequences: 5,
    };
    let graph = Graph::capture(device, || {
        // SAFETY: every buffer was allocated with the size of its shape and outlives the graph.
        unsafe { kernels.decode_attention(&plan, &case.input(), &rows, out.address()) }
    })
    .unwrap();
    for batch in [[2000, 1, 16, 500, 1999], [3, 700, 2, 33, 64], [1, 1, 1, 1, 1]] {
        let mut on_device: Vec<i32> = batch.iter().map(|&length| length as i32).collect();
        on_device[3] = 0;
        length_on.upload(0, &on_device).unwrap();
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
