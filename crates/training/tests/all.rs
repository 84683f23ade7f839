//! Integration tests, one binary.

mod checkpoints;
mod peft_golden;
mod trainer;
