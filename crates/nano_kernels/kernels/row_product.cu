// The product of one row with a weight matrix, at the rate at which memory gives the weights, with
// what comes before and after it in a decoder done on the way.
//
//   x = input, or with a norm: input * norm / sqrt(mean(input^2) + eps), rounded to bf16
//   y = x weight^T
//   out = y | out + y | silu(y's first half) * (y's second half), rounded once
//
// Every thread block keeps x in shared memory. A warp takes two rows of the weight at a time (those
// of gate and up where they are multiplied); each lane has its own ring of STAGES pieces of 16 bytes
// of each in shared memory: what one piece frees is at once filled with the piece that the lane
// needs that much later, also across the end of its rows. The first pieces are asked for before x
// is there, and before the kernel in front has ended.
//
// Grid: as many blocks as fit the device. Block: 32 NUM_WARPS.
// Shared memory: STAGES ROWS 16 32 NUM_WARPS + in_features 2 bytes, or 4 with a norm, dynamic.
//
//   out:    [out_features] bf16 or f32; [out_features / 2] bf16 if gated
//   input:  [in_features] bf16
//   norm:   [in_features] bf16, or null
//   weight: [out_features, in_features] bf16
//
// in_features is a multiple of 8.
//
// Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019 (the norm); Shazeer, GLU
// Variants Improve Transformer, 2020 (the gate).
#include "mma.cuh"

constexpr int NUM_WARPS = 16;
constexpr int NUM_THREADS = NUM_WARPS * WARP;
constexpr int ROWS = 2;
// With 160 KB one block fills a multiprocessor, so that the blocks of the next product, which come
// while those of this one end, lie evenly: with room for two they do not.
#if __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
constexpr int STAGES = 10;
#else
constexpr int STAGES = 4;  // the shared memory is smaller there
#endif

__device__ __forceinline__ float dot(const Bf16x8& a, const Bf16x8& b, float sum) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sum = fmaf(low_float(a.pairs[i]), low_float(b.pairs[i]), sum);
        sum = fmaf(high_float(a.pairs[i]), high_float(b.pairs[i]), sum);
    }
    return sum;
}

// x into shared memory, and before it is there its norm behind it. Each thread normalises what it
// wrote itself.
__device__ __forceinline__ void stage(Bf16x8* x, const Bf16x8* input, const Bf16x8* norm,
                                      int num_vectors, float eps) {
    __shared__ float scratch[WARP];
    float sum_of_squares = 0.0f;
    Bf16x8* staged_norm = x + num_vectors;
    if (norm != nullptr) {
        for (int i = threadIdx.x; i < num_vectors; i += NUM_THREADS) staged_norm[i] = norm[i];
    }
    wait_for_previous();
    for (int i = threadIdx.x; i < num_vectors; i += NUM_THREADS) {
        const Bf16x8 vector = input[i];
        sum_of_squares = dot(vector, vector, sum_of_squares);
        x[i] = vector;
    }
    if (norm != nullptr) {
        sum_of_squares = block_reduce(sum_of_squares, scratch, Add());
        const float scale = rsqrtf(sum_of_squares / (num_vectors * 8) + eps);
        for (int i = threadIdx.x; i < num_vectors; i += NUM_THREADS) {
            float values[8], factors[8];
            unpack(x[i], values);
            unpack(staged_norm[i], factors);
#pragma unroll
            for (int e = 0; e < 8; e++) values[e] *= scale * factors[e];
            x[i] = pack(values);
        }
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
row_product(void* out, const Bf16x8* input, const Bf16x8* norm, const Bf16x8* weight,
            int out_features, int in_features, int epilogue, float eps) {
    extern __shared__ __align__(16) Bf16x8 shared[];
    let_next_begin();
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int num_vectors = in_features / 8;
    const int num_units = (out_features + ROWS - 1) / ROWS;
    const int stride = gridDim.x * NUM_WARPS;
    // Neighbouring units lie in neighbouring blocks: a short product uses every multiprocessor.
    int unit = warp * gridDim.x + blockIdx.x;

    const auto row_of = [&](int of_unit, int r) {
        return epilogue == GATED ? of_unit + r * num_units : of_unit * ROWS + r;
    };
    Bf16x8* x = shared + STAGES * ROWS * NUM_THREADS;
    const auto piece = [&](int at_stage, int r) {
        return shared + (at_stage * ROWS + r) * NUM_THREADS + threadIdx.x;
    };
    int next_unit = unit, next_first = 0;
    const auto load = [&](int at_stage) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int row = row_of(next_unit, r), at = next_first + lane;
            const bool valid = next_unit < num_units && row < out_features && at < num_vectors;
            const i64 offset = valid ? (i64)row * num_vectors + at : 0;
            copy_async(piece(at_stage, r), weight + offset, valid);
        }
        commit_copies();
        next_first += WARP;
        if (next_first >= num_vectors) {
            next_first = 0;
            next_unit += stride;
        }
    };
#pragma unroll
    for (int s = 0; s < STAGES; s++) load(s);
    stage(x, input, norm, num_vectors, eps);

    int at_stage = 0;
    for (; unit < num_units; unit += stride) {
        float sums[ROWS] = {}, before[ROWS] = {};
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int row = row_of(unit, r);
            if (epilogue == ADD && lane == 0 && row < out_features) {
                before[r] = low_float(((const bf16*)out)[row]);
            }
        }
        for (int first = 0; first < num_vectors; first += WARP) {
            // Past the end the weights are zeros; x is read where it is.
            const Bf16x8 vector = x[min(first + lane, num_vectors - 1)];
            wait_copies<STAGES - 1>();
#pragma unroll
            for (int r = 0; r < ROWS; r++) sums[r] = dot(*piece(at_stage, r), vector, sums[r]);
            load(at_stage);
            if (++at_stage == STAGES) at_stage = 0;
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) sums[r] = warp_reduce(sums[r], Add());
        if (lane != 0) continue;
        if (epilogue == GATED) {
            // Rounded as they are where the halves are written out first.
            const float gate = low_float(pack_bf16(sums[0], 0.0f));
            const float up = low_float(pack_bf16(sums[1], 0.0f));
            const float gated = gate / (1.0f + __expf(-gate)) * up;
            ((bf16*)out)[unit] = (bf16)pack_bf16(gated, 0.0f);
            continue;
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int row = row_of(unit, r);
            if (row >= out_features) continue;
            if (epilogue == STORE_F32) {
                ((float*)out)[row] = sums[r];
            } else {
                ((bf16*)out)[row] = (bf16)pack_bf16(before[r] + sums[r], 0.0f);
            }
        }
    }
}
