//! Integration tests, one binary.

mod adapter_folders;
mod adapter_sets;
mod adapters;
mod balanced_rank;
mod initialisations;
mod packed_merges;
mod peft_folders;
mod vectors;
