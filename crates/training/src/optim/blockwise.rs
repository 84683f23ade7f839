//! Numbers in 8 bits, in blocks with a scale each: bitsandbytes' dynamic blockwise quantization.
//!
//! Source: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"; codes, rounding and signs as in
//! bitsandbytes' `kOptimizerStatic8bit2StateBlockwise` and `create_dynamic_map`.

use std::sync::LazyLock;

/// Values that share a scale.
pub(super) const BLOCK: usize = 256;

/// The numbers that codes stand for, ascending, within -1 to 1.
pub(super) type Map = [f32; 256];

/// For averages of gradients.
pub(super) static SIGNED: LazyLock<Map> = LazyLock::new(|| dynamic_map(true));
/// For averages of squares.
pub(super) static UNSIGNED: LazyLock<Map> = LazyLock::new(|| dynamic_map(false));

/// Codes whose leading zeros are an exponent and whose other bits a fraction.
fn dynamic_map(signed: bool) -> Map {
    const EXPONENTS: i32 = 7;
    // Where nothing is put: zero is there several times.
    let (mut map, mut filled) = ([0.0; 256], 0);
    let mut put = |value: f32| {
        map[filled] = value;
        filled += 1;
    };
    for exponent in 0..EXPONENTS {
        let fractions = (1usize << exponent) * if signed { 1 } else { 2 };
        let scale = 10f64.powi(exponent - (EXPONENTS - 1)) as f32;
        for index in 0..fractions {
            let mean = (boundary(index, fractions) + boundary(index + 1, fractions)) / 2.0;
            put(scale * mean);
            if signed {
                put(-(scale * mean));
            }
        }
    }
    put(1.0);
    map.sort_by(f32::total_cmp);
    map
}

/// `torch.linspace(0.1, 1, count + 1)[index]`, rounded once.
fn boundary(index: usize, count: usize) -> f32 {
    let step = (1.0 - 0.1f32) / count as f32;
    match index < count.div_ceil(2) {
        true => step.mul_add(index as f32, 0.1),
        false => (-step).mul_add((count - index) as f32, 1.0),
    }
}

/// The code of a number from -1 to 1: the nearest, of two as near the even one.
fn code(map: &Map, value: f32) -> u8 {
    let above = map.partition_point(|entry| *entry < value).min(255);
    if map[above] == value || above == 0 {
        // Of equal entries, all of them zero, the search that this follows ends at an even one.
        return above as u8;
    }
    let below = above - 1;
    let middle = (map[below] + map[above]) * 0.5;
    let nearer = match value.partial_cmp(&middle) {
        Some(std::cmp::Ordering::Less) => below,
        Some(std::cmp::Ordering::Greater) => above,
        _ => [below, above][below % 2],
    };
    nearer as u8
}

/// As [`code`], with the sign of `value`: what is small and negative gets no code of zero, and the other way round.
fn signed_code(map: &Map, value: f32) -> u8 {
    let found = code(map, value);
    match (map[usize::from(found)].is_sign_negative(), value.is_sign_negative()) {
        (false, true) => found.saturating_sub(1),
        (true, false) => found.saturating_add(1),
        _ => found,
    }
}

/// A block's codes and its scale, the largest magnitude.
pub(super) fn quantize(map: &Map, values: &[f32], signed: bool, codes: &mut [u8]) -> f32 {
    let scale = values.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    for (code_of, value) in codes.iter_mut().zip(values) {
        let value = value / scale;
        *code_of = if signed { signed_code(map, value) } else { code(map, value) };
    }
    scale
}
