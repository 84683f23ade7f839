//! Running calibration data through a model, block by block, for what criteria look at.
//!
//! Memory beside the weights: the blocks' inputs, and the gradients of one block.

use std::{collections::BTreeMap, ops::Range};

use burn::{module::Module, tensor::Tensor};
use kiln_distributed::{PairwiseSum, Shares, Sharing, agreed};
use kiln_models::{
    CausalLm, Context, Decoder, Keep, Probe, Slots, Tape, Targets, TokenBatch, Windows, families::Channels,
    residual_gradient,
};
use kiln_quant_core::{Projection, QuantLinear, to_host};

use crate::{
    Error, Result,
    criterion::{Axis, Criterion, InputStatistics, Matrix},
    structure::{Coupling, Structure},
};

/// Rows of logits held at once.
const LOGIT_ROWS: usize = 256;

/// Scores of channels by the path of their matrix.
pub(crate) type MatrixScores = BTreeMap<String, Vec<f64>>;

/// Which channels of a matrix are scored: those of its group, or those of the residual stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scored {
    Groups,
    Hidden,
}

impl Scored {
    fn axis(self, input: Channels) -> Axis {
        match (self, input == Channels::Hidden) {
            (Self::Groups, true) | (Self::Hidden, false) => Axis::Output,
            (Self::Groups, false) | (Self::Hidden, true) => Axis::Input,
        }
    }
}

/// Scores that need the weights alone.
pub(crate) fn weight_scores(
    model: &Decoder<QuantLinear>,
    structure: &Structure,
    criterion: Criterion,
    scored: Scored,
) -> Result<MatrixScores> {
    let linears = structure.by_path();
    let mut scores = MatrixScores::new();
    for (path, slot) in model.slots() {
        let Some(linear) = linears.get(path.as_str()) else { continue };
        let [_, d_output] = slot.shape();
        let matrix = Matrix { weight: to_host(&path, slot.weight())?, d_output, ..Matrix::default() };
        let values = matrix.scores(criterion, scored.axis(linear.input));
        scores.insert(path, values);
    }
    Ok(scores)
}

/// A model on a tape, and the batches that go through it.
struct Runner<'a> {
    model: Decoder<Probe<QuantLinear>>,
    tape: Tape,
    structure: &'a Structure,
    /// Paths of the linears whose inputs are pruned: o and down.
    pruned_inputs: Vec<&'a str>,
    /// Who has which batches.
    shares: Shares,
    /// This rank's.
    batches: Vec<TokenBatch>,
    contexts: Vec<Context>,
}

impl<'a> Runner<'a> {
    /// `rows` windows go through the model at a time.
    fn new(
        model: &Decoder<QuantLinear>,
        structure: &'a Structure,
        calibration: &Windows,
        rows: usize,
        sharing: &Sharing,
    ) -> Result<Self> {
        calibration.check(model)?;
        let tape = Tape::default();
        let model = model.valid().try_map(|path, base| Ok::<_, Error>(Probe::new(path, base, &tape)))?;
        let mut batches = calibration.batches_of(rows);
        let shares = sharing.of(batches.len())?;
        batches = batches.drain(shares.own()).collect();
        let contexts =
            batches.iter().map(|tokens| model.context(tokens, None)).collect::<kiln_models::Result<_>>()?;
        let linears = structure.by_path().into_iter();
        let pruned_inputs = linears.filter(|(_, linear)| linear.loses_inputs()).map(|(path, _)| path);
        Ok(Self { model, tape, structure, pruned_inputs: pruned_inputs.collect(), shares, batches, contexts })
    }

    fn embed(&self) -> Vec<Tensor<3>> {
        self.contexts.iter().map(|context| self.model.embed(context)).collect()
    }

    fn block(&self, index: usize, inputs: &[Tensor<3>]) -> Vec<Tensor<3>> {
        let both = inputs.iter().zip(&self.contexts);
        both.map(|(x, context)| self.model.block(index, x.clone(), context, None)).collect()
    }
}

/// Scores by gradients, and the mean loss of the calibration data in nats per token.
pub(crate) fn gradient_scores(
    model: &Decoder<QuantLinear>,
    structure: &Structure,
    criterion: Criterion,
    scored: Scored,
    calibration: &Windows,
    sharing: &Sharing,
) -> Result<(MatrixScores, f64)> {
    // Tokens of an expert don't tell which window they are of.
    let rows = match criterion.needs_fisher() && structure.layers.iter().any(|layer| layer.experts > 0) {
        true => 1,
        false => calibration.rows(),
    };
    let runner = Runner::new(model, structure, calibration, rows, sharing)?;
    let first = runner.shares.own().start;
    let blocks = runner.model.num_blocks();
    let mut inputs = vec![runner.embed()];
    for index in 0..blocks {
        inputs.push(runner.block(index, &inputs[index]));
    }
    let top = inputs.pop().unwrap_or_default();
    let mut gradients = Vec::new();
    let losses = runner.batches.iter().zip(top).map(|(tokens, x)| {
        let (sum, gradient) = top_gradient(&runner.model, tokens, x)?;
        gradients.push(gradient);
        Ok(sum)
    });
    let nll: f64 = runner.shares.in_order::<Error>(losses.collect())?.into_iter().sum();
    let windows = calibration.count();
    let targets = calibration.length() - 1;
    let mut scores = MatrixScores::new();
    for index in (0..blocks).rev() {
        let inputs = inputs.pop().unwrap_or_default();
        let of_part = |batches: Range<usize>| {
            let fisher = criterion.needs_fisher();
            let mut sums = BlockGradients { fisher, rows, windows, targets, by_path: BTreeMap::new() };
            for batch in batches.start - first..batches.end - first {
                let (input, dy) = (inputs[batch].clone(), gradients[batch].clone());
                gradients[batch] = runner.back(index, batch, input, dy, &mut sums)?;
            }
            Ok::<_, Error>(sums)
        };
        let sums = runner.shares.partial_sums(of_part, BlockGradients::merged);
        let sums = agreed(runner.shares.ranks(), sums)?;
        runner.score_block(index, criterion, scored, &sums, &mut scores)?;
    }
    Ok((scores, nll / (windows * targets) as f64))
}

/// Sum of the next-token losses of all rows, and its gradient at the residual stream after the last block.
fn top_gradient(
    model: &Decoder<Probe<QuantLinear>>,
    tokens: &TokenBatch,
    x: Tensor<3>,
) -> Result<(f64, Tensor<3>)> {
    let length = tokens.length;
    let next = |place: usize| tokens.ids.get(place + 1).copied().unwrap_or(0);
    let ids: Vec<u32> = (0..tokens.ids.len()).map(next).collect();
    let scored: Vec<bool> = (0..ids.len()).map(|place| place % length != length - 1).collect();
    Ok(residual_gradient(model, tokens, x, Targets { ids: &ids, scored: &scored }, LOGIT_ROWS)?)
}

/// Gradients of one block's weights, summed over the batches.
#[derive(Clone)]
struct BlockGradients {
    fisher: bool,
    /// Windows of a batch.
    rows: usize,
    /// Windows of all batches.
    windows: usize,
    /// Targets of a window.
    targets: usize,
    /// `[d_input, d_output]`: gradient of the mean loss, mean square of the windows' gradients.
    by_path: BTreeMap<String, (Tensor<2>, Option<Tensor<2>>)>,
}

impl BlockGradients {
    /// `input` `[tokens, d_input]`, `d_output` `[tokens, d_output]` of the summed loss; the tokens are those of some windows, or
    /// of one window that are an expert's.
    fn add(&mut self, path: String, input: Tensor<2>, d_output: Tensor<2>) {
        let (windows, targets, length) = (self.windows as f32, self.targets as f32, self.targets + 1);
        let fisher = self.fisher.then(|| {
            let tokens = input.dims()[0];
            let length = if self.rows == 1 { tokens } else { length };
            let squares = (0..tokens / length.max(1)).map(|row| {
                let (x, dy) = (
                    input.clone().narrow(0, row * length, length),
                    d_output.clone().narrow(0, row * length, length),
                );
                x.transpose().matmul(dy).div_scalar(targets).square().div_scalar(windows)
            });
            squares.reduce(|sum, square| sum + square)
        });
        let gradient = input.transpose().matmul(d_output).div_scalar(targets * windows);
        self.add_sums(path, gradient, fisher.flatten());
    }

    fn add_sums(&mut self, path: String, gradient: Tensor<2>, fisher: Option<Tensor<2>>) {
        let new = match self.by_path.remove(&path) {
            Some((sum, squares)) => {
                let both = match (squares, fisher) {
                    (Some(sum), Some(square)) => Some(sum + square),
                    (one, other) => one.or(other),
                };
                (sum + gradient, both)
            }
            None => (gradient, fisher),
        };
        self.by_path.insert(path, new);
    }

    /// Those of the batches of both.
    fn merged(mut self, other: Self) -> Self {
        other
            .by_path
            .into_iter()
            .for_each(|(path, (gradient, fisher))| self.add_sums(path, gradient, fisher));
        self
    }

    /// Gradient and, where it is asked for, mean square of a weight of `length` values in host memory, and whether there
    /// were any: 1, or -0.0, which as all values then adds nothing.
    fn flat(&self, path: &str, length: usize) -> Result<Vec<f32>> {
        let parts = if self.fisher { 2 } else { 1 };
        let mut flat = match self.by_path.get(path) {
            Some((gradient, fisher)) => {
                let mut flat = to_host(path, gradient.clone())?;
                if let Some(fisher) = fisher {
                    flat.extend(to_host(path, fisher.clone())?);
                }
                flat.resize(parts * length, -0.0);
                flat.push(1.0);
                return Ok(flat);
            }
            None => vec![-0.0; parts * length],
        };
        flat.push(-0.0);
        Ok(flat)
    }
}

impl Runner<'_> {
    /// Runs one block again under autodiff; returns the gradient of its input.
    fn back(
        &self,
        index: usize,
        batch: usize,
        input: Tensor<3>,
        dy: Tensor<3>,
        sums: &mut BlockGradients,
    ) -> Result<Tensor<3>> {
        let input = Tensor::from_inner(input).require_grad();
        let (y, calls) = self
            .tape
            .record(Keep::Gradients, || self.model.block(index, input.clone(), &self.contexts[batch], None));
        let mut found = (y * Tensor::from_inner(dy)).sum().backward();
        for call in calls {
            let Some(gradient) = call.tap.and_then(|tap| tap.grad_remove(&mut found)) else { continue };
            sums.add(call.path, call.input, gradient);
        }
        input
            .grad_remove(&mut found)
            .ok_or_else(|| Error::mismatch(format!("block {index}"), "a gradient of its input", "none"))
    }

    fn score_block(
        &self,
        index: usize,
        criterion: Criterion,
        scored: Scored,
        sums: &PairwiseSum<BlockGradients>,
        scores: &mut MatrixScores,
    ) -> Result<()> {
        let linears = self.structure.by_path();
        for (path, slot) in self.model.slots() {
            if linears.get(path.as_str()).is_none_or(|linear| linear.layer != index) {
                continue;
            }
            let [d_input, d_output] = slot.shape();
            let length = d_input * d_output;
            let own = sums.clone().try_map(|sums| sums.flat(&path, length));
            let parts = if criterion.needs_fisher() { 2 } else { 1 };
            let mut gradient = self.shares.sum(own, parts * length + 1)?;
            // No token may have gone to an expert.
            if gradient.pop() == Some(0.0) && linears[path.as_str()].expert.is_none() {
                return Err(Error::mismatch(path, "a gradient", "none"));
            }
            let fisher = gradient.split_off(length);
            let matrix = Matrix { weight: to_host(&path, slot.weight())?, gradient, fisher, d_output };
            let values = matrix.scores(criterion, scored.axis(linears[path.as_str()].input));
            if values.iter().any(|value| !value.is_finite()) {
                return Err(Error::mismatch(path, "finite importances", "one that is not"));
            }
            scores.insert(path, values);
        }
        Ok(())
    }
}

impl Runner<'_> {
    /// Statistics of the inputs of a block's o and down over all ranks' batches; `outputs` gets the block's for this rank's.
    fn input_statistics(
        &self,
        index: usize,
        inputs: &[Tensor<3>],
        outputs: &mut Vec<Tensor<3>>,
    ) -> Result<BTreeMap<String, InputStatistics>> {
        let linears = self.structure.linears.iter();
        let linears = linears.filter(|linear| linear.layer == index && linear.loses_inputs());
        let width = |linear: &Coupling| {
            let along = self.structure.layers[index].along(linear.input);
            along.map_or(1, |(group, unit)| group.count * unit)
        };
        let widths: Vec<(&str, usize)> =
            linears.map(|linear| (linear.path.as_str(), width(linear))).collect();
        let mut own = || -> Result<Vec<f64>> {
            let mut numbers = Vec::new();
            for (x, context) in inputs.iter().zip(&self.contexts) {
                let (output, calls) = self.tape.record_of(&self.pruned_inputs, Keep::Inputs, || {
                    self.model.block(index, x.clone(), context, None)
                });
                outputs.push(output);
                let mut of_batch: BTreeMap<String, InputStatistics> = BTreeMap::new();
                for call in calls {
                    let [_, width] = call.input.dims();
                    let inputs = to_host(&call.path, call.input)?;
                    of_batch.insert(call.path, InputStatistics::of(&inputs, width));
                }
                for &(path, width) in &widths {
                    // No token may have gone to an expert.
                    let found = of_batch.remove(path).unwrap_or_else(|| InputStatistics::of(&[], width));
                    if found.mean.len() != width {
                        return Err(Error::mismatch(path, format!("{width} inputs"), found.mean.len()));
                    }
                    numbers.push(found.count as f64);
                    numbers.extend(found.mean.into_iter().chain(found.deviations));
                }
            }
            Ok(numbers)
        };
        let mut block: BTreeMap<String, InputStatistics> = BTreeMap::new();
        let numbers = self.shares.in_order(own())?;
        let mut rest = &numbers[..];
        for &(path, width) in widths.iter().cycle() {
            let Some((of_batch, later)) = rest.split_at_checked(1 + 2 * width) else { break };
            let (mean, deviations) = (of_batch[1..=width].to_vec(), of_batch[1 + width..].to_vec());
            let found = InputStatistics { count: of_batch[0] as usize, mean, deviations };
            block.entry(path.to_owned()).or_default().merge(&found);
            rest = later;
        }
        Ok(block)
    }
}

/// Statistics of the inputs of o and down, by path, and the influence of each block.
#[derive(Debug, Default)]
pub(crate) struct Statistics {
    pub inputs: BTreeMap<String, InputStatistics>,
    /// `1 - mean(cos(input, output))` of each block's residual stream, over tokens.
    pub influence: Vec<f64>,
}

/// Decides which inputs of a block's o and down stay, from the statistics of that block: paths and flags.
pub(crate) type Decide<'a> =
    &'a mut dyn FnMut(usize, &BTreeMap<String, InputStatistics>) -> Result<Vec<(String, Vec<bool>)>>;

/// One forward pass. With `decide`, each block's output is computed again without what it drops, so that later blocks
/// see what the pruned model will give them.
pub(crate) fn statistics(
    model: &Decoder<QuantLinear>,
    structure: &Structure,
    calibration: &Windows,
    sharing: &Sharing,
    mut decide: Option<Decide>,
) -> Result<Statistics> {
    let runner = Runner::new(model, structure, calibration, calibration.rows(), sharing)?;
    let mut found = Statistics::default();
    let mut inputs = runner.embed();
    for index in 0..runner.model.num_blocks() {
        let mut outputs = Vec::new();
        let block = runner.input_statistics(index, &inputs, &mut outputs)?;
        if let Some(decide) = &mut decide {
            for (path, stays) in decide(index, &block)? {
                let mask: Vec<f32> = stays.iter().map(|&stays| f32::from(u8::from(stays))).collect();
                runner.tape.mask(&path, Tensor::from_floats(mask.as_slice(), &runner.model.device()));
            }
            outputs = runner.block(index, &inputs);
        }
        found.influence.push(influence(&runner.shares, &inputs, &outputs)?);
        found.inputs.extend(block);
        inputs = outputs;
    }
    Ok(found)
}

/// Of the blocks' streams of all ranks.
fn influence(shares: &Shares, inputs: &[Tensor<3>], outputs: &[Tensor<3>]) -> Result<f64> {
    let of_batch = |(x, y): (&Tensor<3>, &Tensor<3>)| -> Result<[f64; 2]> {
        let [_, _, width] = x.dims();
        let (x, y) = (to_host("x", x.clone())?, to_host("y", y.clone())?);
        Ok([cosines(&x, &y, width).iter().sum(), (x.len() / width) as f64])
    };
    let own = inputs.iter().zip(outputs).map(of_batch).collect::<Result<Vec<_>>>();
    let (mut sum, mut count) = (0.0, 0.0);
    for of_batch in shares.in_order(own.map(|sums| sums.concat()))?.chunks_exact(2) {
        sum += of_batch[0];
        count += of_batch[1];
    }
    Ok(1.0 - sum / count.max(1.0))
}

/// Cosines between rows of `width` values; 1 where a row is zero, as such a block changes nothing there.
fn cosines(x: &[f32], y: &[f32], width: usize) -> Vec<f64> {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let rows = x.chunks(width).zip(y.chunks(width));
    rows.map(|(x, y)| {
        let norms = (dot(x, x) * dot(y, y)).sqrt();
        if norms > 0.0 { dot(x, y) / norms } else { 1.0 }
    })
    .collect()
}

/// Block influence (ShortGPT, arXiv 2403.03853) of given residual streams, `[tokens, width]` row-major before and after
/// a block: `1 - mean(cos)`.
///
/// # Panics
/// If the two differ in length or hold no whole rows.
pub fn block_influence(before: &[f32], after: &[f32], width: usize) -> f64 {
    assert!(
        width > 0 && before.len() == after.len() && before.len().is_multiple_of(width),
        "rows of {width}"
    );
    let cosines = cosines(before, after, width);
    1.0 - cosines.iter().sum::<f64>() / cosines.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use burn::{
        optim::{GradientsAccumulator, GradientsParams},
        tensor::Device,
    };
    use kiln_models::{Checkpoint, DriverOptions, LoadOptions, loss_and_gradients};
    use kiln_testkit::read;

    use super::*;

    /// Gradients of all weights of a dense model at once, `[d_input, d_output]`, of the mean loss of some windows.
    fn plain(model: &Decoder<QuantLinear>, windows: &[Vec<u32>]) -> BTreeMap<String, Vec<f32>> {
        let model = model.clone().unfreeze().train();
        let tokens = TokenBatch::new(windows).unwrap();
        let next = windows.iter().flat_map(|w| w[1..].iter().copied().chain([0]));
        let ids: Vec<u32> = next.collect();
        let length = windows[0].len();
        let scored: Vec<bool> = (0..ids.len()).map(|place| place % length != length - 1).collect();
        let targets = Targets { ids: &ids, scored: &scored };
        let mut gradients = GradientsAccumulator::new();
        loss_and_gradients(&model, &tokens, targets, &DriverOptions::default(), &mut gradients).unwrap();
        let gradients: GradientsParams = gradients.grads();
        let count = (windows.len() * (length - 1)) as f32;
        let mut found = BTreeMap::new();
        for (path, slot) in model.slots() {
            let QuantLinear::Dense(linear) = slot else { panic!("{path} is packed") };
            let gradient = gradients.get::<2>(linear.weight.id).unwrap();
            found.insert(path, read(gradient / count));
        }
        found
    }

    #[test]
    fn block_by_block_scores_are_those_of_plain_autodiff() {
        for folder in ["llama-untied-bf16", "qwen3-untied-f32", "opt-f32"] {
            let checkpoint = Checkpoint::open(kiln_testkit::testdata(&format!("tiny/{folder}"))).unwrap();
            let (model, _) = checkpoint.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
            let structure = Structure::of(model.config());
            let windows: Vec<Vec<u32>> =
                (0..5).map(|w| (0..12).map(|i| (w * 31 + i * 7 + i * i) % 256).collect()).collect();
            // Batches of 2, 2 and 1 windows.
            let calibration = Windows::new(windows.clone()).unwrap().with_rows(2);
            let whole = plain(&model, &windows);
            let single: Vec<_> = windows.iter().map(|w| plain(&model, std::slice::from_ref(w))).collect();
            for criterion in [
                Criterion::TaylorVector,
                Criterion::TaylorFirst,
                Criterion::TaylorSecond,
                Criterion::TaylorMixed,
            ] {
                for scored in [Scored::Groups, Scored::Hidden] {
                    let (found, loss) = gradient_scores(
                        &model,
                        &structure,
                        criterion,
                        scored,
                        &calibration,
                        &Sharing::default(),
                    )
                    .unwrap();
                    assert!(loss > 4.0 && loss < 7.0, "{loss}");
                    for (path, slot) in model.slots() {
                        let path = path.as_str();
                        let mean =
                            |i: usize| single.iter().map(|g| g[path][i] * g[path][i]).sum::<f32>() / 5.0;
                        let weight = read(slot.weight());
                        let matrix = Matrix {
                            gradient: whole[path].clone(),
                            fisher: (0..weight.len()).map(mean).collect(),
                            d_output: slot.shape()[1],
                            weight,
                        };
                        let axis = scored.axis(structure.by_path()[path].input);
                        let expected = matrix.scores(criterion, axis);
                        let largest = expected.iter().copied().fold(0.0, f64::max);
                        for (found, expected) in found[path].iter().zip(&expected) {
                            let difference = (found - expected).abs();
                            assert!(
                                difference < 1e-4 * largest,
                                "{folder} {criterion:?} {path}: {found} {expected}"
                            );
                        }
                    }
                }
            }
        }
    }
}
