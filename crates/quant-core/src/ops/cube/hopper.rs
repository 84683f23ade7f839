//! Matrix products on compute capability 9.0 (Hopper), whose matrix units CubeCL's kernels don't use at their full rate:
//! they take their operands from shared memory, by `wgmma`, which CubeCL can't express. So this one kernel is CUDA C++.

use std::fmt::Write;

use burn::backend::cubecl::dtype_to_storage_type;
use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::{
    CubeKernel, PrecompiledSource,
    features::Tma,
    ir::{
        ElemType, UIntKind,
        attributes::BufferIOAttr,
        metadata::Info,
        settings::{Dim3, KernelSettings},
    },
    prelude::*,
    server::{KernelArguments, KernelResource, MetadataBindingInfo, TensorMapBinding, TensorMapMeta},
    zspace::{Shape, Strides, metadata::Metadata},
};

/// Least rows, columns and inner size of a product that fills a good part of a tile.
const LEAST: usize = 64;
const TILE_ROWS: usize = 128;
const TILE_INNER: usize = 32;
/// Rows or columns of an operand that one copy brings.
const BOX: usize = 64;
/// Rows of tiles that are made one after the other.
const BAND: usize = 8;
const THREADS: u32 = 288;
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
}

impl Product {
    fn stages(&self) -> usize {
        // A block has 48 KiB, and two blocks share a multiprocessor.
        if self.columns == 64 { 3 } else { 2 }
    }

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

impl KernelMetadata for Product {
    fn id(&self) -> KernelId {
        KernelId::new::<Self>().info(*self).cube_dim(Dim3::new_1d(THREADS))
    }

    fn address_type(&self) -> ElemType {
        UIntKind::U32.into()
    }
}

impl CubeKernel for Product {
    fn define(&self) -> KernelDefinition {
        let settings = KernelSettings::new(Dim3::new_1d(THREADS), ExecutionMode::Unchecked, AddressType::U32);
        KernelDefinition { body: Scope::root(settings.clone()), info: Info::default(), settings }
    }

    fn source(&self) -> Option<PrecompiledSource> {
        Some(PrecompiledSource { source: self.text(), entrypoint_name: "product".to_owned(), lang: "cuda" })
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

/// Writes `a · b` into the contiguous `out`, if the device and the operands allow it; else does nothing and says so.
pub(super) fn launch(a: &CubeTensor, b: &CubeTensor, out: &CubeTensor) -> bool {
    let properties = a.client.properties();
    if properties.identity.fingerprint != ARCHITECTURE || !properties.features.tma.contains(Tma::Base) {
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
    let columns = if n <= 64 { 64 } else { 128 };
    let kernel = Product {
        operand: a.tensor.dtype,
        result: out.dtype,
        columns,
        inner_contiguous: [a.inner_contiguous(), b.inner_contiguous()],
    };
    let tiles = m.div_ceil(TILE_ROWS) * n.div_ceil(columns);
    let Ok(tiles) = u32::try_from(tiles) else { return false };
    let arguments = KernelArguments {
        resources: vec![a.resource(), b.resource(), KernelResource::Buffer(out.handle.clone().binding())],
        declared_io: vec![BufferIOAttr::ReadOnly, BufferIOAttr::ReadOnly, BufferIOAttr::WriteOnly],
        info: MetadataBindingInfo::new([m, n, k].map(|size| size as u64).to_vec(), 3),
    };
    // The kernel stays inside: copies end with the maps' sizes, and what lies beyond the rows and columns of `out`, which is
    // as large as the product, isn't stored. `gpu-check --part operations` walks these edges.
    out.client.launch(Box::new(kernel), CubeCount::Static(tiles, 1, count as u32), arguments);
    true
}
