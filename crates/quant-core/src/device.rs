//! What a device is and can hold.

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
};

use burn::tensor::{Device, Tensor};

use crate::{Compute, Error, Result};

/// What a device is and can hold.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceLimits {
    /// Its name and its runtime's.
    pub name: String,
    /// Bytes of the largest tensor; `None` where only memory limits it.
    pub largest_tensor: Option<u64>,
    /// Operands that it multiplies natively.
    pub operands: Vec<Compute>,
}

impl DeviceLimits {
    /// Fails for a device that isn't there.
    ///
    /// # Errors
    /// [`Error::Option`] naming it.
    pub fn check_there(device: &Device) -> Result<()> {
        // What such a device does is to panic.
        let made = || Tensor::<1>::zeros([1], device).into_data();
        match catch_unwind(AssertUnwindSafe(made)) {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::Option {
                option: "device".into(),
                expected: "one that is there".into(),
                found: format!("{device:?}"),
            }),
        }
    }

    /// Whether what `device` computes lies in the host's memory: not on a GPU, where a way to the host is a wait and two
    /// ways over a bus.
    pub fn in_host_memory(device: &Device) -> bool {
        match device.clone().without_autodiff().as_dispatch() {
            #[cfg(feature = "cube")]
            burn::backend::DispatchDevice::Cube(_) => false,
            _ => true,
        }
    }

    /// The limits of `device`.
    pub fn of(device: &Device) -> Self {
        let operands = Compute::ALL.into_iter().filter(|compute| compute.is_native(device)).collect();
        let (name, largest_tensor) = match device.clone().without_autodiff().as_dispatch() {
            #[cfg(feature = "cube")]
            burn::backend::DispatchDevice::Cube(device) => crate::ops::cube::name_and_page(device),
            other => (format!("{other:?}"), None),
        };
        Self { name, largest_tensor, operands }
    }
}

impl fmt::Display for DeviceLimits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.name)?;
        if let Some(bytes) = self.largest_tensor {
            write!(f, ", tensors of at most {:.2} GB", bytes as f64 / 1e9)?;
        }
        let operands: Vec<String> = self.operands.iter().map(Compute::to_string).collect();
        write!(f, ", multiplies {}", operands.join(", "))
    }
}
