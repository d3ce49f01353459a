// Paged attention of one new token a sequence, for groups of up to 8 query heads a K/V head, with
// RoPE and the write of the token's key and value done on the way.
//
//   out[head] = sum over positions p of softmax(query[head] . key[p] / sqrt(HEAD_DIM)) value[p]
//
// over the positions p in [max(0, length - window), length), of which the last is the token's own.
//
// A thread block takes one part of one sequence and one K/V head: an equal share of the cache
// blocks within the window. The list of parts is made anew for each step, as even as it gets, so
// that one launch shape, and a graph that holds it, serves any lengths. Each warp streams every
// NUM_WARPS-th cache block through its own ring in shared memory and keeps a running softmax; the
// warp with the newest block puts the token's row into it. The group's heads share each key and
// value on the tensor cores, with keys as the rows and heads as the 8 columns of a product:
//
//   scores  [16 keys x 8 heads]        = K [16 x HEAD_DIM]    query^T [HEAD_DIM x 8]
//   output  [HEAD_DIM x 8 heads]      += V^T [HEAD_DIM x 16]  weights [16 x 8]
//
// Warps are merged through shared memory, parts by the thread block that finishes last; both in
// a fixed order, so equal launches give equal bits.
//
// Grid: (num_kv_heads, num_parts). Block: 32 NUM_WARPS.
// Shared memory: NUM_WARPS STAGES 2 BLOCK_SIZE HEAD_DIM 2 bytes, dynamic.
//
//   out:         [num_sequences, num_heads, HEAD_DIM] bf16; zeros for a length of 0
//   partial:     [num_parts, num_kv_heads, group, HEAD_DIM] f32, scratch
//   partial_ml:  [num_parts, num_kv_heads, group, 2] f32, scratch
//   arrived:     [num_sequences, num_kv_heads] u32, zeros; left as zeros
//   qkv:         [num_sequences, num_heads + 2 num_kv_heads, HEAD_DIM] bf16, none of it rotated
//   cos_sin:     [max_position, 2, HEAD_DIM / 2] f32: cosines, then sines
//   cache:       one layer, [num_blocks, k | v, num_kv_heads, BLOCK_SIZE, HEAD_DIM] bf16; written
//                at each sequence's last position
//   block_table: [num_sequences, max_blocks] i32
//   parts:       [num_parts] Part, those of a sequence one after the other
//   window:      1 to 2^30; a window over every length is none
//   scale:       log2(e) / sqrt(HEAD_DIM)
//
// Source: Kwon et al., PagedAttention, 2023; Dao et al., Flash-Decoding, 2023; Ainslie et al.,
// GQA, 2023.
#include "mma.cuh"
#include "rope.cuh"

#ifndef HEAD_DIM
#error "HEAD_DIM is 64 or 128"
#endif
constexpr int NUM_WARPS = 4;
constexpr int STAGES = 3;
constexpr int MAX_GROUP = 8;
constexpr int TILE = BLOCK_SIZE * HEAD_DIM;  // elements of a block's keys, or of its values
constexpr int CHUNKS = HEAD_DIM / 8;         // 16-byte chunks of a row
constexpr int DIM_TILES = HEAD_DIM / 16;
constexpr int HALF_DIM = HEAD_DIM / 2;

// One of the parts that a sequence's keys are cut into.
struct __align__(16) Part {
    int sequence;
    int length;     // the new token included; 0 for a padding row of a fixed launch shape, of which
                    // nothing is written to the cache
    int index;
    int num_parts;  // 0 for one that only fills a fixed launch shape
};
// The interval of cache blocks that a thread block works through.
struct Share {
    int first_position;  // positions before it lie outside the window
    int length;
    int begin, end;      // cache blocks, as indices into the block table
    int num_parts;       // those that have work
};

__device__ __forceinline__ Share share_of(const Part& part, int window) {
    Share share;
    share.length = part.length;
    share.first_position = max(0, part.length - window);
    const int first_block = share.first_position / BLOCK_SIZE;
    const int num_blocks = (part.length + BLOCK_SIZE - 1) / BLOCK_SIZE - first_block;
    const int per_part = max(1, (num_blocks + part.num_parts - 1) / max(1, part.num_parts));
    share.num_parts = min(part.num_parts, max(1, (num_blocks + per_part - 1) / per_part));
    share.begin = first_block + part.index * per_part;
    share.end = min(share.begin + per_part, first_block + num_blocks);
    return share;
}

// Two heads' running softmax in a lane: those of columns 2 pair and 2 pair + 1.
struct Running {
    float output[DIM_TILES][4];
    float largest[2];
    float sum[2];  // over this lane's rows alone until the end
};

// Copies a block's keys and values into a stage of the ring. Rows past the length become zeros:
// what lies there may be anything, NaN too.
__device__ __forceinline__ void load_block(bf16* stage, const bf16* keys, i64 values_offset,
                                           int num_valid_rows, int lane) {
    constexpr int ROWS_AT_ONCE = WARP / CHUNKS;
    const int chunk = lane % CHUNKS;
#pragma unroll
    for (int i = 0; i < BLOCK_SIZE / ROWS_AT_ONCE; i++) {
        const int row = i * ROWS_AT_ONCE + lane / CHUNKS;
        const bool valid = row < num_valid_rows;
        const int target = swizzled<HEAD_DIM>(row, chunk);
        const bf16* source = keys + row * HEAD_DIM + chunk * 8;
        copy_async(stage + target, source, valid);
        copy_async(stage + TILE + target, source + values_offset, valid);
    }
}

// The token's own key and value, eight pairs of elements a lane.
struct Newest {
    Bf16x8 first, second;
};
constexpr int UNITS = HALF_DIM / 8;  // lanes of a key, then of a value

// Takes them from `key`, the row's first one, and leaves them at `target`, a row of the cache.
__device__ __forceinline__ Newest write_newest(const bf16* key, bf16* target, i64 values_offset,
                                               int num_kv_heads, const float* angles, int lane) {
    Newest newest = {};
    if (lane >= 2 * UNITS) return newest;
    const int is_value = lane / UNITS, element = lane % UNITS * 8;
    const bf16* source = key + is_value * num_kv_heads * HEAD_DIM + element;
    newest.first = *(const Bf16x8*)source;
    newest.second = *(const Bf16x8*)(source + HALF_DIM);
    if (!is_value) rotate(newest.first, newest.second, angles + element, HALF_DIM);
    target += is_value * values_offset + element;
    *(Bf16x8*)target = newest.first;
    *(Bf16x8*)(target + HALF_DIM) = newest.second;
    return newest;
}

// Puts them into a stage of the ring.
__device__ __forceinline__ void put_newest(bf16* stage, const Newest& newest, int row, int lane) {
    if (lane >= 2 * UNITS) return;
    bf16* tile = stage + lane / UNITS * TILE;
    *(Bf16x8*)(tile + swizzled<HEAD_DIM>(row, lane % UNITS)) = newest.first;
    *(Bf16x8*)(tile + swizzled<HEAD_DIM>(row, lane % UNITS + UNITS)) = newest.second;
}

// One cache block against the group's heads; `position` is that of its first row.
__device__ __forceinline__ void attend(Running& running, const bf16* stage,
                                       const u32 (&query)[DIM_TILES][2], const Share& share,
                                       int position, float scale, int lane) {
    const int matrix_row = lane % 8;
    // Even and odd steps apart: two chains of products that do not wait for each other.
    float scores[4] = {}, odd_scores[4] = {};
#pragma unroll
    for (int k = 0; k < DIM_TILES; k++) {
        u32 keys[4];
        const int row = matrix_row + (lane / 8 % 2) * 8;
        load_matrices(keys, shared_address(stage + swizzled<HEAD_DIM>(row, 2 * k + lane / 16)));
        multiply(k % 2 ? odd_scores : scores, keys, query[k][0], query[k][1]);
    }
    float weights[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int at = position + lane / 4 + (i / 2) * 8;
        const bool visible = at >= share.first_position && at < share.length;
        weights[i] = visible ? (scores[i] + odd_scores[i]) * scale : NEGATIVE_INFINITY;
    }
    float shrink[2];
#pragma unroll
    for (int head = 0; head < 2; head++) {
        float largest = fmaxf(weights[head], weights[head + 2]);
#pragma unroll
        for (int distance = 4; distance < WARP; distance *= 2) {
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, distance));
        }
        // A block has at least one visible row, so this is finite from the first block on.
        largest = fmaxf(largest, running.largest[head]);
        shrink[head] = exp2_fast(running.largest[head] - largest);
        running.largest[head] = largest;
        weights[head] = exp2_fast(weights[head] - largest);
        weights[head + 2] = exp2_fast(weights[head + 2] - largest);
        running.sum[head] = running.sum[head] * shrink[head] + weights[head] + weights[head + 2];
    }
    // From rows of keys to columns of keys, which is how the next product reads them.
    const u32 weights_low = transpose_matrix(pack_bf16(weights[0], weights[1]));
    const u32 weights_high = transpose_matrix(pack_bf16(weights[2], weights[3]));
#pragma unroll
    for (int d = 0; d < DIM_TILES; d++) {
        u32 values[4];
        const int row = matrix_row + lane / 16 * 8;
        const bf16* source = stage + TILE + swizzled<HEAD_DIM>(row, 2 * d + lane / 8 % 2);
        load_matrices_transposed(values, shared_address(source));
#pragma unroll
        for (int i = 0; i < 4; i++) running.output[d][i] *= shrink[i % 2];
        multiply(running.output[d], values, weights_low, weights_high);
    }
}

// What the parts of one sequence and K/V head left behind, merged by a whole thread block. Each
// thread weighs the parts for itself: all loads of MERGED parts are on their way at once.
__device__ void merge_parts(bf16* out, const float* partial, const float* partial_ml, int group,
                            int num_parts) {
    constexpr int MERGED = 8;
    for (int e = threadIdx.x * 4; e < group * HEAD_DIM; e += blockDim.x * 4) {
        const int h = e / HEAD_DIM;
        float largest = NEGATIVE_INFINITY, total = 0.0f;
        float4 value = {};
        for (int first = 0; first < num_parts; first += MERGED) {
            float2 ml[MERGED];
            float4 parts[MERGED];
#pragma unroll
            for (int i = 0; i < MERGED; i++) {
                const i64 s = min(first + i, num_parts - 1);
                ml[i] = __ldcg((const float2*)partial_ml + s * group + h);
                parts[i] = __ldcg((const float4*)(partial + s * group * HEAD_DIM + e));
                if (first + i >= num_parts) ml[i] = make_float2(NEGATIVE_INFINITY, 0.0f);
            }
            float merged_largest = largest;
#pragma unroll
            for (int i = 0; i < MERGED; i++) merged_largest = fmaxf(merged_largest, ml[i].x);
            const float before = exp2_fast(largest - merged_largest);
            total *= before;
            value = {value.x * before, value.y * before, value.z * before, value.w * before};
#pragma unroll
            for (int i = 0; i < MERGED; i++) {
                const float shrink = exp2_fast(ml[i].x - merged_largest);
                total += shrink * ml[i].y;
                value.x += shrink * parts[i].x;
                value.y += shrink * parts[i].y;
                value.z += shrink * parts[i].z;
                value.w += shrink * parts[i].w;
            }
            largest = merged_largest;
        }
        const float scale = 1.0f / total;
        u32* target = (u32*)(out + e);
        target[0] = pack_bf16(value.x * scale, value.y * scale);
        target[1] = pack_bf16(value.z * scale, value.w * scale);
    }
}

extern "C" __global__ void __launch_bounds__(NUM_WARPS* WARP)
decode_attention(bf16* out, float* partial, float* partial_ml, u32* arrived, const bf16* qkv,
                 const float* cos_sin, bf16* cache, const int* block_table, const Part* parts,
                 int num_heads, int max_blocks, int window, float scale) {
    extern __shared__ __align__(128) bf16 shared[];
    __shared__ float warp_largest[NUM_WARPS][MAX_GROUP], warp_sum[NUM_WARPS][MAX_GROUP];
    __shared__ bool is_last;
    let_next_begin();
    const int kv_head = blockIdx.x;
    const int num_kv_heads = gridDim.x, group = num_heads / num_kv_heads;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const Part part = parts[blockIdx.y];
    const Share share = share_of(part, window);
    // Without a wait, so that there is room for the next kernel: a first part's blocks wait for all.
    if (part.index >= share.num_parts) return;

    // Stream this warp's cache blocks: begin + warp, begin + warp + NUM_WARPS and so on. Only the
    // token's own row comes from the kernel in front: all others are there already.
    bf16* ring = shared + warp * STAGES * 2 * TILE;
    const int* table = block_table + (i64)part.sequence * max_blocks;
    const i64 values_offset = (i64)num_kv_heads * TILE;
    const int position = max(share.length - 1, 0);
    const auto keys_of = [&](int block) {
        return cache + ((i64)table[block] * 2 * num_kv_heads + kv_head) * TILE;
    };
    const auto load = [&](int block, int stage) {
        if (block < share.end) {
            load_block(ring + stage * 2 * TILE, keys_of(block), values_offset,
                       position - block * BLOCK_SIZE, lane);
        }
        commit_copies();
    };
    const int first = share.begin + warp;
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) load(first + s * NUM_WARPS, s);

    // A lane's elements of a query head are whole pairs: in tile k and in tile k + DIM_TILES / 2.
    const float* angles = cos_sin + (i64)position * HEAD_DIM;
    float2 cosines[DIM_TILES / 2][2], sines[DIM_TILES / 2][2];
#pragma unroll
    for (int k = 0; k < DIM_TILES; k++) {
        const float* at = angles + k / 2 * 16 + k % 2 * 8 + lane % 4 * 2;
        cosines[k / 2][k % 2] = *(const float2*)at;
        sines[k / 2][k % 2] = *(const float2*)(at + HALF_DIM);
    }
    const int newest_block = position / BLOCK_SIZE, newest_row = position % BLOCK_SIZE;
    const bool has_newest = newest_block >= first && newest_block < share.end &&
                            (newest_block - first) % NUM_WARPS == 0;
    bf16* newest_target = has_newest ? keys_of(newest_block) + newest_row * HEAD_DIM : nullptr;
    wait_for_previous();

    u32 heads[DIM_TILES][2];
    const int column = lane / 4;
    const bf16* row = qkv + (i64)part.sequence * (num_heads + 2 * num_kv_heads) * HEAD_DIM;
    const bf16* head = row + (kv_head * group + column) * HEAD_DIM;
#pragma unroll
    for (int k = 0; k < DIM_TILES; k++) {
        const u32* pairs = (const u32*)(head + k * 16) + lane % 4;
        heads[k][0] = column < group ? pairs[0] : 0;
        heads[k][1] = column < group ? pairs[4] : 0;
    }
    Newest newest;
    if (has_newest) {
        newest = write_newest(row + (num_heads + kv_head) * HEAD_DIM, newest_target, values_offset,
                              num_kv_heads, angles, lane);
    }
#pragma unroll
    for (int k = 0; k < DIM_TILES; k++) {
        u32 &low = heads[k / 2][k % 2], &high = heads[k / 2 + DIM_TILES / 2][k % 2];
        float x[2] = {low_float(low), high_float(low)}, y[2] = {low_float(high), high_float(high)};
        const float2 cosine = cosines[k / 2][k % 2], sine = sines[k / 2][k % 2];
        rotate(x[0], y[0], cosine.x, sine.x);
        rotate(x[1], y[1], cosine.y, sine.y);
        low = pack_bf16(x[0], x[1]);
        high = pack_bf16(y[0], y[1]);
    }

    Running running = {};
    running.largest[0] = running.largest[1] = NEGATIVE_INFINITY;
    int stage = 0;
    for (int block = first; block < share.end; block += NUM_WARPS) {
        load(block + (STAGES - 1) * NUM_WARPS, (stage + STAGES - 1) % STAGES);
        wait_copies<STAGES - 1>();
        __syncwarp();
        if (block == newest_block) {
            put_newest(ring + stage * 2 * TILE, newest, newest_row, lane);
            __syncwarp();
        }
        attend(running, ring + stage * 2 * TILE, heads, share, block * BLOCK_SIZE, scale, lane);
        __syncwarp();  // the next turn's copies overwrite what the other lanes have now read
        stage = (stage + 1) % STAGES;
    }
    wait_copies<0>();
    __syncwarp();

    // This warp's output goes into its ring: [MAX_GROUP][HEAD_DIM] f32 fit into one stage.
    float* warp_output = (float*)ring;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int h = lane % 4 * 2 + i;
        float sum = running.sum[i];
        for (int distance = 4; distance < WARP; distance *= 2) {
            sum += __shfl_xor_sync(ALL_LANES, sum, distance);
        }
        warp_largest[warp][h] = running.largest[i];
        warp_sum[warp][h] = sum;
#pragma unroll
        for (int d = 0; d < DIM_TILES; d++) {
            warp_output[h * HEAD_DIM + d * 16 + lane / 4] = running.output[d][i];
            warp_output[h * HEAD_DIM + d * 16 + lane / 4 + 8] = running.output[d][i + 2];
        }
    }
    __syncthreads();

    // Merge the warps: into the output, or into this part of it.
    const i64 pair = (i64)part.sequence * num_kv_heads + kv_head;
    const i64 first_of_sequence = (i64)(blockIdx.y - part.index) * num_kv_heads;
    const i64 first_row = (first_of_sequence + kv_head * part.num_parts) * group;
    bf16* pair_out = out + pair * group * HEAD_DIM;
    float* pair_partial = partial + first_row * HEAD_DIM;
    float* pair_ml = partial_ml + first_row * 2;
    for (int e = threadIdx.x; e < group * HEAD_DIM; e += blockDim.x) {
        const int h = e / HEAD_DIM;
        float largest = NEGATIVE_INFINITY, sum = 0.0f, value = 0.0f;
#pragma unroll
        for (int w = 0; w < NUM_WARPS; w++) largest = fmaxf(largest, warp_largest[w][h]);
#pragma unroll
        for (int w = 0; w < NUM_WARPS; w++) {
            // A warp without keys has no largest score.
            const float its_sum = warp_sum[w][h];
            const float shrink = its_sum > 0.0f ? exp2_fast(warp_largest[w][h] - largest) : 0.0f;
            sum += shrink * its_sum;
            value += shrink * ((const float*)(shared + w * STAGES * 2 * TILE))[e];
        }
        if (share.num_parts == 1) {
            pair_out[e] = (bf16)pack_bf16(sum > 0.0f ? value / sum : 0.0f, 0.0f);
        } else {
            pair_partial[part.index * group * HEAD_DIM + e] = value;
            if (e % HEAD_DIM == 0) {
                pair_ml[(part.index * group + h) * 2] = largest;
                pair_ml[(part.index * group + h) * 2 + 1] = sum;
            }
        }
    }
    if (share.num_parts == 1) return;

    // The thread block that arrives last sees what all others wrote.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(&arrived[pair], 1u) == share.num_parts - 1;
        if (is_last) arrived[pair] = 0;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    merge_parts(pair_out, pair_partial, pair_ml, group, share.num_parts);
}
