//! Integration tests, one binary.

mod driver;
mod golden;
