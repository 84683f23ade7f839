//! Attention sinks on top of attention without them: one more score in each softmax, whose weight goes nowhere, makes the
//! others smaller by one factor.
//!
//! With `L` the logarithm of a query's sum of exponentials and `s` its head's sink, the sum with the sink has `L' = log(e^L
//! + e^s)`. The result is the one without the sink times `e^(L - L')`; and attention's own backward pass gives the right
//! gradients if it is told that result and `L'`, since weights come from `L'` there.

use burn::backend::{
    Backend, TensorMetadata,
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::Shape;

use super::{FusedKernels, Scores};

/// [`attention_with_sinks`](super::attention_with_sinks) and the logarithm of each query's sum of exponentials, the sink's
/// included, `[batch, heads, length]`.
pub(super) fn forward<B: FusedKernels>(
    [q, k, v, sinks]: [FloatTensor<B>; 4],
    [query_segments, key_segments]: [IntTensor<B>; 2],
    scores: Scores,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (out, log_sums) = B::attention_with_log_sums(q, k, v, query_segments, key_segments, scores);
    // `log(1 + e^x)`, from the side where nothing overflows.
    let above = B::float_sub(by_head::<B>(sinks), log_sums.clone());
    let small = B::float_log1p(B::float_exp(B::float_neg(B::float_abs(above.clone()))));
    let added = B::float_add(B::float_clamp_min(above, 0.0.into()), small);
    let factors = B::float_exp(B::float_neg(added.clone()));
    let sums = log_sums.shape();
    let factors =
        B::float_reshape(B::float_swap_dims(factors, 1, 2), Shape::from(vec![sums[0], sums[2], sums[1], 1]));
    (B::float_mul(out, factors), B::float_add(log_sums, added))
}

/// Gradient of the sinks, `[heads]`; `out` and `log_sums` are what [`forward`] gave.
pub(super) fn backward<B: Backend>(
    sinks: FloatTensor<B>,
    out: FloatTensor<B>,
    log_sums: FloatTensor<B>,
    d_out: FloatTensor<B>,
) -> FloatTensor<B> {
    let sums = log_sums.shape();
    let (batch, heads, length) = (sums[0], sums[1], sums[2]);
    let along = B::float_sum_dim(B::float_mul(out, d_out), 3);
    let along = B::float_swap_dims(B::float_reshape(along, Shape::from(vec![batch, length, heads])), 1, 2);
    let weights = B::float_exp(B::float_sub(by_head::<B>(sinks), log_sums));
    let d = B::float_sum_dim(B::float_sum_dim(B::float_mul(weights, along), 2), 0);
    B::float_neg(B::float_reshape(d, Shape::from(vec![heads])))
}

/// `[heads]` beside `[batch, heads, length]`.
fn by_head<B: Backend>(sinks: FloatTensor<B>) -> FloatTensor<B> {
    let heads = sinks.shape()[0];
    B::float_reshape(sinks, Shape::from(vec![1, heads, 1]))
}
