//! Integration tests, one binary.

#[cfg(target_os = "linux")]
mod memory;
