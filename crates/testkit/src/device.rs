//! Devices that may be missing.

use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::tensor::Device;

use crate::files::required;

/// A Vulkan device, and the right to use it alone: software Vulkan is slow enough for one test at a time.
#[derive(Debug)]
pub struct Vulkan {
    /// The device.
    pub device: Device,
    _turn: MutexGuard<'static, ()>,
}

/// WGPU on Vulkan; `None`, said on the terminal, where there is no adapter or the feature `wgpu` is off.
///
/// # Panics
/// If there is none although `KILN_REQUIRE_VULKAN=1`.
pub fn vulkan() -> Option<Vulkan> {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    match open() {
        Ok(device) => Some(Vulkan { device, _turn: turn }),
        Err(reason) => {
            assert!(!required("KILN_REQUIRE_VULKAN"), "KILN_REQUIRE_VULKAN=1, but {reason}");
            crate::skipped(&reason);
            None
        }
    }
}

#[cfg(feature = "wgpu")]
fn open() -> Result<Device, String> {
    use std::sync::OnceLock;

    use burn::tensor::wgpu::WgpuBackend;

    static DEVICE: OnceLock<Result<Device, String>> = OnceLock::new();
    // Pinned to Vulkan: OpenGL may be there too, without all that the kernels need.
    let open =
        || Device::wgpu_options().graphics_api(WgpuBackend::Vulkan).init().map_err(|error| error.to_string());
    DEVICE.get_or_init(open).clone()
}

#[cfg(not(feature = "wgpu"))]
fn open() -> Result<Device, String> {
    Err("the tests were built without the feature wgpu".into())
}

/// What `f` gives, and how many kernels it launched on GPUs; none without the feature `wgpu`.
pub fn launches<T>(f: impl FnOnce() -> T) -> (T, usize) {
    #[cfg(feature = "wgpu")]
    {
        use std::sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        };

        use cubecl::logging::{LaunchObservation, LaunchObserver};

        #[derive(Default)]
        struct Counter(AtomicUsize);
        impl LaunchObserver for Counter {
            fn launched(&self, _: &'static str) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        let counter = Arc::new(Counter::default());
        let watching = LaunchObservation::new(counter.clone());
        let result = f();
        drop(watching);
        (result, counter.0.load(Ordering::Relaxed))
    }
    #[cfg(not(feature = "wgpu"))]
    (f(), 0)
}
