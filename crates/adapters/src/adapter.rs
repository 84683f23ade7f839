//! What an adapter is.

use burn::{
    module::{Module, ModuleDisplay},
    tensor::Tensor,
};
use kiln_quant_core::{Place, Projection};

/// A trained part beside a frozen linear layer.
///
/// It sees its base only as a [`Projection`], so that every adapter works on every weight format.
pub trait Adapter: Module + ModuleDisplay + 'static {
    /// The output of `base` and adapter together, given `y`, the output of `base` alone for `x`; both have the base's
    /// bias in them.
    ///
    /// # Shapes
    /// `x` `[rows, d_input]`, `y` and the result `[rows, d_output]`.
    ///
    /// # Panics
    /// If the sizes of `x`, `y`, `base` and the adapter don't fit together.
    fn adapt<P: Projection>(&self, base: &P, x: Tensor<2>, y: Tensor<2>) -> Tensor<2>;

    /// The dense weight `[d_input, d_output]` whose product with `x`, plus the base's bias, is
    /// [`forward`](Self::forward) outside training.
    ///
    /// # Panics
    /// If the sizes of `base` and the adapter don't fit together.
    fn merged_weight<P: Projection>(&self, base: &P) -> Tensor<2>;

    /// The output of `base` and adapter together, the base's bias included.
    ///
    /// # Shapes
    /// `[.., d_input]` → `[.., d_output]`.
    ///
    /// # Panics
    /// If the sizes of `x`, `base` and the adapter don't fit together.
    fn forward<P: Projection, const D: usize>(&self, base: &P, x: Tensor<D>) -> Tensor<D> {
        let ([d_input, d_output], mut sizes) = (base.shape(), x.dims());
        assert_eq!(sizes[D - 1], d_input, "an input of {sizes:?} for {d_input} inputs");
        let x = x.reshape([sizes.iter().product::<usize>() / d_input, d_input]);
        sizes[D - 1] = d_output;
        self.forward_rows(base, x).reshape(sizes)
    }

    /// [`forward`](Self::forward) of rows, for adapters that have a shorter way than through the output of `base` alone.
    ///
    /// # Shapes
    /// `[rows, d_input]` → `[rows, d_output]`.
    ///
    /// # Panics
    /// As [`forward`](Self::forward).
    fn forward_rows<P: Projection>(&self, base: &P, x: Tensor<2>) -> Tensor<2> {
        let y = base.forward(x.clone());
        self.adapt(base, x, y)
    }

    /// Whether it takes an input rounded by [`fused::operand`](kiln_quant_core::fused::operand) for f32, beside a base that
    /// does.
    fn takes_operands(&self) -> bool {
        false
    }

    /// Hears where training stands before every forward pass; adapters with dropout need it.
    fn at(&self, _place: Place) {}
}
