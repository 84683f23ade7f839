//! The slot of a linear layer during calibration: what stands in it can be exchanged from outside.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::{module::Module, tensor::Tensor};
use kiln_adapters::{Adapted, Lora};
use kiln_quant_core::{Compute, Plan, Projection, QuantLinear, Scheme};

/// What stands in a slot, during calibration and after it.
pub(crate) type Slot = Adapted<QuantLinear, Lora>;

/// A slot behind a handle; clones are the same slot.
#[derive(Module, Debug)]
pub struct Station {
    #[module(skip)]
    slot: Handle,
    /// Whether no scheme is for it.
    #[module(skip)]
    stays_dense: bool,
}

#[derive(Debug, Clone)]
struct Handle(Arc<Mutex<Slot>>);

impl Station {
    pub(crate) fn new(slot: Slot, stays_dense: bool) -> Self {
        Self { slot: Handle(Arc::new(Mutex::new(slot))), stays_dense }
    }

    /// The one of `schemes` that it gets.
    pub(crate) fn scheme(&self, path: &str, schemes: &Plan<Scheme>) -> Scheme {
        if self.stays_dense { Scheme::Dense } else { *schemes.get(path) }
    }

    fn lock(&self) -> MutexGuard<'_, Slot> {
        // A panic while the lock was held leaves a whole slot.
        self.slot.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What stands in the slot; tensors are shared, not copied.
    pub(crate) fn slot(&self) -> Slot {
        self.lock().clone()
    }

    pub(crate) fn set(&self, slot: Slot) {
        *self.lock() = slot;
    }
}

impl Projection for Station {
    fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let mut sizes = x.dims();
        let rows = sizes[..D - 1].iter().product::<usize>();
        let y = Projection::forward(&self.slot(), x.reshape([rows, sizes[D - 1]]));
        sizes[D - 1] = y.dims()[1];
        y.reshape(sizes)
    }

    fn weight(&self) -> Tensor<2> {
        self.slot().weight()
    }

    fn bias(&self) -> Option<Tensor<1>> {
        self.slot().bias()
    }

    fn shape(&self) -> [usize; 2] {
        self.lock().shape()
    }

    fn compute(&self) -> Compute {
        self.lock().compute()
    }

    fn set_compute(&mut self, compute: Compute) {
        self.lock().set_compute(compute);
    }
}
