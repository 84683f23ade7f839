//! Whole-model operations on gradients that Burn does parameter by parameter.

use burn::{
    module::{Module, ModuleVisitor, Param},
    optim::GradientsParams,
    tensor::Tensor,
};
use kiln_quant_core::to_host;

use crate::Result;

/// The norm of all gradients together, as if they were one vector.
///
/// # Errors
/// A device that can't be read.
pub(crate) fn global_norm<M: Module>(model: &M, gradients: &GradientsParams) -> Result<f64> {
    struct Squares<'a> {
        gradients: &'a GradientsParams,
        sums: Vec<Tensor<1>>,
    }
    impl ModuleVisitor for Squares<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(gradient) = self.gradients.get::<D>(param.id) {
                self.sums.push(gradient.square().sum());
            }
        }
    }
    let mut squares = Squares { gradients, sums: Vec::new() };
    model.visit(&mut squares);
    if squares.sums.is_empty() {
        return Ok(0.0);
    }
    // One read for all, so that a GPU is waited for once.
    let sums = to_host("gradients", Tensor::cat(squares.sums, 0)).map_err(kiln_models::Error::from)?;
    Ok(sums.into_iter().map(f64::from).sum::<f64>().sqrt())
}

/// All gradients times `factor`.
pub(crate) fn scale<M: Module>(model: &M, gradients: GradientsParams, factor: f64) -> GradientsParams {
    struct Scale {
        from: GradientsParams,
        to: GradientsParams,
        factor: f64,
    }
    impl ModuleVisitor for Scale {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(gradient) = self.from.remove::<D>(param.id) {
                self.to.register(param.id, gradient.mul_scalar(self.factor));
            }
        }
    }
    let mut scale = Scale { from: gradients, to: GradientsParams::new(), factor };
    model.visit(&mut scale);
    scale.to
}
