//! The module's one error type.

/// What can go wrong when a model is searched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An option, plan or text that doesn't fit the model.
    #[error("{name}: expected {expected}, found {found}")]
    Argument {
        /// The option, path or text.
        name: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// Of the search.
    #[error(transparent)]
    Search(#[from] kiln_mixq_search::Error),
    /// Of a scheme or a weight.
    #[error(transparent)]
    Quant(#[from] kiln_quant_core::Error),
    /// Of the model.
    #[error(transparent)]
    Model(#[from] kiln_models::Error),
    /// Of adapters.
    #[error(transparent)]
    Adapter(#[from] kiln_adapters::Error),
    /// Of the adapters' calibrated start.
    #[error(transparent)]
    Calibration(#[from] kiln_calibration::Error),
    /// Of the fine-tune.
    #[error(transparent)]
    Training(#[from] kiln_training::Error),
    /// Of the held-out score.
    #[error(transparent)]
    Eval(#[from] kiln_eval::Error),
    /// Of the fingerprint or the training-memory model.
    #[error(transparent)]
    SideTuning(#[from] kiln_side_tuning::Error),
}

/// `Result` with this module's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn argument(
        name: impl Into<String>,
        expected: impl Into<String>,
        found: impl std::fmt::Display,
    ) -> Self {
        Self::Argument { name: name.into(), expected: expected.into(), found: found.to_string() }
    }
}
