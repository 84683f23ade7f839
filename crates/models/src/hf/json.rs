//! Typed reading of a checkpoint's JSON files, which remembers what nobody asked for.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

use crate::{Error, Result};

/// Largest `config.json` and the like, in bytes; real ones have a few thousand.
pub(super) const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// Reads a JSON object from a file of at most `max_bytes`.
pub(super) fn read_object(path: &Path, max_bytes: u64) -> Result<Map<String, Value>> {
    let file = File::open(path).map_err(Error::io(path))?;
    let mut text = Vec::new();
    file.take(max_bytes + 1).read_to_end(&mut text).map_err(Error::io(path))?;
    let fail = |found: String| Error::File {
        path: path.into(),
        field: "content".into(),
        expected: format!("a JSON object of at most {max_bytes} bytes"),
        found,
    };
    if text.len() as u64 > max_bytes {
        return Err(fail("a longer file".into()));
    }
    match serde_json::from_slice(&text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => Err(fail(kind(&other).into())),
        Err(error) => Err(fail(error.to_string())),
    }
}

/// A JSON object whose keys are asked for by name and type. `null` counts as absent unless said otherwise.
#[derive(Debug)]
pub(crate) struct Fields<'a> {
    path: &'a Path,
    prefix: String,
    map: &'a Map<String, Value>,
    known: RefCell<BTreeSet<String>>,
    unknown: RefCell<Vec<String>>,
}

impl<'a> Fields<'a> {
    /// The object `map` of the file `path`; `prefix` (such as `rope_scaling.`) goes before the keys in messages.
    pub(crate) fn new(path: &'a Path, prefix: &str, map: &'a Map<String, Value>) -> Self {
        Self { path, prefix: prefix.into(), map, known: RefCell::default(), unknown: RefCell::default() }
    }

    /// The value of `key`.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.know(&[key]);
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Whether `key` is there, be it as `null`.
    pub(crate) fn present(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// All keys, in the file's order.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &'a str> {
        self.map.keys().map(String::as_str)
    }

    /// Marks keys as understood that need no value.
    pub(crate) fn know(&self, keys: &[&str]) {
        self.known.borrow_mut().extend(keys.iter().map(|&key| key.to_owned()));
    }

    /// Adds unknown keys of an object that belongs to this one.
    pub(crate) fn add_unknown(&self, keys: impl IntoIterator<Item = String>) {
        self.unknown.borrow_mut().extend(keys);
    }

    /// Keys that nobody asked for, added ones included.
    pub(crate) fn unknown(&self) -> Vec<String> {
        let known = self.known.borrow();
        let own = self.map.keys().filter(|key| !known.contains(*key));
        own.map(|key| format!("{}{key}", self.prefix)).chain(self.unknown.borrow().clone()).collect()
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => convert(value).map(Some).ok_or_else(|| self.wrong(key, expected)),
        }
    }

    /// A truth value.
    pub(crate) fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// A string.
    pub(crate) fn str(&self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "a string", Value::as_str)
    }

    /// A number.
    pub(crate) fn f64(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    /// A finite number above zero.
    pub(crate) fn positive(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number above 0", |value| value.as_f64().filter(|v| v.is_finite() && *v > 0.0))
    }

    /// A list of strings.
    pub(crate) fn strings(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        self.typed(key, "a list of strings", |value| value.as_array()?.iter().map(Value::as_str).collect())
    }

    /// An object.
    pub(crate) fn object(&self, key: &str) -> Result<Option<Fields<'a>>> {
        let map = self.typed(key, "an object", Value::as_object)?;
        Ok(map.map(|map| Fields::new(self.path, &format!("{}{key}.", self.prefix), map)))
    }

    /// An integer in `1..=max`.
    pub(crate) fn size(&self, key: &str, max: usize) -> Result<Option<usize>> {
        self.typed(key, &format!("an integer in 1..={max}"), |value| {
            let value = usize::try_from(value.as_u64()?).ok()?;
            (1..=max).contains(&value).then_some(value)
        })
    }

    /// An integer in `1..=max` that must be there.
    pub(crate) fn required_size(&self, key: &str, max: usize) -> Result<usize> {
        self.size(key, max)?.ok_or_else(|| self.wrong(key, &format!("an integer in 1..={max}")))
    }

    /// An error about the value of `key`, which is shown.
    pub(crate) fn wrong(&self, key: &str, expected: &str) -> Error {
        Error::File {
            path: self.path.into(),
            field: format!("{}{key}", self.prefix),
            expected: expected.into(),
            found: self.show(key),
        }
    }

    /// An error about a value of `key` that Kiln doesn't implement.
    pub(crate) fn unsupported(&self, key: &str, supported: &str) -> Error {
        Error::Unsupported {
            path: self.path.into(),
            field: format!("{}{key}", self.prefix),
            found: self.show(key),
            supported: supported.into(),
        }
    }

    /// Refuses every value of `key` but `only` (and its absence).
    pub(crate) fn refuse_unless(&self, key: &str, only: impl Into<Value>) -> Result<()> {
        let only = only.into();
        let equal = |value: &Value| match (value.as_f64(), only.as_f64()) {
            (Some(value), Some(only)) => value == only,
            _ => *value == only,
        };
        if self.get(key).is_none_or(equal) { Ok(()) } else { Err(self.unsupported(key, &only.to_string())) }
    }

    /// The file.
    pub(crate) fn path(&self) -> PathBuf {
        self.path.into()
    }

    fn show(&self, key: &str) -> String {
        const LONGEST: usize = 80;
        match self.map.get(key) {
            None => "nothing".into(),
            Some(value @ (Value::Array(_) | Value::Object(_))) => kind(value).into(),
            Some(value) => value.to_string().chars().take(LONGEST).collect(),
        }
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
