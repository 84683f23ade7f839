//! Operations on packed weights: the extension traits, the plain functions, one file per backend.
//!
//! [`PackedOps`] is differentiable; [`PackedKernels`] holds what its backward passes call on the inner backend.
//! Both are implemented for Burn's Flex (CPU) and, behind the GPU features, for every CubeCL runtime with or without
//! fusion. On other backends the functions here panic: Burn routes extensions only to listed backends.

mod autodiff;
#[cfg(feature = "cube")]
pub(crate) mod cube;
#[cfg(feature = "flex")]
pub(crate) mod few_rows;
#[cfg(feature = "flex")]
pub(crate) mod flex;
pub(crate) mod reference;

pub use reference::packed_dequantize as reference_dequantize;

use burn::backend::{
    Dispatch, backend_extension,
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::{Int, Shape, Tensor};

use crate::{Block, Compute, QuantScheme, Value, scheme::Grid};

/// On the CPU, up to this many rows are multiplied by kernels that unpack on the way; more, by a matrix product over an
/// unpacked tile.
#[cfg(any(feature = "flex", feature = "cube"))]
pub(crate) const FEW_ROWS: usize = 4;

/// What the arithmetic needs to know about a packed weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedSpec {
    /// How a code becomes a number.
    pub value: Value,
    /// Inputs of a block.
    pub inputs: usize,
    /// Outputs of a block.
    pub outputs: usize,
    /// Inputs of the weight.
    pub d_input: usize,
    /// Outputs of the weight.
    pub d_output: usize,
    /// What operands of products of many rows are rounded to. On the CPU an `x` that [is](crate::fused::operand) rounded so
    /// counts as f32: results and gradients are f32.
    pub compute: Compute,
}

impl PackedSpec {
    /// The arithmetic of `scheme` on a weight of `d_input` × `d_output`, operands not rounded.
    pub fn new(scheme: &QuantScheme, d_input: usize, d_output: usize) -> Self {
        Self {
            value: scheme.value,
            inputs: scheme.block.inputs_of(d_input),
            outputs: scheme.block.outputs,
            d_input,
            d_output,
            compute: Compute::F32,
        }
    }

    /// Whether offsets are read.
    pub const fn has_offsets(&self) -> bool {
        matches!(self.value, Value::Affine { grid: Grid::Float | Grid::Integer, .. })
    }

    /// Shape of scales and offsets.
    pub fn scale_shape(&self) -> [usize; 2] {
        Block { outputs: self.outputs, inputs: Some(self.inputs) }.grid_shape(self.d_input, self.d_output)
    }
}

// Output shapes for the lazy implementation on fusing backends.
#[cfg_attr(not(feature = "fusion"), allow(dead_code))]
fn forward_shape(x: &Shape, spec: &PackedSpec) -> Shape {
    Shape::from(vec![x[0], spec.d_output])
}
#[cfg_attr(not(feature = "fusion"), allow(dead_code))]
fn backward_shape(dy: &Shape, spec: &PackedSpec) -> Shape {
    Shape::from(vec![dy[0], spec.d_input])
}
#[cfg_attr(not(feature = "fusion"), allow(dead_code))]
fn dense_shape(spec: &PackedSpec) -> Shape {
    Shape::from(vec![spec.d_input, spec.d_output])
}

/// Kernels of the backward passes. Not differentiable themselves: Burn's autodiff is first order.
///
/// Shapes as in [`PackedOps`]; `dy` is `[rows, d_output]`. Without offsets (see [`PackedSpec::has_offsets`]) the
/// `offsets` argument is ignored and its gradient is zero.
#[backend_extension(
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    Fusion: cfg(feature = "fusion")
)]
pub trait PackedKernels: burn::backend::Backend {
    /// `dx = dy · Wᵀ`, `[rows, d_input]`.
    #[fusion(dtype = dy, shape = backward_shape(dy, spec))]
    fn packed_linear_dx(
        dy: FloatTensor<Self>,
        codes: IntTensor<Self>,
        scales: FloatTensor<Self>,
        offsets: FloatTensor<Self>,
        spec: PackedSpec,
    ) -> FloatTensor<Self>;

    /// Gradients with respect to scales and offsets, given `dW = xᵀ · dy` without ever holding all of it.
    #[fusion(meta = |_x, _dy, _codes, scales, offsets, _spec| (scales.clone(), offsets.clone()))]
    fn packed_linear_dparams(
        x: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        codes: IntTensor<Self>,
        scales: FloatTensor<Self>,
        offsets: FloatTensor<Self>,
        spec: PackedSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// Gradients with respect to scales and offsets, given the dense `dw` `[d_input, d_output]`.
    #[fusion(meta = |_dw, _codes, scales, offsets, _spec| (scales.clone(), offsets.clone()))]
    fn packed_dequantize_dparams(
        dw: FloatTensor<Self>,
        codes: IntTensor<Self>,
        scales: FloatTensor<Self>,
        offsets: FloatTensor<Self>,
        spec: PackedSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

/// Differentiable operations: with respect to `x`, `scales` and `offsets`; codes are constants.
#[backend_extension(
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    Autodiff,
    Fusion: cfg(feature = "fusion")
)]
pub trait PackedOps: burn::backend::Backend {
    /// `y = x · W`: `[rows, d_input]` → `[rows, d_output]`. No dense weight outlives the call.
    #[fusion(dtype = x, shape = forward_shape(x, spec))]
    fn packed_linear(
        x: FloatTensor<Self>,
        codes: IntTensor<Self>,
        scales: FloatTensor<Self>,
        offsets: FloatTensor<Self>,
        spec: PackedSpec,
    ) -> FloatTensor<Self>;

    /// The dense weight `[d_input, d_output]`, always f32.
    #[fusion(
        dtype = { let _ = (codes, scales, offsets); burn::tensor::DType::F32 },
        shape = { let _ = (codes, scales, offsets); dense_shape(spec) }
    )]
    fn packed_dequantize(
        codes: IntTensor<Self>,
        scales: FloatTensor<Self>,
        offsets: FloatTensor<Self>,
        spec: PackedSpec,
    ) -> FloatTensor<Self>;
}

/// `x · W` for any rank: `[.., d_input]` → `[.., d_output]`. Without offsets pass the scales in their place.
///
/// # Panics
/// If the last size of `x` is not `spec.d_input`, or on a backend without an implementation.
pub fn packed_linear<const D: usize>(
    x: Tensor<D>,
    codes: Tensor<2, Int>,
    scales: Tensor<2>,
    offsets: Tensor<2>,
    spec: PackedSpec,
) -> Tensor<D> {
    let mut sizes = x.dims();
    assert_eq!(
        sizes[D - 1],
        spec.d_input,
        "packed_linear: x is {sizes:?}, the weight has {} inputs",
        spec.d_input
    );
    let rows: usize = sizes[..D - 1].iter().product();
    sizes[D - 1] = spec.d_output;
    if rows == 0 {
        // Burn's `reshape` takes a size of 0 for the one that is there.
        return Tensor::zeros(sizes, (&x.device(), x.dtype()));
    }
    Tensor::<2>::from_dispatch(Dispatch::packed_linear(
        x.reshape([rows, spec.d_input]).into_dispatch(),
        codes.into_dispatch(),
        scales.into_dispatch(),
        offsets.into_dispatch(),
        spec,
    ))
    .reshape(sizes)
}

/// `dy · Wᵀ`, `[rows, d_output]` → `[rows, d_input]`: what the backward pass of [`packed_linear`] computes, for callers
/// without a graph.
///
/// # Panics
/// If the last size of `dy` is not `spec.d_output`, or on a backend without an implementation.
pub fn packed_linear_dx(
    dy: Tensor<2>,
    codes: Tensor<2, Int>,
    scales: Tensor<2>,
    offsets: Tensor<2>,
    spec: PackedSpec,
) -> Tensor<2> {
    assert_eq!(dy.dims()[1], spec.d_output, "packed_linear_dx: dy beside {spec:?}");
    Tensor::from_dispatch(Dispatch::packed_linear_dx(
        dy.into_dispatch(),
        codes.into_dispatch(),
        scales.into_dispatch(),
        offsets.into_dispatch(),
        spec,
    ))
}

/// The dense weight `[d_input, d_output]` in f32. Without offsets pass the scales in their place.
///
/// # Panics
/// On a backend without an implementation.
pub fn packed_dequantize(
    codes: Tensor<2, Int>,
    scales: Tensor<2>,
    offsets: Tensor<2>,
    spec: PackedSpec,
) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::packed_dequantize(
        codes.into_dispatch(),
        scales.into_dispatch(),
        offsets.into_dispatch(),
        spec,
    ))
}
