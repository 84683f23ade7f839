//! What a model looks like, whatever file said so.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    families::{
        Activation, Channels, EXPERT_ROLES, Family, LinearRole, NormAxis, NormKind, NormPlace, Part, Parts,
        VectorRole,
    },
    hf::parse_config,
    stored_config::StoredConfig,
};

/// The shape of a model. Made from a Hugging Face `config.json` or from GGUF metadata.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "StoredConfig", into = "StoredConfig")]
pub struct ModelConfig {
    /// The family, as the file named it.
    pub family: &'static Family,
    /// Which of [`Family::blocks`] each block is; empty where all are the first.
    pub block_kinds: Vec<usize>,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Channels of the MLP.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Width of a head; not always `hidden_size / num_attention_heads`.
    pub head_dim: usize,
    /// Positions the model was made for.
    pub max_position_embeddings: usize,
    /// Added to the norms' mean square or variance.
    pub norm_eps: f64,
    /// Whether norms have weights; only OPT's and NanoChat's may not.
    pub norm_affine: bool,
    /// The function in the MLP.
    pub activation: Activation,
    /// Attention and MLP both read the block's input, and both are added to it; the MLP shares the attention's norm where it has
    /// none of its own.
    pub parallel: bool,
    /// Rotary tables; [`LayerAttention::rope`] chooses. None where positions are learned.
    pub rope: Vec<RopeConfig>,
    /// What differs between the blocks' attentions, one for each block.
    pub layer_attention: Vec<LayerAttention>,
    /// Factor on the attention's scores.
    pub attention_scale: AttentionScale,
    /// Scores `z` become `cap * tanh(z / cap)`.
    pub attention_softcap: Option<f64>,
    /// Factor on ALiBi's bias of scores; 0 where positions are others.
    pub alibi: f64,
    /// A factor on queries that grows with their positions.
    pub query_temperature: Option<QueryTemperature>,
    /// Factor on the embedding.
    pub embedding_multiplier: f64,
    /// Factor on what attention and MLP add to the residual stream.
    pub residual_multiplier: f64,
    /// Factor on the logits.
    pub logit_multiplier: f64,
    /// Logits `z` become `cap * tanh(z / cap)`.
    pub logit_softcap: Option<f64>,
    /// Queries, keys and values are brought within plus and minus this before they are rotated.
    pub qkv_clip: Option<f64>,
    /// The experts of blocks that have some.
    pub experts: Option<ExpertsConfig>,
    /// Heads of blocks that are recurrent.
    pub delta_net: Option<DeltaNetConfig>,
    /// Which linears have biases.
    pub biases: Biases,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// Widths of each block where blocks differ, as after pruning; empty where all have the widths above. Ask
    /// [`layer`](Self::layer).
    pub layer_shapes: Vec<LayerShape>,
    /// Width of each block's heads where blocks differ; empty where all are [`head_dim`](Self::head_dim) wide. Ask
    /// [`head_dim_of`](Self::head_dim_of).
    pub layer_head_dims: Vec<usize>,
    /// What blocks hear of tokens by themselves, beside the residual stream.
    pub per_layer_input: Option<PerLayerInputConfig>,
    /// Width of embedding and head where it isn't the residual stream's; OPT's `word_embed_proj_dim`.
    pub embedding_width: Option<usize>,
    /// Whether there is a norm before the head; only OPT-350M has none.
    pub has_final_norm: bool,
}

/// Inputs of single blocks, made of token ids and the embedding: Gemma 4's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PerLayerInputConfig {
    /// Channels of one block's input.
    pub width: usize,
    /// Rows of the table that they are looked up in.
    pub vocab_size: usize,
}

/// Factor on the attention's scores.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum AttentionScale {
    /// The width of a head to the power of -1/2.
    HeadDim,
    /// This number to the power of -1/2: Gemma's `query_pre_attn_scalar`.
    Scalar(f64),
    /// This: Granite's `attention_multiplier`.
    Factor(f64),
}

/// Queries at position `p` are multiplied by `1 + beta * ln(1 + floor(p / original_max_position_embeddings))`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueryTemperature {
    /// Its growth: `llama_4_scaling_beta`.
    pub beta: f64,
    /// Positions before it grows.
    pub original_max_position_embeddings: usize,
}

impl QueryTemperature {
    /// The factor at a position.
    pub fn at(&self, position: u32) -> f32 {
        let steps = (f64::from(position) / self.original_max_position_embeddings as f64).floor();
        (1.0 + self.beta * steps.ln_1p()) as f32
    }
}

/// Heads of gated delta nets, blocks that keep a matrix for each value head in place of keys and values: Qwen 3.5's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeltaNetConfig {
    /// Heads of queries and keys.
    pub key_heads: usize,
    /// Heads of values, a multiple of those.
    pub value_heads: usize,
    /// Width of a query or key.
    pub key_dim: usize,
    /// Width of a value.
    pub value_dim: usize,
    /// Tokens that the convolution before them sees, the token itself included.
    pub convolution: usize,
}

impl DeltaNetConfig {
    /// Values that a token keeps for the backward pass, counted from the operations of `delta.rs`: products and sums of the
    /// convolution, queries, keys and values on their way, eleven squares of a chunk, and the matrices of chunks.
    pub(crate) fn kept_values(&self) -> f64 {
        let Self { key_heads, value_heads, key_dim, value_dim, convolution } = *self;
        let [key_heads, value_heads, key_dim, value_dim, convolution] =
            [key_heads, value_heads, key_dim, value_dim, convolution].map(|size| size as f64);
        let mixed = 2.0 * key_heads * key_dim + value_heads * value_dim;
        let chunk = crate::delta::CHUNK as f64;
        (convolution + 3.0) * mixed
            + value_heads * (11.0 * chunk + 11.0 * key_dim + 8.0 * value_dim)
            + 3.0 * value_heads * key_dim * value_dim / chunk
    }
}

/// A mixture of experts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertsConfig {
    /// How many there are.
    pub count: usize,
    /// How many a token goes through.
    pub per_token: usize,
    /// Channels of each.
    pub width: usize,
    /// Channels of the one that all tokens go through; 0 where there is none.
    pub shared_width: usize,
    /// Whether the weights of the chosen are divided by their sum.
    pub normalise: bool,
    /// The function between an expert's linears, where it isn't the model's.
    pub clamped: Option<ClampedSwiglu>,
}

/// gpt-oss's function of gate and up: with `g = min(gate, limit)` and `u` = up within ± limit, `(u + 1) g sigmoid(alpha g)`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClampedSwiglu {
    /// See above.
    pub alpha: f64,
    /// See above.
    pub limit: f64,
}

/// Which linears have biases.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Biases {
    /// Queries, keys and values.
    pub qkv: bool,
    /// The attention's output.
    pub o: bool,
    /// All of the MLP.
    pub mlp: bool,
    /// The head.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub head: bool,
}

impl Biases {
    /// Those of either.
    #[must_use]
    pub const fn or(self, other: Self) -> Self {
        Self {
            qkv: self.qkv || other.qkv,
            o: self.o || other.o,
            mlp: self.mlp || other.mlp,
            head: self.head || other.head,
        }
    }

    /// Those of both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self {
            qkv: self.qkv && other.qkv,
            o: self.o && other.o,
            mlp: self.mlp && other.mlp,
            head: self.head && other.head,
        }
    }
}

/// What a block's attention sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerAttention {
    /// The number of latest positions seen (a token's own included); `None` sees all.
    pub sliding_window: Option<usize>,
    /// Index of the rotary table; `None` doesn't rotate.
    pub rope: Option<usize>,
}

/// Widths of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerShape {
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Channels of the MLP.
    pub intermediate_size: usize,
    /// Channels of each expert; 0 in models without experts, as in files of before blocks' experts could differ.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub expert_width: usize,
    /// Channels of the expert that all tokens go through; 0 where there is none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub shared_expert_width: usize,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_zero(width: &usize) -> bool {
    *width == 0
}

/// What a tensor is in a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorRole {
    /// Token embedding.
    Embedding,
    /// Output head.
    Head,
    /// A linear of a block.
    Linear,
    /// Norms, biases, learned positions.
    Plain,
}

/// A tensor that a model of some shape has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorShape {
    /// Its name in checkpoints.
    pub name: String,
    /// Sizes in checkpoints, outermost first: `[d_output, d_input]` of a linear.
    pub shape: Vec<usize>,
    /// What it is.
    pub role: TensorRole,
}

impl ModelConfig {
    /// The shape that the text of a `config.json` describes.
    ///
    /// # Errors
    /// Text that isn't a JSON object, an unknown family, or whatever the family's keys must not say.
    ///
    /// ```
    /// use kiln_models::config::ModelConfig;
    /// let config = ModelConfig::from_json(
    ///     r#"{"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    ///         "num_hidden_layers": 32, "num_attention_heads": 32}"#,
    /// )?;
    /// assert_eq!(config.parameters(), 6_738_415_616);
    /// # Ok::<(), kiln_models::Error>(())
    /// ```
    pub fn from_json(text: &str) -> Result<Self> {
        let map = serde_json::from_str(text).map_err(|error| Error::File {
            path: "config.json".into(),
            field: "content".into(),
            expected: "a JSON object".into(),
            found: error.to_string(),
        })?;
        parse_config(&map)
    }

    /// A model of a family without anything: no blocks, all widths 0, factors 1.
    pub(crate) fn bare(family: &'static Family) -> Self {
        Self {
            family,
            block_kinds: Vec::new(),
            vocab_size: 0,
            hidden_size: 0,
            intermediate_size: 0,
            num_hidden_layers: 0,
            num_attention_heads: 0,
            num_key_value_heads: 0,
            head_dim: 0,
            max_position_embeddings: 0,
            norm_eps: family.class.norm_eps,
            norm_affine: true,
            activation: family.class.activations[0].1,
            parallel: family.class.parallel,
            rope: Vec::new(),
            layer_attention: Vec::new(),
            attention_scale: AttentionScale::HeadDim,
            attention_softcap: None,
            alibi: 0.0,
            query_temperature: None,
            embedding_multiplier: 1.0,
            residual_multiplier: 1.0,
            logit_multiplier: 1.0,
            logit_softcap: None,
            qkv_clip: None,
            experts: None,
            delta_net: None,
            biases: Biases::default(),
            tie_word_embeddings: false,
            layer_shapes: Vec::new(),
            layer_head_dims: Vec::new(),
            per_layer_input: None,
            embedding_width: None,
            has_final_norm: true,
        }
    }

    /// The window of every block.
    pub fn sliding_windows(&self) -> Vec<Option<usize>> {
        self.layer_attention.iter().map(|layer| layer.sliding_window).collect()
    }

    /// Norms and linears of block `index`.
    pub fn parts(&self, index: usize) -> Parts {
        let kind = self.block_kinds.get(index).copied().unwrap_or(0);
        self.family.blocks[kind]
    }

    /// Widths of block `index`.
    pub fn layer(&self, index: usize) -> LayerShape {
        self.layer_shapes.get(index).copied().unwrap_or(self.common_shape())
    }

    /// Width of the heads of block `index`.
    pub fn head_dim_of(&self, index: usize) -> usize {
        self.layer_head_dims.get(index).copied().unwrap_or(self.head_dim)
    }

    /// Width of the heads that rotary table `table` turns.
    pub fn rotary_head_dim(&self, table: usize) -> usize {
        let user = self.layer_attention.iter().position(|layer| layer.rope == Some(table));
        user.map_or(self.head_dim, |index| self.head_dim_of(index))
    }

    /// The block whose keys and values block `index` attends to: itself, or the last one of the same window that has its own.
    ///
    /// # Panics
    /// If there is none.
    pub fn key_value_source(&self, index: usize) -> usize {
        let found = self.find_key_value_source(index);
        found.unwrap_or_else(|| panic!("block {index} attends to keys of an earlier one, and there is none"))
    }

    pub(crate) fn find_key_value_source(&self, index: usize) -> Option<usize> {
        let slides = |block: usize| self.layer_attention[block].sliding_window.is_some();
        (0..=index).rev().find(|block| {
            self.parts(*block).has_keys() && (*block == index || slides(*block) == slides(index))
        })
    }

    /// The blocks whose keys and values others attend to.
    pub fn shared_key_values(&self) -> Vec<usize> {
        // The first kind of blocks, which models without a list of kinds are made of, has keys.
        let kinds = self.block_kinds.iter().enumerate();
        let sharers = kinds.filter(|(_, kind)| !self.family.blocks[**kind].has_keys());
        let sources: BTreeSet<usize> = sharers.map(|(index, _)| self.key_value_source(index)).collect();
        sources.into_iter().collect()
    }

    /// Channels behind the hidden state in which the residual stream carries those keys and values.
    pub(crate) fn carried_width(&self) -> usize {
        let sources = self.shared_key_values().into_iter();
        sources.map(|source| 2 * self.width(Channels::KeyValue, source)).sum()
    }

    /// The widths that blocks without their own have.
    pub(crate) fn common_shape(&self) -> LayerShape {
        LayerShape {
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads,
            intermediate_size: self.intermediate_size,
            expert_width: self.experts.map_or(0, |experts| experts.width),
            shared_expert_width: self.experts.map_or(0, |experts| experts.shared_width),
        }
    }

    /// Gives each block its widths; those that all blocks share become the model's.
    pub fn set_layers(&mut self, shapes: Vec<LayerShape>) {
        let shared = |width: fn(&LayerShape) -> usize, own: usize| match shapes.first().map(width) {
            Some(first) if shapes.iter().all(|shape| width(shape) == first) => first,
            _ => own,
        };
        let own = self.common_shape();
        // One divides the other, so both are shared or neither.
        let heads = |shape: &LayerShape| [shape.num_attention_heads, shape.num_key_value_heads];
        if let Some(first) =
            shapes.first().map(heads).filter(|first| shapes.iter().all(|s| heads(s) == *first))
        {
            [self.num_attention_heads, self.num_key_value_heads] = first;
        }
        self.intermediate_size = shared(|shape| shape.intermediate_size, own.intermediate_size);
        if let Some(experts) = &mut self.experts {
            experts.width = shared(|shape| shape.expert_width, own.expert_width);
            experts.shared_width = shared(|shape| shape.shared_expert_width, own.shared_expert_width);
        }
        let common = self.common_shape();
        self.layer_shapes = if shapes.iter().all(|shape| *shape == common) { Vec::new() } else { shapes };
    }

    /// Gives each block's heads their width; equal ones become the model's.
    pub fn set_head_dims(&mut self, head_dims: Vec<usize>) {
        self.layer_head_dims.clear();
        match head_dims.windows(2).all(|pair| pair[0] == pair[1]) {
            true => self.head_dim = head_dims.first().copied().unwrap_or(self.head_dim),
            false => self.layer_head_dims = head_dims,
        }
    }

    /// How many channels of a kind block `index` has.
    pub fn width(&self, channels: Channels, index: usize) -> usize {
        let (shape, head_dim) = (self.layer(index), self.head_dim_of(index));
        match channels {
            Channels::Hidden => self.hidden_size,
            Channels::Query => shape.num_attention_heads * head_dim,
            Channels::KeyValue => shape.num_key_value_heads * head_dim,
            Channels::QueryKeyValue(_) => {
                (shape.num_attention_heads + 2 * shape.num_key_value_heads) * head_dim
            }
            Channels::Mlp => shape.intermediate_size,
            Channels::GateUp => 2 * shape.intermediate_size,
            Channels::Expert => shape.expert_width,
            Channels::SharedExpert => shape.shared_expert_width,
            Channels::PerLayer => self.per_layer_input.map_or(0, |inputs| inputs.width),
            Channels::Experts => self.experts.map_or(0, |experts| experts.count),
            Channels::One => 1,
            Channels::GatedQuery => 2 * shape.num_attention_heads * head_dim,
            Channels::DeltaMixed => self
                .delta_net
                .map_or(0, |delta| 2 * delta.key_heads * delta.key_dim + delta.value_heads * delta.value_dim),
            Channels::DeltaValue => self.delta_net.map_or(0, |delta| delta.value_heads * delta.value_dim),
            Channels::DeltaHeads => self.delta_net.map_or(0, |delta| delta.value_heads),
        }
    }

    /// `[d_input, d_output]` of a linear of block `index`.
    pub fn linear_shape(&self, role: LinearRole, index: usize) -> [usize; 2] {
        role.channels().map(|channels| self.width(channels, index))
    }

    /// Width of a norm of block `index`.
    pub fn norm_width(&self, place: NormPlace, index: usize) -> usize {
        match place.axis() {
            NormAxis::Hidden => self.hidden_size,
            NormAxis::Head => self.head_dim_of(index),
            NormAxis::Queries => self.width(Channels::Query, index),
            NormAxis::Keys => self.width(Channels::KeyValue, index),
        }
    }

    /// Whether linears of a role have biases.
    pub fn has_bias(&self, role: LinearRole) -> bool {
        match role {
            LinearRole::Query
            | LinearRole::GatedQuery
            | LinearRole::Key
            | LinearRole::Value
            | LinearRole::QueryKeyValue(_) => self.biases.qkv,
            LinearRole::Output => self.biases.o,
            LinearRole::Router
            | LinearRole::SharedExpertGate
            | LinearRole::DeltaMixed
            | LinearRole::DeltaGate
            | LinearRole::DeltaStrength
            | LinearRole::DeltaDecay
            | LinearRole::DeltaOutput => false,
            _ => self.biases.mlp,
        }
    }

    /// Factor on the attention scores of block `index`.
    pub fn attention_scale(&self, index: usize) -> f32 {
        match self.attention_scale {
            AttentionScale::HeadDim => (self.head_dim_of(index) as f32).powf(-0.5),
            AttentionScale::Scalar(scalar) => scalar.powf(-0.5) as f32,
            AttentionScale::Factor(factor) => factor as f32,
        }
    }

    /// The shape of a parameter of block `index` that is neither a linear's nor a norm's.
    pub fn vector_shape(&self, role: VectorRole, index: usize) -> Vec<usize> {
        match role {
            VectorRole::XieluPositive | VectorRole::XieluNegative | VectorRole::LayerScalar => vec![1],
            VectorRole::XieluBeta | VectorRole::XieluEps => Vec::new(),
            VectorRole::RouterBias | VectorRole::ExpertScales => {
                vec![self.experts.map_or(0, |experts| experts.count)]
            }
            VectorRole::RouterScale => vec![self.hidden_size],
            VectorRole::DeltaConvolution => {
                let width = self.delta_net.map_or(0, |delta| delta.convolution);
                vec![self.width(Channels::DeltaMixed, index), 1, width]
            }
            VectorRole::DeltaLogRate | VectorRole::DeltaTimeBias => {
                vec![self.width(Channels::DeltaHeads, index)]
            }
            VectorRole::DeltaNorm => vec![self.delta_net.map_or(0, |delta| delta.value_dim)],
            VectorRole::Sinks => vec![self.layer(index).num_attention_heads],
        }
    }

    /// The linears of block `index`, experts' included, by their paths within the block, in the order in which data flows.
    pub fn linears(&self, index: usize) -> Vec<(String, LinearRole)> {
        self.parts(index).iter().flat_map(|part| self.linears_of(part)).collect()
    }

    /// The linears of a part, by their paths within the block.
    fn linears_of(&self, part: &Part) -> Vec<(String, LinearRole)> {
        match part {
            Part::Linear(linear) => vec![(linear.name.to_owned(), linear.role)],
            Part::Experts(experts) => {
                let count = self.experts.map_or(0, |experts| experts.count);
                let kinds = || EXPERT_ROLES.into_iter().enumerate();
                let each = (0..count).flat_map(|expert| kinds().map(move |kind| (expert, kind)));
                each.map(|(expert, (kind, role))| (experts.path(expert, kind), role)).collect()
            }
            Part::Norm(_) | Part::Vector(_) => Vec::new(),
        }
    }

    /// All tensors of a model of this shape, a tied head counted once, in the order in which they are loaded.
    pub fn tensors(&self) -> Vec<TensorShape> {
        let (names, hidden) = (&self.family.names, self.hidden_size);
        let width = self.embedding_width.unwrap_or(hidden);
        let mut list = TensorList { tensors: Vec::new(), biased_norms: self.family.norm == NormKind::Layer };
        list.add(format!("{}.weight", names.embedding), [self.vocab_size, width], TensorRole::Embedding);
        if let (Some(paths), Some(width)) = (names.projections, self.embedding_width) {
            for (path, shape) in paths.into_iter().zip([[hidden, width], [width, hidden]]) {
                list.add(format!("{path}.weight"), shape, TensorRole::Plain);
            }
        }
        if let Some(positions) = names.positions {
            let rows = self.max_position_embeddings + positions.offset;
            list.add(format!("{}.weight", positions.path), [rows, hidden], TensorRole::Plain);
        }
        if let Some(path) = names.embedding_norm {
            list.norm(path, hidden, self.norm_affine);
        }
        if let (Some(inputs), Some(paths)) = (self.per_layer_input, names.per_layer) {
            let width = inputs.width * self.num_hidden_layers;
            let table = [inputs.vocab_size, width];
            list.add(format!("{}.weight", paths.embedding), table, TensorRole::Embedding);
            list.add(format!("{}.weight", paths.projection), [width, hidden], TensorRole::Plain);
            list.norm(paths.norm, inputs.width, self.norm_affine);
        }
        for index in 0..self.num_hidden_layers {
            for part in self.parts(index).iter() {
                let path = self.family.path(index, part.name());
                match part {
                    Part::Norm(norm) => {
                        list.norm(&path, self.norm_width(norm.place, index), self.norm_affine);
                    }
                    Part::Linear(_) | Part::Experts(_) => {
                        for (name, role) in self.linears_of(part) {
                            let path = self.family.path(index, &name);
                            let [d_input, d_output] = self.linear_shape(role, index);
                            if self.has_bias(role) {
                                list.add(format!("{path}.bias"), [d_output], TensorRole::Plain);
                            }
                            let kind = match role.stays_dense() {
                                true => TensorRole::Plain,
                                false => TensorRole::Linear,
                            };
                            list.add(format!("{path}.weight"), [d_output, d_input], kind);
                        }
                    }
                    Part::Vector(vector) => {
                        list.add(path, self.vector_shape(vector.role, index), TensorRole::Plain);
                    }
                }
            }
        }
        list.norm(names.final_norm, hidden, self.norm_affine && self.has_final_norm);
        if self.biases.head {
            list.add(format!("{}.bias", names.head), [self.vocab_size], TensorRole::Plain);
        }
        if !self.tie_word_embeddings {
            list.add(format!("{}.weight", names.head), [self.vocab_size, width], TensorRole::Head);
        }
        list.tensors
    }

    /// Parameters of a model of this shape: weights, biases, norms and tables, a tied head counted once.
    ///
    /// ```
    /// use kiln_models::Checkpoint;
    /// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/models/tiny-llama");
    /// assert_eq!(Checkpoint::open(folder)?.config().parameters(), 1_967_808);
    /// # Ok::<(), kiln_models::Error>(())
    /// ```
    pub fn parameters(&self) -> u64 {
        let count = |tensor: &TensorShape| tensor.shape.iter().map(|&size| size as u64).product::<u64>();
        self.tensors().iter().map(count).sum()
    }
}

struct TensorList {
    tensors: Vec<TensorShape>,
    biased_norms: bool,
}

impl TensorList {
    fn add(&mut self, name: String, shape: impl Into<Vec<usize>>, role: TensorRole) {
        self.tensors.push(TensorShape { name, shape: shape.into(), role });
    }

    fn norm(&mut self, path: &str, width: usize, affine: bool) {
        if affine {
            self.add(format!("{path}.weight"), [width], TensorRole::Plain);
            if self.biased_norms {
                self.add(format!("{path}.bias"), [width], TensorRole::Plain);
            }
        }
    }
}

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// How frequencies are changed for longer contexts.
    pub scaling: RopeScaling,
    /// The share of a head's channels that are rotated, the first ones; above 0, at most 1.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub partial_rotary_factor: f64,
}

fn one() -> f64 {
    1.0
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_one(factor: &f64) -> bool {
    *factor == 1.0
}

impl RopeConfig {
    /// Plain frequencies of all channels.
    pub fn plain(theta: f64) -> Self {
        Self { theta, scaling: RopeScaling::Default, partial_rotary_factor: 1.0 }
    }

    /// The base of the frequencies with the stretch that [`RopeScaling::Alpha`] gives it.
    pub(crate) fn stretched_theta(&self, head_dim: usize) -> f64 {
        let d = head_dim as f64;
        match self.scaling {
            RopeScaling::Alpha { alpha } => self.theta * alpha.powf(d / (d - 2.0)),
            _ => self.theta,
        }
    }

    /// Channels of a head that are rotated: an even number of them.
    pub fn rotated(&self, head_dim: usize) -> usize {
        match self.scaling {
            // Its pairs are those of the whole head, and some turn by nothing.
            RopeScaling::Proportional { .. } => head_dim,
            _ => (head_dim as f64 * self.partial_rotary_factor) as usize / 2 * 2,
        }
    }
}

/// Context extension, as transformers' `rope_type` defines it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase")]
#[non_exhaustive]
pub enum RopeScaling {
    /// Frequencies as they are.
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        /// Stretch.
        factor: f64,
    },
    /// Theta grows with the sequence once it is longer than `original_max_position_embeddings`.
    Dynamic {
        /// Stretch.
        factor: f64,
        /// Positions of pre-training.
        original_max_position_embeddings: usize,
    },
    /// YaRN: low frequencies stretched, high ones kept, attention sharpened.
    Yarn {
        /// Stretch.
        factor: f64,
        /// Positions of pre-training.
        original_max_position_embeddings: usize,
        /// Rotations above which a frequency is kept (default 32).
        beta_fast: f64,
        /// Rotations below which a frequency is stretched (default 1).
        beta_slow: f64,
        /// Factor on cos and sin, resolved (from `attention_factor`, or from `mscale` and `mscale_all_dim`, or `0.1 ln(factor) + 1`).
        attention_factor: f64,
        /// Whether the correction range is rounded outwards to whole dimensions (default true).
        truncate: bool,
    },
    /// Frequencies of the whole head's width, of which the first `partial_rotary_factor` are kept and the others are 0: Gemma 4's.
    Proportional {
        /// Stretch of those that are kept.
        factor: f64,
    },
    /// A theta that is stretched whatever the length: HunYuan's `alpha`.
    Alpha {
        /// Theta is multiplied by this to the power of `n / (n - 2)`, with n rotated channels.
        alpha: f64,
    },
    /// LongRoPE: each frequency divided by a factor of its own, from one list or, for sequences longer than
    /// `original_max_position_embeddings`, another.
    LongRope {
        /// Of short sequences, one for each pair of channels.
        short_factor: Vec<f64>,
        /// Of long ones.
        long_factor: Vec<f64>,
        /// Positions of pre-training.
        original_max_position_embeddings: usize,
        /// Factor on cos and sin.
        attention_factor: f64,
    },
    /// LLaMA 3's: low frequencies stretched, high ones kept, smooth between.
    Llama3 {
        /// Stretch.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are stretched.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Positions of pre-training.
        original_max_position_embeddings: usize,
    },
}

/// Ids with a meaning, from `config.json`, `generation_config.json` or GGUF metadata.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpecialTokens {
    /// Begin of sequence.
    pub bos: Option<u32>,
    /// Ids that end generation.
    pub eos: Vec<u32>,
    /// Padding.
    pub pad: Option<u32>,
}
