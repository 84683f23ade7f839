//! The side network: downsampling, gates, blocks, norm, upsampling and mix.

use std::convert::Infallible;

use burn::{
    module::{Module, Param},
    nn::Linear,
    tensor::Tensor,
};
use kiln_models::{Block, BlockPart, Context, KvCache, Norm, PartShape, config::ModelConfig};

use crate::{Downsampler, Gate, Mixer, Result, SideConfig, config::GateShape, init::Init};

/// What is trained: everything beside the backbone. Its parameters are f32.
#[derive(Module, Debug)]
pub struct SideNetwork {
    /// One for each block; the first serves the embedding too, unless it has its own, which then comes first.
    pub downsample: Vec<Downsampler>,
    /// One for each block.
    pub gates: Vec<Gate>,
    /// As many as the backbone has, less those that are dropped.
    pub blocks: Vec<Block<Linear>>,
    /// After the last block.
    pub norm: Norm,
    /// To the backbone's width.
    pub upsample: Linear,
    /// What the head sees.
    pub mix: Mixer,
    #[module(skip)]
    model: ModelConfig,
    #[module(skip)]
    side_width: usize,
    /// For each block of the backbone the place of its side block.
    #[module(skip)]
    places: Vec<Option<usize>>,
}

impl SideNetwork {
    pub(crate) fn new(config: &SideConfig, backbone: &ModelConfig, init: &Init) -> Result<Self> {
        let model = config.side_model(backbone)?;
        let (width, layers, side) = (backbone.hidden_size, backbone.num_hidden_layers, model.hidden_size);
        let kept = config.kept(layers)?;
        let own = usize::from(!config.shared_embedding);
        // Named as where no block is dropped, which initial values depend on.
        let modules = (0..own).chain(kept.iter().map(|index| index + own));
        Ok(Self {
            downsample: modules
                .map(|index| Downsampler::new(config, [width, side], &format!("downsample.{index}"), init))
                .collect(),
            gates: kept.iter().map(|_| Gate::new(&config.gate, side, init)).collect(),
            blocks: kept.iter().map(|index| block(&model, *index, init)).collect(),
            norm: init.norm(model.family.norm, side, model.norm_eps, model.norm_affine),
            upsample: match config.mix {
                crate::HeadMix::Additive => init.zero_linear([side, width]),
                _ => init.linear("upsample", [side, width], true),
            },
            mix: Mixer::new(config.mix, config.mix_shape, width, init),
            model,
            side_width: side,
            places: (0..layers).map(|index| kept.binary_search(&index).ok()).collect(),
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
        let model = &self.model;
        if !model.rope.is_empty() {
            let device = context.ids.device();
            let mut beside = context.clone();
            let tables = model.rope.iter().map(|rope| rope.tables(model.head_dim, positions, &device));
            beside.rotary = tables.collect();
            context.beside = Some(beside.into());
        }
        context
    }

    /// The module of the embedding.
    fn first_downsampler(&self) -> &Downsampler {
        &self.downsample[0]
    }

    /// The module of side block `place`.
    fn downsampler(&self, place: usize) -> &Downsampler {
        &self.downsample[place + self.downsample.len() - self.blocks.len()]
    }

    /// The side blocks, with the places of those of the backbone beside which they stand.
    pub(crate) fn sides_mut(&mut self) -> impl Iterator<Item = (usize, &mut Block<Linear>)> {
        let beside = self.places.iter().enumerate().filter_map(|(index, place)| place.map(|_| index));
        beside.zip(&mut self.blocks)
    }

    /// What is kept of the backbone's state `state`: 0 is the embedding, `i + 1` the output of block `i`.
    pub(crate) fn features(&self, state: usize, x: Tensor<3>) -> Tensor<3> {
        let place = state.checked_sub(1).and_then(|index| self.places[index]);
        place.map_or(self.first_downsampler(), |place| self.downsampler(place)).features(x)
    }

    /// The side's state before its first block.
    pub(crate) fn start(&self, features: Tensor<3>) -> Tensor<3> {
        self.first_downsampler().forward(features)
    }

    /// From the features of the backbone's block `index` and the side's state before to the side's state behind, which is the
    /// same where that block has no side block.
    pub(crate) fn step(
        &self,
        index: usize,
        features: Tensor<3>,
        side: Tensor<3>,
        context: &Context,
        cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        let Some(place) = self.places[index] else { return side };
        let x = self.gates[place].forward(self.downsampler(place).forward(features), side);
        let context = context.beside.as_deref().unwrap_or(context);
        self.blocks[place].forward(index, x, context, cache, &self.model)
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
        let first = self.first_downsampler();
        let weights = first.down.iter().map(|linear| linear.weight.val().is_require_grad());
        let norm = first.norm.iter().filter_map(|norm| norm.weight.as_ref());
        weights
            .chain(norm.map(|weight: &Param<Tensor<1>>| weight.val().is_require_grad()))
            .any(|trained| trained)
    }
}

fn block(model: &ModelConfig, index: usize, init: &Init) -> Block<Linear> {
    let (kind, eps, affine) = (model.family.norm, model.norm_eps, model.norm_affine);
    let made = Block::build(model, index, |name, shape| {
        Ok::<_, Infallible>(match shape {
            PartShape::Norm(width) => BlockPart::Norm(init.norm(kind, width, eps, affine)),
            PartShape::Vector(size, role) => BlockPart::Vector(init.vector(size, role)),
            PartShape::DenseLinear(shape) => {
                BlockPart::Linear(init.linear(&format!("blocks.{index}.{name}"), shape, false))
            }
            PartShape::Linear(shape, bias) => {
                BlockPart::Linear(init.linear(&format!("blocks.{index}.{name}"), shape, bias))
            }
        })
    });
    match made {
        Ok(block) => block,
        Err(never) => match never {},
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
        let (width, side) = (backbone.hidden_size, model.hidden_size);
        let kept = self.kept(backbone.num_hidden_layers)?;
        let bias = |size: usize, there: bool| if there { size } else { 0 };
        let linear = |a: usize, b: usize| a * b + bias(b, self.downsample_bias);
        let module = match self.downsample {
            crate::Downsample::Linear => linear(width, side),
            kind if kind.is_low_rank() => linear(width, self.rank) + linear(self.rank, side),
            _ => 0,
        } + bias(2 * side, self.downsample_norm);
        let tensors = model.tensors();
        let constants = kept.iter().flat_map(|&index| {
            let constants = model.parts(index).iter().filter(|part| part.is_constant());
            constants.map(move |part| (index, part.name()))
        });
        let constants: Vec<_> = constants.map(|(index, name)| model.family.path(index, name)).collect();
        let count = |prefix: &str| -> usize {
            let trained = tensors.iter().filter(|tensor| !constants.contains(&tensor.name));
            let under = trained.filter(|tensor| tensor.name.starts_with(prefix));
            under.map(|tensor| tensor.shape.iter().product::<usize>()).sum()
        };
        let blocks = kept.iter().map(|index| count(&format!("{}.{index}.", model.family.names.blocks))).sum();
        let norm = count(&format!("{}.", model.family.names.final_norm));
        let alpha = match self.mix {
            crate::HeadMix::Raw { .. } | crate::HeadMix::Sigmoid { .. } => self.mix_shape.size(width),
            _ => 0,
        };
        Ok(ParameterCounts {
            blocks,
            downsample: (kept.len() + usize::from(!self.shared_embedding)) * module,
            upsample: side * width + width,
            gates: kept.len() * GateShape::size(self.gate.shape, side) + alpha,
            norm,
        })
    }
}
