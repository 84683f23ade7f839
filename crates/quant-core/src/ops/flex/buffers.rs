//! Tensors' memory.

use half::{bf16, f16, slice::HalfFloatSliceExt};

use burn::{
    backend::{
        flex::{Flex, FlexTensor},
        ops::FloatTensorOps,
    },
    tensor::{DType, FloatDType, Shape, TensorData},
};

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
