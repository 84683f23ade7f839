//! The optional stages on a [`Base`], with their usual settings.

#[cfg(feature = "calibration")]
use kiln_adapters::{AdapterConfig, LoraAttacher};
#[cfg(feature = "calibration")]
use kiln_calibration::{CalibrationConfig, Calibrator};
#[cfg(feature = "mixq-search")]
use kiln_mixq_search::{Fidelity, KlMix, Outcome, Plan, SearchSettings, TrialLog};
#[cfg(any(feature = "calibration", feature = "pruning"))]
use kiln_models::Windows;
#[cfg(feature = "calibration")]
use kiln_models::{Decoder, Slots};
#[cfg(feature = "pruning")]
use kiln_pruning::{BlockPruning, CutOptions, PruningReport};
#[cfg(feature = "calibration")]
use kiln_quant_core::QuantLinear;

#[cfg(feature = "calibration")]
use crate::{AdaptedModel, FineTuned, Tuned};
use crate::{Base, Result};

/// A model whose codes and LoRA adapters were chosen together on `windows`.
#[cfg(feature = "calibration")]
pub(crate) fn calibrated(
    model: Decoder<QuantLinear>,
    adapters: &AdapterConfig,
    config: &CalibrationConfig,
    windows: &Windows,
) -> Result<AdaptedModel> {
    let attacher = LoraAttacher::new(adapters, &model.slot_shapes())?;
    let (model, _) = Calibrator::new(config, windows).with_adapters(&attacher).run(model)?;
    model.try_map(|_, slot| Ok(slot.into_any()))
}

impl Base {
    /// Quantizes the model by a calibration (GPTQ, LoftQ, ApiQ) that chooses codes and LoRA adapters together. The
    /// adapters are the start of a fine-tune: [`FineTuned::finetune`].
    ///
    /// # Errors
    /// Adapters other than LoRA, and as [`Calibrator::run`].
    #[cfg(feature = "calibration")]
    pub fn calibrate(
        &self,
        adapters: AdapterConfig,
        config: &CalibrationConfig,
        windows: &Windows,
    ) -> Result<FineTuned> {
        let model = calibrated(self.model().clone(), &adapters, config, windows)?;
        Ok(FineTuned::new(Tuned::from_parts(model, adapters), self.language(), None))
    }

    /// Removes heads and channels from the blocks. `windows` are the texts that the criterion looks at, if it looks at any.
    ///
    /// # Errors
    /// As [`BlockPruning::prune`].
    #[cfg(feature = "pruning")]
    pub fn prune(&self, pruning: &BlockPruning, windows: Option<&Windows>) -> Result<(Self, PruningReport)> {
        let pruned = pruning.prune(self.model().clone(), windows, &CutOptions::default())?;
        Ok((self.with_model(pruned.model), pruned.report))
    }

    /// Searches which linear gets which format, by the default method, on the divergence from this model on `windows`.
    /// The outcome's front has a plan for each limit of memory.
    ///
    /// # Errors
    /// Choices or windows that don't fit the model.
    #[cfg(feature = "mixq-search")]
    pub fn search(
        &self,
        choices: &crate::mixq::Choices,
        windows: &Windows,
        evaluations: usize,
    ) -> Result<Outcome> {
        let space = crate::mixq::space_of(self.model(), choices)?;
        let variants = crate::mixq::Variants::new(self.model().clone());
        let mut objective = crate::mixq::ModelObjective::new(variants, windows, &Default::default())?;
        let settings = SearchSettings::new(evaluations, Fidelity::kl(objective.tokens()));
        let mut log = TrialLog::in_memory(&space);
        Ok(kiln_mixq_search::search(&space, &mut objective, &mut log, &KlMix::default(), &settings)?)
    }

    /// The model quantized by a plan of a search.
    ///
    /// # Errors
    /// A plan of another model.
    #[cfg(feature = "mixq-search")]
    pub fn with_plan(&self, plan: &Plan) -> Result<Self> {
        Ok(self.with_model(crate::mixq::Variants::new(self.model().clone()).model(plan)?))
    }
}
