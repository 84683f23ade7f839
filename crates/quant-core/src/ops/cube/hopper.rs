//! Matrix products on compute capability 9.0 (Hopper), whose matrix units CubeCL's kernels don't use at their full rate:
//! they take their operands from shared memory, by `wgmma`, which CubeCL can't express. So this one kernel is CUDA C++.

use std::fmt::Write;

use burn::backend::{cubecl::dtype_to_storage_type, ops::FloatTensorOps};
use burn::tensor::DType;
use burn_cubecl::{CubeBackend, tensor::CubeTensor};
use cubecl::{
    features::Tma,
    ir::{ElemType, attributes::BufferIOAttr},
    prelude::*,
    server::{KernelArguments, KernelResource, MetadataBindingInfo, TensorMapBinding, TensorMapMeta},
    zspace::{Shape, Strides, metadata::Metadata},
};

use super::{
    cuda_text::{CudaKernel, CudaText},
    empty, units,
};
use crate::Compute;

/// Least rows, columns and inner size of a product that fills a good part of a tile.
const LEAST: usize = 64;
const TILE_ROWS: usize = 128;
const TILE_INNER: usize = 32;
/// Rows or columns of an operand that one copy brings.
const BOX: usize = 64;
/// Rows of tiles that are made one after the other.
const BAND: usize = 8;
/// Bulk copies begin at multiples of it, in bytes, and rows lie as far apart.
const ALIGNED: usize = 16;
/// The code that CubeCL's CUDA runtime compiles for such a device.
const ARCHITECTURE: &str = "ptx_sm90";

/// One kernel: what of its text differs from the others'.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Product {
    operand: DType,
    result: DType,
    /// Columns of a tile: 64 or 128.
    columns: usize,
    /// Whether the inner dimension is the contiguous one, of a and of b.
    inner_contiguous: [bool; 2],
    /// Whether a second product is added.
    update: bool,
}

impl Product {
    fn stages(&self) -> usize {
        // A block has 48 KiB, and two blocks share a multiprocessor.
        if self.columns == 64 { 3 } else { 2 }
    }
}

impl CudaText for Product {
    const NAME: &'static str = "product";
    const THREADS: u32 = 288;

    fn text(&self) -> String {
        let operand = if self.operand == DType::BF16 { "bf16" } else { "f16" };
        let sums = self.columns / 2;
        let list = |item: &dyn Fn(usize) -> String| (0..sums).map(item).collect::<Vec<_>>().join(", ");
        let [a_inner, b_inner] = self.inner_contiguous.map(u8::from);
        let mut text = String::new();
        for (name, value) in [
            ("TILE_M", TILE_ROWS),
            ("TILE_N", self.columns),
            ("TILE_K", TILE_INNER),
            ("STAGES", self.stages()),
            ("BAND", BAND),
            ("A_INNER", a_inner.into()),
            ("B_INNER", b_inner.into()),
            ("UPDATE", self.update.into()),
        ] {
            let _ = writeln!(text, "#define {name} {value}");
        }
        let _ = writeln!(
            text,
            "#define MULTIPLY(d, a, b) asm volatile(\"wgmma.mma_async.sync.aligned.m64n{}k16.f32.{operand}.{operand} {{{}}}, \
             %{sums}, %{}, 1, 1, 1, %{}, %{};\" : {} : \"l\"(a), \"l\"(b), \"n\"(1 - A_INNER), \"n\"(1 - B_INNER))",
            self.columns,
            list(&|i| format!("%{i}")),
            sums + 1,
            sums + 2,
            sums + 3,
            list(&|i| format!("\"+f\"(d[{i}])")),
        );
        text.push_str(&match self.result {
            DType::F32 => "#define RESULT float\n__device__ __forceinline__ void store(float* to, float x, float y) { \
                           *(float2*)to = make_float2(x, y); }\n"
                .to_owned(),
            _ => format!(
                "#define RESULT unsigned short\n__device__ __forceinline__ void store(unsigned short* to, float x, float y) {{ \
                 unsigned int both; asm(\"cvt.rn.{operand}x2.f32 %0, %1, %2;\" : \"=r\"(both) : \"f\"(y), \"f\"(x)); \
                 *(unsigned int*)to = both; }}\n"
            ),
        });
        text.push_str(include_str!("hopper.cu"));
        text
    }
}

/// A matrix, or matrices at one distance, as bulk copies see them.
struct Operand<'a> {
    tensor: &'a CubeTensor,
    /// How many, and the elements from one to the next.
    matrices: [usize; 2],
    /// Rows (of b: columns), and their distance.
    outer: [usize; 2],
    /// The inner dimension, and the distance of its elements.
    inner: [usize; 2],
}

impl<'a> Operand<'a> {
    /// `None` if it isn't laid out as copies need it. The inner dimension is `inner` places before the last.
    fn new(tensor: &'a CubeTensor, inner: usize) -> Option<Self> {
        let (shape, strides) = (tensor.meta.shape(), tensor.meta.strides());
        let last = shape.num_dims() - 1;
        let dimension = |i: usize| [shape[i], strides[i]];
        let (outer, inner) = (dimension(last - 1 + inner), dimension(last - inner));
        let matrices =
            (0..last - 1).rev().filter(|&i| shape[i] != 1).try_fold([1, 0], |[count, stride], i| {
                if count == 1 {
                    Some([shape[i], strides[i]])
                } else {
                    (strides[i] == count * stride).then_some([count * shape[i], stride])
                }
            })?;
        let operand = Self { tensor, matrices, outer, inner };
        let aligned = |elements: usize| (elements * tensor.dtype.size()).is_multiple_of(ALIGNED);
        let begins = tensor.handle.offset_start.unwrap_or(0).is_multiple_of(ALIGNED as u64);
        let [rows, columns] = [operand.outer[1], operand.inner[1]];
        let repeated = matrices[0] > 1 && matrices[1] == 0;
        let copied = rows.min(columns) == 1
            && aligned(rows.max(columns))
            && aligned(matrices[1])
            && !repeated
            && begins;
        (copied && !tensor.meta.is_tiled()).then_some(operand)
    }

    fn inner_contiguous(&self) -> bool {
        self.inner[1] == 1
    }

    fn resource(&self) -> KernelResource {
        let (tile, slow, fast, swizzle) = if self.inner_contiguous() {
            ([1, BOX, TILE_INNER], self.outer, self.inner, TensorMapSwizzle::B64)
        } else {
            ([1, TILE_INNER, BOX], self.inner, self.outer, TensorMapSwizzle::B128)
        };
        // One matrix is at no distance from the next; the map wants one.
        let distance = self.matrices[1].max(slow[1]);
        let map = TensorMapMeta {
            format: TensorMapFormat::Tiled(TiledArgs { tile_size: Shape::from(tile) }),
            metadata: Metadata::new(
                Shape::from([self.matrices[0], slow[0], fast[0]]),
                Strides::from(&[distance, slow[1], 1][..]),
            ),
            elem_stride: Strides::from(&[1, 1, 1][..]),
            interleave: TensorMapInterleave::None,
            swizzle,
            prefetch: TensorMapPrefetch::B128,
            oob_fill: OobFill::Zero,
            elem_ty: dtype_to_storage_type(self.tensor.dtype),
        };
        KernelResource::TensorMap(TensorMapBinding { binding: self.tensor.handle.clone().binding(), map })
    }
}

/// Writes `a · b`, plus `left · right` where there is such an update, into the contiguous `out`, if the device and the
/// operands allow it; else does nothing and says so.
pub(super) fn launch([a, b]: [&CubeTensor; 2], update: Option<[&CubeTensor; 2]>, out: &CubeTensor) -> bool {
    if !serves(a) {
        return false;
    }
    let types = matches!(a.dtype, DType::BF16 | DType::F16)
        && a.dtype == b.dtype
        && (out.dtype == DType::F32 || out.dtype == a.dtype);
    let (Some(a), Some(b)) = (Operand::new(a, 0), Operand::new(b, 1)) else {
        return false;
    };
    let [m, n, k] = [a.outer[0], b.outer[0], a.inner[0]];
    let count = a.matrices[0];
    let sizes = m.min(n).min(k) >= LEAST
        // Results are written in pairs, and their places in a matrix counted in 32 bits.
        && n.is_multiple_of(2)
        && m.max(n).max(k) < 1 << 31
        && b.matrices[0] == count
        && count < 1 << 16;
    if !types || !sizes {
        return false;
    }
    let update = match update {
        None => None,
        Some([left, right]) => {
            let (Some(left), Some(right)) = (Operand::new(left, 0), Operand::new(right, 1)) else {
                return false;
            };
            let fits = [&left, &right].iter().all(|x| x.tensor.dtype == a.tensor.dtype && x.matrices[0] == 1)
                && [left.outer[0], right.outer[0], right.inner[0]] == [m, n, left.inner[0]]
                && [&left, &right].map(Operand::inner_contiguous) == [&a, &b].map(Operand::inner_contiguous);
            if !fits || count != 1 {
                return false;
            }
            Some([left, right])
        }
    };
    let columns = if n <= 64 { 64 } else { 128 };
    let kernel = Product {
        operand: a.tensor.dtype,
        result: out.dtype,
        columns,
        inner_contiguous: [a.inner_contiguous(), b.inner_contiguous()],
        update: update.is_some(),
    };
    let tiles = m.div_ceil(TILE_ROWS) * n.div_ceil(columns);
    let Ok(tiles) = u32::try_from(tiles) else { return false };
    let inner_of_update = update.as_ref().map_or(0, |[left, _]| left.inner[0]);
    let mut resources: Vec<_> =
        [&a, &b].into_iter().chain(update.iter().flatten()).map(Operand::resource).collect();
    let mut declared_io = vec![BufferIOAttr::ReadOnly; resources.len()];
    resources.push(KernelResource::Buffer(out.handle.clone().binding()));
    declared_io.push(BufferIOAttr::WriteOnly);
    let arguments = KernelArguments {
        resources,
        declared_io,
        info: MetadataBindingInfo::new([m, n, k, inner_of_update].map(|size| size as u64).to_vec(), 4),
    };
    // The kernel stays inside: copies end with the maps' sizes, and what lies beyond the rows and columns of `out`, which is
    // as large as the product, isn't stored. `gpu-check --part operations` walks these edges.
    out.client.launch(Box::new(CudaKernel(kernel)), CubeCount::Static(tiles, 1, count as u32), arguments);
    true
}

/// Most columns of a low-rank update's left factor.
const MOST_RANK: usize = 64;

/// Whether [`product_and_update`] is worth a try for rows `x` in f32.
pub(super) fn updates(x: &CubeTensor, [left, right]: [&CubeTensor; 2], compute: Compute) -> bool {
    let (sizes, rank, columns) = (x.meta.shape(), left.meta.shape()[1], right.meta.shape()[1]);
    // Rows lie at multiples of what copies can begin at, those of what a factor is split into too.
    let aligned = |size: usize| size.is_multiple_of(ALIGNED / 2);
    serves(x)
        && [sizes[0], sizes[1], columns].iter().all(|&size| size >= LEAST)
        && compute != Compute::F32
        && [left, right].iter().all(|factor| factor.dtype == DType::F32)
        && [sizes[1], columns, rank].into_iter().all(aligned)
        && (1..=MOST_RANK).contains(&rank)
}

/// `a · b + left · right` in f32 of rounded a and b; left and right, in f32, are not rounded to 16 bits but split into two
/// numbers of 16 bits each, of whose four products the three largest are added.
pub(super) fn product_and_update(
    a: &CubeTensor,
    b: &CubeTensor,
    [left, right]: [&CubeTensor; 2],
) -> Option<CubeTensor> {
    let inner_contiguous = Operand::new(b, 1)?.inner_contiguous();
    let turned = |x: CubeTensor| if inner_contiguous { CubeBackend::float_transpose(x) } else { x };
    // Laid out as b is.
    let right = turned(right.clone());
    let [left, right] = split([left, &right], a.dtype, inner_contiguous);
    let right = turned(right);
    let out = empty(a, [a.meta.shape()[0], b.meta.shape()[1]], DType::F32);
    launch([a, b], Some([&left, &right]), &out).then_some(out)
}

/// Two matrices in f32, each three times: rounded to `dtype`, but once what rounding took off, in the first matrix the last
/// time, in the second one the second. The first one's lie side by side, the second one's too or one below the other.
fn split([first, second]: [&CubeTensor; 2], dtype: DType, side_by_side: bool) -> [CubeTensor; 2] {
    let sizes = |x: &CubeTensor, along: usize| {
        let shape = x.meta.shape();
        let mut sizes = [shape[0], shape[1]];
        sizes[along] *= 3;
        (sizes, shape[along])
    };
    let ((first_sizes, first_size), (second_sizes, second_size)) =
        (sizes(first, 1), sizes(second, usize::from(side_by_side)));
    let (first_out, second_out) = (empty(first, first_sizes, dtype), empty(first, second_sizes, dtype));
    let [first_count, second_count] = [first_sizes, second_sizes].map(|[rows, columns]| rows * columns);
    let (count, dim) = units(&first.client, first_count + second_count);
    let (first_strides, second_strides) = (first.meta.strides(), second.meta.strides());
    split_kernel::launch(
        &first.client,
        count,
        dim,
        first.clone().into_tensor_arg(),
        second.clone().into_tensor_arg(),
        first_out.clone().into_tensor_arg(),
        second_out.clone().into_tensor_arg(),
        first_count,
        first_sizes[1],
        first_strides[0],
        first_strides[1],
        first_size,
        second_count,
        second_sizes[1],
        second_strides[0],
        second_strides[1],
        second_size,
        side_by_side,
        dtype_to_storage_type(dtype),
    );
    [first_out, second_out]
}

#[cube(launch)]
fn split_kernel<E: Float>(
    first: &Tensor<f32>,
    second: &Tensor<f32>,
    first_out: &mut Tensor<E>,
    second_out: &mut Tensor<E>,
    first_count: usize,
    first_columns: usize,
    first_row: usize,
    first_column: usize,
    first_size: usize,
    second_count: usize,
    second_columns: usize,
    second_row: usize,
    second_column: usize,
    second_size: usize,
    #[comptime] side_by_side: bool,
    #[define(E)] _type: ElemType,
) {
    if ABSOLUTE_POS < first_count {
        let (row, column) = (ABSOLUTE_POS / first_columns, ABSOLUTE_POS % first_columns);
        let value = first[row * first_row + column % first_size * first_column];
        first_out[ABSOLUTE_POS] = part::<E>(value, column / first_size == 2);
    } else if ABSOLUTE_POS - first_count < second_count {
        let at = ABSOLUTE_POS - first_count;
        let (row, column) = (at / second_columns, at % second_columns);
        if comptime!(side_by_side) {
            let value = second[row * second_row + column % second_size * second_column];
            second_out[at] = part::<E>(value, column / second_size == 1);
        } else {
            let value = second[row % second_size * second_row + column * second_column];
            second_out[at] = part::<E>(value, row / second_size == 1);
        }
    }
}

/// A number rounded, or what rounding takes off.
#[cube]
fn part<E: Float>(value: f32, low: bool) -> E {
    let high = E::cast_from(value);
    let rest = E::cast_from(value - f32::cast_from(high));
    select(low, rest, high)
}

/// Whether the kernel runs where `x` is.
fn serves(x: &CubeTensor) -> bool {
    let properties = x.client.properties();
    properties.identity.fingerprint == ARCHITECTURE && properties.features.tma.contains(Tma::Base)
}
