//! Rows of files: JSON lines, a JSON array, Parquet.

use std::{
    fmt,
    fs::File,
    io::{BufRead, BufReader},
    path::Path,
};

use serde::de::{DeserializeSeed, Deserializer as _, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::error::{Error, Problem, Result};

/// What some editors put before a text in UTF-8.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// What hears of every row: its line or number, counted from 1, and what it holds.
type OnRow<'a> = dyn FnMut(usize, Map<String, Value>) -> Result<()> + 'a;

/// Whether rows are read from files of this extension.
pub(super) fn has_rows(extension: &str) -> bool {
    matches!(extension, "jsonl" | "json" | "parquet")
}

/// Reads the rows of a file one by one. Tables have a column for whatever any row has, so what is null isn't there.
pub(super) fn for_each_row(path: &Path, extension: &str, on_row: &mut OnRow<'_>) -> Result<()> {
    let on_row: &mut OnRow<'_> = &mut |line, mut row| {
        row.retain(|_, value| !value.is_null());
        on_row(line, row)
    };
    match extension {
        "json" => json(path, on_row),
        "parquet" => parquet(path, on_row),
        _ => json_lines(path, on_row),
    }
}

fn json_lines(path: &Path, on_row: &mut OnRow<'_>) -> Result<()> {
    let mut reader = BufReader::new(open(path)?);
    let mut text = Vec::new();
    for line in 1.. {
        text.clear();
        if reader.read_until(b'\n', &mut text).map_err(Error::io(path))? == 0 {
            break;
        }
        if line == 1 && text.starts_with(BYTE_ORDER_MARK) {
            text.drain(..BYTE_ORDER_MARK.len());
        }
        if text.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let row = serde_json::from_slice(&text)
            .map_err(|error| Problem::new("row", "a JSON object", error).in_line(path, line))?;
        on_row(line, row)?;
    }
    Ok(())
}

/// An array of objects, or an object of which one value is such an array, such as `{"data": [..]}`. One row is held at a
/// time.
fn json(path: &Path, on_row: &mut OnRow<'_>) -> Result<()> {
    let mut reader = BufReader::new(open(path)?);
    if reader.fill_buf().map_err(Error::io(path))?.starts_with(BYTE_ORDER_MARK) {
        reader.consume(BYTE_ORDER_MARK.len());
    }
    let (mut failed, mut rows) = (None, 0);
    let mut deserializer = serde_json::Deserializer::from_reader(reader);
    let array = Array { on_row, failed: &mut failed, rows: &mut rows };
    let read = deserializer.deserialize_any(array).and_then(|()| deserializer.end());
    match (failed, read) {
        (Some(error), _) => Err(error),
        (None, Ok(())) => Ok(()),
        (None, Err(error)) => {
            let expected = "a list of objects, or an object with one";
            Err(Problem::new(format!("after row {rows}"), expected, error).in_file(path))
        }
    }
}

/// Passes the objects of an array on.
struct Array<'a, 'b> {
    on_row: &'a mut OnRow<'b>,
    failed: &'a mut Option<Error>,
    rows: &'a mut usize,
}

impl<'de> Visitor<'de> for Array<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> std::result::Result<(), A::Error> {
        while let Some(row) = items.next_element::<Map<String, Value>>()? {
            *self.rows += 1;
            if let Err(error) = (self.on_row)(*self.rows, row) {
                *self.failed = Some(error);
                return Err(A::Error::custom("a row was refused"));
            }
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> std::result::Result<(), A::Error> {
        let mut found = false;
        while fields.next_key::<String>()?.is_some() {
            let item = Field { on_row: &mut *self.on_row, failed: &mut *self.failed, rows: &mut *self.rows };
            let is_array = fields.next_value_seed(item)?;
            if is_array && found {
                return Err(A::Error::custom("two lists"));
            }
            found |= is_array;
        }
        if !found {
            return Err(A::Error::custom("an object without a list"));
        }
        Ok(())
    }
}

/// A value of the outer object: rows, if it is an array.
struct Field<'a, 'b> {
    on_row: &'a mut OnRow<'b>,
    failed: &'a mut Option<Error>,
    rows: &'a mut usize,
}

impl<'de> DeserializeSeed<'de> for Field<'_, '_> {
    type Value = bool;

    fn deserialize<D: serde::Deserializer<'de>>(self, value: D) -> std::result::Result<bool, D::Error> {
        value.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Field<'_, '_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> std::result::Result<bool, A::Error> {
        let Self { on_row, failed, rows } = self;
        Array { on_row, failed, rows }.visit_seq(items).map(|()| true)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> std::result::Result<bool, A::Error> {
        while fields.next_entry::<serde::de::IgnoredAny, serde::de::IgnoredAny>()?.is_some() {}
        Ok(false)
    }

    fn visit_bool<E>(self, _: bool) -> std::result::Result<bool, E> {
        Ok(false)
    }

    fn visit_i64<E>(self, _: i64) -> std::result::Result<bool, E> {
        Ok(false)
    }

    fn visit_u64<E>(self, _: u64) -> std::result::Result<bool, E> {
        Ok(false)
    }

    fn visit_f64<E>(self, _: f64) -> std::result::Result<bool, E> {
        Ok(false)
    }

    fn visit_str<E>(self, _: &str) -> std::result::Result<bool, E> {
        Ok(false)
    }

    fn visit_unit<E>(self) -> std::result::Result<bool, E> {
        Ok(false)
    }
}

#[cfg(feature = "parquet")]
fn parquet(path: &Path, on_row: &mut OnRow<'_>) -> Result<()> {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use parquet::file::{reader::FileReader, serialized_reader::SerializedFileReader};
    let file = open(path)?;
    let refused =
        |error: parquet::errors::ParquetError| Problem::new("rows", "a Parquet file", error).in_file(path);
    // The library panics on some files that aren't what they say.
    let read = catch_unwind(AssertUnwindSafe(|| {
        let reader = SerializedFileReader::new(file).map_err(refused)?;
        for (index, row) in reader.get_row_iter(None).map_err(refused)?.enumerate() {
            match row.map_err(refused)?.to_json_value() {
                Value::Object(row) => on_row(index + 1, row)?,
                other => return Err(Problem::new("row", "an object", other).in_line(path, index + 1)),
            }
        }
        Ok(())
    }));
    read.unwrap_or_else(|_| {
        Err(Problem::new("rows", "a Parquet file", "one that can't be read").in_file(path))
    })
}

#[cfg(not(feature = "parquet"))]
fn parquet(path: &Path, _: &mut OnRow<'_>) -> Result<()> {
    let expected = ".txt, .u16le, .jsonl or .json, or Kiln built with its feature parquet";
    Err(Problem::new("extension", expected, ".parquet").in_file(path))
}

/// A regular file: a device could go on for ever.
pub(super) fn open(path: &Path) -> Result<File> {
    let file = File::open(path).map_err(Error::io(path))?;
    if !file.metadata().map_err(Error::io(path))?.is_file() {
        return Err(Problem::new("type", "a regular file", "something else").in_file(path));
    }
    Ok(file)
}
