//! The header of a GGUF file, versions 2 and 3: metadata, then where each tensor lies.
//!
//! Everything is little endian. Each count and length is compared with the bytes that are left before anything
//! is allocated for it.

use std::{
    collections::HashSet,
    fs::File,
    io::{BufReader, Read},
    path::Path,
};

use super::{
    blocks::BlockType,
    value::{Array, Metadata, Value},
};
use crate::{Error, Result};

/// Elements of the longest metadata array that is read; vocabularies have fewer than a million.
const MAX_ARRAY: u64 = 1 << 24;
/// Bytes of the longest key, as the format says.
const MAX_KEY: u64 = 65_535;
/// Bytes of the longest string value; chat templates have some thousands.
const MAX_STRING: u64 = 1 << 24;
/// Bytes of the longest tensor name, as the format says.
const MAX_NAME: u64 = 64;
/// How deep arrays may stand in arrays.
const MAX_DEPTH: u32 = 4;
/// Bytes of the smallest key with its value, and of the smallest tensor entry.
const MIN_KEY_VALUE: u64 = 8 + 4 + 1;
const MIN_TENSOR: u64 = 8 + 4 + 8 + 4 + 8;

/// Where a tensor lies and what it looks like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The name in the file.
    pub name: String,
    /// Sizes, outermost first (the file has them the other way round).
    pub shape: Vec<usize>,
    /// How values are stored.
    pub kind: BlockType,
    /// First byte, from the start of its file.
    pub(super) start: u64,
    /// Which of the model's files it is in.
    pub(super) part: usize,
}

impl TensorInfo {
    /// Length of the innermost axis, the one that blocks run along.
    pub fn width(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Never: a tensor with a size of zero isn't read.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What the header says.
pub(super) struct Header {
    pub metadata: Metadata,
    pub tensors: Vec<TensorInfo>,
}

/// Reads the header of `file`, which is `path`.
pub(super) fn read(path: &Path, file: &File) -> Result<Header> {
    let size = file.metadata().map_err(Error::io(path))?.len();
    let mut reader = Reader { input: BufReader::new(file), position: 0, size, path };
    let magic = reader.array::<4>("magic")?;
    if &magic != b"GGUF" {
        return Err(reader.error("magic", "\"GGUF\"", format!("{:?}", String::from_utf8_lossy(&magic))));
    }
    let version = reader.u32("version")?;
    if version != 2 && version != 3 {
        let found = match version.swap_bytes() {
            swapped @ (2 | 3) => format!("big-endian version {swapped}"),
            _ => version.to_string(),
        };
        return Err(Error::Unsupported {
            path: path.into(),
            field: "version".into(),
            found,
            supported: "little-endian versions 2 and 3".into(),
        });
    }
    let tensor_count = reader.count("tensor count", MIN_TENSOR)?;
    let key_count = reader.count("key count", MIN_KEY_VALUE)?;
    let metadata = reader.metadata(key_count)?;
    let tensors = reader.tensors(tensor_count, &metadata)?;
    Ok(Header { metadata, tensors })
}

struct Reader<'a> {
    input: BufReader<&'a File>,
    position: u64,
    size: u64,
    path: &'a Path,
}

impl Reader<'_> {
    fn error(&self, field: &str, expected: impl Into<String>, found: impl Into<String>) -> Error {
        Error::File {
            path: self.path.into(),
            field: field.into(),
            expected: expected.into(),
            found: found.into(),
        }
    }

    /// Accounts for the next `count` bytes, which must exist.
    fn advance(&mut self, count: u64, field: &str) -> Result<()> {
        let left = self.size - self.position;
        if count > left {
            return Err(self.error(
                field,
                format!("{count} bytes at offset {}", self.position),
                format!("{left} up to the end of the file"),
            ));
        }
        self.position += count;
        Ok(())
    }

    fn array<const N: usize>(&mut self, field: &str) -> Result<[u8; N]> {
        self.advance(N as u64, field)?;
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes).map_err(Error::io(self.path))?;
        Ok(bytes)
    }

    fn u32(&mut self, field: &str) -> Result<u32> {
        self.array(field).map(u32::from_le_bytes)
    }

    fn u64(&mut self, field: &str) -> Result<u64> {
        self.array(field).map(u64::from_le_bytes)
    }

    /// A number of things that take at least `size` bytes each.
    fn count(&mut self, field: &str, size: u64) -> Result<u64> {
        let count = self.u64(field)?;
        let most = (self.size - self.position) / size;
        if count > most {
            return Err(self.error(
                field,
                format!("at most {most} in what is left of the file"),
                count.to_string(),
            ));
        }
        Ok(count)
    }

    fn string(&mut self, field: &str, most: u64) -> Result<String> {
        let length = self.u64(field)?;
        if length > most {
            return Err(self.error(field, format!("a string of at most {most} bytes"), length.to_string()));
        }
        self.advance(length, field)?;
        let mut bytes = vec![0; length as usize];
        self.input.read_exact(&mut bytes).map_err(Error::io(self.path))?;
        String::from_utf8(bytes)
            .map_err(|error| self.error(field, "UTF-8 text", error.utf8_error().to_string()))
    }

    fn metadata(&mut self, count: u64) -> Result<Metadata> {
        let mut metadata = Metadata::new(self.path);
        for index in 0..count {
            let key = self.string(&format!("key {index}"), MAX_KEY)?;
            let kind = self.u32(&key)?;
            let value = self.value(kind, &key)?;
            if !metadata.insert(key.clone(), value) {
                return Err(self.error(&key, "each key once", "the key twice"));
            }
        }
        Ok(metadata)
    }

    fn value(&mut self, kind: u32, key: &str) -> Result<Value> {
        Ok(match kind {
            0 | 2 | 4 | 10 => Value::Uint(self.unsigned(kind, key)?),
            1 | 3 | 5 | 11 => Value::Int(self.signed(kind, key)?),
            6 => Value::F32(f32::from_le_bytes(self.array(key)?)),
            12 => Value::F64(f64::from_le_bytes(self.array(key)?)),
            7 => Value::Bool(self.bool(key)?),
            8 => Value::String(self.string(key, MAX_STRING)?),
            9 => Value::Array(self.values(key, 1)?),
            _ => return Err(self.error(key, "a value type in 0..=12", kind.to_string())),
        })
    }

    fn unsigned(&mut self, kind: u32, key: &str) -> Result<u64> {
        Ok(match kind {
            0 => u8::from_le_bytes(self.array(key)?).into(),
            2 => u16::from_le_bytes(self.array(key)?).into(),
            4 => u32::from_le_bytes(self.array(key)?).into(),
            _ => u64::from_le_bytes(self.array(key)?),
        })
    }

    fn signed(&mut self, kind: u32, key: &str) -> Result<i64> {
        Ok(match kind {
            1 => i8::from_le_bytes(self.array(key)?).into(),
            3 => i16::from_le_bytes(self.array(key)?).into(),
            5 => i32::from_le_bytes(self.array(key)?).into(),
            _ => i64::from_le_bytes(self.array(key)?),
        })
    }

    fn float(&mut self, kind: u32, key: &str) -> Result<f64> {
        Ok(match kind {
            6 => f32::from_le_bytes(self.array(key)?).into(),
            _ => f64::from_le_bytes(self.array(key)?),
        })
    }

    fn bool(&mut self, key: &str) -> Result<bool> {
        match self.array::<1>(key)? {
            [0] => Ok(false),
            [1] => Ok(true),
            [byte] => Err(self.error(key, "a boolean, 0 or 1", byte.to_string())),
        }
    }

    fn values(&mut self, key: &str, depth: u32) -> Result<Array> {
        if depth > MAX_DEPTH {
            return Err(self.error(key, format!("arrays at most {MAX_DEPTH} deep"), "a deeper one"));
        }
        let kind = self.u32(key)?;
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => 12,
            _ => return Err(self.error(key, "an element type in 0..=12", kind.to_string())),
        };
        let count = self.count(key, size)?;
        if count > MAX_ARRAY {
            return Err(self.error(key, format!("at most {MAX_ARRAY} elements"), count.to_string()));
        }
        // The lists grow as elements are really read, so a lying count allocates nothing.
        let mut elements = 0..count;
        Ok(match kind {
            0 | 2 | 4 | 10 => {
                Array::Uint(elements.try_fold(vec![], |v, _| push(v, self.unsigned(kind, key)))?)
            }
            1 | 3 | 5 | 11 => Array::Int(elements.try_fold(vec![], |v, _| push(v, self.signed(kind, key)))?),
            6 | 12 => Array::Float(elements.try_fold(vec![], |v, _| push(v, self.float(kind, key)))?),
            7 => Array::Bool(elements.try_fold(vec![], |v, _| push(v, self.bool(key)))?),
            8 => Array::String(elements.try_fold(vec![], |v, _| push(v, self.string(key, MAX_STRING)))?),
            _ => Array::Array(elements.try_fold(vec![], |v, _| push(v, self.values(key, depth + 1)))?),
        })
    }

    fn tensors(&mut self, count: u64, metadata: &Metadata) -> Result<Vec<TensorInfo>> {
        let alignment = metadata.usize("general.alignment")?.unwrap_or(32) as u64;
        if alignment == 0 || !alignment.is_multiple_of(8) {
            return Err(self.error("general.alignment", "a positive multiple of 8", alignment.to_string()));
        }
        let mut names = HashSet::new();
        let mut tensors = Vec::new();
        for index in 0..count {
            let tensor = self.tensor(&format!("name of tensor {index}"), alignment)?;
            if !names.insert(tensor.name.clone()) {
                return Err(self.error(&tensor.name, "each tensor once", "the name twice"));
            }
            tensors.push(tensor);
        }
        let data = self.position.checked_next_multiple_of(alignment);
        for tensor in &mut tensors {
            let end = data.and_then(|data| {
                tensor.start = tensor.start.checked_add(data)?;
                tensor.start.checked_add(tensor.kind.bytes_of(tensor.len())? as u64)
            });
            if end.is_none_or(|end| end > self.size) {
                return Err(self.error(
                    &tensor.name,
                    format!("data within the {} bytes of the file", self.size),
                    end.map_or("an overflowing offset".into(), |end| format!("an end at {end}")),
                ));
            }
        }
        Ok(tensors)
    }

    /// One entry; its `start` still counts from the data section.
    fn tensor(&mut self, field: &str, alignment: u64) -> Result<TensorInfo> {
        let name = self.string(field, MAX_NAME)?;
        let dimensions = self.u32(&name)?;
        if !(1..=4).contains(&dimensions) {
            return Err(self.error(&name, "1 to 4 dimensions", dimensions.to_string()));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let size = self.u64(&name)?;
            // The limit on the product below keeps every later computation of sizes exact.
            let size = usize::try_from(size).ok().filter(|&size| size > 0);
            shape.push(size.ok_or_else(|| self.error(&name, "positive sizes", "zero or too large a size"))?);
        }
        let values = shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
        if values.is_none_or(|values| values as u64 > 1 << 48) {
            return Err(self.error(&name, "at most 2^48 values", format!("sizes {shape:?}")));
        }
        let id = self.u32(&name)?;
        let kind = BlockType::from_id(id).ok_or_else(|| Error::Unsupported {
            path: self.path.into(),
            field: name.clone(),
            found: format!("tensor type {id}"),
            supported: BlockType::list(),
        })?;
        if !shape[0].is_multiple_of(kind.weights()) {
            let expected = format!("rows of whole {} blocks of {}", kind.name(), kind.weights());
            return Err(self.error(&name, expected, format!("rows of {}", shape[0])));
        }
        let start = self.u64(&name)?;
        if !start.is_multiple_of(alignment) {
            return Err(self.error(&name, format!("an offset aligned to {alignment}"), start.to_string()));
        }
        shape.reverse();
        Ok(TensorInfo { name, shape, kind, start, part: 0 })
    }
}

/// `list` with `item`, or the item's error.
fn push<T>(mut list: Vec<T>, item: Result<T>) -> Result<Vec<T>> {
    list.push(item?);
    Ok(list)
}
