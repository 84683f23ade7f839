//! [`ClippedWeight`] as tensors of a device: off the CPU nothing of an optimisation step goes through the host.
//!
//! That takes the dense weights of a block in f32 once more, and while a layer is put on its levels some tensors of its size.

use burn::tensor::{Device, Int, Tensor, TensorData, activation::sigmoid};

use crate::{
    ClippedWeight, ClippingGrid,
    clipping::{FAR, ROUND, SCALE, ZERO},
    values::tensor,
};

/// A weight with the ranges of its groups, `[d_input, d_output]` and `[groups, d_output]`.
pub(crate) struct ClippedTensor {
    grid: ClippingGrid,
    weight: Tensor<2>,
    max: Tensor<2>,
    min: Tensor<2>,
    /// The group of each input.
    groups: Tensor<1, Int>,
}

/// The levels of all groups under some logits, as [`Levels`](crate::Levels).
pub(crate) struct LevelTensors {
    scale: Tensor<2>,
    zero: Tensor<2>,
    derivatives: [Tensor<2>; 2],
}

impl ClippedTensor {
    pub(crate) fn new(weight: &ClippedWeight, device: &Device) -> Self {
        let ([d_input, _], grid) = (weight.shape(), weight.grid());
        let [max, min] = weight.ranges().map(|values| tensor(values.to_vec(), weight.groups(), device));
        let groups: Vec<i64> = (0..d_input).map(|input| (input / grid.group) as i64).collect();
        Self {
            grid,
            weight: tensor(weight.weight().to_vec(), weight.shape(), device),
            max,
            min,
            groups: Tensor::from_data(TensorData::new(groups, [d_input]), device),
        }
    }

    /// See [`ClippedWeight::levels`].
    pub(crate) fn levels(&self, gamma: Tensor<2>, beta: Tensor<2>) -> LevelTensors {
        let (upper, lower) = (sigmoid(gamma), sigmoid(beta));
        let slope = |s: &Tensor<2>, end: &Tensor<2>| s.clone() * (s.clone().neg() + 1.0) * end.clone();
        let (high, low) = (upper.clone() * self.max.clone(), lower.clone() * self.min.clone());
        let (d_high, d_low) = (slope(&upper, &self.max), slope(&lower, &self.min));
        let (raw, derivatives) = if self.grid.symmetric {
            let half = f64::from(self.grid.half());
            let (high, low) = (high.abs().div_scalar(half), low.clone().abs().div_scalar(half));
            let below = low.clone().greater(high.clone());
            let d_high = d_high.abs().div_scalar(half).mask_fill(below.clone(), 0.0);
            let d_low = d_low.abs().div_scalar(half).mask_fill(below.clone().bool_not(), 0.0);
            (high.mask_where(below, low), [d_high, d_low])
        } else {
            let top = f64::from(self.grid.top());
            let raw = (high - low.clone()).div_scalar(top);
            (raw, [d_high.div_scalar(top), d_low.div_scalar(-top)])
        };
        let scale = raw.clone().clamp(SCALE[0], SCALE[1]);
        let zero = match self.grid.symmetric {
            true => scale.full_like(self.grid.half()),
            false => nearest((low.neg() / scale.clone()).clamp(-ZERO, ZERO)),
        };
        let bounded = raw.not_equal(scale.clone());
        LevelTensors { scale, zero, derivatives: derivatives.map(|d| d.mask_fill(bounded.clone(), 0.0)) }
    }

    /// `w / s`, its integer, the integer within the range, and `s`, for each weight.
    fn on_levels(&self, levels: &LevelTensors) -> [Tensor<2>; 4] {
        let low = levels.zero.clone().neg();
        let high = low.clone() + self.grid.top();
        let of_inputs = |x: Tensor<2>| x.select(0, self.groups.clone());
        let scale = of_inputs(levels.scale.clone());
        let t = self.weight.clone() / scale.clone();
        let rounded = nearest(t.clone().clamp(-FAR, FAR));
        let level = rounded.clone().max_pair(of_inputs(low)).min_pair(of_inputs(high));
        [t, rounded, level, scale]
    }

    /// See [`ClippedWeight::quantize`].
    pub(crate) fn quantize(&self, levels: &LevelTensors) -> Tensor<2> {
        let [.., level, scale] = self.on_levels(levels);
        level * scale
    }

    /// See [`ClippedWeight::gradients`].
    pub(crate) fn gradients(&self, levels: &LevelTensors, gradient: Tensor<2>) -> [Tensor<2>; 2] {
        let [t, rounded, level, _] = self.on_levels(levels);
        let outside = level.clone().not_equal(rounded);
        let of_weights = gradient * (level - t.mask_fill(outside, 0.0));
        let ([d_input, d_output], [groups, _]) = (of_weights.dims(), self.max.dims());
        let missing = groups * self.grid.group - d_input;
        let of_weights = match missing {
            0 => of_weights,
            _ => {
                let zeros = Tensor::zeros([missing, d_output], &of_weights.device());
                Tensor::cat(vec![of_weights, zeros], 0)
            }
        };
        let d_scale: Tensor<2> =
            of_weights.reshape([groups, self.grid.group, d_output]).sum_dim(1).squeeze_dim(1);
        levels.derivatives.each_ref().map(|d| d_scale.clone() * d.clone())
    }
}

/// The nearest integer, ties to even on every device, as the host has it: what `round` does with ties is theirs.
fn nearest(t: Tensor<2>) -> Tensor<2> {
    t.add_scalar(ROUND).sub_scalar(ROUND)
}

#[cfg(test)]
mod tests {
    use kiln_testkit::{assert_close, read, values, vulkan};

    use super::*;

    /// What the host computes, which the vectors of ApiQ's code are compared with.
    fn check(device: &Device, tolerance: f32) {
        for (bits, group, symmetric, include_zero) in [
            (2, 32, false, true),
            (3, 24, false, false),
            (4, 70, true, true),
            (8, 16, true, false),
            (2, 8, false, true),
        ] {
            let what = format!("{bits} bits, groups of {group}, symmetric {symmetric}");
            let grid = ClippingGrid { bits, group, symmetric, include_zero };
            let mut weight = values(3, 70 * 5);
            // Groups of one number, of zeros, and some whose scale would leave its bounds.
            weight[..70].fill(0.25);
            weight[70..140].fill(0.0);
            weight[140..210].iter_mut().for_each(|w| *w *= 1e-7);
            // Ends that lie alike around zero, so that the zero point is a tie for equal logits, and ties of weights.
            for (i, w) in weight[210..280].iter_mut().enumerate() {
                *w = [1.0, -1.0, 0.5, -0.25, 0.0, 0.75][i % 6];
            }
            let host = ClippedWeight::new("w", &weight, 70, 5, grid).unwrap();
            let there = ClippedTensor::new(&host, device);
            let shape = host.groups();
            let count = shape[0] * shape[1];
            let [gamma, beta] =
                [4, 5].map(|seed| values(seed, count).iter().map(|x| 3.0 * x).collect::<Vec<_>>());
            let (mut gamma, mut beta) = (gamma, beta);
            for group in 0..shape[0] {
                // Of the output with ties: the published end, and one that keeps the range.
                let at = group * shape[1] + 3;
                (gamma[at], beta[at]) = if group % 2 == 0 { (20.0, 20.0) } else { (4.0, 4.0) };
            }
            let gradient = values(6, 70 * 5);
            let logits = |values: &[f32]| tensor::<2>(values.to_vec(), shape, device);

            let expected = host.levels(&gamma, &beta);
            let levels = there.levels(logits(&gamma), logits(&beta));
            let scales = read(levels.scale.clone());
            for (found, expected) in scales.iter().zip(&expected.scale) {
                assert!((found - expected).abs() <= tolerance * expected, "{what}: {found} {expected}");
            }
            assert_eq!(read(levels.zero.clone()), expected.zero, "{what}");
            let found = read(there.quantize(&levels));
            assert_close(&what, &found, &host.quantize(&expected), tolerance);
            let found = there.gradients(&levels, tensor(gradient.clone(), [70, 5], device));
            for (found, expected) in found.into_iter().zip(host.gradients(&expected, &gradient)) {
                assert_close(&what, &read(found), &expected, 10.0 * tolerance);
            }
        }
    }

    #[test]
    fn tensors_are_on_the_levels_of_the_host() {
        check(&Device::flex(), 1e-6);
    }

    #[test]
    fn tensors_of_a_gpu_are_on_the_levels_of_the_host() {
        if let Some(vulkan) = vulkan() {
            check(&vulkan.device, 2e-6);
        }
    }
}
