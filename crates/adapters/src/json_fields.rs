//! Typed access to the keys of a JSON object whose author isn't trusted.

use std::fmt::Display;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::Error;

/// A field that isn't what it should be, before it is known whether it came from a file or from an option.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Problem {
    field: String,
    expected: String,
    found: String,
}

impl Problem {
    pub(crate) fn new(field: impl Into<String>, expected: impl Into<String>, found: impl Display) -> Self {
        Self { field: field.into(), expected: expected.into(), found: found.to_string() }
    }

    /// The same under the name that `rename` gives the field.
    pub(crate) fn renamed(self, rename: fn(&str) -> &str) -> Self {
        Self { field: rename(&self.field).to_owned(), ..self }
    }

    pub(crate) fn in_file(self, path: &Path) -> Error {
        Error::File { path: path.into(), field: self.field, expected: self.expected, found: self.found }
    }

    pub(crate) fn argument(self) -> Error {
        Error::Argument { name: self.field, expected: self.expected, found: self.found }
    }
}

/// A value for a message: its JSON text, cut where it is long.
pub(crate) fn shorten(value: &Value) -> String {
    const LENGTH: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(LENGTH) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// The keys of an object; null is the same as an absent key, as in Python dataclasses with optional fields.
pub(crate) struct Fields<'a>(pub(crate) &'a Map<String, Value>);

type Found<T> = Result<T, Problem>;

impl<'a> Fields<'a> {
    fn get<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Found<Option<T>> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| Problem::new(key, expected, shorten(value))),
        }
    }

    pub(crate) fn string(&self, key: &str) -> Found<Option<String>> {
        self.get(key, "a string", |value| value.as_str().map(str::to_owned))
    }

    /// Absent means false.
    pub(crate) fn bool(&self, key: &str) -> Found<bool> {
        Ok(self.get(key, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    pub(crate) fn number(&self, key: &str) -> Found<Option<f64>> {
        self.get(key, "a number", Value::as_f64)
    }

    pub(crate) fn size(&self, key: &str) -> Found<Option<usize>> {
        self.get(key, "a whole number, not negative", size)
    }

    /// One whole number or a list of them.
    pub(crate) fn sizes(&self, key: &str) -> Found<Option<Vec<usize>>> {
        self.get(key, "a whole number, not negative, or a list of them", |value| match value {
            Value::Array(items) => items.iter().map(size).collect(),
            one => size(one).map(|one| vec![one]),
        })
    }

    /// One string or a list of them; absent and `""` mean none.
    pub(crate) fn strings(&self, key: &str) -> Found<Vec<String>> {
        let strings = self.get(key, "a string or a list of strings", |value| match value {
            Value::Array(items) => items.iter().map(|item| item.as_str().map(str::to_owned)).collect(),
            one => one.as_str().map(|one| if one.is_empty() { vec![] } else { vec![one.to_owned()] }),
        })?;
        Ok(strings.unwrap_or_default())
    }

    /// An object of whole numbers, in the file's order.
    pub(crate) fn pattern_sizes(&self, key: &str) -> Found<Vec<(String, usize)>> {
        self.pattern(key, "a whole number, not negative", size)
    }

    /// An object of numbers, in the file's order.
    pub(crate) fn pattern_numbers(&self, key: &str) -> Found<Vec<(String, f64)>> {
        self.pattern(key, "a number", Value::as_f64)
    }

    fn pattern<T>(
        &self,
        key: &str,
        expected: &str,
        read: fn(&Value) -> Option<T>,
    ) -> Found<Vec<(String, T)>> {
        let Some(entries) = self.get(key, "an object", Value::as_object)? else { return Ok(Vec::new()) };
        entries
            .iter()
            .map(|(pattern, value)| {
                let value = read(value)
                    .ok_or_else(|| Problem::new(format!("{key}.{pattern}"), expected, shorten(value)))?;
                Ok((pattern.clone(), value))
            })
            .collect()
    }
}

fn size(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|value| usize::try_from(value).ok())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn long_values_are_cut_between_characters() {
        let text = shorten(&json!("é".repeat(100)));
        assert_eq!(text.chars().count(), 61);
        assert!(text.ends_with('…'));
    }

    #[test]
    fn null_is_absent_and_one_value_is_a_list() {
        let value = json!({"a": null, "b": 3, "c": "x", "d": ["x", "y"], "e": ""});
        let fields = Fields(value.as_object().unwrap());
        assert_eq!(fields.size("a"), Ok(None));
        assert_eq!(fields.sizes("b"), Ok(Some(vec![3])));
        assert_eq!(fields.strings("c").unwrap(), ["x"]);
        assert_eq!(fields.strings("d").unwrap(), ["x", "y"]);
        assert_eq!(fields.strings("e").unwrap(), Vec::<String>::new());
    }
}
