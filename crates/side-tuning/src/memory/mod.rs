//! What a training step holds, as a function of its configuration.
//!
//! [`estimate`] counts the tensors of Kiln's own steps: f32, fused attention (no stored scores), logits a few rows at a
//! time. [`paper`] has the formula behind the published figures: 16 bits, stored scores, no logits.
//!
//! With n tokens in a batch, a LLaMA block keeps for each token, in values (d width, q and v query and key channels, f
//! MLP channels, a heads, r LoRA rank):
//!
//! | method | values per token and block |
//! | --- | --- |
//! | full | `4 d + 2 q + 2 v + 3 f + a` |
//! | LoRA, QLoRA | the same and `7 r` |
//! | side tuning | the same of the side block, and `3 d'` (gate and LayerNorm), `d + 2 k` (adapter: the backbone's state and two low-rank ones) |
//!
//! With recomputation a block keeps its input only, `n d` (side tuning: `n (d + d')`), and one block's values exist at a
//! time. Beside them: weights; 8 bytes of optimizer state and 4 of gradient for each trained value; the logits of one
//! chunk.

mod flops;
pub mod paper;

pub use flops::step_macs;
use kiln_models::{
    Recompute,
    config::{LlamaConfig, ModelConfig, OptConfig},
};

use crate::{Downsample, Error, Result, SideConfig, network::width_and_layers};

/// What is trained.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Method {
    /// Every weight.
    Full,
    /// LoRA on every linear of the blocks; over packed weights it is QLoRA.
    Lora {
        /// Rank of the adapters.
        rank: usize,
    },
    /// A side network: QST over packed weights, LST over dense ones.
    Side(SideConfig),
}

/// The shape of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Rows of a micro-batch.
    pub batch: usize,
    /// Tokens of a row.
    pub seq_len: usize,
    /// What is computed again.
    pub recompute: Recompute,
    /// Rows of logits held at once.
    pub logit_rows: usize,
}

/// Bytes that a step holds at its peak.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MemoryEstimate {
    /// The model's weights, trained ones included.
    pub weights: f64,
    /// AdamW's averages.
    pub optimizer: f64,
    /// Gradients of what is trained.
    pub gradients: f64,
    /// What is kept for the backward pass.
    pub activations: f64,
    /// The most that exists beside the activations for a moment: a block's values on the way, or the head's (a chunk of
    /// logits, the last state and its gradient, the gradient of a trained tied embedding).
    pub transient: f64,
    /// What AdamW makes on the way for the largest trained tensor.
    pub update: f64,
    /// Values that are trained.
    pub trainable: f64,
}

/// What a process holds beside a step's tensors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ProcessConstants {
    /// Program, runtime, thread buffers, tokenizer, data: bytes.
    pub base: f64,
    /// Resident over live bytes of gradients, activations and transient tensors: freed memory that the allocator hasn't
    /// returned.
    pub slack: f64,
}

impl ProcessConstants {
    /// Of a program on the CPU, fixed by the embedded model's steps (`tests/memory.rs`) on Linux with two threads.
    pub const CPU: Self = Self { base: 30e6, slack: 1.05 };
}

impl MemoryEstimate {
    /// Live bytes at the peak. Activations go while gradients come, so the larger of the two counts, each with what
    /// exists beside it for a moment.
    pub fn total(&self) -> f64 {
        self.weights + self.optimizer + self.moving()
    }

    /// The peak of a process.
    pub fn peak_rss(&self, constants: &ProcessConstants) -> f64 {
        constants.base + self.weights + self.optimizer + constants.slack * self.moving()
    }

    fn moving(&self) -> f64 {
        (self.activations + self.transient).max(self.gradients + self.update)
    }
}

/// Sizes of a block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Block {
    pub width: f64,
    pub query: f64,
    pub key: f64,
    pub inner: f64,
    pub heads: f64,
    /// Whether the MLP is gated (LLaMA).
    pub gated: bool,
}

impl Block {
    pub fn of(model: &ModelConfig) -> Result<Self> {
        match model {
            ModelConfig::Llama(config) => Ok(Self::llama(config)),
            ModelConfig::Opt(config) => Ok(Self::opt(config)),
            _ => Err(Error::argument("model", "a LLaMA-family or OPT model", "another")),
        }
    }

    fn llama(config: &LlamaConfig) -> Self {
        Self {
            width: config.hidden_size as f64,
            query: (config.num_attention_heads * config.head_dim) as f64,
            key: (config.num_key_value_heads * config.head_dim) as f64,
            inner: config.intermediate_size as f64,
            heads: config.num_attention_heads as f64,
            gated: true,
        }
    }

    fn opt(config: &OptConfig) -> Self {
        let query = (config.num_attention_heads * config.head_dim) as f64;
        Self {
            width: config.hidden_size as f64,
            query,
            key: query,
            inner: config.ffn_dim as f64,
            heads: config.num_attention_heads as f64,
            gated: false,
        }
    }

    /// Values of the linears.
    pub fn linears(&self) -> f64 {
        let products = if self.gated { 3.0 } else { 2.0 };
        self.width * (2.0 * self.query + 2.0 * self.key + products * self.inner)
    }

    /// Values of LoRA adapters of rank 1 on all linears.
    pub fn low_rank(&self) -> f64 {
        let Self { width, query, key, inner, gated, .. } = *self;
        let products = if gated { 3.0 } else { 2.0 };
        2.0 * (width + query) + 2.0 * (width + key) + products * (width + inner)
    }

    fn slots(&self) -> f64 {
        if self.gated { 7.0 } else { 6.0 }
    }

    /// Values that a token keeps when the inputs of all linears are needed. `norms` says whether norms are trained,
    /// which only OPT's, made of several operations, keep more for.
    fn kept(&self, norms: bool) -> f64 {
        let Self { width, query, key, inner, heads, gated } = *self;
        let attention = 2.0 * query + 2.0 * key + heads;
        if gated {
            // Residual and normed state twice, gate, up and their product.
            4.0 * width + attention + 3.0 * inner
        } else {
            // Centred and normed state twice, scaled ones where gains are trained; the activation.
            (if norms { 6.0 } else { 4.0 }) * width + attention + inner
        }
    }

    /// Values of a token that exist at once in a pass through the MLP, forwards without a graph or backwards: residual,
    /// normed state, gate and up, or their gradients.
    fn passing(&self) -> f64 {
        2.0 * self.width + if self.gated { 2.0 } else { 1.0 } * self.inner
    }
}

/// Bytes of a step of `method` on a model whose weights take `weight_bytes` as loaded
/// ([`StorageReport::total_bytes`](kiln_quant_core::StorageReport::total_bytes)).
///
/// # Errors
/// A side network that doesn't fit the model.
pub fn estimate(
    model: &ModelConfig,
    weight_bytes: usize,
    method: &Method,
    step: &Step,
) -> Result<MemoryEstimate> {
    const VALUE: f64 = 4.0;
    let (block, [_, layers]) = (Block::of(model)?, width_and_layers(model));
    let vocabulary = vocabulary(model);
    let (tokens, layers) = ((step.batch * step.seq_len) as f64, layers as f64);
    let logits = step.logit_rows.min(step.batch * step.seq_len) as f64 * vocabulary;
    let again = step.recompute == Recompute::Block;
    // Of a token: kept by a block's backward pass; a block's input; existing for a moment while blocks run without a
    // graph, and backwards.
    let (kept, input, forward, backward);
    let (trainable, largest);
    match method {
        Method::Full => {
            trainable = weight_bytes as f64 / VALUE;
            largest = vocabulary * block.width;
            (kept, input) = (block.kept(true), block.width);
            (forward, backward) = (if again { block.passing() } else { 0.0 }, block.passing());
        }
        Method::Lora { rank } => {
            let rank = *rank as f64;
            trainable = layers * rank * block.low_rank();
            largest = 0.0;
            (kept, input) = (block.kept(false) + rank * block.slots(), block.width);
            (forward, backward) = (if again { block.passing() } else { 0.0 }, block.passing());
        }
        Method::Side(config) => {
            let side = Block::of(&config.side_model(model)?)?;
            trainable = config.parameter_counts(model)?.total() as f64;
            largest = 0.0;
            (kept, input) = (side.kept(true) + downsampling(config, &block, &side), block.width + side.width);
            (forward, backward) = (block.passing(), side.passing() + 2.0 * input);
        }
    }
    let full = matches!(method, Method::Full);
    let trained_weights = if full { 0.0 } else { VALUE * trainable };
    let (activations, backward) =
        if again { ((layers + 1.0) * input, backward + kept) } else { (layers * kept + input, backward) };
    // The gradient of the last state; of a trained head, the sum so far and a chunk's part.
    let head = tokens * input + logits + 2.0 * largest;
    Ok(MemoryEstimate {
        weights: weight_bytes as f64 + trained_weights,
        optimizer: 2.0 * VALUE * trainable,
        gradients: VALUE * trainable,
        activations: VALUE * tokens * activations,
        transient: VALUE * head.max(tokens * forward.max(backward)),
        update: 3.0 * VALUE * largest,
        trainable,
    })
}

/// Values that a token keeps for the downsampling and the gate of a block.
fn downsampling(config: &SideConfig, block: &Block, side: &Block) -> f64 {
    let weights = match config.downsample {
        Downsample::Linear => block.width,
        Downsample::Lora => block.width + config.rank as f64,
        Downsample::Adapter => block.width + 2.0 * config.rank as f64,
        Downsample::MaxPool | Downsample::AvgPool => 0.0,
    };
    weights + side.width * if config.downsample_norm { 3.0 } else { 1.0 }
}

pub(crate) fn vocabulary(model: &ModelConfig) -> f64 {
    match model {
        ModelConfig::Llama(config) => config.vocab_size as f64,
        ModelConfig::Opt(config) => config.vocab_size as f64,
        _ => 0.0,
    }
}
