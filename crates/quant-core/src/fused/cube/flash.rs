//! Attention whose scores stay on the chip, in CUDA C++: on NVIDIA's devices from compute capability 8.0 on.

use burn::tensor::DType;
use burn_cubecl::{kernel::into_contiguous, tensor::CubeTensor};
use cubecl::{
    ir::attributes::BufferIOAttr,
    prelude::*,
    server::{KernelArguments, KernelResource, MetadataBindingInfo},
};

use super::{super::Scores, attention::Sizes, empty, empty_like};
use crate::{
    Compute,
    ops::cube::{
        cuda_text::{CudaKernel, CudaText},
        rounded as round,
    },
};

const WARPS: usize = 4;
/// Rows that a warp holds.
const ROWS: usize = 16;
/// Largest head whose rows fit in registers.
const MOST_HEAD_DIM: usize = 128;
/// Least compute capability, in tenths.
const CAPABILITY: u32 = 80;

/// Which of the three kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Pass {
    Forward,
    Queries,
    Keys,
}

/// One kernel: what of its text differs from the others'.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Flash {
    pass: Pass,
    head_dim: usize,
    compute: Compute,
    alibi: bool,
    softcap: bool,
}

impl CudaText for Flash {
    const NAME: &'static str = "attention";
    const THREADS: u32 = WARPS as u32 * 32;

    fn text(&self) -> String {
        // As many rows and blocks as keep sums in registers, and tiles, two of each, below 48 KiB.
        let (tile, blocks) = match (self.head_dim, self.pass) {
            (..=64, Pass::Keys) => (64, 2),
            (..=64, _) => (64, 3),
            (65..=96, _) => (32, 2),
            _ => (32, 1),
        };
        let pass = match self.pass {
            Pass::Forward => "FORWARD",
            Pass::Queries => "QUERIES",
            Pass::Keys => "KEYS",
        };
        let operand = if self.compute == Compute::F16 { "f16" } else { "bf16" };
        let (alibi, softcap) = (u8::from(self.alibi), u8::from(self.softcap));
        format!(
            "#define {pass}\n#define WARPS {WARPS}\n#define BLOCKS {blocks}\n#define HEAD_DIM {}\n#define TILE {tile}\n\
             #define ALIBI {alibi}\n#define SOFTCAP {softcap}\n\
             #define MULTIPLY \"mma.sync.aligned.m16n8k16.row.col.f32.{operand}.{operand}.f32\"\n\
             #define ROUND \"cvt.rn.{operand}x2.f32\"\n{}",
            self.head_dim,
            include_str!("flash.cu"),
        )
    }
}

/// Whether the device and the sizes allow these kernels.
pub(super) fn takes(q: &CubeTensor, sizes: &Sizes, scores: &Scores) -> bool {
    let identity = &q.client.properties().identity;
    let capability =
        identity.fingerprint.strip_prefix("ptx_sm").and_then(|number| number.parse::<u32>().ok());
    let Sizes { batch, length, keys, heads, kv_heads, head_dim, .. } = *sizes;
    capability.is_some_and(|capability| capability >= CAPABILITY)
        && scores.compute != Compute::F32
        && head_dim.is_multiple_of(16)
        && (16..=MOST_HEAD_DIM).contains(&head_dim)
        && batch * length > 0
        // Cubes in these directions; places in a row of the batch are counted in 32 bits.
        && heads.max(batch) < 1 << 16
        && keys < 1 << 30
        && keys * heads.max(kv_heads) * head_dim < 1 << 32
}

/// Operands of 16 bits, without the gaps between rows that a cast may leave.
fn rounded<const N: usize>(tensors: [&CubeTensor; N], scores: &Scores) -> [CubeTensor; N] {
    tensors.map(|x| into_contiguous(round(x.clone(), scores.compute)))
}

fn launch(pass: Pass, sizes: &Sizes, scores: &Scores, read: &[&CubeTensor], written: &[&CubeTensor]) {
    let Sizes { batch, length, keys, heads, kv_heads, head_dim, .. } = *sizes;
    let kernel = Flash {
        pass,
        head_dim,
        compute: scores.compute,
        alibi: scores.alibi != 0.0,
        softcap: scores.softcap != 0.0,
    };
    let (rows, columns) = if pass == Pass::Keys { (keys, kv_heads) } else { (length, heads) };
    let count = CubeCount::Static(rows.div_ceil(WARPS * ROWS) as u32, columns as u32, batch as u32);
    // One more than there can be sees all.
    let window = scores.window.map_or(keys + 1, |window| window.min(keys + 1));
    let counts = [length, keys, heads, kv_heads, 1 << heads.ilog2(), window].map(|count| count as u64);
    let factors = [scores.scale, scores.alibi, scores.softcap].map(|factor| factor.to_bits().into());
    let info: Vec<u64> = counts.into_iter().chain(factors).collect();
    let tensors = || read.iter().chain(written);
    let arguments = KernelArguments {
        resources: tensors().map(|x| KernelResource::Buffer(x.handle.clone().binding())).collect(),
        declared_io: read
            .iter()
            .map(|_| BufferIOAttr::ReadOnly)
            .chain(written.iter().map(|_| BufferIOAttr::WriteOnly))
            .collect(),
        info: MetadataBindingInfo::new(info.clone(), info.len()),
    };
    // The kernel stays inside: rows beyond the last query or key are read as zeros or as the last one, and not stored; shapes
    // are asserted in `Sizes::new`. `gpu-check --part operations` walks these edges.
    read[0].client.launch(Box::new(CudaKernel(kernel)), count, arguments);
}

/// As [`attention::forward`](super::attention::forward); keys and values may have gaps between the rows of the batch, which
/// rounding closes.
pub(super) fn forward(
    [q, k, v]: [&CubeTensor; 3],
    segments: &[CubeTensor; 2],
    sizes: &Sizes,
    scores: &Scores,
) -> (CubeTensor, CubeTensor) {
    let (out, log_sums) = (empty_like(q), empty(q, [sizes.batch, sizes.heads, sizes.length], DType::F32));
    let [q, k, v] = rounded([q, k, v], scores);
    let read = [&q, &k, &v, &segments[0], &segments[1]];
    launch(Pass::Forward, sizes, scores, &read, &[&out, &log_sums]);
    (out, log_sums)
}

/// As [`attention::backward`](super::attention::backward), of contiguous tensors.
pub(super) fn backward(
    [q, k, v, out, exact_d_out]: [&CubeTensor; 5],
    log_sums: &CubeTensor,
    segments: &[CubeTensor; 2],
    sizes: &Sizes,
    scores: &Scores,
) -> (CubeTensor, CubeTensor, CubeTensor) {
    let (dq, dk, dv) = (empty_like(q), empty_like(k), empty_like(v));
    let along = empty_like(log_sums);
    let [q, k, v, d_out] = rounded([q, k, v, exact_d_out], scores);
    let [of_queries, of_keys] = segments;
    let read = [&q, &k, &v, &d_out, out, exact_d_out, of_queries, of_keys, log_sums];
    launch(Pass::Queries, sizes, scores, &read, &[&dq, &along]);
    let read = [&q, &k, &v, &d_out, of_queries, of_keys, log_sums, &along];
    launch(Pass::Keys, sizes, scores, &read, &[&dk, &dv]);
    (dq, dk, dv)
}
