//! Loss and gradients of one batch, holding as little as possible: logits a few rows at a time, blocks one at a time.

use burn::{
    optim::{GradientsAccumulator, GradientsParams},
    tensor::{Int, Tensor, TensorData},
};
use kiln_quant_core::{fused, to_host_together};
use serde::{Deserialize, Serialize};

use crate::{
    CausalLm, Context, EmbeddingNoise, Error, Objective, PackedHead, Result, TokenBatch, TokenLoss, Weights,
    balance::{Balance, Routed, RouterLog},
    nll,
};

/// What the backward pass computes again instead of keeping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Nothing: all blocks' intermediate values are kept. Fastest.
    None,
    /// Each block: only the blocks' inputs are kept, `[batch, length, width]` each; costs one more forward pass.
    Block,
}

/// How [`loss_and_gradients`] trades memory for time, and what the loss of a place is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DriverOptions {
    /// What is computed again.
    pub recompute: Recompute,
    /// Rows of logits held at once.
    pub logit_rows: usize,
    /// The loss of a scored place.
    pub loss: TokenLoss,
    /// What is added to the embedding; the inputs of Gemma 4's single blocks are made of the embedding without it.
    pub noise: Option<EmbeddingNoise>,
    /// Coefficient of the load-balancing loss of mixtures of experts, which is added to the mean loss of this batch's
    /// targets: transformers' `router_aux_loss_coef`. As there, a step of several batches has one for each, so that it depends on how
    /// rows are dealt out. Without it routers learn from the targets alone.
    pub router_loss: Option<f64>,
}

impl Default for DriverOptions {
    fn default() -> Self {
        Self {
            recompute: Recompute::None,
            logit_rows: 128,
            loss: TokenLoss::default(),
            noise: None,
            router_loss: None,
        }
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

/// Losses that are still on the device; reading them waits for it. By default there are none.
#[derive(Debug, Clone, Default)]
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
        Ok(Self::read_all(vec![self], Vec::new())?.0.into_iter().sum())
    }

    /// The sums of each of `losses` in nats and the values of `others`, with one wait for the device.
    ///
    /// # Errors
    /// A device that can't be read.
    pub fn read_all(losses: Vec<Self>, others: Vec<Tensor<1>>) -> Result<(Vec<f64>, Vec<f32>)> {
        let counts: Vec<Vec<usize>> =
            losses.iter().map(|loss| loss.parts.iter().map(|part| part.dims()[0]).collect()).collect();
        let parts = losses.into_iter().flat_map(|loss| loss.parts).chain(others).collect();
        let mut values = to_host_together("losses", parts)?.into_iter();
        let mut sum = |count: usize| values.by_ref().take(count).map(f64::from).sum::<f64>();
        let sums = counts.into_iter().map(|parts| parts.into_iter().map(&mut sum).sum::<f64>()).collect();
        Ok((sums, values.collect()))
    }
}

/// Adds the gradients of the **sum** of the scored places' losses, each times its weight, to `gradients`, and returns that
/// sum in nats. Without options that is the sum of the targets' negative log-likelihoods.
///
/// Sums, so that micro-batches add up: divide by the number of targets of all of them. `model` is the training model
/// (after [`train`](burn::module::Module::train)); whatever requires gradients gets them. With [`Recompute::Block`]
/// the gradients are those of plain autodiff to rounding, provided that blocks are deterministic (dropout included).
///
/// # Errors
/// [`Error::Argument`] if targets or weights don't fit the batch, none is scored, or an id is not in the vocabulary.
pub fn loss_and_gradients<'a, M: CausalLm>(
    model: &M,
    tokens: &TokenBatch,
    objective: impl Into<Objective<'a>>,
    options: &DriverOptions,
    gradients: &mut GradientsAccumulator<M>,
) -> Result<f64> {
    queue_gradients(model, tokens, objective, options, gradients)?.read()
}

/// As [`loss_and_gradients`], without waiting for the device, but for [`Weights::Computed`]: the loss is to be read later.
///
/// # Errors
/// As [`loss_and_gradients`], and those of [`Weights::Computed`].
pub fn queue_gradients<'a, M: CausalLm>(
    model: &M,
    tokens: &TokenBatch,
    objective: impl Into<Objective<'a>>,
    options: &DriverOptions,
    gradients: &mut GradientsAccumulator<M>,
) -> Result<PendingLoss> {
    let objective = objective.into();
    check(model, tokens, objective.targets)?;
    check_numbers(model, tokens, objective.numbers)?;
    let mut context = model.context(tokens, None)?;
    let router = match options.router_loss {
        Some(coefficient) => Some(RouterLoss::new(coefficient, &objective, &mut context)?),
        None => None,
    };
    let noisy = |x| match options.noise {
        Some(noise) => noise.add(x, model.hidden_width(), tokens),
        None => x,
    };
    match options.recompute {
        Recompute::None => {
            let x = match options.noise {
                Some(_) => model.residual_from(noisy(model.embed(&context)), &context, None),
                None => model.residual(&context, None),
            };
            let (mut loss, dx) = head(model, x.clone().inner(), objective, options, gradients)?;
            let beside = match router {
                Some(router) => {
                    let routed = router.log.take();
                    Some(router.of_all(&router.balance(&routed, tokens)?, &routed, &mut loss))
                }
                None => None,
            };
            backward(model, x, dx, beside, gradients);
            Ok(loss)
        }
        Recompute::Block => {
            let inference = model.valid();
            let mut inputs = vec![noisy(inference.embed(&context))];
            for index in 0..model.num_blocks() {
                inputs.push(inference.block(index, inputs[index].clone(), &context, None));
            }
            let top = inputs.pop().expect("the embedding at least");
            let (mut loss, mut dx) = head(model, top.clone(), objective, options, gradients)?;
            let balance = match &router {
                Some(router) => {
                    let routed = router.log.take();
                    let balance = router.balance(&routed, tokens)?;
                    router.of_all(&balance, &routed, &mut loss);
                    Some((router, balance))
                }
                None => None,
            };
            let mut output = top;
            for index in (0..model.num_blocks()).rev() {
                let input = inputs.pop().expect("an input for every block");
                let both = [input.clone(), output];
                dx = block_backward(model, index, both, dx, &context, balance.as_ref(), gradients);
                output = input;
            }
            if model.trains_embedding() {
                backward(model, model.embed(&context), dx, None, gradients);
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
    check_numbers(model, tokens, None)?;
    let options = DriverOptions { logit_rows, ..DriverOptions::default() };
    let (loss, dx) = head(model, x, targets.into(), &options, &mut GradientsAccumulator::new())?;
    Ok((loss.read()?, dx))
}

/// The load-balancing loss of a batch, as part of the sum of its targets' losses.
struct RouterLoss {
    /// The coefficient times what the mean is later divided by.
    factor: f64,
    log: RouterLog,
}

impl RouterLoss {
    fn new(coefficient: f64, objective: &Objective, context: &mut Context) -> Result<Self> {
        let fail = |name: &str, expected: &str, found: String| {
            Err(Error::Argument { name: name.into(), expected: expected.into(), found })
        };
        if !(coefficient.is_finite() && coefficient >= 0.0) {
            return fail("router_loss", "a number of at least 0", coefficient.to_string());
        }
        let scored = objective.targets.scored.iter().enumerate().filter(|(_, scored)| **scored);
        let targets = match &objective.weights {
            Weights::Equal => scored.count() as f64,
            Weights::Given(weights) => {
                scored.filter_map(|(place, _)| weights.get(place)).map(|weight| f64::from(*weight)).sum()
            }
            Weights::Computed(_) => {
                return fail("router_loss", "weights that are known before the pass", "computed ones".into());
            }
        };
        if targets < 0.0 {
            return fail("router_loss", "weights of which the sum is at least 0", targets.to_string());
        }
        let log = RouterLog::default();
        context.routers = Some(log.clone());
        Ok(Self { factor: coefficient * targets, log })
    }

    fn balance(&self, routed: &[Routed], tokens: &TokenBatch) -> Result<Balance> {
        Balance::of(routed, tokens).ok_or_else(|| Error::Argument {
            name: "router_loss".into(),
            expected: "experts in blocks that gradients go through".into(),
            found: "none".into(),
        })
    }

    fn of_one(&self, balance: &Balance, routed: &Routed) -> Tensor<1> {
        balance.loss(&routed.scores).mul_scalar(self.factor)
    }

    /// The loss of all blocks, noted in `loss`.
    fn of_all(&self, balance: &Balance, routed: &[Routed], loss: &mut PendingLoss) -> Tensor<1> {
        // Blocks may be on several devices.
        let device = routed[0].scores.device();
        let parts = routed.iter().map(|routed| self.of_one(balance, routed).to_device(&device));
        let sum = parts.reduce(|sum, part| sum + part).expect("a router at least");
        loss.parts.push(if sum.is_autodiff() { sum.clone().inner() } else { sum.clone() });
        sum
    }
}

/// Runs one block again under autodiff; returns the gradient of its input.
fn block_backward<M: CausalLm>(
    model: &M,
    index: usize,
    [input, output]: [Tensor<3>; 2],
    dy: Tensor<3>,
    context: &Context,
    balance: Option<&(&RouterLoss, Balance)>,
    gradients: &mut GradientsAccumulator<M>,
) -> Tensor<3> {
    let input = Tensor::from_inner(input).require_grad();
    let y = model.block_again(index, input.clone(), output, context);
    let mut seed = fused::seeded(y, dy);
    if let Some((router, balance)) = balance {
        let routed = router.log.take();
        let device = seed.device();
        for routed in &routed {
            seed = seed + router.of_one(balance, routed).to_device(&device);
        }
    }
    let mut found = seed.backward();
    let dx = input.grad_remove(&mut found).expect("a block passes gradients to its input");
    gradients.accumulate(model, GradientsParams::from_grads(found, model));
    dx
}

/// Sends `dx` down the graph that ends in `x`, if there is one: where the head alone is trained, there is none. The loss
/// `beside` is of the same graph.
fn backward<M: CausalLm>(
    model: &M,
    x: Tensor<3>,
    dx: Tensor<3>,
    beside: Option<Tensor<1>>,
    gradients: &mut GradientsAccumulator<M>,
) {
    if !x.is_tracked() {
        return;
    }
    let mut seed = fused::seeded(x, dx);
    if let Some(beside) = beside {
        let device = seed.device();
        seed = seed + beside.to_device(&device);
    }
    let found = seed.backward();
    gradients.accumulate(model, GradientsParams::from_grads(found, model));
}

/// Final norm, head and loss, a few rows at a time: the losses and the gradient of their sum.
fn head<M: CausalLm>(
    model: &M,
    x: Tensor<3>,
    objective: Objective,
    options: &DriverOptions,
    gradients: &mut GradientsAccumulator<M>,
) -> Result<(PendingLoss, Tensor<3>)> {
    let Objective { targets, weights, teacher, numbers } = objective;
    let [batch, length, width] = x.dims();
    let device = x.device();
    let places: Vec<usize> = (0..batch * length).filter(|&place| targets.scored[place]).collect();
    let rows = x.reshape([batch * length, width]);
    let ints = |values: Vec<i64>| {
        let count = values.len();
        Tensor::<1, Int>::from_data(TensorData::new(values, [count]), &device)
    };
    let weights = match weights {
        Weights::Equal => None,
        Weights::Given(all) => {
            check_weights(all.len(), batch * length)?;
            Some(places.iter().map(|&place| all[place]).collect())
        }
        Weights::Computed(weigh) => {
            let found = weigh(&nll::of_places(&model.valid(), &rows, &places, targets.ids)?)?;
            check_weights(found.len(), places.len())?;
            Some(found)
        }
    };
    let chunk = options.logit_rows.max(1);
    let plain = options.loss == TokenLoss::default() && teacher.is_none() && numbers.is_none();
    if let Some(head) = model.packed_head().filter(|head| plain && head.weight.has_cross_entropy(&rows)) {
        let scored = Scored { rows: &rows, places: &places, ids: targets.ids, weights: weights.as_deref() };
        let (loss, dx) = head_by_vocabulary(model, head, &scored, chunk, gradients);
        return Ok((loss, scattered(vec![dx], &places, [batch, length])));
    }
    let mut weights = weights.as_ref().map(|weights: &Vec<f32>| weights.chunks(chunk));
    let (mut losses, mut found_rows) = (Vec::new(), Vec::new());
    for (number, places) in places.chunks(chunk).enumerate() {
        model.at_row(number * chunk);
        let index = ints(places.iter().map(|&place| place as i64).collect());
        let ids = ints(places.iter().map(|&place| i64::from(targets.ids[place])).collect());
        let part = Tensor::from_inner(rows.clone().select(0, index.clone())).require_grad();
        let teacher = teacher.as_ref().map(|teacher| Tensor::from_inner(teacher.logits(index)));
        let outputs = model.lm_head(model.final_norm(part.clone()));
        let loss = match numbers {
            Some(numbers) => {
                let numbers: Vec<f32> = places.iter().map(|&place| numbers[place]).collect();
                let numbers = Tensor::<1>::from_data(numbers.as_slice(), &device);
                (outputs.squeeze_dim::<1>(1) - numbers).square()
            }
            None => options.loss.of(outputs, ids, teacher),
        };
        let mut found = match weights.as_mut().and_then(Iterator::next) {
            Some(weights) => {
                let weights = Tensor::<1>::from_data(weights, &device).cast(loss.dtype());
                losses.push(loss.clone().inner() * weights.clone());
                fused::seeded(loss, weights).backward()
            }
            None => {
                losses.push(loss.clone().inner());
                // Begins with ones, which is the gradient of the sum.
                loss.backward()
            }
        };
        found_rows.push(part.grad_remove(&mut found).expect("the head passes gradients to its input"));
        gradients.accumulate(model, GradientsParams::from_grads(found, model));
    }
    let dx = scattered(found_rows, &places, [batch, length]);
    Ok((PendingLoss { parts: losses }, dx))
}

/// Places that count.
struct Scored<'a> {
    /// The residual stream, `[batch * length, width]`.
    rows: &'a Tensor<2>,
    places: &'a [usize],
    /// Target ids of all places.
    ids: &'a [u32],
    /// A factor for each of `places`.
    weights: Option<&'a [f32]>,
}

/// Final norm, a packed head and cross-entropy, a part of the vocabulary at a time; as many logits at once as `rows` rows
/// have. The gradient is one of the scored rows.
fn head_by_vocabulary<M: CausalLm>(
    model: &M,
    head: PackedHead,
    scored: &Scored,
    rows: usize,
    gradients: &mut GradientsAccumulator<M>,
) -> (PendingLoss, Tensor<2>) {
    let device = scored.rows.device();
    let ints = |values: Vec<i64>| Tensor::<1, Int>::from_data(values.as_slice(), &device);
    let index = ints(scored.places.iter().map(|&place| place as i64).collect());
    let ids = ints(scored.places.iter().map(|&place| i64::from(scored.ids[place])).collect());
    let weights = scored.weights.map(|weights| Tensor::<1>::from_data(weights, &device));
    model.at_row(0);
    let part = Tensor::from_inner(scored.rows.clone().select(0, index)).require_grad();
    let x = model.head_input(model.final_norm(part.clone()));
    let columns = (rows * model.vocab_size()).div_ceil(scored.places.len());
    let (losses, dx) =
        head.weight.cross_entropy(x.clone().inner(), ids, weights.clone(), head.logits, columns);
    let mut found = fused::seeded(x, dx).backward();
    let dx = part.grad_remove(&mut found).expect("the final norm passes gradients to its input");
    gradients.accumulate(model, GradientsParams::from_grads(found, model));
    let losses = match weights {
        Some(weights) => losses * weights,
        None => losses,
    };
    (PendingLoss { parts: vec![losses] }, dx)
}

/// Gradients of the scored places' rows, in parts, as those of all places `[batch, length, width]`.
fn scattered(mut parts: Vec<Tensor<2>>, places: &[usize], [batch, length]: [usize; 2]) -> Tensor<3> {
    let (width, device) = (parts[0].dims()[1], parts[0].device());
    // Where a place is not scored, the row of zeros behind all others.
    parts.push(Tensor::zeros([1, width], &device));
    let mut from = vec![places.len() as i64; batch * length];
    places.iter().zip(0..).for_each(|(&place, row)| from[place] = row);
    let from = Tensor::<1, Int>::from_data(TensorData::new(from, [batch * length]), &device);
    Tensor::cat(parts, 0).select(0, from).reshape([batch, length, width])
}

fn check_weights(found: usize, expected: usize) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::Argument {
        name: "weights".into(),
        expected: format!("a weight for each of {expected} places"),
        found: found.to_string(),
    })
}

fn check<M: CausalLm>(model: &M, tokens: &TokenBatch, targets: Targets) -> Result<()> {
    let fail = |name: &str, expected: String, found: String| {
        Err(Error::Argument { name: name.into(), expected, found })
    };
    let (count, vocabulary) = (tokens.ids.len(), model.vocab_size());
    let outputs = match model.labels() {
        // A number, whatever the id.
        Some(1) => usize::MAX,
        Some(labels) => labels,
        None => vocabulary,
    };
    if targets.ids.len() != count || targets.scored.len() != count {
        let found = format!("{} ids and {} flags", targets.ids.len(), targets.scored.len());
        return fail("targets", format!("one for each of {count} tokens"), found);
    }
    if !targets.scored.contains(&true) {
        return fail("targets", "at least one scored place".into(), "none".into());
    }
    let mut scored = targets.ids.iter().zip(targets.scored).filter(|(_, scored)| **scored).map(|(id, _)| id);
    if let Some(id) = tokens.ids.iter().find(|id| **id as usize >= vocabulary) {
        return fail("token ids", format!("ids below {vocabulary}"), id.to_string());
    }
    if let Some(id) = scored.find(|id| **id as usize >= outputs) {
        return fail("target ids", format!("ids below {outputs}"), id.to_string());
    }
    Ok(())
}

/// A number for each place where the model gives one, and none elsewhere.
fn check_numbers<M: CausalLm>(model: &M, tokens: &TokenBatch, numbers: Option<&[f32]>) -> Result<()> {
    let (count, wanted) = (tokens.ids.len(), model.labels() == Some(1));
    let expected = match (wanted, numbers) {
        (true, Some(numbers)) if numbers.len() == count => return Ok(()),
        (false, None) => return Ok(()),
        (true, _) => format!("one for each of {count} places: the model has one output"),
        (false, Some(_)) => "none: the model has more than one output".to_owned(),
    };
    let found = numbers.map_or("none".into(), |numbers| numbers.len().to_string());
    Err(Error::Argument { name: "numbers".into(), expected, found })
}
