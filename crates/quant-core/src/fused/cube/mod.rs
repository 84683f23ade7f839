//! The fused operations on CubeCL: a launch or a few each, the same sums in the same order on every run.

mod attention;
mod few_queries;
#[cfg(feature = "cuda-cpp")]
mod flash;
mod narrow;
mod packed;
mod rows;
mod step;
mod vocabulary;

use burn::backend::{
    ops::FloatTensorOps,
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::{DType, IntDType, Shape};
use burn_cubecl::{CubeBackend, kernel::into_contiguous, ops::numeric, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    Drops, FusedKernels, FusedOps, Gating, LowRankSpec, NormSpec, RotaryPairs, Scores, autodiff::low, sinks,
};
use crate::{
    Compute, SuperLayout,
    ops::cube::{empty, rounded_product, units},
};

/// Cubes in one direction that every device takes.
const MOST_CUBES: usize = 1 << 15;

/// The sizes of a tensor seen as rows of its last axis: `[rows, width]`.
fn rows_of(x: &CubeTensor) -> [usize; 2] {
    let shape = x.meta.shape();
    let width = shape[shape.num_dims() - 1];
    [shape.num_elements() / width.max(1), width]
}

fn count_of(x: &CubeTensor) -> usize {
    x.meta.shape().num_elements()
}

/// A new tensor of the shape and type of `like`.
fn empty_like(like: &CubeTensor) -> CubeTensor {
    empty(like, like.meta.shape().clone(), like.dtype)
}

/// Zeros of the shape of `like`. Burn's own may have gaps between rows, on CUDA.
fn zeros_like(like: &CubeTensor) -> CubeTensor {
    let (client, device, shape) = (like.client.clone(), like.device.clone(), like.meta.shape().clone());
    into_contiguous(numeric::zeros_client(client, device, shape, DType::F32))
}

/// `x`, contiguous, to be written in place: a copy where somebody else holds it.
fn to_write(x: CubeTensor) -> CubeTensor {
    let x = into_contiguous(x);
    if x.can_mut() { x } else { into_contiguous(x.copy()) }
}

/// A launch of one cube of `units` for each row.
fn cubes(rows: usize, units: usize) -> (CubeCount, CubeDim) {
    let x = rows.clamp(1, MOST_CUBES);
    let count = CubeCount::Static(x as u32, rows.div_ceil(x).max(1) as u32, 1);
    (count, CubeDim::new_1d(units as u32))
}

/// Runs a kernel with one cube for each row of `like`.
///
/// Its kernels index rows below the rows and columns below the width, of tensors of that shape or of one row.
macro_rules! by_rows {
    ($kernel:path, $like:expr, [$($arg:expr),*], [$($scalar:expr),*]) => {{
        let [rows, width] = rows_of(&$like);
        let units = rows::units_of(width);
        let (count, dim) = cubes(rows, units);
        // SAFETY: see above; shapes are asserted by the callers.
        unsafe {
            $kernel(&$like.client, count, dim, $($arg.clone().into_tensor_arg(),)* rows, width, $($scalar,)* units);
        }
    }};
}

impl FusedKernels for CubeBackend {
    fn norm_dx(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        spec: NormSpec,
    ) -> FloatTensor<Self> {
        let (x, weight, dy) = (into_contiguous(x), into_contiguous(weight), into_contiguous(dy));
        let [_, width] = rows_of(&x);
        assert_eq!([count_of(&dy), count_of(&weight)], [count_of(&x), width], "norm: gradient and weights");
        let dx = empty_like(&x);
        by_rows!(rows::norm_dx::launch_unchecked, x, [x, weight, dy, dx], [spec.eps, spec.centred]);
        dx
    }

    fn norm_dweight(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        spec: NormSpec,
    ) -> FloatTensor<Self> {
        let ([rows, width], x, dy) = (rows_of(&x), into_contiguous(x), into_contiguous(dy));
        let [means, inverses] = [(); 2].map(|()| empty(&x, [rows], DType::F32));
        let d_weight = empty_like(&weight);
        by_rows!(rows::moments_of_rows::launch_unchecked, x, [x, means, inverses], [spec.eps, spec.centred]);
        let (count, dim) = units(&x.client, width);
        rows::norm_dweight::launch(
            &x.client.clone(),
            count,
            dim,
            x.into_tensor_arg(),
            dy.into_tensor_arg(),
            means.into_tensor_arg(),
            inverses.into_tensor_arg(),
            d_weight.clone().into_tensor_arg(),
            rows,
            width,
        );
        d_weight
    }

    fn kept(x: FloatTensor<Self>, _: Compute) -> FloatTensor<Self> {
        x
    }

    fn kept_result(out: FloatTensor<Self>) -> FloatTensor<Self> {
        out
    }

    fn gated_with_kept(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        gating: Gating,
        compute: Compute,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        (Self::gated(gate.clone(), up.clone(), gating, compute), gate, up)
    }

    fn gated_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        gating: Gating,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (gate, up, dy) = (into_contiguous(gate), into_contiguous(up), into_contiguous(dy));
        let (d_gate, d_up) = (empty_like(&gate), empty_like(&up));
        let (count, dim) = units(&gate.client, count_of(&gate));
        rows::gated_backward::launch(
            &d_gate.client,
            count,
            dim,
            gate.into_tensor_arg(),
            up.into_tensor_arg(),
            dy.into_tensor_arg(),
            d_gate.clone().into_tensor_arg(),
            d_up.clone().into_tensor_arg(),
            count_of(&d_gate),
            gating,
        );
        (d_gate, d_up)
    }

    fn attention_with_log_sums(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        query_segments: IntTensor<Self>,
        key_segments: IntTensor<Self>,
        scores: Scores,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        attention::forward([q, k, v], [query_segments, key_segments], scores)
    }

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
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        attention::backward([q, k, v, out, d_out], log_sums, [query_segments, key_segments], scores)
    }

    fn cross_entropy_with_gradient(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        use burn::backend::ops::IntTensorOps;
        let [rows, _] = rows_of(&logits);
        let targets = match targets.dtype {
            DType::I32 => targets,
            _ => Self::int_cast(targets, IntDType::I32),
        };
        let (logits, targets) = (to_write(logits), into_contiguous(targets));
        assert_eq!(count_of(&targets), rows, "cross_entropy: targets of {rows} rows");
        let losses = empty(&logits, [rows], DType::F32);
        by_rows!(rows::cross_entropy::launch_unchecked, logits, [logits, targets, losses], []);
        (losses, logits)
    }

    fn scaled_matmul(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        factor: f32,
        compute: Compute,
    ) -> FloatTensor<Self> {
        match narrow::product(&a, &b, factor) {
            Some(product) => product,
            None => Self::float_mul_scalar(rounded_product(a, b, compute), factor.into()),
        }
    }

    fn scale_rows(x: FloatTensor<Self>, factors: FloatTensor<Self>) -> FloatTensor<Self> {
        let ([_, columns], x, factors) = (rows_of(&x), to_write(x), into_contiguous(factors));
        let (count, dim) = units(&x.client, count_of(&x));
        rows::scale_rows::launch(
            &x.client,
            count,
            dim,
            x.clone().into_tensor_arg(),
            factors.into_tensor_arg(),
            count_of(&x),
            columns,
        );
        x
    }
}

impl FusedOps for CubeBackend {
    fn norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, spec: NormSpec) -> FloatTensor<Self> {
        let (x, weight) = (into_contiguous(x), into_contiguous(weight));
        assert_eq!(count_of(&weight), rows_of(&x)[1], "norm: weights for rows of {}", rows_of(&x)[1]);
        let y = empty_like(&x);
        by_rows!(rows::norm::launch_unchecked, x, [x, weight, y], [spec.eps, spec.centred]);
        y
    }

    fn operand(x: FloatTensor<Self>, _: Compute) -> FloatTensor<Self> {
        x
    }

    fn gated(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        gating: Gating,
        _: Compute,
    ) -> FloatTensor<Self> {
        let (gate, up) = (into_contiguous(gate), into_contiguous(up));
        assert_eq!(count_of(&up), count_of(&gate), "gated: gate and up");
        let y = empty_like(&gate);
        let (count, dim) = units(&gate.client, count_of(&gate));
        rows::gated::launch(
            &y.client,
            count,
            dim,
            gate.into_tensor_arg(),
            up.into_tensor_arg(),
            y.clone().into_tensor_arg(),
            count_of(&y),
            gating,
        );
        y
    }

    fn rotate(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        pairs: RotaryPairs,
        sign: f32,
    ) -> FloatTensor<Self> {
        let (x, cos, sin) = (into_contiguous(x), into_contiguous(cos), into_contiguous(sin));
        let shape = x.meta.shape().clone();
        let [rows, half] = rows_of(&cos);
        assert!(
            rows == shape[0] * shape[1] && count_of(&sin) == rows * half && 2 * half <= shape[3],
            "rotate: tables {rows}x{half} for {shape:?}"
        );
        let y = empty_like(&x);
        // One for each pair, one for each channel that stays.
        let units_of_head = shape[3] - half;
        let total = rows * shape[2] * units_of_head;
        let (count, dim) = units(&y.client, total);
        rows::rotate::launch(
            &y.client,
            count,
            dim,
            x.into_tensor_arg(),
            cos.into_tensor_arg(),
            sin.into_tensor_arg(),
            y.clone().into_tensor_arg(),
            total,
            shape[2],
            units_of_head,
            half,
            sign,
            pairs,
        );
        y
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
        let x = into_contiguous(x);
        let y = empty_like(&x);
        let (count, dim) = units(&y.client, count_of(&y).div_ceil(4));
        rows::dropout::launch(
            &y.client,
            count,
            dim,
            x.into_tensor_arg(),
            y.clone().into_tensor_arg(),
            count_of(&y),
            drops.key[0],
            drops.key[1],
            drops.threshold,
        );
        y
    }

    fn seeded(x: FloatTensor<Self>, _: FloatTensor<Self>) -> FloatTensor<Self> {
        numeric::zeros_client(x.client.clone(), x.device.clone(), Shape::from(vec![1]), DType::F32)
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
        match narrow::product(&a, &b, 1.0) {
            Some(product) => product,
            None => rounded_product(a, b, compute),
        }
    }

    fn add_matmul(
        y: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        compute: Compute,
    ) -> FloatTensor<Self> {
        if rows_of(&a)[1] > narrow::MOST {
            return Self::float_add(y, rounded_product(a, b, compute));
        }
        narrow::outer(Some(into_contiguous(y)), &a, &b, 1.0)
    }

    fn sum_groups(x: FloatTensor<Self>, size: usize) -> FloatTensor<Self> {
        let ([rows, columns], x) = (rows_of(&x), into_contiguous(x));
        let y = empty(&x, [rows, columns / size], DType::F32);
        let (count, dim) = units(&y.client, count_of(&y));
        rows::sum_groups::launch(
            &y.client,
            count,
            dim,
            x.into_tensor_arg(),
            y.clone().into_tensor_arg(),
            count_of(&y),
            size,
        );
        y
    }

    fn add_repeated(y: FloatTensor<Self>, update: FloatTensor<Self>, times: usize) -> FloatTensor<Self> {
        let (y, update) = (into_contiguous(y), into_contiguous(update));
        let out = empty_like(&y);
        let (count, dim) = units(&out.client, count_of(&out));
        rows::add_repeated::launch(
            &out.client,
            count,
            dim,
            y.into_tensor_arg(),
            update.into_tensor_arg(),
            out.clone().into_tensor_arg(),
            count_of(&out),
            times,
        );
        out
    }

    fn reordered(x: FloatTensor<Self>, order: IntTensor<Self>, _: IntTensor<Self>) -> FloatTensor<Self> {
        Self::float_select(x, 1, order)
    }

    fn super_scales(
        words: IntTensor<Self>,
        factors: FloatTensor<Self>,
        layout: SuperLayout,
    ) -> FloatTensor<Self> {
        let (words, factors) = (into_contiguous(words), into_contiguous(factors));
        let scales = empty(&factors, [layout.rows, layout.columns], DType::F32);
        let (count, dim) = units(&scales.client, layout.rows * layout.columns);
        rows::super_scales::launch(
            &scales.client,
            count,
            dim,
            words.into_tensor_arg(),
            factors.into_tensor_arg(),
            scales.clone().into_tensor_arg(),
            layout.rows,
            layout.columns,
            layout.blocks,
            layout.bits,
        );
        scales
    }

    fn double_scales(
        codes: IntTensor<Self>,
        nested: FloatTensor<Self>,
        offset: FloatTensor<Self>,
        size: [usize; 2],
    ) -> FloatTensor<Self> {
        let (codes, nested, offset) =
            (into_contiguous(codes), into_contiguous(nested), into_contiguous(offset));
        let scales = empty(&nested, size, DType::F32);
        let (count, dim) = units(&scales.client, size[0] * size[1]);
        rows::double_scales::launch(
            &scales.client,
            count,
            dim,
            codes.into_tensor_arg(),
            nested.into_tensor_arg(),
            offset.into_tensor_arg(),
            scales.clone().into_tensor_arg(),
            size[0],
            size[1],
        );
        scales
    }
}
