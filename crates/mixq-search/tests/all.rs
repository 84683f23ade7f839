//! One test binary.
#![allow(missing_docs)]

mod common;
mod methods;
mod resume;
mod vectors;
