//! The performance model: a small ensemble of multi-layer perceptrons.

use rand::RngExt;

use super::{Prediction, Surrogate};
use crate::{Result, moves::stream};

/// Width of the three hidden layers.
const WIDTH: usize = 32;
/// Networks; their mean is the prediction, their spread the deviation.
const MEMBERS: u64 = 5;
const EPOCHS: i32 = 200;
const LEARNING_RATE: f32 = 1e-2;

/// `inputs → 32 → 32 → 32 → 1` with ReLU, five members from different starts, each trained on the squared error of
/// standardised targets: 200 full-batch epochs of Adam at 1e-2.
#[derive(Debug, Clone)]
pub struct MlpEnsemble {
    members: Vec<Mlp>,
    mean: f64,
    scale: f64,
}

impl MlpEnsemble {
    /// Trains the members; the same seed and data give the same networks.
    ///
    /// # Errors
    /// [`Error::Option`](crate::Error::Option) if there are no observations or lengths differ.
    pub fn fit(x: &[Vec<f64>], y: &[f64], seed: u64) -> Result<Self> {
        super::check(x, y)?;
        let n = y.len() as f64;
        let mean = y.iter().sum::<f64>() / n;
        let spread = (y.iter().map(|y| (y - mean).powi(2)).sum::<f64>() / n).sqrt();
        let scale = if spread > 0.0 { spread } else { 1.0 };
        let inputs: Vec<Vec<f32>> = x.iter().map(|x| x.iter().map(|&value| value as f32).collect()).collect();
        let targets: Vec<f32> = y.iter().map(|y| ((y - mean) / scale) as f32).collect();
        let members = (0..MEMBERS)
            .map(|member| {
                let mut mlp = Mlp::new(inputs[0].len(), seed, member);
                mlp.train(&inputs, &targets);
                mlp
            })
            .collect();
        Ok(Self { members, mean, scale })
    }
}

impl Surrogate for MlpEnsemble {
    fn predict(&self, x: &[f64]) -> Prediction {
        let x: Vec<f32> = x.iter().map(|&value| value as f32).collect();
        let outputs: Vec<f64> = self.members.iter().map(|mlp| f64::from(mlp.forward(&x)[3][0])).collect();
        let n = outputs.len() as f64;
        let mean = outputs.iter().sum::<f64>() / n;
        let variance = outputs.iter().map(|output| (output - mean).powi(2)).sum::<f64>() / n;
        Prediction { mean: self.mean + self.scale * mean, sd: self.scale * variance.sqrt() }
    }
}

/// A layer's weights `[inputs][outputs]` and bias behind one another.
#[derive(Debug, Clone)]
struct Layer {
    parameters: Vec<f32>,
    inputs: usize,
    outputs: usize,
}

#[derive(Debug, Clone)]
struct Mlp {
    layers: [Layer; 4],
}

impl Mlp {
    fn new(inputs: usize, seed: u64, member: u64) -> Self {
        let mut rng = stream(seed, "mlp", member);
        let mut layer = |inputs: usize, outputs: usize| {
            let bound = (6.0 / inputs.max(1) as f32).sqrt();
            let weights = (0..inputs * outputs).map(|_| bound * (2.0 * rng.random::<f32>() - 1.0));
            Layer { parameters: weights.chain(std::iter::repeat_n(0.0, outputs)).collect(), inputs, outputs }
        };
        Self { layers: [layer(inputs, WIDTH), layer(WIDTH, WIDTH), layer(WIDTH, WIDTH), layer(WIDTH, 1)] }
    }

    /// Outputs of every layer, after ReLU but for the last.
    fn forward(&self, x: &[f32]) -> [Vec<f32>; 4] {
        let mut outputs: [Vec<f32>; 4] = Default::default();
        self.forward_into(x, &mut outputs);
        outputs
    }

    /// The same in buffers that are used again.
    fn forward_into(&self, x: &[f32], outputs: &mut [Vec<f32>; 4]) {
        for (index, layer) in self.layers.iter().enumerate() {
            let (weights, bias) = layer.parameters.split_at(layer.inputs * layer.outputs);
            let (before, rest) = outputs.split_at_mut(index);
            let output = &mut rest[0];
            output.clear();
            output.extend_from_slice(bias);
            let input = before.last().map_or(x, Vec::as_slice);
            for (value, row) in input.iter().zip(weights.chunks_exact(layer.outputs)) {
                for (output, weight) in output.iter_mut().zip(row) {
                    *output += value * weight;
                }
            }
            if index < 3 {
                output.iter_mut().for_each(|value| *value = value.max(0.0));
            }
        }
    }

    /// Adds the gradient of `0.5 * error²` at one observation.
    fn backward(&self, x: &[f32], error: f32, outputs: &[Vec<f32>; 4], gradients: &mut [Vec<f32>; 4]) {
        let mut delta = vec![error];
        for (index, layer) in self.layers.iter().enumerate().rev() {
            let input = if index == 0 { x } else { &outputs[index - 1] };
            let split = layer.inputs * layer.outputs;
            let (weights, bias) = gradients[index].split_at_mut(split);
            for (value, row) in input.iter().zip(weights.chunks_exact_mut(layer.outputs)) {
                for (gradient, delta) in row.iter_mut().zip(&delta) {
                    *gradient += value * delta;
                }
            }
            bias.iter_mut().zip(&delta).for_each(|(gradient, delta)| *gradient += delta);
            if index > 0 {
                let rows = layer.parameters[..split].chunks_exact(layer.outputs);
                let back = |(row, &active): (&[f32], &f32)| {
                    if active > 0.0 { dot(row, &delta) } else { 0.0 }
                };
                delta = rows.zip(input).map(back).collect();
            }
        }
    }

    fn train(&mut self, inputs: &[Vec<f32>], targets: &[f32]) {
        let zeros: [Vec<f32>; 4] = self.layers.each_ref().map(|layer| vec![0.0; layer.parameters.len()]);
        let (mut first, mut second) = (zeros.clone(), zeros.clone());
        let mut outputs: [Vec<f32>; 4] = Default::default();
        let per_observation = 2.0 / targets.len() as f32;
        for epoch in 1..=EPOCHS {
            let mut gradients = zeros.clone();
            for (x, target) in inputs.iter().zip(targets) {
                self.forward_into(x, &mut outputs);
                let error = per_observation * (outputs[3][0] - target);
                self.backward(x, error, &outputs, &mut gradients);
            }
            let rate = LEARNING_RATE * (1.0 - 0.999f32.powi(epoch)).sqrt() / (1.0 - 0.9f32.powi(epoch));
            for (index, layer) in self.layers.iter_mut().enumerate() {
                let moments = first[index].iter_mut().zip(&mut second[index]);
                for ((parameter, gradient), (m, v)) in
                    layer.parameters.iter_mut().zip(&gradients[index]).zip(moments)
                {
                    *m = 0.9 * *m + 0.1 * gradient;
                    *v = 0.999 * *v + 0.001 * gradient * gradient;
                    *parameter -= rate * *m / (v.sqrt() + 1e-8);
                }
            }
        }
    }
}

/// In eight sums side by side: one alone would wait for every addition.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a_lanes, b_lanes) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = a_lanes.remainder().iter().zip(b_lanes.remainder()).map(|(a, b)| a * b).sum();
    let mut sums = [0.0f32; 8];
    for (a, b) in a_lanes.zip(b_lanes) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    rest + sums.iter().sum::<f32>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_equal_finite_differences() {
        let mut mlp = Mlp::new(3, 1, 0);
        let (x, target) = ([0.3, -0.7, 0.9], 0.4);
        let mut gradients = mlp.layers.each_ref().map(|layer| vec![0.0; layer.parameters.len()]);
        let outputs = mlp.forward(&x);
        mlp.backward(&x, outputs[3][0] - target, &outputs, &mut gradients);
        let mut checked = 0;
        for (layer, gradients) in gradients.iter().enumerate() {
            for index in (0..gradients.len()).step_by(7) {
                let mut loss = |shift: f32| {
                    let before = mlp.layers[layer].parameters[index];
                    mlp.layers[layer].parameters[index] = before + shift;
                    let error = mlp.forward(&x)[3][0] - target;
                    mlp.layers[layer].parameters[index] = before;
                    0.5 * error * error
                };
                let slope = (loss(1e-2) - loss(-1e-2)) / 2e-2;
                // f32 and a step of 1e-2: a ReLU that switches inside the step is the largest error.
                assert!((slope - gradients[index]).abs() < 2e-2, "{slope} {}", gradients[index]);
                checked += usize::from(slope.abs() > 0.05);
            }
        }
        assert!(checked > 10, "{checked} parameters with a slope");
    }

    #[test]
    fn fits_a_curve_and_is_the_same_for_the_same_seed() {
        let x: Vec<Vec<f64>> =
            (0..40).map(|i| vec![f64::from(i % 8) / 7.0, f64::from(i / 8) / 4.0]).collect();
        let y: Vec<f64> = x.iter().map(|x| 10.0 + 3.0 * x[0] * x[0] - 2.0 * x[0] * x[1]).collect();
        let fit = |seed| MlpEnsemble::fit(&x, &y, seed).unwrap();
        let mlp = fit(7);
        let error = x.iter().zip(&y).map(|(x, y)| (mlp.predict(x).mean - y).abs()).fold(0.0, f64::max);
        assert!(error < 0.3, "{error}");
        assert_eq!(mlp.predict(&[0.1, 0.2]), fit(7).predict(&[0.1, 0.2]));
        assert_ne!(mlp.predict(&[0.1, 0.2]), fit(8).predict(&[0.1, 0.2]));
        let (inside, outside) = (mlp.predict(&[0.5, 0.5]).sd, mlp.predict(&[4.0, -3.0]).sd);
        assert!(outside > inside, "{outside} {inside}");
    }
}
