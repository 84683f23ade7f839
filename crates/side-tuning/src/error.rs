//! The crate's one error type.

use kiln_quant_core::shortened;
use std::path::{Path, PathBuf};

/// What can go wrong when side networks are described, made, trained, read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file that is not what its name or header says, or that belongs to another base.
    #[error("{}: {}: expected {}, found {}", path.display(), shortened(field), shortened(expected), shortened(found))]
    File {
        /// The file.
        path: PathBuf,
        /// The tensor, key or header field.
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
    /// An option out of range, or one that doesn't fit the backbone.
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
    Models(#[from] kiln_models::Error),
    /// Another error of the packed weights.
    #[error(transparent)]
    Quant(kiln_quant_core::Error),
}

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An [`Error::Io`] for `path`.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    pub(crate) fn argument(name: &str, expected: impl Into<String>, found: impl ToString) -> Self {
        Self::Argument { name: name.into(), expected: expected.into(), found: found.to_string() }
    }

    pub(crate) fn file(path: &Path, field: &str, expected: impl Into<String>, found: impl ToString) -> Self {
        let (path, field) = (path.to_path_buf(), field.into());
        Self::File { path, field, expected: expected.into(), found: found.to_string() }
    }
}

/// An error about a file stays one, whichever crate opened the file.
impl From<kiln_quant_core::Error> for Error {
    fn from(error: kiln_quant_core::Error) -> Self {
        match error {
            kiln_quant_core::Error::File { path, field, expected, found } => {
                Self::File { path, field, expected, found }
            }
            kiln_quant_core::Error::Io { path, source } => Self::Io { path, source },
            other => Self::Quant(other),
        }
    }
}
