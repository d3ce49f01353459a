// What the warps of prefill_attention_wgmma.cu share: how its tiles lie in shared memory, their
// products, barriers, and the running softmax.
#pragma once
#include "hopper.cuh"

#if !defined(HEAD_DIM) || !defined(IN_PARTS)
#error "HEAD_DIM is 64 or 128, IN_PARTS 0 or 1"
#endif
constexpr int KEYS = 128;
constexpr int STAGES = HEAD_DIM == 64 ? 4 : 2;
constexpr int GROUP_ROWS = 64, GROUP_THREADS = 128, NUM_THREADS = 3 * GROUP_THREADS;
constexpr int HALVES = HEAD_DIM / 64;  // of a row: the swizzle is 64 columns wide
constexpr int ROW_BYTES = 128;         // of a half
constexpr int HALF_BYTES = KEYS * ROW_BYTES;
constexpr int TILE_BYTES = HALVES * HALF_BYTES;  // of a step's keys, of its values, of the queries
constexpr int BLOCKS_PER_STEP = KEYS / BLOCK_SIZE;
// A warp alone cannot ask for the boxes of a step's keys as fast as they are multiplied.
constexpr int COPYING_WARPS = GROUP_THREADS / WARP;
constexpr int BOXES = BLOCKS_PER_STEP / COPYING_WARPS;  // of a warp: one a lane
// A step's keys, or values: eight rows of one half, eight of the other, and so on.
constexpr int EIGHT_BYTES = 8 * ROW_BYTES, EIGHTS_BYTES = HALVES * EIGHT_BYTES;
constexpr int BOX_BYTES = BLOCK_SIZE / 8 * EIGHTS_BYTES;
// Of a thread, by setmaxnreg: 128 x 40 + 256 x 232 is what a launch of 384 x 168 holds.
#define COPYING_REGISTERS "40"
#define MULTIPLYING_REGISTERS "232"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// d = a b^T over 16 columns, or d += where `adds`: queries and keys.
__device__ __forceinline__ void multiply_keys(float (&d)[64], u64 a, u64 b, int adds) {
    asm volatile(
        "{\n.reg .pred adds;\nsetp.ne.b32 adds, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
        "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "
        "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "
        "%56, %57, %58, %59, %60, %61, %62, %63},"
        " %64, %65, adds, 1, 1, 0, 0;\n}"
        : SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48)
        : "l"(a), "l"(b), "r"(adds));
}
// d += a b over 16 rows of values, whose columns are contiguous.
__device__ __forceinline__ void multiply_values(float (&d)[HEAD_DIM / 2], const u32 (&a)[4],
                                                u64 b) {
#if HEAD_DIM == 128
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
        "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "
        "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "
        "%56, %57, %58, %59, %60, %61, %62, %63},"
        " {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
        : SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#else
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
        "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31},"
        " {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
        : SIXTEEN(0), SIXTEEN(16)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#endif
}
__device__ __forceinline__ u64 keys_descriptor(u32 address) {
    return (descriptor(address) & ~((u64)0x3fff << 32)) | (u64)(EIGHTS_BYTES >> 4) << 32;
}
// The same with rows along what is summed over: from one half to the other too.
__device__ __forceinline__ u64 values_descriptor(u32 address) {
    return (keys_descriptor(address) & ~((u64)0x3fff << 16)) | (u64)(EIGHT_BYTES >> 4) << 16;
}
// The warpgroups' turns on the tensor cores, by two of the hardware's barriers.
__device__ __forceinline__ void await_turn(int group) {
    asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory");
}
__device__ __forceinline__ void give_turn(int group) {
    asm volatile("bar.arrive %0, 256;" ::"r"(2 - group) : "memory");
}
__device__ __forceinline__ void sync_copying_warps() {
    asm volatile("bar.sync 4, 128;" ::: "memory");
}
// Both warpgroups are here.
__device__ __forceinline__ void sync_warpgroups() { asm volatile("bar.sync 3, 256;" ::: "memory"); }

// Shared addresses of the barriers, 8 bytes each: two of the queries, STAGES of keys and values.
struct Barriers {
    u32 query_full, query_free, tail, keys_full, keys_free, values_full, values_free;
    __device__ explicit Barriers(u32 base) {
        query_full = base;
        query_free = base + 16;
        tail = base + 32;
        keys_full = base + 40;
        keys_free = keys_full + STAGES * 8;
        values_full = keys_free + STAGES * 8;
        values_free = values_full + STAGES * 8;
    }
};
constexpr int NUM_BARRIERS = 5 + 4 * STAGES;

// The running softmax of a thread's two rows, lane / 4 and + 8 of its warp's sixteen.
struct Running {
    float largest[2], sum[2], shrink[2];
};

// Over the four lanes that share a row.
__device__ __forceinline__ float quad_sum(float sum) {
    sum += __shfl_xor_sync(ALL_LANES, sum, 1);
    return sum + __shfl_xor_sync(ALL_LANES, sum, 2);
}

// Turns scores into weights 2^(scale (score - largest)).
__device__ __forceinline__ void soften(Running& running, float (&scores)[64], float scale) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float largest = running.largest[h];
#pragma unroll
        for (int j = 0; j < 16; j++) {
            largest = fmaxf(largest, fmaxf(scores[4 * j + 2 * h], scores[4 * j + 2 * h + 1]));
        }
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
        // No key of this row is visible yet: any finite reference gives weights of zero.
        const float reference = largest == NEGATIVE_INFINITY ? 0.0f : largest * scale;
        running.shrink[h] = exp2_fast(fmaf(running.largest[h], scale, -reference));
        running.largest[h] = largest;
        float even = 0.0f, odd = 0.0f;
#pragma unroll
        for (int j = 0; j < 16; j++) {
            float* pair = &scores[4 * j + 2 * h];
            pair[0] = exp2_fast(fmaf(pair[0], scale, -reference));
            pair[1] = exp2_fast(fmaf(pair[1], scale, -reference));
            even += pair[0];
            odd += pair[1];
        }
        running.sum[h] = fmaf(running.sum[h], running.shrink[h], even + odd);
    }
}
#endif
