//! The crate's one error type.

use std::time::Duration;

/// What can go wrong between ranks.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A rank that ended, or didn't answer in time.
    #[error("rank {rank} of {size}: {} after {:.1} s", who(*lost), waited.as_secs_f64())]
    Lost {
        /// The rank that noticed.
        rank: usize,
        /// The number of ranks.
        size: usize,
        /// The rank that is gone, where that is known.
        lost: Option<usize>,
        /// How long it was waited for.
        waited: Duration,
    },
    /// A rank that met an error of its own, and said so.
    #[error("rank {rank} failed: {message}")]
    Failed {
        /// The rank.
        rank: usize,
        /// Its error.
        message: String,
    },
    /// A rank that isn't like rank 0.
    #[error("rank {rank}: {name}: expected {expected}, as rank 0 has, found {found}")]
    Different {
        /// The rank.
        rank: usize,
        /// What differs.
        name: String,
        /// What rank 0 has.
        expected: String,
        /// What the rank has.
        found: String,
    },
    /// An argument out of range.
    #[error("{name}: expected {expected}, found {found}")]
    Argument {
        /// The argument.
        name: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// An engine that can't be started.
    #[error("{engine}: {message}")]
    Start {
        /// The engine.
        engine: &'static str,
        /// Why not.
        message: String,
    },
}

fn who(lost: Option<usize>) -> String {
    match lost {
        Some(rank) => format!("rank {rank} has ended, noticed"),
        None => "a rank didn't answer".to_owned(),
    }
}

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
