// Paged attention of many new tokens a sequence on the tensor cores of a Hopper GPU: what
// prefill_attention.cu computes, with the same cache, tables and tiles.
//
// A thread block takes one piece of work after the other: a tile of consecutive tokens and one K/V
// head, whose ROWS rows are the tile's tokens times the group's query heads (row = token * group +
// head). One warp copies: queries once a piece, then keys and values KEYS at a time through
// STAGES stages of shared memory (TMA, 128-byte swizzle, one box for 16 rows of 64 columns of a
// cache block). Two warpgroups of 64 rows multiply, keep their running softmax in registers, and
// take turns: one softens its scores while the other has the tensor cores. Within a warpgroup the
// next step's scores are on their way while this step's weights meet the values.
//
// Grid: as many blocks as the device has room for, or pieces of work. Block: NUM_THREADS.
// Shared memory: 1024 + HALVES ROW_BYTES (ROWS + STAGES 2 KEYS) bytes, dynamic.
//
//   query:       tensor map of [num_tokens, num_heads, HEAD_DIM] bf16, rotated, with boxes of
//                64 columns, a group's heads and ROWS / group tokens
//   cache:       tensor map of one layer, [num_blocks k | v num_kv_heads BLOCK_SIZE, HEAD_DIM]
//                bf16, with boxes of 64 columns and BLOCK_SIZE rows
//   out:         [num_tokens, num_heads, HEAD_DIM] bf16
//   block_table: [num_sequences, max_blocks] i32
//   tiles:       [num_tiles] Tile, at most ROWS / group tokens each
//   turns:       [2] u32, zeros; left as zeros: pieces of work given out beyond the first of each
//                thread block, and thread blocks that found no more
//   window:      1 to 2^30; a window over every length is none
//   scale:       log2(e) / sqrt(HEAD_DIM)
//
// Source: Shah et al., FlashAttention-3, 2024; Kwon et al., PagedAttention, 2023.
#include "hopper.cuh"

#ifndef HEAD_DIM
#error "HEAD_DIM is 64 or 128"
#endif
constexpr int ROWS = 128, KEYS = 128;
constexpr int STAGES = HEAD_DIM == 64 ? 4 : 2;
constexpr int GROUP_ROWS = 64, GROUP_THREADS = 128, NUM_THREADS = 3 * GROUP_THREADS;
constexpr int HALVES = HEAD_DIM / 64;  // of a row: the swizzle is 64 columns wide
constexpr int ROW_BYTES = 128;         // of a half
constexpr int HALF_BYTES = KEYS * ROW_BYTES;
constexpr int TILE_BYTES = HALVES * HALF_BYTES;  // of a step's keys, of its values, of the queries
constexpr int BLOCKS_PER_STEP = KEYS / BLOCK_SIZE;
constexpr int BOXES = BLOCKS_PER_STEP * HALVES;  // of a step's keys: one a lane
// Of a thread, by setmaxnreg: 128 x 32 + 256 x 232 of what a launch of 384 x 168 holds.
#define COPYING_REGISTERS "32"
#define MULTIPLYING_REGISTERS "232"

struct Tile {
    int sequence;
    int first_token;     // its row of query and out
    int num_tokens;
    int first_position;  // that token's position in its sequence
};
// What the copying warp tells the others.
struct Work {
    Tile tile;    // no tokens: there is no more work
    int kv_head;
};
// The keys that any of a tile's tokens sees. Blocks before them may be another sequence's by now.
struct Keys {
    int first_block, num_blocks, num_steps, end;
    __device__ Keys(const Tile& tile, int window) {
        end = tile.first_position + tile.num_tokens;
        first_block = max(0, tile.first_position + 1 - window) / BLOCK_SIZE;
        num_blocks = (end + BLOCK_SIZE - 1) / BLOCK_SIZE - first_block;
        num_steps = (num_blocks + BLOCKS_PER_STEP - 1) / BLOCKS_PER_STEP;
    }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SIXTEEN(i) FOUR(i), FOUR(i + 4), FOUR(i + 8), FOUR(i + 12)
// d = a b^T over 16 columns, or d += where `adds`: queries and keys.
__device__ __forceinline__ void multiply_keys(float (&d)[64], u64 a, u64 b, int adds) {
    asm volatile(
        "{\n.reg .pred adds;\nsetp.ne.b32 adds, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
        "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "
        "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "
        "%56, %57, %58, %59, %60, %61, %62, %63},"
        " %64, %65, adds, 1, 1, 0, 0;\n}"
        : SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48)
        : "l"(a), "l"(b), "r"(adds));
}
// d += a b over 16 rows of values, whose columns are contiguous.
__device__ __forceinline__ void multiply_values(float (&d)[HEAD_DIM / 2], const u32 (&a)[4],
                                                u64 b) {
#if HEAD_DIM == 128
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
        "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "
        "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "
        "%56, %57, %58, %59, %60, %61, %62, %63},"
        " {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
        : SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#else
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
        "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31},"
        " {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
        : SIXTEEN(0), SIXTEEN(16)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#endif
}
// A tile whose rows are contiguous along the product's own side, halves HALF_BYTES apart.
__device__ __forceinline__ u64 values_descriptor(u32 address) {
    return (descriptor(address) & ~((u64)0x3fff << 16)) | (u64)(HALF_BYTES >> 4) << 16;
}
// The warpgroups' turns on the tensor cores, by two of the hardware's barriers.
__device__ __forceinline__ void await_turn(int group) {
    asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory");
}
__device__ __forceinline__ void give_turn(int group) {
    asm volatile("bar.arrive %0, 256;" ::"r"(2 - group) : "memory");
}
// Queries and Work have been read, and may be overwritten: from both warpgroups to the copying warp.
__device__ __forceinline__ void await_queries_read() {
    asm volatile("bar.sync 3, 288;" ::: "memory");
}
__device__ __forceinline__ void queries_read() {
    asm volatile("bar.arrive 3, 288;" ::: "memory");
}

// Shared addresses of the barriers, 8 bytes each.
struct Barriers {
    u32 query_full, tail, keys_full, keys_free, values_full, values_free;
    __device__ explicit Barriers(u32 base) {
        query_full = base;
        tail = base + 8;
        keys_full = base + 16;
        keys_free = keys_full + STAGES * 8;
        values_full = keys_free + STAGES * 8;
        values_free = values_full + STAGES * 8;
    }
};
constexpr int NUM_BARRIERS = 2 + 4 * STAGES;

// The copying warp.
__device__ __forceinline__ void copy(const TensorMap& query, const TensorMap& cache,
                                     const int* block_table, const Tile* tiles, u32* turns,
                                     int num_tiles, int num_kv_heads, int group, int max_blocks,
                                     int window, u32 queries, Work* work,
                                     const Barriers& barriers) {
    const int lane = threadIdx.x;
    const int half = lane % HALVES, box_block = lane / HALVES % BLOCKS_PER_STEP;
    const u32 box_offset = half * HALF_BYTES + box_block * BLOCK_SIZE * ROW_BYTES;
    const u32 keys = queries + TILE_BYTES, values = keys + STAGES * TILE_BYTES;
    const u32 query_bytes = HALVES * ROW_BYTES * group * (ROWS / group);
    const u64 keep = keep_policy();
    Turn turn;
    u32 tail_phase = 0;
    bool is_first = true;
    for (int piece = blockIdx.x; piece < num_tiles * num_kv_heads;) {
        const Tile tile = tiles[piece / num_kv_heads];
        const int kv_head = piece % num_kv_heads;
        const Keys span(tile, window);
        if (tile.num_tokens > 0) {
            const int* table = block_table + (i64)tile.sequence * max_blocks + span.first_block;
            // Past the last block that one again: its rows count for nothing.
            int block = table[min(box_block, span.num_blocks - 1)];
            if (!is_first) await_queries_read();
            is_first = false;
            if (lane == 0) {
                *work = {tile, kv_head};
                expect_bytes(barriers.query_full, query_bytes);
                for (int h = 0; h < HALVES; h++) {
                    copy_box(queries + h * HALF_BYTES, query, h * 64, kv_head * group,
                             tile.first_token, barriers.query_full, keep);
                }
            }
            for (int step = 0; step < span.num_steps; step++) {
                const int row = (block * 2 * num_kv_heads + kv_head) * BLOCK_SIZE;
                const int next = (step + 1) * BLOCKS_PER_STEP + box_block;
                if (step + 1 < span.num_steps) block = table[min(next, span.num_blocks - 1)];
                const u32 keys_full = barriers.keys_full + turn.stage * 8;
                wait(barriers.keys_free + turn.stage * 8, turn.phase ^ 1);
                if (lane == 0) expect_bytes(keys_full, TILE_BYTES);
                __syncwarp();
                if (lane < BOXES) {
                    copy_box(keys + turn.stage * TILE_BYTES + box_offset, cache, half * 64, row,
                             keys_full, keep);
                }
                // Behind the end anything may lie, and a weight of 0 times no number is none: there
                // the values become zeros before the others see them.
                const bool is_tail = step + 1 == span.num_steps && span.end % BLOCK_SIZE != 0;
                const u32 stage = values + turn.stage * TILE_BYTES;
                const u32 values_full = barriers.values_full + turn.stage * 8;
                const u32 full = is_tail ? barriers.tail : values_full;
                wait(barriers.values_free + turn.stage * 8, turn.phase ^ 1);
                if (lane == 0) expect_bytes(full, TILE_BYTES);
                __syncwarp();
                if (lane < BOXES) {
                    copy_box(stage + box_offset, cache, half * 64,
                             row + num_kv_heads * BLOCK_SIZE, full, keep);
                }
                if (is_tail) {
                    wait(barriers.tail, tail_phase);
                    tail_phase ^= 1;
                    const int first = span.end - (span.first_block * BLOCK_SIZE + step * KEYS);
                    for (int h = 0; h < HALVES; h++) {
                        const u32 end = stage + h * HALF_BYTES + HALF_BYTES;
                        for (u32 at = end - (KEYS - first) * ROW_BYTES + lane * 16; at < end;
                             at += WARP * 16) {
                            asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(at),
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
        }
        if (lane == 0) piece = gridDim.x + atomicAdd(&turns[0], 1u);
        piece = __shfl_sync(ALL_LANES, piece, 0);
    }
    if (!is_first) await_queries_read();
    if (lane != 0) return;
    work->tile.num_tokens = 0;
    arrive(barriers.query_full);
    // The last block to come here: nobody asks for work any more.
    if (atomicAdd(&turns[1], 1u) == gridDim.x - 1) turns[0] = turns[1] = 0;
}

// The running softmax of a thread's two rows, lane / 4 and + 8 of its warp's sixteen.
struct Running {
    float largest[2], sum[2], shrink[2];
};

// Turns scores into weights 2^(scale (score - largest)).
__device__ __forceinline__ void soften(Running& running, float (&scores)[64], float scale) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float largest = running.largest[h];
#pragma unroll
        for (int j = 0; j < 16; j++) {
            largest = fmaxf(largest, fmaxf(scores[4 * j + 2 * h], scores[4 * j + 2 * h + 1]));
        }
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
        // No key of this row is visible yet: any finite reference gives weights of zero.
        const float reference = largest == NEGATIVE_INFINITY ? 0.0f : largest * scale;
        running.shrink[h] = exp2_fast(fmaf(running.largest[h], scale, -reference));
        running.largest[h] = largest;
        float even = 0.0f, odd = 0.0f;
#pragma unroll
        for (int j = 0; j < 16; j++) {
            float* pair = &scores[4 * j + 2 * h];
            pair[0] = exp2_fast(fmaf(pair[0], scale, -reference));
            pair[1] = exp2_fast(fmaf(pair[1], scale, -reference));
            even += pair[0];
            odd += pair[1];
        }
        running.sum[h] = fmaf(running.sum[h], running.shrink[h], even + odd);
    }
}

// A multiplying warpgroup.
__device__ __forceinline__ void attend(bf16* out, int num_heads, int group, int window, float scale,
                                       u32 queries, const Work* work, const Barriers& barriers) {
    const int warpgroup = threadIdx.x / GROUP_THREADS - 1, lane = threadIdx.x % WARP;
    const int first_row = warpgroup * GROUP_ROWS + threadIdx.x / WARP % 4 * 16;
    const u32 my_queries = queries + warpgroup * GROUP_ROWS * ROW_BYTES;
    const u32 keys = queries + TILE_BYTES, values = keys + STAGES * TILE_BYTES;
    Turn turn;
    u32 query_phase = 0;
    if (warpgroup == 1) give_turn(warpgroup);
    for (;;) {
        wait(barriers.query_full, query_phase);
        query_phase ^= 1;
        const Tile tile = work->tile;
        const int kv_head = work->kv_head;
        if (tile.num_tokens == 0) break;
        const Keys span(tile, window);
        const auto position_of = [&](int row) {
            return tile.first_position + min(row / group, tile.num_tokens - 1);
        };
        const int warp_first = position_of(first_row), warp_last = position_of(first_row + 15);
        const int my_row = first_row + lane / 4;
        const int positions[2] = {position_of(my_row), position_of(my_row + 8)};

        float scores[64], output[HEAD_DIM / 2];
        u32 weights[KEYS / 16][4];
        Running running = {{NEGATIVE_INFINITY, NEGATIVE_INFINITY}, {}, {}};
        const auto multiply_scores = [&](int stage) {
#pragma unroll
            for (int k = 0; k < HEAD_DIM / 16; k++) {
                const u32 offset = k / 4 * HALF_BYTES + k % 4 * 32;
                multiply_keys(scores, descriptor(my_queries + offset),
                              descriptor(keys + stage * TILE_BYTES + offset), k > 0);
            }
            commit_products();
        };
        const auto multiply_weights = [&](int stage) {
#pragma unroll
            for (int k = 0; k < KEYS / 16; k++) {
                const u32 at = values + stage * TILE_BYTES + k * 16 * ROW_BYTES;
                multiply_values(output, weights[k], values_descriptor(at));
            }
            commit_products();
        };
        const auto weigh = [&](int step) {
            const int first_key = span.first_block * BLOCK_SIZE + step * KEYS;
            if (first_key + KEYS - 1 > warp_first || first_key <= warp_last - window) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int last = positions[h] - first_key - lane % 4 * 2, none = last - window;
#pragma unroll
                    for (int j = 0; j < 16; j++) {
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            const bool visible = j * 8 + i <= last && j * 8 + i > none;
                            if (!visible) scores[4 * j + 2 * h + i] = NEGATIVE_INFINITY;
                        }
                    }
                }
            }
            soften(running, scores, scale);
        };
        const auto pack_weights = [&] {
#pragma unroll
            for (int k = 0; k < KEYS / 16; k++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float* pair = &scores[8 * k + 2 * i];
                    weights[k][i] = pack_bf16(pair[0], pair[1]);
                }
            }
        };
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; i++) output[i] = 0.0f;

        wait(barriers.keys_full + turn.stage * 8, turn.phase);
        await_turn(warpgroup);
        pin(scores);
        begin_products();
        multiply_scores(turn.stage);
        give_turn(warpgroup);
        wait_products<0>();
        pin(scores);
        if (lane == 0) arrive(barriers.keys_free + turn.stage * 8);
        if (span.num_steps == 1) queries_read();
        weigh(0);
        pack_weights();
        for (int step = 1; step < span.num_steps; step++) {
            const Turn before = turn;
            turn.next(STAGES);
            wait(barriers.keys_full + turn.stage * 8, turn.phase);
            await_turn(warpgroup);
            wait(barriers.values_full + before.stage * 8, before.phase);
            pin(scores);
            pin(output);
            begin_products();
            multiply_scores(turn.stage);
            multiply_weights(before.stage);
            give_turn(warpgroup);
            wait_products<1>();
            pin(scores);
            if (lane == 0) arrive(barriers.keys_free + turn.stage * 8);
            if (step == span.num_steps - 1) queries_read();
            weigh(step);
            wait_products<0>();
            pin(output);
            if (lane == 0) arrive(barriers.values_free + before.stage * 8);
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 2; i++) output[i] *= running.shrink[i / 2 % 2];
            pack_weights();
        }
        wait(barriers.values_full + turn.stage * 8, turn.phase);
        pin(output);
        begin_products();
        multiply_weights(turn.stage);
        wait_products<0>();
        pin(output);
        if (lane == 0) arrive(barriers.values_free + turn.stage * 8);
        turn.next(STAGES);

        // Neighbours swap, so that a lane has four columns in a row and four lanes write 32 bytes.
        const bool is_odd = lane % 2 == 1;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float sum = running.sum[h];
            sum += __shfl_xor_sync(ALL_LANES, sum, 1);
            sum += __shfl_xor_sync(ALL_LANES, sum, 2);
            const float scale_out = 1.0f / sum;
            const int row = my_row + h * 8, token = row / group;
            const i64 at = (i64)(tile.first_token + token) * num_heads + kv_head * group + row % group;
            bf16* target = out + at * HEAD_DIM + lane % 4 / 2 * 4 + (is_odd ? 8 : 0);
#pragma unroll
            for (int j = 0; j < HEAD_DIM / 8; j += 2) {
                const float* left = &output[4 * j + 2 * h];
                const float* right = left + 4;
                const u32 low = pack_bf16(left[0] * scale_out, left[1] * scale_out);
                const u32 high = pack_bf16(right[0] * scale_out, right[1] * scale_out);
                const u32 swapped = __shfl_xor_sync(ALL_LANES, is_odd ? low : high, 1);
                if (token < tile.num_tokens) {
                    *(uint2*)(target + j * 8) =
                        is_odd ? make_uint2(swapped, high) : make_uint2(low, swapped);
                }
            }
        }
    }
    if (warpgroup == 0) await_turn(warpgroup);
}
#endif

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
prefill_attention_wgmma(const __grid_constant__ TensorMap query,
                        const __grid_constant__ TensorMap cache, bf16* out, const int* block_table,
                        const Tile* tiles, u32* turns, int num_tiles, int num_heads,
                        int num_kv_heads, int max_blocks, int window, float scale) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ unsigned char unaligned[];
    __shared__ __align__(8) u64 barrier_memory[NUM_BARRIERS];
    __shared__ Work work;
    const u32 queries = (shared_address(unaligned) + 1023) & ~1023u;
    const Barriers barriers(shared_address(barrier_memory));
    const int group = num_heads / num_kv_heads;
    let_next_begin();
    if (threadIdx.x == 0) {
        constexpr int MULTIPLYING_WARPS = 2 * GROUP_THREADS / WARP;
        init_barrier(barriers.query_full, 1);
        init_barrier(barriers.tail, 1);
        for (int s = 0; s < STAGES; s++) {
            init_barrier(barriers.keys_full + s * 8, 1);
            init_barrier(barriers.keys_free + s * 8, MULTIPLYING_WARPS);
            init_barrier(barriers.values_full + s * 8, 1);
            init_barrier(barriers.values_free + s * 8, MULTIPLYING_WARPS);
        }
        publish_barriers();
    }
    __syncthreads();
    wait_for_previous();
    if (threadIdx.x < GROUP_THREADS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 " COPYING_REGISTERS ";");
        if (threadIdx.x >= WARP) return;
        publish_stores();  // those of the kernel in front
        copy(query, cache, block_table, tiles, turns, num_tiles, num_kv_heads, group, max_blocks,
             window, queries, &work, barriers);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 " MULTIPLYING_REGISTERS ";");
        attend(out, num_heads, group, window, scale, queries, &work, barriers);
    }
#endif
}
