//! The slot of a linear layer during calibration: what stands in it can be exchanged and listened to from outside.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::{module::Module, tensor::Tensor};
use kiln_adapters::{Adapted, Lora};
use kiln_quant_core::{Projection, QuantLinear};

/// What stands in a slot, during calibration and after it.
pub(crate) type Slot = Adapted<QuantLinear, Lora>;

/// A slot behind a handle; clones are the same slot.
#[derive(Module, Debug)]
pub struct Station {
    #[module(skip)]
    state: Handle,
}

#[derive(Debug, Clone)]
struct Handle(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    slot: Slot,
    listening: bool,
    heard: Option<[Tensor<2>; 2]>,
}

impl Station {
    pub(crate) fn new(slot: Slot) -> Self {
        Self { state: Handle(Arc::new(Mutex::new(State { slot, listening: false, heard: None }))) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic while the lock was held leaves a whole slot.
        self.state.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What stands in the slot; tensors are shared, not copied.
    pub(crate) fn slot(&self) -> Slot {
        self.state().slot.clone()
    }

    pub(crate) fn set(&self, slot: Slot) {
        self.state().slot = slot;
    }

    /// Keeps input and output of the next passes, until [`heard`](Self::heard).
    pub(crate) fn listen(&self) {
        self.state().listening = true;
    }

    /// Input and output `[rows, ..]` of the last pass; `None` if there was none. Ends the listening.
    pub(crate) fn heard(&self) -> Option<[Tensor<2>; 2]> {
        let mut state = self.state();
        state.listening = false;
        state.heard.take()
    }
}

impl Projection for Station {
    fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let (slot, listening) = {
            let state = self.state();
            (state.slot.clone(), state.listening)
        };
        let mut sizes = x.dims();
        let rows = sizes[..D - 1].iter().product::<usize>();
        let x = x.reshape([rows, sizes[D - 1]]);
        let y = Projection::forward(&slot, x.clone());
        sizes[D - 1] = y.dims()[1];
        if listening {
            self.state().heard = Some([x, y.clone()]);
        }
        y.reshape(sizes)
    }

    fn weight(&self) -> Tensor<2> {
        self.slot().weight()
    }

    fn bias(&self) -> Option<Tensor<1>> {
        self.slot().bias()
    }

    fn shape(&self) -> [usize; 2] {
        self.state().slot.shape()
    }
}
