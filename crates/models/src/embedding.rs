//! Token embeddings, dense or packed as the file holds them, and the output head that may be the same matrix.

use burn::{
    module::{Module, Param},
    tensor::{Device, FloatDType, Int, Tensor},
};
use kiln_quant_core::{Compute, PackedTensor, fused};

/// A table `[vocabulary, width]`.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)] // a model holds one
pub enum Embedding {
    /// Dense.
    Dense(DenseEmbedding),
    /// Packed along the width; a lookup unpacks only the rows asked for.
    Packed(PackedTensor),
}

/// A dense table.
#[derive(Module, Debug)]
pub struct DenseEmbedding {
    /// `[vocabulary, width]`.
    pub weight: Param<Tensor<2>>,
}

impl Embedding {
    /// A frozen dense one.
    pub(crate) fn dense(table: Tensor<2>) -> Self {
        Self::Dense(DenseEmbedding { weight: Param::from_tensor(table).set_require_grad(false) })
    }

    /// The table, `[vocabulary, width]`, dense.
    pub(crate) fn table(&self) -> Tensor<2> {
        match self {
            Self::Dense(table) => table.weight.val(),
            Self::Packed(table) => table.dequantize().transpose(),
        }
    }

    /// Rows of the table.
    ///
    /// # Shapes
    /// `[batch, length]` → `[batch, length, width]`.
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let [batch, length] = ids.dims();
        let ids = ids.reshape([batch * length]);
        let rows = match self {
            Self::Dense(table) => table.weight.val().select(0, ids).cast(FloatDType::F32),
            Self::Packed(table) => table.outputs(ids),
        };
        let [_, width] = rows.dims();
        rows.reshape([batch, length, width])
    }

    /// The table as an output head; operands of a dense table's product are rounded as `compute` says.
    ///
    /// # Shapes
    /// `[.., width]` → `[.., vocabulary]`.
    pub fn project<const D: usize>(&self, x: Tensor<D>, compute: Compute) -> Tensor<D> {
        match self {
            Self::Dense(table) => fused::matmul(x, table.weight.val().transpose(), compute),
            Self::Packed(table) => table.forward(x),
        }
    }

    /// Whether the table requires gradients; a packed one never does.
    pub fn is_trained(&self) -> bool {
        matches!(self, Self::Dense(table) if table.weight.val().is_require_grad())
    }

    /// Bytes: packed as stored, dense in its type.
    pub(crate) fn stored_bytes(&self) -> usize {
        match self {
            Self::Dense(table) => table.weight.val().dtype().size() * self.shape().iter().product::<usize>(),
            Self::Packed(table) => table.storage_bytes(),
        }
    }

    /// Where the table is.
    pub fn device(&self) -> Device {
        match self {
            Self::Dense(table) => table.weight.val().device(),
            Self::Packed(table) => table.codes.val().device(),
        }
    }

    /// `[vocabulary, width]`.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::Dense(table) => table.weight.lazy_shape().dims(),
            Self::Packed(table) => {
                let [width, vocabulary] = table.shape();
                [vocabulary, width]
            }
        }
    }
}
