//! One row times affine codes, on processors with byte dot products (AVX-512 VNNI; VBMI for 3, 5 and 6 bits).
//!
//! Each block of the row is written in three signed digits of base 256 under a power of two, to 2^-22 of the block's
//! largest value; their products with the codes are then summed without rounding, four codes an instruction. Codes of 2, 4
//! and 8 bits are masked where they stand in their words; eight of 3, 5 or 6 bits are picked from two words at once. Other
//! processors and codebooks take the kernels of [`super::kernels`].

use std::arch::x86_64::*;

use super::{
    kernels::{Scratch, Tile},
    simd::vectorize,
    stored::Rows,
};
use crate::packing::RUN;

/// Digits of a value.
const DIGITS: usize = 3;
/// What the digits count in units of the last one.
const WEIGHTS: [f32; DIGITS] = [65536.0, 256.0, 1.0];
/// Longest block whose sums fit 32 bits at 8 bits a code: 255 * 128 * 2^15 < 2^31.
const MAX_BLOCK: usize = 1 << 15;
/// Rows of words that are fetched ahead.
const AHEAD: usize = 6;
/// Outputs of one vector.
const LANES: usize = 16;
/// Inputs of the smallest blocks: the codes of a word at 2 bits.
const SMALLEST_BLOCK: usize = 16;
/// Codes that are picked at once.
const GROUP: usize = 8;

/// A row in digits.
pub(super) struct DigitRow {
    digits: Digits,
    blocks: Vec<DigitBlock>,
}

/// Digits in the order in which codes meet them.
enum Digits {
    /// For each word of a column and each of its parts (codes that one mask picks), four in a word.
    Words(Vec<[i32; DIGITS]>),
    /// For each group of codes, eight in two words.
    Groups(Vec<[i64; DIGITS]>),
}

/// What is shared by a block of the row.
struct DigitBlock {
    /// The power of two that the last digit counts.
    unit: f32,
    /// Sum of the values.
    sum: f32,
    /// Where each digit's sum of products starts: less the grid's centre times the sum of the digits.
    start: [i32; DIGITS],
}

/// Whether this processor and these codes take this path: blocks must be whole words, or whole groups of codes, or one in
/// all.
pub(super) fn supported(bits: u32, inputs: usize, d_input: usize) -> bool {
    (inputs.is_multiple_of(SMALLEST_BLOCK) || inputs >= d_input)
        && inputs.min(d_input) <= MAX_BLOCK
        && super::simd::avx512()
        && is_x86_feature_detected!("avx512vnni")
        && ([2, 4, 8].contains(&bits) || is_x86_feature_detected!("avx512vbmi"))
}

impl DigitRow {
    /// `None` where a value isn't finite.
    pub(super) fn new(x: &[f32], inputs: usize, bits: u32, center: f32) -> Option<Self> {
        vectorize(|| {
            let mut planes =
                std::array::from_fn::<_, DIGITS, _>(|_| vec![0i8; x.len().next_multiple_of(RUN)]);
            let mut blocks = Vec::with_capacity(x.len().div_ceil(inputs));
            for (block, x) in x.chunks(inputs).enumerate() {
                let [a, b, c] = &mut planes;
                let range = block * inputs..block * inputs + x.len();
                let planes = [&mut a[range.clone()], &mut b[range.clone()], &mut c[range]];
                blocks.push(DigitBlock::new(x, planes, center)?);
            }
            let digits = match bits {
                2 => Digits::Words(by_words::<2, 4>(&planes)),
                4 => Digits::Words(by_words::<4, 2>(&planes)),
                8 => Digits::Words(by_words::<8, 1>(&planes)),
                _ => Digits::Groups(by_groups(&planes)),
            };
            Some(Self { digits, blocks })
        })
    }
}

/// The digits of the codes that each of the `PARTS` masks of a word picks; `planes` hold whole runs.
#[inline(always)]
fn by_words<const BITS: usize, const PARTS: usize>(planes: &[Vec<i8>; DIGITS]) -> Vec<[i32; DIGITS]> {
    let mut digits = vec![[0; DIGITS]; planes[0].len() * BITS / 32 * PARTS];
    for (digit, plane) in planes.iter().enumerate() {
        for (parts, word) in digits.chunks_exact_mut(PARTS).zip(plane.chunks_exact(32 / BITS)) {
            for (part, into) in parts.iter_mut().enumerate() {
                into[digit] = i32::from_le_bytes(std::array::from_fn(|i| word[i * PARTS + part] as u8));
            }
        }
    }
    digits
}

/// The digits of eight codes after the other; `planes` hold whole runs.
#[inline(always)]
fn by_groups(planes: &[Vec<i8>; DIGITS]) -> Vec<[i64; DIGITS]> {
    let groups = planes.each_ref().map(|plane| plane.as_chunks::<GROUP>().0);
    let digits =
        |group: usize| groups.map(|groups| i64::from_le_bytes(groups[group].map(|digit| digit as u8)));
    (0..groups[0].len()).map(digits).collect()
}

impl DigitBlock {
    /// Writes the digits of a block of the row; `None` where a value isn't finite.
    #[inline(always)]
    fn new(x: &[f32], planes: [&mut [i8]; DIGITS], center: f32) -> Option<Self> {
        if !x.iter().all(|x| x.is_finite()) {
            return None;
        }
        let largest = x.iter().fold(0.0f32, |max, x| max.max(x.abs()));
        // 2^e with largest / 2^e in [2^21, 2^22); far below the smallest normal numbers nothing is kept.
        let exponent = ((largest.to_bits() >> 23) as i32 - 127 - 21).max(-126);
        let (unit, per_unit) = (power_of_two(exponent), power_of_two(-exponent));
        let mut sums = [0i32; DIGITS];
        let [first, second, third] = planes;
        for (((&x, a), b), c) in x.iter().zip(first).zip(second).zip(third) {
            [*a, *b, *c] = digits((x * per_unit).round_ties_even() as i32);
            sums[0] += i32::from(*a);
            sums[1] += i32::from(*b);
            sums[2] += i32::from(*c);
        }
        Some(Self { unit, sum: sum(x), start: sums.map(|sum| -(center as i32) * sum) })
    }
}

/// The sum, in as many parts as a vector has lanes.
#[inline(always)]
fn sum(x: &[f32]) -> f32 {
    let (vectors, rest) = x.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for vector in vectors {
        for (sum, x) in sums.iter_mut().zip(vector) {
            *sum += x;
        }
    }
    sums.iter().chain(rest).sum()
}

/// `2^exponent` for `-126..=127`.
fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits(((exponent + 127) as u32) << 23)
}

/// Balanced digits of base 256, the most significant first, for `|value| <= 2^22`.
#[inline(always)]
fn digits(value: i32) -> [i8; DIGITS] {
    let low = value as i8;
    let rest = (value - i32::from(low)) >> 8;
    let middle = rest as i8;
    [((rest - i32::from(middle)) >> 8) as i8, middle, low]
}

/// Writes `y[c] = sum over k of x[k] * w[k, c]` for a tile of all inputs.
///
/// # Safety
/// The processor must have what [`supported`] asks for; the tile's pointers must be readable as its fields say, `y`
/// writable for its columns; `row` must come from as many inputs, in the same blocks and width.
pub(super) unsafe fn row_times(tile: &Tile, row: &DigitRow, y: *mut f32, scratch: &mut Scratch) {
    let parameters = tile.all_rows(scratch);
    // SAFETY: passed on unchanged; scales and offsets of all blocks are there.
    unsafe {
        match (tile.levels.bits, &row.digits) {
            (2, Digits::Words(digits)) => words_times::<2>(tile, digits, &row.blocks, parameters, y),
            (4, Digits::Words(digits)) => words_times::<4>(tile, digits, &row.blocks, parameters, y),
            (_, Digits::Words(digits)) => words_times::<8>(tile, digits, &row.blocks, parameters, y),
            (3, Digits::Groups(digits)) => groups_times::<3>(tile, digits, &row.blocks, parameters, y),
            (5, Digits::Groups(digits)) => groups_times::<5>(tile, digits, &row.blocks, parameters, y),
            (_, Digits::Groups(digits)) => groups_times::<6>(tile, digits, &row.blocks, parameters, y),
        }
    }
}

/// The first lanes, where fewer than [`LANES`] outputs are left.
fn mask_of(left: usize) -> __mmask16 {
    if left < LANES { (1 << left) - 1 } else { !0 }
}

/// # Safety
/// As [`row_times`]; `parameters` must be readable for all blocks.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn words_times<const BITS: u32>(
    tile: &Tile,
    digits: &[[i32; DIGITS]],
    blocks: &[DigitBlock],
    parameters: (Rows, Option<Rows>),
    y: *mut f32,
) {
    const WIDE: usize = 4;
    let mut c = 0;
    // SAFETY: the columns read and written stay below `tile.columns`; the mask leaves out those beyond.
    unsafe {
        while c + WIDE * LANES <= tile.columns {
            words_times_columns::<BITS, WIDE>(tile, digits, blocks, parameters, y, c, !0);
            c += WIDE * LANES;
        }
        while c < tile.columns {
            let mask = mask_of(tile.columns - c);
            words_times_columns::<BITS, 1>(tile, digits, blocks, parameters, y, c, mask);
            c += LANES;
        }
    }
}

/// `VECTORS` vectors of outputs from column `c` on; `mask` picks the lanes.
///
/// # Safety
/// As [`words_times`], for the picked columns.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn words_times_columns<const BITS: u32, const VECTORS: usize>(
    tile: &Tile,
    digits: &[[i32; DIGITS]],
    blocks: &[DigitBlock],
    parameters: (Rows, Option<Rows>),
    y: *mut f32,
    c: usize,
    mask: __mmask16,
) {
    let parts = 8 / BITS as usize;
    let low_bits = _mm512_set1_epi32(((1u32 << BITS) - 1).wrapping_mul(0x0101_0101) as i32);
    // The tile has all inputs.
    let words_per_block = (tile.inputs.min(tile.k1) * BITS as usize).div_ceil(u32::BITS as usize);
    let mut sums = [_mm512_setzero_ps(); VECTORS];
    for (index, block) in blocks.iter().enumerate() {
        let mut counts = [block.start.map(|start| _mm512_set1_epi32(start)); VECTORS];
        let first = index * words_per_block;
        let last = (digits.len() / parts).min(first + words_per_block);
        for word in first..last {
            // SAFETY: `word` is one of the column's words, in a row of the tile; masked lanes aren't read.
            let words: [__m512i; VECTORS] =
                std::array::from_fn(|v| unsafe { load_words(tile, word, c + v * LANES, mask) });
            for part in 0..parts {
                let digits = &digits[word * parts + part];
                for v in 0..VECTORS {
                    let shifted = _mm512_srl_epi32(words[v], _mm_cvtsi32_si128((part as u32 * BITS) as i32));
                    let codes = if BITS == 8 { shifted } else { _mm512_and_si512(shifted, low_bits) };
                    for (count, &digit) in counts[v].iter_mut().zip(digits) {
                        *count = _mm512_dpbusd_epi32(*count, codes, _mm512_set1_epi32(digit));
                    }
                }
            }
        }
        for v in 0..VECTORS {
            // SAFETY: the caller's.
            sums[v] = unsafe { block.add(sums[v], counts[v], parameters, index, c + v * LANES, mask) };
        }
    }
    for (v, sum) in sums.into_iter().enumerate() {
        // SAFETY: `y` is writable for the tile's columns; masked lanes aren't written.
        unsafe { _mm512_mask_storeu_ps(y.add(c + v * LANES), mask, sum) }
    }
}

/// The words of sixteen outputs from column `c` on, in one row of words; `mask` picks the lanes.
///
/// # Safety
/// The picked words must be in the tile.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn load_words(tile: &Tile, word: usize, c: usize, mask: __mmask16) -> __m512i {
    // SAFETY: the caller's.
    unsafe {
        let at = tile.words.add(word * tile.word_stride + c);
        // Rows lie pages apart, where the processor doesn't look ahead by itself; a prefetch may point anywhere.
        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD * tile.word_stride).cast());
        _mm512_maskz_loadu_epi32(mask, at.cast())
    }
}

impl DigitBlock {
    /// `sum` plus what this block, the `index`-th, gives to the sixteen outputs from column `c` on, of which `counts` are the
    /// digits' sums of products.
    ///
    /// # Safety
    /// The picked columns must have scales and offsets.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn add(
        &self,
        sum: __m512,
        counts: [__m512i; DIGITS],
        (scales, offsets): (Rows, Option<Rows>),
        index: usize,
        c: usize,
        mask: __mmask16,
    ) -> __m512 {
        let mut product = _mm512_setzero_ps();
        for (count, weight) in counts.into_iter().zip(WEIGHTS) {
            product = _mm512_fmadd_ps(_mm512_cvtepi32_ps(count), _mm512_set1_ps(weight), product);
        }
        // SAFETY: the caller's; masked lanes aren't read.
        unsafe {
            let scale = _mm512_maskz_loadu_ps(mask, scales.row(index).add(c));
            let sum = _mm512_fmadd_ps(product, _mm512_mul_ps(scale, _mm512_set1_ps(self.unit)), sum);
            match offsets {
                Some(offsets) => {
                    let offset = _mm512_maskz_loadu_ps(mask, offsets.row(index).add(c));
                    _mm512_fmadd_ps(offset, _mm512_set1_ps(self.sum), sum)
                }
                None => sum,
            }
        }
    }
}

/// # Safety
/// As [`words_times`], of codes that straddle words; AVX-512 VBMI.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
unsafe fn groups_times<const BITS: u32>(
    tile: &Tile,
    digits: &[[i64; DIGITS]],
    blocks: &[DigitBlock],
    parameters: (Rows, Option<Rows>),
    y: *mut f32,
) {
    const WIDE: usize = 2;
    let mut c = 0;
    // SAFETY: the columns read and written stay below `tile.columns`; the mask leaves out those beyond.
    unsafe {
        while c + WIDE * LANES <= tile.columns {
            groups_times_columns::<BITS, WIDE>(tile, digits, blocks, parameters, y, c, !0);
            c += WIDE * LANES;
        }
        while c < tile.columns {
            let mask = mask_of(tile.columns - c);
            groups_times_columns::<BITS, 1>(tile, digits, blocks, parameters, y, c, mask);
            c += LANES;
        }
    }
}

/// Where the codes of a group begin: the row of words within its run, and the bit.
#[inline(always)]
const fn group_place(group: usize, bits: u32) -> (usize, u32) {
    let bit = group % (RUN / GROUP) * GROUP * bits as usize;
    (bit / 32, (bit % 32) as u32)
}

/// `VECTORS` vectors of outputs from column `c` on; `mask` picks the lanes.
///
/// # Safety
/// As [`groups_times`], for the picked columns.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
unsafe fn groups_times_columns<const BITS: u32, const VECTORS: usize>(
    tile: &Tile,
    digits: &[[i64; DIGITS]],
    blocks: &[DigitBlock],
    parameters: (Rows, Option<Rows>),
    y: *mut f32,
    c: usize,
    mask: __mmask16,
) {
    let low_bits = _mm512_set1_epi8(((1u32 << BITS) - 1) as i8);
    // For each group of a run, the bits at which its codes begin in two words.
    let places: [__m512i; RUN / GROUP] = std::array::from_fn(|group| {
        let (_, shift) = group_place(group, BITS);
        let bytes = std::array::from_fn(|code| (shift + code as u32 * BITS) as u8);
        _mm512_set1_epi64(i64::from_le_bytes(bytes))
    });
    let groups_per_block = tile.inputs.div_ceil(GROUP);
    let mut sums = [_mm512_setzero_ps(); VECTORS];
    for (index, block) in blocks.iter().enumerate() {
        // Two sums for each output, of which one begins with zero.
        let mut counts = [[block.start.map(|start| _mm512_set1_epi64(i64::from(start as u32))); 2]; VECTORS];
        let first = index * groups_per_block;
        for group in first..digits.len().min(first + groups_per_block) {
            let (row, _) = group_place(group, BITS);
            let run = group / (RUN / GROUP) * BITS as usize;
            // The last group of a run may end with the run's last word, and then reads it twice.
            let next = (row + 1).min(BITS as usize - 1);
            for v in 0..VECTORS {
                let c = c + v * LANES;
                // SAFETY: both are among the column's words, in rows of the tile; masked lanes aren't read.
                let [low, high] =
                    unsafe { [load_words(tile, run + row, c, mask), load_words(tile, run + next, c, mask)] };
                // Outputs 0, 1, 4, 5, .. and 2, 3, 6, 7, ..
                let pairs = [_mm512_unpacklo_epi32(low, high), _mm512_unpackhi_epi32(low, high)];
                for (pair, counts) in pairs.into_iter().zip(&mut counts[v]) {
                    let picked = _mm512_multishift_epi64_epi8(places[group % (RUN / GROUP)], pair);
                    let codes = _mm512_and_si512(picked, low_bits);
                    for (count, &digit) in counts.iter_mut().zip(&digits[group]) {
                        *count = _mm512_dpbusd_epi32(*count, codes, _mm512_set1_epi64(digit));
                    }
                }
            }
        }
        for v in 0..VECTORS {
            let [first, second] = counts[v];
            // The two sums of each output, in the outputs' order.
            let together = std::array::from_fn(|digit| {
                let [a, b] = [first[digit], second[digit]].map(|x| _mm512_castsi512_ps(x));
                let [even, odd] = [_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xdd>(a, b)];
                _mm512_add_epi32(_mm512_castps_si512(even), _mm512_castps_si512(odd))
            });
            // SAFETY: the caller's.
            sums[v] = unsafe { block.add(sums[v], together, parameters, index, c + v * LANES, mask) };
        }
    }
    for (v, sum) in sums.into_iter().enumerate() {
        // SAFETY: `y` is writable for the tile's columns; masked lanes aren't written.
        unsafe { _mm512_mask_storeu_ps(y.add(c + v * LANES), mask, sum) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_make_up_the_value() {
        for value in (-(1 << 22)..=1 << 22).step_by(997).chain([1 << 22, 128, -128, 127, 32768, -32769]) {
            let [high, middle, low] = digits(value).map(i32::from);
            assert_eq!(high * 65536 + middle * 256 + low, value);
        }
    }

    #[test]
    fn values_that_are_not_finite_are_left_to_the_float_kernel() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = [1.0; 64];
            x[40] = bad;
            assert!(DigitRow::new(&x, 32, 4, 0.0).is_none());
        }
    }
}
