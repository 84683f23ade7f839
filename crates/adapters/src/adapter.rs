//! What an adapter is.

use burn::{
    module::{Module, ModuleDisplay},
    tensor::Tensor,
};
use kiln_quant_core::Projection;

/// A trained part beside a frozen linear layer.
///
/// It sees its base only as a [`Projection`], so that every adapter works on every weight format.
pub trait Adapter: Module + ModuleDisplay {
    /// The output of `base` and adapter together, the base's bias included.
    ///
    /// # Shapes
    /// `[.., d_input]` → `[.., d_output]`.
    ///
    /// # Panics
    /// If the sizes of `x`, `base` and the adapter don't fit together.
    fn forward<P: Projection, const D: usize>(&self, base: &P, x: Tensor<D>) -> Tensor<D>;

    /// The dense weight `[d_input, d_output]` whose product with `x`, plus the base's bias, is
    /// [`forward`](Self::forward) outside training.
    ///
    /// # Panics
    /// If the sizes of `base` and the adapter don't fit together.
    fn merged_weight<P: Projection>(&self, base: &P) -> Tensor<2>;
}
