//! Values drawn at random, in f32.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// In -1..1, in steps of 2⁻²³.
fn unit(rng: &mut ChaCha8Rng) -> f64 {
    f64::from(rng.next_u32() >> 8) / f64::from(1 << 23) - 1.0
}

/// In ±`bound`.
pub(crate) fn uniform(rng: &mut ChaCha8Rng, bound: f64, count: usize) -> Vec<f32> {
    (0..count).map(|_| (unit(rng) * bound) as f32).collect()
}

/// Normally distributed around 0.
pub(crate) fn normal(rng: &mut ChaCha8Rng, deviation: f64, count: usize) -> Vec<f32> {
    let value = |_| {
        // In 0..1 without 0, whose logarithm is infinite.
        let within = 1.0 - (unit(rng) + 1.0) / 2.0;
        box_muller(deviation, within, unit(rng) / 2.0) as f32
    };
    (0..count).map(value).collect()
}

/// Box and Muller's transformation of two uniform numbers, `within` in 0..1 without 0 and `turn` of any whole turn, to a
/// normally distributed one.
pub(crate) fn box_muller(deviation: f64, within: f64, turn: f64) -> f64 {
    deviation * (-2.0 * within.ln()).sqrt() * (std::f64::consts::TAU * turn).cos()
}
