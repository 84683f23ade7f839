//! One test binary.

mod interrupted;
mod methods;
mod refused;
mod scaling;
mod setup;
#[cfg(all(feature = "flex", feature = "wgpu"))]
mod wgpu;
