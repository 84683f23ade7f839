#![doc = include_str!("../README.md")]

mod communicator;
mod error;
#[cfg(feature = "mpi")]
mod mpi;
mod pairwise;
mod threads;

#[cfg(feature = "mpi")]
pub use crate::mpi::Mpi;
pub use communicator::{Alone, Communicator, agreed, gathered, share};
pub use error::{Error, Result};
pub use pairwise::{PairwiseSum, sum};
pub use threads::{Thread, threads};
