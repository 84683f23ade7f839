//! Integration tests, one binary.

mod harness;
mod perplexity;
mod tasks;
