//! Integration tests, one binary.

mod batteries;
mod fused;
mod ops;
mod wgpu;
