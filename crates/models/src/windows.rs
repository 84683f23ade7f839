//! Windows of text that a model is measured on.

use kiln_quant_core::hash::hex;
use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

use crate::{CausalLm, Error, Result, TokenBatch};

/// Token ids in windows of one length, without padding: what calibration, pruning and the search measure a model on.
///
/// ```
/// use kiln_models::Windows;
/// let ids: Vec<u32> = (0..1000).map(|i| i % 256).collect();
/// let windows = Windows::disjoint(&ids, 64, 10, 42)?;
/// assert_eq!((windows.count(), windows.length()), (10, 64));
/// assert!(Windows::disjoint(&ids, 128, 10, 42).is_err());
/// # Ok::<(), kiln_models::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Windows {
    windows: Vec<Vec<u32>>,
    rows: usize,
}

/// Windows that go through a model together.
const ROWS: usize = 8;

/// The ids alone, which is what tells windows apart.
impl std::fmt::Debug for Windows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.windows.fmt(f)
    }
}

fn fail<T>(expected: impl Into<String>, found: impl Into<String>) -> Result<T> {
    Err(Error::Argument { name: "windows".into(), expected: expected.into(), found: found.into() })
}

/// Tokens of so many windows, if the text has them.
fn enough(ids: &[u32], length: usize, count: usize) -> Result<usize> {
    match count.checked_mul(length) {
        Some(needed) if length > 0 && needed <= ids.len() => Ok(needed),
        _ => {
            let expected = format!("a text of at least {count} windows of {length} tokens");
            fail(expected, format!("{} tokens", ids.len()))
        }
    }
}

impl Windows {
    /// Windows as they are.
    ///
    /// # Errors
    /// [`Error::Argument`] unless there is at least one window, all have one length, and that is 2 or more: a single
    /// token has no next one.
    pub fn new(windows: Vec<Vec<u32>>) -> Result<Self> {
        let Some(first) = windows.first() else { return fail("at least one window", "none") };
        if first.len() < 2 {
            return fail("windows of at least 2 tokens", format!("one of {}", first.len()));
        }
        if let Some(other) = windows.iter().find(|window| window.len() != first.len()) {
            return fail("windows of one length", format!("{} and {} tokens", first.len(), other.len()));
        }
        Ok(Self { windows, rows: ROWS })
    }

    /// `count` windows of `length` tokens, each from a uniformly random place of `ids`; they may overlap. Depends on
    /// `seed` only. The published runs of GPTQ and ApiQ take 128 windows of 2048 tokens of WikiText-2's training split.
    ///
    /// # Errors
    /// [`Error::Argument`] if the text is shorter than one window, or as [`new`](Self::new).
    pub fn random(ids: &[u32], length: usize, count: usize, seed: u64) -> Result<Self> {
        let Some(last) = ids.len().checked_sub(length) else {
            let expected = format!("a text of at least one window of {length} tokens");
            return fail(expected, format!("{} tokens", ids.len()));
        };
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let places = last as u128 + 1;
        let mut start = || ((u128::from(rng.next_u64()) * places) >> 64) as usize;
        Self::new((0..count).map(|_| start()).map(|start| ids[start..start + length].to_vec()).collect())
    }

    /// `count` windows of `length` tokens that don't overlap, drawn from `ids` by `seed`. LLM-Pruner takes 10 of 64
    /// tokens for its gradients; Wanda-sp 128 and FLAP 1024 longer ones for their statistics.
    ///
    /// # Errors
    /// [`Error::Argument`] if the text is too short, or as [`new`](Self::new).
    pub fn disjoint(ids: &[u32], length: usize, count: usize, seed: u64) -> Result<Self> {
        enough(ids, length, count)?;
        let mut starts: Vec<usize> = (0..ids.len() / length).map(|window| window * length).collect();
        starts.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        Self::new(starts[..count].iter().map(|&start| ids[start..start + length].to_vec()).collect())
    }

    /// The first `count` windows of `length` tokens, one after another.
    ///
    /// # Errors
    /// [`Error::Argument`] if the text is too short, or as [`new`](Self::new).
    pub fn leading(ids: &[u32], length: usize, count: usize) -> Result<Self> {
        let needed = enough(ids, length, count)?;
        Self::new(ids[..needed].chunks(length).map(<[u32]>::to_vec).collect())
    }

    /// How many windows go through a model together where several may (default 8); changes memory and rounding only.
    #[must_use]
    pub fn with_rows(mut self, rows: usize) -> Self {
        self.rows = rows.max(1);
        self
    }

    /// The first `count` windows, at least one.
    #[must_use]
    pub fn first(&self, count: usize) -> Self {
        let count = count.clamp(1, self.count());
        Self { windows: self.windows[..count].to_vec(), rows: self.rows }
    }

    /// The windows' ids.
    pub fn as_slice(&self) -> &[Vec<u32>] {
        &self.windows
    }

    /// How many windows there are; never 0.
    pub fn count(&self) -> usize {
        self.windows.len()
    }

    /// Tokens of each window.
    pub fn length(&self) -> usize {
        self.windows[0].len()
    }

    /// SHA-256 of length and ids in hexadecimal, for records of what something was measured on.
    pub fn hash(&self) -> String {
        let mut hash = Sha256::new();
        hash.update((self.length() as u64).to_le_bytes());
        self.windows.iter().flatten().for_each(|id| hash.update(id.to_le_bytes()));
        hex(hash.finalize())
    }

    /// Windows of a batch: what [`with_rows`](Self::with_rows) said.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Batches of [`with_rows`](Self::with_rows) windows.
    pub fn batches(&self) -> Vec<TokenBatch> {
        self.batches_of(self.rows)
    }

    /// Batches of `rows` windows, the last of what is left.
    pub fn batches_of(&self, rows: usize) -> Vec<TokenBatch> {
        let batches = self.windows.chunks(rows.max(1)).map(TokenBatch::new);
        batches.map(|batch| batch.expect("windows of one length")).collect()
    }

    /// Fails unless `model` can read the windows.
    ///
    /// # Errors
    /// [`Error::Argument`] for windows longer than its positions, or ids outside its vocabulary.
    pub fn check<M: CausalLm>(&self, model: &M) -> Result<()> {
        let (vocabulary, positions) = (model.vocab_size(), model.max_positions());
        if self.length() > positions {
            let expected = format!("windows of at most {positions} tokens, the model's positions");
            return fail(expected, self.length().to_string());
        }
        match self.windows.iter().flatten().find(|&&id| id as usize >= vocabulary) {
            Some(id) => fail(format!("ids below {vocabulary}, the vocabulary"), id.to_string()),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(windows: Result<Windows>, parts: &[&str]) {
        let error = windows.unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }

    #[test]
    fn every_place_may_be_chosen_and_the_seed_decides() {
        let ids: Vec<u32> = (0..12).collect();
        let windows = Windows::random(&ids, 10, 60, 1).unwrap();
        assert!(windows.as_slice().iter().all(|window| window[9] == window[0] + 9));
        let mut starts: Vec<u32> = windows.as_slice().iter().map(|window| window[0]).collect();
        starts.sort_unstable();
        starts.dedup();
        assert_eq!(starts, [0, 1, 2]);
        assert_eq!(windows, Windows::random(&ids, 10, 60, 1).unwrap());
        assert_ne!(windows, Windows::random(&ids, 10, 60, 2).unwrap());
    }

    #[test]
    fn disjoint_windows_share_no_token() {
        let ids: Vec<u32> = (0..100).collect();
        let windows = Windows::disjoint(&ids, 16, 6, 1).unwrap();
        let mut all = windows.as_slice().concat();
        all.sort_unstable();
        assert_eq!(all, (0..96).collect::<Vec<u32>>());
        assert_ne!(windows, Windows::disjoint(&ids, 16, 6, 2).unwrap());
    }

    #[test]
    fn texts_that_are_too_short_and_ragged_windows_are_refused() {
        refused(Windows::new(vec![]), &["at least one window"]);
        refused(Windows::new(vec![vec![1]]), &["at least 2 tokens"]);
        refused(Windows::new(vec![vec![1, 2], vec![1, 2, 3]]), &["one length", "2 and 3"]);
        refused(Windows::random(&[1, 2, 3], 4, 1, 0), &["one window of 4", "3 tokens"]);
        refused(Windows::random(&[1, 2, 3], 2, 0, 0), &["at least one window"]);
        refused(Windows::random(&[1, 2, 3], 0, 1, 0), &["at least 2 tokens"]);
        refused(Windows::disjoint(&[1; 639], 64, 10, 0), &["at least 10 windows of 64", "639 tokens"]);
        refused(Windows::disjoint(&[1; 639], 64, usize::MAX, 0), &["639 tokens"]);
        refused(Windows::disjoint(&[1; 639], 64, 0, 0), &["at least one window"]);
        assert_eq!(Windows::random(&[1, 2, 3, 4], 4, 1, 0).unwrap().as_slice(), [[1, 2, 3, 4]]);
    }

    #[test]
    fn batches_hold_all_windows_in_order() {
        let windows = Windows::new((0..5).map(|i| vec![i, i + 10]).collect()).unwrap().with_rows(2);
        let batches = windows.batches();
        assert_eq!(batches.iter().map(|batch| batch.batch).collect::<Vec<_>>(), [2, 2, 1]);
        let ids: Vec<u32> = batches.into_iter().flat_map(|batch| batch.ids).collect();
        assert_eq!(ids, windows.as_slice().concat());
        assert_eq!(windows.first(3).as_slice(), &windows.as_slice()[..3]);
        let leading = Windows::leading(&windows.as_slice().concat(), 2, 3).unwrap();
        assert_eq!(leading.as_slice(), windows.first(3).as_slice());
        refused(Windows::leading(&[1, 2, 3], 2, 2), &["2 windows of 2 tokens", "3 tokens"]);
    }
}
