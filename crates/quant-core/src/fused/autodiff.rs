//! Backward passes of the fused operations, for every backend that has the kernels.

use burn::backend::{
    TensorMetadata,
    autodiff::{
        Autodiff,
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::{FloatDType, Shape};

use super::{Drops, FusedKernels, FusedOps, Gating, LowRankSpec, NormSpec, RotaryPairs, Scores, sinks};
use crate::{Compute, SuperLayout};

pub(super) fn dropped<B: FusedOps>(x: FloatTensor<B>, drops: Option<Drops>) -> FloatTensor<B> {
    match drops {
        Some(drops) => B::dropout(x, drops),
        None => x,
    }
}

/// `factor · drop(x) · a`.
pub(super) fn low<B: FusedOps + FusedKernels>(
    x: FloatTensor<B>,
    a: FloatTensor<B>,
    spec: LowRankSpec,
) -> FloatTensor<B> {
    B::scaled_matmul(dropped::<B>(x, spec.drops), a, spec.factor, spec.compute)
}

/// Declares a backward pass: `$op` with state `$state` and `$n` parents.
macro_rules! backward {
    ($op:ident, $n:literal, $state:ty, |$parents:ident, $st:pat_param, $dy:ident, $grads:ident| $body:block) => {
        #[derive(Debug)]
        struct $op;
        impl<B: FusedOps + FusedKernels> Backward<B, $n> for $op {
            type State = $state;
            fn backward(self, ops: Ops<Self::State, $n>, $grads: &mut Gradients, _: &mut Checkpointer) {
                let $parents = ops.parents;
                let $dy = $grads.consume::<B>(&ops.node);
                let $st = ops.state;
                $body
            }
        }
    };
}

impl<B: FusedOps + FusedKernels, C: CheckpointStrategy> FusedOps for Autodiff<B, C> {
    fn norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, spec: NormSpec) -> FloatTensor<Self> {
        backward!(
            Norm,
            2,
            (FloatTensor<B>, FloatTensor<B>, NormSpec),
            |parents, (x, weight, spec), dy, grads| {
                let [node_x, node_weight] = parents;
                if let Some(node) = node_weight {
                    let d_weight = B::norm_dweight(x.clone(), weight.clone(), dy.clone(), spec);
                    grads.register::<B>(node.id, d_weight);
                }
                if let Some(node) = node_x {
                    grads.register::<B>(node.id, B::norm_dx(x, weight, dy, spec));
                }
            }
        );
        match Norm.prepare::<C>([x.node(), weight.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (x, weight) = (x.into_primitive(), weight.into_primitive());
                prep.finish((x.clone(), weight.clone(), spec), B::norm(x, weight, spec))
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::norm(x.into_primitive(), weight.into_primitive(), spec))
            }
        }
    }

    fn operand(x: FloatTensor<Self>, compute: Compute) -> FloatTensor<Self> {
        backward!(Operand, 1, (), |parents, (), dy, grads| {
            let [node] = parents;
            if let Some(node) = node {
                grads.register::<B>(node.id, dy);
            }
        });
        match Operand.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((), B::kept(x.into_primitive(), compute)),
            OpsKind::UnTracked(prep) => prep.finish(x.into_primitive()),
        }
    }

    fn gated(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        gating: Gating,
        compute: Compute,
    ) -> FloatTensor<Self> {
        backward!(
            Gated,
            2,
            (FloatTensor<B>, FloatTensor<B>, Gating),
            |parents, (gate, up, gating), dy, grads| {
                let (d_gate, d_up) = B::gated_backward(gate, up, dy, gating);
                for (node, gradient) in parents.into_iter().zip([d_gate, d_up]) {
                    if let Some(node) = node {
                        grads.register::<B>(node.id, gradient);
                    }
                }
            }
        );
        match Gated.prepare::<C>([gate.node(), up.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (gate, up) = (gate.into_primitive(), up.into_primitive());
                let (y, gate, up) = B::gated_with_kept(gate, up, gating, compute);
                prep.finish((gate, up, gating), y)
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::gated(gate.into_primitive(), up.into_primitive(), gating, compute))
            }
        }
    }

    fn rotate(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        pairs: RotaryPairs,
        sign: f32,
    ) -> FloatTensor<Self> {
        backward!(
            Rotate,
            1,
            (FloatTensor<B>, FloatTensor<B>, RotaryPairs, f32),
            |parents, (cos, sin, pairs, sign), dy, grads| {
                let [node] = parents;
                if let Some(node) = node {
                    grads.register::<B>(node.id, B::rotate(dy, cos, sin, pairs, -sign));
                }
            }
        );
        let (cos, sin) = (cos.into_primitive(), sin.into_primitive());
        match Rotate.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let state = (cos.clone(), sin.clone(), pairs, sign);
                prep.finish(state, B::rotate(x.into_primitive(), cos, sin, pairs, sign))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::rotate(x.into_primitive(), cos, sin, pairs, sign)),
        }
    }

    fn attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        query_segments: IntTensor<Self>,
        key_segments: IntTensor<Self>,
        scores: Scores,
    ) -> FloatTensor<Self> {
        backward!(
            Attention,
            3,
            ([FloatTensor<B>; 5], [IntTensor<B>; 2], Scores),
            |parents, ([q, k, v, out, log_sums], [query_segments, key_segments], scores), dy, grads| {
                let (dq, dk, dv) =
                    B::attention_backward(q, k, v, out, log_sums, dy, query_segments, key_segments, scores);
                for (node, gradient) in parents.into_iter().zip([dq, dk, dv]) {
                    if let Some(node) = node {
                        grads.register::<B>(node.id, gradient);
                    }
                }
            }
        );
        match Attention.prepare::<C>([q.node(), k.node(), v.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (q, k, v) = (q.into_primitive(), k.into_primitive(), v.into_primitive());
                let segments = [query_segments.clone(), key_segments.clone()];
                let (out, log_sums) = B::attention_with_log_sums(
                    q.clone(),
                    k.clone(),
                    v.clone(),
                    query_segments,
                    key_segments,
                    scores,
                );
                let [q, k, v] = [q, k, v].map(|operand| B::kept(operand, scores.compute));
                let state = ([q, k, v, B::kept_result(out.clone()), log_sums], segments, scores);
                prep.finish(state, out)
            }
            OpsKind::UnTracked(prep) => prep.finish(<B as FusedOps>::attention(
                q.into_primitive(),
                k.into_primitive(),
                v.into_primitive(),
                query_segments,
                key_segments,
                scores,
            )),
        }
    }

    fn attention_with_sinks(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        sinks: FloatTensor<Self>,
        query_segments: IntTensor<Self>,
        key_segments: IntTensor<Self>,
        scores: Scores,
    ) -> FloatTensor<Self> {
        backward!(
            AttentionWithSinks,
            4,
            ([FloatTensor<B>; 6], [IntTensor<B>; 2], Scores),
            |parents,
             ([q, k, v, sinks, out, log_sums], [query_segments, key_segments], scores),
             dy,
             grads| {
                let [node_q, node_k, node_v, node_sinks] = parents;
                if let Some(node) = node_sinks {
                    let d_sinks = sinks::backward::<B>(sinks, out.clone(), log_sums.clone(), dy.clone());
                    grads.register::<B>(node.id, d_sinks);
                }
                let (dq, dk, dv) =
                    B::attention_backward(q, k, v, out, log_sums, dy, query_segments, key_segments, scores);
                for (node, gradient) in [node_q, node_k, node_v].into_iter().zip([dq, dk, dv]) {
                    if let Some(node) = node {
                        grads.register::<B>(node.id, gradient);
                    }
                }
            }
        );
        let segments = [query_segments, key_segments];
        let trained = sinks.is_tracked();
        let nodes = [q.node(), k.node(), v.node(), sinks.node()];
        let inputs = [q, k, v, sinks].map(|tensor| tensor.into_primitive());
        let (out, log_sums) = sinks::forward::<B>(inputs.clone(), segments.clone(), scores);
        match AttentionWithSinks.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let [q, k, v, sinks] = inputs;
                let [q, k, v] = [q, k, v].map(|operand| B::kept(operand, scores.compute));
                // The sinks' gradient is of the result.
                let kept = if trained { out.clone() } else { B::kept_result(out.clone()) };
                prep.finish(([q, k, v, sinks, kept, log_sums], segments, scores), out)
            }
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn cross_entropy(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self> {
        backward!(CrossEntropy, 1, FloatTensor<B>, |parents, gradient, dy, grads| {
            let [node] = parents;
            if let Some(node) = node {
                grads.register::<B>(node.id, B::scale_rows(gradient, dy));
            }
        });
        match CrossEntropy.prepare::<C>([logits.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (losses, gradient) = B::cross_entropy_with_gradient(logits.into_primitive(), targets);
                prep.finish(gradient, losses)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::cross_entropy(logits.into_primitive(), targets)),
        }
    }

    fn dropout(x: FloatTensor<Self>, drops: Drops) -> FloatTensor<Self> {
        backward!(Dropout, 1, Drops, |parents, drops, dy, grads| {
            let [node] = parents;
            if let Some(node) = node {
                grads.register::<B>(node.id, B::dropout(dy, drops));
            }
        });
        match Dropout.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(drops, B::dropout(x.into_primitive(), drops)),
            OpsKind::UnTracked(prep) => prep.finish(B::dropout(x.into_primitive(), drops)),
        }
    }

    fn seeded(x: FloatTensor<Self>, gradient: FloatTensor<Self>) -> FloatTensor<Self> {
        backward!(Seeded, 1, FloatTensor<B>, |parents, gradient, _dy, grads| {
            let [node] = parents;
            if let Some(node) = node {
                grads.register::<B>(node.id, gradient);
            }
        });
        let gradient = gradient.into_primitive();
        match Seeded.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let zero = B::seeded(x.into_primitive(), gradient.clone());
                prep.finish(gradient, zero)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::seeded(x.into_primitive(), gradient)),
        }
    }

    fn low_rank(
        y: FloatTensor<Self>,
        x: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        spec: LowRankSpec,
    ) -> FloatTensor<Self> {
        backward!(
            LowRank,
            4,
            ([FloatTensor<B>; 4], LowRankSpec),
            |parents, ([x, a, b, low], spec), dy, grads| {
                let [node_y, node_x, node_a, node_b] = parents;
                let LowRankSpec { factor, drops, compute } = spec;
                if let Some(node) = node_b {
                    let d_b = B::matmul(B::float_transpose(low), dy.clone(), compute);
                    grads.register::<B>(node.id, d_b);
                }
                let d_low = B::scaled_matmul(dy.clone(), B::float_transpose(b), factor, compute);
                if let Some(node) = node_a {
                    let x = dropped::<B>(x, drops);
                    let d_a = B::matmul(B::float_transpose(x), d_low.clone(), compute);
                    grads.register::<B>(node.id, d_a);
                }
                if let Some(node) = node_x {
                    let dx = B::matmul(d_low, B::float_transpose(a), compute);
                    grads.register::<B>(node.id, dropped::<B>(dx, drops));
                }
                if let Some(node) = node_y {
                    grads.register::<B>(node.id, dy);
                }
            }
        );
        let compute = spec.compute;
        match LowRank.prepare::<C>([y.node(), x.node(), a.node(), b.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (x, a, b) = (x.into_primitive(), a.into_primitive(), b.into_primitive());
                let low = low::<B>(x.clone(), a.clone(), spec);
                let state = ([x, a, b.clone(), low.clone()], spec);
                prep.finish(state, B::add_matmul(y.into_primitive(), low, b, compute))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::low_rank(
                y.into_primitive(),
                x.into_primitive(),
                a.into_primitive(),
                b.into_primitive(),
                spec,
            )),
        }
    }

    fn matmul(a: FloatTensor<Self>, b: FloatTensor<Self>, compute: Compute) -> FloatTensor<Self> {
        backward!(
            Matmul,
            2,
            (Option<FloatTensor<B>>, Option<FloatTensor<B>>, Compute),
            |parents, (a, b, compute), dy, grads| {
                let [node_a, node_b] = parents;
                if let (Some(node), Some(b)) = (node_a, b) {
                    grads.register::<B>(node.id, B::matmul(dy.clone(), B::float_transpose(b), compute));
                }
                if let (Some(node), Some(a)) = (node_b, a) {
                    grads.register::<B>(node.id, B::matmul(B::float_transpose(a), dy, compute));
                }
            }
        );
        match Matmul.prepare::<C>([a.node(), b.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                // Only what a gradient needs is kept.
                let (for_b, for_a) = (b.is_tracked(), a.is_tracked());
                let (a, b) = (a.into_primitive(), b.into_primitive());
                let state = (for_b.then(|| a.clone()), for_a.then(|| b.clone()), compute);
                prep.finish(state, B::matmul(a, b, compute))
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::matmul(a.into_primitive(), b.into_primitive(), compute))
            }
        }
    }

    fn add_matmul(
        y: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        compute: Compute,
    ) -> FloatTensor<Self> {
        backward!(
            AddMatmul,
            3,
            (FloatTensor<B>, FloatTensor<B>, Compute),
            |parents, (a, b, compute), dy, grads| {
                let [node_y, node_a, node_b] = parents;
                if let Some(node) = node_a {
                    grads.register::<B>(node.id, B::matmul(dy.clone(), B::float_transpose(b), compute));
                }
                if let Some(node) = node_b {
                    grads.register::<B>(node.id, B::matmul(B::float_transpose(a), dy.clone(), compute));
                }
                if let Some(node) = node_y {
                    grads.register::<B>(node.id, dy);
                }
            }
        );
        match AddMatmul.prepare::<C>([y.node(), a.node(), b.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (a, b) = (a.into_primitive(), b.into_primitive());
                let state = (a.clone(), b.clone(), compute);
                prep.finish(state, B::add_matmul(y.into_primitive(), a, b, compute))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::add_matmul(
                y.into_primitive(),
                a.into_primitive(),
                b.into_primitive(),
                compute,
            )),
        }
    }

    fn sum_groups(x: FloatTensor<Self>, size: usize) -> FloatTensor<Self> {
        backward!(SumGroups, 1, usize, |parents, size, dy, grads| {
            let [node] = parents;
            if let Some(node) = node {
                let shape = dy.shape();
                let zeros = Shape::from(vec![shape[0], shape[1] * size]);
                let zeros = B::float_zeros(zeros, &dy.device(), FloatDType::F32);
                grads.register::<B>(node.id, B::add_repeated(zeros, dy, size));
            }
        });
        match SumGroups.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(size, B::sum_groups(x.into_primitive(), size)),
            OpsKind::UnTracked(prep) => prep.finish(B::sum_groups(x.into_primitive(), size)),
        }
    }

    fn add_repeated(y: FloatTensor<Self>, update: FloatTensor<Self>, times: usize) -> FloatTensor<Self> {
        backward!(AddRepeated, 2, usize, |parents, times, dy, grads| {
            let [node_y, node_update] = parents;
            if let Some(node) = node_update {
                grads.register::<B>(node.id, B::sum_groups(dy.clone(), times));
            }
            if let Some(node) = node_y {
                grads.register::<B>(node.id, dy);
            }
        });
        let parts = AddRepeated.prepare::<C>([y.node(), update.node()]).compute_bound().stateful();
        let sum = B::add_repeated(y.into_primitive(), update.into_primitive(), times);
        match parts {
            OpsKind::Tracked(prep) => prep.finish(times, sum),
            OpsKind::UnTracked(prep) => prep.finish(sum),
        }
    }

    fn reordered(x: FloatTensor<Self>, order: IntTensor<Self>, places: IntTensor<Self>) -> FloatTensor<Self> {
        backward!(Reordered, 1, [IntTensor<B>; 2], |parents, [order, places], dy, grads| {
            let [node] = parents;
            if let Some(node) = node {
                grads.register::<B>(node.id, B::reordered(dy, places, order));
            }
        });
        match Reordered.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let y = B::reordered(x.into_primitive(), order.clone(), places.clone());
                prep.finish([order, places], y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::reordered(x.into_primitive(), order, places)),
        }
    }

    fn double_scales(
        codes: IntTensor<Self>,
        nested: FloatTensor<Self>,
        offset: FloatTensor<Self>,
        size: [usize; 2],
    ) -> FloatTensor<Self> {
        // Constants: nothing to track.
        let scales = B::double_scales(codes, nested.into_primitive(), offset.into_primitive(), size);
        FloatTensor::<Self>::new(scales)
    }

    fn super_scales(
        words: IntTensor<Self>,
        factors: FloatTensor<Self>,
        layout: SuperLayout,
    ) -> FloatTensor<Self> {
        FloatTensor::<Self>::new(B::super_scales(words, factors.into_primitive(), layout))
    }
}
