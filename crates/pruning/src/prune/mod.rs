//! Pruning a model: measure, choose, cut.

mod blocks;
mod compensation;
mod hidden;
mod layers;

use kiln_distributed::{Sharing, agreed};
use kiln_models::{Decoder, Slots, Windows};
use kiln_quant_core::{Projection, QuantLinear, fingerprint, to_host};
use serde::{Deserialize, Serialize};

pub use self::{blocks::BlockPruning, compensation::bias_of, hidden::HiddenPruning, layers::LayerPruning};
use crate::{
    Error, Result,
    apply::{CutOptions, Requantized, apply},
    criterion::Matrix,
    kept::Kept,
    structure::Structure,
};

/// A pruned model.
#[derive(Debug, Clone)]
pub struct Pruned {
    /// The model, smaller.
    pub model: Decoder<QuantLinear>,
    /// What was done.
    pub report: PruningReport,
}

/// What pruning did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PruningReport {
    /// Parameters of the model that came in.
    pub parameters_before: u64,
    /// Parameters now.
    pub parameters_after: u64,
    /// Bytes of the tensors that came in.
    pub bytes_before: usize,
    /// Bytes now.
    pub bytes_after: usize,
    /// What stays, in the numbering of the model that came in.
    pub kept: Kept,
    /// Packed weights that could not be cut on their codes.
    pub requantized: Vec<Requantized>,
    /// Mean loss of the calibration data before each step, in nats per token, where gradients were taken.
    pub calibration_loss: Vec<f64>,
    /// SHA-256 of the calibration data, where there were any.
    pub calibration: Option<String>,
}

/// A model on its way.
struct Run {
    model: Decoder<QuantLinear>,
    kept: Kept,
    report: PruningReport,
    losses: Vec<f64>,
    sharing: Sharing,
}

impl Run {
    /// Fails unless all ranks have the same model, calibration data and options.
    fn start(
        model: Decoder<QuantLinear>,
        structure: &Structure,
        calibration: Option<&Windows>,
        pruning: &impl Serialize,
        sharing: &Sharing,
    ) -> Result<Self> {
        if sharing.ranks().size() > 1 {
            let model = agreed(sharing.ranks(), fingerprint(&model, |_| true).map_err(Error::from))?;
            let pruning = serde_json::to_string(pruning).expect("options are numbers and names");
            let facts = [
                ("options", pruning),
                ("parts", sharing.parts().to_string()),
                ("calibration", calibration.map(Windows::hash).unwrap_or_default()),
                ("model", model),
            ];
            sharing.ranks().same(&facts.map(|(name, value)| (name.to_owned(), value)).into())?;
        }
        let kept = Kept::everything(structure);
        let report = PruningReport {
            parameters_before: model.config().parameters(),
            parameters_after: 0,
            bytes_before: model.stored_bytes(),
            bytes_after: 0,
            kept: kept.clone(),
            requantized: Vec::new(),
            calibration_loss: Vec::new(),
            calibration: calibration.map(Windows::hash),
        };
        Ok(Self { model, kept, report, losses: Vec::new(), sharing: sharing.clone() })
    }

    fn cut(&mut self, kept: &Kept, options: &CutOptions) -> Result<()> {
        let (model, requantized) = apply(self.model.clone(), kept, options)?;
        self.model = model;
        self.kept = self.kept.then(kept)?;
        self.report.requantized.extend(requantized);
        Ok(())
    }

    fn finish(self) -> Result<Pruned> {
        let report = PruningReport {
            parameters_after: self.model.config().parameters(),
            bytes_after: self.model.stored_bytes(),
            kept: self.kept,
            calibration_loss: self.losses,
            ..self.report
        };
        Ok(Pruned { model: self.model, report })
    }
}

/// The weight of one linear in host memory.
fn matrix(model: &Decoder<QuantLinear>, path: &str) -> Result<Matrix> {
    let slot = model.slots().into_iter().find(|(slot_path, _)| slot_path == path);
    let (_, slot) =
        slot.ok_or_else(|| Error::mismatch(path, "a linear of the model", "none of that name"))?;
    let (weight, [_, d_output]) = (to_host(path, slot.weight())?, slot.shape());
    Ok(Matrix { weight, d_output, ..Matrix::default() })
}

/// Widths stay as they are.
fn one() -> usize {
    1
}
