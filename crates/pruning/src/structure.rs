//! Dependency groups: which rows and columns of which linears must go together. The one place that knows.

use std::collections::BTreeMap;

use kiln_models::{
    config::{LayerShape, ModelConfig},
    families::{Channels, LinearRole, NormAxis, Part, VectorRole},
};

/// What goes together, one at a time, from the linears of a group.
///
/// | units | outputs lost by | inputs lost by |
/// | --- | --- | --- |
/// | heads | q, k, v, or the matrix of all three | o (`out_proj`) |
/// | channels | gate and up, or the matrix of both (`fc1`) | down (`fc2`) |
/// | channels of experts | gate and up of every expert | down of every expert |
/// | channels of the shared expert | its gate and up | its down |
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Units {
    /// A key-value head with its query heads (without grouped queries: one head).
    Heads,
    /// A channel of the MLP.
    Channels,
    /// A channel of each expert, which need not be the same one: experts stay equally wide.
    ExpertChannels,
    /// A channel of the expert that all tokens go through.
    SharedExpertChannels,
}

impl Units {
    /// Those that lie along an axis; `None` for the residual stream and what stays.
    fn along(channels: Channels) -> Option<Self> {
        Some(match channels {
            Channels::Query | Channels::GatedQuery | Channels::KeyValue | Channels::QueryKeyValue(_) => {
                Self::Heads
            }
            Channels::Mlp | Channels::GateUp => Self::Channels,
            Channels::Expert => Self::ExpertChannels,
            Channels::SharedExpert => Self::SharedExpertChannels,
            Channels::Hidden
            | Channels::PerLayer
            | Channels::Experts
            | Channels::One
            | Channels::DeltaMixed
            | Channels::DeltaValue
            | Channels::DeltaHeads => return None,
        })
    }

    /// What they are called in messages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Heads => "key-value heads",
            Self::Channels | Self::ExpertChannels | Self::SharedExpertChannels => "channels",
        }
    }
}

/// A linear's place in the groups; its weight is `[d_input, d_output]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Coupling {
    /// The linear's path.
    pub path: String,
    /// The block it stands in.
    pub layer: usize,
    /// The expert it belongs to, of those that tokens are sent to.
    pub expert: Option<usize>,
    /// What lies along its inputs.
    pub input: Channels,
    /// What lies along its outputs.
    pub output: Channels,
}

impl Coupling {
    /// What goes from it; `None` for linears that only the residual stream's channels go from.
    pub fn units(&self) -> Option<Units> {
        Units::along(self.input).or(Units::along(self.output))
    }

    /// Whether units go from its inputs: o and down.
    pub(crate) fn loses_inputs(&self) -> bool {
        Units::along(self.input).is_some()
    }
}

/// Linears that lose the same units.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// What they are.
    pub units: Units,
    /// What plans call it: `self_attn`, `mlp`, `mlp.experts` or `mlp.shared_expert` behind the block's path, whatever the
    /// family's modules are called; e.g. `model.layers.3.self_attn`.
    pub path: String,
    /// How many there are.
    pub count: usize,
    /// Why none may go.
    pub stays: Option<&'static str>,
}

/// The groups of one block.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    /// Heads and channels.
    pub shape: LayerShape,
    /// Width of a head.
    pub head_dim: usize,
    /// Experts that tokens are sent to; 0 where there are none.
    pub experts: usize,
    /// Attention first.
    pub groups: Vec<Group>,
}

impl Layer {
    /// Query heads that share a key-value head.
    pub fn queries_per_group(&self) -> usize {
        self.shape.num_attention_heads / self.shape.num_key_value_heads
    }

    /// The group that loses `units`, if the block has one.
    pub fn group(&self, units: Units) -> Option<&Group> {
        self.groups.iter().find(|group| group.units == units)
    }

    /// The group whose units lie along an axis, and how many positions each takes there.
    pub(crate) fn along(&self, channels: Channels) -> Option<(&Group, usize)> {
        let (head, queries) = (self.head_dim, self.queries_per_group());
        let per_unit = match channels {
            Channels::Query => queries * head,
            Channels::GatedQuery => 2 * queries * head,
            Channels::QueryKeyValue(_) => (queries + 2) * head,
            Channels::KeyValue => head,
            Channels::GateUp => 2,
            _ => 1,
        };
        Some((self.group(Units::along(channels)?)?, per_unit))
    }
}

/// All groups of a model, from its declared structure.
///
/// ```
/// use kiln_models::Checkpoint;
/// use kiln_pruning::{Structure, Units};
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/models/tiny-llama");
/// let structure = Structure::of(Checkpoint::open(folder)?.config());
/// let attention = structure.layers[0].group(Units::Heads).unwrap();
/// assert_eq!((attention.path.as_str(), attention.count), ("model.layers.0.self_attn", 2));
/// assert_eq!(structure.layers[0].queries_per_group(), 3);
/// # Ok::<(), kiln_models::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Structure {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Why channels of the residual stream may not go.
    pub hidden_stays: Option<&'static str>,
    /// Why whole blocks may not go.
    pub layers_stay: Option<&'static str>,
    /// The blocks' groups.
    pub layers: Vec<Layer>,
    /// All linears of the blocks, in the order in which data flows.
    pub linears: Vec<Coupling>,
}

/// Why none of what later blocks read may go.
const BLOCKS_READ_MORE: &str =
    "blocks read keys of earlier ones or inputs of their own beside the residual stream";

impl Structure {
    /// The groups of a model of this shape.
    pub fn of(config: &ModelConfig) -> Self {
        let family = config.family;
        let blocks = 0..config.num_hidden_layers;
        let reads_more =
            config.per_layer_input.is_some() || blocks.clone().any(|layer| !config.parts(layer).has_keys());
        let routers_scale = |layer: usize| {
            let scale = |part: &Part| matches!(part, Part::Vector(v) if v.role == VectorRole::RouterScale);
            config.parts(layer).iter().any(scale)
        };
        let hidden_stays = match () {
            () if reads_more => Some(BLOCKS_READ_MORE),
            () if config.embedding_width.is_some() => Some("the embedding is narrower and projected"),
            () if blocks.clone().any(routers_scale) => Some("routers have a norm of their own over it"),
            () => None,
        };
        let linears = blocks.clone().flat_map(|layer| {
            let experts = config.parts(layer).experts();
            config.linears(layer).into_iter().map(move |(name, role)| {
                let [input, output] = role.channels();
                let expert = experts.and_then(|experts| experts.expert_of(&name));
                Coupling { path: family.path(layer, &name), layer, expert, input, output }
            })
        });
        Self {
            hidden: config.hidden_size,
            hidden_stays,
            layers_stay: reads_more.then_some(BLOCKS_READ_MORE),
            layers: blocks.clone().map(|layer| layer_of(config, layer, reads_more)).collect(),
            linears: linears.collect(),
        }
    }

    /// The linears that `units` go from, root (q, gate) first and the one that leads back to the residual stream last; of
    /// experts one after the other.
    pub fn linears_of(&self, layer: usize, units: Units) -> impl Iterator<Item = &Coupling> {
        self.linears.iter().filter(move |linear| linear.layer == layer && linear.units() == Some(units))
    }

    /// Linears by path.
    pub(crate) fn by_path(&self) -> BTreeMap<&str, &Coupling> {
        self.linears.iter().map(|linear| (linear.path.as_str(), linear)).collect()
    }

    /// Weights that go with one unit of a group of `layer`, biases not counted.
    pub fn unit_parameters(&self, layer: usize, units: Units) -> usize {
        let along = |channels| self.layers[layer].along(channels).map_or(0, |(_, per_unit)| per_unit);
        let linears = self.linears_of(layer, units);
        linears.map(|linear| (along(linear.input) + along(linear.output)) * self.hidden).sum()
    }
}

fn layer_of(config: &ModelConfig, layer: usize, reads_more: bool) -> Layer {
    let (parts, shape) = (config.parts(layer), config.layer(layer));
    let mut over_heads = parts.norms().map(|norm| norm.place.axis());
    let heads_stay = match () {
        () if reads_more => Some(BLOCKS_READ_MORE),
        () if over_heads.any(|axis| !matches!(axis, NormAxis::Hidden | NormAxis::Head)) => {
            Some("a norm runs over all of them together")
        }
        () if config.alibi != 0.0 => {
            Some("what scores lose with the distance goes by a head's place among all")
        }
        () => None,
    };
    let experts = parts.experts().and(config.experts).map_or(0, |experts| experts.count);
    let has = |role| parts.linear(role).is_some();
    let groups = [
        (has(LinearRole::Output), Units::Heads, "self_attn", shape.num_key_value_heads, heads_stay),
        (has(LinearRole::Down), Units::Channels, "mlp", shape.intermediate_size, None),
        (experts > 0, Units::ExpertChannels, "mlp.experts", shape.expert_width, None),
        (
            has(LinearRole::SharedDown),
            Units::SharedExpertChannels,
            "mlp.shared_expert",
            shape.shared_expert_width,
            None,
        ),
    ];
    let groups = groups.into_iter().filter(|(exists, ..)| *exists);
    let groups = groups.map(|(_, units, name, count, stays)| Group {
        units,
        path: config.family.path(layer, name),
        count,
        stays,
    });
    Layer { shape, head_dim: config.head_dim_of(layer), experts, groups: groups.collect() }
}
