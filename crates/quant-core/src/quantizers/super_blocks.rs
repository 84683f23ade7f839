//! Scales and offsets as small integers under one factor per 256 inputs.

use half::f16;

use super::{
    blocks::Params,
    rtn::{levels, round_integer},
};
use crate::{Codebook, Grid, QuantScheme, SuperBlocks, SuperLayout, SuperScales, Value};

/// The largest integer for a scale: what GGUF's type of the same codes holds, so that the weight fits a file of it.
fn largest(scheme: &QuantScheme, layout: &SuperLayout) -> f32 {
    match scheme.value {
        _ if layout.bits == 4 => 15.0,
        Value::Affine { grid: Grid::Float, .. } => 63.0,
        Value::Affine { bits: 3, .. } | Value::Codebook(Codebook::Iq4Nl) => 31.0,
        _ => 127.0,
    }
}

/// `params` (output-major) as they read back, and the integers and factors that say so. Offsets are at most 0: a block
/// whose values all are positive begins at 0.
pub(super) fn in_super_blocks(
    scheme: &QuantScheme,
    layout: &SuperLayout,
    params: &[Params],
) -> (Vec<Params>, SuperScales) {
    let top = largest(scheme, layout);
    let mut rounded = params.to_vec();
    let mut offsets = scheme.has_offsets().then(|| SuperBlocks::new(layout));
    let mut scales = SuperBlocks::new(layout);
    for (column, params) in rounded.chunks_exact_mut(layout.rows).enumerate() {
        for (block, params) in params.chunks_mut(layout.blocks).enumerate() {
            let first = block * layout.blocks;
            if let Some(offsets) = &mut offsets {
                let reach = levels(scheme.bits());
                let highest: Vec<f32> = params.iter().map(|p| p.offset + p.scale * reach).collect();
                let below = params.iter().map(|p| p.offset.min(0.0)).collect::<Vec<_>>();
                let found = fill(offsets, layout, [first, column], &below, -top);
                for ((params, offset), highest) in params.iter_mut().zip(found).zip(highest) {
                    params.offset = offset;
                    params.scale = ((highest - offset) / reach).max(0.0);
                }
            }
            let wanted = params.iter().map(|p| p.scale).collect::<Vec<_>>();
            let found = fill(&mut scales, layout, [first, column], &wanted, top);
            params.iter_mut().zip(found).for_each(|(params, scale)| params.scale = scale);
        }
    }
    (rounded, SuperScales { scales, offsets })
}

/// Writes the values under one factor, which all have the sign of `top`; returns them as they read back. The value
/// farthest from zero becomes the integer `top` (without its sign).
fn fill(
    into: &mut SuperBlocks,
    layout: &SuperLayout,
    [first, column]: [usize; 2],
    values: &[f32],
    top: f32,
) -> Vec<f32> {
    let farthest = values.iter().fold(0.0f32, |most, value| most.max(value.abs()));
    let factor = f16::from_f32(farthest / top).to_f32();
    into.factors[first / layout.blocks * layout.columns + column] = factor;
    let integers = values.iter().map(|value| match factor {
        0.0 => 0.0,
        _ => round_integer(value / factor).clamp(0.0, top.abs()),
    });
    let integers: Vec<f32> = integers.collect();
    for (row, integer) in (first..).zip(&integers) {
        into.set(layout, row, column, *integer as i8);
    }
    integers.into_iter().map(|integer| integer * factor).collect()
}
