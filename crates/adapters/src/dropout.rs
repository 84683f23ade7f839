//! Dropout whose mask can be made again.

use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::{Bool, Device, Tensor, TensorData};
use kiln_quant_core::Place;
use rand::Rng;

use crate::random::{Purpose, generator, path_hash};

/// Dropout of one module's input.
///
/// The mask is a function of the seed, the [`Place`] in the training run, the module's path and the element's index:
/// whoever computes a block again, later or on another device, drops the same elements. Until [`at`](Self::at) tells
/// that this is training, nothing is dropped; trainers call it through
/// [`Projection::at`](kiln_quant_core::Projection::at).
///
/// Clones share their place, those inside clones of a model too (`model.valid()` for recomputation).
///
/// ```
/// use burn::tensor::Device;
/// use kiln_adapters::Dropout;
/// use kiln_quant_core::Place;
/// let dropout = Dropout::new(0.5, "up_proj", 42);
/// assert!(dropout.dropped([2, 3], &Device::flex()).is_none());
/// dropout.at(Place { step: 7, micro_batch: 0, training: true });
/// assert!(dropout.dropped([2, 3], &Device::flex()).is_some());
/// ```
#[derive(Debug, Clone)]
pub struct Dropout {
    probability: f64,
    path: u64,
    seed: u64,
    place: Arc<Mutex<Place>>,
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
        Self { probability, path: path_hash(path), seed, place: Arc::new(Mutex::new(place)) }
    }

    /// Hears where training stands.
    pub fn at(&self, place: Place) {
        *self.place.lock().unwrap_or_else(PoisonError::into_inner) = place;
    }

    fn place(&self) -> Place {
        *self.place.lock().unwrap_or_else(PoisonError::into_inner)
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
        let place = self.place();
        if self.probability == 0.0 || !place.training {
            return None;
        }
        let mask = self.mask(shape[0] * shape[1], place);
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

    fn mask(&self, count: usize, Place { step, micro_batch, .. }: Place) -> Vec<bool> {
        let mut rng = generator(Purpose::Dropout, self.seed, self.path, step, micro_batch);
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

    fn at(step: u64, micro_batch: u64) -> Place {
        Place { step, micro_batch, training: true }
    }

    fn mask(seed: u64, path: &str, place: Place) -> Vec<bool> {
        Dropout::new(0.25, path, seed).mask(COUNT, place)
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
        let (dropout, device) = (Dropout::new(0.25, "q_proj", 1), Device::flex());
        let clone = dropout.clone();
        dropout.at(at(3, 1));
        let read = |dropout: &Dropout| {
            dropout.dropped([30, 10], &device).unwrap().into_data().iter::<bool>().collect::<Vec<_>>()
        };
        let first = read(&clone);
        clone.at(at(9, 9));
        assert_ne!(read(&dropout), first);
        dropout.at(at(3, 1));
        assert_eq!(read(&clone), first);
    }

    #[test]
    fn the_rate_is_the_probability() {
        for probability in [0.05, 0.1, 0.5, 0.9] {
            let mask = Dropout::new(probability, "q_proj", 7).mask(COUNT, at(0, 0));
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
            let dropped = dropout.dropped([100, 200], &device).unwrap();
            let y = x.clone().mask_fill(dropped, 0.0).mul_scalar(dropout.compensation());
            sum += f64::from(y.mean().into_scalar::<f32>());
        }
        // 200,000 elements of variance p / (1 - p): a standard error of 0.0015.
        assert!((sum / 10.0 - 1.0).abs() < 0.006, "{}", sum / 10.0);
    }

    #[test]
    fn nothing_is_dropped_in_evaluation_or_at_probability_zero() {
        let (dropout, device) = (Dropout::new(0.3, "q_proj", 5), Device::flex());
        assert!(dropout.dropped([2, 2], &device).is_none());
        dropout.at(at(0, 0));
        assert!(dropout.dropped([2, 2], &device).is_some());
        dropout.at(Place { training: false, ..at(0, 0) });
        assert!(dropout.dropped([2, 2], &device).is_none());
        let none = Dropout::new(0.0, "q_proj", 5);
        none.at(at(0, 0));
        assert!(none.dropped([2, 2], &device).is_none());
    }

    #[test]
    #[should_panic(expected = "probability 1")]
    fn everything_can_not_be_dropped() {
        let _ = Dropout::new(1.0, "q_proj", 0);
    }
}
