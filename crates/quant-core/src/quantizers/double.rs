//! Double quantization of scales.

use crate::{DoubleScales, dynamic_map::DYNAMIC_MAP, scheme::DOUBLE_BLOCK};

/// QLoRA's double quantization as bitsandbytes does it.
///
/// `scales` stand in output-major order (`column * block_rows + row`). Their mean is taken off, the rest is
/// stored as the nearest of the 256 levels of bitsandbytes' dynamic map times the largest magnitude of each 256
/// scales; on a midpoint the lower level wins.
///
/// The quantizers choose a weight's codes against the scales **before** this step, as bitsandbytes does, so that
/// codes agree with its files byte for byte; the value read back uses the scale after it. bitsandbytes' CPU
/// library finds the level through a table of 65,536 entries and so takes the other neighbour where a scale lies
/// within 1/65,536 of a midpoint; its other paths, and this function, don't.
pub fn double_quantize(scales: &[f32]) -> DoubleScales {
    let offset = mean(scales);
    let mut codes = Vec::with_capacity(scales.len());
    let mut nested = Vec::with_capacity(scales.len().div_ceil(DOUBLE_BLOCK));
    for block in scales.chunks(DOUBLE_BLOCK) {
        let largest = block.iter().fold(0.0f32, |max, scale| max.max((scale - offset).abs()));
        let inverse = if largest > 0.0 { 1.0 / largest } else { 0.0 };
        codes.extend(block.iter().map(|scale| nearest((scale - offset) * inverse)));
        nested.push(largest);
    }
    DoubleScales { codes, nested, offset }
}

/// Code of the nearest level.
fn nearest(x: f32) -> u8 {
    let upper = DYNAMIC_MAP.partition_point(|&level| level < x);
    let code = match upper {
        0 => 0,
        256 => 255,
        _ if x > (DYNAMIC_MAP[upper - 1] + DYNAMIC_MAP[upper]) / 2.0 => upper,
        _ => upper - 1,
    };
    code as u8
}

/// The mean as torch computes it in f32 on most x86 machines, for up to 512 values: the sum runs in 32 lanes (four
/// vectors of eight), then over vectors, then over lanes. Further blocks of 512 are added in f64.
fn mean(values: &[f32]) -> f32 {
    const LANES: usize = 32;
    let total: f64 = values
        .chunks(16 * LANES)
        .map(|block| {
            let (rows, rest) = block.as_chunks::<LANES>();
            let mut lanes = [0.0f32; LANES];
            for row in rows {
                lanes.iter_mut().zip(row).for_each(|(lane, value)| *lane += value);
            }
            let sum: f32 = (0..8).map(|i| lanes[i] + lanes[i + 8] + lanes[i + 16] + lanes[i + 24]).sum();
            f64::from(rest.iter().fold(sum, |sum, value| sum + value))
        })
        .sum();
    if values.is_empty() { 0.0 } else { (total / values.len() as f64) as f32 }
}
