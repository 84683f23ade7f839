//! A block of a decoder: attention and MLP, each beside the residual path, from the parts that its family lists.

use burn::tensor::{Tensor, activation::relu};
use kiln_quant_core::{Projection, fused};

use crate::{
    Context, KvCache, Norm,
    config::ModelConfig,
    families::{Activation, Family, LinearRole, NormPlace, Part},
};

/// One block; its norms and linears in the order of [`Family::block`].
#[derive(Debug, Clone)]
pub struct Block<P: Projection> {
    pub(crate) family: &'static Family,
    pub(crate) parts: Vec<BlockPart<P>>,
}

/// A norm or linear of a block.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)] // most are linears
pub enum BlockPart<P: Projection> {
    /// A norm.
    Norm(Norm),
    /// A linear.
    Linear(P),
}

/// What [`Block::build`] asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PartShape {
    /// A norm of this width.
    Norm(usize),
    /// A linear of shape `[d_input, d_output]`, with a bias or without.
    Linear([usize; 2], bool),
}

impl<P: Projection> Block<P> {
    /// Block `index` of the model that `config` describes; `part` makes each part, given its path within the block.
    ///
    /// # Errors
    /// The first error of `part`.
    ///
    /// # Panics
    /// If `part` answers a norm with a linear, or the reverse.
    pub fn build<E>(
        config: &ModelConfig,
        index: usize,
        mut part: impl FnMut(&str, PartShape) -> Result<BlockPart<P>, E>,
    ) -> Result<Self, E> {
        let family = config.family;
        let parts = family.block.iter().map(|entry| {
            let shape = match entry {
                Part::Norm(norm) => PartShape::Norm(config.norm_width(norm.place)),
                Part::Linear(linear) => {
                    PartShape::Linear(config.linear_shape(linear.role, index), config.has_bias(linear.role))
                }
            };
            let made = part(entry.name(), shape)?;
            let same = matches!(
                (entry, &made),
                (Part::Norm(_), BlockPart::Norm(_)) | (Part::Linear(_), BlockPart::Linear(_))
            );
            assert!(same, "{}: a part of another kind than {entry:?}", entry.name());
            Ok(made)
        });
        Ok(Self { family, parts: parts.collect::<Result<_, E>>()? })
    }

    /// Parts with their paths within the block.
    pub fn parts(&self) -> impl Iterator<Item = (&'static str, &BlockPart<P>)> {
        self.family.block.iter().map(Part::name).zip(&self.parts)
    }

    /// The norms, with what the family says of them.
    pub fn norms_mut(&mut self) -> impl Iterator<Item = (NormPlace, &mut Norm)> {
        self.family.block.iter().zip(&mut self.parts).filter_map(|(entry, part)| match (entry, part) {
            (Part::Norm(norm), BlockPart::Norm(part)) => Some((norm.place, part)),
            _ => None,
        })
    }

    /// The norm of a place, if the family has one there.
    pub fn norm(&self, place: NormPlace) -> Option<&Norm> {
        self.family.block.iter().zip(&self.parts).find_map(|(entry, part)| match (entry, part) {
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
        self.family.block.iter().zip(&self.parts).find_map(|(entry, part)| match (entry, part) {
            (Part::Linear(linear), BlockPart::Linear(part)) if linear.role == role => Some(part),
            _ => None,
        })
    }

    /// The linear of a role, if the family has one.
    pub fn linear_mut(&mut self, role: LinearRole) -> Option<&mut P> {
        self.family.block.iter().zip(&mut self.parts).find_map(|(entry, part)| match (entry, part) {
            (Part::Linear(linear), BlockPart::Linear(part)) if linear.role == role => Some(part),
            _ => None,
        })
    }

    /// The linears with their paths within the block, in the order in which data flows.
    pub fn linears(&self) -> impl Iterator<Item = (&'static str, &P)> {
        self.parts().filter_map(|(name, part)| match part {
            BlockPart::Linear(linear) => Some((name, linear)),
            BlockPart::Norm(_) => None,
        })
    }

    /// The same block with other projections; `f` gets the path within the block.
    pub(crate) fn try_map<Q: Projection, E>(
        self,
        mut f: impl FnMut(&str, P) -> Result<Q, E>,
    ) -> Result<Block<Q>, E> {
        let family = self.family;
        let parts = family.block.iter().zip(self.parts).map(|(entry, part)| match part {
            BlockPart::Norm(norm) => Ok(BlockPart::Norm(norm)),
            BlockPart::Linear(linear) => f(entry.name(), linear).map(BlockPart::Linear),
        });
        Ok(Block { family, parts: parts.collect::<Result<_, E>>()? })
    }

    /// Runs the block; `index` says which one it is of the model that `config` describes.
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
        let normed = self.normed(NormPlace::PreAttention, x.clone());
        let attended = self.attention(index, normed, context, cache, config);
        let x = x + self.normed(NormPlace::PostAttention, attended);
        let normed = self.normed(NormPlace::PreMlp, x.clone());
        x + self.normed(NormPlace::PostMlp, self.mlp(normed))
    }

    fn normed<const D: usize>(&self, place: NormPlace, x: Tensor<D>) -> Tensor<D> {
        match self.norm(place) {
            Some(norm) => norm.forward(x),
            None => x,
        }
    }

    /// The output of a linear that every family has.
    fn project(&self, role: LinearRole, x: Tensor<3>) -> Tensor<3> {
        self.linear(role).unwrap_or_else(|| panic!("{:?} blocks have no {role:?}", self.family)).forward(x)
    }

    /// Grouped-query attention.
    fn attention(
        &self,
        index: usize,
        x: Tensor<3>,
        context: &Context,
        cache: Option<&mut KvCache>,
        config: &ModelConfig,
    ) -> Tensor<3> {
        let [batch, length, _] = x.dims();
        let (shape, layer) = (config.layer(index), config.layer_attention[index]);
        let heads =
            |role, x, heads: usize| self.project(role, x).reshape([batch, length, heads, config.head_dim]);
        let q = heads(LinearRole::Query, x.clone(), shape.num_attention_heads);
        let q = self.normed(NormPlace::QueryHead, q);
        let k = heads(LinearRole::Key, x.clone(), shape.num_key_value_heads);
        let k = self.normed(NormPlace::KeyHead, k);
        let v = heads(LinearRole::Value, x, shape.num_key_value_heads);
        let (q, k) = match layer.rope {
            Some(table) => {
                let [cos, sin] = context.rotary[table].clone();
                (fused::rotate(q, cos.clone(), sin.clone()), fused::rotate(k, cos, sin))
            }
            None => (q, k),
        };
        let [k, v] = match cache {
            Some(cache) => cache.extend(index, k, v),
            None => [k, v],
        };
        let spec = context.attention(config.attention_scale(), layer.sliding_window);
        let y = fused::attention(q, k, v, &spec);
        let y = y.reshape([batch, length, shape.num_attention_heads * config.head_dim]);
        self.project(LinearRole::Output, y)
    }

    fn mlp(&self, x: Tensor<3>) -> Tensor<3> {
        let gate = |x: &Tensor<3>| self.project(LinearRole::Gate, x.clone());
        let inner = match self.family.activation {
            Activation::SiluGated => fused::swiglu(gate(&x), self.project(LinearRole::Up, x)),
            Activation::GeluTanhGated => fused::geglu(gate(&x), self.project(LinearRole::Up, x)),
            Activation::Relu => relu(self.project(LinearRole::Up, x)),
        };
        self.project(LinearRole::Down, inner)
    }
}
