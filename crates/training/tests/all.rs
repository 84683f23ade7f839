//! Integration tests, one binary.

mod checkpoints;
mod losses;
mod options;
mod peft_golden;
mod trainer;
mod watching;
