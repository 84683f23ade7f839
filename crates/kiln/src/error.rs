//! One error over those of all crates.

use std::{error::Error as StdError, fmt, io};

/// `Result` with [`Error`], which every function of this crate gives.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong. Its text is a sentence that names the file, option or tensor, what was expected and what was found;
/// [`source`](StdError::source) has the cause below it, where there is one.
///
/// Programs that want to react ask for the kind of error:
///
/// ```
/// let error = kiln::Base::open("no/such/folder").unwrap_err();
/// assert!(error.is_io() && !error.is_unsupported());
/// assert!(error.to_string().contains("no/such/folder"));
/// ```
pub struct Error(Box<Source>);

/// The error of the crate where it happened.
#[derive(Debug, thiserror::Error)]
enum Source {
    #[error("{name}: expected {expected}, found {found}")]
    Argument { name: String, expected: String, found: String },
    #[error(transparent)]
    Quant(kiln_quant_core::Error),
    #[error(transparent)]
    Models(kiln_models::Error),
    #[error(transparent)]
    Adapters(kiln_adapters::Error),
    #[error(transparent)]
    Training(kiln_training::Error),
    #[error(transparent)]
    Eval(kiln_eval::Error),
    #[cfg(feature = "calibration")]
    #[error(transparent)]
    Calibration(kiln_calibration::Error),
    #[cfg(feature = "pruning")]
    #[error(transparent)]
    Pruning(kiln_pruning::Error),
    #[cfg(feature = "side-tuning")]
    #[error(transparent)]
    SideTuning(kiln_side_tuning::Error),
    #[cfg(feature = "mixq-search")]
    #[error(transparent)]
    Search(kiln_mixq_search::Error),
}

/// What the predicates tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Io,
    File,
    Unsupported,
    Argument,
    Cancelled,
    NotFinite,
    Other,
}

impl Error {
    /// An option of this crate that is out of range.
    pub(crate) fn argument(
        name: impl Into<String>,
        expected: impl Into<String>,
        found: impl fmt::Display,
    ) -> Self {
        let (name, expected, found) = (name.into(), expected.into(), found.to_string());
        Self(Box::new(Source::Argument { name, expected, found }))
    }

    /// The operating system refused something: a missing file, a full disk.
    pub fn is_io(&self) -> bool {
        self.kind() == Kind::Io
    }

    /// A file is not what its name or header says, or doesn't fit the rest.
    pub fn is_file(&self) -> bool {
        self.kind() == Kind::File
    }

    /// Something well-formed that Kiln, or the format of an export, doesn't know.
    pub fn is_unsupported(&self) -> bool {
        self.kind() == Kind::Unsupported
    }

    /// An option is out of range, or doesn't fit the model or the data.
    pub fn is_argument(&self) -> bool {
        self.kind() == Kind::Argument
    }

    /// A callback ended the work.
    pub fn is_cancelled(&self) -> bool {
        self.kind() == Kind::Cancelled
    }

    /// A number is no longer finite: training diverged, or a model's outputs are no numbers.
    pub fn is_not_finite(&self) -> bool {
        self.kind() == Kind::NotFinite
    }

    /// The operating system's error, if it is one.
    pub fn as_io(&self) -> Option<&io::Error> {
        let mut cause: Option<&(dyn StdError + 'static)> = Some(self);
        while let Some(error) = cause {
            if let Some(io) = error.downcast_ref() {
                return Some(io);
            }
            cause = error.source();
        }
        None
    }

    /// The error of the crate where it happened, such as [`kiln::training::Error`](kiln_training::Error), if it is an `E`.
    pub fn downcast_ref<E: StdError + 'static>(&self) -> Option<&E> {
        let source: &(dyn StdError + 'static) = match &*self.0 {
            Source::Argument { .. } => return None,
            Source::Quant(error) => error,
            Source::Models(error) => error,
            Source::Adapters(error) => error,
            Source::Training(error) => error,
            Source::Eval(error) => error,
            #[cfg(feature = "calibration")]
            Source::Calibration(error) => error,
            #[cfg(feature = "pruning")]
            Source::Pruning(error) => error,
            #[cfg(feature = "side-tuning")]
            Source::SideTuning(error) => error,
            #[cfg(feature = "mixq-search")]
            Source::Search(error) => error,
        };
        source.downcast_ref()
    }

    fn kind(&self) -> Kind {
        match &*self.0 {
            Source::Argument { .. } => Kind::Argument,
            Source::Quant(error) => quant(error),
            Source::Models(error) => models(error),
            Source::Adapters(error) => adapters(error),
            Source::Training(error) => training(error),
            Source::Eval(error) => eval(error),
            #[cfg(feature = "calibration")]
            Source::Calibration(error) => calibration(error),
            #[cfg(feature = "pruning")]
            Source::Pruning(error) => pruning(error),
            #[cfg(feature = "side-tuning")]
            Source::SideTuning(error) => side_tuning(error),
            #[cfg(feature = "mixq-search")]
            Source::Search(error) => search(error),
        }
    }
}

fn quant(error: &kiln_quant_core::Error) -> Kind {
    use kiln_quant_core::Error;
    match error {
        Error::Io { .. } => Kind::Io,
        Error::File { .. } => Kind::File,
        Error::NotFinite { .. } => Kind::NotFinite,
        Error::Scheme { .. } | Error::Option { .. } | Error::Pattern { .. } | Error::Tensor { .. } => {
            Kind::Argument
        }
        _ => Kind::Other,
    }
}

fn models(error: &kiln_models::Error) -> Kind {
    use kiln_models::Error;
    match error {
        Error::Io { .. } => Kind::Io,
        Error::File { .. } => Kind::File,
        Error::Unsupported { .. } | Error::Export { .. } => Kind::Unsupported,
        Error::Argument { .. } | Error::Template(_) => Kind::Argument,
        Error::Quant(error) => quant(error),
        _ => Kind::Other,
    }
}

fn adapters(error: &kiln_adapters::Error) -> Kind {
    use kiln_adapters::Error;
    match error {
        Error::Io { .. } => Kind::Io,
        Error::File { .. } => Kind::File,
        Error::Unsupported { .. } => Kind::Unsupported,
        Error::Argument { .. } => Kind::Argument,
        Error::Quant(error) => quant(error),
        _ => Kind::Other,
    }
}

fn training(error: &kiln_training::Error) -> Kind {
    use kiln_training::Error;
    match error {
        Error::Io { .. } => Kind::Io,
        Error::File { .. } | Error::Data { .. } => Kind::File,
        Error::Argument { .. } => Kind::Argument,
        Error::Diverged { .. } => Kind::NotFinite,
        Error::Model(error) => models(error),
        _ => Kind::Other,
    }
}

fn eval(error: &kiln_eval::Error) -> Kind {
    use kiln_eval::Error;
    match error {
        Error::Io { .. } => Kind::Io,
        Error::File { .. } | Error::Task { .. } | Error::Document { .. } => Kind::File,
        Error::Option { .. } | Error::Data { .. } | Error::Request { .. } => Kind::Argument,
        Error::NotFinite { .. } => Kind::NotFinite,
        Error::Cancelled { .. } => Kind::Cancelled,
        Error::Model(error) => models(error),
        _ => Kind::Other,
    }
}

#[cfg(feature = "calibration")]
fn calibration(error: &kiln_calibration::Error) -> Kind {
    use kiln_calibration::Error;
    match error {
        Error::Io { .. } => Kind::Io,
        Error::File { .. } => Kind::File,
        Error::Argument { .. } => Kind::Argument,
        Error::NotFinite { .. } | Error::Diverged { .. } => Kind::NotFinite,
        Error::Cancelled { .. } => Kind::Cancelled,
        Error::Model(error) => models(error),
        Error::Adapter(error) => adapters(error),
        Error::Quant(error) => quant(error),
        _ => Kind::Other,
    }
}

#[cfg(feature = "pruning")]
fn pruning(error: &kiln_pruning::Error) -> Kind {
    use kiln_pruning::Error;
    match error {
        Error::File { .. } => Kind::File,
        Error::Option { .. }
        | Error::RemovesAll { .. }
        | Error::NothingToPrune { .. }
        | Error::Calibration { .. }
        | Error::Mismatch { .. } => Kind::Argument,
        Error::Model(error) => models(error),
        Error::Quant(error) => quant(error),
        _ => Kind::Other,
    }
}

#[cfg(feature = "side-tuning")]
fn side_tuning(error: &kiln_side_tuning::Error) -> Kind {
    use kiln_side_tuning::Error;
    match error {
        Error::Io { .. } => Kind::Io,
        Error::File { .. } => Kind::File,
        Error::Argument { .. } => Kind::Argument,
        Error::Models(error) => models(error),
        Error::Quant(error) => quant(error),
        _ => Kind::Other,
    }
}

#[cfg(feature = "mixq-search")]
fn search(error: &kiln_mixq_search::Error) -> Kind {
    use kiln_mixq_search::Error;
    match error {
        Error::Io { .. } => Kind::Io,
        Error::Log { .. } => Kind::File,
        Error::Space { .. }
        | Error::Setting { .. }
        | Error::Plan { .. }
        | Error::Limit { .. }
        | Error::NotMeasured { .. }
        | Error::Option { .. } => Kind::Argument,
        _ => Kind::Other,
    }
}

/// As the error of the crate where it happened.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source()
    }
}

/// Of ranks, as the trainer tells it.
impl From<kiln_distributed::Error> for Error {
    fn from(error: kiln_distributed::Error) -> Self {
        kiln_training::Error::from(error).into()
    }
}

macro_rules! from {
    ($($(#[$feature:meta])? $source:ident => $error:ty,)*) => {
        $($(#[$feature])?
        impl From<$error> for Error {
            fn from(error: $error) -> Self {
                Self(Box::new(Source::$source(error)))
            }
        })*
    };
}

from! {
    Quant => kiln_quant_core::Error,
    Models => kiln_models::Error,
    Adapters => kiln_adapters::Error,
    Training => kiln_training::Error,
    Eval => kiln_eval::Error,
    #[cfg(feature = "calibration")]
    Calibration => kiln_calibration::Error,
    #[cfg(feature = "pruning")]
    Pruning => kiln_pruning::Error,
    #[cfg(feature = "side-tuning")]
    SideTuning => kiln_side_tuning::Error,
    #[cfg(feature = "mixq-search")]
    Search => kiln_mixq_search::Error,
}
