//! The adapter's kind as a run-time choice.

use burn::{
    module::Module,
    tensor::{DType, Tensor},
};
use kiln_quant_core::{Place, Projection};

use crate::{
    Adapter, Core, Dora, Full, Geometry, Lora, LowRank, Method, PooledAdapter, Result,
    config::AdapterConfig,
    json_fields::Problem,
    part::{Description, Part},
};

/// An adapter of any kind, for programs that learn which from a configuration.
#[derive(Module, Debug)]
#[non_exhaustive]
pub enum AnyAdapter {
    /// Low-rank.
    Lora(Lora),
    /// Low-rank with magnitudes.
    Dora(Dora),
    /// Q-BaRA, QA-LoRA, QA-HiRA or QA-BLoRA.
    Pooled(PooledAdapter),
}

impl AnyAdapter {
    /// The adapter, if it is low-rank.
    pub fn as_lora(&self) -> Option<&Lora> {
        match self {
            Self::Lora(lora) => Some(lora),
            _ => None,
        }
    }

    /// The adapter, if it pools.
    pub fn as_pooled(&self) -> Option<&PooledAdapter> {
        match self {
            Self::Pooled(pooled) => Some(pooled),
            _ => None,
        }
    }

    /// `[d_input, d_output]` of the base.
    pub fn base_shape(&self) -> [usize; 2] {
        match self {
            Self::Lora(lora) => lora.base_shape(),
            Self::Dora(dora) => dora.base_shape(),
            Self::Pooled(pooled) => pooled.base_shape(),
        }
    }

    pub(crate) fn describe(&self) -> Description {
        let low_rank = |r| Method::lora().geometry([1, 1], r);
        let described =
            |geometry: Geometry, scaling, magnitudes| Description { geometry, scaling, magnitudes };
        match self {
            Self::Lora(lora) => described(low_rank(lora.rank()), lora.scaling(), false),
            Self::Dora(dora) => described(low_rank(dora.rank()), dora.scaling(), true),
            Self::Pooled(pooled) => described(pooled.geometry(), pooled.scaling(), false),
        }
    }

    /// The tensors, as they are held; magnitudes as one row.
    pub(crate) fn parts(&self) -> Vec<(Part, Tensor<2>)> {
        match self {
            Self::Lora(lora) => vec![(Part::A, lora.lora_a.val()), (Part::B, lora.lora_b.val())],
            Self::Dora(dora) => vec![
                (Part::A, dora.lora_a.val()),
                (Part::B, dora.lora_b.val()),
                (Part::Magnitude, dora.magnitude.val().unsqueeze()),
            ],
            Self::Pooled(pooled) => match &pooled.core {
                Core::LowRank(LowRank { a, b }) => vec![(Part::A, a.val()), (Part::B, b.val())],
                Core::Full(Full { h }) => vec![(Part::H, h.val())],
            },
        }
    }
}

/// The same call on whichever adapter it is.
macro_rules! either {
    ($self:expr, $adapter:ident => $call:expr) => {
        match $self {
            AnyAdapter::Lora($adapter) => $call,
            AnyAdapter::Dora($adapter) => $call,
            AnyAdapter::Pooled($adapter) => $call,
        }
    };
}

impl Adapter for AnyAdapter {
    fn adapt<P: Projection>(&self, base: &P, x: Tensor<2>, y: Tensor<2>) -> Tensor<2> {
        either!(self, adapter => adapter.adapt(base, x, y))
    }

    fn forward_rows<P: Projection>(&self, base: &P, x: Tensor<2>) -> Tensor<2> {
        either!(self, adapter => adapter.forward_rows(base, x))
    }

    fn merged_weight<P: Projection>(&self, base: &P) -> Tensor<2> {
        either!(self, adapter => adapter.merged_weight(base))
    }

    fn takes_operands(&self) -> bool {
        either!(self, adapter => adapter.takes_operands())
    }

    fn at(&self, place: Place) {
        either!(self, adapter => adapter.at(place));
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::AnyAdapter {}
    impl Sealed for super::Lora {}
    impl Sealed for super::Dora {}
    impl Sealed for super::PooledAdapter {}
}

/// A kind of adapter that a configuration can ask for: [`Lora`], [`Dora`], [`PooledAdapter`], or [`AnyAdapter`] where
/// the configuration decides.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no kind of adapter that a configuration can ask for",
    note = "the kinds are `Lora`, `Dora`, `PooledAdapter`, and `AnyAdapter` where the configuration decides"
)]
pub trait AdapterKind: Adapter + Into<AnyAdapter> + sealed::Sealed {
    /// Refuses configurations of other kinds.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) naming the option.
    fn accept(config: &AdapterConfig) -> Result<()>;

    /// The adapter, if it is of this kind.
    fn from_any(adapter: AnyAdapter) -> Option<Self>;
}

/// The refusal of a configuration that asks for something else than `expected`.
fn other_kind<T>(config: &AdapterConfig, expected: &str) -> Result<T> {
    Err(Problem::new("method", expected, config.method.name()).argument())
}

impl AdapterKind for Lora {
    fn accept(config: &AdapterConfig) -> Result<()> {
        match config.method {
            Method::Lora { .. } => Ok(()),
            _ => other_kind(config, "lora"),
        }
    }

    fn from_any(adapter: AnyAdapter) -> Option<Self> {
        if let AnyAdapter::Lora(lora) = adapter { Some(lora) } else { None }
    }
}

impl AdapterKind for Dora {
    fn accept(config: &AdapterConfig) -> Result<()> {
        match config.method {
            Method::Dora { .. } => Ok(()),
            _ => other_kind(config, "dora"),
        }
    }

    fn from_any(adapter: AnyAdapter) -> Option<Self> {
        if let AnyAdapter::Dora(dora) = adapter { Some(dora) } else { None }
    }
}

impl AdapterKind for PooledAdapter {
    fn accept(config: &AdapterConfig) -> Result<()> {
        match config.method {
            Method::Lora { .. } | Method::Dora { .. } => other_kind(config, "one that pools"),
            _ => Ok(()),
        }
    }

    fn from_any(adapter: AnyAdapter) -> Option<Self> {
        if let AnyAdapter::Pooled(pooled) = adapter { Some(pooled) } else { None }
    }
}

impl AdapterKind for AnyAdapter {
    fn accept(_: &AdapterConfig) -> Result<()> {
        Ok(())
    }

    fn from_any(adapter: AnyAdapter) -> Option<Self> {
        Some(adapter)
    }
}

impl From<Lora> for AnyAdapter {
    fn from(lora: Lora) -> Self {
        Self::Lora(lora)
    }
}

impl From<Dora> for AnyAdapter {
    fn from(dora: Dora) -> Self {
        Self::Dora(dora)
    }
}

impl From<PooledAdapter> for AnyAdapter {
    fn from(pooled: PooledAdapter) -> Self {
        Self::Pooled(pooled)
    }
}

/// A tensor of an adapter: f32, on `device`.
pub(crate) fn tensor(values: Vec<f32>, shape: [usize; 2], device: &burn::tensor::Device) -> Tensor<2> {
    Tensor::from_data(burn::tensor::TensorData::new(values, shape), (device, DType::F32))
}
