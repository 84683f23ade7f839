//! The crate's one error type.

use kiln_quant_core::shortened;
use std::path::PathBuf;

/// What can go wrong while a model, its files, its tokenizer or its templates are read, written or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file that is not what its name or header says, or that doesn't fit the rest of the checkpoint.
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
    /// Something well-formed that Kiln doesn't implement.
    #[error("{}: {field}: {found} is not supported; supported: {supported}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The key or tensor.
        field: String,
        /// Its value.
        found: String,
        /// What would be understood.
        supported: String,
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
    /// Something that a file format can't hold.
    #[error("{format}: {name}: expected {expected}, found {found}")]
    Export {
        /// The format.
        format: &'static str,
        /// The tensor or setting.
        name: String,
        /// What the format holds.
        expected: String,
        /// What was to be written.
        found: String,
    },
    /// The tokenizer's refusal.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A chat template that doesn't compile, or that refuses the conversation.
    #[error("chat template: {0}")]
    Template(String),
    /// An argument out of range.
    #[error("{}: expected {}, found {}", shortened(name), shortened(expected), shortened(found))]
    Argument {
        /// The argument.
        name: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// An error of the packed weights.
    #[error(transparent)]
    Quant(#[from] kiln_quant_core::Error),
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
