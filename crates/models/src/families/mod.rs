//! The one place that knows a decoder family: the names of its parts, what it computes with them, and its spelling in
//! configuration files. Everything else — loading, exporting, pruning, side networks, sizes — goes by these tables.
//!
//! A family is a file here, a line in [`FAMILIES`] and a fixture.

mod gemma3;
mod llama;
mod opt;

use std::fmt;

use serde_json::{Map, Value};

use crate::{
    Result,
    config::{Biases, ModelConfig, SpecialTokens},
    hf::Fields,
};

/// All families, in the order in which GGUF's shared architecture names are resolved.
pub static FAMILIES: [&Family; 6] =
    [&llama::LLAMA, &llama::MISTRAL, &llama::QWEN2, &llama::QWEN3, &opt::OPT, &gemma3::GEMMA3];

/// A family of decoder-only models, as transformers names it.
pub struct Family {
    /// `model_type` of `config.json`.
    pub model_type: &'static str,
    /// The class in `architectures`.
    pub architecture: &'static str,
    /// Names of the tensors outside the blocks.
    pub names: Names,
    /// The kind of all its norms.
    pub norm: NormKind,
    /// What the MLP does between its linears.
    pub activation: Activation,
    /// Norms and linears of a block. The order is that of loading and of the module's parameters.
    pub block: &'static [Part],
    /// Keys of `config.json` for query heads, key and value heads (`None`: as many as query heads) and MLP channels.
    pub widths: Widths,
    /// The architecture in GGUF files, if Kiln reads and writes it there.
    pub gguf: Option<GgufArchitecture>,
    /// Ids where files are silent: transformers' class defaults.
    pub special_tokens: fn() -> SpecialTokens,
    /// The biases that the family's own configuration keys express, nearest to those given.
    pub own_biases: fn(Biases) -> Biases,
    pub(crate) module: ModulePath,
    pub(crate) read: fn(&Fields<'_>, &'static Family) -> Result<ModelConfig>,
    pub(crate) write: fn(&ModelConfig, &mut Map<String, Value>),
}

/// Paths of the modules outside the blocks, and of the list of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Names {
    /// Token embedding.
    pub embedding: &'static str,
    /// Table of learned positions; `None` where positions are rotary.
    pub positions: Option<LearnedPositions>,
    /// The list of blocks; block 3 is `{blocks}.3`.
    pub blocks: &'static str,
    /// Norm before the head.
    pub final_norm: &'static str,
    /// Output head, where it isn't the embedding.
    pub head: &'static str,
}

/// A table of learned positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LearnedPositions {
    /// Path of the table.
    pub path: &'static str,
    /// Rows at its beginning that no position uses.
    pub offset: usize,
}

/// Keys of the widths that may differ by block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Widths {
    /// Query heads.
    pub heads: &'static str,
    /// Key and value heads; `None`: as many as query heads.
    pub key_value_heads: Option<&'static str>,
    /// MLP channels.
    pub channels: &'static str,
}

/// What a norm computes over the last axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// `x / sqrt(mean(x²) + eps) * weight`.
    Rms,
    /// `x / sqrt(mean(x²) + eps) * (1 + weight)`: Gemma.
    RmsOnePlus,
    /// Layer norm, with weight and bias or neither.
    Layer,
}

/// What the MLP does between its linears.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `down(silu(gate) * up)`.
    SiluGated,
    /// `down(gelu(gate) * up)`, GELU in its tanh form.
    GeluTanhGated,
    /// `down(relu(up))`.
    Relu,
}

impl Activation {
    /// Whether the factors that scale the MLP's channels before it can be taken back behind it: it is linear in `up`, or
    /// lets positive factors through.
    pub(crate) fn passes_factors(self) -> bool {
        match self {
            Self::SiluGated | Self::GeluTanhGated | Self::Relu => true,
        }
    }
}

/// A norm or linear of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// A norm.
    Norm(NormPart),
    /// A linear: a slot of the model.
    Linear(LinearPart),
}

/// A norm of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NormPart {
    /// Path within the block.
    pub name: &'static str,
    /// What it normalises.
    pub place: NormPlace,
    /// Name within the block in GGUF files.
    pub gguf: &'static str,
}

/// A linear of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearPart {
    /// Path within the block.
    pub name: &'static str,
    /// What it is for.
    pub role: LinearRole,
    /// Name within the block in GGUF files.
    pub gguf: &'static str,
}

impl Part {
    /// Path within the block.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Norm(norm) => norm.name,
            Self::Linear(linear) => linear.name,
        }
    }

    /// Name within the block in GGUF files.
    pub fn gguf(&self) -> &'static str {
        match self {
            Self::Norm(norm) => norm.gguf,
            Self::Linear(linear) => linear.gguf,
        }
    }
}

/// What a norm of a block normalises. A missing one is the identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormPlace {
    /// The attention's input.
    PreAttention,
    /// What the attention adds to the residual stream.
    PostAttention,
    /// The MLP's input.
    PreMlp,
    /// What the MLP adds to the residual stream.
    PostMlp,
    /// Each query head, before the rotation.
    QueryHead,
    /// Each key head, before the rotation.
    KeyHead,
}

impl NormPlace {
    /// Whether it runs over a head instead of the residual stream.
    pub fn is_head(self) -> bool {
        match self {
            Self::QueryHead | Self::KeyHead => true,
            Self::PreAttention | Self::PostAttention | Self::PreMlp | Self::PostMlp => false,
        }
    }
}

/// What a linear of a block is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinearRole {
    /// Queries.
    Query,
    /// Keys.
    Key,
    /// Values.
    Value,
    /// The attention's output.
    Output,
    /// The MLP's gate.
    Gate,
    /// The MLP's way in.
    Up,
    /// The MLP's way out.
    Down,
}

impl LinearRole {
    /// What lies along inputs and outputs.
    pub fn channels(self) -> [Channels; 2] {
        match self {
            Self::Query => [Channels::Hidden, Channels::Query],
            Self::Key | Self::Value => [Channels::Hidden, Channels::KeyValue],
            Self::Output => [Channels::Query, Channels::Hidden],
            Self::Gate | Self::Up => [Channels::Hidden, Channels::Mlp],
            Self::Down => [Channels::Mlp, Channels::Hidden],
        }
    }

    /// Whether it belongs to the attention, not to the MLP.
    pub fn is_attention(self) -> bool {
        match self {
            Self::Query | Self::Key | Self::Value | Self::Output => true,
            Self::Gate | Self::Up | Self::Down => false,
        }
    }
}

/// What the positions along one axis of a linear stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channels {
    /// Channels of the residual stream, the same in all blocks.
    Hidden,
    /// Channels of the block's query heads, head by head.
    Query,
    /// Channels of the block's key and value heads, head by head.
    KeyValue,
    /// Channels of the block's MLP.
    Mlp,
}

/// An architecture of GGUF files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GgufArchitecture {
    /// `general.architecture`, which is also the prefix of hyperparameters.
    pub name: &'static str,
    /// Whether the two halves of each query and key head alternate row by row there.
    pub interleaved: bool,
    /// Whether a file of this family has one window for all blocks; tells families apart that share a name.
    pub windowed: bool,
}

/// Where a model's parameters stand in its module tree: training checkpoints and fingerprints go by these paths.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ModulePath {
    /// The first segment.
    pub root: &'static str,
    /// The beginning of checkpoint names that is left out.
    pub left_out: &'static str,
}

impl ModulePath {
    /// The segments of a checkpoint's module path.
    pub(crate) fn segments(self, path: &'static str) -> impl Iterator<Item = &'static str> {
        let rest = path.strip_prefix(self.left_out).unwrap_or(path);
        std::iter::once(self.root).chain(rest.split('.'))
    }
}

impl Family {
    /// The family of a `model_type`.
    pub fn by_model_type(name: &str) -> Option<&'static Family> {
        FAMILIES.into_iter().find(|family| family.model_type == name)
    }

    /// The family of a GGUF architecture; `windowed` says whether the file has a sliding window.
    pub(crate) fn by_gguf(name: &str, windowed: bool) -> Option<&'static Family> {
        let named =
            || FAMILIES.into_iter().filter(|family| family.gguf.is_some_and(|gguf| gguf.name == name));
        named()
            .find(|family| family.gguf.is_some_and(|gguf| gguf.windowed == windowed))
            .or_else(|| named().next())
    }

    /// The names of all GGUF architectures that are read, for messages.
    pub(crate) fn gguf_names() -> String {
        let mut names: Vec<&str> = Vec::new();
        for gguf in FAMILIES.iter().filter_map(|family| family.gguf) {
            if !names.contains(&gguf.name) {
                names.push(gguf.name);
            }
        }
        names.join(", ")
    }

    /// The family whose configuration keys express what `config` says: the model's own, or one with the same parts whose
    /// keys know more biases, where blocks have no windows.
    pub fn expressing(config: &ModelConfig) -> &'static Family {
        let own = config.family;
        let expresses = |family: &Family| (family.own_biases)(config.biases) == config.biases;
        let same_parts = |family: &Family| {
            (family.names, family.block, family.norm, family.activation)
                == (own.names, own.block, own.norm, own.activation)
        };
        let has_windows = config.layer_attention.iter().any(|layer| layer.sliding_window.is_some());
        if expresses(own) || has_windows {
            return own;
        }
        FAMILIES.into_iter().find(|family| same_parts(family) && expresses(family)).unwrap_or(own)
    }

    /// The block's linears, in the order in which data flows.
    pub fn linears(&self) -> impl Iterator<Item = &'static LinearPart> + use<> {
        self.block.iter().filter_map(|part| match part {
            Part::Linear(linear) => Some(linear),
            Part::Norm(_) => None,
        })
    }

    /// The block's norms.
    pub fn norms(&self) -> impl Iterator<Item = &'static NormPart> + use<> {
        self.block.iter().filter_map(|part| match part {
            Part::Norm(norm) => Some(norm),
            Part::Linear(_) => None,
        })
    }

    /// The block's linear of a role.
    pub fn linear(&self, role: LinearRole) -> Option<&'static LinearPart> {
        self.linears().find(|linear| linear.role == role)
    }

    /// Whether the MLP has a gate.
    pub fn is_gated(&self) -> bool {
        self.linear(LinearRole::Gate).is_some()
    }

    /// The path of a module of block `index`, given its path within the block.
    pub fn path(&self, index: usize, name: &str) -> String {
        format!("{}.{index}.{name}", self.names.blocks)
    }
}

/// Families are static: their names tell them apart.
impl PartialEq for Family {
    fn eq(&self, other: &Self) -> bool {
        self.model_type == other.model_type
    }
}

impl Eq for Family {}

impl fmt::Debug for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.model_type)
    }
}

/// An entry of a block's table.
const fn norm(name: &'static str, place: NormPlace, gguf: &'static str) -> Part {
    Part::Norm(NormPart { name, place, gguf })
}

/// An entry of a block's table.
const fn linear(name: &'static str, role: LinearRole, gguf: &'static str) -> Part {
    Part::Linear(LinearPart { name, role, gguf })
}

/// Names of transformers' LLaMA and of all families that took them over.
const LLAMA_NAMES: Names = Names {
    embedding: "model.embed_tokens",
    positions: None,
    blocks: "model.layers",
    final_norm: "model.norm",
    head: "lm_head",
};

/// The widths' keys of most families.
const LLAMA_WIDTHS: Widths = Widths {
    heads: "num_attention_heads",
    key_value_heads: Some("num_key_value_heads"),
    channels: "intermediate_size",
};

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn tables_name_every_part_once() {
        for family in FAMILIES {
            let names: BTreeSet<_> = family.block.iter().map(Part::name).collect();
            let gguf: BTreeSet<_> = family.block.iter().map(Part::gguf).collect();
            assert_eq!([names.len(), gguf.len()], [family.block.len(); 2], "{family:?}");
            for role in [LinearRole::Query, LinearRole::Key, LinearRole::Value, LinearRole::Output] {
                assert!(family.linear(role).is_some(), "{family:?}: {role:?}");
            }
            let heads = family.norms().filter(|norm| norm.place.is_head()).count();
            assert!(heads == 0 || heads == 2, "{family:?}: norms on both queries and keys, or on neither");
            assert_eq!(Family::by_model_type(family.model_type), Some(family));
        }
    }

    #[test]
    fn a_window_tells_families_of_one_gguf_architecture_apart() {
        assert_eq!(Family::by_gguf("llama", false), Some(&llama::LLAMA));
        assert_eq!(Family::by_gguf("llama", true), Some(&llama::MISTRAL));
        assert_eq!(Family::by_gguf("qwen2", true), Some(&llama::QWEN2));
        assert_eq!(Family::by_gguf("opt", false), None);
        assert_eq!(Family::gguf_names(), "llama, qwen2, qwen3");
    }
}
