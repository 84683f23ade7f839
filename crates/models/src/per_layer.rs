//! Inputs of single blocks, beside the residual stream: Gemma 4's, made of token ids and the embedding.

use burn::{
    module::Param,
    tensor::{Int, Tensor},
};

use crate::{Embedding, Norm};

/// What makes the inputs of all blocks.
#[derive(Debug, Clone)]
pub struct PerLayerInputs {
    /// `[vocabulary, blocks * width]`: for each token the inputs of all blocks, one after the other.
    pub table: Embedding,
    /// `[blocks * width, hidden_size]`: from the embedding to the same.
    pub projection: Param<Tensor<2>>,
    /// Norm over what is projected for a block.
    pub norm: Norm,
}

impl PerLayerInputs {
    /// The input of block `index`: what its part of the table has for the tokens and what its part of the projection makes of
    /// their embedding, in equal shares. Tokens beyond the table have those of the first.
    ///
    /// Each block makes its own, so that nothing of it outlives the block where blocks are computed again.
    ///
    /// # Shapes
    /// `ids` `[batch, length]`, `embedded` `[batch, length, hidden_size]` → `[batch, length, width]`.
    pub(crate) fn of_block(
        &self,
        index: usize,
        width: usize,
        ids: Tensor<2, Int>,
        embedded: Tensor<3>,
    ) -> Tensor<3> {
        let [vocabulary, _] = self.table.shape();
        let beyond = ids.clone().greater_equal_elem(vocabulary as i64);
        let of_tokens = self.table.forward(ids.mask_fill(beyond, 0)).narrow(2, index * width, width);
        let of_tokens = of_tokens.mul_scalar((width as f64).sqrt());
        let [batch, length, hidden] = embedded.dims();
        let weight = self.projection.val().narrow(0, index * width, width);
        let projected = embedded.reshape([batch * length, hidden]).matmul(weight.transpose());
        let projected = projected.mul_scalar((hidden as f64).powf(-0.5)).reshape([batch, length, width]);
        (of_tokens + self.norm.forward(projected)).mul_scalar(0.5f64.sqrt())
    }
}
