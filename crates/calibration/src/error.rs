//! The crate's one error type.

use kiln_quant_core::shortened;
use std::path::PathBuf;

/// What can go wrong while a model is calibrated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file of an interrupted run that is not what its name says, or that belongs to another run.
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
    /// The operating system's refusal.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's error.
        #[source]
        source: std::io::Error,
    },
    /// An option out of range, or one that doesn't fit the model or the text.
    #[error("{}: expected {}, found {}", shortened(name), shortened(expected), shortened(found))]
    Argument {
        /// The option.
        name: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// Activations, weights or statistics that hold NaN or infinity.
    #[error("{place}: {quantity} not finite")]
    NotFinite {
        /// The projection, or the block where no projection is to blame.
        place: String,
        /// What is not finite, and in which calibration window.
        quantity: String,
    },
    /// A Hessian that stays singular at the strongest damping allowed.
    #[error(
        "{projection}: the Hessian is not positive definite, even with damping {damping} of its mean diagonal"
    )]
    Singular {
        /// The projection.
        projection: String,
        /// The last damping tried.
        damping: f64,
    },
    /// Optimisation that can't go on because the loss is no longer finite.
    #[error("{place}, epoch {epoch}, window {window}: the loss is {loss}")]
    Diverged {
        /// The block or projection.
        place: String,
        /// The epoch, counted from 0.
        epoch: usize,
        /// The calibration window, counted from 0.
        window: usize,
        /// The loss.
        loss: f64,
    },
    /// The observer ended the run.
    #[error("calibration cancelled after {blocks} of {total} blocks")]
    Cancelled {
        /// Blocks that were finished, and saved where a folder was given.
        blocks: usize,
        /// Blocks of the model.
        total: usize,
    },
    /// An error of the model.
    #[error(transparent)]
    Model(#[from] kiln_models::Error),
    /// An error of the adapters.
    #[error(transparent)]
    Adapter(#[from] kiln_adapters::Error),
    /// An error of another rank, or of what ranks say to one another.
    #[error(transparent)]
    Ranks(#[from] kiln_distributed::Error),
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

    pub(crate) fn argument(
        name: impl Into<String>,
        expected: impl Into<String>,
        found: impl ToString,
    ) -> Self {
        Self::Argument { name: name.into(), expected: expected.into(), found: found.to_string() }
    }
}
