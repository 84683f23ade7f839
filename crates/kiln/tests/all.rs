//! Integration tests, one binary.

#[cfg(target_os = "linux")]
mod memory;
#[cfg(all(feature = "flex", feature = "wgpu"))]
mod wgpu;
