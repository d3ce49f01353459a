// Root-mean-square normalisation in one pass over a row.
//
//   out = input * weight / sqrt(mean(input^2) + eps)
//
// Grid: num_tokens. Block: whole warps, at least hidden_size / (8 VECTORS) threads, at most 1024.
// Shared memory: 128 bytes. A row stays in registers between the two uses.
//
//   out, input: [num_tokens, hidden_size] bf16
//   weight:     [hidden_size] bf16
//
// hidden_size is a multiple of 8.
//
// Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
#include "common.cuh"

// 16-byte vectors a thread may hold.
constexpr int VECTORS = 4;

extern "C" __global__ void __launch_bounds__(1024)
rms_norm(Bf16x8* out, const Bf16x8* input, const Bf16x8* weight, int hidden_size, float eps) {
    __shared__ float scratch[WARP];
    let_next_begin();
    const int num_vectors = hidden_size / 8;
    const i64 row = (i64)blockIdx.x * num_vectors;
    Bf16x8 factors_of[VECTORS];
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        const int i = threadIdx.x + v * blockDim.x;
        if (i < num_vectors) factors_of[v] = weight[i];
    }
    wait_for_previous();

    float values[VECTORS][8];
    float sum_of_squares = 0.0f;
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        const int i = threadIdx.x + v * blockDim.x;
        if (i >= num_vectors) continue;
        unpack(input[row + i], values[v]);
#pragma unroll
        for (int e = 0; e < 8; e++) sum_of_squares += values[v][e] * values[v][e];
    }
    sum_of_squares = block_reduce(sum_of_squares, scratch, Add());
    const float scale = rsqrtf(sum_of_squares / hidden_size + eps);

#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        const int i = threadIdx.x + v * blockDim.x;
        if (i >= num_vectors) continue;
        float factors[8];
        unpack(factors_of[v], factors);
#pragma unroll
        for (int e = 0; e < 8; e++) values[v][e] *= scale * factors[e];
        out[row + i] = pack(values[v]);
    }
}
