// Prefill attention of a tile whose keys are split over several thread blocks, the parts of the
// tile: what each leaves behind, and how all of it becomes the output.
//
// Source: Dao et al., Flash-Decoding, 2023.
#pragma once
#include "prefill_wgmma.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// What a part leaves behind: of its slot, the thread's elements of the first and the next row in
// turn, two columns at a time, and both rows' largest score and sum.
struct Scratch {
    float4 *partial, *partial_ml;
    u64* arrived;
};
// Of a word of `arrived`: how many parts have left what they have, how many have done all, and from
// bit 32 on which of them have gone without their share of the merge.
constexpr u64 HAS_LEFT = 1, HAS_DONE = 1 << 16, HAS_GONE = (u64)1 << 32;
// Clocks that a part waits for the others, about 0.1 ms.
#ifndef PATIENCE
#define PATIENCE 200000
#endif
__device__ __forceinline__ u32 num_left(u64 word) { return word & (HAS_DONE - 1); }
__device__ __forceinline__ i64 partial_at(int slot, int columns) {
    return ((i64)slot * (HEAD_DIM / 8) + columns) * (2 * GROUP_THREADS) + threadIdx.x - GROUP_THREADS;
}
__device__ __forceinline__ i64 ml_at(int slot) {
    return (i64)slot * (2 * GROUP_THREADS) + threadIdx.x - GROUP_THREADS;
}

// Leaves this part's output and waits for those of the others. Gives the shares of the merge that
// are this part's to do, a bit each: its own, unless the others do not come, since kernels of another
// stream may have the multiprocessors that they need. Then it goes, and the last one to come does
// its share too. For all multiplying threads of a block; there are at most 32 parts.
__device__ __forceinline__ u32 leave_part(const Scratch& scratch, const Running& running,
                                          const float (&output)[HEAD_DIM / 2], int part,
                                          int num_splits, int num_parts) {
    __shared__ u32 shares;
    const float sums[2] = {quad_sum(running.sum[0]), quad_sum(running.sum[1])};
    __stcg(&scratch.partial_ml[ml_at(blockIdx.x)],
           make_float4(running.largest[0], sums[0], running.largest[1], sums[1]));
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 8; j++) {
        const float* x = &output[4 * j];
        __stcg(&scratch.partial[partial_at(blockIdx.x, j)], make_float4(x[0], x[1], x[2], x[3]));
    }
    sync_warps(3, MULTIPLYING_WARPS);
    if (threadIdx.x == GROUP_THREADS) {
        u64* arrived = scratch.arrived + blockIdx.x / num_splits;
        const volatile u64* now = arrived;
        __threadfence();
        const u64 before = atomicAdd(arrived, HAS_LEFT);
        shares = 1u << part;
        if (num_left(before) + 1 == num_parts) {
            shares |= before / HAS_GONE;
        } else {
            const i64 start = clock64();
            while (num_left(*now) < num_parts && clock64() - start < PATIENCE) {}
            // Whoever has come since the last look has not seen this part go.
            const bool goes = num_left(*now) < num_parts &&
                              num_left(atomicOr(arrived, HAS_GONE << part)) < num_parts;
            if (goes) shares = 0;
        }
        __threadfence();
    }
    sync_warps(3, MULTIPLYING_WARPS);
    return shares;
}
// The last part to call this, after all else, leaves zero to the next launch.
__device__ __forceinline__ void forget_parts(const Scratch& scratch, int num_splits,
                                             int num_parts) {
    if (threadIdx.x != GROUP_THREADS) return;
    u64* arrived = scratch.arrived + blockIdx.x / num_splits;
    const u32 others = atomicAdd(arrived, HAS_DONE) % HAS_GONE / HAS_DONE;
    if (others + 1 == num_parts) *arrived = 0;
}

// Of the thread's two rows, `columns` pairs of columns from `first` on, merged over all parts;
// `targets` are the rows' outputs at the thread's first column, null where there is no row. Loads
// of AT_ONCE parts are on their way at once.
template <int COLUMNS>
__device__ __forceinline__ void merge_columns(const Scratch& scratch, bf16* const (&targets)[2],
                                              int first_slot, int num_parts, int first,
                                              int columns, float scale) {
    constexpr int AT_ONCE = 16 / COLUMNS;
    float largest[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, sums[2] = {};
    float4 values[COLUMNS] = {};
    for (int p = 0; p < num_parts; p += AT_ONCE) {
        float4 ml[AT_ONCE], parts[AT_ONCE][COLUMNS];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int slot = first_slot + min(p + i, num_parts - 1);
            ml[i] = __ldcg(&scratch.partial_ml[ml_at(slot)]);
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                const int at = first + min(j, columns - 1);
                parts[i][j] = __ldcg(&scratch.partial[partial_at(slot, at)]);
            }
            if (p + i >= num_parts) ml[i] = make_float4(NEGATIVE_INFINITY, 0, NEGATIVE_INFINITY, 0);
        }
        float merged[2] = {largest[0], largest[1]}, shrink[2];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            merged[0] = fmaxf(merged[0], ml[i].x);
            merged[1] = fmaxf(merged[1], ml[i].z);
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            // While no part has a key that the row sees, any finite reference will do.
            largest[h] = fmaxf(largest[h], -1e30f);
            merged[h] = fmaxf(merged[h], -1e30f);
            shrink[h] = exp2_fast((largest[h] - merged[h]) * scale);
            largest[h] = merged[h];
            sums[h] *= shrink[h];
        }
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            values[j] = {values[j].x * shrink[0], values[j].y * shrink[0],
                         values[j].z * shrink[1], values[j].w * shrink[1]};
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const float weights[2] = {exp2_fast((ml[i].x - merged[0]) * scale),
                                      exp2_fast((ml[i].z - merged[1]) * scale)};
            sums[0] = fmaf(weights[0], ml[i].y, sums[0]);
            sums[1] = fmaf(weights[1], ml[i].w, sums[1]);
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                values[j].x = fmaf(weights[0], parts[i][j].x, values[j].x);
                values[j].y = fmaf(weights[0], parts[i][j].y, values[j].y);
                values[j].z = fmaf(weights[1], parts[i][j].z, values[j].z);
                values[j].w = fmaf(weights[1], parts[i][j].w, values[j].w);
            }
        }
    }
    const float scales[2] = {1.0f / sums[0], 1.0f / sums[1]};
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
        const u32 pairs[2] = {pack_bf16(values[j].x * scales[0], values[j].y * scales[0]),
                              pack_bf16(values[j].z * scales[1], values[j].w * scales[1])};
#pragma unroll
        for (int h = 0; h < 2; h++) {
            if (j < columns && targets[h]) *(u32*)(targets[h] + (first + j) * 8) = pairs[h];
        }
    }
}

// The same for one share of all pairs; `slot` is the first part's.
__device__ __forceinline__ void merge_share(const Scratch& scratch, bf16* const (&targets)[2],
                                            int slot, int share, int num_parts, float scale) {
    const int first = HEAD_DIM / 8 * share / num_parts;
    const int columns = HEAD_DIM / 8 * (share + 1) / num_parts - first;
    if (columns > 4) {
        merge_columns<8>(scratch, targets, slot, num_parts, first, columns, scale);
    } else if (columns > 2) {
        merge_columns<4>(scratch, targets, slot, num_parts, first, columns, scale);
    } else if (columns > 0) {
        merge_columns<2>(scratch, targets, slot, num_parts, first, columns, scale);
    }
}
#endif
