//! Integration tests, one binary.

mod driver;
mod export;
mod exporters;
mod forms;
mod gemma3;
mod generate;
mod golden;
mod kquants;
mod lying;
mod nll;
mod smollm2;
mod wrappers;
