//! Dependency groups: which rows and columns of which linears must go together. The one place that knows.

use std::collections::BTreeMap;

use kiln_models::{
    config::{LayerShape, ModelConfig},
    families::{Channels, LinearRole, NormAxis},
};

use crate::{Error, Result};

/// A linear's place in the groups; its weight is `[d_input, d_output]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Coupling {
    /// The linear's path.
    pub path: String,
    /// The block it stands in.
    pub layer: usize,
    /// What lies along its inputs.
    pub input: Channels,
    /// What lies along its outputs.
    pub output: Channels,
}

impl Coupling {
    /// Whether the linear belongs to the attention of its block, not to the MLP.
    pub fn is_attention(&self) -> bool {
        [self.input, self.output].iter().any(|channels| channels.are_heads())
    }
}

/// The groups of one block.
///
/// | group | unit | outputs lost by | inputs lost by |
/// | --- | --- | --- | --- |
/// | attention | a key-value head with its query heads (without grouped queries: one head) | q, k, v, or the matrix of all three | o (`out_proj`) |
/// | MLP | a channel | gate and up, or the matrix of both (`fc1`) | down (`fc2`) |
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    /// Path of the attention group, e.g. `model.layers.3.self_attn`.
    pub attention: String,
    /// Path of the MLP group, e.g. `model.layers.3.mlp`.
    pub mlp: String,
    /// Heads and channels.
    pub shape: LayerShape,
    /// Whether heads can go: not where a norm runs over all of them together, whose mean would be another.
    pub heads_go: bool,
    /// Whether the MLP is a mixture of experts, whose channels stay.
    pub has_experts: bool,
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
/// let structure = Structure::of(Checkpoint::open(folder)?.config());
/// assert_eq!(structure.layers[0].attention, "model.layers.0.self_attn");
/// assert_eq!(structure.layers[0].queries_per_group(), 3);
/// # Ok::<(), kiln_models::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Structure {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Whether channels of the residual stream can go.
    pub hidden_goes: bool,
    /// Why nothing may go, in models of which blocks read more than the residual stream.
    pub stays: Option<&'static str>,
    /// The blocks' groups.
    pub layers: Vec<Layer>,
    /// All linears of the blocks, in the order in which data flows.
    pub linears: Vec<Coupling>,
}

impl Structure {
    /// The groups of a model of this shape.
    pub fn of(config: &ModelConfig) -> Self {
        let family = config.family;
        let (mut layers, mut linears) = (Vec::new(), Vec::new());
        for layer in 0..config.num_hidden_layers {
            let parts = config.parts(layer);
            layers.push(Layer {
                attention: family.path(layer, "self_attn"),
                mlp: family.path(layer, "mlp"),
                shape: config.layer(layer),
                has_experts: parts.experts().is_some(),
                heads_go: parts
                    .norms()
                    .all(|norm| matches!(norm.place.axis(), NormAxis::Hidden | NormAxis::Head)),
            });
            linears.extend(config.linears(layer).into_iter().map(|(name, role)| {
                let [input, output] = role.channels();
                Coupling { path: family.path(layer, &name), layer, input, output }
            }));
        }
        let alone = |layer: usize| {
            let parts = config.parts(layer);
            parts.stands_alone() && parts.linear(LinearRole::GatedQuery).is_none()
        };
        let plain = (0..config.num_hidden_layers).all(alone)
            && !family.norms_values
            && config.layer_head_dims.is_empty();
        // The residual stream's channels are those of two more matrices.
        let hidden_goes = config.embedding_width.is_none();
        let stays = (!plain).then_some(
            "heads of several widths or normed values, keys of earlier blocks, recurrent blocks, gated heads or inputs of their own",
        );
        Self { hidden: config.hidden_size, head_dim: config.head_dim, hidden_goes, stays, layers, linears }
    }

    /// Fails for a model of which nothing can go.
    ///
    /// # Errors
    /// [`Error::Mismatch`] with the reason.
    pub(crate) fn check_goes(&self) -> Result<()> {
        match self.stays {
            None => Ok(()),
            Some(found) => {
                Err(Error::mismatch("model", "blocks that read nothing but the residual stream", found))
            }
        }
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
        let width = |linear: &Coupling| if linear.output == Channels::GateUp { 2 } else { 1 };
        self.group(layer, false).into_iter().map(width).sum::<usize>() * self.hidden
    }
}
