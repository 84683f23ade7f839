//! The crate's one error type.

use std::path::PathBuf;

use crate::Compute;

/// What can go wrong when weights are described, quantized, packed or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A scheme string that the parser doesn't accept.
    #[error("scheme \"{text}\": {reason}")]
    Scheme {
        /// The string as given.
        text: String,
        /// What was expected and what was found.
        reason: String,
    },
    /// An option out of its range.
    #[error("option {option}: expected {expected}, found {found}")]
    Option {
        /// Type and field, e.g. `Hqq.iters`.
        option: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// A path pattern that is not a regular expression.
    #[error("pattern \"{pattern}\": {reason}")]
    Pattern {
        /// The pattern as given.
        pattern: String,
        /// The regular-expression engine's words.
        reason: String,
    },
    /// A tensor whose shape, type or content doesn't fit what it is used for.
    #[error("tensor \"{}\": expected {}, found {}", shortened(name), shortened(expected), shortened(found))]
    Tensor {
        /// The tensor's name, a checkpoint path where there is one.
        name: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// A weight that can't be quantized because it holds a value that is not finite.
    #[error("weight \"{name}\": output {output}, input {input} is {value}, which is not finite")]
    NotFinite {
        /// The weight's name.
        name: String,
        /// The output row.
        output: usize,
        /// The input column.
        input: usize,
        /// The offending value.
        value: f32,
    },
    /// A file that is not what its name or header says.
    #[error("{}: {}: expected {}, found {}", path.display(), shortened(field), shortened(expected), shortened(found))]
    File {
        /// The file.
        path: PathBuf,
        /// The tensor, metadata key or header field.
        field: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// Operands that the device doesn't multiply.
    #[error("{device} doesn't multiply {asked} operands, it does {}", names(native))]
    Compute {
        /// What was asked for.
        asked: Compute,
        /// The device.
        device: String,
        /// What it multiplies.
        native: Vec<Compute>,
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
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An [`Error::Io`] for `path`.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}

/// A text for a message: of one that is very long, which may be a whole file's, the beginning.
///
/// ```
/// assert_eq!(kiln_quant_core::shortened("weight"), "weight");
/// assert!(kiln_quant_core::shortened(&"x".repeat(100_000)).len() < 1100);
/// ```
pub fn shortened(text: &str) -> std::borrow::Cow<'_, str> {
    const MOST: usize = 1000;
    match text.char_indices().nth(MOST) {
        None => text.into(),
        Some((end, _)) => format!("{}… ({} bytes)", &text[..end], text.len()).into(),
    }
}

fn names(computes: &[Compute]) -> String {
    computes.iter().map(Compute::to_string).collect::<Vec<_>>().join(", ")
}
