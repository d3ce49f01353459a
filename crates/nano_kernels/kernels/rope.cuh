// Rotary position embedding: element i of a head and element i + head_dim / 2 are a pair (x, y),
// turned by the angle of the token's position: (x cos - y sin, y cos + x sin).
//
// Source: Su et al., RoFormer, 2021.
#pragma once
#include "common.cuh"

// The roundings are spelled out, so that every kernel turns to the same bits.
__device__ __forceinline__ void rotate(float& x, float& y, float cosine, float sine) {
    const float turned = __fmaf_rn(x, cosine, -__fmul_rn(y, sine));
    y = __fmaf_rn(y, cosine, __fmul_rn(x, sine));
    x = turned;
}

// Eight pairs; their cosines lie at `angles` and their sines half a head later.
__device__ __forceinline__ void rotate(Bf16x8& first, Bf16x8& second, const float* angles,
                                       int half_dim) {
    float x[8], y[8];
    unpack(first, x);
    unpack(second, y);
#pragma unroll
    for (int e = 0; e < 8; e++) rotate(x[e], y[e], angles[e], angles[half_dim + e]);
    first = pack(x);
    second = pack(y);
}
