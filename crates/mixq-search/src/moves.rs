//! Random plans and changes of plans. Every function draws from the generator that it is given.

use rand::RngExt;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

use crate::{Config, SearchSpace};

/// A generator for one purpose: a function of seed, label and round, whatever else was drawn before.
pub(crate) fn stream(seed: u64, label: &str, round: u64) -> ChaCha8Rng {
    let mut hash = Sha256::new();
    hash.update(seed.to_le_bytes());
    hash.update(round.to_le_bytes());
    hash.update(label);
    ChaCha8Rng::from_seed(hash.finalize().into())
}

/// `a` and `b` mixed, each unit from either with the same probability.
pub(crate) fn crossover(a: &Config, b: &Config, rng: &mut ChaCha8Rng) -> Config {
    Config(a.0.iter().zip(&b.0).map(|(&a, &b)| if rng.random_bool(0.5) { a } else { b }).collect())
}

impl SearchSpace {
    /// A uniformly drawn configuration.
    pub fn sample(&self, rng: &mut ChaCha8Rng) -> Config {
        Config((0..self.units().len()).map(|unit| rng.random_range(0..self.choices(unit)) as u8).collect())
    }

    /// A configuration whose share of large choices is drawn first, so that every memory gets its share of samples.
    pub(crate) fn sample_stratified(&self, rng: &mut ChaCha8Rng) -> Config {
        let share: f64 = rng.random();
        let unit = |unit| {
            let top = (self.choices(unit) - 1) as f64;
            // The fractional part decides between two neighbours; the jitter reaches all others now and then.
            let level = (share + 0.5 * (rng.random::<f64>() - 0.5)).clamp(0.0, 1.0) * top;
            (level.floor() + f64::from(u8::from(rng.random::<f64>() < level.fract()))).min(top) as u8
        };
        Config((0..self.units().len()).map(unit).collect())
    }

    /// `config` with each unit moved to a neighbouring choice with probability `rate`.
    pub fn mutate(&self, config: &Config, rate: f64, rng: &mut ChaCha8Rng) -> Config {
        let mut next = config.clone();
        for (unit, index) in next.0.iter_mut().enumerate() {
            let last = (self.choices(unit) - 1) as u8;
            if last > 0 && rng.random_bool(rate.clamp(0.0, 1.0)) {
                let up = *index == 0 || (*index < last && rng.random_bool(0.5));
                *index = if up { *index + 1 } else { *index - 1 };
            }
        }
        next
    }

    /// Every configuration that differs from `config` in one unit.
    pub fn neighbours(&self, config: &Config) -> Vec<Config> {
        let mut all = Vec::new();
        for unit in 0..self.units().len() {
            for choice in (0..self.choices(unit) as u8).filter(|&choice| choice != config.0[unit]) {
                let mut next = config.clone();
                next.0[unit] = choice;
                all.push(next);
            }
        }
        all
    }

    /// Lowers units, cheapest damage per byte first, until the plan fits into `limit`. `damage(unit, from)` is what
    /// going from choice `from` to the one below costs.
    ///
    /// The limit must have passed [`Self::check_limit`].
    pub(crate) fn repair(&self, config: &mut Config, limit: Option<u64>, damage: impl Fn(usize, u8) -> f64) {
        let Some(limit) = limit else { return };
        while self.bytes(config) > limit {
            let price = |unit: usize| {
                let from = config.0[unit];
                let weights = &self.weights()[unit];
                let saved = weights[usize::from(from)] - weights[usize::from(from) - 1];
                damage(unit, from).max(0.0) / saved.max(1) as f64
            };
            let lowerable = (0..config.0.len()).filter(|&unit| config.0[unit] > 0);
            let Some(unit) = lowerable.min_by(|&a, &b| price(a).total_cmp(&price(b))) else { return };
            config.0[unit] -= 1;
        }
    }

    /// `config` after `swaps` swaps: each lowers one unit and raises others while the plan stays within `limit`.
    pub(crate) fn swap(&self, config: &Config, swaps: usize, limit: u64, rng: &mut ChaCha8Rng) -> Config {
        let mut next = config.clone();
        let units = next.0.len();
        for _ in 0..swaps {
            let lowerable: Vec<usize> = (0..units).filter(|&unit| next.0[unit] > 0).collect();
            let lowered = (!lowerable.is_empty()).then(|| lowerable[rng.random_range(0..lowerable.len())]);
            if let Some(unit) = lowered {
                next.0[unit] -= 1;
            }
            // Raise random units as long as something fits; the lowered one would only undo the swap.
            loop {
                let room = limit.saturating_sub(self.bytes(&next));
                let fits = |&unit: &usize| {
                    let (weights, from) = (&self.weights()[unit], usize::from(next.0[unit]));
                    Some(unit) != lowered
                        && from + 1 < weights.len()
                        && weights[from + 1] - weights[from] <= room
                };
                let raisable: Vec<usize> = (0..units).filter(fits).collect();
                if raisable.is_empty() {
                    break;
                }
                next.0[raisable[rng.random_range(0..raisable.len())]] += 1;
            }
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::toy_space;

    #[test]
    fn streams_depend_on_seed_label_and_round_only() {
        let draw = |seed, label, round| stream(seed, label, round).random::<u64>();
        assert_eq!(draw(1, "a", 0), draw(1, "a", 0));
        for other in [draw(2, "a", 0), draw(1, "b", 0), draw(1, "a", 1)] {
            assert_ne!(draw(1, "a", 0), other);
        }
    }

    #[test]
    fn every_move_stays_inside_the_space_and_the_limit() {
        let space = toy_space(6, 4);
        let mut rng = stream(3, "moves", 0);
        let limit = space.smallest() + (space.largest() - space.smallest()) / 3;
        let mut changed = 0;
        for _ in 0..200 {
            let a = space.sample(&mut rng);
            let b = space.sample_stratified(&mut rng);
            let child = crossover(&a, &b, &mut rng);
            let mut mutated = space.mutate(&child, 0.5, &mut rng);
            assert!([&a, &b, &child, &mutated].iter().all(|config| space.contains(config)));
            assert!(child.0.iter().zip(a.0.iter().zip(&b.0)).all(|(c, (a, b))| c == a || c == b));
            assert!(child.0.iter().zip(&mutated.0).all(|(&from, &to)| from.abs_diff(to) <= 1));
            space.repair(&mut mutated, Some(limit), |_, _| 1.0);
            assert!(space.bytes(&mutated) <= limit);
            let swapped = space.swap(&mutated, 2, limit, &mut rng);
            assert!(space.contains(&swapped) && space.bytes(&swapped) <= limit);
            changed += usize::from(swapped != mutated);
        }
        assert!(changed > 150, "swaps change plans: {changed} of 200");
    }

    #[test]
    fn stratified_samples_cover_the_memory_axis() {
        let space = toy_space(12, 4);
        let mut rng = stream(5, "strata", 0);
        let span = (space.largest() - space.smallest()) as f64;
        let mut bins = [0; 5];
        for _ in 0..1000 {
            let at = (space.bytes(&space.sample_stratified(&mut rng)) - space.smallest()) as f64 / span;
            bins[((at * 5.0) as usize).min(4)] += 1;
        }
        assert!(bins.iter().all(|&count| count > 80), "{bins:?}");
    }

    #[test]
    fn repair_takes_the_cheapest_damage_per_byte() {
        let space = toy_space(3, 3);
        let mut config = space.highest();
        let limit = space.largest() - 1;
        space.repair(&mut config, Some(limit), |unit, _| if unit == 1 { 0.01 } else { 1e9 });
        assert_eq!(config.0, [2, 1, 2]);
    }
}
