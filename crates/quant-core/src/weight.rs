//! A packed weight in host memory: what quantizers and checkpoint readers make, and what becomes a
//! `PackedTensor` on a device.

use rayon::prelude::*;

use crate::{
    Error, QuantScheme, Result, ScaleType, Value,
    packing::{code_rows, unpack_column},
    scheme::{DOUBLE_BLOCK, Grid, SuperLayout},
};

/// Scales in host memory, by block: `[block_rows, block_columns]` as [`QuantScheme::scale_shape`] says.
#[derive(Debug, Clone, PartialEq)]
pub enum Scales {
    /// Values, already rounded to the scheme's [`ScaleType`].
    Plain(Vec<f32>),
    /// Double-quantized.
    Double(DoubleScales),
    /// Small integers under factors; the offsets too.
    Super(SuperScales),
}

/// Small integers, each under the factor of its 256 inputs; laid out as [`SuperLayout`] says.
#[derive(Debug, Clone, PartialEq)]
pub struct SuperBlocks {
    /// Words of integers, `[word_rows, d_output]`.
    pub words: Vec<u32>,
    /// Values of f16, `[factor_rows, d_output]`.
    pub factors: Vec<f32>,
}

/// Scales as [`ScaleType::Super4`] and [`ScaleType::Super8`] hold them, with the offsets, which are held alike.
#[derive(Debug, Clone, PartialEq)]
pub struct SuperScales {
    /// The scales.
    pub scales: SuperBlocks,
    /// The offsets, exactly when [`QuantScheme::has_offsets`].
    pub offsets: Option<SuperBlocks>,
}

impl SuperBlocks {
    /// All zero.
    pub fn new(layout: &SuperLayout) -> Self {
        let count = |rows: usize| rows.saturating_mul(layout.columns);
        Self { words: vec![0; count(layout.word_rows())], factors: vec![0.0; count(layout.factor_rows())] }
    }

    /// Writes an integer that was zero.
    ///
    /// # Panics
    /// If `row` or `column` is out of range, or the integer doesn't fit the layout's width.
    pub fn set(&mut self, layout: &SuperLayout, row: usize, column: usize, integer: i8) {
        let (word, shift) = layout.place(row);
        let fits = layout.bits == 8 || (0..16).contains(&integer);
        assert!(fits, "the integer {integer} needs more than {} bits", layout.bits);
        self.words[word * layout.columns + column] |= u32::from(integer as u8) << shift;
    }

    /// An integer.
    ///
    /// # Panics
    /// If `row` or `column` is out of range.
    pub fn get(&self, layout: &SuperLayout, row: usize, column: usize) -> i8 {
        let (word, shift) = layout.place(row);
        integer(self.words[word * layout.columns + column] >> shift, layout.bits)
    }

    /// The values, `[block_rows, d_output]`: each integer times its factor, exact in f32.
    pub fn decode(&self, layout: &SuperLayout) -> Vec<f32> {
        let columns = layout.columns;
        let value = |row: usize, column: usize| {
            self.factors[row / layout.blocks * columns + column] * f32::from(self.get(layout, row, column))
        };
        (0..layout.rows).flat_map(|row| (0..columns).map(move |column| value(row, column))).collect()
    }
}

/// The lowest `bits` of a word: unsigned at 4, signed at 8.
#[inline(always)]
pub(crate) fn integer(word: u32, bits: u32) -> i8 {
    if bits == 8 { word as u8 as i8 } else { (word & 15) as i8 }
}

/// QLoRA's double quantization: `scale = map[code] * nested[i / 256] + offset`, with `i` the scale's index in
/// **output-major** order (`column * block_rows + row`), as bitsandbytes stores them.
#[derive(Debug, Clone, PartialEq)]
pub struct DoubleScales {
    /// One code per scale, output-major.
    pub codes: Vec<u8>,
    /// One scale per 256 codes.
    pub nested: Vec<f32>,
    /// Added to every scale.
    pub offset: f32,
}

impl DoubleScales {
    /// The scales, output-major.
    pub fn decode(&self) -> Vec<f32> {
        let map = crate::dynamic_map::DYNAMIC_MAP;
        self.codes
            .iter()
            .enumerate()
            .map(|(i, &code)| map[usize::from(code)] * self.nested[i / DOUBLE_BLOCK] + self.offset)
            .collect()
    }
}

/// Codes, scales and offsets of one linear layer; layouts as in [`packing`](crate::packing).
///
/// The dense value at (`input`, `output`) is `scale * code + offset` or `scale * level[code]`, with scale and
/// offset of the block that holds it. With an `input_order`, packed row `k` stands for input `input_order[k]`.
#[derive(Debug, Clone, PartialEq)]
pub struct PackedWeight {
    /// The format.
    pub scheme: QuantScheme,
    /// Inputs.
    pub d_input: usize,
    /// Outputs.
    pub d_output: usize,
    /// Words `[code_rows, d_output]`.
    pub codes: Vec<u32>,
    /// Scales `[block_rows, block_columns]`.
    pub scales: Scales,
    /// Offsets in the scales' shape, exactly when [`QuantScheme::has_offsets`] and the scales don't hold them
    /// ([`Scales::Super`]).
    pub offsets: Option<Vec<f32>>,
    /// A permutation of `0..d_input` (GPTQ's act-order).
    pub input_order: Option<Vec<u32>>,
}

impl PackedWeight {
    /// Checks that all parts fit together; call it on anything read from a file.
    ///
    /// # Errors
    /// [`Error::Tensor`] naming the part of `name` that doesn't fit.
    pub fn validate(&self, name: &str) -> Result<()> {
        let check = |part: &str, expected: usize, found: usize| {
            if expected == found {
                return Ok(());
            }
            Err(Error::Tensor {
                name: format!("{name}.{part}"),
                expected: format!(
                    "{expected} values for {} inputs, {} outputs, scheme {}",
                    self.d_input, self.d_output, self.scheme
                ),
                found: found.to_string(),
            })
        };
        let [rows, columns] = self.scheme.scale_shape(self.d_input, self.d_output);
        // A product beyond `usize` fits no vector either.
        let count = rows.saturating_mul(columns);
        let words = code_rows(self.d_input, self.scheme.bits()).saturating_mul(self.d_output);
        check("codes", words, self.codes.len())?;
        match (&self.scales, self.scheme.scales) {
            (Scales::Double(double), ScaleType::Double) => {
                check("scales", count, double.codes.len())?;
                check("scales_nested", count.div_ceil(DOUBLE_BLOCK), double.nested.len())?;
            }
            (Scales::Plain(scales), ScaleType::F32 | ScaleType::F16 | ScaleType::Bf16) => {
                check("scales", count, scales.len())?;
            }
            (Scales::Super(both), ScaleType::Super4 | ScaleType::Super8) => {
                let layout = self.scheme.super_layout(self.d_input, self.d_output);
                let layout = layout.unwrap_or_else(|| unreachable!("the scale type has one"));
                let parts = [("scale_codes", "scales"), ("offset_codes", "offsets")];
                let both = [Some(&both.scales), both.offsets.as_ref()];
                let there = [true, self.scheme.has_offsets()];
                for (((codes, factors), blocks), there) in parts.into_iter().zip(both).zip(there) {
                    let size = |rows: usize| if there { rows.saturating_mul(layout.columns) } else { 0 };
                    check(codes, size(layout.word_rows()), blocks.map_or(0, |blocks| blocks.words.len()))?;
                    check(
                        factors,
                        size(layout.factor_rows()),
                        blocks.map_or(0, |blocks| blocks.factors.len()),
                    )?;
                }
            }
            (Scales::Plain(_), ScaleType::Double) => check("scales_nested", count.div_ceil(DOUBLE_BLOCK), 0)?,
            (Scales::Double(double), _) => check("scales_nested", 0, double.nested.len().max(1))?,
            (Scales::Plain(_), _) => check("scale_codes", 1, 0)?,
            (Scales::Super(_), _) => check("scale_codes", 0, 1)?,
        }
        let apart = self.scheme.has_offsets() && self.scheme.scales.integer_bits().is_none();
        let offsets = if apart { count } else { 0 };
        check("offsets", offsets, self.offsets.as_ref().map_or(0, Vec::len))?;
        if let Some(order) = &self.input_order {
            check("input_order", self.d_input, order.len())?;
            let mut seen = vec![false; self.d_input];
            for &input in order {
                match seen.get_mut(input as usize) {
                    Some(seen) if !*seen => *seen = true,
                    _ => {
                        return Err(Error::Tensor {
                            name: format!("{name}.input_order"),
                            expected: format!("a permutation of 0..{}", self.d_input),
                            found: format!("{input} twice or out of range"),
                        });
                    }
                }
            }
        }
        Ok(())
    }

    /// Scales `[block_rows, block_columns]` as the arithmetic sees them.
    pub fn effective_scales(&self) -> Vec<f32> {
        match &self.scales {
            Scales::Plain(scales) => scales.clone(),
            Scales::Super(both) => self.decoded(&both.scales),
            Scales::Double(double) => {
                let [rows, columns] = self.scheme.scale_shape(self.d_input, self.d_output);
                let decoded = double.decode();
                let mut scales = vec![0.0; rows * columns];
                for column in 0..columns {
                    for row in 0..rows {
                        scales[row * columns + column] = decoded[column * rows + row];
                    }
                }
                scales
            }
        }
    }

    /// Offsets `[block_rows, block_columns]` as the arithmetic sees them, where the scheme has any.
    pub fn effective_offsets(&self) -> Option<Vec<f32>> {
        match &self.scales {
            Scales::Super(both) => both.offsets.as_ref().map(|offsets| self.decoded(offsets)),
            _ => self.offsets.clone(),
        }
    }

    fn decoded(&self, blocks: &SuperBlocks) -> Vec<f32> {
        let layout = self.scheme.super_layout(self.d_input, self.d_output);
        layout.map_or_else(Vec::new, |layout| blocks.decode(&layout))
    }

    /// The dense weight in the checkpoint's layout, `[d_output, d_input]` row-major, inputs in their own order.
    ///
    /// Outputs are shared among threads; the result doesn't depend on their number.
    pub fn dequantize(&self) -> Vec<f32> {
        let (scales, offsets) = (self.effective_scales(), self.effective_offsets());
        let mut dense = vec![0.0; self.d_input * self.d_output];
        let rows = dense.par_chunks_exact_mut(self.d_input.max(1)).enumerate();
        // Neighbouring outputs share cache lines of words.
        rows.with_min_len(16).for_each_init(
            || vec![0; self.d_input],
            |codes, (output, row)| self.dequantize_output(output, &scales, offsets.as_deref(), codes, row),
        );
        dense
    }

    /// One row of [`Self::dequantize`]; `codes` is scratch for `d_input` codes.
    fn dequantize_output(
        &self,
        output: usize,
        scales: &[f32],
        offsets: Option<&[f32]>,
        codes: &mut [u8],
        row: &mut [f32],
    ) {
        let [_, columns] = self.scheme.scale_shape(self.d_input, self.d_output);
        let inputs = self.scheme.block.inputs_of(self.d_input);
        unpack_column(&self.codes, self.d_output, self.scheme.bits(), output, codes);
        for (k, &code) in codes.iter().enumerate() {
            let block = (k / inputs) * columns + output / self.scheme.block.outputs;
            let scale = scales[block];
            let value = match self.scheme.value {
                Value::Codebook(codebook) => scale * codebook.levels()[usize::from(code)],
                Value::Affine { bits, grid: Grid::Symmetric } => {
                    scale * (f32::from(code) - f32::from(1u8 << (bits - 1)))
                }
                Value::Affine { .. } => {
                    scale * f32::from(code) + offsets.map_or(0.0, |offsets| offsets[block])
                }
            };
            let input = self.input_order.as_ref().map_or(k, |order| order[k] as usize);
            row[input] = value;
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::{HostQuantizer, MinMax};

    #[test]
    fn dequantizing_gives_the_same_bits_on_any_number_of_threads() {
        let weight: Vec<f32> = (0..77 * 99).map(|i| (i as f32 * 0.37).sin()).collect();
        for scheme in ["affine3:32:int", "affine2:8x4", "nf4:64:double", "affine5:16:super8"] {
            let packed = MinMax.quantize("w", &weight, 77, 99, &scheme.parse().unwrap()).unwrap();
            let on = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| packed.dequantize()).into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let one = on(1);
            assert_eq!(one, on(5), "{scheme}");
            // And with no pool at all, one output after another.
            let (mut codes, mut row) = ([0; 77], [0.0; 77]);
            for (output, expected) in one.chunks(77).enumerate() {
                let (scales, offsets) = (packed.effective_scales(), packed.effective_offsets());
                packed.dequantize_output(output, &scales, offsets.as_deref(), &mut codes, &mut row);
                assert_eq!(row.map(f32::to_bits), expected, "{scheme}");
            }
        }
    }
}
