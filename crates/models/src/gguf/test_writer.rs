//! Writes small GGUF files for tests.

use std::io::Write;

use tempfile::NamedTempFile;

use super::BlockType;

/// The bytes of a file in the making.
#[derive(Default, Clone)]
pub(crate) struct Writer {
    keys: Vec<u8>,
    key_count: u64,
    entries: Vec<u8>,
    tensor_count: u64,
    data: Vec<u8>,
}

fn string(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

impl Writer {
    /// A key with its type number and its encoded value.
    pub(crate) fn raw(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        string(&mut self.keys, key);
        self.keys.extend(kind.to_le_bytes());
        self.keys.extend(value);
        self.key_count += 1;
        self
    }

    pub(crate) fn u32(self, key: &str, value: u32) -> Self {
        self.raw(key, 4, &value.to_le_bytes())
    }

    pub(crate) fn f32(self, key: &str, value: f32) -> Self {
        self.raw(key, 6, &value.to_le_bytes())
    }

    pub(crate) fn bool(self, key: &str, value: bool) -> Self {
        self.raw(key, 7, &[value.into()])
    }

    pub(crate) fn str(self, key: &str, value: &str) -> Self {
        let mut bytes = vec![];
        string(&mut bytes, value);
        self.raw(key, 8, &bytes)
    }

    fn array<T>(self, key: &str, kind: u32, values: &[T], write: impl Fn(&mut Vec<u8>, &T)) -> Self {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| write(&mut bytes, value));
        self.raw(key, 9, &bytes)
    }

    pub(crate) fn strings(self, key: &str, values: &[String]) -> Self {
        self.array(key, 8, values, |bytes, value| string(bytes, value))
    }

    pub(crate) fn i32s(self, key: &str, values: &[i32]) -> Self {
        self.array(key, 5, values, |bytes, value| bytes.extend(value.to_le_bytes()))
    }

    pub(crate) fn bools(self, key: &str, values: &[bool]) -> Self {
        self.array(key, 7, values, |bytes, value| bytes.push((*value).into()))
    }

    pub(crate) fn f32s(self, key: &str, values: &[f32]) -> Self {
        self.array(key, 6, values, |bytes, value| bytes.extend(value.to_le_bytes()))
    }

    /// A tensor entry as given; `sizes` innermost first.
    pub(crate) fn entry(mut self, name: &str, sizes: &[u64], kind: u32, offset: u64) -> Self {
        string(&mut self.entries, name);
        self.entries.extend((sizes.len() as u32).to_le_bytes());
        sizes.iter().for_each(|size| self.entries.extend(size.to_le_bytes()));
        self.entries.extend(kind.to_le_bytes());
        self.entries.extend(offset.to_le_bytes());
        self.tensor_count += 1;
        self
    }

    /// A tensor with its data; `shape` outermost first.
    pub(crate) fn tensor(mut self, name: &str, shape: &[usize], kind: BlockType, data: &[u8]) -> Self {
        let sizes: Vec<u64> = shape.iter().rev().map(|&size| size as u64).collect();
        self.data.resize(self.data.len().next_multiple_of(32), 0);
        let offset = self.data.len() as u64;
        self.data.extend(data);
        self.entry(name, &sizes, kind.id(), offset)
    }

    /// A tensor of 32-bit floats.
    pub(crate) fn floats(self, name: &str, shape: &[usize], values: &[f32]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.tensor(name, shape, BlockType::F32, &bytes)
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(self.tensor_count.to_le_bytes());
        bytes.extend(self.key_count.to_le_bytes());
        bytes.extend(&self.keys);
        bytes.extend(&self.entries);
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes.extend(&self.data);
        bytes
    }

    pub(crate) fn file(&self) -> NamedTempFile {
        file(&self.bytes())
    }
}

/// A temporary file of these bytes.
pub(crate) fn file(bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}
