//! The crate's one error type.

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
    /// An error of the model.
    #[error(transparent)]
    Model(#[from] kiln_models::Error),
}

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn option(option: &str, expected: impl Into<String>, found: impl ToString) -> Self {
        Self::Option { option: option.into(), expected: expected.into(), found: found.to_string() }
    }

    pub(crate) fn data(what: impl Into<String>, expected: impl Into<String>, found: impl ToString) -> Self {
        Self::Data { what: what.into(), expected: expected.into(), found: found.to_string() }
    }
}
