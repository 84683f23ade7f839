//! The crate's one error type.

use std::{io, path::PathBuf};

/// What can go wrong when a space is described, searched or logged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A space that can't be searched: nothing to choose, or contradictory units.
    #[error("search space: {field}: expected {expected}, found {found}")]
    Space {
        /// The unit or field.
        field: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// A setting string that the parser doesn't accept.
    #[error("setting \"{text}\": {reason}")]
    Setting {
        /// The string as given.
        text: String,
        /// What was expected and what was found.
        reason: String,
    },
    /// A plan or configuration that is not of the space.
    #[error("plan: {path}: expected {expected}, found {found}")]
    Plan {
        /// The path or unit.
        path: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// A memory limit that no plan meets.
    #[error("no plan fits into {limit} bytes; the smallest possible plan takes {smallest} bytes")]
    Limit {
        /// The limit in bytes.
        limit: u64,
        /// Bytes of the smallest plan.
        smallest: u64,
    },
    /// A memory limit that plans meet, but none that was measured.
    #[error(
        "no measured plan fits into {limit} bytes ({}); the smallest possible plan takes {smallest} bytes",
        measured.map_or("no plan was measured".into(), |bytes| format!("the smallest measured takes {bytes}"))
    )]
    NotMeasured {
        /// The limit in bytes.
        limit: u64,
        /// Bytes of the smallest measured plan, if there is one.
        measured: Option<u64>,
        /// Bytes of the smallest plan.
        smallest: u64,
    },
    /// An option out of its range.
    #[error("option {option}: expected {expected}, found {found}")]
    Option {
        /// Type and field, e.g. `KlMix.budgets`.
        option: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// A trial log that is not this search's.
    #[error("{}: {field}: expected {expected}, found {found}", path.display())]
    Log {
        /// The file.
        path: PathBuf,
        /// The field.
        field: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// An objective that couldn't measure a plan.
    #[error("evaluating plan {plan}: {source}")]
    Objective {
        /// The configuration's indices.
        plan: String,
        /// The objective's own error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A plot that couldn't be drawn.
    #[error("plot: {0}")]
    Plot(String),
    /// A file operation that failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    pub(crate) fn option(option: &str, expected: &str, found: impl ToString) -> Self {
        Self::Option { option: option.into(), expected: expected.into(), found: found.to_string() }
    }

    pub(crate) fn space(field: impl Into<String>, expected: &str, found: impl ToString) -> Self {
        Self::Space { field: field.into(), expected: expected.into(), found: found.to_string() }
    }
}

/// [`std::result::Result`] with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
