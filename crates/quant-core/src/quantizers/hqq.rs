//! Half-quadratic quantization: the zero point that suits heavy-tailed errors.

use super::{
    HostQuantizer,
    blocks::{Blocks, Params},
    encode::{round, sum},
    rtn::{fit, levels, range, round_integer, with_zero_point},
};
use crate::{Error, Grid, PackedWeight, QuantScheme, Result, Value};

/// Half-quadratic quantization (Badri and Shaji, 2023), the solver of the Python package `hqq` 0.2.8.
///
/// The scale is the block's range over `2^bits - 1`, as with [`MinMax`](super::MinMax); the zero point then
/// minimises `sum |w - q|^p` with `p < 1`, which cares about many small errors more than about few large ones.
/// Each iteration shrinks the residual, `e = sign(r) max(0, |r| - |r|^(p - 1) / beta)`, and sets
/// `zero = mean(code - (w - e) / scale)`; then `beta` grows by `kappa`. All blocks stop together as soon as the
/// weight's mean absolute error no longer falls.
///
/// | option | default | meaning | range |
/// | --- | --- | --- | --- |
/// | `lp_norm` | 0.7 | `p` | above 0, at most 1 |
/// | `beta` | 10 | how closely the shrunken residual follows the residual | above 0 |
/// | `kappa` | 1 | growth of `beta` per iteration | from 1 |
/// | `iters` | 20 | iterations at most | from 1 |
///
/// The paper lets `beta` grow, and the package lists `kappa` 1.01 among its options; its solver never applies it,
/// hence the default here.
///
/// Takes affine schemes with float offset (`-zero * scale`) or integer zero point (the solver's, rounded at the
/// end). Differences from the package: the zero point is solved for the scale as stored; blocks with a range of
/// at most 1e-4, whose scale the package sets to 1, and scales below 5e-5, which it raises (both guards for half
/// precision), keep their own scale.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hqq {
    /// The exponent `p` of the error.
    pub lp_norm: f32,
    /// Weight of the quadratic term.
    pub beta: f32,
    /// Growth of `beta` per iteration.
    pub kappa: f32,
    /// Most iterations.
    pub iters: usize,
}

impl Default for Hqq {
    fn default() -> Self {
        Self { lp_norm: 0.7, beta: 10.0, kappa: 1.0, iters: 20 }
    }
}

impl Hqq {
    fn check(&self) -> Result<()> {
        let fail = |option: &str, expected: &str, found: String| {
            Err(Error::Option { option: format!("Hqq.{option}"), expected: expected.into(), found })
        };
        if !(self.lp_norm > 0.0 && self.lp_norm <= 1.0) {
            return fail("lp_norm", "a number above 0, at most 1", self.lp_norm.to_string());
        }
        if !(self.beta > 0.0 && self.beta.is_finite()) {
            return fail("beta", "a finite number above 0", self.beta.to_string());
        }
        if !(self.kappa >= 1.0 && self.kappa.is_finite()) {
            return fail("kappa", "a finite number from 1", self.kappa.to_string());
        }
        if self.iters == 0 {
            return fail("iters", "at least 1", self.iters.to_string());
        }
        Ok(())
    }

    /// Zero points of all blocks for the scales of `start`, both output-major.
    fn solve(&self, blocks: &Blocks, start: &[Params], top: f32) -> Vec<f32> {
        let mut zeros: Vec<f32> = start.iter().map(|p| -p.offset / p.scale).collect();
        let (mut beta, mut least) = (self.beta, f32::INFINITY);
        for _ in 0..self.iters {
            let shrink = Shrink::new(beta, self.lp_norm);
            let steps = blocks.map(|i, values| {
                if has_zero_point(&start[i]) {
                    step(values, start[i].scale, zeros[i], top, &shrink)
                } else {
                    (0.0, 0.0)
                }
            });
            let error = steps.iter().map(|(_, error)| error).sum::<f64>() / blocks.weights() as f64;
            zeros = steps.into_iter().map(|(zero, _)| zero).collect();
            // The package keeps the zero points of the step that failed to improve, too.
            if error as f32 >= least {
                break;
            }
            least = error as f32;
            beta *= self.kappa;
        }
        zeros
    }
}

impl HostQuantizer for Hqq {
    fn quantize(
        &self,
        name: &str,
        weight: &[f32],
        d_input: usize,
        d_output: usize,
        scheme: &QuantScheme,
    ) -> Result<PackedWeight> {
        self.check()?;
        let Value::Affine { bits, grid: grid @ (Grid::Float | Grid::Integer) } = scheme.value else {
            return Err(Error::Scheme {
                text: scheme.to_string(),
                reason: "half-quadratic quantization needs an affine scheme with an offset".into(),
            });
        };
        let blocks = Blocks::new(name, weight, d_input, d_output, scheme)?;
        let mut params = blocks.map(|_, values| fit(scheme, range(values)));
        let zeros = self.solve(&blocks, &params, levels(bits));
        for (params, zero) in params.iter_mut().zip(zeros) {
            if has_zero_point(params) {
                let zero = if grid == Grid::Integer { round_integer(zero) } else { zero };
                *params = with_zero_point(params.scale, zero, scheme.scales);
            }
        }
        blocks.pack(&params)
    }
}

/// A constant block, or one within a few subnormal numbers, has none.
fn has_zero_point(params: &Params) -> bool {
    (1.0 / params.scale).is_finite()
}

/// One iteration on one block: its next zero point, and the sum of absolute errors before it.
fn step(values: &[f32], scale: f32, zero: f32, top: f32, shrink: &Shrink) -> (f32, f64) {
    let inverse = 1.0 / scale;
    let code = |w: f32| round((w * inverse + zero).clamp(0.0, top));
    let residual = |w: f32| w - (code(w) - zero) / inverse;
    let error = sum(values, |w| f64::from(residual(w).abs()));
    let total = sum(values, |w| f64::from(code(w) - (w - shrink.apply(residual(w))) * inverse));
    ((total / values.len() as f64) as f32, error)
}

/// The shrinking operator `sign(r) max(0, |r| - |r|^(p - 1) / beta)`.
struct Shrink {
    inverse_beta: f32,
    exponent: f32,
    /// Residuals up to here shrink to zero: `beta^(-1 / (2 - p))`, a little less for rounding. Most do.
    zero_up_to: f32,
}

impl Shrink {
    fn new(beta: f32, lp_norm: f32) -> Self {
        Self {
            inverse_beta: 1.0 / beta,
            exponent: lp_norm - 1.0,
            zero_up_to: 0.999 * beta.powf(-1.0 / (2.0 - lp_norm)),
        }
    }

    #[inline]
    fn apply(&self, residual: f32) -> f32 {
        let size = residual.abs();
        if size <= self.zero_up_to {
            return 0.0;
        }
        (size - self.inverse_beta * size.powf(self.exponent)).max(0.0).copysign(residual)
    }
}
