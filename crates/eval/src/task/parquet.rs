//! Rows of Parquet files.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use parquet::file::{reader::FileReader, serialized_reader::SerializedFileReader};

use super::Document;
use crate::{Error, Result};

/// All rows; columns that JSON has no type for become what the Parquet library writes them as.
pub(super) fn read(path: &Path) -> Result<Vec<Document>> {
    let refused = |error: parquet::errors::ParquetError| Error::file(path, "rows", "a Parquet file", error);
    let file = std::fs::File::open(path).map_err(Error::io(path))?;
    // The library panics on some files that aren't what they say.
    let read = catch_unwind(AssertUnwindSafe(|| {
        let reader = SerializedFileReader::new(file).map_err(refused)?;
        let mut rows = Vec::new();
        for row in reader.get_row_iter(None).map_err(refused)? {
            match row.map_err(refused)?.to_json_value() {
                serde_json::Value::Object(row) => rows.push(row),
                other => return Err(Error::file(path, format!("row {}", rows.len()), "an object", other)),
            }
        }
        Ok(rows)
    }));
    read.unwrap_or_else(|_| Err(Error::file(path, "rows", "a Parquet file", "one that can't be read")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rows_are_read_with_their_lists() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/eval/arc.parquet");
        let rows = read(Path::new(path)).unwrap();
        let choices = json!({"text": ["one", "two", "three"], "label": ["1", "2", "3"]});
        assert_eq!((rows.len(), &rows[1]["choices"], &rows[1]["answerKey"]), (2, &choices, &json!("3")));
    }

    #[test]
    fn files_that_are_cut_off_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cut.parquet");
        std::fs::write(&path, b"PAR1 and no more").unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("cut.parquet: rows: expected a Parquet file"), "{error}");
    }
}
