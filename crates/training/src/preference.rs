//! Losses on whole answers: which of two is better, or whether one is good.
//!
//! All are functions of the answers' log-probabilities under the model and, for most, under a reference. Their derivatives
//! with respect to those are the weights with which the answers' tokens enter the backward pass.

use kiln_models::{Error as ModelError, Result as ModelResult};
use serde::{Deserialize, Serialize};

use crate::error::{Problem, Result};

/// A loss on answers of which one is preferred, or which are labelled good or bad.
///
/// With `π` and `ρ` the sums of the answer's log-probabilities under the model and the reference, `c` and `r` the chosen
/// and the rejected answer, `n` their tokens, and `h = (π_c - ρ_c) - (π_r - ρ_r)`, the loss of a pair is
///
/// | | loss | source |
/// | --- | --- | --- |
/// | `Dpo` | `-(1-ε) ln σ(β h) - ε ln σ(-β h)` | Rafailov et al. 2023; ε: Mitchell 2023 |
/// | `Hinge` | `max(0, 1 - β h)` | Zhao et al. 2023 (SLiC) |
/// | `Ipo` | `(h' - 1 / 2β)²`, where `h'` is `h` of means over tokens, as TRL has it | Azar et al. 2023 |
/// | `SimPo` | `-ln σ(β (π_c / n_c - π_r / n_r) - γ)` | Meng et al. 2024 |
/// | `Orpo` | `-ln p_c - β ln σ(odds_c - odds_r)`, `p` the mean likelihood, `odds = ln p - ln(1 - p)`; the first term is a mean over all chosen tokens | Hong et al. 2024 |
/// | `Kto` | of one answer: `w_good (1 - σ(β (π - ρ - z)))` or `w_bad (1 - σ(β (z - π + ρ)))`, where `z` is the mean of `π - ρ` over answers to other prompts of the micro-batch, at least 0 | Ethayarajh et al. 2024 |
///
/// The loss of a step is the weighted mean over its pairs (`Kto`: its answers). The reference is the model as the run begins
/// ([`Trainer::with_reference`](crate::Trainer::with_reference) takes another).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum PreferenceLoss {
    /// Direct preference optimization.
    Dpo {
        /// How dear it is to move away from the reference; above 0.
        beta: f64,
        /// Share of pairs whose sides are taken to be swapped, 0 to below 0.5.
        label_smoothing: f64,
    },
    /// Sequence likelihood calibration.
    Hinge {
        /// As for `Dpo`.
        beta: f64,
    },
    /// Identity preference optimization.
    Ipo {
        /// As for `Dpo`.
        beta: f64,
    },
    /// Simple preference optimization; has no reference.
    SimPo {
        /// Factor of the difference; above 0.
        beta: f64,
        /// By how much the chosen answer should be better, `γ`; at least 0.
        margin: f64,
    },
    /// Odds-ratio preference optimization; has no reference.
    Orpo {
        /// Factor of the odds ratio's term; above 0.
        beta: f64,
    },
    /// Kahneman–Tversky optimization, on answers with labels.
    Kto {
        /// As for `Dpo`.
        beta: f64,
        /// Weight of good answers, at least 0.
        desirable: f64,
        /// Weight of bad answers, at least 0.
        undesirable: f64,
    },
}

/// An answer's log-probability.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Answer {
    /// Sum over its tokens, in nats.
    pub log_p: f64,
    pub tokens: usize,
    /// The same sum under the reference; 0 where there is none.
    pub reference: f64,
    /// What its share of the loss is multiplied by; of a pair, the chosen answer's.
    pub weight: f64,
}

impl Answer {
    fn mean(self) -> f64 {
        self.log_p / self.tokens as f64
    }

    fn reward(self) -> f64 {
        self.log_p - self.reference
    }
}

/// What the answers of a micro-batch come to.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Outcome {
    /// Its share of the step's loss.
    pub loss: f64,
    /// Derivatives of `loss` by each answer's negative log-likelihood.
    pub slopes: Vec<f64>,
    pub rewards: Rewards,
}

/// Sums of rewards, `β (π - ρ)`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Rewards {
    pub chosen: f64,
    pub rejected: f64,
    pub count_chosen: usize,
    pub count_rejected: usize,
    /// Pairs of which the chosen answer has the higher reward.
    pub right: usize,
}

impl Rewards {
    pub(crate) fn add(&mut self, other: Self) {
        self.chosen += other.chosen;
        self.rejected += other.rejected;
        self.count_chosen += other.count_chosen;
        self.count_rejected += other.count_rejected;
        self.right += other.right;
    }

    /// As numbers that go from one rank to another.
    pub(crate) fn to_numbers(self) -> [f64; Self::NUMBERS] {
        let counts = [self.count_chosen, self.count_rejected, self.right].map(|count| count as f64);
        [self.chosen, self.rejected, counts[0], counts[1], counts[2]]
    }

    /// Of what [`to_numbers`](Self::to_numbers) gives.
    pub(crate) fn from_numbers(numbers: &[f64]) -> Self {
        let count = |index: usize| numbers[index] as usize;
        let [count_chosen, count_rejected, right] = [count(2), count(3), count(4)];
        Self { chosen: numbers[0], rejected: numbers[1], count_chosen, count_rejected, right }
    }

    pub(crate) const NUMBERS: usize = 5;

    pub(crate) fn report(&self, of_pairs: bool) -> PreferenceReport {
        let mean = |sum: f64, count: usize| (count > 0).then(|| sum / count as f64);
        PreferenceReport {
            chosen: mean(self.chosen, self.count_chosen),
            rejected: mean(self.rejected, self.count_rejected),
            accuracy: mean(self.right as f64, self.count_chosen).filter(|_| of_pairs),
        }
    }
}

/// How a step's answers stood before it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PreferenceReport {
    /// Mean reward of chosen (good) answers: `β` times by how much the model likes them better than the reference does, or,
    /// without a reference, `β` times the mean log-probability of a token.
    pub chosen: Option<f64>,
    /// The same of rejected (bad) answers.
    pub rejected: Option<f64>,
    /// Share of pairs whose chosen answer has the higher reward.
    pub accuracy: Option<f64>,
}

/// What a step's sums are divided by.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Totals {
    /// Weights of the pairs, or of the answers with labels.
    pub units: f64,
    /// Tokens of chosen answers, each times its weight.
    pub chosen_tokens: f64,
}

impl Totals {
    pub(crate) fn add(&mut self, other: Self) {
        self.units += other.units;
        self.chosen_tokens += other.chosen_tokens;
    }
}

impl PreferenceLoss {
    /// DPO with β = 0.1 and no label smoothing.
    pub fn dpo() -> Self {
        Self::Dpo { beta: 0.1, label_smoothing: 0.0 }
    }

    /// KTO with β = 0.1 and equal weights.
    pub fn kto() -> Self {
        Self::Kto { beta: 0.1, desirable: 1.0, undesirable: 1.0 }
    }

    /// Whether answers are compared with what a reference thinks of them.
    pub fn has_reference(&self) -> bool {
        !matches!(self, Self::SimPo { .. } | Self::Orpo { .. })
    }

    /// Whether the loss is one of answers with labels, not of pairs.
    pub fn is_of_labels(&self) -> bool {
        matches!(self, Self::Kto { .. })
    }

    fn beta(&self) -> f64 {
        match *self {
            Self::Dpo { beta, .. }
            | Self::Hinge { beta }
            | Self::Ipo { beta }
            | Self::SimPo { beta, .. }
            | Self::Orpo { beta }
            | Self::Kto { beta, .. } => beta,
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        let fail = |name, expected, found| Err(Problem::new(name, expected, found).argument());
        let is_amount = |value: f64| value.is_finite() && value >= 0.0;
        if !(self.beta().is_finite() && self.beta() > 0.0) {
            return fail("preference.beta", "a finite number above 0", self.beta());
        }
        match *self {
            Self::Dpo { label_smoothing, .. } if !(0.0..0.5).contains(&label_smoothing) => {
                fail("preference.label_smoothing", "a number from 0 to below 0.5", label_smoothing)
            }
            Self::SimPo { margin, .. } if !is_amount(margin) => {
                fail("preference.margin", "a finite number, at least 0", margin)
            }
            Self::Kto { desirable, .. } if !is_amount(desirable) => {
                fail("preference.desirable", "a finite number, at least 0", desirable)
            }
            Self::Kto { undesirable, .. } if !is_amount(undesirable) => {
                fail("preference.undesirable", "a finite number, at least 0", undesirable)
            }
            _ => Ok(()),
        }
    }

    /// Loss and slopes of pairs: chosen and rejected answers in turn.
    pub(crate) fn of_pairs(&self, answers: &[Answer], totals: Totals) -> Outcome {
        let mut outcome = Outcome::default();
        for pair in answers.chunks_exact(2) {
            let (chosen, rejected) = (pair[0], pair[1]);
            let (loss, slopes) = self.of_pair(chosen, rejected, totals);
            outcome.loss += loss;
            outcome.slopes.extend(slopes);
            let reward = |answer: Answer| {
                self.beta() * if self.has_reference() { answer.reward() } else { answer.mean() }
            };
            outcome.rewards.add(Rewards {
                chosen: reward(chosen),
                rejected: reward(rejected),
                count_chosen: 1,
                count_rejected: 1,
                right: usize::from(reward(chosen) > reward(rejected)),
            });
        }
        outcome
    }

    /// A pair's share of the loss, and its derivatives by both negative log-likelihoods.
    fn of_pair(&self, chosen: Answer, rejected: Answer, totals: Totals) -> (f64, [f64; 2]) {
        let lengths = [chosen, rejected].map(|answer| answer.tokens as f64);
        let margin = chosen.reward() - rejected.reward();
        // The loss and its derivatives by both log-probabilities.
        let (loss, slopes) = match *self {
            Self::Dpo { beta, label_smoothing: swapped } => {
                let x = beta * margin;
                let loss = -(1.0 - swapped) * log_sigmoid(x) - swapped * log_sigmoid(-x);
                let slope = beta * (swapped * sigmoid(x) - (1.0 - swapped) * sigmoid(-x));
                (loss, [slope, -slope])
            }
            Self::Hinge { beta } => {
                let short = 1.0 - beta * margin;
                let slope = if short > 0.0 { -beta } else { 0.0 };
                (short.max(0.0), [slope, -slope])
            }
            Self::Ipo { beta } => {
                let mean = |answer: Answer| answer.reward() / answer.tokens as f64;
                let short = mean(chosen) - mean(rejected) - 1.0 / (2.0 * beta);
                (short * short, [2.0 * short / lengths[0], -2.0 * short / lengths[1]])
            }
            Self::SimPo { beta, margin } => {
                let x = beta * (chosen.mean() - rejected.mean()) - margin;
                let slope = -beta * sigmoid(-x);
                (-log_sigmoid(x), [slope / lengths[0], -slope / lengths[1]])
            }
            Self::Orpo { beta } => {
                // A likelihood of 1 has no odds.
                let [c, r] = [chosen, rejected].map(|answer| answer.mean().min(-1e-12));
                // ln(1 - p) of a mean log-likelihood ln p.
                let complement = |log_p: f64| (-log_p.exp_m1()).ln();
                let odds = |log_p: f64| log_p - complement(log_p);
                let x = odds(c) - odds(r);
                // The derivative of the odds by ln p is 1 / (1 - p).
                let slope = |log_p: f64| -beta * sigmoid(-x) / -log_p.exp_m1();
                let share = totals.units / totals.chosen_tokens;
                let loss = -beta * log_sigmoid(x) - chosen.log_p * share;
                (loss, [slope(c) / lengths[0] - share, -slope(r) / lengths[1]])
            }
            Self::Kto { .. } => unreachable!("labels aren't pairs: the trainer's check"),
        };
        let weight = chosen.weight / totals.units;
        (loss * weight, slopes.map(|slope| -slope * weight))
    }

    /// Loss and slopes of answers with labels; `divergence` is `z`.
    pub(crate) fn of_labels(
        &self,
        answers: &[Answer],
        labels: &[bool],
        divergence: f64,
        totals: Totals,
    ) -> Outcome {
        let Self::Kto { beta, desirable, undesirable } = *self else {
            unreachable!("pairs have no labels: the trainer's check")
        };
        let mut outcome = Outcome::default();
        for (answer, good) in answers.iter().zip(labels) {
            let (weight, sign) = if *good { (desirable, 1.0) } else { (undesirable, -1.0) };
            let weight = weight * answer.weight / totals.units;
            let likes = sigmoid(sign * beta * (answer.reward() - divergence));
            outcome.loss += weight * (1.0 - likes);
            outcome.slopes.push(weight * sign * beta * likes * (1.0 - likes));
            let reward = beta * answer.reward();
            let mut rewards = Rewards::default();
            if *good {
                (rewards.chosen, rewards.count_chosen) = (reward, 1);
            } else {
                (rewards.rejected, rewards.count_rejected) = (reward, 1);
            }
            outcome.rewards.add(rewards);
        }
        outcome
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// ln σ(x) without overflow.
fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

/// Sums of the scored places' negative log-likelihoods of examples with so many scored places each.
pub(crate) fn sums(nll: &[f32], scored: &[usize]) -> ModelResult<Vec<f64>> {
    if scored.iter().sum::<usize>() != nll.len() {
        return Err(ModelError::Argument {
            name: "likelihoods".into(),
            expected: format!("one for each of {} scored places", scored.iter().sum::<usize>()),
            found: nll.len().to_string(),
        });
    }
    let mut rest = nll.iter().map(|nll| f64::from(*nll));
    Ok(scored.iter().map(|count| rest.by_ref().take(*count).sum()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOTALS: Totals = Totals { units: 3.0, chosen_tokens: 17.0 };

    fn answer(log_p: f64, tokens: usize, reference: f64) -> Answer {
        Answer { log_p, tokens, reference, weight: 1.0 }
    }

    fn losses() -> [PreferenceLoss; 6] {
        use PreferenceLoss::*;
        [
            Dpo { beta: 0.1, label_smoothing: 0.0 },
            Dpo { beta: 0.7, label_smoothing: 0.2 },
            Hinge { beta: 0.3 },
            Ipo { beta: 0.1 },
            SimPo { beta: 2.0, margin: 1.0 },
            Orpo { beta: 0.4 },
        ]
    }

    #[test]
    fn slopes_are_derivatives() {
        const STEP: f64 = 1e-5;
        for loss in losses() {
            let start =
                [answer(-7.0, 5, -7.5), answer(-9.0, 8, -8.0), answer(-3.0, 2, -4.0), answer(-2.0, 4, -3.0)];
            let found = loss.of_pairs(&start, TOTALS).slopes;
            for index in 0..start.len() {
                let at = |change: f64| {
                    let mut moved = start;
                    // The slope is by the negative log-likelihood.
                    moved[index].log_p -= change;
                    loss.of_pairs(&moved, TOTALS).loss
                };
                let expected = (at(STEP) - at(-STEP)) / (2.0 * STEP);
                assert!(
                    (found[index] - expected).abs() < 1e-8,
                    "{loss:?} {index}: {} {expected}",
                    found[index]
                );
            }
        }
        let kto = PreferenceLoss::Kto { beta: 0.3, desirable: 1.0, undesirable: 1.5 };
        let (start, labels) = ([answer(-7.0, 5, -7.5), answer(-9.0, 8, -8.0)], [true, false]);
        let found = kto.of_labels(&start, &labels, 0.4, TOTALS).slopes;
        for index in 0..2 {
            let at = |change: f64| {
                let mut moved = start;
                moved[index].log_p -= change;
                kto.of_labels(&moved, &labels, 0.4, TOTALS).loss
            };
            let expected = (at(STEP) - at(-STEP)) / (2.0 * STEP);
            assert!((found[index] - expected).abs() < 1e-8);
        }
    }

    #[test]
    fn sides_far_apart_stay_finite() {
        for loss in losses() {
            for (chosen, rejected) in [(-1e-9, -5000.0), (-5000.0, -1e-9), (-2000.0, -2000.0)] {
                let outcome = loss.of_pairs(&[answer(chosen, 5, -1.0), answer(rejected, 5, -1.0)], TOTALS);
                assert!(outcome.loss.is_finite(), "{loss:?} {chosen} {rejected}");
                assert!(outcome.slopes.iter().all(|slope| slope.is_finite()), "{loss:?} {chosen} {rejected}");
            }
        }
    }

    #[test]
    fn options_out_of_range_are_named() {
        use PreferenceLoss::*;
        let wrong = [
            (Dpo { beta: 0.0, label_smoothing: 0.0 }, "beta"),
            (Dpo { beta: 0.1, label_smoothing: 0.5 }, "label_smoothing"),
            (Ipo { beta: f64::NAN }, "beta"),
            (SimPo { beta: 1.0, margin: -1.0 }, "margin"),
            (Kto { beta: 1.0, desirable: -1.0, undesirable: 1.0 }, "desirable"),
            (Kto { beta: 1.0, desirable: 1.0, undesirable: f64::INFINITY }, "undesirable"),
        ];
        for (loss, name) in wrong {
            assert!(loss.check().unwrap_err().to_string().starts_with(&format!("preference.{name}:")));
        }
    }
}
