//! Integration tests, one binary.

mod adapters;
#[cfg(target_os = "linux")]
mod memory;
#[cfg(feature = "mixq-search")]
mod mixq;
#[cfg(all(feature = "flex", feature = "wgpu"))]
mod wgpu;
