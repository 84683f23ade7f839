//! The slot of a linear layer in a model.

use burn::{
    module::{Module, ModuleDisplay},
    nn::Linear,
    tensor::Tensor,
};

use crate::{
    Compute,
    fused::{self, LowRankSpec},
};

/// What a model needs of a linear layer, whatever stands behind it: dense, packed, or either with an adapter.
///
/// Models are generic over one projection (`Decoder<P>`), so that quantizing, adapting and merging change the type and
/// nothing else.
pub trait Projection: Module + ModuleDisplay + 'static {
    /// `x · W + b`.
    ///
    /// # Shapes
    /// `[.., d_input]` → `[.., d_output]`.
    ///
    /// # Panics
    /// If the last size of `x` is not `d_input`.
    fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D>;

    /// [`forward`](Self::forward) with a [`low_rank`](fused::low_rank) update of its result.
    ///
    /// # Shapes
    /// `x` `[rows, d_input]`, `a` `[d_input, rank]`, `b` `[rank, d_output]` → `[rows, d_output]`.
    ///
    /// # Panics
    /// If the sizes don't fit together.
    fn forward_low_rank(&self, x: Tensor<2>, a: Tensor<2>, b: Tensor<2>, update: LowRankSpec) -> Tensor<2> {
        fused::low_rank(self.forward(x.clone()), x, a, b, update)
    }

    /// The dense weight `[d_input, d_output]`, made on demand; the bias is not in it.
    fn weight(&self) -> Tensor<2>;

    /// The bias `[d_output]`, if there is one.
    fn bias(&self) -> Option<Tensor<1>>;

    /// `[d_input, d_output]`.
    fn shape(&self) -> [usize; 2];

    /// What operands of its products are rounded to; adapters around it do the same.
    fn compute(&self) -> Compute {
        Compute::F32
    }

    /// Rounds operands of its products so from now on, where its weight allows it; a model tells all its slots.
    fn set_compute(&mut self, _compute: Compute) {}

    /// Whether [`forward`](Self::forward) takes an input rounded by [`fused::operand`] for f32 and answers in f32.
    fn takes_operands(&self) -> bool {
        false
    }

    /// Hears where training stands before every forward pass; seeded dropout needs it, most projections don't.
    fn at(&self, _place: Place) {}
}

/// `x`, which all of `readers` read and nothing else, as a graph should keep it for them; see [`fused::operand`].
pub fn operand_of<P: Projection, const D: usize>(x: Tensor<D>, readers: &[&P]) -> Tensor<D> {
    match readers {
        [first, others @ ..]
            if first.takes_operands()
                && others.iter().all(|one| one.takes_operands() && one.compute() == first.compute()) =>
        {
            fused::operand(x, first.compute())
        }
        _ => x,
    }
}

/// Where a forward pass stands in a training run; masks drawn at random depend on nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The step, counted from 0.
    pub step: u64,
    /// The micro-batch within the step.
    pub micro_batch: u64,
    /// Whether gradients are taken: `false` while evaluating.
    pub training: bool,
}

impl Projection for Linear {
    fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        Linear::forward(self, x)
    }

    fn weight(&self) -> Tensor<2> {
        self.weight.val()
    }

    fn bias(&self) -> Option<Tensor<1>> {
        self.bias.as_ref().map(|bias| bias.val())
    }

    fn shape(&self) -> [usize; 2] {
        self.weight.lazy_shape().dims()
    }
}
