// Products of a batch that decodes, up to 192 rows, on a Hopper GPU; few rows have kernels of their own.
//
//   x = input, scaled by row with a norm before: see shared_norm.cuh
//   out = x weight^T                                        [num_tokens, width]
//   out = out + x weight^T                                  the same, ADD
//
// The weights are the wide side of wgmma and are read once; all tokens are the other side, up to
// NUM_TOKENS of them, so that no row tile is half empty. A tile is TILE_ROWS rows of the weight.
//
// Of STORE and ADD a cluster takes one tile, and each of its blocks an equal share of in_features:
// a matrix with few rows keeps most multiprocessors busy. Each block then adds up all shares of
// some tokens, in the order of the blocks. Of STORE_F32 a block takes whole tiles, one after the
// other.
//
// One warp copies through a ring of STAGES stages of shared memory (TMA, 128-byte swizzle), into
// the next tile while this one's is stored; two warpgroups of 64 weight rows each multiply, while
// three warps add up the squares for a norm before. The ring fills with weights before the kernel in
// front of this one has ended.
//
// Grid: STORE, ADD: a cluster of 1 to 4 a tile, each of its blocks with a step or more. STORE_F32: any
// number of blocks, without clusters.
// Block: NUM_THREADS. Shared memory: 1024 + STAGES STAGE_BYTES, dynamic.
//
//   weight: tensor map of [width, in_features] bf16 with boxes of CHUNK columns and TILE_ROWS rows
//   input:  tensor map of [num_tokens, in_features] bf16, with boxes of CHUNK columns and all
//           tokens: one that reached far behind their end would be slow. Rows of a stage behind
//           them are no token's, and zero.
//   out:    [num_tokens, width] bf16, STORE_F32 f32
//   norm:   before or, ADD, behind, which leaves a sum of squares for each tile
//   num_tiles: width / TILE_ROWS, rounded up
//
// width and in_features are multiples of 8.
//
// Source: NVIDIA, PTX ISA, Asynchronous Warpgroup Level Matrix Instructions; NVIDIA, CUTLASS, its
// persistent cooperative kernels.
#include "shared_norm.cuh"
#include "wgmma.cuh"

#ifndef NUM_TOKENS
#error "NUM_TOKENS is 64 to 192, whole 32"
#endif
constexpr int TILE_ROWS = 128;
constexpr int NUM_THREADS = 3 * GROUP_THREADS;
constexpr int COPYING_WARPS = GROUP_THREADS / WARP, MULTIPLYING_WARPS = 2 * COPYING_WARPS;
constexpr int WEIGHT_BYTES = TILE_ROWS * ROW_BYTES, INPUT_BYTES = NUM_TOKENS * ROW_BYTES;
constexpr int STAGE_BYTES = WEIGHT_BYTES + INPUT_BYTES;
constexpr int STAGES = (200 << 10) / STAGE_BYTES;
constexpr int STAGED = TILE_ROWS + 4;  // floats of a token's row of sums, without bank conflicts
constexpr int AT_ONCE = NUM_TOKENS > 96 ? 8 : 4;  // tokens that a warp adds up at once
static_assert(NUM_TOKENS * STAGED * 4 <= STAGES * STAGE_BYTES, "the sums take the ring's place");
// Of a thread, by setmaxnreg: 128 x 56 + 256 x 224 are what a launch of 384 x 168 holds.
constexpr int COPYING_REGISTERS = 56, MULTIPLYING_REGISTERS = 224;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// Where another block of the cluster has what this one has at `address`, and four floats there, if
// they are wanted.
__device__ __forceinline__ u32 address_in(int rank, u32 address) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}
__device__ __forceinline__ float4 load_there(u32 address, int is_wanted) {
    float4 value = {};
    asm volatile("{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %5, 0;\n"
                 "@wanted ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];\n}"
                 : "+f"(value.x), "+f"(value.y), "+f"(value.z), "+f"(value.w)
                 : "r"(address), "r"(is_wanted)
                 : "memory");
    return value;
}

// Writes a warp's sums of whole tiles, 16 weight rows down and the tokens across; `first` is the
// output column of the first one.
__device__ __forceinline__ void store_whole(const float (&sums)[NUM_TOKENS / 2], float* out,
                                            int first, int num_tokens, int width, int lane) {
    const int token = lane % 4 * 2;
    float* target = out + (i64)token * width + first + lane / 4;
#pragma unroll
    for (int i = 0; i < NUM_TOKENS / 2; i++) {
        const int down = i % 4 / 2 * 8, across = i / 4 * 8 + i % 2;
        if (token + across < num_tokens && first + lane / 4 + down < width) {
            target[(i64)across * width + down] = sums[i];
        }
    }
}

// Adds up what the blocks of a cluster have in the place of their rings, of this block's part of
// the tokens, a warp for each.
__device__ __forceinline__ void store_shares(u32 shares, bf16* out, const SharedNorm& norm,
                                             bool adds, int tile, int num_tokens, int width,
                                             int rank, int num_ranks, int warp, int lane) {
    const int column = tile * TILE_ROWS + lane * 4;
    const bool is_mine = column < width, has_norm_behind = norm.weight != nullptr;
    const int part = (num_tokens + num_ranks - 1) / num_ranks;
    const int end = min((rank + 1) * part, num_tokens);
    uint2 before[AT_ONCE] = {};
    const auto load_before = [&](int first) {
#pragma unroll
        for (int t = 0; t < AT_ONCE; t++) {
            const int token = first + t * MULTIPLYING_WARPS;
            if (adds && is_mine && token < end) {
                before[t] = *(const uint2*)(out + (i64)token * width + column);
            }
        }
    };
    int first = rank * part + warp;
    load_before(first);
    uint2 factors = {};
    if (has_norm_behind && is_mine) factors = *(const uint2*)(norm.weight + column);
    __syncwarp();
    sync_cluster();
    while (first < end) {
        float4 sums[AT_ONCE] = {};
        for (int r = 0; r < num_ranks; r++) {
            const u32 there = address_in(r, shares + lane * 16);
#pragma unroll
            for (int t = 0; t < AT_ONCE; t++) {
                const int token = first + t * MULTIPLYING_WARPS;
                const float4 share = load_there(there + token * STAGED * 4, token < end);
                sums[t] = {sums[t].x + share.x, sums[t].y + share.y, sums[t].z + share.z,
                           sums[t].w + share.w};
            }
        }
        float squared[AT_ONCE];
#pragma unroll
        for (int t = 0; t < AT_ONCE; t++) {
            const int token = first + t * MULTIPLYING_WARPS;
            const bool is_stored = is_mine && token < end;
            const i64 at = (i64)token * width + column;
            const u32 low = before[t].x, high = before[t].y;
            const uint2 sum =
                make_uint2(pack_bf16(low_float(low) + sums[t].x, high_float(low) + sums[t].y),
                           pack_bf16(low_float(high) + sums[t].z, high_float(high) + sums[t].w));
            if (is_stored) *(uint2*)(out + at) = sum;
            const float x = low_float(sum.x), y = high_float(sum.x);
            const float z = low_float(sum.y), w = high_float(sum.y);
            if (has_norm_behind && is_stored) {
                *(uint2*)(norm.scaled + at) = make_uint2(
                    pack_bf16(x * low_float(factors.x), y * high_float(factors.x)),
                    pack_bf16(z * low_float(factors.y), w * high_float(factors.y)));
            }
            squared[t] = is_mine ? x * x + y * y + (z * z + w * w) : 0.0f;
        }
        if (has_norm_behind) {
#pragma unroll
            for (int t = 0; t < AT_ONCE; t++) {
                const int token = first + t * MULTIPLYING_WARPS;
                const float of_tile = warp_reduce(squared[t], Add());
                if (lane == 0 && token < end) norm.squares[token * NORM_SQUARES + tile] = of_tile;
            }
        }
        first += AT_ONCE * MULTIPLYING_WARPS;
        load_before(first);
    }
}
#endif

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
batch_product(const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap input,
              void* out, const SharedNorm norm, int num_tokens, int width, int in_features,
              int num_tiles, int epilogue) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ unsigned char unaligned[];
    __shared__ __align__(8) u64 barriers[2 * STAGES + 1];
    __shared__ __align__(8) float scales[NUM_TOKENS];
    const u32 ring_offset = -shared_address(unaligned) & 1023;
    const u32 ring = shared_address(unaligned) + ring_offset;
    const u32 full = shared_address(barriers), empty = full + STAGES * 8;
    const u32 has_scales = empty + STAGES * 8;
    const int lane = threadIdx.x % WARP;
    const int rank = __clusterRelativeBlockRank(), num_ranks = __clusterSizeInBlocks();
    const bool is_whole = epilogue == STORE_F32;
    const int num_steps = (in_features + CHUNK - 1) / CHUNK;
    const int share = is_whole ? num_steps : (num_steps + num_ranks - 1) / num_ranks;
    const int first_step = is_whole ? 0 : rank * share;
    const int my_steps = min(share, num_steps - first_step);
    const int first_tile = is_whole ? blockIdx.x : blockIdx.x / num_ranks;
    const int stride = is_whole ? gridDim.x : num_tiles;

    let_next_begin();
    if (threadIdx.x == 0) {
        init_ring(full, empty, STAGES, 1, MULTIPLYING_WARPS);
        init_barrier(has_scales, GROUP_THREADS - WARP);
        publish_barriers();
    }
    __syncthreads();

    if (threadIdx.x < GROUP_THREADS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COPYING_REGISTERS));
        if (threadIdx.x == 0) {
            const u64 read_once = read_once_policy(), keep = keep_policy();
            const auto load_weight = [&](int stage, int step, int tile) {
                const u32 target = ring + stage * STAGE_BYTES, barrier = full + stage * 8;
                const int column = (first_step + step) * CHUNK;
                expect_bytes(barrier, WEIGHT_BYTES + num_tokens * ROW_BYTES);
                copy_box(target, weight, column, tile * TILE_ROWS, barrier, read_once);
            };
            Turn turn;
            int ahead = min(my_steps, STAGES);
            for (int step = 0; step < ahead; step++) load_weight(step, step, first_tile);
            wait_for_previous();
            publish_stores();  // those of the kernel in front
            for (int tile = first_tile; tile < num_tiles; tile += stride) {
                for (int step = 0; step < my_steps; step++) {
                    if (ahead > 0) {
                        ahead--;
                    } else {
                        wait(empty + turn.stage * 8, turn.phase ^ 1);
                        load_weight(turn.stage, step, tile);
                    }
                    copy_box(ring + turn.stage * STAGE_BYTES + WEIGHT_BYTES, input,
                             (first_step + step) * CHUNK, 0, full + turn.stage * 8, keep);
                    turn.next(STAGES);
                }
            }
        } else if (threadIdx.x >= WARP && norm.num_squares > 0) {
            load_scales<GROUP_THREADS - WARP>(scales, norm, num_tokens, in_features,
                                              threadIdx.x - WARP, has_scales);
        }
        __syncwarp();
        if (!is_whole) sync_cluster();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MULTIPLYING_REGISTERS));
        for (int s = 0; s < STAGES; s++) {
            clear_rows(ring + s * STAGE_BYTES + WEIGHT_BYTES + num_tokens * ROW_BYTES,
                       NUM_TOKENS - num_tokens, threadIdx.x - GROUP_THREADS,
                       MULTIPLYING_WARPS * WARP);
        }
        publish_shared();
        sync_warps(1, MULTIPLYING_WARPS);
        wait_for_previous();
        const int warp = threadIdx.x / WARP - COPYING_WARPS, group = warp / 4;
        float sums[NUM_TOKENS / 2];
        Turn turn;
        for (int tile = first_tile; tile < num_tiles; tile += stride) {
            multiply_steps<STAGES, STAGE_BYTES>(
                turn, my_steps, full, ring + group * GROUP_ROWS * ROW_BYTES, ring + WEIGHT_BYTES,
                [&](u64 a, u64 b, int adds) { multiply(sums, a, b, adds); },
                [&](int stage) { if (lane == 0) arrive(empty + stage * 8); });
            pin(sums);
            if (norm.num_squares > 0) {
                wait(has_scales, 0);
#pragma unroll
                for (int i = 0; i < NUM_TOKENS / 2; i += 4) {
                    const float2 scale = *(const float2*)(scales + i * 2 + lane % 4 * 2);
                    sums[i] *= scale.x;
                    sums[i + 1] *= scale.y;
                    sums[i + 2] *= scale.x;
                    sums[i + 3] *= scale.y;
                }
            }
            if (is_whole) {
                store_whole(sums, (float*)out, tile * TILE_ROWS + warp * 16, num_tokens, width,
                            lane);
            }
        }
        if (!is_whole) {
            sync_warps(1, MULTIPLYING_WARPS);  // both warpgroups have read the ring
            float* shares = (float*)(unaligned + ring_offset);
#pragma unroll
            for (int i = 0; i < NUM_TOKENS / 2; i++) {
                const int token = i / 4 * 8 + lane % 4 * 2 + i % 2;
                shares[token * STAGED + warp * 16 + lane / 4 + i % 4 / 2 * 8] = sums[i];
            }
            store_shares(ring, (bf16*)out, norm, epilogue == ADD, first_tile, num_tokens, width,
                         rank, num_ranks, warp, lane);
            __syncwarp();
        }
    }
    // No block ends while another one may still read its shared memory.
    if (!is_whole) sync_cluster();
#endif
}
