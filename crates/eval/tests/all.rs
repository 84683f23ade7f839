//! Integration tests, one binary.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "what tests print is shown when they fail, or on request"
)]

mod harness;
mod perplexity;
mod tasks;
