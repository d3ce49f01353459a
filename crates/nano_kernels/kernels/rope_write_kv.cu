// Rotary position embedding of queries and keys, and the write of keys and values into the cache,
// for the rows that decode attention does not take. Values are copied as they are.
//
// Grid: num_tokens. Block: any number of threads. A thread takes eight pairs at a time.
//
//   query:    [num_tokens, num_heads, head_dim] bf16, written
//   cache:    one layer, [num_blocks, k | v, num_kv_heads, BLOCK_SIZE, head_dim] bf16, written
//   qkv:      [num_tokens, num_heads + 2 num_kv_heads, head_dim] bf16: queries, keys, values
//   cos_sin:  [max_position, 2, head_dim / 2] f32: cosines, then sines
//   position: [num_tokens] i32, below max_position
//   slot:     [num_tokens] i32: block * BLOCK_SIZE + row in the block; below 0, a padding row
//             of a fixed launch shape, nothing is written to the cache
//
// head_dim is a multiple of 16.
//
// Source: Kwon et al., PagedAttention, 2023.
#include "rope.cuh"

extern "C" __global__ void __launch_bounds__(512)
rope_write_kv(bf16* query, bf16* cache, const bf16* qkv, const float* cos_sin,
              const int* position, const int* slot, int num_heads, int num_kv_heads,
              int head_dim) {
    let_next_begin();
    const i64 token = blockIdx.x;
    const int half_dim = head_dim / 2;
    const int units_per_head = half_dim / 8;
    const int all_heads = num_heads + 2 * num_kv_heads;
    const int token_slot = slot[token];
    const float* angles = cos_sin + (i64)position[token] * head_dim;
    wait_for_previous();

    for (int unit = threadIdx.x; unit < all_heads * units_per_head; unit += blockDim.x) {
        const int head = unit / units_per_head;
        const int element = unit % units_per_head * 8;
        const bf16* source = qkv + (token * all_heads + head) * head_dim + element;
        Bf16x8 first = *(const Bf16x8*)source;
        Bf16x8 second = *(const Bf16x8*)(source + half_dim);

        const bool is_value = head >= num_heads + num_kv_heads;
        if (!is_value) rotate(first, second, angles + element, half_dim);
        bf16* target = query + (token * num_heads + head) * head_dim + element;
        if (head >= num_heads) {
            if (token_slot < 0) continue;
            const i64 block = token_slot / BLOCK_SIZE;
            const int row = token_slot % BLOCK_SIZE;
            // Keys and values of a block follow each other as 2 num_kv_heads heads do in qkv.
            const i64 cache_head = block * 2 * num_kv_heads + (head - num_heads);
            target = cache + (cache_head * BLOCK_SIZE + row) * head_dim + element;
        }
        *(Bf16x8*)target = first;
        *(Bf16x8*)(target + half_dim) = second;
    }
}
