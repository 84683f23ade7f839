//! Which documents are shown as examples.

use super::{Document, Sampler};
use crate::{PythonRandom, error::Problem};

/// Draws examples for one document after another, as the harness does with its one generator a task.
pub(super) struct Examples<'a> {
    pool: &'a [Document],
    shots: usize,
    sampler: Sampler,
    /// Whether the document itself may be in the pool, and must not be shown.
    exclude: bool,
    random: PythonRandom,
}

impl<'a> Examples<'a> {
    pub(super) fn new(
        pool: &'a [Document],
        shots: usize,
        sampler: Sampler,
        exclude: bool,
        seed: u64,
    ) -> Self {
        Self { pool, shots, sampler, exclude, random: PythonRandom::new(seed) }
    }

    /// Places in the pool; `document` is the one to be scored.
    pub(super) fn draw(&mut self, document: &Document) -> Result<Vec<usize>, Problem> {
        let (pool, shots) = (self.pool, self.shots);
        let other = |&place: &usize| !self.exclude || &pool[place] != document;
        if shots == 0 {
            return Ok(Vec::new());
        }
        if self.sampler == Sampler::FirstN {
            let drawn: Vec<usize> = (0..pool.len()).filter(other).take(shots).collect();
            return if drawn.len() == shots { Ok(drawn) } else { Err(self.too_few(drawn.len())) };
        }
        // One more than are shown, in case the document is among them.
        let count = shots + usize::from(self.exclude);
        let drawn = self.random.sample(pool.len(), count).ok_or_else(|| self.too_few(pool.len()))?;
        let drawn: Vec<usize> = drawn.into_iter().filter(other).take(shots).collect();
        if drawn.len() == shots {
            return Ok(drawn);
        }
        // There are copies of the document.
        let rest: Vec<usize> = (0..pool.len()).filter(other).collect();
        let drawn = self.random.sample(rest.len(), shots).ok_or_else(|| self.too_few(rest.len()))?;
        Ok(drawn.into_iter().map(|place| rest[place]).collect())
    }

    fn too_few(&self, found: usize) -> Problem {
        let more = if self.exclude && self.sampler == Sampler::Default { ", and one more" } else { "" };
        Problem::new("few-shot examples", format!("{} documents{more}", self.shots), found)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pool(numbers: &[i64]) -> Vec<Document> {
        numbers.iter().map(|number| json!({"n": number}).as_object().unwrap().clone()).collect()
    }

    fn draw(numbers: &[i64], shots: usize, sampler: Sampler, document: i64) -> Result<Vec<usize>, Problem> {
        Examples::new(&pool(numbers), shots, sampler, true, 1234).draw(&pool(&[document])[0])
    }

    #[test]
    fn the_document_itself_is_not_shown() {
        // random.Random(1234).sample(range(7), 3) is [6, 3, 0].
        let numbers = [0, 1, 2, 3, 4, 5, 6];
        assert_eq!(draw(&numbers, 2, Sampler::Default, 9).unwrap(), [6, 3]);
        assert_eq!(draw(&numbers, 2, Sampler::Default, 6).unwrap(), [3, 0]);
        assert_eq!(draw(&numbers, 2, Sampler::FirstN, 0).unwrap(), [1, 2]);
        // Of three copies two are drawn; then [x for x in pool if x != doc] is drawn from again: Python gives these.
        let drawn = draw(&[6, 1, 2, 6, 4, 5, 6], 2, Sampler::Default, 6).unwrap();
        assert_eq!(drawn, [1, 5]);
    }

    #[test]
    fn too_small_a_pool_is_an_error() {
        assert!(draw(&[0, 1], 2, Sampler::Default, 9).is_err());
        assert!(draw(&[0, 1, 2], 3, Sampler::FirstN, 1).is_err());
        assert!(draw(&[0, 1, 2], 2, Sampler::FirstN, 1).is_ok());
        assert!(draw(&[], 1, Sampler::Default, 1).is_err());
        assert!(draw(&[], 0, Sampler::Default, 1).unwrap().is_empty());
    }
}
