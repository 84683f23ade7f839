//! A block of a decoder: attention and MLP, each beside the residual path, from the parts that its family lists.

use std::borrow::Cow;

use burn::{
    module::Param,
    tensor::{
        Tensor,
        activation::{gelu, relu, sigmoid, silu, softplus},
    },
};
use kiln_quant_core::{
    Compute, Projection,
    fused::{self, AttentionSpec},
    operand_of,
};

use crate::{
    Context, KvCache, Norm,
    config::{ExpertsConfig, ModelConfig},
    delta::DeltaNet,
    experts::{Expert, clamped_swiglu, mixture, shared},
    families::{
        Activation, EXPERT_ROLES, FusedRows, LinearRole, NormPlace, Part, Parts, VectorPart, VectorRole,
    },
    norm::divided_by_root_mean_square,
    placement::moved,
};

/// One block; its norms, linears and other parameters in the order of its table.
#[derive(Debug, Clone)]
pub struct Block<P: Projection> {
    pub(crate) table: Parts,
    pub(crate) parts: Vec<BlockPart<P>>,
}

/// A part of a block.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)] // most are linears
pub enum BlockPart<P: Projection> {
    /// A norm.
    Norm(Norm),
    /// A linear.
    Linear(P),
    /// A few numbers, flat.
    Vector(Param<Tensor<1>>),
    /// All experts.
    Experts(Vec<Expert<P>>),
}

/// Linears that read attention's input, and the MLP's.
const READ_BY_ATTENTION: &[LinearRole] = &[
    LinearRole::Query,
    LinearRole::GatedQuery,
    LinearRole::Key,
    LinearRole::Value,
    LinearRole::QueryKeyValue(FusedRows::Concatenated),
    LinearRole::QueryKeyValue(FusedRows::Grouped),
];
const READ_BY_MLP: &[LinearRole] = &[LinearRole::GateUp, LinearRole::Gate, LinearRole::Up];

/// What [`Block::build`] asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PartShape {
    /// A norm of this width.
    Norm(usize),
    /// A linear of shape `[d_input, d_output]`, with a bias or without.
    Linear([usize; 2], bool),
    /// So many numbers, for this.
    Vector(usize, VectorRole),
    /// A linear of shape `[d_input, d_output]` without a bias that is never quantized.
    DenseLinear([usize; 2]),
}

/// What a block reads and gives beside the residual stream.
#[derive(Debug, Default)]
pub(crate) struct Beside {
    /// The block's own input, `[batch, length, channels]`.
    pub input: Option<Tensor<3>>,
    /// Keys and values of the block that it attends to, if that is another.
    pub shared: Option<[Tensor<4>; 2]>,
    /// Its own keys and values, once it has run.
    pub own: Option<[Tensor<4>; 2]>,
}

impl<P: Projection> Block<P> {
    /// Block `index` of the model that `config` describes; `part` makes each part, given its path within the block, and the
    /// linears of experts one by one.
    ///
    /// # Errors
    /// The first error of `part`.
    ///
    /// # Panics
    /// If `part` answers with a part of another kind.
    pub fn build<E>(
        config: &ModelConfig,
        index: usize,
        mut part: impl FnMut(&str, PartShape) -> Result<BlockPart<P>, E>,
    ) -> Result<Self, E> {
        let table = config.parts(index);
        let linear = |role| PartShape::Linear(config.linear_shape(role, index), config.has_bias(role));
        let parts = table.iter().map(|entry| {
            let shape = match entry {
                Part::Norm(norm) => PartShape::Norm(config.norm_width(norm.place, index)),
                Part::Vector(vector) => {
                    let shape = config.vector_shape(vector.role, index);
                    PartShape::Vector(shape.iter().product(), vector.role)
                }
                Part::Linear(part) if part.role.stays_dense() => {
                    PartShape::DenseLinear(config.linear_shape(part.role, index))
                }
                Part::Linear(part) => linear(part.role),
                Part::Experts(experts) => {
                    let count = config.experts.map_or(0, |experts| experts.count);
                    let made = (0..count).map(|expert| {
                        let mut one = |kind: usize| {
                            let name = experts.path(expert, kind);
                            match part(&name, linear(EXPERT_ROLES[kind]))? {
                                BlockPart::Linear(linear) => Ok(linear),
                                _ => panic!("{name}: a part of another kind than a linear"),
                            }
                        };
                        Ok([one(0)?, one(1)?, one(2)?])
                    });
                    return Ok(BlockPart::Experts(made.collect::<Result<_, E>>()?));
                }
            };
            let made = part(entry.name(), shape)?;
            let same = matches!(
                (entry, &made),
                (Part::Norm(_), BlockPart::Norm(_))
                    | (Part::Linear(_), BlockPart::Linear(_))
                    | (Part::Vector(_), BlockPart::Vector(_))
            );
            assert!(same, "{}: a part of another kind than {entry:?}", entry.name());
            Ok(made)
        });
        Ok(Self { table, parts: parts.collect::<Result<_, E>>()? })
    }

    /// Parts with their paths within the block.
    pub fn parts(&self) -> impl Iterator<Item = (&'static str, &BlockPart<P>)> {
        self.table.iter().map(Part::name).zip(&self.parts)
    }

    /// The norms, with what the family says of them.
    pub fn norms_mut(&mut self) -> impl Iterator<Item = (NormPlace, &mut Norm)> {
        self.table.iter().zip(&mut self.parts).filter_map(|(entry, part)| match (entry, part) {
            (Part::Norm(norm), BlockPart::Norm(part)) => Some((norm.place, part)),
            _ => None,
        })
    }

    /// The norm of a place, if the family has one there.
    pub fn norm(&self, place: NormPlace) -> Option<&Norm> {
        self.table.iter().zip(&self.parts).find_map(|(entry, part)| match (entry, part) {
            (Part::Norm(norm), BlockPart::Norm(part)) if norm.place == place => Some(part),
            _ => None,
        })
    }

    /// The norm of a place, if the family has one there.
    pub fn norm_mut(&mut self, place: NormPlace) -> Option<&mut Norm> {
        self.norms_mut().find_map(|(other, norm)| (other == place).then_some(norm))
    }

    /// The linear of a role, if the family has one.
    pub fn linear(&self, role: LinearRole) -> Option<&P> {
        self.table.iter().zip(&self.parts).find_map(|(entry, part)| match (entry, part) {
            (Part::Linear(linear), BlockPart::Linear(part)) if linear.role == role => Some(part),
            _ => None,
        })
    }

    /// The linear of a role, if the family has one.
    pub fn linear_mut(&mut self, role: LinearRole) -> Option<&mut P> {
        self.table.iter().zip(&mut self.parts).find_map(|(entry, part)| match (entry, part) {
            (Part::Linear(linear), BlockPart::Linear(part)) if linear.role == role => Some(part),
            _ => None,
        })
    }

    /// The linears with their paths within the block, in the order in which data flows.
    pub fn linears(&self) -> impl Iterator<Item = (Cow<'static, str>, &P)> {
        let entries = self.table.iter().zip(&self.parts);
        entries.flat_map(|(entry, part)| match (entry, part) {
            (Part::Experts(entry), BlockPart::Experts(experts)) => {
                let named = experts.iter().enumerate().flat_map(move |(index, expert)| {
                    let linears = expert.iter().enumerate();
                    linears.map(move |(kind, linear)| (Cow::Owned(entry.path(index, kind)), linear))
                });
                named.collect()
            }
            (entry, BlockPart::Linear(linear)) => vec![(Cow::Borrowed(entry.name()), linear)],
            _ => Vec::new(),
        })
    }

    /// The linears, as [`linears`](Self::linears) goes through them.
    pub(crate) fn linears_mut(&mut self) -> impl Iterator<Item = &mut P> {
        self.parts.iter_mut().flat_map(|part| match part {
            BlockPart::Linear(linear) => vec![linear],
            BlockPart::Experts(experts) => experts.iter_mut().flatten().collect(),
            BlockPart::Norm(_) | BlockPart::Vector(_) => Vec::new(),
        })
    }

    /// The same block with other projections; `f` gets the path within the block.
    pub(crate) fn try_map<Q: Projection, E>(
        self,
        mut f: impl FnMut(&str, P) -> Result<Q, E>,
    ) -> Result<Block<Q>, E> {
        let table = self.table;
        let parts = table.iter().zip(self.parts).map(|(entry, part)| {
            Ok(match (entry, part) {
                (_, BlockPart::Norm(norm)) => BlockPart::Norm(norm),
                (_, BlockPart::Vector(values)) => BlockPart::Vector(values),
                (entry, BlockPart::Linear(linear)) => BlockPart::Linear(f(entry.name(), linear)?),
                (entry, BlockPart::Experts(experts)) => {
                    let Part::Experts(entry) = entry else { panic!("{entry:?} with experts") };
                    let mapped = experts.into_iter().enumerate().map(|(index, [gate, up, down])| {
                        let mut one = |kind: usize, linear: P| f(&entry.path(index, kind), linear);
                        Ok([one(0, gate)?, one(1, up)?, one(2, down)?])
                    });
                    BlockPart::Experts(mapped.collect::<Result<_, E>>()?)
                }
            })
        });
        Ok(Block { table, parts: parts.collect::<Result<_, E>>()? })
    }

    /// Runs a block that reads nothing but the residual stream; `index` says which one it is of the model that `config`
    /// describes.
    ///
    /// # Shapes
    /// `[batch, length, hidden_size]` → the same.
    ///
    /// # Panics
    /// If `context` has no rotary tables for the config's heads, or `x` doesn't fit it.
    pub fn forward(
        &self,
        index: usize,
        x: Tensor<3>,
        context: &Context,
        cache: Option<&mut KvCache>,
        config: &ModelConfig,
    ) -> Tensor<3> {
        self.forward_beside(index, x, &mut Beside::default(), context, cache, config)
    }

    /// Runs the block on the residual stream and on what it has `beside` it.
    pub(crate) fn forward_beside(
        &self,
        index: usize,
        x: Tensor<3>,
        beside: &mut Beside,
        context: &Context,
        cache: Option<&mut KvCache>,
        config: &ModelConfig,
    ) -> Tensor<3> {
        let added = |y: Tensor<3>| match config.residual_multiplier {
            1.0 => y,
            factor => y.mul_scalar(factor),
        };
        let behind = |place, y| added(self.normed(place, y));
        let normed = self.normed(NormPlace::PreAttention, x.clone());
        if config.parallel {
            let normed = match self.norm(NormPlace::PreMlp) {
                Some(_) => normed,
                // Both sides read it.
                None => self.kept_for(&[READ_BY_ATTENTION, READ_BY_MLP].concat(), normed),
            };
            let attended = self.mixer(index, normed.clone(), beside, context, cache, config);
            let normed = match self.norm(NormPlace::PreMlp) {
                Some(norm) => norm.forward(x.clone()),
                None => normed,
            };
            let y = behind(NormPlace::PostMlp, self.mlp(normed, context, config));
            return x + behind(NormPlace::PostAttention, attended) + y;
        }
        let attended = self.mixer(index, normed, beside, context, cache, config);
        let x = self.normed(NormPlace::StreamAfterAttention, x + behind(NormPlace::PostAttention, attended));
        let normed = self.normed(NormPlace::PreMlp, x.clone());
        let mut y = self.mlp(normed, context, config);
        if let (Some(_), Some(experts)) = (self.norm(NormPlace::PreExperts), &config.experts) {
            y = self.normed(NormPlace::PostDense, y)
                + self.experts_beside(x.clone(), experts, context, config);
        }
        let mut x = self.normed(NormPlace::StreamAfterMlp, x + behind(NormPlace::PostMlp, y));
        if let Some(gate) = self.linear(LinearRole::PerLayerGate) {
            let input = beside.input.take().unwrap_or_else(|| panic!("block {index} without its own input"));
            let y = self.gated(gate.forward(x.clone()), input, Compute::F32, config);
            let y = self.project(LinearRole::PerLayerProjection, y);
            x = x + self.normed(NormPlace::PostPerLayerInput, y);
        }
        match self.find_vector(VectorRole::LayerScalar) {
            Some(scalar) => x * scalar.unsqueeze(),
            None => x,
        }
    }

    fn normed<const D: usize>(&self, place: NormPlace, x: Tensor<D>) -> Tensor<D> {
        match self.norm(place) {
            Some(norm) => norm.forward(x),
            None => x,
        }
    }

    /// The output of a linear that every family has.
    fn project(&self, role: LinearRole, x: Tensor<3>) -> Tensor<3> {
        self.linear(role).unwrap_or_else(|| panic!("a block without {role:?}")).forward(x)
    }

    /// [`Self::project`] of what nothing else reads.
    fn project_kept(&self, role: LinearRole, x: Tensor<3>) -> Tensor<3> {
        self.project(role, self.kept_for(&[role], x))
    }

    /// `x` as a graph keeps it for the linears of `roles`, as far as there are such, which alone read it.
    fn kept_for(&self, roles: &[LinearRole], x: Tensor<3>) -> Tensor<3> {
        let readers: Vec<&P> = roles.iter().filter_map(|role| self.linear(*role)).collect();
        operand_of(x, &readers)
    }

    /// What tokens take from each other: attention or a delta net.
    fn mixer(
        &self,
        index: usize,
        x: Tensor<3>,
        beside: &mut Beside,
        context: &Context,
        cache: Option<&mut KvCache>,
        config: &ModelConfig,
    ) -> Tensor<3> {
        let Some(output) = self.linear(LinearRole::DeltaOutput) else {
            return self.attention(index, x, beside, context, cache, config);
        };
        let linear = |role| self.linear(role).unwrap_or_else(|| panic!("a delta net without {role:?}"));
        let net = DeltaNet {
            config: config.delta_net.unwrap_or_else(|| panic!("a delta net without heads")),
            norm_eps: config.norm_eps,
            mixed: linear(LinearRole::DeltaMixed),
            gate: linear(LinearRole::DeltaGate),
            strength: linear(LinearRole::DeltaStrength),
            decay: linear(LinearRole::DeltaDecay),
            output,
            convolution: self.vector(VectorRole::DeltaConvolution),
            log_rate: self.vector(VectorRole::DeltaLogRate),
            time_bias: self.vector(VectorRole::DeltaTimeBias),
            norm: self.vector(VectorRole::DeltaNorm),
        };
        net.forward(x, context, cache.map(|cache| cache.state(index)))
    }

    /// Grouped-query attention.
    fn attention(
        &self,
        index: usize,
        x: Tensor<3>,
        beside: &mut Beside,
        context: &Context,
        cache: Option<&mut KvCache>,
        config: &ModelConfig,
    ) -> Tensor<3> {
        let layer = config.layer_attention[index];
        let rotated = |x: Tensor<4>| match layer.rope {
            Some(table) => {
                let [cos, sin] = context.rotary[table].clone();
                fused::rotate(x, cos, sin, config.family.rotary_pairs)
            }
            None => x,
        };
        let clipped = |x: Tensor<4>| match config.qkv_clip {
            Some(most) => x.clamp(-most, most),
            None => x,
        };
        let (q, gate, own) = self.queries_keys_values(index, x, config);
        let q = rotated(self.normed(NormPlace::QueryHead, clipped(q)));
        let q = self.normed(NormPlace::RotatedQueryHead, q);
        let q = match &context.query_factors {
            Some(factors) => q * factors.clone(),
            None => q,
        };
        let source = config.key_value_source(index);
        let [k, v] = match own {
            Some([k, v]) => {
                let k = rotated(self.normed(NormPlace::KeyHead, clipped(k)));
                let k = self.normed(NormPlace::RotatedKeyHead, k);
                let v = match config.family.norms_values {
                    true => divided_by_root_mean_square(clipped(v), config.norm_eps),
                    false => clipped(v),
                };
                beside.own = Some([k.clone(), v.clone()]);
                match cache {
                    Some(cache) => cache.extend(index, k, v, layer.sliding_window),
                    None => [k, v],
                }
            }
            None => match cache {
                // Of a model on several devices the source may be on another.
                Some(cache) => cache.of(source).map(|both| moved(both, &q.device())),
                None => beside.shared.take().unwrap_or_else(|| panic!("no keys of block {source}")),
            },
        };
        let spec = AttentionSpec {
            alibi: config.alibi as f32,
            softcap: config.attention_softcap.map(|cap| cap as f32),
            ..context.attention(config.attention_scale(index), layer.sliding_window, k.dims()[1])
        };
        let [batch, length, heads, head_dim] = q.dims();
        let y = match self.find_vector(VectorRole::Sinks) {
            Some(sinks) => fused::attention_with_sinks(q, k, v, sinks, &spec),
            None => fused::attention(q, k, v, &spec),
        };
        let y = match gate {
            Some(gate) => y * sigmoid(gate),
            None => y,
        };
        self.project_kept(LinearRole::Output, y.reshape([batch, length, heads * head_dim]))
    }

    /// Queries, the gates of what their heads say where there are some, and keys and values where the block has some, `[batch, length, heads, head_dim]`, from their linears.
    fn queries_keys_values(
        &self,
        index: usize,
        x: Tensor<3>,
        config: &ModelConfig,
    ) -> (Tensor<4>, Option<Tensor<4>>, Option<[Tensor<4>; 2]>) {
        let [batch, length, _] = x.dims();
        let (shape, head_dim) = (config.layer(index), config.head_dim_of(index));
        let (heads, groups) = (shape.num_attention_heads, shape.num_key_value_heads);
        let split = |x: Tensor<3>, heads: usize| x.reshape([batch, length, heads, head_dim]);
        let fused = [FusedRows::Concatenated, FusedRows::Grouped]
            .into_iter()
            .find_map(|rows| self.linear(LinearRole::QueryKeyValue(rows)).map(|linear| (rows, linear)));
        match fused {
            None => {
                let x = self.kept_for(READ_BY_ATTENTION, x);
                let (q, gate) = match self.linear(LinearRole::GatedQuery) {
                    Some(linear) => {
                        let both = linear.forward(x.clone()).reshape([batch, length, heads, 2 * head_dim]);
                        let part = |first| both.clone().narrow(3, first, head_dim);
                        (part(0), Some(part(head_dim)))
                    }
                    None => {
                        let q = self.normed(NormPlace::Queries, self.project(LinearRole::Query, x.clone()));
                        (split(q, heads), None)
                    }
                };
                let both = self.linear(LinearRole::Key).map(|key| {
                    let k = key.forward(x.clone());
                    let v = match self.linear(LinearRole::Value) {
                        Some(value) => value.forward(x),
                        None => k.clone(),
                    };
                    [split(self.normed(NormPlace::Keys, k), groups), split(v, groups)]
                });
                (q, gate, both)
            }
            Some((FusedRows::Concatenated, linear)) => {
                let all = split(linear.forward(self.kept_for(READ_BY_ATTENTION, x)), heads + 2 * groups);
                let part = |first, count| all.clone().narrow(2, first, count);
                (part(0, heads), None, Some([part(heads, groups), part(heads + groups, groups)]))
            }
            Some((FusedRows::Grouped, linear)) => {
                let queries = heads / groups;
                let all = linear.forward(self.kept_for(READ_BY_ATTENTION, x));
                let all = all.reshape([batch, length, groups, queries + 2, head_dim]);
                let part = |first, count, heads| {
                    all.clone().narrow(3, first, count).reshape([batch, length, heads, head_dim])
                };
                let both = [part(queries, 1, groups), part(queries + 1, 1, groups)];
                (part(0, queries, heads), None, Some(both))
            }
        }
    }

    fn experts(&self) -> Option<&[Expert<P>]> {
        self.parts.iter().find_map(|part| match part {
            BlockPart::Experts(experts) => Some(experts.as_slice()),
            _ => None,
        })
    }

    /// What experts beside an MLP give for the residual stream `x`; their router reads it normed and scaled.
    fn experts_beside(
        &self,
        x: Tensor<3>,
        experts: &ExpertsConfig,
        context: &Context,
        config: &ModelConfig,
    ) -> Tensor<3> {
        let all = self.experts().unwrap_or_else(|| panic!("a norm of experts without any"));
        let sizes = x.dims();
        let rows = |x: Tensor<3>| x.reshape([sizes[0] * sizes[1], sizes[2]]);
        let scale = self.vector(VectorRole::RouterScale).mul_scalar((sizes[2] as f64).powf(-0.5));
        let routed = self.routed(fused::rms_norm(rows(x.clone()), scale, config.norm_eps));
        let factors = self.find_vector(VectorRole::ExpertScales);
        let x = rows(self.normed(NormPlace::PreExperts, x));
        let gated = |gate, up, compute| self.gated(gate, up, compute, config);
        let y = mixture(all, x, routed, factors, context.routers.as_ref(), experts, gated);
        self.normed(NormPlace::PostExperts, y.reshape(sizes))
    }

    /// The router's scores `[tokens, experts]`.
    fn routed(&self, x: Tensor<2>) -> Tensor<2> {
        let router = self.linear(LinearRole::Router).unwrap_or_else(|| panic!("experts without a router"));
        let scores = router.forward(x);
        match self.find_vector(VectorRole::RouterBias) {
            Some(bias) => scores + bias.unsqueeze(),
            None => scores,
        }
    }

    fn mixture(
        &self,
        all: &[Expert<P>],
        x: Tensor<3>,
        experts: &ExpertsConfig,
        context: &Context,
        config: &ModelConfig,
    ) -> Tensor<3> {
        let sizes = x.dims();
        let x = x.reshape([sizes[0] * sizes[1], sizes[2]]);
        let gated = |gate, up, compute| match experts.clamped {
            Some(by) => clamped_swiglu(gate, up, by),
            None => self.gated(gate, up, compute, config),
        };
        let (routed, log) = (self.routed(x.clone()), context.routers.as_ref());
        let mut y = mixture(all, x.clone(), routed, None, log, experts, gated);
        let roles = [LinearRole::SharedGate, LinearRole::SharedUp, LinearRole::SharedDown];
        if let [Some(gate), Some(up), Some(down)] = roles.map(|role| self.linear(role))
            && let Some(scored) = self.linear(LinearRole::SharedExpertGate)
        {
            let score = scored.forward(x.clone());
            y = y + shared([gate, up, down], x, score);
        }
        y.reshape(sizes)
    }

    fn mlp(&self, x: Tensor<3>, context: &Context, config: &ModelConfig) -> Tensor<3> {
        if let (None, Some(all), Some(experts)) =
            (self.linear(LinearRole::Down), self.experts(), &config.experts)
        {
            return self.mixture(all, x, experts, context, config);
        }
        let x = self.kept_for(READ_BY_MLP, x);
        let compute = self.linear(LinearRole::Down).map_or(Compute::F32, Projection::compute);
        let inner = match (self.linear(LinearRole::GateUp), self.linear(LinearRole::Gate)) {
            (Some(linear), _) => {
                let both = linear.forward(x);
                let width = both.dims()[2] / 2;
                self.gated(both.clone().narrow(2, 0, width), both.narrow(2, width, width), compute, config)
            }
            (None, Some(gate)) => {
                self.gated(gate.forward(x.clone()), self.project(LinearRole::Up, x), compute, config)
            }
            (None, None) => self.activated(self.project(LinearRole::Up, x), config),
        };
        self.project_kept(LinearRole::Down, inner)
    }

    /// `compute` is that of the linear that reads the result.
    fn gated<const D: usize>(
        &self,
        gate: Tensor<D>,
        up: Tensor<D>,
        compute: Compute,
        config: &ModelConfig,
    ) -> Tensor<D> {
        match config.activation {
            Activation::Silu => fused::swiglu(gate, up, compute),
            Activation::GeluTanh => fused::geglu(gate, up, compute),
            _ => self.activated(gate, config) * up,
        }
    }

    fn activated<const D: usize>(&self, x: Tensor<D>, config: &ModelConfig) -> Tensor<D> {
        match config.activation {
            Activation::Silu => silu(x),
            Activation::GeluTanh => fused::plain::gelu_tanh(x),
            Activation::Gelu => gelu(x),
            Activation::Relu => relu(x),
            Activation::Relu2 => relu(x).square(),
            Activation::Xielu => {
                let [positive, negative, beta, eps] = [
                    VectorRole::XieluPositive,
                    VectorRole::XieluNegative,
                    VectorRole::XieluBeta,
                    VectorRole::XieluEps,
                ]
                .map(|role| self.vector(role).reshape([1; D]));
                xielu(x, [positive, negative, beta, eps])
            }
        }
    }

    /// Numbers that the family has by its table.
    fn vector(&self, role: VectorRole) -> Tensor<1> {
        self.find_vector(role).unwrap_or_else(|| panic!("a block without {role:?}"))
    }

    fn find_vector(&self, role: VectorRole) -> Option<Tensor<1>> {
        self.vectors().find(|(part, _)| part.role == role).map(|(_, values)| values.val())
    }

    /// Numbers that the block may have, one a head or an expert; see [`VectorRole`].
    pub fn vector_mut(&mut self, role: VectorRole) -> Option<&mut Param<Tensor<1>>> {
        self.table.iter().zip(&mut self.parts).find_map(|(entry, part)| match (entry, part) {
            (Part::Vector(vector), BlockPart::Vector(values)) if vector.role == role => Some(values),
            _ => None,
        })
    }

    /// The parameters that are neither a linear's nor a norm's.
    pub(crate) fn vectors(&self) -> impl Iterator<Item = (&'static VectorPart, &Param<Tensor<1>>)> {
        self.table.iter().zip(&self.parts).filter_map(|(entry, part)| match (entry, part) {
            (Part::Vector(vector), BlockPart::Vector(values)) => Some((vector, values)),
            _ => None,
        })
    }
}

/// `ap x² + β x` above 0, `an (e^min(x, ε) - 1 - x) + β x` below, with `ap = softplus(αp)`, `an = β + softplus(αn)`.
fn xielu<const D: usize>(x: Tensor<D>, [positive, negative, beta, eps]: [Tensor<D>; 4]) -> Tensor<D> {
    let above = softplus(positive, 1.0) * relu(x.clone()).square();
    let negative = beta.clone() + softplus(negative, 1.0);
    let low = x.clone().min_pair(eps);
    // `e^x - 1` without losing what is small: of a padding token's embedding, which is 0, a norm makes much of it.
    let less_one = low.clone().mul_scalar(0.5).tanh() * low.exp().add_scalar(1.0);
    let below = negative * (less_one - x.clone());
    let below = below.mask_fill(x.clone().greater_scalar(0.0), 0.0);
    above + below + beta * x
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use kiln_testkit::read;

    use super::*;

    #[test]
    fn xielu_keeps_what_is_small() {
        let (positive, negative, beta, eps) = (0.3f64, -0.2f64, 0.5f64, -1e-6f64);
        let device = Device::flex();
        let number = |value: f64| Tensor::<3>::full([1, 1, 1], value, &device);
        let values = [0.0f32, -1e-9, -1e-7, -3e-6, -1e-3, -0.5, -30.0, 1e-7, 0.4, 7.0];
        let x = Tensor::<1>::from_floats(values, &device).reshape([1, 1, values.len()]);
        let found = read(xielu(x, [positive, negative, beta, eps].map(number)));
        for (x, found) in values.into_iter().map(f64::from).zip(found) {
            let softplus = |x: f64| x.exp().ln_1p();
            let expected = match x > 0.0 {
                true => softplus(positive) * x * x + beta * x,
                false => (beta + softplus(negative)) * (x.min(eps).exp_m1() - x) + beta * x,
            };
            let error = (f64::from(found) - expected).abs();
            assert!(error <= 1e-6 * expected.abs().max(x.abs()), "{x}: {found}, expected {expected}");
        }
    }
}
