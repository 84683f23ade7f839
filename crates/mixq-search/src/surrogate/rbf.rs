//! Radial basis functions with a cubic kernel and a linear tail.

use super::{
    Prediction, Surrogate,
    linear::{dot, solve},
};
use crate::{Error, Result};

/// `sum_i weights_i |x - x_i|³ + tail · (x, 1)`: interpolates, up to a small penalty that keeps repeated points
/// solvable. AMQ's surrogate.
#[derive(Debug, Clone)]
pub struct CubicRbf {
    x: Vec<Vec<f64>>,
    weights: Vec<f64>,
    tail: Vec<f64>,
}

/// Added to the kernel's diagonal.
const SMOOTHING: f64 = 1e-6;

fn cubed(a: &[f64], b: &[f64]) -> f64 {
    let squared: f64 = a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum();
    squared * squared.sqrt()
}

impl CubicRbf {
    /// Solves for weights and tail.
    ///
    /// # Errors
    /// [`Error::Option`] if there are no observations, lengths differ, or the system is singular (fewer distinct
    /// points than the tail has terms are held by a penalty on the tail).
    pub fn fit(x: &[Vec<f64>], y: &[f64]) -> Result<Self> {
        super::check(x, y)?;
        let (n, terms) = (x.len(), x[0].len() + 1);
        let size = n + terms;
        let mut matrix = vec![0.0; size * size];
        for i in 0..n {
            for j in 0..n {
                matrix[i * size + j] = cubed(&x[i], &x[j]);
            }
            // The cubic kernel is conditionally positive: the smoothing term enters with its sign.
            matrix[i * size + i] += SMOOTHING;
            for (k, value) in x[i].iter().copied().chain([1.0]).enumerate() {
                matrix[i * size + n + k] = value;
                matrix[(n + k) * size + i] = value;
            }
        }
        for k in n..size {
            matrix[k * size + k] = -SMOOTHING;
        }
        let right = y.iter().copied().chain(std::iter::repeat_n(0.0, terms)).collect();
        let mut solution = solve(matrix, right)
            .ok_or_else(|| Error::option("CubicRbf", "distinct points", "a singular system"))?;
        let tail = solution.split_off(n);
        Ok(Self { x: x.to_vec(), weights: solution, tail })
    }
}

impl Surrogate for CubicRbf {
    /// The deviation is 0: an interpolant has no opinion on its error.
    fn predict(&self, x: &[f64]) -> Prediction {
        let kernel: f64 =
            self.x.iter().zip(&self.weights).map(|(known, weight)| weight * cubed(known, x)).sum();
        Prediction { mean: kernel + dot(&self.tail, x) + self.tail[x.len()], sd: 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interpolates_its_points_and_continues_lines() {
        let x: Vec<Vec<f64>> = (0..16).map(|i| vec![f64::from(i % 4), f64::from(i / 4)]).collect();
        let y: Vec<f64> = x.iter().map(|x| x[0].sin() * x[1]).collect();
        let rbf = CubicRbf::fit(&x, &y).unwrap();
        for (x, y) in x.iter().zip(&y) {
            assert!((rbf.predict(x).mean - y).abs() < 1e-4);
        }
        let line: Vec<f64> = x.iter().map(|x| 1.0 + x[0] - 2.0 * x[1]).collect();
        assert!((CubicRbf::fit(&x, &line).unwrap().predict(&[8.0, 1.0]).mean - 7.0).abs() < 1e-3);
    }

    #[test]
    fn fewer_points_than_tail_terms_still_fit() {
        let x = vec![vec![0.0, 0.0, 0.0, 0.0], vec![1.0, 1.0, 1.0, 1.0]];
        let rbf = CubicRbf::fit(&x, &[1.0, 2.0]).unwrap();
        assert!((rbf.predict(&x[1]).mean - 2.0).abs() < 1e-3);
    }
}
