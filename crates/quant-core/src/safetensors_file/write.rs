//! Writing: whole or not at all, the same bytes for the same tensors.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Write},
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
    /// The same bits, as I32.
    I32(&'a [u32]),
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
            Self::I32(_) => Dtype::I32,
            Self::F32(_) => Dtype::F32,
            Self::F16(_) => Dtype::F16,
            Self::Bf16(_) => Dtype::BF16,
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Self::U8(values) => values.len(),
            Self::U32(values) | Self::I32(values) => values.len(),
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
    pub fn encode<E>(&self, mut take: impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        match self {
            Self::U8(values) => take(values),
            Self::U32(values) | Self::I32(values) => encode(values, |value| value.to_le_bytes(), take),
            Self::F32(values) => encode(values, |value| value.to_le_bytes(), take),
            Self::F16(values) => encode(values, |value| half::f16::from_f32(value).to_le_bytes(), take),
            Self::Bf16(values) => encode(values, |value| half::bf16::from_f32(value).to_le_bytes(), take),
        }
    }
}

fn encode<T: Copy, const N: usize, E>(
    values: &[T],
    bytes: impl Fn(T) -> [u8; N],
    mut take: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
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

/// A tensor that will be written: what the header says of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorPlan {
    /// Its name.
    pub name: String,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
}

impl TensorPlan {
    /// Bytes of the tensor; `None` beyond what a file can hold.
    pub fn bytes(&self) -> Option<usize> {
        let count = self.shape.iter().try_fold(1usize, |count, size| count.checked_mul(*size))?;
        Some(count.checked_mul(self.dtype.bitsize())? / 8)
    }
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
    let plan_of = |tensor: &NewTensor| TensorPlan {
        name: tensor.name.clone(),
        dtype: tensor.values.dtype(),
        shape: tensor.shape.clone(),
    };
    let plan: Vec<TensorPlan> = tensors.iter().map(plan_of).collect();
    for (tensor, plan) in tensors.iter().zip(&plan) {
        let bytes = tensor.values.len() * plan.dtype.bitsize() / 8;
        if plan.bytes() != Some(bytes) {
            let expected = format!("values for the shape {:?}", plan.shape);
            return Err(fail(&plan.name, expected, tensor.values.len().to_string()));
        }
    }
    let by_name: BTreeMap<&str, &Values> =
        tensors.iter().map(|tensor| (tensor.name.as_str(), &tensor.values)).collect();
    stream_safetensors(path, plan, metadata, |tensor, put| put(by_name[tensor.name.as_str()]))
}

/// As [`write_safetensors`] for tensors that aren't all in memory: `produce` is asked for one tensor of `plan` at a
/// time, wide types first and then by name, and hands its values to the function it is given.
///
/// # Errors
/// As [`write_safetensors`], and whatever `produce` fails with; `path` is then as it was before.
pub fn stream_safetensors<E: From<Error>>(
    path: &Path,
    mut plan: Vec<TensorPlan>,
    metadata: &BTreeMap<String, String>,
    mut produce: impl FnMut(&TensorPlan, &mut dyn FnMut(&Values) -> Result<(), E>) -> Result<(), E>,
) -> Result<(), E> {
    check(&plan)?;
    plan.sort_by(|a, b| b.dtype.bitsize().cmp(&a.dtype.bitsize()).then_with(|| a.name.cmp(&b.name)));
    let header = header(&plan, metadata);
    if header.len() as u64 > MAX_HEADER_BYTES {
        return Err(E::from(Error::File {
            path: path.into(),
            field: "header".into(),
            expected: format!("at most {MAX_HEADER_BYTES} bytes of names, shapes and metadata"),
            found: header.len().to_string(),
        }));
    }
    // `write_atomically` carries the operating system's errors only; others wait here.
    let mut refusal = None;
    let written = write_atomically(path, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        for tensor in &plan {
            let result = stream_tensor(path, tensor, &mut produce, file);
            if let Err(error) = result {
                refusal = Some(error);
                return Err(io::ErrorKind::Other.into());
            }
        }
        Ok(())
    });
    match refusal {
        Some(error) => Err(error),
        None => written.map_err(E::from),
    }
}

/// Writes what `produce` gives for `tensor`, which must be as much as the header says.
fn stream_tensor<E: From<Error>>(
    path: &Path,
    tensor: &TensorPlan,
    produce: &mut impl FnMut(&TensorPlan, &mut dyn FnMut(&Values) -> Result<(), E>) -> Result<(), E>,
    file: &mut impl Write,
) -> Result<(), E> {
    let (bytes, mut found) = (tensor.bytes().unwrap_or(0), 0);
    produce(tensor, &mut |values| {
        found += values.len() * values.dtype().bitsize() / 8;
        if values.dtype() != tensor.dtype || found > bytes {
            let found = format!("{found} bytes of {}", values.dtype());
            return Err(E::from(fail(&tensor.name, format!("{bytes} bytes of {}", tensor.dtype), found)));
        }
        values.encode(|bytes| file.write_all(bytes)).map_err(|error| E::from(Error::io(path)(error)))
    })?;
    if found == bytes {
        return Ok(());
    }
    let expected = format!("{bytes} bytes of values for the shape {:?}", tensor.shape);
    Err(E::from(fail(&tensor.name, expected, found.to_string())))
}

fn fail(name: &str, expected: impl Into<String>, found: String) -> Error {
    Error::Tensor { name: name.into(), expected: expected.into(), found }
}

fn check(plan: &[TensorPlan]) -> Result<()> {
    let mut names = BTreeSet::new();
    let mut total = 0usize;
    for tensor in plan {
        if tensor.name == "__metadata__" || !names.insert(&tensor.name) {
            return Err(fail(&tensor.name, "a name of its own", "one that is taken".into()));
        }
        let sum = tensor.bytes().and_then(|bytes| total.checked_add(bytes));
        total = sum.ok_or_else(|| fail(&tensor.name, "sizes of a file", format!("{:?}", tensor.shape)))?;
    }
    Ok(())
}

/// The header, padded to a multiple of eight bytes.
fn header(plan: &[TensorPlan], metadata: &BTreeMap<String, String>) -> String {
    let mut header = Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), json!(metadata));
    }
    let mut start = 0;
    for tensor in plan {
        let end = start + tensor.bytes().unwrap_or(0);
        let entry =
            json!({"dtype": tensor.dtype.to_string(), "shape": tensor.shape, "data_offsets": [start, end]});
        header.insert(tensor.name.clone(), entry);
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

    #[test]
    fn streamed_tensors_must_be_what_the_plan_says() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.safetensors");
        let plan =
            |name: &str, dtype, shape: &[usize]| TensorPlan { name: name.into(), dtype, shape: shape.into() };
        let two = vec![plan("b", Dtype::F16, &[2]), plan("a", Dtype::I32, &[3])];
        let mut asked = Vec::new();
        stream_safetensors::<Error>(&path, two.clone(), &BTreeMap::new(), |tensor, put| {
            asked.push(tensor.name.clone());
            match tensor.name.as_str() {
                // In two pieces.
                "a" => put(&Values::I32(&[u32::MAX])).and_then(|()| put(&Values::I32(&[2, 3]))),
                _ => put(&Values::F16(&[0.5, -1.0])),
            }
        })
        .unwrap();
        assert_eq!(asked, ["a", "b"]);
        let file = SafetensorsFile::open(&path).unwrap();
        let a = file.read("a").unwrap();
        assert_eq!((a.dtype, &a.bytes[..8]), (Dtype::I32, &[255, 255, 255, 255, 2, 0, 0, 0][..]));
        assert_eq!(file.read_f32("b").unwrap(), (vec![2], vec![0.5, -1.0]));
        let before = std::fs::read(&path).unwrap();
        for (values, part) in [
            (Values::F16(&[1.0][..]), "expected 4 bytes of values for the shape [2], found 2"),
            (Values::F16(&[1.0; 3][..]), "found 6 bytes of F16"),
            (Values::F32(&[1.0][..]), "bytes of F16, found 4 bytes of F32"),
        ] {
            let refused =
                stream_safetensors::<Error>(&path, two[..1].to_vec(), &BTreeMap::new(), |_, put| {
                    put(&values)
                });
            let message = refused.unwrap_err().to_string();
            assert!(message.contains("\"b\"") && message.contains(part), "{message}");
        }
        let refused: Result<()> = stream_safetensors(&path, two, &BTreeMap::new(), |tensor, _| {
            Err(fail(&tensor.name, "more", "less".into()))
        });
        assert_eq!(refused.unwrap_err().to_string(), "tensor \"a\": expected more, found less");
        // What was there before is untouched, and nothing lies beside it.
        assert_eq!(std::fs::read(&path).unwrap(), before);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
