//! How much a channel of one matrix matters.

use serde::{Deserialize, Serialize};

/// What is measured. `W` is a weight, `G` the gradient of the mean calibration loss, `F = (1/N) Σ gₙ²` the diagonal
/// empirical Fisher from the gradients of single windows, `X` a linear's input over the calibration tokens; sums run
/// over the weights of one channel.
///
/// | name | score of a channel | needs |
/// | --- | --- | --- |
/// | `random` | uniform, by seed | nothing |
/// | `l1`, `l2` | `Σ abs(W)`, `Σ W²` | the weights |
/// | `taylor_vector` | `abs(Σ W G)` | one backward pass |
/// | `taylor_first` | `Σ abs(W G)` | one backward pass |
/// | `taylor_second` | `Σ abs(W F W)` | gradients by window |
/// | `taylor_mixed` | `Σ abs(W G - W F W / 2)` | gradients by window |
/// | `wanda` | `mean(abs(W)) · ‖X‖`, on o and down | a forward pass |
/// | `flap_wifv` | `Var(X) · Σ W²`, on o and down | a forward pass |
/// | `flap_ifv` | `Var(X)`, on o and down | a forward pass |
/// | `flap_wifn` | `mean(abs(W)) · rms(X)`, on o and down | a forward pass |
///
/// Sources: LLM-Pruner (arXiv 2305.11627) for the first seven, Wanda-sp and FLAP (arXiv 2312.11983) for the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Criterion {
    /// Uniform random numbers.
    Random,
    /// Sum of magnitudes.
    L1,
    /// Sum of squares, without the root.
    L2,
    /// First order, the channel as a whole.
    TaylorVector,
    /// First order, weight by weight: the default of LLM-Pruner's program.
    TaylorFirst,
    /// Second order alone.
    TaylorSecond,
    /// First and second order.
    TaylorMixed,
    /// Wanda, structured.
    Wanda,
    /// FLAP's weighted input feature variance.
    FlapWifv,
    /// FLAP's input feature variance.
    FlapIfv,
    /// FLAP's weighted input feature norm.
    FlapWifn,
}

impl Criterion {
    /// Whether it looks at gradients.
    pub fn needs_gradients(self) -> bool {
        matches!(self, Self::TaylorVector | Self::TaylorFirst) || self.needs_fisher()
    }

    /// Whether it looks at the gradients of single windows.
    pub fn needs_fisher(self) -> bool {
        matches!(self, Self::TaylorSecond | Self::TaylorMixed)
    }

    /// Whether it looks at the inputs of o and down.
    pub fn needs_inputs(self) -> bool {
        matches!(self, Self::Wanda | Self::FlapWifv | Self::FlapIfv | Self::FlapWifn)
    }

    /// Whether a head's score is the mean over its channels' squares, as in FLAP, and not their sum.
    pub(crate) fn is_flap(self) -> bool {
        matches!(self, Self::FlapWifv | Self::FlapIfv | Self::FlapWifn)
    }
}

/// Which axis of a weight `[d_input, d_output]` the channels are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    /// A channel is what one input feeds.
    Input,
    /// A channel is what feeds one output.
    Output,
}

/// A weight in host memory with its gradients, all `[d_input, d_output]` row-major. Those that a criterion doesn't look
/// at may be empty.
#[derive(Debug, Clone, Default)]
pub struct Matrix {
    /// The weight.
    pub weight: Vec<f32>,
    /// Gradient of the mean loss.
    pub gradient: Vec<f32>,
    /// Mean of the squared gradients of single windows.
    pub fisher: Vec<f32>,
    /// Outputs.
    pub d_output: usize,
}

impl Matrix {
    /// Scores of the channels along `axis` under a criterion of weights and gradients; sums in f64.
    ///
    /// # Panics
    /// If `criterion` is none of those, or what it looks at has another size than the weight.
    pub fn scores(&self, criterion: Criterion, axis: Axis) -> Vec<f64> {
        let same = |part: &[f32]| assert_eq!(part.len(), self.weight.len(), "gradients of {criterion:?}");
        if criterion.needs_gradients() && criterion != Criterion::TaylorSecond {
            same(&self.gradient);
        }
        if criterion.needs_fisher() {
            same(&self.fisher);
        }
        let w = |i: usize| f64::from(self.weight[i]);
        let g = |i: usize| f64::from(self.gradient[i]);
        let f = |i: usize| f64::from(self.fisher[i]);
        match criterion {
            Criterion::L1 => self.sum(axis, |i| w(i).abs()),
            Criterion::L2 => self.sum(axis, |i| w(i) * w(i)),
            Criterion::TaylorVector => self.sum(axis, |i| w(i) * g(i)).into_iter().map(f64::abs).collect(),
            Criterion::TaylorFirst => self.sum(axis, |i| (w(i) * g(i)).abs()),
            Criterion::TaylorSecond => self.sum(axis, |i| (w(i) * f(i) * w(i)).abs()),
            Criterion::TaylorMixed => self.sum(axis, |i| (w(i) * g(i) - 0.5 * w(i) * f(i) * w(i)).abs()),
            other => panic!("{other:?} is no criterion of weights and gradients"),
        }
    }

    /// Sums of `term(index)` over each channel.
    fn sum(&self, axis: Axis, term: impl Fn(usize) -> f64) -> Vec<f64> {
        let inputs = self.weight.len() / self.d_output.max(1);
        match axis {
            Axis::Input => (0..inputs)
                .map(|input| (0..self.d_output).map(|output| term(input * self.d_output + output)).sum())
                .collect(),
            Axis::Output => {
                let mut sums = vec![0.0; self.d_output];
                for i in 0..self.weight.len() {
                    sums[i % self.d_output] += term(i);
                }
                sums
            }
        }
    }

    /// Scores of the inputs under a criterion of activations.
    ///
    /// # Panics
    /// If `criterion` is another, or `inputs` has another width.
    pub fn input_scores(&self, criterion: Criterion, inputs: &InputStatistics) -> Vec<f64> {
        let squares = self.scores(Criterion::L2, Axis::Input);
        let magnitudes = self.scores(Criterion::L1, Axis::Input);
        assert_eq!(squares.len(), inputs.mean.len(), "statistics of the inputs");
        (0..squares.len())
            .map(|j| match criterion {
                Criterion::Wanda => magnitudes[j] / self.d_output as f64 * inputs.square_sum(j).sqrt(),
                Criterion::FlapWifv => inputs.variance(j) * squares[j],
                Criterion::FlapIfv => inputs.variance(j),
                Criterion::FlapWifn => {
                    let mean_square = inputs.square_sum(j) / inputs.count.max(1) as f64;
                    magnitudes[j] / self.d_output as f64 * mean_square.sqrt()
                }
                other => panic!("{other:?} is no criterion of activations"),
            })
            .collect()
    }
}

/// Mean and spread of each input of a linear over the calibration tokens, in f64.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct InputStatistics {
    /// Tokens.
    pub count: usize,
    /// Mean of each input.
    pub mean: Vec<f64>,
    /// Sum of squared differences from the mean.
    pub deviations: Vec<f64>,
}

impl InputStatistics {
    /// Adds tokens, `[tokens, width]` row-major; the order of merging is that of the calls.
    ///
    /// # Panics
    /// If `values` doesn't hold whole rows of the width of the rows before.
    pub fn add(&mut self, values: &[f32], width: usize) {
        self.merge(&Self::of(values, width));
    }

    /// Of these tokens alone.
    pub(crate) fn of(values: &[f32], width: usize) -> Self {
        assert!(width > 0 && values.len().is_multiple_of(width), "rows of {width} values");
        let count = values.len() / width;
        let (mut means, mut deviations) = (vec![0.0; width], vec![0.0; width]);
        for (j, (mean, deviations)) in means.iter_mut().zip(&mut deviations).enumerate().filter(|_| count > 0)
        {
            let column = || values.iter().skip(j).step_by(width).map(|&value| f64::from(value));
            *mean = column().sum::<f64>() / count as f64;
            *deviations = column().map(|value| (value - *mean).powi(2)).sum::<f64>();
        }
        Self { count, mean: means, deviations }
    }

    /// Adds other tokens.
    ///
    /// # Panics
    /// If they have another width.
    pub(crate) fn merge(&mut self, other: &Self) {
        if self.count == 0 {
            let width = other.mean.len();
            (self.mean, self.deviations) = (vec![0.0; width], vec![0.0; width]);
        }
        assert_eq!(self.mean.len(), other.mean.len(), "width of the inputs");
        if other.count == 0 {
            return;
        }
        let (old, new) = (self.count as f64, other.count as f64);
        let sums = self.mean.iter_mut().zip(&mut self.deviations);
        for ((mean, deviations), (other, more)) in sums.zip(other.mean.iter().zip(&other.deviations)) {
            // Chan's rule for merging two sets: exact means, no cancellation of large sums.
            let shift = other - *mean;
            *mean += shift * new / (old + new);
            *deviations += more + shift * shift * old * new / (old + new);
        }
        self.count += other.count;
    }

    /// Unbiased variance of input `j`.
    pub fn variance(&self, j: usize) -> f64 {
        self.deviations[j] / (self.count.max(2) - 1) as f64
    }

    /// `Σ x²` of input `j`.
    pub fn square_sum(&self, j: usize) -> f64 {
        self.deviations[j] + self.count as f64 * self.mean[j] * self.mean[j]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_don_t_depend_on_how_tokens_are_batched() {
        let values: Vec<f32> = (0..60).map(|i| (i as f32 * 0.7).sin() + 100.0).collect();
        let (mut whole, mut parts) = (InputStatistics::default(), InputStatistics::default());
        whole.add(&values, 3);
        for part in [&values[..3], &values[3..30], &values[30..]] {
            parts.add(part, 3);
        }
        for j in 0..3 {
            let column: Vec<f64> = values.iter().skip(j).step_by(3).map(|&v| f64::from(v)).collect();
            let mean = column.iter().sum::<f64>() / 20.0;
            let variance = column.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 19.0;
            for found in [&whole, &parts] {
                assert!((found.variance(j) - variance).abs() < 1e-12);
                let squares: f64 = column.iter().map(|v| v * v).sum();
                assert!((found.square_sum(j) / squares - 1.0).abs() < 1e-12);
            }
        }
    }
}
