//! Several sets as one, each with its share of every epoch.

use std::{ops::Range, sync::OnceLock};

use super::{DataReport, Dataset, store::Store, values::Values};
use crate::{
    batch::permutation,
    error::{Problem, Result},
};

/// A part of a mixture.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Part {
    /// Its units among all.
    units: Range<usize>,
    /// How many of them an epoch has.
    per_epoch: usize,
}

impl Part {
    /// Its units of an epoch: the next ones of an endless stream that goes through the part again and again, `seed` saying in
    /// which order; without it, in its own.
    pub(crate) fn of_epoch(&self, epoch: u64, seed: Option<u64>) -> Vec<u32> {
        let count = self.units.len() as u64;
        let (mut pass, mut order) = (None, Vec::new());
        let first = epoch.wrapping_mul(self.per_epoch as u64);
        (first..first + self.per_epoch as u64)
            .map(|place| {
                if pass != Some(place / count) {
                    pass = Some(place / count);
                    order = match seed {
                        // Another seed than the epoch's own shuffle, and another for each part.
                        Some(seed) => {
                            permutation(self.units.len(), !seed ^ self.units.start as u64, place / count)
                        }
                        None => (0..self.units.len() as u32).collect(),
                    };
                }
                self.units.start as u32 + order[(place % count) as usize]
            })
            .collect()
    }
}

impl Dataset {
    /// Several sets, of which an epoch has shares in proportion to their weights: as many examples as no set
    /// has to be gone through twice for. Of a set that isn't used up, the following epochs have the rest first; where that ends
    /// within an epoch, an example may come twice in it.
    ///
    /// ```
    /// use kiln_training::{DataOptions, Dataset};
    /// let ids = |count| Dataset::from_ids((0..count).collect(), &DataOptions::new(10, 1000));
    /// // 30 and 100 examples: all of the first, and 10 of the second, in every epoch.
    /// let mixed = Dataset::mixture([(ids(300)?, 3.0), (ids(1000)?, 1.0)])?;
    /// assert_eq!(mixed.units_in_epoch(), 40);
    /// # Ok::<(), kiln_training::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) for no set, a mixture among them, a weight that isn't finite and above 0, shares of less than an
    /// example, or sets of different forms or vocabularies.
    pub fn mixture(parts: impl IntoIterator<Item = (Self, f64)>) -> Result<Self> {
        let (sets, weights): (Vec<Self>, Vec<f64>) = parts.into_iter().unzip();
        let Some(first) = sets.first() else {
            return Err(Problem::new("mixture", "at least one data set", "none").argument());
        };
        if let Some(other) = sets.iter().find(|set| set.options.classes != first.options.classes) {
            let expected = format!("sets with the same classes, {:?}", first.options.classes);
            return Err(Problem::new("mixture", expected, format!("{:?}", other.options.classes)).argument());
        }
        if let Some(weight) = weights.iter().find(|weight| !(weight.is_finite() && **weight > 0.0)) {
            return Err(Problem::new("mixture.weight", "a finite number above 0", weight).argument());
        }
        if sets.iter().any(|set| set.parts.is_some()) {
            return Err(Problem::new("mixture", "sets that are no mixtures themselves", "one").argument());
        }
        let kind = |set: &Self| (set.is_pairs, set.has_labels, set.has_values(), set.options.vocab_size);
        if let Some(other) = sets.iter().find(|set| kind(set) != kind(first)) {
            let name = |set: &Self| {
                let (pairs, labels, values, vocabulary) = kind(set);
                format!("pairs: {pairs}, labels: {labels}, classes or numbers: {values}, {vocabulary} ids")
            };
            return Err(
                Problem::new("mixture", format!("sets of one form, {}", name(first)), name(other)).argument()
            );
        }
        let per_weight = sets
            .iter()
            .zip(&weights)
            .map(|(set, weight)| set.units() as f64 / weight)
            .fold(f64::INFINITY, f64::min);
        let (mut report, mut found, mut start) = (DataReport::default(), Vec::new(), 0);
        for (set, weight) in sets.iter().zip(&weights) {
            // A little more, against rounding: 3 of 30 are 10.
            let per_epoch = (per_weight * weight + 1e-9) as usize;
            if per_epoch == 0 {
                let expected = "weights that leave each set an example of an epoch";
                return Err(Problem::new("mixture.weight", expected, weight).argument());
            }
            found.push(Part { units: start..start + set.units(), per_epoch: per_epoch.min(set.units()) });
            start += set.units();
            report.add(&set.report);
        }
        let mut options = first.options.clone();
        options.seq_len = sets.iter().map(|set| set.options.seq_len).max().unwrap_or(options.seq_len);
        let (is_pairs, has_labels) = (first.is_pairs, first.has_labels);
        let has_weights = sets.iter().any(|set| set.has_weights);
        let values = sets.iter().filter_map(|set| set.values).reduce(Values::joined);
        let store = Store::joined(sets.into_iter().map(|set| set.store).collect());
        let (parts, fingerprint) = (Some(found), OnceLock::new());
        Ok(Self { store, is_pairs, has_weights, has_labels, values, options, report, parts, fingerprint })
    }

    /// Pairs or examples that an epoch has: all, or, of a mixture, the parts' shares.
    pub fn units_in_epoch(&self) -> usize {
        match &self.parts {
            Some(parts) => parts.iter().map(|part| part.per_epoch).sum(),
            None => self.units(),
        }
    }

    /// The units of an epoch; `seed` says from which end of a mixture's parts they are taken.
    pub(crate) fn units_of(&self, epoch: u64, seed: Option<u64>) -> Vec<u32> {
        match &self.parts {
            Some(parts) => parts.iter().flat_map(|part| part.of_epoch(epoch, seed)).collect(),
            None => (0..self.units() as u32).collect(),
        }
    }
}
