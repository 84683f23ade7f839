//! What Jinja has beyond what minijinja brings, or means otherwise.

use minijinja::{Environment, Error, ErrorKind, State, Value, value::ValueKind};

use crate::jinja::{measured, within};

/// Widest text that [`center`] and `zfill` make.
const MAX_WIDTH: usize = 1 << 16;

/// Adds tests and filters; of those that are there already, Jinja's meaning wins.
pub(super) fn complete(environment: &mut Environment<'static>) {
    minijinja_contrib::add_to_environment(environment);
    // There none is as good as an empty list.
    environment.add_test("iterable", |value: &Value| {
        matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map | ValueKind::Iterable)
    });
    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map)
    });
    environment.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
    environment.set_unknown_method_callback(method);
    environment.add_filter("center", center);
    environment.add_filter("truncate", truncate);
    environment.add_filter("wordcount", |text: String| text.split_whitespace().count());
}

/// Python's methods, as far as their results may be.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    measured(name, value, args)?;
    within(python(state, value, name, args)?)
}

/// Those that are missing elsewhere, then those of [`minijinja_contrib::pycompat`].
fn python(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let text = value.as_str();
    match (text, name, args) {
        (Some(text), "partition" | "rpartition", [separator]) => {
            let separator = separator.as_str().filter(|separator| !separator.is_empty());
            let separator = separator.ok_or_else(|| failure("partition: expected a separator".into()))?;
            let parts = match name {
                "partition" => text.split_once(separator),
                _ => text.rsplit_once(separator),
            };
            let parts = match (parts, name) {
                (Some((before, after)), _) => [before, separator, after],
                (None, "partition") => [text, "", ""],
                (None, _) => ["", "", text],
            };
            Ok(parts.into_iter().map(Value::from).collect())
        }
        (Some(text), "zfill", [width]) => {
            let width = at_most("zfill", usize::try_from(width.clone())?)?;
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            let zeros = width.saturating_sub(text.chars().count());
            Ok(Value::from(format!("{sign}{}{digits}", "0".repeat(zeros))))
        }
        (Some(text), "swapcase", []) => {
            let swapped = text.chars().flat_map(|c| match c.is_lowercase() {
                true => c.to_uppercase().collect::<Vec<char>>(),
                false => c.to_lowercase().collect(),
            });
            Ok(Value::from(swapped.collect::<String>()))
        }
        (None, "index", [wanted]) if value.kind() == ValueKind::Seq => {
            let place = value.try_iter()?.position(|item| item == *wanted);
            place.map(Value::from).ok_or_else(|| failure(format!("index: {wanted} is not in the list")))
        }
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// Jinja's `truncate`: whole words, unless `killwords`, and `end` behind them, where the text is longer than `length` and
/// `leeway` more.
fn truncate(
    text: String,
    length: Option<usize>,
    killwords: Option<bool>,
    end: Option<String>,
    leeway: Option<usize>,
) -> String {
    let (length, end) = (length.unwrap_or(255), end.unwrap_or_else(|| "...".into()));
    if text.chars().count() <= length.saturating_add(leeway.unwrap_or(5)) {
        return text;
    }
    let kept: String = text.chars().take(length.saturating_sub(end.chars().count())).collect();
    let words = match kept.rsplit_once(' ') {
        Some((words, _)) if killwords != Some(true) => words,
        _ => kept.as_str(),
    };
    format!("{words}{end}")
}

fn failure(reason: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason)
}

/// A width that may be made.
fn at_most(name: &str, width: usize) -> Result<usize, Error> {
    match width <= MAX_WIDTH {
        true => Ok(width),
        false => Err(failure(format!("{name}: expected a width of at most {MAX_WIDTH}, found {width}"))),
    }
}

/// Python's `str.center`.
fn center(text: String, width: Option<usize>) -> Result<String, Error> {
    let (width, length) = (at_most("center", width.unwrap_or(80))?, text.chars().count());
    let padding = width.saturating_sub(length);
    let left = padding / 2 + (padding & width & 1);
    Ok(format!("{}{text}{}", " ".repeat(left), " ".repeat(padding - left)))
}
