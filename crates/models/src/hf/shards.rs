//! The tensors of a folder: one file, or the shards that an index lists; safetensors, or else PyTorch's own.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use kiln_quant_core::safetensors_file::{Dtype, RawTensor, SafetensorsFile};

use super::{
    json::{Fields, read_object},
    pytorch::PytorchFile,
};
use crate::{Error, Result, source::DenseTensor};

/// Longest index of a sharded checkpoint.
const MAX_INDEX_BYTES: u64 = 100_000_000;
const PYTORCH: &str = "pytorch_model.bin";
const PYTORCH_INDEX: &str = "pytorch_model.bin.index.json";

/// A file of tensors.
#[derive(Debug)]
pub(super) enum TensorFile {
    Safetensors(SafetensorsFile),
    Pytorch(PytorchFile),
}

impl TensorFile {
    fn open(path: PathBuf) -> Result<Self> {
        match path.extension().is_some_and(|extension| extension == "bin") {
            true => PytorchFile::open(path).map(Self::Pytorch),
            false => Ok(Self::Safetensors(SafetensorsFile::open(path)?)),
        }
    }

    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Safetensors(file) => file.path(),
            Self::Pytorch(file) => file.path(),
        }
    }

    fn names(&self) -> Vec<String> {
        match self {
            Self::Safetensors(file) => file.names().map(str::to_owned).collect(),
            Self::Pytorch(file) => file.names().map(str::to_owned).collect(),
        }
    }

    fn describe(&self, name: &str) -> Result<(Dtype, &[usize])> {
        match self {
            Self::Safetensors(file) => Ok(file.describe(name)?),
            Self::Pytorch(file) => file.describe(name),
        }
    }

    fn read(&self, name: &str) -> Result<RawTensor> {
        match self {
            Self::Safetensors(file) => Ok(file.read(name)?),
            Self::Pytorch(file) => file.read(name),
        }
    }

    fn read_f32(&self, name: &str) -> Result<DenseTensor> {
        let (shape, values) = match self {
            Self::Safetensors(file) => file.read_f32(name)?,
            Self::Pytorch(file) => file.read_f32(name)?,
        };
        Ok(DenseTensor { shape, values })
    }

    /// The safetensors file; others hold no stacked or packed tensors.
    fn safetensors(&self, name: &str) -> Result<&SafetensorsFile> {
        match self {
            Self::Safetensors(file) => Ok(file),
            Self::Pytorch(file) => Err(Error::Unsupported {
                path: file.path().into(),
                field: name.into(),
                found: "a stacked or packed tensor in a PyTorch file".into(),
                supported: "safetensors".into(),
            }),
        }
    }
}

/// The tensors of one or several files, under one name space.
#[derive(Debug)]
pub(super) struct SafetensorsSet {
    files: Vec<TensorFile>,
    /// File of each tensor, and its name there.
    index: BTreeMap<String, (usize, String)>,
    /// What was opened, for messages.
    path: PathBuf,
}

impl SafetensorsSet {
    /// Opens `model.safetensors` of a folder, or the shards that `model.safetensors.index.json` lists, or what stands under
    /// another name where it is the only index or the only file, as AutoGPTQ's `gptq_model-4bit-128g.safetensors`. Without
    /// any, PyTorch's `pytorch_model.bin` or its shards.
    pub(crate) fn open_folder(folder: &Path) -> Result<Self> {
        let (single, index) = (folder.join("model.safetensors"), folder.join("model.safetensors.index.json"));
        if single.exists() {
            return Self::open_file(folder, single);
        }
        if index.exists() {
            return Self::open_index(folder, &index);
        }
        let (indices, files) = (files(folder, ".safetensors.index.json")?, files(folder, ".safetensors")?);
        match (indices.as_slice(), files.as_slice()) {
            ([index], _) => Self::open_index(folder, index),
            ([], [file]) => Self::open_file(folder, file.clone()),
            ([], []) if folder.join(PYTORCH).exists() => Self::open_file(folder, folder.join(PYTORCH)),
            ([], []) if folder.join(PYTORCH_INDEX).exists() => {
                Self::open_index(folder, &folder.join(PYTORCH_INDEX))
            }
            _ => Err(Error::File {
                path: folder.into(),
                field: "weights".into(),
                expected: "model.safetensors, model.safetensors.index.json, one file of either kind, or pytorch_model.bin"
                    .into(),
                found: match files.len() {
                    0 => "neither".into(),
                    count => format!("{count} safetensors files and {} indices", indices.len()),
                },
            }),
        }
    }

    fn open_file(folder: &Path, path: PathBuf) -> Result<Self> {
        let file = TensorFile::open(path)?;
        let index = file.names().into_iter().map(|name| (name.clone(), (0, name))).collect();
        Ok(Self { files: vec![file], index, path: folder.into() })
    }

    fn open_index(folder: &Path, index_path: &Path) -> Result<Self> {
        let object = read_object(index_path, MAX_INDEX_BYTES)?;
        let fields = Fields::new(index_path, "", &object);
        let weight_map = object
            .get("weight_map")
            .and_then(|map| map.as_object())
            .ok_or_else(|| fields.wrong("weight_map", "an object from tensor names to file names"))?;
        let fields = Fields::new(index_path, "weight_map.", weight_map);
        let mut shards = BTreeSet::new();
        for (name, shard) in weight_map {
            // A path that leaves the folder must not be followed.
            let plain = shard.as_str().filter(|shard| Path::new(shard).file_name() == Some(shard.as_ref()));
            shards.insert(plain.ok_or_else(|| fields.wrong(name, "the name of a file beside the index"))?);
        }
        let mut set = Self { files: Vec::new(), index: BTreeMap::new(), path: folder.into() };
        for shard in &shards {
            set.add(TensorFile::open(folder.join(shard))?)?;
        }
        for (name, shard) in weight_map {
            let path = folder.join(shard.as_str().unwrap_or_default());
            if set.index.get(name).is_none_or(|(file, _)| set.files[*file].path() != path) {
                return Err(missing(&path, name));
            }
        }
        Ok(set)
    }

    fn add(&mut self, file: TensorFile) -> Result<()> {
        for name in file.names() {
            if let Some((other, _)) = self.index.insert(name.clone(), (self.files.len(), name.clone())) {
                return Err(Error::File {
                    path: file.path().into(),
                    field: name,
                    expected: "each tensor in one shard".into(),
                    found: format!("the same name in {}", self.files[other].path().display()),
                });
            }
        }
        self.files.push(file);
        Ok(())
    }

    /// Gives tensors other names; those that get none are left out, and counted.
    pub(crate) fn rename(&mut self, name: impl Fn(&str) -> Option<String>) -> usize {
        let before = self.index.len();
        let index = std::mem::take(&mut self.index).into_iter();
        self.index = index.filter_map(|(old, place)| Some((name(&old)?, place))).collect();
        before - self.index.len()
    }

    /// Names of all tensors, sorted.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.index.keys().map(String::as_str)
    }

    /// Whether there is a tensor `name`.
    pub(crate) fn contains(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// The file that holds the tensor `name`.
    pub(crate) fn file_of(&self, name: &str) -> Result<&TensorFile> {
        self.place_of(name).map(|(file, _)| file)
    }

    /// The file that holds the tensor `name`, and what it is called there.
    fn place_of(&self, name: &str) -> Result<(&TensorFile, &str)> {
        match self.index.get(name) {
            Some((file, there)) => Ok((&self.files[*file], there)),
            None => Err(missing(&self.path, name)),
        }
    }

    /// As [`SafetensorsFile::describe`].
    pub(crate) fn describe(&self, name: &str) -> Result<(Dtype, &[usize])> {
        let (file, there) = self.place_of(name)?;
        file.describe(there)
    }

    /// Bytes of the tensor.
    pub(crate) fn bytes(&self, name: &str) -> Result<u64> {
        let (dtype, shape) = self.describe(name)?;
        let bits =
            shape.iter().map(|size| *size as u64).product::<u64>().saturating_mul(dtype.bitsize() as u64);
        Ok(bits / 8)
    }

    /// Bytes of all tensors whose names begin so.
    pub(crate) fn bytes_of_all(&self, prefix: &str) -> Result<u64> {
        let names = self.index.range(prefix.to_owned()..).map(|(name, _)| name);
        let mut names = names.take_while(|name| name.starts_with(prefix));
        names.try_fold(0u64, |bytes, name| Ok(bytes.saturating_add(self.bytes(name)?)))
    }

    /// As [`SafetensorsFile::read`].
    pub(crate) fn read(&self, name: &str) -> Result<RawTensor> {
        let (file, there) = self.place_of(name)?;
        file.read(there)
    }

    /// As [`SafetensorsFile::read_part`].
    pub(crate) fn read_part(&self, name: &str, index: usize) -> Result<RawTensor> {
        let (file, there) = self.place_of(name)?;
        Ok(file.safetensors(name)?.read_part(there, index)?)
    }

    /// As [`SafetensorsFile::read_u32`], the values alone.
    pub(crate) fn read_u32(&self, name: &str) -> Result<Vec<u32>> {
        let (file, there) = self.place_of(name)?;
        Ok(file.safetensors(name)?.read_u32(there)?.1)
    }

    /// As [`SafetensorsFile::read_f32_part`].
    pub(crate) fn read_f32_part(&self, name: &str, index: usize) -> Result<DenseTensor> {
        let (file, there) = self.place_of(name)?;
        let (shape, values) = file.safetensors(name)?.read_f32_part(there, index)?;
        Ok(DenseTensor { shape, values })
    }

    /// As [`SafetensorsFile::read_f32`].
    pub(crate) fn read_f32(&self, name: &str) -> Result<DenseTensor> {
        let (file, there) = self.place_of(name)?;
        file.read_f32(there)
    }

    /// An [`Error::File`] about the tensor `name`, with the file that holds it.
    pub(crate) fn wrong(&self, name: &str, expected: impl Into<String>, found: impl Into<String>) -> Error {
        let path = self.file_of(name).map_or(self.path.as_path(), TensorFile::path);
        Error::File { path: path.into(), field: name.into(), expected: expected.into(), found: found.into() }
    }

    /// Fails with the place of the first value that is infinite or not a number.
    pub(crate) fn check_finite(&self, name: &str, values: &[f32]) -> Result<()> {
        match values.iter().position(|value| !value.is_finite()) {
            Some(i) => Err(self.wrong(name, "finite values", format!("{} at element {i}", values[i]))),
            None => Ok(()),
        }
    }
}

/// The files of a folder whose names end so, sorted.
fn files(folder: &Path, end: &str) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).and_then(|entries| entries.collect::<std::io::Result<Vec<_>>>());
    let paths = entries.map_err(Error::io(folder))?.into_iter().map(|entry| entry.path());
    let named = |path: &PathBuf| path.to_string_lossy().ends_with(end) && path.is_file();
    let mut paths: Vec<PathBuf> = paths.filter(named).collect();
    paths.sort();
    Ok(paths)
}

/// The error about a tensor that `path` doesn't hold.
fn missing(path: &Path, name: &str) -> Error {
    Error::File {
        path: path.into(),
        field: name.into(),
        expected: "a tensor".into(),
        found: "none of that name".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Two shards, `a` and `b` in the first, `c` in the second, and the given index.
    fn sharded(index: &str) -> (tempfile::TempDir, Result<SafetensorsSet>) {
        let folder = tempfile::tempdir().unwrap();
        let one = br#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
                       "b":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
        let two = br#"{"c":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
        for (name, header, data) in
            [("1.st", &one[..], &[1, 2][..]), ("2.st", two, &[3]), ("3.st", two, &[4])]
        {
            let bytes = [&(header.len() as u64).to_le_bytes(), header, data].concat();
            std::fs::write(folder.path().join(name), bytes).unwrap();
        }
        std::fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
        let set = SafetensorsSet::open_folder(folder.path());
        (folder, set)
    }

    #[test]
    fn shards_are_one_name_space() {
        let (_folder, set) = sharded(r#"{"weight_map":{"a":"1.st","b":"1.st","c":"2.st"}}"#);
        let set = set.unwrap();
        assert_eq!(set.names().collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(set.read("c").unwrap().bytes, [3]);
    }

    #[test]
    fn wrong_indices_name_file_and_tensor() {
        for (index, parts) in [
            (r#"{"weight_map":{"a":"1.st","c":"4.st"}}"#, &["4.st"][..]),
            (r#"{"weight_map":{"a":"1.st","d":"2.st"}}"#, &["2.st", "d:"]),
            (r#"{"weight_map":{"a":"2.st","b":"1.st"}}"#, &["2.st", "a:"]),
            (r#"{"weight_map":{"a":"1.st","c":"2.st","d":"3.st"}}"#, &["3.st", "c:", "2.st"]),
            (r#"{"weight_map":{"a":"../1.st"}}"#, &["index.json", "weight_map.a", "../1.st"]),
            (r#"{"weight_map":{"a":"/etc/passwd"}}"#, &["index.json", "weight_map.a"]),
            (r#"{"weight_map":{"a":".."}}"#, &["index.json", "weight_map.a"]),
            (r#"{"weight_map":{"a":7}}"#, &["index.json", "weight_map.a", "7"]),
            (r#"{"weight_map":[]}"#, &["index.json", "weight_map"]),
            (r#"{"weight"#, &["index.json"]),
        ] {
            let message = sharded(index).1.unwrap_err().to_string();
            assert!(parts.iter().all(|part| message.contains(part)), "{index}: {message}");
        }
        let (folder, _) = sharded("{}");
        std::fs::remove_file(folder.path().join("model.safetensors.index.json")).unwrap();
        for name in ["1.st", "2.st"] {
            std::fs::rename(folder.path().join(name), folder.path().join(format!("{name}.safetensors")))
                .unwrap();
        }
        let message = SafetensorsSet::open_folder(folder.path()).unwrap_err().to_string();
        assert!(message.contains("2 safetensors files"), "{message}");
        std::fs::remove_file(folder.path().join("1.st.safetensors")).unwrap();
        assert_eq!(SafetensorsSet::open_folder(folder.path()).unwrap().names().collect::<Vec<_>>(), ["c"]);
        let empty = tempfile::tempdir().unwrap();
        let message = SafetensorsSet::open_folder(empty.path()).unwrap_err().to_string();
        assert!(message.contains("model.safetensors"), "{message}");
    }

    proptest! {
        #[test]
        fn mutated_indices_never_panic(edits in prop::collection::vec((0usize..60, 32u8..127), 1..4)) {
            let mut index = br#"{"weight_map":{"a":"1.st","b":"1.st","c":"2.st"}}"#.to_vec();
            for (place, value) in edits {
                let place = place % index.len();
                index[place] = value;
            }
            let (_folder, set) = sharded(std::str::from_utf8(&index).unwrap());
            if let Ok(set) = set {
                for name in set.names() {
                    prop_assert_eq!(set.read(name).unwrap().bytes.len(), 1);
                }
            }
        }
    }
}
