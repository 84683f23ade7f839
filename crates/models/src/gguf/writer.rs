//! Writing GGUF files, version 3: keys, then tensors one at a time.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use kiln_quant_core::write_atomically;

use super::{
    blocks::BlockType,
    parts,
    value::{Array, Value},
};
use crate::{Error, Result};

/// Tensors begin at multiples of this.
const ALIGNMENT: usize = 32;
/// Bytes of the longest tensor name, with the zero that other readers keep behind it.
const MAX_NAME: usize = 63;

/// A tensor that will be written.
pub(crate) struct NewTensor {
    /// The name in the file.
    pub name: String,
    /// Sizes, outermost first; rows are whole blocks.
    pub shape: Vec<usize>,
    pub kind: BlockType,
}

impl NewTensor {
    pub(crate) fn bytes(&self) -> Option<usize> {
        let count = self.shape.iter().try_fold(1usize, |count, size| count.checked_mul(*size))?;
        let width = self.shape.last()?;
        (count > 0 && width.is_multiple_of(self.kind.weights())).then(|| self.kind.bytes_of(count))?
    }
}

/// Writes a file as [`write_atomically`] does; `data` gives the bytes of the tensor with that index. Returns the file's
/// size.
pub(crate) fn write(
    path: &Path,
    keys: &[(String, Value)],
    tensors: &[NewTensor],
    mut data: impl FnMut(usize) -> Result<Vec<u8>>,
) -> Result<u64> {
    let (header, sizes) = header(path, keys, tensors)?;
    let total = header.len() + sizes.iter().map(|size| size.next_multiple_of(ALIGNMENT)).sum::<usize>();
    // `write_atomically` carries the operating system's errors only; others wait here.
    let mut refusal = None;
    let written = write_atomically(path, |file| {
        file.write_all(&header)?;
        for (index, &size) in sizes.iter().enumerate() {
            let bytes = match data(index) {
                Ok(bytes) if bytes.len() == size => bytes,
                Ok(bytes) => {
                    let found = format!("{} bytes", bytes.len());
                    refusal = Some(wrong(path, &tensors[index].name, format!("{size} bytes"), found));
                    return Err(std::io::ErrorKind::Other.into());
                }
                Err(error) => {
                    refusal = Some(error);
                    return Err(std::io::ErrorKind::Other.into());
                }
            };
            file.write_all(&bytes)?;
            file.write_all(&[0; ALIGNMENT][..size.next_multiple_of(ALIGNMENT) - size])?;
        }
        Ok(())
    });
    match refusal {
        Some(error) => Err(error),
        None => {
            written?;
            Ok(total as u64)
        }
    }
}

fn wrong(path: &Path, field: &str, expected: impl Into<String>, found: impl Into<String>) -> Error {
    Error::File { path: path.into(), field: field.into(), expected: expected.into(), found: found.into() }
}

/// Writes the tensors into files of about `most` bytes of data each, or one if they fit, as [`write`] does: the others
/// before the first, which opens the model. Several files can't be replaced as one: they must be new. Returns the first file,
/// and the size of all.
pub(crate) fn write_parts(
    path: &Path,
    most: Option<u64>,
    keys: &[(String, Value)],
    tensors: &[NewTensor],
    mut data: impl FnMut(usize) -> Result<Vec<u8>>,
) -> Result<(PathBuf, u64)> {
    let mut starts = vec![0];
    let mut held = 0;
    for (index, tensor) in tensors.iter().enumerate() {
        let bytes = tensor.bytes().unwrap_or(0) as u64;
        if held > 0 && most.is_some_and(|most| held + bytes > most) {
            starts.push(index);
            held = 0;
        }
        held += bytes;
    }
    let count = starts.len();
    if count == 1 {
        return Ok((path.into(), write(path, keys, tensors, data)?));
    }
    let text = path.to_string_lossy();
    let stem = text.strip_suffix(".gguf").unwrap_or(&text);
    if let Some(taken) = (0..count).map(|index| parts::name(stem, index, count)).find(|path| path.exists()) {
        let expected = "a new name for each part: parts of two models would make one of both";
        return Err(wrong(&taken, "file", expected, "one that is there"));
    }
    let mut total = 0;
    for (index, &start) in starts.iter().enumerate().rev() {
        let end = starts.get(index + 1).copied().unwrap_or(tensors.len());
        let numbers = [(parts::NUMBER, index), (parts::COUNT, count), (parts::TENSORS, tensors.len())];
        let numbers = numbers.map(|(key, number)| (key.to_owned(), Value::Uint(number as u64)));
        let keys: Vec<_> = keys.iter().filter(|_| index == 0).cloned().chain(numbers).collect();
        let path = parts::name(stem, index, count);
        total += write(&path, &keys, &tensors[start..end], |at| data(start + at))?;
    }
    Ok((parts::name(stem, 0, count), total))
}

/// Everything before the tensors' data, and the size of each of them.
fn header(path: &Path, keys: &[(String, Value)], tensors: &[NewTensor]) -> Result<(Vec<u8>, Vec<usize>)> {
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((keys.len() as u64).to_le_bytes());
    for (key, value) in keys {
        string(&mut bytes, key);
        match value {
            // llama.cpp takes these in 16 bits only.
            Value::Uint(value) if [parts::NUMBER, parts::COUNT].contains(&key.as_str()) => {
                bytes.extend(2u32.to_le_bytes());
                bytes.extend((*value as u16).to_le_bytes());
            }
            Value::Uint(value) if key == parts::TENSORS => put_value(&mut bytes, &Value::Int(*value as i64)),
            value => put_value(&mut bytes, value),
        }
    }
    let (mut sizes, mut offset) = (Vec::new(), 0usize);
    for tensor in tensors {
        if tensor.name.len() > MAX_NAME {
            let expected = format!("a name of at most {MAX_NAME} bytes");
            return Err(wrong(path, &tensor.name, expected, tensor.name.len().to_string()));
        }
        let size = tensor.bytes().ok_or_else(|| {
            let expected =
                format!("rows of whole {} blocks of {}", tensor.kind.name(), tensor.kind.weights());
            wrong(path, &tensor.name, expected, format!("sizes {:?}", tensor.shape))
        })?;
        string(&mut bytes, &tensor.name);
        bytes.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|&size| bytes.extend((size as u64).to_le_bytes()));
        bytes.extend(tensor.kind.id().to_le_bytes());
        bytes.extend((offset as u64).to_le_bytes());
        offset += size.next_multiple_of(ALIGNMENT);
        sizes.push(size);
    }
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
    Ok((bytes, sizes))
}

fn string(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

/// A value's type number and bytes. Integers take 32 bits where they fit, as all known keys do; arrays of floats hold
/// scores, which are f32.
fn put_value(bytes: &mut Vec<u8>, value: &Value) {
    let mut put = |kind: u32, value: &[u8]| {
        bytes.extend(kind.to_le_bytes());
        bytes.extend(value);
    };
    match value {
        Value::Uint(value) => match u32::try_from(*value) {
            Ok(value) => put(4, &value.to_le_bytes()),
            Err(_) => put(10, &value.to_le_bytes()),
        },
        Value::Int(value) => match i32::try_from(*value) {
            Ok(value) => put(5, &value.to_le_bytes()),
            Err(_) => put(11, &value.to_le_bytes()),
        },
        Value::F32(value) => put(6, &value.to_le_bytes()),
        Value::F64(value) => put(12, &value.to_le_bytes()),
        Value::Bool(value) => put(7, &[(*value).into()]),
        Value::String(text) => {
            put(8, &[]);
            string(bytes, text);
        }
        Value::Array(array) => {
            put(9, &[]);
            put_array(bytes, array);
        }
    }
}

fn put_array(bytes: &mut Vec<u8>, array: &Array) {
    fn put<T>(bytes: &mut Vec<u8>, kind: u32, values: &[T], mut one: impl FnMut(&mut Vec<u8>, &T)) {
        bytes.extend(kind.to_le_bytes());
        bytes.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| one(bytes, value));
    }
    match array {
        Array::Uint(values) if values.iter().all(|&value| u32::try_from(value).is_ok()) => {
            put(bytes, 4, values, |bytes, &value| bytes.extend((value as u32).to_le_bytes()));
        }
        Array::Uint(values) => put(bytes, 10, values, |bytes, value| bytes.extend(value.to_le_bytes())),
        Array::Int(values) if values.iter().all(|&value| i32::try_from(value).is_ok()) => {
            put(bytes, 5, values, |bytes, &value| bytes.extend((value as i32).to_le_bytes()));
        }
        Array::Int(values) => put(bytes, 11, values, |bytes, value| bytes.extend(value.to_le_bytes())),
        Array::Float(values) => {
            put(bytes, 6, values, |bytes, &value| bytes.extend((value as f32).to_le_bytes()));
        }
        Array::Bool(values) => put(bytes, 7, values, |bytes, &value| bytes.push(value.into())),
        Array::String(values) => put(bytes, 8, values, |bytes, value| string(bytes, value)),
        Array::Array(values) => put(bytes, 9, values, put_array),
    }
}
