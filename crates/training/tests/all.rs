//! Integration tests, one binary.

mod checkpoints;
mod losses;
mod options;
mod peft_golden;
mod ranks;
mod trainer;
mod watching;
