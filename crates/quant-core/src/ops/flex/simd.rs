//! Sixteen lanes of f32: AVX-512 where the processor has it, plain arrays otherwise.
//!
//! Kernels are written once, generic over [`Lanes`] and always inlined, and instantiated by [`dispatch!`] inside
//! a function with the matching `target_feature`.

use crate::{dynamic_map::DYNAMIC_MAP, scheme::DOUBLE_BLOCK};

/// Lanes per vector.
pub(crate) const LANES: usize = 16;

/// Sixteen f32 beside sixteen u32.
pub(crate) trait Lanes: Copy {
    /// Sixteen packed words.
    type Words: Copy;
    /// A table of sixteen levels, ready for lookups.
    type Table: Copy;

    /// # Safety
    /// `at` must be readable for 16 values.
    unsafe fn load(at: *const f32) -> Self;
    /// # Safety
    /// `at` must be writable for 16 values.
    unsafe fn store(self, at: *mut f32);
    /// # Safety
    /// `at` must be readable for 16 words.
    unsafe fn words(at: *const u32) -> Self::Words;
    /// Prepares a lookup table.
    fn table(levels: &[f32; LANES]) -> Self::Table;
    /// The same value in every lane.
    fn splat(value: f32) -> Self;
    /// `table[(words >> shift) mod 16]`.
    fn lookup(table: Self::Table, words: Self::Words, shift: u32) -> Self;
    /// `(words >> shift) & mask`, as floats; `shift` is a constant after inlining, as in the others.
    fn code(words: Self::Words, shift: u32, mask: u32) -> Self;
    /// `words & mask`, as floats.
    fn masked(words: Self::Words, mask: u32) -> Self;
    /// `1 + code / 2^bits` of the codes of `bits` bits at `words >> shift`; `shift + bits` is at most 32.
    fn fraction(words: Self::Words, shift: u32, bits: u32) -> Self;
    /// [`Self::fraction`] of codes that begin in the first words and end in the second.
    fn straddling_fraction(words: [Self::Words; 2], shift: u32, bits: u32) -> Self;
    /// The signed byte at `words >> shift`, as floats; `shift` is at most 24.
    fn signed_byte(words: Self::Words, shift: u32) -> Self;
    /// `16 / times` values, each so many times; `times` divides 16.
    ///
    /// # Safety
    /// `at` must be readable for `16 / times` values.
    unsafe fn spread(at: *const f32, times: usize) -> Self;
    /// Levels of bitsandbytes' dynamic map at the codes of the places `first`, `first + step`, .., and their nested scales.
    ///
    /// # Safety
    /// `words` must be readable for the bytes at these places, `nested` for a value for each 256 of them; the places must
    /// fit an i32.
    unsafe fn double_scales(words: *const u32, nested: *const f32, first: usize, step: usize) -> [Self; 2];
    /// `low >> shift | high << (32 - shift)`, for `0 < shift < 32`.
    fn straddle(low: Self::Words, high: Self::Words, shift: u32) -> Self::Words;
    /// `self + other`.
    fn add(self, other: Self) -> Self;
    /// `self - other`.
    fn sub(self, other: Self) -> Self;
    /// `self * other`.
    fn mul(self, other: Self) -> Self;
    /// `self * other + plus`, rounded once where the processor can.
    fn mul_add(self, other: Self, plus: Self) -> Self;
    /// Sum of the lanes.
    fn sum(self) -> f32;
}

/// Sixteen lanes in an array; the compiler turns loops over it into whatever vectors the function may use.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; LANES]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }
}

impl Lanes for Portable {
    type Words = [u32; LANES];
    type Table = [f32; LANES];

    #[inline(always)]
    unsafe fn load(at: *const f32) -> Self {
        // SAFETY: readable for 16 values by this function's contract; the read is unaligned.
        Self(unsafe { at.cast::<[f32; LANES]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, at: *mut f32) {
        // SAFETY: writable for 16 values by this function's contract; the write is unaligned.
        unsafe { at.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn words(at: *const u32) -> Self::Words {
        // SAFETY: readable for 16 words by this function's contract; the read is unaligned.
        unsafe { at.cast::<[u32; LANES]>().read_unaligned() }
    }
    #[inline(always)]
    fn table(levels: &[f32; LANES]) -> Self::Table {
        *levels
    }
    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; LANES])
    }
    #[inline(always)]
    fn lookup(table: Self::Table, words: Self::Words, shift: u32) -> Self {
        Self(std::array::from_fn(|i| table[(words[i] >> shift) as usize % LANES]))
    }
    #[inline(always)]
    fn code(words: Self::Words, shift: u32, mask: u32) -> Self {
        Self(std::array::from_fn(|i| ((words[i] >> shift) & mask) as i32 as f32))
    }
    #[inline(always)]
    fn masked(words: Self::Words, mask: u32) -> Self {
        Self(std::array::from_fn(|i| (words[i] & mask) as f32))
    }
    #[inline(always)]
    fn fraction(words: Self::Words, shift: u32, bits: u32) -> Self {
        Self(words.map(|word| fraction(word >> shift, bits)))
    }
    #[inline(always)]
    fn straddling_fraction([low, high]: [Self::Words; 2], shift: u32, bits: u32) -> Self {
        Self(Self::straddle(low, high, shift).map(|word| fraction(word, bits)))
    }
    #[inline(always)]
    fn signed_byte(words: Self::Words, shift: u32) -> Self {
        Self(std::array::from_fn(|i| f32::from((words[i] >> shift) as i8)))
    }
    #[inline(always)]
    unsafe fn spread(at: *const f32, times: usize) -> Self {
        // SAFETY: readable for as many values by this function's contract.
        Self(std::array::from_fn(|i| unsafe { *at.add(i / times) }))
    }
    #[inline(always)]
    unsafe fn double_scales(words: *const u32, nested: *const f32, first: usize, step: usize) -> [Self; 2] {
        // SAFETY: readable at these places by this function's contract.
        let code = |place: usize| unsafe { *words.add(place / 4) } >> (8 * (place % 4)) & 255;
        let levels = std::array::from_fn(|i| DYNAMIC_MAP[code(first + i * step) as usize]);
        // SAFETY: the same.
        let nested = std::array::from_fn(|i| unsafe { *nested.add((first + i * step) / DOUBLE_BLOCK) });
        [Self(levels), Self(nested)]
    }
    #[inline(always)]
    fn straddle(low: Self::Words, high: Self::Words, shift: u32) -> Self::Words {
        std::array::from_fn(|i| low[i] >> shift | high[i] << (32 - shift))
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }
    #[inline(always)]
    fn mul_add(self, other: Self, plus: Self) -> Self {
        self.mul(other).add(plus)
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        self.0.iter().sum()
    }
}

/// `1 + code / 2^bits`, the code being the lowest bits of `word`.
#[inline(always)]
fn fraction(word: u32, bits: u32) -> f32 {
    f32::from_bits((word << (FRACTION_BITS - bits)) & FRACTION | ONE)
}

/// The bits of 1.
const ONE: u32 = 1f32.to_bits();
/// Width of a float's fraction.
const FRACTION_BITS: u32 = f32::MANTISSA_DIGITS - 1;
/// The bits of a float's fraction.
const FRACTION: u32 = (1 << FRACTION_BITS) - 1;

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::{FRACTION, FRACTION_BITS, LANES, Lanes, ONE};
    use crate::{dynamic_map::DYNAMIC_MAP, scheme::DOUBLE_BLOCK};

    /// One 512-bit register. Only made inside functions that [`super::dispatch!`] guards.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(pub(crate) __m512);

    /// A shift that folds to an immediate once inlined.
    #[inline(always)]
    unsafe fn shr(words: __m512i, shift: u32) -> __m512i {
        // SAFETY: called only from the methods below.
        unsafe { _mm512_srl_epi32(words, _mm_cvtsi32_si128(shift as i32)) }
    }

    /// A shift that folds to an immediate once inlined.
    #[inline(always)]
    unsafe fn shl(words: __m512i, shift: u32) -> __m512i {
        // SAFETY: called only from the methods below.
        unsafe { _mm512_sll_epi32(words, _mm_cvtsi32_si128(shift as i32)) }
    }

    /// 1 and a fraction of which the highest `bits` bits are those of `words`.
    #[inline(always)]
    unsafe fn in_fraction(words: __m512i, bits: u32) -> __m512 {
        let mask = FRACTION & !(FRACTION >> bits);
        // SAFETY: called only from the methods below.
        unsafe {
            let (mask, one) = (_mm512_set1_epi32(mask as i32), _mm512_set1_epi32(ONE as i32));
            // words & mask | one
            _mm512_castsi512_ps(_mm512_ternarylogic_epi32::<0xea>(words, mask, one))
        }
    }

    /// 0, 1, .. 15.
    #[inline(always)]
    unsafe fn ascending() -> __m512i {
        // SAFETY: called only from the methods below.
        unsafe { _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0) }
    }

    // SAFETY (every block below): values of this type exist only in code that runs after AVX-512F was
    // detected; pointers are valid by the trait's contracts.
    #[allow(clippy::undocumented_unsafe_blocks, reason = "one comment for all of them")]
    impl Lanes for Avx512 {
        type Words = __m512i;
        type Table = __m512;

        #[inline(always)]
        unsafe fn load(at: *const f32) -> Self {
            Self(unsafe { _mm512_loadu_ps(at) })
        }
        #[inline(always)]
        unsafe fn store(self, at: *mut f32) {
            unsafe { _mm512_storeu_ps(at, self.0) }
        }
        #[inline(always)]
        unsafe fn words(at: *const u32) -> Self::Words {
            unsafe { _mm512_loadu_si512(at.cast()) }
        }
        #[inline(always)]
        fn table(levels: &[f32; LANES]) -> Self::Table {
            unsafe { _mm512_loadu_ps(levels.as_ptr()) }
        }
        #[inline(always)]
        fn splat(value: f32) -> Self {
            Self(unsafe { _mm512_set1_ps(value) })
        }
        #[inline(always)]
        fn lookup(table: Self::Table, words: Self::Words, shift: u32) -> Self {
            // The permutation reads only the low four bits of each index.
            Self(unsafe { _mm512_permutexvar_ps(shr(words, shift), table) })
        }
        #[inline(always)]
        fn code(words: Self::Words, shift: u32, mask: u32) -> Self {
            Self(unsafe {
                let code = _mm512_and_si512(shr(words, shift), _mm512_set1_epi32(mask as i32));
                _mm512_cvtepi32_ps(code)
            })
        }
        #[inline(always)]
        fn masked(words: Self::Words, mask: u32) -> Self {
            Self(unsafe { _mm512_cvtepu32_ps(_mm512_and_si512(words, _mm512_set1_epi32(mask as i32))) })
        }
        #[inline(always)]
        fn fraction(words: Self::Words, shift: u32, bits: u32) -> Self {
            let place = FRACTION_BITS - bits;
            Self(unsafe {
                in_fraction(
                    if shift < place { shl(words, place - shift) } else { shr(words, shift - place) },
                    bits,
                )
            })
        }
        #[inline(always)]
        fn straddling_fraction([low, high]: [Self::Words; 2], shift: u32, bits: u32) -> Self {
            // A code that straddles begins at `33 - bits` or later, which is beyond its place in the fraction.
            let place = FRACTION_BITS - bits;
            Self(unsafe {
                let words = _mm512_or_si512(shr(low, shift - place), shl(high, place + 32 - shift));
                in_fraction(words, bits)
            })
        }
        #[inline(always)]
        fn signed_byte(words: Self::Words, shift: u32) -> Self {
            Self(unsafe {
                let top = _mm512_sll_epi32(words, _mm_cvtsi32_si128(24 - shift as i32));
                _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(top))
            })
        }
        #[inline(always)]
        unsafe fn spread(at: *const f32, times: usize) -> Self {
            Self(unsafe {
                let values = _mm512_maskz_loadu_ps(u16::MAX >> (LANES - LANES / times), at);
                _mm512_permutexvar_ps(shr(ascending(), times.trailing_zeros()), values)
            })
        }
        #[inline(always)]
        unsafe fn double_scales(
            words: *const u32,
            nested: *const f32,
            first: usize,
            step: usize,
        ) -> [Self; 2] {
            unsafe {
                let steps = _mm512_mullo_epi32(ascending(), _mm512_set1_epi32(step as i32));
                let places = _mm512_add_epi32(steps, _mm512_set1_epi32(first as i32));
                let words = _mm512_i32gather_epi32::<4>(shr(places, 2), words.cast());
                let byte = _mm512_and_si512(places, _mm512_set1_epi32(3));
                let codes = _mm512_srlv_epi32(words, _mm512_slli_epi32::<3>(byte));
                let codes = _mm512_and_si512(codes, _mm512_set1_epi32(255));
                let levels = _mm512_i32gather_ps::<4>(codes, DYNAMIC_MAP.as_ptr());
                let blocks = shr(places, const { DOUBLE_BLOCK.trailing_zeros() });
                [Self(levels), Self(_mm512_i32gather_ps::<4>(blocks, nested))]
            }
        }
        #[inline(always)]
        fn straddle(low: Self::Words, high: Self::Words, shift: u32) -> Self::Words {
            unsafe {
                let left = _mm512_sll_epi32(high, _mm_cvtsi32_si128((32 - shift) as i32));
                _mm512_or_si512(shr(low, shift), left)
            }
        }
        #[inline(always)]
        fn add(self, other: Self) -> Self {
            Self(unsafe { _mm512_add_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            Self(unsafe { _mm512_sub_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            Self(unsafe { _mm512_mul_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn mul_add(self, other: Self, plus: Self) -> Self {
            Self(unsafe { _mm512_fmadd_ps(self.0, other.0, plus.0) })
        }
        #[inline(always)]
        fn sum(self) -> f32 {
            unsafe { _mm512_reduce_add_ps(self.0) }
        }
    }
}
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;

/// Runs `f` compiled for the widest vectors the processor has; `f` must be small enough to be inlined.
#[inline]
pub(crate) fn vectorize<R>(f: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        unsafe fn wide<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        #[target_feature(enable = "avx2,fma")]
        unsafe fn middle<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        if avx512() {
            // SAFETY: the instructions were just detected.
            return unsafe { wide(f) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the instructions were just detected.
            return unsafe { middle(f) };
        }
    }
    f()
}

/// Whether the processor has the AVX-512 parts that the kernels use.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(crate) fn avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
}

/// `e^x` to about two units in the last place, without branches, so that loops over it become vectors.
///
/// Saturates at `e^±87`, the range of normal numbers.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    /// Adding it rounds to an integer in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    /// `ln 2` in two parts, the first exact in few bits.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    /// 1 / n! for n = 7 .. 2.
    const TERMS: [f32; 6] = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5];
    let x = x.clamp(-87.0, 87.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN_2[0] - n * LN_2[1];
    let mut sum = TERMS[0];
    for term in &TERMS[1..] {
        sum = sum * r + term;
    }
    // The low bits of `shifted` hold `n`; those of `ROUND` itself fall off the left end.
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    (sum * r * r + r + 1.0) * power
}

/// Calls the generic function `$name::<L, ..>(args)` with the widest [`Lanes`] that the processor has, inside a
/// function compiled for its instructions.
macro_rules! dispatch {
    ($name:ident $(::<$($generic:ident),*>)? ($($arg:ident : $type:ty),* $(,)?)) => {{
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            unsafe fn wide($($arg: $type),*) {
                $name::<crate::ops::flex::simd::Avx512 $($(, $generic)*)?>($($arg),*)
            }
            #[target_feature(enable = "avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            unsafe fn middle($($arg: $type),*) {
                $name::<crate::ops::flex::simd::Portable $($(, $generic)*)?>($($arg),*)
            }
            if crate::ops::flex::simd::avx512() {
                // SAFETY: the instructions were just detected.
                return unsafe { wide($($arg),*) };
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                // SAFETY: the instructions were just detected.
                return unsafe { middle($($arg),*) };
            }
        }
        $name::<crate::ops::flex::simd::Portable $($(, $generic)*)?>($($arg),*)
    }};
}
pub(crate) use dispatch;

#[cfg(test)]
mod tests {
    use kiln_testkit::values;

    use super::*;

    /// The lanes of what `L` makes of the same words.
    fn lanes<L: Lanes>(found: &mut Vec<[f32; LANES]>) {
        let keep = |lanes: L| {
            let mut values = [0.0; LANES];
            // SAFETY: an array of sixteen values.
            unsafe { lanes.store(values.as_mut_ptr()) };
            values
        };
        let nested = values(1, LANES);
        let words: Vec<u32> = (0..512u32).map(|i| i.wrapping_mul(2_654_435_761)).collect();
        // SAFETY: 16 words; up to 16 values; bytes of 512 words, and a value for each 256 of these.
        unsafe {
            for shift in 0..=24 {
                found.push(keep(L::signed_byte(L::words(words.as_ptr()), shift)));
            }
            for bits in [5, 6] {
                for shift in 0..=32 - bits {
                    found.push(keep(L::fraction(L::words(words.as_ptr()), shift, bits)));
                }
                for shift in 33 - bits..32 {
                    let [low, high] = [0, 1].map(|i| L::words(words[i..].as_ptr()));
                    found.push(keep(L::straddling_fraction([low, high], shift, bits)));
                }
            }
            for times in [1, 2, 4, 8, 16] {
                found.push(keep(L::spread(nested.as_ptr(), times)));
            }
            for (first, step) in [(0, 1), (3, 9), (100, 128), (2047, 0)] {
                found.extend(L::double_scales(words.as_ptr(), nested.as_ptr(), first, step).map(keep));
            }
        }
    }

    #[test]
    fn vectors_hold_what_arrays_do() {
        // The macro returns from the function that it stands in.
        fn widest(found: &mut Vec<[f32; LANES]>) {
            dispatch!(lanes(found: &mut Vec<[f32; LANES]>))
        }
        let (mut portable, mut wide) = (Vec::new(), Vec::new());
        lanes::<Portable>(&mut portable);
        widest(&mut wide);
        assert_eq!(wide, portable);
        assert_eq!(portable.len(), 25 + 28 + 27 + 4 + 5 + 5 + 8);
    }

    #[test]
    fn exp_agrees_with_the_standard_library() {
        let mut worst = 0.0f64;
        for i in -860_000..=860_000 {
            let x = i as f32 * 1e-4;
            let expected = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) / expected - 1.0).abs());
        }
        assert!(worst < 3e-7, "{worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(-1e30) < 1e-37 && exp(f32::MIN) < 1e-37);
    }
}
