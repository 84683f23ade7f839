//! Numbered things that ranks share, with sums whose bits don't depend on the number of ranks.

use std::{fmt, ops::Range, sync::Arc};

use crate::{Alone, Communicator, Error, Number, PairwiseSum, Result, agreed, gathered, share, sum};

/// Who shares a work on numbered things, and in how many parts its sums are made; by default one rank, in one part.
#[derive(Debug, Clone)]
pub struct Sharing {
    ranks: Arc<dyn Communicator>,
    parts: usize,
}

impl Default for Sharing {
    fn default() -> Self {
        Self { ranks: Arc::new(Alone), parts: 1 }
    }
}

impl Sharing {
    /// `ranks`, at most as many as `parts`. What comes out depends on `parts`, as sums do in their last bits, and not on how
    /// many ranks there are.
    pub fn new(ranks: Arc<dyn Communicator>, parts: usize) -> Self {
        Self { ranks, parts }
    }

    /// The ranks.
    pub fn ranks(&self) -> &dyn Communicator {
        &*self.ranks
    }

    /// The number of parts.
    pub fn parts(&self) -> usize {
        self.parts
    }

    /// `count` things, shared.
    ///
    /// # Errors
    /// [`Error::Argument`] for fewer parts than ranks, or more than things. All ranks must give the same.
    pub fn of(&self, count: usize) -> Result<Shares> {
        let (size, parts) = (self.ranks.size(), self.parts);
        // One part may be empty: there is nothing to share then.
        if (size..=count.max(1)).contains(&parts) && parts > 0 {
            return Ok(Shares { sharing: self.clone(), count });
        }
        Err(Error::Argument {
            name: "parts".into(),
            expected: format!("from {size}, the number of ranks, to {count}, the number of things to share"),
            found: parts.to_string(),
        })
    }
}

/// Numbered things, such as calibration windows, of which each rank has consecutive ones.
///
/// Sums over all of them are made one thing after another within each of as many consecutive parts as [`Sharing`] says, and
/// then of the parts in pairs. Each rank has whole parts.
///
/// ```
/// use std::sync::Arc;
/// use kiln_distributed::{Alone, Error, Sharing};
///
/// let things = [0.5, 1.5, 2.0, 4.0, 8.0];
/// let shares = Sharing::new(Arc::new(Alone), 2).of(things.len())?;
/// assert_eq!(shares.own(), 0..5);
/// let own = shares.partial_sums(|part| Ok::<_, Error>(vec![things[part].iter().sum::<f64>()]), |mut a, b| {
///     a[0] += b[0];
///     a
/// });
/// assert_eq!(shares.sum(own, 1)?, [16.0]);
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Shares {
    sharing: Sharing,
    count: usize,
}

impl Shares {
    /// The ranks.
    pub fn ranks(&self) -> &dyn Communicator {
        self.sharing.ranks()
    }

    /// How many things there are.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The things of a rank.
    ///
    /// # Panics
    /// If there is no such rank.
    pub fn of(&self, rank: usize) -> Range<usize> {
        let parts = share(self.sharing.parts, rank, self.ranks().size());
        share(self.count, parts.start, self.sharing.parts).start
            ..share(self.count, parts.end - 1, self.sharing.parts).end
    }

    /// The things of this rank.
    pub fn own(&self) -> Range<usize> {
        self.of(self.ranks().rank())
    }

    /// What `of_part` makes of each of this rank's parts, added up as far as it goes here.
    ///
    /// # Errors
    /// The first of `of_part`.
    pub fn partial_sums<T, E>(
        &self,
        mut of_part: impl FnMut(Range<usize>) -> std::result::Result<T, E>,
        mut add: impl FnMut(T, T) -> T,
    ) -> std::result::Result<PairwiseSum<T>, E> {
        let parts = share(self.sharing.parts, self.ranks().rank(), self.ranks().size());
        let mut sums = PairwiseSum::new(parts.start);
        for part in parts {
            sums.push(of_part(share(self.count, part, self.sharing.parts))?, &mut add);
        }
        Ok(sums)
    }

    /// The sum of all ranks' parts, each of `length` values, at all ranks; an error of one is an error of all.
    ///
    /// # Errors
    /// As [`sum`] and [`agreed`].
    pub fn sum<T: Number, E: fmt::Display + From<Error>>(
        &self,
        own: std::result::Result<PairwiseSum<Vec<T>>, E>,
        length: usize,
    ) -> std::result::Result<Vec<T>, E> {
        let own = agreed(self.ranks(), own)?;
        Ok(sum(self.ranks(), own, self.sharing.parts, length)?)
    }

    /// The numbers that ranks found of their things, in the things' order; an error of one is an error of all.
    ///
    /// # Errors
    /// As [`gathered`].
    pub fn in_order<E: fmt::Display + From<Error>>(
        &self,
        own: std::result::Result<Vec<f64>, E>,
    ) -> std::result::Result<Vec<f64>, E> {
        let (_, all) = gathered(self.ranks(), own, |found| bytemuck::cast_slice(found).to_vec())?;
        let numbers =
            |bytes: Vec<u8>| bytes.chunks_exact(8).map(bytemuck::pod_read_unaligned).collect::<Vec<f64>>();
        Ok(all.into_iter().flat_map(numbers).collect())
    }
}
