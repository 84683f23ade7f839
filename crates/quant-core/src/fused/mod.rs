//! The other operations of a transformer block, each with a backward pass written by hand.
//!
//! Composed of Burn's elementwise operations, attention, norms and activations would keep several copies of their
//! inputs in the graph and go over memory many times. On Flex these functions run as one pass and keep what their
//! backward pass cannot recompute cheaply; on every other backend, and for types other than f32, they are the plain
//! versions in [`plain`], which tests compare with.

#[cfg(feature = "flex")]
mod attention;
#[cfg(feature = "flex")]
mod autodiff;
#[cfg(feature = "flex")]
mod flex;
#[cfg(feature = "flex")]
mod groups;
pub mod plain;

use std::sync::Arc;

#[cfg(feature = "flex")]
use burn::backend::{
    Dispatch, DispatchDevice, backend_extension,
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::{DType, Int, Tensor};

/// Which keys a query sees: those at or before its own place, of its own segment, and inside the window.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionSpec {
    /// Factor on the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Latest positions seen, the query's own included; `None` sees all.
    pub window: Option<usize>,
    /// Segments of the queries, `[batch, length]` row-major.
    pub query_segments: Arc<[u32]>,
    /// Segments of the keys, `[batch, past + length]` row-major: the queries' places come last.
    pub key_segments: Arc<[u32]>,
}

impl AttentionSpec {
    /// Whether query `query` of `row` sees key `key`, given the lengths of a row.
    #[inline]
    pub fn sees(&self, row: usize, query: usize, key: usize, [length, keys]: [usize; 2]) -> bool {
        let place = query + keys - length;
        key <= place
            && self.window.is_none_or(|window| place - key < window)
            && self.query_segments[row * length + query] == self.key_segments[row * keys + key]
    }
}

/// An activation `x * sigmoid(s(x))` that gates another value.
#[cfg(feature = "flex")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gating {
    /// `s(x) = x`.
    Silu,
    /// `s(x) = 2 sqrt(2 / π) (x + 0.044715 x³)`, since `(1 + tanh(u)) / 2 = sigmoid(2 u)`.
    GeluTanh,
}

/// The differentiable operations, on Flex only.
#[cfg(feature = "flex")]
#[backend_extension(Flex: cfg(feature = "flex"), Autodiff)]
pub(crate) trait FusedOps: burn::backend::Backend {
    /// See [`rms_norm`].
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f32) -> FloatTensor<Self>;
    /// See [`swiglu`] and [`geglu`].
    fn gated(gate: FloatTensor<Self>, up: FloatTensor<Self>, gating: Gating) -> FloatTensor<Self>;
    /// See [`rotate`]; `sign` is -1 for the inverse rotation.
    fn rotate(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        sign: f32,
    ) -> FloatTensor<Self>;
    /// See [`attention`].
    fn attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        spec: AttentionSpec,
    ) -> FloatTensor<Self>;
    /// See [`cross_entropy`].
    fn cross_entropy(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self>;
    /// See [`add_matmul`].
    fn add_matmul(y: FloatTensor<Self>, a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self>;
    /// See [`sum_groups`].
    fn sum_groups(x: FloatTensor<Self>, size: usize) -> FloatTensor<Self>;
    /// See [`add_repeated`].
    fn add_repeated(y: FloatTensor<Self>, update: FloatTensor<Self>, times: usize) -> FloatTensor<Self>;
    /// See [`double_scales`].
    fn double_scales(
        codes: IntTensor<Self>,
        nested: FloatTensor<Self>,
        offset: FloatTensor<Self>,
        shape: [usize; 2],
    ) -> FloatTensor<Self>;
}

/// Whether the fused kernels take this tensor.
fn fused<const D: usize>(x: &Tensor<D>) -> bool {
    #[cfg(feature = "flex")]
    return x.dtype() == DType::F32
        && matches!(x.device().without_autodiff().as_dispatch(), DispatchDevice::Flex(_));
    #[cfg(not(feature = "flex"))]
    return false;
}

/// Calls the fused operation where it exists, else the plain one.
macro_rules! fused_or_plain {
    ($x:expr, $fused:expr, $plain:expr) => {{
        #[cfg(feature = "flex")]
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
        Dispatch::rms_norm(x.into_dispatch(), weight.into_dispatch(), eps as f32),
        plain::rms_norm(x, weight, eps)
    )
}

/// `silu(gate) * up`.
///
/// # Shapes
/// Both and the result alike.
pub fn swiglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    fused_or_plain!(
        gate,
        Dispatch::gated(gate.into_dispatch(), up.into_dispatch(), Gating::Silu),
        plain::swiglu(gate, up)
    )
}

/// `gelu(gate) * up`, with GELU's tanh form: `x / 2 * (1 + tanh(sqrt(2 / π) * (x + 0.044715 x³)))`.
///
/// # Shapes
/// Both and the result alike.
pub fn geglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    fused_or_plain!(
        gate,
        Dispatch::gated(gate.into_dispatch(), up.into_dispatch(), Gating::GeluTanh),
        plain::geglu(gate, up)
    )
}

/// Rotary positions, half-split: pairs are (`i`, `i + head_dim / 2`).
///
/// # Shapes
/// `x` `[batch, length, heads, head_dim]`; `cos` and `sin` `[batch * length, head_dim / 2]`; result as `x`.
pub fn rotate(x: Tensor<4>, cos: Tensor<2>, sin: Tensor<2>) -> Tensor<4> {
    fused_or_plain!(
        x,
        Dispatch::rotate(x.into_dispatch(), cos.into_dispatch(), sin.into_dispatch(), 1.0),
        plain::rotate(x, cos, sin)
    )
}

/// Grouped-query attention: `softmax(q kᵀ · scale) v` over the keys that [`AttentionSpec`] lets a query see. The graph
/// keeps q, k, v, the result and one number per query and head; no scores.
///
/// # Shapes
/// `q` `[batch, length, heads, head_dim]`; `k`, `v` `[batch, past + length, kv_heads, head_dim]`; result as `q`.
///
/// # Panics
/// If shapes or segments don't fit together.
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, spec: &AttentionSpec) -> Tensor<4> {
    fused_or_plain!(
        q,
        Dispatch::attention(q.into_dispatch(), k.into_dispatch(), v.into_dispatch(), spec.clone()),
        plain::attention(q, k, v, spec)
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

/// `y + a · b`, in place where `y` is not used elsewhere.
///
/// # Shapes
/// `y` `[rows, columns]`, `a` `[rows, inner]`, `b` `[inner, columns]`.
pub fn add_matmul(y: Tensor<2>, a: Tensor<2>, b: Tensor<2>) -> Tensor<2> {
    fused_or_plain!(
        y,
        Dispatch::add_matmul(y.into_dispatch(), a.into_dispatch(), b.into_dispatch()),
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
