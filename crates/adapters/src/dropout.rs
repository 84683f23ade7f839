//! Dropout whose mask can be made again.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use burn::tensor::{Bool, Device, Tensor, TensorData};
use rand::Rng;

use crate::random::{Purpose, generator, path_hash};

/// Where training stands, as far as dropout must know: a handle that all dropouts of a model share.
///
/// Clones are the same clock, those inside clones of the model too (`model.valid()` for recomputation). Until a trainer
/// calls [`train`](Self::train), nothing is dropped.
///
/// ```
/// use kiln_adapters::DropoutClock;
/// let clock = DropoutClock::new(42);
/// clock.train(true);
/// clock.set(7, 0); // before the first micro-batch of step 7, and before recomputing any of its blocks
/// clock.train(false); // before an evaluation
/// assert!(!clock.is_training());
/// ```
#[derive(Debug, Clone)]
pub struct DropoutClock(Arc<State>);

#[derive(Debug)]
struct State {
    seed: u64,
    step: AtomicU64,
    micro_batch: AtomicU64,
    training: AtomicBool,
}

impl DropoutClock {
    /// A clock at step 0, micro-batch 0, outside training.
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(State {
            seed,
            step: AtomicU64::new(0),
            micro_batch: AtomicU64::new(0),
            training: AtomicBool::new(false),
        }))
    }

    /// Sets the optimizer step and the micro-batch within it.
    pub fn set(&self, step: u64, micro_batch: u64) {
        self.0.step.store(step, Ordering::SeqCst);
        self.0.micro_batch.store(micro_batch, Ordering::SeqCst);
    }

    /// Switches dropout on for training, off for evaluation.
    pub fn train(&self, training: bool) {
        self.0.training.store(training, Ordering::SeqCst);
    }

    /// Whether dropout is on.
    pub fn is_training(&self) -> bool {
        self.0.training.load(Ordering::SeqCst)
    }
}

/// Dropout of one module's input.
///
/// The mask is a function of the clock's seed, step and micro-batch, the module's path and the element's index: whoever
/// computes a block again, later or on another device, drops the same elements.
#[derive(Debug, Clone)]
pub struct Dropout {
    probability: f64,
    slot: u64,
    clock: DropoutClock,
}

impl Dropout {
    /// Drops the share `probability` of the input of the module `path`, whenever `clock` says that this is training.
    ///
    /// # Panics
    /// If `probability` is not from 0 to below 1.
    pub fn new(probability: f64, path: &str, clock: DropoutClock) -> Self {
        assert!(
            (0.0..1.0).contains(&probability),
            "dropout of probability {probability}, not from 0 to below 1"
        );
        Self { probability, slot: path_hash(path), clock }
    }

    /// The share that is dropped in training.
    pub fn probability(&self) -> f64 {
        self.probability
    }

    /// True for the elements to set to zero; `None` if nothing is to be dropped now.
    ///
    /// A bool for each element rather than a factor: a quarter of the memory, and the autodiff graph keeps it. What
    /// remains is to be multiplied by [`compensation`](Self::compensation), wherever that is cheapest.
    pub fn dropped(&self, shape: [usize; 2], device: &Device) -> Option<Tensor<2, Bool>> {
        if self.probability == 0.0 || !self.clock.is_training() {
            return None;
        }
        let mask = self.mask(shape[0] * shape[1]);
        // Outside autodiff, a tensor mixes with those of any autodiff context.
        let device = device.clone().without_autodiff();
        Some(Tensor::from_data(TensorData::new(mask, shape), &device))
    }

    /// `x` with what is dropped now set to zero, and the factor that what remains is to be multiplied by.
    pub(crate) fn apply(&self, x: Tensor<2>) -> (Tensor<2>, f64) {
        match self.dropped(x.dims(), &x.device()) {
            Some(dropped) => (x.mask_fill(dropped, 0.0), self.compensation()),
            None => (x, 1.0),
        }
    }

    /// 1 / (1 - probability), which keeps the expectation.
    pub fn compensation(&self) -> f64 {
        1.0 / (1.0 - self.probability)
    }

    fn mask(&self, count: usize) -> Vec<bool> {
        let State { seed, step, micro_batch, .. } = &*self.clock.0;
        let (step, micro_batch) = (step.load(Ordering::SeqCst), micro_batch.load(Ordering::SeqCst));
        let mut rng = generator(Purpose::Dropout, *seed, self.slot, step, micro_batch);
        let threshold = (self.probability * (u64::from(u32::MAX) + 1) as f64).round() as u64;
        let mut mask = Vec::with_capacity(count);
        let mut bytes = [0; 1 << 12];
        while mask.len() < count {
            rng.fill_bytes(&mut bytes);
            let words = bytes.chunks_exact(4).take(count - mask.len());
            mask.extend(words.map(|w| u64::from(u32::from_le_bytes([w[0], w[1], w[2], w[3]])) < threshold));
        }
        mask
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COUNT: usize = 100_003;

    fn mask(clock: &DropoutClock, path: &str) -> Vec<bool> {
        Dropout::new(0.25, path, clock.clone()).mask(COUNT)
    }

    #[test]
    fn the_mask_depends_on_seed_step_micro_batch_and_path_only() {
        let clock = DropoutClock::new(1);
        clock.set(3, 1);
        let reference = mask(&clock, "layers.0.q_proj");
        clock.set(4, 0);
        let step = mask(&clock, "layers.0.q_proj");
        clock.set(3, 2);
        let micro_batch = mask(&clock, "layers.0.q_proj");
        clock.set(3, 1);
        let path = mask(&clock, "layers.1.q_proj");
        let other = DropoutClock::new(2);
        other.set(3, 1);
        let seed = mask(&other, "layers.0.q_proj");
        for different in [step, micro_batch, path, seed] {
            // Independent masks differ in 2 · 0.25 · 0.75 of the places.
            let share =
                different.iter().zip(&reference).filter(|(a, b)| a != b).count() as f64 / COUNT as f64;
            assert!((share - 0.375).abs() < 0.01, "{share}");
        }
        let resumed = DropoutClock::new(1);
        resumed.set(3, 1);
        assert_eq!(mask(&resumed, "layers.0.q_proj"), reference);
        // A clone is the same clock.
        let clone = resumed.clone();
        clone.set(9, 9);
        assert_ne!(mask(&resumed, "layers.0.q_proj"), reference);
    }

    #[test]
    fn the_rate_is_the_probability() {
        for probability in [0.05, 0.1, 0.5, 0.9] {
            let dropout = Dropout::new(probability, "q_proj", DropoutClock::new(7));
            let dropped = dropout.mask(COUNT).into_iter().filter(|dropped| *dropped).count() as f64;
            let deviation = (COUNT as f64 * probability * (1.0 - probability)).sqrt();
            assert!(
                (dropped - COUNT as f64 * probability).abs() < 4.0 * deviation,
                "{probability}: {dropped}"
            );
        }
    }

    #[test]
    fn the_mean_is_kept() {
        let clock = DropoutClock::new(5);
        clock.train(true);
        let dropout = Dropout::new(0.3, "q_proj", clock.clone());
        let device = Device::flex();
        let x = Tensor::<2>::ones([100, 200], &device);
        let mut sum = 0.0;
        for step in 0..10 {
            clock.set(step, 0);
            let dropped = dropout.dropped([100, 200], &device).unwrap();
            let y = x.clone().mask_fill(dropped, 0.0).mul_scalar(dropout.compensation());
            sum += f64::from(y.mean().into_scalar::<f32>());
        }
        // 200,000 elements of variance p / (1 - p): a standard error of 0.0015.
        assert!((sum / 10.0 - 1.0).abs() < 0.006, "{}", sum / 10.0);
    }

    #[test]
    fn nothing_is_dropped_in_evaluation_or_at_probability_zero() {
        let (clock, device) = (DropoutClock::new(5), Device::flex());
        let dropout = Dropout::new(0.3, "q_proj", clock.clone());
        assert!(dropout.dropped([2, 2], &device).is_none());
        clock.train(true);
        assert!(dropout.dropped([2, 2], &device).is_some());
        assert!(Dropout::new(0.0, "q_proj", clock.clone()).dropped([2, 2], &device).is_none());
        clock.train(false);
        assert!(dropout.dropped([2, 2], &device).is_none());
    }

    #[test]
    #[should_panic(expected = "probability 1")]
    fn everything_can_not_be_dropped() {
        let _ = Dropout::new(1.0, "q_proj", DropoutClock::new(0));
    }
}
