//! Attention, forward and backward, a block of queries at a time: scores of one block are all that ever exists. Each
//! block is two products (five backwards) and one kernel for everything between them.
//!
//! Operands of products lie head by head: keys and values `[batch, kv_heads, keys, head_dim]`; queries in blocks one
//! after the other, each `[batch, heads, count, head_dim]`, so that a block is one piece of memory in which the query
//! heads that share a key head are one matrix of `group * count` rows. Nothing is copied for grouped heads.

use std::ops::Range;

use burn::backend::cubecl::dtype_to_storage_type;
use burn::tensor::{DType, Shape};
use burn_cubecl::{kernel::into_contiguous, tensor::CubeTensor};
use cubecl::{ir::ElemType, prelude::*};

use super::{
    super::Scores,
    count_of, cubes, empty, empty_like, few_queries,
    rows::{over_units, units_of},
    units, zeros_like,
};
use crate::ops::cube::{operand_type, product, product_into};

/// Rows of scores of a block, over all rows of the batch and all heads.
const SCORE_ROWS: usize = 1 << 15;
/// Least and most queries of a block. A multiple of the least one begins where every device lets a tensor begin.
const QUERIES: Range<usize> = 64..1024;

/// Sizes of one attention.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub(super) batch: usize,
    pub(super) length: usize,
    pub(super) keys: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    /// Queries of a block.
    queries: usize,
}

impl Sizes {
    fn new([q, k, v]: [&CubeTensor; 3], segments: &[CubeTensor; 2]) -> Self {
        let (q, k, v) = (q.meta.shape(), k.meta.shape(), v.meta.shape());
        let (batch, length, keys, heads, kv_heads, head_dim) = (q[0], q[1], k[1], q[2], k[2], q[3]);
        let counts = segments.each_ref().map(count_of);
        assert!(
            k == v
                && k[0] == batch
                && k[3] == head_dim
                && keys >= length
                && heads.is_multiple_of(kv_heads)
                && counts == [batch * length, batch * keys]
                && segments.iter().all(|segments| segments.dtype == DType::I32),
            "attention: q {q:?}, k {k:?}, v {v:?}, {counts:?} query and key segments",
        );
        let queries = SCORE_ROWS / (batch * heads);
        let queries = (queries / QUERIES.start * QUERIES.start).clamp(QUERIES.start, QUERIES.end);
        Self { batch, length, keys, heads, kv_heads, head_dim, queries }
    }

    /// Blocks of queries, each with the keys that any of them may see.
    fn blocks(self, window: Option<usize>) -> impl Iterator<Item = Block> {
        let past = self.keys - self.length;
        (0..self.length).step_by(self.queries).map(move |start| {
            let queries = start..self.length.min(start + self.queries);
            let first = window.map_or(0, |window| (start + past + 1).saturating_sub(window));
            // Where every device lets a tensor begin.
            let first = first / QUERIES.start * QUERIES.start;
            Block { sizes: self, keys: first..past + queries.end, queries }
        })
    }
}

/// A block of queries.
struct Block {
    sizes: Sizes,
    queries: Range<usize>,
    keys: Range<usize>,
}

impl Block {
    /// Rows of scores.
    fn rows(&self) -> usize {
        self.sizes.batch * self.sizes.heads * self.queries.len()
    }

    /// `[batch * kv_heads, group * queries, columns]`.
    fn shape(&self, columns: usize) -> Shape {
        let batches = self.sizes.batch * self.sizes.kv_heads;
        Shape::from(vec![batches, self.rows() / batches, columns])
    }

    /// The block's part of queries that were laid out by blocks.
    fn of_queries(&self, queries: &CubeTensor) -> CubeTensor {
        let Sizes { batch, heads, head_dim, .. } = self.sizes;
        let offset = self.queries.start * batch * heads * head_dim;
        part(queries, offset, self.shape(head_dim), None)
    }

    /// The block's keys of `[batch, kv_heads, keys, head_dim]`.
    fn of_keys(&self, keys: &CubeTensor) -> CubeTensor {
        let Sizes { batch, kv_heads, keys: all, head_dim, .. } = self.sizes;
        let shape = Shape::from(vec![batch * kv_heads, self.keys.len(), head_dim]);
        part(keys, self.keys.start * head_dim, shape, Some(all * head_dim))
    }
}

/// A tensor of `shape` from the element `offset` of another on; `batch_stride` where its batches don't follow each
/// other.
fn part(whole: &CubeTensor, offset: usize, shape: Shape, batch_stride: Option<usize>) -> CubeTensor {
    let handle = whole.handle.clone().offset_start((offset * whole.dtype.size()) as u64);
    let (client, device) = (whole.client.clone(), whole.device.clone());
    let mut part = CubeTensor::new_contiguous(client, device, shape, handle, whole.dtype);
    if let Some(stride) = batch_stride {
        part.meta.strides_mut()[0] = stride;
    }
    part
}

fn transposed(mut x: CubeTensor) -> CubeTensor {
    x.meta.swap(1, 2);
    x
}

/// What the kernels between the products are told.
fn launch_arguments(block: &Block, scores: Scores) -> Layout {
    let Sizes { length, keys, heads, .. } = block.sizes;
    Layout {
        heads,
        power: 1 << heads.ilog2(),
        count: block.queries.len(),
        start: block.queries.start,
        first_key: block.keys.start,
        length,
        keys,
        // One more than there can be sees all.
        window: scores.window.unwrap_or(keys + 1),
    }
}

/// Where a block's queries and keys are.
struct Layout {
    heads: usize,
    power: usize,
    count: usize,
    start: usize,
    first_key: usize,
    length: usize,
    keys: usize,
    window: usize,
}

/// Keys or values without gaps, but for those between the rows of the batch: a cache has room there.
fn gapless_rows(x: CubeTensor) -> CubeTensor {
    let (shape, strides) = (x.meta.shape(), x.meta.strides());
    let gapless = strides[1..] == [shape[2] * shape[3], shape[3], 1] && strides[0] >= shape[1] * strides[1];
    if gapless && !x.meta.is_tiled() { x } else { into_contiguous(x) }
}

/// `[batch, length, heads, head_dim]` in f32, whose rows of the batch may lie apart, to the layout of products, in blocks of
/// `queries`.
fn laid_out(x: &CubeTensor, queries: usize, dtype: DType) -> CubeTensor {
    let laid = empty(x, x.meta.shape().clone(), dtype);
    move_heads(x, &laid, queries, true);
    laid
}

/// The reverse of [`laid_out`].
fn gathered(x: &CubeTensor, queries: usize) -> CubeTensor {
    let back = empty(x, x.meta.shape().clone(), DType::F32);
    move_heads(x, &back, queries, false);
    back
}

fn move_heads(from: &CubeTensor, to: &CubeTensor, queries: usize, lay_out: bool) {
    let shape = from.meta.shape();
    let (count, dim) = units(&from.client, count_of(from));
    let row = if lay_out { from.meta.strides()[0] } else { shape[1] * shape[2] * shape[3] };
    // SAFETY: both sides are indexed by a permutation of the elements of one shape, with the gaps between rows that their
    // strides say.
    unsafe {
        move_heads_kernel::launch_unchecked(
            &from.client,
            count,
            dim,
            from.clone().into_tensor_arg(),
            to.clone().into_tensor_arg(),
            shape[0],
            shape[1],
            shape[2],
            shape[3],
            queries,
            row,
            lay_out,
            [dtype_to_storage_type(from.dtype), dtype_to_storage_type(to.dtype)],
        );
    }
}

/// The result `[batch, length, heads, head_dim]` and the logarithm of each query's sum of exponentials, `[batch, heads,
/// length]`.
pub(super) fn forward(
    [q, k, v]: [CubeTensor; 3],
    segments: [CubeTensor; 2],
    scores: Scores,
) -> (CubeTensor, CubeTensor) {
    let (q, k, v) = (into_contiguous(q), gapless_rows(k), gapless_rows(v));
    let segments = segments.map(into_contiguous);
    let sizes = Sizes::new([&q, &k, &v], &segments);
    if few_queries::takes(&sizes) {
        return few_queries::forward([&q, &k, &v], &segments, &sizes, &scores);
    }
    #[cfg(feature = "cuda-cpp")]
    if super::flash::takes(&q, &sizes, &scores) {
        return super::flash::forward([&q, &k, &v], &segments, &sizes, &scores);
    }
    let dtype = operand_type(scores.compute);
    let log_sums = empty(&q, [sizes.batch, sizes.heads, sizes.length], DType::F32);
    let out = empty_like(&q);
    let (q, k, v) = (
        laid_out(&q, sizes.queries, dtype),
        laid_out(&k, sizes.keys, dtype),
        laid_out(&v, sizes.keys, dtype),
    );
    for block in sizes.blocks(scores.window) {
        let raw = product(block.of_queries(&q), transposed(block.of_keys(&k)), DType::F32);
        let weights = empty(&q, block.shape(block.keys.len()), dtype);
        let width = block.keys.len();
        let units = units_of(width);
        let (count, dim) = cubes(block.rows(), units);
        let at = launch_arguments(&block, scores);
        // SAFETY: a cube stays in its row of scores, whose query, head and keys are those of the asserted shapes.
        unsafe {
            weights_kernel::launch_unchecked(
                &raw.client.clone(),
                count,
                dim,
                raw.into_tensor_arg(),
                segments[0].clone().into_tensor_arg(),
                segments[1].clone().into_tensor_arg(),
                weights.clone().into_tensor_arg(),
                log_sums.clone().into_tensor_arg(),
                scores.scale,
                scores.alibi,
                scores.softcap,
                block.rows(),
                width,
                at.heads,
                at.power,
                at.count,
                at.start,
                at.first_key,
                at.length,
                at.keys,
                at.window,
                units,
                dtype_to_storage_type(dtype),
            );
        }
        product_into(weights, block.of_keys(&v), block.of_queries(&out));
    }
    (gathered(&out, sizes.queries), log_sums)
}

/// Gradients with respect to q, k and v.
pub(super) fn backward(
    [q, k, v, out, d_out]: [CubeTensor; 5],
    log_sums: CubeTensor,
    segments: [CubeTensor; 2],
    scores: Scores,
) -> (CubeTensor, CubeTensor, CubeTensor) {
    let [q, k, v, out, d_out] = [q, k, v, out, d_out].map(into_contiguous);
    let segments = segments.map(into_contiguous);
    let sizes = Sizes::new([&q, &k, &v], &segments);
    let counts = [&out, &d_out, &log_sums].map(count_of);
    let queries = sizes.batch * sizes.heads * sizes.length;
    assert_eq!(counts, [count_of(&q), count_of(&q), queries], "attention: what its backward pass is given");
    #[cfg(feature = "cuda-cpp")]
    if super::flash::takes(&q, &sizes, &scores) {
        let log_sums = into_contiguous(log_sums);
        return super::flash::backward([&q, &k, &v, &out, &d_out], &log_sums, &segments, &sizes, &scores);
    }
    let dtype = operand_type(scores.compute);
    let along = along(&out, &d_out);
    let (dq, dk, dv) = (empty_like(&q), zeros_like(&k), zeros_like(&v));
    let by_queries = |x: &CubeTensor| laid_out(x, sizes.queries, dtype);
    let by_heads = |x: &CubeTensor| laid_out(x, sizes.keys, dtype);
    let (q, k, v, d_out) = (by_queries(&q), by_heads(&k), by_heads(&v), by_queries(&d_out));
    for block in sizes.blocks(scores.window) {
        let (q, d_out) = (block.of_queries(&q), block.of_queries(&d_out));
        let (k, v) = (block.of_keys(&k), block.of_keys(&v));
        let width = block.keys.len();
        let raw = product(q.clone(), transposed(k.clone()), DType::F32);
        let d_weights = product(d_out.clone(), transposed(v), DType::F32);
        let weights = empty(&q, block.shape(width), dtype);
        let d_scores = empty(&q, block.shape(width), dtype);
        let units = units_of(width);
        let (count, dim) = cubes(block.rows(), units);
        let at = launch_arguments(&block, scores);
        // SAFETY: a cube stays in its row of scores, whose query, head and keys are those of the asserted shapes.
        unsafe {
            score_gradients_kernel::launch_unchecked(
                &raw.client.clone(),
                count,
                dim,
                raw.into_tensor_arg(),
                d_weights.into_tensor_arg(),
                log_sums.clone().into_tensor_arg(),
                along.clone().into_tensor_arg(),
                segments[0].clone().into_tensor_arg(),
                segments[1].clone().into_tensor_arg(),
                weights.clone().into_tensor_arg(),
                d_scores.clone().into_tensor_arg(),
                scores.scale,
                scores.alibi,
                scores.softcap,
                block.rows(),
                width,
                at.heads,
                at.power,
                at.count,
                at.start,
                at.first_key,
                at.length,
                at.keys,
                at.window,
                units,
                dtype_to_storage_type(dtype),
            );
        }
        product_into(d_scores.clone(), k, block.of_queries(&dq));
        add_keys(&dk, product(transposed(d_scores), q, DType::F32), &block);
        add_keys(&dv, product(transposed(weights), d_out, DType::F32), &block);
    }
    (gathered(&dq, sizes.queries), dk, dv)
}

/// `Σ out · d_out` of each head, `[batch, heads, length]`.
fn along(out: &CubeTensor, d_out: &CubeTensor) -> CubeTensor {
    let shape = out.meta.shape();
    let along = empty(out, [shape[0], shape[2], shape[1]], DType::F32);
    let (count, dim) = units(&out.client, count_of(&along));
    along_kernel::launch(
        &out.client,
        count,
        dim,
        out.clone().into_tensor_arg(),
        d_out.clone().into_tensor_arg(),
        along.clone().into_tensor_arg(),
        shape[0] * shape[1] * shape[2],
        shape[1],
        shape[2],
        shape[3],
    );
    along
}

/// Adds a block's gradients `[batch * kv_heads, keys, head_dim]` to those of all keys, `[batch, keys, kv_heads,
/// head_dim]`.
fn add_keys(all: &CubeTensor, part: CubeTensor, block: &Block) {
    let Sizes { keys, kv_heads, head_dim, .. } = block.sizes;
    let elements = count_of(&part);
    let (count, dim) = units(&all.client, elements);
    add_keys_kernel::launch(
        &all.client,
        count,
        dim,
        part.into_tensor_arg(),
        all.clone().into_tensor_arg(),
        elements,
        block.keys.len(),
        block.keys.start,
        keys,
        kv_heads,
        head_dim,
    );
}

/// Element by element of `[batch, length, heads, head_dim]`.
#[cube(launch_unchecked)]
fn move_heads_kernel<S: Float, T: Float>(
    from: &Tensor<S>,
    to: &mut Tensor<T>,
    batch: usize,
    length: usize,
    heads: usize,
    head_dim: usize,
    queries: usize,
    from_row: usize,
    #[comptime] lay_out: bool,
    #[define(S, T)] _types: [ElemType; 2],
) {
    if ABSOLUTE_POS < batch * length * heads * head_dim {
        let d = ABSOLUTE_POS % head_dim;
        let head = ABSOLUTE_POS / head_dim % heads;
        let place = ABSOLUTE_POS / (head_dim * heads) % length;
        let row = ABSOLUTE_POS / (head_dim * heads * length);
        let start = place / queries * queries;
        let count = min(queries, length - start);
        let laid =
            start * batch * heads * head_dim + ((row * heads + head) * count + place - start) * head_dim + d;
        if comptime!(lay_out) {
            to[laid] = T::cast_from(from[ABSOLUTE_POS + row * (from_row - length * heads * head_dim)]);
        } else {
            to[ABSOLUTE_POS] = T::cast_from(from[laid]);
        }
    }
}

/// Whether the query at `place` sees `key`, both counted from the first key.
#[cube]
pub(super) fn sees(
    query_segment: i32,
    key_segments: &Tensor<i32>,
    at: usize,
    place: usize,
    key: usize,
    window: usize,
) -> bool {
    key <= place && place < key + window && key_segments[at + key] == query_segment
}

/// ALiBi's slope of a head, 0 where there is none; see [`alibi_slope`](super::super::alibi_slope). `power` is the largest
/// power of two that is at most the number of heads.
#[cube]
pub(super) fn slope(alibi: f32, head: usize, power: usize) -> f32 {
    let mut exponent = f32::cast_from(head + 1) / f32::cast_from(power);
    if head >= power {
        exponent = f32::cast_from(2 * (head - power) + 1) / f32::cast_from(2 * power);
    }
    // 8 ln 2.
    alibi * (exponent * -5.545_177_5f32).exp()
}

/// The score of a key `behind` places before its query.
#[cube]
pub(super) fn score(product: f32, scale: f32, softcap: f32, slope: f32, behind: usize) -> f32 {
    let mut z = product * scale - slope * f32::cast_from(behind);
    if softcap != 0.0 {
        z = softcap * (z / softcap).tanh();
    }
    z
}

/// Unscaled scores to weights, and the logarithms of their sums of exponentials. One cube for each row.
#[cube(launch_unchecked)]
fn weights_kernel<E: Float>(
    scores: &Tensor<f32>,
    query_segments: &Tensor<i32>,
    key_segments: &Tensor<i32>,
    weights: &mut Tensor<E>,
    log_sums: &mut Tensor<f32>,
    scale: f32,
    alibi: f32,
    softcap: f32,
    rows: usize,
    width: usize,
    heads: usize,
    power: usize,
    count: usize,
    start: usize,
    first_key: usize,
    length: usize,
    keys: usize,
    window: usize,
    #[comptime] units: usize,
    #[define(E)] _type: ElemType,
) {
    if CUBE_POS < rows {
        let at = CUBE_POS * width;
        let head = CUBE_POS / count;
        let row = head / heads;
        let query = start + CUBE_POS % count;
        let place = query + keys - length;
        let segment = query_segments[row * length + query];
        let slope = slope(alibi, head % heads, power);
        let key_at = row * keys;

        let mut largest = f32::new(f32::MIN);
        let mut sum = 0.0f32;
        for i in range_stepped(UNIT_POS as usize, width, units) {
            if sees(segment, key_segments, key_at, place, first_key + i, window) {
                let score = score(scores[at + i], scale, softcap, slope, place - first_key - i);
                if score > largest {
                    sum = sum * (largest - score).exp() + 1.0;
                    largest = score;
                } else {
                    sum += (score - largest).exp();
                }
            }
        }
        let most = over_units(largest, units, true);
        let log_sum = most + over_units(sum * (largest - most).exp(), units, false).ln();
        if UNIT_POS == 0 {
            log_sums[head * length + query] = log_sum;
        }
        for i in range_stepped(UNIT_POS as usize, width, units) {
            let mut weight = 0.0f32;
            if sees(segment, key_segments, key_at, place, first_key + i, window) {
                weight =
                    (score(scores[at + i], scale, softcap, slope, place - first_key - i) - log_sum).exp();
            }
            weights[at + i] = E::cast_from(weight);
        }
    }
}

/// Unscaled scores to weights, and gradients of weights to gradients of unscaled scores. One cube for each row.
#[cube(launch_unchecked)]
fn score_gradients_kernel<E: Float>(
    scores: &Tensor<f32>,
    d_weights: &Tensor<f32>,
    log_sums: &Tensor<f32>,
    along: &Tensor<f32>,
    query_segments: &Tensor<i32>,
    key_segments: &Tensor<i32>,
    weights: &mut Tensor<E>,
    d_scores: &mut Tensor<E>,
    scale: f32,
    alibi: f32,
    softcap: f32,
    rows: usize,
    width: usize,
    heads: usize,
    power: usize,
    count: usize,
    start: usize,
    first_key: usize,
    length: usize,
    keys: usize,
    window: usize,
    #[comptime] units: usize,
    #[define(E)] _type: ElemType,
) {
    if CUBE_POS < rows {
        let at = CUBE_POS * width;
        let head = CUBE_POS / count;
        let row = head / heads;
        let query = start + CUBE_POS % count;
        let place = query + keys - length;
        let segment = query_segments[row * length + query];
        let log_sum = log_sums[head * length + query];
        let along = along[head * length + query];
        let slope = slope(alibi, head % heads, power);
        for i in range_stepped(UNIT_POS as usize, width, units) {
            let mut weight = 0.0f32;
            let mut through = scale;
            if sees(segment, key_segments, row * keys, place, first_key + i, window) {
                let z = score(scores[at + i], scale, softcap, slope, place - first_key - i);
                weight = (z - log_sum).exp();
                if softcap != 0.0 {
                    let share = z / softcap;
                    through *= 1.0 - share * share;
                }
            }
            weights[at + i] = E::cast_from(weight);
            d_scores[at + i] = E::cast_from(weight * (d_weights[at + i] - along) * through);
        }
    }
}

/// One unit for each token and head.
#[cube(launch)]
fn along_kernel(
    out: &Tensor<f32>,
    d_out: &Tensor<f32>,
    along: &mut Tensor<f32>,
    total: usize,
    length: usize,
    heads: usize,
    head_dim: usize,
) {
    if ABSOLUTE_POS < total {
        let mut sum = 0.0f32;
        for d in 0..head_dim {
            sum += out[ABSOLUTE_POS * head_dim + d] * d_out[ABSOLUTE_POS * head_dim + d];
        }
        let head = ABSOLUTE_POS % heads;
        let place = ABSOLUTE_POS / heads % length;
        let row = ABSOLUTE_POS / (heads * length);
        along[(row * heads + head) * length + place] = sum;
    }
}

/// One unit for each value of `part`.
#[cube(launch)]
fn add_keys_kernel(
    part: &Tensor<f32>,
    all: &mut Tensor<f32>,
    elements: usize,
    width: usize,
    first_key: usize,
    keys: usize,
    kv_heads: usize,
    head_dim: usize,
) {
    if ABSOLUTE_POS < elements {
        let d = ABSOLUTE_POS % head_dim;
        let key = first_key + ABSOLUTE_POS / head_dim % width;
        let head = ABSOLUTE_POS / (head_dim * width) % kv_heads;
        let row = ABSOLUTE_POS / (head_dim * width * kv_heads);
        all[((row * keys + key) * kv_heads + head) * head_dim + d] += part[ABSOLUTE_POS];
    }
}
