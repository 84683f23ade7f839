//! One test binary.

mod interrupted;
mod methods;
mod refused;
mod scaling;
mod setup;
mod wgpu;
