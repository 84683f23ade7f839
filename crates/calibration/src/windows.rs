//! Calibration windows from a text.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{Error, Result};

/// `count` windows of `length` tokens, each from a uniformly random place of `ids`; they may overlap. Depends on `seed`
/// only. The published runs take 128 windows of 2048 tokens of WikiText-2's training split.
///
/// # Errors
/// [`Error::Argument`] if the text is shorter than one window, or there are no windows.
///
/// ```
/// let ids: Vec<u32> = (0..100).collect();
/// let windows = kiln_calibration::random_windows(&ids, 16, 3, 2)?;
/// assert_eq!(windows.len(), 3);
/// assert!(windows.iter().all(|window| window.len() == 16 && window[15] == window[0] + 15));
/// # Ok::<(), kiln_calibration::Error>(())
/// ```
pub fn random_windows(ids: &[u32], length: usize, count: usize, seed: u64) -> Result<Vec<Vec<u32>>> {
    if length == 0 || count == 0 {
        let found = format!("{count} of {length} tokens");
        return Err(Error::argument("calibration windows", "at least one, of at least one token", found));
    }
    let Some(last) = ids.len().checked_sub(length) else {
        let expected = format!("at least one window of {length} tokens");
        return Err(Error::argument("calibration text", expected, format!("{} tokens", ids.len())));
    };
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let places = last as u128 + 1;
    let mut start = || ((u128::from(rng.next_u64()) * places) >> 64) as usize;
    Ok((0..count).map(|_| start()).map(|start| ids[start..start + length].to_vec()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_may_be_chosen_and_the_seed_decides() {
        let ids: Vec<u32> = (0..12).collect();
        let windows = random_windows(&ids, 10, 60, 1).unwrap();
        let mut starts: Vec<u32> = windows.iter().map(|window| window[0]).collect();
        starts.sort_unstable();
        starts.dedup();
        assert_eq!(starts, [0, 1, 2]);
        assert_eq!(windows, random_windows(&ids, 10, 60, 1).unwrap());
        assert_ne!(windows, random_windows(&ids, 10, 60, 2).unwrap());
    }

    #[test]
    fn a_text_shorter_than_one_window_is_refused() {
        let error = random_windows(&[1, 2, 3], 4, 1, 0).unwrap_err().to_string();
        assert!(error.contains("calibration text") && error.contains("3 tokens"), "{error}");
        assert_eq!(random_windows(&[1, 2, 3, 4], 4, 1, 0).unwrap(), [[1, 2, 3, 4]]);
        assert!(random_windows(&[1, 2, 3], 0, 1, 0).is_err());
        assert!(random_windows(&[1, 2, 3], 2, 0, 0).is_err());
    }
}
