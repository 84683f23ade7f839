//! Integration tests, one binary.

mod driver;
mod generate;
mod golden;
mod nll;
mod smollm2;
