//! Unpacking kernels: a tile to dense f32, and one row times a packed matrix in both directions.

use super::simd::{LANES, Lanes, dispatch};
use crate::{Grid, Value, packing::RUN};

/// Inputs of the only blocks smaller than a run that the kernels of one row take: two to a run.
pub(super) const HALF: usize = RUN / 2;

/// How codes become levels: a table of up to 4 bits, a subtraction beyond.
#[derive(Clone, Copy)]
pub(super) struct Levels {
    pub table: [f32; LANES],
    /// The code whose level is zero, where levels are codes less a constant.
    pub center: f32,
    pub bits: u32,
    /// Whether levels are codes less `center`.
    pub affine: bool,
}

impl Levels {
    pub(super) fn new(value: Value) -> Self {
        let bits = value.bits();
        let center = match value {
            Value::Affine { grid: Grid::Symmetric, .. } => f32::from(1u8 << (bits - 1)),
            _ => 0.0,
        };
        let table = match value {
            Value::Codebook(codebook) => codebook.table16(),
            Value::Affine { .. } => std::array::from_fn(|i| (i % (1 << bits)) as f32 - center),
        };
        Self { table, center, bits, affine: matches!(value, Value::Affine { .. }) }
    }

    /// The level of one code.
    #[inline(always)]
    pub(super) fn of(&self, code: u32) -> f32 {
        if self.bits > 4 { code as f32 - self.center } else { self.table[code as usize % LANES] }
    }
}

/// A rectangle of a packed weight: inputs `k0..k1` (`k0` a multiple of 32), `columns` outputs. All pointers stand
/// at the rectangle's first output; scales and offsets at the row of the block that holds `k0`.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub words: *const u32,
    /// Words between two code rows.
    pub word_stride: usize,
    pub scales: *const f32,
    /// Null without offsets.
    pub offsets: *const f32,
    /// Values between two block rows.
    pub scale_stride: usize,
    pub k0: usize,
    pub k1: usize,
    pub columns: usize,
    /// Inputs per block.
    pub inputs: usize,
    pub levels: Levels,
}

/// The word row where code `j` of a run starts, its shift, and whether it straddles.
#[inline(always)]
const fn place(j: usize, bits: u32) -> (usize, u32, bool) {
    let bit = j * bits as usize;
    let shift = (bit % 32) as u32;
    (bit / 32, shift, shift + bits > 32)
}

/// Level of code `j` of a run in 16 lanes, given the run's words.
#[inline(always)]
fn level<L: Lanes, const BITS: u32>(words: &[L::Words; 8], table: L::Table, center: L, j: usize) -> L {
    let (row, shift, straddles) = place(j, BITS);
    let (words, shift) = match straddles {
        true => (L::straddle(words[row], words[row + 1], shift), 0),
        false => (words[row], shift),
    };
    if BITS > 4 { L::code(words, shift, (1 << BITS) - 1).sub(center) } else { L::lookup(table, words, shift) }
}

/// The `BITS` words of a run in 16 lanes.
///
/// # Safety
/// `at` must be readable for 16 words in each of `BITS` rows `stride` apart.
#[inline(always)]
unsafe fn run_words<L: Lanes, const BITS: u32>(at: *const u32, stride: usize) -> [L::Words; 8] {
    // SAFETY: rows beyond the run's own repeat its last one, so no other row is read.
    std::array::from_fn(|row| unsafe { L::words(at.add(row.min(BITS as usize - 1) * stride)) })
}

/// Repeats a statement for `$j` in 0..8, unrolled with a constant.
macro_rules! unroll8 {
    ($j:ident => $body:block) => {{
        const $j: usize = 0;
        $body
    }
    {
        const $j: usize = 1;
        $body
    }
    {
        const $j: usize = 2;
        $body
    }
    {
        const $j: usize = 3;
        $body
    }
    {
        const $j: usize = 4;
        $body
    }
    {
        const $j: usize = 5;
        $body
    }
    {
        const $j: usize = 6;
        $body
    }
    {
        const $j: usize = 7;
        $body
    }};
}

/// Calls `$name::<L, BITS>` for the width in `$bits`.
macro_rules! by_bits {
    ($bits:expr, $name:ident, $($arg:expr),*) => {
        match $bits {
            2 => $name::<L, 2>($($arg),*),
            3 => $name::<L, 3>($($arg),*),
            4 => $name::<L, 4>($($arg),*),
            5 => $name::<L, 5>($($arg),*),
            6 => $name::<L, 6>($($arg),*),
            _ => $name::<L, 8>($($arg),*),
        }
    };
}

/// Writes the dense tile: row `k - k0`, column `c` at `out + (k - k0) * stride + c`.
///
/// # Safety
/// The tile's pointers must be readable as its fields say, and `out` writable for `k1 - k0` rows of `columns` values,
/// `stride` apart.
pub(super) unsafe fn decode(tile: &Tile, out: *mut f32, stride: usize) {
    #[inline(always)]
    fn any<L: Lanes>(tile: &Tile, out: *mut f32, stride: usize) {
        // SAFETY: `decode`'s contract, passed on unchanged.
        unsafe { by_bits!(tile.levels.bits, decode_lanes, tile, out, stride) }
    }
    dispatch!(any(tile: &Tile, out: *mut f32, stride: usize))
}

#[inline(always)]
unsafe fn decode_lanes<L: Lanes, const BITS: u32>(tile: &Tile, out: *mut f32, stride: usize) {
    let vectors = tile.columns / LANES;
    let (table, center) = (L::table(&tile.levels.table), L::splat(tile.levels.center));
    let first_block = tile.k0 / tile.inputs;
    for k in (tile.k0..tile.k1).step_by(RUN) {
        let count = RUN.min(tile.k1 - k);
        // Row of the block of each code of this run, as an offset into the scales.
        let blocks: [usize; RUN] =
            std::array::from_fn(|j| ((k + j.min(count - 1)) / tile.inputs - first_block) * tile.scale_stride);
        let one_block = blocks[0] == blocks[RUN - 1];
        // SAFETY: all offsets stay inside the rectangle that `decode`'s contract covers.
        unsafe {
            let words = tile.words.add((k - tile.k0) / RUN * BITS as usize * tile.word_stride);
            let out = out.add((k - tile.k0) * stride);
            for c in (0..vectors * LANES).step_by(LANES) {
                let run = run_words::<L, BITS>(words.add(c), tile.word_stride);
                let parameters = |block: usize| {
                    let offset = if tile.offsets.is_null() {
                        L::splat(0.0)
                    } else {
                        L::load(tile.offsets.add(block + c))
                    };
                    (L::load(tile.scales.add(block + c)), offset)
                };
                let (mut scale, mut offset) = parameters(blocks[0]);
                if one_block && count == RUN {
                    macro_rules! quarter { ($q:literal) => { unroll8!(J => {
                        let value = level::<L, BITS>(&run, table, center, $q * 8 + J);
                        value.mul(scale).add(offset).store(out.add(($q * 8 + J) * stride + c));
                    }) } }
                    quarter!(0);
                    quarter!(1);
                    quarter!(2);
                    quarter!(3);
                } else if tile.inputs == HALF && count == RUN {
                    let second = parameters(blocks[HALF]);
                    macro_rules! quarter { ($q:literal) => { unroll8!(J => {
                        let value = level::<L, BITS>(&run, table, center, $q * 8 + J);
                        let (scale, offset) = if $q < 2 { (scale, offset) } else { second };
                        value.mul(scale).add(offset).store(out.add(($q * 8 + J) * stride + c));
                    }) } }
                    quarter!(0);
                    quarter!(1);
                    quarter!(2);
                    quarter!(3);
                } else if count == RUN {
                    macro_rules! quarter { ($q:literal) => { unroll8!(J => {
                        const AT: usize = $q * 8 + J;
                        if AT > 0 && blocks[AT] != blocks[AT.saturating_sub(1)] {
                            (scale, offset) = parameters(blocks[AT]);
                        }
                        let value = level::<L, BITS>(&run, table, center, AT);
                        value.mul(scale).add(offset).store(out.add(AT * stride + c));
                    }) } }
                    quarter!(0);
                    quarter!(1);
                    quarter!(2);
                    quarter!(3);
                } else {
                    for j in 0..count {
                        if j > 0 && blocks[j] != blocks[j - 1] {
                            (scale, offset) = parameters(blocks[j]);
                        }
                        let value = level::<L, BITS>(&run, table, center, j);
                        value.mul(scale).add(offset).store(out.add(j * stride + c));
                    }
                }
            }
            for c in vectors * LANES..tile.columns {
                for (j, &block) in blocks[..count].iter().enumerate() {
                    let scale = *tile.scales.add(block + c);
                    let offset = if tile.offsets.is_null() { 0.0 } else { *tile.offsets.add(block + c) };
                    let value = scalar_level::<BITS>(tile, words.add(c), j) * scale + offset;
                    *out.add(j * stride + c) = value;
                }
            }
        }
    }
}

/// Level of code `j` of the run whose first word is at `words`, one lane.
///
/// # Safety
/// As for [`run_words`], for one word.
#[inline(always)]
unsafe fn scalar_level<const BITS: u32>(tile: &Tile, words: *const u32, j: usize) -> f32 {
    let (row, shift, straddles) = place(j, BITS);
    // SAFETY: a code lies inside the `BITS` rows of its run.
    let code = unsafe {
        let mut code = *words.add(row * tile.word_stride) >> shift;
        if straddles {
            code |= *words.add((row + 1) * tile.word_stride) << (32 - shift);
        }
        code & ((1 << BITS) - 1)
    };
    tile.levels.of(code)
}

/// `y[c] += sum over k of x[k] * w[k, c]` for the tile, whose blocks must be whole runs (or one block in all), or half
/// ones.
///
/// `x` stands at input `k0` and must hold whole runs, zero beyond `k1`; `block_sums` holds the sum of `x` over each
/// block; `raw` is scratch of `columns` values.
///
/// # Safety
/// The tile's pointers must be readable as its fields say; `x` for whole runs, `block_sums` for every block, `y` and
/// `raw` writable for `columns` values.
pub(super) unsafe fn row_times(
    tile: &Tile,
    x: *const f32,
    block_sums: *const f32,
    y: *mut f32,
    raw: *mut f32,
) {
    #[inline(always)]
    fn any<L: Lanes>(tile: &Tile, x: *const f32, block_sums: *const f32, y: *mut f32, raw: *mut f32) {
        // SAFETY: `row_times`' contract, passed on unchanged.
        unsafe {
            if tile.inputs == HALF && tile.k1 - tile.k0 > HALF {
                by_bits!(tile.levels.bits, row_times_half_runs, tile, x, block_sums, y)
            } else {
                by_bits!(tile.levels.bits, row_times_lanes, tile, x, block_sums, y, raw)
            }
        }
    }
    dispatch!(any(tile: &Tile, x: *const f32, block_sums: *const f32, y: *mut f32, raw: *mut f32))
}

#[inline(always)]
unsafe fn row_times_lanes<L: Lanes, const BITS: u32>(
    tile: &Tile,
    x: *const f32,
    block_sums: *const f32,
    y: *mut f32,
    raw: *mut f32,
) {
    let vectors = tile.columns / LANES * LANES;
    let (table, center) = (L::table(&tile.levels.table), L::splat(tile.levels.center));
    let mut block = 0;
    let mut k = tile.k0;
    while k < tile.k1 {
        let end = tile.k1.min((k / tile.inputs + 1) * tile.inputs);
        // SAFETY: all offsets stay inside what `row_times`' contract covers.
        unsafe {
            for start in (k..end).step_by(RUN) {
                let words = tile.words.add((start - tile.k0) / RUN * BITS as usize * tile.word_stride);
                let x = x.add(start - tile.k0);
                for c in (0..vectors).step_by(LANES) {
                    let run = run_words::<L, BITS>(words.add(c), tile.word_stride);
                    // Four sums hide the latency of the additions.
                    let mut sums = [L::splat(0.0); 4];
                    if start > k {
                        sums[0] = L::load(raw.add(c));
                    }
                    macro_rules! quarter { ($q:literal) => { unroll8!(J => {
                        let value = level::<L, BITS>(&run, table, center, $q * 8 + J);
                        sums[J % 4] = value.mul_add(L::splat(*x.add($q * 8 + J)), sums[J % 4]);
                    }) } }
                    quarter!(0);
                    quarter!(1);
                    quarter!(2);
                    quarter!(3);
                    sums[0].add(sums[1]).add(sums[2].add(sums[3])).store(raw.add(c));
                }
                for c in vectors..tile.columns {
                    let mut sum = if start > k { *raw.add(c) } else { 0.0 };
                    for j in 0..RUN {
                        sum += *x.add(j) * scalar_level::<BITS>(tile, words.add(c), j);
                    }
                    *raw.add(c) = sum;
                }
            }
            let scales = tile.scales.add(block * tile.scale_stride);
            for c in (0..vectors).step_by(LANES) {
                let sum = L::load(raw.add(c)).mul_add(L::load(scales.add(c)), L::load(y.add(c)));
                sum.store(y.add(c));
            }
            for c in vectors..tile.columns {
                *y.add(c) += *raw.add(c) * *scales.add(c);
            }
            if !tile.offsets.is_null() {
                let (offsets, x_sum) = (tile.offsets.add(block * tile.scale_stride), *block_sums.add(block));
                for c in (0..vectors).step_by(LANES) {
                    let sum = L::splat(x_sum).mul_add(L::load(offsets.add(c)), L::load(y.add(c)));
                    sum.store(y.add(c));
                }
                for c in vectors..tile.columns {
                    *y.add(c) += x_sum * *offsets.add(c);
                }
            }
        }
        (k, block) = (end, block + 1);
    }
}

/// As [`row_times`], for blocks of half a run.
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn row_times_half_runs<L: Lanes, const BITS: u32>(
    tile: &Tile,
    x: *const f32,
    block_sums: *const f32,
    y: *mut f32,
) {
    let vectors = tile.columns / LANES * LANES;
    let (table, center) = (L::table(&tile.levels.table), L::splat(tile.levels.center));
    for (run, k) in (tile.k0..tile.k1).step_by(RUN).enumerate() {
        // The last run may be half a one: its second block then isn't there.
        let halves = (tile.k1 - k).div_ceil(HALF).min(2);
        // SAFETY: all offsets stay inside what `row_times`' contract covers; `x` is zero beyond `k1`.
        unsafe {
            let words = tile.words.add(run * BITS as usize * tile.word_stride);
            let x = x.add(run * RUN);
            let block = |half: usize| (2 * run + half.min(halves - 1)) * tile.scale_stride;
            let offset = |half: usize, c: usize| L::load(tile.offsets.add(block(half) + c));
            let block_sum = |half: usize| if half < halves { *block_sums.add(2 * run + half) } else { 0.0 };
            for c in (0..vectors).step_by(LANES) {
                let words = run_words::<L, BITS>(words.add(c), tile.word_stride);
                let mut sum = L::load(y.add(c));
                // Two sums for each half hide the latency of the additions.
                let mut sums = [L::splat(0.0); 4];
                macro_rules! quarter { ($q:literal) => { unroll8!(J => {
                    let value = level::<L, BITS>(&words, table, center, $q * 8 + J);
                    let at = $q / 2 * 2 + J % 2;
                    sums[at] = value.mul_add(L::splat(*x.add($q * 8 + J)), sums[at]);
                }) } }
                quarter!(0);
                quarter!(1);
                quarter!(2);
                quarter!(3);
                for half in 0..2 {
                    let scale = L::load(tile.scales.add(block(half) + c));
                    sum = sums[2 * half].add(sums[2 * half + 1]).mul_add(scale, sum);
                    if !tile.offsets.is_null() {
                        sum = L::splat(block_sum(half)).mul_add(offset(half, c), sum);
                    }
                }
                sum.store(y.add(c));
            }
            for c in vectors..tile.columns {
                for half in 0..halves {
                    let mut sum = 0.0;
                    for j in half * HALF..(half + 1) * HALF {
                        sum += *x.add(j) * scalar_level::<BITS>(tile, words.add(c), j);
                    }
                    *y.add(c) += sum * *tile.scales.add(block(half) + c);
                    if !tile.offsets.is_null() {
                        *y.add(c) += block_sum(half) * *tile.offsets.add(block(half) + c);
                    }
                }
            }
        }
    }
}

/// `dx[k] = sum over c of dy[c] * level[k, c] * scale[c] + dy[c] * offset[c]` for a tile inside one block row, whose
/// `inputs` are whole runs (or one block in all), or for one run of two blocks. `scaled` is scratch of twice `columns`
/// values.
///
/// # Safety
/// The tile's pointers must be readable as its fields say; `dy` for `columns` values; `dx` writable for `k1 - k0`,
/// `scaled` for twice `columns`.
pub(super) unsafe fn row_times_transposed(tile: &Tile, dy: *const f32, dx: *mut f32, scaled: *mut f32) {
    #[inline(always)]
    fn any<L: Lanes>(tile: &Tile, dy: *const f32, dx: *mut f32, scaled: *mut f32) {
        // SAFETY: `row_times_transposed`'s contract, passed on unchanged.
        unsafe {
            match (tile.levels.bits, tile.levels.affine) {
                (2, true) => row_times_transposed_lanes::<L, 2, true>(tile, dy, dx, scaled),
                (4, true) => row_times_transposed_lanes::<L, 4, true>(tile, dy, dx, scaled),
                (8, true) => row_times_transposed_lanes::<L, 8, true>(tile, dy, dx, scaled),
                (2, false) => row_times_transposed_lanes::<L, 2, false>(tile, dy, dx, scaled),
                (5, _) => row_times_transposed_lanes::<L, 5, false>(tile, dy, dx, scaled),
                (6, _) => row_times_transposed_lanes::<L, 6, false>(tile, dy, dx, scaled),
                (3, _) => row_times_transposed_lanes::<L, 3, false>(tile, dy, dx, scaled),
                _ => row_times_transposed_lanes::<L, 4, false>(tile, dy, dx, scaled),
            }
        }
    }
    dispatch!(any(tile: &Tile, dy: *const f32, dx: *mut f32, scaled: *mut f32))
}

/// `MASKED` takes codes where they stand in their words, times a power of two that is taken off the sums: fewer
/// instructions than looking levels up, for codes that are levels less a constant and straddle no word. Values of
/// `dy * scale` from 2^96 on overflow.
#[inline(always)]
unsafe fn row_times_transposed_lanes<L: Lanes, const BITS: u32, const MASKED: bool>(
    tile: &Tile,
    dy: *const f32,
    dx: *mut f32,
    scaled: *mut f32,
) {
    let vectors = tile.columns / LANES * LANES;
    let (table, center) = (L::table(&tile.levels.table), L::splat(tile.levels.center));
    // SAFETY: all offsets stay inside what `row_times_transposed`'s contract covers.
    unsafe {
        let center_of_sums = if MASKED { tile.levels.center } else { 0.0 };
        // Of the block of each half of a run; of the same one where a run is inside a block.
        let halves = if tile.inputs == HALF { (tile.k1 - tile.k0).div_ceil(HALF) } else { 1 };
        let mut constants = [0.0; 2];
        for (half, constant) in constants.iter_mut().enumerate().take(halves) {
            *constant = scale_row::<L>(tile, half, dy, scaled.add(half * tile.columns), center_of_sums);
        }
        for k in (tile.k0..tile.k1).step_by(RUN) {
            let words = tile.words.add((k - tile.k0) / RUN * BITS as usize * tile.word_stride);
            macro_rules! quarter { ($q:literal) => {
                let half = ($q / 2).min(halves - 1);
                let scaled = scaled.add(half * tile.columns);
                let mut sums = [L::splat(0.0); 8];
                for c in (0..vectors).step_by(LANES) {
                    let run = run_words::<L, BITS>(words.add(c), tile.word_stride);
                    let weight = L::load(scaled.add(c));
                    unroll8!(J => {
                        let value = if MASKED {
                            let (row, shift, _) = place($q * 8 + J, BITS);
                            L::masked(run[row], ((1 << BITS) - 1) << shift)
                        } else {
                            level::<L, BITS>(&run, table, center, $q * 8 + J)
                        };
                        sums[J] = value.mul_add(weight, sums[J]);
                    });
                }
                for j in $q * 8..RUN.min(tile.k1 - k).min($q * 8 + 8) {
                    let mut sum = sums[j % 8].sum();
                    if MASKED {
                        // Exact: a power of two.
                        sum /= (1u32 << place(j, BITS).1) as f32;
                    }
                    sum += constants[half];
                    for c in vectors..tile.columns {
                        let level = scalar_level::<BITS>(tile, words.add(c), j);
                        sum += *scaled.add(c) * if MASKED { level + tile.levels.center } else { level };
                    }
                    *dx.add(k - tile.k0 + j) = sum;
                }
            } }
            quarter!(0);
            quarter!(1);
            quarter!(2);
            quarter!(3);
        }
    }
}

/// Writes `dy * scale` for each column to `scaled`, and sums `dy * (offset - center * scale)`, with the tile's block row
/// `block`.
///
/// # Safety
/// As for [`row_times_transposed`].
#[inline(always)]
unsafe fn scale_row<L: Lanes>(
    tile: &Tile,
    block: usize,
    dy: *const f32,
    scaled: *mut f32,
    center: f32,
) -> f32 {
    let vectors = tile.columns / LANES * LANES;
    // SAFETY: all offsets stay inside what `row_times_transposed`'s contract covers.
    unsafe {
        let tile = &Tile {
            scales: tile.scales.add(block * tile.scale_stride),
            offsets: match tile.offsets.is_null() {
                true => tile.offsets,
                false => tile.offsets.add(block * tile.scale_stride),
            },
            ..*tile
        };
        let (mut offsets, mut scales) = (L::splat(0.0), L::splat(0.0));
        for c in (0..vectors).step_by(LANES) {
            let dy = L::load(dy.add(c));
            let product = dy.mul(L::load(tile.scales.add(c)));
            product.store(scaled.add(c));
            scales = scales.add(product);
            if !tile.offsets.is_null() {
                offsets = dy.mul_add(L::load(tile.offsets.add(c)), offsets);
            }
        }
        let (mut offsets, mut scales) = (offsets.sum(), scales.sum());
        for c in vectors..tile.columns {
            *scaled.add(c) = *dy.add(c) * *tile.scales.add(c);
            scales += *scaled.add(c);
            if !tile.offsets.is_null() {
                offsets += *dy.add(c) * *tile.offsets.add(c);
            }
        }
        offsets - center * scales
    }
}
