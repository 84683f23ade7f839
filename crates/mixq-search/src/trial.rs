//! One measured plan.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{Config, Fidelity, Plan};

/// What makes two trials the same.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrialKey {
    /// The plan.
    pub config: Config,
    /// How thoroughly it was measured.
    pub fidelity: Fidelity,
    /// Under which seed.
    pub seed: u64,
}

/// A measured plan, as the log keeps it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Trial {
    /// The plan as indices.
    pub config: Config,
    /// How thoroughly it was measured.
    pub fidelity: Fidelity,
    /// Under which seed.
    pub seed: u64,
    /// The score; `None` if it was not finite.
    pub score: Option<f64>,
    /// Bytes on the searched memory axis.
    pub bytes: u64,
    /// Seconds that the measurement took.
    pub seconds: f64,
    /// The method that asked for it.
    pub method: String,
    /// Further figures of the objective.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub figures: BTreeMap<String, f64>,
    /// Scores on the way: amount and score.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub curve: Vec<(u64, f64)>,
    /// Whether it was stopped early; the score is the one reached then.
    #[serde(default)]
    pub stopped: bool,
    /// The plan as settings.
    pub plan: Plan,
}

impl Trial {
    /// What tells it from other trials.
    pub fn key(&self) -> TrialKey {
        TrialKey { config: self.config.clone(), fidelity: self.fidelity, seed: self.seed }
    }
}
