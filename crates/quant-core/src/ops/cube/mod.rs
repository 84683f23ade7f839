//! CubeCL (any GPU). Few rows: one kernel that unpacks and multiplies, bound by memory. Many rows: unpack into a dense
//! matrix that dies with the call, then a matrix product whose operands are rounded as [`Compute`](crate::Compute) says.

#[cfg(feature = "cuda-cpp")]
pub(crate) mod cuda_text;
#[cfg(feature = "cuda-cpp")]
mod hopper;
mod kernels;
mod product;

use burn::backend::{
    cubecl::dtype_to_storage_type,
    ops::FloatTensorOps,
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::{DType, FloatDType, Slice};
use burn_cubecl::{CubeBackend, tensor::CubeTensor};
use cubecl::{calculate_cube_count_elemwise, ir::ElemType, prelude::*};

use self::kernels::{COLUMNS, Format, PARTS};
#[cfg(feature = "cuda-cpp")]
pub(crate) use self::product::rounded;
pub(crate) use self::product::{
    empty, multiplies, name_and_page, operand_type, product, product_into, rounded_product,
};
use super::{FEW_ROWS, PackedKernels, PackedOps, PackedSpec};
use crate::packing::{RUN, code_rows};

const _: () = assert!(FEW_ROWS <= PARTS, "a part of the fused kernel adds up each row");

/// Outputs whose dense gradient is held at a time when scales and offsets are learned.
const GRADIENT_OUTPUTS: usize = 1024;

/// A packed weight on the device.
struct Packed {
    codes: CubeTensor,
    scales: CubeTensor,
    offsets: CubeTensor,
    spec: PackedSpec,
}

impl Packed {
    fn new(codes: CubeTensor, scales: CubeTensor, offsets: CubeTensor, spec: PackedSpec) -> Self {
        // I32 holds the same bits; the kernels see 32-bit words.
        assert!(matches!(codes.dtype, DType::U32 | DType::I32), "codes must be U32, found {:?}", codes.dtype);
        let words = [code_rows(spec.d_input, spec.value.bits()), spec.d_output];
        let expect = |part: &str, tensor: &CubeTensor, shape: [usize; 2]| {
            let found = tensor.meta.shape();
            assert_eq!(found.as_slice(), shape, "{part} of a packed weight {spec:?}");
        };
        expect("words", &codes, words);
        expect("scales", &scales, spec.scale_shape());
        if spec.has_offsets() {
            expect("offsets", &offsets, spec.scale_shape());
        }
        Self { codes, scales, offsets, spec }
    }

    fn format(&self) -> Format {
        let spec = &self.spec;
        Format {
            value: spec.value,
            has_offsets: spec.has_offsets(),
            in_block: match spec.inputs {
                inputs if inputs.is_multiple_of(RUN) || inputs >= spec.d_input => RUN,
                inputs if RUN.is_multiple_of(inputs) => inputs,
                _ => 1,
            },
            ragged: !spec.d_input.is_multiple_of(RUN),
        }
    }

    /// Types of scales and offsets.
    fn types(&self) -> [ElemType; 2] {
        [&self.scales, &self.offsets].map(|tensor| dtype_to_storage_type(tensor.dtype))
    }

    fn empty(&self, shape: [usize; 2], dtype: DType) -> CubeTensor {
        empty(&self.codes, shape, dtype)
    }

    /// The dense weight.
    fn dense(self, dtype: DType) -> CubeTensor {
        let spec = self.spec;
        let dense = self.empty([spec.d_input, spec.d_output], dtype);
        let (format, [scales, offsets]) = (self.format(), self.types());
        let (count, dim) = units(&dense.client, spec.d_input.div_ceil(RUN) * spec.d_output);
        // SAFETY: shapes are asserted in `Packed::new`; runs and outputs beyond them end at once, and inputs are tested.
        unsafe {
            kernels::dequantize::launch_unchecked(
                &dense.client,
                count,
                dim,
                self.codes.into_tensor_arg(),
                self.scales.into_tensor_arg(),
                self.offsets.into_tensor_arg(),
                dense.clone().into_tensor_arg(),
                spec.inputs,
                spec.outputs,
                format,
                [scales, offsets, dtype_to_storage_type(dtype)],
            );
        }
        dense
    }

    /// `x · W` for at most [`FEW_ROWS`] rows.
    fn few_rows(self, x: CubeTensor) -> CubeTensor {
        let (spec, rows) = (self.spec, x.meta.shape()[0]);
        assert_eq!(x.meta.shape()[1], spec.d_input, "x beside {spec:?}");
        let y = self.empty([rows, spec.d_output], x.dtype);
        let (format, [scales, offsets]) = (self.format(), self.types());
        let dtype = dtype_to_storage_type(x.dtype);
        // SAFETY: shapes are asserted above and in `Packed::new`; outputs and inputs beyond them are not read.
        unsafe {
            kernels::rows_times_weight::launch_unchecked(
                &y.client,
                CubeCount::Static(spec.d_output.div_ceil(COLUMNS) as u32, 1, 1),
                CubeDim::new_2d(COLUMNS as u32, PARTS as u32),
                x.into_tensor_arg(),
                self.codes.into_tensor_arg(),
                self.scales.into_tensor_arg(),
                self.offsets.into_tensor_arg(),
                y.clone().into_tensor_arg(),
                spec.inputs,
                spec.outputs,
                rows,
                format,
                [scales, offsets, dtype],
            );
        }
        y
    }

    /// Gradients of scales and offsets, given a function that computes the dense gradient of some outputs in f32;
    /// `width` outputs at a time, a multiple of the block's.
    fn parameter_gradients(
        self,
        width: usize,
        dw: impl Fn(usize, usize) -> CubeTensor,
    ) -> (CubeTensor, CubeTensor) {
        let (spec, shape) = (self.spec, self.spec.scale_shape());
        let (format, types) = (self.format(), self.types());
        let d_scales = self.empty(shape, self.scales.dtype);
        let d_offsets = self.empty(shape, self.offsets.dtype);
        for first in (0..spec.d_output).step_by(width) {
            let end = spec.d_output.min(first + width);
            let (count, dim) = units(&d_scales.client, shape[0] * (end - first).div_ceil(spec.outputs));
            kernels::reduce_blocks::launch(
                &d_scales.client,
                count,
                dim,
                dw(first, end).into_tensor_arg(),
                self.codes.clone().into_tensor_arg(),
                d_scales.clone().into_tensor_arg(),
                d_offsets.clone().into_tensor_arg(),
                first,
                spec.inputs,
                spec.outputs,
                format,
                types,
            );
        }
        (d_scales, d_offsets)
    }
}

/// A launch of at least `count` units.
pub(crate) fn units(client: &Client, count: usize) -> (CubeCount, CubeDim) {
    let dim = CubeDim::new(client, count);
    (calculate_cube_count_elemwise(client, count, dim), dim)
}

/// `x` rounded as an operand, and beside it the dense weight, transposed where that is asked.
fn operands(x: CubeTensor, packed: Packed, transposed: bool) -> (CubeTensor, CubeTensor) {
    let x = product::rounded(x, packed.spec.compute);
    let dense = packed.dense(x.dtype);
    (x, if transposed { CubeBackend::float_transpose(dense) } else { dense })
}

/// `x · W + left · right`, `W` transposed where that is asked, if the device has a kernel for both at once.
pub(crate) fn packed_product_and_update(
    x: &CubeTensor,
    (codes, scales, offsets): (CubeTensor, CubeTensor, CubeTensor),
    update: [&CubeTensor; 2],
    spec: PackedSpec,
    transposed: bool,
) -> Option<CubeTensor> {
    #[cfg(feature = "cuda-cpp")]
    if x.dtype == DType::F32 && hopper::updates(x, update, spec.compute) {
        let packed = Packed::new(codes, scales, offsets, spec);
        let (x, dense) = operands(x.clone(), packed, transposed);
        return hopper::product_and_update(&x, &dense, update);
    }
    #[cfg(not(feature = "cuda-cpp"))]
    let _ = (x, codes, scales, offsets, update, spec, transposed);
    None
}

fn in_f32(tensor: CubeTensor) -> CubeTensor {
    if tensor.dtype == DType::F32 { tensor } else { CubeBackend::float_cast(tensor, FloatDType::F32) }
}

impl PackedOps for CubeBackend {
    fn packed_linear(
        x: FloatTensor<Self>,
        codes: IntTensor<Self>,
        scales: FloatTensor<Self>,
        offsets: FloatTensor<Self>,
        spec: PackedSpec,
    ) -> FloatTensor<Self> {
        let packed = Packed::new(codes, scales, offsets, spec);
        match x.meta.shape()[0] {
            0 => packed.empty([0, spec.d_output], x.dtype),
            1..=FEW_ROWS => packed.few_rows(x),
            _ => {
                let dtype = x.dtype;
                let (x, dense) = operands(x, packed, false);
                product(x, dense, dtype)
            }
        }
    }

    fn packed_dequantize(
        codes: IntTensor<Self>,
        scales: FloatTensor<Self>,
        offsets: FloatTensor<Self>,
        spec: PackedSpec,
    ) -> FloatTensor<Self> {
        Packed::new(codes, scales, offsets, spec).dense(DType::F32)
    }
}

impl PackedKernels for CubeBackend {
    /// Always through the dense weight: who asks for gradients has many rows.
    fn packed_linear_dx(
        dy: FloatTensor<Self>,
        codes: IntTensor<Self>,
        scales: FloatTensor<Self>,
        offsets: FloatTensor<Self>,
        spec: PackedSpec,
    ) -> FloatTensor<Self> {
        let dtype = dy.dtype;
        let (dy, dense) = operands(dy, Packed::new(codes, scales, offsets, spec), true);
        product(dy, dense, dtype)
    }

    /// Holds `dW` of `GRADIENT_OUTPUTS` outputs (or of one block, if wider) at a time, in f32.
    fn packed_linear_dparams(
        x: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        codes: IntTensor<Self>,
        scales: FloatTensor<Self>,
        offsets: FloatTensor<Self>,
        spec: PackedSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let rows = x.meta.shape()[0];
        let (x, dy) = (Self::float_transpose(in_f32(x)), in_f32(dy));
        let width = GRADIENT_OUTPUTS.next_multiple_of(spec.outputs);
        Packed::new(codes, scales, offsets, spec).parameter_gradients(width, |first, end| {
            let dy = Self::float_slice(dy.clone(), &[Slice::from(0..rows), Slice::from(first..end)]);
            Self::float_matmul(x.clone(), dy)
        })
    }

    fn packed_dequantize_dparams(
        dw: FloatTensor<Self>,
        codes: IntTensor<Self>,
        scales: FloatTensor<Self>,
        offsets: FloatTensor<Self>,
        spec: PackedSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let dw = in_f32(dw);
        Packed::new(codes, scales, offsets, spec).parameter_gradients(spec.d_output, |_, _| dw.clone())
    }
}
