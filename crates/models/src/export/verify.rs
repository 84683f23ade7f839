//! What was written, read again.

use std::path::Path;

use kiln_quant_core::to_host;
use serde::Serialize;

use super::report::differences;
use crate::{CausalLm, Checkpoint, Error, LoadOptions, Result, TokenBatch};

/// How far the logits of a reloaded model are from those of the model that was written, over all positions of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LogitDifference {
    /// Largest absolute difference.
    pub max: f32,
    /// `‖reloaded - model‖ / ‖model‖`.
    pub relative: f64,
}

/// Loads what stands at `path` as it is stored, onto the device of `model`, and compares the logits of `prompt`. Operands of
/// the reloaded model are not rounded: where those of `model` are, that is part of the difference.
///
/// # Errors
/// [`Error::Argument`] for a prompt that is empty, longer than the model's positions, or has ids beyond its vocabulary,
/// and for a file of another vocabulary; whatever [`Checkpoint::open`] and [`Checkpoint::load`] refuse.
pub fn verify_export(
    path: impl AsRef<Path>,
    model: &impl CausalLm,
    prompt: &[u32],
) -> Result<LogitDifference> {
    let argument =
        |name: &str, expected: String, found: String| Error::Argument { name: name.into(), expected, found };
    if prompt.is_empty() || prompt.len() > model.max_positions() {
        let expected = format!("1..={} ids", model.max_positions());
        return Err(argument("prompt", expected, prompt.len().to_string()));
    }
    if let Some(id) = prompt.iter().find(|&&id| id as usize >= model.vocab_size()) {
        return Err(argument("prompt", format!("ids below {}", model.vocab_size()), id.to_string()));
    }
    let (reloaded, _) = Checkpoint::open(path)?.load(&LoadOptions::default().in_f32(), &model.device())?;
    if reloaded.vocab_size() != model.vocab_size() {
        let (expected, found) = (model.vocab_size().to_string(), reloaded.vocab_size().to_string());
        return Err(argument("vocabulary of the written model", expected, found));
    }
    let tokens = TokenBatch::new(&[prompt.to_vec()])?;
    let (max, relative) = differences(&logits(&reloaded, &tokens)?, &logits(model, &tokens)?);
    Ok(LogitDifference { max, relative })
}

fn logits(model: &impl CausalLm, tokens: &TokenBatch) -> Result<Vec<f32>> {
    Ok(to_host("logits", model.forward(&model.context(tokens, None)?))?)
}
