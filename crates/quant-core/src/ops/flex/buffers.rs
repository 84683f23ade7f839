//! Tensors' memory.

use std::{mem::MaybeUninit, ptr};

use burn::{
    backend::{
        flex::{Flex, FlexTensor, Layout},
        ops::FloatTensorOps,
    },
    tensor::{Bytes, DType, FloatDType, Shape, TensorData},
};
use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

use super::{Matrix, multiplies, simd::vectorize};
use crate::Compute;

/// Contiguous f32, whatever the strides and float type.
pub(crate) fn contiguous(tensor: FlexTensor) -> FlexTensor {
    let tensor = tensor.to_contiguous();
    // Scales are widened in every pass: by instructions where the processor has them.
    let values = match tensor.dtype() {
        DType::F32 => return tensor,
        DType::F16 => tensor.as_slice::<f16>().expect("contiguous").to_f32_vec(),
        DType::BF16 => tensor.as_slice::<bf16>().expect("contiguous").to_f32_vec(),
        _ => return Flex::float_cast(tensor, FloatDType::F32),
    };
    self::tensor(values, tensor.layout().shape().clone(), DType::F32)
}

/// The values of a tensor made by [`contiguous`].
pub(crate) fn floats(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice().expect("a contiguous f32 tensor")
}

/// The values of a contiguous bf16 tensor.
pub(crate) fn halves(tensor: &FlexTensor) -> &[bf16] {
    tensor.as_slice().expect("a contiguous bf16 tensor")
}

/// A tensor made by [`contiguous`] in bf16, to the nearest, of two equally near to the even one, as products round.
pub(crate) fn rounded(tensor: &FlexTensor) -> FlexTensor {
    let values = floats(tensor);
    let halves: Vec<u16> = written(values.len(), ROUNDED, |first, halves| {
        vectorize(|| halves.iter_mut().zip(&values[first..]).for_each(|(half, value)| *half = round(*value)));
    });
    half_tensor(halves, tensor.layout().shape().clone())
}

/// A bf16 tensor of such bits.
pub(crate) fn half_tensor(bits: Vec<u16>, shape: Shape) -> FlexTensor {
    FlexTensor::new(Bytes::from_elems(bits), Layout::contiguous(shape), DType::BF16)
}

/// Values of a task that rounds them.
const ROUNDED: usize = 1 << 14;

/// The bits of the nearest bf16, of values below the normal numbers those of zero, as products round; written without a
/// branch, for vectors.
#[inline(always)]
pub(crate) fn round(value: f32) -> u16 {
    let bits = value.to_bits();
    let nearest = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet_nan = (bits >> 16) | 0x40;
    let zero = (bits >> 16) & 0x8000;
    (if value.is_nan() {
        quiet_nan
    } else if value.abs() < f32::MIN_POSITIVE {
        zero
    } else {
        nearest
    }) as u16
}

/// Whether operands are rounded, and not only widened.
pub(crate) fn rounds(compute: Compute) -> bool {
    compute != Compute::F32 && multiplies(compute)
}

/// Whether a tensor of `dtype` is an operand that products by `compute` read as it is, and that counts as f32.
pub(crate) fn is_operand(dtype: DType, compute: Compute) -> bool {
    dtype == DType::BF16 && compute == Compute::Bf16 && multiplies(compute)
}

/// The type of what products by `compute` make of an operand.
pub(crate) fn result_type(operand: DType, compute: Compute) -> DType {
    if is_operand(operand, compute) { DType::F32 } else { operand }
}

/// A tensor whose memory a product reads: as it is where it can be, copied or widened where not.
pub(crate) fn operand(x: FlexTensor, compute: Compute) -> FlexTensor {
    let read = Matrix::of(&x).is_some() && (x.dtype() == DType::F32 || rounds(compute));
    if read { x } else { contiguous(x) }
}

/// `len` values of which `f` writes `step` at a time, in parallel: it is given the place of the first one, and zeros. A large
/// vector of zeros is else written by one thread, which takes as long as a small product.
pub(crate) fn written<T: Copy + Default + Send>(
    len: usize,
    step: usize,
    f: impl Fn(usize, &mut [T]) + Sync,
) -> Vec<T> {
    let mut values = Vec::with_capacity(len);
    let room: &mut [MaybeUninit<T>] = &mut values.spare_capacity_mut()[..len];
    room.par_chunks_mut(step).enumerate().for_each(|(index, part)| f(index * step, filled(part)));
    // SAFETY: the parts are all of the vector's first `len` places, each filled.
    unsafe { values.set_len(len) };
    values
}

/// [`written`] of two vectors at once.
pub(crate) fn both_written<T: Copy + Default + Send>(
    len: usize,
    step: usize,
    f: impl Fn(usize, [&mut [T]; 2]) + Sync,
) -> [Vec<T>; 2] {
    let mut both = [(); 2].map(|()| Vec::with_capacity(len));
    let [one, other] = both.each_mut().map(|values| &mut values.spare_capacity_mut()[..len]);
    let parts = one.par_chunks_mut(step).zip(other.par_chunks_mut(step)).enumerate();
    parts.for_each(|(index, (one, other))| f(index * step, [filled(one), filled(other)]));
    for values in &mut both {
        // SAFETY: as in `written`.
        unsafe { values.set_len(len) };
    }
    both
}

/// Zeros.
fn filled<T: Copy + Default>(part: &mut [MaybeUninit<T>]) -> &mut [T] {
    part.fill(MaybeUninit::new(T::default()));
    // SAFETY: all of it has just been filled; the types have the same layout.
    unsafe { &mut *(ptr::from_mut(part) as *mut [T]) }
}

/// The words of a contiguous integer tensor; U32 and I32 hold the same bits.
pub(crate) fn words(tensor: &FlexTensor) -> &[u32] {
    assert!(
        matches!(tensor.dtype(), DType::U32 | DType::I32),
        "codes and segments must be 32-bit integers, found {:?}",
        tensor.dtype()
    );
    bytemuck::cast_slice(tensor.bytes())
}

/// A tensor of `dtype` from f32 values.
pub(crate) fn tensor(values: Vec<f32>, shape: impl Into<Shape>, dtype: DType) -> FlexTensor {
    let tensor = FlexTensor::from_data(TensorData::new(values, shape.into()));
    if dtype == DType::F32 { tensor } else { Flex::float_cast(tensor, FloatDType::from(dtype)) }
}
