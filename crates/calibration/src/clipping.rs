//! Affine grids with learnable clipping, as ApiQ and OmniQuant have them: values, gradients, packed codes.

use kiln_quant_core::{Grid, PackedWeight, QuantScheme, ScaleType, Scales, Value, packing::CodePacker};
use rayon::prelude::*;

use crate::{Error, Result};

/// Bounds of a scale; where one is reached, the logits get no gradient.
pub(crate) const SCALE: [f32; 2] = [1e-5, 1e4];
/// Largest magnitude of a zero point.
pub(crate) const ZERO: f32 = 1e4;
/// Adding it rounds an f32 below 2^22 to an integer, ties to even, in one vector instruction.
pub(crate) const ROUND: f32 = 12_582_912.0;
/// Beyond every level (zero points are at most 1e4), below 2^22.
pub(crate) const FAR: f32 = 1e6;

/// Where the levels of a group lie, given the clipped ends of its range.
///
/// With `n = 2^bits - 1`, logistic `S`, and the group's largest and smallest weight `M`, `m`:
/// `M' = S(gamma) M`, `m' = S(beta) m`;
///
/// | | scale `s` | zero point `z` |
/// | --- | --- | --- |
/// | asymmetric | `(M' - m') / n` | `round(-m' / s)` |
/// | symmetric | `max(abs M', abs m') / (2^(bits - 1) - 1)` | `2^(bits - 1) - 1` |
///
/// and a weight becomes `s (clamp(round(w / s) + z, 0, n) - z)`. Source: the code of
/// [ApiQ](https://arxiv.org/abs/2402.05147) and [OmniQuant](https://arxiv.org/abs/2308.13137).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClippingGrid {
    /// 2 to 6, or 8.
    pub bits: u32,
    /// Neighbouring inputs of one output that share a scale; the last group may be smaller.
    pub group: usize,
    /// Whether the levels lie around zero.
    pub symmetric: bool,
    /// Extends each group's range to zero, so that zero points are codes and a constant group keeps its value. The
    /// published code doesn't; groups of real weights contain zero anyway.
    pub include_zero: bool,
}

impl ClippingGrid {
    /// The grid for a packed scheme: float and integer offsets are asymmetric.
    ///
    /// # Errors
    /// [`Error::Argument`] for codebooks, other widths than 2 to 6 and 8 bits, blocks of several outputs, and
    /// double-quantized scales.
    pub fn for_scheme(scheme: &QuantScheme, d_input: usize, include_zero: bool) -> Result<Self> {
        let (bits, grid) = affine_in_groups("scheme", scheme)?;
        let symmetric = grid == Grid::Symmetric;
        Ok(Self { bits, group: scheme.block.inputs_of(d_input), symmetric, include_zero })
    }

    /// Largest code.
    pub(crate) fn top(&self) -> f32 {
        ((1u32 << self.bits) - 1) as f32
    }

    /// The level that the range's larger end has on the symmetric grid, which is also its zero point.
    pub(crate) fn half(&self) -> f32 {
        ((1u32 << (self.bits - 1)) - 1) as f32
    }
}

/// Bits and grid of a scheme whose ranges can be chosen group by group.
///
/// # Errors
/// [`Error::Argument`] naming `name` for any other scheme.
pub(crate) fn affine_in_groups(name: &str, scheme: &QuantScheme) -> Result<(u32, Grid)> {
    match scheme.value {
        Value::Affine { bits: bits @ (2 | 3 | 4 | 5 | 6 | 8), grid }
            if scheme.block.outputs == 1
                && scheme.scales != ScaleType::Double
                && scheme.scales.integer_bits().is_none() =>
        {
            Ok((bits, grid))
        }
        _ => {
            let expected =
                "an affine scheme of 2 to 6 or 8 bits in groups of one output, scales not quantized";
            Err(Error::argument(name, expected, scheme))
        }
    }
}

/// A weight with the ranges of its groups, `[d_input, d_output]` row-major: neighbours in memory are neighbouring
/// outputs, which have scales of their own, so that everything runs in vector instructions.
#[derive(Debug, Clone)]
pub struct ClippedWeight {
    grid: ClippingGrid,
    d_input: usize,
    d_output: usize,
    weight: Vec<f32>,
    max: Vec<f32>,
    min: Vec<f32>,
}

/// The levels of all groups under some logits; all `[groups, d_output]` row-major.
#[derive(Debug, Clone)]
pub struct Levels {
    /// Distances of two levels.
    pub scale: Vec<f32>,
    /// Zero points, integers.
    pub zero: Vec<f32>,
    /// Derivatives of the scale in gamma and in beta.
    derivatives: [Vec<f32>; 2],
}

impl ClippedWeight {
    /// Takes a weight `[d_output, d_input]` row-major, as checkpoints store it.
    ///
    /// # Errors
    /// [`Error::Argument`] if sizes don't fit; [`Error::NotFinite`] naming the projection.
    pub fn new(
        name: &str,
        weight: &[f32],
        d_input: usize,
        d_output: usize,
        grid: ClippingGrid,
    ) -> Result<Self> {
        if weight.is_empty() || d_input.checked_mul(d_output) != Some(weight.len()) || grid.group == 0 {
            let expected = format!("{d_output} outputs of {d_input} values in groups of at least one");
            let found = format!("{} values in groups of {}", weight.len(), grid.group);
            return Err(Error::argument(name, expected, found));
        }
        if weight.iter().any(|value| !value.is_finite()) {
            return Err(Error::NotFinite { place: name.into(), quantity: "the weight is".into() });
        }
        let weight = transpose(weight, d_output, d_input);
        let (mut max, mut min) = (Vec::new(), Vec::new());
        for rows in weight.chunks(grid.group * d_output) {
            let start = if grid.include_zero { [0.0; 2] } else { [f32::NEG_INFINITY, f32::INFINITY] };
            let (mut high, mut low) = (vec![start[0]; d_output], vec![start[1]; d_output]);
            for row in rows.chunks_exact(d_output) {
                high.iter_mut().zip(row).for_each(|(high, w)| *high = high.max(*w));
                low.iter_mut().zip(row).for_each(|(low, w)| *low = low.min(*w));
            }
            max.extend(high);
            min.extend(low);
        }
        Ok(Self { grid, d_input, d_output, weight, max, min })
    }

    /// `[groups, d_output]`: the shape of logits, scales and zero points.
    pub fn groups(&self) -> [usize; 2] {
        [self.d_input.div_ceil(self.grid.group), self.d_output]
    }

    pub(crate) fn grid(&self) -> ClippingGrid {
        self.grid
    }

    /// Largest and smallest weights, `[groups, d_output]`.
    pub(crate) fn ranges(&self) -> [&[f32]; 2] {
        [&self.max, &self.min]
    }

    /// `[d_input, d_output]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.d_input, self.d_output]
    }

    /// The weight as it is, `[d_input, d_output]`.
    pub fn weight(&self) -> &[f32] {
        &self.weight
    }

    /// The levels for logits `[groups, d_output]` of the upper and the lower end.
    ///
    /// # Panics
    /// If there isn't one of each for every group.
    pub fn levels(&self, gamma: &[f32], beta: &[f32]) -> Levels {
        let count = self.max.len();
        assert!(gamma.len() == count && beta.len() == count, "logits for {count} groups");
        let mut levels = Levels {
            scale: vec![0.0; count],
            zero: vec![0.0; count],
            derivatives: [vec![0.0; count], vec![0.0; count]],
        };
        for i in 0..count {
            let (upper, lower) = (sigmoid(gamma[i]), sigmoid(beta[i]));
            let (high, low) = (upper * self.max[i], lower * self.min[i]);
            let (d_high, d_low) = (upper * (1.0 - upper) * self.max[i], lower * (1.0 - lower) * self.min[i]);
            let (raw, d_gamma, d_beta) = if self.grid.symmetric {
                let half = self.grid.half();
                if high.abs() >= low.abs() {
                    (high.abs() / half, d_high.abs() / half, 0.0)
                } else {
                    (low.abs() / half, 0.0, d_low.abs() / half)
                }
            } else {
                let top = self.grid.top();
                ((high - low) / top, d_high / top, -d_low / top)
            };
            let scale = raw.clamp(SCALE[0], SCALE[1]);
            levels.scale[i] = scale;
            levels.zero[i] = if self.grid.symmetric {
                self.grid.half()
            } else {
                (-low / scale).clamp(-ZERO, ZERO).round_ties_even()
            };
            if raw == scale {
                levels.derivatives[0][i] = d_gamma;
                levels.derivatives[1][i] = d_beta;
            }
        }
        levels
    }

    /// The weight on its levels, `[d_input, d_output]`.
    pub fn quantize(&self, levels: &Levels) -> Vec<f32> {
        let (top, columns) = (self.grid.top(), self.d_output);
        let mut values = vec![0.0; self.weight.len()];
        let size = self.grid.group * columns;
        values.par_chunks_mut(size).zip(self.weight.par_chunks(size)).enumerate().for_each(
            |(group, (values, weight))| {
                let (scale, zero) = levels.group(group, columns);
                for (values, weight) in values.chunks_exact_mut(columns).zip(weight.chunks_exact(columns)) {
                    for (((value, w), s), z) in values.iter_mut().zip(weight).zip(scale).zip(zero) {
                        *value = s * clamped(nearest(w / s), -z, top - z);
                    }
                }
            },
        );
        values
    }

    /// Gradients of gamma and beta, `[groups, d_output]`, from the gradient `[d_input, d_output]` of
    /// [`quantize`](Self::quantize)'s result.
    ///
    /// Straight through the rounding: `dQ/ds = (code - z) - w / s` inside the range, its bounds included, and
    /// `code - z` outside; zero points are constants.
    ///
    /// # Panics
    /// If `gradient` doesn't have the weight's size.
    pub fn gradients(&self, levels: &Levels, gradient: &[f32]) -> [Vec<f32>; 2] {
        assert_eq!(gradient.len(), self.weight.len(), "a gradient for each weight");
        let (top, columns) = (self.grid.top(), self.d_output);
        let size = self.grid.group * columns;
        let mut d_scale = vec![0.0; levels.scale.len()];
        d_scale
            .par_chunks_mut(columns)
            .zip(self.weight.par_chunks(size).zip(gradient.par_chunks(size)))
            .enumerate()
            .for_each(|(group, (sums, (weight, gradient)))| {
                let (scale, zero) = levels.group(group, columns);
                for (weight, gradient) in weight.chunks_exact(columns).zip(gradient.chunks_exact(columns)) {
                    let levels = scale.iter().zip(zero);
                    for (((sum, w), dq), (s, z)) in sums.iter_mut().zip(weight).zip(gradient).zip(levels) {
                        let t = w / s;
                        let rounded = nearest(t);
                        let level = clamped(rounded, -z, top - z);
                        *sum += dq * (level - if level == rounded { t } else { 0.0 });
                    }
                }
            });
        let times = |d: &[f32]| d_scale.iter().zip(d).map(|(a, b)| a * b).collect();
        [times(&levels.derivatives[0]), times(&levels.derivatives[1])]
    }

    /// Codes and levels in the scheme's packed form. Scales are rounded to the scheme's storage type first, codes chosen
    /// against the rounded ones. The symmetric grid's zero point is not the one of
    /// [`Grid::Symmetric`], so it becomes a stored offset ([`Grid::Integer`]).
    ///
    /// # Errors
    /// [`Error::Quant`] if a scale or offset exceeds the range of its storage type.
    ///
    /// # Panics
    /// If the scheme is not one that the grid was made for.
    pub fn pack(&self, name: &str, levels: &Levels, scheme: &QuantScheme) -> Result<PackedWeight> {
        let mut scheme = *scheme;
        assert_eq!(
            ClippingGrid::for_scheme(&scheme, self.d_input, self.grid.include_zero).ok(),
            Some(self.grid),
            "a scheme for this grid"
        );
        if let Value::Affine { grid, .. } = &mut scheme.value
            && *grid == Grid::Symmetric
        {
            *grid = Grid::Integer;
        }
        let scale: Vec<f32> = levels.scale.iter().map(|&scale| scheme.scales.round(scale)).collect();
        let offset: Vec<f32> =
            scale.iter().zip(&levels.zero).map(|(s, z)| scheme.scales.round(-s * z)).collect();
        if let Some(i) =
            (0..scale.len()).find(|&i| !(scale[i] > 0.0 && scale[i].is_finite() && offset[i].is_finite()))
        {
            return Err(Error::Quant(kiln_quant_core::Error::Tensor {
                name: name.into(),
                expected: format!("scales and offsets in the range of scheme {scheme}"),
                found: format!("scale {} with zero point {}", levels.scale[i], levels.zero[i]),
            }));
        }
        let (top, columns) = (self.grid.top(), self.d_output);
        let mut packer = CodePacker::new(self.d_input, columns, self.grid.bits);
        let mut codes = vec![0u8; self.d_input];
        for output in 0..columns {
            for (input, code) in codes.iter_mut().enumerate() {
                let group = (input / self.grid.group) * columns + output;
                let t = self.weight[input * columns + output] / scale[group];
                *code = clamped(nearest(t) + levels.zero[group], 0.0, top) as u8;
            }
            packer.set_column(output, &codes);
        }
        Ok(PackedWeight {
            scheme,
            d_input: self.d_input,
            d_output: columns,
            codes: packer.into_words(),
            scales: Scales::Plain(scale),
            offsets: Some(offset),
            input_order: None,
        })
    }
}

impl Levels {
    /// Scales and zero points of one group of inputs, for all outputs.
    fn group(&self, group: usize, columns: usize) -> (&[f32], &[f32]) {
        let part = group * columns..(group + 1) * columns;
        (&self.scale[part.clone()], &self.zero[part])
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// The nearest integer, ties to even; what lies beyond every level stays there.
#[inline]
fn nearest(t: f32) -> f32 {
    (clamped(t, -FAR, FAR) + ROUND) - ROUND
}

/// As `f32::clamp`, without its treatment of NaN, which costs half of the speed.
#[inline]
#[allow(clippy::manual_clamp)]
fn clamped(t: f32, low: f32, high: f32) -> f32 {
    let t = if t > low { t } else { low };
    if t < high { t } else { high }
}

/// `[rows, columns]` → `[columns, rows]`.
pub(crate) fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut out = vec![0.0; values.len()];
    for (row, values) in values.chunks_exact(columns).enumerate() {
        for (column, value) in values.iter().enumerate() {
            out[column * rows + row] = *value;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use kiln_testkit::{assert_close, testdata};
    use serde_json::Value as Json;

    use super::*;

    fn vectors() -> Json {
        let bytes = std::fs::read(testdata("vectors/apiq_affine.json")).unwrap();
        serde_json::from_slice(&bytes).unwrap()
    }

    fn floats(value: &Json) -> Vec<f32> {
        match value {
            Json::Array(values) => values.iter().flat_map(floats).collect(),
            value => vec![value.as_f64().unwrap() as f32],
        }
    }

    /// One group of eight weights of one output, with its levels.
    fn case(case: &Json) -> (ClippedWeight, Levels) {
        let grid = ClippingGrid {
            bits: case["bits"].as_u64().unwrap() as u32,
            group: 8,
            symmetric: case["symmetric"].as_bool().unwrap(),
            include_zero: false,
        };
        let weight = ClippedWeight::new("w", &floats(&case["w"]), 8, 1, grid).unwrap();
        let levels = weight.levels(&floats(&case["gamma"]), &floats(&case["beta"]));
        (weight, levels)
    }

    fn scheme(grid: &ClippingGrid) -> QuantScheme {
        let suffix = if grid.symmetric { ":sym" } else { "" };
        format!("affine{}:{}{suffix}", grid.bits, grid.group).parse().unwrap()
    }

    fn codes(packed: &PackedWeight) -> Vec<f32> {
        let mut all = Vec::new();
        for output in 0..packed.d_output {
            let mut codes = vec![0; packed.d_input];
            let bits = packed.scheme.bits();
            kiln_quant_core::packing::unpack_column(&packed.codes, packed.d_output, bits, output, &mut codes);
            all.extend(codes.into_iter().map(f32::from));
        }
        all
    }

    #[test]
    fn values_codes_and_gradients_are_the_references() {
        let vectors = vectors();
        for json in vectors["cases"].as_array().unwrap() {
            let (weight, levels) = case(json);
            let what = format!("{} bits, symmetric {}", json["bits"], json["symmetric"]);
            assert_close(&what, &levels.scale, &floats(&json["scale"]), 1e-7);
            assert_eq!(levels.zero, floats(&json["zero"]), "{what}");
            assert_close(&what, &weight.quantize(&levels), &floats(&json["dequant"]), 2e-7);
            let packed = weight.pack("w", &levels, &scheme(&weight.grid)).unwrap();
            assert_eq!(codes(&packed), floats(&json["codes"]), "{what}");
            assert_close(&what, &packed.dequantize(), &floats(&json["dequant"]), 2e-7);
            let [gamma, beta] = weight.gradients(&levels, &floats(&json["upstream"]));
            assert_close(&what, &gamma, &floats(&json["grad_gamma_f64"]), 2e-7);
            assert_close(&what, &beta, &floats(&json["grad_beta_f64"]), 2e-7);
        }
    }

    #[test]
    fn degenerate_groups_are_the_references() {
        for json in vectors()["edge_cases"].as_array().unwrap() {
            let (weight, levels) = case(json);
            let what = json.to_string();
            let scale = floats(&json["scale"])[0];
            assert!((levels.scale[0] - scale).abs() <= 1e-6 * scale, "{what}");
            assert_eq!(levels.zero, floats(&json["zero"]), "{what}");
            let expected = floats(&json["dequant"]);
            let largest = expected.iter().fold(0f32, |max, w| max.max(w.abs()));
            assert_close(&what, &weight.quantize(&levels), &expected, 1e-6 * largest);
        }
    }

    #[test]
    fn groups_of_a_matrix_have_their_own_logits() {
        let matrix = vectors()["matrix"].clone();
        let grid = ClippingGrid { bits: 2, group: 4, symmetric: false, include_zero: false };
        let weight = ClippedWeight::new("w", &floats(&matrix["W"]), 8, 2, grid).unwrap();
        // The reference counts groups output by output.
        let by_group = |name: &str| transpose(&floats(&matrix[name]), 2, 2);
        let levels = weight.levels(&by_group("gamma"), &by_group("beta"));
        assert_close("scale", &levels.scale, &by_group("scale"), 1e-7);
        assert_eq!(levels.zero, by_group("zero"));
        let dequantized = transpose(&weight.quantize(&levels), 8, 2);
        assert_close("values", &dequantized, &floats(&matrix["dequant"]), 2e-7);
        let packed = weight.pack("w", &levels, &"affine2:4:int".parse().unwrap()).unwrap();
        assert_eq!(codes(&packed), floats(&matrix["codes"]));
    }

    #[test]
    fn including_zero_keeps_constant_groups_and_zero_points_in_range() {
        let grid = ClippingGrid { bits: 2, group: 4, symmetric: false, include_zero: true };
        let weight = [0.5, 0.5, 0.5, 0.5, -0.1, -0.2, -0.3, -0.4];
        let clipped = ClippedWeight::new("w", &weight, 8, 1, grid).unwrap();
        let levels = clipped.levels(&[20.0; 2], &[20.0; 2]);
        assert_eq!(levels.zero, [0.0, 3.0]);
        let expected = [0.5, 0.5, 0.5, 0.5, -0.13333334, -0.26666668, -0.26666668, -0.4];
        assert_close("values", &clipped.quantize(&levels), &expected, 1e-6);
    }

    #[test]
    fn ragged_groups_and_half_precision_scales_pack_what_they_quantize() {
        let weight = kiln_testkit::values(3, 70 * 5);
        for text in ["affine3:32:f16", "affine4:32:int", "affine2:col:bf16", "affine8:16"] {
            let scheme: QuantScheme = text.parse().unwrap();
            let grid = ClippingGrid::for_scheme(&scheme, 70, true).unwrap();
            let clipped = ClippedWeight::new("w", &weight, 70, 5, grid).unwrap();
            let [rows, columns] = clipped.groups();
            let logits = vec![2.0; rows * columns];
            let levels = clipped.levels(&logits, &logits);
            let packed = clipped.pack("w", &levels, &scheme).unwrap();
            packed.validate("w").unwrap();
            let simulated = transpose(&clipped.quantize(&levels), 70, 5);
            // Half a step of rounding of the scale at the outermost level.
            let tolerance = if scheme.scales == kiln_quant_core::ScaleType::F32 { 1e-6 } else { 0.3 };
            let found = packed.dequantize();
            assert!(kiln_testkit::relative_difference(&found, &simulated) < tolerance, "{text}");
        }
    }

    #[test]
    fn weights_that_are_not_finite_are_refused_by_name() {
        let grid = ClippingGrid { bits: 2, group: 2, symmetric: false, include_zero: true };
        let error = ClippedWeight::new("layers.0.q_proj", &[1.0, f32::NAN], 2, 1, grid).unwrap_err();
        assert!(error.to_string().contains("layers.0.q_proj"), "{error}");
        assert!(ClippedWeight::new("w", &[1.0; 3], 2, 2, grid).is_err());
        assert!(ClippingGrid::for_scheme(&"nf4:64".parse().unwrap(), 64, true).is_err());
    }
}
