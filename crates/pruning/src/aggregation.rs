//! From the scores of channels in single matrices to the scores of heads and MLP channels.

use serde::{Deserialize, Serialize};

/// How the scores that one channel has in the matrices of its group become one number.
///
/// It is applied channel by channel; a head's score is the sum over its channels afterwards. For `Max` and `Prod` the
/// order matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Aggregation {
    /// Sum.
    Sum,
    /// Mean.
    Mean,
    /// Largest.
    Max,
    /// Product. In f64, whose range four factors of any real model's scores don't leave.
    Prod,
    /// That of the root: q or gate.
    First,
    /// That of the linear which leads back to the residual stream: o or down.
    Last,
}

impl Aggregation {
    /// One score per channel from one list per matrix, root first.
    ///
    /// # Panics
    /// If there is no list, or they differ in length.
    pub fn apply(self, matrices: &[Vec<f64>]) -> Vec<f64> {
        let count = matrices[0].len();
        assert!(matrices.iter().all(|scores| scores.len() == count), "scores of {count} channels each");
        (0..count)
            .map(|channel| {
                let mut scores = matrices.iter().map(|scores| scores[channel]);
                match self {
                    Self::Sum => scores.sum(),
                    Self::Mean => scores.sum::<f64>() / matrices.len() as f64,
                    Self::Max => scores.fold(f64::NEG_INFINITY, f64::max),
                    Self::Prod => scores.product(),
                    Self::First => matrices[0][channel],
                    Self::Last => scores.next_back().unwrap_or(0.0),
                }
            })
            .collect()
    }
}

/// Which key-value head the scores of a query head go to under grouped queries.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GqaFold {
    /// The one it attends with.
    #[default]
    Grouped,
    /// Head `h` to `h mod key-value heads`, as LLM-Pruner's program does: a mistake of its, for comparison only.
    Modulo,
}

impl GqaFold {
    /// Sums the scores of query channels into those of `key_value_heads · head_dim` channels.
    ///
    /// # Panics
    /// If the heads are no multiple of `key_value_heads`.
    pub fn apply(self, queries: &[f64], key_value_heads: usize, head_dim: usize) -> Vec<f64> {
        let width = key_value_heads * head_dim;
        assert!(width > 0 && queries.len().is_multiple_of(width), "whole groups of query heads");
        let per_group = queries.len() / width;
        let mut folded = vec![0.0; width];
        for (channel, score) in queries.iter().enumerate() {
            let (head, within) = (channel / head_dim, channel % head_dim);
            let group = match self {
                Self::Grouped => head / per_group,
                Self::Modulo => head % key_value_heads,
            };
            folded[group * head_dim + within] += score;
        }
        folded
    }
}

/// Scores of heads, from those of their channels.
pub fn head_sums(channels: &[f64], head_dim: usize) -> Vec<f64> {
    channels.chunks(head_dim.max(1)).map(|head| head.iter().sum()).collect()
}

/// `(x - mean) / standard deviation` (n - 1) of the values; zeros where they don't differ.
pub fn standardise(values: &[f64]) -> Vec<f64> {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count.max(1.0);
    let spread = (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (count - 1.0).max(1.0)).sqrt();
    values.iter().map(|v| if spread > 0.0 { (v - mean) / spread } else { 0.0 }).collect()
}
