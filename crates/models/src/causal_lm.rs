//! What trainers, evaluators and generators need of a language model.

use burn::{
    module::{Module, ModuleDisplay, Param},
    tensor::{Device, Tensor},
};
use kiln_quant_core::{LogitSpec, PackedTensor, Place, Slots};

use crate::{Context, Error, KvCache, Result, ScaleSite, TokenBatch};

/// A head that is one packed matrix.
#[derive(Debug, Clone, Copy)]
pub struct PackedHead<'a> {
    /// The matrix, `[width, vocabulary]`.
    pub weight: &'a PackedTensor,
    /// What is done to its products.
    pub logits: LogitSpec,
}

/// A decoder-only language model, block by block.
///
/// The residual stream goes `embed` → `block(0)` → .. → `block(n - 1)` → `final_norm` → `lm_head`. Drivers that hold
/// one block at a time (recomputation, calibration, side tuning) call the steps; [`forward`](Self::forward) and
/// [`hidden_states`](Self::hidden_states) are built on them.
pub trait CausalLm: Module + ModuleDisplay + 'static {
    /// Puts a batch on the model's device, with tables and masks for its positions; `cache` says what went before.
    ///
    /// # Errors
    /// As [`check_tokens`](Self::check_tokens).
    fn context(&self, tokens: &TokenBatch, cache: Option<&KvCache>) -> Result<Context>;

    /// Whether the model knows all ids and positions of a batch.
    ///
    /// # Errors
    /// [`Error::Argument`] for an id that isn't in the vocabulary, or a position beyond [`max_positions`](Self::max_positions).
    fn check_tokens(&self, tokens: &TokenBatch) -> Result<()> {
        let wrong = |what: &str, limit: usize, found: u32| Error::Argument {
            name: "tokens".into(),
            expected: format!("{what} below {limit}, as the model has"),
            found: found.to_string(),
        };
        let (vocabulary, positions) = (self.vocab_size(), self.max_positions());
        if let Some(id) = tokens.ids.iter().max().filter(|id| **id as usize >= vocabulary) {
            return Err(wrong("ids", vocabulary, *id));
        }
        match tokens.positions.iter().max().filter(|position| **position as usize >= positions) {
            Some(position) => Err(wrong("positions", positions, *position)),
            None => Ok(()),
        }
    }

    /// Channels of the residual stream that are the hidden state, the first ones, where others stand behind them for later
    /// blocks; `None`: all.
    fn hidden_width(&self) -> Option<usize> {
        None
    }

    /// The residual stream before the first block, `[batch, length, width]`.
    fn embed(&self, context: &Context) -> Tensor<3>;

    /// Whether [`embed`](Self::embed) has parameters that require gradients.
    fn trains_embedding(&self) -> bool;

    /// Number of blocks.
    fn num_blocks(&self) -> usize;

    /// Runs block `index` on the residual stream `[batch, length, width]`.
    ///
    /// # Panics
    /// If there is no such block, or `x` doesn't fit the context.
    fn block(&self, index: usize, x: Tensor<3>, context: &Context, cache: Option<&mut KvCache>) -> Tensor<3>;

    /// Runs block `index` again, for its gradients: `output` is what it gave for `x` before, without a graph.
    ///
    /// Models of which a part is frozen override it to take that part's result from `output`.
    fn block_again(&self, index: usize, x: Tensor<3>, _output: Tensor<3>, context: &Context) -> Tensor<3> {
        self.block(index, x, context, None)
    }

    /// The norm between the last block and the head, `[.., width]` → `[.., width]`.
    fn final_norm<const D: usize>(&self, x: Tensor<D>) -> Tensor<D>;

    /// What the matrix of a head multiplies, from [`final_norm`](Self::final_norm)'s output: narrower in models whose embedding is.
    fn head_input<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        x
    }

    /// Logits, from [`final_norm`](Self::final_norm)'s output `[.., width]` → `[.., vocabulary]`.
    fn lm_head<const D: usize>(&self, x: Tensor<D>) -> Tensor<D>;

    /// The head, where [`lm_head`](Self::lm_head) is a packed matrix's product with [`head_input`](Self::head_input)'s result and
    /// nothing else. Losses of it may then be had a part of the vocabulary at a time.
    fn packed_head(&self) -> Option<PackedHead<'_>> {
        None
    }

    /// Number of token ids.
    fn vocab_size(&self) -> usize;

    /// What [`lm_head`](Self::lm_head) gives in place of logits of the vocabulary: so many classes, or one number.
    fn labels(&self) -> Option<usize> {
        None
    }

    /// Positions the model was made for.
    fn max_positions(&self) -> usize;

    /// The length of texts beyond which keys cached of their beginnings serve no longer; `None`: they always do. LongRoPE
    /// rotates all of a longer text by other frequencies.
    fn cache_limit(&self) -> Option<usize> {
        None
    }

    /// Where the parameters are; of a model on several devices where the embedding is.
    fn device(&self) -> Device;

    /// Where the residual stream is after the last block, and so the logits.
    fn head_device(&self) -> Device {
        self.device()
    }

    /// Fails for a model whose parts stand on several devices, which `what` can't work on.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the devices.
    fn check_one_device(&self, what: &str) -> Result<()> {
        match self.devices() {
            devices if devices.len() < 2 => Ok(()),
            devices => Err(Error::Argument {
                name: "model".into(),
                expected: format!("all of it on one device, for {what}"),
                found: format!("parts on {devices:?}"),
            }),
        }
    }

    /// Tells every part whose results depend on it where training stands (seeded dropout); trainers call it before each
    /// forward pass.
    fn at(&self, place: Place);

    /// Tells a head whose results depend on it that the next rows are those from `first` on of a batch's scored places.
    fn at_row(&self, _first: usize) {}

    /// The residual stream after the last block, before the final norm; what training without recomputation runs.
    fn residual(&self, context: &Context, cache: Option<&mut KvCache>) -> Tensor<3> {
        self.residual_from(self.embed(context), context, cache)
    }

    /// As [`residual`](Self::residual), from `x`, what [`embed`](Self::embed) gave or what was made of it.
    fn residual_from(
        &self,
        mut x: Tensor<3>,
        context: &Context,
        mut cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        for index in 0..self.num_blocks() {
            x = self.block(index, x, context, cache.as_deref_mut());
        }
        if let Some(cache) = cache {
            cache.advance(context);
        }
        x
    }

    /// Logits of every position, `[batch, length, vocabulary]`.
    fn forward(&self, context: &Context) -> Tensor<3> {
        self.lm_head(self.final_norm(self.residual(context, None)))
    }

    /// Embedding, the output of every block but the last, and the final norm's output: `blocks + 1` tensors, as
    /// transformers' `output_hidden_states`.
    fn hidden_states(&self, context: &Context) -> Vec<Tensor<3>> {
        let mut states = vec![self.embed(context)];
        for index in 0..self.num_blocks() {
            let x = self.block(index, states[index].clone(), context, None);
            states.push(x);
        }
        if let Some(last) = states.pop() {
            states.push(self.final_norm(last));
        }
        if let Some(width) = self.hidden_width() {
            states = states.into_iter().map(|state| state.narrow(2, 0, width)).collect();
        }
        states
    }
}

/// A model in which factors can move between norms and linears without changing what it computes, as AWQ's scaling
/// does.
pub trait ScaleSites: CausalLm + Slots {
    /// Where factors can move between the parts of block `index`, in the order in which data flows.
    ///
    /// # Panics
    /// If there is no such block.
    fn scale_sites(&self, index: usize) -> Vec<ScaleSite>;

    /// A parameter `[width]` of a block's norm by its name in the checkpoint, `model.layers.3.input_layernorm.weight`;
    /// `None` if no [`scale_sites`](Self::scale_sites) names it.
    fn norm_parameter(&mut self, name: &str) -> Option<&mut Param<Tensor<1>>>;
}
