// An RMSNorm that two products share.
//
//   normed = residual * weight / sqrt(mean square of its row of the residual + eps)
//
// The product that adds to the residual leaves residual * weight behind and, of each row, sums of the
// residual's squares. The next one takes residual * weight as its input and scales its own sums, to
// all of whose terms the root mean square is common. A product has one norm at most, before it or
// behind.
//
// Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
#pragma once
#include "hopper.cuh"

#ifndef NORM_SQUARES
#error "NORM_SQUARES is the number of sums of squares that a row has at most"
#endif

struct SharedNorm {
    const bf16* weight;  // [out_features], or null: no norm behind
    bf16* scaled;        // [num_tokens, out_features], written with a norm behind
    float* squares;      // [num_tokens, NORM_SQUARES], written with a norm behind, read with one before
    int num_squares;     // of a row, read; 0: no norm before
    float eps;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// What the sums of a product with a norm before it are scaled by, for each token, by THREADS threads
// that do nothing else: the products need not wait for it before they end. Each arrives at `has_scales`.
// A few lanes share a token, so that many loads are on their way at once: their latency is what this
// takes.
template <int THREADS>
__device__ __forceinline__ void load_scales(float* scales, const SharedNorm& norm, int num_tokens,
                                            int in_features, int thread, u32 has_scales) {
    wait_for_previous();
    constexpr int LANES = 8, AT_ONCE = 4, TOKENS_APART = THREADS / LANES;
    for (int first = 0; first < num_tokens; first += AT_ONCE * TOKENS_APART) {
        const int mine = first + thread / LANES;
        float sums[AT_ONCE] = {};
        for (int i = thread % LANES * 4; i < norm.num_squares; i += LANES * 4) {
            float4 squares[AT_ONCE];
#pragma unroll
            for (int t = 0; t < AT_ONCE; t++) {
                const int token = min(mine + t * TOKENS_APART, num_tokens - 1);
                squares[t] = __ldcg((const float4*)(norm.squares + token * NORM_SQUARES + i));
            }
            const int left = norm.num_squares - i;
#pragma unroll
            for (int t = 0; t < AT_ONCE; t++) {
                sums[t] += squares[t].x + (left > 1 ? squares[t].y : 0.0f) +
                           (left > 2 ? squares[t].z : 0.0f) + (left > 3 ? squares[t].w : 0.0f);
            }
        }
#pragma unroll
        for (int t = 0; t < AT_ONCE; t++) {
#pragma unroll
            for (int distance = LANES / 2; distance > 0; distance /= 2) {
                sums[t] += __shfl_xor_sync(ALL_LANES, sums[t], distance);
            }
            const int token = mine + t * TOKENS_APART;
            if (thread % LANES == 0 && token < num_tokens) {
                scales[token] = rsqrtf(sums[t] / in_features + norm.eps);
            }
        }
    }
    arrive(has_scales);
}
#endif
