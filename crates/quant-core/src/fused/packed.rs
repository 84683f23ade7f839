//! A product with a packed weight and a low-rank update of it as one operation: the input has one gradient, not two to be
//! summed, and where a product can go on with the factors of the update, result and gradient go through memory once.

use burn::backend::{
    Dispatch,
    autodiff::{
        Autodiff,
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    backend_extension,
    tensor::{FloatTensor, IntTensor},
};
#[cfg(feature = "fusion")]
use burn::tensor::Shape;
use burn::tensor::{DType, Int, Tensor};

use super::{
    FusedKernels, FusedOps, LowRankSpec,
    autodiff::{dropped, low},
};
use crate::ops::{PackedKernels, PackedOps, PackedSpec};

/// A packed weight's tensors.
type Parts<F, I> = (I, F, F);

#[cfg(feature = "fusion")]
fn result_of(x: &Shape, spec: &PackedSpec, transposed: bool) -> Shape {
    Shape::from(vec![x[0], if transposed { spec.d_input } else { spec.d_output }])
}

/// Not differentiable.
#[backend_extension(
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    Fusion: cfg(feature = "fusion")
)]
pub(crate) trait PackedUpdate: burn::backend::Backend {
    /// `x · W + left · right`; `x · Wᵀ + left · right` if `transposed`.
    #[fusion(dtype = x, shape = result_of(x, spec, *transposed))]
    #[allow(clippy::too_many_arguments)] // the macro takes tensors one by one
    fn packed_update(
        x: FloatTensor<Self>,
        codes: IntTensor<Self>,
        scales: FloatTensor<Self>,
        offsets: FloatTensor<Self>,
        left: FloatTensor<Self>,
        right: FloatTensor<Self>,
        spec: PackedSpec,
        transposed: bool,
    ) -> FloatTensor<Self>;
}

/// Differentiable with respect to `x`, `scales`, `offsets`, `a` and `b`.
#[backend_extension(
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    Autodiff,
    Fusion: cfg(feature = "fusion")
)]
pub(crate) trait PackedLowRank: burn::backend::Backend {
    /// See [`packed_low_rank`].
    #[fusion(dtype = x, shape = { let _ = update; result_of(x, spec, false) })]
    #[allow(clippy::too_many_arguments)] // the macro takes tensors one by one
    fn packed_low_rank(
        x: FloatTensor<Self>,
        codes: IntTensor<Self>,
        scales: FloatTensor<Self>,
        offsets: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        spec: PackedSpec,
        update: LowRankSpec,
    ) -> FloatTensor<Self>;
}

/// `x · W + factor · drop(x) · a · b`: [`packed_linear`](crate::ops::packed_linear) with a
/// [`low_rank`](super::low_rank) update, of f32 or what counts as it.
///
/// # Shapes
/// `x` `[rows, d_input]`, `a` `[d_input, rank]`, `b` `[rank, d_output]` → `[rows, d_output]`.
pub(crate) fn packed_low_rank(
    x: Tensor<2>,
    (codes, scales, offsets): Parts<Tensor<2>, Tensor<2, Int>>,
    [a, b]: [Tensor<2>; 2],
    spec: PackedSpec,
    update: LowRankSpec,
) -> Tensor<2> {
    let [a, b] = [a, b].map(|factor| factor.cast(DType::F32));
    Tensor::from_dispatch(Dispatch::packed_low_rank(
        x.into_dispatch(),
        codes.into_dispatch(),
        scales.into_dispatch(),
        offsets.into_dispatch(),
        a.into_dispatch(),
        b.into_dispatch(),
        spec,
        update,
    ))
}

/// [`PackedUpdate::packed_update`] as one product after the other.
pub(super) fn one_after_the_other<B: FusedOps + PackedOps + PackedKernels>(
    x: FloatTensor<B>,
    (codes, scales, offsets): Parts<FloatTensor<B>, IntTensor<B>>,
    [left, right]: [FloatTensor<B>; 2],
    spec: PackedSpec,
    transposed: bool,
) -> FloatTensor<B> {
    let y = match transposed {
        true => B::packed_linear_dx(x, codes, scales, offsets, spec),
        false => B::packed_linear(x, codes, scales, offsets, spec),
    };
    B::add_matmul(y, left, right, spec.compute)
}

#[derive(Debug, Clone)]
struct State<B: burn::backend::Backend> {
    x: FloatTensor<B>,
    parts: Parts<FloatTensor<B>, IntTensor<B>>,
    factors: [FloatTensor<B>; 2],
    low: FloatTensor<B>,
    spec: PackedSpec,
    update: LowRankSpec,
}

#[derive(Debug)]
struct LowRankOfPacked;

impl<B: FusedOps + FusedKernels + PackedKernels + PackedUpdate> Backward<B, 5> for LowRankOfPacked {
    type State = State<B>;

    fn backward(self, ops: Ops<Self::State, 5>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [node_x, node_scales, node_offsets, node_a, node_b] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        let State { x, parts: (codes, scales, offsets), factors: [a, b], low, spec, update } = ops.state;
        let LowRankSpec { factor, drops, compute } = update;
        if node_scales.is_some() || node_offsets.is_some() {
            let (x, dy, codes) = (x.clone(), dy.clone(), codes.clone());
            let (d_scales, d_offsets) =
                B::packed_linear_dparams(x, dy, codes, scales.clone(), offsets.clone(), spec);
            if let Some(node) = node_scales {
                grads.register::<B>(node.id, d_scales);
            }
            if let Some(node) = node_offsets.filter(|_| spec.has_offsets()) {
                grads.register::<B>(node.id, d_offsets);
            }
        }
        if let Some(node) = node_b {
            grads.register::<B>(node.id, B::matmul(B::float_transpose(low), dy.clone(), compute));
        }
        let d_low = B::scaled_matmul(dy.clone(), B::float_transpose(b), factor, compute);
        if let Some(node) = node_a {
            let x = B::float_transpose(dropped::<B>(x, drops));
            grads.register::<B>(node.id, B::matmul(x, d_low.clone(), compute));
        }
        if let Some(node) = node_x {
            let a = B::float_transpose(a);
            let dx = if drops.is_some() {
                let dx = B::packed_linear_dx(dy, codes, scales, offsets, spec);
                B::float_add(dx, dropped::<B>(B::matmul(d_low, a, compute), drops))
            } else {
                B::packed_update(dy, codes, scales, offsets, d_low, a, spec, true)
            };
            grads.register::<B>(node.id, dx);
        }
    }
}

impl<B, C: CheckpointStrategy> PackedLowRank for Autodiff<B, C>
where
    B: FusedOps + FusedKernels + PackedKernels + PackedUpdate + PackedLowRank,
{
    fn packed_low_rank(
        x: FloatTensor<Self>,
        codes: IntTensor<Self>,
        scales: FloatTensor<Self>,
        offsets: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        spec: PackedSpec,
        update: LowRankSpec,
    ) -> FloatTensor<Self> {
        let nodes = [x.node(), scales.node(), offsets.node(), a.node(), b.node()];
        let prepared = LowRankOfPacked.prepare::<C>(nodes).compute_bound().stateful();
        let (x, scales, offsets) = (x.into_primitive(), scales.into_primitive(), offsets.into_primitive());
        let (a, b) = (a.into_primitive(), b.into_primitive());
        match prepared {
            OpsKind::Tracked(prepared) => {
                let low = low::<B>(x.clone(), a.clone(), update);
                let state = State::<B> {
                    x: x.clone(),
                    parts: (codes.clone(), scales.clone(), offsets.clone()),
                    factors: [a, b.clone()],
                    low: low.clone(),
                    spec,
                    update,
                };
                prepared.finish(state, B::packed_update(x, codes, scales, offsets, low, b, spec, false))
            }
            OpsKind::UnTracked(prepared) => {
                prepared.finish(B::packed_low_rank(x, codes, scales, offsets, a, b, spec, update))
            }
        }
    }
}
