//! The choice of the next token from its logits, in host memory.

use std::collections::BTreeSet;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{Error, Result, generate::GenerateOptions};

/// Chooses tokens as transformers' logits processors do: penalty, temperature, top-k, top-p, min-p, then one draw.
#[derive(Debug)]
pub(crate) struct Sampler {
    temperature: f64,
    top_k: Option<usize>,
    top_p: Option<f64>,
    min_p: Option<f64>,
    penalty: f32,
    /// Tokens that occurred, where that counts.
    seen: BTreeSet<u32>,
    random: ChaCha8Rng,
}

impl Sampler {
    pub(crate) fn new(options: &GenerateOptions, prompt: &[u32]) -> Self {
        Self {
            temperature: options.temperature,
            top_k: options.top_k,
            top_p: options.top_p,
            min_p: options.min_p,
            penalty: options.repetition_penalty as f32,
            seen: prompt.iter().copied().filter(|_| options.repetition_penalty != 1.0).collect(),
            random: ChaCha8Rng::seed_from_u64(options.seed),
        }
    }

    /// The next token's id.
    pub(crate) fn choose(&mut self, logits: &[f32]) -> Result<u32> {
        if self.penalty == 1.0 {
            return self.draw(logits);
        }
        let mut logits = logits.to_vec();
        for &id in &self.seen {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = if *logit < 0.0 { *logit * self.penalty } else { *logit / self.penalty };
            }
        }
        let id = self.draw(&logits)?;
        self.seen.insert(id);
        Ok(id)
    }

    fn draw(&mut self, logits: &[f32]) -> Result<u32> {
        let best = largest(logits)?;
        if self.temperature == 0.0 {
            return Ok(best as u32);
        }
        let kept = self.candidates(logits, logits[best]);
        let total: f64 = kept.iter().map(|(_, probability)| probability).sum();
        // 53 random bits: uniform in 0..1.
        let mut rest = (self.random.next_u64() >> 11) as f64 / (1u64 << 53) as f64 * total;
        for &(id, probability) in &kept {
            if rest < probability {
                return Ok(id);
            }
            rest -= probability;
        }
        // Rounding used up the last probability.
        Ok(best as u32)
    }

    /// The ids that may be drawn and their probabilities (under top-p: of the sum before it was cut).
    fn candidates(&self, logits: &[f32], largest: f32) -> Vec<(u32, f64)> {
        let difference = |logit: f32| (f64::from(logit) - f64::from(largest)) / self.temperature;
        let mut kept: Vec<(u32, f64)> =
            logits.iter().enumerate().map(|(id, &logit)| (id as u32, difference(logit))).collect();
        if let Some(k) = self.top_k.filter(|&k| k < kept.len()) {
            let mut scores: Vec<f64> = kept.iter().map(|(_, score)| *score).collect();
            let (_, &mut kth, _) = scores.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
            // Ties with the k-th stay, as in transformers.
            kept.retain(|(_, score)| *score >= kth);
        }
        let total: f64 = kept.iter().map(|(_, score)| score.exp()).sum();
        kept.iter_mut().for_each(|(_, score)| *score = score.exp() / total);
        if let Some(p) = self.top_p {
            kept.sort_by(|(_, a), (_, b)| b.total_cmp(a));
            let mut before = 0.0;
            let count = kept.iter().take_while(|(_, probability)| {
                let wanted = before < p;
                before += probability;
                wanted
            });
            let count = count.count();
            kept.truncate(count);
        }
        if let Some(p) = self.min_p {
            let least = p * kept.iter().map(|(_, probability)| *probability).fold(0.0, f64::max);
            kept.retain(|(_, probability)| *probability >= least);
        }
        kept
    }
}

/// Index of the largest logit, the first of equals.
fn largest(logits: &[f32]) -> Result<usize> {
    let mut best = 0;
    for (id, &logit) in logits.iter().enumerate() {
        if logit.is_nan() || logit == f32::INFINITY {
            return Err(not_finite(id, logit));
        }
        if logit > logits[best] {
            best = id;
        }
    }
    match logits.get(best) {
        Some(logit) if logit.is_finite() => Ok(best),
        // Every logit is minus infinity, or there is none.
        _ => Err(not_finite(best, f32::NEG_INFINITY)),
    }
}

fn not_finite(id: usize, logit: f32) -> Error {
    Error::Argument {
        name: format!("logit of token {id}"),
        expected: "numbers below infinity, at least one of them finite".into(),
        found: logit.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> GenerateOptions {
        GenerateOptions::new(1).with_temperature(1.0)
    }

    fn draws(options: &GenerateOptions, logits: &[f32], count: usize) -> Vec<usize> {
        let mut sampler = Sampler::new(options, &[]);
        let mut seen = vec![0; logits.len()];
        for _ in 0..count {
            seen[sampler.choose(logits).unwrap() as usize] += 1;
        }
        seen
    }

    /// Every count lies within four standard deviations of its expectation.
    #[track_caller]
    fn assert_distribution(seen: &[usize], expected: &[f64]) {
        let count: usize = seen.iter().sum();
        for (id, (&seen, &p)) in seen.iter().zip(expected).enumerate() {
            let deviation = (count as f64 * p * (1.0 - p)).sqrt();
            let difference = (seen as f64 - count as f64 * p).abs();
            assert!(difference <= 4.0 * deviation, "token {id}: {seen} of {count}, expected {p}");
        }
    }

    // Logits of the probabilities 8/15, 4/15, 2/15 and 1/15, not in order.
    const LN2: f32 = std::f32::consts::LN_2;
    const LOGITS: [f32; 4] = [LN2, 3.0 * LN2, 0.0, 2.0 * LN2];

    #[test]
    fn draws_follow_the_softmax() {
        let fifteenths = |parts: [f64; 4]| parts.map(|part| part / 15.0);
        assert_distribution(&draws(&options(), &LOGITS, 20_000), &fifteenths([2.0, 8.0, 1.0, 4.0]));
        // A far offset changes nothing.
        let shifted = LOGITS.map(|logit| logit + 2000.0);
        assert_distribution(
            &draws(&options().with_seed(3), &shifted, 20_000),
            &fifteenths([2.0, 8.0, 1.0, 4.0]),
        );
        // Half the temperature squares the odds: 64, 16, 4, 1 of 85.
        let cool = options().with_temperature(0.5);
        assert_distribution(
            &draws(&cool, &LOGITS, 20_000),
            &[4.0 / 85.0, 64.0 / 85.0, 1.0 / 85.0, 16.0 / 85.0],
        );
    }

    #[test]
    fn top_k_keeps_the_k_largest_and_ties_with_the_last() {
        let seen = draws(&options().with_top_k(2), &LOGITS, 20_000);
        assert_distribution(&seen, &[0.0, 8.0 / 12.0, 0.0, 4.0 / 12.0]);
        assert_eq!(draws(&options().with_top_k(1), &LOGITS, 50), [0, 50, 0, 0]);
        let tied = draws(&options().with_top_k(2), &[1.0, 2.0, 1.0, 0.0], 1000);
        assert!(tied[0] > 0 && tied[2] > 0 && tied[3] == 0, "{tied:?}");
        assert_distribution(
            &draws(&options().with_top_k(9), &LOGITS, 20_000),
            &[2.0 / 15.0, 8.0 / 15.0, 1.0 / 15.0, 4.0 / 15.0],
        );
    }

    #[test]
    fn top_p_keeps_the_smallest_set_that_reaches_p() {
        // Cumulative: 8/15 = 0.533, 12/15 = 0.8, 14/15 = 0.933, 1.
        let kept = |p: f64| {
            let sampler = Sampler::new(&options().with_top_p(p), &[]);
            sampler.candidates(&LOGITS, LOGITS[1]).into_iter().map(|(id, _)| id).collect::<Vec<_>>()
        };
        assert_eq!(kept(1e-9), [1]);
        assert_eq!(kept(0.53), [1]);
        assert_eq!(kept(0.54), [1, 3]);
        assert_eq!(kept(0.79), [1, 3]);
        assert_eq!(kept(0.81), [1, 3, 0]);
        assert_eq!(kept(0.94), [1, 3, 0, 2]);
        assert_eq!(kept(1.0), [1, 3, 0, 2]);
        let seen = draws(&options().with_top_p(0.7), &LOGITS, 20_000);
        assert_distribution(&seen, &[0.0, 8.0 / 12.0, 0.0, 4.0 / 12.0]);
        // Top-p counts what top-k left: 8/12 = 0.667 reaches 0.6, 8/15 would not.
        let both = Sampler::new(&options().with_top_k(2).with_top_p(0.6), &[]);
        assert_eq!(both.candidates(&LOGITS, LOGITS[1]).len(), 1);
    }

    #[test]
    fn min_p_keeps_what_is_likely_enough_beside_the_best() {
        // 8, 4, 2 and 1 of 15.
        let kept = |p: f64| {
            let sampler = Sampler::new(&options().with_min_p(p), &[]);
            let mut ids: Vec<u32> =
                sampler.candidates(&LOGITS, LOGITS[1]).into_iter().map(|(id, _)| id).collect();
            ids.sort_unstable();
            ids
        };
        assert_eq!(kept(0.12), [0, 1, 2, 3]);
        assert_eq!(kept(0.2), [0, 1, 3]);
        assert_eq!(kept(0.3), [1, 3]);
        assert_eq!(kept(1.0), [1]);
    }

    #[test]
    fn what_occurred_is_less_likely() {
        let penalized = GenerateOptions::new(1).with_repetition_penalty(2.0);
        let mut sampler = Sampler::new(&penalized, &[0, 9]);
        // 3 is halved; then 2, which has occurred now.
        assert_eq!(sampler.choose(&[3.0, 2.0, 1.2]).unwrap(), 1);
        assert_eq!(sampler.choose(&[3.0, 2.0, 1.2]).unwrap(), 0);
        assert_eq!(sampler.choose(&[2.0, 2.0, 1.2]).unwrap(), 2);
        // A negative logit grows more negative.
        assert_eq!(Sampler::new(&penalized, &[0]).choose(&[-1.0, -1.5]).unwrap(), 1);
    }

    #[test]
    fn a_temperature_of_zero_and_a_tiny_one_take_the_first_of_the_largest() {
        let logits = [0.5, 2.0, f32::NEG_INFINITY, 2.0];
        assert_eq!(draws(&GenerateOptions::new(1), &logits, 5), [0, 5, 0, 0]);
        assert_eq!(draws(&options().with_temperature(1e-300), &LOGITS, 5), [0, 5, 0, 0]);
    }

    #[test]
    fn logits_that_are_not_numbers_are_errors() {
        for (logits, part) in [
            (vec![0.0, f32::NAN], "token 1"),
            (vec![f32::INFINITY, 0.0], "token 0"),
            (vec![f32::NEG_INFINITY; 2], "at least one"),
            (vec![], "at least one"),
        ] {
            let message = Sampler::new(&options(), &[]).choose(&logits).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }
}
