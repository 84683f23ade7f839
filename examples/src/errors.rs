//! How a program ends.

use std::{error::Error, process::ExitCode};

use clap::Parser;

/// `Result` with any error.
pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Parses the options, runs `body` and says how it ended: 0, 1 after an error, which is printed with its causes, or 2 for
/// options that don't parse, which clap prints.
pub fn program<O: Parser>(body: impl FnOnce(O) -> Result<()>) -> ExitCode {
    match body(O::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", sentence(&*error));
            ExitCode::FAILURE
        }
    }
}

/// An error and its causes, a line each. A cause that the line before already tells isn't told again.
fn sentence(error: &dyn Error) -> String {
    let mut text = format!("error: {error}");
    let (mut last, mut cause) = (error.to_string(), error.source());
    while let Some(found) = cause {
        let message = found.to_string();
        if !last.contains(&message) {
            text += &format!("\n  because: {message}");
            last = message;
        }
        cause = found.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::fmt;

    use super::*;

    #[derive(Debug)]
    struct Layer(&'static str, Option<Box<Layer>>);

    impl fmt::Display for Layer {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }
    }

    impl Error for Layer {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            self.1.as_deref().map(|layer| layer as _)
        }
    }

    #[test]
    fn an_error_is_a_sentence_with_each_cause_once() {
        let cause = Layer("no such file", None);
        let repeated = Layer("config.json: no such file", Some(Box::new(cause)));
        let error = Layer("the model can't be loaded", Some(Box::new(repeated)));
        let expected = "error: the model can't be loaded\n  because: config.json: no such file";
        assert_eq!(sentence(&error), expected);
    }
}
