//! Dropout whose mask can be made again.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::{
    module::{Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor},
    tensor::{Device, Tensor},
};
use rand::Rng;

use crate::{
    Place,
    fused::{self, Drops},
    random::{Purpose, generator, path_hash},
};

/// Dropout of one module's input.
///
/// The mask is a function of the seed, the [`Place`] in the training run, the module's path and the element's index
/// ([`Drops`]): whoever computes a block again, later or on another device, drops the same elements, and no mask is kept.
/// Until [`at`](Self::at) tells that this is training, nothing is dropped; trainers call it through
/// [`Projection::at`](crate::Projection::at).
///
/// Clones share their place, those inside clones of a model too (`model.valid()` for recomputation); what
/// [`fork`](Module::fork) makes has its own, so that replicas of a model can train side by side.
///
/// ```
/// use kiln_quant_core::{Dropout, Place};
/// let dropout = Dropout::new(0.5, "up_proj", 42);
/// assert!(dropout.drops().is_none());
/// dropout.at(Place { step: 7, micro_batch: 0, training: true });
/// assert!(dropout.drops().is_some());
/// ```
#[derive(Debug, Clone)]
pub struct Dropout {
    probability: f64,
    path: u64,
    seed: u64,
    now: Arc<Mutex<Now>>,
}

/// Where training stands, and which row of a batch's scored places comes next.
#[derive(Debug, Clone, Copy)]
struct Now {
    place: Place,
    first_row: u64,
}

impl Dropout {
    /// Drops the share `probability` of the input of the module `path` in training.
    ///
    /// # Panics
    /// If `probability` is not from 0 to below 1.
    pub fn new(probability: f64, path: &str, seed: u64) -> Self {
        assert!(
            (0.0..1.0).contains(&probability),
            "dropout of probability {probability}, not from 0 to below 1"
        );
        let place = Place { step: 0, micro_batch: 0, training: false };
        let now = Now { place, first_row: 0 };
        Self { probability, path: path_hash(path), seed, now: Arc::new(Mutex::new(now)) }
    }

    /// Hears where training stands.
    pub fn at(&self, place: Place) {
        self.now().place = place;
    }

    /// Hears which of a batch's rows comes next, where they come a few at a time.
    pub(crate) fn at_row(&self, first: u64) {
        self.now().first_row = first;
    }

    /// The row that comes next.
    pub(crate) fn first_row(&self) -> u64 {
        self.now().first_row
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The share that is dropped in training.
    pub fn probability(&self) -> f64 {
        self.probability
    }

    /// What is dropped now; `None` if nothing is.
    ///
    /// What remains is to be multiplied by [`compensation`](Self::compensation), wherever that is cheapest.
    pub fn drops(&self) -> Option<Drops> {
        let Place { step, micro_batch, training } = self.now().place;
        if self.probability == 0.0 || !training {
            return None;
        }
        let mut rng = generator(Purpose::Dropout, self.seed, self.path, step, micro_batch);
        let key = [rng.next_u32(), rng.next_u32()];
        let threshold = (self.probability * (u64::from(u32::MAX) + 1) as f64).round() as u32;
        Some(Drops { key, threshold })
    }

    /// `x` with what is dropped now set to zero, and the factor that what remains is to be multiplied by.
    pub fn apply(&self, x: Tensor<2>) -> (Tensor<2>, f64) {
        match self.drops() {
            Some(drops) => (fused::dropout(x, drops), self.compensation()),
            None => (x, 1.0),
        }
    }

    /// 1 / (1 - probability), which keeps the expectation.
    pub fn compensation(&self) -> f64 {
        1.0 / (1.0 - self.probability)
    }
}

/// No parameters; a module for the sake of [`fork`](Module::fork).
impl Module for Dropout {
    fn collect_devices(&self, devices: Devices) -> Devices {
        devices
    }

    fn fork(self, _: &Device) -> Self {
        let now = *self.now();
        Self { now: Arc::new(Mutex::new(now)), ..self }
    }

    fn to_device(self, _: &Device) -> Self {
        self
    }

    fn train(self) -> Self {
        self
    }

    fn valid(&self) -> Self {
        self.clone()
    }

    fn materialize(self) -> Self {
        self
    }

    fn visit<V: ModuleVisitor>(&self, _: &mut V) {}

    fn map<M: ModuleMapper>(self, _: &mut M) -> Self {
        self
    }
}

impl ModuleDisplayDefault for Dropout {
    fn content(&self, content: Content) -> Option<Content> {
        content.add("probability", &self.probability).optional()
    }
}

impl ModuleDisplay for Dropout {}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    const COUNT: usize = 100_003;

    fn at(step: u64, micro_batch: u64) -> Place {
        Place { step, micro_batch, training: true }
    }

    fn mask(seed: u64, path: &str, place: Place) -> Vec<bool> {
        let dropout = Dropout::new(0.25, path, seed);
        dropout.at(place);
        dropout.drops().unwrap().mask(COUNT)
    }

    #[test]
    fn the_mask_depends_on_seed_step_micro_batch_and_path_only() {
        let reference = mask(1, "layers.0.q_proj", at(3, 1));
        let others = [
            mask(1, "layers.0.q_proj", at(4, 0)),
            mask(1, "layers.0.q_proj", at(3, 2)),
            mask(1, "layers.1.q_proj", at(3, 1)),
            mask(2, "layers.0.q_proj", at(3, 1)),
        ];
        for different in others {
            // Independent masks differ in 2 · 0.25 · 0.75 of the places.
            let share =
                different.iter().zip(&reference).filter(|(a, b)| a != b).count() as f64 / COUNT as f64;
            assert!((share - 0.375).abs() < 0.01, "{share}");
        }
        assert_eq!(mask(1, "layers.0.q_proj", at(3, 1)), reference);
    }

    #[test]
    fn clones_stand_at_the_same_place() {
        let dropout = Dropout::new(0.25, "q_proj", 1);
        let clone = dropout.clone();
        dropout.at(at(3, 1));
        let read = |dropout: &Dropout| dropout.drops().unwrap();
        let first = read(&clone);
        clone.at(at(9, 9));
        assert_ne!(read(&dropout), first);
        dropout.at(at(3, 1));
        assert_eq!(read(&clone), first);
    }

    #[test]
    fn a_fork_stands_where_it_is_told() {
        let dropout = Dropout::new(0.25, "q_proj", 1);
        dropout.at(at(3, 1));
        let fork = dropout.clone().fork(&Device::flex());
        assert_eq!(fork.drops(), dropout.drops());
        fork.at(at(4, 1));
        assert_eq!(dropout.drops().unwrap().mask(COUNT), mask(1, "q_proj", at(3, 1)));
        assert_eq!(fork.drops().unwrap().mask(COUNT), mask(1, "q_proj", at(4, 1)));
    }

    #[test]
    fn the_rate_is_the_probability() {
        for probability in [0.05, 0.1, 0.5, 0.9] {
            let dropout = Dropout::new(probability, "q_proj", 7);
            dropout.at(at(0, 0));
            let mask = dropout.drops().unwrap().mask(COUNT);
            let dropped = mask.into_iter().filter(|dropped| *dropped).count() as f64;
            let deviation = (COUNT as f64 * probability * (1.0 - probability)).sqrt();
            assert!(
                (dropped - COUNT as f64 * probability).abs() < 4.0 * deviation,
                "{probability}: {dropped}"
            );
        }
    }

    #[test]
    fn the_mean_is_kept() {
        let dropout = Dropout::new(0.3, "q_proj", 5);
        let device = Device::flex();
        let x = Tensor::<2>::ones([100, 200], &device);
        let mut sum = 0.0;
        for step in 0..10 {
            dropout.at(at(step, 0));
            let (y, compensation) = dropout.apply(x.clone());
            sum += f64::from(y.mean().into_scalar::<f32>()) * compensation;
        }
        // 200,000 elements of variance p / (1 - p): a standard error of 0.0015.
        assert!((sum / 10.0 - 1.0).abs() < 0.006, "{}", sum / 10.0);
    }

    #[test]
    fn nothing_is_dropped_in_evaluation_or_at_probability_zero() {
        let dropout = Dropout::new(0.3, "q_proj", 5);
        assert!(dropout.drops().is_none());
        dropout.at(at(0, 0));
        assert!(dropout.drops().is_some());
        dropout.at(Place { training: false, ..at(0, 0) });
        assert!(dropout.drops().is_none());
        let none = Dropout::new(0.0, "q_proj", 5);
        none.at(at(0, 0));
        assert!(none.drops().is_none());
    }

    #[test]
    #[should_panic(expected = "probability 1")]
    fn everything_can_not_be_dropped() {
        let _ = Dropout::new(1.0, "q_proj", 0);
    }
}
