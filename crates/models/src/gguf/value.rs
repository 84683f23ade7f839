//! Metadata of a GGUF file: keys with typed values.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use crate::{Error, Result};

/// A metadata value. Integers of all widths are widened; no reader of metadata depends on the width.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Value {
    /// u8, u16, u32 or u64.
    Uint(u64),
    /// i8, i16, i32 or i64.
    Int(i64),
    /// 32-bit float.
    F32(f32),
    /// 64-bit float.
    F64(f64),
    /// Boolean.
    Bool(bool),
    /// UTF-8 text.
    String(String),
    /// Values of one type.
    Array(Array),
}

impl Value {
    fn type_name(&self) -> &'static str {
        match self {
            Self::Uint(_) => "an unsigned integer",
            Self::Int(_) => "a signed integer",
            Self::F32(_) | Self::F64(_) => "a float",
            Self::Bool(_) => "a boolean",
            Self::String(_) => "a string",
            Self::Array(Array::String(_)) => "an array of strings",
            Self::Array(Array::Array(_)) => "an array of arrays",
            Self::Array(_) => "an array of numbers",
        }
    }

    /// The value as text for an error: short, whatever the file holds.
    fn describe(&self) -> String {
        match self {
            Self::Uint(value) => value.to_string(),
            Self::Int(value) => value.to_string(),
            Self::F32(value) => value.to_string(),
            Self::F64(value) => value.to_string(),
            Self::Bool(value) => value.to_string(),
            Self::String(value) => format!("\"{}\"", value.chars().take(80).collect::<String>()),
            Self::Array(_) => self.type_name().into(),
        }
    }
}

/// A metadata array; elements are widened like [`Value`]'s.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Array {
    /// Unsigned integers.
    Uint(Vec<u64>),
    /// Signed integers.
    Int(Vec<i64>),
    /// Floats of either width.
    Float(Vec<f64>),
    /// Booleans.
    Bool(Vec<bool>),
    /// Texts.
    String(Vec<String>),
    /// Arrays.
    Array(Vec<Array>),
}

/// All keys of a file. A getter gives `None` for a missing key and an error for one of another type.
#[derive(Debug, Clone, PartialEq)]
pub struct Metadata {
    path: PathBuf,
    values: BTreeMap<String, Value>,
}

impl Metadata {
    pub(crate) fn new(path: &Path) -> Self {
        Self { path: path.into(), values: BTreeMap::new() }
    }

    /// Adds a key; `false` if it was there.
    pub(crate) fn insert(&mut self, key: String, value: Value) -> bool {
        self.values.insert(key, value).is_none()
    }

    /// The keys, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.values.get(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| self.error(key, expected, value.describe()))
    }

    /// A non-negative integer.
    ///
    /// # Errors
    /// [`Error::File`] if `key` holds something else.
    pub fn usize(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a non-negative integer", |value| match *value {
            Value::Uint(value) => usize::try_from(value).ok(),
            Value::Int(value) => usize::try_from(value).ok(),
            _ => None,
        })
    }

    /// A token id.
    ///
    /// # Errors
    /// [`Error::File`] if `key` holds something else.
    pub fn u32(&self, key: &str) -> Result<Option<u32>> {
        self.typed(key, "an integer in 0..2^32", |value| match *value {
            Value::Uint(value) => u32::try_from(value).ok(),
            Value::Int(value) => u32::try_from(value).ok(),
            _ => None,
        })
    }

    /// A finite number.
    ///
    /// An f32 is read as its shortest decimal: files hold what stood in a `config.json` (`1e-5`), rounded to f32,
    /// and this gives the decimal back.
    ///
    /// # Errors
    /// [`Error::File`] if `key` holds something else.
    pub fn f64(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a finite number", |value| {
            let value = match *value {
                Value::F32(value) => value.to_string().parse().ok()?,
                Value::F64(value) => value,
                Value::Uint(value) => value as f64,
                Value::Int(value) => value as f64,
                _ => return None,
            };
            value.is_finite().then_some(value)
        })
    }

    /// A boolean.
    ///
    /// # Errors
    /// [`Error::File`] if `key` holds something else.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a boolean", |value| match *value {
            Value::Bool(value) => Some(value),
            _ => None,
        })
    }

    /// A string.
    ///
    /// # Errors
    /// [`Error::File`] if `key` holds something else.
    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", |value| match value {
            Value::String(value) => Some(value.as_str()),
            _ => None,
        })
    }

    /// An array of strings.
    ///
    /// # Errors
    /// [`Error::File`] if `key` holds something else.
    pub fn strings(&self, key: &str) -> Result<Option<&[String]>> {
        self.typed(key, "an array of strings", |value| match value {
            Value::Array(Array::String(values)) => Some(values.as_slice()),
            _ => None,
        })
    }

    /// An array of floats.
    ///
    /// # Errors
    /// [`Error::File`] if `key` holds something else.
    pub fn floats(&self, key: &str) -> Result<Option<&[f64]>> {
        self.typed(key, "an array of floats", |value| match value {
            Value::Array(Array::Float(values)) => Some(values.as_slice()),
            _ => None,
        })
    }

    /// An array of integers.
    ///
    /// # Errors
    /// [`Error::File`] if `key` holds something else.
    pub fn ints(&self, key: &str) -> Result<Option<Vec<i64>>> {
        self.typed(key, "an array of integers", |value| match value {
            Value::Array(Array::Int(values)) => Some(values.clone()),
            Value::Array(Array::Uint(values)) => values.iter().map(|&value| value.try_into().ok()).collect(),
            _ => None,
        })
    }

    /// `value`, which a getter found under `key`, or the error that the key is missing.
    ///
    /// # Errors
    /// [`Error::File`] for `None`.
    pub fn require<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.error(key, "a value", "no such key".into()))
    }

    /// An [`Error::File`] about `field` of this file.
    pub(super) fn error(&self, field: &str, expected: &str, found: String) -> Error {
        Error::File { path: self.path.clone(), field: field.into(), expected: expected.into(), found }
    }

    /// An [`Error::Unsupported`] about `field` of this file.
    pub(super) fn unsupported(&self, field: &str, found: &str, supported: &str) -> Error {
        Error::Unsupported {
            path: self.path.clone(),
            field: field.into(),
            found: found.into(),
            supported: supported.into(),
        }
    }

    /// The error for the value of `key`, which Kiln doesn't implement.
    pub(super) fn unsupported_value(&self, key: &str, supported: &str) -> Error {
        self.unsupported(key, &self.get(key).map_or("nothing".into(), Value::describe), supported)
    }
}
