//! A dense weight cut into the blocks of a scheme: checked, visited in parallel, packed.

use std::borrow::Cow;

use rayon::prelude::*;

use super::{double_quantize, encode::Encoder, super_blocks::in_super_blocks};
use crate::{
    Error, PackedWeight, QuantScheme, Result, ScaleType, Scales, Value,
    packing::{CodePacker, code_rows},
};

/// Outputs packed together: enough to write whole cache lines of words.
const BAND: usize = 16;

/// Scale and offset of one block as they read back from storage. The offset is 0 where none is stored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Params {
    /// Distance of two levels, or the factor of a codebook.
    pub scale: f32,
    /// Added to every value.
    pub offset: f32,
}

/// A checked weight `[d_output, d_input]` with the scheme it shall have.
#[derive(Debug)]
pub(super) struct Blocks<'a> {
    name: &'a str,
    weight: &'a [f32],
    d_input: usize,
    d_output: usize,
    scheme: QuantScheme,
}

impl<'a> Blocks<'a> {
    /// Checks sizes, scheme and weight.
    pub(super) fn new(
        name: &'a str,
        weight: &'a [f32],
        d_input: usize,
        d_output: usize,
        scheme: &QuantScheme,
    ) -> Result<Self> {
        check_scheme(scheme)?;
        if weight.is_empty() || d_input.checked_mul(d_output) != Some(weight.len()) {
            return Err(Error::Tensor {
                name: name.into(),
                expected: format!("{d_output} outputs of {d_input} values, at least one value"),
                found: format!("{} values", weight.len()),
            });
        }
        let bad = weight.par_iter().enumerate().find_first(|(_, value)| !value.is_finite());
        if let Some((i, &value)) = bad {
            let (output, input) = (i / d_input, i % d_input);
            return Err(Error::NotFinite { name: name.into(), output, input, value });
        }
        Ok(Self { name, weight, d_input, d_output, scheme: *scheme })
    }

    /// Number of weights.
    pub(super) fn weights(&self) -> usize {
        self.weight.len()
    }

    /// `visit(i, values)` for every block, in parallel; `i` counts blocks in output-major order
    /// (`column * block_rows + row`), which is the order of the results too.
    pub(super) fn map<T: Send>(&self, visit: impl Fn(usize, &[f32]) -> T + Sync) -> Vec<T> {
        let [rows, columns] = self.scheme.scale_shape(self.d_input, self.d_output);
        let per_column: Vec<Vec<T>> = (0..columns)
            .into_par_iter()
            .map(|column| {
                (0..rows).map(|row| visit(column * rows + row, &self.values(row, column))).collect()
            })
            .collect();
        per_column.into_iter().flatten().collect()
    }

    /// The weights of one block, output by output.
    fn values(&self, row: usize, column: usize) -> Cow<'a, [f32]> {
        let inputs = self.scheme.block.inputs_of(self.d_input);
        let (first, end) = (row * inputs, self.d_input.min((row + 1) * inputs));
        let part = |output: usize| &self.weight[output * self.d_input + first..output * self.d_input + end];
        if self.scheme.block.outputs == 1 {
            return Cow::Borrowed(part(column));
        }
        let start = column * self.scheme.block.outputs;
        let outputs = start..self.d_output.min(start + self.scheme.block.outputs);
        Cow::Owned(outputs.flat_map(part).copied().collect())
    }

    /// Codes the weight against `params` (output-major) and packs the result.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a scale or offset is not finite.
    pub(super) fn pack(&self, params: &[Params]) -> Result<PackedWeight> {
        let [rows, columns] = self.scheme.scale_shape(self.d_input, self.d_output);
        let is_finite = |p: &Params| p.scale.is_finite() && p.offset.is_finite();
        if let Some(i) = params.iter().position(|p| !is_finite(p)) {
            return Err(self.overflow(i / rows, i % rows, &params[i]));
        }
        let mut params = Cow::Borrowed(params);
        let scales = if let Some(layout) = self.scheme.super_layout(self.d_input, self.d_output) {
            let (rounded, scales) = in_super_blocks(&self.scheme, &layout, &params);
            if let Some(i) = rounded.iter().position(|p| !is_finite(p)) {
                return Err(self.overflow(i / rows, i % rows, &params[i]));
            }
            params = Cow::Owned(rounded);
            Scales::Super(scales)
        } else if self.scheme.scales == ScaleType::Double {
            let double = double_quantize(&params.iter().map(|p| p.scale).collect::<Vec<_>>());
            if let Some(i) = double.decode().iter().position(|scale| !scale.is_finite()) {
                return Err(self.overflow(i / rows, i % rows, &params[i]));
            }
            Scales::Double(double)
        } else {
            Scales::Plain(input_major(&params, rows, columns, |p| p.scale))
        };
        let apart = self.scheme.has_offsets() && !matches!(scales, Scales::Super(_));
        let offsets = apart.then(|| input_major(&params, rows, columns, |p| p.offset));
        Ok(PackedWeight {
            scheme: self.scheme,
            d_input: self.d_input,
            d_output: self.d_output,
            codes: self.codes(&params, rows),
            scales,
            offsets,
            input_order: None,
        })
    }

    /// The words `[code_rows, d_output]`: bands of outputs are packed on their own, then laid side by side.
    fn codes(&self, params: &[Params], rows: usize) -> Vec<u32> {
        let encoder = Encoder::new(self.scheme.value);
        let inputs = self.scheme.block.inputs_of(self.d_input);
        let bands: Vec<Vec<u32>> = self
            .weight
            .par_chunks(BAND * self.d_input)
            .enumerate()
            .map(|(band, weight)| {
                let mut packer =
                    CodePacker::new(self.d_input, weight.len() / self.d_input, self.scheme.bits());
                let mut codes = vec![0; self.d_input];
                for (i, row) in weight.chunks_exact(self.d_input).enumerate() {
                    let column = (band * BAND + i) / self.scheme.block.outputs;
                    let params = &params[column * rows..][..rows];
                    for ((values, codes), params) in
                        row.chunks(inputs).zip(codes.chunks_mut(inputs)).zip(params)
                    {
                        encoder.encode(params, values, codes);
                    }
                    packer.set_column(i, &codes);
                }
                packer.into_words()
            })
            .collect();
        let mut words = vec![0; code_rows(self.d_input, self.scheme.bits()) * self.d_output];
        words.par_chunks_exact_mut(self.d_output).enumerate().for_each(|(row, words)| {
            for (words, band) in words.chunks_mut(BAND).zip(&bands) {
                let width = words.len();
                words.copy_from_slice(&band[row * width..][..width]);
            }
        });
        words
    }

    fn overflow(&self, column: usize, row: usize, params: &Params) -> Error {
        let (output, input) =
            (column * self.scheme.block.outputs, row * self.scheme.block.inputs_of(self.d_input));
        let largest = self.values(row, column).iter().fold(0.0f32, |max, w| max.max(w.abs()));
        Error::Tensor {
            name: self.name.into(),
            expected: format!("scales and offsets in the range of scheme {}", self.scheme),
            found: format!(
                "scale {} and offset {} for weights up to {largest} in the block at output {output}, input {input}",
                params.scale, params.offset
            ),
        }
    }
}

/// What a parsed scheme string can't be, but a scheme put together by hand can.
fn check_scheme(scheme: &QuantScheme) -> Result<()> {
    let fail = |reason: &str| Err(Error::Scheme { text: scheme.to_string(), reason: reason.into() });
    if scheme.block.outputs == 0 || scheme.block.inputs == Some(0) {
        return fail("expected blocks of at least one weight");
    }
    match scheme.value {
        Value::Affine { bits, .. } if ![2, 3, 4, 5, 6, 8].contains(&bits) => {
            fail("expected 2, 3, 4, 5, 6 or 8 bits")
        }
        _ => scheme.contradiction().map_or(Ok(()), fail),
    }
}

/// One field of output-major `params` as `[block_rows, block_columns]`.
fn input_major(params: &[Params], rows: usize, columns: usize, field: impl Fn(&Params) -> f32) -> Vec<f32> {
    let mut values = Vec::with_capacity(params.len());
    for row in 0..rows {
        values.extend((0..columns).map(|column| field(&params[column * rows + row])));
    }
    values
}
