//! One test binary.

mod classifier;
mod common;
mod counts;
mod files;
mod hidden_cache;
mod memory;
mod tiny;
mod training;
