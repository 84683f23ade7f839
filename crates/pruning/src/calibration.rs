//! The text that importances are measured on.

use kiln_models::TokenBatch;
use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// Windows of one length, without padding. LLM-Pruner takes 10 of 64 tokens for its gradients; Wanda-sp 128 and FLAP
/// 1024 longer ones for their statistics.
///
/// ```
/// use kiln_pruning::Calibration;
/// let ids: Vec<u32> = (0..1000).map(|i| i % 256).collect();
/// let calibration = Calibration::sample(&ids, 10, 64, 42)?;
/// assert_eq!((calibration.windows().len(), calibration.windows()[0].len()), (10, 64));
/// assert!(Calibration::sample(&ids, 10, 128, 42).is_err());
/// # Ok::<(), kiln_pruning::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Calibration {
    windows: Vec<Vec<u32>>,
    rows: usize,
}

/// Windows that go through the model together.
const ROWS: usize = 8;

impl Calibration {
    /// # Errors
    /// [`Error::Calibration`] unless there is at least one window, all have one length, and that is 2 or more.
    pub fn new(windows: Vec<Vec<u32>>) -> Result<Self> {
        let fail =
            |expected: &str, found: String| Err(Error::Calibration { expected: expected.into(), found });
        let Some(first) = windows.first() else { return fail("at least one window", "none".into()) };
        if first.len() < 2 {
            return fail("windows of at least 2 tokens", format!("one of {}", first.len()));
        }
        if let Some(other) = windows.iter().find(|window| window.len() != first.len()) {
            return fail("windows of one length", format!("{} and {} tokens", first.len(), other.len()));
        }
        Ok(Self { windows, rows: ROWS })
    }

    /// `count` windows of `length` tokens that don't overlap, drawn from `ids` by `seed`.
    ///
    /// # Errors
    /// [`Error::Calibration`] if `ids` are too few, or as [`new`](Self::new).
    pub fn sample(ids: &[u32], count: usize, length: usize, seed: u64) -> Result<Self> {
        let expected = || Error::Calibration {
            expected: format!("at least {count} windows of {length} tokens"),
            found: format!("{} tokens", ids.len()),
        };
        if length < 2 || count.checked_mul(length).is_none_or(|needed| needed > ids.len()) {
            return Err(expected());
        }
        let mut starts: Vec<usize> = (0..ids.len() / length).map(|window| window * length).collect();
        starts.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        Self::new(starts[..count].iter().map(|&start| ids[start..start + length].to_vec()).collect())
    }

    /// How many windows go through the model together (default 8); changes memory and rounding only.
    pub fn with_rows(mut self, rows: usize) -> Self {
        self.rows = rows.max(1);
        self
    }

    /// The windows.
    pub fn windows(&self) -> &[Vec<u32>] {
        &self.windows
    }

    /// Tokens of a window.
    pub fn length(&self) -> usize {
        self.windows[0].len()
    }

    /// SHA-256 of the ids, for a checkpoint's record.
    pub fn hash(&self) -> String {
        let mut hash = Sha256::new();
        hash.update((self.length() as u64).to_le_bytes());
        self.windows.iter().flatten().for_each(|id| hash.update(id.to_le_bytes()));
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    pub(crate) fn batches(&self) -> Result<Vec<TokenBatch>> {
        self.windows.chunks(self.rows).map(|rows| Ok(TokenBatch::new(rows)?)).collect()
    }

    /// Fails if the model has no such ids or positions.
    pub(crate) fn check(&self, vocabulary: usize, positions: usize) -> Result<()> {
        if self.length() > positions {
            return Err(Error::Calibration {
                expected: format!("windows of at most {positions} tokens, the model's positions"),
                found: self.length().to_string(),
            });
        }
        match self.windows.iter().flatten().find(|&&id| id as usize >= vocabulary) {
            Some(id) => Err(Error::Calibration {
                expected: format!("ids below {vocabulary}, the vocabulary"),
                found: id.to_string(),
            }),
            None => Ok(()),
        }
    }
}
