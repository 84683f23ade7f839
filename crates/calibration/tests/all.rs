//! One test binary.

mod interrupted;
mod methods;
mod ranks;
mod refused;
mod scaling;
mod setup;
mod wgpu;
