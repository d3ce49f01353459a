// Products of a warpgroup, which only Hopper has: wgmma, with sums in registers. All of it is defined
// for sm_90a alone.
//
// Source: NVIDIA, PTX ISA: wgmma.
#pragma once
#include "hopper.cuh"

constexpr int GROUP_ROWS = 64, GROUP_THREADS = 128;  // of a warpgroup
constexpr int CHUNK = 64;  // columns of a row in shared memory: 128 bytes, the width of the swizzle
constexpr int ROW_BYTES = CHUNK * sizeof(bf16);

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// What wgmma knows of a tile: rows of 128 bytes, swizzled, eight of them 1024 bytes.
__device__ __forceinline__ u64 descriptor(u32 address) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}
__device__ __forceinline__ void begin_products() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int IN_FLIGHT> __device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(IN_FLIGHT) : "memory");
}
// Keeps the compiler from moving uses of what wgmma writes across its waits.
template <int N> __device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
// Sums of a wgmma from d[i] on, and as many as its assembly names.
#define FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SIXTEEN(i) FOUR(i), FOUR(i + 4), FOUR(i + 8), FOUR(i + 12)
#define NAMES_4 "%0, %1, %2, %3"
#define NAMES_8 NAMES_4 ", %4, %5, %6, %7"
#define NAMES_16 NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_32 NAMES_16 \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_48 NAMES_32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_56 NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define NAMES_64 NAMES_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_80 NAMES_64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define NAMES_96 NAMES_80 \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES_112 NAMES_96 \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
// d = a b^T over 16 columns, or d += where `adds`: 64 rows of a and ROWS of b. A, B and ADDS number the
// operands behind the sums, A also counts these.
#define PRODUCT(ROWS, A, B, ADDS, ...)                                                           \
    __device__ __forceinline__ void multiply(float (&d)[A], u64 a, u64 b, int adds) {            \
        asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, %" #ADDS ", 0;\n"                   \
                     "wgmma.mma_async.sync.aligned.m64n" #ROWS "k16.f32.bf16.bf16 {" NAMES_##A   \
                     "}, %" #A ", %" #B ", adds, 1, 1, 0, 0;\n}"                                 \
                     : __VA_ARGS__                                                               \
                     : "l"(a), "l"(b), "r"(adds));                                               \
    }
PRODUCT(8, 4, 5, 6, FOUR(0))
PRODUCT(16, 8, 9, 10, FOUR(0), FOUR(4))
PRODUCT(32, 16, 17, 18, SIXTEEN(0))
PRODUCT(64, 32, 33, 34, SIXTEEN(0), SIXTEEN(16))
PRODUCT(96, 48, 49, 50, SIXTEEN(0), SIXTEEN(16), SIXTEEN(32))
PRODUCT(112, 56, 57, 58, SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), FOUR(48), FOUR(52))
PRODUCT(128, 64, 65, 66, SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48))
PRODUCT(160, 80, 81, 82, SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48), SIXTEEN(64))
PRODUCT(192, 96, 97, 98, SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48), SIXTEEN(64),
        SIXTEEN(80))
PRODUCT(224, 112, 113, 114, SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48), SIXTEEN(64),
        SIXTEEN(80), SIXTEEN(96))
#undef PRODUCT

// A ring's stages, one after the other: `multiply` is given descriptors of 16 columns of the rows that
// lie at `a` and `b` in the first stage, and whether it adds. A stage is released when the products
// of the next one are on their way.
template <int NUM_STAGES, int STAGE_BYTES, typename Multiply, typename Release>
__device__ __forceinline__ void multiply_steps(Turn& turn, int num_steps, u32 full, u32 a, u32 b,
                                               Multiply multiply, Release release) {
    int before = 0;
    for (int step = 0; step < num_steps; step++) {
        wait(full + turn.stage * 8, turn.phase);
        const int stage = turn.stage * STAGE_BYTES;
        const u64 a_rows = descriptor(a + stage), b_rows = descriptor(b + stage);
        begin_products();
#pragma unroll
        for (int k = 0; k < ROW_BYTES; k += 32) {
            multiply(a_rows + (k >> 4), b_rows + (k >> 4), step + k > 0);
        }
        commit_products();
        wait_products<1>();
        if (step > 0) release(before);
        before = turn.stage;
        turn.next(NUM_STAGES);
    }
    wait_products<0>();
    release(before);
}
#endif
