//! Flex kernels: slices in, slices out, parallel over rows.

mod attention;
mod groups;
mod packed;

use burn::backend::{
    flex::{Flex, FlexTensor},
    ops::FloatTensorOps,
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::{DType, Shape};
use half::bf16;
use rayon::prelude::*;

use self::attention::Visible;
use super::{
    Drops, FusedKernels, FusedOps, GELU_CUBE, GELU_SCALE, Gating, LowRankSpec, NormSpec, RotaryPairs, Scores,
    autodiff::low, philox, sinks,
};
use crate::ops::flex::{
    Matrix, Out, SharedMut, Stored, both_written, contiguous, floats, half_tensor, halves, matmul, multiply,
    operand, product, result_type, round, rounded, rounds,
    simd::{exp, vectorize},
    tensor, words, written,
};
use crate::{Compute, SuperLayout};

/// Values of a task that drops some, a multiple of four.
const DROPPED: usize = 1 << 14;

/// Columns up to which a product is narrow: its factors are an adapter's.
const NARROW: usize = 64;

/// Rows of a task.
const ROWS: usize = 32;

/// The sizes of a tensor seen as rows of its last axis: `[rows, width]`.
fn rows_of(x: &FlexTensor) -> [usize; 2] {
    let shape = x.layout().shape();
    let width = shape[shape.num_dims() - 1];
    [shape.num_elements() / width.max(1), width]
}

/// The values of a tensor made by [`contiguous`], to be written: copied first where somebody else holds them.
fn values_mut(x: &mut FlexTensor) -> &mut [f32] {
    x.storage_mut()
}

fn shape_of(x: &FlexTensor) -> Shape {
    x.layout().shape().clone()
}

/// What a row loses, and its factor `1 / sqrt(mean(x²) + eps)` after that.
#[inline(always)]
fn moments(x: &[f32], spec: NormSpec) -> (f32, f32) {
    let width = x.len() as f32;
    let mean = if spec.centred { lanes_sum(x, |x| x) / width } else { 0.0 };
    let square = lanes_sum(x, |x| (x - mean) * (x - mean)) / width;
    (mean, (square + spec.eps).sqrt().recip())
}

/// A sum in sixteen lanes, which the compiler may put in vectors.
#[inline(always)]
fn lanes_sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let chunks = x.chunks_exact(16);
    let rest: f32 = chunks.remainder().iter().map(|&x| f(x)).sum();
    let mut lanes = [0.0; 16];
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += f(x);
        }
    }
    lanes.iter().sum::<f32>() + rest
}

fn norm_dx(x: &[f32], weight: &[f32], dy: &[f32], spec: NormSpec) -> Vec<f32> {
    let width = weight.len();
    written(x.len(), ROWS * width, |first, dx: &mut [f32]| {
        let (x, dy) = (&x[first..], &dy[first..]);
        vectorize(|| {
            for ((dx, x), dy) in
                dx.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(dy.chunks_exact(width))
            {
                let (mean, inverse) = moments(x, spec);
                let mut d_mean = 0.0;
                if spec.centred {
                    for (dx, (dy, w)) in dx.iter_mut().zip(dy.iter().zip(weight)) {
                        *dx = dy * w;
                    }
                    d_mean = lanes_sum(dx, |d| d) / width as f32;
                }
                for ((dx, (x, dy)), w) in dx.iter_mut().zip(x.iter().zip(dy)).zip(weight) {
                    *dx = dy * w * (x - mean);
                }
                let along = lanes_sum(dx, |d| d) * inverse * inverse / width as f32;
                for ((dx, (x, dy)), w) in dx.iter_mut().zip(x.iter().zip(dy)).zip(weight) {
                    *dx = inverse * (dy * w - d_mean - (x - mean) * along);
                }
            }
        });
    })
}

fn norm_dweight(x: &[f32], dy: &[f32], width: usize, spec: NormSpec) -> Vec<f32> {
    x.par_chunks(ROWS * width)
        .zip(dy.par_chunks(ROWS * width))
        .map(|(x, dy)| {
            let mut d_weight = vec![0.0; width];
            vectorize(|| {
                for (x, dy) in x.chunks_exact(width).zip(dy.chunks_exact(width)) {
                    let (mean, inverse) = moments(x, spec);
                    for (dw, (x, dy)) in d_weight.iter_mut().zip(x.iter().zip(dy)) {
                        *dw += dy * (x - mean) * inverse;
                    }
                }
            });
            d_weight
        })
        // In order, so that the sum doesn't depend on the number of threads.
        .collect::<Vec<_>>()
        .into_iter()
        .fold(vec![0.0; width], |mut sum, part| {
            sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
            sum
        })
}

impl Gating {
    /// `y *= up * sigmoid(s(y))`.
    fn forward(self, y: &mut [f32], up: &[f32]) {
        assert_eq!(up.len(), y.len(), "gated: gate and up");
        y.par_chunks_mut(GATED).zip(up.par_chunks(GATED)).for_each(|(y, up)| self.forward_part(y, up));
    }

    /// [`Self::forward`] on one thread.
    fn forward_part(self, y: &mut [f32], up: &[f32]) {
        match self {
            Self::Silu => gate_by(|x| x, y, up),
            Self::GeluTanh => gate_by(|x| GELU_SCALE * (x + GELU_CUBE * x * x * x), y, up),
        }
    }

    /// [`Self::forward`], and the bits of gate and up rounded, each part while it is in the cache.
    fn forward_rounding(self, y: &mut [f32], up: &[f32]) -> [Vec<u16>; 2] {
        assert_eq!(up.len(), y.len(), "gated: gate and up");
        let result = SharedMut(y.as_mut_ptr());
        both_written(up.len(), GATED, |first, [gate_bits, up_bits]: [&mut [u16]; 2]| {
            // SAFETY: parts are disjoint and lie inside `y`, which is as long as what is written.
            let y = unsafe { std::slice::from_raw_parts_mut(result.at(first), gate_bits.len()) };
            let up = &up[first..][..up_bits.len()];
            vectorize(|| {
                gate_bits.iter_mut().zip(&*y).for_each(|(bits, gate)| *bits = round(*gate));
                up_bits.iter_mut().zip(up).for_each(|(bits, up)| *bits = round(*up));
            });
            self.forward_part(y, up);
        })
    }

    /// Turns the result's gradient `dy` into the gate's; returns that of `up`.
    fn backward<T: Kept>(self, gate: &[T], up: &[T], dy: &mut [f32]) -> Vec<f32> {
        match self {
            Self::Silu => gate_backward(|x| (x, 1.0), gate, up, dy),
            Self::GeluTanh => {
                let s = |x: f32| {
                    let square = x * x;
                    (GELU_SCALE * (x + GELU_CUBE * square * x), GELU_SCALE * (1.0 + 3.0 * GELU_CUBE * square))
                };
                gate_backward(s, gate, up, dy)
            }
        }
    }
}

/// A value as a graph keeps it.
trait Kept: Copy + Sync {
    fn widened(self) -> f32;
}

impl Kept for f32 {
    #[inline(always)]
    fn widened(self) -> f32 {
        self
    }
}

impl Kept for bf16 {
    #[inline(always)]
    fn widened(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

/// Values that one task takes.
const GATED: usize = 1 << 14;

fn gate_by(s: impl Fn(f32) -> f32, y: &mut [f32], up: &[f32]) {
    vectorize(|| {
        for (y, up) in y.iter_mut().zip(up) {
            *y = *y * up / (1.0 + exp(-s(*y)));
        }
    });
}

/// `s` gives its value and its slope.
fn gate_backward<T: Kept>(
    s: impl Fn(f32) -> (f32, f32) + Sync,
    gate: &[T],
    up: &[T],
    dy: &mut [f32],
) -> Vec<f32> {
    let d_gate = SharedMut(dy.as_mut_ptr());
    written(dy.len(), GATED, |first, d_up: &mut [f32]| {
        // SAFETY: parts are disjoint and lie inside `dy`, which is as long as what is written.
        let dy = unsafe { std::slice::from_raw_parts_mut(d_gate.at(first), d_up.len()) };
        let (gate, up) = (&gate[first..], &up[first..]);
        vectorize(|| {
            for (((dy, d_up), gate), up) in dy.iter_mut().zip(d_up).zip(gate).zip(up) {
                let (gate, up) = (gate.widened(), up.widened());
                let (argument, slope) = s(gate);
                let sigmoid = 1.0 / (1.0 + exp(-argument));
                *d_up = *dy * gate * sigmoid;
                *dy = *dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid) * slope);
            }
        });
    })
}

fn rotate_rows(
    x: &mut [f32],
    [cos, sin]: [&[f32]; 2],
    [heads, head_dim, half]: [usize; 3],
    pairs: RotaryPairs,
    sign: f32,
) {
    let turn = |low: &mut f32, high: &mut f32, cos: f32, sin: f32| {
        let (a, b, sin) = (*low, *high, sin * sign);
        *low = a * cos - b * sin;
        *high = b * cos + a * sin;
    };
    x.par_chunks_mut(heads * head_dim)
        .zip(cos.par_chunks(half).zip(sin.par_chunks(half)))
        .with_min_len(ROWS)
        .for_each(|(x, (cos, sin))| {
            vectorize(|| {
                let angles = || cos.iter().zip(sin);
                for head in x.chunks_exact_mut(head_dim) {
                    let head = &mut head[..2 * half];
                    match pairs {
                        RotaryPairs::Halves => {
                            let (low, high) = head.split_at_mut(half);
                            for ((low, high), (cos, sin)) in low.iter_mut().zip(high).zip(angles()) {
                                turn(low, high, *cos, *sin);
                            }
                        }
                        RotaryPairs::Neighbours => {
                            for (pair, (cos, sin)) in head.chunks_exact_mut(2).zip(angles()) {
                                let (low, high) = pair.split_at_mut(1);
                                turn(&mut low[0], &mut high[0], *cos, *sin);
                            }
                        }
                    }
                }
            });
        });
}

/// Negative log-likelihoods; turns the logits into their gradients (`softmax - onehot`) on the way.
fn cross_entropy_rows(logits: &mut [f32], targets: &[i64], classes: usize) -> Vec<f32> {
    let mut nll = vec![0.0; targets.len()];
    logits.par_chunks_mut(classes).zip(targets).zip(&mut nll).for_each(|((row, &target), nll)| {
        let target = usize::try_from(target).unwrap_or(usize::MAX);
        assert!(target < classes, "cross_entropy: target {target} of {classes} classes");
        vectorize(|| {
            let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let chosen = row[target] - largest;
            let mut sum = 0.0f64;
            for part in row.chunks_mut(1024) {
                part.iter_mut().for_each(|x| *x = exp(*x - largest));
                sum += f64::from(lanes_sum(part, |x| x));
            }
            *nll = (sum.ln() - f64::from(chosen)) as f32;
            let scale = (1.0 / sum) as f32;
            row.iter_mut().for_each(|x| *x *= scale);
            row[target] -= 1.0;
        });
    });
    nll
}

/// Targets as i64, whatever integer type the device uses.
fn targets_of(targets: &FlexTensor) -> Vec<i64> {
    let targets = targets.to_contiguous();
    targets.into_data().convert::<i64>().try_into_vec().expect("integer values")
}

/// Calls `f` with what attention sees of its segments.
fn with_visible<T>(
    query_segments: &FlexTensor,
    key_segments: &FlexTensor,
    scores: Scores,
    f: impl FnOnce(Visible) -> T,
) -> T {
    let (queries, keys) = (query_segments.to_contiguous(), key_segments.to_contiguous());
    f(Visible { scores, query_segments: words(&queries), key_segments: words(&keys) })
}

impl FusedKernels for Flex {
    fn norm_dx(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        spec: NormSpec,
    ) -> FloatTensor<Self> {
        let shape = shape_of(&x);
        let (x, weight, dy) = (contiguous(x), contiguous(weight), contiguous(dy));
        tensor(norm_dx(floats(&x), floats(&weight), floats(&dy), spec), shape, DType::F32)
    }

    fn norm_dweight(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        spec: NormSpec,
    ) -> FloatTensor<Self> {
        let ([_, width], x, dy) = (rows_of(&x), contiguous(x), contiguous(dy));
        tensor(norm_dweight(floats(&x), floats(&dy), width, spec), shape_of(&weight), DType::F32)
    }

    fn kept(x: FloatTensor<Self>, compute: Compute) -> FloatTensor<Self> {
        if x.dtype() == DType::F32 && rounds(compute) { rounded(&contiguous(x)) } else { x }
    }

    /// Weights and their gradients are made again row by row, and the products of both sum to those of the result.
    fn kept_result(_: FloatTensor<Self>) -> FloatTensor<Self> {
        tensor(Vec::new(), [0], DType::F32)
    }

    fn gated_with_kept(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        gating: Gating,
        compute: Compute,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        if !rounds(compute) {
            return (Self::gated(gate.clone(), up.clone(), gating, compute), gate, up);
        }
        let (mut y, up) = (contiguous(gate), contiguous(up));
        let shape = shape_of(&y);
        let [gate, up] = gating.forward_rounding(values_mut(&mut y), floats(&up));
        let [gate, up] = [gate, up].map(|values| half_tensor(values, shape.clone()));
        (y, gate, up)
    }

    fn gated_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        gating: Gating,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let shape = shape_of(&gate);
        let mut d_gate = contiguous(dy);
        let d_gate_values = values_mut(&mut d_gate);
        let d_up = match (gate.dtype(), up.dtype()) {
            (DType::BF16, DType::BF16) => {
                let (gate, up) = (gate.to_contiguous(), up.to_contiguous());
                gating.backward(halves(&gate), halves(&up), d_gate_values)
            }
            _ => {
                let (gate, up) = (contiguous(gate), contiguous(up));
                gating.backward(floats(&gate), floats(&up), d_gate_values)
            }
        };
        (d_gate, tensor(d_up, shape, DType::F32))
    }

    fn attention_with_log_sums(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        query_segments: IntTensor<Self>,
        key_segments: IntTensor<Self>,
        scores: Scores,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let shape = shape_of(&q);
        let (out, log_sums) = with_visible(&query_segments, &key_segments, scores, |visible| {
            attention::forward(q, k, v, visible)
        });
        (out, tensor(log_sums, [shape[0], shape[2], shape[1]], DType::F32))
    }

    fn attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        _: FloatTensor<Self>,
        log_sums: FloatTensor<Self>,
        d_out: FloatTensor<Self>,
        query_segments: IntTensor<Self>,
        key_segments: IntTensor<Self>,
        scores: Scores,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let [dq, dk, dv] = with_visible(&query_segments, &key_segments, scores, |visible| {
            attention::backward([q, k, v, d_out], floats(&log_sums), visible)
        });
        (dq, dk, dv)
    }

    fn cross_entropy_with_gradient(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let ([rows, classes], mut logits) = (rows_of(&logits), contiguous(logits));
        let losses = cross_entropy_rows(values_mut(&mut logits), &targets_of(&targets), classes);
        (tensor(losses, [rows], DType::F32), logits)
    }

    fn scaled_matmul(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        factor: f32,
        compute: Compute,
    ) -> FloatTensor<Self> {
        Self::float_mul_scalar(Self::matmul(a, b, compute), factor.into())
    }

    fn scale_rows(x: FloatTensor<Self>, factors: FloatTensor<Self>) -> FloatTensor<Self> {
        let ([_, columns], factors, mut x) = (rows_of(&x), contiguous(factors), contiguous(x));
        for (row, factor) in values_mut(&mut x).chunks_exact_mut(columns).zip(floats(&factors)) {
            // The usual loss is a plain sum.
            if *factor != 1.0 {
                row.iter_mut().for_each(|x| *x *= factor);
            }
        }
        x
    }
}

/// Calls `f` with the sizes of a product and its operands.
fn operands<R>(
    a: FlexTensor,
    b: FlexTensor,
    compute: Compute,
    f: impl FnOnce([usize; 3], Matrix<'_>, Matrix<'_>) -> R,
) -> R {
    let ([rows, inner], [_, columns]) = (rows_of(&a), rows_of(&b));
    assert_eq!(shape_of(&b)[0], inner, "a product of {rows} x {inner} and {:?}", shape_of(&b));
    let (a, b) = (operand(a, compute), operand(b, compute));
    let (a, b) = (Matrix::of(&a).expect("an operand"), Matrix::of(&b).expect("an operand"));
    f([rows, columns, inner], a, b)
}

impl FusedOps for Flex {
    fn norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, spec: NormSpec) -> FloatTensor<Self> {
        let (shape, [_, width]) = (shape_of(&x), rows_of(&x));
        let (x, weight) = (contiguous(x), contiguous(weight));
        let (x, weight) = (floats(&x), floats(&weight));
        assert_eq!(weight.len(), width, "norm: weights for rows of {width}");
        let y = written(x.len(), ROWS * width, |first, y: &mut [f32]| {
            vectorize(|| {
                for (y, x) in y.chunks_exact_mut(width).zip(x[first..].chunks_exact(width)) {
                    let (mean, inverse) = moments(x, spec);
                    for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                        *y = (x - mean) * inverse * w;
                    }
                }
            });
        });
        tensor(y, shape, DType::F32)
    }

    /// Without a graph nothing is kept.
    fn operand(x: FloatTensor<Self>, _: Compute) -> FloatTensor<Self> {
        x
    }

    fn gated(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        gating: Gating,
        _: Compute,
    ) -> FloatTensor<Self> {
        let (mut out, up) = (contiguous(gate), contiguous(up));
        gating.forward(values_mut(&mut out), floats(&up));
        out
    }

    fn rotate(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        pairs: RotaryPairs,
        sign: f32,
    ) -> FloatTensor<Self> {
        let (shape, [_, half]) = (shape_of(&x), rows_of(&cos));
        let (cos, sin) = (contiguous(cos), contiguous(sin));
        let (cos, sin) = (floats(&cos), floats(&sin));
        let mut x = contiguous(x);
        rotate_rows(values_mut(&mut x), [cos, sin], [shape[2], shape[3], half], pairs, sign);
        x
    }

    fn attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        query_segments: IntTensor<Self>,
        key_segments: IntTensor<Self>,
        scores: Scores,
    ) -> FloatTensor<Self> {
        Self::attention_with_log_sums(q, k, v, query_segments, key_segments, scores).0
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
        sinks::forward::<Self>([q, k, v, sinks], [query_segments, key_segments], scores).0
    }

    fn cross_entropy(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self> {
        Self::cross_entropy_with_gradient(logits, targets).0
    }

    fn dropout(x: FloatTensor<Self>, drops: Drops) -> FloatTensor<Self> {
        let mut x = contiguous(x);
        values_mut(&mut x).par_chunks_mut(DROPPED).enumerate().for_each(|(task, x)| {
            let first = (task * DROPPED / 4) as u64;
            for (index, x) in (first..).zip(x.chunks_mut(4)) {
                for (x, word) in x.iter_mut().zip(philox::words(index, drops.key)) {
                    if word < drops.threshold {
                        *x = 0.0;
                    }
                }
            }
        });
        x
    }

    fn seeded(_: FloatTensor<Self>, _: FloatTensor<Self>) -> FloatTensor<Self> {
        tensor(vec![0.0], [1], DType::F32)
    }

    fn low_rank(
        y: FloatTensor<Self>,
        x: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        spec: LowRankSpec,
    ) -> FloatTensor<Self> {
        Self::add_matmul(y, low::<Self>(x, a, spec), b, spec.compute)
    }

    fn matmul(a: FloatTensor<Self>, b: FloatTensor<Self>, compute: Compute) -> FloatTensor<Self> {
        if !rounds(compute) && a.dtype() == DType::F32 && b.dtype() == DType::F32 {
            return Self::float_matmul(a, b);
        }
        let dtype = result_type(a.dtype(), compute);
        let (rows, columns) = (shape_of(&a)[0], shape_of(&b)[1]);
        // The gradient of a narrow factor: what is packed row by row then lies in rows.
        if columns < rows && columns <= NARROW && Matrix::of(&a).is_some_and(|a| a.is_turned()) {
            let turned = operands(b.transpose(0, 1), a.transpose(0, 1), compute, |sizes, b, a| {
                tensor(product(sizes, b, &a, compute), [columns, rows], dtype)
            });
            return turned.transpose(0, 1).to_contiguous();
        }
        operands(a, b, compute, |sizes, a, b| tensor(product(sizes, a, &b, compute), [rows, columns], dtype))
    }

    fn add_matmul(
        y: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        compute: Compute,
    ) -> FloatTensor<Self> {
        let mut out = contiguous(y);
        if rounds(compute) {
            let to = values_mut(&mut out);
            operands(a, b, compute, |sizes, a, b| {
                assert_eq!(to.len(), sizes[0] * sizes[1], "add_matmul: values beside {sizes:?}");
                // SAFETY: `to` holds the rows, as just asserted.
                unsafe { multiply(sizes, Out::new(to.as_mut_ptr(), sizes[1], true), a, &b, compute) }
            });
            return out;
        }
        // In f32 whole rows are shared out, as ever: other parts could take other kernels of the library, and change bits.
        let ([_, columns], [_, inner]) = (rows_of(&out), rows_of(&a));
        let (a, b) = (contiguous(a), contiguous(b));
        let (a, b, y) = (floats(&a), floats(&b), values_mut(&mut out));
        let rows = y.len() / columns.max(1);
        assert_eq!([a.len(), b.len()], [rows * inner, inner * columns], "add_matmul: sizes");
        let step = rows.div_ceil(rayon::current_num_threads()).max(1);
        y.par_chunks_mut(step * columns).zip(a.par_chunks(step * inner)).for_each(|(y, a)| {
            let (sizes, out) = ([y.len() / columns, columns, inner], Out::new(y.as_mut_ptr(), columns, true));
            // SAFETY: `y` is the task's own and holds whole rows.
            unsafe { matmul(sizes, out, Matrix::rows(a, inner), Matrix::rows(b, columns), compute) }
        });
        out
    }

    fn sum_groups(x: FloatTensor<Self>, size: usize) -> FloatTensor<Self> {
        let ([rows, columns], x) = (rows_of(&x), contiguous(x));
        tensor(groups::sum(floats(&x), size), [rows, columns / size], DType::F32)
    }

    fn add_repeated(y: FloatTensor<Self>, update: FloatTensor<Self>, times: usize) -> FloatTensor<Self> {
        let (mut y, update) = (contiguous(y), contiguous(update));
        groups::add_repeated(values_mut(&mut y), floats(&update), times);
        y
    }

    fn reordered(x: FloatTensor<Self>, order: IntTensor<Self>, _: IntTensor<Self>) -> FloatTensor<Self> {
        Self::float_select(x, 1, order)
    }

    fn super_scales(
        words: IntTensor<Self>,
        factors: FloatTensor<Self>,
        layout: SuperLayout,
    ) -> FloatTensor<Self> {
        let (codes, factors) = (words.to_contiguous(), contiguous(factors));
        let scales = Stored::integers(self::words(&codes), floats(&factors), layout).unpack();
        tensor(scales, [layout.rows, layout.columns], DType::F32)
    }

    fn double_scales(
        codes: IntTensor<Self>,
        nested: FloatTensor<Self>,
        offset: FloatTensor<Self>,
        shape: [usize; 2],
    ) -> FloatTensor<Self> {
        let (codes, nested, offset) = (codes.to_contiguous(), contiguous(nested), contiguous(offset));
        let scales = Stored::double(words(&codes), floats(&nested), floats(&offset)[0], shape).unpack();
        tensor(scales, shape, DType::F32)
    }
}
