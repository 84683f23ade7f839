//! The width of the residual stream.

use kiln_models::{CausalLm, Decoder, Windows};
use kiln_quant_core::QuantLinear;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::{Pruned, Run};
use crate::{
    Error, Result,
    aggregation::Aggregation,
    apply::CutOptions,
    criterion::Criterion,
    importance::{MatrixScores, Scored, gradient_scores, weight_scores},
    kept::Kept,
    selection::{lowest, removed_mlp_channels, without},
    structure::Structure,
};

/// Prunes the residual stream: the same channels everywhere.
///
/// A channel's score is the sum over all linears of the blocks of the criterion along their hidden axis. Criteria of
/// activations have no meaning here.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HiddenPruning {
    /// What is measured.
    pub criterion: Criterion,
    /// Share of the channels to remove, 0..1.
    pub ratio: f64,
    /// The width becomes a multiple of it (1 changes nothing).
    #[serde(default = "super::one")]
    pub round_to: usize,
    /// Seed of the random criterion.
    #[serde(default)]
    pub seed: u64,
}

impl HiddenPruning {
    /// No rounding, seed 0.
    pub fn new(criterion: Criterion, ratio: f64) -> Self {
        Self { criterion, ratio, round_to: 1, seed: 0 }
    }

    /// Prunes `model`; see [`apply`](crate::apply) for what becomes of the norms.
    ///
    /// # Errors
    /// As [`BlockPruning::prune`](super::BlockPruning::prune).
    pub fn prune(
        &self,
        model: Decoder<QuantLinear>,
        calibration: Option<&Windows>,
        options: &CutOptions,
    ) -> Result<Pruned> {
        model.check_one_device("pruning")?;
        if !(0.0..=1.0).contains(&self.ratio) {
            return Err(Error::option("HiddenPruning.ratio", "a share in 0..1", self.ratio));
        }
        if self.criterion.needs_inputs() {
            let found = format!("{:?}", self.criterion);
            return Err(Error::option(
                "HiddenPruning.criterion",
                "a criterion of weights or gradients",
                found,
            ));
        }
        let structure = Structure::of(model.config());
        if let Some(why) = structure.hidden_stays {
            return Err(Error::mismatch("hidden", format!("all channels, as {why}"), "fewer"));
        }
        let removed = removed_mlp_channels(structure.hidden, self.ratio, self.round_to);
        if removed >= structure.hidden {
            return Err(Error::RemovesAll {
                group: "hidden width".into(),
                ratio: self.ratio,
                count: structure.hidden,
                units: "channels".into(),
            });
        }
        let mut run = Run::start(model, &structure, calibration, self, &options.sharing)?;
        let matrices = match (self.criterion, calibration) {
            (Criterion::Random, _) => {
                let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
                let scores = (0..structure.hidden).map(|_| f64::from(rng.next_u32())).collect();
                MatrixScores::from([("random".into(), scores)])
            }
            (criterion, Some(calibration)) if criterion.needs_gradients() => {
                let (scores, loss) = gradient_scores(
                    &run.model,
                    &structure,
                    criterion,
                    Scored::Hidden,
                    calibration,
                    &options.sharing,
                )?;
                run.losses.push(loss);
                scores
            }
            (criterion, None) if criterion.needs_gradients() => {
                let expected = format!("windows for {criterion:?}");
                return Err(Error::Calibration { expected, found: "none".into() });
            }
            (criterion, _) => weight_scores(&run.model, &structure, criterion, Scored::Hidden)?,
        };
        let matrices: Vec<Vec<f64>> = matrices.into_values().collect();
        let scores = Aggregation::Sum.apply(&matrices);
        let mut kept = Kept::everything(&structure);
        kept.hidden = without(structure.hidden, &lowest(&scores, removed));
        run.cut(&kept, options)?;
        run.finish()
    }
}
