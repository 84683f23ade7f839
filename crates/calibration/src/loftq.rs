//! Starting points that look at the weight only: QLoRA's residual, LoftQ, PiSSA on a quantized residual.

use kiln_quant_core::{HostQuantizer, Hqq, LeastSquares, MinMax, MseClipped, PackedWeight, QuantScheme};
use serde::{Deserialize, Serialize};

use crate::{Error, Factors, Result, Svd, low_rank};

/// The quantizers of `kiln-quant-core`, with their defaults.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Rounding {
    /// Round to nearest on the whole range.
    #[default]
    MinMax,
    /// Round to nearest on the best shrunken range.
    MseClipped,
    /// Scale and offset of least squared error for the codes.
    LeastSquares,
    /// Half-quadratic.
    Hqq,
}

impl Rounding {
    /// The quantizer.
    pub fn quantizer(self) -> Box<dyn HostQuantizer> {
        match self {
            Self::MinMax => Box::new(MinMax),
            Self::MseClipped => Box::new(MseClipped::default()),
            Self::LeastSquares => Box::new(LeastSquares::default()),
            Self::Hqq => Box::new(Hqq::default()),
        }
    }
}

/// Options of [LoftQ](https://arxiv.org/abs/2310.08659).
///
/// | option | default | meaning | range |
/// | --- | --- | --- | --- |
/// | `iterations` | 5 | alternating steps; 1 is QLoRA's base with the best correction of its residual | from 1 |
/// | `rounding` | min-max | the quantizer | |
/// | `svd` | randomized | how singular vectors are found | |
/// | `compensate_scaling` | true | divides B by the adapter's scaling, so that the model starts at `Q + A · B`; false as published, where it starts at `Q + scaling · A · B` | |
/// | `keep_best` | true | the step with the least error is kept, not the last: errors may rise again | |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoftqConfig {
    /// Alternating steps.
    pub iterations: usize,
    /// The quantizer.
    pub rounding: Rounding,
    /// How singular vectors are found.
    pub svd: Svd,
    /// Whether to keep the best step, not the last.
    pub keep_best: bool,
    /// Whether B is divided by the adapter's scaling.
    pub compensate_scaling: bool,
}

impl Default for LoftqConfig {
    fn default() -> Self {
        Self {
            iterations: 5,
            rounding: Rounding::default(),
            svd: Svd::default(),
            keep_best: true,
            compensate_scaling: true,
        }
    }
}

impl LoftqConfig {
    pub(crate) fn check(&self) -> Result<()> {
        if self.iterations == 0 {
            return Err(Error::argument("LoftqConfig.iterations", "at least 1", 0));
        }
        Ok(())
    }
}

/// A quantized weight with the factors that make up for its error.
#[derive(Debug, Clone)]
pub struct QuantizedWithFactors {
    /// The weight.
    pub weight: PackedWeight,
    /// The factors; `weight + A · B` is near the original.
    pub factors: Factors,
    /// `‖W - Q - A · B‖` in the Frobenius norm after each step.
    pub errors: Vec<f64>,
    /// The step that was kept, from 0.
    pub step: usize,
}

/// LoftQ: quantizes what the factors leave, corrects what quantization leaves, in turns.
///
/// `weight` is `[d_output, d_input]` row-major. Every step ends with the factors, so they fit the weight that is
/// returned. Factors aren't divided by a LoRA scaling here, whatever [`LoftqConfig::compensate_scaling`] says to a calibration;
/// divide B by it.
///
/// # Errors
/// [`Error::Argument`] for no iterations; whatever [`low_rank`] and the quantizer refuse.
pub fn loftq(
    name: &str,
    weight: &[f32],
    d_input: usize,
    rank: usize,
    scheme: &QuantScheme,
    config: &LoftqConfig,
) -> Result<QuantizedWithFactors> {
    config.check()?;
    let quantizer = config.rounding.quantizer();
    let (mut best, mut errors): (Option<(PackedWeight, Factors, usize)>, Vec<f64>) = (None, Vec::new());
    let mut remaining = weight.to_vec();
    let mut least = f64::INFINITY;
    for step in 0..config.iterations {
        let packed = quantizer.quantize(name, &remaining, d_input, weight.len() / d_input.max(1), scheme)?;
        let residual = difference(weight, &packed.dequantize());
        let factors = low_rank(name, &residual, d_input, rank, config.svd)?;
        let product = factors.product();
        let error = norm(&difference(&residual, &product));
        errors.push(error);
        remaining = difference(weight, &product);
        if !config.keep_best || error < least || best.is_none() {
            least = error;
            best = Some((packed, factors, step));
        }
    }
    let (weight, factors, step) = best.expect("at least one step");
    Ok(QuantizedWithFactors { weight, factors, errors, step })
}

/// [PiSSA](https://arxiv.org/abs/2404.02948) on a quantized residual: the factors hold the weight's leading singular
/// vectors, and what they leave is quantized.
///
/// `weight` is `[d_output, d_input]` row-major. Factors aren't divided by a LoRA scaling; divide B by it.
///
/// # Errors
/// Whatever [`low_rank`] and the quantizer refuse.
pub fn pissa(
    name: &str,
    weight: &[f32],
    d_input: usize,
    rank: usize,
    scheme: &QuantScheme,
    rounding: Rounding,
    svd: Svd,
) -> Result<QuantizedWithFactors> {
    let factors = low_rank(name, weight, d_input, rank, svd)?;
    let residual = difference(weight, &factors.product());
    let packed = rounding.quantizer().quantize(name, &residual, d_input, weight.len() / d_input, scheme)?;
    let error = norm(&difference(&residual, &packed.dequantize()));
    Ok(QuantizedWithFactors { weight: packed, factors, errors: vec![error], step: 0 })
}

pub(crate) fn difference(a: &[f32], b: &[f32]) -> Vec<f32> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

/// The Frobenius norm.
pub(crate) fn norm(values: &[f32]) -> f64 {
    values.iter().map(|value| f64::from(*value) * f64::from(*value)).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use kiln_testkit::{assert_close, relative_difference, testdata};
    use serde_json::Value as Json;

    use super::*;

    fn floats(value: &Json) -> Vec<f32> {
        match value {
            Json::Array(values) => values.iter().flat_map(floats).collect(),
            value => vec![value.as_f64().unwrap() as f32],
        }
    }

    fn vectors() -> Json {
        serde_json::from_slice(&std::fs::read(testdata("vectors/apiq_loftq.json")).unwrap()).unwrap()
    }

    #[test]
    fn every_step_is_the_reference() {
        let vectors = vectors();
        let weight = floats(&vectors["W"]);
        for case in vectors["cases"].as_array().unwrap() {
            let table = case["table"].as_str().unwrap();
            let scheme = format!("{table}:8").parse().unwrap();
            for svd in [Svd::Exact, Svd::Randomized { iterations: 8, oversampling: 4, seed: 7 }] {
                let config = LoftqConfig { keep_best: false, svd, ..LoftqConfig::default() };
                let found = loftq("w", &weight, 8, 2, &scheme, &config).unwrap();
                let history = case["history"].as_array().unwrap();
                let expected: Vec<f32> = history.iter().flat_map(|step| floats(&step["fro_total"])).collect();
                let errors: Vec<f32> = found.errors.iter().map(|&error| error as f32).collect();
                assert_close(table, &errors, &expected, 1e-6);
                assert_close(table, &found.weight.dequantize(), &floats(&case["Q"]), 1e-6);
                assert_close(table, &found.factors.product(), &floats(&case["BA"]), 1e-6);
                assert_eq!(found.step, 4);
            }
        }
    }

    #[test]
    fn the_best_step_is_kept() {
        let weight = floats(&vectors()["W"]);
        let found = loftq("w", &weight, 8, 2, &"nf4:8".parse().unwrap(), &LoftqConfig::default()).unwrap();
        // The reference's errors fall until the third step, then rise.
        assert_eq!(found.step, 2);
        let total = difference(&difference(&weight, &found.weight.dequantize()), &found.factors.product());
        assert!((norm(&total) - found.errors[2]).abs() < 1e-6);
    }

    #[test]
    fn pissa_beats_plain_rounding_at_two_bits() {
        let factors =
            Factors { rank: 4, a: kiln_testkit::values(1, 64 * 4), b: kiln_testkit::values(2, 4 * 48) };
        let noise = kiln_testkit::values(3, 64 * 48);
        let weight: Vec<f32> = factors.product().iter().zip(&noise).map(|(w, n)| w + 0.1 * n).collect();
        let scheme = "affine2:32".parse().unwrap();
        let found = pissa("w", &weight, 64, 4, &scheme, Rounding::MinMax, Svd::Exact).unwrap();
        let sum: Vec<f32> =
            found.weight.dequantize().iter().zip(found.factors.product()).map(|(q, f)| q + f).collect();
        let plain = MinMax.quantize("w", &weight, 64, 48, &scheme).unwrap().dequantize();
        assert!(relative_difference(&sum, &weight) < 0.3 * relative_difference(&plain, &weight));
    }

    #[test]
    fn every_rounding_works_and_bad_options_are_named() {
        let weight = kiln_testkit::values(4, 64 * 6);
        let scheme = "affine3:32".parse().unwrap();
        for rounding in [Rounding::MinMax, Rounding::MseClipped, Rounding::LeastSquares, Rounding::Hqq] {
            let config = LoftqConfig { rounding, ..LoftqConfig::default() };
            let found = loftq("w", &weight, 64, 2, &scheme, &config).unwrap();
            assert!(found.errors.iter().all(|error| *error < norm(&weight)), "{rounding:?}");
        }
        let config = LoftqConfig { iterations: 0, ..LoftqConfig::default() };
        let error = loftq("w", &weight, 64, 2, &scheme, &config).unwrap_err();
        assert!(error.to_string().contains("iterations"), "{error}");
    }
}
