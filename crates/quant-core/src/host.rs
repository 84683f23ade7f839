//! From a device to host memory.

use burn::tensor::{Element, Int, Tensor};

use crate::{Error, Result};

/// A tensor's values in f32, row-major; its buffer itself where the device is the CPU and nobody else holds it.
///
/// `name` is for errors.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// let tensor = Tensor::<2>::from_floats([[1.0, 2.0], [3.0, 4.0]], &Device::flex());
/// assert_eq!(kiln_quant_core::to_host("w", tensor.transpose())?, [1.0, 3.0, 2.0, 4.0]);
/// # Ok::<(), kiln_quant_core::Error>(())
/// ```
///
/// # Errors
/// [`Error::Tensor`] if the device can't be read.
pub fn to_host<const D: usize>(name: &str, tensor: Tensor<D>) -> Result<Vec<f32>> {
    tensor.try_into_vec_as().map_err(|error| unreadable::<f32>(name, error))
}

/// Values of vectors one after the other, with one wait for each device where those of a device stand together.
///
/// `name` is for errors.
///
/// # Errors
/// As [`to_host`].
pub fn to_host_together(name: &str, vectors: Vec<Tensor<1>>) -> Result<Vec<f32>> {
    let mut values = Vec::new();
    for of_device in vectors.chunk_by(|a, b| a.device() == b.device()) {
        values.extend(to_host(name, Tensor::cat(of_device.to_vec(), 0))?);
    }
    Ok(values)
}

/// As [`to_host`], of whole numbers.
///
/// # Errors
/// [`Error::Tensor`] if the device can't be read.
pub fn ints_to_host<const D: usize>(name: &str, tensor: Tensor<D, Int>) -> Result<Vec<i64>> {
    tensor.try_into_vec_as().map_err(|error| unreadable::<i64>(name, error))
}

pub(crate) fn unreadable<E: Element>(name: &str, error: impl std::fmt::Display) -> Error {
    Error::Tensor {
        name: name.into(),
        expected: format!("values that can be read from the device as {:?}", E::dtype()),
        found: error.to_string(),
    }
}
