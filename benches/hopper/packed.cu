// out = x * W of a packed W, or x * W^T, on the matrix units of compute capability 9.0: a candidate for the library, see check.py.
//
// W is the operand that matrix units take from registers: each thread unpacks what its fragments need, so W never lies dense
// anywhere, and shared memory (48 KiB for a kernel that CubeCL gets as text) holds tiles of x alone. Operands are f16: codes
// become weights by two instructions for two of them, exactly rounded once, where bf16 takes nine. So rows of x come
// scaled by a power of two, undone at the end. With UPDATE: + left * right, of operands in bf16, left scaled alike.
//
// A block of 128 threads makes ROWS x FEATURES of out; two blocks share a multiprocessor. The inner places of a run of 32 come
// in the order in which a thread's codes lie in words: check.py's `order`. Sizes: k of x * W a multiple of 32, columns of
// W of 8, groups of scales a multiple of 32 inputs of one output, scales and offsets f16.
//
// Above these lines stand: BITS, TRANSPOSED, OFFSETS, LEAST (-1024 less the code of zero, twice in f16), UPDATE, STAGES, BLOCKS,
// BAND, MULTIPLY, MULTIPLY_UPDATE, and for finding out what costs what: NOUNPACK, NOSTORE.
typedef unsigned int u32;
typedef unsigned long long u64;

struct __align__(64) TensorMap { u64 words[16]; };
struct Sizes { u64 m, n, k, update, block, columns; };

#define FEATURES 128
#define ROWS 128
#define RUN 32
#define BOX_BYTES (64 * RUN * 2)
#define STAGE_BYTES (ROWS / 64 * BOX_BYTES)
#define MASK ((1u << BITS) - 1)

__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

__device__ __forceinline__ void wait(u32 barrier, u32 phase) {
    asm volatile("{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra ready;\n"
                 "bra again;\nready:\n}" ::"r"(barrier), "r"(phase) : "memory");
}

__device__ __forceinline__ void copy(u32 to, const TensorMap* map, u32 barrier, int row, int k) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
                 ::"r"(to), "l"(map), "r"(barrier), "r"(k), "r"(row), "r"(0) : "memory");
}

__device__ __forceinline__ u64 descriptor(u32 address) {
    return (u64)((address & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)((8 * RUN * 2) >> 4) << 32 | (u64)2 << 62;
}

__device__ __forceinline__ uint4 load4(const u32* from) { return __ldg((const uint4*)from); }
__device__ __forceinline__ u32 part(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// N neighbouring numbers of 16 bits.
template <int N> struct Halves {
    u32 words[N / 2];
    __device__ __forceinline__ void load(const unsigned short* from) {
        if constexpr (N == 8) {
            const uint4 v = __ldg((const uint4*)from);
            words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
        } else {
            const uint2 v = __ldg((const uint2*)from);
            words[0] = v.x, words[1] = v.y;
        }
    }
    __device__ __forceinline__ u32 twice(int i) const { return __byte_perm(words[i / 2], 0, i % 2 ? 0x3232 : 0x1010); }
};

#if TRANSPOSED
#define PARAMETERS 8
#else
#define PARAMETERS 4
#endif
// Words that one row of codes needs: a field of codes may straddle two.
#if TRANSPOSED
#define LINES (BITS == 3 ? 2 : 1)
#define RAW (2 * LINES)
#else
#define RAW (BITS == 8 || BITS == 3 ? 2 : 1)
#endif

struct Raw {
    uint4 words[RAW];
    Halves<PARAMETERS> scales;
#if OFFSETS
    Halves<PARAMETERS> offsets;
#endif
};

// Two codes, each in a half of `field` from bit `shift` on, as two weights.
__device__ __forceinline__ u32 weights(u32 field, int shift, u32 scales, u32 offsets) {
    // 1024 + code, exactly.
    const u32 codes = ((field >> shift) & (MASK | MASK << 16)) | 0x64006400u;
    u32 levels, result;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(levels) : "r"(codes), "r"(LEAST));
#if OFFSETS
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(levels), "r"(scales), "r"(offsets));
#else
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(levels), "r"(scales));
#endif
    return result;
}

extern "C" __global__ void __launch_bounds__(128, BLOCKS)
product(const __grid_constant__ TensorMap x_map,
#if UPDATE
        const __grid_constant__ TensorMap left_map,
#endif
        const u32* __restrict__ codes, const unsigned short* __restrict__ scales,
#if OFFSETS
        const unsigned short* __restrict__ offsets,
#endif
#if UPDATE
        const unsigned short* __restrict__ right,
#endif
        const float* __restrict__ factors, float* __restrict__ out, const __grid_constant__ Sizes sizes) {
    __shared__ __align__(1024) unsigned char tiles[STAGES * STAGE_BYTES];
    __shared__ __align__(8) u64 barriers[2 * STAGES];
    const u32 m = (u32)sizes.m, n = (u32)sizes.n, k = (u32)sizes.k;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 first_tile = shared_address(tiles), full = shared_address(barriers), empty = full + 8 * STAGES;

    const u32 high = (m + ROWS - 1) / ROWS, wide = (n + FEATURES - 1) / FEATURES;
    const u32 band = blockIdx.x / (BAND * wide), height = min(high - band * BAND, BAND);
    const u32 within = blockIdx.x - band * BAND * wide;
    const u32 row = (band * BAND + within % height) * ROWS, feature = within / height * FEATURES;
    // Two runs at a time: what lies past the last one arrives as zeros.
    const u32 runs_with_codes = (k + RUN - 1) / RUN, runs = (runs_with_codes + 1) / 2 * 2;
#if UPDATE
    const u32 steps = runs + ((u32)sizes.update + RUN - 1) / RUN;
#else
    const u32 steps = runs;
#endif

    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; stage++) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + 8 * stage) : "memory");
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 4;" ::"r"(empty + 8 * stage) : "memory");
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();

    auto fetch = [&](u32 step) {
        const u32 stage = step % STAGES, barrier = full + 8 * stage, tile = first_tile + stage * STAGE_BYTES;
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(STAGE_BYTES) : "memory");
        const TensorMap* map = &x_map;
        u32 inner = step * RUN;
#if UPDATE
        if (step >= runs) map = &left_map, inner -= runs * RUN;
#endif
#pragma unroll
        for (int box = 0; box < ROWS / 64; box++) copy(tile + box * BOX_BYTES, map, barrier, row + box * 64, inner);
    };
    if (threadIdx.x == 0)
        for (u32 step = 0; step < min(steps, (u32)STAGES); step++) fetch(step);
    // The tile before the last one is free, so that no warp waits for the others.
    auto refill = [&](u32 step) {
        if (threadIdx.x == (step & 3) * 32 && step >= 2) {
            const u32 next = step - 2 + STAGES;
            if (next < steps) {
                wait(empty + 8 * (next % STAGES), ((next / STAGES) & 1) ^ 1);
                fetch(next);
            }
        }
        __syncwarp();
    };

    // This thread's part of a fragment: 4 neighbouring features, and 8 neighbouring places of every run.
    const u32 g = lane / 4, q = lane % 4;
    const u32 first = feature + warp * 32 + g * 4;
    const u32 block = (u32)sizes.block, columns = (u32)sizes.columns;
#if TRANSPOSED
    // Features are inputs: a warp has one run of them.
    const u32 run_of_warp = min(feature + warp * 32, n - RUN) / RUN;
    const u32 word = 4 * BITS * g / 32, shift = 4 * BITS * g % 32;
    const u32* code_row = codes + (u64)(run_of_warp * BITS + word) * columns;
    const u32 next_word = BITS == 3 && word < 2 ? columns : 0;
    // Bytes of two words that hold this thread's codes.
    const u32 halves = BITS == 4 ? (g % 2 ? 0x7632 : 0x5410) : (g % 4) * 0x1111 + 0x4400;
    const u64 scale_row = (u64)(run_of_warp * RUN / block) * columns;
    auto load = [&](u32 run) {
        Raw raw;
        const u32 inner = min(run * RUN + q * 8, k - 8);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            raw.words[half * LINES] = load4(code_row + inner + half * 4);
            if constexpr (BITS == 3) raw.words[half * LINES + LINES - 1] = load4(code_row + next_word + inner + half * 4);
        }
        raw.scales.load(scales + scale_row + inner);
#if OFFSETS
        raw.offsets.load(offsets + scale_row + inner);
#endif
        return raw;
    };
#else
    // A run may lie in one block of scales only.
    const u32 shown = min(first, n - 4), runs_of_block = block / RUN;
    const u32 word = 8 * BITS * q / 32, shift = 8 * BITS * q % 32;
    const u32* code_row = codes + (u64)word * columns + shown;
    const u32 next_word = BITS == 8 ? columns : BITS == 3 && word < 2 ? columns : 0;
    const u32 halves = q % 2 ? 0x3322 : 0x1100;
    u32 in_block = 0;
    const unsigned short* scale_row = scales + shown;
#if OFFSETS
    const unsigned short* offset_row = offsets + shown;
#endif
    auto load = [&](u32 run) {
        Raw raw;
        raw.words[0] = load4(code_row);
        if constexpr (RAW == 2) raw.words[RAW - 1] = load4(code_row + next_word);
        raw.scales.load(scale_row);
#if OFFSETS
        raw.offsets.load(offset_row);
#endif
        if (run + 1 < runs_with_codes) {
            code_row += BITS * columns;
            if (++in_block == runs_of_block) {
                in_block = 0, scale_row += columns;
#if OFFSETS
                offset_row += columns;
#endif
            }
        }
        return raw;
    };
#endif
    // Two steps of 16, two halves of the features, and a fragment's four registers.
    auto unpack = [&](const Raw& raw, u32 (&a)[2][2][4]) {
#if TRANSPOSED
#pragma unroll
        for (int p = 0; p < 4; p++) {
            const int at = 2 * p;
            u32 first_field = part(raw.words[at / 4 * LINES], at % 4), second_field = part(raw.words[at / 4 * LINES], at % 4 + 1);
            if constexpr (BITS == 3) {
                first_field = __funnelshift_r(first_field, part(raw.words[at / 4 * LINES + LINES - 1], at % 4), shift);
                second_field = __funnelshift_r(second_field, part(raw.words[at / 4 * LINES + LINES - 1], at % 4 + 1), shift);
            }
            const u32 both = __byte_perm(first_field, second_field, BITS == 4 || BITS == 2 ? halves : 0x5410);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                u32 field = both;
                if constexpr (BITS == 8) field = __byte_perm(first_field, second_field, j | j << 4 | (4 + j) << 8 | (4 + j) << 12);
#if OFFSETS
                const u32 offset = raw.offsets.words[p];
#else
                const u32 offset = 0;
#endif
                a[p / 2][j / 2][p % 2 * 2 + j % 2] = weights(field, BITS == 8 ? 0 : BITS * j, raw.scales.words[p], offset);
            }
        }
#else
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 field = part(raw.words[0], j);
            if constexpr (BITS == 3) {
                field = __funnelshift_r(field, part(raw.words[RAW - 1], j), shift);
                field = (field & 0xFFFF) | (field << 4 & 0xFFFF0000u);
            }
            if constexpr (BITS == 2) field = __byte_perm(field, 0, halves);
            const u32 scale = raw.scales.twice(j);
#if OFFSETS
            const u32 offset = raw.offsets.twice(j);
#else
            const u32 offset = 0;
#endif
#pragma unroll
            for (int p = 0; p < 4; p++) {
                u32 of_pair = field;
                if constexpr (BITS == 8) of_pair = __byte_perm(field, part(raw.words[RAW - 1], j), p | p << 4 | (4 + p) << 8 | (4 + p) << 12);
                a[p / 2][j / 2][p % 2 * 2 + j % 2] = weights(of_pair, BITS == 8 ? 0 : BITS * p, scale, offset);
            }
        }
#endif
    };

    float sums[2][ROWS / 2];
#pragma unroll
    for (int t = 0; t < 2; t++)
#pragma unroll
        for (int i = 0; i < ROWS / 2; i++) sums[t][i] = 0.0f;

    auto tile_of = [&](u32 step) {
        wait(full + 8 * (step % STAGES), step / STAGES & 1);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        return descriptor(first_tile + step % STAGES * STAGE_BYTES);
    };
    auto release = [&](u32 step) {
        if (lane == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty + 8 * (step % STAGES)) : "memory");
    };
#if UPDATE
    auto unpack_update = [&](u32 inner, u32 (&a)[2][2][4]) {
        const u32 shown_here = min(first, n - 4);
#pragma unroll
        for (int s = 0; s < 2; s++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                uint2 v[2];
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const u32 at = min(inner + s * 16 + e * 8 + q * 2 + c, (u32)sizes.update - 1);
                    v[c] = __ldg((const uint2*)(right + (u64)at * n + shown_here));
                }
                a[s][0][e * 2] = __byte_perm(v[0].x, v[1].x, 0x5410);
                a[s][0][e * 2 + 1] = __byte_perm(v[0].x, v[1].x, 0x7632);
                a[s][1][e * 2] = __byte_perm(v[0].y, v[1].y, 0x5410);
                a[s][1][e * 2 + 1] = __byte_perm(v[0].y, v[1].y, 0x7632);
            }
    };
#endif

    Raw raw = load(0);
    u32 a[2][2][2][4];
    for (u32 step = 0; step < runs; step += 2) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 at = step + half;
#if NOUNPACK
            if (step == 0) unpack(raw, a[half]);
#else
            unpack(raw, a[half]);
            raw = load(at + 1);
#endif
            const u64 b = tile_of(at);
#pragma unroll
            for (int s = 0; s < 2; s++)
#pragma unroll
                for (int t = 0; t < 2; t++) MULTIPLY(sums[t], a[half][s][t], b + s * (32 >> 4));
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            if (at > 0) release(at - 1);
            refill(at);
        }
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    release(runs - 1);
#if UPDATE
    for (u32 step = runs; step < steps; step++) {
        unpack_update((step - runs) * RUN, a[0]);
        const u64 b = tile_of(step);
#pragma unroll
        for (int s = 0; s < 2; s++)
#pragma unroll
            for (int t = 0; t < 2; t++) MULTIPLY_UPDATE(sums[t], a[0][s][t], b + s * (32 >> 4));
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        release(step);
        refill(step);
    }
#endif

    if (first >= n) return;
#pragma unroll
    for (int b = 0; b < ROWS / 8; b++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const u32 r = row + b * 8 + q * 2 + e;
            if (r < (NOSTORE ? m - 4095 : m)) {
                const float f = __ldg(factors + r);
                const float4 v = make_float4(sums[0][b * 4 + e] * f, sums[0][b * 4 + 2 + e] * f, sums[1][b * 4 + e] * f, sums[1][b * 4 + 2 + e] * f);
                *(float4*)(out + (u64)r * n + first) = v;
            }
        }
}
