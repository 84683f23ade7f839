//! Architectures whose blocks differ, of which keys say block by block what they are like: hyperparameters are read as the keys
//! of `config.json` that say the same, and written from a configuration.

use super::{
    config::Keys,
    gemma4, qwen3_5,
    value::{Metadata, Value},
};
use crate::{
    Result,
    config::ModelConfig,
    families::{ByBlock, LinearRole},
};

/// A key without the architecture, and its value.
pub(crate) type Own = (&'static str, Value);

/// What a file's tensors say of the model.
pub(super) struct Facts {
    pub vocab_size: usize,
    /// Rows of the table of what blocks hear of tokens by themselves.
    pub vocab_size_per_layer: Option<usize>,
    pub tied: bool,
    /// Whether some blocks have keys and no values.
    pub keys_only: bool,
    /// Whether queries have biases.
    pub biased: bool,
    /// `rope_freqs.weight`.
    pub factors: Option<Vec<f32>>,
}

/// The model's shape.
pub(super) fn config(kind: ByBlock, keys: &Keys, facts: &Facts) -> Result<ModelConfig> {
    match kind {
        ByBlock::Gemma4 => gemma4::config(keys, facts),
        ByBlock::Qwen3_5 => qwen3_5::config(keys, facts),
    }
}

/// The keys of `config` beside those that all architectures have, some of which these replace.
pub(crate) fn keys(kind: ByBlock, config: &ModelConfig) -> Vec<Own> {
    match kind {
        ByBlock::Gemma4 => gemma4::keys(config),
        ByBlock::Qwen3_5 => qwen3_5::keys(config),
    }
}

/// `rope_freqs.weight`.
pub(crate) fn rope_factors(kind: ByBlock, config: &ModelConfig) -> Option<Vec<f32>> {
    match kind {
        ByBlock::Gemma4 => gemma4::rope_factors(config),
        ByBlock::Qwen3_5 => None,
    }
}

/// Whether what `config`'s keys say is `config` again: these files have no key for the rest.
pub(crate) fn expresses(
    kind: ByBlock,
    keys: &[(String, Value)],
    architecture: &str,
    config: &ModelConfig,
) -> Result<bool> {
    let mut metadata = Metadata::new("config".as_ref());
    for (key, value) in keys {
        metadata.insert(key.clone(), value.clone());
    }
    let has = |index: usize, role| config.parts(index).linear(role).is_some();
    let facts = Facts {
        vocab_size: config.vocab_size,
        vocab_size_per_layer: config.per_layer_input.map(|inputs| inputs.vocab_size),
        tied: config.tie_word_embeddings,
        keys_only: (0..config.num_hidden_layers)
            .any(|index| has(index, LinearRole::Key) && !has(index, LinearRole::Value)),
        // Other readers take none.
        biased: false,
        factors: rope_factors(kind, config),
    };
    let found = self::config(kind, &Keys::new(&metadata, architecture), &facts)?;
    // Numbers that went through 32 bits.
    let close = |a: f64, b: f64| (a - b).abs() <= 1e-6 * a.abs();
    let rounded = ModelConfig {
        norm_eps: if close(found.norm_eps, config.norm_eps) { config.norm_eps } else { found.norm_eps },
        ..found
    };
    Ok(rounded == *config)
}
