//! LoRA on whole models: the stages that join kiln-models and kiln-adapters.

use std::path::Path;

use kiln_adapters::{Adapted, Lora, LoraAttacher, PeftConfig, PeftFolder, Result, save_peft};
use kiln_models::{AnyModel, Slots};
use kiln_quant_core::QuantLinear;

/// A model whose blocks' linears carry LoRA adapters, where the configuration says so.
pub type LoraModel = AnyModel<Adapted<QuantLinear, Lora>>;

/// Attaches new adapters to a loaded model.
///
/// The attacher keeps the configuration (for [`save_lora`]) and the dropout's clock (for the trainer).
///
/// # Errors
/// A configuration that asks for what isn't implemented, or selects no module.
pub fn attach_lora(
    model: AnyModel<QuantLinear>,
    config: &PeftConfig,
    seed: u64,
) -> Result<(LoraModel, LoraAttacher)> {
    let attacher = LoraAttacher::new(config, &model.slot_shapes(), seed)?;
    Ok((model.try_map(|path, base| attacher.attach_to_residual(path, base))?, attacher))
}

/// Attaches the adapters of a PEFT folder to a loaded model.
///
/// # Errors
/// Files that are missing or malformed, or that don't fit the model.
pub fn load_lora(
    model: AnyModel<QuantLinear>,
    folder: impl AsRef<Path>,
    seed: u64,
) -> Result<(LoraModel, LoraAttacher)> {
    let attacher = PeftFolder::open(folder)?.attacher(&model.slot_shapes(), seed)?;
    Ok((model.try_map(|path, base| attacher.attach_to_residual(path, base))?, attacher))
}

/// Writes the adapters as a PEFT folder, which Python's PEFT opens.
///
/// # Errors
/// As [`save_peft`].
pub fn save_lora(model: &LoraModel, config: &PeftConfig, folder: impl AsRef<Path>) -> Result<()> {
    let mut adapters = Vec::new();
    model.for_each_slot(|path, slot| {
        adapters.extend(slot.adapter.clone().map(|lora| (path.to_owned(), lora)));
    });
    save_peft(folder.as_ref(), config, adapters.iter().map(|(path, lora)| (path, lora)))
}
