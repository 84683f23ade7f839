//! What a model looks like, whatever file said so.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The shape of a model. Made from a Hugging Face `config.json` or from GGUF metadata.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "model_type", rename_all = "lowercase")]
#[non_exhaustive]
pub enum ModelConfig {
    /// LLaMA 1–3, Mistral, Qwen2, Qwen3, SmolLM2.
    Llama(LlamaConfig),
    /// OPT.
    Opt(OptConfig),
}

/// The LLaMA family. Fields are named as in `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LlamaConfig {
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
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Rotary positions.
    pub rope: RopeConfig,
    /// For each block, the number of latest positions it sees (itself included); `None` sees all. Mistral, some Qwen2.
    pub sliding_window: Vec<Option<usize>>,
    /// Biases on q, k and v (Qwen2; LLaMA's `attention_bias`).
    pub qkv_bias: bool,
    /// Bias on o (LLaMA's `attention_bias`).
    pub o_bias: bool,
    /// Biases on gate, up and down.
    pub mlp_bias: bool,
    /// RMSNorm over each head of q and k (Qwen3).
    pub qk_norm: bool,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// Widths of each block where blocks differ, as after pruning; empty where all have the widths above. Ask
    /// [`layer`](Self::layer).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layer_shapes: Vec<LayerShape>,
}

/// Widths of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerShape {
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides `num_attention_heads`, and equals it in OPT.
    pub num_key_value_heads: usize,
    /// Channels of the MLP (`ffn_dim` of OPT).
    pub intermediate_size: usize,
}

impl LlamaConfig {
    /// Widths of block `index`.
    pub fn layer(&self, index: usize) -> LayerShape {
        self.layer_shapes.get(index).copied().unwrap_or(LayerShape {
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads,
            intermediate_size: self.intermediate_size,
        })
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
}

/// Fails unless a linear or table has the shape that a configuration gives it.
pub(crate) fn check_shape(path: &str, expected: [usize; 2], found: [usize; 2]) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::Argument {
        name: path.into(),
        expected: format!("shape {expected:?}, as the configuration says"),
        found: format!("{found:?}"),
    })
}

/// Fails unless there are as many of something as a configuration says.
pub(crate) fn check_count(what: &str, expected: usize, found: usize) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::Argument {
        name: what.into(),
        expected: format!("{expected}, as the configuration says"),
        found: found.to_string(),
    })
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

/// OPT with pre-norm blocks (all sizes but 350M, which is refused). Fields are named as in `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OptConfig {
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Channels of the MLP.
    pub ffn_dim: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Width of a head; `hidden_size / num_attention_heads` unless heads or width were pruned.
    pub head_dim: usize,
    /// Learned positions; the table holds two more rows (offset 2).
    pub max_position_embeddings: usize,
    /// Biases on all linears (`enable_bias`).
    pub bias: bool,
    /// Whether LayerNorms have weights and biases (`layer_norm_elementwise_affine`).
    pub layer_norm_affine: bool,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// Widths of each block where blocks differ, as after pruning; empty where all have the widths above. Ask
    /// [`layer`](Self::layer).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layer_shapes: Vec<LayerShape>,
}

impl OptConfig {
    /// Widths of block `index`.
    pub fn layer(&self, index: usize) -> LayerShape {
        self.layer_shapes.get(index).copied().unwrap_or(LayerShape {
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_attention_heads,
            intermediate_size: self.ffn_dim,
        })
    }

    /// Gives each block its widths; equal ones become the model's.
    pub fn set_layers(&mut self, shapes: Vec<LayerShape>) {
        self.layer_shapes = shapes;
        if let Some(shape) = uniform(&self.layer_shapes) {
            self.layer_shapes.clear();
            self.num_attention_heads = shape.num_attention_heads;
            self.ffn_dim = shape.intermediate_size;
        }
    }
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
