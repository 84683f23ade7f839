//! What a training step holds, as a function of its configuration: the tensors of Kiln's own steps, with fused attention (no
//! stored scores) and logits a few rows at a time.
//!
//! With n tokens in a batch, a LLaMA block keeps for each token, in values (d width, q and v query and key channels, f
//! MLP channels, a heads, r LoRA rank):
//!
//! | method | values per token and block |
//! | --- | --- |
//! | full | `4 d + 2 q + 2 v + 3 f + a` |
//! | LoRA, QLoRA | the same and `7 r` |
//!
//! These are f32; [`Halves`] says which are 16-bit instead: `2 d + 2 q + 2 v + 3 f`, or `q + 2 v`.
//!
//! With recomputation a block keeps its input only, `n d`, and one block's values exist at a time. Beside them: weights;
//! 8 bytes of optimizer state and 4 of gradient for each trained value; the logits of one chunk.

use std::collections::BTreeMap;

#[cfg(doc)]
use kiln_quant_core::Compute;
use kiln_quant_core::{Projection, Slots};

use crate::{
    CausalLm, Decoder, Recompute,
    config::ModelConfig,
    families::{Channels, NormAxis, NormKind, NormPlace},
};

/// Bytes of a value.
const VALUE: f64 = 4.0;

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
    /// What of a block is kept in 16 bits.
    pub halves: Halves,
}

/// What of a block is kept in 16 bits. Without a graph that [keeps operands rounded](Compute::keeps_rounded) it is nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Halves {
    /// Nothing.
    None,
    /// Attention's operands: of a model whose linears multiply f32.
    Attention,
    /// Also what linears read, and the MLP's gates: of one whose linears [take operands](Projection::takes_operands).
    Operands,
}

impl Halves {
    /// Of a step of `model`, with the adapters that it has.
    pub fn of<P: Projection>(model: &Decoder<P>) -> Self {
        match model.compute().keeps_rounded(&model.device()) {
            true if model.slots().iter().all(|(_, slot)| slot.takes_operands()) => Self::Operands,
            true => Self::Attention,
            false => Self::None,
        }
    }
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
    /// Of a program on the CPU, fixed by steps of a small model on Linux with two threads.
    pub const CPU: Self = Self { base: 26e6, slack: 1.05 };
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

    /// Bytes that exist during a step only, at its peak.
    pub fn moving(&self) -> f64 {
        (self.activations + self.transient).max(self.gradients + self.update)
    }
}

/// Sizes of a block: of linears means over all blocks, of the rest those of the first block with attention.
#[derive(Debug, Clone, Copy)]
pub struct BlockSizes {
    /// Channels of the residual stream.
    pub width: f64,
    /// Channels of the query heads.
    pub query: f64,
    /// Channels of the key heads.
    pub key: f64,
    /// Channels of the MLP.
    pub inner: f64,
    /// Query heads.
    pub heads: f64,
    /// Weights of the linears.
    pub linears: f64,
    /// Values of LoRA adapters of rank 1 on all linears.
    pub low_rank: f64,
    /// Number of linears.
    pub slots: f64,
    /// Channels of shared keys and values behind the residual stream.
    carried: f64,
    /// The share of blocks that are recurrent, and what a token keeps in one of them in place of attention.
    recurrent: [f64; 2],
    gated: bool,
    norms: Norms,
}

/// How many norms of a kind there are.
#[derive(Debug, Clone, Copy)]
struct Norms {
    kind: NormKind,
    before: f64,
    behind: f64,
    over_heads: bool,
}

impl BlockSizes {
    /// Of a model; where its blocks differ in width, by the widths that blocks without their own have.
    pub fn of(model: &ModelConfig) -> Self {
        let mut alike = model.clone();
        alike.layer_shapes.clear();
        let width = |channels| alike.width(channels, 0) as f64;
        let layers = model.num_hidden_layers;
        let recurrent: Vec<bool> = (0..layers).map(|index| model.parts(index).is_recurrent()).collect();
        let first = recurrent.iter().position(|recurrent| !recurrent).unwrap_or(0);
        let table = model.parts(first);
        // Blocks of one kind and one width of heads have the same linears: how many there are, and the first.
        let mut kinds: BTreeMap<(usize, usize), (usize, usize)> = BTreeMap::new();
        for index in 0..layers {
            let kind = alike.block_kinds.get(index).copied().unwrap_or(0);
            kinds.entry((kind, alike.head_dim_of(index))).or_insert((0, index)).0 += 1;
        }
        let mean = |of: fn([f64; 2]) -> f64| -> f64 {
            let of_block = |index: usize| -> f64 {
                let linears = alike.linears(index).into_iter();
                linears.map(|(_, role)| of(alike.linear_shape(role, index).map(|size| size as f64))).sum()
            };
            let sum: f64 = kinds.values().map(|(count, index)| *count as f64 * of_block(*index)).sum();
            sum / layers.max(1) as f64
        };
        let share = recurrent.iter().filter(|recurrent| **recurrent).count() as f64 / layers.max(1) as f64;
        let count =
            |places: &[NormPlace]| table.norms().filter(|norm| places.contains(&norm.place)).count() as f64;
        Self {
            width: width(Channels::Hidden),
            query: width(Channels::Query),
            key: width(Channels::KeyValue),
            inner: width(Channels::Mlp),
            heads: alike.num_attention_heads as f64,
            linears: mean(|[d_input, d_output]| d_input * d_output),
            low_rank: mean(|[d_input, d_output]| d_input + d_output),
            slots: mean(|_| 1.0),
            carried: model.carried_width() as f64,
            recurrent: [share, model.delta_net.map_or(0.0, |delta| delta.kept_values())],
            gated: table.is_gated(),
            norms: Norms {
                kind: model.family.norm,
                before: count(&[
                    NormPlace::PreAttention,
                    NormPlace::PreMlp,
                    NormPlace::PreExperts,
                    NormPlace::StreamAfterAttention,
                    NormPlace::StreamAfterMlp,
                ]),
                behind: count(&[
                    NormPlace::PostAttention,
                    NormPlace::PostMlp,
                    NormPlace::PostDense,
                    NormPlace::PostExperts,
                    NormPlace::PostPerLayerInput,
                ]),
                over_heads: table.norms().any(|norm| norm.place.axis() != NormAxis::Hidden),
            },
        }
    }

    /// Values of a token that go into a block: the residual stream, with the shared keys and values behind it.
    pub fn input(&self) -> f64 {
        self.width + self.carried
    }

    /// Values that a token keeps when the inputs of all linears are needed, 16-bit ones counted half. `norms` says whether
    /// norms are trained: layer norms, made of several operations, keep more then.
    pub fn kept(&self, norms: bool, halves: Halves) -> f64 {
        let Self { width, query, key, inner, heads, .. } = *self;
        let [recurrent, of_recurrent] = self.recurrent;
        // Queries, keys and values; the result, which a linear reads; what linears read of the stream.
        let [operands, result, normed] = match halves {
            Halves::None => [1.0, 1.0, 1.0],
            Halves::Attention => [0.5, 1.0, 1.0],
            Halves::Operands => [0.5, 0.5, 0.5],
        };
        let attention = operands * (query + 2.0 * key) + result * query + heads;
        let attention = attention * (1.0 - recurrent) + of_recurrent * recurrent;
        let stream = match self.norms.kind {
            // What goes in; before a linear also what comes out.
            NormKind::Rms | NormKind::RmsOnePlus | NormKind::Identity => {
                (1.0 + normed) * self.norms.before + self.norms.behind
            }
            // Centred and normed state, the scaled one where gains are trained.
            NormKind::Layer | NormKind::LayerGain => {
                (self.norms.before + self.norms.behind) * if norms { 3.0 } else { 2.0 }
            }
        };
        let heads = if self.norms.over_heads { (query + key) * (1.0 - recurrent) } else { 0.0 };
        // Gate, up and their product; or the activation.
        stream * width + attention + heads + if self.gated { 3.0 * normed } else { 1.0 } * inner
    }

    /// Values of a token that exist at once in a pass through the MLP, forwards without a graph or backwards: residual,
    /// normed state, gate and up, or their gradients.
    pub fn passing(&self) -> f64 {
        2.0 * self.width + if self.gated { 2.0 } else { 1.0 } * self.inner
    }
}

/// What a method adds to a step, in values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Work {
    /// Values that are trained beside the model's weights.
    pub added: f64,
    /// Values of the model's weights that are trained.
    pub trained_weights: f64,
    /// Values of the largest trained tensor that gets its gradient in parts.
    pub largest: f64,
    /// Kept of a token by a block's backward pass.
    pub kept: f64,
    /// A block's input, of a token.
    pub input: f64,
    /// Existing for a moment, of a token, while a block runs without a graph.
    pub forward: f64,
    /// Existing for a moment, of a token, while a block runs backwards.
    pub backward: f64,
}

impl Work {
    /// Every weight is trained; `weight_bytes` are those of the f32 weights.
    pub fn full(model: &ModelConfig, weight_bytes: usize, step: &Step) -> Self {
        let block = BlockSizes::of(model);
        Self {
            added: 0.0,
            trained_weights: weight_bytes as f64 / VALUE,
            largest: model.vocab_size as f64 * block.width,
            kept: block.kept(true, step.halves.min(Halves::Attention)),
            ..Self::through(&block, step)
        }
    }

    /// LoRA on every linear of the blocks; over packed weights it is QLoRA.
    pub fn lora(model: &ModelConfig, rank: usize, step: &Step) -> Self {
        let (block, rank) = (BlockSizes::of(model), rank as f64);
        Self {
            added: model.num_hidden_layers as f64 * rank * block.low_rank,
            kept: block.kept(false, step.halves) + rank * block.slots,
            ..Self::through(&block, step)
        }
    }

    /// Gradients go through all blocks.
    fn through(block: &BlockSizes, step: &Step) -> Self {
        let again = step.recompute == Recompute::Block;
        Self {
            added: 0.0,
            trained_weights: 0.0,
            largest: 0.0,
            kept: 0.0,
            input: block.input(),
            forward: if again { block.passing() } else { 0.0 },
            // The stream's gradient is what the pass began with.
            backward: block.passing() - 2.0 * block.width,
        }
    }
}

/// Bytes of a step on a model whose weights take `weight_bytes` as loaded
/// ([`StorageReport::total_bytes`](kiln_quant_core::StorageReport::total_bytes)).
pub fn estimate(model: &ModelConfig, weight_bytes: usize, work: &Work, step: &Step) -> MemoryEstimate {
    let Work { added, trained_weights, largest, kept, input, forward, backward } = *work;
    let (tokens, layers) = ((step.batch * step.seq_len) as f64, model.num_hidden_layers as f64);
    let logits = step.logit_rows.min(step.batch * step.seq_len) as f64 * model.vocab_size as f64;
    let trainable = added + trained_weights;
    let (activations, backward) = match step.recompute {
        Recompute::Block => ((layers + 1.0) * input, backward + kept),
        Recompute::None => (layers * kept + input, backward),
    };
    // The gradient of the last state; of a trained head, the sum so far and a chunk's part.
    let head = tokens * input + logits + 2.0 * largest;
    MemoryEstimate {
        weights: weight_bytes as f64 + VALUE * added,
        optimizer: 2.0 * VALUE * trainable,
        gradients: VALUE * trainable,
        activations: VALUE * tokens * activations,
        transient: VALUE * head.max(tokens * forward.max(backward)),
        update: 3.0 * VALUE * largest,
        trainable,
    }
}
