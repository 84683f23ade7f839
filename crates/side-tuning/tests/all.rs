//! One test binary.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "what tests print is shown when they fail, or on request"
)]

mod classifier;
mod common;
mod counts;
mod files;
mod hidden_cache;
mod memory;
mod starts;
mod tiny;
mod training;
