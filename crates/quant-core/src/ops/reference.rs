//! The packed operations in plain tensor operations: slow, dense, differentiable, on any Burn backend.
//! The measure that every kernel is tested against.

use burn::tensor::{DType, FloatDType, Int, IntDType, Tensor, TensorData};

use super::PackedSpec;
use crate::{
    Value,
    packing::{RUN, position},
    scheme::Grid,
};

/// [`packed_dequantize`](super::packed_dequantize) without kernels.
pub fn packed_dequantize(
    codes: Tensor<2, Int>,
    scales: Tensor<2>,
    offsets: Tensor<2>,
    spec: PackedSpec,
) -> Tensor<2> {
    let device = scales.device();
    let levels = levels(unpack(codes, spec), spec);
    let index = |size: usize, block: usize| {
        let index: Vec<i64> = (0..size).map(|i| (i / block) as i64).collect();
        Tensor::<1, Int>::from_data(TensorData::new(index, [size]), &device)
    };
    let spread = |blocks: Tensor<2>| {
        let blocks = blocks.cast(FloatDType::F32);
        blocks.select(0, index(spec.d_input, spec.inputs)).select(1, index(spec.d_output, spec.outputs))
    };
    let dense = levels * spread(scales);
    if spec.has_offsets() { dense + spread(offsets) } else { dense }
}

/// Codes `[d_input, d_output]`.
fn unpack(words: Tensor<2, Int>, spec: PackedSpec) -> Tensor<2, Int> {
    let (bits, device) = (spec.value.bits(), words.device());
    let padded = spec.d_input.next_multiple_of(RUN);
    let column = |f: &dyn Fn(usize) -> i64| {
        let values: Vec<i64> = (0..padded).map(f).collect();
        Tensor::<1, Int>::from_data(TensorData::new(values, [padded]), &device)
    };
    let u32s = |t: Tensor<2, Int>| t.cast(IntDType::U32);
    let low_row = column(&|k| position(k, bits).0 as i64);
    let high_row = column(&|k| {
        let (row, shift) = position(k, bits);
        (row + usize::from(shift + bits > 32)) as i64
    });
    // A code that doesn't straddle takes nothing from the (same) high word: its left shift is masked to zero.
    let shift = column(&|k| i64::from(position(k, bits).1));
    let left = column(&|k| {
        let shift = position(k, bits).1;
        if shift + bits > 32 { i64::from(32 - shift) } else { 0 }
    });
    let straddles = column(&|k| i64::from(position(k, bits).1 + bits > 32));
    let spread = |t: Tensor<1, Int>| u32s(t.unsqueeze_dim::<2>(1).expand([padded, spec.d_output]));
    let low = words.clone().select(0, low_row).bitwise_right_shift(spread(shift));
    let high = words.select(0, high_row).bitwise_left_shift(spread(left)) * spread(straddles);
    let codes = low.bitwise_or(high).bitwise_and_scalar((1i64 << bits) - 1);
    codes.narrow(0, 0, spec.d_input)
}

/// The number that each code stands for before scaling.
fn levels(codes: Tensor<2, Int>, spec: PackedSpec) -> Tensor<2> {
    let device = codes.device();
    match spec.value {
        Value::Affine { bits, grid: Grid::Symmetric } => {
            codes.float().sub_scalar((1u32 << (bits - 1)) as f32)
        }
        Value::Affine { .. } => codes.float(),
        Value::Codebook(codebook) => {
            let levels = codebook.levels();
            let table = Tensor::<1>::from_data(TensorData::new(levels.to_vec(), [levels.len()]), &device);
            let ids = codes.cast(IntDType::from(DType::I32)).reshape([spec.d_input * spec.d_output]);
            table.select(0, ids).reshape([spec.d_input, spec.d_output])
        }
    }
}
