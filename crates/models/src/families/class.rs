//! What a family's configuration class says: keys, what they stand for, and what holds where a file is silent. Reading and
//! writing go by it, so that a family is a table.

use serde_json::{Map, Value, json};

use super::{Activation, Family};
use crate::{
    Error, Result,
    config::{AttentionScale, Biases, ExpertsConfig, LayerAttention, ModelConfig, RopeConfig},
    export::config_keys::{self, set},
    hf::{
        Fields,
        config::{self, MAX_EXPERTS, MAX_HEADS, MAX_LAYERS, MAX_POSITIONS, MAX_VOCABULARY, MAX_WIDTH},
        rope::{self, RopeKeys},
    },
};

/// Keys of `config.json` and transformers' class defaults.
#[derive(Clone, Copy)]
pub(crate) struct Class {
    pub keys: Keys,
    /// Width of a head where the file is silent.
    pub head_dim: HeadDim,
    /// Key and value heads where the file is silent; `None` as many as query heads.
    pub key_value_heads: Option<usize>,
    /// Channels of the MLP are four times the width where the file is silent; else it must say.
    pub four_times: bool,
    pub max_positions: usize,
    /// Whether the head is the embedding where the file is silent.
    pub tied: bool,
    pub norm_eps: f64,
    /// The values that the activation's key may have, the first being written; and what holds where the file is silent.
    pub activations: &'static [(&'static str, Activation)],
    /// Biases that are there without being asked for.
    pub always: Biases,
    /// Keys that ask for biases.
    pub bias_keys: &'static [BiasKey],
    pub windows: Windows,
    /// Whether blocks may have heads of different widths.
    pub head_dims: bool,
    pub rope: Rope,
    /// Whether the class scales the embedding by the root of its width.
    pub scales_embedding: bool,
    /// Keys of factors, in the model's order: embedding, attention, residual, logits.
    pub multipliers: Multipliers,
    /// How experts are described, in families that have them.
    pub experts: Option<ExpertKeys>,
    /// The blocks' attention and MLP run side by side.
    pub parallel: bool,
    /// Keys that must have one value, which is the one that the family computes by.
    pub only: &'static [(&'static str, bool)],
    /// Keys that change nothing here.
    pub ignored: &'static [&'static str],
    /// What only this family knows, after everything else was read.
    pub read_more: fn(&Fields<'_>, &mut ModelConfig) -> Result<()>,
    /// The same for writing.
    pub write_more: fn(&ModelConfig, &mut Map<String, Value>),
}

/// Names of the keys that most families have under some name. Where there are several, the first is written.
#[derive(Clone, Copy)]
pub(crate) struct Keys {
    pub hidden: &'static [&'static str],
    pub layers: &'static [&'static str],
    pub heads: &'static [&'static str],
    /// Key and value heads; empty: as many as query heads.
    pub key_value_heads: &'static [&'static str],
    pub channels: &'static [&'static str],
    pub positions: &'static [&'static str],
    pub norm_eps: &'static [&'static str],
    pub activation: &'static [&'static str],
}

/// Keys of a mixture of experts.
#[derive(Clone, Copy)]
pub(crate) struct ExpertKeys {
    /// Channels of an expert.
    pub width: &'static str,
    /// `norm_topk_prob` where the file is silent; `None`: the class always divides by the sum of the chosen.
    pub normalise: Option<bool>,
    /// Whether `decoder_sparse_step` and `mlp_only_layers` leave blocks with an MLP of the second kind.
    pub sparse_layers: bool,
    /// Channels of the shared expert; empty where there is none.
    pub shared_width: &'static str,
    /// Whether models may have none: then the class itself reads and writes what there is beside these widths.
    pub optional: bool,
}

/// Names of the number of experts and of those that a token goes through.
const EXPERT_COUNT: &[&str] = &["num_local_experts", "num_experts"];
const EXPERTS_PER_TOKEN: &[&str] = &["num_experts_per_tok", "experts_per_token", "top_k_experts"];

/// How wide a head is.
#[derive(Clone, Copy)]
pub(crate) enum HeadDim {
    /// `head_dim`, else an equal share of the width.
    Share,
    /// An equal share of the width, for which the class knows no key; files of ours have one where it is another.
    Implied,
    /// `head_dim`, else this.
    Default(usize),
}

/// A key that asks for biases.
#[derive(Clone, Copy)]
pub(crate) struct BiasKey {
    pub key: &'static str,
    /// Where the file is silent.
    pub default: bool,
    pub covers: Biases,
}

/// Which blocks have a sliding window.
#[derive(Clone, Copy)]
pub(crate) enum Windows {
    /// None.
    Never,
    /// All, if there is one; the number holds where the file is silent, `null` is none.
    All(Option<usize>),
    /// Those that `layer_types` or `max_window_layers` choose, if `use_sliding_window` is set.
    ByLayer,
    /// Those that `layer_types` chooses, else all but each `period`-th.
    Pattern {
        /// Where the file is silent.
        window: Option<usize>,
        /// 1 leaves no window without `layer_types`.
        period: usize,
        /// Keys of the period.
        keys: &'static [&'static str],
    },
}

/// What rotary positions blocks have.
#[derive(Clone, Copy)]
pub(crate) enum Rope {
    /// None: positions are learned, or ALiBi's.
    Never,
    /// One table for all blocks.
    One(RopeKeys),
    /// One for full and one for sliding blocks.
    ByKind([RopeKeys; 2]),
    /// One, for blocks with a window; the others aren't rotated. `all_without`: but all are, if there is no window at all.
    Sliding {
        /// See above.
        all_without: bool,
    },
}

impl Rope {
    /// What blocks with these windows see.
    pub(crate) fn attention(self, windows: Vec<Option<usize>>) -> Vec<LayerAttention> {
        let has_window = windows.iter().any(Option::is_some);
        let table = |window: Option<usize>| match (self, window) {
            (Self::Never, _) => None,
            (Self::One(_), _) => Some(0),
            (Self::ByKind(_), window) => Some(usize::from(window.is_some())),
            (Self::Sliding { .. }, Some(_)) => Some(0),
            (Self::Sliding { all_without }, None) => (all_without && !has_window).then_some(0),
        };
        let layers = windows.into_iter();
        layers.map(|window| LayerAttention { sliding_window: window, rope: table(window) }).collect()
    }
}

/// The window of all blocks but each `period`-th.
pub(crate) fn every_but(period: usize, window: Option<usize>, layers: usize) -> Vec<Option<usize>> {
    (1..=layers).map(|layer| window.filter(|_| !layer.is_multiple_of(period))).collect()
}

/// Keys of factors; empty ones are not known to the class.
#[derive(Clone, Copy, Default)]
pub(crate) struct Multipliers {
    pub embedding: &'static str,
    pub attention: &'static str,
    /// The attention's scale is this to the power of -1/2, with what holds where the file is silent.
    pub query_scalar: Option<(&'static str, f64)>,
    pub residual: &'static str,
    /// Multiplies the logits.
    pub logits: Option<(&'static str, f64)>,
    /// Divides the logits.
    pub logits_divisor: &'static str,
    /// Caps of logits and scores, with what holds where the file is silent.
    pub logit_softcap: Option<(&'static str, Option<f64>)>,
    pub attention_softcap: Option<(&'static str, Option<f64>)>,
}

impl Multipliers {
    const NONE: Self = Self {
        embedding: "",
        attention: "",
        query_scalar: None,
        residual: "",
        logits: None,
        logits_divisor: "",
        logit_softcap: None,
        attention_softcap: None,
    };
    pub(crate) const GRANITE: Self = Self {
        embedding: "embedding_multiplier",
        attention: "attention_multiplier",
        residual: "residual_multiplier",
        logits_divisor: "logits_scaling",
        ..Self::NONE
    };
}

pub(crate) const NO_BIASES: Biases = Biases { qkv: false, o: false, mlp: false, head: false };
pub(crate) const QKV: Biases = Biases { qkv: true, ..NO_BIASES };
pub(crate) const ATTENTION: Biases = Biases { o: true, ..QKV };
pub(crate) const OUTPUT: Biases = Biases { o: true, ..NO_BIASES };
pub(crate) const MLP: Biases = Biases { mlp: true, ..NO_BIASES };
pub(crate) const BLOCK: Biases = Biases { mlp: true, ..ATTENTION };

pub(crate) const ATTENTION_BIAS: BiasKey =
    BiasKey { key: "attention_bias", default: false, covers: ATTENTION };
pub(crate) const MLP_BIAS: BiasKey = BiasKey { key: "mlp_bias", default: false, covers: MLP };

pub(crate) const SILU: &[(&str, Activation)] = &[("silu", Activation::Silu), ("swish", Activation::Silu)];
pub(crate) const GELU_TANH: &[(&str, Activation)] = &[
    ("gelu_pytorch_tanh", Activation::GeluTanh),
    ("gelu_new", Activation::GeluTanh),
    ("gelu_fast", Activation::GeluTanh),
];

pub(crate) const LLAMA_KEYS: Keys = Keys {
    hidden: &["hidden_size"],
    layers: &["num_hidden_layers"],
    heads: &["num_attention_heads"],
    key_value_heads: &["num_key_value_heads"],
    channels: &["intermediate_size"],
    positions: &["max_position_embeddings"],
    norm_eps: &["rms_norm_eps"],
    activation: &["hidden_act"],
};

/// LLaMA's, from which those of others are made.
pub(crate) const LLAMA: Class = Class {
    keys: LLAMA_KEYS,
    head_dim: HeadDim::Share,
    key_value_heads: None,
    four_times: false,
    max_positions: 2048,
    tied: false,
    norm_eps: 1e-6,
    activations: SILU,
    always: NO_BIASES,
    bias_keys: &[ATTENTION_BIAS, MLP_BIAS],
    windows: Windows::Never,
    head_dims: false,
    rope: Rope::One(RopeKeys::DEFAULT),
    scales_embedding: false,
    multipliers: Multipliers::NONE,
    experts: None,
    parallel: false,
    only: &[],
    ignored: &[],
    read_more: |_, _| Ok(()),
    write_more: |_, _| (),
};

impl Class {
    /// The keys of the channels of an expert, and of the one that all tokens go through; empty where there is none.
    pub(crate) fn expert_widths(&self) -> [&'static str; 2] {
        self.experts.map_or([""; 2], |keys| [keys.width, keys.shared_width])
    }

    /// The biases that the keys express, nearest to those given: a key is set if its output's bias is wanted, or, where it
    /// covers none, any of the others.
    pub(crate) fn biases_nearest(&self, wanted: Biases) -> Biases {
        let set = |key: &BiasKey| if key.covers.o { wanted.o } else { key.covers.and(wanted) != NO_BIASES };
        self.bias_keys.iter().filter(|key| set(key)).fold(self.always, |all, key| all.or(key.covers))
    }

    /// The model that `fields` describe.
    pub(crate) fn read(&self, fields: &Fields<'_>, family: &'static Family) -> Result<ModelConfig> {
        let keys = &self.keys;
        for (key, only) in self.only {
            fields.refuse_unless(key, *only)?;
        }
        fields.know(self.ignored);
        let hidden_size = required(fields, keys.hidden, MAX_WIDTH)?;
        let num_hidden_layers = required(fields, keys.layers, MAX_LAYERS)?;
        let num_attention_heads = required(fields, keys.heads, MAX_HEADS)?;
        let head_dim = match (fields.size("head_dim", MAX_WIDTH)?, self.head_dim) {
            (Some(head_dim), _) | (None, HeadDim::Default(head_dim)) => head_dim,
            (None, HeadDim::Share | HeadDim::Implied) => {
                config::equal_share(fields, hidden_size, num_attention_heads)?
            }
        };
        // Rotary positions turn pairs of channels.
        if !matches!(self.rope, Rope::Never) && !head_dim.is_multiple_of(2) {
            return Err(fields.wrong("head_dim", "an even number"));
        }
        let intermediate_size = match first(keys.channels, |key| fields.size(key, MAX_WIDTH))? {
            Some(size) => size,
            None if self.four_times => 4 * hidden_size,
            None => required(fields, keys.channels, MAX_WIDTH)?,
        };
        let max_position_embeddings =
            first(keys.positions, |key| fields.size(key, MAX_POSITIONS))?.unwrap_or(self.max_positions);
        let mut biases = self.always;
        for key in self.bias_keys {
            if fields.bool(key.key)?.unwrap_or(key.default) {
                biases = biases.or(key.covers);
            }
        }
        let mut config = ModelConfig {
            vocab_size: fields.required_size("vocab_size", MAX_VOCABULARY)?,
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads: self.key_value_heads(fields, num_attention_heads)?,
            head_dim,
            max_position_embeddings,
            norm_eps: self.epsilon(fields)?,
            activation: self.activation(fields)?,
            embedding_multiplier: if self.scales_embedding { (hidden_size as f64).sqrt() } else { 1.0 },
            biases,
            tie_word_embeddings: fields.bool("tie_word_embeddings")?.unwrap_or(self.tied),
            ..ModelConfig::bare(family)
        };
        self.read_multipliers(fields, &mut config)?;
        if let Some(keys) = self.experts.as_ref().filter(|keys| !keys.optional) {
            keys.read(fields, &mut config)?;
        }
        let windows = self.read_windows(fields, num_hidden_layers)?;
        (config.rope, config.layer_attention) = self.read_rope(fields, &config, windows)?;
        (self.read_more)(fields, &mut config)?;
        config::extension(fields, &mut config)?;
        config::set_layer_shapes(fields, &mut config)?;
        config.check_heads().map_err(|wrong| Error::File {
            path: fields.path(),
            field: wrong.field.into(),
            expected: wrong.expected,
            found: wrong.found,
        })?;
        Ok(config)
    }

    /// Key and value heads: `null` means as many as query heads, absence means the class's default.
    fn key_value_heads(&self, fields: &Fields<'_>, heads: usize) -> Result<usize> {
        let keys = self.keys.key_value_heads;
        let present = keys.iter().any(|key| fields.present(key));
        let default = if present { heads } else { self.key_value_heads.unwrap_or(heads) };
        let key_value_heads = first(keys, |key| fields.size(key, MAX_HEADS))?.unwrap_or(default);
        if heads.is_multiple_of(key_value_heads) {
            return Ok(key_value_heads);
        }
        let key = keys.first().copied().unwrap_or("num_key_value_heads");
        Err(fields.wrong(key, &format!("a divisor of num_attention_heads, {heads}")))
    }

    fn epsilon(&self, fields: &Fields<'_>) -> Result<f64> {
        for key in self.keys.norm_eps {
            match fields.f64(key)? {
                Some(epsilon) if (0.0..1.0).contains(&epsilon) => return Ok(epsilon),
                Some(_) => return Err(fields.wrong(key, "a number in 0..1")),
                None => {}
            }
        }
        Ok(self.norm_eps)
    }

    fn activation(&self, fields: &Fields<'_>) -> Result<Activation> {
        let mut activation = self.activations[0].1;
        for key in self.keys.activation.iter().rev() {
            if let Some(name) = fields.str(key)? {
                let known = self.activations.iter().find(|(known, _)| *known == name);
                let names = || self.activations.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
                activation = known.ok_or_else(|| fields.unsupported(key, &names()))?.1;
            }
        }
        Ok(activation)
    }

    fn read_multipliers(&self, fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
        let keys = &self.multipliers;
        let factor = |key: &str| match key {
            "" => Ok(None),
            key => fields.positive(key),
        };
        if let Some(factor) = factor(keys.embedding)? {
            config.embedding_multiplier = factor;
        }
        if !keys.attention.is_empty() {
            config.attention_scale = AttentionScale::Factor(factor(keys.attention)?.unwrap_or(1.0));
        }
        if let Some((key, default)) = keys.query_scalar {
            config.attention_scale = AttentionScale::Scalar(factor(key)?.unwrap_or(default));
        }
        config.residual_multiplier = factor(keys.residual)?.unwrap_or(1.0);
        config.logit_multiplier = match (keys.logits, factor(keys.logits_divisor)?) {
            (Some((key, default)), _) => factor(key)?.unwrap_or(default),
            (None, Some(divisor)) => 1.0 / divisor,
            (None, None) => 1.0,
        };
        let cap = |key: Option<(&str, Option<f64>)>| match key {
            Some((key, _)) if fields.present(key) => fields.positive(key),
            Some((_, default)) => Ok(default),
            None => Ok(None),
        };
        config.logit_softcap = cap(keys.logit_softcap)?;
        config.attention_softcap = cap(keys.attention_softcap)?;
        Ok(())
    }

    /// The window of every block.
    fn read_windows(&self, fields: &Fields<'_>, layers: usize) -> Result<Vec<Option<usize>>> {
        let window = |default| match fields.present("sliding_window") {
            true => fields.size("sliding_window", MAX_POSITIONS),
            false => Ok(default),
        };
        let chosen = |window: Option<usize>, slides: Vec<bool>| {
            let missing = || fields.wrong("sliding_window", "a window, as layer_types asks for one");
            let one = |slides: bool| if slides { window.map(Some).ok_or_else(missing) } else { Ok(None) };
            slides.into_iter().map(one).collect::<Result<Vec<_>>>()
        };
        match self.windows {
            Windows::Never => Ok(vec![None; layers]),
            Windows::All(default) => match config::slides(fields, layers)? {
                Some(slides) => chosen(window(default)?, slides),
                None => Ok(vec![window(default)?; layers]),
            },
            Windows::ByLayer => {
                fields.know(&["sliding_window"]);
                let used = fields.bool("use_sliding_window")?.unwrap_or(false);
                let window = if used { window(Some(4096))? } else { None };
                let first = match fields.get("max_window_layers").map(Value::as_u64) {
                    None => 28,
                    Some(Some(first)) => first,
                    Some(None) => return Err(fields.wrong("max_window_layers", "a number of layers")),
                };
                match config::slides(fields, layers)? {
                    Some(slides) => chosen(window, slides),
                    None => Ok((0..layers as u64).map(|layer| window.filter(|_| layer >= first)).collect()),
                }
            }
            Windows::Pattern { window: default, period, keys } => {
                let window = window(default)?;
                let period = first(keys, |key| read_period(fields, key))?.unwrap_or(period);
                match (config::slides(fields, layers)?, window) {
                    (_, None) => Ok(vec![None; layers]),
                    (Some(slides), window) => chosen(window, slides),
                    (None, window) => Ok(every_but(period, window, layers)),
                }
            }
        }
    }

    /// The rotary tables, and what each block's attention sees.
    fn read_rope(
        &self,
        fields: &Fields<'_>,
        config: &ModelConfig,
        windows: Vec<Option<usize>>,
    ) -> Result<(Vec<RopeConfig>, Vec<LayerAttention>)> {
        let (positions, head_dim) = (config.max_position_embeddings, config.head_dim);
        let tables = match self.rope {
            Rope::Never => Vec::new(),
            Rope::One(keys) => vec![rope::parse(fields, &keys, positions, head_dim)?],
            Rope::Sliding { .. } => vec![rope::parse(fields, &RopeKeys::DEFAULT, positions, head_dim)?],
            Rope::ByKind(keys) => rope::parse_by_layer_type(fields, positions, head_dim, keys)?,
        };
        Ok((tables, self.rope.attention(windows)))
    }

    /// The keys that say what `config` is.
    pub(crate) fn write(&self, config: &ModelConfig, map: &mut Map<String, Value>) {
        let keys = &self.keys;
        let name = |activation: Activation| {
            let known = self.activations.iter().find(|(_, known)| *known == activation);
            known.map(|(name, _)| *name)
        };
        set(
            map,
            [
                ("vocab_size", json!(config.vocab_size)),
                ("tie_word_embeddings", json!(config.tie_word_embeddings)),
            ],
        );
        let sizes = [
            (keys.hidden, json!(config.hidden_size)),
            (keys.channels, json!(config.intermediate_size)),
            (keys.layers, json!(config.num_hidden_layers)),
            (keys.heads, json!(config.num_attention_heads)),
            (keys.key_value_heads, json!(config.num_key_value_heads)),
            (keys.positions, json!(config.max_position_embeddings)),
            (keys.norm_eps, json!(config.norm_eps)),
            (keys.activation, json!(name(config.activation))),
        ];
        map.extend(sizes.into_iter().filter_map(|(keys, value)| Some(((*keys.first()?).to_owned(), value))));
        let shared = config.head_dim * config.num_attention_heads == config.hidden_size;
        if !(shared && matches!(self.head_dim, HeadDim::Implied)) {
            set(map, [("head_dim", json!(config.head_dim))]);
        }
        for (key, only) in self.only {
            set(map, [(key, json!(only))]);
        }
        let own = self.biases_nearest(config.biases);
        for key in self.bias_keys {
            set(map, [(key.key, json!(key.covers.and(own) == key.covers))]);
        }
        self.write_multipliers(config, map);
        let keys = self.experts.as_ref().filter(|keys| !keys.optional);
        if let (Some(keys), Some(experts)) = (keys, &config.experts) {
            keys.write(config, experts, map);
        }
        self.write_windows(config, map);
        match (self.rope, config.rope.as_slice()) {
            (Rope::Never, _) | (_, []) => {}
            (Rope::ByKind(_), tables) => config_keys::rope_by_layer_type(tables, map),
            (Rope::One(keys), [table, ..]) => config_keys::rope(table, &keys, map),
            (Rope::Sliding { .. }, [table, ..]) => config_keys::rope(table, &RopeKeys::DEFAULT, map),
        }
        let factor = match self.multipliers.embedding {
            "" if self.scales_embedding => (config.hidden_size as f64).sqrt(),
            "" => 1.0,
            _ => config.embedding_multiplier,
        };
        config_keys::extension(config, own, factor, map);
        config_keys::layer_shapes(config, map);
        (self.write_more)(config, map);
    }

    fn write_multipliers(&self, config: &ModelConfig, map: &mut Map<String, Value>) {
        let keys = &self.multipliers;
        let mut put = |key: &str, value: Value| {
            if !key.is_empty() {
                set(map, [(key, value)]);
            }
        };
        put(keys.embedding, json!(config.embedding_multiplier));
        put(keys.residual, json!(config.residual_multiplier));
        put(keys.logits_divisor, json!(divisor(config.logit_multiplier)));
        put(keys.logits.map_or("", |(key, _)| key), json!(config.logit_multiplier));
        put(keys.logit_softcap.map_or("", |(key, _)| key), json!(config.logit_softcap));
        put(keys.attention_softcap.map_or("", |(key, _)| key), json!(config.attention_softcap));
        match config.attention_scale {
            AttentionScale::HeadDim => {}
            AttentionScale::Scalar(scalar) => {
                // Classes want an integer where it is one.
                let number = if scalar.fract() == 0.0 { json!(scalar as u64) } else { json!(scalar) };
                put(keys.query_scalar.map_or("", |(key, _)| key), number);
            }
            AttentionScale::Factor(factor) => put(keys.attention, json!(factor)),
        }
    }

    fn write_windows(&self, config: &ModelConfig, map: &mut Map<String, Value>) {
        let windows = config.sliding_windows();
        let window = windows.iter().flatten().next();
        match self.windows {
            Windows::Never => {}
            Windows::All(_) => {
                set(map, [("sliding_window", json!(window))]);
                if windows.iter().any(|other| other.as_ref() != window) {
                    set(map, [("layer_types", config_keys::layer_types(config))]);
                }
            }
            Windows::ByLayer => set(
                map,
                [
                    ("use_sliding_window", json!(window.is_some())),
                    ("sliding_window", json!(window)),
                    ("layer_types", config_keys::layer_types(config)),
                ],
            ),
            Windows::Pattern { .. } => set(
                map,
                [("sliding_window", json!(window)), ("layer_types", config_keys::layer_types(config))],
            ),
        }
    }
}

impl ExpertKeys {
    pub(crate) fn read(&self, fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
        let count = required(fields, EXPERT_COUNT, MAX_EXPERTS)?;
        let per_token = required(fields, EXPERTS_PER_TOKEN, MAX_EXPERTS)?;
        if per_token > count {
            return Err(
                fields.wrong(EXPERTS_PER_TOKEN[0], &format!("at most the {count} experts that there are"))
            );
        }
        let shared_width = match self.shared_width {
            "" => 0,
            key => fields.required_size(key, MAX_WIDTH)?,
        };
        let normalise = match self.normalise {
            None => true,
            Some(default) => fields.bool("norm_topk_prob")?.unwrap_or(default),
        };
        config.experts = Some(ExpertsConfig {
            count,
            per_token,
            width: fields.required_size(self.width, MAX_WIDTH)?,
            shared_width,
            normalise,
            clamped: None,
        });
        if self.sparse_layers {
            let step = fields.size("decoder_sparse_step", MAX_LAYERS)?.unwrap_or(1);
            let wrong = || fields.wrong("mlp_only_layers", "a list of layers");
            let dense: Vec<u64> = match fields.get("mlp_only_layers") {
                None => Vec::new(),
                Some(list) => list
                    .as_array()
                    .and_then(|list| list.iter().map(Value::as_u64).collect())
                    .ok_or_else(wrong)?,
            };
            let is_dense =
                |layer: usize| dense.contains(&(layer as u64)) || !(layer + 1).is_multiple_of(step);
            let kinds: Vec<usize> =
                (0..config.num_hidden_layers).map(|layer| usize::from(is_dense(layer))).collect();
            if kinds.contains(&1) {
                config.block_kinds = kinds;
            }
        }
        Ok(())
    }

    fn write(&self, config: &ModelConfig, experts: &ExpertsConfig, map: &mut Map<String, Value>) {
        // Some classes know one name, some the other.
        for key in EXPERT_COUNT {
            set(map, [(key, json!(experts.count))]);
        }
        set(map, [(EXPERTS_PER_TOKEN[0], json!(experts.per_token)), (self.width, json!(experts.width))]);
        if !self.shared_width.is_empty() {
            set(map, [(self.shared_width, json!(experts.shared_width))]);
        }
        if self.normalise.is_some() {
            set(map, [("norm_topk_prob", json!(experts.normalise))]);
        }
        if self.sparse_layers {
            let dense = config.block_kinds.iter().enumerate().filter(|(_, kind)| **kind == 1);
            let dense: Vec<usize> = dense.map(|(layer, _)| layer).collect();
            set(map, [("decoder_sparse_step", json!(1)), ("mlp_only_layers", json!(dense))]);
        }
    }
}

/// The number that `factor` is 1 divided by: the shortest one, as the file has had it, where rounding leaves several.
fn divisor(factor: f64) -> f64 {
    let exact = 1.0 / factor;
    let short = (exact * 1e6).round() / 1e6;
    if 1.0 / short == factor { short } else { exact }
}

/// The first of `keys` that `read` finds something under.
pub(crate) fn first<T>(keys: &[&str], read: impl Fn(&str) -> Result<Option<T>>) -> Result<Option<T>> {
    let mut found = None;
    // All are looked at, so that none is unknown.
    for key in keys {
        let value = read(key)?;
        found = found.or(value);
    }
    Ok(found)
}

/// A number of layers, or one letter for each: `LLLG`, the last being the full one.
fn read_period(fields: &Fields<'_>, key: &str) -> Result<Option<usize>> {
    match fields.get(key).and_then(Value::as_str) {
        Some(letters) => match letters.strip_suffix('G') {
            Some(local) if local.bytes().all(|letter| letter == b'L') => Ok(Some(letters.len())),
            _ => Err(fields.wrong(key, "a number of layers, or L for each local one and a G behind them")),
        },
        None => fields.size(key, MAX_LAYERS),
    }
}

fn required(fields: &Fields<'_>, keys: &[&str], max: usize) -> Result<usize> {
    match first(keys, |key| fields.size(key, max))? {
        Some(size) => Ok(size),
        None => fields.required_size(keys.first().copied().unwrap_or_default(), max),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divisors_are_those_that_were_read() {
        for read in [1.0, 2.5, 3.0, 8.0, 13.0, 16.0, 49.0, 0.1, 7.3] {
            assert_eq!(divisor(1.0 / read), read);
        }
    }

    #[test]
    fn a_period_is_a_number_or_letters() {
        let read = |value: Value| {
            let map = Map::from_iter([("p".to_owned(), value)]);
            read_period(&Fields::new(std::path::Path::new("config.json"), "", &map), "p")
        };
        assert_eq!(read(json!(4)).unwrap(), Some(4));
        assert_eq!(read(json!("LLLG")).unwrap(), Some(4));
        assert_eq!(read(Value::Null).unwrap(), None);
        for wrong in [json!("LLL"), json!("LGLG"), json!(""), json!(0)] {
            assert!(read(wrong).is_err());
        }
    }
}
