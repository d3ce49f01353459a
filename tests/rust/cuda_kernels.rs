//! The small kernels against their references on a GPU; skips where there is none.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::float_cmp,
    clippy::print_stdout,
    reason = "a test fails by a panic and says what it measured; copies are exact"
)]

mod cuda_fixture;
mod oracle;

use cuda_fixture::{Random, assert_close, download, floats, kernels, poisoned};
use half::bf16;
use nano_kernels::cuda::attention::Heads;
use nano_kernels::cuda::gather::{Gather, TokenIds};
use nano_kernels::cuda::norm::RmsNorm;
use nano_kernels::cuda::rope::RopeWriteKv;
use nano_kernels::cuda::{Device, Error, Graph};
use nano_kernels::reference::rope;

/// bf16 rounds by 2⁻⁸ of a value at worst.
const ROUNDING: f64 = 4e-3;

#[test]
fn a_row_is_normalised() {
    let Some(kernels) = kernels() else { return };
    let device = kernels.device();
    let mut random = Random(1);
    for (num_tokens, hidden_size) in
        [(1, 8), (1, 4096), (3, 264), (17, 5120), (2, 14336), (5, 16384), (64, 1024)]
    {
        let input = random.values(num_tokens * hidden_size);
        let weight = random.values(hidden_size);
        let (input_on, weight_on) =
            (device.allocate_from(&input).unwrap(), device.allocate_from(&weight).unwrap());
        let out = poisoned(device, input.len());
        let launch = RmsNorm {
            out: out.address(),
            input: input_on.address(),
            weight: weight_on.address(),
            num_tokens,
            hidden_size,
            eps: 1e-5,
        };
        // SAFETY: every buffer was allocated above with the size of its shape.
        unsafe { kernels.rms_norm(&launch) }.unwrap();
        let expected: Vec<f32> = floats(&input)
            .chunks(hidden_size)
            .flat_map(|row| oracle::rms_norm(row, &floats(&weight), 1e-5))
            .collect();
        let what = format!("rms_norm {num_tokens} x {hidden_size}");
        assert_close(&what, &download(&out), &expected, ROUNDING);
    }
}

#[test]
fn queries_and_keys_are_turned_and_keys_and_values_lie_at_their_slots() {
    let Some(kernels) = kernels() else { return };
    let device = kernels.device();
    let mut random = Random(2);
    for (num_tokens, num_heads, num_kv_heads, head_dim) in
        [(1, 32, 8, 128), (17, 32, 8, 128), (5, 6, 2, 64), (3, 1, 1, 16), (33, 8, 1, 64)]
    {
        let (num_blocks, max_position) = (9, 100);
        let all_heads = num_heads + 2 * num_kv_heads;
        let qkv = random.values(num_tokens * all_heads * head_dim);
        let position: Vec<i32> =
            (0..num_tokens).map(|_| random.below(max_position) as i32).collect();
        let mut slot: Vec<i32> = random.shuffled(num_blocks * 16)[..num_tokens]
            .iter()
            .map(|&slot| slot as i32)
            .collect();
        if num_tokens > 4 {
            slot[2] = -1;
        }
        let half_dim = head_dim / 2;
        let angles: Vec<f32> = (0..max_position * half_dim).map(|_| random.value() * 2.0).collect();
        let cos_sin: Vec<f32> = angles
            .chunks(half_dim)
            .flat_map(|row| {
                row.iter().map(|a| a.cos()).chain(row.iter().map(|a| a.sin())).collect::<Vec<_>>()
            })
            .collect();

        let query = poisoned(device, num_tokens * num_heads * head_dim);
        let cache_len = num_blocks * 2 * num_kv_heads * 16 * head_dim;
        let cache = device.allocate(cache_len * 2).unwrap();
        cache.fill(0).unwrap();
        let qkv_on = device.allocate_from(&qkv).unwrap();
        let cos_sin_on = device.allocate_from(&cos_sin).unwrap();
        let position_on = device.allocate_from(&position).unwrap();
        let slot_on = device.allocate_from(&slot).unwrap();
        let launch = RopeWriteKv {
            query: query.address(),
            cache: cache.address(),
            qkv: qkv_on.address(),
            cos_sin: cos_sin_on.address(),
            position: position_on.address(),
            slot: slot_on.address(),
            num_tokens,
            heads: Heads { num_heads, num_kv_heads, head_dim },
        };
        // SAFETY: every buffer was allocated above with the size of its shape; positions and
        // slots are below their limits.
        unsafe { kernels.rope_write_kv(&launch) }.unwrap();

        let mut expected_query = Vec::new();
        let mut expected_cache = vec![0.0; cache_len];
        for (token, heads) in floats(&qkv).chunks(all_heads * head_dim).enumerate() {
            let row = &cos_sin[position[token] as usize * head_dim..][..head_dim];
            for (head, values) in heads.chunks(head_dim).enumerate() {
                let mut values = values.to_vec();
                if head < num_heads + num_kv_heads {
                    rope::rotate(&mut values, &row[..half_dim], &row[half_dim..]);
                }
                if head < num_heads {
                    expected_query.extend(values);
                } else if let Ok(slot) = usize::try_from(slot[token]) {
                    // k | v and then the head is one index, as after the queries in qkv.
                    let row = (slot / 16 * 2 * num_kv_heads + head - num_heads) * 16 + slot % 16;
                    expected_cache[row * head_dim..][..head_dim].copy_from_slice(&values);
                }
            }
        }
        let what = format!("rope {num_tokens} x ({num_heads} + 2 x {num_kv_heads}) x {head_dim}");
        assert_close(&format!("{what}, query"), &download(&query), &expected_query, ROUNDING);
        assert_close(&format!("{what}, cache"), &download(&cache), &expected_cache, ROUNDING);
    }
}

#[test]
fn the_gate_multiplies() {
    let Some(kernels) = kernels() else { return };
    let device = kernels.device();
    let mut random = Random(3);
    for (num_tokens, intermediate_size) in [(1, 8), (1, 14336), (7, 2056), (33, 3584)] {
        let mut gate_up = random.values(num_tokens * 2 * intermediate_size);
        // Far ends of the gate neither overflow nor become NaN.
        gate_up[0] = bf16::from_f32(-300.0);
        gate_up[1] = bf16::from_f32(300.0);
        let gate_up_on = device.allocate_from(&gate_up).unwrap();
        let out = poisoned(device, num_tokens * intermediate_size);
        let (to, from) = (out.address(), gate_up_on.address());
        // SAFETY: both buffers were allocated above with the size of their shapes.
        unsafe { kernels.silu_mul(to, from, num_tokens, intermediate_size) }.unwrap();
        let expected: Vec<f32> =
            floats(&gate_up).chunks(2 * intermediate_size).flat_map(oracle::silu_mul).collect();
        let what = format!("silu_mul {num_tokens} x {intermediate_size}");
        assert_close(&what, &download(&out), &expected, ROUNDING);
    }
}

#[test]
fn rows_come_by_index_from_the_host_and_from_the_step_before() {
    let Some(kernels) = kernels() else { return };
    let device = kernels.device();
    let mut random = Random(4);
    for (num_rows, num_source_rows, row_size) in [(1, 1, 8), (5, 100, 264), (40, 1000, 4096)] {
        let source = random.values(num_source_rows * row_size);
        let mut index: Vec<u32> =
            (0..num_rows).map(|_| random.below(num_source_rows) as u32).collect();
        if num_rows > 2 {
            index[1] = u32::MAX;
        }
        let source_on = device.allocate_from(&source).unwrap();
        let index_on = device.allocate_from(&index).unwrap();
        let expected: Vec<f32> = index
            .iter()
            .flat_map(|&row| match source.chunks(row_size).nth(row as usize) {
                Some(row) => floats(row),
                None => vec![0.0; row_size],
            })
            .collect();
        let out = poisoned(device, num_rows * row_size);
        let gather = Gather {
            out: out.address(),
            source: source_on.address(),
            num_rows,
            num_source_rows,
            row_size,
        };
        // SAFETY: every buffer was allocated above with the size of its shape.
        unsafe { kernels.gather_rows(&gather, index_on.address()) }.unwrap();
        assert_eq!(download(&out), expected);

        // The same ids, every other one by way of what a step before has sampled.
        let sampled: Vec<u32> = index.iter().rev().copied().collect();
        let from_sampled: Vec<u32> = (0..num_rows as u32).map(|row| row % 2).collect();
        let token: Vec<u32> = (0..num_rows)
            .map(|row| if row % 2 == 1 { (num_rows - 1 - row) as u32 } else { index[row] })
            .collect();
        let token_on = device.allocate_from(&token).unwrap();
        let from_sampled_on = device.allocate_from(&from_sampled).unwrap();
        let sampled_on = device.allocate_from(&sampled).unwrap();
        out.fill(0xff).unwrap();
        let ids = TokenIds {
            token: token_on.address(),
            from_sampled: from_sampled_on.address(),
            sampled: sampled_on.address(),
        };
        // SAFETY: as above; rows of `sampled` are below num_rows.
        unsafe { kernels.embed_tokens(&gather, &ids) }.unwrap();
        assert_eq!(download(&out), expected);
    }
}

#[test]
fn a_graph_replays_with_what_its_buffers_hold_then() {
    let Some(kernels) = kernels() else { return };
    let device = kernels.device();
    let mut random = Random(5);
    let (num_tokens, intermediate_size) = (3, 512);
    let gate_up_on = device.allocate(num_tokens * 2 * intermediate_size * 2).unwrap();
    let out = poisoned(device, num_tokens * intermediate_size);
    let (to, from) = (out.address(), gate_up_on.address());
    let graph = Graph::capture(device, || {
        // SAFETY: both buffers were allocated above and outlive the graph's launches.
        unsafe { kernels.silu_mul(to, from, num_tokens, intermediate_size) }
    })
    .unwrap();
    for _ in 0..3 {
        let gate_up = random.values(num_tokens * 2 * intermediate_size);
        gate_up_on.upload(0, &gate_up).unwrap();
        graph.launch().unwrap();
        let mut seen = vec![bf16::ZERO; num_tokens * intermediate_size];
        out.download(0, &mut seen).unwrap();
        let expected: Vec<f32> =
            floats(&gate_up).chunks(2 * intermediate_size).flat_map(oracle::silu_mul).collect();
        assert_close("replayed silu_mul", &floats(&seen), &expected, ROUNDING);
    }
}

#[test]
fn of_rows_only_their_first_bytes_are_copied() {
    let Some(kernels) = kernels() else { return };
    let device = kernels.device();
    let (offset, num_rows, pitch, width) = (32, 5, 48, 20);
    let mut source = device.allocate_pinned(offset + num_rows * pitch).unwrap();
    source.as_mut_slice().iter_mut().zip((1..=250).cycle()).for_each(|(it, value)| *it = value);
    let target = device.allocate(source.num_bytes()).unwrap();
    target.fill(0xff).unwrap();
    // SAFETY: both buffers live until the download below, which waits, and nothing writes them.
    unsafe { target.enqueue_upload_rows(&source, offset, (num_rows, pitch), width) }.unwrap();
    let mut seen = vec![0_u8; target.num_bytes()];
    target.download(0, &mut seen).unwrap();
    for (at, (&seen, &sent)) in seen.iter().zip(source.as_slice()).enumerate() {
        let is_copied = at >= offset && (at - offset) % pitch < width;
        assert_eq!(seen, if is_copied { sent } else { 0xff }, "byte {at}");
    }
}

#[test]
fn a_failed_capture_leaves_the_stream_usable() {
    let Some(kernels) = kernels() else { return };
    let device = kernels.device();
    let refused =
        Graph::capture(device, || Err(Error::Shape { name: "x", range: "nothing", value: 1 }));
    assert!(matches!(refused, Err(Error::Shape { .. })));
    let buffer = device.allocate_from(&[1.0_f32, 2.0]).unwrap();
    let mut back = [0.0_f32; 2];
    buffer.download(0, &mut back).unwrap();
    assert_eq!(back, [1.0, 2.0]);
}

#[test]
fn memory_comes_back_and_too_much_is_refused_with_numbers() {
    let Some(kernels) = kernels() else { return };
    let device = kernels.device();
    let memory = device.memory().unwrap();
    let error = device.allocate(memory.total_bytes * 2).unwrap_err();
    assert!(
        matches!(error, Error::OutOfMemory { needed_bytes, free_bytes }
            if needed_bytes == memory.total_bytes * 2 && free_bytes <= memory.total_bytes),
        "{error}"
    );
    // Other tests allocate at the same time, less than this.
    drop(device.allocate(4 << 30).unwrap());
    let with = device.allocate(4 << 30).unwrap();
    let held = device.memory().unwrap().free_bytes;
    drop(with);
    assert!(device.memory().unwrap().free_bytes > held + (3 << 30));
}

#[test]
fn a_machine_without_a_gpu_is_told_so() {
    match Device::new(10_000) {
        Err(Error::NoDevice(reason)) => println!("{reason}"),
        other => panic!("{other:?}"),
    }
}
