//! The backward passes, written by hand: the graph keeps references to codes, scales and offsets, and `x` only when a
//! scale or offset is tracked. No dense weight lives in it.

use burn::backend::{
    autodiff::{
        Autodiff, NodeId,
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    tensor::{FloatTensor, IntTensor},
};

use super::{PackedKernels, PackedOps, PackedSpec};

#[derive(Debug, Clone)]
struct State<B: burn::backend::Backend> {
    /// Node of `x`, only when parameters are tracked.
    x: Option<NodeId>,
    codes: IntTensor<B>,
    scales: FloatTensor<B>,
    offsets: FloatTensor<B>,
    spec: PackedSpec,
}

impl<B: PackedOps + PackedKernels, C: CheckpointStrategy> PackedOps for Autodiff<B, C> {
    fn packed_linear(
        x: FloatTensor<Self>,
        codes: IntTensor<Self>,
        scales: FloatTensor<Self>,
        offsets: FloatTensor<Self>,
        spec: PackedSpec,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct PackedLinear;

        impl<B: PackedOps + PackedKernels> Backward<B, 3> for PackedLinear {
            type State = State<B>;

            fn backward(
                self,
                ops: Ops<Self::State, 3>,
                grads: &mut Gradients,
                checkpointer: &mut Checkpointer,
            ) {
                let [node_x, node_scales, node_offsets] = ops.parents;
                let dy = grads.consume::<B>(&ops.node);
                let State { x, codes, scales, offsets, spec } = ops.state;
                if let Some(x) = x {
                    let x: FloatTensor<B> = checkpointer.retrieve_node_output(x);
                    let (d_scales, d_offsets) = B::packed_linear_dparams(
                        x,
                        dy.clone(),
                        codes.clone(),
                        scales.clone(),
                        offsets.clone(),
                        spec,
                    );
                    if let Some(node) = node_scales {
                        grads.register::<B>(node.id, d_scales);
                    }
                    if let Some(node) = node_offsets.filter(|_| spec.has_offsets()) {
                        grads.register::<B>(node.id, d_offsets);
                    }
                }
                if let Some(node) = node_x {
                    grads.register::<B>(node.id, B::packed_linear_dx(dy, codes, scales, offsets, spec));
                }
            }
        }

        let learned = scales.is_tracked() || offsets.is_tracked();
        match PackedLinear.prepare::<C>([x.node(), scales.node(), offsets.node()]).compute_bound().stateful()
        {
            OpsKind::Tracked(mut prep) => {
                let state = State::<B> {
                    x: learned.then(|| prep.checkpoint(&x)),
                    codes: codes.clone(),
                    scales: scales.primitive().clone(),
                    offsets: offsets.primitive().clone(),
                    spec,
                };
                let y = B::packed_linear(
                    x.into_primitive(),
                    codes,
                    scales.into_primitive(),
                    offsets.into_primitive(),
                    spec,
                );
                prep.finish(state, y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::packed_linear(
                x.into_primitive(),
                codes,
                scales.into_primitive(),
                offsets.into_primitive(),
                spec,
            )),
        }
    }

    fn packed_dequantize(
        codes: IntTensor<Self>,
        scales: FloatTensor<Self>,
        offsets: FloatTensor<Self>,
        spec: PackedSpec,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct PackedDequantize;

        impl<B: PackedOps + PackedKernels> Backward<B, 2> for PackedDequantize {
            type State = State<B>;

            fn backward(
                self,
                ops: Ops<Self::State, 2>,
                grads: &mut Gradients,
                _checkpointer: &mut Checkpointer,
            ) {
                let [node_scales, node_offsets] = ops.parents;
                let dw = grads.consume::<B>(&ops.node);
                let State { codes, scales, offsets, spec, .. } = ops.state;
                let (d_scales, d_offsets) = B::packed_dequantize_dparams(dw, codes, scales, offsets, spec);
                if let Some(node) = node_scales {
                    grads.register::<B>(node.id, d_scales);
                }
                if let Some(node) = node_offsets.filter(|_| spec.has_offsets()) {
                    grads.register::<B>(node.id, d_offsets);
                }
            }
        }

        match PackedDequantize.prepare::<C>([scales.node(), offsets.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let state = State::<B> {
                    x: None,
                    codes: codes.clone(),
                    scales: scales.primitive().clone(),
                    offsets: offsets.primitive().clone(),
                    spec,
                };
                let dense =
                    B::packed_dequantize(codes, scales.into_primitive(), offsets.into_primitive(), spec);
                prep.finish(state, dense)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::packed_dequantize(
                codes,
                scales.into_primitive(),
                offsets.into_primitive(),
                spec,
            )),
        }
    }
}
