//! Two reports on the same documents.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{MetricReport, Report};
use crate::{
    Error, Metric, PythonRandom, Result, Score,
    metrics::{aggregate, deviation},
};

/// Random exchanges of a permutation test.
const EXCHANGES: usize = 10_000;

/// How likely a difference at least as large is, were both models alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum SignificanceTest {
    /// McNemar's exact test: of the documents that one model got right and the other wrong, are as many on either side?
    Mcnemar,
    /// A permutation test: documents' scores exchanged between the models, at random, 10,000 times.
    Permutation,
}

/// The difference of two models in one figure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MetricComparison {
    /// The task.
    pub task: String,
    /// Which figure.
    pub metric: Metric,
    /// Of which filter of generated texts.
    pub filter: String,
    /// Documents.
    pub documents: usize,
    /// The first model's.
    pub first: f64,
    /// The second model's.
    pub second: f64,
    /// Second minus first.
    pub difference: f64,
    /// Standard error of the mean of the documents' differences; `None` for figures that aren't means.
    pub stderr: Option<f64>,
    /// How `p_value` was found.
    pub test: SignificanceTest,
    /// Two-sided.
    pub p_value: f64,
}

/// Two models, figure by figure; shown as a Markdown table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// What the first report calls its model.
    pub first: String,
    /// What the second does.
    pub second: String,
    /// The figures that both have.
    pub metrics: Vec<MetricComparison>,
}

impl Comparison {
    /// Compares the figures of the tasks that both reports have, document by document.
    ///
    /// # Errors
    /// [`Error::Data`] if there is no such task, or the two runs asked different things about one.
    pub fn new(first: &Report, second: &Report) -> Result<Self> {
        let mut metrics = Vec::new();
        for task in &first.tasks {
            let Some(other) = second.task(&task.task) else { continue };
            let what = format!("task {}", task.task);
            if (&task.requests, task.documents) != (&other.requests, other.documents) {
                let describe =
                    |documents, shots| format!("requests of {documents} documents with {shots} examples");
                let expected = format!("the first report's {}", describe(task.documents, task.shots));
                return Err(Error::data(
                    what,
                    expected,
                    format!("other {}", describe(other.documents, other.shots)),
                ));
            }
            for metric in &task.metrics {
                let same =
                    |other: &&MetricReport| (other.metric, &other.filter) == (metric.metric, &metric.filter);
                let Some(other) = other.metrics.iter().find(same) else { continue };
                if metric.scores.len() != other.scores.len() || metric.scores.is_empty() {
                    let expected = format!("{} scores", metric.scores.len());
                    return Err(Error::data(what, expected, other.scores.len()));
                }
                metrics.push(compare(&task.task, metric, other));
            }
        }
        if metrics.is_empty() {
            return Err(Error::data("tasks", "at least one that both reports have", 0));
        }
        Ok(Self { first: first.model.clone(), second: second.model.clone(), metrics })
    }

    /// The comparison as a Markdown table.
    pub fn to_markdown(&self) -> String {
        let mut table = String::from(
            "| task | metric | first | second | difference | stderr | p |\n\
             | --- | --- | ---: | ---: | ---: | ---: | ---: |\n",
        );
        for found in &self.metrics {
            let metric = crate::task::name(&found.metric);
            let filter = if found.filter == "none" { String::new() } else { format!(", {}", found.filter) };
            let stderr = found.stderr.map_or("N/A".into(), |error| format!("{error:.4}"));
            table += &format!(
                "| {} | {metric}{filter} | {:.4} | {:.4} | {:+.4} | {stderr} | {:.4} |\n",
                found.task, found.first, found.second, found.difference, found.p_value
            );
        }
        table
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_markdown())
    }
}

fn compare(task: &str, first: &MetricReport, second: &MetricReport) -> MetricComparison {
    let pairs: Vec<(Score, Score)> =
        first.scores.iter().copied().zip(second.scores.iter().copied()).collect();
    let numbers: Option<Vec<(f64, f64)>> = pairs
        .iter()
        .map(|pair| match *pair {
            (Score::Number(first), Score::Number(second)) => Some((first, second)),
            _ => None,
        })
        .collect();
    let is_mean = first.metric.aggregation() == "mean";
    let binary = |numbers: &Vec<(f64, f64)>| {
        is_mean && numbers.iter().all(|(a, b)| [a, b].into_iter().all(|score| *score == 0.0 || *score == 1.0))
    };
    let (test, p_value) = match &numbers {
        Some(numbers) if binary(numbers) => (SignificanceTest::Mcnemar, mcnemar(numbers)),
        _ => (SignificanceTest::Permutation, permutation(first.metric, &pairs)),
    };
    let differences = numbers.filter(|numbers| is_mean && numbers.len() > 1).map(|numbers| {
        let differences: Vec<f64> = numbers.iter().map(|(first, second)| second - first).collect();
        deviation(&differences) / (differences.len() as f64).sqrt()
    });
    MetricComparison {
        task: task.into(),
        metric: first.metric,
        filter: first.filter.clone(),
        documents: pairs.len(),
        first: first.value,
        second: second.value,
        difference: second.value - first.value,
        stderr: differences,
        test,
        p_value,
    }
}

/// Twice the probability of at most as many of the rarer kind, if both kinds are equally likely.
fn mcnemar(numbers: &[(f64, f64)]) -> f64 {
    let gained = numbers.iter().filter(|(first, second)| second > first).count();
    let lost = numbers.iter().filter(|(first, second)| second < first).count();
    let (total, rarer) = (gained + lost, gained.min(lost));
    // Logarithms: 2^-total has no f64 for many documents.
    let mut term = -(total as f64) * std::f64::consts::LN_2;
    let mut sum = term.exp();
    for k in 1..=rarer {
        term += ((total - k + 1) as f64).ln() - (k as f64).ln();
        sum += term.exp();
    }
    (2.0 * sum).min(1.0)
}

fn permutation(metric: Metric, pairs: &[(Score, Score)]) -> f64 {
    let (mut first, mut second): (Vec<Score>, Vec<Score>) = pairs.iter().copied().unzip();
    let difference =
        |first: &[Score], second: &[Score]| (aggregate(metric, second) - aggregate(metric, first)).abs();
    let found = difference(&first, &second);
    let mut random = PythonRandom::new(0);
    // Rounding must not make an equal difference a smaller one.
    let least = found - 1e-12 * found.max(1.0);
    let mut as_large = 0usize;
    for _ in 0..EXCHANGES {
        for ((first, second), pair) in first.iter_mut().zip(&mut second).zip(pairs) {
            (*first, *second) = if random.below(2) == 0 { *pair } else { (pair.1, pair.0) };
        }
        as_large += usize::from(difference(&first, &second) >= least);
    }
    (1 + as_large) as f64 / (1 + EXCHANGES) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(values: &[(u8, u8)]) -> Vec<(f64, f64)> {
        values.iter().map(|&(first, second)| (f64::from(first), f64::from(second))).collect()
    }

    #[test]
    fn mcnemars_test_equals_the_binomial_distribution() {
        // 1 lost, 5 gained: 2 * (1 + 6) / 64.
        let values = numbers(&[(1, 0), (0, 1), (0, 1), (0, 1), (0, 1), (0, 1), (1, 1), (0, 0)]);
        assert!((mcnemar(&values) - 14.0 / 64.0).abs() < 1e-12);
        assert_eq!(mcnemar(&numbers(&[(1, 1), (0, 0)])), 1.0);
        assert_eq!(mcnemar(&numbers(&[(1, 0), (0, 1)])), 1.0);
        // Thousands of documents don't underflow: equal shares are no difference.
        let values: Vec<_> = (0..8000).map(|n| (f64::from(n % 2), f64::from((n + 1) % 2))).collect();
        assert!(mcnemar(&values) > 0.99);
    }

    #[test]
    fn a_permutation_test_finds_what_is_there() {
        let score = |value: f64| Score::Number(value);
        let same: Vec<_> = (0..40).map(|n| (score(-f64::from(n)), score(-f64::from(n)))).collect();
        assert_eq!(permutation(Metric::Perplexity, &same), 1.0);
        let better: Vec<_> =
            (0..40).map(|n| (score(-f64::from(n % 7) - 0.5), score(-f64::from(n % 7)))).collect();
        assert!(permutation(Metric::Perplexity, &better) < 1e-3);
        // Of two documents that differ, half of the exchanges leave as large a difference.
        let two = [(score(-1.0), score(-2.0)), (score(-1.0), score(-2.0))];
        let found = permutation(Metric::Perplexity, &two);
        assert!((found - 0.5).abs() < 0.03, "{found}");
    }
}
