//! Folders as Hugging Face's libraries and MLX write them: `config.json`, `generation_config.json` and safetensors, with
//! dense, bitsandbytes 4-bit, GPTQ, AWQ or MLX weights; and Kiln's own.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

pub use kiln_quant_core::safetensors_file::{Dtype, RawTensor, SafetensorsFile};
use kiln_quant_core::{Codebook, PackedWeight};

use crate::{
    Error, Result,
    config::{ModelConfig, SpecialTokens},
    families::Family,
    source::{DenseTensor, Described, StoredWeight, TensorSource, transposed},
};

mod awq;
mod bnb;
mod compressed;
pub(crate) mod config;
mod experts;
mod fp8;
mod gptq;
mod hqq;
mod json;
mod mlx;
mod packed;
mod pytorch;
pub(crate) mod rope;
mod shards;
#[cfg(test)]
mod tests;
mod wrapper;

pub use self::{
    awq::AwqConfig,
    compressed::CompressedConfig,
    fp8::Fp8Config,
    gptq::{GptqConfig, GptqOverride, ZeroFormat},
    mlx::{MlxConfig, MlxLayout},
    packed::PackedFolder,
};
pub(crate) use self::{
    awq::pack as pack_awq,
    config::{classifier_of, parse as parse_config},
    gptq::sorted_codes,
    json::Fields,
    packed::{FINGERPRINT, PACKED_WEIGHTS},
};
use self::{config::FolderConfig, shards::SafetensorsSet};

/// How the linears of a folder are stored, as its configuration says; single modules may be dense all the same.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Quantization {
    /// Dense.
    None,
    /// bitsandbytes, 4 bits.
    BitsAndBytes {
        /// NF4 or FP4.
        codebook: Codebook,
        /// Whether scales are quantized too.
        double: bool,
    },
    /// bitsandbytes, 8 bits.
    BitsAndBytesInt8,
    /// compressed-tensors, integers.
    CompressedTensors(CompressedConfig),
    /// 8-bit floats, read to dense.
    Fp8(Fp8Config),
    /// GPTQ.
    Gptq(GptqConfig),
    /// AWQ.
    Awq(AwqConfig),
    /// HQQ; what a linear is like its tensors say.
    Hqq,
    /// MLX, affine.
    Mlx(MlxConfig),
    /// Kiln's own: see [`PackedFolder`].
    Kiln,
}

/// What stands behind a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stored {
    Dense,
    BitsAndBytes,
    BitsAndBytesInt8,
    CompressedTensors,
    Fp8,
    Gptq,
    Awq,
    Hqq,
    Mlx,
    /// In a tensor of all experts.
    Sliced,
}

/// An open checkpoint folder. Tensors are read from disk at every call, one at a time.
///
/// ```no_run
/// # use kiln_models::{hf::HfFolder, TensorSource};
/// let folder = HfFolder::open("SmolLM2-135M-Instruct")?;
/// println!("{:?}, stored as {:?}", folder.config(), folder.storage());
/// println!("not understood: {:?}", folder.unknown_keys());
/// let weight = folder.weight("model.layers.0.self_attn.q_proj")?;
/// # Ok::<(), kiln_models::Error>(())
/// ```
#[derive(Debug)]
pub struct HfFolder {
    path: PathBuf,
    config: FolderConfig,
    tensors: SafetensorsSet,
    /// Public names: plain tensors under their own, packed ones as `P.weight`, those of stacked experts one by one.
    names: BTreeMap<String, Stored>,
    /// Tensors of experts that are stacked in others.
    slices: BTreeMap<String, experts::Slice>,
    notes: Vec<String>,
}

impl HfFolder {
    /// Opens a folder: reads its JSON files and the headers of its safetensors files, and no tensor but, where a GPTQ
    /// configuration doesn't say how zero points are stored or calls the grid symmetric, one tensor of zero points to guess
    /// from.
    ///
    /// # Errors
    /// [`Error::File`] for files that are truncated, malformed or contradictory, [`Error::Unsupported`] for
    /// architectures, values and formats that Kiln doesn't implement, [`Error::Io`].
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let mut config = config::read_folder(&path)?;
        if config.quantization == Quantization::Kiln {
            return Err(Error::Unsupported {
                path: path.join("config.json"),
                field: "quantization_config.quant_method".into(),
                found: "kiln".into(),
                supported: "a folder of another writer here; PackedFolder or Checkpoint::open".into(),
            });
        }
        let mut tensors = SafetensorsSet::open_folder(&path)?;
        let mut notes = Vec::new();
        if let Some(of) = config.text_part_of {
            let left_out = tensors.rename(wrapper::text_name);
            notes.push(format!("the text part of {of}; {left_out} tensors of its other parts were left out"));
        }
        notes.extend(add_prefix(&mut tensors, config.model.family));
        let mut names = public_names(&tensors, &config.quantization)?;
        let slices = experts::slices(&tensors, &config.model)?;
        for (name, slice) in &slices {
            for source in slice.sources() {
                names.remove(&source);
            }
            names.insert(name.clone(), Stored::Sliced);
        }
        if let Quantization::Gptq(gptq) = &mut config.quantization {
            notes.extend(decide_zeros(&tensors, &names, gptq)?);
        }
        Ok(Self { path, config, tensors, names, slices, notes })
    }

    /// Reads GPTQ's zero points as `zeros`, whatever the configuration says: some files are labelled wrongly. Nothing
    /// happens to other folders.
    #[must_use]
    pub fn with_gptq_zeros(mut self, zeros: ZeroFormat) -> Self {
        if let Quantization::Gptq(gptq) = &mut self.config.quantization {
            gptq.zeros = Some(zeros);
            self.notes.push(format!("zero points taken for {zeros:?} as asked"));
        }
        self
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config.model
    }

    /// Ids with a meaning; those of `generation_config.json` go first.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.config.special_tokens
    }

    /// Keys of the configuration that Kiln doesn't know, for a load report.
    pub fn unknown_keys(&self) -> &[String] {
        &self.config.unknown_keys
    }

    /// The class in `architectures`, if it is one for sequence classification.
    pub fn classifier(&self) -> Option<&str> {
        self.config.classifier.as_deref()
    }

    /// What a classifier's outputs are called.
    pub fn labels(&self) -> &[String] {
        &self.config.labels
    }

    /// How the linears are stored.
    pub fn storage(&self) -> &Quantization {
        &self.config.quantization
    }

    /// Guesses and overrides that a load report should show.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    fn stored(&self, name: &str) -> Result<Stored> {
        self.names.get(name).copied().ok_or_else(|| Error::File {
            path: self.path.clone(),
            field: name.into(),
            expected: "a tensor".into(),
            found: "none of that name".into(),
        })
    }

    fn packed(&self, name: &str, stored: Stored) -> Result<Option<PackedWeight>> {
        match (stored, &self.config.quantization) {
            (Stored::Sliced, _) => match self.slices.get(name) {
                Some(slice) => slice.packed(&self.tensors),
                None => Ok(None),
            },
            (Stored::Dense | Stored::Fp8 | Stored::Hqq, _) => Ok(None),
            (Stored::BitsAndBytesInt8, _) => bnb::int8_weight(&self.tensors, module_of(name)).map(Some),
            (Stored::CompressedTensors, Quantization::CompressedTensors(config)) => {
                compressed::weight(&self.tensors, module_of(name), config).map(Some)
            }
            (Stored::Gptq, Quantization::Gptq(config)) => {
                gptq::weight(&self.tensors, module_of(name), config).map(Some)
            }
            (Stored::Awq, Quantization::Awq(config)) => {
                awq::weight(&self.tensors, module_of(name), config).map(Some)
            }
            (Stored::Mlx, Quantization::Mlx(config)) => {
                mlx::weight(&self.tensors, module_of(name), config).map(Some)
            }
            _ => bnb::weight(&self.tensors, name).map(Some),
        }
    }

    fn read(&self, name: &str) -> Result<StoredWeight> {
        let stored = self.stored(name)?;
        if stored == Stored::Hqq {
            // Its tensors say whether it stays packed.
            return hqq::weight(&self.tensors, module_of(name));
        }
        match self.packed(name, stored)? {
            Some(packed) => Ok(StoredWeight::Packed(packed)),
            None => self.read_dense(name).map(StoredWeight::Dense),
        }
    }

    fn read_dense(&self, name: &str) -> Result<DenseTensor> {
        let mut tensor = match (self.slices.get(name), self.names.get(name), &self.config.quantization) {
            (Some(slice), ..) => slice.read(&self.tensors)?,
            (_, Some(Stored::Fp8), Quantization::Fp8(config)) => fp8::weight(&self.tensors, name, *config)?,
            _ => self.tensors.read_f32(name)?,
        };
        self.tensors.check_finite(name, &tensor.values)?;
        let family = self.config.model.family;
        if let ([rows, columns], true) = (tensor.shape.as_slice(), family.conv1d && family.is_in_block(name))
        {
            tensor.values = transposed(&tensor.values, *rows, *columns);
            tensor.shape.reverse();
        }
        Ok(tensor)
    }
}

impl TensorSource for HfFolder {
    fn contains(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }

    fn names(&self) -> Vec<String> {
        self.names.keys().cloned().collect()
    }

    fn describe(&self, name: &str) -> Result<Described> {
        match self.stored(name)? {
            Stored::Dense | Stored::Fp8 => {
                let mut shape = self.tensors.describe(name)?.1.to_vec();
                let family = self.config.model.family;
                if shape.len() == 2 && family.conv1d && family.is_in_block(name) {
                    shape.reverse();
                }
                Ok(Described { shape: Some(shape), bytes: self.tensors.bytes(name)?, dense: true })
            }
            // A part of a tensor, which is read alone.
            Stored::Sliced => {
                let packed = self.slices.get(name).and_then(experts::Slice::packed_bytes);
                Ok(Described { shape: None, bytes: packed.unwrap_or(0), dense: packed.is_none() })
            }
            _ => {
                let bytes = self.tensors.bytes_of_all(&format!("{}.", module_of(name)))?;
                Ok(Described { shape: None, bytes, dense: false })
            }
        }
    }

    fn dense(&self, name: &str) -> Result<DenseTensor> {
        match self.read(name)? {
            StoredWeight::Packed(packed) => {
                Ok(DenseTensor { shape: vec![packed.d_output, packed.d_input], values: packed.dequantize() })
            }
            StoredWeight::Dense(dense) => Ok(dense),
        }
    }

    fn weight(&self, module: &str) -> Result<StoredWeight> {
        self.read(&format!("{module}.weight"))
    }
}

/// `P` of `P.weight`.
fn module_of(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

/// Adds the prefix that tensors saved from the model without a head lack, as transformers' `AutoModel` and some early
/// checkpoints are; returns a note if so.
fn add_prefix(tensors: &mut SafetensorsSet, family: &Family) -> Option<String> {
    let first = format!("{}.weight", family.names.embedding);
    let (prefix, bare) = first.split_once('.')?;
    if tensors.contains(&first) || !tensors.contains(bare) {
        return None;
    }
    tensors.rename(|name| match name.starts_with(family.names.head) {
        true => Some(name.to_owned()),
        false => Some(format!("{prefix}.{name}")),
    });
    Some(format!("tensors stand without the prefix {prefix}, which was added"))
}

/// Says how GPTQ's zero points are stored where the configuration doesn't, or says what they contradict; returns a note
/// then. Without a word everything that isn't seen is version 1, the only one there was while files didn't say.
fn decide_zeros(
    tensors: &SafetensorsSet,
    names: &BTreeMap<String, Stored>,
    gptq: &mut GptqConfig,
) -> Result<Option<String>> {
    if gptq.zeros.is_some() && !gptq.sym {
        return Ok(None);
    }
    let first = names.iter().find(|(_, stored)| **stored == Stored::Gptq).map(|(name, _)| module_of(name));
    let seen = first.map(|module| gptq::seen_zeros(tensors, module, gptq)).transpose()?.flatten();
    let Some(stated) = gptq.zeros else {
        let zeros = seen.unwrap_or(ZeroFormat::V1);
        gptq.zeros = Some(zeros);
        let note =
            format!("quantization_config.checkpoint_format is absent: zero points taken for {zeros:?}");
        return Ok(Some(note));
    };
    Ok(seen.filter(|seen| *seen != stated).map(|seen| {
        gptq.zeros = Some(seen);
        format!(
            "quantization_config.checkpoint_format says that zero points are stored as {stated:?}, but by sym they are \
             2^(bits - 1), which {seen:?} stores as {} has them: taken for {seen:?}",
            first.unwrap_or_default()
        )
    }))
}

/// The names a folder shows: the parts of packed weights stand behind one `P.weight`.
fn public_names(tensors: &SafetensorsSet, quantization: &Quantization) -> Result<BTreeMap<String, Stored>> {
    let mut names: BTreeMap<String, Stored> =
        tensors.names().map(|name| (name.to_owned(), Stored::Dense)).collect();
    // `name` and the parts of the same beginning stand behind one weight.
    let mut gather = |name: &str, start: &str, parts: &[&str], weight: String, stored: Stored| {
        names.remove(name);
        for part in parts {
            names.remove(&format!("{start}{part}"));
        }
        names.insert(weight, stored);
    };
    for name in tensors.names() {
        let module = |ending: &str| name.strip_suffix(ending);
        let weight = |module: &str| format!("{module}.weight");
        if let Some((start, _)) = name.split_once(bnb::STATE_INFIX) {
            gather(name, start, &bnb::COMPANIONS, start.to_owned(), Stored::BitsAndBytes);
        } else if let Some(module) = module(".qweight") {
            let (parts, stored) = match quantization {
                Quantization::Gptq(_) => (&gptq::COMPANIONS[..], Stored::Gptq),
                Quantization::Awq(_) => (&awq::COMPANIONS[..], Stored::Awq),
                _ => {
                    let expected = "a quantization_config with quant_method gptq or awq";
                    return Err(tensors.wrong(name, expected, "none"));
                }
            };
            gather(name, module, parts, weight(module), stored);
        } else {
            match quantization {
                Quantization::CompressedTensors(_) => {
                    if let Some(module) = module(compressed::CODES) {
                        gather(
                            name,
                            module,
                            &compressed::COMPANIONS,
                            weight(module),
                            Stored::CompressedTensors,
                        );
                    }
                }
                Quantization::Hqq => {
                    if let Some(module) = module(hqq::CODES) {
                        gather(name, module, &hqq::COMPANIONS, weight(module), Stored::Hqq);
                    }
                }
                Quantization::BitsAndBytesInt8 => {
                    if let Some(module) = module(bnb::INT8_COMPANIONS[0]) {
                        gather(name, module, &bnb::INT8_COMPANIONS, weight(module), Stored::BitsAndBytesInt8);
                    }
                }
                Quantization::Mlx(_) => {
                    if let Some(module) = module(".scales") {
                        gather(name, module, &mlx::COMPANIONS, weight(module), Stored::Mlx);
                    }
                }
                Quantization::Fp8(config) if fp8::is_one(tensors, name) => {
                    gather(name, name, &[config.scale()], name.to_owned(), Stored::Fp8);
                }
                _ => {}
            }
        }
    }
    Ok(names)
}

/// Greatest common divisor.
fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
