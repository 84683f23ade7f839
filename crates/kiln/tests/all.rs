//! Integration tests, one binary.

mod adapters;
mod families;
#[cfg(target_os = "linux")]
mod memory;
#[cfg(feature = "mixq-search")]
mod mixq;
mod recipe;
mod wgpu;
