//! Integration tests, one binary.

mod fused;
mod ops;
#[cfg(feature = "wgpu")]
mod wgpu;
