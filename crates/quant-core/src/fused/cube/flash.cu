// Attention on matrix units whose operands are registers (compute capability 8.0 and later): scores stay on the chip.
//
// A warp has 16 queries (KEYS: 16 keys) in registers, a block WARPS times as many; tiles of what they
// meet go through shared memory, one ahead. Operands have 16 bits, sums are f32. Each result is summed by one thread in one order.
// Above these lines stand the definitions that differ from kernel to kernel: FORWARD, QUERIES or KEYS for one of the three,
// WARPS, BLOCKS (on a multiprocessor), HEAD_DIM (a multiple of 16), TILE (rows of a tile, a multiple of 16), ALIBI and SOFTCAP
// (1 where there are such), MULTIPLY and ROUND.
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// `scale`, `alibi` and `softcap` are the bits of floats; `power` is the largest power of two that is at most `heads`.
struct Sizes { u64 length, keys, heads, kv_heads, power, window, scale, alibi, softcap; };

#define THREADS (WARPS * 32)
#define ROWS (WARPS * 16)
#define CHUNKS (HEAD_DIM / 8)
#define STEPS (HEAD_DIM / 16)
// Rows lie 16 bytes further apart than they are long, so that eight of them are in different banks.
#define ROW_BYTES (HEAD_DIM * 2 + 16)
#define TILE_BYTES (TILE * ROW_BYTES)
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
#define NOTHING __int_as_float(0xFF800000)

__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm(MULTIPLY " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 pair(float x, float y) {
    u32 both;
    asm(ROUND " %0, %1, %2;" : "=r"(both) : "f"(y), "f"(x));
    return both;
}

// Two neighbouring 8-column blocks of sums as the left operand of a product over their columns.
__device__ __forceinline__ void left(u32 (&a)[4], const float (&x)[4], const float (&y)[4]) {
    a[0] = pair(x[0], x[1]), a[1] = pair(x[2], x[3]), a[2] = pair(y[0], y[1]), a[3] = pair(y[2], y[3]);
}

// Right operands of two products, 16 of the inner dimension each: rows `row..row + 16` of a tile are their columns.
__device__ __forceinline__ void right(u32 (&b)[4], u32 tile, int row, int inner) {
    const int lane = threadIdx.x % 32;
    const u32 from = tile + (row + lane / 16 * 8 + lane % 8) * ROW_BYTES + (inner + lane / 8 % 2 * 8) * 2;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(from) : "memory");
}

// The same of a transposed tile: its rows are the inner dimension.
__device__ __forceinline__ void right_transposed(u32 (&b)[4], u32 tile, int inner, int column) {
    const int lane = threadIdx.x % 32;
    const u32 from = tile + (inner + lane % 16) * ROW_BYTES + (column + lane / 16 * 8) * 2;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(from) : "memory");
}

// Rows `first..first + TILE` of a matrix of `limit` rows; the last one again beyond. Who looks at them there sees nothing.
__device__ __forceinline__ void load_tile(u32 to, const u16* from, u32 stride, int first, int limit) {
#pragma unroll
    for (int i = threadIdx.x; i < TILE * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        const u16* source = from + (u64)((u32)min(first + row, limit - 1) * stride + chunk * 8);
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + row * ROW_BYTES + chunk * 16), "l"(source) : "memory");
    }
}

// One value of 4 bytes for each row of a tile.
__device__ __forceinline__ void load_values(u32 to, const void* from, int first, int limit) {
    const int row = threadIdx.x;
    if (row < TILE)
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;"
                     ::"r"(to + row * 4), "l"((const u32*)from + min(first + row, limit - 1)) : "memory");
}

__device__ __forceinline__ void end_of_loads() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all loads but those of the last tile begun.
__device__ __forceinline__ void wait_for_loads(bool one_ahead) {
    if (one_ahead) asm volatile("cp.async.wait_group 1;" ::: "memory");
    else asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
}

// Left operands: rows `row` and `row + 8` of a matrix of `limit` rows.
__device__ __forceinline__ void load_left(u32 (&a)[STEPS][4], const u16* from, u64 stride, int row, int limit) {
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int r = row + i % 2 * 8, d = step * 16 + threadIdx.x % 4 * 2 + i / 2 * 8;
            a[step][i] = r < limit ? *(const u32*)(from + (u64)r * stride + d) : 0;
        }
    }
}

// sums[rows][TILE] = a · tileᵀ
__device__ __forceinline__ void scores_of(float (&sums)[TILE / 8][4], const u32 (&a)[STEPS][4], u32 tile) {
#pragma unroll
    for (int block = 0; block < TILE / 8; block++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[block][i] = 0.0f;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        u32 b[TILE / 16][4];
#pragma unroll
        for (int block = 0; block < TILE / 16; block++) right(b[block], tile, block * 16, step * 16);
#pragma unroll
        for (int block = 0; block < TILE / 8; block++)
            multiply(sums[block], a[step], b[block / 2][block % 2 * 2], b[block / 2][block % 2 * 2 + 1]);
    }
}

// sums[rows][HEAD_DIM] += weights[rows][TILE] · tile
__device__ __forceinline__ void add_weighted(float (&sums)[HEAD_DIM / 8][4], const float (&weights)[TILE / 8][4], u32 tile) {
#pragma unroll
    for (int step = 0; step < TILE / 16; step++) {
        u32 a[4], b[STEPS][4];
        left(a, weights[2 * step], weights[2 * step + 1]);
#pragma unroll
        for (int block = 0; block < STEPS; block++) right_transposed(b[block], tile, step * 16, block * 16);
#pragma unroll
        for (int block = 0; block < HEAD_DIM / 8; block++)
            multiply(sums[block], a, b[block / 2][block % 2 * 2], b[block / 2][block % 2 * 2 + 1]);
    }
}

__device__ __forceinline__ void store(float* to, u64 stride, int row, int limit, const float (&sums)[HEAD_DIM / 8][4],
                                      float first, float second) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (row + half * 8 >= limit) continue;
        const float factor = half ? second : first;
        float* at = to + (u64)(row + half * 8) * stride + threadIdx.x % 4 * 2;
#pragma unroll
        for (int block = 0; block < HEAD_DIM / 8; block++)
            *(float2*)(at + block * 8) = make_float2(sums[block][half * 2] * factor, sums[block][half * 2 + 1] * factor);
    }
}

__device__ __forceinline__ float sum_of_four(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

__device__ __forceinline__ float largest_of_four(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float float_of(u64 bits) { return __uint_as_float((u32)bits); }

// What turns products into scores, times log2(e) so that powers of two serve.
struct Score {
    float scale, factor, slope, softcap;

    __device__ Score(const Sizes& sizes, int head)
        : scale(float_of(sizes.scale)), factor(scale * LOG2E), slope(0.0f), softcap(float_of(sizes.softcap)) {
#if ALIBI
        const int power = (int)sizes.power;
        const float exponent = head < power ? (float)(head + 1) / power : (float)(2 * (head - power) + 1) / (2 * power);
        slope = float_of(sizes.alibi) * power_of_two(-8.0f * exponent) * LOG2E;
#endif
    }

    __device__ float operator()(float product, int behind) const {
        float z = product * factor;
#if ALIBI
        z -= slope * (float)behind;
#endif
#if SOFTCAP
        z = softcap * LOG2E * tanhf(z * LN2 / softcap);
#endif
        return z;
    }

    // The derivative of a score to its product, without log2(e).
    __device__ float through(float z) const {
#if SOFTCAP
        const float share = z * LN2 / softcap;
        return scale * (1.0f - share * share);
#else
        return scale;
#endif
    }
};

// Whether the segments of a tile are all, or any of them is, the warp's common one, added to what its own rows say.
__device__ __forceinline__ void compare(const int (&segments)[TILE], int common, bool& same, bool& meet) {
    for (int i = threadIdx.x % 32; i < TILE; i += 32) {
        const bool equal = segments[i] == common;
        same &= equal, meet |= equal;
    }
    same = __all_sync(~0u, same), meet = __any_sync(~0u, meet);
}

// What a tile's pairs of queries and keys have to be asked.
enum Visible { NONE, SOME, ALL };

// Of `queries` queries, whose places are `place..` on, and TILE (or 16) keys; `same` and `meet` say of the segments that all, or any, are equal.
__device__ __forceinline__ Visible visible(int place, int queries, int key, int keys, int window, bool same, bool meet) {
    if (!meet || key > place + queries - 1 || place >= key + keys - 1 + window) return NONE;
    return same && key + keys - 1 <= place && place + queries - 1 < key + window ? ALL : SOME;
}

__device__ __forceinline__ bool sees(int place, int key, int window, int query_segment, int key_segment) {
    return key <= place && place - key < window && query_segment == key_segment;
}

// Puts `nothing` in the place of what queries, from `place` on, don't see of the keys of a tile.
__device__ __forceinline__ void hide(float (&weights)[TILE / 8][4], int place, int key, int window, const int (&segment)[2],
                                     const int (&segments)[TILE], float nothing) {
#pragma unroll
    for (int block = 0; block < TILE / 8; block++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int half = i / 2, at = block * 8 + threadIdx.x % 4 * 2 + i % 2;
            const bool visible = sees(place + half * 8, key + at, window, segment[half], segments[at]);
            weights[block][i] = visible ? weights[block][i] : nothing;
        }
    }
}

#define BOUND_ENDS                                                                                    \
    const int length = (int)sizes.length, keys = (int)sizes.keys, past = keys - length;               \
    const int heads = (int)sizes.heads, kv_heads = (int)sizes.kv_heads, window = (int)sizes.window;   \
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

#ifdef FORWARD
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
attention(const u16* __restrict__ q, const u16* __restrict__ k, const u16* __restrict__ v, const int* __restrict__ query_segments,
        const int* __restrict__ key_segments, float* __restrict__ out, float* __restrict__ log_sums,
        const __grid_constant__ Sizes sizes) {
    __shared__ __align__(16) unsigned char tiles[2][2][TILE_BYTES];
    __shared__ int segments[2][TILE];
    BOUND_ENDS
    const int head = blockIdx.y, row_of_batch = blockIdx.z, kv_head = head / (heads / kv_heads);
    // The longest rows first.
    const int block_first = (gridDim.x - 1 - blockIdx.x) * ROWS, first = block_first + warp * 16, row = first + lane / 4;
    const u64 stride = (u64)heads * HEAD_DIM, kv_stride = (u64)kv_heads * HEAD_DIM;
    q += (u64)row_of_batch * length * stride + head * HEAD_DIM;
    out += (u64)row_of_batch * length * stride + head * HEAD_DIM;
    k += (u64)row_of_batch * keys * kv_stride + kv_head * HEAD_DIM;
    v += (u64)row_of_batch * keys * kv_stride + kv_head * HEAD_DIM;
    query_segments += (u64)row_of_batch * length, key_segments += (u64)row_of_batch * keys;
    log_sums += ((u64)row_of_batch * heads + head) * length;

    u32 queries[STEPS][4];
    load_left(queries, q, stride, row, length);
    // Rows beyond the end are like the last.
    const int segment[2] = {query_segments[min(row, length - 1)], query_segments[min(row + 8, length - 1)]};
    const int common = __shfl_sync(~0u, segment[0], 0);
    const bool same_queries = __all_sync(~0u, segment[0] == common && segment[1] == common);
    const Score score(sizes, head);

    float sums[HEAD_DIM / 8][4] = {}, largest[2] = {NOTHING, NOTHING}, total[2] = {0.0f, 0.0f};
    const int first_tile = max(0, past + block_first + 1 - window) / TILE;
    const int last_tile = (past + min(block_first + ROWS, length) - 1) / TILE;
    auto load = [&](int tile) {
        const int stage = tile & 1;
        load_tile(shared_address(tiles[stage][0]), k, kv_stride, tile * TILE, keys);
        load_tile(shared_address(tiles[stage][1]), v, kv_stride, tile * TILE, keys);
        load_values(shared_address(segments[stage]), key_segments, tile * TILE, keys);
        end_of_loads();
    };
    load(first_tile);
    for (int tile = first_tile; tile <= last_tile; tile++) {
        const int stage = tile & 1, key = tile * TILE;
        if (tile < last_tile) load(tile + 1);
        wait_for_loads(tile < last_tile);
        bool same = same_queries, meet = !same_queries;
        compare(segments[stage], common, same, meet);
        const Visible seen = visible(past + first, 16, key, TILE, window, same, meet);
        if (seen != NONE) {
            float weights[TILE / 8][4];
            scores_of(weights, queries, shared_address(tiles[stage][0]));
            float most[2] = {NOTHING, NOTHING};
#pragma unroll
            for (int block = 0; block < TILE / 8; block++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int half = i / 2, place = past + row + half * 8, at = block * 8 + lane % 4 * 2 + i % 2;
                    weights[block][i] = score(weights[block][i], place - key - at);
                }
            }
            if (seen != ALL) hide(weights, past + row, key, window, segment, segments[stage], NOTHING);
#pragma unroll
            for (int block = 0; block < TILE / 8; block++)
#pragma unroll
                for (int i = 0; i < 4; i++) most[i / 2] = fmaxf(most[i / 2], weights[block][i]);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float now = fmaxf(largest[half], largest_of_four(most[half]));
                const float base = now == NOTHING ? 0.0f : now;
                const float shrink = power_of_two(largest[half] - base);
                largest[half] = now;
                total[half] *= shrink;
#pragma unroll
                for (int block = 0; block < HEAD_DIM / 8; block++)
                    sums[block][half * 2] *= shrink, sums[block][half * 2 + 1] *= shrink;
#pragma unroll
                for (int block = 0; block < TILE / 8; block++) {
#pragma unroll
                    for (int i = half * 2; i < half * 2 + 2; i++) {
                        weights[block][i] = power_of_two(weights[block][i] - base);
                        total[half] += weights[block][i];
                    }
                }
            }
            add_weighted(sums, weights, shared_address(tiles[stage][1]));
        }
        __syncthreads();
    }

#pragma unroll
    for (int half = 0; half < 2; half++) {
        total[half] = sum_of_four(total[half]);
        if (lane % 4 == 0 && row + half * 8 < length) log_sums[row + half * 8] = (largest[half] + log2f(total[half])) * LN2;
    }
    // A query that sees nothing has no result.
    store(out, stride, row, length, sums, total[0] > 0.0f ? 1.0f / total[0] : 0.0f, total[1] > 0.0f ? 1.0f / total[1] : 0.0f);
}

#endif

#ifdef QUERIES
// Gradients of queries, and `along`: the sum of `out * d_out` of each query and head.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
attention(const u16* __restrict__ q, const u16* __restrict__ k, const u16* __restrict__ v, const u16* __restrict__ d_out,
        const float* __restrict__ out, const float* __restrict__ exact_d_out, const int* __restrict__ query_segments,
        const int* __restrict__ key_segments, const float* __restrict__ log_sums, float* __restrict__ dq,
        float* __restrict__ along, const __grid_constant__ Sizes sizes) {
    __shared__ __align__(16) unsigned char tiles[2][2][TILE_BYTES];
    __shared__ int segments[2][TILE];
    __shared__ float along_of[ROWS];
    BOUND_ENDS
    const int head = blockIdx.y, row_of_batch = blockIdx.z, kv_head = head / (heads / kv_heads);
    const int block_first = (gridDim.x - 1 - blockIdx.x) * ROWS, first = block_first + warp * 16, row = first + lane / 4;
    const u64 stride = (u64)heads * HEAD_DIM, kv_stride = (u64)kv_heads * HEAD_DIM;
    const u64 at_queries = (u64)row_of_batch * length * stride + head * HEAD_DIM;
    q += at_queries, d_out += at_queries, out += at_queries, exact_d_out += at_queries, dq += at_queries;
    k += (u64)row_of_batch * keys * kv_stride + kv_head * HEAD_DIM;
    v += (u64)row_of_batch * keys * kv_stride + kv_head * HEAD_DIM;
    query_segments += (u64)row_of_batch * length, key_segments += (u64)row_of_batch * keys;
    log_sums += ((u64)row_of_batch * heads + head) * length, along += ((u64)row_of_batch * heads + head) * length;

    for (int i = 0; i < 16 && first + i < length; i++) {
        float sum = 0.0f;
        for (int d = lane; d < HEAD_DIM; d += 32) sum += out[(first + i) * stride + d] * exact_d_out[(first + i) * stride + d];
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
        if (lane == 0) along_of[warp * 16 + i] = along[first + i] = sum;
    }
    __syncwarp();

    u32 queries[STEPS][4], gradients[STEPS][4];
    load_left(queries, q, stride, row, length);
    load_left(gradients, d_out, stride, row, length);
    float log_sum[2], along_here[2];
    int segment[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int inside = min(row + half * 8, length - 1);
        segment[half] = query_segments[inside];
        log_sum[half] = log_sums[inside] * LOG2E;
        along_here[half] = row + half * 8 < length ? along_of[warp * 16 + lane / 4 + half * 8] : 0.0f;
    }
    const int common = __shfl_sync(~0u, segment[0], 0);
    const bool same_queries = __all_sync(~0u, segment[0] == common && segment[1] == common);
    const Score score(sizes, head);

    float sums[HEAD_DIM / 8][4] = {};
    const int first_tile = max(0, past + block_first + 1 - window) / TILE;
    const int last_tile = (past + min(block_first + ROWS, length) - 1) / TILE;
    auto load = [&](int tile) {
        const int stage = tile & 1;
        load_tile(shared_address(tiles[stage][0]), k, kv_stride, tile * TILE, keys);
        load_tile(shared_address(tiles[stage][1]), v, kv_stride, tile * TILE, keys);
        load_values(shared_address(segments[stage]), key_segments, tile * TILE, keys);
        end_of_loads();
    };
    load(first_tile);
    for (int tile = first_tile; tile <= last_tile; tile++) {
        const int stage = tile & 1, key = tile * TILE;
        if (tile < last_tile) load(tile + 1);
        wait_for_loads(tile < last_tile);
        bool same = same_queries, meet = !same_queries;
        compare(segments[stage], common, same, meet);
        const Visible seen = visible(past + first, 16, key, TILE, window, same, meet);
        if (seen != NONE) {
            float weights[TILE / 8][4], d_weights[TILE / 8][4];
            scores_of(weights, queries, shared_address(tiles[stage][0]));
            scores_of(d_weights, gradients, shared_address(tiles[stage][1]));
#pragma unroll
            for (int block = 0; block < TILE / 8; block++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int half = i / 2, place = past + row + half * 8, at = block * 8 + lane % 4 * 2 + i % 2;
                    const float z = score(weights[block][i], place - key - at);
                    const float weight = power_of_two(z - log_sum[half]);
                    weights[block][i] = weight * (d_weights[block][i] - along_here[half]) * score.through(z);
                }
            }
            if (seen != ALL) hide(weights, past + row, key, window, segment, segments[stage], 0.0f);
            add_weighted(sums, weights, shared_address(tiles[stage][0]));
        }
        __syncthreads();
    }
    store(dq, stride, row, length, sums, 1.0f, 1.0f);
}

#endif

#ifdef KEYS
// Gradients of keys and values: queries of all heads that share a key head pass by.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
attention(const u16* __restrict__ q, const u16* __restrict__ k, const u16* __restrict__ v, const u16* __restrict__ d_out,
     const int* __restrict__ query_segments, const int* __restrict__ key_segments, const float* __restrict__ log_sums,
     const float* __restrict__ along, float* __restrict__ dk, float* __restrict__ dv, const __grid_constant__ Sizes sizes) {
    __shared__ __align__(16) unsigned char tiles[2][2][TILE_BYTES];
    __shared__ int segments[2][TILE];
    __shared__ float log_sums_of[2][TILE], along_of[2][TILE];
    BOUND_ENDS
    const int kv_head = blockIdx.y, row_of_batch = blockIdx.z, group = heads / kv_heads;
    // The first keys are seen by most queries.
    const int block_first = blockIdx.x * ROWS, first = block_first + warp * 16, row = first + lane / 4;
    const u64 stride = (u64)heads * HEAD_DIM, kv_stride = (u64)kv_heads * HEAD_DIM;
    const u64 at_queries = (u64)row_of_batch * length * stride, at_keys = (u64)row_of_batch * keys * kv_stride + kv_head * HEAD_DIM;
    q += at_queries, d_out += at_queries;
    k += at_keys, v += at_keys, dk += at_keys, dv += at_keys;
    query_segments += (u64)row_of_batch * length, key_segments += (u64)row_of_batch * keys;
    log_sums += (u64)row_of_batch * heads * length, along += (u64)row_of_batch * heads * length;

    u32 own_keys[STEPS][4], own_values[STEPS][4];
    load_left(own_keys, k, kv_stride, row, keys);
    load_left(own_values, v, kv_stride, row, keys);
    const int segment[2] = {key_segments[min(row, keys - 1)], key_segments[min(row + 8, keys - 1)]};
    const int common = __shfl_sync(~0u, segment[0], 0);
    const bool same_keys = __all_sync(~0u, segment[0] == common && segment[1] == common);

    float d_keys[HEAD_DIM / 8][4] = {}, d_values[HEAD_DIM / 8][4] = {};
    // Queries that may see a key of the block.
    const int from = max(0, block_first - past), to = min(length, block_first + ROWS - 1 + window - past);
    const int first_tile = from / TILE, tiles_of_head = to > from ? (to - 1) / TILE - first_tile + 1 : 0;
    const int rounds = tiles_of_head * group;
    auto load = [&](int round) {
        const int stage = round & 1, head = kv_head * group + round / tiles_of_head;
        const int query = (first_tile + round % tiles_of_head) * TILE;
        load_tile(shared_address(tiles[stage][0]), q + head * HEAD_DIM, stride, query, length);
        load_tile(shared_address(tiles[stage][1]), d_out + head * HEAD_DIM, stride, query, length);
        load_values(shared_address(segments[stage]), query_segments, query, length);
        load_values(shared_address(log_sums_of[stage]), log_sums + (u64)head * length, query, length);
        load_values(shared_address(along_of[stage]), along + (u64)head * length, query, length);
        end_of_loads();
    };
    if (rounds > 0) load(0);
    for (int round = 0; round < rounds; round++) {
        const int stage = round & 1, head = kv_head * group + round / tiles_of_head;
        const int query = (first_tile + round % tiles_of_head) * TILE;
        if (round + 1 < rounds) load(round + 1);
        wait_for_loads(round + 1 < rounds);
        bool same = same_keys && query + TILE <= length, meet = !same_keys;
        compare(segments[stage], common, same, meet);
        const Visible seen = visible(past + query, TILE, first, 16, window, same, meet);
        if (seen != NONE) {
            const Score score(sizes, head);
            float weights[TILE / 8][4], d_weights[TILE / 8][4];
            scores_of(weights, own_keys, shared_address(tiles[stage][0]));
            scores_of(d_weights, own_values, shared_address(tiles[stage][1]));
#pragma unroll
            for (int block = 0; block < TILE / 8; block++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int half = i / 2, key = row + half * 8, at = block * 8 + lane % 4 * 2 + i % 2;
                    const int place = past + query + at;
                    const float z = score(weights[block][i], place - key);
                    weights[block][i] = power_of_two(z - log_sums_of[stage][at] * LOG2E);
                    d_weights[block][i] = weights[block][i] * (d_weights[block][i] - along_of[stage][at]) * score.through(z);
                }
            }
            if (seen != ALL) {
#pragma unroll
                for (int block = 0; block < TILE / 8; block++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int half = i / 2, key = row + half * 8, at = block * 8 + lane % 4 * 2 + i % 2;
                        const bool visible = query + at < length
                            && sees(past + query + at, key, window, segments[stage][at], segment[half]);
                        weights[block][i] = visible ? weights[block][i] : 0.0f;
                        d_weights[block][i] = visible ? d_weights[block][i] : 0.0f;
                    }
                }
            }
            add_weighted(d_values, weights, shared_address(tiles[stage][1]));
            add_weighted(d_keys, d_weights, shared_address(tiles[stage][0]));
        }
        __syncthreads();
    }
    store(dk, kv_stride, row, keys, d_keys, 1.0f, 1.0f);
    store(dv, kv_stride, row, keys, d_values, 1.0f, 1.0f);
}
#endif
