//! CubeCL (any GPU). Few rows: one kernel that unpacks and multiplies, bound by memory. Many rows: unpack into a dense
//! matrix that dies with the call, then a matrix product whose operands are rounded as [`Compute`](crate::Compute) says.

#[cfg(feature = "cuda-cpp")]
pub(crate) mod cuda_text;
#[cfg(feature = "cuda-cpp")]
mod hopper;
mod kernels;
mod product;

use std::ops::Range;

use burn::backend::{
    cubecl::dtype_to_storage_type,
    ops::{FloatTensorOps, IntTensorOps},
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::{DType, FloatDType, Slice};
use burn_cubecl::{CubeBackend, kernel::into_contiguous, tensor::CubeTensor};
use cubecl::{calculate_cube_count_elemwise, ir::ElemType, prelude::*};

use self::kernels::{COLUMNS, Format, PARTS};
#[cfg(feature = "cuda-cpp")]
pub(crate) use self::product::rounded;
pub(crate) use self::product::{
    empty, multiplies, name_and_page, operand_type, product, product_into, rounded_product,
};
use super::{PackedKernels, PackedOps, PackedSpec};
use crate::packing::{RUN, code_rows};

/// Up to this many rows are multiplied by the kernel that unpacks on the way, which reads the packed weight once for each
/// [`PARTS`] of them; more, by a product with an unpacked weight, which is written and read in 16 or 32 bits.
const FEW_ROWS: usize = 2 * PARTS;
/// Cubes of a multiprocessor that keep its memory busy.
const CUBES: usize = 4;
/// Multiprocessors of devices that don't say how many they have.
const MULTIPROCESSORS: usize = 16;

/// Outputs whose dense gradient is held at a time when scales and offsets are learned.
const GRADIENT_OUTPUTS: usize = 1024;

/// Bytes of a dense weight that products hold at a time, at most: larger ones, which heads of large vocabularies are, are
/// unpacked and multiplied in parts. No more than a quarter of the largest tensor of the device.
const MOST_DENSE: u64 = 256 << 20;

/// A packed weight on the device.
#[derive(Clone)]
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

    /// Outputs of a part that is unpacked at a time, whole blocks of them, for a dense weight of `dtype`.
    fn outputs_at_once(&self, dtype: DType) -> usize {
        let page = self.codes.client.properties().memory.max_page_size;
        let most = MOST_DENSE.min(page / 4) as usize / dtype.size() / self.spec.d_input.max(1);
        (most / self.spec.outputs).max(1).saturating_mul(self.spec.outputs).min(self.spec.d_output)
    }

    /// The weight of the given outputs, which begin with a block.
    fn of_outputs(&self, outputs: Range<usize>) -> Self {
        let columns = |x: &CubeTensor, columns: Range<usize>| {
            let rows = x.meta.shape()[0];
            CubeBackend::float_slice(x.clone(), &[Slice::from(0..rows), Slice::from(columns)])
        };
        let blocks = outputs.start / self.spec.outputs..outputs.end.div_ceil(self.spec.outputs);
        let rows = self.codes.meta.shape()[0];
        let codes = [Slice::from(0..rows), Slice::from(outputs.clone())];
        let offsets = match self.spec.has_offsets() {
            true => columns(&self.offsets, blocks.clone()),
            false => self.offsets.clone(),
        };
        Self {
            codes: CubeBackend::int_slice(self.codes.clone(), &codes),
            scales: columns(&self.scales, blocks),
            offsets,
            spec: PackedSpec { d_output: outputs.len(), ..self.spec },
        }
    }

    /// `x · W`, or `x · Wᵀ` if `transposed`, by products with the unpacked weight.
    fn many_rows(self, x: CubeTensor, transposed: bool) -> CubeTensor {
        let (spec, rows, dtype) = (self.spec, x.meta.shape()[0], x.dtype);
        let at_once = self.outputs_at_once(operand_type(spec.compute));
        if at_once >= spec.d_output {
            let (x, dense) = operands(x, self, transposed);
            return product(x, dense, dtype);
        }
        let x = product::rounded(x, spec.compute);
        let parts = (0..spec.d_output).step_by(at_once).map(|first| {
            let outputs = first..spec.d_output.min(first + at_once);
            (outputs.clone(), self.of_outputs(outputs).dense(x.dtype))
        });
        let columns = |outputs: Range<usize>| [Slice::from(0..rows), Slice::from(outputs)];
        if transposed {
            let products = parts.map(|(outputs, dense)| {
                let x = into_contiguous(CubeBackend::float_slice(x.clone(), &columns(outputs)));
                product(x, CubeBackend::float_transpose(dense), dtype)
            });
            products.reduce(CubeBackend::float_add).expect("a weight of at least one output")
        } else {
            let y = self.empty([rows, spec.d_output], dtype);
            parts.fold(y, |y, (outputs, dense)| {
                CubeBackend::float_slice_assign(y, &columns(outputs), product(x.clone(), dense, dtype))
            })
        }
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

    /// Into how many shares the inputs are split for `columns` cubes of outputs: as many as give every multiprocessor its
    /// cubes, with a run for each unit.
    fn splits(&self, columns: usize) -> usize {
        let most = self.spec.d_input.div_ceil(RUN).div_ceil(PARTS);
        (CUBES * multiprocessors(&self.codes) / columns).clamp(1, most)
    }

    /// `x · W` for at most [`FEW_ROWS`] rows.
    fn few_rows(self, x: CubeTensor) -> CubeTensor {
        let (spec, rows) = (self.spec, x.meta.shape()[0]);
        assert_eq!(x.meta.shape()[1], spec.d_input, "x beside {spec:?}");
        let y = self.empty([rows, spec.d_output], x.dtype);
        let columns = spec.d_output.div_ceil(COLUMNS);
        let splits = self.splits(columns);
        let shares = match splits {
            1 => y.clone(),
            _ => self.empty([splits * rows, spec.d_output], DType::F32),
        };
        let (format, [scales, offsets]) = (self.format(), self.types());
        let [of_x, of_shares] = [&x, &shares].map(|tensor| dtype_to_storage_type(tensor.dtype));
        // SAFETY: shapes are asserted above and in `Packed::new`; outputs and inputs beyond them are not read, rows beyond
        // the last are read as that and not written, and `shares` has rows for each of the splits.
        unsafe {
            kernels::rows_times_weight::launch_unchecked(
                &y.client,
                CubeCount::Static(columns as u32, splits as u32, rows.div_ceil(PARTS) as u32),
                CubeDim::new_2d(COLUMNS as u32, PARTS as u32),
                x.into_tensor_arg(),
                self.codes.into_tensor_arg(),
                self.scales.into_tensor_arg(),
                self.offsets.into_tensor_arg(),
                shares.clone().into_tensor_arg(),
                spec.inputs,
                spec.outputs,
                splits,
                rows.min(PARTS),
                format,
                [scales, offsets, of_x, of_shares],
            );
        }
        if splits > 1 {
            let count = rows * spec.d_output;
            let (cubes, dim) = units(&y.client, count);
            // SAFETY: units beyond `count` end; both tensors are contiguous, and the shares have `splits` times as many.
            unsafe {
                kernels::sum_shares::launch_unchecked(
                    &y.client,
                    cubes,
                    dim,
                    shares.into_tensor_arg(),
                    y.clone().into_tensor_arg(),
                    count,
                    splits,
                    dtype_to_storage_type(y.dtype),
                );
            }
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

/// Multiprocessors of a tensor's device, or a guess.
pub(crate) fn multiprocessors(x: &CubeTensor) -> usize {
    let hardware = &x.client.properties().hardware;
    hardware.num_streaming_multiprocessors.map_or(MULTIPROCESSORS, |count| count as usize)
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
            _ => packed.many_rows(x, false),
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
        Packed::new(codes, scales, offsets, spec).many_rows(dy, true)
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
