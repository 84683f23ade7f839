//! Kernels over rows of contiguous f32 tensors, and elementwise ones. A row belongs to one cube, so that its sums have
//! one order and need no tuning.

use cubecl::prelude::*;

use super::super::{
    GELU_CUBE, GELU_SCALE, Gating, RotaryPairs,
    philox::{MULTIPLIERS, ROUNDS, WEYL},
};
use crate::{dynamic_map::DYNAMIC_MAP, scheme::DOUBLE_BLOCK};

/// Units of a cube that handles a long row.
const MOST_UNITS: usize = 256;
/// Units that add up the parts of all others.
const SUMMING: usize = 16;

/// Units of a cube for rows of `width`: a power of two, so that most have work.
pub(super) fn units_of(width: usize) -> usize {
    width.div_ceil(4).next_power_of_two().clamp(2 * SUMMING, MOST_UNITS)
}

/// The sum, or the maximum, of `value` over the cube's units; every unit gets it.
#[cube]
pub(super) fn over_units(value: f32, #[comptime] units: usize, #[comptime] maximum: bool) -> f32 {
    let mut parts = Shared::<[f32]>::new_slice(units);
    let mut sums = Shared::<[f32]>::new_slice(SUMMING);
    let unit = UNIT_POS as usize;
    parts[unit] = value;
    sync_cube();
    if unit < SUMMING {
        let mut sum = parts[unit];
        #[unroll]
        for i in 1..units / SUMMING {
            let part = parts[i * SUMMING + unit];
            sum = if comptime!(maximum) { max(sum, part) } else { sum + part };
        }
        sums[unit] = sum;
    }
    sync_cube();
    let mut sum = sums[0];
    #[unroll]
    for i in 1..SUMMING {
        sum = if comptime!(maximum) { max(sum, sums[i]) } else { sum + sums[i] };
    }
    sum
}

/// What a row that starts at `at` loses, and its factor `1 / sqrt(mean(x²) + eps)` after that.
#[cube]
fn moments(
    x: &Tensor<f32>,
    at: usize,
    width: usize,
    eps: f32,
    #[comptime] centred: bool,
    #[comptime] units: usize,
) -> (f32, f32) {
    let mut mean = 0.0f32;
    if comptime!(centred) {
        let mut sum = 0.0f32;
        for i in range_stepped(UNIT_POS as usize, width, units) {
            sum += x[at + i];
        }
        mean = over_units(sum, units, false) / f32::cast_from(width);
    }
    let mut squares = 0.0f32;
    for i in range_stepped(UNIT_POS as usize, width, units) {
        let value = x[at + i] - mean;
        squares += value * value;
    }
    (mean, (over_units(squares, units, false) / f32::cast_from(width) + eps).sqrt().recip())
}

#[cube(launch_unchecked)]
pub(super) fn norm(
    x: &Tensor<f32>,
    weight: &Tensor<f32>,
    y: &mut Tensor<f32>,
    rows: usize,
    width: usize,
    eps: f32,
    #[comptime] centred: bool,
    #[comptime] units: usize,
) {
    if CUBE_POS < rows {
        let at = CUBE_POS * width;
        let (mean, inverse) = moments(x, at, width, eps, centred, units);
        for i in range_stepped(UNIT_POS as usize, width, units) {
            y[at + i] = (x[at + i] - mean) * inverse * weight[i];
        }
    }
}

#[cube(launch_unchecked)]
pub(super) fn norm_dx(
    x: &Tensor<f32>,
    weight: &Tensor<f32>,
    dy: &Tensor<f32>,
    dx: &mut Tensor<f32>,
    rows: usize,
    width: usize,
    eps: f32,
    #[comptime] centred: bool,
    #[comptime] units: usize,
) {
    if CUBE_POS < rows {
        let at = CUBE_POS * width;
        let (mean, inverse) = moments(x, at, width, eps, centred, units);
        let mut along = 0.0f32;
        let mut sum = 0.0f32;
        for i in range_stepped(UNIT_POS as usize, width, units) {
            let gradient = dy[at + i] * weight[i];
            along += gradient * (x[at + i] - mean);
            sum += gradient;
        }
        let along = over_units(along, units, false) * inverse * inverse / f32::cast_from(width);
        let mut d_mean = 0.0f32;
        if comptime!(centred) {
            d_mean = over_units(sum, units, false) / f32::cast_from(width);
        }
        for i in range_stepped(UNIT_POS as usize, width, units) {
            dx[at + i] = inverse * (dy[at + i] * weight[i] - d_mean - (x[at + i] - mean) * along);
        }
    }
}

/// What [`moments`] says of each row.
#[cube(launch_unchecked)]
pub(super) fn moments_of_rows(
    x: &Tensor<f32>,
    means: &mut Tensor<f32>,
    inverses: &mut Tensor<f32>,
    rows: usize,
    width: usize,
    eps: f32,
    #[comptime] centred: bool,
    #[comptime] units: usize,
) {
    if CUBE_POS < rows {
        let (mean, inverse) = moments(x, CUBE_POS * width, width, eps, centred, units);
        if UNIT_POS == 0 {
            means[CUBE_POS] = mean;
            inverses[CUBE_POS] = inverse;
        }
    }
}

/// One unit for each column.
#[cube(launch)]
pub(super) fn norm_dweight(
    x: &Tensor<f32>,
    dy: &Tensor<f32>,
    means: &Tensor<f32>,
    inverses: &Tensor<f32>,
    d_weight: &mut Tensor<f32>,
    rows: usize,
    width: usize,
) {
    if ABSOLUTE_POS < width {
        let mut sum = 0.0f32;
        for row in 0..rows {
            let at = row * width + ABSOLUTE_POS;
            sum += dy[at] * (x[at] - means[row]) * inverses[row];
        }
        d_weight[ABSOLUTE_POS] = sum;
    }
}

/// `s(x)` of [`Gating`].
#[cube]
fn argument(x: f32, #[comptime] gating: Gating) -> f32 {
    if comptime!(gating == Gating::Silu) { x } else { GELU_SCALE * (x + GELU_CUBE * x * x * x) }
}

/// The slope of [`argument`].
#[cube]
fn slope(x: f32, #[comptime] gating: Gating) -> f32 {
    if comptime!(gating == Gating::Silu) {
        f32::new(1.0)
    } else {
        GELU_SCALE * (1.0 + 3.0 * GELU_CUBE * x * x)
    }
}

#[cube]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

#[cube(launch)]
pub(super) fn gated(
    gate: &Tensor<f32>,
    up: &Tensor<f32>,
    y: &mut Tensor<f32>,
    count: usize,
    #[comptime] gating: Gating,
) {
    if ABSOLUTE_POS < count {
        let x = gate[ABSOLUTE_POS];
        y[ABSOLUTE_POS] = x * up[ABSOLUTE_POS] * sigmoid(argument(x, gating));
    }
}

#[cube(launch)]
pub(super) fn gated_backward(
    gate: &Tensor<f32>,
    up: &Tensor<f32>,
    dy: &Tensor<f32>,
    d_gate: &mut Tensor<f32>,
    d_up: &mut Tensor<f32>,
    count: usize,
    #[comptime] gating: Gating,
) {
    if ABSOLUTE_POS < count {
        let x = gate[ABSOLUTE_POS];
        let gradient = dy[ABSOLUTE_POS];
        let open = sigmoid(argument(x, gating));
        d_up[ABSOLUTE_POS] = gradient * x * open;
        let inner = open * (1.0 + x * (1.0 - open) * slope(x, gating));
        d_gate[ABSOLUTE_POS] = gradient * up[ABSOLUTE_POS] * inner;
    }
}

/// `x` `[tokens, heads, units_of_head + half]`: one unit for each of a head's `half` pairs, and one for each channel behind
/// them.
#[cube(launch)]
pub(super) fn rotate(
    x: &Tensor<f32>,
    cos: &Tensor<f32>,
    sin: &Tensor<f32>,
    y: &mut Tensor<f32>,
    total: usize,
    heads: usize,
    units_of_head: usize,
    half: usize,
    sign: f32,
    #[comptime] pairs: RotaryPairs,
) {
    if ABSOLUTE_POS < total {
        let head = ABSOLUTE_POS / units_of_head;
        let i = ABSOLUTE_POS % units_of_head;
        let at = head * (units_of_head + half);
        if i < half {
            let place = head / heads * half + i;
            let mut low = at + i;
            let mut high = at + half + i;
            if comptime!(matches!(pairs, RotaryPairs::Neighbours)) {
                low = at + 2 * i;
                high = at + 2 * i + 1;
            }
            let (a, b) = (x[low], x[high]);
            let (cos, sin) = (cos[place], sin[place] * sign);
            y[low] = a * cos - b * sin;
            y[high] = b * cos + a * sin;
        } else {
            y[at + half + i] = x[at + half + i];
        }
    }
}

/// Losses of rows; the logits become their gradients (`softmax - onehot`).
#[cube(launch_unchecked)]
pub(super) fn cross_entropy(
    logits: &mut Tensor<f32>,
    targets: &Tensor<i32>,
    losses: &mut Tensor<f32>,
    rows: usize,
    classes: usize,
    #[comptime] units: usize,
) {
    if CUBE_POS < rows {
        let at = CUBE_POS * classes;
        // Each unit's largest logit and its sum of exponentials below it.
        let mut largest = f32::new(f32::MIN);
        let mut sum = 0.0f32;
        for i in range_stepped(UNIT_POS as usize, classes, units) {
            let logit = logits[at + i];
            if logit > largest {
                sum = sum * (largest - logit).exp() + 1.0;
                largest = logit;
            } else {
                sum += (logit - largest).exp();
            }
        }
        let most = over_units(largest, units, true);
        let log_sum = most + over_units(sum * (largest - most).exp(), units, false).ln();
        // A target beyond the classes has the last one's place, as every checked access has.
        let target = min(targets[CUBE_POS] as u32 as usize, classes - 1);
        if UNIT_POS == 0 {
            losses[CUBE_POS] = log_sum - logits[at + target];
        }
        sync_cube();
        for i in range_stepped(UNIT_POS as usize, classes, units) {
            let chosen = select(i == target, 1.0f32, 0.0f32);
            logits[at + i] = (logits[at + i] - log_sum).exp() - chosen;
        }
    }
}

#[cube(launch)]
pub(super) fn scale_rows(x: &mut Tensor<f32>, factors: &Tensor<f32>, count: usize, columns: usize) {
    if ABSOLUTE_POS < count {
        x[ABSOLUTE_POS] *= factors[ABSOLUTE_POS / columns];
    }
}

/// One unit for four values.
#[cube(launch)]
pub(super) fn dropout(
    x: &Tensor<f32>,
    y: &mut Tensor<f32>,
    count: usize,
    key_low: u32,
    key_high: u32,
    threshold: u32,
) {
    let at = ABSOLUTE_POS * 4;
    if at < count {
        let mut words = Array::<u32>::new(4usize);
        words[0] = ABSOLUTE_POS as u32;
        words[1] = 0u32;
        words[2] = 0u32;
        words[3] = 0u32;
        #[unroll]
        for round in 0..ROUNDS {
            let (first, third) = (words[0], words[2]);
            let low = key_low + comptime!(round.wrapping_mul(WEYL[0]));
            let high = key_high + comptime!(round.wrapping_mul(WEYL[1]));
            words[0] = third.mul_hi(MULTIPLIERS[1]) ^ words[1] ^ low;
            words[1] = third * MULTIPLIERS[1];
            words[2] = first.mul_hi(MULTIPLIERS[0]) ^ words[3] ^ high;
            words[3] = first * MULTIPLIERS[0];
        }
        #[unroll]
        for i in 0..4 {
            if at + i < count {
                y[at + i] = select(words[i] < threshold, 0.0f32, x[at + i]);
            }
        }
    }
}

/// One unit for each sum.
#[cube(launch)]
pub(super) fn sum_groups(x: &Tensor<f32>, y: &mut Tensor<f32>, count: usize, size: usize) {
    if ABSOLUTE_POS < count {
        let mut sum = 0.0f32;
        for i in 0..size {
            sum += x[ABSOLUTE_POS * size + i];
        }
        y[ABSOLUTE_POS] = sum;
    }
}

#[cube(launch)]
pub(super) fn add_repeated(
    y: &Tensor<f32>,
    update: &Tensor<f32>,
    out: &mut Tensor<f32>,
    count: usize,
    times: usize,
) {
    if ABSOLUTE_POS < count {
        out[ABSOLUTE_POS] = y[ABSOLUTE_POS] + update[ABSOLUTE_POS / times];
    }
}

/// Entry `code` of the dynamic map, found by halving its entries from `first` on.
#[cube]
fn map_entry(code: u32, #[comptime] first: usize, #[comptime] bits: u32) -> f32 {
    if comptime!(bits == 0) {
        f32::new(comptime!(DYNAMIC_MAP[first]))
    } else {
        let half = comptime!(1u32 << (bits - 1));
        let low = map_entry(code, first, comptime!(bits - 1));
        let high = map_entry(code, comptime!(first + half as usize), comptime!(bits - 1));
        select((code & half) != 0u32, high, low)
    }
}

/// Scales `[rows, columns]` of their output-major codes, one unit for each.
#[cube(launch)]
pub(super) fn double_scales(
    codes: &Tensor<u32>,
    nested: &Tensor<f32>,
    offset: &Tensor<f32>,
    scales: &mut Tensor<f32>,
    rows: usize,
    columns: usize,
) {
    if ABSOLUTE_POS < rows * columns {
        let place = ABSOLUTE_POS % columns * rows + ABSOLUTE_POS / columns;
        let code = codes[place / 4] >> (8 * (place % 4)) as u32 & 255;
        scales[ABSOLUTE_POS] = map_entry(code, 0usize, 8u32) * nested[place / DOUBLE_BLOCK] + offset[0];
    }
}

/// Scales `[rows, columns]` of their integers in words, one unit for each.
#[cube(launch)]
pub(super) fn super_scales(
    words: &Tensor<u32>,
    factors: &Tensor<f32>,
    scales: &mut Tensor<f32>,
    rows: usize,
    columns: usize,
    blocks: usize,
    #[comptime] bits: u32,
) {
    if ABSOLUTE_POS < rows * columns {
        let row = ABSOLUTE_POS / columns;
        let column = ABSOLUTE_POS % columns;
        let bit = row * comptime!(bits as usize);
        let code = words[bit / 32 * columns + column] >> (bit % 32) as u32 & comptime!((1u32 << bits) - 1);
        let mut integer = f32::cast_from(code);
        if comptime!(bits == 8) {
            // Two's complement.
            integer -= select(code > 127u32, 256.0f32, 0.0f32);
        }
        scales[ABSOLUTE_POS] = integer * factors[row / blocks * columns + column];
    }
}
