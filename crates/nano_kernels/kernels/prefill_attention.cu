// Paged attention of many new tokens a sequence: causal, over the cached prefix and the new
// tokens themselves, whose keys and values are in the cache already.
//
//   out[token, head] = sum over positions p of
//                      softmax(query[token, head] . key[p] / sqrt(HEAD_DIM)) value[p]
//
// over the positions p in (position - window, position] of the token's own.
//
// A thread block takes a tile of consecutive tokens of one sequence and one K/V head. Its ROWS
// rows are the tile's tokens times the group's query heads (row = token * group + head), so keys
// and values are read once a group. Keys come KEYS at a time through STAGES stages of shared
// memory; each warp owns 16 ROW_TILES rows and keeps their running softmax in registers.
//
// Grid: (num_kv_heads, num_tiles), so that blocks begin in the order of the tiles, whatever their
// head. Block: 32 NUM_WARPS.
// Shared memory: (ROWS + STAGES 2 KEYS) HEAD_DIM 2 bytes, dynamic.
//
//   out:         [num_tokens, num_heads, HEAD_DIM] bf16
//   query:       [num_tokens, num_heads, HEAD_DIM] bf16, rotated
//   cache:       one layer, [num_blocks, k | v, num_kv_heads, BLOCK_SIZE, HEAD_DIM] bf16
//   block_table: [num_sequences, max_blocks] i32
//   tiles:       [num_tiles] Tile, at most ROWS / group tokens each
//   window:      1 to 2^30; a window over every length is none
//   scale:       log2(e) / sqrt(HEAD_DIM)
//
// Source: Dao, FlashAttention-2, 2023; Kwon et al., PagedAttention, 2023.
#include "mma.cuh"

#ifndef HEAD_DIM
#error "HEAD_DIM is 64 or 128"
#endif
constexpr int NUM_WARPS = 4;
constexpr int ROW_TILES = 2;
constexpr int ROWS = NUM_WARPS * ROW_TILES * 16;
// With 64 keys of 128 elements a thread's scores and output leave no registers for the rest.
constexpr int KEYS = HEAD_DIM == 64 ? 64 : 32;
constexpr int STAGES = 2;
constexpr int ID_STAGES = 4;
constexpr int NUM_THREADS = NUM_WARPS * WARP;
constexpr int KEY_TILE = KEYS * HEAD_DIM;   // elements of a step's keys, or of its values
constexpr int CHUNKS = HEAD_DIM / 8;        // 16-byte chunks of a row
constexpr int ROWS_AT_ONCE = NUM_THREADS / CHUNKS;
constexpr int BLOCKS_PER_STEP = KEYS / BLOCK_SIZE;

struct Tile {
    int sequence;
    int first_token;     // its row of query and out
    int num_tokens;
    int first_position;  // that token's position in its sequence
};

// The running softmax of a warp's rows. Lane: rows lane / 4 and + 8 of each 16, as in mma.cuh.
struct Running {
    float output[ROW_TILES][HEAD_DIM / 8][4];
    float largest[ROW_TILES][2];
    float sum[ROW_TILES][2];
};

// The shared address of a lane's row in a tile at chunk `odd`, 0 or 1; chunk 2 k + odd is at this
// address ^ 32 k, because rows are a power of two long and the swizzle is a bit-wise one.
__device__ __forceinline__ u32 lane_address(const bf16* tile, int row, int odd) {
    return shared_address(tile + swizzled<HEAD_DIM>(row, odd));
}

__device__ __forceinline__ void scores_of(float (&scores)[ROW_TILES][KEYS / 8][4],
                                          const bf16* query, const bf16* keys, int first_row,
                                          int lane) {
    constexpr int BYTES_OF_16_ROWS = 16 * HEAD_DIM * sizeof(bf16);
    const u32 query_address = lane_address(query, first_row + lane % 16, lane / 16);
    const u32 key_address = lane_address(keys, lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; k++) {
        u32 rows[ROW_TILES][4];
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++) {
            load_matrices(rows[m], (query_address ^ 32 * k) + m * BYTES_OF_16_ROWS);
        }
#pragma unroll
        for (int j = 0; j < KEYS / 16; j++) {
            u32 columns[4];
            load_matrices(columns, (key_address ^ 32 * k) + j * BYTES_OF_16_ROWS);
#pragma unroll
            for (int m = 0; m < ROW_TILES; m++) {
                multiply(scores[m][2 * j], rows[m], columns[0], columns[1]);
                multiply(scores[m][2 * j + 1], rows[m], columns[2], columns[3]);
            }
        }
    }
}

// Turns scores into weights 2^(scale (score - largest)) and brings what was summed before down
// to the new largest.
__device__ __forceinline__ void soften(Running& running, float (&scores)[ROW_TILES][KEYS / 8][4],
                                       float scale) {
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float largest = running.largest[m][half];
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++) {
                largest = fmaxf(largest, fmaxf(scores[m][j][2 * half], scores[m][j][2 * half + 1]));
            }
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
            // No key of this row is visible yet: any finite reference gives weights of zero.
            const float reference = largest == NEGATIVE_INFINITY ? 0.0f : __fmul_rn(largest, scale);
            // Rounded as the reference was: exactly 1 where the largest stays, so that steps in which
            // a row sees nothing, more or fewer by where its tile ends, leave its bits alone.
            const float shrink =
                exp2_fast(__fmul_rn(running.largest[m][half], scale) - reference);
            running.largest[m][half] = largest;
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) {
                    scores[m][j][i] = exp2_fast(scores[m][j][i] * scale - reference);
                    sum += scores[m][j][i];
                }
            }
            running.sum[m][half] = running.sum[m][half] * shrink + sum;
#pragma unroll
            for (int d = 0; d < HEAD_DIM / 8; d++) {
                running.output[m][d][2 * half] *= shrink;
                running.output[m][d][2 * half + 1] *= shrink;
            }
        }
    }
}

__device__ __forceinline__ void add_values(Running& running,
                                           const float (&weights)[ROW_TILES][KEYS / 8][4],
                                           const bf16* values, int lane) {
    constexpr int BYTES_OF_16_ROWS = 16 * HEAD_DIM * sizeof(bf16);
    const u32 value_address = lane_address(values, lane % 16, lane / 16);
#pragma unroll
    for (int j = 0; j < KEYS / 16; j++) {
        u32 rows[ROW_TILES][4];
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* pair = &weights[m][2 * j + i / 2][i % 2 * 2];
                rows[m][i] = pack_bf16(pair[0], pair[1]);
            }
        }
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 16; d++) {
            u32 columns[4];
            load_matrices_transposed(columns, (value_address ^ 32 * d) + j * BYTES_OF_16_ROWS);
#pragma unroll
            for (int m = 0; m < ROW_TILES; m++) {
                multiply(running.output[m][2 * d], rows[m], columns[0], columns[1]);
                multiply(running.output[m][2 * d + 1], rows[m], columns[2], columns[3]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
prefill_attention(bf16* out, const bf16* query, const bf16* cache, const int* block_table,
                  const Tile* tiles, int num_heads, int max_blocks, int window, float scale) {
    extern __shared__ __align__(1024) bf16 shared[];
    begin();
    const Tile tile = tiles[blockIdx.y];
    const int kv_head = blockIdx.x, num_kv_heads = gridDim.x, group = num_heads / num_kv_heads;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int num_rows = tile.num_tokens * group;
    // Where the row's head lies in query and out.
    const auto row_offset = [&](int row) {
        const i64 token = tile.first_token + row / group;
        return (token * num_heads + kv_head * group + row % group) * HEAD_DIM;
    };

    // The keys that any of the tile's tokens sees, in steps of KEYS.
    const int end = tile.first_position + tile.num_tokens;
    const int first_visible = max(0, tile.first_position + 1 - window);
    const int first_step = first_visible / KEYS, num_steps = (end + KEYS - 1) / KEYS;

    const int chunk = threadIdx.x % CHUNKS, thread_row = threadIdx.x / CHUNKS;
    for (int row = thread_row; row < ROWS; row += ROWS_AT_ONCE) {
        const bool valid = row < num_rows;
        const bf16* source = query + (valid ? row_offset(row) : 0) + chunk * 8;
        copy_async(shared + swizzled<HEAD_DIM>(row, chunk), source, valid);
    }
    const int* table = block_table + (i64)tile.sequence * max_blocks;
    const auto stage_of = [&](int step) {
        return shared + ROWS * HEAD_DIM + step % STAGES * 2 * KEY_TILE;
    };
    // Block ids come in the background too. Asked for in one step, they are committed in the next,
    // seen by every thread after the one that follows, and used in the third.
    __shared__ int block_ids[ID_STAGES][BLOCKS_PER_STEP];
    const auto load_ids = [&](int step) {
        if (threadIdx.x >= BLOCKS_PER_STEP) return;
        const int index = step * BLOCKS_PER_STEP + threadIdx.x;
        // What no token sees is not read: blocks before the window may be gone from the table.
        const bool needed = index * BLOCK_SIZE < end && (index + 1) * BLOCK_SIZE > first_visible;
        int* target = &block_ids[step % ID_STAGES][threadIdx.x];
        copy_async_word(target, table + (needed ? index : 0), needed);
    };
    const auto load = [&](int step) {
        bf16* stage = stage_of(step);
        const i64 values_offset = (i64)num_kv_heads * BLOCK_SIZE * HEAD_DIM;
#pragma unroll
        for (int i = 0; i < KEYS / ROWS_AT_ONCE; i++) {
            const int row = i * ROWS_AT_ONCE + thread_row;
            const int position = step * KEYS + row;
            // Zeros past the end, where anything may lie, and before the window, where a block
            // may be another sequence's by now.
            const bool valid = position < end && position >= first_visible;
            static_assert(BLOCK_SIZE % ROWS_AT_ONCE == 0, "a pass stays in one block");
            const i64 block = block_ids[step % ID_STAGES][i * ROWS_AT_ONCE / BLOCK_SIZE];
            const bf16* source =
                cache +
                ((block * 2 * num_kv_heads + kv_head) * BLOCK_SIZE + row % BLOCK_SIZE) * HEAD_DIM +
                chunk * 8;
            const int target = swizzled<HEAD_DIM>(row, chunk);
            copy_async(stage + target, source, valid);
            copy_async(stage + KEY_TILE + target, source + values_offset, valid);
        }
    };

    Running running = {};
    const int first_row = warp * ROW_TILES * 16;
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
        running.largest[m][0] = running.largest[m][1] = NEGATIVE_INFINITY;
    }
    const auto position_of = [&](int row) {
        return tile.first_position + min(row / group, tile.num_tokens - 1);
    };
    const int warp_first = position_of(first_row);
    const int warp_last = position_of(first_row + ROW_TILES * 16 - 1);

    for (int s = 0; s < ID_STAGES; s++) load_ids(first_step + s);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    load(first_step);
    commit_copies();
    for (int step = first_step; step < num_steps; step++) {
        if (step + 1 < num_steps) load(step + 1);
        commit_copies();
        wait_copies<STAGES - 1>();
        __syncthreads();
        load_ids(step + ID_STAGES);

        const bf16* keys = stage_of(step);
        float scores[ROW_TILES][KEYS / 8][4] = {};
        scores_of(scores, shared, keys, first_row, lane);
        const int first_key = step * KEYS;
        if (first_key + KEYS - 1 > warp_first || first_key <= warp_last - window) {
#pragma unroll
            for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int at = position_of(first_row + m * 16 + half * 8 + lane / 4);
#pragma unroll
                    for (int i = 0; i < KEYS / 4; i++) {
                        const int key = first_key + i / 2 * 8 + lane % 4 * 2 + i % 2;
                        const bool visible = key <= at && key > at - window;
                        if (!visible) scores[m][i / 2][2 * half + i % 2] = NEGATIVE_INFINITY;
                    }
                }
            }
        }
        soften(running, scores, scale);
        add_values(running, scores, keys + KEY_TILE, lane);
        __syncthreads();  // the next turn's copies overwrite this stage
    }

#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = running.sum[m][half];
            sum += __shfl_xor_sync(ALL_LANES, sum, 1);
            sum += __shfl_xor_sync(ALL_LANES, sum, 2);
            const int row = first_row + m * 16 + half * 8 + lane / 4;
            if (row >= num_rows) continue;
            u32* target = (u32*)(out + row_offset(row)) + lane % 4;
#pragma unroll
            for (int d = 0; d < HEAD_DIM / 8; d++) {
                const float* pair = &running.output[m][d][2 * half];
                target[d * 4] = pack_bf16(pair[0] / sum, pair[1] / sum);
            }
        }
    }
}
