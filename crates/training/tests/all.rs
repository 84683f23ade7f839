//! Integration tests, one binary.

mod trainer;
