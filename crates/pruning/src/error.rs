//! The crate's one error type.

use kiln_quant_core::shortened;
use std::path::PathBuf;

/// What can go wrong when a model is measured, cut, saved or loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An option out of its range, or one that the rest of the options contradicts.
    #[error("option {option}: expected {expected}, found {found}")]
    Option {
        /// Type and field, e.g. `BlockPruning.steps`.
        option: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// A ratio that leaves a group without a single head or channel.
    #[error("{group}: ratio {ratio} removes all {count} {units}; at least one must stay")]
    RemovesAll {
        /// The group's path, e.g. `model.layers.3.self_attn`.
        group: String,
        /// The ratio asked for.
        ratio: f64,
        /// How many there are.
        count: usize,
        /// What they are.
        units: String,
    },
    /// Nothing may be pruned.
    #[error("nothing to prune: {reason}")]
    NothingToPrune {
        /// Why.
        reason: String,
    },
    /// Calibration data that are too short, missing or malformed.
    #[error("calibration data: expected {expected}, found {found}")]
    Calibration {
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// An error of another rank, or of what ranks say to one another.
    #[error(transparent)]
    Ranks(#[from] kiln_distributed::Error),
    /// Indices or shapes that don't fit the model.
    #[error("{}: expected {}, found {}", shortened(name), shortened(expected), shortened(found))]
    Mismatch {
        /// The group, tensor or field.
        name: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// A file that is not what its name says, or that contradicts the rest of the checkpoint.
    #[error("{}: {}: expected {}, found {}", path.display(), shortened(field), shortened(expected), shortened(found))]
    File {
        /// The file.
        path: PathBuf,
        /// The key.
        field: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// An error of the model or its checkpoint.
    #[error(transparent)]
    Model(#[from] kiln_models::Error),
    /// An error of the packed weights or of a tensor file.
    #[error(transparent)]
    Quant(#[from] kiln_quant_core::Error),
}

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn option(option: &str, expected: impl Into<String>, found: impl ToString) -> Self {
        Self::Option { option: option.into(), expected: expected.into(), found: found.to_string() }
    }

    pub(crate) fn mismatch(
        name: impl Into<String>,
        expected: impl Into<String>,
        found: impl ToString,
    ) -> Self {
        Self::Mismatch { name: name.into(), expected: expected.into(), found: found.to_string() }
    }
}
