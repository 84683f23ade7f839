//! From scores of documents to figures with standard errors, as the harness computes them.

use std::thread;

use crate::{Metric, PythonRandom, Score};

/// Resamples that share a generator.
const CHUNK: usize = 1000;

/// The figure of all documents.
pub(crate) fn aggregate(metric: Metric, scores: &[Score]) -> f64 {
    match metric {
        Metric::F1 => f1(scores),
        Metric::Mcc => matthews(scores),
        Metric::Perplexity => (-mean(scores)).exp(),
        Metric::WordPerplexity | Metric::BytePerplexity => (-weighted_mean(scores)).exp(),
        Metric::BitsPerByte => -weighted_mean(scores) / std::f64::consts::LN_2,
        _ => mean(scores),
    }
}

/// Its standard error: of means by the formula, of F1, Matthews's correlation and perplexity by `resamples` resamples
/// (rounded down to thousands), of the others none.
pub(crate) fn standard_error(metric: Metric, scores: &[Score], resamples: usize) -> Option<f64> {
    if scores.len() < 2 || resamples == 0 {
        return None;
    }
    match metric {
        Metric::WordPerplexity | Metric::BytePerplexity | Metric::BitsPerByte => None,
        Metric::F1 | Metric::Mcc | Metric::Perplexity => {
            let found = resampled(metric, scores, resamples);
            (found.len() > 1).then(|| deviation(&found))
        }
        _ => {
            let values: Vec<f64> = scores.iter().map(number).collect();
            Some(deviation(&values) / (values.len() as f64).sqrt())
        }
    }
}

fn number(score: &Score) -> f64 {
    match *score {
        Score::Number(value) | Score::Pair(value, _) => value,
    }
}

fn pair(score: &Score) -> (f64, f64) {
    match *score {
        Score::Number(value) => (value, 1.0),
        Score::Pair(left, right) => (left, right),
    }
}

fn mean(scores: &[Score]) -> f64 {
    scores.iter().map(number).sum::<f64>() / scores.len() as f64
}

fn weighted_mean(scores: &[Score]) -> f64 {
    let sum = |of: fn((f64, f64)) -> f64| scores.iter().map(|score| of(pair(score))).sum::<f64>();
    sum(|pair| pair.0) / sum(|pair| pair.1)
}

/// With the class 1 as the positive one; 0 where it neither is nor was predicted.
fn f1(scores: &[Score]) -> f64 {
    let count = |of: fn(bool, bool) -> bool| {
        scores.iter().map(pair).filter(|&(gold, found)| of(gold == 1.0, found == 1.0)).count() as f64
    };
    let (hits, errors) = (count(|gold, found| gold && found), count(|gold, found| gold != found));
    if hits + errors == 0.0 { 0.0 } else { 2.0 * hits / (2.0 * hits + errors) }
}

/// For any number of classes; 0 where one side has a single class.
fn matthews(scores: &[Score]) -> f64 {
    let classes =
        scores.iter().map(pair).fold(0.0f64, |most, (gold, found)| most.max(gold).max(found)) as usize;
    let (mut golds, mut founds) = (vec![0.0; classes + 1], vec![0.0; classes + 1]);
    let (mut correct, total) = (0.0, scores.len() as f64);
    for (gold, found) in scores.iter().map(pair) {
        golds[gold as usize] += 1.0;
        founds[found as usize] += 1.0;
        correct += f64::from(u8::from(gold == found));
    }
    let product = |left: &[f64], right: &[f64]| left.iter().zip(right).map(|(a, b)| a * b).sum::<f64>();
    let spread = |of: &[f64]| total * total - product(of, of);
    let scale = (spread(&golds) * spread(&founds)).sqrt();
    if scale == 0.0 { 0.0 } else { (correct * total - product(&golds, &founds)) / scale }
}

/// Sample standard deviation.
pub(crate) fn deviation(values: &[f64]) -> f64 {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (squares / (values.len() as f64 - 1.0)).sqrt()
}

/// The figure of resamples: chunk `i` of them is drawn by `random.Random(i)`.
fn resampled(metric: Metric, scores: &[Score], resamples: usize) -> Vec<f64> {
    let size = CHUNK.min(resamples);
    let chunks = resamples / size;
    let threads = thread::available_parallelism().map_or(1, usize::from).min(chunks);
    let chunk = |seed: usize| -> Vec<f64> {
        let mut random = PythonRandom::new(seed as u64);
        let mut drawn = Vec::with_capacity(scores.len());
        (0..size)
            .map(|_| {
                drawn.clear();
                drawn.extend((0..scores.len()).map(|_| scores[random.choose(scores.len())]));
                aggregate(metric, &drawn)
            })
            .collect()
    };
    let part =
        |first: usize| (first..chunks).step_by(threads).map(|seed| (seed, chunk(seed))).collect::<Vec<_>>();
    let mut found: Vec<(usize, Vec<f64>)> = thread::scope(|scope| {
        let part = &part;
        let handles: Vec<_> = (0..threads).map(|first| scope.spawn(move || part(first))).collect();
        handles.into_iter().flat_map(|handle| handle.join().expect("resampling")).collect()
    });
    found.sort_by_key(|(seed, _)| *seed);
    found.into_iter().flat_map(|(_, values)| values).collect()
}

/// Mean of tasks' means weighted by their sizes, and its standard error from theirs.
pub(crate) fn pooled(values: &[(f64, Option<f64>, usize)]) -> (f64, Option<f64>) {
    let total: f64 = values.iter().map(|&(_, _, size)| size as f64).sum();
    let mean = values.iter().map(|&(value, _, size)| value * size as f64).sum::<f64>() / total;
    let sum = values
        .iter()
        .map(|&(_, error, size)| error.map(|error| (size as f64 - 1.0) * error * error * size as f64));
    let variance = sum.sum::<Option<f64>>().map(|sum| sum / (total - values.len() as f64));
    (mean, variance.map(|variance| (variance / total).sqrt()).filter(|error| error.is_finite()))
}

/// Plain mean of tasks' means, and its standard error.
pub(crate) fn unweighted(values: &[(f64, Option<f64>, usize)]) -> (f64, Option<f64>) {
    let count = values.len() as f64;
    let mean = values.iter().map(|&(value, _, _)| value).sum::<f64>() / count;
    let sum = values.iter().map(|&(_, error, _)| error.map(|error| error * error)).sum::<Option<f64>>();
    (mean, sum.map(|sum| sum.sqrt() / count))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::golden::vector;

    fn scores(value: &Value) -> Vec<Score> {
        serde_json::from_value(value.clone()).unwrap()
    }

    #[track_caller]
    fn near(found: f64, expected: &Value) {
        let expected = expected.as_f64().unwrap();
        assert!((found - expected).abs() <= 1e-12 * expected.abs().max(1.0), "{found} {expected}");
    }

    #[test]
    fn figures_equal_the_harness() {
        let data = vector("word_perplexity items");
        near(aggregate(Metric::WordPerplexity, &scores(&data["items"])), &data["value"]);
        let data = vector("byte_perplexity items");
        near(aggregate(Metric::BytePerplexity, &scores(&data["items"])), &data["value"]);
        near(aggregate(Metric::BitsPerByte, &scores(&data["items"])), &data["bits_per_byte"]);
        assert_eq!(standard_error(Metric::BitsPerByte, &scores(&data["items"]), 1000), None);
        let data = vector("mean/stderr");
        near(aggregate(Metric::Acc, &scores(&data["items"])), &data["acc"]);
        near(standard_error(Metric::Acc, &scores(&data["items"]), 1000).unwrap(), &data["acc_stderr"]);
        assert_eq!(standard_error(Metric::Acc, &[Score::Number(1.0)], 1000), None);
        let data = vector("group");
        let list = |key: &str| data[key].as_array().unwrap().clone();
        let values: Vec<_> = list("acc")
            .iter()
            .zip(list("stderr"))
            .zip(list("sizes"))
            .map(|((acc, error), size)| {
                (acc.as_f64().unwrap(), error.as_f64(), size.as_u64().unwrap() as usize)
            })
            .collect();
        near(pooled(&values).0, &data["weighted"]);
        near(pooled(&values).1.unwrap(), &data["pooled_stderr"]);
        near(unweighted(&values).0, &data["unweighted"]);
        // sqrt(0.05^2 + 0.04^2 + 0.1^2) / 3.
        near(unweighted(&values).1.unwrap(), &json!(0.0141f64.sqrt() / 3.0));
        assert_eq!(pooled(&[(0.5, None, 1), (0.5, Some(0.1), 9)]).1, None);
    }

    #[test]
    fn classes_and_resamples_equal_the_harness() {
        // lm-eval 0.4.13: `f1_score`, `matthews_corrcoef`, `perplexity` and `bootstrap_stderr(.., iters=2000)`.
        let two = scores(&json!([[1, 1], [0, 0], [1, 0], [0, 0], [1, 1], [0, 1], [1, 1]]));
        let three = scores(&json!([[0, 0], [1, 2], [2, 2], [1, 1], [0, 2], [2, 2]]));
        let ll = scores(&json!([-1.5, -0.25, -3.0, -2.125, -0.5]));
        for (metric, scores, value, error) in [
            (Metric::F1, &two, 0.75, 0.194_070_123_745_947_98),
            (Metric::Mcc, &two, 0.416_666_666_666_666_7, 0.376_260_377_030_109_6),
            (Metric::Mcc, &three, 0.577_350_269_189_625_7, 0.256_592_494_624_123_4),
            (Metric::Perplexity, &ll, 4.371_035_772_929_758, 2.368_478_245_576_25),
        ] {
            near(aggregate(metric, scores), &json!(value));
            near(standard_error(metric, scores, 2000).unwrap(), &json!(error));
        }
        assert_eq!(f1(&scores(&json!([[0, 0], [0, 0]]))), 0.0);
        assert_eq!(matthews(&scores(&json!([[1, 1], [1, 1]]))), 0.0);
    }
}
