//! The papers' recipes.

use crate::{BatchOptions, ScheduleKind, TrainerConfig};

/// How the methods that Kiln has were trained where they were published. Batches are micro-batches of the size that was
/// used there; for less memory take smaller ones and more of them.
impl TrainerConfig {
    /// QLoRA on instructions (Dettmers et al. 2023, released script): 16 rows one by one, 2e-4 (1e-4 from 33 B parameters
    /// on), constant, gradients clipped to 0.3, no decay.
    pub fn qlora(steps: u64) -> Self {
        Self::new(steps, BatchOptions::new(1).with_group_by_length(true))
            .with_accumulate(16)
            .with_lr(2e-4)
            .with_clip(Some(0.3))
    }

    /// Q-BaRA and QA-HiRA (released script): as QLoRA, in four micro-batches of 4 rows. QA-LoRA's paper has 2e-5 in its place,
    /// because it pools by sums.
    pub fn balanced_rank(steps: u64) -> Self {
        Self::qlora(steps).with_batch(BatchOptions::new(4).with_group_by_length(true)).with_accumulate(4)
    }

    /// ApiQ on WikiText-2 (Liao et al. 2024, released script): 64 rows of 1024 tokens, 3e-4, warm-up over 3 % of the steps,
    /// then half a cosine wave, decay 0.1. LoftQ's script has the same.
    pub fn apiq(steps: u64) -> Self {
        Self::new(steps, BatchOptions::new(4))
            .with_accumulate(16)
            .with_lr(3e-4)
            .with_warmup((steps * 3).div_ceil(100))
            .with_schedule(ScheduleKind::Cosine { final_ratio: 0.0 })
            .with_weight_decay(0.1)
    }

    /// QST on Alpaca (Zhang et al. 2024, appendix B): 2e-4 (1e-4 from 13 B parameters on), constant, rows of at most 384
    /// tokens.
    pub fn side_tuning(steps: u64) -> Self {
        Self::new(steps, BatchOptions::new(8)).with_lr(2e-4)
    }

    /// Repair of a pruned model on Alpaca (LLM-Pruner, and AutoMixQ after it): 64 rows of at most 256 tokens, 1e-4, 100 steps
    /// of warm-up, then down on a line.
    pub fn pruned(steps: u64) -> Self {
        Self::new(steps, BatchOptions::new(4))
            .with_accumulate(16)
            .with_lr(1e-4)
            .with_warmup(100)
            .with_schedule(ScheduleKind::Linear { final_ratio: 0.0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recipes_are_accepted_at_any_length() {
        for steps in [1, 10, 10_000] {
            let recipes = [
                TrainerConfig::qlora(steps),
                TrainerConfig::balanced_rank(steps),
                TrainerConfig::apiq(steps),
                TrainerConfig::side_tuning(steps),
                TrainerConfig::pruned(steps),
            ];
            for recipe in recipes {
                assert!(recipe.check().is_ok(), "{recipe:?}");
                let rows = recipe.batch.batch * recipe.accumulate;
                assert!([8, 16, 64].contains(&rows), "{recipe:?}");
            }
        }
        assert_eq!(TrainerConfig::apiq(1000).warmup, 30);
    }
}
