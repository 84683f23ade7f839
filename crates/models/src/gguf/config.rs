//! The model's shape from `<architecture>.*` keys and from which tensors there are.

use std::collections::BTreeSet;

use super::{
    Gguf, by_block, layers, qwen3_5, rope,
    value::{Array, Metadata, Value},
};
use crate::{
    Error, Result,
    config::{AttentionScale, Biases, ExpertsConfig, ModelConfig, QueryTemperature, RopeConfig, RopeScaling},
    families::{
        ByBlock, Family, FusedRows, GgufArchitecture, LinearRole,
        class::{Rope, Windows},
    },
    hf::{config::MAX_EXPERTS, rope::RopeKeys},
    source::TensorSource,
};

/// Keys (without the architecture) that are read, or that change nothing.
const KNOWN: [&str; 31] = [
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.key_length_swa",
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.value_length",
    "attention.value_length_swa",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.dimension_count_swa",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "tensor_data_layout",
    "vocab_size",
];

/// Keys that change what the model computes, with the values (as numbers, booleans being 0 and 1) that don't.
const REFUSED: [(&str, &[f64]); 26] = [
    ("attention.causal", &[1.0]),
    ("attention.clamp_kqv", &[0.0]),
    ("attention.max_alibi_bias", &[0.0]),
    ("attention.scale", &[0.0]),
    ("attention.shared_kv_layers", &[0.0]),
    ("attention.sliding_window_pattern", &[]),
    ("attention.temperature_scale", &[0.0]),
    ("attn_logit_softcapping", &[0.0]),
    ("embedding_length_per_layer_input", &[0.0]),
    ("embedding_scale", &[0.0, 1.0]),
    ("expert_count", &[0.0]),
    ("expert_gating_func", &[0.0, 1.0]),
    ("expert_group_count", &[0.0, 1.0]),
    ("expert_group_used_count", &[0.0, 1.0]),
    ("expert_shared_count", &[0.0]),
    ("expert_used_count", &[0.0]),
    ("expert_weights_norm", &[1.0]),
    ("expert_weights_scale", &[0.0, 1.0]),
    ("final_logit_softcapping", &[0.0]),
    ("logit_scale", &[0.0, 1.0]),
    ("nextn_predict_layers", &[0.0]),
    ("residual_scale", &[0.0, 1.0]),
    ("rope.dimension_sections", &[]),
    ("rope.scaling.yarn_ext_factor", &[1.0]),
    ("rope.scaling.yarn_log_multiplier", &[0.0]),
    ("use_parallel_residual", &[0.0]),
];

/// `<architecture>.*` keys.
pub(super) struct Keys<'a> {
    pub metadata: &'a Metadata,
    architecture: &'a str,
}

impl<'a> Keys<'a> {
    pub(crate) fn new(metadata: &'a Metadata, architecture: &'a str) -> Self {
        Self { metadata, architecture }
    }

    /// The whole key.
    pub(crate) fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    /// A size; not zero.
    pub(crate) fn size(&self, key: &str) -> Result<Option<usize>> {
        let key = self.key(key);
        let size = self.metadata.usize(&key)?;
        if size == Some(0) {
            return Err(self.metadata.error(&key, "a positive integer", "0".into()));
        }
        Ok(size)
    }

    pub(crate) fn required_size(&self, key: &str) -> Result<usize> {
        let size = self.size(key)?;
        self.metadata.require(&self.key(key), size)
    }

    /// A positive number.
    pub(crate) fn positive(&self, key: &str) -> Result<Option<f64>> {
        let key = self.key(key);
        let value = self.metadata.f64(&key)?;
        match value {
            Some(value) if value <= 0.0 => {
                Err(self.metadata.error(&key, "a positive number", value.to_string()))
            }
            _ => Ok(value),
        }
    }

    fn refuse_what_changes_the_model(&self, family: &Family) -> Result<()> {
        for (key, harmless) in REFUSED {
            let by_block = family.gguf.is_some_and(|gguf| gguf.by_block == Some(ByBlock::Gemma4));
            let experts = matches!(key, "expert_count" | "expert_used_count")
                && (by_block || family.class.experts.is_some());
            let read = experts || read_by(family).contains(&key);
            let key = self.key(key);
            if read || self.metadata.get(&key).is_none() {
                continue;
            }
            let number = match self.metadata.bool(&key) {
                Ok(value) => value.map(|value| f64::from(u8::from(value))),
                Err(_) => self.metadata.f64(&key).unwrap_or(None),
            };
            if !number.is_some_and(|number| harmless.contains(&number)) {
                let supported = match harmless {
                    [] => "models without this key".into(),
                    _ => format!("{harmless:?}"),
                };
                return Err(self.metadata.unsupported_value(&key, &supported));
            }
        }
        Ok(())
    }
}

/// Query heads and key heads.
pub(super) fn head_counts(metadata: &Metadata, architecture: &str) -> Result<(usize, usize)> {
    let keys = Keys::new(metadata, architecture);
    let query = keys.required_size("attention.head_count")?;
    let key = keys.size("attention.head_count_kv")?.unwrap_or(query);
    if !query.is_multiple_of(key) {
        let field = keys.key("attention.head_count_kv");
        return Err(metadata.error(
            &field,
            &format!("a divisor of the {query} query heads"),
            key.to_string(),
        ));
    }
    Ok((query, key))
}

pub(super) fn unknown_keys(file: &Gguf) -> Vec<&str> {
    let by_block = file.names.family.gguf.and_then(|gguf| gguf.by_block);
    let own = if by_block == Some(ByBlock::Qwen3_5) { &qwen3_5::KNOWN[..] } else { &[] };
    let known = |key: &str| {
        KNOWN.contains(&key) || own.contains(&key) || REFUSED.iter().any(|(refused, _)| *refused == key)
    };
    let prefix = file.architecture.as_str();
    let rest = |key: &str| key.strip_prefix(prefix)?.strip_prefix('.').map(known);
    file.metadata.keys().filter(|key| rest(key) == Some(false)).collect()
}

pub(super) fn read(file: &Gguf) -> Result<ModelConfig> {
    let metadata = &file.metadata;
    let keys = Keys::new(metadata, &file.architecture);
    // 0 is none, as Phi-4's files say it.
    let window = metadata.usize(&keys.key("attention.sliding_window"))?.filter(|window| *window > 0);
    // The file's names fit the family that it was opened with; only the window can tell another one of that name.
    let opened = file.names.family;
    let family = Family::by_gguf(&file.architecture, window.is_some(), opened.class.experts.is_some())
        .unwrap_or(opened);
    let gguf = family.gguf.unwrap_or(GgufArchitecture::PLAIN);
    keys.refuse_what_changes_the_model(family)?;
    let finetuned = keys.key("rope.scaling.finetuned");
    // Of Granite it says whether queries and keys are rotated at all.
    if gguf.name.starts_with("granite") && metadata.bool(&finetuned)? == Some(false) {
        return Err(metadata.unsupported_value(&finetuned, "true, or none"));
    }
    if let Some(kind) = gguf.by_block {
        return by_blocks(file, &keys, family, kind);
    }
    let parts = family.blocks[file.names.kind];
    let hidden_size = keys.required_size("embedding_length")?;
    let num_hidden_layers = keys.required_size("block_count")?;
    let (num_attention_heads, num_key_value_heads) = head_counts(metadata, &file.architecture)?;
    let head_dim = head_dim(&keys, hidden_size, num_attention_heads)?;
    let partial_rotary_factor = partial_factor(&keys, family, head_dim)?;
    check_layer_count(file, &keys, num_hidden_layers)?;
    let max_position_embeddings = keys.required_size("context_length")?;
    let theta = keys.positive("rope.freq_base")?.unwrap_or(10_000.0);
    let factors = file.rope_factors.as_ref().map(|tensor| file.decode(&tensor.name, tensor)).transpose()?;
    let mut scaling = match &factors {
        Some(factors) => rope::from_factors(&keys, &factors.values, theta, head_dim)?,
        None => rope::from_keys(&keys, max_position_embeddings)?,
    };
    if let RopeScaling::Yarn { truncate, .. } = &mut scaling {
        *truncate = gguf.rounds_yarn;
    }
    let epsilon_key = match family.norm.centres() {
        true => "attention.layer_norm_epsilon",
        false => "attention.layer_norm_rms_epsilon",
    };
    let epsilon = keys.positive(epsilon_key)?;
    let full = RopeConfig { theta, scaling, partial_rotary_factor };
    let rope = match family.class.rope {
        Rope::Never => Vec::new(),
        Rope::ByKind([full_keys, sliding]) => {
            // Where both kinds have one base by default, one key says it of both.
            let usual = if full_keys.theta == sliding.theta { theta } else { sliding.theta };
            let sliding = keys.positive("rope.freq_base_swa")?.unwrap_or(usual);
            vec![full, RopeConfig::plain(sliding)]
        }
        _ => vec![full],
    };
    let bias = |roles: &[LinearRole]| {
        let linears = parts.linears().filter(|linear| roles.contains(&linear.role));
        let mut names: Vec<String> = linears.map(|linear| format!("{}.bias", linear.name)).collect();
        if let Some(experts) = parts.experts().filter(|_| roles.contains(&LinearRole::Down)) {
            names.extend((0..3).map(|kind| format!("{}.bias", experts.path(0, kind))));
        }
        if names.is_empty() {
            return Ok(false);
        }
        all_or_none(file, family, num_hidden_layers, &names)
    };
    let mut config = ModelConfig {
        vocab_size: vocab_size(file, &keys)?,
        hidden_size,
        intermediate_size: keys.required_size("feed_forward_length")?,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        max_position_embeddings,
        norm_eps: metadata.require(&keys.key(epsilon_key), epsilon)?,
        rope,
        biases: Biases {
            qkv: bias(&[
                LinearRole::Query,
                LinearRole::Key,
                LinearRole::Value,
                LinearRole::QueryKeyValue(FusedRows::Concatenated),
                LinearRole::QueryKeyValue(FusedRows::Grouped),
            ])?,
            o: bias(&[LinearRole::Output])?,
            mlp: bias(&[LinearRole::Gate, LinearRole::Up, LinearRole::GateUp, LinearRole::Down])?,
            head: file.contains(&format!("{}.bias", family.names.head)),
        },
        tie_word_embeddings: gguf.always_tied || !file.contains(&format!("{}.weight", family.names.head)),
        ..ModelConfig::bare(family)
    };
    config.experts = experts(&keys, family)?;
    if file.names.kind != 0 {
        config.block_kinds = vec![file.names.kind; num_hidden_layers];
    }
    config.parallel = match gguf.parallel_key {
        true => metadata.bool(&keys.key("use_parallel_residual"))?.unwrap_or(true),
        false => gguf.parallel_kinds.contains(&file.names.kind),
    };
    config.alibi = f64::from(u8::from(gguf.alibi));
    if let Some(beta) = keys.positive("attention.temperature_scale")?.filter(|_| gguf.temperature) {
        let Some(RopeScaling::Yarn { original_max_position_embeddings, .. }) =
            config.rope.first().map(|rope| &rope.scaling)
        else {
            let key = keys.key("attention.temperature_scale");
            return Err(metadata.error(&key, "rotary positions with YaRN beside it", "none".into()));
        };
        config.query_temperature = Some(QueryTemperature {
            beta,
            original_max_position_embeddings: *original_max_position_embeddings,
        });
    }
    let slides = slides(&keys, family, num_hidden_layers)?;
    config.layer_attention = match (slides, window) {
        (Some(slides), Some(window)) => {
            let windows = slides.into_iter().map(|slides| slides.then_some(window)).collect();
            family.class.rope.attention(windows)
        }
        (_, window) => layers::attention(&config, window),
    };
    same_for_sliding(&keys, head_dim, config.rope.first().map(|rope| rope.rotated(head_dim)))?;
    config.attention_scale = layers::scale(&config);
    read_factors(&keys, &mut config)?;
    Ok(config)
}

/// Which blocks slide, where a file of a family with both kinds lists them.
fn slides(keys: &Keys, family: &Family, layers: usize) -> Result<Option<Vec<bool>>> {
    let key = keys.key("attention.sliding_window_pattern");
    match (family.class.windows, keys.metadata.get(&key)) {
        (_, None) => Ok(None),
        (Windows::Pattern { .. }, Some(Value::Array(Array::Bool(slides)))) if slides.len() == layers => {
            Ok(Some(slides.clone()))
        }
        (Windows::Pattern { .. }, Some(Value::Uint(period @ 1..))) => {
            Ok(Some((1..=layers as u64).map(|layer| layer % period != 0).collect()))
        }
        _ => {
            let expected = format!("{layers} booleans or a period");
            Err(keys.metadata.error(&key, &expected, "something else".into()))
        }
    }
}

/// Keys that say of sliding blocks what another says of all, which must be the same.
fn same_for_sliding(keys: &Keys, head_dim: usize, rotated: Option<usize>) -> Result<()> {
    let all = [
        ("attention.key_length_swa", Some(head_dim)),
        ("attention.value_length_swa", Some(head_dim)),
        ("rope.dimension_count_swa", rotated),
    ];
    for (key, expected) in all {
        if keys.size(key)?.is_some_and(|found| Some(found) != expected) {
            let expected = expected.map_or("none".into(), |expected| expected.to_string());
            return Err(keys.metadata.unsupported_value(&keys.key(key), &expected));
        }
    }
    Ok(())
}

/// Of an architecture whose blocks differ.
fn by_blocks(file: &Gguf, keys: &Keys, family: &Family, kind: ByBlock) -> Result<ModelConfig> {
    let layers = match kind {
        ByBlock::Gemma4 => keys.required_size("block_count")?,
        ByBlock::Qwen3_5 => qwen3_5::layers(keys)?,
    };
    check_layer_count(file, keys, layers)?;
    let has = |index: usize, name: &str| file.contains(&format!("{}.weight", family.path(index, name)));
    let table = family.names.per_layer.map(|paths| format!("{}.weight", paths.embedding));
    let table = table.and_then(|name| file.tensors.get(&name));
    let factors = file.rope_factors.as_ref().map(|tensor| file.decode(&tensor.name, tensor)).transpose()?;
    let facts = by_block::Facts {
        vocab_size: vocab_size(file, keys)?,
        vocab_size_per_layer: table.and_then(|table| table.shape.first().copied()),
        tied: !file.contains(&format!("{}.weight", family.names.head)),
        keys_only: (0..layers).any(|index| has(index, "self_attn.k_proj") && !has(index, "self_attn.v_proj")),
        biased: (0..layers).any(|index| file.contains(&family.path(index, "self_attn.q_proj.bias"))),
        factors: factors.map(|factors| factors.values),
    };
    by_block::config(kind, keys, &facts)
}

/// Keys that change the model and that a family reads.
fn read_by(family: &Family) -> Vec<&'static str> {
    let multipliers = &family.class.multipliers;
    let mut read = Vec::new();
    let mut add = |known: bool, key| read.extend(known.then_some(key));
    add(!multipliers.embedding.is_empty(), "embedding_scale");
    add(!multipliers.attention.is_empty(), "attention.scale");
    add(!multipliers.residual.is_empty(), "residual_scale");
    add(!multipliers.logits_divisor.is_empty() || multipliers.logits.is_some(), "logit_scale");
    let gguf = family.gguf.unwrap_or(GgufArchitecture::PLAIN);
    // Where kinds of blocks tell it, the key says it once more, and isn't always right.
    add(gguf.parallel_key || !gguf.parallel_kinds.is_empty(), "use_parallel_residual");
    let by_block = gguf.by_block == Some(ByBlock::Gemma4);
    let recurrent = gguf.by_block == Some(ByBlock::Qwen3_5);
    add(recurrent, "rope.dimension_sections");
    add(recurrent, qwen3_5::PREDICTORS);
    let patterned = matches!(family.class.windows, Windows::Pattern { .. });
    add(by_block || patterned, "attention.sliding_window_pattern");
    add(by_block, "attention.shared_kv_layers");
    add(by_block, "embedding_length_per_layer_input");
    add(gguf.temperature, "attention.temperature_scale");
    add(gguf.temperature, "rope.scaling.yarn_log_multiplier");
    add(multipliers.attention_softcap.is_some(), "attn_logit_softcapping");
    add(multipliers.logit_softcap.is_some(), "final_logit_softcapping");
    read
}

/// A mixture of experts; what becomes of the chosen weights readers of these files take for granted.
fn experts(keys: &Keys, family: &Family) -> Result<Option<ExpertsConfig>> {
    if family.class.experts.is_none() {
        return Ok(None);
    }
    let (count, per_token) = (keys.required_size("expert_count")?, keys.required_size("expert_used_count")?);
    let most = [("expert_count", count, MAX_EXPERTS), ("expert_used_count", per_token, count)];
    if let Some((key, found, most)) = most.into_iter().find(|(_, found, most)| found > most) {
        return Err(keys.metadata.error(&keys.key(key), &format!("at most {most}"), found.to_string()));
    }
    let width = match keys.size("expert_feed_forward_length")? {
        Some(width) => width,
        None => keys.required_size("feed_forward_length")?,
    };
    let shared = family.blocks.iter().any(|parts| parts.linear(LinearRole::SharedDown).is_some());
    let shared_width = match shared {
        true => keys.required_size("expert_shared_feed_forward_length")?,
        false => 0,
    };
    let normalise = family.gguf.is_none_or(|gguf| gguf.normalises);
    let clamped = layers::clamped(family);
    Ok(Some(ExpertsConfig { count, per_token, width, shared_width, normalise, clamped }))
}

fn read_factors(keys: &Keys, config: &mut ModelConfig) -> Result<()> {
    if config.family.class.scales_embedding {
        config.embedding_multiplier = (config.hidden_size as f64).sqrt();
    }
    for key in read_by(config.family) {
        let value = || keys.positive(key);
        match key {
            "embedding_scale" => config.embedding_multiplier = value()?.unwrap_or(1.0),
            "attention.scale" => {
                config.attention_scale = value()?.map_or(AttentionScale::HeadDim, AttentionScale::Factor);
            }
            "residual_scale" => config.residual_multiplier = value()?.unwrap_or(1.0),
            "logit_scale" if config.family.class.multipliers.logits.is_some() => {
                config.logit_multiplier = value()?.unwrap_or(1.0);
            }
            "logit_scale" => config.logit_multiplier = 1.0 / value()?.unwrap_or(1.0),
            "attn_logit_softcapping" => config.attention_softcap = value()?,
            "final_logit_softcapping" => config.logit_softcap = value()?,
            // Others are read where they belong.
            _ => {}
        }
    }
    Ok(())
}

/// The share of rotated channels.
fn partial_factor(keys: &Keys, family: &Family, head_dim: usize) -> Result<f64> {
    let Some(count) = keys.size("rope.dimension_count")? else { return Ok(1.0) };
    let partial = matches!(family.class.rope, Rope::One(RopeKeys { partial: Some(_), .. }));
    if count == head_dim || partial && count <= head_dim {
        return Ok(count as f64 / head_dim as f64);
    }
    let supported = format!("the width of a head, {head_dim}");
    Err(keys.metadata.unsupported_value(&keys.key("rope.dimension_count"), &supported))
}

/// Width of a head; keys and values must agree on it.
fn head_dim(keys: &Keys, hidden_size: usize, heads: usize) -> Result<usize> {
    let head_dim = match keys.size("attention.key_length")? {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => {
            let expected = format!("a divisor of the width {hidden_size}");
            return Err(keys.metadata.error(&keys.key("attention.head_count"), &expected, heads.to_string()));
        }
    };
    let key = "attention.value_length";
    if keys.size(key)?.is_some_and(|size| size != head_dim) {
        let supported = format!("the width of a head, {head_dim}");
        return Err(keys.metadata.unsupported_value(&keys.key(key), &supported));
    }
    Ok(head_dim)
}

/// There must be tensors for exactly the blocks that the metadata announces; so the count is bounded by the file's size.
fn check_layer_count(file: &Gguf, keys: &Keys, expected: usize) -> Result<()> {
    let prefix = format!("{}.", file.names.family.names.blocks);
    let layer = |name: &String| name.strip_prefix(&prefix)?.split('.').next()?.parse::<usize>().ok();
    let found: BTreeSet<usize> = file.tensors.keys().filter_map(layer).collect();
    if found.len() == expected && found.last().is_none_or(|&last| last + 1 == expected) {
        return Ok(());
    }
    let found = format!("{expected}, with tensors for {} blocks up to {:?}", found.len(), found.last());
    Err(keys.metadata.error(
        &keys.key("block_count"),
        "the number of blocks that there are tensors for",
        found,
    ))
}

/// Rows of the embedding, which the metadata must not contradict.
fn vocab_size(file: &Gguf, keys: &Keys) -> Result<usize> {
    let name = format!("{}.weight", file.names.family.names.embedding);
    let shape = &file.find(&name)?.shape;
    let &[rows, _] = shape.as_slice() else {
        return Err(keys.metadata.error("token_embd.weight", "2 dimensions", shape.len().to_string()));
    };
    match keys.size("vocab_size")? {
        Some(size) if size != rows => {
            let expected = format!("{rows}, the rows of token_embd.weight");
            Err(keys.metadata.error(&keys.key("vocab_size"), &expected, size.to_string()))
        }
        _ => Ok(rows),
    }
}

/// Whether every block has all of these tensors; an error if only some have.
fn all_or_none(file: &Gguf, family: &Family, layers: usize, names: &[String]) -> Result<bool> {
    let all: Vec<String> =
        (0..layers).flat_map(|layer| names.iter().map(move |name| family.path(layer, name))).collect();
    let missing = all.iter().find(|name| !file.contains(name));
    let present = all.iter().find(|name| file.contains(name));
    match (missing, present) {
        (None, _) => Ok(true),
        (Some(_), None) => Ok(false),
        (Some(missing), Some(present)) => Err(Error::File {
            path: file.path.clone(),
            field: missing.clone(),
            expected: format!("a tensor, since there is {present}"),
            found: "none".into(),
        }),
    }
}
