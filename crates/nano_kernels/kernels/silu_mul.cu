// SwiGLU's gate: out = silu(gate) * up, with silu(x) = x / (1 + exp(-x)).
//
// Grid: (blocks over a row, num_tokens). Block: 256 threads, eight elements each.
//
//   out:     [num_tokens, intermediate_size] bf16
//   gate_up: [num_tokens, 2 intermediate_size] bf16, the gate first
//
// intermediate_size is a multiple of 8.
//
// Source: Shazeer, GLU Variants Improve Transformer, 2020.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256)
silu_mul(Bf16x8* out, const Bf16x8* gate_up, int intermediate_size) {
    begin();
    const int num_vectors = intermediate_size / 8;
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= num_vectors) return;
    const i64 token = blockIdx.y;
    float gate[8], up[8];
    unpack(gate_up[token * 2 * num_vectors + i], gate);
    unpack(gate_up[(token * 2 + 1) * num_vectors + i], up);
#pragma unroll
    for (int e = 0; e < 8; e++) gate[e] = gate[e] / (1.0f + __expf(-gate[e])) * up[e];
    out[token * num_vectors + i] = pack(gate);
}
