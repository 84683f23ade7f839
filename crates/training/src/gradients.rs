//! Whole-model operations on gradients that Burn does parameter by parameter.

use burn::{
    module::{Module, ModuleVisitor, Param},
    optim::{GradientsAccumulator, GradientsParams},
    tensor::{Tensor, TensorData},
};
use kiln_quant_core::{fused, to_host_together};

use crate::Result;

/// Sums of squares, a few for each gradient; the root of their sum is the norm of all gradients as one vector.
pub(crate) fn squares<M: Module>(model: &M, gradients: &GradientsParams) -> Vec<Tensor<1>> {
    struct Flat<'a> {
        gradients: &'a GradientsParams,
        found: Vec<Tensor<1>>,
    }
    impl ModuleVisitor for Flat<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(gradient) = self.gradients.get::<D>(param.id) {
                let count: usize = gradient.dims().iter().product();
                self.found.push(gradient.reshape([count]));
            }
        }
    }
    let mut flat = Flat { gradients, found: Vec::new() };
    model.visit(&mut flat);
    fused::square_sums(flat.found)
}

/// Gradients of both together.
pub(crate) fn added<M: Module>(model: &M, a: GradientsParams, b: GradientsParams) -> GradientsParams {
    let mut sum = GradientsAccumulator::new();
    sum.accumulate(model, a);
    sum.accumulate(model, b);
    sum.grads()
}

/// The gradients of all trained parameters in one buffer, in the order of the module, and after them for each parameter
/// whether it has one: 1, or -0.0. The values of one that it hasn't are -0.0, which adds nothing to anything.
pub(crate) fn flattened<M: Module>(model: &M, gradients: GradientsParams) -> Result<Vec<f32>> {
    struct Flatten {
        gradients: GradientsParams,
        parts: Vec<Tensor<1>>,
        found: Vec<f32>,
    }
    impl ModuleVisitor for Flatten {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let value = param.val();
            if !value.is_require_grad() {
                return;
            }
            let gradient = self.gradients.remove::<D>(param.id);
            self.found.push(if gradient.is_some() { 1.0 } else { -0.0 });
            let count: usize = value.dims().iter().product();
            let absent = || Tensor::full([count], -0.0, &value.device().without_autodiff());
            self.parts.push(gradient.map_or_else(absent, |gradient| gradient.reshape([count])));
        }
    }
    let mut flatten = Flatten { gradients, parts: Vec::new(), found: Vec::new() };
    model.visit(&mut flatten);
    let mut flat = to_host_together("gradients", flatten.parts)?;
    flat.extend(flatten.found);
    Ok(flat)
}

/// Length of what [`flattened`] gives.
pub(crate) fn flat_length<M: Module>(model: &M) -> usize {
    trained_sizes(model).into_iter().map(|size| size + 1).sum()
}

/// Numbers of values of the trained parameters, in the order of the module.
fn trained_sizes<M: Module>(model: &M) -> Vec<usize> {
    struct Sizes(Vec<usize>);
    impl ModuleVisitor for Sizes {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let value = param.val();
            if value.is_require_grad() {
                self.0.push(value.dims().iter().product());
            }
        }
    }
    let mut sizes = Sizes(Vec::new());
    model.visit(&mut sizes);
    sizes.0
}

/// The gradients that a buffer like [`flattened`]'s, or a sum of such, has.
pub(crate) fn unflattened<M: Module>(model: &M, flat: &[f32]) -> GradientsParams {
    struct Unflatten<'a> {
        values: &'a [f32],
        found: &'a [f32],
        gradients: GradientsParams,
    }
    impl ModuleVisitor for Unflatten<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let value = param.val();
            if !value.is_require_grad() {
                return;
            }
            let (values, rest) = self.values.split_at(value.dims().iter().product());
            let (found, others) = self.found.split_at(1);
            (self.values, self.found) = (rest, others);
            if found[0] > 0.0 {
                let device = value.device().without_autodiff();
                let gradient =
                    Tensor::<D>::from_data(TensorData::new(values.to_vec(), value.dims()), &device);
                self.gradients.register(param.id, gradient);
            }
        }
    }
    let (values, found) = flat.split_at(flat.len() - trained_sizes(model).len());
    let mut unflatten = Unflatten { values, found, gradients: GradientsParams::new() };
    model.visit(&mut unflatten);
    unflatten.gradients
}
