//! GPTQ: codes one input at a time, each error spread over the inputs still to come.

use faer::{Mat, Side, linalg::solvers::DenseSolveCore};
use kiln_quant_core::{Grid, PackedWeight, QuantScheme, Scales, packing::CodePacker};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{Error, Hessian, Result, clipping::affine_in_groups};

/// Outputs quantized together, so that a row of the factor is read once for all of them.
const TILE: usize = 16;

/// Options of [GPTQ](https://arxiv.org/abs/2210.17323), with the original program's defaults.
///
/// | option | default | meaning | range |
/// | --- | --- | --- | --- |
/// | `damping` | 0.01 | added to the Hessian's diagonal, as a part of its mean; raised by the same amount until the factorisation succeeds | above 0 |
/// | `max_damping` | 1 | where raising ends | from `damping` |
/// | `block` | 128 | inputs between two updates of the rest; a group's range is taken from weights as of the last one | from 1 |
/// | `act_order` | false | inputs with the largest diagonal first | |
/// | `static_groups` | false | ranges from the original weight, so that groups stay neighbouring inputs under `act_order` | |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GptqConfig {
    /// Part of the mean diagonal added to the diagonal.
    pub damping: f64,
    /// The strongest damping tried.
    pub max_damping: f64,
    /// Inputs between two updates.
    pub block: usize,
    /// Whether inputs are taken in the order of falling diagonal.
    pub act_order: bool,
    /// Whether ranges come from the original weight.
    pub static_groups: bool,
}

impl Default for GptqConfig {
    fn default() -> Self {
        Self { damping: 0.01, max_damping: 1.0, block: 128, act_order: false, static_groups: false }
    }
}

impl GptqConfig {
    pub(crate) fn check(&self) -> Result<()> {
        if self.block == 0 {
            return Err(Error::argument("GptqConfig.block", "at least 1", 0));
        }
        if !(self.damping > 0.0 && self.damping <= self.max_damping && self.max_damping.is_finite()) {
            let found = format!("{} and {}", self.damping, self.max_damping);
            let name = "GptqConfig.damping and max_damping";
            return Err(Error::argument(name, "0 < damping <= max_damping", found));
        }
        Ok(())
    }
}

/// What [`gptq`] made.
#[derive(Debug, Clone)]
pub struct Gptq {
    /// The weight. With `act_order` and without `static_groups` its rows are in the order of quantization
    /// ([`PackedWeight::input_order`]).
    pub weight: PackedWeight,
    /// Half the sum of squared errors, each over its entry of the factor: GPTQ's own estimate of the output error.
    pub loss: f64,
    /// The damping that the factorisation took.
    pub damping: f64,
    /// Inputs that were zero in all samples; their weights become zero.
    pub dead: usize,
}

/// Quantizes `weight` `[d_output, d_input]` row-major so that outputs for inputs like those of `hessian` change least.
///
/// Groups of one output always contain zero. [`Grid::Symmetric`] is GPTQ's own (zero point `2^(bits - 1)`), the other
/// grids are asymmetric. Codes are chosen against scales and offsets as stored; the arithmetic is f64.
///
/// # Errors
/// [`Error::Argument`] for a scheme other than affine in groups of one output, options out of range, or sizes that
/// don't fit; [`Error::NotFinite`]; [`Error::Singular`].
pub fn gptq(
    name: &str,
    weight: &[f32],
    d_output: usize,
    hessian: &Hessian,
    scheme: &QuantScheme,
    config: &GptqConfig,
) -> Result<Gptq> {
    gptq_shared(name, weight, d_output, &SharedFactor::new(name, hessian, config)?, scheme, config)
}

/// [`gptq`] with the factor of its inputs' Hessian, which weights with the same inputs share.
pub(crate) fn gptq_shared(
    name: &str,
    weight: &[f32],
    d_output: usize,
    shared: &SharedFactor,
    scheme: &QuantScheme,
    config: &GptqConfig,
) -> Result<Gptq> {
    let problem = Problem::new(name, weight, d_output, shared, scheme, config)?;
    let tiles: Vec<Tile> = problem
        .weight
        .par_chunks(TILE * problem.d_input)
        .map(|rows| problem.quantize(rows.to_vec()))
        .collect();
    problem.pack(tiles)
}

/// Scale and offset of one group, as stored.
#[derive(Debug, Clone, Copy)]
struct Params {
    scale: f32,
    offset: f32,
    zero: f64,
}

/// What depends on the inputs only.
pub(crate) struct SharedFactor {
    /// The upper factor of the inverse Hessian, `[d_input, d_input]`, permuted.
    factor: Vec<f64>,
    /// `order[k]` is the input quantized as the `k`-th.
    order: Vec<usize>,
    damping: f64,
    /// Inputs that were zero in all samples.
    dead: Vec<usize>,
}

impl SharedFactor {
    /// `name` is used in errors.
    pub(crate) fn new(name: &str, hessian: &Hessian, config: &GptqConfig) -> Result<Self> {
        config.check()?;
        let d_input = hessian.d_input();
        let mut matrix = hessian.matrix();
        let dead: Vec<usize> = (0..d_input).filter(|i| matrix[i * d_input + i] == 0.0).collect();
        for &i in &dead {
            matrix[i * d_input + i] = 1.0;
        }
        let mut order: Vec<usize> = (0..d_input).collect();
        if config.act_order {
            let diagonal = |i: usize| matrix[i * d_input + i];
            // Stable, so that equal entries keep their order.
            order.sort_by(|&a, &b| diagonal(b).total_cmp(&diagonal(a)));
        }
        let (factor, damping) = factor(name, &matrix, &order, config)?;
        Ok(Self { factor, order, damping, dead })
    }
}

/// One weight, its inputs in the order of quantization.
struct Problem<'a> {
    name: &'a str,
    d_input: usize,
    d_output: usize,
    scheme: QuantScheme,
    config: &'a GptqConfig,
    /// Inputs of a group.
    group: usize,
    symmetric: bool,
    top: f64,
    /// `[d_output, d_input]`, permuted.
    weight: Vec<f64>,
    shared: &'a SharedFactor,
}

/// Some outputs, quantized.
struct Tile {
    /// `[outputs, d_input]` in the order of quantization.
    codes: Vec<u8>,
    /// `[outputs, groups]`.
    params: Vec<Params>,
    loss: f64,
}

impl<'a> Problem<'a> {
    fn new(
        name: &'a str,
        weight: &[f32],
        d_output: usize,
        shared: &'a SharedFactor,
        scheme: &QuantScheme,
        config: &'a GptqConfig,
    ) -> Result<Self> {
        let d_input = shared.order.len();
        let (group, symmetric, top) = check(name, weight, d_output, d_input, scheme)?;
        let mut weight: Vec<f64> = weight.iter().map(|&w| f64::from(w)).collect();
        for &i in &shared.dead {
            weight.iter_mut().skip(i).step_by(d_input).for_each(|w| *w = 0.0);
        }
        let rows = weight.chunks_exact(d_input);
        let weight = rows.flat_map(|row| shared.order.iter().map(|&i| row[i])).collect();
        Ok(Self { name, d_input, d_output, scheme: *scheme, config, group, symmetric, top, weight, shared })
    }

    fn groups(&self) -> usize {
        self.d_input.div_ceil(self.group)
    }

    /// Whether a group is neighbouring inputs even though quantization goes another way.
    fn natural_groups(&self) -> bool {
        self.config.static_groups || self.group >= self.d_input
    }

    /// The grid of a group's weights, which always holds zero.
    fn params(&self, weights: impl Iterator<Item = f64>) -> Params {
        let (mut min, mut max) = weights.fold((0f64, 0f64), |(min, max), w| (min.min(w), max.max(w)));
        if self.symmetric {
            max = max.max(-min);
            min = if min < 0.0 { -max } else { min };
        }
        if min == 0.0 && max == 0.0 {
            (min, max) = (-1.0, 1.0);
        }
        let scale = self.scheme.scales.round(((max - min) / self.top) as f32);
        let zero =
            if self.symmetric { (self.top + 1.0) / 2.0 } else { (-min / f64::from(scale)).round_ties_even() };
        let offset = self.scheme.scales.round((-f64::from(scale) * zero) as f32);
        Params { scale, offset, zero }
    }

    /// Ranges of the original weight, where they don't follow the updates.
    fn fixed_params(&self, row: &[f64]) -> Option<Vec<Params>> {
        if !self.natural_groups() {
            return None;
        }
        let mut natural = vec![0.0; self.d_input];
        self.shared.order.iter().zip(row).for_each(|(&input, &w)| natural[input] = w);
        Some(natural.chunks(self.group).map(|group| self.params(group.iter().copied())).collect())
    }

    /// Quantizes some rows of the permuted weight.
    fn quantize(&self, mut rows: Vec<f64>) -> Tile {
        let (n, groups) = (self.d_input, self.groups());
        let count = rows.len() / n;
        let mut codes = vec![0; rows.len()];
        let fixed: Option<Vec<Vec<Params>>> =
            rows.chunks_exact(n).map(|row| self.fixed_params(row)).collect();
        let blank = Params { scale: 0.0, offset: 0.0, zero: 0.0 };
        let is_fixed = fixed.is_some();
        let mut params = fixed.map_or_else(|| vec![blank; count * groups], |fixed| fixed.concat());
        let mut loss = 0.0;
        for start in (0..n).step_by(self.config.block) {
            let end = n.min(start + self.config.block);
            let width = end - start;
            // The block's own weights are updated at once, the rest when it is done.
            let mut block: Vec<f64> = rows.chunks_exact(n).flat_map(|row| row[start..end].to_vec()).collect();
            let mut errors = vec![0.0; count * width];
            for i in start..end {
                let factor = &self.shared.factor[i * n..(i + 1) * n];
                for r in 0..count {
                    let group = if is_fixed { self.shared.order[i] / self.group } else { i / self.group };
                    let slot = &mut params[r * groups + group];
                    if !is_fixed && i % self.group == 0 {
                        let columns = r * n + i..r * n + n.min(i + self.group);
                        *slot = self.params(rows[columns].iter().copied());
                    }
                    let (w, grid) = (block[r * width + i - start], *slot);
                    let (scale, offset) = (f64::from(grid.scale), f64::from(grid.offset));
                    let code = ((w / scale).round_ties_even() + grid.zero).clamp(0.0, self.top);
                    codes[r * n + i] = code as u8;
                    let error = (w - (scale * code + offset)) / factor[i];
                    loss += error * error / 2.0;
                    errors[r * width + i - start] = error;
                    subtract(&mut block[r * width + i - start..(r + 1) * width], error, &factor[i..end]);
                }
            }
            for i in start..end {
                let factor = &self.shared.factor[i * n + end..(i + 1) * n];
                for r in 0..count {
                    subtract(&mut rows[r * n + end..(r + 1) * n], errors[r * width + i - start], factor);
                }
            }
        }
        Tile { codes, params, loss }
    }

    fn pack(&self, tiles: Vec<Tile>) -> Result<Gptq> {
        let (n, groups, columns) = (self.d_input, self.groups(), self.d_output);
        let loss = tiles.iter().map(|tile| tile.loss).sum();
        let mut packer = CodePacker::new(n, columns, self.scheme.bits());
        let (mut scales, mut offsets) = (vec![0.0; groups * columns], vec![0.0; groups * columns]);
        let rows =
            tiles.iter().flat_map(|tile| tile.codes.chunks_exact(n).zip(tile.params.chunks_exact(groups)));
        for (output, (codes, params)) in rows.enumerate() {
            if self.natural_groups() {
                let mut natural = vec![0; n];
                self.shared.order.iter().zip(codes).for_each(|(&input, &code)| natural[input] = code);
                packer.set_column(output, &natural);
            } else {
                packer.set_column(output, codes);
            }
            for (group, params) in params.iter().enumerate() {
                if !(params.scale.is_finite() && params.offset.is_finite()) {
                    return Err(Error::Quant(kiln_quant_core::Error::Tensor {
                        name: self.name.into(),
                        expected: format!("scales and offsets in the range of scheme {}", self.scheme),
                        found: format!("scale {} at output {output}, group {group}", params.scale),
                    }));
                }
                scales[group * columns + output] = params.scale;
                offsets[group * columns + output] = params.offset;
            }
        }
        let reordered = self.config.act_order && !self.natural_groups();
        let weight = PackedWeight {
            scheme: self.scheme,
            d_input: n,
            d_output: columns,
            codes: packer.into_words(),
            scales: Scales::Plain(scales),
            offsets: self.scheme.has_offsets().then_some(offsets),
            input_order: reordered.then(|| self.shared.order.iter().map(|&input| input as u32).collect()),
        };
        Ok(Gptq { weight, loss, damping: self.shared.damping, dead: self.shared.dead.len() })
    }
}

/// Inputs of a group, whether the grid is symmetric, the largest code.
fn check(
    name: &str,
    weight: &[f32],
    d_output: usize,
    d_input: usize,
    scheme: &QuantScheme,
) -> Result<(usize, bool, f64)> {
    let (bits, grid) = affine_in_groups(name, scheme)?;
    if weight.is_empty() || d_output.checked_mul(d_input) != Some(weight.len()) {
        let expected = format!("{d_output} outputs of {d_input} values, at least one");
        return Err(Error::argument(name, expected, format!("{} values", weight.len())));
    }
    if weight.iter().any(|w| !w.is_finite()) {
        return Err(Error::NotFinite { place: name.into(), quantity: "the weight is".into() });
    }
    Ok((scheme.block.inputs_of(d_input), grid == Grid::Symmetric, f64::from((1u32 << bits) - 1)))
}

/// `U`, upper, with `H^-1 = U^T U`, row-major, and the damping that it took.
fn factor(name: &str, matrix: &[f64], order: &[usize], config: &GptqConfig) -> Result<(Vec<f64>, f64)> {
    let n = order.len();
    let mean = (0..n).map(|i| matrix[i * n + i]).sum::<f64>() / n as f64;
    if !mean.is_finite() {
        return Err(Error::NotFinite { place: name.into(), quantity: "the Hessian is".into() });
    }
    let mut damping = config.damping;
    // A tiny damping is not raised by itself: each attempt factorises.
    let step = damping.max(0.01);
    loop {
        let damped = Mat::from_fn(n, n, |i, j| {
            matrix[order[i] * n + order[j]] + if i == j { damping * mean } else { 0.0 }
        });
        let inverse = damped.llt(Side::Lower).ok().map(|factor| factor.inverse());
        if let Some(factor) = inverse.and_then(|inverse| inverse.llt(Side::Lower).ok()) {
            let lower = factor.L();
            let mut upper = vec![0.0; n * n];
            for i in 0..n {
                for j in i..n {
                    upper[i * n + j] = lower[(j, i)];
                }
            }
            if upper.iter().all(|value| value.is_finite()) {
                return Ok((upper, damping));
            }
        }
        if damping + step > config.max_damping {
            return Err(Error::Singular { projection: name.into(), damping });
        }
        damping += step;
    }
}

/// `y -= factor * x`.
fn subtract(y: &mut [f64], factor: f64, x: &[f64]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y -= factor * x);
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use kiln_quant_core::{HostQuantizer, MinMax, packing::unpack_column};
    use kiln_testkit::{assert_close, relative_difference, testdata};
    use serde_json::Value as Json;

    use super::*;
    use crate::values::tensor;

    fn vectors(name: &str) -> Json {
        serde_json::from_slice(&std::fs::read(testdata(name)).unwrap()).unwrap()
    }

    fn floats(value: &Json) -> Vec<f32> {
        match value {
            Json::Array(values) => values.iter().flat_map(floats).collect(),
            value => vec![value.as_f64().unwrap() as f32],
        }
    }

    fn hessian_of(samples: &Json) -> Hessian {
        let mut hessian = Hessian::new(8);
        for sample in samples.as_array().unwrap() {
            hessian.add("w", tensor(floats(sample), [6, 8], &Device::flex())).unwrap();
        }
        hessian
    }

    /// `sum (W - Q) H (W - Q)^T`, up to the factor between H and `X^T X`.
    fn output_error(weight: &[f32], found: &[f32], hessian: &Hessian) -> f64 {
        let n = hessian.d_input();
        let h = hessian.matrix();
        let rows = weight.chunks_exact(n).zip(found.chunks_exact(n));
        let sum: f64 = rows
            .map(|(w, q)| {
                let d: Vec<f64> = w.iter().zip(q).map(|(w, q)| f64::from(*w) - f64::from(*q)).collect();
                (0..n * n).map(|i| d[i / n] * h[i] * d[i % n]).sum::<f64>()
            })
            .sum();
        sum * hessian.samples() as f64 / 2.0
    }

    #[test]
    fn hessian_and_factor_are_the_references() {
        let vectors = vectors("vectors/apiq_gptq.json");
        let hessian = hessian_of(&vectors["X"]);
        let matrix: Vec<f32> = hessian.matrix().iter().map(|&h| h as f32).collect();
        assert_close("H", &matrix, &floats(&vectors["H"]), 5e-6);
        let order: Vec<usize> = (0..8).collect();
        let rows = vectors["H"].as_array().unwrap().iter().flat_map(|row| row.as_array().unwrap());
        let matrix: Vec<f64> = rows.map(|value| value.as_f64().unwrap()).collect();
        let (upper, _) = factor("w", &matrix, &order, &GptqConfig::default()).unwrap();
        let upper: Vec<f32> = upper.iter().map(|&u| u as f32).collect();
        assert_close("U", &upper, &floats(&vectors["U_upper_of_inverse_undamped_order"]), 1e-7);
    }

    #[test]
    fn codes_scales_and_errors_are_the_references() {
        let vectors = vectors("vectors/apiq_gptq.json");
        let hessian = hessian_of(&vectors["X"]);
        for case in vectors["cases"].as_array().unwrap() {
            let name = case["name"].as_str().unwrap();
            let weight = floats(&case["W"]);
            let group = case["group"].as_i64().unwrap();
            let group = if group < 0 { "col".to_string() } else { group.to_string() };
            let suffix = if case["sym"].as_bool().unwrap() { "sym" } else { "int" };
            let scheme = format!("affine{}:{group}:{suffix}", case["bits"]).parse().unwrap();
            let config = GptqConfig {
                damping: case["damp"].as_f64().unwrap(),
                block: case["block"].as_u64().unwrap() as usize,
                act_order: case["actorder"].as_bool().unwrap(),
                static_groups: case["static_groups"].as_bool().unwrap(),
                ..GptqConfig::default()
            };
            let found = gptq(name, &weight, 4, &hessian, &scheme, &config).unwrap();
            found.weight.validate(name).unwrap();
            assert_close(name, &found.weight.effective_scales(), &floats(&case["scales"]), 1e-7);
            assert_close(name, &found.weight.dequantize(), &floats(&case["dequant"]), 1e-6);
            let loss = case["loss"].as_f64().unwrap();
            assert!((found.loss - loss).abs() < 1e-5 * loss, "{name}: loss {} for {loss}", found.loss);
            let error = output_error(&weight, &found.weight.dequantize(), &hessian);
            let expected = case["output_sq_err"].as_f64().unwrap();
            assert!((error - expected).abs() < 1e-4 * expected, "{name}: {error} for {expected}");
            let order = found.weight.input_order.map(|order| floats(&serde_json::json!(order)));
            let dynamic = config.act_order && !config.static_groups;
            assert_eq!(order, dynamic.then(|| floats(&case["perm"])), "{name}");
        }
    }

    #[test]
    fn packed_words_and_values_are_those_of_gptq_files() {
        for case in vectors("vectors/apiq_gptq_pack.json")["cases"].as_array().unwrap() {
            let size = |name: &str| case[name].as_u64().unwrap() as usize;
            let (n, columns, group, bits) =
                (size("in_features"), size("out_features"), size("group"), size("bits") as u32);
            let codes: Vec<u8> = floats(&case["codes_in_by_out"]).iter().map(|&code| code as u8).collect();
            let mut packer = CodePacker::new(n, columns, bits);
            for output in 0..columns {
                let column: Vec<u8> = codes.iter().skip(output).step_by(columns).copied().collect();
                packer.set_column(output, &column);
            }
            let words = packer.into_words();
            let expected: Vec<u32> = case["qweight"]
                .as_array()
                .unwrap()
                .iter()
                .flat_map(|row| row.as_array().unwrap())
                .map(|word| word.as_i64().unwrap() as u32)
                .collect();
            // Files narrower than a run of 32 codes end earlier; the rest of ours is padding.
            assert_eq!(words[..expected.len()], expected, "{bits} bits");
            assert!(words[expected.len()..].iter().all(|&word| word == 0));
            let scales = floats(&case["scales"]);
            let offsets = scales.iter().zip(floats(&case["zeros"])).map(|(s, z)| -s * z).collect();
            let scheme = format!("affine{bits}:{group}:int").parse().unwrap();
            let (codes, scales) = (words, Scales::Plain(scales));
            let offsets = Some(offsets);
            let weight = PackedWeight {
                scheme,
                d_input: n,
                d_output: columns,
                codes,
                scales,
                offsets,
                input_order: None,
            };
            assert_close("values", &weight.dequantize(), &floats(&case["dequant_out_by_in"]), 1e-6);
        }
    }

    fn random_problem(rank: usize) -> (Vec<f32>, Hessian) {
        let device = Device::flex();
        let mut hessian = Hessian::new(40);
        let mix = kiln_testkit::tensor::<2>(1, [rank, 40], &device);
        hessian.add("w", kiln_testkit::tensor::<2>(2, [200, rank], &device).matmul(mix)).unwrap();
        (kiln_testkit::values(3, 30 * 40), hessian)
    }

    #[test]
    fn output_error_is_below_rounding_and_singular_hessians_are_damped() {
        let scheme: QuantScheme = "affine3:8:int".parse().unwrap();
        for rank in [60, 5] {
            let (weight, hessian) = random_problem(rank);
            let found = gptq("w", &weight, 30, &hessian, &scheme, &GptqConfig::default()).unwrap();
            let rounded = MinMax.quantize("w", &weight, 40, 30, &scheme).unwrap().dequantize();
            let error = output_error(&weight, &found.weight.dequantize(), &hessian);
            let rounding = output_error(&weight, &rounded, &hessian);
            assert!(error < 0.8 * rounding, "rank {rank}: {error} and {rounding}");
        }
    }

    #[test]
    fn a_hessian_that_no_damping_saves_is_an_error_that_names_the_projection() {
        let (weight, mut hessian) = random_problem(60);
        hessian.sum[1] = 1e9;
        hessian.sum[40] = 1e9;
        let scheme = "affine3:8".parse().unwrap();
        // Raised in steps of a hundredth, however small it begins: a hundred factorisations, not a billion.
        for damping in [GptqConfig::default().damping, 1e-9] {
            let config = GptqConfig { damping, ..GptqConfig::default() };
            let error = gptq("layers.3.o_proj", &weight, 30, &hessian, &scheme, &config).unwrap_err();
            assert!(
                matches!(&error, Error::Singular { projection, .. } if projection == "layers.3.o_proj"),
                "{error}"
            );
        }
        hessian.sum[0] = f64::NAN;
        let error =
            gptq("layers.3.o_proj", &weight, 30, &hessian, &scheme, &GptqConfig::default()).unwrap_err();
        assert!(matches!(&error, Error::NotFinite { place, .. } if place == "layers.3.o_proj"), "{error}");
    }

    #[test]
    fn dead_inputs_become_zero_and_do_not_spread() {
        let device = Device::flex();
        let mut x = kiln_testkit::values(5, 100 * 16);
        x.iter_mut().skip(3).step_by(16).for_each(|x| *x = 0.0);
        let mut hessian = Hessian::new(16);
        hessian.add("w", tensor(x, [100, 16], &device)).unwrap();
        let weight = kiln_testkit::values(6, 8 * 16);
        let scheme = "affine4:8:int".parse().unwrap();
        let found = gptq("w", &weight, 8, &hessian, &scheme, &GptqConfig::default()).unwrap();
        assert_eq!(found.dead, 1);
        let dense = found.weight.dequantize();
        assert!(dense.iter().skip(3).step_by(16).all(|&w| w.abs() < 1e-6));
        assert!(relative_difference(&dense, &weight) < 0.4);
        // All of them dead: nothing to go by, everything zero.
        let mut nothing = Hessian::new(16);
        nothing.add("w", tensor(vec![0.0; 32], [2, 16], &device)).unwrap();
        let found = gptq("w", &weight, 8, &nothing, &scheme, &GptqConfig::default()).unwrap();
        assert_eq!(found.dead, 16);
        assert!(found.weight.dequantize().iter().all(|&w| w.abs() < 1e-6));
    }

    #[test]
    fn inputs_that_are_not_finite_are_refused_by_name() {
        let mut hessian = Hessian::new(2);
        let x = tensor(vec![1.0, 2.0, f32::NAN, 0.0], [2, 2], &Device::flex());
        let error = hessian.add("layers.1.up_proj", x).unwrap_err();
        assert!(error.to_string().contains("layers.1.up_proj"), "{error}");
    }

    #[test]
    fn symmetric_codes_of_half_precision_scales_fit_their_width() {
        let (weight, hessian) = random_problem(60);
        for text in ["affine2:8:sym:f16", "affine4:16:sym:bf16", "affine8:col", "affine2:8:f16"] {
            let config = GptqConfig { act_order: true, ..GptqConfig::default() };
            let found = gptq("w", &weight, 30, &hessian, &text.parse().unwrap(), &config).unwrap();
            found.weight.validate("w").unwrap();
            let mut codes = vec![0; 40];
            unpack_column(&found.weight.codes, 30, found.weight.scheme.bits(), 0, &mut codes);
            assert!(codes.iter().any(|&code| code != codes[0]), "{text}");
        }
    }
}
