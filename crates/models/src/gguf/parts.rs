//! A model in one file, or in several whose names end in `-00001-of-00005.gguf`, as llama.cpp splits them.

use std::{
    collections::HashSet,
    fs::File,
    path::{Path, PathBuf},
};

use super::{
    header::{self, TensorInfo},
    value::Metadata,
};
use crate::{Error, Result};

/// The keys that each part has: its number from 0 on, and how many there are.
pub(crate) const NUMBER: &str = "split.no";
pub(crate) const COUNT: &str = "split.count";
/// In the first part: tensors of all.
pub(crate) const TENSORS: &str = "split.tensors.count";
/// Most parts: their numbers have five digits.
const MAX_PARTS: usize = 99_999;

/// The name of a part; `stem` is the whole's path without `.gguf`.
pub(crate) fn name(stem: &str, index: usize, count: usize) -> PathBuf {
    format!("{stem}-{:05}-of-{count:05}.gguf", index + 1).into()
}

/// Header of the whole, and its files; tensors know theirs.
pub(super) struct Parts {
    pub metadata: Metadata,
    pub tensors: Vec<TensorInfo>,
    pub files: Vec<(PathBuf, File)>,
}

/// Opens the model that `path` is, or is any part of.
pub(super) fn open(path: &Path) -> Result<Parts> {
    let file = File::open(path).map_err(Error::io(path))?;
    let header = header::read(path, &file)?;
    let count = header.metadata.usize(COUNT)?.unwrap_or(1);
    if count <= 1 {
        let files = vec![(path.to_path_buf(), file)];
        return Ok(Parts { metadata: header.metadata, tensors: header.tensors, files });
    }
    let metadata = &header.metadata;
    if count > MAX_PARTS {
        return Err(metadata.error(COUNT, &format!("at most {MAX_PARTS} parts"), count.to_string()));
    }
    let number = metadata.require(NUMBER, metadata.usize(NUMBER)?)?;
    let text = path.to_string_lossy();
    let end = format!("-{:05}-of-{count:05}.gguf", number.saturating_add(1));
    let stem = text.strip_suffix(&end).ok_or_else(|| {
        let expected = format!("part {number} of {count} in a file whose name ends in {end}");
        metadata.error(NUMBER, &expected, path.display().to_string())
    })?;
    let (mut whole, mut tensors, mut files) = (None, Vec::new(), Vec::new());
    for part in 0..count {
        let path = name(stem, part, count);
        let file = File::open(&path).map_err(Error::io(&path))?;
        let mut header = header::read(&path, &file)?;
        for (key, expected) in [(NUMBER, part), (COUNT, count)] {
            let found = header.metadata.require(key, header.metadata.usize(key)?)?;
            if found != expected {
                return Err(header.metadata.error(key, &expected.to_string(), found.to_string()));
            }
        }
        header.tensors.iter_mut().for_each(|tensor| tensor.part = part);
        tensors.append(&mut header.tensors);
        files.push((path, file));
        whole.get_or_insert(header.metadata);
    }
    // There are at least two parts.
    let metadata = whole.unwrap_or(header.metadata);
    let mut names = HashSet::new();
    if let Some(twice) = tensors.iter().find(|tensor| !names.insert(tensor.name.as_str())) {
        return Err(metadata.error(&twice.name, "each tensor in one part", "the name in two".into()));
    }
    if let Some(expected) = metadata.usize(TENSORS)?.filter(|expected| *expected != tensors.len()) {
        return Err(metadata.error(TENSORS, &format!("{} tensors", tensors.len()), expected.to_string()));
    }
    Ok(Parts { metadata, tensors, files })
}
