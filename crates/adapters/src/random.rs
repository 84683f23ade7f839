//! Random numbers that depend on a key and on nothing else: not on the order of calls, the device or the thread.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// What a generator is for; different purposes under one seed see unrelated numbers.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Purpose {
    Dropout,
    Initialization,
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

#[cfg(test)]
mod tests {
    use rand::Rng;

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
