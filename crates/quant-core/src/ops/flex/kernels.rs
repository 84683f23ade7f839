//! Unpacking kernels: a tile to dense f32, and one row times a packed matrix in both directions.

use super::{
    simd::{LANES, Lanes, dispatch},
    stored::{Rows, Stored},
};
use crate::{Grid, Value, packing::RUN};

/// Inputs of the smallest blocks that the kernels of one row take.
const SMALLEST: usize = 4;

/// Whether blocks of so many inputs begin and end with runs, or runs with blocks, as the kernels of one row need.
pub(super) fn fits_runs(inputs: usize, d_input: usize) -> bool {
    inputs.is_multiple_of(RUN) || inputs >= d_input || (inputs >= SMALLEST && RUN.is_multiple_of(inputs))
}

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
/// at the rectangle's first output.
#[derive(Clone, Copy)]
pub(super) struct Tile<'a> {
    pub words: *const u32,
    /// Words between two code rows.
    pub word_stride: usize,
    /// Scales of the whole weight.
    pub scales: &'a Stored<'a>,
    /// Offsets of the whole weight.
    pub offsets: Option<&'a Stored<'a>>,
    /// The rectangle's first output.
    pub n0: usize,
    pub k0: usize,
    pub k1: usize,
    pub columns: usize,
    /// Inputs per block.
    pub inputs: usize,
    pub levels: Levels,
}

/// Room for scales and for offsets, kept by who calls.
pub(super) type Scratch = [Vec<f32>; 2];

impl Tile<'_> {
    /// Scales, and offsets where there are any, of `count` blocks of inputs, counted from the one that holds `k0`.
    fn rows(&self, first: usize, count: usize, scratch: &mut Scratch) -> (Rows, Option<Rows>) {
        let (at, size) = ([self.k0 / self.inputs + first, self.n0], [count, self.columns]);
        let [scales, offsets] = scratch;
        (self.scales.rows(at, size, scales), self.offsets.map(|stored| stored.rows(at, size, offsets)))
    }

    /// [`Self::rows`] of all its blocks.
    pub(super) fn all_rows(&self, scratch: &mut Scratch) -> (Rows, Option<Rows>) {
        self.rows(0, (self.k1 - 1) / self.inputs - self.k0 / self.inputs + 1, scratch)
    }
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

/// Calls `$name::<L, BITS>`, or `$name::<L, BITS, $parts>`, for the width in `$bits`.
macro_rules! by_bits {
    ($bits:expr, $name:ident, $parts:literal, $($arg:expr),*) => {
        match $bits {
            2 => $name::<L, 2, $parts>($($arg),*),
            3 => $name::<L, 3, $parts>($($arg),*),
            4 => $name::<L, 4, $parts>($($arg),*),
            5 => $name::<L, 5, $parts>($($arg),*),
            6 => $name::<L, 6, $parts>($($arg),*),
            _ => $name::<L, 8, $parts>($($arg),*),
        }
    };
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
pub(super) unsafe fn decode(tile: &Tile, out: *mut f32, stride: usize, scratch: &mut Scratch) {
    #[inline(always)]
    fn any<L: Lanes>(tile: &Tile, out: *mut f32, stride: usize, scratch: &mut Scratch) {
        // SAFETY: `decode`'s contract, passed on unchanged.
        unsafe { by_bits!(tile.levels.bits, decode_lanes, tile, out, stride, scratch) }
    }
    dispatch!(any(tile: &Tile, out: *mut f32, stride: usize, scratch: &mut Scratch))
}

#[inline(always)]
unsafe fn decode_lanes<L: Lanes, const BITS: u32>(
    tile: &Tile,
    out: *mut f32,
    stride: usize,
    scratch: &mut Scratch,
) {
    let vectors = tile.columns / LANES;
    let (table, center) = (L::table(&tile.levels.table), L::splat(tile.levels.center));
    for k in (tile.k0..tile.k1).step_by(RUN) {
        let count = RUN.min(tile.k1 - k);
        // The block of each code, counted from that of the first.
        let first = k / tile.inputs;
        let blocks: [usize; RUN] = std::array::from_fn(|j| (k + j.min(count - 1)) / tile.inputs - first);
        let one_block = blocks[RUN - 1] == 0;
        let (scales, offsets) = tile.rows(first - tile.k0 / tile.inputs, blocks[RUN - 1] + 1, scratch);
        // SAFETY: all offsets stay inside the rectangle that `decode`'s contract covers.
        unsafe {
            let words = tile.words.add((k - tile.k0) / RUN * BITS as usize * tile.word_stride);
            let out = out.add((k - tile.k0) * stride);
            for c in (0..vectors * LANES).step_by(LANES) {
                let run = run_words::<L, BITS>(words.add(c), tile.word_stride);
                let parameters = |block: usize| {
                    let offset = offsets.map_or(L::splat(0.0), |offsets| L::load(offsets.row(block).add(c)));
                    (L::load(scales.row(block).add(c)), offset)
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
                } else if tile.inputs == RUN / 2 && count == RUN {
                    let second = parameters(blocks[RUN / 2]);
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
                    let scale = *scales.row(block).add(c);
                    let offset = offsets.map_or(0.0, |offsets| *offsets.row(block).add(c));
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

/// `y[c] += sum over k of x[k] * w[k, c]` for the tile, whose blocks must be as [`fits_runs`] says.
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
    scratch: &mut Scratch,
) {
    #[inline(always)]
    fn any<L: Lanes>(
        tile: &Tile,
        x: *const f32,
        block_sums: *const f32,
        y: *mut f32,
        raw: *mut f32,
        scratch: &mut Scratch,
    ) {
        // SAFETY: `row_times`' contract, passed on unchanged.
        unsafe {
            match tile.inputs {
                16 => by_bits!(tile.levels.bits, row_times_parts, 2, tile, x, block_sums, y, scratch),
                8 => by_bits!(tile.levels.bits, row_times_parts, 4, tile, x, block_sums, y, scratch),
                4 => by_bits!(tile.levels.bits, row_times_parts, 8, tile, x, block_sums, y, scratch),
                _ => by_bits!(tile.levels.bits, row_times_lanes, tile, x, block_sums, y, raw, scratch),
            }
        }
    }
    dispatch!(any(
        tile: &Tile,
        x: *const f32,
        block_sums: *const f32,
        y: *mut f32,
        raw: *mut f32,
        scratch: &mut Scratch,
    ))
}

#[inline(always)]
unsafe fn row_times_lanes<L: Lanes, const BITS: u32>(
    tile: &Tile,
    x: *const f32,
    block_sums: *const f32,
    y: *mut f32,
    raw: *mut f32,
    scratch: &mut Scratch,
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
            let (scales, offsets) = tile.rows(block, 1, scratch);
            let scales = scales.row(0);
            for c in (0..vectors).step_by(LANES) {
                let sum = L::load(raw.add(c)).mul_add(L::load(scales.add(c)), L::load(y.add(c)));
                sum.store(y.add(c));
            }
            for c in vectors..tile.columns {
                *y.add(c) += *raw.add(c) * *scales.add(c);
            }
            if let Some(offsets) = offsets {
                let (offsets, x_sum) = (offsets.row(0), *block_sums.add(block));
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

/// As [`row_times`], for blocks of which a run holds `PARTS`.
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn row_times_parts<L: Lanes, const BITS: u32, const PARTS: usize>(
    tile: &Tile,
    x: *const f32,
    block_sums: *const f32,
    y: *mut f32,
    scratch: &mut Scratch,
) {
    let inputs = RUN / PARTS;
    let vectors = tile.columns / LANES * LANES;
    let (table, center) = (L::table(&tile.levels.table), L::splat(tile.levels.center));
    for (run, k) in (tile.k0..tile.k1).step_by(RUN).enumerate() {
        let first = run * PARTS;
        // The last run may hold fewer: the others then add a block that is there, times zero.
        let parts = (tile.k1 - k).div_ceil(inputs).min(PARTS);
        let (scales, offsets) = tile.rows(first, parts, scratch);
        let of_part = |rows: Rows| std::array::from_fn(|part: usize| rows.row(part.min(parts - 1)));
        let scales: [_; PARTS] = of_part(scales);
        let offsets: Option<[_; PARTS]> = offsets.map(of_part);
        // SAFETY: all offsets stay inside what `row_times`' contract covers; `x` is zero beyond `k1`.
        unsafe {
            let words = tile.words.add(run * BITS as usize * tile.word_stride);
            let x = x.add(run * RUN);
            let sums_of_x: [f32; PARTS] =
                std::array::from_fn(|part| if part < parts { *block_sums.add(first + part) } else { 0.0 });
            for c in (0..vectors).step_by(LANES) {
                let words = run_words::<L, BITS>(words.add(c), tile.word_stride);
                let mut sum = L::load(y.add(c));
                // Two for each part hide the latency of the additions, where there aren't many parts.
                let mut sums = [[L::splat(0.0); 2]; PARTS];
                macro_rules! quarter { ($q:literal) => { unroll8!(J => {
                    let value = level::<L, BITS>(&words, table, center, $q * 8 + J);
                    let into = &mut sums[($q * 8 + J) / (RUN / PARTS)][if PARTS == 2 { J % 2 } else { 0 }];
                    *into = value.mul_add(L::splat(*x.add($q * 8 + J)), *into);
                }) } }
                quarter!(0);
                quarter!(1);
                quarter!(2);
                quarter!(3);
                for part in 0..PARTS {
                    let [even, odd] = sums[part];
                    let of_part = if PARTS == 2 { even.add(odd) } else { even };
                    sum = of_part.mul_add(L::load(scales[part].add(c)), sum);
                    if let Some(offsets) = &offsets {
                        sum = L::splat(sums_of_x[part]).mul_add(L::load(offsets[part].add(c)), sum);
                    }
                }
                sum.store(y.add(c));
            }
            for c in vectors..tile.columns {
                for part in 0..parts {
                    let mut sum = 0.0;
                    for j in part * inputs..(part + 1) * inputs {
                        sum += *x.add(j) * scalar_level::<BITS>(tile, words.add(c), j);
                    }
                    *y.add(c) += sum * *scales[part].add(c);
                    if let Some(offsets) = &offsets {
                        *y.add(c) += sums_of_x[part] * *offsets[part].add(c);
                    }
                }
            }
        }
    }
}

/// `dx[k] = sum over c of dy[c] * level[k, c] * scale[c] + dy[c] * offset[c]` for a tile inside one block row, whose
/// `inputs` are whole runs (or one block in all), or for one run of smaller blocks. `scaled` is scratch of
/// [`blocks_of_run`] times `columns` values.
///
/// # Safety
/// The tile's pointers must be readable as its fields say; `dy` for `columns` values; `dx` writable for `k1 - k0`,
/// `scaled` for as much as it must hold.
pub(super) unsafe fn row_times_transposed(
    tile: &Tile,
    dy: *const f32,
    dx: *mut f32,
    scaled: *mut f32,
    scratch: &mut Scratch,
) {
    #[inline(always)]
    fn any<L: Lanes>(tile: &Tile, dy: *const f32, dx: *mut f32, scaled: *mut f32, scratch: &mut Scratch) {
        macro_rules! lanes {
            ($bits:literal, $by:ident, $narrow:literal) => {
                row_times_transposed_lanes::<L, $bits, { by::$by }, $narrow>(tile, dy, dx, scaled, scratch)
            };
        }
        macro_rules! by_value {
            ($narrow:literal) => {
                match (tile.levels.bits, tile.levels.affine) {
                    (2, true) => lanes!(2, MASK, $narrow),
                    (4, true) => lanes!(4, MASK, $narrow),
                    (8, true) => lanes!(8, MASK, $narrow),
                    (2, false) => lanes!(2, LEVEL, $narrow),
                    (5, _) => lanes!(5, FRACTION, $narrow),
                    (6, _) => lanes!(6, FRACTION, $narrow),
                    (3, _) => lanes!(3, LEVEL, $narrow),
                    _ => lanes!(4, LEVEL, $narrow),
                }
            };
        }
        // SAFETY: `row_times_transposed`'s contract, passed on unchanged.
        unsafe {
            match blocks_of_run(tile.inputs) {
                1 => by_value!(false),
                _ => by_value!(true),
            }
        }
    }
    dispatch!(any(tile: &Tile, dy: *const f32, dx: *mut f32, scaled: *mut f32, scratch: &mut Scratch))
}

/// Blocks in a run: one where blocks are runs or longer.
pub(super) const fn blocks_of_run(inputs: usize) -> usize {
    RUN.div_ceil(inputs)
}

/// How [`row_times_transposed_lanes`] makes levels of codes.
mod by {
    /// By looking them up, or converting them.
    pub(super) const LEVEL: u8 = 0;
    /// By taking codes where they stand in their words, times a power of two that is taken off the sums: for codes that are
    /// levels less a constant and straddle no word. Values of `dy * scale` from 2^96 on overflow.
    pub(super) const MASK: u8 = 1;
    /// By putting codes into the fraction of a float behind a one, whose share is taken off the sums: for codes that are
    /// levels less a constant and straddle words. It costs two or three bits of the precision.
    pub(super) const FRACTION: u8 = 2;
}

/// `BY` is one of [`by`]; the last two need fewer instructions. `NARROW` where a run holds several blocks.
#[inline(always)]
unsafe fn row_times_transposed_lanes<L: Lanes, const BITS: u32, const BY: u8, const NARROW: bool>(
    tile: &Tile,
    dy: *const f32,
    dx: *mut f32,
    scaled: *mut f32,
    scratch: &mut Scratch,
) {
    let vectors = tile.columns / LANES * LANES;
    let (table, center) = (L::table(&tile.levels.table), L::splat(tile.levels.center));
    // SAFETY: all offsets stay inside what `row_times_transposed`'s contract covers.
    unsafe {
        // What the sums below hold of a code, and what is taken off them, of each weight's scale times `dy`.
        let (unit, excess) = match BY {
            by::MASK => (1.0, tile.levels.center),
            by::FRACTION => ((1u32 << BITS) as f32, (1u32 << BITS) as f32 + tile.levels.center),
            _ => (1.0, 0.0),
        };
        // Of each block of a run; of the same one where a run is inside a block.
        let blocks = if NARROW { (tile.k1 - tile.k0).div_ceil(tile.inputs) } else { 1 };
        let (scales, offsets) = tile.rows(0, blocks, scratch);
        let mut constants = [0.0; RUN / SMALLEST];
        for (block, constant) in constants.iter_mut().enumerate().take(blocks) {
            let rows = (scales.row(block), offsets.map(|offsets| offsets.row(block)));
            let scaled = scaled.add(block * tile.columns);
            *constant = scale_row::<L>(tile.columns, rows, dy, scaled, excess);
        }
        let block_of = |j: usize| if NARROW { (j / tile.inputs).min(blocks - 1) } else { 0 };
        for k in (tile.k0..tile.k1).step_by(RUN) {
            let words = tile.words.add((k - tile.k0) / RUN * BITS as usize * tile.word_stride);
            macro_rules! quarter { ($q:literal) => {
                let scaled: [_; 8] =
                    std::array::from_fn(|j| scaled.add(block_of($q * 8 + j) * tile.columns));
                let mut sums = [L::splat(0.0); 8];
                for c in (0..vectors).step_by(LANES) {
                    let run = run_words::<L, BITS>(words.add(c), tile.word_stride);
                    unroll8!(J => {
                        let weight = L::load(scaled[if NARROW { J } else { 0 }].add(c));
                        let (row, shift, straddles) = place($q * 8 + J, BITS);
                        let value = match BY {
                            by::MASK => L::masked(run[row], ((1 << BITS) - 1) << shift),
                            by::FRACTION if straddles => {
                                L::straddling_fraction([run[row], run[row + 1]], shift, BITS)
                            }
                            by::FRACTION => L::fraction(run[row], shift, BITS),
                            _ => level::<L, BITS>(&run, table, center, $q * 8 + J),
                        };
                        sums[J] = value.mul_add(weight, sums[J]);
                    });
                }
                for j in $q * 8..RUN.min(tile.k1 - k).min($q * 8 + 8) {
                    let mut sum = sums[j % 8].sum();
                    // Exact: a power of two.
                    sum *= match BY {
                        by::MASK => ((1u32 << place(j, BITS).1) as f32).recip(),
                        _ => unit,
                    };
                    sum += constants[block_of(j)];
                    for c in vectors..tile.columns {
                        let level = scalar_level::<BITS>(tile, words.add(c), j);
                        sum += *scaled[j % 8].add(c) * (level + excess);
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

/// Writes `dy * scale` for each of `columns` columns to `scaled`, and sums `dy * (offset - excess * scale)`.
///
/// # Safety
/// Scales, offsets where there are any, and `dy` must be readable for the columns, `scaled` writable.
#[inline(always)]
unsafe fn scale_row<L: Lanes>(
    columns: usize,
    (scales, offsets): (*const f32, Option<*const f32>),
    dy: *const f32,
    scaled: *mut f32,
    excess: f32,
) -> f32 {
    let vectors = columns / LANES * LANES;
    // SAFETY: all places are below `columns`.
    unsafe {
        let (mut of_offsets, mut of_scales) = (L::splat(0.0), L::splat(0.0));
        for c in (0..vectors).step_by(LANES) {
            let dy = L::load(dy.add(c));
            let product = dy.mul(L::load(scales.add(c)));
            product.store(scaled.add(c));
            of_scales = of_scales.add(product);
            if let Some(offsets) = offsets {
                of_offsets = dy.mul_add(L::load(offsets.add(c)), of_offsets);
            }
        }
        let (mut of_offsets, mut of_scales) = (of_offsets.sum(), of_scales.sum());
        for c in vectors..columns {
            *scaled.add(c) = *dy.add(c) * *scales.add(c);
            of_scales += *scaled.add(c);
            if let Some(offsets) = offsets {
                of_offsets += *dy.add(c) * *offsets.add(c);
            }
        }
        of_offsets - excess * of_scales
    }
}
