//! Random numbers that depend on a key and on nothing else: not on the order of calls, the device or the thread.

use rand::SeedableRng;
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

#[cfg(test)]
mod tests {
    use rand::Rng;

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
