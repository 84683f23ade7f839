// out[z] = a[z] * b[z] on the matrix units of compute capability 9.0: operands of 16 bits, sums in f32. With UPDATE: out = a * b
// + left * right, of other operands that are laid out alike.
//
// A block makes a tile of TILE_M x TILE_N. Two warp groups multiply, 64 rows each; one warp copies tiles of the operands
// into shared memory in bulk, STAGES ahead. What lies past an operand's end arrives as zeros. Above these lines stand the
// definitions that differ from kernel to kernel: tiles, stages, layouts, MULTIPLY and store.
typedef unsigned int u32;
typedef unsigned long long u64;

struct __align__(64) TensorMap { u64 words[16]; };
struct Sizes { u64 m, n, k, update; };

#define WARPS (TILE_M / 16)
// A box is what one copy brings: 64 rows or columns of an operand, TILE_K of the inner dimension.
#define BOX_BYTES (64 * TILE_K * 2)
#define A_BYTES (TILE_M / 64 * BOX_BYTES)
#define STAGE_BYTES (A_BYTES + TILE_N / 64 * BOX_BYTES)
// Distance in bytes of 16 of the inner dimension inside a box.
#define STEP(INNER_CONTIGUOUS) (INNER_CONTIGUOUS ? 32 : 16 * 128)

__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

__device__ __forceinline__ void wait(u32 barrier, u32 phase) {
    asm volatile("{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra ready;\n"
                 "bra again;\nready:\n}" ::"r"(barrier), "r"(phase) : "memory");
}

template <bool INNER_CONTIGUOUS>
__device__ __forceinline__ void copy(u32 to, const TensorMap* map, u32 barrier, int row, int k, int z) {
    const int x = INNER_CONTIGUOUS ? k : row, y = INNER_CONTIGUOUS ? row : k;
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
                 ::"r"(to), "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z) : "memory");
}

// What the matrix unit is told of a tile: its address, the distances of boxes and of 8 rows, and how rows are swizzled.
template <bool INNER_CONTIGUOUS>
__device__ __forceinline__ u64 descriptor(u32 address) {
    const u64 boxes = INNER_CONTIGUOUS ? 1 : BOX_BYTES >> 4;
    const u64 rows = INNER_CONTIGUOUS ? (8 * TILE_K * 2) >> 4 : (8 * 128) >> 4;
    const u64 swizzle = INNER_CONTIGUOUS ? 2 /* 64 bytes */ : 1 /* 128 bytes */;
    return (u64)((address & 0x3FFFF) >> 4) | boxes << 16 | rows << 32 | swizzle << 62;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32 + 32, 2)
product(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
#if UPDATE
        const __grid_constant__ TensorMap left_map, const __grid_constant__ TensorMap right_map,
#endif
        RESULT* __restrict__ out, const __grid_constant__ Sizes sizes) {
    __shared__ __align__(1024) unsigned char tiles[STAGES * STAGE_BYTES];
    __shared__ __align__(8) u64 barriers[2 * STAGES];
    const u32 m = (u32)sizes.m, n = (u32)sizes.n, k = (u32)sizes.k;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 first_tile = shared_address(tiles), full = shared_address(barriers), empty = full + 8 * STAGES;

    // Blocks that run together share rows and columns: BAND rows of tiles at a time.
    const u32 high = (m + TILE_M - 1) / TILE_M, wide = (n + TILE_N - 1) / TILE_N;
    const u32 band = blockIdx.x / (BAND * wide), height = min(high - band * BAND, BAND);
    const u32 within = blockIdx.x - band * BAND * wide;
    const u32 row = (band * BAND + within % height) * TILE_M, column = within / height * TILE_N;
    const u32 z = blockIdx.z, steps_of_product = (k + TILE_K - 1) / TILE_K;
#if UPDATE
    const u32 steps = steps_of_product + ((u32)sizes.update + TILE_K - 1) / TILE_K;
#else
    const u32 steps = steps_of_product;
#endif

    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; stage++) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + 8 * stage) : "memory");
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty + 8 * stage), "r"(WARPS) : "memory");
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();

    if (warp == WARPS) {
        if (lane != 0) return;
        for (u32 step = 0; step < steps; step++) {
            const u32 stage = step % STAGES, round = step / STAGES;
            const u32 barrier = full + 8 * stage, tile = first_tile + stage * STAGE_BYTES;
            wait(empty + 8 * stage, (round & 1) ^ 1);
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(STAGE_BYTES) : "memory");
            const TensorMap *a = &a_map, *b = &b_map;
            u32 inner = step * TILE_K;
#if UPDATE
            if (step >= steps_of_product) a = &left_map, b = &right_map, inner -= steps_of_product * TILE_K;
#endif
#pragma unroll
            for (int box = 0; box < TILE_M / 64; box++)
                copy<A_INNER>(tile + box * BOX_BYTES, a, barrier, row + box * 64, inner, z);
#pragma unroll
            for (int box = 0; box < TILE_N / 64; box++)
                copy<B_INNER>(tile + A_BYTES + box * BOX_BYTES, b, barrier, column + box * 64, inner, z);
        }
        return;
    }

    const int group = warp / 4;
    float sums[TILE_N / 2];
#pragma unroll
    for (int i = 0; i < TILE_N / 2; i++) sums[i] = 0.0f;
    for (u32 step = 0; step < steps; step++) {
        const u32 stage = step % STAGES, round = step / STAGES;
        wait(full + 8 * stage, round & 1);
        const u32 tile = first_tile + stage * STAGE_BYTES;
        const u64 a = descriptor<A_INNER>(tile + group * BOX_BYTES), b = descriptor<B_INNER>(tile + A_BYTES);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int inner = 0; inner < TILE_K / 16; inner++) {
            const u64 a_step = a + (u64)(inner * STEP(A_INNER) >> 4), b_step = b + (u64)(inner * STEP(B_INNER) >> 4);
            MULTIPLY(sums, a_step, b_step);
        }
        asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
        if (lane == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty + 8 * stage) : "memory");
    }

    const u32 first_row = row + group * 64 + warp % 4 * 16 + lane / 4, first_column = column + lane % 4 * 2;
    out += (u64)z * m * n;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const u32 r = first_row + half * 8;
        if (r >= m) continue;
#pragma unroll
        for (int block = 0; block < TILE_N / 8; block++) {
            const u32 c = first_column + block * 8;
            if (c < n) store(out + (u64)r * n + c, sums[block * 4 + half * 2], sums[block * 4 + half * 2 + 1]);
        }
    }
}
