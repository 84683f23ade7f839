//! Products of operands rounded to bf16, summed in f32, by AVX512-BF16.
//!
//! Operands are rounded while they are packed: two values that are neighbours along the summed size share a word, and
//! [`micro`] multiplies and adds both at once. Values below the normal numbers count as zero, as the instruction has it.

use std::{arch::x86_64::*, cell::Cell, mem::transmute, ops::Range};

use half::{bf16, f16};
use rayon::prelude::*;

use super::{Matrix, Out, Tiles, Values, spans};

/// Rows of a block of the left side, columns of a panel of the right one: 24 sums in registers.
const ROWS: usize = 12;
const COLUMNS: usize = 32;
/// Columns of a vector.
const LANES: usize = 16;
/// The summed size of blocks and panels: a panel of 16 KiB stays in the first-level cache.
const DEPTH: usize = 256;
/// Words of a row of a block. Rows a power of two apart would share places in the cache.
const ROW: usize = DEPTH / 2 + LANES;
const BLOCK: usize = ROWS * ROW;
/// Blocks that are multiplied with one panel after the other: they stay in the second-level cache.
const BLOCKS: usize = 24;
/// Rows that are packed at a time, and how much of each, so that scratch doesn't grow with the product: at most 10 MB.
const SLAB: usize = 1024;
const SLAB_DEPTH: usize = 16 * DEPTH;
/// Columns of a task.
const TASK_COLUMNS: usize = 512;
/// Columns that are unpacked at a time, whole panels: they stay in the cache until they are packed.
const TILE_COLUMNS: usize = 64;

/// Whether the processor has what the functions below need.
pub(super) fn supported() -> bool {
    super::super::simd::avx512() && is_x86_feature_detected!("avx512bf16")
}

thread_local! {
    /// Blocks and panels, kept to save page faults. Taken while in use: a thread that waits may take on another product.
    static SCRATCH: Cell<[Vec<u32>; 2]> = const { Cell::new([const { Vec::new() }; 2]) };
}

fn with_scratch<R>(f: impl FnOnce(&mut [Vec<u32>; 2]) -> R) -> R {
    SCRATCH.with(|scratch| {
        let mut taken = scratch.take();
        let result = f(&mut taken);
        scratch.set(taken);
        result
    })
}

/// The first `size` words, whatever they hold, from where a vector doesn't straddle cache lines.
fn room(words: &mut Vec<u32>, size: usize) -> *mut u32 {
    if words.len() < size + LANES {
        words.resize(size + LANES, 0);
    }
    // SAFETY: at most 15 words, which were added.
    unsafe { words.as_mut_ptr().add(words.as_ptr().align_offset(64)) }
}

/// A float type as it lies in memory.
trait Element: Copy {
    /// Those of 16 values that `mask` names, the others zero.
    ///
    /// # Safety
    /// The named values must be readable; AVX-512.
    unsafe fn load(at: *const Self, mask: u16) -> __m512;

    /// Words of 16 pairs of neighbours: of 32 values those that `mask` names, the others zero.
    ///
    /// # Safety
    /// The named values must be readable; AVX512-BF16.
    #[inline(always)]
    unsafe fn neighbours(at: *const Self, mask: u32) -> __m512i {
        // SAFETY: this function's contract; the types are 512 bits of data.
        unsafe {
            let low = Self::load(at, mask as u16);
            let high = Self::load(at.wrapping_add(LANES), (mask >> LANES) as u16);
            transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
        }
    }

    /// Words of 16 pairs: of 16 values each at `at` and at `other` those that the masks name, the others zero; `at` in the lower
    /// halves.
    ///
    /// # Safety
    /// The named values must be readable; AVX512-BF16.
    #[inline(always)]
    unsafe fn pairs([at, other]: [*const Self; 2], [mask, other_mask]: [u16; 2]) -> __m512i {
        // SAFETY: this function's contract; both types are 256 bits of data.
        unsafe {
            let [low, high] = [Self::load(at, mask), Self::load(other, other_mask)]
                .map(|x| transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x)));
            interleaved(low, high)
        }
    }
}

/// Words of 16 pairs of 16-bit values.
///
/// # Safety
/// AVX-512.
#[inline(always)]
unsafe fn interleaved(low: __m256i, high: __m256i) -> __m512i {
    // SAFETY: this function's contract.
    unsafe { _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)) }
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load(at: *const Self, mask: u16) -> __m512 {
        // SAFETY: this function's contract; values that aren't named are not read.
        unsafe { _mm512_maskz_loadu_ps(mask, at) }
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn load(at: *const Self, mask: u16) -> __m512 {
        // SAFETY: this function's contract; values that aren't named are not read. bf16 is the upper half of an f32.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))
        }
    }

    #[inline(always)]
    unsafe fn neighbours(at: *const Self, mask: u32) -> __m512i {
        // SAFETY: this function's contract; values that aren't named are not read.
        unsafe { _mm512_maskz_loadu_epi16(mask, at.cast()) }
    }

    #[inline(always)]
    unsafe fn pairs([at, other]: [*const Self; 2], [mask, other_mask]: [u16; 2]) -> __m512i {
        // SAFETY: this function's contract; values that aren't named are not read.
        unsafe {
            let low = _mm256_maskz_loadu_epi16(mask, at.cast());
            interleaved(low, _mm256_maskz_loadu_epi16(other_mask, other.cast()))
        }
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn load(at: *const Self, mask: u16) -> __m512 {
        // SAFETY: this function's contract; values that aren't named are not read.
        unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, at.cast())) }
    }
}

/// The first `count` of 16.
#[inline(always)]
fn first(count: usize) -> u16 {
    if count >= LANES { u16::MAX } else { (1 << count) - 1 }
}

/// The first `count` of 32.
#[inline(always)]
fn first_of_32(count: usize) -> u32 {
    if count >= 2 * LANES { u32::MAX } else { (1 << count) - 1 }
}

/// Rows to columns.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn transpose(rows: [__m512i; LANES]) -> [__m512i; LANES] {
    let mut by_two = rows;
    for i in 0..LANES / 2 {
        by_two[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        by_two[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    // Column 4 j + i of four rows in the j-th quarter of vector i.
    let mut by_four = by_two;
    for i in 0..LANES / 4 {
        let [a, b, c, d] = [by_two[4 * i], by_two[4 * i + 1], by_two[4 * i + 2], by_two[4 * i + 3]];
        by_four[4 * i] = _mm512_unpacklo_epi64(a, c);
        by_four[4 * i + 1] = _mm512_unpackhi_epi64(a, c);
        by_four[4 * i + 2] = _mm512_unpacklo_epi64(b, d);
        by_four[4 * i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    let mut columns = by_four;
    for i in 0..4 {
        let [a, b, c, d] = [by_four[i], by_four[4 + i], by_four[8 + i], by_four[12 + i]];
        let [even_low, odd_low] = [_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b)];
        let [even_high, odd_high] = [_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d)];
        columns[i] = _mm512_shuffle_i32x4::<0x88>(even_low, even_high);
        columns[4 + i] = _mm512_shuffle_i32x4::<0x88>(odd_low, odd_high);
        columns[8 + i] = _mm512_shuffle_i32x4::<0xdd>(even_low, even_high);
        columns[12 + i] = _mm512_shuffle_i32x4::<0xdd>(odd_low, odd_high);
    }
    columns
}

/// One side of a product as packing sees it: lines (rows of the left side, columns of the right one), and the summed size.
#[derive(Clone, Copy)]
struct Side<T> {
    at: *const T,
    line: usize,
    depth: usize,
}

impl<T: Element> Side<T> {
    /// Hands `put` the words of up to 16 lines from `line` on and up to 16 pairs: `put(place, vector)`, places being those
    /// of lines if `by_line`, else those of pairs; what doesn't exist is zero.
    ///
    /// # Safety
    /// `lines` lines and `depth` values of each must be readable from `(line, k)` on; AVX512-BF16.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn square(
        self,
        by_line: bool,
        [line, k]: [usize; 2],
        [lines, depth]: [usize; 2],
        mut put: impl FnMut(usize, __m512i),
    ) {
        let (lines, depth) = (lines.min(LANES), depth.min(2 * LANES));
        let at = self.at.wrapping_add(line * self.line + k * self.depth);
        let zero = _mm512_setzero_si512();
        let mut vectors = [zero; LANES];
        // SAFETY: this function's contract.
        unsafe {
            if self.depth == 1 {
                for (i, vector) in vectors[..lines].iter_mut().enumerate() {
                    *vector = T::neighbours(at.wrapping_add(i * self.line), first_of_32(depth));
                }
            } else {
                for (i, vector) in vectors[..depth.div_ceil(2)].iter_mut().enumerate() {
                    let at = at.wrapping_add(2 * i * self.depth);
                    let exists = if 2 * i + 1 < depth { first(lines) } else { 0 };
                    *vector = T::pairs([at, at.wrapping_add(self.depth)], [first(lines), exists]);
                }
            }
        }
        if by_line != (self.depth == 1) {
            vectors = transpose(vectors);
        }
        let places = if by_line { lines } else { depth.div_ceil(2) };
        for (place, vector) in vectors[..places].iter().enumerate() {
            put(place, *vector);
        }
    }

    /// Packs `lines` lines into blocks of [`ROWS`] rows, `depth` (at most [`DEPTH`]) of each.
    ///
    /// # Safety
    /// The values must be readable; `blocks` must be writable for whole blocks; AVX512-BF16.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn pack_blocks(self, [line, k]: [usize; 2], [lines, depth]: [usize; 2], blocks: *mut u32) {
        if self.depth == 1 {
            for row in 0..lines {
                let from = self.at.wrapping_add((line + row) * self.line + k);
                let into = blocks.wrapping_add(row / ROWS * BLOCK + row % ROWS * ROW);
                for j in (0..depth).step_by(2 * LANES) {
                    // SAFETY: this function's contract; 16 words from pair `j / 2` on lie inside a row of `ROW` words.
                    unsafe {
                        let words = T::neighbours(from.wrapping_add(j), first_of_32(depth - j));
                        _mm512_storeu_si512(into.wrapping_add(j / 2).cast(), words);
                    }
                }
            }
            return;
        }
        for i in (0..lines).step_by(LANES) {
            for j in (0..depth).step_by(2 * LANES) {
                // SAFETY: this function's contract; 16 words from pair `j / 2` on lie inside a row of `ROW` words.
                unsafe {
                    self.square(true, [line + i, k + j], [lines - i, depth - j], |row, words| {
                        let row = i + row;
                        let at = row / ROWS * BLOCK + row % ROWS * ROW + j / 2;
                        _mm512_storeu_si512(blocks.add(at).cast(), words);
                    });
                }
            }
        }
    }

    /// Packs `lines` lines into panels of [`COLUMNS`] columns, `depth` (at most [`DEPTH`]) of each.
    ///
    /// # Safety
    /// The values must be readable; `panels` must be writable for whole panels; AVX512-BF16.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn pack_panels(self, [lines, depth]: [usize; 2], panels: *mut u32) {
        let pairs = depth.div_ceil(2);
        for i in (0..lines.next_multiple_of(COLUMNS)).step_by(LANES) {
            for j in (0..depth).step_by(2 * LANES) {
                // SAFETY: this function's contract; lines beyond the last one are none, and written as zeros.
                unsafe {
                    self.square(false, [i, j], [lines.saturating_sub(i), depth - j], |pair, words| {
                        let at = (i / COLUMNS * pairs + j / 2 + pair) * COLUMNS + i % COLUMNS;
                        _mm512_storeu_si512(panels.add(at).cast(), words);
                    });
                }
            }
        }
    }
}

/// Calls a method of the [`Side`] that a matrix is: `$line` is the stride of its lines, `row` for a left side and `column` for
/// a right one, `$depth` the other.
macro_rules! with_side {
    ($matrix:expr, $line:ident, $depth:ident, |$side:ident| $body:expr) => {{
        let matrix: Matrix<'_> = $matrix;
        let (line, depth) = (matrix.$line, matrix.$depth);
        match matrix.values {
            Values::F32(values) => {
                let $side = Side { at: values.as_ptr(), line, depth };
                $body
            }
            Values::Bf16(values) => {
                let $side = Side { at: values.as_ptr(), line, depth };
                $body
            }
            Values::F16(values) => {
                let $side = Side { at: values.as_ptr(), line, depth };
                $body
            }
        }
    }};
}

/// `out (+)= block · panel`: `R` rows, `V` vectors of columns of which `columns` columns exist.
///
/// # Safety
/// `a` must hold `R` rows of a block, `b` `pairs` rows of a panel; `out` must be writable for `R` rows of `columns`
/// values, `stride` apart; AVX512-BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn micro<const R: usize, const V: usize>(
    a: *const u32,
    b: *const u32,
    pairs: usize,
    out: Out,
    columns: usize,
) {
    let mut sums = [[_mm512_setzero_ps(); V]; R];
    for row in 0..R {
        for column in (0..V * LANES).step_by(LANES) {
            // Written at the end; until then the line has come.
            _mm_prefetch::<_MM_HINT_T0>(out.to.at(row * out.stride + column).cast());
        }
    }
    // SAFETY: this function's contract; the transmuted types are 512 bits of data.
    unsafe {
        for pair in 0..pairs {
            let b: [__m512i; V] =
                std::array::from_fn(|v| _mm512_loadu_si512(b.add(pair * COLUMNS + v * LANES).cast()));
            for (row, sums) in sums.iter_mut().enumerate() {
                let a = _mm512_set1_epi32(*a.add(row * ROW + pair) as i32);
                for (sum, b) in sums.iter_mut().zip(b) {
                    let [a, b] = [a, b].map(|x| transmute::<__m512i, __m512bh>(x));
                    *sum = _mm512_dpbf16_ps(*sum, a, b);
                }
            }
        }
        for v in 0..V {
            let mask = first(columns.saturating_sub(v * LANES));
            for (row, sums) in sums.iter().enumerate() {
                let at = out.to.at(row * out.stride + v * LANES);
                let before = if out.add { _mm512_maskz_loadu_ps(mask, at) } else { _mm512_setzero_ps() };
                _mm512_mask_storeu_ps(at, mask, _mm512_add_ps(sums[v], before));
            }
        }
    }
}

/// [`micro`] for any number of rows up to [`ROWS`].
///
/// # Safety
/// As there.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn block_times_panel(
    rows: usize,
    a: *const u32,
    b: *const u32,
    pairs: usize,
    out: Out,
    columns: usize,
) {
    macro_rules! by_rows {
        ($($r:literal)*) => {
            // SAFETY: `micro`'s contract, passed on unchanged.
            unsafe {
                match rows {
                    $($r if columns > LANES => micro::<$r, 2>(a, b, pairs, out, columns),
                    $r => micro::<$r, 1>(a, b, pairs, out, columns),)*
                    _ => unreachable!("a block has at most {ROWS} rows"),
                }
            }
        };
    }
    by_rows!(1 2 3 4 5 6 7 8 9 10 11 12);
}

/// `out (+)= blocks · panels`.
///
/// # Safety
/// Blocks and panels must hold `rows`, `columns` and `depth`; `out` must be writable for `rows` rows of `columns`
/// values, `stride` apart; AVX512-BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn blocks_times_panels(
    [rows, columns, depth]: [usize; 3],
    blocks: *const u32,
    panels: *const u32,
    out: Out,
) {
    let pairs = depth.div_ceil(2);
    for group in (0..rows).step_by(BLOCKS * ROWS) {
        for column in (0..columns).step_by(COLUMNS) {
            for row in (group..rows.min(group + BLOCKS * ROWS)).step_by(ROWS) {
                // SAFETY: this function's contract.
                unsafe {
                    block_times_panel(
                        ROWS.min(rows - row),
                        blocks.add(row / ROWS * BLOCK),
                        panels.add(column / COLUMNS * pairs * COLUMNS),
                        pairs,
                        out.at(row, column, false),
                        columns - column,
                    );
                }
            }
        }
    }
}

fn parts(size: usize, step: usize) -> impl Iterator<Item = Range<usize>> {
    (0..size).step_by(step).map(move |start| start..size.min(start + step))
}

/// `out (+)= lhs · rhs` on one thread; sizes are rows, columns and the summed size.
///
/// # Safety
/// As [`super::matmul`]; AVX512-BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn matmul([m, n, k]: [usize; 3], out: Out, lhs: Matrix<'_>, rhs: Matrix<'_>) {
    with_scratch(|[blocks, panels]| {
        let blocks = room(blocks, m.min(SLAB).div_ceil(ROWS) * BLOCK);
        let panels = room(panels, n.min(TASK_COLUMNS).next_multiple_of(COLUMNS) * DEPTH / 2);
        for n in parts(n, TASK_COLUMNS) {
            for k in parts(k, DEPTH) {
                let (rhs, size) = (rhs.from(k.start, n.start), [n.len(), k.len()]);
                // SAFETY: the matrices hold the sizes; `panels` has room for a task's columns.
                unsafe { with_side!(rhs, column, row, |side| side.pack_panels(size, panels)) }
                for m in parts(m, SLAB) {
                    let (at, size) = ([m.start, k.start], [m.len(), k.len()]);
                    // SAFETY: the matrices hold the sizes; `blocks` has room for a slab.
                    unsafe {
                        with_side!(lhs, row, column, |side| side.pack_blocks(at, size, blocks));
                        let sizes = [m.len(), n.len(), k.len()];
                        blocks_times_panels(sizes, blocks, panels, out.at(m.start, n.start, k.start > 0));
                    }
                }
            }
        }
    });
}

/// `out = lhs · rhs`, in parallel, the right side unpacked tile by tile.
///
/// # Safety
/// `out` must be writable for `m` rows of `n` values; the matrices must hold the sizes; AVX512-BF16.
pub(super) unsafe fn multiply([m, n, k]: [usize; 3], out: Out, lhs: Matrix<'_>, rhs: &impl Tiles) {
    /// Where packed rows go.
    #[derive(Clone, Copy)]
    struct Blocks(*mut u32);
    // SAFETY: tasks write and read blocks of their own.
    unsafe impl Send for Blocks {}
    // SAFETY: as above.
    unsafe impl Sync for Blocks {}
    impl Blocks {
        fn at(self, index: usize) -> *mut u32 {
            self.0.wrapping_add(index)
        }
    }

    let threads = rayon::current_num_threads();
    if n < COLUMNS * threads {
        // Too few columns to share out: rows are, and each task packs the right side for itself.
        let step = m.div_ceil(threads).next_multiple_of(ROWS);
        return (0..m.div_ceil(step)).into_par_iter().for_each(|i| {
            let rows = i * step..m.min((i + 1) * step);
            for k in parts(k, DEPTH) {
                rhs.tile((k.start, k.end), (0, n), |tile| {
                    tile.holds(k.len(), n);
                    let sizes = [rows.len(), n, k.len()];
                    let (out, lhs) = (out.at(rows.start, 0, k.start > 0), lhs.from(rows.start, k.start));
                    // SAFETY: `lhs` and the tile hold their sizes; tasks write rows of their own.
                    unsafe { matmul(sizes, out, lhs, tile) }
                });
            }
        });
    }
    with_scratch(|[blocks, _]| {
        let layer = m.min(SLAB).div_ceil(ROWS) * BLOCK;
        let blocks = Blocks(room(blocks, k.min(SLAB_DEPTH).div_ceil(DEPTH) * layer));
        for (slab, deep) in
            parts(m, SLAB).flat_map(|slab| parts(k, SLAB_DEPTH).map(move |k| (slab.clone(), k)))
        {
            let layers =
                || parts(deep.len(), DEPTH).map(|k| deep.start + k.start..deep.start + k.end).enumerate();
            // Whole squares of packing that are whole blocks.
            let step = slab.len().div_ceil(4 * threads).next_multiple_of(ROWS * 4);
            (0..slab.len().div_ceil(step)).into_par_iter().for_each(|i| {
                let rows = i * step..slab.len().min((i + 1) * step);
                for (index, k) in layers() {
                    let into = blocks.at(index * layer + rows.start / ROWS * BLOCK);
                    let (at, size) = ([slab.start + rows.start, k.start], [rows.len(), k.len()]);
                    // SAFETY: `lhs` holds the sizes; tasks pack whole blocks of their own, for which there is room.
                    unsafe { with_side!(lhs, row, column, |side| side.pack_blocks(at, size, into)) }
                }
            });
            spans(n, TASK_COLUMNS).for_each(|n| {
                let columns = n.1 - n.0;
                with_scratch(|[_, panels]| {
                    let panels = room(panels, columns.next_multiple_of(COLUMNS) * DEPTH / 2);
                    for (index, k) in layers() {
                        for part in parts(columns, TILE_COLUMNS) {
                            rhs.tile((k.start, k.end), (n.0 + part.start, n.0 + part.end), |tile| {
                                let (size, at) = ([part.len(), k.len()], part.start * k.len().div_ceil(2));
                                tile.holds(k.len(), part.len());
                                // SAFETY: the tile holds its sizes, and there is room for its panels.
                                unsafe {
                                    with_side!(tile, column, row, |side| side
                                        .pack_panels(size, panels.wrapping_add(at)));
                                }
                            });
                        }
                        let sizes = [slab.len(), columns, k.len()];
                        let place = out.at(slab.start, n.0, k.start > 0);
                        // SAFETY: blocks and panels were just packed; tasks write columns of their own.
                        unsafe { blocks_times_panels(sizes, blocks.at(index * layer), panels, place) }
                    }
                });
            });
        }
    });
}
