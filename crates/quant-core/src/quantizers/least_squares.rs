//! Scale and offset by least squares for the codes that rounding chose.

use super::{
    HostQuantizer,
    blocks::{Blocks, Params},
    encode::Encoder,
    rtn::{fit, range, round_integer, with_zero_point},
};
use crate::{Error, Grid, PackedWeight, QuantScheme, Result, Value};

/// Rounds to nearest on the block's range, then takes the scale and offset of least squared error for those codes, then the
/// nearest codes for these, and so on; the best of all is kept, so that no block gets worse than with
/// [`MinMax`](super::MinMax) (before scales that are themselves quantized, where the scheme has such).
///
/// The alternation is Lloyd's algorithm (1957) with levels bound to a line, or to a codebook's. On the integer grid the zero
/// point is the free offset's, rounded, and the scale the best for it; the symmetric grid and codebooks have a scale only.
///
/// | option | default | meaning | range |
/// | --- | --- | --- | --- |
/// | `iterations` | 8 | fits at most; a block ends early where the codes no longer change its error | from 1 |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeastSquares {
    /// Fits at most.
    pub iterations: usize,
}

impl Default for LeastSquares {
    fn default() -> Self {
        Self { iterations: 8 }
    }
}

impl HostQuantizer for LeastSquares {
    fn quantize(
        &self,
        name: &str,
        weight: &[f32],
        d_input: usize,
        d_output: usize,
        scheme: &QuantScheme,
    ) -> Result<PackedWeight> {
        if self.iterations == 0 {
            let option = "LeastSquares.iterations".into();
            return Err(Error::Option { option, expected: "at least 1".into(), found: "0".into() });
        }
        let blocks = Blocks::new(name, weight, d_input, d_output, scheme)?;
        let encoder = Encoder::new(scheme.value);
        blocks.pack(&blocks.map(|_, values| self.search(scheme, &encoder, values)))
    }
}

impl LeastSquares {
    fn search(&self, scheme: &QuantScheme, encoder: &Encoder, values: &[f32]) -> Params {
        let mut best = fit(scheme, range(values));
        let mut least = encoder.error(&best, values, 2.0);
        let mut codes = vec![0; values.len()];
        for _ in 0..self.iterations {
            encoder.encode(&best, values, &mut codes);
            let Some(params) = Sums::of(scheme.value, values, &codes).fit(scheme) else { break };
            let error = encoder.error(&params, values, 2.0);
            // Written so that an error of NaN, of scales too large for their storage type, is taken if there is a better one.
            if error < least || (least.is_nan() && !error.is_nan()) {
                (best, least) = (params, error);
            } else {
                break;
            }
        }
        best
    }
}

/// What a fit needs of a block with levels `l` and weights `w`.
#[derive(Debug, Default)]
struct Sums {
    count: f64,
    l: f64,
    ll: f64,
    w: f64,
    lw: f64,
}

impl Sums {
    fn of(value: Value, values: &[f32], codes: &[u8]) -> Self {
        let mut sums = Self { count: values.len() as f64, ..Self::default() };
        for (&w, &code) in values.iter().zip(codes) {
            let level = match value {
                Value::Codebook(codebook) => codebook.levels().get(usize::from(code)).copied().unwrap_or(0.0),
                Value::Affine { bits, grid: Grid::Symmetric } => {
                    f32::from(code) - (1u32 << (bits - 1)) as f32
                }
                Value::Affine { .. } => f32::from(code),
            };
            let (w, l) = (f64::from(w), f64::from(level));
            sums.l += l;
            sums.ll += l * l;
            sums.w += w;
            sums.lw += l * w;
        }
        sums
    }

    /// The scale for levels that are shifted by `-zero`, and weights by `-offset`.
    fn scale(&self, zero: f64, offset: f64) -> f64 {
        let lw = self.lw - zero * self.w - offset * (self.l - zero * self.count);
        lw / (self.ll - 2.0 * zero * self.l + zero * zero * self.count)
    }

    /// The stored scale and offset of least error; none where codes or weights don't tell one.
    fn fit(&self, scheme: &QuantScheme) -> Option<Params> {
        let storage = scheme.scales;
        let found = match scheme.value {
            Value::Codebook(_) | Value::Affine { grid: Grid::Symmetric, .. } => {
                Params { scale: storage.round(self.scale(0.0, 0.0) as f32), offset: 0.0 }
            }
            Value::Affine { grid, .. } => {
                let spread = self.count * self.ll - self.l * self.l;
                let scale = (self.count * self.lw - self.l * self.w) / spread;
                let offset = (self.w - scale * self.l) / self.count;
                match grid {
                    Grid::Integer => {
                        let zero = round_integer((-offset / scale) as f32);
                        let scale = storage.round(self.scale(f64::from(zero), 0.0) as f32);
                        with_zero_point(scale, zero, storage)
                    }
                    _ => {
                        let offset = storage.round(offset as f32);
                        Params { scale: storage.round(self.scale(0.0, f64::from(offset)) as f32), offset }
                    }
                }
            }
        };
        (found.scale > 0.0 && found.scale.is_finite() && found.offset.is_finite()).then_some(found)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::random_weight, *};
    use crate::quantizers::{MinMax, error};

    fn squares(weight: &[f32], found: &[f32]) -> f64 {
        weight.iter().zip(found).map(|(w, q)| (f64::from(*w) - f64::from(*q)).powi(2)).sum()
    }

    /// With f32 scales no small change of scale or offset makes the same codes better.
    #[test]
    fn the_fit_is_the_best_for_its_codes() {
        for text in ["affine2:64", "affine4:64", "affine3:64:sym", "nf4:64", "nf2:64"] {
            let scheme: QuantScheme = text.parse().unwrap();
            let weight = random_weight(5, 64);
            let encoder = Encoder::new(scheme.value);
            let mut codes = vec![0; 64];
            encoder.encode(&fit(&scheme, range(&weight)), &weight, &mut codes);
            let found = Sums::of(scheme.value, &weight, &codes).fit(&scheme).unwrap();
            let of = |scale: f32, offset: f32| -> f64 {
                let read = |code: &u8| match scheme.value {
                    Value::Codebook(codebook) => scale * codebook.levels()[usize::from(*code)],
                    Value::Affine { bits, grid: Grid::Symmetric } => {
                        scale * (i32::from(*code) - (1 << (bits - 1))) as f32
                    }
                    Value::Affine { .. } => scale * f32::from(*code) + offset,
                };
                squares(&weight, &codes.iter().map(read).collect::<Vec<_>>())
            };
            let best = of(found.scale, found.offset);
            let step = 1e-3 * found.scale;
            for (scale, offset) in [(step, 0.0), (-step, 0.0), (0.0, step), (0.0, -step), (step, -step)] {
                if offset == 0.0 || scheme.has_offsets() {
                    assert!(best < of(found.scale + scale, found.offset + offset), "{text} {scale} {offset}");
                }
            }
        }
    }

    #[test]
    fn few_bits_gain_most() {
        let weight = random_weight(9, 64 * 256);
        for (text, most) in
            [("affine2:64", 0.9), ("affine3:64", 0.96), ("affine4:64:int:f16", 1.0), ("nf3:64:f16", 1.0)]
        {
            let scheme = text.parse().unwrap();
            let of = |quantizer: &dyn HostQuantizer| {
                let packed = quantizer.quantize("w", &weight, 256, 64, &scheme).unwrap();
                error(&weight, &packed).relative
            };
            let [plain, once, fitted] =
                [of(&MinMax), of(&LeastSquares { iterations: 1 }), of(&LeastSquares::default())];
            assert!(
                fitted <= once && once <= plain && fitted < most * plain,
                "{text}: {plain} {once} {fitted}"
            );
        }
    }
}
