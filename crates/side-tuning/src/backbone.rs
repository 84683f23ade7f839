//! What side tuning needs of a model beyond `CausalLm`, and how it keeps the model out of autodiff.

use burn::{
    module::{Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor},
    tensor::Device,
};
use kiln_models::{CausalLm, Decoder, config::ModelConfig};
use kiln_quant_core::Projection;

/// A model that a side network can be built for: one that tells its shape.
pub trait Backbone: CausalLm {
    /// The model's shape.
    fn model_config(&self) -> &ModelConfig;
}

impl<P: Projection> Backbone for Decoder<P> {
    fn model_config(&self) -> &ModelConfig {
        self.config()
    }
}

/// A module that stays outside autodiff, even inside one that is being trained.
///
/// Burn's [`train`](Module::train) moves every parameter to the autodiff device, frozen ones included, and with them
/// whatever is computed from them.
#[derive(Debug, Clone)]
pub(crate) struct Frozen<M>(M);

impl<M: Module> Frozen<M> {
    pub(crate) fn new(module: M) -> Self {
        Self(module.freeze().valid())
    }

    pub(crate) fn get(&self) -> &M {
        &self.0
    }

    pub(crate) fn into_inner(self) -> M {
        self.0
    }
}

impl<M: Module> Module for Frozen<M> {
    fn train(self) -> Self {
        self
    }

    fn valid(&self) -> Self {
        self.clone()
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        self.0.collect_devices(devices)
    }

    fn fork(self, device: &Device) -> Self {
        Self(self.0.fork(&device.clone().without_autodiff()))
    }

    fn to_device(self, device: &Device) -> Self {
        Self(self.0.to_device(&device.clone().without_autodiff()))
    }

    fn materialize(self) -> Self {
        Self(self.0.materialize())
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        self.0.visit(visitor);
    }

    fn map<V: ModuleMapper>(self, mapper: &mut V) -> Self {
        // Whatever was asked for, it stays frozen.
        Self::new(self.0.map(mapper))
    }
}

impl<M: Module + ModuleDisplay> ModuleDisplayDefault for Frozen<M> {
    fn content(&self, content: Content) -> Option<Content> {
        ModuleDisplayDefault::content(&self.0, content)
    }

    fn num_params(&self) -> usize {
        Module::num_params(&self.0)
    }
}

impl<M: Module + ModuleDisplay> ModuleDisplay for Frozen<M> {}
