//! Between device tensors and host memory.

use burn::tensor::{DType, Device, Tensor, TensorData};

/// A tensor's values in host memory; its buffer itself where the device is the CPU and nobody else holds it.
pub(crate) fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    let data = tensor.into_data();
    let data = if data.dtype() == DType::F32 { data } else { data.convert::<f32>() };
    data.try_into_vec().expect("a tensor of this process holds what it says")
}

/// Values as an f32 tensor outside autodiff.
pub(crate) fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
}

/// FNV-1a, to tell runs apart and to find damage.
pub(crate) struct Fingerprint(u64);

impl Fingerprint {
    pub(crate) fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    pub(crate) fn bytes(&mut self, bytes: impl IntoIterator<Item = u8>) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    pub(crate) fn values(&mut self, values: &[f32]) {
        self.bytes(values.iter().flat_map(|value| value.to_le_bytes()));
    }

    /// As it is stored.
    pub(crate) fn text(&self) -> String {
        format!("{:016x}", self.0)
    }

    pub(crate) fn value(&self) -> u64 {
        self.0
    }
}
