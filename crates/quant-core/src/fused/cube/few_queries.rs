//! Attention of a few queries, as in decoding: keys and values are read where they lie and as they are, so that a token
//! costs one reading of the cache and not a rounded or rearranged copy of it. Keys are divided into shares, of which every
//! cube has one for one query and head; then the shares are summed in their order.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{
    super::Scores,
    attention::{Sizes, score, sees, slope},
    count_of, empty, empty_like,
    rows::over_units,
    units,
};
use crate::ops::cube::multiprocessors;

/// Most queries of a row.
const QUERIES: usize = 4;
/// Units of a cube: about as many as a head has channels.
const UNITS: usize = 64;
/// Most keys of a share; their weights lie in shared memory.
const SHARE: usize = 512;
/// Cubes of a multiprocessor that keep its memory busy.
const CUBES: usize = 16;
/// Cubes that every device takes in the directions y and z.
const MOST_CUBES: usize = 1 << 15;

/// Whether these are few queries.
pub(super) fn takes(sizes: &Sizes) -> bool {
    (1..=QUERIES).contains(&sizes.length)
        && sizes.batch * sizes.length <= MOST_CUBES
        && sizes.heads <= MOST_CUBES
}

/// As [`attention::forward`](super::attention::forward), of contiguous queries; keys and values may have gaps between the
/// rows of the batch.
pub(super) fn forward(
    [q, k, v]: [&CubeTensor; 3],
    segments: &[CubeTensor; 2],
    sizes: &Sizes,
    scores: &Scores,
) -> (CubeTensor, CubeTensor) {
    let Sizes { batch, length, keys, heads, kv_heads, head_dim, .. } = *sizes;
    let client = &q.client;
    let first_key = scores.window.map_or(0, |window| (keys + 1 - length).saturating_sub(window));
    let seen = keys - first_key;
    let rows = batch * length * heads;
    let wanted = (CUBES * multiprocessors(q)).div_ceil(rows).min(seen.div_ceil(UNITS));
    let share = seen.div_ceil(wanted).min(SHARE);
    let shares = seen.div_ceil(share);
    let sums = empty(q, [rows, shares, head_dim], DType::F32);
    let tops = empty(q, [rows, shares, 2], DType::F32);
    // SAFETY: a cube stays in its query and head and in its share of the keys, of the shapes asserted in `Sizes::new`, and
    // in its part of `sums` and `tops`.
    unsafe {
        share_kernel::launch_unchecked(
            client,
            CubeCount::Static(shares as u32, heads as u32, (batch * length) as u32),
            CubeDim::new_1d(UNITS as u32),
            q.clone().into_tensor_arg(),
            k.clone().into_tensor_arg(),
            v.clone().into_tensor_arg(),
            segments[0].clone().into_tensor_arg(),
            segments[1].clone().into_tensor_arg(),
            sums.clone().into_tensor_arg(),
            tops.clone().into_tensor_arg(),
            scores.scale,
            scores.alibi,
            scores.softcap,
            length,
            keys,
            heads,
            kv_heads,
            1 << heads.ilog2(),
            // One more than there can be sees all.
            scores.window.unwrap_or(keys + 1),
            first_key,
            share,
            shares,
            k.meta.strides()[0],
            v.meta.strides()[0],
            head_dim,
        );
    }
    let (out, log_sums) = (empty_like(q), empty(q, [batch, heads, length], DType::F32));
    let (count, dim) = units(client, count_of(&out));
    // SAFETY: units beyond the result end; the others stay in their query's and head's part of all tensors.
    unsafe {
        sum_kernel::launch_unchecked(
            client,
            count,
            dim,
            sums.into_tensor_arg(),
            tops.into_tensor_arg(),
            out.clone().into_tensor_arg(),
            log_sums.clone().into_tensor_arg(),
            rows * head_dim,
            length,
            heads,
            head_dim,
            shares,
        );
    }
    (out, log_sums)
}

/// Of one share of the keys of a query and head: the largest score, the sum of exponentials below it, and the values
/// weighted by these.
#[cube(launch_unchecked)]
fn share_kernel(
    q: &Tensor<f32>,
    k: &Tensor<f32>,
    v: &Tensor<f32>,
    query_segments: &Tensor<i32>,
    key_segments: &Tensor<i32>,
    sums: &mut Tensor<f32>,
    tops: &mut Tensor<f32>,
    scale: f32,
    alibi: f32,
    softcap: f32,
    length: usize,
    keys: usize,
    heads: usize,
    kv_heads: usize,
    power: usize,
    window: usize,
    first_key: usize,
    share: usize,
    shares: usize,
    k_row: usize,
    v_row: usize,
    #[comptime] head_dim: usize,
) {
    let unit = UNIT_POS as usize;
    let head = CUBE_POS_Y as usize;
    let token = CUBE_POS_Z as usize;
    let row = token / length;
    let place = token % length + keys - length;
    let segment = query_segments[token];
    let slope = slope(alibi, head, power);
    let of_query = (token * heads + head) * head_dim;
    let first = first_key + CUBE_POS_X as usize * share;
    let count = min(share, keys - first);
    // From key to key, and from a row to its head's channels of the share's first key.
    let step = kv_heads * head_dim;
    let start = first * step + head / (heads / kv_heads) * head_dim;

    let mut query = Shared::<[f32]>::new_slice(head_dim);
    for d in range_stepped(unit, head_dim, UNITS) {
        query[d] = q[of_query + d];
    }
    sync_cube();

    let mut weights = Shared::<[f32]>::new_slice(SHARE);
    let mut largest = f32::new(f32::MIN);
    for i in range_stepped(unit, count, UNITS) {
        let mut z = f32::new(f32::MIN);
        if sees(segment, key_segments, row * keys, place, first + i, window) {
            let at = row * k_row + start + i * step;
            let mut product = 0.0f32;
            for d in 0..head_dim {
                product += query[d] * k[at + d];
            }
            z = score(product, scale, softcap, slope, place - first - i);
        }
        weights[i] = z;
        largest = max(largest, z);
    }
    let most = over_units(largest, UNITS, true);
    let mut sum = 0.0f32;
    for i in range_stepped(unit, count, UNITS) {
        // What isn't seen weighs nothing, in a share of which nothing is seen, too. What is no number stays so.
        let weight = select(weights[i] == f32::MIN, 0.0f32, (weights[i] - most).exp());
        weights[i] = weight;
        sum += weight;
    }
    // Waits for the weights as well.
    let sum = over_units(sum, UNITS, false);

    let part = (token * heads + head) * shares + CUBE_POS_X as usize;
    for d in range_stepped(unit, head_dim, UNITS) {
        let mut value = 0.0f32;
        for i in 0..count {
            value += weights[i] * v[row * v_row + start + i * step + d];
        }
        sums[part * head_dim + d] = value;
    }
    if unit == 0 {
        tops[2 * part] = most;
        tops[2 * part + 1] = sum;
    }
}

/// Shares to results. One unit for each channel of a query and head.
#[cube(launch_unchecked)]
fn sum_kernel(
    sums: &Tensor<f32>,
    tops: &Tensor<f32>,
    out: &mut Tensor<f32>,
    log_sums: &mut Tensor<f32>,
    total: usize,
    length: usize,
    heads: usize,
    head_dim: usize,
    shares: usize,
) {
    if ABSOLUTE_POS < total {
        let d = ABSOLUTE_POS % head_dim;
        let of_query = ABSOLUTE_POS / head_dim;
        let first = of_query * shares;
        let mut most = f32::new(f32::MIN);
        for share in first..first + shares {
            most = max(most, tops[2 * share]);
        }
        let mut value = 0.0f32;
        let mut sum = 0.0f32;
        for share in first..first + shares {
            let factor = (tops[2 * share] - most).exp();
            sum += factor * tops[2 * share + 1];
            value += factor * sums[share * head_dim + d];
        }
        out[ABSOLUTE_POS] = value / sum;
        if d == 0 {
            let (token, head) = (of_query / heads, of_query % heads);
            log_sums[(token / length * heads + head) * length + token % length] = most + sum.ln();
        }
    }
}
