//! Safetensors files: headers are checked when a file is opened, tensors are read one at a time, nothing is mapped; files
//! are written to a temporary sibling and renamed.

mod write;

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io,
    path::{Path, PathBuf},
};

use safetensors::tensor::{Metadata, TensorInfo};

pub use safetensors::Dtype;
pub use write::{NewTensor, TensorPlan, Values, stream_safetensors, write_safetensors};

use crate::{Error, Result};

/// Bytes of the little-endian header length that opens a file.
const LENGTH_BYTES: u64 = 8;
/// Longest header, as in the `safetensors` crate.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Bytes read at once while converting; a multiple of every element's size.
const CHUNK_BYTES: usize = 1 << 20;

/// A tensor as its file stores it.
#[derive(Debug, Clone, PartialEq)]
pub struct RawTensor {
    /// Type of the elements.
    pub dtype: Dtype,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Little-endian elements, row-major.
    pub bytes: Vec<u8>,
}

/// One open `.safetensors` file.
///
/// ```no_run
/// # use kiln_quant_core::safetensors_file::SafetensorsFile;
/// let file = SafetensorsFile::open("adapter_model.safetensors")?;
/// for name in file.names() {
///     let tensor = file.read(name)?;
///     println!("{name}: {:?} {:?}", tensor.dtype, tensor.shape);
/// }
/// # Ok::<(), kiln_quant_core::Error>(())
/// ```
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    file: File,
    data_start: u64,
    metadata: HashMap<String, String>,
    tensors: BTreeMap<String, TensorInfo>,
}

impl SafetensorsFile {
    /// Opens a file and checks its header against its size: the ranges of the tensors must follow one another from the
    /// first byte after the header to the last of the file, each as long as its type and shape say.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::File`] for a header that is truncated, too long, not JSON, or that lies.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let fail = |expected: String, found: String| Error::File {
            path: path.clone(),
            field: "header".into(),
            expected,
            found,
        };
        let file = File::open(&path).map_err(Error::io(&path))?;
        let size = file.metadata().map_err(Error::io(&path))?.len();
        if size < LENGTH_BYTES {
            return Err(fail(format!("at least {LENGTH_BYTES} bytes"), size.to_string()));
        }
        let mut length = [0; LENGTH_BYTES as usize];
        read_exact_at(&file, &mut length, 0).map_err(Error::io(&path))?;
        let length = u64::from_le_bytes(length);
        let longest = MAX_HEADER_BYTES.min(size - LENGTH_BYTES);
        if length > longest {
            let expected = format!("at most {longest} bytes of header in a file of {size}");
            return Err(fail(expected, length.to_string()));
        }
        let mut header = vec![0; length as usize];
        read_exact_at(&file, &mut header, LENGTH_BYTES).map_err(Error::io(&path))?;
        let header: Metadata = serde_json::from_slice(&header).map_err(|error| {
            fail("tensors with type, shape and adjoining ranges".into(), error.to_string())
        })?;
        let data_start = LENGTH_BYTES + length;
        if header.data_len() as u64 != size - data_start {
            let expected = format!("{} bytes of tensors", header.data_len());
            return Err(fail(expected, format!("{} after the header", size - data_start)));
        }
        let tensors = header.tensors().into_iter().map(|(name, info)| (name, info.clone())).collect();
        let metadata = header.metadata().clone().unwrap_or_default();
        Ok(Self { path, file, data_start, metadata, tensors })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The header's `__metadata__`.
    pub fn metadata(&self) -> &HashMap<String, String> {
        &self.metadata
    }

    /// Names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Type and shape of the tensor `name`, without reading it.
    ///
    /// # Errors
    /// [`Error::File`] if there is none.
    pub fn describe(&self, name: &str) -> Result<(Dtype, &[usize])> {
        self.info(name).map(|info| (info.dtype, info.shape.as_slice()))
    }

    /// Reads the tensor `name` as it is stored.
    ///
    /// # Errors
    /// [`Error::File`] if there is none, [`Error::Io`].
    pub fn read(&self, name: &str) -> Result<RawTensor> {
        self.read_bytes(self.info(name)?)
    }

    /// Reads one of the tensors that are stacked in the tensor `name`: place `index` of its outermost axis, as it is stored.
    ///
    /// # Errors
    /// As [`Self::read`]; [`Error::File`] if there is no such place.
    pub fn read_part(&self, name: &str, index: usize) -> Result<RawTensor> {
        self.read_bytes(&self.part(name, index)?)
    }

    /// As [`Self::read_part`], of values stored as F32, F16, BF16 or F64.
    ///
    /// # Errors
    /// As [`Self::read_part`]; [`Error::File`] for other types.
    pub fn read_f32_part(&self, name: &str, index: usize) -> Result<(Vec<usize>, Vec<f32>)> {
        self.floats(name, &self.part(name, index)?)
    }

    /// Where one of the tensors lies that are stacked in the tensor `name`.
    fn part(&self, name: &str, index: usize) -> Result<TensorInfo> {
        let info = self.info(name)?;
        let [count, shape @ ..] = info.shape.as_slice() else {
            return Err(self.wrong(name, "at least one axis", "none"));
        };
        if index >= *count {
            return Err(self.wrong(
                name,
                format!("more than {index} on the outermost axis"),
                count.to_string(),
            ));
        }
        let (start, end) = info.data_offsets;
        let size = (end - start) / count;
        let start = start + index * size;
        Ok(TensorInfo { dtype: info.dtype, shape: shape.to_vec(), data_offsets: (start, start + size) })
    }

    /// Shape and values of the tensor `name`, stored as F32, F16, BF16 or F64. Needs little memory beside the result.
    ///
    /// # Errors
    /// As [`Self::read`]; [`Error::File`] for other types.
    pub fn read_f32(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>)> {
        self.floats(name, self.info(name)?)
    }

    fn floats(&self, name: &str, info: &TensorInfo) -> Result<(Vec<usize>, Vec<f32>)> {
        let values = match info.dtype {
            Dtype::F32 => self.decode(info, f32::from_le_bytes),
            Dtype::F16 => self.decode(info, |bytes| half::f16::from_le_bytes(bytes).to_f32()),
            Dtype::BF16 => self.decode(info, |bytes| half::bf16::from_le_bytes(bytes).to_f32()),
            Dtype::F64 => self.decode(info, |bytes| f64::from_le_bytes(bytes) as f32),
            other => Err(self.wrong(name, "type F32, F16, BF16 or F64", other.to_string())),
        }?;
        Ok((info.shape.clone(), values))
    }

    /// Shape and values of the tensor `name`, stored as U32.
    ///
    /// # Errors
    /// As [`Self::read_f32`].
    pub fn read_u32(&self, name: &str) -> Result<(Vec<usize>, Vec<u32>)> {
        let info = self.info(name)?;
        let values = match info.dtype {
            Dtype::U32 => self.decode(info, u32::from_le_bytes),
            other => Err(self.wrong(name, "type U32", other.to_string())),
        }?;
        Ok((info.shape.clone(), values))
    }

    /// An [`Error::File`] about the tensor, metadata key or header field `field` of this file.
    pub fn wrong(&self, field: &str, expected: impl Into<String>, found: impl Into<String>) -> Error {
        Error::File {
            path: self.path.clone(),
            field: field.into(),
            expected: expected.into(),
            found: found.into(),
        }
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.tensors.get(name).ok_or_else(|| self.wrong(name, "a tensor", "none of that name"))
    }

    fn read_bytes(&self, info: &TensorInfo) -> Result<RawTensor> {
        let (start, end) = info.data_offsets;
        let mut bytes = self.reserve(end - start)?;
        bytes.resize(end - start, 0);
        self.read_at(&mut bytes, start)?;
        Ok(RawTensor { dtype: info.dtype, shape: info.shape.clone(), bytes })
    }

    /// Reads a tensor in chunks; `convert` makes a value of `N` bytes.
    fn decode<T, const N: usize>(&self, info: &TensorInfo, convert: fn([u8; N]) -> T) -> Result<Vec<T>> {
        let (start, end) = info.data_offsets;
        let mut values = self.reserve((end - start) / N)?;
        let mut buffer = vec![0; CHUNK_BYTES.min(end - start)];
        for offset in (start..end).step_by(CHUNK_BYTES) {
            let chunk = &mut buffer[..CHUNK_BYTES.min(end - offset)];
            self.read_at(chunk, offset)?;
            values.extend(chunk.as_chunks().0.iter().map(|&bytes| convert(bytes)));
        }
        Ok(values)
    }

    fn read_at(&self, buffer: &mut [u8], offset: usize) -> Result<()> {
        read_exact_at(&self.file, buffer, self.data_start + offset as u64).map_err(Error::io(&self.path))
    }

    /// Room for `count` values, or an error: a sparse file may be larger than the memory.
    fn reserve<T>(&self, count: usize) -> Result<Vec<T>> {
        let mut values = Vec::new();
        let reserved = values.try_reserve_exact(count);
        reserved.map_err(|_| Error::io(&self.path)(io::ErrorKind::OutOfMemory.into()))?;
        Ok(values)
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, buffer, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => {
                buffer = &mut buffer[read..];
                offset += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A file of a header and data, under a fresh folder that lives as long as the first value.
    fn file(header: &[u8], data: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.safetensors");
        let bytes = [&(header.len() as u64).to_le_bytes(), header, data].concat();
        std::fs::write(&path, bytes).unwrap();
        (folder, path)
    }

    fn open_error(header: &str, data: &[u8]) -> String {
        let (_folder, path) = file(header.as_bytes(), data);
        let message = SafetensorsFile::open(&path).unwrap_err().to_string();
        assert!(message.contains("t.safetensors: header"), "{message}");
        message
    }

    #[test]
    fn parts_are_read_alone_and_none_beyond_the_last() {
        let header = br#"{"s":{"dtype":"BF16","shape":[2,1,2],"data_offsets":[0,8]},
            "z":{"dtype":"F32","shape":[],"data_offsets":[8,12]}}"#;
        // 1, 2, 3, 4 in bf16.
        let data = [0x80, 0x3F, 0x00, 0x40, 0x40, 0x40, 0x80, 0x40, 0, 0, 0, 0];
        let (_folder, path) = file(header, &data);
        let file = SafetensorsFile::open(path).unwrap();
        assert_eq!(file.read_f32_part("s", 1).unwrap(), (vec![1, 2], vec![3.0, 4.0]));
        assert_eq!(file.read_part("s", 0).unwrap().bytes, data[..4]);
        for (name, index, part) in
            [("s", 2, "more than 2"), ("z", 0, "at least one axis"), ("t", 0, "a tensor")]
        {
            let message = file.read_part(name, index).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn every_float_type_reads_as_f32() {
        let header = br#"{"__metadata__":{"format":"pt"},
            "a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},
            "b":{"dtype":"F16","shape":[1,2],"data_offsets":[8,12]},
            "c":{"dtype":"BF16","shape":[2,1],"data_offsets":[12,16]},
            "d":{"dtype":"F64","shape":[],"data_offsets":[16,24]},
            "e":{"dtype":"I32","shape":[0],"data_offsets":[24,24]}}"#;
        let mut data = Vec::new();
        data.extend(1.5f32.to_le_bytes());
        data.extend(f32::MIN_POSITIVE.to_le_bytes());
        // f16: 1.5 is 0x3E00, the smallest subnormal 2^-24 is 0x0001. bf16: -2 is 0xC000, 1e38 rounds to 0x7E96.
        data.extend([0x00, 0x3E, 0x01, 0x00]);
        data.extend([0x00, 0xC0, 0x96, 0x7E]);
        data.extend(0.1f64.to_le_bytes());
        let (_folder, path) = file(header, &data);
        let file = SafetensorsFile::open(&path).unwrap();
        let read = |name| file.read_f32(name).unwrap();
        assert_eq!(read("a"), (vec![2], vec![1.5, f32::MIN_POSITIVE]));
        assert_eq!(read("b"), (vec![1, 2], vec![1.5, 2f32.powi(-24)]));
        assert_eq!(read("c"), (vec![2, 1], vec![-2.0, f32::from_bits(0x7E96_0000)]));
        assert_eq!(read("d"), (vec![], vec![0.1]));
        assert_eq!(file.read("c").unwrap().bytes, data[12..16]);
        assert_eq!(file.metadata()["format"], "pt");
        assert_eq!(file.names().collect::<Vec<_>>(), ["a", "b", "c", "d", "e"]);
        let message = file.read_f32("e").unwrap_err().to_string();
        assert!(message.contains("e: expected type F32, F16, BF16 or F64, found I32"), "{message}");
        let message = file.read("f").unwrap_err().to_string();
        assert!(message.contains("t.safetensors: f: expected a tensor"), "{message}");
    }

    #[test]
    fn tensors_longer_than_a_chunk_are_read_whole() {
        let count = CHUNK_BYTES / 2 + 3;
        let header =
            format!(r#"{{"a":{{"dtype":"BF16","shape":[{count}],"data_offsets":[0,{}]}}}}"#, 2 * count);
        let data: Vec<u8> = (0..count).flat_map(|i| (i as u16 & 0x3FFF).to_le_bytes()).collect();
        let (_folder, path) = file(header.as_bytes(), &data);
        let values = SafetensorsFile::open(&path).unwrap().read_f32("a").unwrap().1;
        assert_eq!(values.len(), count);
        for (i, value) in values.iter().enumerate() {
            assert_eq!(value.to_bits(), (i as u32 & 0x3FFF) << 16);
        }
    }

    #[test]
    fn lying_headers_are_refused() {
        let one = |fields: &str| format!(r#"{{"a":{{{fields}}}}}"#);
        // Longer and shorter than the file.
        let message = open_error(&one(r#""dtype":"F32","shape":[2],"data_offsets":[0,8]"#), &[0; 4]);
        assert!(message.contains("expected 8 bytes of tensors, found 4"), "{message}");
        open_error(&one(r#""dtype":"F32","shape":[1],"data_offsets":[0,4]"#), &[0; 5]);
        // Size against shape, unknown type, overflow.
        open_error(&one(r#""dtype":"F32","shape":[3],"data_offsets":[0,8]"#), &[0; 8]);
        open_error(&one(r#""dtype":"F33","shape":[2],"data_offsets":[0,8]"#), &[0; 8]);
        open_error(&one(r#""dtype":"F32","shape":[9223372036854775807,8],"data_offsets":[0,8]"#), &[0; 8]);
        open_error(&one(r#""dtype":"F32","shape":[2],"data_offsets":[8,0]"#), &[0; 8]);
        // Overlap and gap.
        let two = |b: &str| {
            format!(
                r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":[0,4]}},
                    "b":{{"dtype":"U8","shape":[4],"data_offsets":{b}}}}}"#
            )
        };
        open_error(&two("[2,6]"), &[0; 6]);
        open_error(&two("[5,9]"), &[0; 9]);
        open_error("[]", &[]);
        open_error("", &[]);
    }

    #[test]
    fn truncated_files_are_refused() {
        let header = br#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#;
        let (_folder, path) = file(header, &[1, 2, 3, 4]);
        let whole = std::fs::read(&path).unwrap();
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert!(matches!(SafetensorsFile::open(&path), Err(Error::File { .. })), "{length} bytes");
        }
        let huge = [&u64::MAX.to_le_bytes()[..], header].concat();
        std::fs::write(&path, huge).unwrap();
        assert!(matches!(SafetensorsFile::open(&path), Err(Error::File { .. })));
    }

    proptest! {
        #[test]
        fn mutated_files_never_panic(edits in prop::collection::vec((0usize..400, any::<u8>()), 1..6), cut in 0usize..500) {
            let header = br#"{"__metadata__":{"x":"y"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},
                "b":{"dtype":"F16","shape":[4],"data_offsets":[24,32]},"c":{"dtype":"U8","shape":[5,1],"data_offsets":[32,37]}}"#;
            let (_folder, path) = file(header, &[7; 37]);
            let mut bytes = std::fs::read(&path).unwrap();
            for (place, value) in edits {
                let place = place % bytes.len();
                bytes[place] = value;
            }
            bytes.truncate(cut.max(bytes.len() / 2));
            std::fs::write(&path, &bytes).unwrap();
            if let Ok(file) = SafetensorsFile::open(&path) {
                for name in file.names() {
                    let raw = file.read(name).unwrap();
                    prop_assert!(raw.bytes.len() <= bytes.len());
                    if let Ok((shape, values)) = file.read_f32(name) {
                        prop_assert_eq!(values.len(), shape.iter().product::<usize>());
                    }
                }
            }
        }
    }
}
