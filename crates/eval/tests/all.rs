//! Integration tests, one binary.

mod perplexity;
