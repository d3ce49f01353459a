// What the warps of prefill_attention_wgmma.cu share: how its tiles lie in shared memory, their
// products, barriers, and the running softmax.
#pragma once
#include "mma.cuh"
#include "wgmma.cuh"

#if !defined(HEAD_DIM) || !defined(IN_PARTS)
#error "HEAD_DIM is 64 or 128, IN_PARTS 0 or 1"
#endif
constexpr int KEYS = 128;
constexpr int STAGES = HEAD_DIM == 64 ? 4 : 2;
constexpr int NUM_THREADS = 3 * GROUP_THREADS;
constexpr int HALVES = HEAD_DIM / CHUNK;  // of a row, each a row in shared memory
constexpr int HALF_BYTES = KEYS * ROW_BYTES;
constexpr int TILE_BYTES = HALVES * HALF_BYTES;  // of a step's keys, of its values, of the queries
constexpr int BLOCKS_PER_STEP = KEYS / BLOCK_SIZE;
// A warp alone cannot ask for the boxes of a step's keys as fast as they are multiplied.
constexpr int COPYING_WARPS = GROUP_THREADS / WARP, MULTIPLYING_WARPS = 2 * COPYING_WARPS;
constexpr int BOXES = BLOCKS_PER_STEP / COPYING_WARPS;  // of a warp: one a lane
// A step's keys, or values: eight rows of one half, eight of the other, and so on.
constexpr int EIGHT_BYTES = 8 * ROW_BYTES, EIGHTS_BYTES = HALVES * EIGHT_BYTES;
constexpr int BOX_BYTES = BLOCK_SIZE / 8 * EIGHTS_BYTES;
// A row of the output on its way: eight of them lie in different banks.
constexpr int OUT_ROW_BYTES = HEAD_DIM * 2 + 16;
// Of a thread, by setmaxnreg: 128 x 40 + 256 x 232 is what a launch of 384 x 168 holds.
constexpr int COPYING_REGISTERS = 40, MULTIPLYING_REGISTERS = 232;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// d = a b^T over 16 columns, or d += where `adds`, with a in registers; TRANSPOSED, d = a b, b's columns
// contiguous. A step's scores and half a step's are arrays of their own: wgmmas of two widths with
// the same registers would wait for each other.
#define PRODUCT(COLUMNS, NUM_SUMS, A, B, ADDS, IS_TRANSPOSED, ...)                               \
    template <int TRANSPOSED>                                                                    \
    __device__ __forceinline__ void multiply(float (&d)[NUM_SUMS], const u32 (&a)[4], u64 b,     \
                                             int adds) {                                         \
        asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " ADDS ", 0;\n"                     \
                     "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32.bf16.bf16 {"          \
                     NAMES_##NUM_SUMS "}, {" A "}, " B ", adds, 1, 1, " IS_TRANSPOSED ";\n}"     \
                     : __VA_ARGS__                                                               \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds),            \
                       "n"(TRANSPOSED));                                                         \
    }
PRODUCT(64, 32, "%32, %33, %34, %35", "%36", "%37", "%38", SIXTEEN(0), SIXTEEN(16))
PRODUCT(128, 64, "%64, %65, %66, %67", "%68", "%69", "%70", SIXTEEN(0), SIXTEEN(16), SIXTEEN(32),
        SIXTEEN(48))
#undef PRODUCT
// What wgmma knows of keys or values, see `descriptor`: the lower half for an address, and the whole
// for so many bytes behind it. An addition a product is all that lies between them.
__device__ __forceinline__ u32 low_half(u32 address, int leading_bytes) {
    return (address & 0x3ffff) >> 4 | (u32)(leading_bytes >> 4) << 16;
}
__device__ __forceinline__ u64 descriptor_at(u32 low, int num_bytes) {
    u64 d;
    asm("mov.b64 %0, {%1, %2};"
        : "=l"(d)
        : "r"(low + num_bytes / 16), "r"((u32)(EIGHTS_BYTES >> 4) | 1u << 30));
    return d;
}
// Four matrices of 8 x 8 bf16, their rows at the addresses of eight lanes each.
__device__ __forceinline__ void store_matrices(u32 row, const u32 (&x)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
                 "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
}
__device__ __forceinline__ uint4 load_eight(u32 address) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
}

// Shared addresses of the barriers, 8 bytes each: two of the queries, STAGES of keys and values.
struct Barriers {
    u32 query_full, query_free = query_full + 2 * 8, tail = query_free + 2 * 8;
    u32 keys_full = tail + 8, keys_free = keys_full + STAGES * 8;
    u32 values_full = keys_free + STAGES * 8, values_free = values_full + STAGES * 8;
};
constexpr int NUM_BARRIERS = 5 + 4 * STAGES;

// The running softmax of a thread's two rows, lane / 4 and + 8 of its warp's sixteen: the largest
// score so far, or one not much smaller, scaled too; the sum of all weights, relative to it; and what
// those before shrink by.
struct Running {
    float largest[2], reference[2], sum[2], shrink[2];
};
// Their positions, and the first and the last of the tile.
struct Rows {
    int positions[2], first, last;
};

// Over the four lanes that share a row.
__device__ __forceinline__ float quad_sum(float sum) {
    sum += __shfl_xor_sync(ALL_LANES, sum, 1);
    return sum + __shfl_xor_sync(ALL_LANES, sum, 2);
}

// Hides the keys, from `first_key` on, that a row does not see.
template <int N>
__device__ __forceinline__ void hide(float (&scores)[N], const Rows& rows, int first_key,
                                     int window) {
    if (first_key + 2 * N - 1 <= rows.first && first_key > rows.last - window) return;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int last = rows.positions[h] - first_key - threadIdx.x % 4 * 2, none = last - window;
#pragma unroll
        for (int j = 0; j < N / 4; j++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const bool visible = j * 8 + i <= last && j * 8 + i > none;
                if (!visible) scores[4 * j + 2 * h + i] = NEGATIVE_INFINITY;
            }
        }
    }
}
template <int N>
__device__ __forceinline__ void find_largest(Running& running, const float (&scores)[N],
                                             float scale) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float largest = running.largest[h];
#pragma unroll
        for (int j = 0; j < N / 4; j++) {
            largest = fmaxf(largest, fmaxf(scores[4 * j + 2 * h], scores[4 * j + 2 * h + 1]));
        }
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
        // Growth by little does not count: weights up to 2^8 do no harm, and nothing need shrink.
        if ((largest - running.largest[h]) * scale <= 8.0f) largest = running.largest[h];
        // No key of this row is visible yet: any finite reference gives weights of zero.
        running.reference[h] = largest == NEGATIVE_INFINITY ? 0.0f : largest * scale;
        running.shrink[h] = exp2_fast(fmaf(running.largest[h], scale, -running.reference[h]));
        running.largest[h] = largest;
    }
}
// Turns scores into weights 2^(scale score - reference).
template <int N>
__device__ __forceinline__ void soften(Running& running, float (&scores)[N], float scale) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float even = 0.0f, odd = 0.0f;
#pragma unroll
        for (int j = 0; j < N / 4; j++) {
            float* pair = &scores[4 * j + 2 * h];
            pair[0] = exp2_fast(fmaf(pair[0], scale, -running.reference[h]));
            pair[1] = exp2_fast(fmaf(pair[1], scale, -running.reference[h]));
            even += pair[0];
            odd += pair[1];
        }
        running.sum[h] = fmaf(running.sum[h], running.shrink[h], even + odd);
    }
}
#endif
