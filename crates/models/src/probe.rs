//! Linears that tell what flows through them.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use burn::{module::Module, tensor::Tensor};
use kiln_quant_core::{Compute, Place, Projection};

/// What a [`Tape`] keeps of each call of a linear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Inputs.
    Inputs,
    /// Inputs and outputs.
    Outputs,
    /// Inputs, without their graph, and a tap whose gradient is the output's. The pass must run under autodiff.
    Gradients,
}

/// One call of one linear.
#[derive(Debug, Clone)]
pub struct Call {
    /// The linear's path.
    pub path: String,
    /// `[tokens, d_input]`.
    pub input: Tensor<2>,
    /// `[tokens, d_output]`, of [`Keep::Outputs`].
    pub output: Option<Tensor<2>>,
    /// Zeros `[tokens, d_output]` that were added to the output under autodiff, of [`Keep::Gradients`].
    pub tap: Option<Tensor<2>>,
}

#[derive(Debug, Default)]
struct State {
    keep: Option<Keep>,
    /// The paths listened to; `None` for all.
    only: Option<Vec<String>>,
    calls: Vec<Call>,
    masks: BTreeMap<String, Tensor<1>>,
}

/// What all [`Probe`]s of a model report to; clones are the same tape.
///
/// ```
/// use burn::tensor::Device;
/// use kiln_models::{CausalLm, Checkpoint, Keep, LoadOptions, Probe, Slots, Tape, TokenBatch};
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/models/tiny-llama");
/// let (model, _) = Checkpoint::open(folder)?.load(&LoadOptions::default(), &Device::flex())?;
/// let tape = Tape::default();
/// let model = model.try_map(|path, linear| Ok::<_, kiln_models::Error>(Probe::new(path, linear, &tape)))?;
/// let context = model.context(&TokenBatch::new(&[vec![1, 2, 3]])?, None)?;
/// let (_, calls) = tape.record(Keep::Inputs, || model.block(0, model.embed(&context), &context, None));
/// assert_eq!(calls[0].path, "model.layers.0.self_attn.q_proj");
/// assert_eq!(calls[0].input.dims(), [3, 192]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Memory
/// What is kept, until the calls are dropped: run one block at a time.
#[derive(Debug, Clone, Default)]
pub struct Tape(Arc<Mutex<State>>);

impl Tape {
    fn state(&self) -> MutexGuard<'_, State> {
        // The state is whole between any two statements, so a panic elsewhere doesn't spoil it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `pass` and returns what it did with all calls, in their order.
    pub fn record<T>(&self, keep: Keep, pass: impl FnOnce() -> T) -> (T, Vec<Call>) {
        self.run(keep, None, pass)
    }

    /// As [`record`](Self::record), of the linears at `paths` only.
    pub fn record_of<T>(&self, paths: &[&str], keep: Keep, pass: impl FnOnce() -> T) -> (T, Vec<Call>) {
        self.run(keep, Some(paths.iter().map(ToString::to_string).collect()), pass)
    }

    fn run<T>(&self, keep: Keep, only: Option<Vec<String>>, pass: impl FnOnce() -> T) -> (T, Vec<Call>) {
        let set = |keep, only| {
            let mut state = self.state();
            (state.keep, state.only) = (keep, only);
            std::mem::take(&mut state.calls)
        };
        set(Some(keep), only);
        let result = pass();
        (result, set(None, None))
    }

    /// Multiplies the input of the linear `path` by `mask` `[d_input]` from now on.
    pub fn mask(&self, path: &str, mask: Tensor<1>) {
        self.state().masks.insert(path.into(), mask);
    }

    /// What the linear `path` is to do now.
    fn of(&self, path: &str) -> (Option<Tensor<1>>, Option<Keep>) {
        let state = self.state();
        let heard = state.only.as_ref().is_none_or(|only| only.iter().any(|listened| listened == path));
        (state.masks.get(path).cloned(), state.keep.filter(|_| heard))
    }
}

/// A projection on a [`Tape`]; computes what `base` computes.
///
/// A weight stays as it is, packed or dense, and needs no gradient: that of a weight is `inputᵀ · d(tap)`, made where
/// it is wanted and for as many tokens at a time as are wanted.
#[derive(Module, Debug)]
pub struct Probe<P: Projection> {
    /// The projection.
    pub base: P,
    #[module(skip)]
    path: String,
    #[module(skip)]
    tape: Tape,
}

impl<P: Projection> Probe<P> {
    /// `base`, which reports to `tape` under the name `path`.
    pub fn new(path: &str, base: P, tape: &Tape) -> Self {
        Self { base, path: path.into(), tape: tape.clone() }
    }
}

fn rows<const D: usize>(x: Tensor<D>) -> Tensor<2> {
    let sizes = x.dims();
    x.reshape([sizes[..D - 1].iter().product::<usize>(), sizes[D - 1]])
}

impl<P: Projection> Projection for Probe<P> {
    fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let (mask, keep) = self.tape.of(&self.path);
        let x = match mask {
            Some(mask) => x * mask.unsqueeze(),
            None => x,
        };
        let Some(keep) = keep else { return self.base.forward(x) };
        let y = self.base.forward(x.clone());
        let (call, y) = match keep {
            Keep::Inputs => ((rows(x), None, None), y),
            Keep::Outputs => ((rows(x), Some(rows(y.clone())), None), y),
            Keep::Gradients => {
                let input = rows(x.without_autodiff());
                let sizes = y.dims();
                let zeros = Tensor::<2>::zeros([input.dims()[0], sizes[D - 1]], &input.device());
                let tap = Tensor::from_inner(zeros).require_grad();
                ((input, None, Some(tap.clone())), y + tap.reshape(sizes))
            }
        };
        let (path, (input, output, tap)) = (self.path.clone(), call);
        self.tape.state().calls.push(Call { path, input, output, tap });
        y
    }

    fn weight(&self) -> Tensor<2> {
        self.base.weight()
    }

    fn bias(&self) -> Option<Tensor<1>> {
        self.base.bias()
    }

    fn shape(&self) -> [usize; 2] {
        self.base.shape()
    }

    fn compute(&self) -> Compute {
        self.base.compute()
    }

    fn set_compute(&mut self, compute: Compute) {
        self.base.set_compute(compute);
    }

    fn at(&self, place: Place) {
        self.base.at(place);
    }
}

#[cfg(test)]
mod tests {
    use burn::{
        module::{Param, ParamId},
        nn::Linear,
        tensor::Device,
    };
    use kiln_testkit::{assert_close, read, tensor};

    use super::*;

    fn linear(seed: u64, shape: [usize; 2]) -> Linear {
        let device = Device::flex();
        let frozen = Param::initialized(ParamId::new(), tensor(seed, shape, &device));
        Linear { weight: frozen, bias: None }
    }

    #[test]
    fn calls_are_kept_in_their_order_while_a_pass_is_recorded() {
        let (device, tape) = (Device::flex(), Tape::default());
        let [first, second] = [("a", linear(1, [4, 3])), ("b", linear(2, [3, 5]))]
            .map(|(path, base)| Probe::new(path, base, &tape));
        let x = tensor::<3>(3, [2, 3, 4], &device);
        let pass = || second.forward(first.forward(x.clone()));
        let expected = read(Projection::forward(&second.base, Projection::forward(&first.base, x.clone())));
        assert_eq!(read(pass()), expected);
        let (y, calls) = tape.record(Keep::Outputs, pass);
        assert_eq!(read(y.clone()), expected);
        let paths: Vec<&str> = calls.iter().map(|call| call.path.as_str()).collect();
        assert_eq!(paths, ["a", "b"]);
        assert_eq!(calls[0].input.dims(), [6, 4]);
        assert_eq!(read(calls[0].input.clone()), read(x.clone()));
        assert_eq!(read(calls[0].output.clone().unwrap()), read(calls[1].input.clone()));
        assert_eq!(read(calls[1].output.clone().unwrap()), read(y));
        let (_, calls) = tape.record_of(&["b"], Keep::Inputs, pass);
        assert!(calls.len() == 1 && calls[0].path == "b" && calls[0].output.is_none());
        // Nothing is left of the passes before, nor of one that isn't recorded.
        pass();
        assert!(tape.record(Keep::Inputs, || ()).1.is_empty());
    }

    #[test]
    fn taps_have_the_gradients_of_the_outputs() {
        let (device, tape) = (Device::flex(), Tape::default());
        let probe = Probe::new("a", linear(1, [4, 3]), &tape);
        let x = Tensor::from_inner(tensor::<2>(2, [5, 4], &device));
        let dy = tensor::<2>(3, [5, 3], &device);
        let (y, mut calls) = tape.record(Keep::Gradients, || probe.forward(x));
        // d/dy of sum(dy * y^2) = 2 dy y.
        let expected = read(y.clone().inner() * dy.clone() * 2.0);
        let mut gradients = (y.clone() * y * Tensor::from_inner(dy)).sum().backward();
        let Call { input, tap, .. } = calls.remove(0);
        let found = tap.unwrap().grad_remove(&mut gradients).unwrap();
        assert_close("tap", &read(found), &expected, 1e-6);
        assert_eq!(read(input), read(tensor::<2>(2, [5, 4], &device)));
    }

    #[test]
    fn a_mask_takes_inputs_away() {
        let (device, tape) = (Device::flex(), Tape::default());
        let probe = Probe::new("a", linear(1, [2, 3]), &tape);
        tape.mask("a", Tensor::from_floats([0.0, 1.0], &device));
        tape.mask("b", Tensor::zeros([2], &device));
        let (y, calls) = tape.record(Keep::Inputs, || probe.forward(Tensor::<2>::ones([1, 2], &device)));
        assert_eq!(read(calls[0].input.clone()), [0.0, 1.0]);
        assert_eq!(read(y), read(probe.weight().narrow(0, 1, 1)));
    }
}
