//! Methods at equal numbers of trained values.

use crate::{
    Method, Pooling, QBara, QaBlora, QaHira, QaLora, Result,
    json_fields::Problem,
    methods::{divisors, list},
};

/// A method with the rank that brings it nearest to a budget.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Parity {
    /// The method.
    pub method: Method,
    /// The nominal rank to configure.
    pub r: usize,
    /// What it trains.
    pub parameters: usize,
    /// What was asked for.
    pub budget: usize,
}

impl Parity {
    fn new(method: Method, r: usize, shapes: &[[usize; 2]], budget: usize) -> Self {
        Self { method, r, parameters: method.parameters(shapes, r), budget }
    }

    /// Trained values over the budget.
    pub fn ratio(&self) -> f64 {
        self.parameters as f64 / self.budget as f64
    }
}

/// Chooses the numbers of each method so that they train as many values as LoRA of one rank does.
///
/// ```
/// use kiln_adapters::ParityBudget;
/// // q, k, v, o of one block, as [d_input, d_output].
/// let budget = ParityBudget::of_lora(&[[4096, 4096]; 4], 64)?;
/// assert_eq!(budget.parameters(), 4 * 64 * 8192);
/// // Tiles of 8 outputs × 4 inputs: the shape of the released code.
/// let choice = budget.qa_hira([4, 8])?;
/// assert_eq!(choice.ratio(), 1.0);
/// # Ok::<(), kiln_adapters::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct ParityBudget {
    shapes: Vec<[usize; 2]>,
    r: usize,
    budget: usize,
}

impl ParityBudget {
    /// As many values as LoRA of rank `r` has beside linears of `shapes` `[d_input, d_output]`.
    ///
    /// # Errors
    /// No shapes, a size of 0, or a rank of 0.
    pub fn of_lora(shapes: &[[usize; 2]], r: usize) -> Result<Self> {
        if shapes.is_empty() || r == 0 || shapes.iter().flatten().any(|size| *size == 0) {
            let expected = "at least one linear layer, and sizes and rank of at least 1";
            return Err(Problem::new("budget", expected, format!("rank {r} of {shapes:?}")).argument());
        }
        let budget = Method::lora().parameters(shapes, r);
        Ok(Self { shapes: shapes.to_vec(), r, budget })
    }

    /// The number of values.
    pub fn parameters(&self) -> usize {
        self.budget
    }

    /// The largest sizes that divide all inputs and all outputs.
    fn common(&self) -> [usize; 2] {
        [0, 1].map(|axis| self.shapes.iter().fold(0, |common, shape| gcd(common, shape[axis])))
    }

    /// Q-BaRA: the budget exactly, for any λ that divides all inputs and outputs.
    ///
    /// # Errors
    /// Another λ; the message lists those that divide.
    pub fn q_bara(&self, lambda: usize) -> Result<Parity> {
        let [inputs, outputs] = self.common();
        fits("lambda", lambda, gcd(inputs, outputs))?;
        Ok(Parity::new(Method::QBara(QBara { lambda }), self.r, &self.shapes, self.budget))
    }

    /// QA-LoRA with groups of `pool` inputs: the rank nearest to the budget, the same for all layers.
    ///
    /// # Errors
    /// A `pool` that doesn't divide all inputs.
    pub fn qa_lora(&self, pool: usize, pooling: Pooling) -> Result<Parity> {
        fits("pool", pool, self.common()[0])?;
        let method = Method::QaLora(QaLora { pool, pooling });
        let r = self.nearest_rank(method.parameters(&self.shapes, 1));
        Ok(Parity::new(method, r, &self.shapes, self.budget))
    }

    /// QA-BLoRA with `pool` and `repeat`: the stored rank nearest to the budget, the same for all layers.
    ///
    /// # Errors
    /// Sizes that don't divide all inputs and outputs.
    pub fn qa_blora(&self, pool: usize, repeat: usize) -> Result<Parity> {
        let [inputs, outputs] = self.common();
        fits("pool", pool, inputs)?;
        fits("repeat", repeat, outputs)?;
        let of_rank = |rank| Method::QaBlora(QaBlora { pool, repeat, rank: Some(rank) });
        let rank = self.nearest_rank(of_rank(1).parameters(&self.shapes, 1));
        Ok(Parity::new(of_rank(rank), self.r, &self.shapes, self.budget))
    }

    /// QA-HiRA for a base with blocks of `[inputs, outputs]`: among the multiples p and q of the blocks that divide all
    /// inputs and outputs, those nearest to the budget (as a ratio); at equal distance those with the largest rank
    /// bounds, then those with the smaller p.
    ///
    /// # Errors
    /// Blocks that don't divide all inputs and outputs.
    pub fn qa_hira(&self, [inputs, outputs]: [usize; 2]) -> Result<Parity> {
        let common = self.common();
        fits("block inputs", inputs, common[0])?;
        fits("block outputs", outputs, common[1])?;
        let sizes =
            |block: usize, common: usize| divisors(common / block).into_iter().map(move |d| d * block);
        let choices = sizes(inputs, common[0])
            .flat_map(|pool| sizes(outputs, common[1]).map(move |repeat| (pool, repeat)))
            .map(|(pool, repeat)| {
                let method = Method::QaHira(QaHira { pool, repeat, ..QaHira::default() });
                Parity::new(method, self.r, &self.shapes, self.budget)
            });
        let bound = |choice: &Parity| -> usize {
            self.shapes.iter().map(|shape| choice.method.geometry(*shape, self.r).rank_bound(*shape)).sum()
        };
        let best = choices.reduce(|best, next| {
            let distance = |choice: &Parity| choice.ratio().ln().abs();
            let order = distance(&next).total_cmp(&distance(&best)).then(bound(&best).cmp(&bound(&next)));
            if order.is_lt() { next } else { best }
        });
        best.ok_or_else(|| Problem::new("blocks", "sizes that divide", "none").argument())
    }

    /// The rank at which `per_rank` values a rank come nearest to the budget.
    fn nearest_rank(&self, per_rank: usize) -> usize {
        ((self.budget + per_rank / 2) / per_rank).max(1)
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn fits(option: &str, size: usize, common: usize) -> Result<()> {
    if size > 0 && common.is_multiple_of(size) {
        return Ok(());
    }
    let expected = format!("a size that divides all layers: {}", list(&divisors(common)));
    Err(Problem::new(option, expected, size).argument())
}
