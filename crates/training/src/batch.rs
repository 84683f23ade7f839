//! Batches of examples in an order that a small cursor describes exactly, so that a resumed run sees the same ones.

use std::borrow::Cow;
use std::sync::Arc;

use kiln_models::{Targets, TokenBatch};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::data::{Dataset, Example};
use crate::error::{Problem, Result};

/// The order in which an epoch visits the examples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Order {
    /// A permutation that depends on seed and epoch only.
    #[default]
    Shuffled,
    /// The file's order in every epoch.
    Consecutive,
}

/// How examples become batches.
///
/// | name | default | purpose | range |
/// | --- | --- | --- | --- |
/// | `batch` | required | rows of a batch | at least 1 |
/// | `packing` | false | several examples in one row | |
/// | `order` | shuffled | order of the examples in an epoch | |
/// | `group_by_length` | false | rows of like length side by side, so that there is less padding: of a shuffled epoch every 50 batches, or a quarter of it if that is fewer, are sorted, the longest first | with shuffling, without packing |
/// | `seed` | 0 | of the permutations | |
/// | `pad_id` | 0 | id at positions without a token; never seen by other positions | below the vocabulary's size |
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct BatchOptions {
    /// Rows of a batch.
    pub batch: usize,
    /// Whether a row holds several examples.
    pub packing: bool,
    /// Order of the examples in an epoch.
    pub order: Order,
    /// Whether rows of like length stand side by side.
    #[serde(default)]
    pub group_by_length: bool,
    /// Seed of the permutations.
    pub seed: u64,
    /// The id at positions without a token.
    pub pad_id: u32,
}

impl BatchOptions {
    /// `batch` rows, each with one example, shuffled with seed 0.
    pub fn new(batch: usize) -> Self {
        Self { batch, packing: false, order: Order::default(), group_by_length: false, seed: 0, pad_id: 0 }
    }

    /// Sets `packing`.
    #[must_use]
    pub fn with_packing(mut self, packing: bool) -> Self {
        self.packing = packing;
        self
    }

    /// Sets `order`.
    #[must_use]
    pub fn with_order(mut self, order: Order) -> Self {
        self.order = order;
        self
    }

    /// Sets `group_by_length`.
    #[must_use]
    pub fn with_group_by_length(mut self, group_by_length: bool) -> Self {
        self.group_by_length = group_by_length;
        self
    }

    /// Sets `seed`.
    #[must_use]
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Sets `pad_id`.
    #[must_use]
    pub fn with_pad_id(mut self, pad_id: u32) -> Self {
        self.pad_id = pad_id;
        self
    }

    fn validate(&self, dataset: &Dataset) -> Result<()> {
        check_size(self.batch, dataset)?;
        check_pad(self.pad_id, dataset)?;
        let fail = |name: &str, expected: &str| Err(Problem::new(name, expected, true).argument());
        if self.packing && self.group_by_length {
            return fail("group_by_length", "false, with packing: packed rows are all of one length");
        }
        if self.order == Order::Consecutive && self.group_by_length {
            return fail("group_by_length", "false, in the file's order");
        }
        if self.packing && (dataset.is_pairs() || dataset.has_labels()) {
            return fail("packing", "false, for answers that are compared: each has a row");
        }
        Ok(())
    }
}

/// Rows of a batch; the rest as [`BatchOptions::new`] has it.
impl From<usize> for BatchOptions {
    fn from(batch: usize) -> Self {
        Self::new(batch)
    }
}

/// Where [`Batches`] stands: the next batch begins with row `position` of `epoch`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cursor {
    /// Seed of the permutations.
    pub seed: u64,
    /// Epoch, counted from 0.
    pub epoch: u64,
    /// Rows of the epoch that were served.
    pub position: usize,
}

/// Rows of tokens with the targets of a loss, as models and [`token_nll`](kiln_models::token_nll) take them.
///
/// Rows are as long as the longest of them needs, or, when packing, as the data set's `seq_len`. Positions count from 0
/// within an example. Segments number the examples of a row from 1; padding is in segment 0. A pair is two rows.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Batch {
    /// Ids, positions and segments.
    pub tokens: TokenBatch,
    /// The id that follows each position in its segment; 0 at a segment's last position and for padding. Of texts with
    /// classes the class at the last position.
    pub targets: Vec<u32>,
    /// Whether predicting the target is learned; false wherever there is no target.
    pub scored: Vec<bool>,
    /// Which examples these are, in the order of their places.
    pub examples: Vec<Placed>,
}

/// An example of a [`Batch`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Placed {
    /// Its number in the data set.
    pub index: usize,
    /// Its targets that are learned.
    pub targets: usize,
    /// Its weight.
    pub weight: f32,
    /// Its label.
    pub label: Option<bool>,
    /// Its class or number.
    pub value: Option<f32>,
}

impl Batch {
    /// Number of targets that are learned: what a sum of losses is divided by.
    pub fn target_count(&self) -> usize {
        self.scored.iter().filter(|scored| **scored).count()
    }

    /// What the model should have said.
    pub fn as_targets(&self) -> Targets<'_> {
        Targets { ids: &self.targets, scored: &self.scored }
    }

    fn padding(batch: usize, length: usize, pad_id: u32) -> Self {
        let size = batch * length;
        let (ids, positions, segments) = (vec![pad_id; size], vec![0; size], vec![0; size]);
        let tokens = TokenBatch { ids, positions, segments, batch, length };
        Self { tokens, targets: vec![0; size], scored: vec![false; size], examples: Vec::new() }
    }

    /// `rows` of examples and their numbers, each at least `min_width` and as long as the longest needs.
    fn assemble(rows: &[Vec<(usize, Cow<'_, Example>)>], min_width: usize, pad_id: u32) -> Self {
        let length =
            |row: &Vec<(usize, Cow<'_, Example>)>| row.iter().map(|(_, e)| e.ids.len()).sum::<usize>();
        let width = rows.iter().map(length).max().unwrap_or(0).max(min_width);
        let mut batch = Self::padding(rows.len(), width, pad_id);
        for (index, row) in rows.iter().enumerate() {
            let mut start = index * width;
            for (segment, (index, example)) in (1..).zip(row) {
                batch.place(start, segment, example);
                let (index, targets) = (*index, example.targets());
                let Example { weight, label, value, .. } = **example;
                batch.examples.push(Placed { index, targets, weight, label, value });
                start += example.ids.len();
            }
        }
        batch
    }

    /// The weight of each place, where it isn't 1 everywhere.
    pub(crate) fn weights(&self, dataset: &Dataset) -> Option<Vec<f32>> {
        if !dataset.has_weights() {
            return None;
        }
        let mut of_examples =
            self.examples.iter().flat_map(|placed| std::iter::repeat_n(placed.weight, placed.targets));
        Some(
            self.scored
                .iter()
                .map(|scored| if *scored { of_examples.next().unwrap_or(0.0) } else { 0.0 })
                .collect(),
        )
    }

    /// The number of each place that is scored, of data for a regression.
    pub(crate) fn numbers(&self) -> Vec<f32> {
        let mut values = self.examples.iter().filter_map(|placed| placed.value);
        self.scored.iter().map(|scored| if *scored { values.next().unwrap_or(0.0) } else { 0.0 }).collect()
    }

    /// The sum of the learned targets' weights.
    pub(crate) fn total_weight(&self) -> f64 {
        self.examples.iter().map(|placed| f64::from(placed.weight) * placed.targets as f64).sum()
    }

    /// The same prompts with one another's answers: of each example the answer of the one before it, of the first that of
    /// the last. As TRL makes them for KTO.
    ///
    /// # Errors
    /// A file of tokens that can't be read.
    pub(crate) fn mismatched(&self, dataset: &Dataset) -> Result<Self> {
        let examples = self.examples.iter().map(|placed| dataset.example(placed.index));
        let examples = examples.collect::<Result<Vec<_>>>()?;
        let split = |index: usize| {
            let ids = &examples[index].ids;
            ids.split_at(examples[index].first_target().unwrap_or(ids.len()))
        };
        let rows = (0..examples.len()).map(|index| {
            let before = index.checked_sub(1).unwrap_or(examples.len() - 1);
            let mut mixed = Example::answer(split(index).0, split(before).1);
            let length = mixed.ids.len().min(dataset.options().seq_len);
            mixed.ids.truncate(length);
            mixed.scored.truncate(length);
            vec![(self.examples[index].index, Cow::Owned(mixed))]
        });
        Ok(Self::assemble(&rows.collect::<Vec<_>>(), 0, 0))
    }

    fn place(&mut self, start: usize, segment: u32, example: &Example) {
        let length = example.ids.len();
        let all = start..start + length;
        self.tokens.ids[all.clone()].copy_from_slice(&example.ids);
        self.tokens.segments[all.clone()].fill(segment);
        for (position, index) in self.tokens.positions[all].iter_mut().zip(0..) {
            *position = index;
        }
        if let Some(value) = example.value {
            // Of a number that is no class nobody asks.
            self.targets[start + length - 1] = value as u32;
            self.scored[start + length - 1] = true;
            return;
        }
        let predicting = start..start + length - 1;
        self.targets[predicting.clone()].copy_from_slice(&example.ids[1..]);
        self.scored[predicting].copy_from_slice(&example.scored[1..]);
    }
}

/// An endless iterator over batches of exactly `batch` rows (of pairs twice as many); the rows that an epoch's end leaves
/// over are served together with the first ones of the next epoch.
///
/// A row is one example, padded on the right, or, with `packing`, as many as fit: each epoch's examples are placed, in
/// the epoch's order, in the first row that has room (first fit).
///
/// ```
/// use std::sync::Arc;
/// use kiln_training::{BatchOptions, Batches, DataOptions, Dataset};
///
/// let data = Arc::new(Dataset::from_ids((0..40).collect(), &DataOptions::new(8, 64))?);
/// let mut batches = Batches::new(data.clone(), BatchOptions::new(2))?;
/// batches.next_batch()?;
/// let mut resumed = Batches::resume(data, BatchOptions::new(2), batches.cursor())?;
/// assert_eq!(resumed.next_batch()?, batches.next_batch()?);
/// # Ok::<(), kiln_training::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Batches {
    dataset: Arc<Dataset>,
    options: BatchOptions,
    cursor: Cursor,
    rows: EpochRows,
}

/// The rows of an epoch: units of the data set, one a row or as many as fit.
#[derive(Debug, Clone)]
struct EpochRows {
    units: Vec<u32>,
    /// Where each packed row ends in `units`.
    ends: Option<Vec<u32>>,
}

impl EpochRows {
    fn len(&self) -> usize {
        self.ends.as_ref().map_or(self.units.len(), Vec::len)
    }

    fn get(&self, row: usize) -> &[u32] {
        match &self.ends {
            None => &self.units[row..=row],
            Some(ends) => {
                let start = row.checked_sub(1).map_or(0, |before| ends[before]);
                &self.units[start as usize..ends[row] as usize]
            }
        }
    }
}

impl Batches {
    /// Starts at the first row of epoch 0.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) for options out of range.
    pub fn new(dataset: Arc<Dataset>, options: BatchOptions) -> Result<Self> {
        let cursor = Cursor { seed: options.seed, epoch: 0, position: 0 };
        Self::resume(dataset, options, cursor)
    }

    /// Goes on where `cursor` was taken, with the same data and options.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) for options out of range and for a cursor of another seed or beyond
    /// the epoch's rows.
    pub fn resume(dataset: Arc<Dataset>, options: BatchOptions, cursor: Cursor) -> Result<Self> {
        options.validate(&dataset)?;
        if cursor.seed != options.seed {
            return Err(Problem::new("cursor.seed", options.seed.to_string(), cursor.seed).argument());
        }
        let rows = epoch_rows(&dataset, &options, cursor.epoch);
        if cursor.position > rows.len() {
            let expected = format!("at most the epoch's {} rows", rows.len());
            return Err(Problem::new("cursor.position", expected, cursor.position).argument());
        }
        Ok(Self { dataset, options, cursor, rows })
    }

    /// Where the next batch begins.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// Rows of the current epoch; with packing and shuffling, epochs may differ.
    pub fn rows_in_epoch(&self) -> usize {
        self.rows.len()
    }
}

impl Batches {
    /// The next batch; there is always one.
    ///
    /// # Errors
    /// A file of tokens that can't be read; the cursor stays where it was.
    pub fn next_batch(&mut self) -> Result<Batch> {
        let before = self.cursor;
        let batch = self.read_batch();
        if batch.is_err() {
            self.cursor = before;
            self.rows = epoch_rows(&self.dataset, &self.options, before.epoch);
        }
        batch
    }

    fn read_batch(&mut self) -> Result<Batch> {
        let dataset = self.dataset.clone();
        let mut rows = Vec::with_capacity(self.options.batch);
        for _ in 0..self.options.batch {
            if self.cursor.position >= self.rows.len() {
                self.cursor.epoch = self.cursor.epoch.wrapping_add(1);
                self.cursor.position = 0;
                self.rows = epoch_rows(&dataset, &self.options, self.cursor.epoch);
            }
            let units = self.rows.get(self.cursor.position).iter();
            let examples = units.flat_map(|unit| dataset.unit(*unit as usize));
            let examples = examples.map(|index| Ok((index, dataset.example(index)?)));
            let examples = examples.collect::<Result<Vec<_>>>()?;
            // The sides of a pair have a row each.
            match dataset.is_pairs() {
                true => rows.extend(examples.into_iter().map(|example| vec![example])),
                false => rows.push(examples),
            }
            self.cursor.position += 1;
        }
        let min_width = if self.options.packing { dataset.options().seq_len } else { 0 };
        Ok(Batch::assemble(&rows, min_width, self.options.pad_id))
    }
}

impl Iterator for Batches {
    type Item = Result<Batch>;

    /// The next batch; never `None`.
    fn next(&mut self) -> Option<Result<Batch>> {
        Some(self.next_batch())
    }
}

/// Rows that `epochs` passes over the data have; packed rows differ from one pass to the next.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) for options out of range.
pub(crate) fn rows_in(dataset: &Dataset, options: &BatchOptions, epochs: u64) -> Result<u64> {
    options.validate(dataset)?;
    if !options.packing {
        return Ok(epochs.saturating_mul(dataset.units_in_epoch() as u64));
    }
    Ok((0..epochs).map(|epoch| epoch_rows(dataset, options, epoch).len() as u64).sum())
}

/// One pass over the data in the file's order, for evaluation: one example a row, of pairs both, the last batch may have
/// fewer rows. A batch is an error where the examples are in a file of tokens that can't be read.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) for `batch` 0 and a padding id outside the vocabulary.
pub fn in_order(dataset: &Dataset, batch: usize, pad_id: u32) -> Result<impl Iterator<Item = Result<Batch>>> {
    check_size(batch, dataset)?;
    check_pad(pad_id, dataset)?;
    let units = dataset.units();
    Ok((0..units).step_by(batch).map(move |start| {
        let end = (start + batch).min(units);
        let rows = (dataset.unit(start).start..dataset.unit(end - 1).end)
            .map(|index| Ok(vec![(index, dataset.example(index)?)]));
        Ok(Batch::assemble(&rows.collect::<Result<Vec<_>>>()?, 0, pad_id))
    }))
}

fn check_size(batch: usize, dataset: &Dataset) -> Result<()> {
    // Positions and targets are u32; a larger batch is a mistake, and its buffers would be allocated.
    let size = batch.checked_mul(dataset.options().seq_len).filter(|size| u32::try_from(*size).is_ok());
    if batch == 0 || size.is_none() {
        return Err(Problem::new("batch", "at least 1 row and fewer than 2^32 tokens", batch).argument());
    }
    Ok(())
}

fn check_pad(pad_id: u32, dataset: &Dataset) -> Result<()> {
    let vocab_size = dataset.options().vocab_size;
    if pad_id as usize >= vocab_size {
        return Err(Problem::new("pad_id", format!("an id below {vocab_size}"), pad_id).argument());
    }
    Ok(())
}

/// The rows of an epoch: a function of the data, the options and the epoch only.
fn epoch_rows(dataset: &Dataset, options: &BatchOptions, epoch: u64) -> EpochRows {
    /// Batches that are sorted together at most.
    const SORTED: usize = 50;
    let mut units = match options.order {
        Order::Consecutive => dataset.units_of(epoch, None),
        Order::Shuffled => {
            let units = dataset.units_of(epoch, Some(options.seed));
            permutation(units.len(), options.seed, epoch)
                .into_iter()
                .map(|place| units[place as usize])
                .collect()
        }
    };
    let tokens = |unit: &u32| dataset.unit_tokens(*unit as usize);
    if options.group_by_length {
        let batches = (units.len() / (4 * options.batch)).clamp(1, SORTED);
        for units in units.chunks_mut(options.batch.saturating_mul(batches)) {
            units.sort_by_key(|unit| std::cmp::Reverse(tokens(unit)));
        }
    }
    if !options.packing {
        return EpochRows { units, ends: None };
    }
    let lengths: Vec<usize> = units.iter().map(tokens).collect();
    let rows = first_fit(&lengths, dataset.options().seq_len);
    let mut ends = Vec::with_capacity(rows.len());
    let mut packed = Vec::with_capacity(units.len());
    for row in rows {
        packed.extend(row.into_iter().map(|index| units[index]));
        ends.push(packed.len() as u32);
    }
    EpochRows { units: packed, ends: Some(ends) }
}

/// Fisher–Yates with a generator keyed by seed and epoch. Written out, because a run must be resumable by a build with
/// another version of the random-number library.
///
/// `length` is below 2³².
pub(crate) fn permutation(length: usize, seed: u64, epoch: u64) -> Vec<u32> {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&epoch.to_le_bytes());
    let mut random = ChaCha8Rng::from_seed(key);
    let mut order: Vec<u32> = (0..length as u32).collect();
    for last in (1..length).rev() {
        // The high half of the product is uniform up to length / 2^64.
        let chosen = (u128::from(random.next_u64()) * (last as u128 + 1)) >> 64;
        order.swap(last, chosen as usize);
    }
    order
}

/// Puts each item in the first row with room for it; rows hold indices into `lengths`, none of which is above
/// `capacity`.
///
/// A tree whose nodes hold the most room below them finds that row in logarithmic time.
fn first_fit(lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    let leaves = lengths.len().next_power_of_two();
    let mut room = vec![capacity; 2 * leaves];
    let mut rows = Vec::new();
    for (item, length) in lengths.iter().enumerate() {
        let mut node = 1;
        while node < leaves {
            node *= 2;
            if room[node] < *length {
                node += 1;
            }
        }
        room[node] -= length;
        let row = node - leaves;
        if row == rows.len() {
            rows.push(Vec::new());
        }
        rows[row].push(item);
        while node > 1 {
            node /= 2;
            room[node] = room[2 * node].max(room[2 * node + 1]);
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::data::DataOptions;

    /// Examples of the given lengths whose ids are all different; of each the second token is learned, and of the later
    /// ones those whose id isn't a multiple of 3.
    fn dataset(lengths: &[usize], seq_len: usize) -> Arc<Dataset> {
        let mut next = 1;
        let examples = lengths.iter().map(|length| {
            let ids: Vec<u32> = (next..).take(*length).collect();
            next += *length as u32;
            let scored = ids.iter().enumerate().map(|(index, id)| index == 1 || id % 3 != 0).collect();
            Example::new(ids, scored)
        });
        Arc::new(
            Dataset::from_examples(examples.collect::<Vec<_>>(), &DataOptions::new(seq_len, 1 << 20))
                .unwrap(),
        )
    }

    fn options(batch: usize, packing: bool, order: Order) -> BatchOptions {
        BatchOptions::new(batch).with_packing(packing).with_order(order).with_seed(5)
    }

    #[test]
    fn rows_are_padded_on_the_right_to_the_longest() {
        let data = dataset(&[3, 5], 8);
        let batch = Batches::new(data, options(2, false, Order::Consecutive)).unwrap().next_batch().unwrap();
        assert_eq!((batch.tokens.batch, batch.tokens.length), (2, 5));
        assert_eq!(batch.tokens.ids, [1, 2, 3, 0, 0, 4, 5, 6, 7, 8]);
        assert_eq!(batch.tokens.positions, [0, 1, 2, 0, 0, 0, 1, 2, 3, 4]);
        assert_eq!(batch.tokens.segments, [1, 1, 1, 0, 0, 1, 1, 1, 1, 1]);
        assert_eq!(batch.targets, [2, 3, 0, 0, 0, 5, 6, 7, 8, 0]);
        let scored = batch.scored.iter().map(|scored| u8::from(*scored)).collect::<Vec<_>>();
        assert_eq!(scored, [1, 0, 0, 0, 0, 1, 0, 1, 1, 0]);
        assert_eq!(batch.target_count(), 4);
    }

    #[test]
    fn packed_rows_restart_positions_and_never_predict_across_examples() {
        let data = dataset(&[3, 4, 2, 2], 6);
        let batch = Batches::new(data, options(2, true, Order::Consecutive)).unwrap().next_batch().unwrap();
        assert_eq!(batch.tokens.length, 6);
        assert_eq!(batch.tokens.ids, [1, 2, 3, 8, 9, 0, 4, 5, 6, 7, 10, 11]);
        assert_eq!(batch.tokens.positions, [0, 1, 2, 0, 1, 0, 0, 1, 2, 3, 0, 1]);
        assert_eq!(batch.tokens.segments, [1, 1, 1, 2, 2, 0, 1, 1, 1, 1, 2, 2]);
        assert_eq!(batch.targets, [2, 3, 0, 9, 0, 0, 5, 6, 7, 0, 11, 0]);
        let scored = batch.scored.iter().map(|scored| u8::from(*scored)).collect::<Vec<_>>();
        assert_eq!(scored, [1, 0, 0, 1, 0, 0, 1, 0, 1, 0, 1, 0]);
    }

    #[test]
    fn an_epoch_visits_every_example_once_and_the_next_in_another_order() {
        let data = dataset(&[2; 50], 4);
        let mut batches = Batches::new(data, options(10, false, Order::Shuffled)).unwrap();
        let mut epoch = || -> Vec<u32> {
            batches
                .by_ref()
                .take(5)
                .flat_map(|b| b.unwrap().tokens.ids.chunks(2).map(|row| row[0]).collect::<Vec<_>>())
                .collect()
        };
        let (first, second) = (epoch(), epoch());
        assert_ne!(first, second);
        for mut ids in [first, second] {
            assert!(!ids.is_sorted());
            ids.sort_unstable();
            assert_eq!(ids, (0..50).map(|i| 2 * i + 1).collect::<Vec<u32>>());
        }
        assert_eq!(batches.cursor(), Cursor { seed: 5, epoch: 1, position: 50 });
    }

    #[test]
    fn batches_cross_the_end_of_an_epoch() {
        let data = dataset(&[2; 3], 4);
        let mut batches = Batches::new(data, options(2, false, Order::Consecutive)).unwrap();
        let firsts: Vec<_> =
            batches.by_ref().take(3).map(|b| b.unwrap().tokens.ids).map(|ids| (ids[0], ids[2])).collect();
        assert_eq!(firsts, [(1, 3), (5, 1), (3, 5)]);
        assert_eq!(batches.cursor(), Cursor { seed: 5, epoch: 1, position: 3 });
        let mut one_large = Batches::new(dataset(&[2; 3], 4), options(8, false, Order::Shuffled)).unwrap();
        assert_eq!(one_large.next_batch().unwrap().tokens.batch, 8);
        assert_eq!(one_large.cursor(), Cursor { seed: 5, epoch: 2, position: 2 });
    }

    #[test]
    fn permutations_depend_on_seed_and_epoch_only() {
        assert_eq!(permutation(100, 1, 2), permutation(100, 1, 2));
        assert_ne!(permutation(100, 1, 2), permutation(100, 2, 1));
        assert_ne!(permutation(100, 1, 2), permutation(100, 1, 3));
        assert_eq!(permutation(1, 0, 0), [0]);
    }

    /// Each of the 6 orders of 3 comes up 1,000 times in 6,000 on average; 150 is five standard deviations.
    #[test]
    fn permutations_are_uniform() {
        let mut counts = std::collections::BTreeMap::new();
        for epoch in 0..6_000 {
            *counts.entry(permutation(3, 9, epoch)).or_insert(0_i32) += 1;
        }
        assert_eq!(counts.len(), 6);
        assert!(counts.values().all(|count| (count - 1_000).abs() < 150), "{counts:?}");
    }

    #[test]
    fn rows_of_like_length_stand_together() {
        let lengths: Vec<usize> = (0..64).map(|i| 2 + i * 37 % 29).collect();
        let data = dataset(&lengths, 32);
        let padding = |options: BatchOptions| {
            let mut batches = Batches::new(data.clone(), options).unwrap();
            let batches: Vec<Batch> = (0..16).map(|_| batches.next_batch().unwrap()).collect();
            let mut seen: Vec<usize> =
                batches.iter().flat_map(|batch| &batch.examples).map(|placed| placed.index).collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..64).collect::<Vec<_>>(), "an epoch has every example once");
            batches
                .iter()
                .map(|batch| batch.tokens.segments.iter().filter(|s| **s == 0).count())
                .sum::<usize>()
        };
        let shuffled = options(4, false, Order::Shuffled);
        assert!(padding(shuffled.clone().with_group_by_length(true)) * 2 < padding(shuffled.clone()));
        for wrong in [shuffled.with_packing(true), options(4, false, Order::Consecutive)] {
            assert!(Batches::new(data.clone(), wrong.with_group_by_length(true)).is_err());
        }
    }

    #[test]
    fn one_pass_in_order_ends_with_a_short_batch() {
        let data = dataset(&[2, 4, 3], 4);
        let batches: Vec<_> = in_order(&data, 2, 9).unwrap().map(|batch| batch.unwrap()).collect();
        assert_eq!(
            batches.iter().map(|b| (b.tokens.batch, b.tokens.length)).collect::<Vec<_>>(),
            [(2, 4), (1, 3)]
        );
        assert_eq!(batches[0].tokens.ids, [1, 2, 9, 9, 3, 4, 5, 6]);
        let targets: usize = batches.iter().map(Batch::target_count).sum();
        assert_eq!(targets, data.report().targets);
    }

    #[test]
    fn options_and_cursors_out_of_range_are_named() {
        let data = dataset(&[2, 2], 4);
        let cases = [
            ("batch", options(0, false, Order::Shuffled)),
            ("batch", options(usize::MAX, false, Order::Shuffled)),
            ("batch", options(1 << 40, true, Order::Shuffled)),
            ("pad_id", BatchOptions { pad_id: 1 << 20, ..options(1, false, Order::Shuffled) }),
        ];
        for (name, options) in cases {
            let error = Batches::new(data.clone(), options).unwrap_err().to_string();
            assert!(error.starts_with(name), "{error}");
        }
        assert!(in_order(&data, 0, 0).is_err());
        for (name, cursor) in [
            ("cursor.seed", Cursor { seed: 6, epoch: 0, position: 0 }),
            ("cursor.position", Cursor { seed: 5, epoch: 0, position: 3 }),
        ] {
            let error =
                Batches::resume(data.clone(), options(1, false, Order::Shuffled), cursor).unwrap_err();
            assert!(error.to_string().starts_with(name), "{error}");
        }
    }

    #[test]
    fn the_last_epoch_that_can_be_counted_is_followed_by_the_first() {
        let far = Cursor { seed: 5, epoch: u64::MAX, position: 1 };
        let mut batches =
            Batches::resume(dataset(&[2, 2], 4), options(1, true, Order::Shuffled), far).unwrap();
        assert_eq!(batches.next_batch().unwrap().target_count(), 2);
        assert_eq!(batches.cursor(), Cursor { seed: 5, epoch: 0, position: 1 });
    }

    /// First fit as its definition says, in quadratic time.
    fn first_fit_by_definition(lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
        let mut rows: Vec<(usize, Vec<usize>)> = Vec::new();
        for (item, length) in lengths.iter().enumerate() {
            match rows.iter_mut().find(|(used, _)| used + length <= capacity) {
                Some((used, row)) => {
                    *used += length;
                    row.push(item);
                }
                None => rows.push((*length, vec![item])),
            }
        }
        rows.into_iter().map(|(_, row)| row).collect()
    }

    #[test]
    fn rows_of_epochs_are_those_that_batches_serve() {
        let data = dataset(&[2, 3, 4, 5, 6, 7, 2, 3], 8);
        for packing in [false, true] {
            let options = options(1, packing, Order::Shuffled);
            let mut batches = Batches::new(data.clone(), options.clone()).unwrap();
            let mut count = 0;
            while batches.cursor().epoch < 3 {
                batches.next();
                count += 1;
            }
            // The batch that begins the fourth epoch.
            count -= 1;
            assert_eq!(rows_in(&data, &options, 3).unwrap(), count, "{packing}");
        }
    }

    proptest! {
        #[test]
        fn packing_is_first_fit(lengths in prop::collection::vec(1usize..=16, 0..80)) {
            prop_assert_eq!(first_fit(&lengths, 16), first_fit_by_definition(&lengths, 16));
        }

        #[test]
        fn a_saved_cursor_gives_the_same_batches(
            lengths in prop::collection::vec(2usize..9, 1..30), batch in 1usize..7, served in 0usize..20,
            packing: bool, shuffled: bool,
        ) {
            let data = dataset(&lengths, 8);
            let order = if shuffled { Order::Shuffled } else { Order::Consecutive };
            let options = options(batch, packing, order);
            let mut batches = Batches::new(data.clone(), options.clone()).unwrap();
            batches.by_ref().take(served).for_each(drop);
            let saved = serde_json::to_string(&batches.cursor()).unwrap();
            let mut resumed = Batches::resume(data, options, serde_json::from_str(&saved).unwrap()).unwrap();
            for _ in 0..10 {
                prop_assert_eq!(resumed.next_batch().unwrap(), batches.next_batch().unwrap());
                prop_assert_eq!(resumed.cursor(), batches.cursor());
            }
        }

        #[test]
        fn every_target_is_the_next_token_of_its_own_example(
            lengths in prop::collection::vec(2usize..9, 1..30), packing: bool,
        ) {
            let data = dataset(&lengths, 8);
            let mut batches = Batches::new(data.clone(), options(1, packing, Order::Shuffled)).unwrap();
            let mut seen = Vec::new();
            let mut targets = 0;
            for _ in 0..batches.rows_in_epoch() {
                let row = batches.next_batch().unwrap();
                targets += row.target_count();
                for t in 0..row.tokens.length {
                    if row.tokens.segments[t] == 0 {
                        prop_assert_eq!((row.tokens.ids[t], row.tokens.positions[t], row.scored[t]), (0, 0, false));
                        continue;
                    }
                    seen.push(row.tokens.ids[t]);
                    let same = row.tokens.segments.get(t + 1) == Some(&row.tokens.segments[t]);
                    if same {
                        prop_assert_eq!(row.targets[t], row.tokens.ids[t + 1]);
                        prop_assert_eq!(row.tokens.positions[t + 1], row.tokens.positions[t] + 1);
                        prop_assert_eq!(row.scored[t], row.tokens.positions[t] == 0 || !row.targets[t].is_multiple_of(3));
                    } else {
                        prop_assert!(!row.scored[t]);
                    }
                    if t == 0 || row.tokens.segments[t - 1] != row.tokens.segments[t] {
                        prop_assert_eq!(row.tokens.positions[t], 0);
                    }
                }
            }
            seen.sort_unstable();
            let all: Vec<u32> = data.examples().flat_map(|example| example.unwrap().ids.clone()).collect();
            prop_assert_eq!(seen, all);
            prop_assert_eq!(targets, data.report().targets);
        }
    }
}
