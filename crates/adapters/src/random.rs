//! Random numbers that depend on a key and on nothing else: not on the order of calls, the device or the thread.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// What a generator is for; different purposes under one seed see unrelated numbers.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Purpose {
    Dropout,
    Initialization,
    /// The start of a search for singular vectors.
    Subspace,
}

/// A generator for the module called `slot` (a [`path_hash`]) at one micro-batch of one step.
pub(crate) fn generator(purpose: Purpose, seed: u64, slot: u64, step: u64, micro_batch: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    for (bytes, part) in key.chunks_exact_mut(8).zip([seed, slot, step, micro_batch]) {
        bytes.copy_from_slice(&part.to_le_bytes());
    }
    let mut rng = ChaCha8Rng::from_seed(key);
    rng.set_stream(purpose as u64);
    rng
}

/// FNV-1a of a module's path: the same in every build, unlike the standard library's hashes.
pub(crate) fn path_hash(path: &str) -> u64 {
    path.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// In -1..1, in steps of 2⁻²³.
fn unit(rng: &mut ChaCha8Rng) -> f64 {
    f64::from(rng.next_u32() >> 8) / f64::from(1 << 23) - 1.0
}

/// In ±`bound`.
pub(crate) fn uniform(rng: &mut ChaCha8Rng, bound: f64, count: usize) -> Vec<f32> {
    (0..count).map(|_| (unit(rng) * bound) as f32).collect()
}

/// By Box and Muller's transformation.
pub(crate) fn normal(rng: &mut ChaCha8Rng, deviation: f64, count: usize) -> Vec<f32> {
    let value = |_| {
        // In 0..1 without 0, whose logarithm is infinite.
        let radius = (-2.0 * (1.0 - (unit(rng) + 1.0) / 2.0).ln()).sqrt();
        (deviation * radius * (std::f64::consts::PI * unit(rng)).cos()) as f32
    };
    (0..count).map(value).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The test vectors of the function's authors.
    #[test]
    fn hash_is_fnv_1a() {
        assert_eq!(path_hash(""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(path_hash("a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(path_hash("foobar"), 0x8594_4171_f739_67e8);
    }

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
