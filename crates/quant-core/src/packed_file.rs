//! Kiln's own file of packed and dense tensors.
//!
//! A safetensors file. A packed weight `P` is several tensors, each named `P` and a suffix:
//!
//! | tensor | type and shape | there is one |
//! | --- | --- | --- |
//! | `P.codes` | U32 `[code_rows, d_output]`, laid out as in [`packing`](crate::packing) | always |
//! | `P.scale_codes` | U8 `[block_columns, block_rows]` under double quantization; the words of integer scales, U32 `[word_rows, d_output]` (see [`SuperLayout`](crate::SuperLayout)) | where scales are not floats |
//! | `P.scales` | the scheme's scale type `[block_rows, block_columns]`; under double quantization the nested scales, F32 `[ceil(scales / 256)]`; of integer scales the factors, F16 `[factor_rows, d_output]` | always |
//! | `P.scale_offset` | F32 `[1]` | under double quantization |
//! | `P.offset_codes` | as `P.scale_codes` | where the scheme has offsets and scales are integers |
//! | `P.offsets` | as `P.scales` | where the scheme has offsets |
//! | `P.input_order` | U32 `[d_input]` | where the inputs are permuted |
//!
//! Dense tensors stand under their own names, as BF16 or F16 where that loses nothing of any value, as F32 otherwise. The
//! metadata hold `kiln.version` ("1"), `kiln.schemes` (a JSON object from path to `{"scheme", "d_input", "d_output"}`) and `kiln.fingerprint` ([`fingerprint`]); every other key is
//! the writer's own and must not begin with `kiln.`. What a reader of version 1 doesn't know is an error, never skipped.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    DoubleScales, Error, PackedWeight, QuantScheme, Result, ScaleType, Scales, SuperBlocks, SuperScales,
    hash::hex,
    packing::code_rows,
    safetensors_file::{Dtype, SafetensorsFile, TensorPlan, Values, stream_safetensors},
    scheme::DOUBLE_BLOCK,
};

const VERSION: &str = "1";
const VERSION_KEY: &str = "kiln.version";
const SCHEMES_KEY: &str = "kiln.schemes";
const FINGERPRINT_KEY: &str = "kiln.fingerprint";
/// Files of earlier versions don't have it.
const DENSE_KEY: &str = "kiln.dense_fingerprint";
const OWN_PREFIX: &str = "kiln.";

/// What the metadata say of one packed weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    scheme: QuantScheme,
    d_input: usize,
    d_output: usize,
}

impl Entry {
    fn of(weight: &PackedWeight) -> Self {
        Self { scheme: weight.scheme, d_input: weight.d_input, d_output: weight.d_output }
    }
}

/// A tensor that belongs to a packed weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Codes,
    ScaleCodes,
    Scales,
    ScaleOffset,
    OffsetCodes,
    Offsets,
    InputOrder,
}

impl Part {
    /// All of them, in the order of the fingerprint.
    const ALL: [Self; 7] = [
        Self::Codes,
        Self::ScaleCodes,
        Self::Scales,
        Self::ScaleOffset,
        Self::OffsetCodes,
        Self::Offsets,
        Self::InputOrder,
    ];

    fn name(self, path: &str) -> String {
        format!("{path}{}", self.suffix())
    }

    const fn suffix(self) -> &'static str {
        match self {
            Self::Codes => ".codes",
            Self::ScaleCodes => ".scale_codes",
            Self::Scales => ".scales",
            Self::ScaleOffset => ".scale_offset",
            Self::OffsetCodes => ".offset_codes",
            Self::Offsets => ".offsets",
            Self::InputOrder => ".input_order",
        }
    }

    /// Whether a weight of this scheme must have the part; `None` leaves it open.
    fn required(self, scheme: &QuantScheme) -> Option<bool> {
        match self {
            Self::Codes | Self::Scales => Some(true),
            Self::ScaleCodes => {
                Some(scheme.scales == ScaleType::Double || scheme.scales.integer_bits().is_some())
            }
            Self::ScaleOffset => Some(scheme.scales == ScaleType::Double),
            Self::OffsetCodes => Some(scheme.has_offsets() && scheme.scales.integer_bits().is_some()),
            Self::Offsets => Some(scheme.has_offsets()),
            Self::InputOrder => None,
        }
    }

    fn dtype(self, scheme: &QuantScheme) -> Dtype {
        match (self, scheme.scales) {
            (Self::Codes | Self::InputOrder, _) => Dtype::U32,
            (Self::ScaleCodes, ScaleType::Double) => Dtype::U8,
            (Self::ScaleCodes | Self::OffsetCodes, _) => Dtype::U32,
            (Self::Scales | Self::Offsets, ScaleType::F16 | ScaleType::Super4 | ScaleType::Super8) => {
                Dtype::F16
            }
            (Self::Scales | Self::Offsets, ScaleType::Bf16) => Dtype::BF16,
            (Self::Scales | Self::Offsets | Self::ScaleOffset, _) => Dtype::F32,
        }
    }

    fn shape(self, Entry { scheme, d_input, d_output }: &Entry) -> Vec<usize> {
        let [rows, columns] = scheme.scale_shape(*d_input, *d_output);
        if let Some(layout) = scheme.super_layout(*d_input, *d_output) {
            match self {
                Self::ScaleCodes | Self::OffsetCodes => return vec![layout.word_rows(), columns],
                Self::Scales | Self::Offsets => return vec![layout.factor_rows(), columns],
                _ => {}
            }
        }
        match self {
            Self::Codes => vec![code_rows(*d_input, scheme.bits()), *d_output],
            Self::ScaleCodes | Self::OffsetCodes => vec![columns, rows],
            Self::Scales if scheme.scales == ScaleType::Double => {
                vec![rows.saturating_mul(columns).div_ceil(DOUBLE_BLOCK)]
            }
            Self::Scales | Self::Offsets => vec![rows, columns],
            Self::ScaleOffset => vec![1],
            Self::InputOrder => vec![*d_input],
        }
    }

    /// The part's content, if the weight has it.
    fn values(self, weight: &PackedWeight) -> Option<Values<'_>> {
        let floats = |values| match self.dtype(&weight.scheme) {
            Dtype::F16 => Values::F16(values),
            Dtype::BF16 => Values::Bf16(values),
            _ => Values::F32(values),
        };
        match (self, &weight.scales) {
            (Self::Codes, _) => Some(Values::U32(&weight.codes)),
            (Self::Scales, Scales::Plain(scales)) => Some(floats(scales)),
            (Self::Scales, Scales::Double(double)) => Some(Values::F32(&double.nested)),
            (Self::ScaleCodes, Scales::Double(double)) => Some(Values::U8(&double.codes)),
            (Self::ScaleOffset, Scales::Double(double)) => {
                Some(Values::F32(std::slice::from_ref(&double.offset)))
            }
            (Self::Scales, Scales::Super(both)) => Some(Values::F16(&both.scales.factors)),
            (Self::ScaleCodes, Scales::Super(both)) => Some(Values::U32(&both.scales.words)),
            (Self::OffsetCodes, Scales::Super(both)) => {
                both.offsets.as_ref().map(|offsets| Values::U32(&offsets.words))
            }
            (Self::Offsets, Scales::Super(both)) => {
                both.offsets.as_ref().map(|offsets| Values::F16(&offsets.factors))
            }
            (Self::ScaleCodes | Self::ScaleOffset | Self::OffsetCodes, _) => None,
            (Self::Offsets, _) => weight.offsets.as_deref().map(floats),
            (Self::InputOrder, _) => weight.input_order.as_deref().map(Values::U32),
        }
    }
}

/// Identifies a set of packed weights: SHA-256, in lower-case hexadecimal.
///
/// Over the paths in ascending order (by bytes); for each path the line `path scheme d_input d_output` (single spaces,
/// a line feed at its end), then the bytes that a [`PackedFile`] holds of its codes, scales (double-quantized: codes,
/// nested scales, offset; integers: codes, factors), offsets (likewise) and input order.
///
/// ```
/// use kiln_quant_core::{HostQuantizer, MinMax, packed_file::fingerprint};
/// let weight: Vec<f32> = (0..64).map(|i| i as f32).collect();
/// let a = MinMax.quantize("a", &weight, 32, 2, &"affine4:32".parse()?)?;
/// let b = MinMax.quantize("a", &weight, 32, 2, &"affine2:32".parse()?)?;
/// assert_eq!(fingerprint([("a", &a)]), fingerprint([("a", &a.clone())]));
/// assert_ne!(fingerprint([("a", &a)]), fingerprint([("a", &b)]));
/// # Ok::<(), kiln_quant_core::Error>(())
/// ```
pub fn fingerprint<'a>(weights: impl IntoIterator<Item = (&'a str, &'a PackedWeight)>) -> String {
    let weights: BTreeMap<&str, &PackedWeight> = weights.into_iter().collect();
    let mut hasher = Sha256::new();
    for (path, weight) in weights {
        update(&mut hasher, path, weight);
    }
    hex(hasher.finalize())
}

fn update(hasher: &mut Sha256, path: &str, weight: &PackedWeight) {
    let PackedWeight { scheme, d_input, d_output, .. } = weight;
    hasher.update(format!("{path} {scheme} {d_input} {d_output}\n"));
    for values in Part::ALL.into_iter().filter_map(|part| part.values(weight)) {
        let Ok(()) = values.encode(|bytes| {
            hasher.update(bytes);
            Ok::<(), std::convert::Infallible>(())
        });
    }
}

/// Adds a dense tensor: the line `name shape`, then its values in little-endian order.
fn update_dense(hasher: &mut Sha256, name: &str, shape: &[usize], values: &[f32]) {
    hasher.update(format!("{name} {shape:?}\n"));
    let Ok(()) = Values::F32(values).encode(|bytes| {
        hasher.update(bytes);
        Ok::<(), std::convert::Infallible>(())
    });
}

/// An open file of packed and dense tensors: the header is checked at once, tensors are read when asked for.
///
/// ```
/// use std::collections::BTreeMap;
/// use kiln_quant_core::{HostQuantizer, MinMax, packed_file::PackedFile};
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("model.safetensors");
/// let weight: Vec<f32> = (0..128).map(|i| (i as f32).sin()).collect();
/// let q_proj = MinMax.quantize("q_proj", &weight, 64, 2, &"nf4:64".parse()?)?;
/// PackedFile::save(&path, [("q_proj", &q_proj)], [("norm.weight", &[2][..], &[1.0, 0.5][..])], &BTreeMap::new())?;
///
/// let file = PackedFile::open(&path)?;
/// file.verify()?;
/// assert_eq!(file.names().collect::<Vec<_>>(), ["norm.weight", "q_proj"]);
/// assert_eq!(file.packed("q_proj")?, q_proj);
/// assert_eq!(file.dense("norm.weight")?, (vec![2], vec![1.0, 0.5]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct PackedFile {
    file: SafetensorsFile,
    packed: BTreeMap<String, Entry>,
    dense: BTreeSet<String>,
    extra: BTreeMap<String, String>,
    fingerprint: String,
    dense_fingerprint: Option<String>,
}

impl PackedFile {
    /// Writes a file: to a temporary sibling first, then renamed. `dense` are name, shape and row-major values.
    ///
    /// # Errors
    /// [`Error::Tensor`] for parts that don't fit together, values that are not finite, scales or offsets that the
    /// scheme's type would round, names that clash, and empty weights; [`Error::Scheme`] for a scheme without a string;
    /// [`Error::Option`] for a metadata key that begins with `kiln.`; [`Error::Io`]. `path` is then as it was before.
    pub fn save<'a>(
        path: impl AsRef<Path>,
        packed: impl IntoIterator<Item = (&'a str, &'a PackedWeight)>,
        dense: impl IntoIterator<Item = (&'a str, &'a [usize], &'a [f32])>,
        extra_metadata: &BTreeMap<String, String>,
    ) -> Result<()> {
        let mut weights = BTreeMap::new();
        for (name, weight) in packed {
            if weights.insert(name, weight).is_some() {
                return Err(clash(name, "a packed weight of the same name"));
            }
        }
        let mut values = BTreeMap::new();
        for (name, shape, data) in dense {
            if values.insert(name, (shape, data)).is_some() {
                return Err(clash(name, "a dense tensor of the same name"));
            }
        }
        let entries = weights.iter().map(|(&name, weight)| (name, Entry::of(weight))).collect();
        let shapes = values.iter().map(|(&name, (shape, _))| (name, shape.to_vec())).collect();
        write(
            path.as_ref(),
            entries,
            shapes,
            |name| Ok::<_, Error>(Cow::Borrowed(weights[name])),
            |name| Ok(Cow::Borrowed(values[name].1)),
            extra_metadata,
        )
    }

    /// As [`save`](Self::save) for a model that isn't in host memory: weights and values are asked for one at a time,
    /// each twice, since the header holds their fingerprints. `packed` are path, scheme, `d_input` and
    /// `d_output`; `dense` are name and shape.
    ///
    /// # Errors
    /// As [`save`](Self::save), and whatever `read_packed` and `read_dense` fail with.
    pub fn save_streamed<E: From<Error>>(
        path: impl AsRef<Path>,
        packed: impl IntoIterator<Item = (String, QuantScheme, usize, usize)>,
        dense: impl IntoIterator<Item = (String, Vec<usize>)>,
        mut read_packed: impl FnMut(&str) -> Result<PackedWeight, E>,
        mut read_dense: impl FnMut(&str) -> Result<Vec<f32>, E>,
        extra_metadata: &BTreeMap<String, String>,
    ) -> Result<(), E> {
        let (mut entries, mut shapes) = (BTreeMap::new(), BTreeMap::new());
        let packed: Vec<_> = packed.into_iter().collect();
        let dense: Vec<_> = dense.into_iter().collect();
        for (name, scheme, d_input, d_output) in &packed {
            let entry = Entry { scheme: *scheme, d_input: *d_input, d_output: *d_output };
            if entries.insert(name.as_str(), entry).is_some() {
                return Err(clash(name, "a packed weight of the same name").into());
            }
        }
        for (name, shape) in &dense {
            if shapes.insert(name.as_str(), shape.clone()).is_some() {
                return Err(clash(name, "a dense tensor of the same name").into());
            }
        }
        write(
            path.as_ref(),
            entries,
            shapes,
            |name| read_packed(name).map(Cow::Owned),
            |name| read_dense(name).map(Cow::Owned),
            extra_metadata,
        )
    }

    /// Opens a file and checks version, metadata, and type and shape of every tensor, without reading any.
    ///
    /// # Errors
    /// [`Error::File`] naming the key or tensor that is missing, unknown or wrong; [`Error::Io`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let file = SafetensorsFile::open(path.as_ref())?;
        let mut metadata: BTreeMap<String, String> = file.metadata().clone().into_iter().collect();
        let mut take = |key: &str, expected: &str| {
            metadata.remove(key).ok_or_else(|| file.wrong(key, expected, "no such metadata key"))
        };
        let version = take(VERSION_KEY, "the version of a file of packed weights")?;
        if version != VERSION {
            return Err(file.wrong(VERSION_KEY, format!("version {VERSION}"), format!("\"{version}\"")));
        }
        let schemes = take(SCHEMES_KEY, "the schemes of the packed weights")?;
        let packed: BTreeMap<String, Entry> = serde_json::from_str(&schemes).map_err(|error| {
            let expected = "a JSON object from path to scheme, d_input and d_output";
            file.wrong(SCHEMES_KEY, expected, error.to_string())
        })?;
        let fingerprint = take(FINGERPRINT_KEY, "the SHA-256 of the packed weights")?;
        let dense_fingerprint = metadata.remove(DENSE_KEY);
        let digit = |byte: &u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte);
        for (key, hash) in [(FINGERPRINT_KEY, Some(&fingerprint)), (DENSE_KEY, dense_fingerprint.as_ref())] {
            if let Some(hash) = hash.filter(|hash| hash.len() != 64 || !hash.as_bytes().iter().all(digit)) {
                return Err(file.wrong(key, "64 lower-case hexadecimal digits", format!("\"{hash}\"")));
            }
        }
        if let Some(key) = metadata.keys().find(|key| key.starts_with(OWN_PREFIX)) {
            return Err(file.wrong(key, format!("a metadata key of version {VERSION}"), "an unknown one"));
        }
        let dense = check_tensors(&file, &packed)?;
        Ok(Self { file, packed, dense, extra: metadata, fingerprint, dense_fingerprint })
    }

    /// Paths of packed weights and names of dense tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let names: BTreeSet<&String> = self.packed.keys().chain(&self.dense).collect();
        names.into_iter().map(String::as_str)
    }

    /// The scheme of the packed weight `name`; `None` for dense tensors and names that the file doesn't hold.
    pub fn scheme(&self, name: &str) -> Option<&QuantScheme> {
        self.packed.get(name).map(|entry| &entry.scheme)
    }

    /// The writer's own metadata.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.extra
    }

    /// The [`fingerprint`] that the file says its packed weights have; [`Self::verify`] says whether it is true.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// One for all that the file holds: SHA-256 of its fingerprints, of packed weights and of dense tensors.
    pub fn whole_fingerprint(&self) -> String {
        let dense = self.dense_fingerprint.as_deref().unwrap_or_default();
        hex(Sha256::digest(format!("{} {dense}", self.fingerprint)))
    }

    /// Sizes of a packed weight (`[d_output, d_input]`) or of a dense tensor, and the bytes of all that is stored of it,
    /// by the header.
    ///
    /// # Errors
    /// [`Error::File`] if there is none.
    pub fn describe(&self, name: &str) -> Result<(Vec<usize>, u64)> {
        let bytes = |name: &str| -> Result<u64> {
            let (dtype, shape) = self.file.describe(name)?;
            Ok((shape.iter().product::<usize>() * dtype.bitsize() / 8) as u64)
        };
        let Some(entry) = self.packed.get(name) else {
            return Ok((self.file.describe(name)?.1.to_vec(), bytes(name)?));
        };
        let parts = Part::ALL.into_iter().map(|part| part.name(name)).filter(|part| self.file.contains(part));
        let stored = parts.map(|part| bytes(&part)).sum::<Result<u64>>()?;
        Ok((vec![entry.d_output, entry.d_input], stored))
    }

    /// Reads the packed weight `name`.
    ///
    /// # Errors
    /// [`Error::File`] if there is none, its parts don't fit together or a scale or offset is not finite; [`Error::Io`].
    pub fn packed(&self, name: &str) -> Result<PackedWeight> {
        let Some(Entry { scheme, d_input, d_output }) = self.packed.get(name).copied() else {
            return Err(self.file.wrong(name, "a packed weight", self.instead(name)));
        };
        let floats = |part: Part| self.file.read_f32(&part.name(name)).map(|(_, values)| values);
        let scales = match scheme.scales {
            ScaleType::Double => Scales::Double(DoubleScales {
                codes: self.file.read(&Part::ScaleCodes.name(name))?.bytes,
                nested: floats(Part::Scales)?,
                offset: floats(Part::ScaleOffset)?[0],
            }),
            ScaleType::Super4 | ScaleType::Super8 => {
                let blocks = |codes: Part, factors: Part| {
                    let words = self.file.read_u32(&codes.name(name))?.1;
                    Ok::<_, Error>(SuperBlocks { words, factors: floats(factors)? })
                };
                let offsets = scheme.has_offsets().then(|| blocks(Part::OffsetCodes, Part::Offsets));
                Scales::Super(SuperScales {
                    scales: blocks(Part::ScaleCodes, Part::Scales)?,
                    offsets: offsets.transpose()?,
                })
            }
            _ => Scales::Plain(floats(Part::Scales)?),
        };
        let apart = scheme.has_offsets() && !matches!(scales, Scales::Super(_));
        let order = Part::InputOrder.name(name);
        let order = self.file.contains(&order).then(|| self.file.read_u32(&order)).transpose()?;
        let weight = PackedWeight {
            scheme,
            d_input,
            d_output,
            codes: self.file.read_u32(&Part::Codes.name(name))?.1,
            scales,
            offsets: apart.then(|| floats(Part::Offsets)).transpose()?,
            input_order: order.map(|(_, order)| order),
        };
        check_weight(name, &weight).map_err(|error| self.in_file(error))?;
        Ok(weight)
    }

    /// Shape and values of the dense tensor `name`.
    ///
    /// # Errors
    /// [`Error::File`] if there is none, or a value is not finite; [`Error::Io`].
    pub fn dense(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>)> {
        if !self.dense.contains(name) {
            return Err(self.file.wrong(name, "a dense tensor", self.instead(name)));
        }
        let (shape, values) = self.file.read_f32(name)?;
        check_finite(name, &values).map_err(|error| self.in_file(error))?;
        Ok((shape, values))
    }

    /// Reads all tensors, one at a time, and compares their fingerprints with the file's: a second for each gigabyte or so.
    ///
    /// # Errors
    /// [`Error::File`] if they differ, or as [`Self::packed`].
    pub fn verify(&self) -> Result<()> {
        let mut hasher = Sha256::new();
        for path in self.packed.keys() {
            update(&mut hasher, path, &self.packed(path)?);
        }
        let found = hex(hasher.finalize());
        if found != self.fingerprint {
            return Err(self.file.wrong(FINGERPRINT_KEY, self.fingerprint.as_str(), found));
        }
        let Some(expected) = &self.dense_fingerprint else { return Ok(()) };
        let mut hasher = Sha256::new();
        for name in &self.dense {
            let (shape, values) = self.dense(name)?;
            update_dense(&mut hasher, name, &shape, &values);
        }
        let found = hex(hasher.finalize());
        match found == *expected {
            true => Ok(()),
            false => Err(self.file.wrong(DENSE_KEY, expected, found)),
        }
    }

    /// What stands under a name that was asked for as something else.
    fn instead(&self, name: &str) -> &'static str {
        match (self.packed.contains_key(name), self.dense.contains(name)) {
            (true, _) => "a packed weight",
            (_, true) => "a dense tensor",
            _ => "none of that name",
        }
    }

    /// The same error, with the file's name.
    fn in_file(&self, error: Error) -> Error {
        match error {
            Error::Tensor { name, expected, found } => self.file.wrong(&name, expected, found),
            other => other,
        }
    }
}

/// Checks every tensor of the file against what the metadata say; returns the names of the dense ones.
fn check_tensors(file: &SafetensorsFile, packed: &BTreeMap<String, Entry>) -> Result<BTreeSet<String>> {
    let mut dense: BTreeSet<String> = file.names().map(str::to_owned).collect();
    for (path, entry) in packed {
        if entry.d_input == 0 || entry.d_output == 0 {
            let found = format!("{} inputs, {} outputs", entry.d_input, entry.d_output);
            return Err(file.wrong(
                &format!("{SCHEMES_KEY}: {path}"),
                "at least one input and output",
                found,
            ));
        }
        for part in Part::ALL {
            let name = part.name(path);
            let required = part.required(&entry.scheme);
            let there = dense.contains(&name);
            if !there && required != Some(true) {
                continue;
            }
            if there && required == Some(false) {
                return Err(file.wrong(&name, format!("none under the scheme {}", entry.scheme), "a tensor"));
            }
            let (dtype, shape) = file.describe(&name)?;
            let expected = (part.dtype(&entry.scheme), part.shape(entry));
            if (dtype, shape) != (expected.0, expected.1.as_slice()) {
                let expected = format!("{} {:?} under the scheme {}", expected.0, expected.1, entry.scheme);
                return Err(file.wrong(&name, expected, format!("{dtype} {shape:?}")));
            }
            dense.remove(&name);
        }
    }
    for name in &dense {
        if packed.contains_key(name) {
            return Err(file.wrong(name, "no tensor under the path of a packed weight", "one"));
        }
        let (dtype, _) = file.describe(name)?;
        if ![Dtype::F32, Dtype::BF16, Dtype::F16].contains(&dtype) {
            return Err(file.wrong(name, "F32, BF16 or F16 in a dense tensor", dtype.to_string()));
        }
    }
    Ok(dense)
}

/// Writes a file; each weight and tensor is asked for once for the fingerprints and once to be written.
fn write<'a, E: From<Error>>(
    path: &Path,
    entries: BTreeMap<&str, Entry>,
    dense: BTreeMap<&str, Vec<usize>>,
    mut read_packed: impl FnMut(&str) -> Result<Cow<'a, PackedWeight>, E>,
    mut read_dense: impl FnMut(&str) -> Result<Cow<'a, [f32]>, E>,
    extra: &BTreeMap<String, String>,
) -> Result<(), E> {
    let (mut plan, mut origin) = (Vec::new(), BTreeMap::new());
    let mut hasher = Sha256::new();
    for (&path, entry) in &entries {
        let weight = read_packed(path)?;
        check_weight(path, &weight)?;
        if Entry::of(&weight) != *entry {
            let found = Error::Tensor {
                name: path.into(),
                expected: format!(
                    "{} inputs, {} outputs, scheme {}",
                    entry.d_input, entry.d_output, entry.scheme
                ),
                found: format!("{}, {}, {}", weight.d_input, weight.d_output, weight.scheme),
            };
            return Err(found.into());
        }
        update(&mut hasher, path, &weight);
        for part in Part::ALL.into_iter().filter(|part| part.values(&weight).is_some()) {
            let name = part.name(path);
            origin.insert(name.clone(), (path, Some(part)));
            plan.push(TensorPlan { name, dtype: part.dtype(&entry.scheme), shape: part.shape(entry) });
        }
    }
    let mut dense_hasher = Sha256::new();
    for (&name, shape) in &dense {
        let values = read_dense(name)?;
        update_dense(&mut dense_hasher, name, shape, &values);
        if let Some(path) = owner(name, |path| entries.contains_key(path)) {
            return Err(clash(name, &format!("the packed weight {path}")).into());
        }
        origin.insert(name.to_owned(), (name, None));
        plan.push(TensorPlan { name: name.into(), dtype: smallest(&values), shape: shape.clone() });
    }
    let fingerprints = [hasher, dense_hasher].map(|hasher| hex(hasher.finalize()));
    let metadata = metadata(&entries, fingerprints, extra)?;
    stream_safetensors(path, plan, &metadata, |tensor, put| match origin[&tensor.name] {
        (path, Some(part)) => {
            let weight = read_packed(path)?;
            part.values(&weight).map_or(Ok(()), |values| put(&values))
        }
        (name, None) => {
            let values = read_dense(name)?;
            check_finite(name, &values)?;
            put(&match tensor.dtype {
                Dtype::BF16 => Values::Bf16(&values),
                Dtype::F16 => Values::F16(&values),
                _ => Values::F32(&values),
            })
        }
    })
}

/// The smallest type that holds all of these values as they are.
fn smallest(values: &[f32]) -> Dtype {
    let holds = |scale: ScaleType| values.iter().all(|x| scale.round(*x).to_bits() == x.to_bits());
    let types = [(ScaleType::Bf16, Dtype::BF16), (ScaleType::F16, Dtype::F16)];
    types.into_iter().find(|(scale, _)| holds(*scale)).map_or(Dtype::F32, |(_, dtype)| dtype)
}

/// The packed weight whose name, or a part's, is `name`.
fn owner(name: &str, is_packed: impl Fn(&str) -> bool) -> Option<&str> {
    let parts = Part::ALL.into_iter().filter_map(|part| name.strip_suffix(part.suffix()));
    std::iter::once(name).chain(parts).find(|path| is_packed(path))
}

fn clash(name: &str, other: &str) -> Error {
    Error::Tensor {
        name: name.into(),
        expected: "a name of its own".into(),
        found: format!("one taken by {other}"),
    }
}

fn metadata(
    entries: &BTreeMap<&str, Entry>,
    [fingerprint, dense_fingerprint]: [String; 2],
    extra: &BTreeMap<String, String>,
) -> Result<BTreeMap<String, String>> {
    if let Some(key) = extra.keys().find(|key| key.starts_with(OWN_PREFIX)) {
        return Err(Error::Option {
            option: "extra_metadata".into(),
            expected: format!("keys that don't begin with {OWN_PREFIX}"),
            found: key.clone(),
        });
    }
    let mut metadata = extra.clone();
    metadata.insert(VERSION_KEY.into(), VERSION.into());
    metadata.insert(SCHEMES_KEY.into(), serde_json::json!(entries).to_string());
    metadata.insert(FINGERPRINT_KEY.into(), fingerprint);
    metadata.insert(DENSE_KEY.into(), dense_fingerprint);
    Ok(metadata)
}

/// Whether a weight can be written and read back as it is.
fn check_weight(name: &str, weight: &PackedWeight) -> Result<()> {
    let PackedWeight { scheme, d_input, d_output, .. } = weight;
    if scheme.to_string().parse::<QuantScheme>()? != *scheme {
        let reason = format!("the string doesn't say all of {scheme:?}");
        return Err(Error::Scheme { text: scheme.to_string(), reason });
    }
    if *d_input == 0 || *d_output == 0 {
        return Err(Error::Tensor {
            name: name.into(),
            expected: "at least one input and output".into(),
            found: format!("{d_input} inputs, {d_output} outputs"),
        });
    }
    weight.validate(name)?;
    for part in Part::ALL {
        let (values, stored) = match part.values(weight) {
            Some(Values::F32(values)) => (values, ScaleType::F32),
            Some(Values::F16(values)) => (values, ScaleType::F16),
            Some(Values::Bf16(values)) => (values, ScaleType::Bf16),
            _ => continue,
        };
        check_finite(&part.name(name), values)?;
        if let Some(value) = values.iter().find(|value| stored.round(**value).to_bits() != value.to_bits()) {
            return Err(Error::Tensor {
                name: part.name(name),
                expected: format!("values that {stored:?} holds exactly"),
                found: format!("{value:e}"),
            });
        }
    }
    Ok(())
}

fn check_finite(name: &str, values: &[f32]) -> Result<()> {
    match values.iter().position(|value| !value.is_finite()) {
        Some(i) => Err(Error::Tensor {
            name: name.into(),
            expected: "finite values".into(),
            found: format!("{} at element {i}", values[i]),
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
