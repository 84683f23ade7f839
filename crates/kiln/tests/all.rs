//! Integration tests, one binary.

mod adapters;
#[cfg(target_os = "linux")]
mod memory;
#[cfg(all(feature = "flex", feature = "wgpu"))]
mod wgpu;
