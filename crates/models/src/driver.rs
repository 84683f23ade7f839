//! Loss and gradients of one batch, holding as little as possible: logits a few rows at a time, blocks one at a time.

use burn::{
    optim::{GradientsAccumulator, GradientsParams},
    tensor::{Int, Tensor, TensorData},
};
use kiln_quant_core::{fused, to_host};
use serde::{Deserialize, Serialize};

use crate::{CausalLm, Context, Error, Result, TokenBatch};

/// What the backward pass computes again instead of keeping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Nothing: all blocks' intermediate values are kept. Fastest.
    None,
    /// Each block: only the blocks' inputs are kept, `[batch, length, width]` each; costs one more forward pass.
    Block,
}

/// How [`loss_and_gradients`] trades memory for time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DriverOptions {
    /// What is computed again.
    pub recompute: Recompute,
    /// Rows of logits held at once.
    pub logit_rows: usize,
}

impl Default for DriverOptions {
    fn default() -> Self {
        Self { recompute: Recompute::None, logit_rows: 256 }
    }
}

/// What the model should have said: `ids[i]` is the target of the logits at place `i` where `scored[i]`.
#[derive(Debug, Clone, Copy)]
pub struct Targets<'a> {
    /// Target ids, `[batch * length]`; ignored where not scored.
    pub ids: &'a [u32],
    /// Places that count.
    pub scored: &'a [bool],
}

/// Losses that are still on the device; reading them waits for it.
#[derive(Debug, Clone)]
pub struct PendingLoss {
    /// Losses of some targets each.
    parts: Vec<Tensor<1>>,
}

impl PendingLoss {
    /// Their sum in nats.
    ///
    /// # Errors
    /// A device that can't be read.
    pub fn read(self) -> Result<f64> {
        Ok(Self::read_all(vec![self], Vec::new())?.0)
    }

    /// The sum of all of `losses` in nats and the values of `others`, with one wait for the device.
    ///
    /// # Errors
    /// A device that can't be read.
    pub fn read_all(losses: Vec<Self>, others: Vec<Tensor<1>>) -> Result<(f64, Vec<f32>)> {
        let counts: Vec<Vec<usize>> =
            losses.iter().map(|loss| loss.parts.iter().map(|part| part.dims()[0]).collect()).collect();
        let parts: Vec<_> = losses.into_iter().flat_map(|loss| loss.parts).chain(others).collect();
        if parts.is_empty() {
            return Ok((0.0, Vec::new()));
        }
        let mut values = to_host("losses", Tensor::cat(parts, 0))?.into_iter();
        let mut sum = |count: usize| values.by_ref().take(count).map(f64::from).sum::<f64>();
        let total = counts.into_iter().map(|parts| parts.into_iter().map(&mut sum).sum::<f64>()).sum();
        Ok((total, values.collect()))
    }
}

/// Adds the gradients of the **sum** of the scored targets' negative log-likelihoods to `gradients`, and returns that
/// sum in nats.
///
/// Sums, so that micro-batches add up: divide by the number of targets of all of them. `model` is the training model
/// (after [`train`](burn::module::Module::train)); whatever requires gradients gets them. With [`Recompute::Block`]
/// the gradients are those of plain autodiff to rounding, provided that blocks are deterministic (dropout included).
///
/// # Errors
/// [`Error::Argument`] if targets don't fit the batch, none is scored, or an id is not in the vocabulary.
pub fn loss_and_gradients<M: CausalLm>(
    model: &M,
    tokens: &TokenBatch,
    targets: Targets,
    options: &DriverOptions,
    gradients: &mut GradientsAccumulator<M>,
) -> Result<f64> {
    queue_gradients(model, tokens, targets, options, gradients)?.read()
}

/// As [`loss_and_gradients`], without waiting for the device: the loss is to be read later.
///
/// # Errors
/// As [`loss_and_gradients`].
pub fn queue_gradients<M: CausalLm>(
    model: &M,
    tokens: &TokenBatch,
    targets: Targets,
    options: &DriverOptions,
    gradients: &mut GradientsAccumulator<M>,
) -> Result<PendingLoss> {
    check(model, tokens, targets)?;
    let context = model.context(tokens, None)?;
    match options.recompute {
        Recompute::None => {
            let x = model.residual(&context, None);
            let (loss, dx) = head(model, x.clone().inner(), targets, options.logit_rows, gradients)?;
            backward(model, x, dx, gradients);
            Ok(loss)
        }
        Recompute::Block => {
            let inference = model.valid();
            let mut inputs = vec![inference.embed(&context)];
            for index in 0..model.num_blocks() {
                inputs.push(inference.block(index, inputs[index].clone(), &context, None));
            }
            let top = inputs.pop().expect("the embedding at least");
            let (loss, mut dx) = head(model, top.clone(), targets, options.logit_rows, gradients)?;
            let mut output = top;
            for index in (0..model.num_blocks()).rev() {
                let input = inputs.pop().expect("an input for every block");
                dx = block_backward(model, index, [input.clone(), output], dx, &context, gradients);
                output = input;
            }
            if model.trains_embedding() {
                backward(model, model.embed(&context), dx, gradients);
            }
            Ok(loss)
        }
    }
}

/// Loss at the top, for callers that go back through the blocks by themselves: the **sum** of the scored targets'
/// negative log-likelihoods in nats, and its gradient with respect to `x`, the residual stream after the last block,
/// `[batch, length, width]` without a graph. Holds `logit_rows` rows of logits at once.
///
/// # Errors
/// As [`loss_and_gradients`].
pub fn residual_gradient<M: CausalLm>(
    model: &M,
    tokens: &TokenBatch,
    x: Tensor<3>,
    targets: Targets,
    logit_rows: usize,
) -> Result<(f64, Tensor<3>)> {
    check(model, tokens, targets)?;
    let (loss, dx) = head(model, x, targets, logit_rows, &mut GradientsAccumulator::new())?;
    Ok((loss.read()?, dx))
}

/// Runs one block again under autodiff; returns the gradient of its input.
fn block_backward<M: CausalLm>(
    model: &M,
    index: usize,
    [input, output]: [Tensor<3>; 2],
    dy: Tensor<3>,
    context: &Context,
    gradients: &mut GradientsAccumulator<M>,
) -> Tensor<3> {
    let input = Tensor::from_inner(input).require_grad();
    let y = model.block_again(index, input.clone(), output, context);
    let mut found = fused::seeded(y, dy).backward();
    let dx = input.grad_remove(&mut found).expect("a block passes gradients to its input");
    gradients.accumulate(model, GradientsParams::from_grads(found, model));
    dx
}

/// Sends `dx` down the graph that ends in `x`.
fn backward<M: CausalLm>(model: &M, x: Tensor<3>, dx: Tensor<3>, gradients: &mut GradientsAccumulator<M>) {
    let found = fused::seeded(x, dx).backward();
    gradients.accumulate(model, GradientsParams::from_grads(found, model));
}

/// Final norm, head and loss, a few rows at a time: the negative log-likelihoods and the gradient of their sum.
fn head<M: CausalLm>(
    model: &M,
    x: Tensor<3>,
    targets: Targets,
    logit_rows: usize,
    gradients: &mut GradientsAccumulator<M>,
) -> Result<(PendingLoss, Tensor<3>)> {
    let [batch, length, width] = x.dims();
    let device = x.device();
    let places: Vec<usize> = (0..batch * length).filter(|&place| targets.scored[place]).collect();
    let rows = x.reshape([batch * length, width]);
    let ints = |values: Vec<i64>| {
        let count = values.len();
        Tensor::<1, Int>::from_data(TensorData::new(values, [count]), &device)
    };
    let (mut losses, mut found_rows) = (Vec::new(), Vec::new());
    for places in places.chunks(logit_rows.max(1)) {
        let index = ints(places.iter().map(|&place| place as i64).collect());
        let ids = ints(places.iter().map(|&place| i64::from(targets.ids[place])).collect());
        let part = Tensor::from_inner(rows.clone().select(0, index)).require_grad();
        let loss = fused::cross_entropy(model.lm_head(model.final_norm(part.clone())), ids);
        losses.push(loss.clone().inner());
        // Begins with ones, which is the gradient of the sum.
        let mut found = loss.backward();
        found_rows.push(part.grad_remove(&mut found).expect("the head passes gradients to its input"));
        gradients.accumulate(model, GradientsParams::from_grads(found, model));
    }
    // Where a place is not scored, the row of zeros behind all others.
    found_rows.push(Tensor::zeros([1, width], &device));
    let mut from = vec![places.len() as i64; batch * length];
    places.iter().zip(0..).for_each(|(&place, row)| from[place] = row);
    let dx = Tensor::cat(found_rows, 0).select(0, ints(from));
    Ok((PendingLoss { parts: losses }, dx.reshape([batch, length, width])))
}

fn check<M: CausalLm>(model: &M, tokens: &TokenBatch, targets: Targets) -> Result<()> {
    let fail = |name: &str, expected: String, found: String| {
        Err(Error::Argument { name: name.into(), expected, found })
    };
    let (count, vocabulary) = (tokens.ids.len(), model.vocab_size());
    if targets.ids.len() != count || targets.scored.len() != count {
        let found = format!("{} ids and {} flags", targets.ids.len(), targets.scored.len());
        return fail("targets", format!("one for each of {count} tokens"), found);
    }
    if !targets.scored.contains(&true) {
        return fail("targets", "at least one scored place".into(), "none".into());
    }
    let scored = targets.ids.iter().zip(targets.scored).filter(|(_, scored)| **scored).map(|(id, _)| id);
    if let Some(id) = tokens.ids.iter().chain(scored).find(|id| **id as usize >= vocabulary) {
        return fail("token ids", format!("ids below {vocabulary}"), id.to_string());
    }
    Ok(())
}
