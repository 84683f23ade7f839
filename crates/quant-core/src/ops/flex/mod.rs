//! Flex (CPU). Few rows: unpack and dot in registers, bound by memory. Many rows: unpack a tile that stays in the
//! cache, then the matrix product that Flex itself uses. Parallel over outputs (forward) or inputs (backward).

mod buffers;
#[cfg(target_arch = "x86_64")]
mod integer_dot;
mod kernels;
mod product;
mod share;
pub(crate) mod simd;
mod stored;
mod view;

use burn::{
    backend::{
        flex::{Flex, FlexTensor},
        tensor::{FloatTensor, IntTensor},
    },
    tensor::DType,
};

use self::view::View;
pub(crate) use self::{
    buffers::{
        both_written, contiguous, floats, half_tensor, halves, is_operand, operand, result_type, round,
        rounded, rounds, tensor, words, written,
    },
    product::{Matrix, Out, SharedMut, matmul, multiplies, multiply, product},
    stored::Stored,
};
use super::{
    PackedKernels, PackedOps, PackedSpec,
    few_rows::{FewRows, StoredScales},
};

/// Makes the parts contiguous and runs `f` on a view of them.
fn with_view<R>(
    codes: FlexTensor,
    scales: FlexTensor,
    offsets: FlexTensor,
    spec: PackedSpec,
    f: impl FnOnce(&View) -> R,
) -> R {
    let (codes, scales) = (codes.to_contiguous(), contiguous(scales));
    let offsets = spec.has_offsets().then(|| contiguous(offsets));
    let stored = |values| Stored::floats(floats(values), spec.scale_shape(), spec.outputs);
    f(&View::new(&codes, stored(&scales), offsets.as_ref().map(stored), spec))
}

impl PackedOps for Flex {
    fn packed_linear(
        x: FloatTensor<Self>,
        codes: IntTensor<Self>,
        scales: FloatTensor<Self>,
        offsets: FloatTensor<Self>,
        spec: PackedSpec,
    ) -> FloatTensor<Self> {
        let (dtype, rows) = (result_type(x.dtype(), spec.compute), x.layout().shape()[0]);
        let y = with_view(codes, scales, offsets, spec, |view| view.forward(x, rows));
        tensor(y, [rows, spec.d_output], dtype)
    }

    fn packed_dequantize(
        codes: IntTensor<Self>,
        scales: FloatTensor<Self>,
        offsets: FloatTensor<Self>,
        spec: PackedSpec,
    ) -> FloatTensor<Self> {
        let dense = with_view(codes, scales, offsets, spec, |view| view.dense());
        tensor(dense, [spec.d_input, spec.d_output], DType::F32)
    }
}

impl PackedKernels for Flex {
    fn packed_linear_dx(
        dy: FloatTensor<Self>,
        codes: IntTensor<Self>,
        scales: FloatTensor<Self>,
        offsets: FloatTensor<Self>,
        spec: PackedSpec,
    ) -> FloatTensor<Self> {
        let (dtype, rows) = (result_type(dy.dtype(), spec.compute), dy.layout().shape()[0]);
        let dx = with_view(codes, scales, offsets, spec, |view| view.backward(dy, rows));
        tensor(dx, [rows, spec.d_input], dtype)
    }

    fn packed_linear_dparams(
        x: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        codes: IntTensor<Self>,
        scales: FloatTensor<Self>,
        offsets: FloatTensor<Self>,
        spec: PackedSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (scale_type, offset_type) = (scales.dtype(), offsets.dtype());
        let rows = x.layout().shape()[0];
        let (x, dy) = (contiguous(x), contiguous(dy));
        let (x, dy) = (floats(&x), floats(&dy));
        let (d_scales, d_offsets) = with_view(codes, scales, offsets, spec, |view| {
            view.parameter_gradients(|(k0, k1), dw| {
                let (x, dy) = (Matrix::columns(&x[k0..], spec.d_input), Matrix::rows(dy, spec.d_output));
                let out = Out::new(dw.as_mut_ptr(), spec.d_output, false);
                // SAFETY: `dw` is the task's own.
                unsafe { matmul([k1 - k0, spec.d_output, rows], out, x, dy, spec.compute) }
            })
        });
        let shape = spec.scale_shape();
        (tensor(d_scales, shape, scale_type), tensor(d_offsets, shape, offset_type))
    }

    fn packed_dequantize_dparams(
        dw: FloatTensor<Self>,
        codes: IntTensor<Self>,
        scales: FloatTensor<Self>,
        offsets: FloatTensor<Self>,
        spec: PackedSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (scale_type, offset_type) = (scales.dtype(), offsets.dtype());
        let dw = contiguous(dw);
        let dw = floats(&dw);
        let (d_scales, d_offsets) = with_view(codes, scales, offsets, spec, |view| {
            view.parameter_gradients(|(k0, k1), part| {
                part.copy_from_slice(&dw[k0 * spec.d_output..k1 * spec.d_output]);
            })
        });
        let shape = spec.scale_shape();
        (tensor(d_scales, shape, scale_type), tensor(d_offsets, shape, offset_type))
    }
}

impl FewRows for Flex {
    fn few_rows(
        x: FloatTensor<Self>,
        codes: IntTensor<Self>,
        scales: FloatTensor<Self>,
        scale_codes: IntTensor<Self>,
        offsets: FloatTensor<Self>,
        offset_codes: IntTensor<Self>,
        spec: PackedSpec,
        form: StoredScales,
        transposed: bool,
    ) -> FloatTensor<Self> {
        let (dtype, rows) = (result_type(x.dtype(), spec.compute), x.layout().shape()[0]);
        let codes = codes.to_contiguous();
        let (scales, offsets) = (contiguous(scales), contiguous(offsets));
        let (scale_codes, offset_codes) = (scale_codes.to_contiguous(), offset_codes.to_contiguous());
        let (scale_codes, offset_codes) = (words(&scale_codes), words(&offset_codes));
        let (scales, offsets) = (floats(&scales), floats(&offsets));
        let (scales, offsets) = match form {
            StoredScales::Integers(layout) => (
                Stored::integers(scale_codes, scales, layout),
                spec.has_offsets().then(|| Stored::integers(offset_codes, offsets, layout)),
            ),
            StoredScales::Double => {
                (Stored::double(scale_codes, scales, offsets[0], spec.scale_shape()), None)
            }
        };
        let view = View::new(&codes, scales, offsets, spec);
        if transposed {
            tensor(view.backward(x, rows), [rows, spec.d_input], dtype)
        } else {
            tensor(view.forward(x, rows), [rows, spec.d_output], dtype)
        }
    }
}
