//! Multiplications of a training step.

use kiln_models::{Recompute, config::ModelConfig, memory::BlockSizes};

use super::Method;
use crate::Result;

/// The backward pass of fused attention over its forward pass, in products: scores again, and four gradients, over two.
const ATTENTION_BACKWARD: f64 = 2.5;

/// Multiply-add pairs per token of a training step; double them for floating-point operations.
///
/// With B the blocks' weights, H the head's, S what a method adds, and attention beside: full `3 (B + H)`, LoRA
/// `2 (B + H) + 3 S`, side tuning `B + 2 H + 3 S`; recomputation adds `B + S`, for side tuning `S`. Ratios of these
/// numbers predict ratios of step times where products dominate. The tied head of a small model is a large part of it,
/// which is why side tuning gains less there: it takes no weight gradients and no second pass through the blocks, but
/// the head's input gradient is needed all the same.
///
/// # Errors
/// A side network that doesn't fit the model.
pub fn step_macs(model: &ModelConfig, method: &Method, recompute: Recompute, seq_len: usize) -> Result<f64> {
    let block = BlockSizes::of(model);
    let (layers, length) = (model.num_hidden_layers as f64, seq_len as f64);
    // Scores and weighted values, of half the keys on average.
    let attention = |block: &BlockSizes| layers * block.query * length;
    let (blocks, head) = (layers * block.linears, block.width * model.vocab_size as f64);
    let forward = blocks + attention(&block);
    let again = if recompute == Recompute::Block { 1.0 } else { 0.0 };
    let backward = ATTENTION_BACKWARD * attention(&block);
    Ok(match method {
        Method::Full => forward + 2.0 * blocks + backward + 3.0 * head + again * forward,
        Method::Lora { rank } => {
            let added = layers * *rank as f64 * block.low_rank;
            forward + blocks + backward + 2.0 * head + 3.0 * added + again * (forward + added)
        }
        Method::Side(config) => {
            let side = BlockSizes::of(&config.side_model(model)?);
            let counts = config.parameter_counts(model)?;
            let added = (counts.blocks + counts.downsample + counts.upsample) as f64;
            let kept = config.kept(model.num_hidden_layers)?.len() as f64;
            let attention = kept * side.query * length;
            let side = (3.0 + again) * added + (1.0 + ATTENTION_BACKWARD + again) * attention;
            forward + 2.0 * head + side
        }
    })
}
