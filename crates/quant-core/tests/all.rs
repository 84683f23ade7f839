//! Integration tests, one binary.

mod ops;
#[cfg(feature = "wgpu")]
mod wgpu;
