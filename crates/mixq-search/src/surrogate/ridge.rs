//! Linear regression with a penalty.

use super::{
    Prediction, Surrogate,
    linear::{Cholesky, dot},
};
use crate::{Error, Result};

/// `y = intercept + weights · x`, least squares with `penalty * |weights|²`; the intercept is free.
#[derive(Debug, Clone)]
pub struct Ridge {
    intercept: f64,
    weights: Vec<f64>,
    center: Vec<f64>,
    factor: Cholesky,
    /// Standard deviation of the residuals.
    noise: f64,
    observations: f64,
}

impl Ridge {
    /// Fits the weights.
    ///
    /// # Errors
    /// [`Error::Option`] if there are no observations, lengths differ, or the penalty is not positive.
    pub fn fit(x: &[Vec<f64>], y: &[f64], penalty: f64) -> Result<Self> {
        super::check(x, y)?;
        if penalty.is_nan() || penalty <= 0.0 {
            return Err(Error::option("Ridge.penalty", "more than 0", penalty));
        }
        let (n, size) = (y.len() as f64, x[0].len());
        let center: Vec<f64> = (0..size).map(|k| x.iter().map(|x| x[k]).sum::<f64>() / n).collect();
        let mean = y.iter().sum::<f64>() / n;
        let mut normal = vec![0.0; size * size];
        let mut right = vec![0.0; size];
        for (x, y) in x.iter().zip(y) {
            let x: Vec<f64> = x.iter().zip(&center).map(|(x, center)| x - center).collect();
            for i in 0..size {
                right[i] += x[i] * (y - mean);
                for j in 0..size {
                    normal[i * size + j] += x[i] * x[j];
                }
            }
        }
        for i in 0..size {
            normal[i * size + i] += penalty;
        }
        let factor = Cholesky::new(normal, size)
            .ok_or_else(|| Error::option("Ridge", "finite observations", "a singular system"))?;
        let weights = factor.solve(&right);
        let intercept = mean - dot(&weights, &center);
        let residual = |(x, y): (&Vec<f64>, &f64)| (y - intercept - dot(&weights, x)).powi(2);
        let noise = (x.iter().zip(y).map(residual).sum::<f64>() / n).sqrt();
        Ok(Self { intercept, weights, center, factor, noise, observations: n })
    }

    /// The weights.
    pub fn weights(&self) -> &[f64] {
        &self.weights
    }
}

impl Surrogate for Ridge {
    fn predict(&self, x: &[f64]) -> Prediction {
        let away: Vec<f64> = x.iter().zip(&self.center).map(|(x, center)| x - center).collect();
        let spread = self.factor.forward(&away);
        let sd = self.noise * (1.0 / self.observations + dot(&spread, &spread)).sqrt();
        Prediction { mean: self.intercept + dot(&self.weights, x), sd }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_data_are_recovered_and_the_deviation_grows_outwards() {
        let x: Vec<Vec<f64>> = (0..20).map(|i| vec![f64::from(i % 5), f64::from(i / 5)]).collect();
        let y: Vec<f64> = x.iter().map(|x| 3.0 + 2.0 * x[0] - x[1]).collect();
        let ridge = Ridge::fit(&x, &y, 1e-9).unwrap();
        assert!((ridge.weights()[0] - 2.0).abs() < 1e-6 && (ridge.weights()[1] + 1.0).abs() < 1e-6);
        assert!((ridge.predict(&[10.0, 10.0]).mean - 13.0).abs() < 1e-6);
        let noisy: Vec<f64> = y.iter().enumerate().map(|(i, y)| y + [0.1, -0.1][i % 2]).collect();
        let ridge = Ridge::fit(&x, &noisy, 1e-3).unwrap();
        assert!(ridge.predict(&[10.0, 10.0]).sd > ridge.predict(&[2.0, 2.0]).sd);
        assert!(Ridge::fit(&x, &y, 0.0).is_err());
    }
}
