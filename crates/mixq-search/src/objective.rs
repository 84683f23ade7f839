//! What a search asks of a model: measure this plan, this thoroughly, under this seed.

use std::{collections::BTreeMap, error::Error as StdError};

use serde::{Deserialize, Serialize};

use crate::{Config, Error, Plan, Result, SearchSpace, digest::digest};

/// What is measured, from cheap to expensive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Measure {
    /// Error of the projections' outputs on calibration tokens.
    ActivationError,
    /// Squared weight error under the diagonal Fisher information.
    Fisher,
    /// Divergence of the quantized model's logits from the dense model's.
    Kl,
    /// Held-out loss of the quantized model after a short fine-tune.
    Finetune,
    /// What a task's metric lacks to 1, of the quantized model or after a fine-tune.
    Task,
}

/// How thoroughly a plan is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Fidelity {
    /// What is measured.
    pub measure: Measure,
    /// On how much: tokens, for [`Measure::Finetune`] steps, for [`Measure::Task`] examples.
    pub amount: u64,
}

impl Fidelity {
    /// KL on so many tokens.
    pub const fn kl(tokens: u64) -> Self {
        Self { measure: Measure::Kl, amount: tokens }
    }

    /// A fine-tune of so many steps.
    pub const fn finetune(steps: u64) -> Self {
        Self { measure: Measure::Finetune, amount: steps }
    }

    /// The same measure on a share of the amount, at least 1.
    pub(crate) fn share(self, share: f64) -> Self {
        Self { amount: ((self.amount as f64 * share).round() as u64).max(1), ..self }
    }
}

/// Which way a score is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// A loss or divergence.
    #[default]
    Minimize,
    /// An accuracy.
    Maximize,
}

impl Direction {
    /// The score as something to minimise, and back. What is not finite is as bad as can be.
    pub fn loss(self, score: f64) -> f64 {
        match self {
            _ if !score.is_finite() => f64::INFINITY,
            Self::Minimize => score,
            Self::Maximize => -score,
        }
    }
}

/// One measurement to make.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Request<'a> {
    /// The plan as indices.
    pub config: &'a Config,
    /// The plan as settings.
    pub plan: &'a Plan,
    /// How thoroughly.
    pub fidelity: Fidelity,
    /// Seed of everything random: data order, adapters, dropout. The same for all plans that are to be compared.
    pub seed: u64,
}

impl<'a> Request<'a> {
    /// A measurement outside a search.
    pub const fn new(config: &'a Config, plan: &'a Plan, fidelity: Fidelity, seed: u64) -> Self {
        Self { config, plan, fidelity, seed }
    }
}

/// What came out.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Measurement {
    /// The figure to optimise. Not finite: the plan failed (a diverged fine-tune), and is never on a front.
    pub score: f64,
    /// Anything else worth keeping, by name.
    pub figures: BTreeMap<String, f64>,
}

impl Measurement {
    /// A score alone.
    pub fn new(score: f64) -> Self {
        Self { score, figures: BTreeMap::new() }
    }
}

/// What an objective's evaluation returns.
pub type Evaluation = std::result::Result<Measurement, Box<dyn StdError + Send + Sync>>;

/// Tells an evaluation whether to go on, given how far it is (in the fidelity's unit) and the score there.
pub type KeepGoing<'a> = dyn FnMut(u64, f64) -> bool + 'a;

/// Measures plans. The score is always that of the *quantized* model.
pub trait Objective {
    /// Names the model and data; a log of another objective is refused.
    fn fingerprint(&self) -> String;

    /// Which way scores are better.
    fn direction(&self) -> Direction {
        Direction::Minimize
    }

    /// What a measurement at `fidelity` really takes where amounts are rounded: that is what a search pays for.
    fn rounded(&self, fidelity: Fidelity) -> Fidelity {
        fidelity
    }

    /// Whether scores of a measure depend on the request's seed. Where they don't, [`Finalists`](crate::Finalists)
    /// would only read the same scores again, and are refused.
    fn has_seeds(&self, _measure: Measure) -> bool {
        true
    }

    /// Measures one plan. The result is a function of the request: a resumed search relies on it.
    ///
    /// A long evaluation may call `keep_going` now and then; when that returns false it should return what it has.
    ///
    /// # Errors
    /// Whatever keeps the plan from being measured at all; the search ends with it and can be resumed.
    fn evaluate(&mut self, request: &Request<'_>, keep_going: &mut KeepGoing<'_>) -> Evaluation;
}

/// A cheap proxy: a plan's score is the sum of one figure per unit and choice, such as the relative output error on
/// calibration tokens or the squared weight error under the diagonal Fisher information.
///
/// ```
/// use kiln_mixq_search::{AdditiveProxy, Config};
/// let proxy = AdditiveProxy::new("fisher of tiny-llama", vec![vec![2.0, 0.5], vec![1.0, 0.1]]);
/// assert_eq!(proxy.score(&Config(vec![0, 1])), 2.1);
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct AdditiveProxy {
    name: String,
    table: Vec<Vec<f64>>,
}

impl AdditiveProxy {
    /// A proxy of `[unit][choice]` figures; `name` says what they are and of which model.
    pub fn new(name: impl Into<String>, table: Vec<Vec<f64>>) -> Self {
        Self { name: name.into(), table }
    }

    /// The figures.
    pub fn table(&self) -> &[Vec<f64>] {
        &self.table
    }

    /// The sum over the chosen figures.
    ///
    /// # Panics
    /// If `config` is not of the space that the table was made for.
    pub fn score(&self, config: &Config) -> f64 {
        assert_eq!(config.0.len(), self.table.len(), "a configuration has one index per unit");
        self.table.iter().zip(&config.0).map(|(unit, &choice)| unit[usize::from(choice)]).sum()
    }

    /// Fails unless there is one figure for every choice of the space.
    ///
    /// # Errors
    /// [`Error::Option`].
    pub fn check(&self, space: &SearchSpace) -> Result<()> {
        let shape = |table: Vec<usize>| format!("{table:?}");
        let found = shape(self.table.iter().map(Vec::len).collect());
        let expected = shape((0..space.units().len()).map(|unit| space.choices(unit)).collect());
        if found == expected { Ok(()) } else { Err(Error::option("AdditiveProxy.table", &expected, found)) }
    }
}

impl Objective for AdditiveProxy {
    fn fingerprint(&self) -> String {
        format!("{} {}", self.name, &digest(format!("{:?}", self.table))[..16])
    }

    fn has_seeds(&self, _measure: Measure) -> bool {
        false
    }

    fn evaluate(&mut self, request: &Request<'_>, _: &mut KeepGoing<'_>) -> Evaluation {
        Ok(Measurement::new(self.score(request.config)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::toy_space;

    #[test]
    fn losses_turn_scores_and_failures_are_worst() {
        assert_eq!(Direction::Minimize.loss(2.0), 2.0);
        assert_eq!(Direction::Maximize.loss(2.0), -2.0);
        assert_eq!(Direction::Maximize.loss(f64::NAN), f64::INFINITY);
    }

    #[test]
    fn a_proxy_of_another_shape_is_refused() {
        let space = toy_space(2, 2);
        assert!(AdditiveProxy::new("a", vec![vec![1.0, 0.0]; 2]).check(&space).is_ok());
        let error = AdditiveProxy::new("a", vec![vec![1.0, 0.0]]).check(&space).unwrap_err();
        assert!(error.to_string().contains("[2, 2], found [2]"), "{error}");
    }
}
