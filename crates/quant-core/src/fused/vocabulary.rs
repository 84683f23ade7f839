//! Cross-entropy over a vocabulary of which some logits at a time are there, on CubeCL.

use burn::backend::{
    Dispatch, backend_extension,
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::{Int, Tensor};

use crate::LogitSpec;

/// Not differentiable.
#[backend_extension(Cube, Fusion: cfg(feature = "fusion"))]
pub(crate) trait VocabularyKernels: burn::backend::Backend {
    /// See [`with_logits`].
    #[fusion(dtype = state, shape = state)]
    fn with_logits(
        state: FloatTensor<Self>,
        products: FloatTensor<Self>,
        targets: IntTensor<Self>,
        first: usize,
        spec: LogitSpec,
    ) -> FloatTensor<Self>;
    /// See [`product_gradients`].
    #[fusion(dtype = products, shape = products)]
    fn product_gradients(
        products: FloatTensor<Self>,
        state: FloatTensor<Self>,
        targets: IntTensor<Self>,
        weights: FloatTensor<Self>,
        first: usize,
        spec: LogitSpec,
    ) -> FloatTensor<Self>;
}

/// What is known of rows after `products` `[rows, columns]` of the ids from `first` on: the largest logit, the sum of
/// exponentials below it, and the target's logit, `[rows, 3]`. `state` is what was known before; of the first ids (0)
/// anything of that shape.
pub(crate) fn with_logits(
    state: Tensor<2>,
    products: Tensor<2>,
    targets: Tensor<1, Int>,
    first: usize,
    spec: LogitSpec,
) -> Tensor<2> {
    let (state, products) = (state.into_dispatch(), products.into_dispatch());
    Tensor::from_dispatch(Dispatch::with_logits(state, products, targets.into_dispatch(), first, spec))
}

/// Gradients of the rows' losses, each times its weight `[rows]`, with respect to `products`, in their place where nobody
/// else holds them; `state` knows all ids.
pub(crate) fn product_gradients(
    products: Tensor<2>,
    state: Tensor<2>,
    targets: Tensor<1, Int>,
    weights: Tensor<1>,
    first: usize,
    spec: LogitSpec,
) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::product_gradients(
        products.into_dispatch(),
        state.into_dispatch(),
        targets.into_dispatch(),
        weights.into_dispatch(),
        first,
        spec,
    ))
}
