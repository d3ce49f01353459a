// Products of up to 32 rows with a weight matrix on the tensor cores of a Hopper GPU, at the rate
// at which memory gives the weights.
//
//   x = input, scaled by row with a norm before: see shared_norm.cuh
//   out = x weight^T                                    [num_tokens, out_features]
//   out = out + x weight^T                              the same, ADD
//   out = silu(x gate^T) * (x up^T), GATED              [num_tokens, out_features / 2]
//
// The weights are the wide side: 64 of their rows are the M side of a wgmma, the tokens its N side.
// A thread block takes whole tiles of tile_rows rows over all in_features, so a row's bits depend on
// the shape of tiles alone. One warp copies weights and another inputs through a ring of stages in shared
// memory (TMA, 128-byte swizzle). Two warpgroups multiply: each takes 64 rows of a tile or, where a
// tile has no more, half of a step's columns. The ring fills with weights before the kernel in front
// of this one has ended: they depend on nothing. Two more warps add up the squares for a norm before.
//
// Grid: any number of blocks. Block: NUM_THREADS.
// Shared memory: 1024 + num_stages chunks_per_step 128 (tile_rows + NUM_TOKENS)
//                + 2 NUM_TOKENS STAGED 4 + NUM_TOKENS 4 + 16 num_stages + 8 bytes, dynamic.
//
//   weight, input: tensor maps of [out_features, in_features] and [num_tokens, in_features] bf16 as
//                  [in_features / CHUNK, rows, CHUNK], with boxes of chunks_per_step and tile_rows
//                  or NUM_TOKENS; GATED, the weight, whose first half is the gate, as
//                  [in_features / CHUNK, out_features / 16, 2, 8, CHUNK], with boxes of
//                  chunks_per_step and tile_rows / 16: eight rows of the gate and eight of up in turn
//   out:           [num_tokens, out_features] bf16 or f32; GATED, half as wide and rounded once
//   norm:          before or, ADD, behind, which leaves a sum of squares for each 32 rows or fewer of a
//                  tile
//
// in_features is a multiple of CHUNK, out_features with a gate one of 16, tile_rows one of 16 and at
// most 128; chunks_per_step is even, num_stages at least 2. A warpgroup's operand is 64 rows whatever
// tile_rows is: behind the last stage lies enough other shared memory for what it reads and does not
// use.
//
// Source: NVIDIA, PTX ISA, Asynchronous Warpgroup Level Matrix Instructions; Shazeer, GLU Variants
// Improve Transformer, 2020 (the gate).
#include "shared_norm.cuh"
#include "wgmma.cuh"

#ifndef NUM_TOKENS
#error "NUM_TOKENS is 8, 16 or 32"
#endif
constexpr int TOKEN_BYTES = NUM_TOKENS * ROW_BYTES;  // of a chunk
constexpr int NUM_GROUPS = 2, GROUP_WARPS = GROUP_THREADS / WARP;
constexpr int NUM_CONSUMERS = NUM_GROUPS * GROUP_THREADS;
constexpr int WEIGHT_WARP = NUM_CONSUMERS / WARP, INPUT_WARP = WEIGHT_WARP + 1;
constexpr int SCALE_WARP = INPUT_WARP + 1, SCALE_WARPS = 2;  // the first of them, and how many
constexpr int NUM_THREADS = (SCALE_WARP + SCALE_WARPS) * WARP;
constexpr int AT_ONCE = 4;  // tokens of a thread
constexpr int STAGED = 68;  // floats of a token's row in the staging memory, without bank conflicts

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#endif

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
skinny_product(const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap input,
               void* out, const SharedNorm norm, int num_tokens, int out_features, int in_features,
               int tile_rows, int chunks_per_step, int num_stages, int epilogue) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ unsigned char unaligned[];
    const int tile_bytes = tile_rows * ROW_BYTES;  // of a chunk
    const u32 stage_bytes = chunks_per_step * (tile_bytes + TOKEN_BYTES);
    const u32 ring = (shared_address(unaligned) + 1023) & ~1023u;
    const u32 staging_offset = ring + num_stages * stage_bytes - shared_address(unaligned);
    float* staging = (float*)(unaligned + staging_offset);
    float* scales = staging + NUM_GROUPS * NUM_TOKENS * STAGED;
    const u32 full = shared_address(scales + NUM_TOKENS);
    const u32 empty = full + num_stages * 8, has_scales = empty + num_stages * 8;
    // From one lane for all: only so the compiler knows that a warp's wgmmas go together, and does
    // not wait after each.
    const int warp = __shfl_sync(ALL_LANES, threadIdx.x / WARP, 0), lane = threadIdx.x % WARP;
    const int num_tiles = (out_features + tile_rows - 1) / tile_rows;
    const int step_columns = chunks_per_step * CHUNK;
    const int num_steps = (in_features + step_columns - 1) / step_columns;
    const bool is_gated = epilogue == GATED;

    let_next_begin();
    if (threadIdx.x == 0) {
        init_ring(full, empty, num_stages, 2, NUM_GROUPS * GROUP_WARPS);
        init_barrier(has_scales, SCALE_WARPS * WARP);
        publish_barriers();
    }
    __syncthreads();

    Turn turn;
    // Copies all weights, or as often the inputs, through the ring.
    const auto fill = [&](bool is_input, u64 policy) {
        for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
            for (int step = 0; step < num_steps; step++) {
                const u32 barrier = full + turn.stage * 8, stage = ring + turn.stage * stage_bytes;
                const int chunk = step * chunks_per_step;
                wait(empty + turn.stage * 8, turn.phase ^ 1);
                expect_bytes(barrier, chunks_per_step * (is_input ? TOKEN_BYTES : tile_bytes));
                if (is_input) {
                    copy_box(stage + chunks_per_step * tile_bytes, input, 0, 0, chunk, barrier,
                             policy);
                } else if (is_gated) {
                    copy_box(stage, weight, 0, 0, 0, tile * (tile_rows / 16), chunk, barrier,
                             policy);
                } else {
                    copy_box(stage, weight, 0, tile * tile_rows, chunk, barrier, policy);
                }
                turn.next(num_stages);
            }
        }
    };
    if (warp == WEIGHT_WARP) {
        if (lane == 0) fill(false, read_once_policy());
        return;
    }
    if (warp == INPUT_WARP) {
        if (lane != 0) return;
        const u64 keep = keep_policy();
        prefetch(input);
        wait_for_previous();
        publish_stores();  // those of the kernel in front
        fill(true, keep);
        return;
    }

    if (warp >= SCALE_WARP) {
        if (norm.num_squares == 0) return;
        load_scales<SCALE_WARPS * WARP>(scales, norm, num_tokens, in_features,
                                        threadIdx.x - SCALE_WARP * WARP, has_scales);
        return;
    }

    const int group = warp / GROUP_WARPS;
    const bool shares_rows = tile_rows <= GROUP_ROWS;
    const int my_chunks = shares_rows ? chunks_per_step / NUM_GROUPS : chunks_per_step;
    const int first_chunk = shares_rows ? group * my_chunks : 0;
    const int first_row = shares_rows ? 0 : group * GROUP_ROWS;
    // A thread's part of a tile's output: one row of the weights, and some tokens.
    const int span = shares_rows ? GROUP_ROWS : NUM_GROUPS * GROUP_ROWS;
    const int row = threadIdx.x % span, first_token = threadIdx.x / span;
    const int tokens_apart = NUM_CONSUMERS / span;
    wait_for_previous();
    for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
        const int feature = tile * tile_rows + row;
        const bool is_mine = row < tile_rows && feature < out_features;
        float before[NUM_TOKENS / 2] = {};
        if (epilogue == ADD && is_mine) {
#pragma unroll
            for (int i = 0; i < NUM_TOKENS / 2; i++) {
                const int token = first_token + i * tokens_apart;
                if (token >= num_tokens) break;
                before[i] = low_float(((const bf16*)out)[(i64)token * out_features + feature]);
            }
        }
        const bool has_norm_behind = norm.weight != nullptr;
        const float factor = has_norm_behind && is_mine ? low_float(norm.weight[feature]) : 0.0f;
        float sums[NUM_TOKENS / 2] = {};
        for (int step = 0; step < num_steps; step++) {
            wait(full + turn.stage * 8, turn.phase);
            const u32 stage = ring + turn.stage * stage_bytes;
            const u64 a = descriptor(stage + first_chunk * tile_bytes + first_row * ROW_BYTES);
            const u64 b =
                descriptor(stage + chunks_per_step * tile_bytes + first_chunk * TOKEN_BYTES);
            begin_products();
            for (int c = 0; c < my_chunks; c++) {
#pragma unroll
                for (int k = 0; k < ROW_BYTES; k += 32) {
                    multiply(sums, a + ((c * tile_bytes + k) >> 4),
                             b + ((c * TOKEN_BYTES + k) >> 4), 1);
                }
            }
            commit_products();
            // They take a fraction of the time in which the next weights come.
            wait_products<0>();
            if (lane == 0) arrive(empty + turn.stage * 8);
            turn.next(num_stages);
        }

        // From the layout of wgmma, features down and tokens across, to rows of the output.
        sync_warps(1, NUM_CONSUMERS / WARP);  // the last tile's has been read
#pragma unroll
        for (int i = 0; i < NUM_TOKENS / 2; i++) {
            const int token = i / 4 * 8 + lane % 4 * 2 + i % 2;
            const int group_row = warp % GROUP_WARPS * 16 + lane / 4 + i % 4 / 2 * 8;
            staging[(group * NUM_TOKENS + token) * STAGED + group_row] = sums[i];
        }
        if (norm.num_squares > 0) wait(has_scales, 0);
        sync_warps(1, NUM_CONSUMERS / WARP);
        const auto sum = [&](int token, int row) {
            const float* lower = staging + token * STAGED + row % GROUP_ROWS;
            const float* upper = lower + NUM_TOKENS * STAGED;
            const float it = shares_rows ? *lower + *upper : row < GROUP_ROWS ? *lower : *upper;
            return norm.num_squares > 0 ? it * scales[token] : it;
        };
        if (is_gated) {
            constexpr int APART = NUM_CONSUMERS / GROUP_ROWS;
            const int half = tile_rows / 2, width = out_features / 2;
            const int pair_row = threadIdx.x % GROUP_ROWS, column = tile * half + pair_row;
            const bool has_column = pair_row < half && column < width;
            const int gate_row = pair_row < half ? pair_row / 8 * 16 + pair_row % 8 : 0;
#pragma unroll
            for (int i = 0; i < NUM_TOKENS / APART; i++) {
                const int token = threadIdx.x / GROUP_ROWS + i * APART;
                const float gate = sum(token, gate_row), up = sum(token, gate_row + 8);
                const float gated = __fdividef(gate, 1.0f + __expf(-gate)) * up;
                if (has_column && token < num_tokens) {
                    ((bf16*)out)[(i64)token * width + column] = (bf16)pack_bf16(gated, 0.0f);
                }
            }
            continue;
        }
        // Several at once, so that their latencies overlap.
#pragma unroll
        for (int first = 0; first < NUM_TOKENS / 2; first += AT_ONCE) {
            if (first * tokens_apart >= num_tokens) break;
            float squared[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int token = first_token + (first + i) * tokens_apart;
                const bool is_one = is_mine && token < num_tokens;
                const i64 at = (i64)token * out_features + feature;
                const float value = is_one ? before[first + i] + sum(token, row) : 0.0f;
                const bf16 rounded = (bf16)pack_bf16(value, 0.0f);
                const float kept = low_float(rounded);
                squared[i] = kept * kept;
                if (is_one && epilogue == STORE_F32) {
                    ((float*)out)[at] = value;
                } else if (is_one) {
                    ((bf16*)out)[at] = rounded;
                    if (has_norm_behind) norm.scaled[at] = (bf16)pack_bf16(kept * factor, 0.0f);
                }
            }
            if (!has_norm_behind) continue;
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) squared[i] = warp_reduce(squared[i], Add());
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int token = first_token + (first + i) * tokens_apart;
                if (lane == 0 && row < tile_rows && token < num_tokens) {
                    const int parts = (tile_rows + WARP - 1) / WARP;
                    norm.squares[token * NORM_SQUARES + tile * parts + row / WARP] = squared[i];
                }
            }
        }
    }
#endif
}
