//! Matrix products on CubeCL, of operands of one type, summed in f32.

use burn::backend::{cubecl::dtype_to_storage_type, ops::FloatTensorOps};
use burn::tensor::{DType, FloatDType, Shape};
use burn_cubecl::{
    CubeBackend, CubeDevice,
    kernel::matmul::{MatmulStrategy, matmul},
    ops::numeric::empty_device_contiguous_dtype,
    tensor::CubeTensor,
};
use cubecl::{features::Tma, ir::ElemType};
use cubek::{
    matmul::{
        definition::{MatmulElems, MatmulGlobalElems, MatmulSetupError},
        launch::launch_ref,
        multi_level::{
            self,
            components::tile::TileMatmulKind,
            routines::batch::{double_buffering::DoubleBufferingArgs, simple::SimpleArgs},
        },
        routine::BlueprintStrategy::Inferred,
        strategy::Strategy,
    },
    std::InputBinding,
};

use crate::Compute;

/// The type of operands.
pub(crate) fn operand_type(compute: Compute) -> DType {
    match compute {
        Compute::F32 => DType::F32,
        Compute::Bf16 => DType::BF16,
        Compute::F16 => DType::F16,
    }
}

/// Whether the matrix units of `device` multiply such operands into sums of f32.
pub(crate) fn multiplies(device: &CubeDevice, compute: Compute) -> bool {
    let (operand, sum) = (dtype_to_storage_type(operand_type(compute)), dtype_to_storage_type(DType::F32));
    let client = device.client();
    let units = &client.properties().features.matmul;
    let takes = |a: ElemType, b: ElemType, sums: ElemType| a == operand && b == operand && sums == sum;
    units.cmma.iter().any(|unit| takes(unit.a_type, unit.b_type, unit.cd_type))
        || units.mma.iter().any(|unit| takes(unit.a_type, unit.b_type, unit.cd_type))
}

/// The name of a device with its runtime's, and the bytes of the largest tensor it holds.
pub(crate) fn name_and_page(device: &CubeDevice) -> (String, Option<u64>) {
    let client = device.client();
    let properties = client.properties();
    (format!("{} {:?}", client.name(), properties.identity), Some(properties.memory.max_page_size))
}

/// An f32 tensor as an operand; other types are operands as they are.
pub(crate) fn rounded(x: CubeTensor, compute: Compute) -> CubeTensor {
    match (x.dtype, compute) {
        (DType::F32, Compute::Bf16) => CubeBackend::float_cast(x, FloatDType::BF16),
        (DType::F32, Compute::F16) => CubeBackend::float_cast(x, FloatDType::F16),
        _ => x,
    }
}

/// `a · b` of rounded operands, in the type of `a`; an operand that is stored in 16 bits stays so where the other one is
/// rounded to the same type, else it is widened.
pub(crate) fn rounded_product(a: CubeTensor, b: CubeTensor, compute: Compute) -> CubeTensor {
    let dtype = a.dtype;
    let (mut a, mut b) = (rounded(a, compute), rounded(b, compute));
    if a.dtype != b.dtype {
        [a, b] = [a, b].map(|x| match x.dtype {
            DType::F32 => x,
            _ => CubeBackend::float_cast(x, FloatDType::F32),
        });
    }
    product(a, b, dtype)
}

/// A new contiguous tensor beside `like`.
pub(crate) fn empty(like: &CubeTensor, shape: impl Into<Shape>, dtype: DType) -> CubeTensor {
    empty_device_contiguous_dtype(like.client.clone(), like.device.clone(), shape.into(), dtype)
}

/// `a · b`, `[.., m, k]` and `[.., k, n]` of one type and any strides, in the type `dtype`.
pub(crate) fn product(a: CubeTensor, b: CubeTensor, dtype: DType) -> CubeTensor {
    let mut sizes = a.meta.shape().to_vec();
    let last = sizes.len() - 1;
    sizes[last] = b.meta.shape()[last];
    let out = empty(&a, sizes, dtype);
    product_into(a, b, out.clone());
    out
}

/// As [`product`], into the contiguous `out`.
///
/// Kernels are chosen by sizes and by what the device has, not by measuring: so that results don't depend on a run, and
/// because compiling all candidates for all shapes of a step takes minutes.
pub(crate) fn product_into(a: CubeTensor, b: CubeTensor, out: CubeTensor) {
    #[cfg(feature = "cuda-cpp")]
    if super::hopper::launch([&a, &b], None, &out) {
        return;
    }
    let dtype = out.dtype;
    let chosen = strategies(&a, &b).into_iter().find(|strategy| launch(strategy, &a, &b, &out).is_ok());
    if chosen.is_none()
        && let Err(error) = matmul(a, b, Some(out), MatmulStrategy::Cube, dtype)
    {
        panic!("matrix product: {error:?}");
    }
}

/// Least size in every direction of a product that is worth bulk copies, and warps of their own for them.
const LARGE: usize = 128;

/// Kernels for 16-bit operands on matrix units, the fastest first.
fn strategies(a: &CubeTensor, b: &CubeTensor) -> Vec<Strategy> {
    if !matches!(a.dtype, DType::BF16 | DType::F16) {
        return Vec::new();
    }
    let features = &a.client.properties().features;
    if features.matmul.mma.is_empty() {
        return Vec::new();
    }
    let (a_shape, b_shape) = (a.meta.shape(), b.meta.shape());
    let last = a_shape.num_dims() - 1;
    let least = a_shape[last - 1].min(a_shape[last]).min(b_shape[last]);
    let mut strategies = Vec::new();
    if features.tma.contains(Tma::Base) && least >= LARGE && [a, b].iter().all(|x| copied_in_bulk(x)) {
        strategies.push(multi_level::Strategy::SpecializedTmaMma(Inferred(().into())).into());
    }
    if least >= LARGE / 2 {
        let arguments = DoubleBufferingArgs { specialized: false, tile_matmul: TileMatmulKind::Mma };
        strategies.push(multi_level::Strategy::DoubleCyclicMma(Inferred(arguments)).into());
    }
    let arguments = SimpleArgs { multi_rows: false, tile_matmul: TileMatmulKind::Mma };
    strategies.push(multi_level::Strategy::SimpleCyclicMma(Inferred(arguments)).into());
    strategies
}

/// Whether the rows or columns of a matrix begin at multiples of 16 bytes.
fn copied_in_bulk(x: &CubeTensor) -> bool {
    let strides = x.meta.strides();
    let last = strides.len() - 1;
    let (row, column) = (strides[last - 1], strides[last]);
    let size = x.dtype.size();
    row.min(column) == 1 && (row.max(column) * size).is_multiple_of(16)
}

fn launch(
    strategy: &Strategy,
    a: &CubeTensor,
    b: &CubeTensor,
    out: &CubeTensor,
) -> Result<(), MatmulSetupError> {
    let operand = |x: &CubeTensor| InputBinding::new(x.clone().binding(), dtype_to_storage_type(x.dtype));
    let mut types = MatmulElems::from_globals(&MatmulGlobalElems {
        lhs: dtype_to_storage_type(a.dtype),
        rhs: dtype_to_storage_type(b.dtype),
        out: dtype_to_storage_type(out.dtype),
    });
    launch_ref(strategy, &a.client, operand(a), operand(b), out.clone().binding(), &mut types)
}
