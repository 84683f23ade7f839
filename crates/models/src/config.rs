//! What a model looks like, whatever file said so.

use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    families::{Channels, Family, LinearRole, NormKind, NormPlace, Part},
    hf::parse_config,
    stored_config::StoredConfig,
};

/// The shape of a model. Made from a Hugging Face `config.json` or from GGUF metadata.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "StoredConfig", into = "StoredConfig")]
pub struct ModelConfig {
    /// The family, as the file named it.
    pub family: &'static Family,
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
    /// Whether norms have weights; only OPT's may not.
    pub norm_affine: bool,
    /// Rotary tables; [`LayerAttention::rope`] chooses. None where positions are learned.
    pub rope: Vec<RopeConfig>,
    /// What differs between the blocks' attentions, one for each block.
    pub layer_attention: Vec<LayerAttention>,
    /// The attention scores' scale is this to the power of -1/2; `None` is `head_dim`.
    pub query_pre_attn_scalar: Option<f64>,
    /// Factor on the embedding.
    pub embedding_multiplier: f64,
    /// Logits `z` become `cap * tanh(z / cap)`.
    pub logit_softcap: Option<f64>,
    /// Which linears of the blocks have biases.
    pub biases: Biases,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// Widths of each block where blocks differ, as after pruning; empty where all have the widths above. Ask
    /// [`layer`](Self::layer).
    pub layer_shapes: Vec<LayerShape>,
}

/// Which linears of the blocks have biases.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Biases {
    /// Queries, keys and values.
    pub qkv: bool,
    /// The attention's output.
    pub o: bool,
    /// All of the MLP.
    pub mlp: bool,
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

    /// The window of every block.
    pub fn sliding_windows(&self) -> Vec<Option<usize>> {
        self.layer_attention.iter().map(|layer| layer.sliding_window).collect()
    }

    /// Widths of block `index`.
    pub fn layer(&self, index: usize) -> LayerShape {
        self.layer_shapes.get(index).copied().unwrap_or(self.common_shape())
    }

    /// The widths that blocks without their own have.
    pub(crate) fn common_shape(&self) -> LayerShape {
        LayerShape {
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads,
            intermediate_size: self.intermediate_size,
        }
    }

    /// Gives each block its widths; equal ones become the model's.
    pub fn set_layers(&mut self, shapes: Vec<LayerShape>) {
        self.layer_shapes = shapes;
        if let Some(shape) = uniform(&self.layer_shapes) {
            self.layer_shapes.clear();
            self.num_attention_heads = shape.num_attention_heads;
            self.num_key_value_heads = shape.num_key_value_heads;
            self.intermediate_size = shape.intermediate_size;
        }
    }

    /// How many channels of a kind block `index` has.
    pub fn width(&self, channels: Channels, index: usize) -> usize {
        let shape = self.layer(index);
        match channels {
            Channels::Hidden => self.hidden_size,
            Channels::Query => shape.num_attention_heads * self.head_dim,
            Channels::KeyValue => shape.num_key_value_heads * self.head_dim,
            Channels::Mlp => shape.intermediate_size,
        }
    }

    /// `[d_input, d_output]` of a linear of block `index`.
    pub fn linear_shape(&self, role: LinearRole, index: usize) -> [usize; 2] {
        role.channels().map(|channels| self.width(channels, index))
    }

    /// Width of a norm of the blocks.
    pub fn norm_width(&self, place: NormPlace) -> usize {
        if place.is_head() { self.head_dim } else { self.hidden_size }
    }

    /// Whether linears of a role have biases.
    pub fn has_bias(&self, role: LinearRole) -> bool {
        match role {
            LinearRole::Query | LinearRole::Key | LinearRole::Value => self.biases.qkv,
            LinearRole::Output => self.biases.o,
            LinearRole::Gate | LinearRole::Up | LinearRole::Down => self.biases.mlp,
        }
    }

    /// Factor on the attention scores.
    pub fn attention_scale(&self) -> f32 {
        match self.query_pre_attn_scalar {
            Some(scalar) => scalar.powf(-0.5) as f32,
            None => (self.head_dim as f32).powf(-0.5),
        }
    }

    /// All tensors of a model of this shape, a tied head counted once, in the order in which they are loaded.
    pub fn tensors(&self) -> Vec<TensorShape> {
        let (names, hidden) = (&self.family.names, self.hidden_size);
        let mut list = TensorList { tensors: Vec::new(), biased_norms: self.family.norm == NormKind::Layer };
        list.add(format!("{}.weight", names.embedding), [self.vocab_size, hidden], TensorRole::Embedding);
        if let Some(positions) = names.positions {
            let rows = self.max_position_embeddings + positions.offset;
            list.add(format!("{}.weight", positions.path), [rows, hidden], TensorRole::Plain);
        }
        for index in 0..self.num_hidden_layers {
            for part in self.family.block {
                let path = self.family.path(index, part.name());
                match part {
                    Part::Norm(norm) => list.norm(&path, self.norm_width(norm.place), self.norm_affine),
                    Part::Linear(linear) => {
                        let [d_input, d_output] = self.linear_shape(linear.role, index);
                        if self.has_bias(linear.role) {
                            list.add(format!("{path}.bias"), [d_output], TensorRole::Plain);
                        }
                        list.add(format!("{path}.weight"), [d_output, d_input], TensorRole::Linear);
                    }
                }
            }
        }
        list.norm(names.final_norm, hidden, self.norm_affine);
        if !self.tie_word_embeddings {
            list.add(format!("{}.weight", names.head), [self.vocab_size, hidden], TensorRole::Head);
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

/// The widths of all blocks, if they are the same.
fn uniform(shapes: &[LayerShape]) -> Option<LayerShape> {
    let first = *shapes.first()?;
    shapes.iter().all(|shape| *shape == first).then_some(first)
}

/// Rotary position embedding, half-split as in Hugging Face's models.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// How frequencies are changed for longer contexts.
    pub scaling: RopeScaling,
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
