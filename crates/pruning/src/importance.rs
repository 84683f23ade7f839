//! Running calibration data through a model, block by block, for what criteria look at.
//!
//! Memory beside the weights: the blocks' inputs, and the gradients of one block.

use std::collections::BTreeMap;

use burn::{module::Module, tensor::Tensor};
use kiln_models::{
    CausalLm, Context, Decoder, Keep, Probe, Slots, Tape, Targets, TokenBatch, Windows, families::Channels,
    residual_gradient,
};
use kiln_quant_core::{Projection, QuantLinear, to_host};

use crate::{
    Error, Result,
    criterion::{Axis, Criterion, InputStatistics, Matrix},
    structure::Structure,
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
    ) -> Result<Self> {
        calibration.check(model)?;
        let tape = Tape::default();
        let model = model.valid().try_map(|path, base| Ok::<_, Error>(Probe::new(path, base, &tape)))?;
        let batches = calibration.batches_of(rows);
        let contexts =
            batches.iter().map(|tokens| model.context(tokens, None)).collect::<kiln_models::Result<_>>()?;
        let linears = structure.by_path().into_iter();
        let pruned_inputs = linears.filter(|(_, linear)| linear.loses_inputs()).map(|(path, _)| path);
        Ok(Self { model, tape, structure, pruned_inputs: pruned_inputs.collect(), batches, contexts })
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
) -> Result<(MatrixScores, f64)> {
    // Tokens of an expert don't tell which window they are of.
    let rows = match criterion.needs_fisher() && structure.layers.iter().any(|layer| layer.experts > 0) {
        true => 1,
        false => calibration.rows(),
    };
    let runner = Runner::new(model, structure, calibration, rows)?;
    let blocks = runner.model.num_blocks();
    let mut inputs = vec![runner.embed()];
    for index in 0..blocks {
        inputs.push(runner.block(index, &inputs[index]));
    }
    let top = inputs.pop().unwrap_or_default();
    let (mut nll, mut gradients) = (0.0, Vec::new());
    for (tokens, x) in runner.batches.iter().zip(top) {
        let (sum, gradient) = top_gradient(&runner.model, tokens, x)?;
        nll += sum;
        gradients.push(gradient);
    }
    let windows = calibration.count();
    let targets = calibration.length() - 1;
    let mut scores = MatrixScores::new();
    for index in (0..blocks).rev() {
        let inputs = inputs.pop().unwrap_or_default();
        let mut sums = BlockGradients {
            fisher: criterion.needs_fisher(),
            rows,
            windows,
            targets,
            by_path: BTreeMap::new(),
        };
        for (batch, input) in inputs.into_iter().enumerate() {
            gradients[batch] = runner.back(index, batch, input, gradients[batch].clone(), &mut sums)?;
        }
        runner.score_block(index, criterion, scored, sums, &mut scores)?;
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
        let new = match self.by_path.remove(&path) {
            Some((sum, squares)) => {
                let both = match (squares, fisher.flatten()) {
                    (Some(sum), Some(square)) => Some(sum + square),
                    (one, other) => one.or(other),
                };
                (sum + gradient, both)
            }
            None => (gradient, fisher.flatten()),
        };
        self.by_path.insert(path, new);
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
        mut sums: BlockGradients,
        scores: &mut MatrixScores,
    ) -> Result<()> {
        let linears = self.structure.by_path();
        for (path, slot) in self.model.slots() {
            if linears.get(path.as_str()).is_none_or(|linear| linear.layer != index) {
                continue;
            }
            let (gradient, fisher) = match sums.by_path.remove(&path) {
                Some(found) => found,
                // An expert that no token went to.
                None if linears[path.as_str()].expert.is_some() => {
                    let zeros = Tensor::zeros(slot.shape(), &self.model.device());
                    let fisher = criterion.needs_fisher().then(|| Tensor::clone(&zeros));
                    (zeros, fisher)
                }
                None => return Err(Error::mismatch(path, "a gradient", "none")),
            };
            let host = |tensor: Tensor<2>| to_host(&path, tensor);
            let matrix = Matrix {
                weight: host(slot.weight())?,
                gradient: host(gradient)?,
                fisher: fisher.map(host).transpose()?.unwrap_or_default(),
                d_output: slot.shape()[1],
            };
            let values = matrix.scores(criterion, scored.axis(linears[path.as_str()].input));
            if values.iter().any(|value| !value.is_finite()) {
                return Err(Error::mismatch(path, "finite importances", "one that is not"));
            }
            scores.insert(path, values);
        }
        Ok(())
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
    mut decide: Option<Decide>,
) -> Result<Statistics> {
    let runner = Runner::new(model, structure, calibration, calibration.rows())?;
    let mut found = Statistics::default();
    let mut inputs = runner.embed();
    for index in 0..runner.model.num_blocks() {
        let mut block: BTreeMap<String, InputStatistics> = BTreeMap::new();
        let mut outputs = Vec::new();
        for (x, context) in inputs.iter().zip(&runner.contexts) {
            let (output, calls) = runner.tape.record_of(&runner.pruned_inputs, Keep::Inputs, || {
                runner.model.block(index, x.clone(), context, None)
            });
            outputs.push(output);
            for call in calls {
                let [_, width] = call.input.dims();
                let inputs = to_host(&call.path, call.input)?;
                block.entry(call.path).or_default().add(&inputs, width);
            }
        }
        for linear in structure.linears.iter().filter(|linear| linear.layer == index) {
            // An expert that no token went to.
            if linear.loses_inputs() && !block.contains_key(&linear.path) {
                let width =
                    structure.layers[index].along(linear.input).map_or(1, |(group, unit)| group.count * unit);
                block.entry(linear.path.clone()).or_default().add(&[], width);
            }
        }
        if let Some(decide) = &mut decide {
            for (path, stays) in decide(index, &block)? {
                let mask: Vec<f32> = stays.iter().map(|&stays| f32::from(u8::from(stays))).collect();
                runner.tape.mask(&path, Tensor::from_floats(mask.as_slice(), &runner.model.device()));
            }
            outputs = runner.block(index, &inputs);
        }
        found.influence.push(influence(&inputs, &outputs)?);
        found.inputs.extend(block);
        inputs = outputs;
    }
    Ok(found)
}

fn influence(inputs: &[Tensor<3>], outputs: &[Tensor<3>]) -> Result<f64> {
    let (mut sum, mut count) = (0.0, 0);
    for (x, y) in inputs.iter().zip(outputs) {
        let [_, _, width] = x.dims();
        let (x, y) = (to_host("x", x.clone())?, to_host("y", y.clone())?);
        sum += cosines(&x, &y, width).iter().sum::<f64>();
        count += x.len() / width;
    }
    Ok(1.0 - sum / count.max(1) as f64)
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
                    let (found, loss) =
                        gradient_scores(&model, &structure, criterion, scored, &calibration).unwrap();
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
