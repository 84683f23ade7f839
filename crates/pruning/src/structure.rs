//! Dependency groups: which rows and columns of which linears must go together. The one place that knows.

use std::collections::BTreeMap;

use kiln_models::{
    AnyModel,
    config::{LayerShape, ModelConfig},
};
use kiln_quant_core::Projection;

use crate::{Error, Result};

/// What the positions along one axis of a linear stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Channels of the residual stream, the same in all blocks.
    Hidden,
    /// Channels of the block's query heads, head by head.
    Query,
    /// Channels of the block's key and value heads, head by head.
    KeyValue,
    /// Channels of the block's MLP.
    Channels,
}

/// A linear's place in the groups; its weight is `[d_input, d_output]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Coupling {
    /// The linear's path.
    pub path: String,
    /// The block it stands in.
    pub layer: usize,
    /// Role of its inputs.
    pub input: Role,
    /// Role of its outputs.
    pub output: Role,
}

impl Coupling {
    /// Whether the linear belongs to the attention of its block, not to the MLP.
    pub fn is_attention(&self) -> bool {
        [self.input, self.output].iter().any(|role| matches!(role, Role::Query | Role::KeyValue))
    }
}

/// The groups of one block.
///
/// | group | unit | outputs lost by | inputs lost by |
/// | --- | --- | --- | --- |
/// | attention | a key-value head with its query heads (without grouped queries: one head) | q, k, v | o (`out_proj`) |
/// | MLP | a channel | gate and up (`fc1`) | down (`fc2`) |
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    /// Path of the attention group, e.g. `model.layers.3.self_attn`.
    pub attention: String,
    /// Path of the MLP group, e.g. `model.layers.3.mlp`.
    pub mlp: String,
    /// Heads and channels.
    pub shape: LayerShape,
}

impl Layer {
    /// Query heads that share a key-value head.
    pub fn queries_per_group(&self) -> usize {
        self.shape.num_attention_heads / self.shape.num_key_value_heads
    }
}

/// All groups of a model, from its declared structure.
///
/// ```
/// use kiln_models::Checkpoint;
/// use kiln_pruning::Structure;
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/models/tiny-llama");
/// let structure = Structure::of(Checkpoint::open(folder)?.config())?;
/// assert_eq!(structure.layers[0].attention, "model.layers.0.self_attn");
/// assert_eq!(structure.layers[0].queries_per_group(), 3);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Structure {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// The blocks' groups.
    pub layers: Vec<Layer>,
    /// All linears of the blocks, in the order in which data flows.
    pub linears: Vec<Coupling>,
}

const LLAMA: [(&str, Role, Role); 7] = [
    ("self_attn.q_proj", Role::Hidden, Role::Query),
    ("self_attn.k_proj", Role::Hidden, Role::KeyValue),
    ("self_attn.v_proj", Role::Hidden, Role::KeyValue),
    ("self_attn.o_proj", Role::Query, Role::Hidden),
    ("mlp.gate_proj", Role::Hidden, Role::Channels),
    ("mlp.up_proj", Role::Hidden, Role::Channels),
    ("mlp.down_proj", Role::Channels, Role::Hidden),
];
const OPT: [(&str, Role, Role); 6] = [
    ("self_attn.q_proj", Role::Hidden, Role::Query),
    ("self_attn.k_proj", Role::Hidden, Role::KeyValue),
    ("self_attn.v_proj", Role::Hidden, Role::KeyValue),
    ("self_attn.out_proj", Role::Query, Role::Hidden),
    ("fc1", Role::Hidden, Role::Channels),
    ("fc2", Role::Channels, Role::Hidden),
];

impl Structure {
    /// # Errors
    /// [`Error::Mismatch`] for an architecture whose groups aren't known here.
    pub fn of(config: &ModelConfig) -> Result<Self> {
        let (hidden, head_dim, count, prefix) = match config {
            ModelConfig::Llama(c) => (c.hidden_size, c.head_dim, c.num_hidden_layers, "model.layers"),
            ModelConfig::Opt(c) => (c.hidden_size, c.head_dim, c.num_hidden_layers, "model.decoder.layers"),
            _ => return Err(Error::mismatch("architecture", "the LLaMA family or OPT", "another")),
        };
        let (mut layers, mut linears) = (Vec::new(), Vec::new());
        for layer in 0..count {
            let (shape, table): (_, &[_]) = match config {
                ModelConfig::Opt(config) => (config.layer(layer), &OPT),
                ModelConfig::Llama(config) => (config.layer(layer), &LLAMA),
                _ => continue,
            };
            layers.push(Layer {
                attention: format!("{prefix}.{layer}.self_attn"),
                mlp: format!("{prefix}.{layer}.mlp"),
                shape,
            });
            linears.extend(table.iter().map(|&(name, input, output)| Coupling {
                path: format!("{prefix}.{layer}.{name}"),
                layer,
                input,
                output,
            }));
        }
        Ok(Self { hidden, head_dim, layers, linears })
    }

    /// The group's linears, root (q, gate) first and the one that leads back to the residual stream last.
    pub fn group(&self, layer: usize, attention: bool) -> Vec<&Coupling> {
        let linears = self.linears.iter();
        linears.filter(|linear| linear.layer == layer && linear.is_attention() == attention).collect()
    }

    /// Linears by path.
    pub(crate) fn by_path(&self) -> BTreeMap<&str, &Coupling> {
        self.linears.iter().map(|linear| (linear.path.as_str(), linear)).collect()
    }

    /// Weights that go with one key-value head of `layer`, biases not counted.
    pub fn head_parameters(&self, layer: usize) -> usize {
        (2 * self.layers[layer].queries_per_group() + 2) * self.head_dim * self.hidden
    }

    /// Weights that go with one MLP channel of `layer`, biases not counted.
    pub fn channel_parameters(&self, layer: usize) -> usize {
        self.group(layer, false).len() * self.hidden
    }
}

/// A model's shape, whichever architecture it is.
pub fn model_config<P: Projection>(model: &AnyModel<P>) -> ModelConfig {
    match model {
        AnyModel::Llama(model) => ModelConfig::Llama(model.config().clone()),
        AnyModel::Opt(model) => ModelConfig::Opt(model.config().clone()),
    }
}
