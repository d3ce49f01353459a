// Paged attention of many new tokens a sequence on the tensor cores of a Hopper GPU: what
// prefill_attention.cu computes, with the same cache, tables and tiles.
//
// A thread block takes one piece of work after the other: a tile of consecutive tokens and one K/V
// head. Two warpgroups take half of its tokens each: GROUP_ROWS rows, which are those tokens times
// the group's query heads (row = token * group + head). COPYING_WARPS warps copy: a warpgroup's
// queries as soon as it has read those before, keys and values KEYS at a time, a step's, through
// STAGES stages of shared memory (TMA, 128-byte swizzle, one box for a head's rows of a cache block);
// the last of several steps is half as wide where that is enough. The warpgroups multiply, with
// queries and their running softmax in registers, each at its own pace. Within one, a step's keys meet
// the queries, and its largest scores are looked for, while the step before's weights meet the values.
//
// Few tiles do not fill the device: then, IN_PARTS, a piece is one of up to num_splits parts of a
// tile's keys, and a thread block takes one. Each part leaves its output, maxima and sums in scratch
// memory, waits for the others, and merges its share of the columns of all of them, in a fixed order.
//
// Grid: as many blocks as the device has room for, or pieces of work; IN_PARTS, one for each of num_tiles
// num_kv_heads num_splits pieces. Block: NUM_THREADS.
// Shared memory: 1024 + HALVES ROW_BYTES (2 GROUP_ROWS + STAGES 2 KEYS) + 2 GROUP_ROWS OUT_ROW_BYTES
// bytes, dynamic.
//
//   query:       tensor map of [num_tokens, num_heads, HEAD_DIM] bf16, rotated, with boxes of
//                64 columns, a group's heads and GROUP_ROWS / group tokens
//   cache:       tensor map of one layer, [num_blocks k | v num_kv_heads BLOCK_SIZE / 8, HALVES,
//                8 rows, 64 columns] bf16, with boxes of a block and head
//   out:         [num_tokens, num_heads, HEAD_DIM] bf16
//   block_table: [num_sequences, max_blocks] i32
//   tiles:       [num_tiles] Tile, at most 2 (GROUP_ROWS / group) tokens each
//   turns:       [2] u32, zeros; left as zeros: pieces of work given out beyond the first of each
//                thread block, and thread blocks that found no more
//   partial:     [blocks, HEAD_DIM / 8, 2 GROUP_THREADS, 4] f32, scratch
//   partial_ml:  [blocks, 2 GROUP_THREADS, 2 rows, 2] f32, scratch
//   arrived:     [num_tiles, num_kv_heads] u64, zeros; left as zeros
//   num_splits:  1 to 32; with more than 1 there are no more pieces than multiprocessors
//   window:      1 to 2^30; a window over every length is none
//   scale:       log2(e) / sqrt(HEAD_DIM)
//
// Source: Shah et al., FlashAttention-3, 2024; Dao et al., Flash-Decoding, 2023; Kwon et al.,
// PagedAttention, 2023.
#include "prefill_parts.cuh"

struct Tile {
    int sequence;
    int first_token;     // its row of query and out
    int num_tokens;
    int first_position;  // that token's position in its sequence
};
// Of the keys that any of a tile's tokens sees, one part. Blocks before them may be another
// sequence's by now.
struct Keys {
    int first_block, num_blocks, num_steps, end;
    int part, num_parts;  // num_steps is 0 from num_parts on
    bool ends_in_half;    // the last step is half as wide; not of parts, which wait for the longest
};
// What the copying warps tell a warpgroup.
struct Work {
    Tile tile;  // no tokens: there is no more work
    Keys keys;
    int kv_head;
};
// A merge takes about as long as so many steps.
constexpr int STEPS_OF_MERGE = 3;
constexpr int MIN_STEPS_PER_PART = 2;

__device__ __forceinline__ Keys keys_of(const Tile& tile, int window, int part, int num_splits) {
    Keys keys;
    keys.end = tile.first_position + tile.num_tokens;
    keys.first_block = max(0, tile.first_position + 1 - window) / BLOCK_SIZE;
    keys.num_blocks = (keys.end + BLOCK_SIZE - 1) / BLOCK_SIZE - keys.first_block;
    keys.num_steps = (keys.num_blocks + BLOCKS_PER_STEP - 1) / BLOCKS_PER_STEP;
    keys.part = part;
    keys.num_parts = 1;
    const int even = (keys.num_steps + num_splits - 1) / num_splits;
    const int num_steps = max(even, MIN_STEPS_PER_PART);
    if (IN_PARTS && keys.num_steps >= num_steps + STEPS_OF_MERGE) {
        keys.num_parts = (keys.num_steps + num_steps - 1) / num_steps;
        keys.num_steps = min(num_steps, keys.num_steps - part * num_steps);
        keys.first_block += part * num_steps * BLOCKS_PER_STEP;
        keys.num_blocks -= part * num_steps * BLOCKS_PER_STEP;
        keys.num_blocks = min(keys.num_blocks, num_steps * BLOCKS_PER_STEP);
        keys.end = min(keys.end, (keys.first_block + keys.num_blocks) * BLOCK_SIZE);
    }
    if (part >= keys.num_parts) keys.num_steps = 0;
    const int num_last = keys.num_blocks - (keys.num_steps - 1) * BLOCKS_PER_STEP;
    keys.ends_in_half = !IN_PARTS && keys.num_steps > 1 && num_last <= BLOCKS_PER_STEP / 2;
    return keys;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// A copying warp.
__device__ __forceinline__ void copy(const TensorMap& query, const TensorMap& cache,
                                     const int* block_table, const Tile* tiles, u32* turns,
                                     int num_tiles, int num_splits, int num_kv_heads, int group,
                                     int max_blocks, int window, u32 queries, Work* work,
                                     int* next_piece, const Barriers& barriers) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int box_block = warp * BOXES + lane % BOXES;
    const u32 box_offset = box_block * BOX_BYTES;
    const u32 keys = queries + TILE_BYTES, values = keys + STAGES * TILE_BYTES;
    const int num_tokens = GROUP_ROWS / group;  // of a warpgroup
    const u32 query_bytes = HALVES * ROW_BYTES * group * num_tokens;
    const u64 keep = keep_policy();
    Turn turn;
    u32 tail_phase = 0, query_phase = 1;
    int slot = 0;
    for (int piece = blockIdx.x; piece < num_tiles * num_kv_heads * num_splits;) {
        const int pair = IN_PARTS ? piece / num_splits : piece;
        const Tile tile = tiles[pair / num_kv_heads];
        const int kv_head = pair % num_kv_heads;
        const Keys span = keys_of(tile, window, piece - pair * num_splits, num_splits);
        if (tile.num_tokens > 0 && span.num_steps > 0) {
            const int* table = block_table + (i64)tile.sequence * max_blocks + span.first_block;
            // Past the last block that one again: its rows count for nothing.
            int block = table[min(box_block, span.num_blocks - 1)];
            for (int step = 0; step < span.num_steps; step++) {
                const int eights = (block * 2 * num_kv_heads + kv_head) * (BLOCK_SIZE / 8);
                const int next = (step + 1) * BLOCKS_PER_STEP + box_block;
                if (step + 1 < span.num_steps) block = table[min(next, span.num_blocks - 1)];
                const bool is_last = step + 1 == span.num_steps;
                // Half a step is its first blocks.
                const bool copies = !(is_last && span.ends_in_half) || warp < COPYING_WARPS / 2;
                const u32 num_bytes = copies ? TILE_BYTES / COPYING_WARPS : 0;
                const u32 keys_full = barriers.keys_full + turn.stage * 8;
                wait(barriers.keys_free + turn.stage * 8, turn.phase ^ 1);
                if (lane == 0) expect_bytes(keys_full, num_bytes);
                __syncwarp();
                if (lane < BOXES && copies) {
                    copy_box(keys + turn.stage * TILE_BYTES + box_offset, cache, 0, 0, 0, eights,
                             keys_full, keep);
                }
                if (step == 0 && warp < 2) {
                    const u32 full = barriers.query_full + warp * 8;
                    wait(barriers.query_free + warp * 8, query_phase);
                    if (lane == 0) {
                        work[warp] = {tile, span, kv_head};
                        expect_bytes(full, query_bytes);
                        for (int h = 0; h < HALVES; h++) {
                            copy_box(queries + h * HALF_BYTES + warp * GROUP_ROWS * ROW_BYTES,
                                     query, h * 64, kv_head * group,
                                     tile.first_token + warp * num_tokens, full, keep);
                        }
                    }
                    __syncwarp();
                }
                // Behind the end anything may lie, and a weight of 0 times no number is none: there
                // the values become zeros before the others see them.
                const bool is_tail = is_last && span.end % BLOCK_SIZE != 0;
                const u32 stage = values + turn.stage * TILE_BYTES;
                const u32 values_full = barriers.values_full + turn.stage * 8;
                const u32 full = is_tail ? barriers.tail : values_full;
                wait(barriers.values_free + turn.stage * 8, turn.phase ^ 1);
                if (lane == 0) expect_bytes(full, num_bytes);
                __syncwarp();
                if (lane < BOXES && copies) {
                    copy_box(stage + box_offset, cache, 0, 0, 0,
                             eights + num_kv_heads * (BLOCK_SIZE / 8), full, keep);
                }
                if (is_tail && warp > 0 && lane == 0) arrive(values_full);
                if (is_tail && warp == 0) {
                    wait(barriers.tail, tail_phase);
                    tail_phase ^= 1;
                    const int first = span.end - (span.first_block * BLOCK_SIZE + step * KEYS);
                    // 16 bytes at a time, eight of them a row.
                    for (int unit = first * 8 + lane; unit < KEYS * 8; unit += WARP) {
                        for (int h = 0; h < HALVES; h++) {
                            const int eight = unit / 64 * HALVES + h;
                            asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(
                                             stage + eight * EIGHT_BYTES + unit % 64 * 16),
                                         "r"(0)
                                         : "memory");
                        }
                    }
                    publish_shared();
                    __syncwarp();
                    if (lane == 0) arrive(values_full);
                }
                turn.next(STAGES);
            }
            query_phase ^= 1;
        }
        if (threadIdx.x == 0) next_piece[slot] = gridDim.x + atomicAdd(&turns[0], 1u);
        sync_warps(4, COPYING_WARPS);
        piece = next_piece[slot];
        slot ^= 1;
    }
    if (lane != 0) return;
    if (warp < 2) {
        wait(barriers.query_free + warp * 8, query_phase);
        work[warp].tile.num_tokens = 0;
        arrive(barriers.query_full + warp * 8);
    }
    if (warp > 0) return;
    // The last block to come here: nobody asks for work any more.
    if (atomicAdd(&turns[1], 1u) == gridDim.x - 1) turns[0] = turns[1] = 0;
}

// What a multiplying thread holds of a tile. Loops over these registers are unrolled.
struct Attention {
    const Barriers& barriers;
    u32 keys;  // the shared address of the first stage's; values lie behind the last one's
    Turn turn;
    Rows rows;
    Running running;
    u32 query[HEAD_DIM / 16][4], weights[KEYS / 16][4];
    float output[HEAD_DIM / 2];
    float inverse_sums[2];  // once a tile is finished

    __device__ __forceinline__ void begin(u32 queries, int first_row) {
        const int lane = threadIdx.x % WARP, row = first_row + lane % 16;
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; k++) {
            const u32 at = queries + k / 4 * HALF_BYTES + row * ROW_BYTES;
            load_matrices(query[k], at + ((k % 4 * 2 + lane / 16) ^ row % 8) * 16);
        }
        running = {{NEGATIVE_INFINITY, NEGATIVE_INFINITY}, {}, {}, {}};
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; i++) output[i] = 0.0f;
    }
    template <int N> __device__ __forceinline__ void multiply_scores(float (&scores)[N]) {
        const u32 low = low_half(keys + turn.stage * TILE_BYTES, 16);
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; k++) {
            const int at = k / 4 * EIGHT_BYTES + k % 4 * 32;
            multiply<0>(scores, query[k], descriptor_at(low, at), k > 0);
        }
        commit_products();
    }
    template <int NUM_KEYS> __device__ __forceinline__ void multiply_weights(int stage) {
        const u32 low = low_half(keys + (STAGES + stage) * TILE_BYTES, EIGHT_BYTES);
#pragma unroll
        for (int k = 0; k < NUM_KEYS / 16; k++) {
            multiply<1>(output, weights[k], descriptor_at(low, k * 2 * EIGHTS_BYTES), 1);
        }
        commit_products();
    }
    // A step of NUM_KEYS keys. Their product goes with that of the last step's weights and values;
    // the largest scores are looked for while the latter is on its way.
    template <int NUM_KEYS>
    __device__ __forceinline__ void advance(bool is_first, int first_key, int window, float scale) {
        const bool is_lane_0 = threadIdx.x % WARP == 0;
        float scores[NUM_KEYS / 2];
        const Turn before = turn;
        if (!is_first) turn.next(STAGES);
        wait(barriers.keys_full + turn.stage * 8, turn.phase);
        pin(scores);
        pin(output);
        begin_products();
        multiply_scores(scores);
        if (is_first) {
            wait_products<0>();
        } else {
            multiply_weights<KEYS>(before.stage);
            wait_products<1>();
        }
        pin(scores);
        if (is_lane_0) arrive(barriers.keys_free + turn.stage * 8);
        hide(scores, rows, first_key, window);
        find_largest(running, scores, scale);
        wait(barriers.values_full + turn.stage * 8, turn.phase);
        if (!is_first) {
            wait_products<0>();
            pin(output);
            if (is_lane_0) arrive(barriers.values_free + before.stage * 8);
        }
        soften(running, scores, scale);
        const bool shrinks = running.shrink[0] != 1.0f || running.shrink[1] != 1.0f;
        if (!is_first && __any_sync(ALL_LANES, shrinks)) {
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 2; i++) output[i] *= running.shrink[i / 2 % 2];
        }
#pragma unroll
        for (int k = 0; k < NUM_KEYS / 16; k++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* pair = &scores[8 * k + 2 * i];
                weights[k][i] = pack_bf16(pair[0], pair[1]);
            }
        }
    }
    // The last step's values, of NUM_KEYS keys.
    template <int NUM_KEYS> __device__ __forceinline__ void finish() {
        pin(output);
        begin_products();
        multiply_weights<NUM_KEYS>(turn.stage);
#pragma unroll
        for (int h = 0; h < 2; h++) inverse_sums[h] = 1.0f / quad_sum(running.sum[h]);
        wait_products<0>();
        pin(output);
        if (threadIdx.x % WARP == 0) arrive(barriers.values_free + turn.stage * 8);
        turn.next(STAGES);
    }
};

// A multiplying warpgroup.
__device__ __forceinline__ void attend(bf16* out, const Scratch& scratch, int num_splits,
                                       int num_heads, int group, int window, float scale,
                                       u32 queries, const Work* all_work,
                                       const Barriers& barriers) {
    const int warpgroup = threadIdx.x / GROUP_THREADS - 1, lane = threadIdx.x % WARP;
    const int first_row = threadIdx.x / WARP % 4 * 16;
    const int group_tokens = GROUP_ROWS / group, first_of_group = warpgroup * group_tokens;
    const Work* work = &all_work[warpgroup];
    const u32 query_full = barriers.query_full + warpgroup * 8;
    const u32 query_free = barriers.query_free + warpgroup * 8;
    const u32 my_queries = queries + warpgroup * GROUP_ROWS * ROW_BYTES;
    // Of the warp's sixteen rows the lane's, whose token no tile has if it is one too many.
    const int my_row = first_row + lane % 16;
    const bool is_row = my_row < group_tokens * group;
    const int my_token = is_row ? first_of_group + my_row / group : 2 * GROUP_ROWS;
    const int my_head = my_row % group;
    const u32 out_rows = queries + (1 + 2 * STAGES) * TILE_BYTES +
                         (warpgroup * GROUP_ROWS + first_row) * OUT_ROW_BYTES;
    Attention it = {barriers, queries + TILE_BYTES};
    const auto& output = it.output;
    const auto& running = it.running;
    u32 query_phase = 0;
    for (;;) {
        wait(query_full, query_phase);
        query_phase ^= 1;
        const Tile tile = work->tile;
        const Keys span = work->keys;
        const int kv_head = work->kv_head;
        if (tile.num_tokens == 0) break;
        const int position = tile.first_position + min(my_token, tile.num_tokens - 1);
        it.rows = {{__shfl_sync(ALL_LANES, position, lane / 4),
                    __shfl_sync(ALL_LANES, position, lane / 4 + 8)},
                   tile.first_position,
                   tile.first_position + tile.num_tokens - 1};
        it.begin(my_queries, first_row);
        arrive(query_free);  // each thread has read its work too

        const bool ends_in_half = !IN_PARTS && span.ends_in_half;
        int first_key = span.first_block * BLOCK_SIZE;
        const int end = first_key + (span.num_steps - ends_in_half) * KEYS;
        it.advance<KEYS>(true, first_key, window, scale);
        while ((first_key += KEYS) < end) it.advance<KEYS>(false, first_key, window, scale);
        if (ends_in_half) {
            it.advance<KEYS / 2>(false, first_key, window, scale);
            it.finish<KEYS / 2>();
        } else {
            it.finish<KEYS>();
        }

        // The lane's row of the output's heads, -1 for none.
        const int head = (tile.first_token + my_token) * num_heads + kv_head * group + my_head;
        const int row_of_out = my_token < tile.num_tokens ? head : -1;
        if (IN_PARTS && span.num_parts > 1) {
            u32 shares = leave_part(scratch, running, output, span.part, num_splits, span.num_parts);
            bf16* targets[2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int row = __shfl_sync(ALL_LANES, row_of_out, lane / 4 + h * 8);
                targets[h] = row < 0 ? nullptr : out + (i64)row * HEAD_DIM + lane % 4 * 2;
            }
            for (; shares != 0; shares &= shares - 1) {
                merge_share(scratch, targets, blockIdx.x - span.part, __ffs(shares) - 1,
                            span.num_parts, scale);
            }
            forget_parts(scratch, num_splits, span.num_parts);
            continue;
        }
        // By way of shared memory, so that a warp writes whole rows.
        __syncwarp();
#pragma unroll
        for (int j = 0; j < HEAD_DIM / 8; j += 2) {
            u32 pairs[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *pair = &output[4 * j + 2 * i], scale_out = it.inverse_sums[i % 2];
                pairs[i] = pack_bf16(pair[0] * scale_out, pair[1] * scale_out);
            }
            store_matrices(out_rows + lane % 16 * OUT_ROW_BYTES + (j + lane / 16) * 16, pairs);
        }
        __syncwarp();
        constexpr int LANES_OF_ROW = HEAD_DIM / 8;
#pragma unroll
        for (int i = 0; i < 16; i += WARP / LANES_OF_ROW) {
            const int row = i + lane / LANES_OF_ROW, eight = lane % LANES_OF_ROW;
            const int target = __shfl_sync(ALL_LANES, row_of_out, row);
            const uint4 x = load_eight(out_rows + row * OUT_ROW_BYTES + eight * 16);
            if (target >= 0) *(uint4*)(out + (i64)target * HEAD_DIM + eight * 8) = x;
        }
    }
}
#endif

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
prefill_attention_wgmma(const __grid_constant__ TensorMap query,
                        const __grid_constant__ TensorMap cache, bf16* out, const int* block_table,
                        const Tile* tiles, u32* turns, float* partial, float* partial_ml,
                        u64* arrived, int num_tiles, int num_splits, int num_heads,
                        int num_kv_heads, int max_blocks, int window, float scale) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ unsigned char unaligned[];
    __shared__ __align__(8) u64 barrier_memory[NUM_BARRIERS];
    __shared__ Work work[2];
    __shared__ int next_piece[2];
    const u32 queries = (shared_address(unaligned) + 1023) & ~1023u;
    const Barriers barriers = {shared_address(barrier_memory)};
    const int group = num_heads / num_kv_heads;
    let_next_begin();
    if (threadIdx.x == 0) {
        init_ring(barriers.query_full, barriers.query_free, 2, 1, GROUP_THREADS);
        init_barrier(barriers.tail, COPYING_WARPS);
        for (int s = 0; s < STAGES; s++) {
            init_barrier(barriers.keys_full + s * 8, COPYING_WARPS);
            init_barrier(barriers.keys_free + s * 8, MULTIPLYING_WARPS);
            init_barrier(barriers.values_full + s * 8, COPYING_WARPS);
            init_barrier(barriers.values_free + s * 8, MULTIPLYING_WARPS);
        }
        publish_barriers();
    }
    __syncthreads();
    wait_for_previous();
    if (threadIdx.x < GROUP_THREADS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COPYING_REGISTERS));
        publish_stores();  // those of the kernel in front
        copy(query, cache, block_table, tiles, turns, num_tiles, num_splits, num_kv_heads, group,
             max_blocks, window, queries, work, next_piece, barriers);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MULTIPLYING_REGISTERS));
        const Scratch scratch = {(float4*)partial, (float4*)partial_ml, arrived};
        attend(out, scratch, num_splits, num_heads, group, window, scale, queries, work, barriers);
    }
#endif
}
