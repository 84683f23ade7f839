//! A linear layer with its adapter.

use burn::{
    module::{Module, Param, ParamId},
    nn::Linear,
    tensor::Tensor,
};
use kiln_quant_core::{Compute, Place, Projection};

use crate::{Adapter, AnyAdapter};

/// A linear layer and, where there is one, its adapter: itself a [`Projection`], so that it stands in a model's slot.
///
/// Its [`weight`](Projection::weight) is the merged one.
#[derive(Module, Debug)]
pub struct Adapted<P: Projection, A: Adapter> {
    /// The layer, frozen.
    pub base: P,
    /// The adapter; `None` where the layer stays as it is.
    pub adapter: Option<A>,
}

impl<P: Projection, A: Adapter> Adapted<P, A> {
    /// Puts `adapter` on `base`, which is frozen.
    pub fn new(base: P, adapter: Option<A>) -> Self {
        Self { base: base.freeze(), adapter }
    }

    /// The layer without its adapter.
    pub fn into_base(self) -> P {
        self.base
    }

    /// One dense layer that computes the same outside training; its parameters are frozen and outside autodiff.
    ///
    /// Rounds once, in the type of the base's dense weight. Needs memory for that weight and for the adapter's.
    pub fn merge_dense(self) -> Linear {
        fn frozen<const D: usize>(tensor: Tensor<D>) -> Param<Tensor<D>> {
            // `Param::from_tensor` would ask for gradients.
            Param::initialized(ParamId::new(), tensor.without_autodiff())
        }
        Linear { weight: frozen(self.weight()), bias: self.bias().map(frozen) }
    }
}

impl<P: Projection, A: Adapter + Into<AnyAdapter>> Adapted<P, A> {
    /// The same with the adapter's kind as a run-time choice.
    pub fn into_any(self) -> Adapted<P, AnyAdapter> {
        Adapted { base: self.base, adapter: self.adapter.map(Into::into) }
    }
}

impl<P: Projection, A: Adapter> Projection for Adapted<P, A> {
    fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match &self.adapter {
            Some(adapter) => adapter.forward(&self.base, x),
            None => self.base.forward(x),
        }
    }

    fn weight(&self) -> Tensor<2> {
        match &self.adapter {
            Some(adapter) => adapter.merged_weight(&self.base),
            None => self.base.weight(),
        }
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

    fn takes_operands(&self) -> bool {
        self.base.takes_operands() && self.adapter.as_ref().is_none_or(Adapter::takes_operands)
    }

    fn at(&self, place: Place) {
        self.base.at(place);
        if let Some(adapter) = &self.adapter {
            adapter.at(place);
        }
    }
}
