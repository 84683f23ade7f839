//! The other operations of a transformer block, each with a backward pass written by hand.
//!
//! Composed of Burn's elementwise operations, attention, norms and activations would keep several copies of their
//! inputs in the graph and go over memory many times. On Flex (CPU) and CubeCL (GPUs) these functions are one or a few
//! passes and keep what their backward pass cannot recompute cheaply; on every other backend, and for types other than
//! f32, they are the plain versions in [`plain`], which tests compare with.

#[cfg(any(feature = "flex", feature = "cube"))]
mod autodiff;
#[cfg(feature = "cube")]
mod cube;
#[cfg(feature = "flex")]
mod flex;
#[cfg(any(feature = "flex", feature = "cube"))]
mod packed;
mod philox;
pub mod plain;
#[cfg(any(feature = "flex", feature = "cube"))]
mod sinks;
#[cfg(feature = "cube")]
pub(crate) mod vocabulary;

#[cfg(any(feature = "flex", feature = "cube"))]
use burn::backend::{
    Dispatch, DispatchDevice, backend_extension,
    tensor::{FloatTensor, IntTensor},
};
#[cfg(feature = "fusion")]
use burn::tensor::Shape;
use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData};

#[cfg(any(feature = "flex", feature = "cube"))]
pub(crate) use self::packed::packed_low_rank;
#[cfg(any(feature = "flex", feature = "cube"))]
use crate::ops::FEW_ROWS;
use crate::{Compute, SuperLayout};

/// Which keys a query sees, those at or before its own place, of its own segment, and inside the window; and how scores
/// are made.
#[derive(Debug, Clone)]
pub struct AttentionSpec {
    /// Factor on the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Factor on ALiBi's bias, which is added to the scaled scores: [`alibi_slope`] of the head times the key's place less
    /// the query's. 0 adds none.
    pub alibi: f32,
    /// Scores `z` (scaled, biased) become `cap * tanh(z / cap)`, above 0; `None` leaves them.
    pub softcap: Option<f32>,
    /// Latest positions seen, the query's own included; `None` sees all.
    pub window: Option<usize>,
    /// What the operands of its products are rounded to.
    pub compute: Compute,
    /// Segments of the queries, `[batch, length]`, of the type [`segments`] gives them.
    pub query_segments: Tensor<2, Int>,
    /// Segments of the keys, `[batch, past + length]`: the queries' places come last.
    pub key_segments: Tensor<2, Int>,
}

/// Segments `[batch, length]`, row-major, as [`AttentionSpec`] wants them.
///
/// # Panics
/// If `values` doesn't hold `batch * length` of them.
pub fn segments(values: &[u32], [batch, length]: [usize; 2], device: &Device) -> Tensor<2, Int> {
    let values = values.iter().map(|&segment| segment as i32).collect();
    Tensor::from_data(TensorData::new::<i32, _>(values, [batch, length]), (device, DType::I32))
}

impl AttentionSpec {
    #[cfg(any(feature = "flex", feature = "cube"))]
    fn scores(&self) -> Scores {
        Scores {
            scale: self.scale,
            alibi: self.alibi,
            softcap: self.softcap.unwrap_or(0.0),
            window: self.window,
            compute: self.compute,
        }
    }
}

/// ALiBi's slope of one of `heads` heads: `2^(-8 (head + 1) / c)` with the largest power of two `c` that is at most `heads`;
/// heads from `c` on take every second slope of `2 c` heads. Source: Press et al. 2022, and BLOOM's code.
///
/// # Panics
/// If `heads` is 0.
pub fn alibi_slope(head: usize, heads: usize) -> f32 {
    let power = 1 << heads.ilog2();
    let exponent = match head < power {
        true => (head + 1) as f32 / power as f32,
        false => (2 * (head - power) + 1) as f32 / (2 * power) as f32,
    };
    (-8.0 * exponent).exp2()
}

/// Which channels of a head turn together in [`rotate`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RotaryPairs {
    /// The `i`-th and the `n / 2 + i`-th of `n` channels.
    Halves,
    /// The `2 i`-th and the `2 i + 1`-th.
    Neighbours,
}

/// What an attention's kernels are told beside their tensors.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg(any(feature = "flex", feature = "cube"))]
pub(crate) struct Scores {
    /// As in [`AttentionSpec`].
    scale: f32,
    /// As in [`AttentionSpec`].
    alibi: f32,
    /// As in [`AttentionSpec`]; 0 where there is none.
    softcap: f32,
    /// As in [`AttentionSpec`].
    window: Option<usize>,
    /// As in [`AttentionSpec`].
    #[cfg_attr(not(feature = "cube"), allow(dead_code))]
    compute: Compute,
}

/// Which elements are dropped: a function of these numbers and the element's index alone, so that whoever needs the mask
/// makes it again, on any device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drops {
    /// The key of [Philox 4x32-10](https://doi.org/10.1145/2063384.2063405); element `i` has word `i % 4` of the counter
    /// `i / 4`.
    pub key: [u32; 2],
    /// Elements whose word is below it are dropped: 2³² times their share.
    pub threshold: u32,
}

impl Drops {
    /// True for each of `count` elements that is dropped.
    pub fn mask(&self, count: usize) -> Vec<bool> {
        self.mask_from(0, count)
    }

    /// As [`mask`](Self::mask), for the elements from `first` on.
    pub fn mask_from(&self, first: u64, count: usize) -> Vec<bool> {
        let words = (first / 4..).flat_map(|index| philox::words(index, self.key));
        let words = words.skip((first % 4) as usize).take(count);
        words.map(|word| word < self.threshold).collect()
    }
}

/// What a low-rank update does beside its products.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LowRankSpec {
    /// Factor on the update.
    pub factor: f32,
    /// What of its input is dropped.
    pub drops: Option<Drops>,
    /// What operands are rounded to; narrow products on GPUs are exact.
    pub compute: Compute,
}

/// What a step of AdamW does beside the parameter, its gradient and its averages.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// Learning rate.
    pub lr: f32,
    /// Weights of the averages before.
    pub betas: [f32; 2],
    /// `1 - beta^t` of each average.
    pub corrections: [f32; 2],
    /// Added to the divisor.
    pub eps: f32,
    /// Factor on the parameter before the step.
    pub decay: f32,
    /// Factor on the gradient.
    pub factor: f32,
}

/// What a norm does beside its tensors.
#[cfg(any(feature = "flex", feature = "cube"))]
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct NormSpec {
    /// Added to the mean square.
    eps: f32,
    /// Whether rows lose their mean first.
    centred: bool,
}

/// An activation `x * sigmoid(s(x))` that gates another value.
#[cfg(any(feature = "flex", feature = "cube"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Gating {
    /// `s(x) = x`.
    Silu,
    /// `s(x) = 2 sqrt(2 / π) (x + 0.044715 x³)`, since `(1 + tanh(u)) / 2 = sigmoid(2 u)`.
    GeluTanh,
}

/// `2 sqrt(2 / π)`, of GELU's tanh form.
#[cfg(any(feature = "flex", feature = "cube"))]
const GELU_SCALE: f32 = 1.595_769;
/// The coefficient of the cube in GELU's tanh form.
#[cfg(any(feature = "flex", feature = "cube"))]
const GELU_CUBE: f32 = 0.044715;

// Output shapes for the lazy implementation on fusing backends.
#[cfg(feature = "fusion")]
fn first_of(shape: &Shape) -> Shape {
    Shape::from(vec![shape[0]])
}
#[cfg(feature = "fusion")]
fn groups_of(x: &Shape, size: usize) -> Shape {
    Shape::from(vec![x[0], x[1] / size])
}
#[cfg(feature = "fusion")]
fn product_of(a: &Shape, b: &Shape) -> Shape {
    Shape::from(vec![a[0], b[1]])
}
#[cfg(feature = "fusion")]
fn log_sums_of(q: &Shape) -> Shape {
    Shape::from(vec![q[0], q[2], q[1]])
}

/// What the backward passes call on the inner backend, and forward passes that keep something for them. Not
/// differentiable themselves: Burn's autodiff is first order.
#[cfg(any(feature = "flex", feature = "cube"))]
#[backend_extension(
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    Fusion: cfg(feature = "fusion")
)]
pub(crate) trait FusedKernels: burn::backend::Backend {
    /// Gradient of the input of [`rms_norm`] and [`layer_norm`].
    #[fusion(dtype = x, shape = x)]
    fn norm_dx(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        spec: NormSpec,
    ) -> FloatTensor<Self>;
    /// Gradient of the weight of [`rms_norm`] and [`layer_norm`].
    #[fusion(dtype = weight, shape = weight)]
    fn norm_dweight(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        spec: NormSpec,
    ) -> FloatTensor<Self>;
    /// What a graph keeps of an operand of products by `compute`: the operand as they round it, where that takes less memory
    /// and loses nothing they would not lose themselves, or the operand itself.
    #[fusion(dtype = x, shape = x)]
    fn kept(x: FloatTensor<Self>, compute: Compute) -> FloatTensor<Self>;
    /// Of the result of [`attention`], what its backward pass is given: the result itself, or nothing (an empty tensor) where
    /// that pass does without.
    #[fusion(dtype = out, shape = out)]
    fn kept_result(out: FloatTensor<Self>) -> FloatTensor<Self>;
    /// [`swiglu`] or [`geglu`], and of both inputs what [`Self::kept`] keeps.
    #[fusion(meta = |gate, up, _gating, _compute| (gate.clone(), gate.clone(), up.clone()))]
    fn gated_with_kept(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        gating: Gating,
        compute: Compute,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
    /// Gradients of both inputs of [`swiglu`] and [`geglu`], given these or what is kept of them.
    #[fusion(meta = |gate, up, _dy, _gating| (gate.clone(), up.clone()))]
    fn gated_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        gating: Gating,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
    /// [`attention`] and the logarithm of each query's sum of exponentials, `[batch, heads, length]`.
    #[fusion(meta = |q, _k, _v, _query_segments, _key_segments, _scores| {
        let mut log_sums = q.clone();
        log_sums.shape = log_sums_of(&q.shape);
        (q.clone(), log_sums)
    })]
    fn attention_with_log_sums(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        query_segments: IntTensor<Self>,
        key_segments: IntTensor<Self>,
        scores: Scores,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
    /// Gradients of q, k and v; `out` is [`Self::kept_result`] and `log_sums` the other of what
    /// [`Self::attention_with_log_sums`] gave.
    #[fusion(meta = |q, k, v, _out, _log_sums, _d_out, _query_segments, _key_segments, _scores| {
        (q.clone(), k.clone(), v.clone())
    })]
    #[allow(clippy::too_many_arguments)] // the macro takes tensors one by one
    fn attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        out: FloatTensor<Self>,
        log_sums: FloatTensor<Self>,
        d_out: FloatTensor<Self>,
        query_segments: IntTensor<Self>,
        key_segments: IntTensor<Self>,
        scores: Scores,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
    /// [`cross_entropy`] and, in the logits' place where nobody else holds them, its gradient of the logits.
    #[fusion(meta = |logits, _targets| {
        let mut losses = logits.clone();
        losses.shape = first_of(&logits.shape);
        (losses, logits.clone())
    })]
    fn cross_entropy_with_gradient(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
    /// `a · b` times `factor`, operands rounded as `compute` says.
    #[fusion(dtype = a, shape = product_of(a, b))]
    fn scaled_matmul(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        factor: f32,
        compute: Compute,
    ) -> FloatTensor<Self>;
    /// Rows of `x` `[rows, columns]` times `factors` `[rows]`, in place where `x` is not used elsewhere.
    #[fusion(dtype = x, shape = x)]
    fn scale_rows(x: FloatTensor<Self>, factors: FloatTensor<Self>) -> FloatTensor<Self>;
}

/// What only CubeCL needs: on the CPU these are few operations on large tensors.
#[cfg(feature = "cube")]
#[backend_extension(Cube, Fusion: cfg(feature = "fusion"))]
pub(crate) trait StepKernels: burn::backend::Backend {
    /// See [`adamw`].
    #[fusion(meta = |parameter, _gradient, first, second, _step| {
        (parameter.clone(), first.clone(), second.clone())
    })]
    fn adamw(
        parameter: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        step: AdamWStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
    /// Writes the sums of squares of the parts of `x` into `sums`, from `first` on.
    #[fusion(dtype = sums, shape = sums)]
    fn square_sums(x: FloatTensor<Self>, sums: FloatTensor<Self>, first: usize) -> FloatTensor<Self>;
}

/// The differentiable operations.
#[cfg(any(feature = "flex", feature = "cube"))]
#[backend_extension(
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    Autodiff,
    Fusion: cfg(feature = "fusion")
)]
pub(crate) trait FusedOps: burn::backend::Backend {
    /// See [`rms_norm`] and [`layer_norm`].
    #[fusion(dtype = x, shape = x)]
    fn norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, spec: NormSpec) -> FloatTensor<Self>;
    /// See [`operand`].
    #[fusion(dtype = x, shape = x)]
    fn operand(x: FloatTensor<Self>, compute: Compute) -> FloatTensor<Self>;
    /// See [`swiglu`] and [`geglu`].
    #[fusion(dtype = gate, shape = gate)]
    fn gated(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        gating: Gating,
        compute: Compute,
    ) -> FloatTensor<Self>;
    /// See [`rotate`]; `sign` is -1 for the inverse rotation.
    #[fusion(dtype = x, shape = x)]
    fn rotate(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        pairs: RotaryPairs,
        sign: f32,
    ) -> FloatTensor<Self>;
    /// See [`attention`].
    #[fusion(dtype = q, shape = q)]
    fn attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        query_segments: IntTensor<Self>,
        key_segments: IntTensor<Self>,
        scores: Scores,
    ) -> FloatTensor<Self>;
    /// See [`attention_with_sinks`].
    #[fusion(dtype = q, shape = q)]
    fn attention_with_sinks(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        sinks: FloatTensor<Self>,
        query_segments: IntTensor<Self>,
        key_segments: IntTensor<Self>,
        scores: Scores,
    ) -> FloatTensor<Self>;
    /// See [`cross_entropy`].
    #[fusion(dtype = logits, shape = first_of(logits))]
    fn cross_entropy(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self>;
    /// See [`dropout`].
    #[fusion(dtype = x, shape = x)]
    fn dropout(x: FloatTensor<Self>, drops: Drops) -> FloatTensor<Self>;
    /// See [`seeded`].
    #[fusion(dtype = x, shape = { let _ = x; Shape::from(vec![1]) })]
    fn seeded(x: FloatTensor<Self>, gradient: FloatTensor<Self>) -> FloatTensor<Self>;
    /// See [`low_rank`].
    #[fusion(dtype = y, shape = y)]
    fn low_rank(
        y: FloatTensor<Self>,
        x: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        spec: LowRankSpec,
    ) -> FloatTensor<Self>;
    /// See [`matmul`].
    #[fusion(dtype = a, shape = product_of(a, b))]
    fn matmul(a: FloatTensor<Self>, b: FloatTensor<Self>, compute: Compute) -> FloatTensor<Self>;
    /// See [`add_matmul`].
    #[fusion(dtype = y, shape = y)]
    fn add_matmul(
        y: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        compute: Compute,
    ) -> FloatTensor<Self>;
    /// See [`sum_groups`].
    #[fusion(dtype = x, shape = groups_of(x, *size))]
    fn sum_groups(x: FloatTensor<Self>, size: usize) -> FloatTensor<Self>;
    /// See [`add_repeated`].
    #[fusion(dtype = y, shape = y)]
    fn add_repeated(y: FloatTensor<Self>, update: FloatTensor<Self>, times: usize) -> FloatTensor<Self>;
    /// See [`reordered`].
    #[fusion(dtype = x, shape = x)]
    fn reordered(x: FloatTensor<Self>, order: IntTensor<Self>, places: IntTensor<Self>) -> FloatTensor<Self>;
    /// See [`double_scales`].
    #[fusion(dtype = nested, shape = Shape::from(size.to_vec()))]
    fn double_scales(
        codes: IntTensor<Self>,
        nested: FloatTensor<Self>,
        offset: FloatTensor<Self>,
        size: [usize; 2],
    ) -> FloatTensor<Self>;
    /// See [`super_scales`].
    #[fusion(dtype = factors, shape = Shape::from(vec![layout.rows, layout.columns]))]
    fn super_scales(
        words: IntTensor<Self>,
        factors: FloatTensor<Self>,
        layout: SuperLayout,
    ) -> FloatTensor<Self>;
}

/// Whether the fused kernels take this tensor.
fn fused<const D: usize>(x: &Tensor<D>) -> bool {
    #[cfg(any(feature = "flex", feature = "cube"))]
    return x.dtype() == DType::F32
        && match x.device().without_autodiff().as_dispatch() {
            #[cfg(feature = "flex")]
            DispatchDevice::Flex(_) => true,
            #[cfg(feature = "cube")]
            DispatchDevice::Cube(_) => true,
            #[allow(unreachable_patterns)] // where no other backend is compiled in
            _ => false,
        };
    #[cfg(not(any(feature = "flex", feature = "cube")))]
    return false;
}

/// Calls the fused operation where it exists, else the plain one.
macro_rules! fused_or_plain {
    ($x:expr, $fused:expr, $plain:expr) => {{
        #[cfg(any(feature = "flex", feature = "cube"))]
        if fused(&$x) {
            return Tensor::from_dispatch($fused);
        }
        $plain
    }};
}

/// Root-mean-square norm over the last axis: `x / sqrt(mean(x²) + eps) * weight`.
///
/// # Shapes
/// `x` `[.., width]`, `weight` `[width]` → `[.., width]`.
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    fused_or_plain!(
        x,
        Dispatch::norm(
            x.into_dispatch(),
            weight.into_dispatch(),
            NormSpec { eps: eps as f32, centred: false }
        ),
        plain::rms_norm(x, weight, eps)
    )
}

/// [Layer norm](https://arxiv.org/abs/1607.06450) over the last axis, without a bias: `(x - mean(x)) / sqrt(variance(x) +
/// eps) * weight`.
///
/// # Shapes
/// `x` `[.., width]`, `weight` `[width]` → `[.., width]`.
///
/// # Panics
/// If `weight` has another size than the last axis.
pub fn layer_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    fused_or_plain!(
        x,
        Dispatch::norm(
            x.into_dispatch(),
            weight.into_dispatch(),
            NormSpec { eps: eps as f32, centred: true }
        ),
        plain::layer_norm(x, weight, eps)
    )
}

/// `x`, which products by `compute` are about to read, as a graph should keep it: on the CPU, where these round to bf16
/// anyway, in bf16, which is half the memory and the same product; else `x` itself. Its gradient stays f32. Where several
/// products read `x`, this is to be called once, so that they keep one tensor.
///
/// Only for what takes it for f32 that was rounded: [`matmul`], [`low_rank`] and the products of packed weights, or a
/// [`Projection`](crate::Projection) that [says so](crate::Projection::takes_operands).
///
/// # Shapes
/// `[.., width]` → the same.
pub fn operand<const D: usize>(x: Tensor<D>, compute: Compute) -> Tensor<D> {
    // Kernels of few rows don't round, and have little to keep.
    #[cfg(any(feature = "flex", feature = "cube"))]
    if x.dims()[..D - 1].iter().product::<usize>() <= FEW_ROWS {
        return x;
    }
    fused_or_plain!(x, Dispatch::operand(x.into_dispatch(), compute), x)
}

/// `silu(gate) * up`. Operands of products around it are rounded as `compute` says, and so is what the graph keeps of gate
/// and up on the CPU: gradients are off by as much as those products make them.
///
/// # Shapes
/// Both and the result alike.
pub fn swiglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>, compute: Compute) -> Tensor<D> {
    fused_or_plain!(
        gate,
        Dispatch::gated(gate.into_dispatch(), up.into_dispatch(), Gating::Silu, compute),
        plain::swiglu(gate, up)
    )
}

/// `gelu(gate) * up`, with GELU's tanh form: `x / 2 * (1 + tanh(sqrt(2 / π) * (x + 0.044715 x³)))`. Kept as [`swiglu`]
/// keeps it.
///
/// # Shapes
/// Both and the result alike.
pub fn geglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>, compute: Compute) -> Tensor<D> {
    fused_or_plain!(
        gate,
        Dispatch::gated(gate.into_dispatch(), up.into_dispatch(), Gating::GeluTanh, compute),
        plain::geglu(gate, up)
    )
}

/// Rotary positions of the first `n` channels of each head; the others stay.
///
/// # Shapes
/// `x` `[batch, length, heads, head_dim]`; `cos` and `sin` `[batch * length, n / 2]`, `n` at most `head_dim`; result as `x`.
///
/// # Panics
/// If the tables don't fit.
pub fn rotate(x: Tensor<4>, cos: Tensor<2>, sin: Tensor<2>, pairs: RotaryPairs) -> Tensor<4> {
    let [batch, length, _, head_dim] = x.dims();
    let [rows, half] = cos.dims();
    assert!(
        rows == batch * length && 2 * half <= head_dim && sin.dims() == [rows, half],
        "rotate: tables {rows}x{half} for {:?}",
        x.dims()
    );
    if half == 0 {
        return x;
    }
    fused_or_plain!(
        x,
        Dispatch::rotate(x.into_dispatch(), cos.into_dispatch(), sin.into_dispatch(), pairs, 1.0),
        plain::rotate(x, cos, sin, pairs)
    )
}

/// Grouped-query attention: `softmax(q kᵀ · scale) v` over the keys that [`AttentionSpec`] lets a query see. The graph
/// keeps q, k, v, on GPUs the result, and one number per query and head; no scores.
///
/// # Shapes
/// `q` `[batch, length, heads, head_dim]`; `k`, `v` `[batch, past + length, kv_heads, head_dim]`; result as `q`.
///
/// # Panics
/// If shapes or segments don't fit together.
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, spec: &AttentionSpec) -> Tensor<4> {
    fused_or_plain!(
        q,
        Dispatch::attention(
            q.into_dispatch(),
            k.into_dispatch(),
            v.into_dispatch(),
            spec.query_segments.clone().into_dispatch(),
            spec.key_segments.clone().into_dispatch(),
            spec.scores(),
        ),
        plain::attention(q, k, v, spec)
    )
}

/// [`attention`] whose softmax runs over the keys and one more score, the head's sink, which has no value: weights sum to
/// less than 1. Source: gpt-oss.
///
/// # Shapes
/// As [`attention`]; `sinks` `[heads]`.
///
/// # Panics
/// As [`attention`].
pub fn attention_with_sinks(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    sinks: Tensor<1>,
    spec: &AttentionSpec,
) -> Tensor<4> {
    assert_eq!(sinks.dims(), [q.dims()[2]], "attention: sinks for {:?}", q.dims());
    fused_or_plain!(
        q,
        Dispatch::attention_with_sinks(
            q.into_dispatch(),
            k.into_dispatch(),
            v.into_dispatch(),
            sinks.into_dispatch(),
            spec.query_segments.clone().into_dispatch(),
            spec.key_segments.clone().into_dispatch(),
            spec.scores(),
        ),
        plain::attention_with_sinks(q, k, v, sinks, spec)
    )
}

/// Negative log-likelihood of each row's target, in nats.
///
/// # Shapes
/// `logits` `[rows, classes]`, `targets` `[rows]` → `[rows]`.
///
/// # Panics
/// If a target is not below `classes`.
pub fn cross_entropy(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    fused_or_plain!(
        logits,
        Dispatch::cross_entropy(logits.into_dispatch(), targets.into_dispatch()),
        plain::cross_entropy(logits, targets)
    )
}

/// `x` with its columns in another order: column `k` of the result is column `order[k]`. `places` is the inverse
/// permutation, by which the backward pass gathers too, where it would else scatter.
///
/// # Shapes
/// `x` `[rows, columns]`, `order` and `places` `[columns]` → as `x`.
pub(crate) fn reordered(x: Tensor<2>, order: Tensor<1, Int>, places: Tensor<1, Int>) -> Tensor<2> {
    fused_or_plain!(
        x,
        Dispatch::reordered(x.into_dispatch(), order.into_dispatch(), places.into_dispatch()),
        x.select(1, order)
    )
}

/// Scales `[block_rows, block_columns]` from their double-quantized form: four codes to a word, output-major, as in
/// [`DoubleScales`](crate::DoubleScales). No gradients pass.
///
/// # Shapes
/// `codes` `[ceil(scales / 4)]`, `nested` `[1, ceil(scales / 256)]`, `offset` `[1]`.
pub(crate) fn double_scales(
    codes: Tensor<1, Int>,
    nested: Tensor<2>,
    offset: Tensor<1>,
    shape: [usize; 2],
) -> Tensor<2> {
    fused_or_plain!(
        nested,
        Dispatch::double_scales(codes.into_dispatch(), nested.into_dispatch(), offset.into_dispatch(), shape),
        plain::double_scales(codes, nested, offset, shape)
    )
}

/// Scales or offsets `[layout.rows, layout.columns]` in f32 from their integers. No gradients pass.
///
/// # Shapes
/// `words` `[layout.word_rows(), layout.columns]`, `factors` `[layout.factor_rows(), layout.columns]`.
pub(crate) fn super_scales(words: Tensor<2, Int>, factors: Tensor<2>, layout: SuperLayout) -> Tensor<2> {
    let factors = factors.cast(FloatDType::F32);
    fused_or_plain!(
        factors,
        Dispatch::super_scales(words.into_dispatch(), factors.into_dispatch(), layout),
        plain::super_scales(words, factors, layout)
    )
}

/// `x` with the elements that `drops` names, counted row by row, set to zero. No mask is kept.
///
/// # Shapes
/// `[rows, columns]` → the same.
pub fn dropout(x: Tensor<2>, drops: Drops) -> Tensor<2> {
    fused_or_plain!(x, Dispatch::dropout(x.into_dispatch(), drops), plain::dropout(x, drops))
}

/// `a · b`, operands rounded as `compute` says, also those of the products of its backward pass.
///
/// # Shapes
/// `a` `[.., inner]`, `b` `[inner, columns]`, any strides → `[.., columns]`.
///
/// # Panics
/// If the inner sizes differ.
pub fn matmul<const D: usize>(a: Tensor<D>, b: Tensor<2>, compute: Compute) -> Tensor<D> {
    let mut sizes = a.dims();
    let rows = sizes[..D - 1].iter().product::<usize>();
    let a = a.reshape([rows, sizes[D - 1]]);
    sizes[D - 1] = b.dims()[1];
    rows_matmul(a, b, compute).reshape(sizes)
}

fn rows_matmul(a: Tensor<2>, b: Tensor<2>, compute: Compute) -> Tensor<2> {
    #[cfg(any(feature = "flex", feature = "cube"))]
    if multiplied(&a, compute) {
        return Tensor::from_dispatch(Dispatch::matmul(a.into_dispatch(), b.into_dispatch(), compute));
    }
    a.matmul(b)
}

/// Whether a packed product of this tensor and its low-rank update are one operation: on the CPU few rows have kernels of their
/// own.
#[cfg(any(feature = "flex", feature = "cube"))]
pub(crate) fn updates_in_one(x: &Tensor<2>, compute: Compute) -> bool {
    #[cfg(feature = "cube")]
    if on_cube(x) {
        return true;
    }
    multiplied(x, compute) && x.dims()[0] > FEW_ROWS
}

/// Whether the fused products by `compute` take this tensor: f32, or on the CPU what [`operand`] makes of it.
#[cfg(any(feature = "flex", feature = "cube"))]
pub(crate) fn multiplied<const D: usize>(x: &Tensor<D>, compute: Compute) -> bool {
    #[cfg(feature = "flex")]
    if matches!(x.device().without_autodiff().as_dispatch(), DispatchDevice::Flex(_))
        && crate::ops::flex::is_operand(x.dtype(), compute)
    {
        return true;
    }
    let _ = compute;
    fused(x)
}

/// `y + factor · drop(x) · a · b`: a low-rank update. The graph keeps x, a, b and `rows · rank` numbers. Factors of another type
/// than `y` are cast to its type.
///
/// # Shapes
/// `y` `[rows, columns]`, `x` `[rows, inputs]`, `a` `[inputs, rank]`, `b` `[rank, columns]`.
pub fn low_rank(y: Tensor<2>, x: Tensor<2>, a: Tensor<2>, b: Tensor<2>, spec: LowRankSpec) -> Tensor<2> {
    let [a, b] = [a, b].map(|factor| factor.cast(y.dtype()));
    fused_or_plain!(
        y,
        Dispatch::low_rank(y.into_dispatch(), x.into_dispatch(), a.into_dispatch(), b.into_dispatch(), spec),
        plain::low_rank(y, x, a, b, spec)
    )
}

/// A number of no meaning whose backward pass gives `x` the gradient `gradient`: goes on with a backward pass that began
/// elsewhere.
///
/// # Shapes
/// `x` and `gradient`, without a graph, alike; result `[1]`.
pub fn seeded<const D: usize>(x: Tensor<D>, gradient: Tensor<D>) -> Tensor<1> {
    fused_or_plain!(
        x,
        Dispatch::seeded(x.into_dispatch(), gradient.into_dispatch()),
        (x * Tensor::from_inner(gradient)).sum()
    )
}

/// Whether [`adamw`] has a kernel for this parameter; it is for GPUs.
pub fn has_adamw<const D: usize>(parameter: &Tensor<D>) -> bool {
    #[cfg(feature = "cube")]
    return on_cube(parameter);
    #[cfg(not(feature = "cube"))]
    {
        let _ = parameter;
        false
    }
}

/// The parameter and its two averages after a step of AdamW, in one pass over all. All are without a graph, of one shape.
///
/// # Panics
/// Where [`has_adamw`] says no.
pub fn adamw<const D: usize>(
    parameter: Tensor<D>,
    gradient: Tensor<D>,
    averages: [Tensor<D>; 2],
    step: AdamWStep,
) -> [Tensor<D>; 3] {
    assert!(has_adamw(&parameter), "adamw on {:?}", parameter.device());
    #[cfg(feature = "cube")]
    {
        let [first, second] = averages.map(Tensor::into_dispatch);
        let (parameter, first, second) =
            Dispatch::adamw(parameter.into_dispatch(), gradient.into_dispatch(), first, second, step);
        [parameter, first, second].map(Tensor::from_dispatch)
    }
    #[cfg(not(feature = "cube"))]
    {
        let _ = (gradient, averages, step);
        unreachable!("refused above")
    }
}

/// Sums of squares of parts of tensors without a graph. On a GPU, where a large tensor has up to 64 parts, those of
/// tensors of a device that stand together are one tensor; elsewhere every tensor has one of its own.
pub fn square_sums(tensors: Vec<Tensor<1>>) -> Vec<Tensor<1>> {
    #[cfg(feature = "cube")]
    let (tensors, mut sums) = {
        let (there, here): (Vec<_>, Vec<_>) = tensors.into_iter().partition(on_cube);
        let in_one = |tensors: &[Tensor<1>]| {
            let counts = tensors.iter().map(|x| square_parts(x.dims()[0]));
            // Every place is written below.
            let sums = Tensor::<1>::empty([counts.sum::<usize>()], &tensors[0].device()).into_dispatch();
            let written = tensors.iter().fold((sums, 0), |(sums, first), x| {
                let next = first + square_parts(x.dims()[0]);
                (Dispatch::square_sums(x.clone().into_dispatch(), sums, first), next)
            });
            Tensor::from_dispatch(written.0)
        };
        let by_device = there.chunk_by(|a, b| a.device() == b.device());
        (here, by_device.map(in_one).collect::<Vec<_>>())
    };
    #[cfg(not(feature = "cube"))]
    let mut sums = Vec::new();
    sums.extend(tensors.into_iter().map(|x| x.square().sum()));
    sums
}

/// Into how many parts [`square_sums`] divides so many elements on a GPU.
#[cfg(feature = "cube")]
fn square_parts(count: usize) -> usize {
    count.div_ceil(4096).clamp(1, 64)
}

/// Whether kernels for f32 on CubeCL take this tensor.
#[cfg(feature = "cube")]
pub(crate) fn on_cube<const D: usize>(x: &Tensor<D>) -> bool {
    x.dtype() == DType::F32 && matches!(x.device().without_autodiff().as_dispatch(), DispatchDevice::Cube(_))
}

/// `y + a · b`, in place where `y` is not used elsewhere; for a small inner size, operands are rounded as `compute` says
/// only in the products of its backward pass.
///
/// # Shapes
/// `y` `[rows, columns]`, `a` `[rows, inner]`, `b` `[inner, columns]`.
pub fn add_matmul(y: Tensor<2>, a: Tensor<2>, b: Tensor<2>, compute: Compute) -> Tensor<2> {
    fused_or_plain!(
        y,
        Dispatch::add_matmul(y.into_dispatch(), a.into_dispatch(), b.into_dispatch(), compute),
        y + a.matmul(b)
    )
}

/// Sums of `size` neighbouring columns.
///
/// # Shapes
/// `x` `[rows, columns]` → `[rows, columns / size]`.
///
/// # Panics
/// If `size` doesn't divide the columns.
pub fn sum_groups(x: Tensor<2>, size: usize) -> Tensor<2> {
    let [_, columns] = x.dims();
    assert!(size > 0 && columns.is_multiple_of(size), "groups of {size} among {columns} columns");
    fused_or_plain!(x, Dispatch::sum_groups(x.into_dispatch(), size), plain::sum_groups(x, size))
}

/// `y` plus `update` with each column repeated `times` times (a a b b c c), in place where `y` is not used elsewhere.
///
/// # Shapes
/// `y` `[rows, columns · times]`, `update` `[rows, columns]`; result as `y`.
///
/// # Panics
/// If the shapes don't fit together.
pub fn add_repeated(y: Tensor<2>, update: Tensor<2>, times: usize) -> Tensor<2> {
    let ([rows, d_output], shape) = (y.dims(), update.dims());
    assert_eq!(
        shape.map(|size| size * times),
        [rows * times, d_output],
        "update repeated beside y {rows}x{d_output}"
    );
    fused_or_plain!(
        y,
        Dispatch::add_repeated(y.into_dispatch(), update.into_dispatch(), times),
        plain::add_repeated(y, update, times)
    )
}
