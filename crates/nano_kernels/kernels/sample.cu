// The choice of the next token, as crates/nano_kernels/src/reference/sampling.rs defines it:
// top_k, then top_p, then min_p by a smallest kept logit; then the argmax of
// (logit - largest) / temperature + gumbel, the lowest id on a tie. Temperature 0 is the argmax.
//
// No sort: a threshold is found by quartering the range of the 32-bit keys that order floats, with
// one pass over the row for two bits, until one logit is left. Sums have a fixed order, so a row's
// choice is the same in any batch.
//
// Grid: num_rows. Block: 1024 threads. Shared memory: 1 KB.
//
//   chosen: [num_rows] u32; NO_TOKEN where no logit is a finite number or one is +infinity
//   answer: [num_rows] u32, the same in the host's memory
//   logits: [num_rows, vocab_size] f32; NaN and -infinity are never chosen
//   rows:   [num_rows] RowSampling
//
// Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011 (the noise).
#include "common.cuh"

constexpr u32 NO_TOKEN = 0xffffffffu;

struct RowSampling {
    float temperature;
    float top_p;
    float min_p_margin;  // ln(min_p) * temperature: what is this far below the largest is dropped
    u32 top_k;           // 0 keeps all
    u64 seed;
    u32 position;
    u32 index;
};

// Keys order as their floats do. NaN and -infinity get key 0, below every finite number's; the
// addition makes -0 a 0.
__device__ __forceinline__ u32 order_key(float value) {
    const u32 bits = __float_as_uint(__fadd_rn(value, 0.0f));
    if (!(value > NEGATIVE_INFINITY)) return 0;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float from_order_key(u32 key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Four random words: Philox 4x32-10.
__device__ __forceinline__ uint4 philox(u32 c0, u32 c1, u32 c2, u32 c3, u32 k0, u32 k1) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const u64 first = (u64)0xD2511F53u * c0;
        const u64 second = (u64)0xCD9E8D57u * c2;
        c0 = (u32)(second >> 32) ^ c1 ^ k0;
        c1 = (u32)second;
        c2 = (u32)(first >> 32) ^ c3 ^ k1;
        c3 = (u32)first;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return make_uint4(c0, c1, c2, c3);
}

// The noise of tokens 4 four to 4 four + 3, as numbers strictly between 0 and 1.
__device__ __forceinline__ void uniforms(float (&noise)[4], const RowSampling& row, u32 four) {
    const uint4 words =
        philox(row.index, row.position, four, 0, (u32)row.seed, (u32)(row.seed >> 32));
    const auto uniform = [](u32 word) { return ((float)(word >> 9) + 0.5f) / 8388608.0f; };
    noise[0] = uniform(words.x);
    noise[1] = uniform(words.y);
    noise[2] = uniform(words.z);
    noise[3] = uniform(words.w);
}

// Of values in registers, which have no addresses.
__device__ __forceinline__ float pick(const float (&values)[4], int i) {
    return i < 2 ? i == 0 ? values[0] : values[1] : i == 2 ? values[2] : values[3];
}

__device__ __forceinline__ float gumbel(float uniform) { return -logf(-logf(uniform)); }

// No noise exceeds this: -ln(-ln(1 - 2^-24)) and a little.
constexpr float MAX_GUMBEL = 16.7f;
// Far above what rounding does to uniform -> gumbel -> uniform.
constexpr float UNIFORM_ERROR = 4e-6f;
constexpr int NUM_CUTS = 3;

// For each cut, over the logits at or above it: how many they are, and the sum of their weights.
struct Above {
    float sum[NUM_CUTS];
    u32 count[NUM_CUTS];
};
__device__ __forceinline__ void warp_sum(Above& above) {
#pragma unroll
    for (int c = 0; c < NUM_CUTS; c++) {
        above.sum[c] = warp_reduce(above.sum[c], Add());
        above.count[c] = __reduce_add_sync(ALL_LANES, above.count[c]);
    }
}

// Over the block; `scratch` holds one a warp.
template <typename Weight>
__device__ Above sum_above(const float* logits, int vocab_size, const float (&cuts)[NUM_CUTS],
                           Above* scratch, Weight weight) {
    Above above = {};
#pragma unroll 8
    for (int token = threadIdx.x; token < vocab_size; token += blockDim.x) {
        const float logit = logits[token];
        const float amount = weight(logit);
#pragma unroll
        for (int c = 0; c < NUM_CUTS; c++) {
            const bool is_above = logit >= cuts[c];
            above.sum[c] += is_above ? amount : 0.0f;
            above.count[c] += is_above;
        }
    }
    warp_sum(above);
    __syncthreads();  // the last call's readers are done with the scratch
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = above;
    __syncthreads();
    above = scratch[threadIdx.x % WARP];
    warp_sum(above);
    return above;
}

// A number that splits the logits as the largest one above which (itself included) the weights
// still sum to `wanted` does. That lies between `low_value`, above which there are at most `count`
// logits, and the largest logit.
template <typename Weight>
__device__ float find_threshold(const float* logits, int vocab_size, float low_value,
                                float largest, float wanted, u32 count, Above* scratch,
                                Weight weight) {
    u32 low = order_key(low_value), high = order_key(largest), count_above_high = 0;
    // With one logit left between the two, nothing is left to find out.
    while (low < high && count - count_above_high > 1) {
        // Three keys in (low, high], ascending; the sums above them descend.
        const u64 range = high - low;
        u32 keys[NUM_CUTS];
        float cuts[NUM_CUTS];
        for (int c = 0; c < NUM_CUTS; c++) {
            keys[c] = low + (u32)((range * (c + 1) + NUM_CUTS) / (NUM_CUTS + 1));
            cuts[c] = from_order_key(keys[c]);
        }
        const Above above = sum_above(logits, vocab_size, cuts, scratch, weight);
        u32 next_high = high;
        for (int c = NUM_CUTS - 1; c >= 0; c--) {
            if (above.sum[c] >= wanted) {
                low = keys[c];
                count = above.count[c];
                break;
            }
            next_high = keys[c] - 1;
            count_above_high = above.count[c];
        }
        high = next_high;
    }
    return from_order_key(low);
}

// The largest value so far, the first of equal ones.
struct Best {
    float value;
    u32 token;
    __device__ void offer(float other, u32 other_token) {
        if (other > value) {
            value = other;
            token = other_token;
        }
    }
    // Orders by value, then by the lower token.
    __device__ u64 key() const { return (u64)order_key(value) << 32 | ~token; }
};

extern "C" __global__ void __launch_bounds__(1024, 1)
sample(u32* chosen, u32* answer, const float* all_logits, const RowSampling* rows, int vocab_size) {
    __shared__ u64 scratch[WARP];
    __shared__ Above sums[WARP];
    begin();
    const RowSampling row = rows[blockIdx.x];
    const float* logits = all_logits + (i64)blockIdx.x * vocab_size;

    Best best = {NEGATIVE_INFINITY, 0};
#pragma unroll 8
    for (int token = threadIdx.x; token < vocab_size; token += blockDim.x) {
        best.offer(logits[token], token);
    }
    u64 best_key = block_reduce(best.key(), scratch, Max());
    const u32 largest_key = (u32)(best_key >> 32);
    const float largest = from_order_key(largest_key);
    const bool none = largest_key == 0 || !isfinite(largest);

    if (!none && row.temperature > 0.0f) {
        float least = -3.402823466e38f;  // the lowest finite number
        if (row.top_k != 0 && row.top_k < vocab_size) {
            const auto one = [](float) { return 1.0f; };
            least = find_threshold(logits, vocab_size, least, largest, (float)row.top_k,
                                   vocab_size, sums, one);
        }
        if (row.top_p < 1.0f) {
            // Finite, or the largest would weigh 0 times infinity.
            const float scale = fminf(1.0f / row.temperature, 3.402823466e38f);
            // Not above 1, and a logit that is no number counts nothing: it is above no cut.
            const auto mass = [&](float logit) { return __expf((logit - largest) * scale); };
            const float cuts[NUM_CUTS] = {least, least, least};
            const Above all = sum_above(logits, vocab_size, cuts, sums, mass);
            // So far down a whole vocabulary weighs less than 1 - top_p, and the largest logit 1.
            const float depth = (logf(vocab_size / (1.0f - row.top_p)) + 1.0f) / scale;
            least = find_threshold(logits, vocab_size, fmaxf(least, largest - depth), largest,
                                   all.sum[0] * row.top_p, all.count[0], sums, mass);
        }
        least = fmaxf(least, __fadd_rn(largest, row.min_p_margin));

        // A sum that some token has: at first that of the largest logit, then the best of this warp.
        // No logit is above the largest, so a token with noise below `least_uniform` cannot win, nor
        // one whose logit no noise lifts so high: most need no logarithm, many not even their noise.
        const u32 first = ~(u32)best_key;
        float noise[4];
        uniforms(noise, row, first / 4);
        float bound = gumbel(pick(noise, first % 4));
        const int num_fours = (vocab_size + 3) / 4;
        best = {NEGATIVE_INFINITY, 0};
        for (int start = 0; start < num_fours; start += blockDim.x) {
            const int four = start + threadIdx.x;
            float scaled[4];
            bool can_win = false;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int token = 4 * four + i;
                const float logit = token < vocab_size ? logits[token] : NEGATIVE_INFINITY;
                scaled[i] = logit >= least ? (logit - largest) / row.temperature : NEGATIVE_INFINITY;
                can_win |= scaled[i] + MAX_GUMBEL >= bound;
            }
            if (!__any_sync(ALL_LANES, can_win)) continue;
            uniforms(noise, row, four);
            const float least_uniform = expf(-expf(-bound)) - UNIFORM_ERROR;
            u32 candidates = 0;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const bool is_candidate = scaled[i] + MAX_GUMBEL >= bound && noise[i] >= least_uniform;
                candidates |= is_candidate << i;
            }
            // Lanes take their candidates together, whichever of the four they are.
            for (; __any_sync(ALL_LANES, candidates); candidates &= candidates - 1) {
                const int i = __ffs(candidates) - 1;
                if (i >= 0) best.offer(pick(scaled, i) + gumbel(pick(noise, i)), 4 * four + i);
            }
            bound = fmaxf(bound, warp_reduce(best.value, Max()));
        }
        best_key = block_reduce(best.key(), scratch, Max());
    }
    if (threadIdx.x == 0) {
        const u32 token = none ? NO_TOKEN : ~(u32)best_key;
        chosen[blockIdx.x] = token;
        answer[blockIdx.x] = token;
    }
}

// Takes tokens out of the choice: their logits become -infinity.
//
// Grid and block: together at least num_banned threads.
//
//   logits: [num_rows, vocab_size] f32, written
//   banned: [num_banned] pairs of row and token; a token outside the vocabulary is ignored
extern "C" __global__ void __launch_bounds__(256)
ban_tokens(float* logits, const uint2* banned, int num_banned, u32 vocab_size) {
    begin();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= num_banned) return;
    const u32 row = banned[i].x, token = banned[i].y;
    if (token < vocab_size) logits[(i64)row * vocab_size + token] = NEGATIVE_INFINITY;
}
