//! Whole-model operations on gradients that Burn does parameter by parameter.

use burn::{
    module::{Module, ModuleVisitor, Param},
    optim::GradientsParams,
    tensor::Tensor,
};
use kiln_quant_core::fused;

/// Sums of squares, a few for each gradient; the root of their sum is the norm of all gradients as one vector.
pub(crate) fn squares<M: Module>(model: &M, gradients: &GradientsParams) -> Vec<Tensor<1>> {
    struct Squares<'a> {
        gradients: &'a GradientsParams,
        sums: Vec<Tensor<1>>,
    }
    impl ModuleVisitor for Squares<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(gradient) = self.gradients.get::<D>(param.id) {
                self.sums.push(fused::square_sums(gradient));
            }
        }
    }
    let mut squares = Squares { gradients, sums: Vec::new() };
    model.visit(&mut squares);
    squares.sums
}
