//! The optional stages on a [`Base`], with their usual settings.

#[cfg(feature = "calibration")]
use kiln_adapters::{Adapted, AdapterConfig, AnyAdapter, Dora, LoraAttacher, Method};
#[cfg(feature = "calibration")]
use kiln_calibration::{CalibrationConfig, Calibrator};
#[cfg(feature = "calibration")]
use kiln_distributed::Sharing;
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
use crate::{AdaptedModel, Error, FineTuned, Tuned};
use crate::{Base, Result};

/// A model whose codes, and the adapters where `config` starts them, were chosen on `windows`.
#[cfg(feature = "calibration")]
pub(crate) fn calibrated(
    model: Decoder<QuantLinear>,
    adapters: &AdapterConfig,
    config: &CalibrationConfig,
    windows: &Windows,
    sharing: &Sharing,
) -> Result<AdaptedModel> {
    let calibrator = Calibrator::new(config, windows).with_sharing(sharing.clone());
    let (Method::Lora { init } | Method::Dora { init }) = adapters.method else {
        let (model, _) = calibrator.run(model)?;
        let model = model.try_map(|_, slot| Ok::<_, Error>(slot.into_base()))?;
        return Ok(Tuned::attach(model, adapters)?.into_model());
    };
    let mut lora = adapters.clone();
    lora.method = Method::Lora { init };
    let attacher = LoraAttacher::new(&lora, &model.slot_shapes())?;
    let (model, _) = calibrator.with_adapters(&attacher).run(model)?;
    let with_magnitudes = matches!(adapters.method, Method::Dora { .. });
    model.try_map(|_, slot| {
        let Adapted { base, adapter } = slot;
        let adapter = adapter.map(|lora| match with_magnitudes {
            true => AnyAdapter::Dora(Dora::from_lora(&base, lora)),
            false => AnyAdapter::Lora(lora),
        });
        Ok(Adapted { base, adapter })
    })
}

impl Base {
    /// Quantizes the model by a calibration (GPTQ, LoftQ, ApiQ). The adapters are the start of a fine-tune:
    /// [`FineTuned::finetune`].
    ///
    /// LoRA and DoRA start as the method chooses them together with the codes, DoRA with the lengths of what LoRA would be.
    /// Others start as they do on any base, and need a method that leaves nothing to them: rounding, AWQ's scaling, GPTQ,
    /// clipping, or ApiQ, whose clipping is learned without factors then.
    ///
    /// # Errors
    /// LoftQ and PiSSA with other adapters than LoRA and DoRA, and as [`Calibrator::run`].
    #[cfg(feature = "calibration")]
    pub fn calibrate(
        &self,
        adapters: AdapterConfig,
        config: &CalibrationConfig,
        windows: &Windows,
    ) -> Result<FineTuned> {
        let model = calibrated(self.model().clone(), &adapters, config, windows, self.sharing())?;
        Ok(FineTuned::new(Tuned::from_parts(model, adapters), self.language(), None))
    }

    /// Removes heads and channels from the blocks. `windows` are the texts that the criterion looks at, if it looks at any.
    ///
    /// # Errors
    /// As [`BlockPruning::prune`].
    #[cfg(feature = "pruning")]
    pub fn prune(&self, pruning: &BlockPruning, windows: Option<&Windows>) -> Result<(Self, PruningReport)> {
        let options = CutOptions { sharing: self.sharing().clone(), ..CutOptions::default() };
        let pruned = pruning.prune(self.model().clone(), windows, &options)?;
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
        let mut variants = crate::mixq::Variants::new(self.model().clone());
        if let Some(prunings) = &choices.prunings {
            variants = variants.with_prunings(prunings.clone())?;
        }
        let mut objective = crate::mixq::ModelObjective::new(variants, windows, &Default::default())?;
        let settings = SearchSettings::new(evaluations, Fidelity::kl(objective.tokens()));
        let mut log = TrialLog::in_memory(&space);
        Ok(kiln_mixq_search::search(&space, &mut objective, &mut log, &KlMix::default(), &settings)?)
    }

    /// The model quantized by a plan of a search.
    ///
    /// # Errors
    /// A plan of another model, or one with pruning ratios, which [`Prunings::apply`](crate::mixq::Prunings::apply) follows.
    #[cfg(feature = "mixq-search")]
    pub fn with_plan(&self, plan: &Plan) -> Result<Self> {
        Ok(self.with_model(crate::mixq::Variants::new(self.model().clone()).model(plan)?))
    }
}
