//! Integration tests, one binary.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "what tests print is shown when they fail, or on request"
)]

mod adapters;
mod architectures;
mod classifiers;
mod families;
mod gradients;
#[cfg(target_os = "linux")]
mod memory;
#[cfg(all(feature = "mixq-search", feature = "pruning"))]
mod mixq;
mod placement;
mod ranks;
mod recipe;
mod tables;
mod tuning;
mod wgpu;
