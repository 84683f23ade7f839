//! What Jinja has beyond what minijinja brings, or means otherwise.

use minijinja::{Environment, Error, ErrorKind, Value, value::ValueKind};

/// Widest text that [`center`] makes.
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
    environment.add_filter("center", center);
    environment.add_filter("wordcount", |text: String| text.split_whitespace().count());
}

/// Python's `str.center`.
fn center(text: String, width: Option<usize>) -> Result<String, Error> {
    let (width, length) = (width.unwrap_or(80), text.chars().count());
    if width > MAX_WIDTH {
        let reason = format!("center: expected a width of at most {MAX_WIDTH}, found {width}");
        return Err(Error::new(ErrorKind::InvalidOperation, reason));
    }
    let padding = width.saturating_sub(length);
    let left = padding / 2 + (padding & width & 1);
    Ok(format!("{}{text}{}", " ".repeat(left), " ".repeat(padding - left)))
}
