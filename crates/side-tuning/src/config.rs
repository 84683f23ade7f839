//! What a side network looks like, and which side networks a backbone can have.

use kiln_models::config::{AttentionScale, ExpertsConfig, ModelConfig, RopeConfig, RopeScaling};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How the backbone's states become as narrow as the side network (`r` is the reduction, `k` the rank).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Downsample {
    /// `W x`.
    Linear,
    /// `W2 W1 x` through `k` channels.
    Lora,
    /// `W2 silu(W1 x)` through `k` channels.
    Adapter,
    /// The largest of each `r` neighbouring features; nothing is trained.
    MaxPool,
    /// The mean of each `r` neighbouring features; nothing is trained.
    AvgPool,
}

impl Downsample {
    /// Whether it goes through `k` channels.
    pub fn is_low_rank(self) -> bool {
        matches!(self, Self::Lora | Self::Adapter)
    }

    /// Whether it has no weights.
    pub fn is_pool(self) -> bool {
        matches!(self, Self::MaxPool | Self::AvgPool)
    }
}

/// One number for all features, or one for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GateShape {
    /// One number, as the paper has it.
    Scalar,
    /// A number a feature, as the released code has it.
    Vector,
}

impl GateShape {
    pub(crate) fn size(self, width: usize) -> usize {
        match self {
            Self::Scalar => 1,
            Self::Vector => width,
        }
    }
}

/// The gates before the side blocks: `m = (1 - beta) downsampled + beta side`, `beta = sigmoid(gamma / temperature)`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GateConfig {
    /// Numbers of each gate.
    pub shape: GateShape,
    /// Initial gamma: 0 in the paper, 0.5 or 1 in the code's releases.
    pub init: f64,
    /// 1 in QST, 0.1 in LST.
    pub temperature: f64,
}

/// Whose share sigmoid(theta) is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Share {
    /// The backbone's, as the released code has it for LLaMA.
    Backbone,
    /// The side network's, as the released code has it for OPT.
    Side,
}

/// What the head sees: `f` is the backbone's state after its final norm, `g` the side network's, normed and upsampled.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
#[non_exhaustive]
pub enum HeadMix {
    /// `alpha f + (1 - alpha) g`. With `init` 1, the paper's, training starts at the backbone, and the first gradient of
    /// everything but alpha is zero: it needs an optimizer like Adam, which moves alpha by a learning rate at once.
    Raw {
        /// Initial alpha.
        init: f64,
    },
    /// `s f + (1 - s) g`, or the shares swapped, `s = sigmoid(theta)`: the released code, which starts elsewhere than
    /// at the backbone.
    Sigmoid {
        /// Initial theta.
        init: f64,
        /// Whose share `s` is.
        share: Share,
    },
    /// `f + g` with an upsampling that starts at zero: starts at the backbone and has a gradient from the first step.
    /// Not in the paper.
    Additive,
    /// `g` alone, as LST.
    SideOnly,
}

/// A side network.
///
/// | name | [`qst`](Self::qst) | [`lst`](Self::lst) | purpose | range |
/// | --- | --- | --- | --- | --- |
/// | `reduction` | 16 | 8 | backbone width over side width | a divisor of the width that leaves whole heads, even ones for rotary positions |
/// | `heads` | backbone's | backbone's | side attention heads; fewer save memory, and differ from the paper | divides the side width; keeps key heads whole |
/// | `downsample` | adapter | linear | from the backbone's width to the side's | |
/// | `rank` | 16 | – | channels of low-rank downsampling | 1 to the backbone's width |
/// | `downsample_norm` | yes | no | LayerNorm (eps 1e-5) after downsampling | |
/// | `downsample_bias` | no | yes | biases of the downsampling's linears | |
/// | `shared_embedding` | yes | no | whether the embedding goes through the first layer's downsampling, or one of its own | |
/// | `gate` | scalar, 0, 1 | scalar, 0, 0.1 | shape, initial gamma, temperature | finite; temperature above 0 |
/// | `mix` | raw, 1 | side only | what the head sees | finite |
/// | `mix_shape` | scalar | – | numbers of alpha | |
/// | `dropped` | none | none | the backbone's blocks that have no side block | at least one is left |
///
/// The defaults are the paper's where it and the released code differ: scalar gates from 0 (the code: vectors from 0.5
/// or 1), alpha itself from 1 (the code: a sigmoid of a vector from 1). Only the paper's form starts at the backbone.
/// What only the code tells (no biases, the LayerNorm, the shared first module) is the code's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct SideConfig {
    /// Backbone width over side width.
    pub reduction: usize,
    /// Attention heads; `None` is as many as the backbone has.
    pub heads: Option<usize>,
    /// From the backbone's width to the side's.
    pub downsample: Downsample,
    /// Channels of low-rank downsampling.
    pub rank: usize,
    /// Whether a LayerNorm follows the downsampling.
    pub downsample_norm: bool,
    /// Whether the downsampling's linears have biases.
    pub downsample_bias: bool,
    /// Whether the embedding shares the first layer's downsampling.
    pub shared_embedding: bool,
    /// The gates.
    pub gate: GateConfig,
    /// What the head sees.
    pub mix: HeadMix,
    /// Numbers of alpha.
    pub mix_shape: GateShape,
    /// The backbone's blocks, from 0, that have no side block: the side's state passes them as it is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dropped: Vec<usize>,
}

impl Default for SideConfig {
    fn default() -> Self {
        Self::qst()
    }
}

impl SideConfig {
    /// [Quantized side tuning](https://arxiv.org/abs/2401.07159).
    pub fn qst() -> Self {
        Self {
            reduction: 16,
            heads: None,
            downsample: Downsample::Adapter,
            rank: 16,
            downsample_norm: true,
            downsample_bias: false,
            shared_embedding: true,
            gate: GateConfig { shape: GateShape::Scalar, init: 0.0, temperature: 1.0 },
            mix: HeadMix::Raw { init: 1.0 },
            mix_shape: GateShape::Scalar,
            dropped: Vec::new(),
        }
    }

    /// [Ladder side tuning](https://arxiv.org/abs/2206.06522), on decoders: linear downsampling, gates of temperature
    /// 0.1, logits from the side network alone. Weights start at random, and no side block is left out; as published they start
    /// from the backbone's ([`SideTuned::with_pruned_start`](crate::SideTuned::with_pruned_start)), and of T5-base's 12
    /// blocks 0, 4 and 8 have none ([`with_dropped`](Self::with_dropped)).
    pub fn lst() -> Self {
        Self {
            reduction: 8,
            downsample: Downsample::Linear,
            downsample_norm: false,
            downsample_bias: true,
            shared_embedding: false,
            gate: GateConfig { shape: GateShape::Scalar, init: 0.0, temperature: 0.1 },
            mix: HeadMix::SideOnly,
            ..Self::qst()
        }
    }

    /// Sets `reduction`.
    #[must_use]
    pub fn with_reduction(mut self, reduction: usize) -> Self {
        self.reduction = reduction;
        self
    }

    /// Sets `heads`.
    #[must_use]
    pub fn with_heads(mut self, heads: usize) -> Self {
        self.heads = Some(heads);
        self
    }

    /// Sets `downsample`, and `downsample_norm` as the method has it: a LayerNorm after the adapter only.
    #[must_use]
    pub fn with_downsample(mut self, downsample: Downsample) -> Self {
        (self.downsample, self.downsample_norm) = (downsample, downsample == Downsample::Adapter);
        self
    }

    /// Sets `rank`.
    #[must_use]
    pub fn with_rank(mut self, rank: usize) -> Self {
        self.rank = rank;
        self
    }

    /// Sets shape and initial value of the gates.
    #[must_use]
    pub fn with_gate(mut self, shape: GateShape, init: f64) -> Self {
        (self.gate.shape, self.gate.init) = (shape, init);
        self
    }

    /// Sets `mix` and `mix_shape`.
    #[must_use]
    pub fn with_mix(mut self, mix: HeadMix, shape: GateShape) -> Self {
        (self.mix, self.mix_shape) = (mix, shape);
        self
    }

    /// Sets `dropped`, in any order.
    #[must_use]
    pub fn with_dropped(mut self, blocks: impl IntoIterator<Item = usize>) -> Self {
        self.dropped = blocks.into_iter().collect();
        self
    }

    /// The backbone's blocks that have a side block, ascending.
    ///
    /// # Errors
    /// Blocks that a backbone of so many blocks doesn't have, that are named twice, or that are all it has.
    pub fn kept(&self, blocks: usize) -> Result<Vec<usize>> {
        let mut dropped = self.dropped.clone();
        dropped.sort_unstable();
        let fits = dropped.windows(2).all(|pair| pair[0] < pair[1])
            && dropped.last().is_none_or(|last| *last < blocks)
            && (dropped.len() < blocks || dropped.is_empty());
        if !fits {
            let expected =
                format!("some but not all of the blocks 0 to {}, each once", blocks.saturating_sub(1));
            return Err(Error::argument("dropped", expected, format!("{:?}", self.dropped)));
        }
        Ok((0..blocks).filter(|block| !dropped.contains(block)).collect())
    }

    /// The side network's blocks as a model of their own: the backbone's architecture, narrower.
    ///
    /// The MLP has `floor(channels / reduction)` channels, as in the released code. All side blocks are alike, also
    /// beside a backbone whose blocks were pruned to different widths.
    ///
    /// # Errors
    /// An option out of its range, with the reductions that this backbone allows.
    pub fn side_model(&self, backbone: &ModelConfig) -> Result<ModelConfig> {
        self.kept(backbone.num_hidden_layers)?;
        let not_finite = |value: f64| !value.is_finite();
        if not_finite(self.gate.init) || not_finite(self.gate.temperature) || self.gate.temperature <= 0.0 {
            let found = format!("init {} and temperature {}", self.gate.init, self.gate.temperature);
            return Err(Error::argument("gate", "finite numbers, the temperature above 0", found));
        }
        if let HeadMix::Raw { init } | HeadMix::Sigmoid { init, .. } = self.mix
            && not_finite(init)
        {
            return Err(Error::argument("mix", "a finite initial value", init));
        }
        let sizes = Sizes::of(backbone)?;
        if self.downsample.is_low_rank() && !(1..=sizes.width).contains(&self.rank) {
            let expected = format!("1 to {}, the backbone's width", sizes.width);
            return Err(Error::argument("rank", expected, self.rank));
        }
        match self.reduced(&sizes, self.reduction) {
            Some(side) => Ok(side.model(backbone)),
            None => Err(self.refuse(&sizes)),
        }
    }

    /// The reductions that a backbone allows, ascending.
    ///
    /// # Errors
    /// A backbone of another architecture.
    pub fn reductions(&self, backbone: &ModelConfig) -> Result<Vec<usize>> {
        let sizes = Sizes::of(backbone)?;
        Ok(self.allowed(&sizes))
    }

    fn allowed(&self, sizes: &Sizes) -> Vec<usize> {
        (1..=sizes.width).filter(|&reduction| self.reduced(sizes, reduction).is_some()).collect()
    }

    fn reduced(&self, sizes: &Sizes, reduction: usize) -> Option<Sizes> {
        let heads = self.heads.unwrap_or(sizes.heads);
        let divide = |a: usize, b: usize| (b > 0 && a.is_multiple_of(b)).then(|| a / b);
        let width = divide(sizes.width, reduction)?;
        let head_dim = divide(width, heads)?;
        let kv_heads = divide(heads.checked_mul(sizes.kv_heads)?, sizes.heads)?;
        let inner = sizes.inner / reduction;
        let turns = sizes.rotary.is_none_or(|dynamic| {
            // Dynamic scaling takes the power head_dim / (head_dim - 2).
            head_dim.is_multiple_of(2) && (head_dim > 2 || !dynamic)
        });
        let whole = kv_heads > 0 && heads.is_multiple_of(kv_heads) && inner > 0;
        (turns && whole).then_some(Sizes { width, inner, heads, kv_heads, head_dim, rotary: sizes.rotary })
    }

    fn refuse(&self, sizes: &Sizes) -> Error {
        let heads = self.heads.unwrap_or(sizes.heads);
        let even = match sizes.rotary {
            Some(true) => "of an even size above 2 (dynamic rotary positions)",
            Some(false) => "of an even size (rotary positions)",
            None => "of one size",
        };
        let allowed = self.allowed(sizes);
        let list = allowed.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
        let list = if allowed.is_empty() { "none with so many heads".into() } else { list };
        let expected = format!(
            "a divisor of the backbone's width {} that leaves {heads} heads {even}: {list}",
            sizes.width
        );
        Error::argument("reduction", expected, self.reduction)
    }
}

/// What reductions depend on.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    width: usize,
    inner: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Whether there are rotary positions, and whether their scaling is dynamic.
    rotary: Option<bool>,
}

impl Sizes {
    fn of(backbone: &ModelConfig) -> Result<Self> {
        let dynamic = |rope: &RopeConfig| {
            matches!(rope.scaling, RopeScaling::Dynamic { .. } | RopeScaling::Alpha { .. })
        };
        let sizes = Self {
            width: backbone.hidden_size,
            inner: backbone.intermediate_size,
            heads: backbone.num_attention_heads,
            kv_heads: backbone.num_key_value_heads,
            head_dim: backbone.head_dim,
            rotary: (!backbone.rope.is_empty()).then(|| backbone.rope.iter().any(dynamic)),
        };
        let Self { width, inner, heads, kv_heads, .. } = sizes;
        if [width, inner, heads, kv_heads].contains(&0) {
            let found = format!("{width}, {inner}, {heads} and {kv_heads}");
            return Err(Error::argument("backbone", "width, channels, heads and key heads above 0", found));
        }
        Ok(sizes)
    }

    /// The backbone's family in these sizes; scores are scaled by the width of the narrower heads.
    fn model(self, backbone: &ModelConfig) -> ModelConfig {
        let mut rope = backbone.rope.clone();
        for table in &mut rope {
            // Its factors are those of the backbone's pairs of channels.
            if matches!(table.scaling, RopeScaling::LongRope { .. }) && self.head_dim != backbone.head_dim {
                table.scaling = RopeScaling::Default;
            }
        }
        let narrower = |width: usize| match width {
            0 => 0,
            width => (width * self.inner / backbone.intermediate_size).max(1),
        };
        let experts = backbone.experts.map(|experts| ExpertsConfig {
            width: narrower(experts.width),
            shared_width: narrower(experts.shared_width),
            ..experts
        });
        // Side blocks have nothing but their own stream to read.
        let mut alone = (0..backbone.num_hidden_layers).map(|index| backbone.parts(index).stands_alone());
        let block_kinds = if alone.all(|alone| alone) { backbone.block_kinds.clone() } else { Vec::new() };
        ModelConfig {
            rope,
            experts,
            hidden_size: self.width,
            intermediate_size: self.inner,
            num_attention_heads: self.heads,
            num_key_value_heads: self.kv_heads,
            head_dim: self.head_dim,
            attention_scale: AttentionScale::HeadDim,
            layer_shapes: Vec::new(),
            layer_head_dims: Vec::new(),
            per_layer_input: None,
            embedding_width: None,
            has_final_norm: true,
            block_kinds,
            ..backbone.clone()
        }
    }
}
