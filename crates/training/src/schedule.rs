//! Learning rates as a pure function of the step, so that a resumed run needs no schedule state.
//!
//! Source: the `get_*_schedule_with_warmup` functions of Hugging Face transformers, whose values
//! `testdata/training/schedules.json` holds.

use serde::{Deserialize, Serialize};

use crate::error::{Problem, Result};

/// The shape of the learning rate after the warm-up; `p` is the progress from the warm-up's end (0) to the last step
/// (1).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum ScheduleKind {
    /// 1.
    Constant,
    /// `f + (1 - f) (1 - p)`: down to `f` on a straight line.
    Linear {
        /// The factor `f` at the end, 0 to 1.
        final_ratio: f64,
    },
    /// `f + (1 - f) (1 + cos(π p)) / 2`: down to `f` along half a cosine wave.
    Cosine {
        /// The factor `f` at the end, 0 to 1.
        final_ratio: f64,
    },
    /// `(1 + cos(π (c p mod 1))) / 2`: down to 0 along half a cosine wave, `c` times.
    CosineWithRestarts {
        /// How often, `c`, at least 1.
        cycles: u32,
    },
    /// `1 / √(1 + s / t)`, `s` the steps since the warm-up; goes on falling after the end.
    InverseSqrt {
        /// After so many steps, `t`, the rate is at 1 / √2; at least 1.
        timescale: u64,
    },
    /// 1, and in the last steps down to `f`. The warm-up begins at `f`, too, as in transformers.
    WarmupStableDecay {
        /// Steps of the fall, at least 1; they begin after the warm-up at the earliest.
        decay_steps: u64,
        /// How it falls.
        decay: Decay,
        /// The factor `f` at both ends, 0 to 1.
        final_ratio: f64,
    },
}

impl ScheduleKind {
    /// Whether a step's rate depends on how many steps there are.
    pub(crate) fn depends_on_total(self) -> bool {
        !matches!(self, Self::Constant | Self::InverseSqrt { .. })
    }
}

/// How a rate falls from 1 to 0, `p` from 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Decay {
    /// `1 - p`.
    Linear,
    /// `(1 + cos(π p)) / 2`.
    Cosine,
    /// `1 - √p`.
    OneMinusSqrt,
}

impl Decay {
    fn at(self, progress: f64) -> f64 {
        match self {
            Self::Linear => 1.0 - progress,
            Self::Cosine => half_cosine(progress),
            Self::OneMinusSqrt => 1.0 - progress.sqrt(),
        }
    }
}

/// From 1 to 0 along half a cosine wave.
fn half_cosine(progress: f64) -> f64 {
    0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
}

/// A learning rate that rises linearly from 0 over the warm-up, then follows a [`ScheduleKind`].
///
/// Steps count from 0. While `step < warmup_steps` the factor is `step / warmup_steps`, so that step 0 of a run with a
/// warm-up has rate 0, as in transformers. Then `p = (step - warmup_steps) / (total_steps - warmup_steps)`, held at 1
/// from `total_steps` on (transformers' cosine would rise again). What a kind does otherwise, it says.
///
/// ```
/// use kiln_training::{Schedule, ScheduleKind};
///
/// let schedule = Schedule::new(3e-3, 10, 100, ScheduleKind::Linear { final_ratio: 0.1 })?;
/// assert_eq!(schedule.lr(5), 1.5e-3);
/// assert_eq!(schedule.lr(10), 3e-3);
/// # Ok::<(), kiln_training::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    peak: f64,
    warmup_steps: u64,
    total_steps: u64,
    kind: ScheduleKind,
}

impl Schedule {
    /// A schedule with rate `peak` (above 0) at the end of the warm-up. A warm-up as long as the run or longer is
    /// allowed: the run then ends while the rate rises.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) for a peak that isn't finite and above 0, a final ratio outside 0 to 1, and
    /// cycles, a time scale or a decay of 0.
    pub fn new(peak: f64, warmup_steps: u64, total_steps: u64, kind: ScheduleKind) -> Result<Self> {
        if !(peak.is_finite() && peak > 0.0) {
            return Err(Problem::new("lr", "a finite number above 0", peak).argument());
        }
        let ratio = match kind {
            ScheduleKind::Linear { final_ratio }
            | ScheduleKind::Cosine { final_ratio }
            | ScheduleKind::WarmupStableDecay { final_ratio, .. } => final_ratio,
            _ => 0.0,
        };
        if !(0.0..=1.0).contains(&ratio) {
            return Err(Problem::new("final_ratio", "a number from 0 to 1", ratio).argument());
        }
        let count = match kind {
            ScheduleKind::CosineWithRestarts { cycles } => ("cycles", u64::from(cycles)),
            ScheduleKind::InverseSqrt { timescale } => ("timescale", timescale),
            ScheduleKind::WarmupStableDecay { decay_steps, .. } => ("decay_steps", decay_steps),
            _ => ("", 1),
        };
        match count {
            (name, 0) => Err(Problem::new(name, "at least 1", 0).argument()),
            _ => Ok(Self { peak, warmup_steps, total_steps, kind }),
        }
    }

    /// The learning rate of `step`, counted from 0.
    pub fn lr(&self, step: u64) -> f64 {
        let since = match step.checked_sub(self.warmup_steps) {
            Some(since) => since as f64,
            None => {
                let from = match self.kind {
                    ScheduleKind::WarmupStableDecay { final_ratio, .. } => final_ratio,
                    _ => 0.0,
                };
                return self.peak * (from + (1.0 - from) * (step as f64 / self.warmup_steps as f64));
            }
        };
        let length = self.total_steps.saturating_sub(self.warmup_steps);
        let progress = (since / length.max(1) as f64).min(1.0);
        let (final_ratio, shape) = match self.kind {
            ScheduleKind::Constant => return self.peak,
            ScheduleKind::InverseSqrt { timescale } => (0.0, 1.0 / (1.0 + since / timescale as f64).sqrt()),
            ScheduleKind::Linear { final_ratio } => (final_ratio, 1.0 - progress),
            ScheduleKind::Cosine { final_ratio } => (final_ratio, half_cosine(progress)),
            ScheduleKind::CosineWithRestarts { .. } if progress >= 1.0 => (0.0, 0.0),
            ScheduleKind::CosineWithRestarts { cycles } => {
                (0.0, half_cosine((f64::from(cycles) * progress).fract()))
            }
            ScheduleKind::WarmupStableDecay { decay_steps, decay, final_ratio } => {
                let stable = length.saturating_sub(decay_steps) as f64;
                let falling = ((since - stable) / decay_steps as f64).clamp(0.0, 1.0);
                (final_ratio, decay.at(falling))
            }
        };
        self.peak * (final_ratio + (1.0 - final_ratio) * shape)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/training/schedules.json");
    /// A few roundings of f64 in another order of operations.
    const TOLERANCE: f64 = 1e-15;

    #[test]
    fn factors_equal_transformers() {
        let cases: Vec<Value> = serde_json::from_slice(&std::fs::read(FILE).unwrap()).unwrap();
        assert_eq!(cases.len(), 40);
        for case in cases {
            let kind: ScheduleKind = serde_json::from_value(case["kind"].clone()).unwrap();
            let (warmup, total) = (case["warmup"].as_u64().unwrap(), case["total"].as_u64().unwrap());
            let schedule = Schedule::new(1.0, warmup, total, kind).unwrap();
            for pair in case["factors"].as_array().unwrap() {
                let (step, factor) = (pair[0].as_u64().unwrap(), pair[1].as_f64().unwrap());
                let lr = schedule.lr(step);
                assert!((lr - factor).abs() <= TOLERANCE, "{case}: step {step}: {lr}");
            }
        }
    }

    #[test]
    fn linear_with_warm_up_by_hand() {
        let schedule = Schedule::new(1.0, 10, 100, ScheduleKind::Linear { final_ratio: 0.0 }).unwrap();
        let rates = [0, 5, 10, 55, 100, 1000].map(|step| schedule.lr(step));
        assert_eq!(rates, [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]);
    }

    #[test]
    fn recipe_of_the_embedded_model_ends_at_a_tenth() {
        let schedule = Schedule::new(3e-3, 10, 100, ScheduleKind::Linear { final_ratio: 0.1 }).unwrap();
        for (step, expected) in [(0, 0.0), (10, 3e-3), (55, 1.65e-3), (99, 3.3e-4), (100, 3e-4), (101, 3e-4)]
        {
            assert!((schedule.lr(step) - expected).abs() < 1e-17, "{step}: {}", schedule.lr(step));
        }
    }

    #[test]
    fn cosine_stays_down_after_the_end() {
        let schedule = Schedule::new(1.0, 0, 10, ScheduleKind::Cosine { final_ratio: 0.25 }).unwrap();
        assert_eq!(schedule.lr(0), 1.0);
        assert_eq!([schedule.lr(10), schedule.lr(15), schedule.lr(u64::MAX)], [0.25; 3]);
    }

    #[test]
    fn warm_up_longer_than_the_run_and_empty_runs_are_finite() {
        let kind = ScheduleKind::Linear { final_ratio: 0.1 };
        assert_eq!(Schedule::new(1.0, 10, 5, kind).unwrap().lr(4), 0.4);
        assert!(Schedule::new(1.0, 10, 5, kind).unwrap().lr(11).is_finite());
        assert!(Schedule::new(1.0, 0, 0, kind).unwrap().lr(0).is_finite());
    }

    #[test]
    fn values_out_of_range_name_the_option() {
        for peak in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(
                Schedule::new(peak, 0, 1, ScheduleKind::Constant).unwrap_err().to_string().starts_with("lr:")
            );
        }
        for final_ratio in [-0.1, 1.1, f64::NAN] {
            for kind in [ScheduleKind::Linear { final_ratio }, ScheduleKind::Cosine { final_ratio }] {
                assert!(Schedule::new(1.0, 0, 1, kind).unwrap_err().to_string().starts_with("final_ratio:"));
            }
        }
        assert!(
            serde_json::from_str::<ScheduleKind>(r#"{"linear": {"final_ratio": 0, "power": 2}}"#).is_err()
        );
    }
}
