//! Devices by the names that the programs' `--device` takes.

use std::{fmt, panic, str::FromStr};

use burn::tensor::{Device, DeviceType};

use crate::Result;

/// A device by its name: `flex`, `wgpu`, `vulkan`, `metal`, `cuda`, `rocm` or `cpu`, of several one by its number, as
/// `cuda:1`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceName {
    kind: String,
    index: usize,
}

/// All names, and the features that the programs are built with for each.
const NAMES: [&str; 7] = ["flex", "wgpu", "vulkan", "metal", "cuda", "rocm", "cpu"];

impl DeviceName {
    /// The CPU.
    pub fn flex() -> Self {
        Self { kind: "flex".into(), index: 0 }
    }

    /// The name's type of device, if it is compiled in.
    fn device_type(&self) -> Option<DeviceType> {
        match self.kind.as_str() {
            #[cfg(feature = "flex")]
            "flex" => Some(DeviceType::Flex),
            #[cfg(feature = "wgpu")]
            "wgpu" => Some(DeviceType::Wgpu),
            #[cfg(feature = "vulkan")]
            "vulkan" => Some(DeviceType::Vulkan),
            #[cfg(feature = "metal")]
            "metal" => Some(DeviceType::Metal),
            #[cfg(feature = "cuda")]
            "cuda" => Some(DeviceType::Cuda),
            #[cfg(feature = "rocm")]
            "rocm" => Some(DeviceType::Rocm),
            #[cfg(feature = "cpu")]
            "cpu" => Some(DeviceType::Cpu),
            _ => None,
        }
    }

    /// Opens the device.
    ///
    /// # Errors
    /// If the program was built without it, or the machine has none of that number.
    pub fn open(&self) -> Result<Device> {
        let kind = &self.kind;
        let wanted = self.device_type().ok_or_else(|| {
            format!(
                "this program was built without the device {kind}: add `--features {kind}` to the command"
            )
        })?;
        // A driver that is missing altogether makes Burn panic.
        let found = panic::catch_unwind(|| Device::enumerate(wanted).into_iter().collect::<Vec<_>>());
        let found = found.map_err(|_| format!("the driver of {kind} can't be loaded on this machine"))?;
        let count = found.len();
        let device = found.into_iter().nth(self.index);
        Ok(device.ok_or_else(|| format!("no device {self}: this machine has {count} of this kind"))?)
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.kind, self.index)
    }
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (kind, index) = text.split_once(':').unwrap_or((text, "0"));
        let index =
            index.parse().map_err(|_| format!("expected a number after the colon, found {index:?}"))?;
        if !NAMES.contains(&kind) {
            return Err(format!("expected one of {}, found {kind:?}", NAMES.join(", ")));
        }
        Ok(Self { kind: kind.into(), index })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_what_is_missing_is_said() {
        let device: DeviceName = "cuda:1".parse().unwrap();
        assert_eq!(device.to_string(), "cuda:1");
        assert!("gpu".parse::<DeviceName>().unwrap_err().contains("flex, wgpu, vulkan"));
        assert!("cuda:x".parse::<DeviceName>().is_err());
        assert!(DeviceName::flex().open().is_ok());
        let error = "flex:7".parse::<DeviceName>().unwrap().open().unwrap_err().to_string();
        assert!(error.contains("flex:7") && error.contains("1 of this kind"), "{error}");
        if cfg!(not(feature = "rocm")) {
            let error = "rocm".parse::<DeviceName>().unwrap().open().unwrap_err().to_string();
            assert!(error.contains("--features rocm"), "{error}");
        }
    }
}
