// Parameters made on the device: random ones, and bf16 from other checkpoint types.
//
// Grid: any. Block: any. Threads walk the elements in strides of the whole grid.
#include "common.cuh"

// One step of SplitMix64, as nano_model's dummy.rs takes it.
__device__ __forceinline__ u64 hash(u64 number) {
    u64 z = number + 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

// Elements that share one seed, as in dummy.rs.
constexpr i64 CHUNK = 1 << 18;

// The numbers of nano_model's dummy.rs: four from each 64 random bits, by a table of draws.
//
//   out:   [num_elements] bf16, 8-byte aligned
//   draws: [65536] bf16
//
// Source: Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators, 2014.
extern "C" __global__ void __launch_bounds__(256)
fill_random(bf16* out, const bf16* draws, i64 num_elements, u64 seed) {
    const i64 stride = (i64)gridDim.x * blockDim.x * 4;
    for (i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * 4; i < num_elements; i += stride) {
        const u64 bits = hash(hash(seed ^ (u64)(i / CHUNK)) + i % CHUNK / 4);
        bf16 four[4];
#pragma unroll
        for (int e = 0; e < 4; e++) four[e] = draws[bits >> 16 * e & 0xffff];
        if (i + 4 <= num_elements) {
            *(uint2*)(out + i) =
                make_uint2(four[0] | (u32)four[1] << 16, four[2] | (u32)four[3] << 16);
        } else {
            for (int e = 0; i + e < num_elements; e++) out[i + e] = four[e];
        }
    }
}

// Rounds to the nearest bf16.
//
//   out:    [num_elements] bf16
//   source: [num_elements] f32, or f16 where `is_half`
extern "C" __global__ void __launch_bounds__(256)
round_to_bf16(bf16* out, const void* source, i64 num_elements, int is_half) {
    const i64 stride = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < num_elements; i += stride) {
        float value;
        if (is_half) {
            asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(((const unsigned short*)source)[i]));
        } else {
            value = ((const float*)source)[i];
        }
        out[i] = (bf16)pack_bf16(value, 0.0f);
    }
}
