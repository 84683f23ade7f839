#![doc = include_str!("../README.md")]

mod communicator;
mod error;
#[cfg(any(feature = "mpi", feature = "nccl"))]
mod link;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "nccl")]
mod nccl;
mod pairwise;
mod shares;
mod threads;

#[cfg(feature = "mpi")]
pub use crate::mpi::Mpi;
pub use communicator::{Alone, Communicator, agreed, gathered, share};
pub use error::{Error, Result};
#[cfg(feature = "nccl")]
pub use nccl::Nccl;
pub use pairwise::{Number, PairwiseSum, added, sum};
pub use shares::{Shares, Sharing};
pub use threads::{Thread, threads};
