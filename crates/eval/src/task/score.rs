//! From answers to scores of one document.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Gold, Metric, OutputType, PreparedDocument, Requests, Task};

/// What a model answered to one request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Response {
    /// The log-likelihood of a continuation, and whether each of its tokens is the model's first choice.
    Pair(f64, bool),
    /// The log-likelihood of a whole text.
    Rolling(f64),
    /// A generated text.
    Text(String),
}

/// What one document contributes to a metric.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Score {
    /// A number to be averaged.
    Number(f64),
    /// Right answer and prediction, or log-likelihood and what it is divided by.
    Pair(f64, f64),
}

/// A document's answers, scored.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    /// Number of the likeliest choice, or texts by filter, or nothing.
    pub prediction: Value,
    /// By metric and filter.
    pub scores: BTreeMap<(Metric, String), Score>,
}

/// Numpy's `argmax`: the first of the largest, or the first that isn't a number.
fn argmax(values: impl IntoIterator<Item = f64>) -> usize {
    let mut best = (0, f64::NEG_INFINITY);
    for (index, value) in values.into_iter().enumerate() {
        if value.is_nan() {
            return index;
        }
        if value > best.1 {
            best = (index, value);
        }
    }
    best.0
}

fn number(right: bool) -> Score {
    Score::Number(f64::from(u8::from(right)))
}

impl Task {
    /// Scores the answers to a document's requests, in their order; the harness's `process_results`.
    ///
    /// # Panics
    /// If the answers aren't of the requests' kind and number.
    pub fn score(&self, document: &PreparedDocument, responses: &[Response]) -> Scored {
        let expected = document.requests.pairs().len().max(1);
        assert_eq!(responses.len(), expected, "answers to the requests of document {}", document.index);
        let filter = || "none".to_owned();
        match (&document.requests, &document.gold) {
            (Requests::Generate { .. }, Gold::Texts(right)) => self.score_text(text(&responses[0]), right),
            (Requests::Rolling { .. }, Gold::Size { words, bytes }) => {
                let Response::Rolling(ll) = responses[0] else { panic!("expected a rolling log-likelihood") };
                let size = |metric| if metric == Metric::WordPerplexity { *words } else { *bytes };
                let score = |metric| Score::Pair(ll, size(metric) as f64);
                let metrics = self.metrics.iter().map(|compiled| compiled.metric);
                let scores = metrics.map(|metric| ((metric, filter()), score(metric))).collect();
                Scored { prediction: Value::Null, scores }
            }
            (_, gold) => {
                let pairs: Vec<(f64, bool)> = responses.iter().map(pair).collect();
                let right = match gold {
                    Gold::Choices(right) => right.as_slice(),
                    _ => &[0],
                };
                let metrics = self.metrics.iter().map(|compiled| compiled.metric);
                let scores = metrics.map(|metric| {
                    let score = match self.description.output_type {
                        OutputType::Loglikelihood if metric == Metric::Perplexity => {
                            Score::Number(pairs[0].0)
                        }
                        OutputType::Loglikelihood => number(pairs[0].1),
                        _ => score_choices(metric, &pairs, right, &document.lengths),
                    };
                    ((metric, filter()), score)
                });
                let scores = scores.collect();
                let chosen = argmax(pairs.iter().map(|pair| pair.0));
                let prediction =
                    if matches!(gold, Gold::Choices(_)) { chosen.into() } else { pairs[0].1.into() };
                Scored { prediction, scores }
            }
        }
    }

    fn score_text(&self, text: &str, right: &[String]) -> Scored {
        let mut prediction = serde_json::Map::new();
        let mut scores = BTreeMap::new();
        for filter in &self.filters {
            let filtered = filter.apply(text);
            for metric in &self.metrics {
                let same = right.iter().any(|right| metric.normalizer.same(&filtered, right));
                scores.insert((metric.metric, filter.name.clone()), number(same));
            }
            prediction.insert(filter.name.clone(), filtered.into());
        }
        Scored { prediction: prediction.into(), scores }
    }
}

fn pair(response: &Response) -> (f64, bool) {
    match response {
        Response::Pair(ll, greedy) => (*ll, *greedy),
        other => panic!("expected a log-likelihood, found {other:?}"),
    }
}

fn text(response: &Response) -> &str {
    match response {
        Response::Text(text) => text,
        other => panic!("expected a text, found {other:?}"),
    }
}

fn score_choices(
    metric: Metric,
    pairs: &[(f64, bool)],
    right: &[usize],
    lengths: &[(usize, usize)],
) -> Score {
    let normalized = |length: fn(&(usize, usize)) -> usize| {
        argmax(pairs.iter().zip(lengths).map(|(pair, lengths)| pair.0 / length(lengths) as f64))
    };
    let chosen = match metric {
        Metric::AccNorm => normalized(|lengths| lengths.0),
        Metric::AccBytes => normalized(|lengths| lengths.1),
        _ => argmax(pairs.iter().map(|pair| pair.0)),
    };
    match metric {
        Metric::F1 | Metric::Mcc => Score::Pair(right[0] as f64, chosen as f64),
        Metric::ExactMatch => number(right.iter().any(|&right| pairs[right].1)),
        _ => number(right.contains(&chosen)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{TaskData, golden};

    #[test]
    fn scores_equal_the_harness() {
        let mut seen = 0;
        for line in golden::lines().iter().filter(|line| line["ll"].is_array()) {
            let task = Task::builtin(line["task"].as_str().unwrap()).unwrap();
            let data =
                TaskData { evaluated: vec![line["doc"].as_object().unwrap().clone()], ..TaskData::default() };
            let document = task.prepare(&data, 0, None, 1234).unwrap().remove(0);
            let ll: Vec<f64> = serde_json::from_value(line["ll"].clone()).unwrap();
            let responses: Vec<Response> = ll.iter().map(|&ll| Response::Pair(ll, false)).collect();
            let scored = task.score(&document, &responses);
            let found = scored.scores.iter().map(|((metric, filter), score)| {
                assert_eq!(filter, "none");
                (crate::task::name(metric), serde_json::to_value(score).unwrap())
            });
            assert_eq!(Value::Object(found.collect()), line["result"], "{line}");
            seen += 1;
        }
        assert_eq!(seen, 16);
    }

    #[test]
    fn lengths_are_characters_or_bytes() {
        let vector = golden::vector("acc_norm chars vs bytes");
        let choices: Vec<String> = serde_json::from_value(vector["choices"].clone()).unwrap();
        let ll: Vec<f64> = serde_json::from_value(vector["ll"].clone()).unwrap();
        let lengths: Vec<_> = choices.iter().map(|choice| (choice.chars().count(), choice.len())).collect();
        let pairs: Vec<_> = ll.iter().map(|&ll| (ll, false)).collect();
        for (metric, key) in [
            (Metric::Acc, "argmax"),
            (Metric::AccNorm, "argmax_norm_chars"),
            (Metric::AccBytes, "argmax_bytes"),
        ] {
            let right = vector[key].as_u64().unwrap() as usize;
            assert_eq!(score_choices(metric, &pairs, &[right], &lengths), Score::Number(1.0), "{key}");
            assert_eq!(score_choices(metric, &pairs, &[1 - right], &lengths), Score::Number(0.0), "{key}");
        }
    }

    #[test]
    fn argmax_is_numpys() {
        assert_eq!(argmax([1.0, 3.0, 3.0]), 1);
        assert_eq!(argmax([1.0, f64::NAN, 3.0]), 1);
        assert_eq!(argmax([f64::NEG_INFINITY, f64::NEG_INFINITY]), 0);
        assert_eq!(argmax([-2.0 / 0.0, -5.0]), 1);
    }
}
