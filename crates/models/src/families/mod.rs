//! The one place that knows a decoder family: the names of its parts, what it computes with them, and its spelling in
//! configuration files. Everything else — loading, exporting, pruning, side networks, sizes — goes by these tables.
//!
//! A family is a file here, a line in [`FAMILIES`] and a fixture.

pub(crate) mod class;
mod cohere;
mod experts;
mod gemma;
mod gemma4;
mod glm;
mod gpt;
mod llama;
mod olmo;
mod opt;
mod phi;
mod qwen3_5;

use std::fmt;

use kiln_quant_core::fused::RotaryPairs;
use serde::{Deserialize, Serialize};

use self::class::Class;
use crate::config::{Biases, ModelConfig, SpecialTokens};

/// All families, in the order in which GGUF's shared architecture names are resolved.
pub static FAMILIES: [&Family; 43] = [
    &llama::LLAMA,
    &llama::MISTRAL,
    &llama::QWEN2,
    &llama::QWEN3,
    &qwen3_5::QWEN3_5,
    &opt::OPT,
    &gemma::GEMMA3,
    &gemma::GEMMA,
    &gemma::GEMMA2,
    &gemma4::GEMMA4,
    &llama::SMOLLM3,
    &llama::GRANITE,
    &llama::GRANITE_HYBRID,
    &llama::MINISTRAL,
    &llama::MINISTRAL3,
    &llama::SEED_OSS,
    &llama::HUNYUAN,
    &llama::HELIUM,
    &llama::ERNIE4_5,
    &llama::ARCEE,
    &llama::APERTUS,
    &llama::NANOCHAT,
    &olmo::OLMO2,
    &olmo::OLMO3,
    &olmo::EXAONE4,
    &phi::PHI,
    &phi::PHI3,
    &glm::GLM4,
    &glm::GLM,
    &cohere::COHERE2,
    &cohere::COHERE,
    &gpt::STARCODER2,
    &gpt::STABLELM,
    &gpt::GPT2,
    &gpt::GPT_NEOX,
    &gpt::FALCON,
    &gpt::BLOOM,
    &experts::MIXTRAL,
    &experts::QWEN2_MOE,
    &experts::QWEN3_MOE,
    &experts::OLMOE,
    &experts::GRANITEMOE,
    &experts::GPT_OSS,
];

/// A family of decoder-only models, as transformers names it.
#[derive(Clone, Copy)]
pub struct Family {
    /// `model_type` of `config.json`.
    pub model_type: &'static str,
    /// The class in `architectures`.
    pub architecture: &'static str,
    /// Other spellings of either that files have.
    pub aliases: &'static [&'static str],
    /// Names of the tensors outside the blocks.
    pub names: Names,
    /// The kind of all its norms.
    pub norm: NormKind,
    /// The kinds of blocks that its models are made of. Within one, the order is that of loading and of the module's
    /// parameters.
    pub blocks: &'static [Parts],
    /// Which channels of a head rotary positions turn together.
    pub rotary_pairs: RotaryPairs,
    /// Whether rotary positions turn the other way round: NanoChat.
    pub turns_back: bool,
    /// Whether each value head is divided by its root mean square: Gemma 4.
    pub norms_values: bool,
    /// Whether dense linears of the blocks stand in checkpoints as `[d_input, d_output]`: GPT-2's `Conv1D`.
    pub conv1d: bool,
    /// The architecture in GGUF files, if Kiln reads and writes it there.
    pub gguf: Option<GgufArchitecture>,
    /// Ids where files are silent: transformers' class defaults.
    pub special_tokens: fn() -> SpecialTokens,
    pub(crate) module: ModulePath,
    pub(crate) class: Class,
}

/// Paths of the modules outside the blocks, and of the list of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Names {
    /// Token embedding.
    pub embedding: &'static str,
    /// Table of learned positions; `None` where positions are rotary.
    pub positions: Option<LearnedPositions>,
    /// Norm over the embedding.
    pub embedding_norm: Option<&'static str>,
    /// The list of blocks; block 3 is `{blocks}.3`.
    pub blocks: &'static str,
    /// Norm before the head.
    pub final_norm: &'static str,
    /// Output head, where it isn't the embedding.
    pub head: &'static str,
    /// What blocks hear of tokens by themselves, beside the residual stream.
    pub per_layer: Option<PerLayerNames>,
    /// Matrices from embeddings of another width to the residual stream, and from there to the head.
    pub projections: Option<[&'static str; 2]>,
}

/// Paths of what makes the inputs of single blocks: Gemma 4's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PerLayerNames {
    /// A token embedding for all blocks side by side.
    pub embedding: &'static str,
    /// From the embedding to the same widths.
    pub projection: &'static str,
    /// Norm over what is projected for one block.
    pub norm: &'static str,
}

/// A table of learned positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LearnedPositions {
    /// Path of the table.
    pub path: &'static str,
    /// Rows at its beginning that no position uses.
    pub offset: usize,
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
    /// Layer norm with a weight alone: Cohere.
    LayerGain,
    /// Nothing: in the place of a norm that a model lacks.
    Identity,
}

impl NormKind {
    /// Whether it takes the mean away before it scales.
    pub fn centres(self) -> bool {
        match self {
            Self::Rms | Self::RmsOnePlus | Self::Identity => false,
            Self::Layer | Self::LayerGain => true,
        }
    }
}

/// The function in the MLP: of the gate, which then multiplies `up`, or of `up` where there is no gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// `x / 2 * (1 + tanh(sqrt(2 / π) (x + 0.044715 x³)))`.
    GeluTanh,
    /// `x / 2 * (1 + erf(x / sqrt(2)))`.
    Gelu,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)²`.
    Relu2,
    /// xIELU, with parameters of its own in each block ([arXiv:2411.13010](https://arxiv.org/abs/2411.13010)).
    Xielu,
}

impl Activation {
    /// Whether positive factors on its input come out as the same factors.
    pub(crate) fn passes_factors(self) -> bool {
        match self {
            Self::Relu => true,
            Self::Silu | Self::GeluTanh | Self::Gelu | Self::Relu2 | Self::Xielu => false,
        }
    }
}

/// Norms, linears and other parameters of a block, in the order of loading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parts(pub &'static [Part]);

impl Parts {
    /// All of them.
    pub fn iter(self) -> impl Iterator<Item = &'static Part> + use<> {
        self.0.iter()
    }

    /// The linears but those of experts, in the order in which data flows.
    pub fn linears(self) -> impl Iterator<Item = &'static LinearPart> + use<> {
        self.0.iter().filter_map(|part| match part {
            Part::Linear(linear) => Some(linear),
            _ => None,
        })
    }

    /// The norms.
    pub fn norms(self) -> impl Iterator<Item = &'static NormPart> + use<> {
        self.0.iter().filter_map(|part| match part {
            Part::Norm(norm) => Some(norm),
            _ => None,
        })
    }

    /// The experts, where the MLP has some.
    pub fn experts(self) -> Option<&'static ExpertsPart> {
        self.0.iter().find_map(|part| match part {
            Part::Experts(experts) => Some(experts),
            _ => None,
        })
    }

    /// The linear of a role.
    pub fn linear(self, role: LinearRole) -> Option<&'static LinearPart> {
        self.linears().find(|linear| linear.role == role)
    }

    /// Whether it needs no earlier block's keys and values: it attends to its own, which may be one matrix, or is recurrent.
    pub fn has_keys(self) -> bool {
        let own = |role| matches!(role, LinearRole::Key | LinearRole::QueryKeyValue(_));
        self.is_recurrent() || self.linears().any(|linear| own(linear.role))
    }

    /// Whether it remembers a matrix for each head in place of keys and values.
    pub fn is_recurrent(self) -> bool {
        self.linear(LinearRole::DeltaOutput).is_some()
    }

    /// Whether it attends, and reads nothing but the residual stream.
    pub fn stands_alone(self) -> bool {
        self.has_keys() && !self.is_recurrent() && self.linear(LinearRole::PerLayerGate).is_none()
    }

    /// The norm of a place.
    pub fn norm(self, place: NormPlace) -> Option<&'static NormPart> {
        self.norms().find(|norm| norm.place == place)
    }

    /// Whether the MLP has a gate.
    pub fn is_gated(self) -> bool {
        self.linears().any(|linear| matches!(linear.role, LinearRole::Gate | LinearRole::GateUp))
            || self.experts().is_some()
    }
}

/// A norm or linear of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// A norm.
    Norm(NormPart),
    /// A linear: a slot of the model.
    Linear(LinearPart),
    /// A few numbers.
    Vector(VectorPart),
    /// All experts of the MLP, each with linears of its own.
    Experts(ExpertsPart),
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

/// A few numbers of a block that belong to no linear or norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VectorPart {
    /// The tensor's name within the block.
    pub name: &'static str,
    /// What it is for.
    pub role: VectorRole,
}

/// What a [`VectorPart`] is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VectorRole {
    /// xIELU's `alpha_p`, `[1]`.
    XieluPositive,
    /// xIELU's `alpha_n`, `[1]`.
    XieluNegative,
    /// xIELU's `beta`, a scalar that is never trained.
    XieluBeta,
    /// xIELU's `eps`, a scalar that is never trained.
    XieluEps,
    /// The router's biases, one an expert.
    RouterBias,
    /// The attention's sinks, one a query head.
    Sinks,
    /// Factors on the channels that a router reads, which are normed before.
    RouterScale,
    /// Factors on the weights of the chosen experts, one an expert.
    ExpertScales,
    /// A factor on all of the residual stream behind the block, `[1]`, that is never trained.
    LayerScalar,
    /// A delta net's weights of a channel's latest tokens, `[channels, 1, width]`.
    DeltaConvolution,
    /// Logarithms of a delta net's rates, one a value head.
    DeltaLogRate,
    /// What is added before a delta net's decays are made, one a value head.
    DeltaTimeBias,
    /// Gains of the norm over what a value head says.
    DeltaNorm,
}

impl VectorRole {
    /// The tensor's name within the block in GGUF files; empty where there is none.
    fn gguf(self) -> &'static str {
        match self {
            Self::Sinks => "attn_sinks.weight",
            Self::RouterBias => "ffn_gate_inp.bias",
            Self::RouterScale => "ffn_gate_inp.scale",
            Self::ExpertScales => "ffn_down_exps.scale",
            Self::LayerScalar => "layer_output_scale.weight",
            Self::XieluPositive | Self::XieluNegative | Self::XieluBeta | Self::XieluEps => "",
            Self::DeltaConvolution => "ssm_conv1d.weight",
            Self::DeltaLogRate => "ssm_a",
            Self::DeltaTimeBias => "ssm_dt.bias",
            Self::DeltaNorm => "ssm_norm.weight",
        }
    }

    /// The key of GGUF files that has its numbers of all blocks, where no tensor has them.
    pub(crate) fn gguf_key(self) -> Option<&'static str> {
        match self {
            Self::XieluPositive => Some("xielu.alpha_p"),
            Self::XieluNegative => Some("xielu.alpha_n"),
            Self::XieluBeta => Some("xielu.beta"),
            Self::XieluEps => Some("xielu.eps"),
            _ => None,
        }
    }

    /// Whether training may change it.
    pub fn is_trained(self) -> bool {
        match self {
            Self::XieluPositive
            | Self::XieluNegative
            | Self::RouterBias
            | Self::Sinks
            | Self::RouterScale
            | Self::ExpertScales
            | Self::DeltaConvolution
            | Self::DeltaLogRate
            | Self::DeltaTimeBias
            | Self::DeltaNorm => true,
            Self::XieluBeta | Self::XieluEps | Self::LayerScalar => false,
        }
    }
}

/// The experts of an MLP: each has a gate, a way in and a way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertsPart {
    /// Path within the block of the list of experts; the linears of expert 3 are `{name}.3.{gate}` and so on.
    pub name: &'static str,
    /// The last segments of the paths of gate, way in and way out.
    pub linears: [&'static str; 3],
    /// Names within the block in GGUF files of what they are stacked in.
    pub gguf: [&'static str; 3],
    /// How the family's own files stack all experts in one tensor a kind; `None` where each expert has its tensors.
    pub stacked: Option<StackedExperts>,
    /// Path within the block of the module in which transformers stacks them, as `gate_up_proj` and `down_proj`.
    pub module: &'static str,
    /// The router's parameter there, where that is no linear.
    pub router: Option<&'static str>,
}

/// Experts as two tensors, `[experts, ..]`, of gate and way in, and of the way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StackedExperts {
    /// Names of the tensors within the block.
    pub tensors: [&'static str; 2],
    /// Names of the tensors with their biases; empty where there are none.
    pub biases: [&'static str; 2],
    /// Matrices are `[d_input, d_output]`, and channels of gate and way in alternate: gpt-oss.
    pub interleaved: bool,
}

/// How [`ExpertsPart::linears`] are counted.
pub const EXPERT_ROLES: [LinearRole; 3] =
    [LinearRole::ExpertGate, LinearRole::ExpertUp, LinearRole::ExpertDown];

impl ExpertsPart {
    /// Expert and kind of the linear whose path within the block is `name`.
    pub(crate) fn place(&self, name: &str) -> Option<(usize, usize)> {
        let (expert, linear) = name.strip_prefix(self.name)?.strip_prefix('.')?.split_once('.')?;
        let kind = self.linears.iter().position(|other| *other == linear)?;
        Some((expert.parse().ok()?, kind))
    }

    /// The expert that the linear belongs to whose path within the block is `name`.
    pub fn expert_of(&self, name: &str) -> Option<usize> {
        self.place(name).map(|(expert, _)| expert)
    }

    /// The path within the block of a linear of expert `index`; `kind` counts in [`EXPERT_ROLES`].
    pub fn path(&self, index: usize, kind: usize) -> String {
        format!("{}.{index}.{}", self.name, self.linears[kind])
    }
}

impl Part {
    /// Path within the block.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Norm(norm) => norm.name,
            Self::Linear(linear) => linear.name,
            Self::Vector(vector) => vector.name,
            Self::Experts(experts) => experts.name,
        }
    }

    /// Whether no training changes it.
    pub fn is_constant(&self) -> bool {
        matches!(self, Self::Vector(vector) if !vector.role.is_trained())
    }

    /// Name within the block in GGUF files, of a vector with its suffix; empty where there is none.
    pub fn gguf(&self) -> &'static str {
        match self {
            Self::Norm(norm) => norm.gguf,
            Self::Linear(linear) => linear.gguf,
            Self::Experts(experts) => experts.gguf[0],
            Self::Vector(vector) => vector.role.gguf(),
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
    /// What the MLP adds to the residual stream, and the experts beside it where there are some.
    PostMlp,
    /// The input of experts that stand beside an MLP.
    PreExperts,
    /// What experts beside an MLP give.
    PostExperts,
    /// What an MLP beside experts gives.
    PostDense,
    /// What a block's own input adds to the residual stream.
    PostPerLayerInput,
    /// The residual stream behind the attention: OPT-350M.
    StreamAfterAttention,
    /// The residual stream behind the MLP.
    StreamAfterMlp,
    /// Each query head, before the rotation.
    QueryHead,
    /// Each key head, before the rotation.
    KeyHead,
    /// Each query head, after the rotation.
    RotatedQueryHead,
    /// Each key head, after the rotation.
    RotatedKeyHead,
    /// All query heads of a token together, before the rotation.
    Queries,
    /// All key heads of a token together, before the rotation.
    Keys,
}

impl NormPlace {
    /// What it runs over.
    pub fn axis(self) -> NormAxis {
        match self {
            Self::PreAttention
            | Self::PostAttention
            | Self::PreMlp
            | Self::PostMlp
            | Self::PreExperts
            | Self::PostExperts
            | Self::PostDense
            | Self::PostPerLayerInput
            | Self::StreamAfterAttention
            | Self::StreamAfterMlp => NormAxis::Hidden,
            Self::QueryHead | Self::KeyHead | Self::RotatedQueryHead | Self::RotatedKeyHead => NormAxis::Head,
            Self::Queries => NormAxis::Queries,
            Self::Keys => NormAxis::Keys,
        }
    }
}

/// What a norm of a block runs over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormAxis {
    /// The residual stream.
    Hidden,
    /// One head, with one weight for all of them.
    Head,
    /// All query heads together.
    Queries,
    /// All key heads together.
    Keys,
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
    /// All three in one matrix.
    QueryKeyValue(FusedRows),
    /// The attention's output.
    Output,
    /// The MLP's gate.
    Gate,
    /// The MLP's way in.
    Up,
    /// Both in one matrix, the gate first.
    GateUp,
    /// The MLP's way out.
    Down,
    /// An expert's gate.
    ExpertGate,
    /// An expert's way in.
    ExpertUp,
    /// An expert's way out.
    ExpertDown,
    /// The gate of the expert that all tokens go through.
    SharedGate,
    /// Its way in.
    SharedUp,
    /// Its way out.
    SharedDown,
    /// From the residual stream to the width of a block's own input, which its GELU gates.
    PerLayerGate,
    /// From there back.
    PerLayerProjection,
    /// From the residual stream to a score for each expert.
    Router,
    /// From the residual stream to the one gate of the expert that all tokens go through.
    SharedExpertGate,
    /// Head by head queries and, for what the head says, gates.
    GatedQuery,
    /// A delta net's queries, keys and values.
    DeltaMixed,
    /// A delta net's gate of its output.
    DeltaGate,
    /// How strongly a delta net's value heads learn.
    DeltaStrength,
    /// How much they forget.
    DeltaDecay,
    /// A delta net's output.
    DeltaOutput,
}

/// How the rows of a matrix of queries, keys and values follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FusedRows {
    /// All query heads, all key heads, all value heads.
    Concatenated,
    /// For each key head the query heads that use it, then itself, then its value head.
    Grouped,
}

impl FusedRows {
    /// The rows of queries, of keys and of values, each head by head, in a matrix for `heads` query heads and `groups` key
    /// heads of width `head_dim`.
    pub fn rows(self, heads: usize, groups: usize, head_dim: usize) -> [Vec<usize>; 3] {
        let queries = heads / groups;
        // The place of a head among all of them: query heads of a group, its key head, its value head.
        let at = |group: usize, of_group: usize| match self {
            Self::Grouped => group * (queries + 2) + of_group,
            Self::Concatenated if of_group < queries => group * queries + of_group,
            Self::Concatenated => heads + (of_group - queries) * groups + group,
        };
        let rows = |of_group: std::ops::Range<usize>| {
            let places =
                (0..groups).flat_map(|group| of_group.clone().map(move |of_group| (group, of_group)));
            let places = places.map(|(group, of_group)| at(group, of_group));
            places.flat_map(|place| place * head_dim..(place + 1) * head_dim).collect()
        };
        [rows(0..queries), rows(queries..queries + 1), rows(queries + 1..queries + 2)]
    }
}

impl LinearRole {
    /// What lies along inputs and outputs.
    pub fn channels(self) -> [Channels; 2] {
        match self {
            Self::Query => [Channels::Hidden, Channels::Query],
            Self::Key | Self::Value => [Channels::Hidden, Channels::KeyValue],
            Self::QueryKeyValue(rows) => [Channels::Hidden, Channels::QueryKeyValue(rows)],
            Self::Output => [Channels::Query, Channels::Hidden],
            Self::Gate | Self::Up => [Channels::Hidden, Channels::Mlp],
            Self::GateUp => [Channels::Hidden, Channels::GateUp],
            Self::Down => [Channels::Mlp, Channels::Hidden],
            Self::ExpertGate | Self::ExpertUp => [Channels::Hidden, Channels::Expert],
            Self::ExpertDown => [Channels::Expert, Channels::Hidden],
            Self::SharedGate | Self::SharedUp => [Channels::Hidden, Channels::SharedExpert],
            Self::SharedDown => [Channels::SharedExpert, Channels::Hidden],
            Self::PerLayerGate => [Channels::Hidden, Channels::PerLayer],
            Self::PerLayerProjection => [Channels::PerLayer, Channels::Hidden],
            Self::Router => [Channels::Hidden, Channels::Experts],
            Self::SharedExpertGate => [Channels::Hidden, Channels::One],
            Self::GatedQuery => [Channels::Hidden, Channels::GatedQuery],
            Self::DeltaMixed => [Channels::Hidden, Channels::DeltaMixed],
            Self::DeltaGate => [Channels::Hidden, Channels::DeltaValue],
            Self::DeltaStrength | Self::DeltaDecay => [Channels::Hidden, Channels::DeltaHeads],
            Self::DeltaOutput => [Channels::DeltaValue, Channels::Hidden],
        }
    }

    /// Whether it decides which way tokens go: small, never quantized, computed in f32 and without a bias of its own.
    pub fn stays_dense(self) -> bool {
        matches!(self, Self::Router | Self::SharedExpertGate)
    }

    /// Whether it belongs to the attention, not to the MLP.
    pub fn is_attention(self) -> bool {
        matches!(
            self,
            Self::Query | Self::GatedQuery | Self::Key | Self::Value | Self::QueryKeyValue(_) | Self::Output
        )
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
    /// Those of queries, keys and values in one matrix.
    QueryKeyValue(FusedRows),
    /// Channels of the block's MLP.
    Mlp,
    /// Channels of the block's MLP, once for the gate and once more.
    GateUp,
    /// Channels of each expert.
    Expert,
    /// Channels of the expert that all tokens go through.
    SharedExpert,
    /// Channels of a block's own input.
    PerLayer,
    /// One for each expert.
    Experts,
    /// A single one.
    One,
    /// Channels of the block's query heads and of their gates, head by head.
    GatedQuery,
    /// Those of a delta net's queries, keys and values.
    DeltaMixed,
    /// Channels of a delta net's value heads.
    DeltaValue,
    /// A delta net's value heads.
    DeltaHeads,
}

impl Channels {
    /// Whether they are channels of heads.
    pub fn are_heads(self) -> bool {
        match self {
            Self::Query | Self::GatedQuery | Self::KeyValue | Self::QueryKeyValue(_) => true,
            Self::Hidden
            | Self::Mlp
            | Self::GateUp
            | Self::Expert
            | Self::SharedExpert
            | Self::PerLayer
            | Self::Experts
            | Self::One
            | Self::DeltaMixed
            | Self::DeltaValue
            | Self::DeltaHeads => false,
        }
    }
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
    /// Whether the weights of norms stand there with 1 added: Gemma's.
    pub norms_plus_one: bool,
    /// One block in so many isn't rotated, which readers take for granted.
    pub unrotated_period: Option<usize>,
    /// The kinds of blocks whose attention and MLP stand side by side.
    pub parallel_kinds: &'static [usize],
    /// Whether a key says whether they do.
    pub parallel_key: bool,
    /// Whether the head is the embedding, whatever the file holds.
    pub always_tied: bool,
    /// Whether scores fall with the distance.
    pub alibi: bool,
    /// Whether a key says how queries grow with their positions.
    pub temperature: bool,
    /// Whether the weights of chosen experts are divided by their sum.
    pub normalises: bool,
    /// Whether YaRN's borders are rounded.
    pub rounds_yarn: bool,
    /// Blocks of the one size whose blocks slide; of others no block does.
    pub slides_with: Option<usize>,
    /// How keys say of each block what it is like, where blocks are of several kinds.
    pub by_block: Option<ByBlock>,
}

/// An architecture of GGUF files whose keys say of each block what it is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ByBlock {
    /// Widths, windows and shared keys.
    Gemma4,
    /// Which blocks are recurrent.
    Qwen3_5,
}

impl GgufArchitecture {
    /// An architecture whose tensors stand in files as in checkpoints.
    const fn plain(name: &'static str) -> Option<Self> {
        Some(Self { name, ..Self::PLAIN })
    }

    pub(crate) const PLAIN: Self = Self {
        name: "",
        interleaved: false,
        windowed: false,
        norms_plus_one: false,
        unrotated_period: None,
        parallel_kinds: &[],
        parallel_key: false,
        always_tied: false,
        alibi: false,
        temperature: false,
        normalises: true,
        rounds_yarn: true,
        slides_with: None,
        by_block: None,
    };
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
        FAMILIES.into_iter().find(|family| family.model_type == name || family.aliases.contains(&name))
    }

    /// The family of a class in `architectures`.
    pub fn by_architecture(name: &str) -> Option<&'static Family> {
        FAMILIES.into_iter().find(|family| family.architecture == name || family.aliases.contains(&name))
    }

    /// The family of a GGUF architecture; `windowed` says whether the file has a sliding window, `experts` whether it has any.
    pub(crate) fn by_gguf(name: &str, windowed: bool, experts: bool) -> Option<&'static Family> {
        let named =
            || FAMILIES.into_iter().filter(|family| family.gguf.is_some_and(|gguf| gguf.name == name));
        let alike = || named().filter(|family| family.class.experts.is_some() == experts);
        alike()
            .find(|family| family.gguf.is_some_and(|gguf| gguf.windowed == windowed))
            .or_else(|| alike().next())
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
        let expresses = |family: &Family| family.own_biases(config.biases) == config.biases;
        let description = |family: &Family| {
            let Family { names, blocks, norm, rotary_pairs, turns_back, norms_values, conv1d, .. } = *family;
            (names, blocks, norm, rotary_pairs, turns_back, norms_values, conv1d)
        };
        let has_windows = config.layer_attention.iter().any(|layer| layer.sliding_window.is_some());
        if expresses(own) || has_windows {
            return own;
        }
        FAMILIES
            .into_iter()
            .find(|family| description(family) == description(own) && expresses(family))
            .unwrap_or(own)
    }

    /// The biases that the family's own configuration keys express, nearest to those given.
    pub fn own_biases(&self, biases: Biases) -> Biases {
        self.class.biases_nearest(biases)
    }

    /// Whether a tensor of this name is one of a block.
    pub(crate) fn is_in_block(&self, name: &str) -> bool {
        name.strip_prefix(self.names.blocks).is_some_and(|rest| rest.starts_with('.'))
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

/// An entry of a block's table, in families that GGUF files don't know.
const fn plain_norm(name: &'static str, place: NormPlace) -> Part {
    norm(name, place, "")
}

/// An entry of a block's table, in families that GGUF files don't know.
const fn plain_linear(name: &'static str, role: LinearRole) -> Part {
    linear(name, role, "")
}

/// An entry of a block's table.
const fn vector(name: &'static str, role: VectorRole) -> Part {
    Part::Vector(VectorPart { name, role })
}

/// Names of transformers' LLaMA and of all families that took them over.
const LLAMA_NAMES: Names = Names {
    embedding: "model.embed_tokens",
    positions: None,
    embedding_norm: None,
    blocks: "model.layers",
    final_norm: "model.norm",
    head: "lm_head",
    per_layer: None,
    projections: None,
};

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn tables_name_every_part_once() {
        for family in FAMILIES {
            for parts in family.blocks {
                let names: BTreeSet<_> = parts.iter().map(Part::name).collect();
                assert_eq!(names.len(), parts.0.len(), "{family:?}");
                let gguf: BTreeSet<_> =
                    parts.iter().map(Part::gguf).filter(|name| !name.is_empty()).collect();
                let named = parts.iter().filter(|part| !part.gguf().is_empty()).count();
                assert_eq!(gguf.len(), named, "{family:?}");
                let keyed =
                    |part: &&Part| matches!(part, Part::Vector(vector) if vector.role.gguf_key().is_some());
                let named = named + parts.iter().filter(keyed).count();
                let first = *parts == family.blocks[0];
                assert!(family.gguf.is_none() || !first || named == parts.0.len(), "{family:?}");
                let fused = parts.linears().any(|linear| matches!(linear.role, LinearRole::QueryKeyValue(_)));
                let has = |role| parts.linear(role).is_some();
                if parts.is_recurrent() {
                    assert!(*parts != family.blocks[0], "{family:?}: its first kind attends");
                    continue;
                }
                assert_eq!(has(LinearRole::Query) || has(LinearRole::GatedQuery), !fused, "{family:?}");
                // Values may be made of keys, and both be another block's.
                assert!(!has(LinearRole::Value) || has(LinearRole::Key), "{family:?}");
                let given = !(fused || has(LinearRole::Key) && has(LinearRole::Value));
                assert!(!given || *parts != family.blocks[0], "{family:?}: its first kind stands alone");
                assert!(has(LinearRole::Output), "{family:?}");
                let beside = parts.norm(NormPlace::PostDense).is_some();
                assert_eq!(has(LinearRole::Down), beside || parts.experts().is_none(), "{family:?}");
                let heads = parts.norms().filter(|norm| norm.place.axis() != NormAxis::Hidden).count();
                let one = usize::from(!parts.has_keys());
                assert!(
                    heads == 0 || heads == 2 - one,
                    "{family:?}: norms on both queries and keys, or on neither"
                );
            }
            assert_eq!(Family::by_model_type(family.model_type), Some(family));
            assert_eq!(Family::by_architecture(family.architecture), Some(family));
        }
    }

    #[test]
    fn windows_and_experts_tell_families_of_one_gguf_architecture_apart() {
        assert_eq!(Family::by_gguf("llama", false, false), Some(&llama::LLAMA));
        assert_eq!(Family::by_gguf("llama", true, false), Some(&llama::MISTRAL));
        assert_eq!(Family::by_gguf("qwen2", true, false), Some(&llama::QWEN2));
        assert_eq!(Family::by_gguf("opt", false, false), None);
        assert_eq!(Family::by_gguf("llama", false, true), Some(&experts::MIXTRAL));
        assert_eq!(Family::by_gguf("llama", true, true), Some(&experts::MIXTRAL));
        assert!(Family::gguf_names().starts_with("llama, qwen2, qwen3, qwen35, gemma3, gemma, gemma2"));
    }
}
