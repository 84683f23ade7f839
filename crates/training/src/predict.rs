//! What a classifier says of a data set, and how good that is.

use kiln_models::{CausalLm, scores_at};

use crate::{Dataset, Result, error::Problem, evaluate::check_values, in_order};

/// Scores of labels for the examples of a data set, beside what they should have been. Where a score is not a number, no figure
/// is.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Predictions {
    /// For each example a score for each label; of a regression the number.
    pub scores: Vec<Vec<f32>>,
    /// For each example its class or its number.
    pub values: Vec<f32>,
}

/// What `model`, a [`Classifier`](kiln_models::Classifier), says of `dataset`, `batch` rows at a time; no gradient is
/// recorded.
///
/// # Errors
/// Another kind of model or data, and data that doesn't fit the model.
pub fn predict<M: CausalLm>(model: &M, dataset: &Dataset, batch: usize) -> Result<Predictions> {
    check_values(dataset, model)?;
    if model.labels().is_none() {
        return Err(Problem::new("model", "a classifier", "a language model").argument());
    }
    let (mut scores, mut values) = (Vec::new(), Vec::new());
    for batch in in_order(dataset, batch, 0)? {
        let batch = batch?;
        scores.extend(scores_at(model, &batch.tokens, &batch.scored)?);
        values.extend(batch.examples.iter().filter_map(|placed| placed.value));
    }
    Ok(Predictions { scores, values })
}

impl Predictions {
    /// The class of the highest score of each example, the first of equal ones.
    pub fn classes(&self) -> Vec<usize> {
        let best = |scores: &Vec<f32>| {
            let above = |best: usize, index: usize| if scores[index] > scores[best] { index } else { best };
            (0..scores.len()).reduce(above).unwrap_or(0)
        };
        self.scores.iter().map(best).collect()
    }

    fn outputs(&self) -> usize {
        self.scores.first().map_or(0, Vec::len)
    }

    /// Whether all scores are numbers.
    fn are_numbers(&self) -> bool {
        !self.scores.iter().flatten().any(|score| score.is_nan())
    }

    /// Whether these are scores of classes: all figures of classes are no numbers otherwise.
    fn are_classes(&self) -> bool {
        let is_class = |value: &f32| value.fract() == 0.0 && (0.0..self.outputs() as f32).contains(value);
        self.are_numbers() && self.values.iter().all(is_class)
    }

    fn pairs(&self) -> impl Iterator<Item = (usize, usize)> {
        self.classes().into_iter().zip(self.values.iter().map(|value| *value as usize))
    }

    /// The share of examples whose class was found.
    pub fn accuracy(&self) -> f64 {
        if !self.are_classes() {
            return f64::NAN;
        }
        let right = self.pairs().filter(|(found, wanted)| found == wanted).count();
        right as f64 / self.values.len() as f64
    }

    /// The harmonic mean of precision and recall of class 1, as GLUE has it for two classes; 0 where neither the data nor
    /// the model has that class.
    pub fn f1(&self) -> f64 {
        if !self.are_classes() {
            return f64::NAN;
        }
        let count =
            |which: fn((usize, usize)) -> bool| self.pairs().filter(|pair| which(*pair)).count() as f64;
        let both = count(|(found, wanted)| found == 1 && wanted == 1);
        let either = count(|(found, _)| found == 1) + count(|(_, wanted)| wanted == 1);
        if either == 0.0 { 0.0 } else { 2.0 * both / either }
    }

    /// Matthews's correlation of classes, any number of them (Gorodkin 2004); 0 where all are of one class or all are said
    /// to be.
    pub fn matthews(&self) -> f64 {
        if !self.are_classes() {
            return f64::NAN;
        }
        let pairs: Vec<(usize, usize)> = self.pairs().collect();
        let classes = self.outputs();
        let (mut found, mut wanted, mut right) = (vec![0.0; classes], vec![0.0; classes], 0.0);
        for (a, b) in &pairs {
            found[*a] += 1.0;
            wanted[*b] += 1.0;
            right += f64::from(u8::from(a == b));
        }
        let total = pairs.len() as f64;
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let spread = |counts: &[f64]| total * total - dot(counts, counts);
        let scale = (spread(&found) * spread(&wanted)).sqrt();
        if scale == 0.0 { 0.0 } else { (right * total - dot(&found, &wanted)) / scale }
    }

    /// Pearson's correlation of a regression's numbers with those of the data; not a number where either never changes.
    pub fn pearson(&self) -> f64 {
        correlation(&self.numbers(), &self.wanted())
    }

    /// Spearman's: Pearson's of the ranks; equal numbers share the mean of theirs.
    pub fn spearman(&self) -> f64 {
        if !self.are_numbers() {
            return f64::NAN;
        }
        correlation(&ranks(&self.numbers()), &ranks(&self.wanted()))
    }

    /// The mean squared error of a regression.
    pub fn squared_error(&self) -> f64 {
        let squares = self.numbers().into_iter().zip(self.wanted()).map(|(a, b)| (a - b).powi(2));
        squares.sum::<f64>() / self.values.len() as f64
    }

    fn numbers(&self) -> Vec<f64> {
        self.scores.iter().map(|scores| scores.first().copied().unwrap_or(f32::NAN).into()).collect()
    }

    fn wanted(&self) -> Vec<f64> {
        self.values.iter().map(|value| (*value).into()).collect()
    }
}

fn correlation(a: &[f64], b: &[f64]) -> f64 {
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let (mean_a, mean_b) = (mean(a), mean(b));
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (a, b) in a.iter().zip(b) {
        let (a, b) = (a - mean_a, b - mean_b);
        (ab, aa, bb) = (ab + a * b, aa + a * a, bb + b * b);
    }
    ab / (aa * bb).sqrt()
}

/// Ranks from 1.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    let mut ranks = vec![0.0; values.len()];
    let mut start = 0;
    for group in order.chunk_by(|a, b| values[*a] == values[*b]) {
        let rank = start as f64 + (group.len() as f64 + 1.0) / 2.0;
        group.iter().for_each(|index| ranks[*index] = rank);
        start += group.len();
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-12, "{found}, not {expected}");
    }

    /// Figures of scikit-learn 1.9.1 and SciPy 1.17.1.
    #[test]
    fn figures_of_classes_are_those_of_scikit_learn() {
        let said = |classes: &[usize], count: usize| {
            let one =
                |class: &usize| (0..count).map(|index| if index == *class { 1.5 } else { -0.5 }).collect();
            classes.iter().map(one).collect::<Vec<Vec<f32>>>()
        };
        let found = [0, 1, 1, 0, 1, 1, 0, 0, 1, 0];
        let values = vec![0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0];
        let two = Predictions { scores: said(&found, 2), values };
        close(two.accuracy(), 0.7);
        close(two.f1(), 0.727_272_727_272_727_3);
        close(two.matthews(), 0.408_248_290_463_863);
        let found = [0, 2, 1, 0, 2, 1, 1, 0, 2, 2];
        let values = vec![0.0, 2.0, 1.0, 1.0, 2.0, 0.0, 1.0, 0.0, 1.0, 2.0];
        let three = Predictions { scores: said(&found, 3), values };
        close(three.accuracy(), 0.7);
        close(three.matthews(), 0.560_606_060_606_060_6);
        let all_alike = Predictions { scores: said(&[0, 0, 0], 2), values: vec![0.0, 0.0, 0.0] };
        assert_eq!((all_alike.f1(), all_alike.matthews(), all_alike.accuracy()), (0.0, 0.0, 1.0));
    }

    #[test]
    fn figures_of_numbers_are_those_of_scipy() {
        let found = [0.5f32, 2.25, 1.5, 4.0, 3.5, 1.5, 0.25, 5.0];
        let scores = found.iter().map(|number| vec![*number]).collect();
        let regression = Predictions { scores, values: vec![1.0, 2.0, 2.0, 3.5, 5.0, 1.0, 0.0, 4.0] };
        close(regression.pearson(), 0.892_806_637_799_537_8);
        close(regression.spearman(), 0.896_986_170_696_191_6);
        close(regression.squared_error(), 0.546_875);
        let flat = Predictions { scores: vec![vec![1.0]; 3], values: vec![1.0, 2.0, 3.0] };
        assert!(flat.pearson().is_nan());
    }

    #[test]
    fn what_is_no_figure_is_no_number() {
        let broken =
            Predictions { scores: vec![vec![f32::NAN, 1.0], vec![0.0, 1.0]], values: vec![0.0, 1.0] };
        let foreign = Predictions { scores: vec![vec![1.0, 0.0]; 2], values: vec![-1.0, 1e30] };
        for found in [broken, foreign] {
            assert!(found.accuracy().is_nan() && found.f1().is_nan() && found.matthews().is_nan());
        }
        let broken = Predictions { scores: vec![vec![f32::NAN], vec![1.0]], values: vec![0.0, 1.0] };
        assert!(broken.spearman().is_nan() && broken.pearson().is_nan() && broken.squared_error().is_nan());
    }
}
