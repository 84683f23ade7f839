//! Round to nearest on the shrunken range with the least error.

use super::{
    HostQuantizer,
    blocks::{Blocks, Params},
    encode::Encoder,
    rtn::{fit, range},
};
use crate::{Error, PackedWeight, QuantScheme, Result};

/// Tries shrunken ranges for every block and keeps the one with the least error, as GPTQ's "mse" option does.
///
/// The range shrinks towards zero, or towards its end nearest to zero where it doesn't contain zero; the first
/// range tried is the whole one, so no block gets worse than with [`MinMax`](super::MinMax) in the chosen norm
/// (before double quantization of the scales, where the scheme asks for that).
///
/// | option | default | meaning | range |
/// | --- | --- | --- | --- |
/// | `grid` | 40 | ranges tried after the whole one | from 1 |
/// | `shrink_to` | 0.4 | the smallest range, as a part of the whole | above 0, below 1 |
/// | `norm` | 2 | exponent of the error | above 0 |
///
/// Exponents other than 1 and 2 are several times slower. GPTQ's own search is close to 80, 0.2 and 2.4.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MseClipped {
    /// Ranges tried after the whole one.
    pub grid: usize,
    /// The smallest range tried, as a part of the whole.
    pub shrink_to: f32,
    /// The exponent `p` in the error `sum |w - q|^p`.
    pub norm: f32,
}

impl Default for MseClipped {
    fn default() -> Self {
        Self { grid: 40, shrink_to: 0.4, norm: 2.0 }
    }
}

impl MseClipped {
    fn check(&self) -> Result<()> {
        let fail = |option: &str, expected: &str, found: String| {
            Err(Error::Option { option: format!("MseClipped.{option}"), expected: expected.into(), found })
        };
        if self.grid == 0 {
            return fail("grid", "at least 1", self.grid.to_string());
        }
        if !(self.shrink_to > 0.0 && self.shrink_to < 1.0) {
            return fail("shrink_to", "a number above 0 and below 1", self.shrink_to.to_string());
        }
        if !(self.norm > 0.0 && self.norm.is_finite()) {
            return fail("norm", "a finite number above 0", self.norm.to_string());
        }
        Ok(())
    }

    /// The best grid for one block.
    fn search(&self, scheme: &QuantScheme, encoder: &Encoder, values: &[f32]) -> Params {
        let (min, max) = range(values);
        let centre = 0f32.clamp(min, max);
        let mut best = fit(scheme, (min, max));
        let mut least = encoder.error(&best, values, self.norm);
        if least == 0.0 {
            return best;
        }
        for i in 1..=self.grid {
            let part = 1.0 - (1.0 - self.shrink_to) * i as f32 / self.grid as f32;
            let shrunken = (centre + part * (min - centre), centre + part * (max - centre));
            let params = fit(scheme, shrunken);
            let error = encoder.error(&params, values, self.norm);
            // Written so that a whole range too wide for its storage type, whose error is NaN, loses.
            if error < least || least.is_nan() {
                (best, least) = (params, error);
            }
        }
        best
    }
}

impl HostQuantizer for MseClipped {
    fn quantize(
        &self,
        name: &str,
        weight: &[f32],
        d_input: usize,
        d_output: usize,
        scheme: &QuantScheme,
    ) -> Result<PackedWeight> {
        self.check()?;
        let blocks = Blocks::new(name, weight, d_input, d_output, scheme)?;
        let encoder = Encoder::new(scheme.value);
        blocks.pack(&blocks.map(|_, values| self.search(scheme, &encoder, values)))
    }
}
