//! Sums whose bits don't depend on how their terms are dealt to ranks.

use crate::{Communicator, Error, Result, share};

/// A sum of numbered terms, added in pairs, pairs of pairs and so on: terms 2i and 2i + 1 first. Which additions are made
/// depends on the terms' numbers only. So ranks may add up consecutive terms each and their results after that
/// ([`sum`]): the bits are those of one rank that had all terms. At most one partial sum for each power of two is held.
///
/// ```
/// use kiln_distributed::PairwiseSum;
/// let add = |a: String, b: String| format!("({a} + {b})");
/// let mut sum = PairwiseSum::new(0);
/// for index in 0..5 {
///     sum.push(index.to_string(), add);
/// }
/// assert_eq!(sum.finish(add).unwrap(), "(((0 + 1) + (2 + 3)) + 4)");
/// ```
#[derive(Debug, Clone)]
pub struct PairwiseSum<T> {
    nodes: Vec<Node<T>>,
    next: usize,
}

/// The sum of `size` terms from `start` on; `size` is a power of two that divides `start`.
#[derive(Debug, Clone)]
struct Node<T> {
    start: usize,
    size: usize,
    value: T,
}

impl<T> PairwiseSum<T> {
    /// A sum whose first term here has the number `first`.
    pub fn new(first: usize) -> Self {
        Self { nodes: Vec::new(), next: first }
    }

    /// Adds the next term.
    pub fn push(&mut self, term: T, add: impl FnMut(T, T) -> T) {
        self.push_node(1, term, add);
    }

    /// Adds the sum of the next `size` terms.
    fn push_node(&mut self, size: usize, value: T, mut add: impl FnMut(T, T) -> T) {
        let mut node = Node { start: self.next, size, value };
        self.next += size;
        while let Some(before) =
            self.nodes.pop_if(|before| before.size == node.size && before.start.is_multiple_of(2 * node.size))
        {
            node = Node { start: before.start, size: 2 * node.size, value: add(before.value, node.value) };
        }
        self.nodes.push(node);
    }

    /// The sum of all terms, `None` if there are none.
    pub fn finish(mut self, mut add: impl FnMut(T, T) -> T) -> Option<T> {
        let mut sum = self.nodes.pop()?.value;
        while let Some(before) = self.nodes.pop() {
            sum = add(before.value, sum);
        }
        Some(sum)
    }

    /// The same partial sums in another form.
    ///
    /// # Errors
    /// The first of `f`.
    pub fn try_map<U, E>(
        self,
        mut f: impl FnMut(T) -> std::result::Result<U, E>,
    ) -> std::result::Result<PairwiseSum<U>, E> {
        let nodes = self.nodes.into_iter();
        let nodes = nodes.map(|Node { start, size, value }| Ok(Node { start, size, value: f(value)? }));
        Ok(PairwiseSum { nodes: nodes.collect::<std::result::Result<_, E>>()?, next: self.next })
    }
}

/// Sizes of the partial sums that terms with these numbers come to.
fn node_sizes(numbers: std::ops::Range<usize>) -> Vec<usize> {
    let mut sum = PairwiseSum::new(numbers.start);
    numbers.for_each(|_| sum.push((), |(), ()| ()));
    sum.nodes.iter().map(|node| node.size).collect()
}

/// A number that ranks add up: `f32` or `f64`.
pub trait Number: bytemuck::Pod + std::ops::AddAssign {}

impl Number for f32 {}
impl Number for f64 {}

/// Values of a partial sum that are on their way at once, for each rank.
const AT_ONCE: usize = 1 << 22;

/// Bytes that any engine takes at once: MPI counts by 32 bits.
const MOST_BYTES: usize = 1 << 30;

/// The sum over the terms of all ranks, at all ranks, value by value: `own` has those that [`share`] deals to this one of
/// `terms`, each of `length` values.
///
/// Every rank adds up a part of the values for all, so that each sends and receives about 2 (n - 1) / n times the
/// sum's bytes, times the number of its partial sums, which is 1 where terms a rank are a power of two.
///
/// Values go as they are in memory: all ranks are machines of one byte order.
///
/// A term that has nothing to say of a value gives -0.0, which adds nothing to any number, not even to -0.0.
///
/// # Errors
/// As [`Communicator::all_to_all`]; [`Error::Argument`] for partial sums of other lengths, or of other terms, of which the
/// other ranks hear nothing.
pub fn sum<T: Number>(
    ranks: &dyn Communicator,
    own: PairwiseSum<Vec<T>>,
    terms: usize,
    length: usize,
) -> Result<Vec<T>> {
    let size = ranks.size();
    let sizes: Vec<Vec<usize>> = (0..size).map(|rank| node_sizes(share(terms, rank, size))).collect();
    check(&own, &sizes[ranks.rank()], length)?;
    if size == 1 {
        return Ok(own.finish(added).unwrap_or_else(|| vec![T::zeroed(); length]));
    }
    let partial_sums = sizes.iter().map(Vec::len).max().unwrap_or(1).max(1);
    let at_once = (AT_ONCE * size).min(MOST_BYTES / size_of::<T>() / partial_sums).max(1);
    let mut all = Vec::with_capacity(length);
    for start in (0..length).step_by(at_once) {
        let count = at_once.min(length - start);
        let slice = |rank: usize| {
            let share = share(count, rank, size);
            start + share.start..start + share.end
        };
        let parts = (0..size).map(|rank| {
            let slices = own.nodes.iter().map(|node| bytemuck::cast_slice(&node.value[slice(rank)]));
            slices.collect::<Vec<&[u8]>>().concat()
        });
        let found = ranks.all_to_all(parts.collect())?;
        let width = slice(ranks.rank()).len();
        let mut sum = PairwiseSum::new(0);
        for (rank, bytes) in found.iter().enumerate() {
            let values = numbers(bytes, width * sizes[rank].len(), rank)?;
            for (index, size) in sizes[rank].iter().enumerate() {
                sum.push_node(*size, values[index * width..][..width].to_vec(), added);
            }
        }
        let sum = sum.finish(added).unwrap_or_else(|| vec![T::zeroed(); width]);
        for (rank, bytes) in ranks.all_gather(bytemuck::cast_slice(&sum).to_vec())?.iter().enumerate() {
            all.extend(numbers::<T>(bytes, slice(rank).len(), rank)?);
        }
    }
    Ok(all)
}

/// `a + b`, value by value; both have as many.
pub fn added<T: Number>(mut a: Vec<T>, b: Vec<T>) -> Vec<T> {
    a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
    a
}

fn check<T>(own: &PairwiseSum<Vec<T>>, sizes: &[usize], length: usize) -> Result<()> {
    let found: Vec<usize> = own.nodes.iter().map(|node| node.size).collect();
    if found != sizes {
        return Err(Error::Argument {
            name: "terms".into(),
            expected: format!("sums of {sizes:?} terms, as this rank is dealt"),
            found: format!("{found:?}"),
        });
    }
    match own.nodes.iter().find(|node| node.value.len() != length) {
        Some(node) => Err(Error::Argument {
            name: "terms".into(),
            expected: format!("{length} values"),
            found: node.value.len().to_string(),
        }),
        None => Ok(()),
    }
}

fn numbers<T: Number>(bytes: &[u8], count: usize, rank: usize) -> Result<Vec<T>> {
    if bytes.len() != size_of::<T>() * count {
        return Err(Error::Different {
            rank,
            name: "length of the sum".into(),
            expected: format!("{} bytes", size_of::<T>() * count),
            found: bytes.len().to_string(),
        });
    }
    Ok(bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect())
}
