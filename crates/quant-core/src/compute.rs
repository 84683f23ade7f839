//! What products round their operands to.

use std::{fmt, str::FromStr};

use burn::tensor::{DType, Device};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// What the operands of matrix products are rounded to; sums, results and everything between products stay f32.
///
/// 16-bit operands run on the matrix units of GPUs, at several times the rate of f32, and bf16 on processors with AVX512-BF16,
/// at up to twice. Held by each layer, never global.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    /// Not rounded. On CUDA's matrix units that is TF32, with 11 bits of precision.
    #[default]
    F32,
    /// The range of f32 with 8 bits of precision. On CPUs values below 1e-38 count as zero.
    Bf16,
    /// 11 bits of precision, on GPUs; values beyond 65504 overflow, which activations of some models reach.
    F16,
}

impl Compute {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::F16];

    /// The operands that values of a type are without rounding.
    pub(crate) fn of(dtype: DType) -> Self {
        match dtype {
            DType::BF16 => Self::Bf16,
            DType::F16 => Self::F16,
            _ => Self::F32,
        }
    }

    /// The fastest that loses little on `device`: bf16 where it multiplies bf16 natively, else f32.
    pub fn best(device: &Device) -> Self {
        if Self::Bf16.is_native(device) { Self::Bf16 } else { Self::F32 }
    }

    /// Whether `device` has units that multiply such operands.
    pub fn is_native(self, device: &Device) -> bool {
        if self == Self::F32 {
            return true;
        }
        #[allow(unreachable_patterns)] // where no other backend is compiled in
        match device.clone().without_autodiff().as_dispatch() {
            #[cfg(feature = "cube")]
            burn::backend::DispatchDevice::Cube(device) => crate::ops::cube::multiplies(device, self),
            #[cfg(feature = "flex")]
            burn::backend::DispatchDevice::Flex(_) => crate::ops::flex::multiplies(self),
            _ => false,
        }
    }

    /// Whether graphs on `device` keep operands of such products [rounded](crate::fused::operand).
    pub fn keeps_rounded(self, device: &Device) -> bool {
        #[cfg(feature = "flex")]
        if matches!(device.clone().without_autodiff().as_dispatch(), burn::backend::DispatchDevice::Flex(_)) {
            return crate::ops::flex::rounds(self);
        }
        let _ = device;
        false
    }

    /// `self`, if `device` multiplies such operands.
    ///
    /// # Errors
    /// [`Error::Compute`] naming what the device multiplies.
    pub fn check(self, device: &Device) -> Result<Self> {
        if self.is_native(device) {
            return Ok(self);
        }
        let native = Self::ALL.into_iter().filter(|compute| compute.is_native(device)).collect();
        Err(Error::Compute { asked: self, device: format!("{device:?}"), native })
    }
}

impl fmt::Display for Compute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        })
    }
}

impl FromStr for Compute {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let found = Self::ALL.into_iter().find(|compute| compute.to_string() == text);
        found.ok_or_else(|| format!("expected f32, bf16 or f16, found {text:?}"))
    }
}
