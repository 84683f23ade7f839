//! Long texts, piece by piece.
//!
//! The library keeps a hundred bytes and more for each byte of the text that it works on, and some patterns take time in
//! the square of it. So a text is given to it in pieces that overlap. A piece's beginning and end may be tokenised otherwise
//! than they would be in the whole; where two pieces agree on a stretch of their overlap, what lies before and behind no
//! longer matters, and in its middle they are joined. Where they don't agree, the piece is made longer, at last to the end.

use std::{ops::Range, time::Duration};

use super::{Tokenizer, error};
use crate::{Result, patience::Patience};

/// Bytes of a piece. Shorter texts are tokenised at once.
pub(super) const PIECE: usize = 32 << 10;
/// Bytes that a piece has in common with the next one.
const OVERLAP: usize = 1 << 10;
/// What two pieces must agree on: bytes and tokens.
const AGREED: (usize, usize) = (256, 16);

/// An id with the bytes of the text that it stands for.
type Token = (u32, Range<usize>);

/// Hands the tokens of `text`, without special ones around it, to `put`.
pub(super) fn encode(tokenizer: &Tokenizer, text: &str, mut put: impl FnMut(Token)) -> Result<()> {
    let limit = Duration::from_secs(1) + Duration::from_micros(4 * text.len() as u64);
    let mut patience = Patience::new(limit);
    let mut encode = |range: Range<usize>| -> Result<Vec<Token>> {
        if patience.is_over() {
            let size = text.len();
            return Err(error(format!("expected a text of {size} bytes to take less than {limit:?}")));
        }
        let tokens = tokenizer.encode_whole(&text[range.clone()])?;
        Ok(tokens.into_iter().map(|(id, at)| (id, at.start + range.start..at.end + range.start)).collect())
    };
    let end_of = |begin: usize, size: usize| ceil(text, begin.saturating_add(size).min(text.len()));
    let mut piece = 0..end_of(0, PIECE);
    let mut tokens = encode(piece.clone())?;
    while piece.end < text.len() {
        let begin = ceil(text, piece.end - OVERLAP);
        let next = begin..end_of(begin, PIECE);
        let following = encode(next.clone())?;
        match joint(&tokens, &following, begin) {
            Some((left, right)) => {
                tokens.drain(..left).for_each(&mut put);
                tokens = following;
                tokens.drain(..right);
                piece = next;
            }
            None => {
                // What was put before ended where `tokens` begins, or at the piece's own beginning.
                let done = tokens.first().map_or(piece.start, |(_, at)| at.start);
                let longer = piece.start..end_of(piece.start, 2 * piece.len());
                tokens = encode(longer.clone())?;
                let kept = tokens.iter().position(|(_, at)| at.start >= done).unwrap_or(tokens.len());
                if piece.start > 0 {
                    tokens.drain(..kept);
                }
                piece = longer;
            }
        }
    }
    tokens.into_iter().for_each(put);
    Ok(())
}

/// The first place that isn't within a character.
fn ceil(text: &str, mut place: usize) -> usize {
    while !text.is_char_boundary(place) {
        place += 1;
    }
    place
}

/// How many of the tokens come from the first piece, and how many of the second's are left out, where both agree from `begin`
/// on.
fn joint(first: &[Token], second: &[Token], begin: usize) -> Option<(usize, usize)> {
    let (mut left, mut right) = (first.partition_point(|(_, at)| at.start < begin), 0);
    let mut run = 0;
    while let (Some(a), Some(b)) = (first.get(left), second.get(right)) {
        if a == b {
            run += 1;
            (left, right) = (left + 1, right + 1);
            let from = &first[left - run].1;
            if run >= AGREED.1 && a.1.end - from.start >= AGREED.0 {
                // Not between the tokens of one character.
                let mut back = run / 2;
                while back + 1 < run && first[left - back].1.start < first[left - back - 1].1.end {
                    back += 1;
                }
                return Some((left - back, right - back));
            }
            continue;
        }
        run = 0;
        match a.1.start <= b.1.start {
            true => left += 1,
            false => right += 1,
        }
    }
    None
}
