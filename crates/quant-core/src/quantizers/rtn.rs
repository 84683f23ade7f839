//! Round to nearest on the block's range.

use super::{
    HostQuantizer,
    blocks::{Blocks, Params},
    encode::round,
};
use crate::{Grid, PackedWeight, QuantScheme, Result, ScaleType, Value};

/// Round to nearest on a grid over the block's whole range.
///
/// With `n = 2^bits - 1`:
///
/// | grid | scale | offset |
/// | --- | --- | --- |
/// | float | `(max - offset) / n` | `min` |
/// | integer | `(max - min) / n` | `scale * round(min / scale)`, that is `-scale * zero` |
/// | symmetric | `max(abs) / (2^(bits - 1) - 1)` | none |
/// | codebook | `max(abs)`, over the smaller end of its levels | none |
///
/// Ranges are not extended to zero, and the integer grid's zero point may lie outside `0..=n`. In 32 bits the
/// float grid's scale is `(max - min) / n`; with a 16-bit offset the range starts at the offset as stored.
/// Codebook codes equal bitsandbytes' 4-bit ones.
///
/// A scale too small for its storage type is stored as zero; its block then reads back as its offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MinMax;

impl HostQuantizer for MinMax {
    fn quantize(
        &self,
        name: &str,
        weight: &[f32],
        d_input: usize,
        d_output: usize,
        scheme: &QuantScheme,
    ) -> Result<PackedWeight> {
        let blocks = Blocks::new(name, weight, d_input, d_output, scheme)?;
        blocks.pack(&blocks.map(|_, values| fit(scheme, range(values))))
    }
}

/// Smallest and largest value of a block.
pub(super) fn range(values: &[f32]) -> (f32, f32) {
    values.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(min, max), &w| {
        (if w < min { w } else { min }, if w > max { w } else { max })
    })
}

/// The grid of `scheme` that spans `min..=max`, rounded to its storage type.
pub(super) fn fit(scheme: &QuantScheme, (min, max): (f32, f32)) -> Params {
    let storage = scheme.scales;
    let largest = min.abs().max(max.abs());
    match scheme.value {
        Value::Codebook(codebook) => Params { scale: storage.round(largest / codebook.reach()), offset: 0.0 },
        Value::Affine { bits, grid: Grid::Symmetric } => {
            let top = ((1u32 << (bits - 1)) - 1) as f32;
            Params { scale: storage.round(largest / top), offset: 0.0 }
        }
        Value::Affine { bits, grid: Grid::Float } => float(min, max, levels(bits), storage),
        Value::Affine { bits, grid: Grid::Integer } => integer(min, max, levels(bits), storage),
    }
}

/// Largest code, as a float.
pub(super) fn levels(bits: u32) -> f32 {
    ((1u32 << bits) - 1) as f32
}

fn float(min: f32, max: f32, top: f32, storage: ScaleType) -> Params {
    let offset = storage.round(min);
    // From the stored offset, so that rounding it doesn't cut off the other end.
    let scale = if min == max { 0.0 } else { storage.round(((max - offset) / top).max(0.0)) };
    Params { scale, offset }
}

fn integer(min: f32, max: f32, top: f32, storage: ScaleType) -> Params {
    let scale = storage.round((max - min) / top);
    if scale > 0.0 {
        return with_zero_point(scale, -round_integer(min / scale), storage);
    }
    // One value: 1 step above or below zero.
    let scale = storage.round(min.abs());
    with_zero_point(scale, if min < 0.0 { 1.0 } else { 0.0 }, storage)
}

/// `scale * (code - zero)` with its offset as stored.
pub(super) fn with_zero_point(scale: f32, zero: f32, storage: ScaleType) -> Params {
    Params { scale, offset: storage.round(-scale * zero) }
}

/// To the nearest integer, ties to even.
pub(super) fn round_integer(value: f32) -> f32 {
    // Above 2^22 the fast rounding is not exact; such a block is constant but for its last bits.
    if value.abs() < 4_194_304.0 { round(value) } else { value.round_ties_even() }
}
