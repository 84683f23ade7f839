//! [`ModelConfig`] in Kiln's own files, such as the record of a pruning.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{
    config::{
        AttentionScale, Biases, DeltaNetConfig, ExpertsConfig, LayerAttention, LayerShape, ModelConfig,
        PerLayerInputConfig, QueryTemperature, RopeConfig, RopeScaling,
    },
    families::{Activation, Family, LinearRole},
    hf::config::{MAX_HEADS, MAX_WIDTH},
};

/// A configuration as JSON. Files written before families had a description of their own are read as [`Before`].
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum StoredConfig {
    Now(Box<Now>),
    Before(Box<Before>),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Now {
    model_type: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    block_kinds: Vec<usize>,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
    max_position_embeddings: usize,
    norm_eps: f64,
    norm_affine: bool,
    /// Absent in files of the families whose classes know only one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    activation: Option<Activation>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    parallel: bool,
    rope: Vec<RopeConfig>,
    layer_attention: Vec<LayerAttention>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    query_pre_attn_scalar: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    attention_multiplier: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    attention_softcap: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    alibi: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    query_temperature: Option<QueryTemperature>,
    embedding_multiplier: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    residual_multiplier: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    logit_multiplier: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    logit_softcap: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    qkv_clip: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    experts: Option<ExpertsConfig>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    delta_net: Option<DeltaNetConfig>,
    biases: Biases,
    tie_word_embeddings: bool,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    layer_shapes: Vec<LayerShape>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    layer_head_dims: Vec<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    per_layer_input: Option<PerLayerInputConfig>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    embedding_width: Option<usize>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    lacks_final_norm: bool,
}

/// What the configurations of the LLaMA family and of OPT looked like in version 1 of Kiln's records.
#[derive(Serialize, Deserialize)]
#[serde(tag = "model_type", rename_all = "lowercase")]
pub(crate) enum Before {
    Llama {
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize,
        num_key_value_heads: usize,
        head_dim: usize,
        max_position_embeddings: usize,
        rms_norm_eps: f64,
        rope: RopeConfig,
        sliding_window: Vec<Option<usize>>,
        qkv_bias: bool,
        o_bias: bool,
        mlp_bias: bool,
        qk_norm: bool,
        tie_word_embeddings: bool,
        #[serde(default)]
        layer_shapes: Vec<LayerShape>,
    },
    Opt {
        vocab_size: usize,
        hidden_size: usize,
        ffn_dim: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize,
        head_dim: usize,
        max_position_embeddings: usize,
        bias: bool,
        layer_norm_affine: bool,
        tie_word_embeddings: bool,
        #[serde(default)]
        layer_shapes: Vec<LayerShape>,
    },
}

impl From<ModelConfig> for StoredConfig {
    fn from(config: ModelConfig) -> Self {
        let (query_pre_attn_scalar, attention_multiplier) = match config.attention_scale {
            AttentionScale::HeadDim => (None, None),
            AttentionScale::Scalar(scalar) => (Some(scalar), None),
            AttentionScale::Factor(factor) => (None, Some(factor)),
        };
        let unless = |value: f64, usual: f64| (value != usual).then_some(value);
        let usual = config.family.class.activations[0].1;
        Self::Now(Box::new(Now {
            model_type: config.family.model_type.into(),
            block_kinds: config.block_kinds,
            vocab_size: config.vocab_size,
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            num_hidden_layers: config.num_hidden_layers,
            num_attention_heads: config.num_attention_heads,
            num_key_value_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            max_position_embeddings: config.max_position_embeddings,
            norm_eps: config.norm_eps,
            norm_affine: config.norm_affine,
            activation: (config.activation != usual).then_some(config.activation),
            parallel: config.parallel,
            rope: config.rope,
            layer_attention: config.layer_attention,
            query_pre_attn_scalar,
            attention_multiplier,
            attention_softcap: config.attention_softcap,
            alibi: unless(config.alibi, 0.0),
            query_temperature: config.query_temperature,
            embedding_multiplier: config.embedding_multiplier,
            residual_multiplier: unless(config.residual_multiplier, 1.0),
            logit_multiplier: unless(config.logit_multiplier, 1.0),
            logit_softcap: config.logit_softcap,
            qkv_clip: config.qkv_clip,
            experts: config.experts,
            delta_net: config.delta_net,
            biases: config.biases,
            tie_word_embeddings: config.tie_word_embeddings,
            layer_shapes: config.layer_shapes,
            layer_head_dims: config.layer_head_dims,
            per_layer_input: config.per_layer_input,
            embedding_width: config.embedding_width,
            lacks_final_norm: !config.has_final_norm,
        }))
    }
}

impl TryFrom<StoredConfig> for ModelConfig {
    type Error = String;

    fn try_from(stored: StoredConfig) -> Result<Self, String> {
        let family = |name: &str| {
            Family::by_model_type(name)
                .ok_or_else(|| format!("model_type: expected a known one, found {name}"))
        };
        let mut config = match stored {
            StoredConfig::Now(now) => Self {
                family: family(&now.model_type)?,
                block_kinds: now.block_kinds,
                vocab_size: now.vocab_size,
                hidden_size: now.hidden_size,
                intermediate_size: now.intermediate_size,
                num_hidden_layers: now.num_hidden_layers,
                num_attention_heads: now.num_attention_heads,
                num_key_value_heads: now.num_key_value_heads,
                head_dim: now.head_dim,
                max_position_embeddings: now.max_position_embeddings,
                norm_eps: now.norm_eps,
                norm_affine: now.norm_affine,
                activation: match now.activation {
                    Some(activation) => activation,
                    None => family(&now.model_type)?.class.activations[0].1,
                },
                parallel: now.parallel,
                rope: now.rope,
                layer_attention: now.layer_attention,
                attention_scale: match (now.query_pre_attn_scalar, now.attention_multiplier) {
                    (Some(scalar), _) => AttentionScale::Scalar(scalar),
                    (None, Some(factor)) => AttentionScale::Factor(factor),
                    (None, None) => AttentionScale::HeadDim,
                },
                attention_softcap: now.attention_softcap,
                alibi: now.alibi.unwrap_or(0.0),
                query_temperature: now.query_temperature,
                embedding_multiplier: now.embedding_multiplier,
                residual_multiplier: now.residual_multiplier.unwrap_or(1.0),
                logit_multiplier: now.logit_multiplier.unwrap_or(1.0),
                logit_softcap: now.logit_softcap,
                qkv_clip: now.qkv_clip,
                experts: now.experts,
                delta_net: now.delta_net,
                biases: now.biases,
                tie_word_embeddings: now.tie_word_embeddings,
                layer_shapes: now.layer_shapes,
                layer_head_dims: now.layer_head_dims,
                per_layer_input: now.per_layer_input,
                embedding_width: now.embedding_width,
                has_final_norm: !now.lacks_final_norm,
            },
            StoredConfig::Before(before) => before.now(family)?,
        };
        if let Some(experts) = config.experts {
            // Before blocks' experts could differ, they weren't listed.
            for shape in config.layer_shapes.iter_mut().filter(|shape| shape.expert_width == 0) {
                (shape.expert_width, shape.shared_expert_width) = (experts.width, experts.shared_width);
            }
        }
        let found = config.layer_attention.len();
        if found != config.num_hidden_layers {
            return Err(format!(
                "blocks' attention: expected {} entries, found {found}",
                config.num_hidden_layers
            ));
        }
        let kinds = config.family.blocks.len();
        let fits = [0, config.num_hidden_layers].contains(&config.block_kinds.len());
        if !fits || config.block_kinds.iter().any(|kind| *kind >= kinds) {
            return Err(format!(
                "block_kinds: expected one below {kinds} for each block, found {:?}",
                config.block_kinds
            ));
        }
        config.check_parts()?;
        let tables = config.rope.len();
        match config.layer_attention.iter().filter_map(|layer| layer.rope).find(|rope| *rope >= tables) {
            Some(rope) => Err(format!("layer_attention.rope: expected below {tables}, found {rope}")),
            None => Ok(config),
        }
    }
}

impl ModelConfig {
    /// What blocks, experts and rotary tables need beside each other.
    fn check_parts(&self) -> Result<(), String> {
        self.check_heads().map_err(|wrong| wrong.to_string())?;
        let mut blocks = 0..self.num_hidden_layers;
        let chosen = |experts: &ExpertsConfig| (1..=experts.count).contains(&experts.per_token);
        if blocks.any(|index| self.parts(index).experts().is_some())
            && !self.experts.as_ref().is_some_and(chosen)
        {
            let expected = "a number of them, and of those a token goes through";
            return Err(format!("experts: expected {expected}, found {:?}", self.experts));
        }
        for rope in &self.rope {
            let share = rope.partial_rotary_factor;
            if !(share > 0.0 && share <= 1.0) {
                return Err(format!("partial_rotary_factor: expected above 0, at most 1, found {share}"));
            }
        }
        Ok(())
    }
}

/// What a configuration says that can't be so.
pub(crate) struct Contradiction {
    pub field: &'static str,
    pub expected: String,
    pub found: String,
}

impl fmt::Display for Contradiction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: expected {}, found {}", self.field, self.expected, self.found)
    }
}

impl ModelConfig {
    /// Heads of a rotary table are equally wide, its lists of factors are as long, and blocks without keys find some.
    pub(crate) fn check_heads(&self) -> Result<(), Contradiction> {
        let layers = self.num_hidden_layers;
        let wrong = |field, expected: String, found: String| Err(Contradiction { field, expected, found });
        let widths = self.layer_head_dims.len();
        if ![0, layers].contains(&widths) {
            return wrong("layer_head_dims", format!("one for each of {layers} blocks"), widths.to_string());
        }
        for (table, rope) in self.rope.iter().enumerate() {
            if let RopeScaling::LongRope { short_factor, long_factor, .. } = &rope.scaling {
                let pairs = rope.rotated(self.rotary_head_dim(table)) / 2;
                let found = [short_factor.len(), long_factor.len()];
                if found != [pairs; 2] {
                    let expected = format!("{pairs} factors in each list of LongRoPE");
                    return wrong("rope", expected, format!("{found:?}"));
                }
            }
        }
        if (0..layers).any(|index| self.parts(index).is_recurrent()) {
            let fits = |delta: &DeltaNetConfig| {
                let DeltaNetConfig { key_heads, value_heads, key_dim, value_dim, convolution } = *delta;
                let heads = [key_heads, value_heads].iter().all(|heads| (1..=MAX_HEADS).contains(heads));
                let widths =
                    [key_dim, value_dim, convolution].iter().all(|width| (1..=MAX_WIDTH).contains(width));
                heads && widths && value_heads.is_multiple_of(key_heads)
            };
            if !self.delta_net.as_ref().is_some_and(fits) {
                let expected = format!(
                    "1 to {MAX_HEADS} heads, as many for values as for keys or a multiple, and widths of 1 to {MAX_WIDTH}"
                );
                return wrong("linear_num_value_heads", expected, format!("{:?}", self.delta_net));
            }
        }
        for index in 0..layers {
            let (parts, attention, width) =
                (self.parts(index), self.layer_attention[index], self.head_dim_of(index));
            if let Some(table) = attention.rope {
                let others = self.rotary_head_dim(table);
                if width != others {
                    let expected =
                        format!("{others} in block {index}, as in the other blocks of its rotary table");
                    return wrong("head_dim", expected, width.to_string());
                }
                if !width.is_multiple_of(2) {
                    let expected = format!("an even number in block {index}, whose heads are rotated");
                    return wrong("head_dim", expected, width.to_string());
                }
            }
            if parts.linear(LinearRole::PerLayerGate).is_some() && self.per_layer_input.is_none() {
                let expected = format!("a width, as block {index} reads such an input");
                return wrong("per_layer_input", expected, "none".into());
            }
            let heads = |block: usize| (self.head_dim_of(block), self.layer(block).num_key_value_heads);
            let source = self.find_key_value_source(index);
            if source.is_none_or(|source| heads(source) != heads(index)) {
                let expected = format!(
                    "an earlier block with heads and window like those of block {index}, whose keys it attends to"
                );
                let found =
                    source.map_or("none".into(), |source| format!("block {source}, with other heads"));
                return wrong("num_kv_shared_layers", expected, found);
            }
        }
        Ok(())
    }
}

impl Before {
    fn now(self, family: impl Fn(&str) -> Result<&'static Family, String>) -> Result<ModelConfig, String> {
        Ok(match self {
            Self::Llama {
                vocab_size,
                hidden_size,
                intermediate_size,
                num_hidden_layers,
                num_attention_heads,
                num_key_value_heads,
                head_dim,
                max_position_embeddings,
                rms_norm_eps,
                rope,
                sliding_window,
                qkv_bias,
                o_bias,
                mlp_bias,
                qk_norm,
                tie_word_embeddings,
                layer_shapes,
            } => {
                // The family wasn't kept: these are the classes that compute what the flags say.
                let window = sliding_window.first().copied().flatten();
                let mixed = sliding_window.iter().any(|other| *other != window);
                let model_type = match (qk_norm, mixed || qkv_bias && !o_bias, window) {
                    (true, ..) => "qwen3",
                    (false, true, _) => "qwen2",
                    (false, false, Some(_)) => "mistral",
                    (false, false, None) => "llama",
                };
                let attention = |window| LayerAttention { sliding_window: window, rope: Some(0) };
                ModelConfig {
                    vocab_size,
                    hidden_size,
                    intermediate_size,
                    num_hidden_layers,
                    num_attention_heads,
                    num_key_value_heads,
                    head_dim,
                    max_position_embeddings,
                    norm_eps: rms_norm_eps,
                    norm_affine: true,
                    rope: vec![rope],
                    layer_attention: sliding_window.into_iter().map(attention).collect(),
                    biases: Biases { qkv: qkv_bias, o: o_bias, mlp: mlp_bias, head: false },
                    tie_word_embeddings,
                    layer_shapes,
                    ..ModelConfig::bare(family(model_type)?)
                }
            }
            Self::Opt {
                vocab_size,
                hidden_size,
                ffn_dim,
                num_hidden_layers,
                num_attention_heads,
                head_dim,
                max_position_embeddings,
                bias,
                layer_norm_affine,
                tie_word_embeddings,
                layer_shapes,
            } => ModelConfig {
                vocab_size,
                hidden_size,
                intermediate_size: ffn_dim,
                num_hidden_layers,
                num_attention_heads,
                num_key_value_heads: num_attention_heads,
                head_dim,
                max_position_embeddings,
                norm_eps: 1e-5,
                norm_affine: layer_norm_affine,
                rope: Vec::new(),
                layer_attention: vec![LayerAttention { sliding_window: None, rope: None }; num_hidden_layers],
                biases: Biases { qkv: bias, o: bias, mlp: bias, head: false },
                tie_word_embeddings,
                layer_shapes,
                ..ModelConfig::bare(family("opt")?)
            },
        })
    }
}
