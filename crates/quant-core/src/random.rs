//! Random numbers that depend on a key and on nothing else: not on the order of calls, the device or the thread.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::hash::Fnv1a;

/// What a generator is for; different purposes under one seed see unrelated numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Masks of dropout.
    Dropout,
    /// Values before training.
    Initialization,
    /// The start of a search for singular vectors.
    Subspace,
    /// What is added to an embedding in training.
    Noise,
}

/// A generator for the module called `slot` (a [`path_hash`]) at one micro-batch of one step.
pub fn generator(purpose: Purpose, seed: u64, slot: u64, step: u64, micro_batch: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    for (bytes, part) in key.chunks_exact_mut(8).zip([seed, slot, step, micro_batch]) {
        bytes.copy_from_slice(&part.to_le_bytes());
    }
    let mut rng = ChaCha8Rng::from_seed(key);
    rng.set_stream(purpose as u64);
    rng
}

/// FNV-1a of a module's path: the same in every build, unlike the standard library's hashes.
pub fn path_hash(path: &str) -> u64 {
    Fnv1a::of(path.bytes()).value()
}

/// In -1..1, in steps of 2⁻²³.
fn unit(rng: &mut ChaCha8Rng) -> f64 {
    f64::from(rng.next_u32() >> 8) / f64::from(1 << 23) - 1.0
}

/// In ±`bound`.
pub fn uniform(rng: &mut ChaCha8Rng, bound: f64, count: usize) -> Vec<f32> {
    (0..count).map(|_| (unit(rng) * bound) as f32).collect()
}

/// Normally distributed around 0.
pub fn normal(rng: &mut ChaCha8Rng, deviation: f64, count: usize) -> Vec<f32> {
    let value = |_| {
        // In 0..1 without 0, whose logarithm is infinite.
        let within = 1.0 - (unit(rng) + 1.0) / 2.0;
        box_muller(deviation, within, unit(rng) / 2.0) as f32
    };
    (0..count).map(value).collect()
}

/// Box and Muller's transformation of two uniform numbers, `within` in 0..1 without 0 and `turn` of any whole turn, to a
/// normally distributed one.
pub fn box_muller(deviation: f64, within: f64, turn: f64) -> f64 {
    deviation * (-2.0 * within.ln()).sqrt() * (std::f64::consts::TAU * turn).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_the_key_counts() {
        let first = |rng: ChaCha8Rng| rng.clone().next_u64();
        let numbers = [
            first(generator(Purpose::Dropout, 1, 2, 3, 4)),
            first(generator(Purpose::Initialization, 1, 2, 3, 4)),
            first(generator(Purpose::Dropout, 9, 2, 3, 4)),
            first(generator(Purpose::Dropout, 1, 9, 3, 4)),
            first(generator(Purpose::Dropout, 1, 2, 9, 4)),
            first(generator(Purpose::Dropout, 1, 2, 3, 9)),
        ];
        for (i, number) in numbers.iter().enumerate() {
            assert!(!numbers[..i].contains(number));
        }
        assert_eq!(numbers[0], first(generator(Purpose::Dropout, 1, 2, 3, 4)));
    }
}
