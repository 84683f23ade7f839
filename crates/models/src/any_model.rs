//! The architecture as a run-time choice.

use burn::{
    module::{Module, Param},
    tensor::{Device, Tensor},
};
use kiln_quant_core::{Place, Projection};

use crate::{CausalLm, Context, KvCache, Llama, Opt, ScaleSite, ScaleSites, Slots, TokenBatch};

/// A model of any supported architecture, for programs that learn which from a file.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)] // a program holds one or two of them
pub enum AnyModel<P: Projection> {
    /// The LLaMA family.
    Llama(Llama<P>),
    /// OPT.
    Opt(Opt<P>),
}

/// The same call on whichever model it is.
macro_rules! either {
    ($self:expr, $model:ident => $call:expr) => {
        match $self {
            AnyModel::Llama($model) => $call,
            AnyModel::Opt($model) => $call,
        }
    };
}

impl<P: Projection> CausalLm for AnyModel<P> {
    fn context(&self, tokens: &TokenBatch, cache: Option<&KvCache>) -> Context {
        either!(self, model => model.context(tokens, cache))
    }
    fn embed(&self, context: &Context) -> Tensor<3> {
        either!(self, model => model.embed(context))
    }
    fn trains_embedding(&self) -> bool {
        either!(self, model => model.trains_embedding())
    }
    fn num_blocks(&self) -> usize {
        either!(self, model => model.num_blocks())
    }
    fn block(&self, index: usize, x: Tensor<3>, context: &Context, cache: Option<&mut KvCache>) -> Tensor<3> {
        either!(self, model => model.block(index, x, context, cache))
    }
    fn final_norm<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        either!(self, model => model.final_norm(x))
    }
    fn lm_head<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        either!(self, model => model.lm_head(x))
    }
    fn vocab_size(&self) -> usize {
        either!(self, model => model.vocab_size())
    }
    fn max_positions(&self) -> usize {
        either!(self, model => model.max_positions())
    }
    fn device(&self) -> Device {
        either!(self, model => model.device())
    }
    fn at(&self, place: Place) {
        either!(self, model => model.at(place));
    }
}

impl<P: Projection> Slots for AnyModel<P> {
    type Slot = P;
    type With<Q: Projection> = AnyModel<Q>;

    fn try_map<Q: Projection, E>(self, f: impl FnMut(&str, P) -> Result<Q, E>) -> Result<AnyModel<Q>, E> {
        Ok(match self {
            Self::Llama(model) => AnyModel::Llama(model.try_map(f)?),
            Self::Opt(model) => AnyModel::Opt(model.try_map(f)?),
        })
    }

    fn slots(&self) -> Vec<(String, &P)> {
        either!(self, model => model.slots())
    }
}

impl<P: Projection> ScaleSites for AnyModel<P> {
    fn scale_sites(&self, index: usize) -> Vec<ScaleSite> {
        either!(self, model => model.scale_sites(index))
    }

    fn norm_parameter(&mut self, name: &str) -> Option<&mut Param<Tensor<1>>> {
        either!(self, model => model.norm_parameter(name))
    }
}
