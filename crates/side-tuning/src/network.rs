//! The side network: downsampling, gates, blocks, norm, upsampling and mix.

use burn::{
    module::{Module, Param},
    nn::Linear,
    tensor::Tensor,
};
use kiln_models::{
    Context, KvCache, LayerNorm, RmsNorm,
    config::{LlamaConfig, ModelConfig, OptConfig},
    llama::{LlamaAttention, LlamaBlock, LlamaMlp},
    opt::{OptAttention, OptBlock},
};

use crate::{Downsampler, Gate, Mixer, Result, SideConfig, config::GateShape, init::Init};

/// What is trained: everything beside the backbone. Its parameters are f32.
#[derive(Module, Debug)]
pub struct SideNetwork {
    /// One for each block; the first serves the embedding too, unless it has its own, which then comes first.
    pub downsample: Vec<Downsampler>,
    /// One for each block.
    pub gates: Vec<Gate>,
    /// As many as the backbone has.
    pub blocks: Vec<SideBlock>,
    /// After the last block.
    pub norm: SideNorm,
    /// To the backbone's width.
    pub upsample: Linear,
    /// What the head sees.
    pub mix: Mixer,
    #[module(skip)]
    model: ModelConfig,
    #[module(skip)]
    side_width: usize,
}

/// A block of the backbone's architecture.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)] // all blocks of a network are alike
pub enum SideBlock {
    /// Of the LLaMA family.
    Llama(LlamaBlock<Linear>),
    /// Of OPT.
    Opt(OptBlock<Linear>),
}

/// The backbone's kind of norm.
#[derive(Module, Debug)]
pub enum SideNorm {
    /// RMSNorm.
    Rms(RmsNorm),
    /// LayerNorm.
    Layer(LayerNorm),
}

impl SideNorm {
    fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Rms(norm) => norm.forward(x),
            Self::Layer(norm) => norm.forward(x),
        }
    }
}

impl SideNetwork {
    pub(crate) fn new(config: &SideConfig, backbone: &ModelConfig, init: &Init) -> Result<Self> {
        let model = config.side_model(backbone)?;
        let ([width, layers], [side, _]) = (width_and_layers(backbone), width_and_layers(&model));
        let modules = layers + usize::from(!config.shared_embedding);
        let block = |index: usize| match &model {
            ModelConfig::Opt(config) => SideBlock::Opt(opt_block(config, index, init)),
            ModelConfig::Llama(config) => SideBlock::Llama(llama_block(config, index, init)),
            _ => unreachable!("side models are LLaMA's or OPT's"),
        };
        let norm = match &model {
            ModelConfig::Llama(config) => SideNorm::Rms(init.rms_norm(side, config.rms_norm_eps)),
            ModelConfig::Opt(config) => SideNorm::Layer(init.layer_norm(side, config.layer_norm_affine)),
            _ => unreachable!("side models are LLaMA's or OPT's"),
        };
        Ok(Self {
            downsample: (0..modules)
                .map(|index| Downsampler::new(config, [width, side], &format!("downsample.{index}"), init))
                .collect(),
            gates: (0..layers).map(|_| Gate::new(&config.gate, side, init)).collect(),
            blocks: (0..layers).map(block).collect(),
            norm,
            upsample: match config.mix {
                crate::HeadMix::Additive => init.zero_linear([side, width]),
                _ => init.linear("upsample", [side, width], true),
            },
            mix: Mixer::new(config.mix, config.mix_shape, width, init),
            model,
            side_width: side,
        })
    }

    /// Width of its blocks.
    pub fn width(&self) -> usize {
        self.side_width
    }

    /// Its blocks as a model of their own.
    pub fn model_config(&self) -> &ModelConfig {
        &self.model
    }

    /// `context` as the side blocks need it.
    pub(crate) fn context(&self, mut context: Context, positions: &[u32]) -> Context {
        if let ModelConfig::Llama(config) = &self.model {
            let device = context.ids.device();
            let mut beside = context.clone();
            beside.rotary = Some(config.rope.tables(config.head_dim, positions, &device));
            context.beside = Some(beside.into());
        }
        context
    }

    /// The module that takes state `state`: 0 is the embedding, `i + 1` the output of block `i`.
    fn downsampler(&self, state: usize) -> &Downsampler {
        let own = self.downsample.len() > self.blocks.len();
        &self.downsample[if own { state } else { state.saturating_sub(1) }]
    }

    /// What is kept of the backbone's state `state`.
    pub(crate) fn features(&self, state: usize, x: Tensor<3>) -> Tensor<3> {
        self.downsampler(state).features(x)
    }

    /// The side's state before its first block.
    pub(crate) fn start(&self, features: Tensor<3>) -> Tensor<3> {
        self.downsampler(0).forward(features)
    }

    /// Side block `index`: from the features of the backbone's block `index` and the side's state before.
    pub(crate) fn step(
        &self,
        index: usize,
        features: Tensor<3>,
        side: Tensor<3>,
        context: &Context,
        cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        let x = self.gates[index].forward(self.downsampler(index + 1).forward(features), side);
        let context = context.beside.as_deref().unwrap_or(context);
        match (&self.blocks[index], &self.model) {
            (SideBlock::Llama(block), ModelConfig::Llama(config)) => {
                block.forward(index, x, context, cache, config)
            }
            (SideBlock::Opt(block), ModelConfig::Opt(config)) => {
                block.forward(index, x, context, cache, config)
            }
            _ => unreachable!("blocks are made with the configuration"),
        }
    }

    /// What the head sees, from the backbone's normed state and the side's last one.
    pub(crate) fn finish<const D: usize>(
        &self,
        backbone: impl FnOnce() -> Tensor<D>,
        side: Tensor<D>,
    ) -> Tensor<D> {
        self.mix.forward(backbone, self.upsample.forward(self.norm.forward(side)))
    }

    /// Whether the embedding's downsampling has parameters that require gradients.
    pub(crate) fn trains_start(&self) -> bool {
        let first = self.downsampler(0);
        let weights = first.down.iter().map(|linear| linear.weight.val().is_require_grad());
        let norm = first.norm.iter().filter_map(|norm| norm.weight.as_ref());
        weights
            .chain(norm.map(|weight: &Param<Tensor<1>>| weight.val().is_require_grad()))
            .any(|trained| trained)
    }
}

/// Width of the residual stream and number of blocks.
pub(crate) fn width_and_layers(model: &ModelConfig) -> [usize; 2] {
    match model {
        ModelConfig::Llama(config) => [config.hidden_size, config.num_hidden_layers],
        ModelConfig::Opt(config) => [config.hidden_size, config.num_hidden_layers],
        _ => [0, 0],
    }
}

fn llama_block(config: &LlamaConfig, index: usize, init: &Init) -> LlamaBlock<Linear> {
    let (width, inner, eps) = (config.hidden_size, config.intermediate_size, config.rms_norm_eps);
    let (query, key) =
        (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
    let linear = |name: &str, shape, bias| init.linear(&format!("blocks.{index}.{name}"), shape, bias);
    let head_norm = || config.qk_norm.then(|| init.rms_norm(config.head_dim, eps));
    LlamaBlock {
        input_layernorm: init.rms_norm(width, eps),
        self_attn: LlamaAttention {
            q_proj: linear("self_attn.q_proj", [width, query], config.qkv_bias),
            k_proj: linear("self_attn.k_proj", [width, key], config.qkv_bias),
            v_proj: linear("self_attn.v_proj", [width, key], config.qkv_bias),
            o_proj: linear("self_attn.o_proj", [query, width], config.o_bias),
            q_norm: head_norm(),
            k_norm: head_norm(),
        },
        post_attention_layernorm: init.rms_norm(width, eps),
        mlp: LlamaMlp {
            gate_proj: linear("mlp.gate_proj", [width, inner], config.mlp_bias),
            up_proj: linear("mlp.up_proj", [width, inner], config.mlp_bias),
            down_proj: linear("mlp.down_proj", [inner, width], config.mlp_bias),
        },
    }
}

fn opt_block(config: &OptConfig, index: usize, init: &Init) -> OptBlock<Linear> {
    let (width, inner, affine) = (config.hidden_size, config.ffn_dim, config.layer_norm_affine);
    let linear = |name: &str, shape| init.linear(&format!("blocks.{index}.{name}"), shape, config.bias);
    OptBlock {
        self_attn_layer_norm: init.layer_norm(width, affine),
        self_attn: OptAttention {
            q_proj: linear("self_attn.q_proj", [width, width]),
            k_proj: linear("self_attn.k_proj", [width, width]),
            v_proj: linear("self_attn.v_proj", [width, width]),
            out_proj: linear("self_attn.out_proj", [width, width]),
        },
        final_layer_norm: init.layer_norm(width, affine),
        fc1: linear("fc1", [width, inner]),
        fc2: linear("fc2", [inner, width]),
    }
}

/// Trained parameters of a side network, without making it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParameterCounts {
    /// Of the blocks.
    pub blocks: usize,
    /// Of the downsampling.
    pub downsample: usize,
    /// Of the upsampling.
    pub upsample: usize,
    /// Of the gates and of the mix.
    pub gates: usize,
    /// Of the final norm.
    pub norm: usize,
}

impl ParameterCounts {
    /// All of them.
    pub fn total(&self) -> usize {
        self.blocks + self.downsample + self.upsample + self.gates + self.norm
    }
}

impl SideConfig {
    /// Parameters of the side network of a backbone.
    ///
    /// # Errors
    /// As [`side_model`](Self::side_model).
    pub fn parameter_counts(&self, backbone: &ModelConfig) -> Result<ParameterCounts> {
        let model = self.side_model(backbone)?;
        let ([width, layers], [side, _]) = (width_and_layers(backbone), width_and_layers(&model));
        let bias = |size: usize, there: bool| if there { size } else { 0 };
        let linear = |a: usize, b: usize| a * b + bias(b, self.downsample_bias);
        let module = match self.downsample {
            crate::Downsample::Linear => linear(width, side),
            kind if kind.is_low_rank() => linear(width, self.rank) + linear(self.rank, side),
            _ => 0,
        } + bias(2 * side, self.downsample_norm);
        let (block, norm) = match &model {
            ModelConfig::Llama(config) => (llama_block_parameters(config), side),
            ModelConfig::Opt(config) => {
                let (inner, norm) = (config.ffn_dim, bias(2 * side, config.layer_norm_affine));
                let linears = 4 * side * side + 2 * side * inner + bias(5 * side + inner, config.bias);
                (linears + 2 * norm, norm)
            }
            _ => (0, 0),
        };
        let alpha = match self.mix {
            crate::HeadMix::Raw { .. } | crate::HeadMix::Sigmoid { .. } => self.mix_shape.size(width),
            _ => 0,
        };
        Ok(ParameterCounts {
            blocks: layers * block,
            downsample: (layers + usize::from(!self.shared_embedding)) * module,
            upsample: side * width + width,
            gates: layers * GateShape::size(self.gate.shape, side) + alpha,
            norm,
        })
    }
}

fn llama_block_parameters(config: &LlamaConfig) -> usize {
    let (side, inner, head) = (config.hidden_size, config.intermediate_size, config.head_dim);
    let (query, key) = (config.num_attention_heads * head, config.num_key_value_heads * head);
    let there = |size: usize, there: bool| if there { size } else { 0 };
    side * (2 * query + 2 * key + 3 * inner)
        + 2 * side
        + there(query + 2 * key, config.qkv_bias)
        + there(side, config.o_bias)
        + there(2 * inner + side, config.mlp_bias)
        + there(2 * head, config.qk_norm)
}
