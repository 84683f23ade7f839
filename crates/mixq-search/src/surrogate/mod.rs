//! Models that predict a loss from a configuration's features.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

pub(crate) mod ehvi;
mod gp;
pub(crate) mod linear;
mod mlp;
mod rbf;
mod ridge;

pub use gp::{GaussianProcess, Matern52};
pub use mlp::MlpEnsemble;
pub use rbf::CubicRbf;
pub use ridge::Ridge;

/// What a surrogate expects.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prediction {
    /// Expected value.
    pub mean: f64,
    /// Standard deviation of the expectation.
    pub sd: f64,
}

/// A fitted model.
pub trait Surrogate {
    /// The prediction for features such as [`SearchSpace::encode`](crate::SearchSpace::encode) gives.
    fn predict(&self, x: &[f64]) -> Prediction;
}

/// Which model to fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum SurrogateKind {
    /// [`MlpEnsemble`], the paper's performance model.
    #[default]
    Mlp,
    /// [`Ridge`] with penalty 0.1.
    Ridge,
    /// [`GaussianProcess`] with a fitted kernel.
    Gp,
    /// [`CubicRbf`].
    Rbf,
}

impl SurrogateKind {
    /// Fits a model.
    ///
    /// # Errors
    /// [`Error::Option`] if there are no observations, lengths differ, or the model can't be fitted.
    pub fn fit(self, x: &[Vec<f64>], y: &[f64], seed: u64) -> Result<Box<dyn Surrogate>> {
        Ok(match self {
            Self::Mlp => Box::new(MlpEnsemble::fit(x, y, seed)?),
            Self::Ridge => Box::new(Ridge::fit(x, y, 0.1)?),
            Self::Gp => Box::new(GaussianProcess::fit(x, y)?),
            Self::Rbf => Box::new(CubicRbf::fit(x, y)?),
        })
    }
}

fn check(x: &[Vec<f64>], y: &[f64]) -> Result<()> {
    let size = x.first().map_or(0, Vec::len);
    if x.is_empty() || x.len() != y.len() || x.iter().any(|x| x.len() != size) {
        let found = format!("{} observations and {} values", x.len(), y.len());
        return Err(Error::option("surrogate.observations", "as many as values, of one length", found));
    }
    if x.iter().flatten().chain(y).any(|value| !value.is_finite()) {
        return Err(Error::option("surrogate.observations", "finite numbers", "others"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_refuses_bad_observations_and_predicts_what_it_saw() {
        let x: Vec<Vec<f64>> = (0..12).map(|i| vec![f64::from(i) / 11.0]).collect();
        let y: Vec<f64> = x.iter().map(|x| 1.0 - x[0]).collect();
        for kind in [SurrogateKind::Mlp, SurrogateKind::Ridge, SurrogateKind::Gp, SurrogateKind::Rbf] {
            for (x, y) in [(&x[..0], &y[..0]), (&x[..2], &y[..1]), (&[vec![f64::NAN]][..], &[1.0][..])] {
                assert!(kind.fit(x, y, 0).is_err());
            }
            let model = kind.fit(&x, &y, 0).unwrap();
            let error = x.iter().zip(&y).map(|(x, y)| (model.predict(x).mean - y).abs()).fold(0.0, f64::max);
            assert!(error < 0.15, "{kind:?}: {error}");
        }
    }
}
