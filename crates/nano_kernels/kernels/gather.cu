// Rows of a matrix by index: the embedding of token ids, and the hidden states that are sampled.
//
// Grid: num_rows. Block: any number of threads, eight elements each at a time.
//
//   out:    [num_rows, row_size] bf16
//   source: [num_source_rows, row_size] bf16
//
// row_size is a multiple of 8; indices are below num_source_rows, or the row becomes zeros.
#include "common.cuh"

__device__ __forceinline__ void copy_row(Bf16x8* out, const Bf16x8* source, u32 index,
                                         u32 num_source_rows, int row_size) {
    const int num_vectors = row_size / 8;
    const Bf16x8* from = source + (i64)index * num_vectors;
    Bf16x8* to = out + (i64)blockIdx.x * num_vectors;
    for (int i = threadIdx.x; i < num_vectors; i += blockDim.x) {
        to[i] = index < num_source_rows ? from[i] : Bf16x8{};
    }
}

//   index: [num_rows] u32
extern "C" __global__ void __launch_bounds__(256)
gather_rows(Bf16x8* out, const Bf16x8* source, const u32* index, u32 num_source_rows,
            int row_size) {
    begin();
    copy_row(out, source, index[blockIdx.x], num_source_rows, row_size);
}

// A token id comes from the host, or from the step before, whose sampled ids the host need not
// have seen yet.
//
//   token:         [num_rows] u32: an id, or a row of `sampled`
//   from_sampled:  [num_rows] u32: 1 where `token` is a row of `sampled`
//   sampled:       [num_sampled] u32
extern "C" __global__ void __launch_bounds__(256)
embed_tokens(Bf16x8* out, const Bf16x8* source, const u32* token, const u32* from_sampled,
             const u32* sampled, u32 num_source_rows, int row_size) {
    begin();
    u32 id = token[blockIdx.x];
    if (from_sampled[blockIdx.x] != 0) id = sampled[id];
    copy_row(out, source, id, num_source_rows, row_size);
}
