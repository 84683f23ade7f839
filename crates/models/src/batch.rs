//! Token ids with what attention must know about them.

use crate::{Error, Result};

/// Rows of token ids, all of one length, in host memory.
///
/// A token sees the earlier tokens of its row that have the same segment. Segment 0 is padding by convention;
/// 1, 2, .. are the documents packed into a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenBatch {
    /// Ids, `[batch, length]` row-major.
    pub ids: Vec<u32>,
    /// Position of each token in its document.
    pub positions: Vec<u32>,
    /// Segment of each token.
    pub segments: Vec<u32>,
    /// Rows.
    pub batch: usize,
    /// Tokens in a row.
    pub length: usize,
}

impl TokenBatch {
    /// Rows of equal length without padding.
    ///
    /// # Errors
    /// If there is no token, or rows differ in length.
    pub fn new(rows: &[Vec<u32>]) -> Result<Self> {
        let length = rows.first().map_or(0, Vec::len);
        if let Some(row) = rows.iter().find(|row| row.len() != length || length == 0) {
            return Err(Error::Argument {
                name: "rows".into(),
                expected: "rows of one length, at least one token".into(),
                found: format!("a row of {} tokens beside one of {length}", row.len()),
            });
        }
        Self::masked(rows.concat(), vec![1; rows.len() * length], rows.len(), length)
    }

    /// Rows with an attention mask (`1` for real tokens, `0` for padding on either side); positions count real tokens.
    ///
    /// # Errors
    /// If ids or mask don't hold `batch * length` values, or there are none.
    pub fn masked(ids: Vec<u32>, mask: Vec<u32>, batch: usize, length: usize) -> Result<Self> {
        if ids.is_empty() || ids.len() != batch * length || mask.len() != ids.len() {
            return Err(Error::Argument {
                name: "ids and attention mask".into(),
                expected: format!("{batch} rows of {length} tokens, at least one"),
                found: format!("{} ids and {} mask values", ids.len(), mask.len()),
            });
        }
        let mut positions = Vec::with_capacity(ids.len());
        for row in mask.chunks_exact(length) {
            let mut next = 0;
            positions.extend(row.iter().map(|&real| {
                let position = next;
                next += u32::from(real != 0);
                position
            }));
        }
        let segments = mask.into_iter().map(|real| u32::from(real != 0)).collect();
        Ok(Self { ids, positions, segments, batch, length })
    }

    /// One row that continues a sequence at `position`.
    pub fn continuing(ids: Vec<u32>, position: u32) -> Self {
        let length = ids.len();
        let positions = (position..).take(length).collect();
        Self { segments: vec![1; length], ids, positions, batch: 1, length }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_count_from_the_first_real_token() {
        let batch = TokenBatch::masked(vec![9; 8], vec![0, 0, 1, 1, 1, 1, 0, 0], 2, 4).unwrap();
        assert_eq!(batch.positions, [0, 0, 0, 1, 0, 1, 2, 2]);
        assert_eq!(batch.segments, [0, 0, 1, 1, 1, 1, 0, 0]);
    }

    #[test]
    fn ragged_or_empty_rows_are_refused() {
        assert!(TokenBatch::new(&[vec![1, 2], vec![3]]).is_err());
        assert!(TokenBatch::new(&[]).is_err());
        assert!(TokenBatch::new(&[vec![]]).is_err());
    }
}
