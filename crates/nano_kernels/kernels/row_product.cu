// The product of one row with a weight matrix, at the rate at which memory gives the weights, with
// what comes before and after it in a decoder done on the way.
//
//   x = input, or with a norm: input * norm / sqrt(mean(input^2) + eps), rounded to bf16
//   y = x weight^T
//   out = y | out + y | silu(y's first half) * (y's second half), rounded once
//
// Every thread block keeps x in shared memory. A warp takes two rows of the weight at a time (those
// of gate and up where they are multiplied) and holds UNROLL 16-byte pieces of each in registers:
// what one piece frees is at once filled with the piece that the warp needs that much later, also
// across the end of its rows. The first pieces are asked for before x is there.
//
// Grid: as many blocks as fit the device. Block: 32 NUM_WARPS.
// Shared memory: in_features 2 bytes, dynamic.
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
#include "common.cuh"

constexpr int NUM_WARPS = 8;
constexpr int NUM_THREADS = NUM_WARPS * WARP;
constexpr int ROWS = 2;
constexpr int UNROLL = 4;

enum Epilogue { STORE = 0, ADD = 1, STORE_F32 = 2, GATED = 3 };

// Weights are read once: they must not push anything else out of the caches.
__device__ __forceinline__ Bf16x8 load_once(const Bf16x8* source) {
    Bf16x8 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.pairs[0]), "=r"(v.pairs[1]), "=r"(v.pairs[2]), "=r"(v.pairs[3])
                 : "l"(source));
    return v;
}

__device__ __forceinline__ float dot(const Bf16x8& a, const Bf16x8& b, float sum) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sum = fmaf(low_float(a.pairs[i]), low_float(b.pairs[i]), sum);
        sum = fmaf(high_float(a.pairs[i]), high_float(b.pairs[i]), sum);
    }
    return sum;
}

// x into shared memory. Each thread normalises what it wrote itself.
__device__ __forceinline__ void stage(Bf16x8* x, const Bf16x8* input, const Bf16x8* norm,
                                      int num_vectors, float eps) {
    __shared__ float scratch[WARP];
    float sum_of_squares = 0.0f;
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
            unpack(norm[i], factors);
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
    extern __shared__ __align__(16) Bf16x8 x[];
    let_next_begin();
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int num_vectors = in_features / 8;
    const int num_rounds = (num_vectors + WARP * UNROLL - 1) / (WARP * UNROLL);
    const int num_units = (out_features + ROWS - 1) / ROWS;
    const int stride = gridDim.x * NUM_WARPS;
    // Neighbouring units lie in neighbouring blocks: a short product uses every multiprocessor.
    int unit = warp * gridDim.x + blockIdx.x;

    const auto row_of = [&](int of_unit, int r) {
        return epilogue == GATED ? of_unit + r * num_units : of_unit * ROWS + r;
    };
    Bf16x8 pieces[UNROLL][ROWS];
    const auto load = [&](int of_unit, int round, int u) {
        const int at = (round * UNROLL + u) * WARP + lane;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int row = row_of(of_unit, r);
            const bool valid = of_unit < num_units && row < out_features && at < num_vectors;
            pieces[u][r] = valid ? load_once(weight + (i64)row * num_vectors + at) : Bf16x8{};
        }
    };
#pragma unroll
    for (int u = 0; u < UNROLL; u++) load(unit, 0, u);
    wait_for_previous();
    stage(x, input, norm, num_vectors, eps);

    for (; unit < num_units; unit += stride) {
        float sums[ROWS] = {};
        for (int round = 0; round < num_rounds; round++) {
            const bool is_last = round + 1 == num_rounds;
            const int next_round = is_last ? 0 : round + 1;
            const int next_unit = is_last ? unit + stride : unit;
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                // Past the end the weights are zeros; x is read where it is.
                const Bf16x8 vector = x[min((round * UNROLL + u) * WARP + lane, num_vectors - 1)];
#pragma unroll
                for (int r = 0; r < ROWS; r++) sums[r] = dot(pieces[u][r], vector, sums[r]);
                load(next_unit, next_round, u);
            }
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
                bf16* target = (bf16*)out + row;
                const float before = epilogue == ADD ? low_float(*target) : 0.0f;
                *target = (bf16)pack_bf16(before + sums[r], 0.0f);
            }
        }
    }
}
