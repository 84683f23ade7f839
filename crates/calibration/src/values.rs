//! Host values as tensors, and numbers of them.

use burn::tensor::{DType, Device, Tensor, TensorData};

/// Values as an f32 tensor outside autodiff.
pub(crate) fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
}

pub(crate) fn finite(values: &[f32]) -> bool {
    values.iter().all(|value| value.is_finite())
}

pub(crate) fn squares(values: impl Iterator<Item = f32>) -> f64 {
    values.map(|value| f64::from(value) * f64::from(value)).sum()
}

/// `sqrt(error / norm)`, 0 where there is no error; always a number, so that it can be stored and read back.
pub(crate) fn ratio(error: f64, norm: f64) -> f64 {
    if error == 0.0 { 0.0 } else { (error / norm).sqrt().min(f64::MAX) }
}
