//! Linears that tell what flows through them.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use burn::{module::Module, tensor::Tensor};
use kiln_quant_core::{Projection, QuantLinear};

/// What is being recorded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Recording {
    #[default]
    Nothing,
    /// Inputs.
    Inputs,
    /// Inputs, and something whose gradient is that of the output.
    Gradients,
}

/// One call of one linear.
#[derive(Debug)]
pub(crate) struct Call {
    pub path: String,
    /// `[tokens, d_input]`, without a graph.
    pub input: Tensor<2>,
    /// Zeros `[tokens, d_output]` that were added to the output, under autodiff.
    pub tap: Option<Tensor<2>>,
}

#[derive(Debug, Default)]
struct State {
    recording: Recording,
    calls: Vec<Call>,
    masks: BTreeMap<String, Tensor<1>>,
}

/// What all linears of a model record to; clones are the same tape.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tape(Arc<Mutex<State>>);

impl Tape {
    fn state(&self) -> MutexGuard<'_, State> {
        // The state is whole between any two statements, so a panic elsewhere doesn't spoil it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn record(&self, recording: Recording) {
        self.state().recording = recording;
    }

    /// The calls since the last time, in their order.
    pub fn take(&self) -> Vec<Call> {
        std::mem::take(&mut self.state().calls)
    }

    /// Multiplies the input of the linear `path` from now on.
    pub fn mask(&self, path: &str, mask: Tensor<1>) {
        self.state().masks.insert(path.into(), mask);
    }
}

/// A linear on a tape. Its weight stays frozen, packed or dense: the weight's gradient is `inputᵀ · d(tap)`, made where
/// it is wanted and for as many tokens at a time as are wanted.
#[derive(Module, Debug)]
pub(crate) struct Tapped {
    base: QuantLinear,
    #[module(skip)]
    path: String,
    /// Whether inputs are wanted when nothing but inputs is recorded.
    #[module(skip)]
    listens: bool,
    #[module(skip)]
    tape: Tape,
}

impl Tapped {
    pub fn new(path: &str, base: QuantLinear, listens: bool, tape: &Tape) -> Self {
        Self { base, path: path.into(), listens, tape: tape.clone() }
    }
}

fn rows<const D: usize>(x: Tensor<D>) -> Tensor<2> {
    let sizes = x.dims();
    x.reshape([sizes[..D - 1].iter().product::<usize>(), sizes[D - 1]])
}

impl Projection for Tapped {
    fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let mut state = self.tape.state();
        let x = match state.masks.get(&self.path) {
            Some(mask) => x * mask.clone().unsqueeze(),
            None => x,
        };
        let (path, y) = (self.path.clone(), self.base.forward(x.clone()));
        match state.recording {
            Recording::Inputs if self.listens => {
                state.calls.push(Call { path, input: rows(x), tap: None });
                y
            }
            Recording::Nothing | Recording::Inputs => y,
            Recording::Gradients => {
                let sizes = y.dims();
                let count = sizes[..D - 1].iter().product();
                let input = rows(x.inner());
                let zeros = Tensor::<2>::zeros([count, sizes[D - 1]], &input.device());
                let tap = Tensor::from_inner(zeros).require_grad();
                state.calls.push(Call { path, input, tap: Some(tap.clone()) });
                y + tap.reshape(sizes)
            }
        }
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
}
