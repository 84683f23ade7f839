//! Integration tests, one binary.

mod ops;
