// The few instructions that attention needs beyond C++: asynchronous copies into shared memory,
// matrix loads from it, and the tensor cores. All of them run from compute capability 8.0 on.
//
// # Source
// PTX ISA: cp.async, ldmatrix, movmatrix, mma.m16n8k16. Fragment layouts, with
// `group = lane / 4` and `pair = lane % 4`:
//   A [16 x 16] a0: row group, columns 2 pair, 2 pair + 1; a1: row group + 8; a2, a3: columns + 8
//   B [16 x 8]  b0: rows 2 pair, 2 pair + 1 of column group; b1: rows + 8
//   C [16 x 8]  c0, c1: row group, columns 2 pair, 2 pair + 1; c2, c3: row group + 8
#pragma once
#include "common.cuh"

// Sixteen bytes from global to shared memory in the background; zeros where `valid` is false,
// and then nothing is read.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}

// The same for four bytes.
__device__ __forceinline__ void copy_async_word(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(valid ? 4 : 0)
                 : "memory");
}

__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most PENDING of this thread's youngest groups of copies are under way.
template <int PENDING> __device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices; lane i gives the shared address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(u32 (&m)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row)
                 : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(u32 (&m)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row)
                 : "memory");
}

// An 8 x 8 matrix across the warp's registers, transposed.
__device__ __forceinline__ u32 transpose_matrix(u32 matrix) {
    u32 transposed;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(matrix));
    return transposed;
}

// c += a b, over 16 x 16 times 16 x 8.
__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Where 16-byte chunk `chunk` of row `row` lies in a tile of rows of DIM bf16 values. The
// chunks of eight consecutive rows at one column fall into different banks.
template <int DIM> __device__ __forceinline__ int swizzled(int row, int chunk) {
    return row * DIM + ((chunk ^ (row & 7)) << 3);
}
