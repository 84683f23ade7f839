//! The operations of [`fused`](super) in plain tensor operations: differentiable, on any backend.

use burn::tensor::{
    Bool, Int, IntDType, Tensor, TensorData,
    activation::{log_softmax, silu, softmax},
};

use super::{AttentionSpec, Drops, LowRankSpec, RotaryPairs, alibi_slope};
use crate::{SuperLayout, dynamic_map::DYNAMIC_MAP, scheme::DOUBLE_BLOCK};

/// See [`rms_norm`](super::rms_norm).
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    let scale = x.clone().square().mean_dim(D - 1).add_scalar(eps).sqrt().recip();
    x * scale * weight.unsqueeze()
}

/// See [`layer_norm`](super::layer_norm).
pub fn layer_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    let mean = x.clone().mean_dim(D - 1);
    rms_norm(x - mean, weight, eps)
}

/// See [`swiglu`](super::swiglu).
pub fn swiglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    silu(gate) * up
}

/// See [`geglu`](super::geglu).
pub fn geglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    gelu_tanh(gate) * up
}

/// GELU in its tanh form.
pub fn gelu_tanh<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let inner = (x.clone() + x.clone().powi_scalar(3).mul_scalar(0.044715))
        .mul_scalar((2.0 / std::f64::consts::PI).sqrt());
    x.mul_scalar(0.5) * inner.tanh().add_scalar(1.0)
}

/// See [`rotate`](super::rotate).
pub fn rotate(x: Tensor<4>, cos: Tensor<2>, sin: Tensor<2>, pairs: RotaryPairs) -> Tensor<4> {
    let ([batch, length, heads, head_dim], [_, half]) = (x.dims(), cos.dims());
    // `[.., 2, half]`, the pairs along the axis of 2.
    let turned = x.clone().narrow(3, 0, 2 * half);
    let turned: Tensor<5> = match pairs {
        RotaryPairs::Halves => turned.reshape([batch, length, heads, 2, half]),
        RotaryPairs::Neighbours => turned.reshape([batch, length, heads, half, 2]).swap_dims(3, 4),
    };
    let spread =
        |table: Tensor<2>| table.reshape([batch, length, 1, 1, half]).expand([batch, length, heads, 1, half]);
    let (cos, sin) = (spread(cos), spread(sin));
    let (low, high) = (turned.clone().narrow(3, 0, 1), turned.narrow(3, 1, 1));
    let first = low.clone() * cos.clone() - high.clone() * sin.clone();
    let turned = Tensor::cat(vec![first, high * cos + low * sin], 3);
    let turned = match pairs {
        RotaryPairs::Halves => turned,
        RotaryPairs::Neighbours => turned.swap_dims(3, 4),
    };
    let turned = turned.reshape([batch, length, heads, 2 * half]);
    match head_dim - 2 * half {
        0 => turned,
        rest => Tensor::cat(vec![turned, x.narrow(3, 2 * half, rest)], 3),
    }
}

/// See [`attention`](super::attention).
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, spec: &AttentionSpec) -> Tensor<4> {
    let heads = q.dims()[2];
    let weights = softmax(scores(q, k, spec), 3);
    weights.matmul(spread(v, heads)).swap_dims(1, 2)
}

/// See [`attention_with_sinks`](super::attention_with_sinks).
pub fn attention_with_sinks(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    sinks: Tensor<1>,
    spec: &AttentionSpec,
) -> Tensor<4> {
    let [batch, length, heads, _] = q.dims();
    let scores = scores(q, k, spec);
    let keys = scores.dims()[3];
    let sinks = sinks.reshape([1, heads, 1, 1]).expand([batch, heads, length, 1]);
    let weights = softmax(Tensor::cat(vec![scores, sinks], 3), 3).narrow(3, 0, keys);
    weights.matmul(spread(v, heads)).swap_dims(1, 2)
}

/// `[batch, keys, kv_heads, head_dim]` → `[batch, heads, keys, head_dim]`: each over the query heads of its group.
fn spread(x: Tensor<4>, heads: usize) -> Tensor<4> {
    let [batch, keys, kv_heads, head_dim] = x.dims();
    x.swap_dims(1, 2)
        .unsqueeze_dim::<5>(2)
        .expand([batch, kv_heads, heads / kv_heads, keys, head_dim])
        .reshape([batch, heads, keys, head_dim])
}

/// Scores `[batch, heads, length, keys]`, the lowest number where a key isn't seen.
fn scores(q: Tensor<4>, k: Tensor<4>, spec: &AttentionSpec) -> Tensor<4> {
    let [batch, length, heads, _] = q.dims();
    let [_, keys, _, _] = k.dims();
    let device = q.device().without_autodiff();
    let places =
        Tensor::<1, Int>::arange((keys - length) as i64..keys as i64, &device).reshape([1, length, 1]);
    let key_places = Tensor::<1, Int>::arange(0..keys as i64, &device).reshape([1, 1, keys]);
    let behind = places - key_places;
    let distances = behind.clone().float().unsqueeze_dim::<4>(1);
    let behind = behind.expand([batch, length, keys]);
    let mut hidden = behind.clone().lower_scalar(0);
    if let Some(window) = spec.window {
        hidden = hidden.bool_or(behind.greater_equal_scalar(window as i64));
    }
    let segments = |segments: &Tensor<2, Int>, shape: [usize; 3]| {
        segments.clone().reshape(shape).expand([batch, length, keys])
    };
    let query_segments = segments(&spec.query_segments, [batch, length, 1]);
    hidden = hidden.bool_or(query_segments.not_equal(segments(&spec.key_segments, [batch, 1, keys])));
    let hidden: Tensor<4, Bool> = hidden.unsqueeze_dim(1);
    let mut scores = q.swap_dims(1, 2).mul_scalar(spec.scale).matmul(spread(k, heads).swap_dims(2, 3));
    if spec.alibi != 0.0 {
        let slopes: Vec<f32> = (0..heads).map(|head| -spec.alibi * alibi_slope(head, heads)).collect();
        let slopes = Tensor::<4>::from_data(TensorData::new(slopes, [1, heads, 1, 1]), &device);
        scores = scores + slopes * distances;
    }
    if let Some(cap) = spec.softcap {
        scores = scores.div_scalar(cap).tanh().mul_scalar(cap);
    }
    scores.mask_fill(hidden.expand([batch, heads, length, keys]), f32::MIN)
}

/// See [`cross_entropy`](super::cross_entropy).
pub fn cross_entropy(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    log_softmax(logits, 1).gather(1, targets.unsqueeze_dim(1)).squeeze_dim(1).neg()
}

/// See [`low_rank`](super::low_rank).
pub fn low_rank(y: Tensor<2>, x: Tensor<2>, a: Tensor<2>, b: Tensor<2>, spec: LowRankSpec) -> Tensor<2> {
    let x = match spec.drops {
        Some(drops) => dropout(x, drops),
        None => x,
    };
    y + x.matmul(a).mul_scalar(spec.factor).matmul(b)
}

/// See [`dropout`](super::dropout).
pub fn dropout(x: Tensor<2>, drops: Drops) -> Tensor<2> {
    let [rows, columns] = x.dims();
    let mask = TensorData::new(drops.mask(rows * columns), [rows, columns]);
    // Outside autodiff, a tensor mixes with those of any autodiff context.
    let mask = Tensor::<2, Bool>::from_data(mask, &x.device().without_autodiff());
    x.mask_fill(mask, 0.0)
}

/// See [`sum_groups`](super::sum_groups).
pub fn sum_groups(x: Tensor<2>, size: usize) -> Tensor<2> {
    let [rows, columns] = x.dims();
    x.reshape([rows, columns / size, size]).sum_dim(2).reshape([rows, columns / size])
}

/// See [`add_repeated`](super::add_repeated).
pub fn add_repeated(y: Tensor<2>, update: Tensor<2>, times: usize) -> Tensor<2> {
    let ([rows, d_output], [_, columns]) = (y.dims(), update.dims());
    let update = update.reshape([rows, columns, 1]);
    (y.reshape([rows, columns, times]) + update).reshape([rows, d_output])
}

/// See [`double_scales`](super::double_scales).
pub(crate) fn double_scales(
    codes: Tensor<1, Int>,
    nested: Tensor<2>,
    offset: Tensor<1>,
    [rows, columns]: [usize; 2],
) -> Tensor<2> {
    let (count, device) = (rows * columns, nested.device());
    let byte = |byte: i32| {
        codes.clone().bitwise_right_shift_scalar(8 * byte).bitwise_and_scalar(255).unsqueeze_dim(1)
    };
    let ids: Tensor<2, Int> = Tensor::cat((0..4).map(byte).collect(), 1).cast(IntDType::I32);
    let ids = ids.clone().reshape([ids.shape().num_elements()]).narrow(0, 0, count);
    let blocks = nested.dims()[1];
    let nested = nested.reshape([blocks, 1]).expand([blocks, DOUBLE_BLOCK]);
    let nested = nested.reshape([blocks * DOUBLE_BLOCK]).narrow(0, 0, count);
    let scales = Tensor::<1>::from_floats(DYNAMIC_MAP, &device).select(0, ids) * nested + offset;
    scales.reshape([columns, rows]).transpose()
}

/// See [`super_scales`](super::super_scales).
pub(crate) fn super_scales(words: Tensor<2, Int>, factors: Tensor<2>, layout: SuperLayout) -> Tensor<2> {
    let SuperLayout { bits, rows, columns, blocks } = layout;
    let device = factors.device();
    let index = |of: &dyn Fn(usize) -> usize| {
        let index: Vec<i64> = (0..rows).map(|row| of(row) as i64).collect();
        Tensor::<1, Int>::from_data(TensorData::new(index, [rows]), &device)
    };
    let words = words.select(0, index(&|row| layout.place(row).0));
    let shifts = index(&|row| layout.place(row).1 as usize).cast(IntDType::U32);
    let shifts = shifts.unsqueeze_dim::<2>(1).expand([rows, columns]);
    let integers = words.bitwise_right_shift(shifts).bitwise_and_scalar((1 << bits) - 1).float();
    let integers = match bits {
        // Two's complement.
        8 => integers.clone() - integers.greater_equal_elem(128.0).float() * 256.0,
        _ => integers,
    };
    integers * factors.select(0, index(&|row| row / blocks))
}
