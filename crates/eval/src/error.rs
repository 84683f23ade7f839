//! The crate's one error type.

use kiln_quant_core::shortened;
use std::path::PathBuf;

/// What can go wrong while a model is evaluated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An option out of its range.
    #[error("option {option}: expected {expected}, found {found}")]
    Option {
        /// Type and field, e.g. `WindowedPerplexity.window`.
        option: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// Data that can't be scored.
    #[error("data: {what}: expected {expected}, found {found}")]
    Data {
        /// The token, document or quantity.
        what: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// A task's description that contradicts itself, or that asks for what there isn't.
    #[error("task {task}: {field}: expected {expected}, found {found}")]
    Task {
        /// The task.
        task: String,
        /// The field of the description.
        field: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// A document that a task can't use.
    #[error("task {task}, {split} document {document}: {field}: expected {expected}, found {found}")]
    Document {
        /// The task.
        task: String,
        /// `evaluated` or `few-shot`.
        split: &'static str,
        /// Its place in the split, from 0.
        document: usize,
        /// The document's field, or the part of the task's description that asks for it.
        field: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// A request that a model can't answer; [`evaluate`](crate::Evaluation::evaluate) turns it into
    /// [`Document`](Self::Document).
    #[error("request {request}: {what}: expected {expected}, found {found}")]
    Request {
        /// The request, counted from 0.
        request: usize,
        /// The part of it.
        what: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// An error between ranks.
    #[error(transparent)]
    Ranks(#[from] kiln_distributed::Error),
    /// A file that isn't what it should be.
    #[error("{}: {}: expected {}, found {}", path.display(), shortened(field), shortened(expected), shortened(found))]
    File {
        /// The file.
        path: PathBuf,
        /// The line or field.
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
    /// A model whose logits are not numbers: weights or activations overflow.
    #[error("window {window}: a negative log-likelihood of {nll}, which is not finite")]
    NotFinite {
        /// The window, counted from 0.
        window: usize,
        /// The offending value.
        nll: f32,
    },
    /// The progress callback ended the evaluation.
    #[error("cancelled after {windows} of {total} windows")]
    Cancelled {
        /// Windows scored.
        windows: usize,
        /// Windows in all.
        total: usize,
    },
    /// The progress callback ended the evaluation of tasks.
    #[error("interrupted after {documents} of {total} documents")]
    Interrupted {
        /// Documents scored.
        documents: usize,
        /// Documents in all.
        total: usize,
    },
    /// An error of the model.
    #[error(transparent)]
    Model(#[from] kiln_models::Error),
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn option(option: &str, expected: impl Into<String>, found: impl ToString) -> Self {
        Self::Option { option: option.into(), expected: expected.into(), found: found.to_string() }
    }

    pub(crate) fn data(what: impl Into<String>, expected: impl Into<String>, found: impl ToString) -> Self {
        Self::Data { what: what.into(), expected: expected.into(), found: found.to_string() }
    }

    pub(crate) fn task(task: &str, field: &str, expected: impl Into<String>, found: impl ToString) -> Self {
        let (task, field) = (task.into(), field.into());
        Self::Task { task, field, expected: expected.into(), found: found.to_string() }
    }

    pub(crate) fn request(
        request: usize,
        what: &str,
        expected: impl Into<String>,
        found: impl ToString,
    ) -> Self {
        Self::Request { request, what: what.into(), expected: expected.into(), found: found.to_string() }
    }

    pub(crate) fn file(
        path: impl Into<PathBuf>,
        field: impl Into<String>,
        expected: impl Into<String>,
        found: impl ToString,
    ) -> Self {
        let (path, field) = (path.into(), field.into());
        Self::File { path, field, expected: expected.into(), found: found.to_string() }
    }

    /// An [`Error::Io`] for `path`.
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}

/// What is wrong with a field, before anyone knows whose field it is.
#[derive(Debug)]
pub(crate) struct Problem {
    pub field: String,
    pub expected: String,
    pub found: String,
}

impl Problem {
    pub(crate) fn new(field: impl Into<String>, expected: impl Into<String>, found: impl ToString) -> Self {
        Self { field: field.into(), expected: expected.into(), found: found.to_string() }
    }

    /// The error of a document of `task`.
    pub(crate) fn of_document(self, task: &str, split: &'static str, document: usize) -> Error {
        let Self { field, expected, found } = self;
        Error::Document { task: task.into(), split, document, field, expected, found }
    }
}
