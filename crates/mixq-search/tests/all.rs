//! One test binary.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "what tests print is shown when they fail, or on request"
)]
#![allow(missing_docs)]

mod common;
mod methods;
mod resume;
mod vectors;
