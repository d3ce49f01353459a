// What every kernel shares: bf16 without headers, vector loads, reductions over a warp and a block.
//
// bf16 is stored as its 16 bits, so no header beyond this one is needed: NVRTC compiles every
// kernel from the text inside the binary alone.
#pragma once

typedef unsigned short bf16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr int WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;
// Token slots of a KV cache block.
constexpr int BLOCK_SIZE = 16;
#define NEGATIVE_INFINITY __int_as_float(0xff800000)

// Lets the next kernel of the stream begin, and waits until the one before has ended, with all that
// it wrote. Every kernel calls both before it reads what another one writes, or writes anything:
// the kernels of a stream overlap, see src/cuda/kernels.rs. At least one block of each must wait:
// then no kernel ends before the one in front of it.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void begin() {
    let_next_begin();
    wait_for_previous();
}

// What becomes of a product, as cuda/product.rs counts.
enum Epilogue { STORE = 0, ADD = 1, STORE_F32 = 2, GATED = 3 };

// One 16-byte access: eight bf16 values.
struct alignas(16) Bf16x8 {
    u32 pairs[4];
};

__device__ __forceinline__ float low_float(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_float(u32 pair) {
    return __uint_as_float(pair & 0xffff0000u);
}

// Two floats rounded to the nearest bf16, `low` in the lower half.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ void unpack(const Bf16x8& vector, float (&values)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        values[2 * i] = low_float(vector.pairs[i]);
        values[2 * i + 1] = high_float(vector.pairs[i]);
    }
}

__device__ __forceinline__ Bf16x8 pack(const float (&values)[8]) {
    Bf16x8 vector;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        vector.pairs[i] = pack_bf16(values[2 * i], values[2 * i + 1]);
    }
    return vector;
}

struct Add {
    template <typename T> __device__ T operator()(T a, T b) const { return a + b; }
};
struct Max {
    template <typename T> __device__ T operator()(T a, T b) const { return a > b ? a : b; }
};

// `combine` over the lanes of a warp; every lane gets the result.
template <typename T, typename Combine>
__device__ __forceinline__ T warp_reduce(T value, Combine combine) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        value = combine(value, __shfl_xor_sync(ALL_LANES, value, distance));
    }
    return value;
}

// `combine` over the threads of a block, whole warps; every thread gets the result. `scratch`
// holds one value a warp. The order is fixed, so the result is too.
template <typename T, typename Combine>
__device__ __forceinline__ T block_reduce(T value, T* scratch, Combine combine) {
    value = warp_reduce(value, combine);
    __syncthreads();  // the last call's readers are done with the scratch
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
    __syncthreads();
    value = scratch[0];
    for (int warp = 1; warp < blockDim.x / WARP; warp++) value = combine(value, scratch[warp]);
    return value;
}

// __syncthreads of so many warps alone, those that name the same `barrier`, which is not 0.
__device__ __forceinline__ void sync_warps(int barrier, int num_warps) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(num_warps * WARP) : "memory");
}

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return (u32)__cvta_generic_to_shared(pointer);
}

// 2^x; minus infinity gives zero.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
