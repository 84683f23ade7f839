//! Codes of one block's weights, and what they read back as.

use super::{blocks::Params, codebook::NearestLevel};
use crate::{Grid, Value};

/// Adding this to an f32 below 2^22 in magnitude rounds it to an integer, ties to even, and leaves that integer
/// in the low bits: a rounding that every target can do in one vector instruction.
const ROUND: f32 = 12_582_912.0;

/// `value` rounded to an integer, ties to even; for magnitudes below 2^22.
#[inline]
pub(super) fn round(value: f32) -> f32 {
    (value + ROUND) - ROUND
}

/// Chooses the nearest code.
#[derive(Debug)]
pub(super) enum Encoder {
    /// Levels `scale * (low..=high) + offset`; code 0 stands for `low`.
    Affine {
        /// 0, or `-2^(bits - 1)` on the symmetric grid.
        low: f32,
        /// `low + 2^bits - 1`.
        high: f32,
    },
    /// `scale * level`.
    Codebook(NearestLevel),
}

impl Encoder {
    pub(super) fn new(value: Value) -> Self {
        match value {
            Value::Codebook(codebook) => Self::Codebook(NearestLevel::new(codebook)),
            Value::Affine { bits, grid } => {
                let top = ((1u32 << bits) - 1) as f32;
                let low = if grid == Grid::Symmetric { -((1u32 << (bits - 1)) as f32) } else { 0.0 };
                Self::Affine { low, high: low + top }
            }
        }
    }

    /// The nearest codes; of two equally near ones the even integer, or the lower level of a codebook.
    pub(super) fn encode(&self, params: &Params, values: &[f32], codes: &mut [u8]) {
        match self {
            Self::Affine { low, high } => {
                // On a grid of one level any code would do: take the one that means "offset".
                let scale = if params.scale == 0.0 { f32::INFINITY } else { params.scale };
                for (&value, code) in values.iter().zip(codes) {
                    let level = ((value - params.offset) / scale).clamp(*low, *high);
                    *code = (level + ROUND).to_bits().wrapping_sub((low + ROUND).to_bits()) as u8;
                }
            }
            Self::Codebook(levels) => {
                let normalize = normalizer(params.scale);
                for (&value, code) in values.iter().zip(codes) {
                    *code = levels.code(normalize(value));
                }
            }
        }
    }

    /// Sum of `|w - q|^norm` over the block, in f64.
    pub(super) fn error(&self, params: &Params, values: &[f32], norm: f32) -> f64 {
        // The common norms without `powf`.
        if norm == 2.0 {
            self.sum(params, values, |difference| f64::from(difference) * f64::from(difference))
        } else if norm == 1.0 {
            self.sum(params, values, |difference| f64::from(difference.abs()))
        } else {
            self.sum(params, values, |difference| f64::from(difference.abs().powf(norm)))
        }
    }

    fn sum(&self, params: &Params, values: &[f32], loss: impl Fn(f32) -> f64) -> f64 {
        let Params { scale, offset } = *params;
        match self {
            Self::Affine { low, high } => {
                let divisor = if scale == 0.0 { f32::INFINITY } else { scale };
                sum(values, |value| {
                    let level = round(((value - offset) / divisor).clamp(*low, *high));
                    loss(value - (scale * level + offset))
                })
            }
            Self::Codebook(levels) => {
                let normalize = normalizer(scale);
                sum(values, |value| loss(value - scale * levels.level(normalize(value))))
            }
        }
    }
}

/// `value / scale` as bitsandbytes computes it: times the reciprocal. A zero scale gives 0; where the reciprocal
/// would overflow, both sides are raised by a power of two first.
fn normalizer(scale: f32) -> impl Fn(f32) -> f32 {
    let lift = if scale < 4.0 * f32::MIN_POSITIVE { 2f32.powi(64) } else { 1.0 };
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / (scale * lift) };
    move |value| (value * lift) * inverse
}

/// Sum of `term` in eight lanes, so that it runs in vector instructions.
pub(super) fn sum(values: &[f32], term: impl Fn(f32) -> f64) -> f64 {
    let (chunks, rest) = values.as_chunks::<8>();
    let mut lanes = [0.0; 8];
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += term(value);
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|&value| term(value)).sum::<f64>()
}
