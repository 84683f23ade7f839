//! Tensors' memory, and products of matrices in it.

use burn::{
    backend::{
        flex::{Flex, FlexTensor},
        ops::FloatTensorOps,
    },
    tensor::{DType, FloatDType, Shape, TensorData},
};

/// A mutable pointer that tasks may share; each writes its own part.
#[derive(Clone, Copy)]
pub(crate) struct SharedMut(pub *mut f32);
// SAFETY: every use hands disjoint ranges to different tasks, as said there.
unsafe impl Send for SharedMut {}
// SAFETY: as above.
unsafe impl Sync for SharedMut {}
impl SharedMut {
    /// The pointer, moved on by `index` values.
    pub(crate) fn at(self, index: usize) -> *mut f32 {
        self.0.wrapping_add(index)
    }
}

/// A matrix in memory with its strides.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    data: &'a [f32],
    row: isize,
    column: isize,
}

impl<'a> Matrix<'a> {
    /// Row-major.
    pub(crate) fn rows(data: &'a [f32], stride: usize) -> Self {
        Self { data, row: stride as isize, column: 1 }
    }
    /// The transpose of a row-major matrix.
    pub(crate) fn columns(data: &'a [f32], stride: usize) -> Self {
        Self { data, row: 1, column: stride as isize }
    }
}

/// `out (+)= lhs · rhs` on one thread; sizes are rows, columns and the summed size.
///
/// # Safety
/// `out` must be writable for the rows, `stride` apart; the matrices must hold the sizes.
pub(crate) unsafe fn matmul(
    [m, n, k]: [usize; 3],
    out: *mut f32,
    stride: usize,
    add: bool,
    lhs: Matrix<'_>,
    rhs: Matrix<'_>,
) {
    // SAFETY: this function's contract.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out,
            1,
            stride as isize,
            add,
            lhs.data.as_ptr(),
            lhs.column,
            lhs.row,
            rhs.data.as_ptr(),
            rhs.column,
            rhs.row,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// Contiguous f32, whatever the strides and float type.
pub(crate) fn contiguous(tensor: FlexTensor) -> FlexTensor {
    let tensor =
        if tensor.dtype() == DType::F32 { tensor } else { Flex::float_cast(tensor, FloatDType::F32) };
    tensor.to_contiguous()
}

/// The values of a tensor made by [`contiguous`].
pub(crate) fn floats(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice().expect("a contiguous f32 tensor")
}

/// The words of a contiguous integer tensor; U32 and I32 hold the same bits.
pub(crate) fn words(tensor: &FlexTensor) -> &[u32] {
    assert!(
        matches!(tensor.dtype(), DType::U32 | DType::I32),
        "codes and segments must be 32-bit integers, found {:?}",
        tensor.dtype()
    );
    bytemuck::cast_slice(tensor.bytes())
}

/// A tensor of `dtype` from f32 values.
pub(crate) fn tensor(values: Vec<f32>, shape: impl Into<Shape>, dtype: DType) -> FlexTensor {
    let tensor = FlexTensor::from_data(TensorData::new(values, shape.into()));
    if dtype == DType::F32 { tensor } else { Flex::float_cast(tensor, FloatDType::from(dtype)) }
}
