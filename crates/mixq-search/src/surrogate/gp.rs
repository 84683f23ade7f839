//! Gaussian-process regression with a Matérn-5/2 kernel.

use super::{
    Prediction, Surrogate,
    linear::{Cholesky, dot},
};
use crate::{Error, Result};

/// `variance * (1 + a + a²/3) exp(-a)`, `a = sqrt(5) |x - x'| / length_scale`, and noise on the diagonal.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Matern52 {
    /// Distance over which values are alike.
    pub length_scale: f64,
    /// Variance of the function.
    pub variance: f64,
    /// Variance of the noise on observations.
    pub noise: f64,
}

impl Matern52 {
    fn between(&self, a: &[f64], b: &[f64]) -> f64 {
        let squared: f64 = a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum();
        let a = (5.0 * squared).sqrt() / self.length_scale;
        self.variance * (1.0 + a + a * a / 3.0) * (-a).exp()
    }
}

/// Regression with a constant mean, the mean of the observations. The predicted deviation is that of the function,
/// without noise. Cost: `n³/3` operations to fit, `n²` per prediction.
#[derive(Debug, Clone)]
pub struct GaussianProcess {
    kernel: Matern52,
    mean: f64,
    x: Vec<Vec<f64>>,
    /// Inverse covariance times centred observations.
    alpha: Vec<f64>,
    factor: Cholesky,
    log_likelihood: f64,
}

impl GaussianProcess {
    /// Conditions a given kernel on observations.
    ///
    /// # Errors
    /// [`Error::Option`] if there are none, lengths differ, or the covariance is not positive definite.
    pub fn new(kernel: Matern52, x: &[Vec<f64>], y: &[f64]) -> Result<Self> {
        super::check(x, y)?;
        let n = y.len();
        let mean = y.iter().sum::<f64>() / n as f64;
        let mut covariance = vec![0.0; n * n];
        for i in 0..n {
            for j in 0..=i {
                let value = kernel.between(&x[i], &x[j]);
                covariance[i * n + j] = value;
                covariance[j * n + i] = value;
            }
            covariance[i * n + i] += kernel.noise;
        }
        let factor = Cholesky::new(covariance, n).ok_or_else(|| {
            Error::option("Matern52", "a positive definite covariance", format!("{kernel:?}"))
        })?;
        let centred: Vec<f64> = y.iter().map(|y| y - mean).collect();
        let alpha = factor.solve(&centred);
        let log_likelihood = -0.5 * dot(&centred, &alpha)
            - factor.half_log_determinant()
            - 0.5 * n as f64 * (2.0 * std::f64::consts::PI).ln();
        Ok(Self { kernel, mean, x: x.to_vec(), alpha, factor, log_likelihood })
    }

    /// Fits the kernel by maximum marginal likelihood: a coarse grid over length scale and noise, then shrinking steps
    /// around the best; the variance follows from the data.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn fit(x: &[Vec<f64>], y: &[f64]) -> Result<Self> {
        super::check(x, y)?;
        let n = y.len() as f64;
        let mean = y.iter().sum::<f64>() / n;
        let spread = (y.iter().map(|y| (y - mean).powi(2)).sum::<f64>() / n).max(1e-12);
        let diagonal = (x[0].len() as f64).sqrt();
        let at = |scale: f64, noise: f64, variance: f64| {
            let kernel = Matern52 {
                length_scale: diagonal * scale.exp(),
                variance: spread * variance.exp(),
                noise: spread * noise.exp(),
            };
            Self::new(kernel, x, y).ok()
        };
        let score = |gp: &Option<Self>| gp.as_ref().map_or(f64::NEG_INFINITY, |gp| gp.log_likelihood);
        // Logarithms of length scale over the cube's diagonal, of noise and of variance over the spread.
        let mut best = [0.0, -7.0, 0.0];
        let mut gp = at(best[0], best[1], best[2]);
        for scale in [-1.5, -0.5, 0.5, 1.5] {
            for noise in [-9.0, -5.0, -2.0] {
                let candidate = at(scale, noise, 0.0);
                if score(&candidate) > score(&gp) {
                    (best, gp) = ([scale, noise, 0.0], candidate);
                }
            }
        }
        let mut step = 1.0;
        while step > 0.2 {
            let mut improved = false;
            for axis in 0..3 {
                for sign in [-1.0, 1.0] {
                    let mut next = best;
                    next[axis] += sign * step;
                    if next[0].abs() > 3.0 || !(-14.0..=1.0).contains(&next[1]) || next[2].abs() > 4.0 {
                        continue;
                    }
                    let candidate = at(next[0], next[1], next[2]);
                    if score(&candidate) > score(&gp) + 1e-9 {
                        (best, gp, improved) = (next, candidate, true);
                    }
                }
            }
            if !improved {
                step /= 2.0;
            }
        }
        gp.ok_or_else(|| Error::option("GaussianProcess", "finite observations", "no kernel that fits"))
    }

    /// The kernel.
    pub fn kernel(&self) -> Matern52 {
        self.kernel
    }

    /// Logarithm of the marginal likelihood of the observations.
    pub fn log_likelihood(&self) -> f64 {
        self.log_likelihood
    }
}

impl Surrogate for GaussianProcess {
    fn predict(&self, x: &[f64]) -> Prediction {
        let covariance: Vec<f64> = self.x.iter().map(|known| self.kernel.between(known, x)).collect();
        let explained = self.factor.forward(&covariance);
        let variance = self.kernel.variance - dot(&explained, &explained);
        Prediction { mean: self.mean + dot(&covariance, &self.alpha), sd: variance.max(0.0).sqrt() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ehvi, hypervolume,
        testing::{close, vector},
    };

    #[test]
    fn reference_posterior_and_expected_improvement() {
        let file = vector("automixq_gp_ehvi.json");
        let list = |name: &str| -> Vec<f64> { serde_json::from_value(file[name].clone()).unwrap() };
        let matrix = |name: &str| -> Vec<Vec<f64>> { serde_json::from_value(file[name].clone()).unwrap() };
        let kernel = &file["kernel"];
        let number = |name: &str| kernel[name].as_f64().unwrap();
        let kernel = Matern52 {
            length_scale: number("length_scale"),
            variance: number("variance"),
            noise: number("noise"),
        };
        let (memory, score) = (list("memory_train"), list("y_train"));
        let gp = GaussianProcess::new(kernel, &matrix("X_train"), &score).unwrap();
        let [limit, worst]: [f64; 2] = serde_json::from_value(file["reference"].clone()).unwrap();
        let observed: Vec<[f64; 2]> = memory.iter().zip(&score).map(|(m, s)| [*m, -s]).collect();
        close(hypervolume(&observed, &[limit, -worst]), file["hypervolume_before"].as_f64().unwrap());

        let mut best = (f64::NEG_INFINITY, 0);
        for (i, x) in matrix("X_candidates").iter().enumerate() {
            let prediction = gp.predict(x);
            close(prediction.mean, list("posterior_mean")[i]);
            close(prediction.sd, list("posterior_sd")[i]);
            let loss = Prediction { mean: -prediction.mean, sd: prediction.sd };
            let gain = ehvi(list("memory_candidates")[i], loss, &observed, [limit, -worst]);
            close(gain, list("ehvi")[i]);
            if gain > best.0 {
                best = (gain, i);
            }
        }
        assert_eq!(best.1 as u64, file["argmax"].as_u64().unwrap());
    }

    #[test]
    fn fitting_raises_the_likelihood_and_predicts_a_smooth_function() {
        let point = |i: usize| vec![(i % 7) as f64 / 6.0, (i / 7) as f64 / 6.0];
        let truth = |x: &[f64]| (2.0 * x[0]).sin() + x[1] * x[1];
        let x: Vec<Vec<f64>> = (0..49).step_by(2).map(point).collect();
        let y: Vec<f64> = x.iter().map(|x| truth(x)).collect();
        let fitted = GaussianProcess::fit(&x, &y).unwrap();
        let guess = Matern52 { length_scale: 0.3, variance: 1.0, noise: 1e-2 };
        assert!(fitted.log_likelihood() > GaussianProcess::new(guess, &x, &y).unwrap().log_likelihood());
        for i in (1..49).step_by(2) {
            let prediction = fitted.predict(&point(i));
            assert!((prediction.mean - truth(&point(i))).abs() < 0.02, "{prediction:?}");
        }
    }
}
