//! Affine weights with integer zero points and scales in f16, as GPTQ and AWQ hold them.

use std::collections::BTreeMap;

use kiln_quant_core::{
    Block, Grid, PackedWeight, QuantScheme, ScaleType, Scales, Value,
    packing::{CodePacker, unpack_column},
};

use super::{
    FloatType, Format,
    item::{Groups, Item, rounded},
};
use crate::Result;

/// Steps of the grid: what dividing an offset `-scale * zero` of f32 by its scale may be off a whole number.
const ZERO_ROUNDING: f32 = 1e-4;

/// One linear as integers.
pub(super) struct Integers {
    /// Kiln's words, with the codes of constant groups set to zero.
    pub codes: Vec<u32>,
    /// As f16 holds them, `[groups, d_output]`.
    pub scales: Vec<f32>,
    pub zeros: Vec<u8>,
    /// Largest distance of an offset from its integer zero, in steps of the grid.
    offset_error: f32,
}

impl Integers {
    /// In groups of `group` inputs, which the weight's own are or are made of.
    pub(crate) fn of(format: Format, item: &Item, weight: &PackedWeight, group: usize) -> Result<Self> {
        let (bits, d_output) = (weight.scheme.bits(), weight.d_output);
        let groups = Groups::of(weight, group);
        let most = ((1u32 << bits) - 1) as f32;
        let (mut zeros, mut offset_error) = (Vec::with_capacity(groups.scales.len()), 0.0f32);
        let (mut scales, mut constant) = (groups.scales, Vec::new());
        for (i, scale) in scales.iter_mut().enumerate() {
            zeros.push(match groups.offsets.as_ref().map(|offsets| offsets[i]) {
                None => 1 << (bits - 1),
                Some(offset) if *scale == 0.0 => {
                    constant.push((i / d_output, i % d_output));
                    *scale = -offset;
                    1
                }
                Some(offset) => {
                    let exact = -offset / *scale;
                    let zero = exact.round().clamp(0.0, most);
                    offset_error = offset_error.max((exact - zero).abs());
                    zero as u8
                }
            });
        }
        let scales = rounded(format, &format!("{}.scales", item.path), &scales, FloatType::F16)?;
        let codes = clear_groups(weight, group, constant);
        Ok(Self { codes, scales, zeros, offset_error })
    }

    /// What zero points cost, if anything.
    pub(crate) fn note(&self, item: &Item) -> Option<String> {
        (self.offset_error > ZERO_ROUNDING).then(|| {
            format!(
                "{}: float offsets rounded to integer zero points, by up to {:.3} steps of the grid",
                item.name(),
                self.offset_error
            )
        })
    }

    /// What a reader sees of `weight`.
    pub(crate) fn into_weight(self, weight: &PackedWeight, group: usize) -> PackedWeight {
        let offsets = self.scales.iter().zip(&self.zeros).map(|(scale, &zero)| -(scale * f32::from(zero)));
        PackedWeight {
            scheme: QuantScheme {
                value: Value::Affine { bits: weight.scheme.bits(), grid: Grid::Integer },
                block: Block::group(group),
                scales: ScaleType::F32,
            },
            d_input: weight.d_input,
            d_output: weight.d_output,
            codes: self.codes,
            offsets: Some(offsets.collect()),
            scales: Scales::Plain(self.scales),
            input_order: weight.input_order.clone(),
        }
    }
}

/// The codes with those of the given (group, output) pairs set to zero.
fn clear_groups(weight: &PackedWeight, group: usize, constant: Vec<(usize, usize)>) -> Vec<u32> {
    if constant.is_empty() {
        return weight.codes.clone();
    }
    let (d_input, d_output, bits) = (weight.d_input, weight.d_output, weight.scheme.bits());
    let mut packer = CodePacker::new(d_input, d_output, bits);
    let mut column = vec![0; d_input];
    let mut by_output: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    constant.into_iter().for_each(|(row, output)| by_output.entry(output).or_default().push(row));
    for output in 0..d_output {
        unpack_column(&weight.codes, d_output, bits, output, &mut column);
        for row in by_output.get(&output).into_iter().flatten() {
            column[row * group..].iter_mut().take(group).for_each(|code| *code = 0);
        }
        packer.set_column(output, &column);
    }
    packer.into_words()
}
