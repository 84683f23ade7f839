//! Backward passes of the fused operations on Flex.

use std::sync::Arc;

use burn::backend::{
    autodiff::{
        Autodiff,
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    flex::{Flex, FlexTensor},
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::DType;

use super::{
    AttentionSpec, FusedOps, Gating, attention,
    flex::{cross_entropy_rows, rms_norm_backward, rows_of, shape_of, targets_of, values_mut},
    groups,
};
use crate::ops::flex::{contiguous, floats, tensor};

/// Declares a backward pass: `$op` with state `$state` and `$n` parents.
macro_rules! backward {
    ($op:ident, $n:literal, $state:ty, |$parents:ident, $st:pat_param, $dy:ident, $grads:ident| $body:block) => {
        #[derive(Debug)]
        struct $op;
        impl Backward<Flex, $n> for $op {
            type State = $state;
            fn backward(self, ops: Ops<Self::State, $n>, $grads: &mut Gradients, _: &mut Checkpointer) {
                let $parents = ops.parents;
                let $dy = $grads.consume::<Flex>(&ops.node);
                let $st = ops.state;
                $body
            }
        }
    };
}

impl<C: CheckpointStrategy> FusedOps for Autodiff<Flex, C> {
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        backward!(RmsNorm, 2, (FlexTensor, FlexTensor, f32), |parents, (x, weight, eps), dy, grads| {
            let (shape, width) = (shape_of(&x), weight.layout().shape().num_elements());
            let (x, weight, dy) = (contiguous(x), contiguous(weight), contiguous(dy));
            let (dx, d_weight) = rms_norm_backward(floats(&x), floats(&weight), floats(&dy), eps);
            let [node_x, node_weight] = parents;
            if let Some(node) = node_x {
                grads.register::<Flex>(node.id, tensor(dx, shape, DType::F32));
            }
            if let Some(node) = node_weight {
                grads.register::<Flex>(node.id, tensor(d_weight, [width], DType::F32));
            }
        });
        match RmsNorm.prepare::<C>([x.node(), weight.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (x, weight) = (x.into_primitive(), weight.into_primitive());
                prep.finish((x.clone(), weight.clone(), eps), Flex::rms_norm(x, weight, eps))
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(Flex::rms_norm(x.into_primitive(), weight.into_primitive(), eps))
            }
        }
    }

    fn gated(gate: FloatTensor<Self>, up: FloatTensor<Self>, gating: Gating) -> FloatTensor<Self> {
        backward!(Gated, 2, (FlexTensor, FlexTensor, Gating), |parents, (gate, up, gating), dy, grads| {
            let shape = shape_of(&gate);
            let (gate, up, mut d_gate) = (contiguous(gate), contiguous(up), contiguous(dy));
            let d_up = gating.backward(floats(&gate), floats(&up), values_mut(&mut d_gate));
            for (node, gradient) in parents.into_iter().zip([d_gate, tensor(d_up, shape, DType::F32)]) {
                if let Some(node) = node {
                    grads.register::<Flex>(node.id, gradient);
                }
            }
        });
        match Gated.prepare::<C>([gate.node(), up.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (gate, up) = (gate.into_primitive(), up.into_primitive());
                prep.finish((gate.clone(), up.clone(), gating), Flex::gated(gate, up, gating))
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(Flex::gated(gate.into_primitive(), up.into_primitive(), gating))
            }
        }
    }

    fn rotate(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        sign: f32,
    ) -> FloatTensor<Self> {
        backward!(Rotate, 1, (FlexTensor, FlexTensor, f32), |parents, (cos, sin, sign), dy, grads| {
            let [node] = parents;
            if let Some(node) = node {
                grads.register::<Flex>(node.id, Flex::rotate(dy, cos, sin, -sign));
            }
        });
        let (cos, sin) = (cos.into_primitive(), sin.into_primitive());
        match Rotate.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let state = (cos.clone(), sin.clone(), sign);
                prep.finish(state, Flex::rotate(x.into_primitive(), cos, sin, sign))
            }
            OpsKind::UnTracked(prep) => prep.finish(Flex::rotate(x.into_primitive(), cos, sin, sign)),
        }
    }

    fn attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        spec: AttentionSpec,
    ) -> FloatTensor<Self> {
        backward!(
            Attention,
            3,
            ([FlexTensor; 4], Arc<Vec<f32>>, AttentionSpec),
            |parents, ([q, k, v, out], lse, spec), dy, grads| {
                let gradients = attention::backward([q, k, v, out, dy], &lse, &spec);
                for (node, gradient) in parents.into_iter().zip(gradients) {
                    if let Some(node) = node {
                        grads.register::<Flex>(node.id, gradient);
                    }
                }
            }
        );
        match Attention.prepare::<C>([q.node(), k.node(), v.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (q, k, v) = (q.into_primitive(), k.into_primitive(), v.into_primitive());
                let (out, lse) = attention::forward(q.clone(), k.clone(), v.clone(), &spec);
                prep.finish(([q, k, v, out.clone()], Arc::new(lse), spec), out)
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(Flex::attention(q.into_primitive(), k.into_primitive(), v.into_primitive(), spec))
            }
        }
    }

    fn cross_entropy(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self> {
        backward!(CrossEntropy, 1, FlexTensor, |parents, gradient, dy, grads| {
            let [node] = parents;
            let ([_, classes], dy, mut gradient) = (rows_of(&gradient), contiguous(dy), gradient);
            for (row, dy) in values_mut(&mut gradient).chunks_exact_mut(classes).zip(floats(&dy)) {
                // The usual loss is a plain sum.
                if *dy != 1.0 {
                    row.iter_mut().for_each(|x| *x *= dy);
                }
            }
            if let Some(node) = node {
                grads.register::<Flex>(node.id, gradient);
            }
        });
        let [rows, classes] = rows_of(logits.primitive());
        match CrossEntropy.prepare::<C>([logits.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let mut logits = contiguous(logits.into_primitive());
                let nll = cross_entropy_rows(values_mut(&mut logits), &targets_of(&targets), classes);
                prep.finish(logits, tensor(nll, [rows], DType::F32))
            }
            OpsKind::UnTracked(prep) => prep.finish(Flex::cross_entropy(logits.into_primitive(), targets)),
        }
    }

    fn add_matmul(y: FloatTensor<Self>, a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self> {
        use burn::backend::ops::FloatTensorOps;
        backward!(AddMatmul, 3, (FlexTensor, FlexTensor), |parents, (a, b), dy, grads| {
            let [node_y, node_a, node_b] = parents;
            if let Some(node) = node_a {
                let b = b.transpose(0, 1);
                grads.register::<Flex>(node.id, Flex::float_matmul(dy.clone(), b));
            }
            if let Some(node) = node_b {
                grads.register::<Flex>(node.id, Flex::float_matmul(a.transpose(0, 1), dy.clone()));
            }
            if let Some(node) = node_y {
                grads.register::<Flex>(node.id, dy);
            }
        });
        match AddMatmul.prepare::<C>([y.node(), a.node(), b.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (a, b) = (a.into_primitive(), b.into_primitive());
                prep.finish((a.clone(), b.clone()), Flex::add_matmul(y.into_primitive(), a, b))
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(Flex::add_matmul(y.into_primitive(), a.into_primitive(), b.into_primitive()))
            }
        }
    }

    fn sum_groups(x: FloatTensor<Self>, size: usize) -> FloatTensor<Self> {
        backward!(SumGroups, 1, usize, |parents, size, dy, grads| {
            let [node] = parents;
            if let Some(node) = node {
                let ([rows, groups], dy) = (rows_of(&dy), contiguous(dy));
                let mut dx = vec![0.0; rows * groups * size];
                groups::add_repeated(&mut dx, floats(&dy), size);
                grads.register::<Flex>(node.id, tensor(dx, [rows, groups * size], DType::F32));
            }
        });
        match SumGroups.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(size, Flex::sum_groups(x.into_primitive(), size)),
            OpsKind::UnTracked(prep) => prep.finish(Flex::sum_groups(x.into_primitive(), size)),
        }
    }

    fn add_repeated(y: FloatTensor<Self>, update: FloatTensor<Self>, times: usize) -> FloatTensor<Self> {
        backward!(AddRepeated, 2, usize, |parents, times, dy, grads| {
            let [node_y, node_update] = parents;
            if let Some(node) = node_update {
                grads.register::<Flex>(node.id, Flex::sum_groups(dy.clone(), times));
            }
            if let Some(node) = node_y {
                grads.register::<Flex>(node.id, dy);
            }
        });
        let parts = AddRepeated.prepare::<C>([y.node(), update.node()]).compute_bound().stateful();
        let sum = Flex::add_repeated(y.into_primitive(), update.into_primitive(), times);
        match parts {
            OpsKind::Tracked(prep) => prep.finish(times, sum),
            OpsKind::UnTracked(prep) => prep.finish(sum),
        }
    }

    fn double_scales(
        codes: IntTensor<Self>,
        nested: FloatTensor<Self>,
        offset: FloatTensor<Self>,
        shape: [usize; 2],
    ) -> FloatTensor<Self> {
        // Constants: nothing to track.
        let scales = Flex::double_scales(codes, nested.into_primitive(), offset.into_primitive(), shape);
        FloatTensor::<Self>::new(scales)
    }
}
