//! Models to files that other tools open, and to Kiln's own.
//!
//! | function | writes | weights that stay exact | read back by |
//! | --- | --- | --- | --- |
//! | [`save_model`] | Kiln's own folder | all | [`Checkpoint::open`](crate::Checkpoint::open) |
//! | [`export_hf`] | dense safetensors | what the float type holds | [`Checkpoint::open`](crate::Checkpoint::open), transformers |
//! | [`save_classifier`], [`export_hf_classifier`] | the same of a classifier | the same | the same |
//! | [`export_mlx`] | MLX's affine safetensors | affine row groups with scales and offsets that the float type holds | [`Checkpoint::open`](crate::Checkpoint::open), mlx-lm |
//! | [`export_gguf`] | one GGUF file | affine row groups of 32 or more with f16 scales and offsets: Q4_0, Q4_1, Q8_0 | [`Checkpoint::open`](crate::Checkpoint::open), llama.cpp |
//! | [`export_gptq`] | GPTQ, format 2 | affine with integer zero points and f16 scales | [`Checkpoint::open`](crate::Checkpoint::open), GPTQModel |
//! | [`export_awq`] | AWQ, 4 bits | as GPTQ, of one group size | [`Checkpoint::open`](crate::Checkpoint::open), AutoAWQ, transformers |
//! | [`export_bitsandbytes`] | bitsandbytes 4-bit | NF4 and FP4 | [`Checkpoint::open`](crate::Checkpoint::open), transformers |
//! | [`export_gguf_lora`] | a LoRA adapter for llama.cpp | all, in f32 | llama.cpp |
//!
//! Codes are never requantized. What a format can't hold is an error that names the tensor, or, with
//! [`Fallback::Dense`], a dense tensor; either way the [`ExportReport`] says what was rounded and by how much.
//! [`verify_export`] reloads what was written and compares logits.
//!
//! Tensors are brought to host memory one at a time and converted twice, first to learn sizes and differences, then to
//! be written. A folder is filled beside its place and renamed; so is a file.

mod awq;
mod bnb;
mod config;
pub(crate) mod config_keys;
mod dense;
mod folder;
mod gguf;
mod gguf_lora;
mod gguf_tokenizer;
mod gptq;
mod integers;
mod item;
mod mlx;
mod own;
mod report;
mod tokenizer_files;
mod verify;

#[cfg(test)]
pub(crate) use self::gguf_tokenizer::describe as describe_tokenizer;
use kiln_quant_core::{ScaleType, safetensors_file::Dtype};
use serde::{Deserialize, Serialize};

pub use self::{
    awq::export_awq,
    bnb::export_bitsandbytes,
    dense::{export_hf, export_hf_classifier},
    gguf::{GgufOptions, export_gguf},
    gguf_lora::{LoraFactors, export_gguf_lora},
    gptq::export_gptq,
    mlx::export_mlx,
    own::{save_classifier, save_model},
    report::{ExportReport, ExportRow},
    verify::{LogitDifference, verify_export},
};
#[allow(unused_imports)] // named in the documentation
use crate::Checkpoint;
use crate::Error;

/// A type of floating-point numbers in files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FloatType {
    /// 32-bit float.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
}

impl FloatType {
    /// The name that configurations have: `float32`, `float16` or `bfloat16`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }

    /// `value` as it reads back; infinite where it exceeds the type's range.
    pub fn round(self, value: f32) -> f32 {
        self.scale_type().round(value)
    }

    const fn scale_type(self) -> ScaleType {
        match self {
            Self::F32 => ScaleType::F32,
            Self::F16 => ScaleType::F16,
            Self::Bf16 => ScaleType::Bf16,
        }
    }

    const fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::Bf16 => Dtype::BF16,
        }
    }
}

/// What happens to a packed weight that a format can't hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fallback {
    /// The export fails and names it.
    #[default]
    Refuse,
    /// It is dequantized and written as a dense tensor, with a note.
    Dense,
}

/// How folders are written.
///
/// | option | default | purpose |
/// | --- | --- | --- |
/// | `float` | F16 | type of dense tensors, and of MLX's scales and offsets |
/// | `fallback` | refuse | packed weights that the format can't hold |
/// | `max_shard_bytes` | 5 GB | most bytes of tensors in one safetensors file; a larger single tensor gets its own |
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExportOptions {
    /// Type of dense tensors, and of MLX's scales and offsets.
    pub float: FloatType,
    /// What happens to packed weights that the format can't hold.
    pub fallback: Fallback,
    /// Most bytes of tensors in one safetensors file.
    pub max_shard_bytes: u64,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self { float: FloatType::F16, fallback: Fallback::Refuse, max_shard_bytes: 5_000_000_000 }
    }
}

impl ExportOptions {
    /// The defaults with dense tensors (and MLX's scales) in `float`.
    pub fn new(float: FloatType) -> Self {
        Self { float, ..Self::default() }
    }

    /// The same with another fallback.
    #[must_use]
    pub fn with_fallback(self, fallback: Fallback) -> Self {
        Self { fallback, ..self }
    }
}

/// The format being written, for messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Kiln,
    HuggingFace,
    Mlx,
    Gguf,
    Gptq,
    Awq,
    BitsAndBytes,
}

impl Format {
    const fn name(self) -> &'static str {
        match self {
            Self::Kiln => "Kiln's own format",
            Self::HuggingFace => "Hugging Face's format",
            Self::Mlx => "MLX",
            Self::Gguf => "GGUF",
            Self::Gptq => "GPTQ",
            Self::Awq => "AWQ",
            Self::BitsAndBytes => "bitsandbytes",
        }
    }

    /// The error about what the format can't hold.
    fn refuse(self, name: &str, expected: impl Into<String>, found: impl Into<String>) -> Error {
        Error::Export {
            format: self.name(),
            name: name.into(),
            expected: expected.into(),
            found: found.into(),
        }
    }
}
