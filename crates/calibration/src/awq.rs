//! AWQ's scaling: larger weights, and so finer steps, for inputs with large activations.

use std::ops::Range;

use burn::tensor::{Device, Tensor};
use kiln_distributed::{Shares, added};
use kiln_models::{Context, Probe, ScaleSites, ScaleSource, Tape};
use kiln_quant_core::{HostQuantizer, MinMax, QuantScheme, Scheme, to_host};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{
    Error, Hessian, Result, ScalingReport,
    block::{Place, pass},
    loftq::difference,
    station::Station,
    stream::Stream,
    values::{ratio, tensor},
};

/// Smallest factor before they are normalised, as published.
const SMALLEST: f64 = 1e-4;

/// Options of the scaling of [AWQ](https://arxiv.org/abs/2306.00978), with the published value as default.
///
/// Inputs of projections are divided by factors `s`, in the norm or the projection that writes them, and the weights that
/// read them are multiplied by `s`. Nothing changes until the weights are rounded; then inputs with a large `s` lose
/// less. `s` is `mean |x|^a`, over `sqrt(max s · min s)`; of the exponents `a` = 0, 1 / `grid`, .. below 1 that is taken whose
/// rounded weights err least at the projections' outputs, over all calibration windows. (The authors' program looks at
/// the output of the whole attention or MLP where several projections share their inputs.)
///
/// | option | default | meaning | range |
/// | --- | --- | --- | --- |
/// | `grid` | 20 | exponents tried | from 1 |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AwqConfig {
    /// Exponents tried.
    pub grid: usize,
}

impl Default for AwqConfig {
    fn default() -> Self {
        Self { grid: 20 }
    }
}

impl AwqConfig {
    pub(crate) fn check(&self) -> Result<()> {
        if self.grid == 0 {
            return Err(Error::argument("AwqConfig.grid", "at least 1", 0));
        }
        Ok(())
    }
}

/// Inputs of a site, over all windows.
struct Inputs {
    /// `sum x x^T`, `[d_input, d_input]`.
    moments: Tensor<2>,
    /// Mean magnitude of each.
    magnitudes: Vec<f64>,
}

/// A weight that reads them.
struct Reader<'a> {
    path: &'a str,
    /// `[d_output, d_input]` row-major.
    weight: &'a [f32],
    scheme: QuantScheme,
}

/// The best factors of a site.
struct Found {
    exponent: f64,
    factors: Vec<f32>,
    /// Sum of the outputs' squared errors for each exponent.
    errors: Vec<f64>,
}

/// What comes into a block: the original residual stream of this rank's windows.
pub(crate) struct Incoming<'a> {
    pub(crate) context: &'a Context,
    pub(crate) shares: &'a Shares,
    pub(crate) x: &'a Stream,
}

/// Scales the original weights of block `index` and the norms before them. Sites with a projection that stays as it is
/// are left alone.
///
/// The stations of `places` are those of `model`, on `tape`.
pub(crate) fn scale<W: ScaleSites<Slot = Probe<Station>>>(
    config: &AwqConfig,
    model: &mut W,
    tape: &Tape,
    index: usize,
    places: &mut [Place],
    incoming: &Incoming,
) -> Result<Vec<ScalingReport>> {
    let Incoming { context, shares, x } = incoming;
    let device = model.device();
    // Inputs are those of the block as it was, also where a site before has changed its weights.
    places.iter().for_each(|place| place.station.set(place.original(&device)));
    let mut reports = Vec::new();
    let mut divisions = Vec::new();
    for site in model.scale_sites(index) {
        let find = |path: &str| {
            let found = places.iter().position(|place| place.path == path);
            found.ok_or_else(|| Error::argument(path, format!("a projection of block {index}"), "none"))
        };
        let readers: Vec<usize> = site.readers.iter().map(|path| find(path)).collect::<Result<_>>()?;
        let source = match &site.source {
            ScaleSource::Norm { .. } => None,
            ScaleSource::Projection(path) => Some(find(path)?),
        };
        if source.iter().chain(&readers).any(|&place| places[place].scheme == Scheme::Dense) {
            continue;
        }
        let Some(first) = readers.first().map(|&reader| &places[reader]) else { continue };
        let forward = |x: Tensor<2>| pass(model, index, context, x);
        let inputs_of = |window: usize| {
            let inputs = first.inputs(tape, &forward, x.tensor(window - shares.own().start, &device)?);
            inputs.ok_or_else(|| Error::argument(&first.path, "a projection that its block runs", "no call"))
        };
        let inputs = Inputs::of(&first.path, first.shape[0], &device, shares, inputs_of)?;
        let weights: Vec<Reader> = readers.iter().filter_map(|&reader| Reader::of(&places[reader])).collect();
        let found = search(config, &weights, &inputs)?;
        let mut norm = 0.0;
        for reader in &weights {
            norm += inputs.squares(reader.path, reader.weight.to_vec())?;
        }
        let best = found.errors.iter().copied().fold(f64::INFINITY, f64::min);
        reports.push(ScalingReport {
            source: match &site.source {
                ScaleSource::Norm { parameters, .. } => parameters.join(", "),
                ScaleSource::Projection(path) => path.clone(),
            },
            readers: site.readers,
            exponent: found.exponent,
            error_before: ratio(found.errors[0], norm),
            error_after: ratio(best, norm),
        });
        for reader in readers {
            multiply_inputs(&mut places[reader].weight, &found.factors);
        }
        if let Some(source) = source {
            divide_outputs(&mut places[source], &found.factors, &device);
        }
        if let ScaleSource::Norm { parameters, one_plus } = site.source {
            divisions.push((parameters, one_plus, found.factors));
        }
    }
    for (names, one_plus, factors) in divisions {
        for name in names {
            if let Some(parameter) = model.norm_parameter(&name) {
                *parameter = parameter.clone().map(|values| match one_plus {
                    true => divided(values.add_scalar(1.0), &factors, &device).sub_scalar(1.0),
                    false => divided(values, &factors, &device),
                });
            }
        }
    }
    Ok(reports)
}

/// Divides weight and bias by a factor an output.
fn divide_outputs(place: &mut Place, factors: &[f32], device: &Device) {
    let rows = place.weight.par_chunks_exact_mut(place.shape[0]).zip(factors);
    rows.for_each(|(row, factor)| row.iter_mut().for_each(|value| *value /= factor));
    place.bias = place.bias.take().map(|bias| bias.map(|bias| divided(bias, factors, device)));
}

/// `values / factors`.
fn divided(values: Tensor<1>, factors: &[f32], device: &Device) -> Tensor<1> {
    values / tensor(factors.to_vec(), [factors.len()], device)
}

/// Multiplies every row by `factors`.
fn multiply_inputs(weight: &mut [f32], factors: &[f32]) {
    let rows = weight.par_chunks_exact_mut(factors.len());
    rows.for_each(|row| row.iter_mut().zip(factors).for_each(|(value, factor)| *value *= factor));
}

impl Inputs {
    /// From what `inputs` says of each window, `[rows, d_input]`; `path` is used in errors.
    fn of(
        path: &str,
        d_input: usize,
        device: &Device,
        shares: &Shares,
        inputs: impl Fn(usize) -> Result<Tensor<2>>,
    ) -> Result<Self> {
        let of_part = |windows: Range<usize>| -> Result<Vec<f64>> {
            let mut hessian = Hessian::new(d_input);
            let (mut magnitudes, mut rows) = (vec![0.0; d_input], 0);
            for window in windows {
                let x = inputs(window)?;
                rows += x.dims()[0];
                let sums = to_host(path, x.clone().abs().sum_dim(0))?;
                magnitudes.iter_mut().zip(sums).for_each(|(total, sum)| *total += f64::from(sum));
                hessian.add_window(path, window, x)?;
            }
            Ok([hessian.sum, magnitudes, vec![rows as f64]].concat())
        };
        let sums = shares.sum(shares.partial_sums(of_part, added), d_input * (d_input + 1) + 1)?;
        let (moments, rest) = sums.split_at(d_input * d_input);
        let (magnitudes, rows) = rest.split_at(d_input);
        let moments = moments.iter().map(|&value| value as f32).collect();
        let magnitudes = magnitudes.iter().map(|total| total / rows[0].max(1.0)).collect();
        Ok(Self { moments: tensor(moments, [d_input, d_input], device), magnitudes })
    }

    /// `sum ‖w x‖²` over all inputs `x`, for rows `w` of the weight of `path`.
    fn squares(&self, path: &str, weight: Vec<f32>) -> Result<f64> {
        let d_input = self.magnitudes.len();
        let shape = [weight.len() / d_input, d_input];
        let weight = tensor(weight, shape, &self.moments.device());
        let squares = weight.clone().matmul(self.moments.clone()) * weight;
        // Rounding may leave less than nothing.
        Ok(to_host(path, squares.sum_dim(1))?.into_iter().map(f64::from).sum::<f64>().max(0.0))
    }
}

/// The factors for an exponent. Inputs that are always zero keep theirs at 1.
fn factors(magnitudes: &[f64], exponent: f64) -> Vec<f32> {
    let alive = |magnitude: &&f64| **magnitude > 0.0;
    let power = |magnitude: f64| magnitude.powf(exponent).max(SMALLEST);
    let ends = magnitudes.iter().filter(alive).fold([f64::INFINITY, 0.0f64], |[min, max], &magnitude| {
        [min.min(power(magnitude)), max.max(power(magnitude))]
    });
    let middle = (ends[0] * ends[1]).sqrt();
    let factor = |magnitude: &f64| if *magnitude > 0.0 { (power(*magnitude) / middle) as f32 } else { 1.0 };
    magnitudes.iter().map(factor).collect()
}

fn search(config: &AwqConfig, readers: &[Reader], inputs: &Inputs) -> Result<Found> {
    let exponents = (0..config.grid).map(|step| step as f64 / config.grid as f64);
    let mut errors = Vec::new();
    for exponent in exponents.clone() {
        let factors = factors(&inputs.magnitudes, exponent);
        let mut error = 0.0;
        for reader in readers {
            error += inputs.squares(reader.path, difference(reader.weight, &reader.rounded(&factors)?))?;
        }
        errors.push(error);
    }
    let best = errors.iter().zip(exponents).min_by(|a, b| a.0.total_cmp(b.0));
    let exponent = best.map_or(0.0, |(_, exponent)| exponent);
    Ok(Found { exponent, factors: factors(&inputs.magnitudes, exponent), errors })
}

impl<'a> Reader<'a> {
    fn of(place: &'a Place) -> Option<Self> {
        match place.scheme {
            Scheme::Packed(scheme) => Some(Self { path: &place.path, weight: &place.weight, scheme }),
            Scheme::Dense => None,
        }
    }

    /// The weight rounded in scaled form.
    fn rounded(&self, factors: &[f32]) -> Result<Vec<f32>> {
        let mut weight = self.weight.to_vec();
        multiply_inputs(&mut weight, factors);
        let (d_input, d_output) = (factors.len(), weight.len() / factors.len());
        let mut rounded = MinMax.quantize(self.path, &weight, d_input, d_output, &self.scheme)?.dequantize();
        let inverse: Vec<f32> = factors.iter().map(|factor| 1.0 / factor).collect();
        multiply_inputs(&mut rounded, &inverse);
        Ok(rounded)
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use kiln_distributed::Sharing;
    use kiln_quant_core::Scheme;
    use kiln_testkit::{assert_close, testdata};
    use serde_json::Value;

    use super::*;

    fn floats(value: &Value) -> Vec<f32> {
        value.as_array().unwrap().iter().map(|value| value.as_f64().unwrap() as f32).collect()
    }

    #[test]
    fn factors_and_errors_are_those_of_autoawq() {
        let text = std::fs::read(testdata("quantizers/awq_reference.json")).unwrap();
        let reference: Value = serde_json::from_slice(&text).unwrap();
        for case in reference["cases"].as_array().unwrap() {
            let number = |name: &str| case[name].as_u64().unwrap() as usize;
            let (rows, d_input) = (number("rows"), number("d_input"));
            let x = floats(&case["x"]);
            let windows: Vec<&[f32]> = x.chunks_exact(rows * d_input).collect();
            let window = |index: usize| Ok(tensor(windows[index].to_vec(), [rows, d_input], &Device::flex()));
            let shares = Sharing::default().of(windows.len()).unwrap();
            let inputs = Inputs::of("x", d_input, &Device::flex(), &shares, window).unwrap();
            let scheme = format!("affine{}:{}:int", number("bits"), number("group"));
            let Scheme::Packed(scheme) = scheme.parse().unwrap() else { panic!("packed") };
            let weights: Vec<Vec<f32>> = case["weights"].as_array().unwrap().iter().map(floats).collect();
            let readers: Vec<Reader> =
                weights.iter().map(|weight| Reader { path: "w", weight, scheme }).collect();
            let found = search(&AwqConfig::default(), &readers, &inputs).unwrap();
            assert_eq!(found.exponent, case["exponent"].as_f64().unwrap());
            assert_close("factors", &found.factors, &floats(&case["factors"]), 1e-5);
            let outputs = number("windows") * rows * weights.iter().map(Vec::len).sum::<usize>() / d_input;
            let means: Vec<f32> = found.errors.iter().map(|error| (error / outputs as f64) as f32).collect();
            let expected = floats(&case["mean_squared_errors"]);
            let largest = expected.iter().copied().fold(0.0, f32::max);
            assert_close("errors", &means, &expected, 1e-4 * largest);
        }
    }

    #[test]
    fn inputs_that_are_always_zero_keep_their_weights() {
        let found = factors(&[0.0, 4.0, 0.25, 1e-9], 0.5);
        // Powers 2, 0.5 and, from 3e-5, the smallest allowed; the middle of their ends is sqrt(2e-4).
        let middle = 2e-4f32.sqrt();
        assert_close("factors", &found, &[1.0, 2.0 / middle, 0.5 / middle, 1e-4 / middle], 1e-3);
        assert_eq!(factors(&[0.0, 0.0], 0.5), [1.0, 1.0]);
        assert_eq!(factors(&[3.0, 0.1, 7.0], 0.0), [1.0; 3]);
    }
}
