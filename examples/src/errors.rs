//! How a program ends.

use std::{
    error::Error,
    fmt,
    io::{self, Write},
    process::ExitCode,
    sync::Mutex,
};

use clap::Parser;

/// `Result` with any error.
pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// A run that was stopped by a signal, with what is left of it.
#[derive(Debug)]
pub(crate) struct Stopped(pub String);

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for Stopped {}

/// Why a line couldn't be printed, the first time.
static UNPRINTED: Mutex<Option<io::Error>> = Mutex::new(None);

/// Prints a line. A pipe that was closed or is full must not end the work: [`program`] tells of it when all is done.
pub fn print_line(line: fmt::Arguments<'_>) {
    if let Err(error) = writeln!(io::stdout(), "{line}") {
        UNPRINTED.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get_or_insert(error);
    }
}

/// As `println!`, by [`print_line`].
#[macro_export]
macro_rules! say {
    ($($line:tt)*) => { $crate::print_line(format_args!($($line)*)) };
}

/// As `eprintln!`, but for a closed pipe, which is nobody to tell.
fn complain(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Parses the options, runs `body` and says how it ended: 0, 1 after an error, which is printed with its causes, 2 for
/// options that don't parse, which clap prints, or 130 if a signal stopped it.
pub fn program<O: Parser>(body: impl FnOnce(O) -> Result<()>) -> ExitCode {
    const STOPPED: u8 = 130;
    if let Err(error) = body(O::parse()) {
        if error.is::<Stopped>() {
            complain(&error.to_string());
            return ExitCode::from(STOPPED);
        }
        complain(&sentence(&*error));
        return ExitCode::FAILURE;
    }
    match UNPRINTED.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take() {
        Some(error) => {
            complain(&format!("error: not all could be printed\n  because: {error}"));
            ExitCode::FAILURE
        }
        None => ExitCode::SUCCESS,
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
