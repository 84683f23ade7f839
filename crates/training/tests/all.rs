//! Integration tests, one binary.

mod peft_golden;
mod trainer;
