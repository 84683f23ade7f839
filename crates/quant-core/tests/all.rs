//! Integration tests, one binary.

mod fused;
mod ops;
mod wgpu;
