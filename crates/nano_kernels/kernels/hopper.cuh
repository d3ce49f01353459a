// What only Hopper has: barriers in shared memory that count bytes, and copies of boxes of a tensor.
// All of it is defined for sm_90a alone; TensorMap is for every target.
//
// Source: NVIDIA, PTX ISA: mbarrier, cp.async.bulk.tensor.
#pragma once
#include "common.cuh"

struct alignas(64) TensorMap {
    u64 opaque[16];
};
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
__device__ __forceinline__ void init_barrier(u32 barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// Of a ring's stages, full and empty again after so many arrivals.
__device__ __forceinline__ void init_ring(u32 full, u32 empty, int num_stages, int num_fill,
                                          int num_empty) {
    for (int s = 0; s < num_stages; s++) {
        init_barrier(full + s * 8, num_fill);
        init_barrier(empty + s * 8, num_empty);
    }
}
__device__ __forceinline__ void expect_bytes(u32 barrier, u32 num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(num_bytes)
                 : "memory");
}
__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// One block of assembly: a loop around it would keep the compiler from overlapping wgmma.
__device__ __forceinline__ void wait(u32 barrier, u32 phase) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}"
        ::"r"(barrier), "r"(phase)
        : "memory");
}
__device__ __forceinline__ u64 read_once_policy() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ u64 keep_policy() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
// Before a copy that must not wait for the map itself.
__device__ __forceinline__ void prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// A copy of the box at `column`, `row` and so on of a tensor, which counts its bytes at a barrier.
#define COPY_BOX(DIMENSIONS, PLACE, ...)                                                           \
    asm volatile("cp.async.bulk.tensor." DIMENSIONS ".shared::cluster.global.tile"                 \
                 ".mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {" PLACE "}], [%2], %3;" \
                 ::"r"(target), "l"(&map), "r"(barrier), "l"(policy), __VA_ARGS__                  \
                 : "memory")
__device__ __forceinline__ void copy_box(u32 target, const TensorMap& map, int column, int row,
                                         u32 barrier, u64 policy) {
    COPY_BOX("2d", "%4, %5", "r"(column), "r"(row));
}
__device__ __forceinline__ void copy_box(u32 target, const TensorMap& map, int column, int row,
                                         int plane, u32 barrier, u64 policy) {
    COPY_BOX("3d", "%4, %5, %6", "r"(column), "r"(row), "r"(plane));
}
__device__ __forceinline__ void copy_box(u32 target, const TensorMap& map, int column, int row,
                                         int plane, int volume, u32 barrier, u64 policy) {
    COPY_BOX("4d", "%4, %5, %6, %7", "r"(column), "r"(row), "r"(plane), "r"(volume));
}
__device__ __forceinline__ void copy_box(u32 target, const TensorMap& map, int column, int row,
                                         int half, int group, int plane, u32 barrier, u64 policy) {
    COPY_BOX("5d", "%4, %5, %6, %7, %8", "r"(column), "r"(row), "r"(half), "r"(group), "r"(plane));
}
#undef COPY_BOX
// Of a cluster, whose blocks lay out their shared memory alike: all in step with what each has in its
// shared memory, and what one of two does for both. The barrier's own release is a fence of the whole
// GPU, which waits for stores to the device's memory.
__device__ __forceinline__ void sync_cluster() {
    asm volatile(
        "fence.release.sync_restrict::shared::cta.cluster;\n"
        "barrier.cluster.arrive.relaxed.aligned;\n"
        "barrier.cluster.wait.aligned;" ::
            : "memory");
}
// At either's barrier. Naming the cluster's scope would put a fence of the whole GPU before it.
__device__ __forceinline__ void arrive_at(int rank, u32 barrier) {
    asm volatile(
        "{\n.reg .u32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}"
        ::"r"(barrier), "r"(rank)
        : "memory");
}
__device__ __forceinline__ void copy_box_to_both(u32 target, const TensorMap& map, int column,
                                                 int row, u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;"
        ::"r"(target), "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"((unsigned short)3),
        "l"(policy)
        : "memory");
}
// What this thread has stored in shared memory, seen by the copies and by wgmma.
__device__ __forceinline__ void publish_shared() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// The same in the device's memory. Without naming it the fence would be one of the whole GPU too.
__device__ __forceinline__ void publish_stores() {
    asm volatile("fence.proxy.async.global;" ::: "memory");
}
// Makes barriers just initialised known to the copies.
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    publish_shared();
}
// Writes zero to rows of 128 bytes, as `thread` of `num_threads`. Rows of a stage that no copy writes
// are multiplied all the same, and a product with zero takes the least power.
__device__ __forceinline__ void clear_rows(u32 rows, int num_rows, int thread, int num_threads) {
    for (int i = thread; i < num_rows * 8; i += num_threads) {
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(rows + i * 16), "r"(0)
                     : "memory");
    }
}
// A place in the ring and how often it has come round.
struct Turn {
    int stage = 0;
    u32 phase = 0;
    __device__ void next(int num_stages) {
        if (++stage == num_stages) {
            stage = 0;
            phase ^= 1;
        }
    }
};
#endif
