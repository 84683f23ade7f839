//! The packed layout, in one place.
//!
//! Codes of one output column form one bit stream along the input axis, low bits first, in `u32` words:
//! code `k` occupies bits `bits * k .. bits * (k + 1)`. Words are stored `[code_rows, d_output]`, row-major, so
//! that neighbouring outputs are neighbours in memory. A column holds whole runs of 32 codes (padding codes are
//! zero), hence `code_rows = ceil(d_input / 32) * bits`; 3-bit codes may straddle two words. This is the layout
//! of GPTQ's `qweight`.

/// Codes in one run: the smallest count that fills whole words at every width.
pub const RUN: usize = 32;

/// Rows of words that hold `d_input` codes of `bits` bits: `ceil(d_input / 32) * bits`.
pub const fn code_rows(d_input: usize, bits: u32) -> usize {
    d_input.div_ceil(RUN) * bits as usize
}

/// Row and shift of the word where code `input` starts.
#[inline]
pub const fn position(input: usize, bits: u32) -> (usize, u32) {
    let bit = (input % RUN) * bits as usize;
    ((input / RUN) * bits as usize + bit / 32, (bit % 32) as u32)
}

/// Packs codes column by column.
///
/// ```
/// use kiln_quant_core::packing::{CodePacker, unpack_column};
/// let mut packer = CodePacker::new(5, 2, 3);
/// packer.set_column(0, &[7, 0, 1, 2, 3]);
/// packer.set_column(1, &[4, 4, 4, 4, 4]);
/// let words = packer.into_words();
/// let mut codes = [0; 5];
/// unpack_column(&words, 2, 3, 0, &mut codes);
/// assert_eq!(codes, [7, 0, 1, 2, 3]);
/// ```
#[derive(Debug, Clone)]
pub struct CodePacker {
    words: Vec<u32>,
    d_input: usize,
    d_output: usize,
    bits: u32,
}

impl CodePacker {
    /// All codes zero.
    ///
    /// # Panics
    /// If `bits` is not in `1..=8`.
    pub fn new(d_input: usize, d_output: usize, bits: u32) -> Self {
        assert!((1..=8).contains(&bits), "bits must be in 1..=8, found {bits}");
        Self { words: vec![0; code_rows(d_input, bits) * d_output], d_input, d_output, bits }
    }

    /// Writes the codes of one output; may be called once per column.
    ///
    /// # Panics
    /// If `output` is out of range or `codes` doesn't hold `d_input` values below `2^bits`.
    pub fn set_column(&mut self, output: usize, codes: &[u8]) {
        assert!(output < self.d_output, "output {output} of {}", self.d_output);
        assert_eq!(codes.len(), self.d_input, "codes of one column");
        for (run, chunk) in codes.chunks(RUN).enumerate() {
            let base = run * self.bits as usize;
            let (mut buffer, mut filled, mut row) = (0u64, 0, base);
            for &code in chunk {
                assert!(u32::from(code) < 1 << self.bits, "code {code} needs more than {} bits", self.bits);
                buffer |= u64::from(code) << filled;
                filled += self.bits;
                if filled >= 32 {
                    self.words[row * self.d_output + output] = buffer as u32;
                    (buffer, filled, row) = (buffer >> 32, filled - 32, row + 1);
                }
            }
            if filled > 0 {
                self.words[row * self.d_output + output] = buffer as u32;
            }
        }
    }

    /// The words, `[code_rows, d_output]`.
    pub fn into_words(self) -> Vec<u32> {
        self.words
    }
}

/// Reads the first `codes.len()` codes of column `output` from words `[code_rows, d_output]`.
///
/// # Panics
/// If the words don't hold that many codes of that column.
pub fn unpack_column(words: &[u32], d_output: usize, bits: u32, output: usize, codes: &mut [u8]) {
    let mask = (1u32 << bits) - 1;
    for (input, code) in codes.iter_mut().enumerate() {
        let (row, shift) = position(input, bits);
        let mut value = words[row * d_output + output] >> shift;
        if shift + bits > 32 {
            value |= words[(row + 1) * d_output + output] << (32 - shift);
        }
        *code = (value & mask) as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn packing_round_trips_any_width_and_size(
            bits in 1u32..=8, d_input in 1usize..200, d_output in 1usize..6, seed in any::<u64>(),
        ) {
            let code = |k: usize, c: usize| {
                (seed.wrapping_mul((k * 31 + c * 7 + 1) as u64) >> 40) as u8 & ((1u16 << bits) - 1) as u8
            };
            let mut packer = CodePacker::new(d_input, d_output, bits);
            for c in 0..d_output {
                packer.set_column(c, &(0..d_input).map(|k| code(k, c)).collect::<Vec<_>>());
            }
            let words = packer.into_words();
            prop_assert_eq!(words.len(), code_rows(d_input, bits) * d_output);
            for c in 0..d_output {
                // Beyond `d_input` the padding of the last run must read as zero.
                let padded = d_input.next_multiple_of(RUN);
                let mut codes = vec![0; padded];
                unpack_column(&words, d_output, bits, c, &mut codes);
                for (k, &found) in codes.iter().enumerate() {
                    prop_assert_eq!(found, if k < d_input { code(k, c) } else { 0 });
                }
            }
        }
    }

    #[test]
    fn three_bit_codes_straddle_words_as_in_gptq() {
        // Codes 10 and 21 of a run of 32 cross word borders (bits 30..33 and 63..66).
        let mut codes = [0u8; 32];
        (codes[10], codes[21]) = (0b101, 0b110);
        let mut packer = CodePacker::new(32, 1, 3);
        packer.set_column(0, &codes);
        assert_eq!(packer.into_words(), [0b01 << 30, 1, 0b11]);
    }
}
