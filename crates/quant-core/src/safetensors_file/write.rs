//! Writing: whole or not at all, the same bytes for the same tensors.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write,
    path::Path,
};

use serde_json::{Map, Value, json};

use super::{Dtype, MAX_HEADER_BYTES};
use crate::{Error, Result, write_atomically};

/// Values encoded at once.
const CHUNK: usize = 1 << 14;

/// What a tensor holds, and the type it is written in.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Values<'a> {
    /// As U8.
    U8(&'a [u8]),
    /// As U32.
    U32(&'a [u32]),
    /// As F32.
    F32(&'a [f32]),
    /// Rounded to F16.
    F16(&'a [f32]),
    /// Rounded to BF16.
    Bf16(&'a [f32]),
}

impl Values<'_> {
    /// The type they are written in.
    pub fn dtype(&self) -> Dtype {
        match self {
            Self::U8(_) => Dtype::U8,
            Self::U32(_) => Dtype::U32,
            Self::F32(_) => Dtype::F32,
            Self::F16(_) => Dtype::F16,
            Self::Bf16(_) => Dtype::BF16,
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Self::U8(values) => values.len(),
            Self::U32(values) => values.len(),
            Self::F32(values) | Self::F16(values) | Self::Bf16(values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Hands the little-endian bytes to `take`, some at a time.
    ///
    /// # Errors
    /// The first error of `take`.
    pub fn encode<E>(
        &self,
        mut take: impl FnMut(&[u8]) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        match self {
            Self::U8(values) => take(values),
            Self::U32(values) => encode(values, |value| value.to_le_bytes(), take),
            Self::F32(values) => encode(values, |value| value.to_le_bytes(), take),
            Self::F16(values) => encode(values, |value| half::f16::from_f32(value).to_le_bytes(), take),
            Self::Bf16(values) => encode(values, |value| half::bf16::from_f32(value).to_le_bytes(), take),
        }
    }
}

fn encode<T: Copy, const N: usize, E>(
    values: &[T],
    bytes: impl Fn(T) -> [u8; N],
    mut take: impl FnMut(&[u8]) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let mut buffer = Vec::with_capacity(N * CHUNK.min(values.len()));
    for chunk in values.chunks(CHUNK) {
        buffer.clear();
        buffer.extend(chunk.iter().flat_map(|&value| bytes(value)));
        take(&buffer)?;
    }
    Ok(())
}

/// A tensor to be written.
#[derive(Debug, Clone)]
pub struct NewTensor<'a> {
    /// Its name.
    pub name: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Its content, row-major.
    pub values: Values<'a>,
}

/// Writes a safetensors file as [`write_atomically`] does. Wide types go first, names are sorted, so that every tensor
/// is aligned and the same content gives the same bytes.
///
/// # Errors
/// [`Error::Tensor`] for a name given twice, the reserved name `__metadata__`, or values that don't fill the shape;
/// [`Error::File`] for a header beyond the format's limit; [`Error::Io`].
pub fn write_safetensors(
    path: &Path,
    tensors: &[NewTensor],
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    check(tensors)?;
    let mut tensors: Vec<&NewTensor> = tensors.iter().collect();
    tensors.sort_by(|a, b| {
        let bits = |tensor: &NewTensor| tensor.values.dtype().bitsize();
        bits(b).cmp(&bits(a)).then_with(|| a.name.cmp(&b.name))
    });
    let header = header(&tensors, metadata);
    if header.len() as u64 > MAX_HEADER_BYTES {
        return Err(Error::File {
            path: path.into(),
            field: "header".into(),
            expected: format!("at most {MAX_HEADER_BYTES} bytes of names, shapes and metadata"),
            found: header.len().to_string(),
        });
    }
    write_atomically(path, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        tensors.iter().try_for_each(|tensor| tensor.values.encode(|bytes| file.write_all(bytes)))
    })
}

fn check(tensors: &[NewTensor]) -> Result<()> {
    let mut names = BTreeSet::new();
    for NewTensor { name, shape, values } in tensors {
        let fail =
            |expected: String, found: String| Err(Error::Tensor { name: name.clone(), expected, found });
        if name == "__metadata__" || !names.insert(name) {
            return fail("a name of its own".into(), "one that is taken".into());
        }
        let count = shape.iter().try_fold(1usize, |count, size| count.checked_mul(*size));
        if count != Some(values.len()) {
            return fail(format!("values for the shape {shape:?}"), values.len().to_string());
        }
    }
    Ok(())
}

/// The header, padded to a multiple of eight bytes.
fn header(tensors: &[&NewTensor], metadata: &BTreeMap<String, String>) -> String {
    let mut header = Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), json!(metadata));
    }
    let mut start = 0;
    for NewTensor { name, shape, values } in tensors {
        let end = start + values.len() * values.dtype().bitsize() / 8;
        let entry =
            json!({"dtype": values.dtype().to_string(), "shape": shape, "data_offsets": [start, end]});
        header.insert(name.clone(), entry);
        start = end;
    }
    let mut header = Value::Object(header).to_string();
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    header
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::safetensors_file::SafetensorsFile;

    fn tensor<'a>(name: &str, shape: &[usize], values: Values<'a>) -> NewTensor<'a> {
        NewTensor { name: name.into(), shape: shape.into(), values }
    }

    #[test]
    fn every_type_reads_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.safetensors");
        let long: Vec<u32> = (0..CHUNK as u32 + 5).map(|i| i.wrapping_mul(0x9E37_79B9)).collect();
        // Both halves hold 1.5 and -2 exactly; 1 + 2^-12 is a tie for neither and rounds to 1.
        let floats = [1.5, -2.0, 1.0 + 2f32.powi(-12)];
        write_safetensors(
            &path,
            &[
                tensor("b", &[3], Values::U8(&[1, 2, 255])),
                tensor("h", &[3, 1], Values::F16(&floats)),
                tensor("g", &[1, 3], Values::Bf16(&floats)),
                tensor("u", &[long.len()], Values::U32(&long)),
                tensor("f", &[3], Values::F32(&floats)),
                tensor("e", &[0, 7], Values::F32(&[])),
            ],
            &BTreeMap::from([("who".into(), "\"me\"\n".into())]),
        )
        .unwrap();
        let file = SafetensorsFile::open(&path).unwrap();
        assert_eq!(file.metadata()["who"], "\"me\"\n");
        assert_eq!(file.read("b").unwrap().bytes, [1, 2, 255]);
        assert_eq!(file.read_u32("u").unwrap(), (vec![long.len()], long));
        assert_eq!(file.read_f32("f").unwrap(), (vec![3], floats.to_vec()));
        assert_eq!(file.read_f32("h").unwrap(), (vec![3, 1], vec![1.5, -2.0, 1.0]));
        assert_eq!(file.read_f32("g").unwrap(), (vec![1, 3], vec![1.5, -2.0, 1.0]));
        assert_eq!(file.read_f32("e").unwrap(), (vec![0, 7], vec![]));
        let message = file.read_u32("f").unwrap_err().to_string();
        assert!(message.contains("f: expected type U32, found F32"), "{message}");
        // The reference implementation takes the file too, and finds every tensor aligned to its type.
        let bytes = std::fs::read(&path).unwrap();
        let reference = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(reference.tensor("u").unwrap().data()[4..8], 0x9E37_79B9u32.to_le_bytes());
        let places: Vec<usize> = ["e", "f", "u", "g", "h", "b"]
            .map(|name| reference.tensor(name).unwrap().data().as_ptr() as usize - bytes.as_ptr() as usize)
            .to_vec();
        assert!(places.is_sorted() && places[..3].iter().all(|place| place % 4 == 0), "{places:?}");
    }

    #[test]
    fn names_and_shapes_that_lie_are_refused_before_anything_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.safetensors");
        let refused = |tensors: &[NewTensor], name: &str| {
            let message = write_safetensors(&path, tensors, &BTreeMap::new()).unwrap_err().to_string();
            assert!(message.contains(&format!("\"{name}\"")), "{message}");
        };
        refused(&[tensor("a", &[2], Values::U8(&[1]))], "a");
        refused(&[tensor("a", &[usize::MAX, 2], Values::U8(&[1]))], "a");
        refused(&[tensor("a", &[1], Values::U8(&[1])), tensor("a", &[1], Values::F32(&[1.0]))], "a");
        refused(&[tensor("__metadata__", &[1], Values::U8(&[1]))], "__metadata__");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
