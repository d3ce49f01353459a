// SwiGLU's gate within the product with both its inputs, for many rows on a Hopper GPU.
//
//   x = input, scaled by row with a norm before: see shared_norm.cuh
//   out = silu(x gate^T) * (x up^T)                         [num_tokens, intermediate_size]
//
// A tile is tile_tokens rows of the input, at most TOKENS, and FEATURES columns of the output. Its
// gate rows and its up rows of the weight lie one below the other in shared memory and are the wide
// side of one wgmma, so that a thread holds a column's gate and its up: they are multiplied in
// float32 and rounded once, where two kernels would round gate and up to bf16 in between.
//
// A thread block takes one tile after the other. One warp copies through a ring of STAGES stages of
// shared memory (TMA, 128-byte swizzle), into the next tile while this one's is stored; warpgroups
// multiply 64 rows each, as many as a tile's rows need. With CLUSTER = 2 the two blocks of a cluster
// have the same columns and different rows, and each copies one half of the weights for both. All
// columns of GROUP row tiles come before those of the next, so that their input stays in the L2
// cache. The ring fills with weights before the kernel in front of this one has ended. Three more
// warps add up the squares for a norm before.
//
// Grid: any number of clusters. Block: NUM_THREADS.
// Shared memory: 1024 + STAGES STAGE_BYTES, dynamic.
//
//   weight: tensor map of [2 intermediate_size, hidden_size] bf16, the gate first, with boxes of
//           CHUNK columns and FEATURES rows
//   input:  tensor map of [num_tokens, hidden_size] bf16, with boxes of CHUNK columns and
//           tile_tokens rows; those of a stage behind them are no token's, and zero
//   out:    [num_tokens, intermediate_size] bf16
//   norm:   before, of up to TOKENS tokens with CLUSTER = 1
//
// intermediate_size, hidden_size and tile_tokens are multiples of 8.
//
// Source: NVIDIA, PTX ISA, Asynchronous Warpgroup Level Matrix Instructions; NVIDIA, CUTLASS, its
// persistent cooperative kernels; Shazeer, GLU Variants Improve Transformer, 2020.
#include "shared_norm.cuh"
#include "wgmma.cuh"

#if !defined(CLUSTER) || !defined(TOKENS)
#error "CLUSTER is 1 or 2, TOKENS 128 or 192"
#endif
// 112 columns cut Mistral's 14336 into 128 tiles, which fill the 132 multiprocessors of an H100.
constexpr int FEATURES = 112, STAGES = TOKENS == 128 ? 5 : 4;
constexpr int GROUP = 16 / CLUSTER;  // row tiles: 2048 rows, 16 MB of input
constexpr int MULTIPLYING_THREADS = TOKENS / GROUP_ROWS * GROUP_THREADS;
constexpr int NUM_THREADS = MULTIPLYING_THREADS + GROUP_THREADS;
constexpr int INPUT_BYTES = TOKENS * ROW_BYTES, HALF_BYTES = FEATURES * ROW_BYTES;
constexpr int STAGE_BYTES = INPUT_BYTES + 2 * HALF_BYTES;
// Of a thread, by setmaxnreg: 128 x 56 + 256 x 224 are what a launch of 384 x 168 holds, and
// 128 x 56 + 384 x 152 one of 512 x 128.
constexpr int COPYING_REGISTERS = 56, MULTIPLYING_REGISTERS = TOKENS == 128 ? 224 : 152;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// d = a b^T over 16 columns, or d += where `adds`.
__device__ __forceinline__ void multiply_both(float (&d)[FEATURES], u64 a, u64 b, int adds) {
#if TOKENS == 128
    multiply(d, a, b, adds);
#else
    // In two halves: a launch has 128 registers a thread, too few for the whole.
    float(&gate)[FEATURES / 2] = (float(&)[FEATURES / 2])d;
    float(&up)[FEATURES / 2] = (float(&)[FEATURES / 2])d[FEATURES / 2];
    multiply(gate, a, b, adds);
    multiply(up, a, b + (HALF_BYTES >> 4), adds);
#endif
}
__device__ __forceinline__ void sync_blocks() { CLUSTER == 2 ? sync_cluster() : __syncthreads(); }
#endif

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
#if CLUSTER == 2 && defined(__CUDA_ARCH_FEAT_SM90_ALL)
__cluster_dims__(2, 1, 1)
#endif
gated_product(const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap input,
              bf16* out, const SharedNorm norm, int num_tokens, int tile_tokens,
              int intermediate_size, int hidden_size) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ unsigned char unaligned[];
    __shared__ __align__(8) u64 barriers[2 * STAGES + 1];
    __shared__ float scales[TOKENS];
    const u32 stages = (shared_address(unaligned) + 1023) & ~1023u;
    const u32 full = shared_address(barriers), empty = full + STAGES * 8;
    const u32 has_scales = empty + STAGES * 8;
    const bool has_norm = CLUSTER == 1 && norm.num_squares > 0;
    const int num_steps = (hidden_size + CHUNK - 1) / CHUNK;
    const int lane = threadIdx.x % WARP;
    const int rank = CLUSTER == 2 ? __clusterRelativeBlockRank() : 0;
    const int height = CLUSTER * tile_tokens, row_tiles = (num_tokens + height - 1) / height;
    const int column_tiles = (intermediate_size + FEATURES - 1) / FEATURES;
    // Where a cluster's tile lies, which all clusters take in this order.
    const auto find = [&](int tile, int& row, int& column) {
        const int first = tile / (GROUP * column_tiles) * GROUP;
        const int together = min(GROUP, row_tiles - first);
        const int rest = tile - first * column_tiles;
        row = (first + rest % together) * height;
        column = rest / together * FEATURES;
    };
    const int first_tile = blockIdx.x / CLUSTER, num_clusters = gridDim.x / CLUSTER;
    const int warpgroup = threadIdx.x / GROUP_THREADS;
    const int num_groups = (tile_tokens + GROUP_ROWS - 1) / GROUP_ROWS;  // that multiply

    let_next_begin();
    if (threadIdx.x == 0) {
        init_ring(full, empty, STAGES, 1, CLUSTER * num_groups * GROUP_THREADS / WARP);
        init_barrier(has_scales, GROUP_THREADS - WARP);
        publish_barriers();
    }
    sync_blocks();

    if (threadIdx.x >= MULTIPLYING_THREADS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COPYING_REGISTERS));
        if (threadIdx.x == MULTIPLYING_THREADS) {
            const u64 keep = keep_policy(), reads = CLUSTER == 2 ? keep : read_once_policy();
            const auto load_weight = [&](int stage, int step, int column) {
                const u32 target = stages + stage * STAGE_BYTES + INPUT_BYTES;
                expect_bytes(full + stage * 8, tile_tokens * ROW_BYTES + 2 * HALF_BYTES);
                if (CLUSTER == 2) {
                    copy_box_to_both(target + rank * HALF_BYTES, weight, step * CHUNK,
                                     rank * intermediate_size + column, full + stage * 8, reads);
                } else {
                    for (int h = 0; h < 2; h++) {
                        copy_box(target + h * HALF_BYTES, weight, step * CHUNK,
                                 h * intermediate_size + column, full + stage * 8, reads);
                    }
                }
            };
            Turn turn;
            int ahead = 0;
            for (int tile = first_tile; tile < row_tiles * column_tiles; tile += num_clusters) {
                int row, column;
                find(tile, row, column);
                if (tile == first_tile) {
                    ahead = min(num_steps, STAGES);
                    for (int step = 0; step < ahead; step++) load_weight(step, step, column);
                    wait_for_previous();
                    publish_stores();  // those of the kernel in front
                }
                for (int step = 0; step < num_steps; step++) {
                    if (ahead > 0) {
                        ahead--;
                    } else {
                        wait(empty + turn.stage * 8, turn.phase ^ 1);
                        load_weight(turn.stage, step, column);
                    }
                    copy_box(stages + turn.stage * STAGE_BYTES, input, step * CHUNK,
                             row + rank * tile_tokens, full + turn.stage * 8, keep);
                    turn.next(STAGES);
                }
            }
        } else if (threadIdx.x >= MULTIPLYING_THREADS + WARP && has_norm) {
            load_scales<GROUP_THREADS - WARP>(scales, norm, num_tokens, hidden_size,
                                              threadIdx.x - MULTIPLYING_THREADS - WARP, has_scales);
        }
    } else if (warpgroup < num_groups) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MULTIPLYING_REGISTERS));
        for (int s = 0; s < STAGES; s++) {
            clear_rows(stages + s * STAGE_BYTES + tile_tokens * ROW_BYTES,
                       num_groups * GROUP_ROWS - tile_tokens, threadIdx.x,
                       num_groups * GROUP_THREADS);
        }
        publish_shared();
        sync_warps(1, num_groups * GROUP_THREADS / WARP);
        wait_for_previous();
        const int my_row = warpgroup * GROUP_ROWS + threadIdx.x / WARP % 4 * 16 + lane / 4;
        const bool is_odd = lane % 2 == 1;
        const auto release = [&](int stage) {
            if (CLUSTER == 2) {
                if (lane < 2) arrive_at(lane, empty + stage * 8);
            } else if (lane == 0) {
                arrive(empty + stage * 8);
            }
        };
        Turn turn;
        for (int tile = first_tile; tile < row_tiles * column_tiles; tile += num_clusters) {
            int row, column;
            find(tile, row, column);
            float sums[FEATURES];
            multiply_steps<STAGES, STAGE_BYTES>(
                turn, num_steps, full, stages + warpgroup * GROUP_ROWS * ROW_BYTES,
                stages + INPUT_BYTES,
                [&](u64 a, u64 b, int adds) { multiply_both(sums, a, b, adds); }, release);
            pin(sums);

            // Neighbours swap, so that a lane has four columns in a row and four lanes 32 bytes.
            const auto gated = [&](int i, float scale) {
                const float gate = sums[i] * scale, up = sums[i + FEATURES / 2] * scale;
                return __fdividef(gate, 1.0f + __expf(-gate)) * up;
            };
            if (has_norm) wait(has_scales, 0);
            const int my_column = column + lane % 4 / 2 * 4 + (is_odd ? 8 : 0);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int first = row + rank * tile_tokens, token = first + my_row + h * 8;
                const int end = min(first + tile_tokens, num_tokens);
                const float scale = has_norm ? scales[my_row + h * 8] : 1.0f;
                bf16* target = out + (i64)token * intermediate_size + my_column;
#pragma unroll
                for (int j = 0; j < FEATURES / 8; j += 2) {
                    const int i = 4 * j + 2 * h;
                    const u32 low = pack_bf16(gated(i, scale), gated(i + 1, scale));
                    const u32 high = pack_bf16(gated(i + 4, scale), gated(i + 5, scale));
                    const u32 swapped = __shfl_xor_sync(ALL_LANES, is_odd ? low : high, 1);
                    if (token < end && my_column + j * 8 < intermediate_size) {
                        *(uint2*)(target + j * 8) =
                            is_odd ? make_uint2(swapped, high) : make_uint2(low, swapped);
                    }
                }
            }
        }
    }
    // Neither block ends while the other may still write into it.
    __syncwarp();
    sync_blocks();
#endif
}
