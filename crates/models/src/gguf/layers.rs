//! What a GGUF architecture leaves to the program that reads it: which blocks slide, which rotary table they have, what scores
//! are scaled by. Reading and writing go by the same rules.
//!
//! Sources: llama.cpp's model code and conversion scripts.

use crate::{
    config::{AttentionScale, ClampedSwiglu, LayerAttention, ModelConfig},
    families::{
        Family,
        class::{Windows, every_but},
    },
};

/// Blocks of the models whose scores are scaled by an equal share of the width, though their heads are wider: Gemma 2 and 3
/// with 27 billion parameters.
const SCALED_BY_SHARE: [(&str, usize); 2] = [("gemma2", 46), ("gemma3_text", 62)];

/// What every block's attention sees in a model with this window.
pub(crate) fn attention(config: &ModelConfig, window: Option<usize>) -> Vec<LayerAttention> {
    let class = &config.family.class;
    let layers = config.num_hidden_layers;
    let slides_with = config.family.gguf.and_then(|gguf| gguf.slides_with);
    let window = window.filter(|_| slides_with.is_none_or(|most| most == layers));
    let mut attention = class.rope.attention(match class.windows {
        Windows::Pattern { period, .. } => every_but(period, window, layers),
        Windows::Never | Windows::All(_) | Windows::ByLayer => vec![window; layers],
    });
    if let Some(period) = config.family.gguf.and_then(|gguf| gguf.unrotated_period) {
        attention.iter_mut().skip(period - 1).step_by(period).for_each(|layer| layer.rope = None);
    }
    attention
}

/// What experts' gates are cut to where no key says it.
pub(crate) fn clamped(family: &Family) -> Option<ClampedSwiglu> {
    (family.gguf?.name == "gpt-oss").then_some(ClampedSwiglu { alpha: 1.702, limit: 7.0 })
}

/// What the scores are multiplied by where no key says it.
pub(crate) fn scale(config: &ModelConfig) -> AttentionScale {
    let family = config.family;
    match family.class.multipliers.query_scalar {
        None => AttentionScale::HeadDim,
        Some(_) => {
            let by_share = SCALED_BY_SHARE.contains(&(family.model_type, config.num_hidden_layers));
            let share = config.hidden_size / config.num_attention_heads;
            AttentionScale::Scalar(if by_share { share } else { config.head_dim } as f64)
        }
    }
}
