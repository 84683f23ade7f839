//! Scaled dot-product attention with grouped queries.

use burn::tensor::{Tensor, activation::softmax};

use crate::Context;

/// `softmax(q kᵀ · scale + mask) v`.
///
/// # Shapes
/// `q` `[batch, length, heads, head_dim]`; `k`, `v` `[batch, past + length, kv_heads, head_dim]`; result as `q`.
pub(crate) fn attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    scale: f64,
    window: Option<usize>,
    context: &Context,
) -> Tensor<4> {
    let [batch, length, heads, head_dim] = q.dims();
    let [_, keys, kv_heads, _] = k.dims();
    let spread = |x: Tensor<4>| {
        // `[batch, kv_heads, 1, keys, head_dim]` over the query heads of each group.
        let group = heads / kv_heads;
        x.swap_dims(1, 2)
            .unsqueeze_dim::<5>(2)
            .expand([batch, kv_heads, group, keys, head_dim])
            .reshape([batch, heads, keys, head_dim])
    };
    let scores = q.swap_dims(1, 2).mul_scalar(scale).matmul(spread(k).swap_dims(2, 3));
    let hidden = context.hidden(window).expand([batch, heads, length, keys]);
    let weights = softmax(scores.mask_fill(hidden, f32::MIN), 3);
    weights.matmul(spread(v)).swap_dims(1, 2)
}
