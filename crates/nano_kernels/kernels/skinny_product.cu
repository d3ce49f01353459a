// Products of up to 32 rows with a weight matrix on the tensor cores of a Hopper GPU, at the rate
// at which memory gives the weights.
//
//   out = input weight^T                                    [num_tokens, out_features]
//   out = silu(input gate^T) * (input up^T), GATED          [num_tokens, out_features / 2]
//
// The weights are the wide side: 64 of their rows are the M side of a wgmma, the tokens its N side.
// A thread block takes whole tiles of tile_rows rows over all in_features, so no sum is cut and a
// row's bits do not depend on the grid. One warp copies weights and input through a ring of stages
// in shared memory (TMA, 128-byte swizzle); one or two warpgroups of 64 rows each multiply. The
// ring fills with weights before the kernel in front of this one has ended: they depend on nothing.
// With a gate, one half of a tile's rows are gate rows, the other the up rows of the same columns.
//
// Grid: any number of blocks. Block: 128 threads a warpgroup, and the copying warp.
// Shared memory: 1024 + num_stages chunks_per_step 128 (tile_rows + NUM_TOKENS)
//                + groups NUM_TOKENS STAGED 4 + 16 num_stages bytes, dynamic.
//
//   weight, input: tensor maps of [out_features, in_features] and [num_tokens, in_features] bf16,
//                  with boxes of CHUNK columns and tile_rows or NUM_TOKENS rows; GATED, the gate
//                  first, with boxes of half of tile_rows
//   out:           [num_tokens, out_features] bf16 or f32; GATED, half as wide and rounded once
//
// Source: NVIDIA, PTX ISA, Asynchronous Warpgroup Level Matrix Instructions.
#include "hopper.cuh"

#ifndef NUM_TOKENS
#error "NUM_TOKENS is 8, 16 or 32"
#endif
constexpr int CHUNK = 64;  // columns: 128 bytes, the width of the swizzle
constexpr int ROW_BYTES = CHUNK * sizeof(bf16);
constexpr int GROUP_ROWS = 64, GROUP_THREADS = 128;
constexpr int STAGED = 68;  // floats of a token's row in the staging memory, without bank conflicts

enum Epilogue { STORE = 0, ADD = 1, STORE_F32 = 2, GATED = 3 };

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
__device__ __forceinline__ void multiply(float (&d)[NUM_TOKENS / 2], u64 a, u64 b) {
#if NUM_TOKENS == 8
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, "
        "%4, %5, 1, 1, 1, 0, 0;"
        : FOUR(0)
        : "l"(a), "l"(b));
#elif NUM_TOKENS == 16
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, "
        "%8, %9, 1, 1, 1, 0, 0;"
        : FOUR(0), FOUR(4)
        : "l"(a), "l"(b));
#else
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, "
        "%8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, 1, 1, 1, 0, 0;"
        : FOUR(0), FOUR(4), FOUR(8), FOUR(12)
        : "l"(a), "l"(b));
#endif
}
__device__ __forceinline__ void sync(int barrier, int num_threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}
#endif

extern "C" __global__ void __launch_bounds__(2 * GROUP_THREADS + WARP, 1)
skinny_product(const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap input,
               void* out, int num_tokens, int out_features, int num_steps, int tile_rows,
               int chunks_per_step, int num_stages, int epilogue) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ unsigned char unaligned[];
    const int num_groups = blockDim.x / GROUP_THREADS;
    const u32 weight_bytes = chunks_per_step * tile_rows * ROW_BYTES;
    const u32 input_bytes = chunks_per_step * NUM_TOKENS * ROW_BYTES;
    const u32 weights = (shared_address(unaligned) + 1023) & ~1023u;
    const u32 inputs = weights + num_stages * weight_bytes;
    const u32 staging_offset = inputs + num_stages * input_bytes - shared_address(unaligned);
    float* staging = (float*)(unaligned + staging_offset);
    const u32 full = shared_address(staging + num_groups * NUM_TOKENS * STAGED);
    const u32 empty = full + num_stages * 8;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int num_tiles = (out_features + tile_rows - 1) / tile_rows;
    const bool is_gated = epilogue == GATED;
    const int box_rows = is_gated ? tile_rows / 2 : tile_rows;

    let_next_begin();
    if (threadIdx.x == 0) {
        for (int s = 0; s < num_stages; s++) {
            init_barrier(full + s * 8, 1);
            init_barrier(empty + s * 8, num_groups * GROUP_THREADS / WARP);
        }
        publish_barriers();
    }
    __syncthreads();

    if (warp == num_groups * GROUP_THREADS / WARP) {
        if (lane != 0) return;
        const u64 read_once = read_once_policy(), keep = keep_policy();
        const int my_tiles = (num_tiles - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
        const int total = my_tiles * num_steps;
        const auto load_weight = [&](int stage, int at) {
            expect_bytes(full + stage * 8, weight_bytes + input_bytes);
            const int tile = blockIdx.x + at / num_steps * gridDim.x;
            const int column = at % num_steps * chunks_per_step * CHUNK;
            const u32 target = weights + stage * weight_bytes;
            for (int c = 0; c < chunks_per_step; c++) {
                const u32 rows = target + c * tile_rows * ROW_BYTES;
                copy_box(rows, weight, column + c * CHUNK, tile * box_rows, full + stage * 8,
                         read_once);
                if (is_gated) {
                    copy_box(rows + box_rows * ROW_BYTES, weight, column + c * CHUNK,
                             out_features / 2 + tile * box_rows, full + stage * 8, read_once);
                }
            }
        };
        const auto load_input = [&](int stage, int at) {
            const int column = at % num_steps * chunks_per_step * CHUNK;
            const u32 target = inputs + stage * input_bytes;
            for (int c = 0; c < chunks_per_step; c++) {
                copy_box(target + c * NUM_TOKENS * ROW_BYTES, input, column + c * CHUNK, 0,
                         full + stage * 8, keep);
            }
        };
        const int ahead = min(total, num_stages);
        for (int at = 0; at < ahead; at++) load_weight(at, at);
        wait_for_previous();
        publish_stores();  // those of the kernel in front
        for (int at = 0; at < ahead; at++) load_input(at, at);
        Turn turn;
        for (int at = ahead; at < total; at++) {
            wait(empty + turn.stage * 8, turn.phase);
            load_weight(turn.stage, at);
            load_input(turn.stage, at);
            turn.next(num_stages);
        }
        return;
    }

    const int group = threadIdx.x / GROUP_THREADS, thread = threadIdx.x % GROUP_THREADS;
    float* staged = staging + group * NUM_TOKENS * STAGED;
    wait_for_previous();
    Turn turn;
    for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
        float sums[NUM_TOKENS / 2] = {};
        int before = 0;
        for (int step = 0; step < num_steps; step++) {
            wait(full + turn.stage * 8, turn.phase);
            const u32 rows = weights + turn.stage * weight_bytes + group * GROUP_ROWS * ROW_BYTES;
            const u64 a = descriptor(rows);
            const u64 b = descriptor(inputs + turn.stage * input_bytes);
            begin_products();
            for (int c = 0; c < chunks_per_step; c++) {
#pragma unroll
                for (int k = 0; k < ROW_BYTES; k += 32) {
                    multiply(sums, a + ((c * tile_rows * ROW_BYTES + k) >> 4),
                             b + ((c * NUM_TOKENS * ROW_BYTES + k) >> 4));
                }
            }
            commit_products();
            wait_products<1>();
            if (step > 0 && lane == 0) arrive(empty + before * 8);
            before = turn.stage;
            turn.next(num_stages);
        }
        wait_products<0>();
        if (lane == 0) arrive(empty + before * 8);

        // From the layout of wgmma, features down and tokens across, to rows of the output.
        const int barrier = is_gated ? 1 : 1 + group;
        const int num_together = is_gated ? num_groups * GROUP_THREADS : GROUP_THREADS;
        sync(barrier, num_together);  // the last tile's has been read
#pragma unroll
        for (int i = 0; i < NUM_TOKENS / 2; i++) {
            const int token = i / 4 * 8 + lane % 4 * 2 + i % 2;
            const int row = thread / WARP * 16 + lane / 4 + i % 4 / 2 * 8;
            staged[token * STAGED + row] = sums[i];
        }
        sync(barrier, num_together);
        if (is_gated) {
            const int first = tile * box_rows, width = out_features / 2;
            for (int i = threadIdx.x; i < num_tokens * box_rows; i += num_together) {
                const int token = i / box_rows, row = i % box_rows;
                if (first + row >= width) continue;
                const auto sum = [&](int row) {
                    const int group = row / GROUP_ROWS;
                    return staging[(group * NUM_TOKENS + token) * STAGED + row % GROUP_ROWS];
                };
                const float gate = sum(row), up = sum(box_rows + row);
                ((bf16*)out)[(i64)token * width + first + row] =
                    (bf16)pack_bf16(gate / (1.0f + __expf(-gate)) * up, 0.0f);
            }
            continue;
        }
        const int first_row = tile * tile_rows + group * GROUP_ROWS;
        const int end_row = min((tile + 1) * tile_rows, out_features);
        for (int i = thread; i < num_tokens * GROUP_ROWS; i += GROUP_THREADS) {
            const int token = i / GROUP_ROWS, row = i % GROUP_ROWS;
            if (first_row + row >= end_row) continue;
            const float sum = staged[token * STAGED + row];
            const i64 at = (i64)token * out_features + first_row + row;
            if (epilogue == STORE_F32) {
                ((float*)out)[at] = sum;
            } else {
                bf16* target = (bf16*)out + at;
                const float addend = epilogue == ADD ? low_float(*target) : 0.0f;
                *target = (bf16)pack_bf16(addend + sum, 0.0f);
            }
        }
    }
#endif
}
