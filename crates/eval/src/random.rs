//! CPython's `random.Random`, which the harness draws few-shot examples and bootstrap samples with.

const WORDS: usize = 624;
const SHIFT: usize = 397;

/// The Mersenne Twister MT19937 with the seeding and the draws of CPython's `random` module.
///
/// ```
/// use kiln_eval::PythonRandom;
/// let mut random = PythonRandom::new(1234);
/// // random.Random(1234).sample(range(7), 3)
/// assert_eq!(random.sample(7, 3), Some(vec![6, 3, 0]));
/// ```
#[derive(Debug, Clone)]
pub struct PythonRandom {
    state: [u32; WORDS],
    next: usize,
}

impl PythonRandom {
    /// `random.Random(seed)`.
    pub fn new(seed: u64) -> Self {
        let (low, high) = (seed as u32, (seed >> 32) as u32);
        let key = if high == 0 { vec![low] } else { vec![low, high] };
        let mut state = initial_state(19_650_218);
        let mut i = 1;
        for k in 0..WORDS {
            let j = k % key.len();
            let mixed = (state[i - 1] ^ (state[i - 1] >> 30)).wrapping_mul(1_664_525);
            state[i] = (state[i] ^ mixed).wrapping_add(key[j]).wrapping_add(j as u32);
            i = following(&mut state, i);
        }
        for _ in 1..WORDS {
            let mixed = (state[i - 1] ^ (state[i - 1] >> 30)).wrapping_mul(1_566_083_941);
            state[i] = (state[i] ^ mixed).wrapping_sub(i as u32);
            i = following(&mut state, i);
        }
        state[0] = 0x8000_0000;
        Self { state, next: WORDS }
    }

    fn next_u32(&mut self) -> u32 {
        if self.next == WORDS {
            for i in 0..WORDS {
                let pair = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % WORDS] & 0x7fff_ffff);
                let odd = if pair & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + SHIFT) % WORDS] ^ (pair >> 1) ^ odd;
            }
            self.next = 0;
        }
        let mut x = self.state[self.next];
        self.next += 1;
        x ^= x >> 11;
        x ^= (x << 7) & 0x9d2c_5680;
        x ^= (x << 15) & 0xefc6_0000;
        x ^ (x >> 18)
    }

    /// `random()`: at least 0, below 1, 53 bits.
    pub fn random(&mut self) -> f64 {
        let (high, low) = (self.next_u32() >> 5, self.next_u32() >> 6);
        (f64::from(high) * 67_108_864.0 + f64::from(low)) / 9_007_199_254_740_992.0
    }

    /// `randrange(n)`; 0 for `n` 0 or 1.
    pub fn below(&mut self, n: u32) -> u32 {
        if n == 0 {
            return 0;
        }
        let unused = n.leading_zeros();
        loop {
            let drawn = self.next_u32() >> unused;
            if drawn < n {
                return drawn;
            }
        }
    }

    /// The index that `choices` draws from `n` elements: `floor(random() * n)`.
    pub fn choose(&mut self, n: usize) -> usize {
        (self.random() * n as f64) as usize
    }

    /// `sample(range(n), k)`, or `None` where Python refuses: `k` beyond `n`, or `n` beyond 32 bits.
    pub fn sample(&mut self, n: usize, k: usize) -> Option<Vec<usize>> {
        let count = u32::try_from(n).ok().filter(|_| k <= n)?;
        let mut small = 21usize;
        if k > 5 {
            let mut power = 1usize;
            while power < 3 * k {
                power = power.checked_mul(4)?;
            }
            small += power;
        }
        let mut drawn = Vec::with_capacity(k);
        if n <= small {
            let mut pool: Vec<usize> = (0..n).collect();
            for i in 0..k {
                let j = self.below(count - i as u32) as usize;
                drawn.push(pool[j]);
                pool[j] = pool[n - i - 1];
            }
        } else {
            let mut seen = std::collections::HashSet::with_capacity(k);
            while drawn.len() < k {
                let j = self.below(count) as usize;
                if seen.insert(j) {
                    drawn.push(j);
                }
            }
        }
        Some(drawn)
    }
}

fn initial_state(seed: u32) -> [u32; WORDS] {
    let mut state = [0; WORDS];
    state[0] = seed;
    for i in 1..WORDS {
        let previous = state[i - 1] ^ (state[i - 1] >> 30);
        state[i] = previous.wrapping_mul(1_812_433_253).wrapping_add(i as u32);
    }
    state
}

/// The place after `i`; the first word follows the last.
fn following(state: &mut [u32; WORDS], i: usize) -> usize {
    if i + 1 < WORDS {
        return i + 1;
    }
    state[0] = state[WORDS - 1];
    1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::vector;

    #[test]
    fn draws_are_pythons() {
        let mut random = PythonRandom::new(1234);
        let drawn: Vec<u32> = (0..4).map(|_| random.next_u32()).collect();
        assert_eq!(serde_json::json!(drawn), vector("getrandbits32 seed1234"));
        for (name, n, k) in [
            ("sample(range(7),3) x3 seed1234", 7, 3),
            ("sample(range(9427),6) x2 seed1234", 9427, 6),
            ("sample(range(2251),5) x2 seed1234", 2251, 5),
        ] {
            let expected: Vec<Vec<usize>> = serde_json::from_value(vector(name)).unwrap();
            let mut random = PythonRandom::new(1234);
            for expected in expected {
                assert_eq!(random.sample(n, k), Some(expected), "{name}");
            }
        }
        let mut random = PythonRandom::new(0);
        let drawn: Vec<u32> = (0..4).map(|_| random.below(339_421)).collect();
        assert_eq!(serde_json::json!(drawn), vector("randint(0,339420) x4 seed0"));
    }

    #[test]
    fn more_draws_are_pythons() {
        // Python 3.11: random.Random(3).random(), .choices(range(10), k=6), random.Random(2**40 + 1).getrandbits(32),
        // random.Random(5).sample(range(30), 10) and the same of range(300).
        assert_eq!(PythonRandom::new(3).random(), 0.237_964_627_091_891_37);
        let mut random = PythonRandom::new(3);
        assert_eq!([0; 6].map(|_| random.choose(10)), [2, 5, 3, 6, 6, 0]);
        assert_eq!(PythonRandom::new((1 << 40) + 1).next_u32(), 754_872_011);
        let expected = [19, 8, 23, 11, 25, 22, 27, 20, 16, 0];
        assert_eq!(PythonRandom::new(5).sample(30, 10), Some(expected.to_vec()));
        let expected = [130, 183, 271, 14, 238, 127, 26, 80, 57, 190];
        assert_eq!(PythonRandom::new(5).sample(300, 10), Some(expected.to_vec()));
    }

    #[test]
    fn samples_beyond_the_population_are_refused() {
        assert_eq!(PythonRandom::new(1).sample(3, 4), None);
        assert_eq!(PythonRandom::new(1).sample(3, 0), Some(vec![]));
        assert_eq!(PythonRandom::new(1).below(0), 0);
    }
}
