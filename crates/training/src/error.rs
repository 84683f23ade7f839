//! The crate's one error type.

use kiln_quant_core::shortened;
use std::fmt::Display;
use std::path::{Path, PathBuf};

/// What can go wrong when data is read, or when a model is trained, saved or resumed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file that is not what its name or header says, or that doesn't fit the run.
    #[error("{}: {}: expected {}, found {}", path.display(), shortened(field), shortened(expected), shortened(found))]
    File {
        /// The file.
        path: PathBuf,
        /// The tensor, key or part of the file.
        field: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// A row of a data file that can't be used.
    #[error("{}, line {line}: {}: expected {}, found {}", path.display(), shortened(field), shortened(expected), shortened(found))]
    Data {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The key of the row.
        field: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// The operating system's refusal.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's error.
        #[source]
        source: std::io::Error,
    },
    /// An option out of range, or one that doesn't fit the others.
    #[error("{}: expected {}, found {}", shortened(name), shortened(expected), shortened(found))]
    Argument {
        /// The option.
        name: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// An error of the model.
    #[error(transparent)]
    Model(#[from] kiln_models::Error),
    /// An error between ranks.
    #[error(transparent)]
    Ranks(#[from] kiln_distributed::Error),
    /// An error of the observer's own: of its score.
    #[error(transparent)]
    Observer(Box<dyn std::error::Error + Send + Sync>),
    /// Training that can't go on because a number is no longer finite.
    #[error("step {step}: {quantity} is {value}{}", last(checkpoint))]
    Diverged {
        /// The step, counted from 0.
        step: u64,
        /// What is not finite: `the loss`, `the gradient's norm`, or a parameter that was to be saved.
        quantity: String,
        /// Its value.
        value: f64,
        /// The last checkpoint of the run, which is good.
        checkpoint: Option<PathBuf>,
    },
}

fn last(checkpoint: &Option<PathBuf>) -> String {
    match checkpoint {
        Some(path) => format!("; the last checkpoint is {}", path.display()),
        None => "; there is no checkpoint yet".into(),
    }
}

impl From<kiln_quant_core::Error> for Error {
    fn from(error: kiln_quant_core::Error) -> Self {
        match error {
            kiln_quant_core::Error::Io { path, source } => Self::Io { path, source },
            kiln_quant_core::Error::File { path, field, expected, found } => {
                Self::File { path, field, expected, found }
            }
            other => Self::Model(other.into()),
        }
    }
}

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An [`Error::Io`] for `path`.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}

/// Something that isn't what it should be, before it is known whether a file, a line or an option holds it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Problem {
    field: String,
    expected: String,
    found: String,
}

impl Problem {
    pub(crate) fn new(field: impl Into<String>, expected: impl Into<String>, found: impl Display) -> Self {
        Self { field: field.into(), expected: expected.into(), found: found.to_string() }
    }

    pub(crate) fn in_file(self, path: &Path) -> Error {
        Error::File { path: path.into(), field: self.field, expected: self.expected, found: self.found }
    }

    pub(crate) fn in_line(self, path: &Path, line: usize) -> Error {
        let Self { field, expected, found } = self;
        Error::Data { path: path.into(), line, field, expected, found }
    }

    pub(crate) fn argument(self) -> Error {
        Error::Argument { name: self.field, expected: self.expected, found: self.found }
    }
}
