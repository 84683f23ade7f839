//! Integration tests, one binary.

mod adapters;
mod peft_folders;
