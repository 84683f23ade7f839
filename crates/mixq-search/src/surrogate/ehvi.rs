//! Expected improvement and expected hypervolume improvement, in closed form.

use super::Prediction;

/// What is believed of a loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Belief {
    Normal(Prediction),
    /// `exp(log) - floor`, with `log` normal.
    LogNormal {
        log: Prediction,
        floor: f64,
    },
}

impl Belief {
    pub(crate) fn certain(loss: f64) -> Self {
        Self::Normal(Prediction { mean: loss, sd: 0.0 })
    }

    /// The median.
    pub(crate) fn typical(&self) -> f64 {
        match self {
            Self::Normal(loss) => loss.mean,
            // Finite, so that areas stay numbers.
            Self::LogNormal { log, floor } => log.mean.min(700.0).exp() - floor,
        }
    }

    /// `E[max(0, target - loss)]`.
    fn expected_improvement(&self, target: f64) -> f64 {
        match *self {
            Self::Normal(loss) => expected_improvement(loss, target),
            Self::LogNormal { log, floor } if log.sd > 0.0 => {
                let target = target + floor;
                if target <= 0.0 {
                    return 0.0;
                }
                let z = (target.ln() - log.mean) / log.sd;
                // exp(mean + sd^2 / 2) Phi(z - sd), the factor in the exponent bounded where Phi is 0 anyway.
                let below = (log.mean + 0.5 * log.sd * log.sd).min(700.0).exp() * normal_cdf(z - log.sd);
                (target * normal_cdf(z) - below).max(0.0)
            }
            Self::LogNormal { .. } => (target - self.typical()).max(0.0),
        }
    }
}

/// Expected improvement of a loss over `target`: `(target - mean) Phi(z) + sd phi(z)`.
fn expected_improvement(loss: Prediction, target: f64) -> f64 {
    let gain = target - loss.mean;
    if loss.sd <= 0.0 {
        return gain.max(0.0);
    }
    let z = gain / loss.sd;
    let density = (-0.5 * z * z).exp() / (2.0 * std::f64::consts::PI).sqrt();
    (gain * normal_cdf(z) + loss.sd * density).max(0.0)
}

/// Expected growth of the dominated area when a plan of known memory and predicted loss joins `observed`, both to be
/// minimised as `[memory, loss]`, up to `reference`.
///
/// The memory is exact, so no sampling is needed: between two memories of the front the best known loss is constant,
/// and the expectation is the interval's width times the expected improvement over that loss.
pub fn ehvi(memory: f64, loss: Prediction, observed: &[[f64; 2]], reference: [f64; 2]) -> f64 {
    Staircase::new(observed, reference).expected_gain(memory, Belief::Normal(loss))
}

/// The front of `observed`, kept for many candidates.
pub(crate) struct Staircase {
    /// `[memory, loss]`, memory growing and loss falling, all inside the reference.
    steps: Vec<[f64; 2]>,
    reference: [f64; 2],
}

impl Staircase {
    pub(crate) fn new(observed: &[[f64; 2]], reference: [f64; 2]) -> Self {
        let mut sorted: Vec<[f64; 2]> = observed.to_vec();
        sorted.retain(|[memory, loss]| *memory < reference[0] && *loss < reference[1]);
        sorted.sort_by(|a, b| a[0].total_cmp(&b[0]).then(a[1].total_cmp(&b[1])));
        let mut steps: Vec<[f64; 2]> = Vec::new();
        for point in sorted {
            if steps.last().is_none_or(|last| point[1] < last[1]) {
                steps.push(point);
            }
        }
        Self { steps, reference }
    }

    pub(crate) fn expected_gain(&self, memory: f64, loss: Belief) -> f64 {
        let known = self.steps.partition_point(|step| step[0] <= memory);
        let mut target = if known == 0 { self.reference[1] } else { self.steps[known - 1][1] };
        let (mut from, mut gain) = (memory, 0.0);
        for step in self.steps[known..].iter().chain([&[self.reference[0], f64::NEG_INFINITY]]) {
            gain += (step[0] - from).max(0.0) * loss.expected_improvement(target);
            (from, target) = (step[0], step[1]);
        }
        gain
    }

    /// Growth of the area if the loss were certain.
    pub(crate) fn gain(&self, memory: f64, loss: f64) -> f64 {
        self.expected_gain(memory, Belief::certain(loss))
    }

    /// Adds a point.
    pub(crate) fn push(&mut self, point: [f64; 2]) {
        let mut points = std::mem::take(&mut self.steps);
        points.push(point);
        *self = Self::new(&points, self.reference);
    }
}

/// Distribution function of the standard normal, to 1e-15: a series inside, a continued fraction in the tails.
fn normal_cdf(z: f64) -> f64 {
    let density = (-0.5 * z * z).exp() / (2.0 * std::f64::consts::PI).sqrt();
    if z.abs() < 4.0 {
        let (mut term, mut sum, mut n) = (z, z, 1.0);
        while term.abs() > 1e-17 * sum.abs() && n < 400.0 {
            n += 2.0;
            term *= z * z / n;
            sum += term;
        }
        return 0.5 + density * sum;
    }
    let mut fraction = z.abs();
    for k in (1..60).rev() {
        fraction = z.abs() + f64::from(k) / fraction;
    }
    let tail = density / fraction;
    if z > 0.0 { 1.0 - tail } else { tail }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{hypervolume, testing::close};

    #[test]
    fn normal_distribution_has_its_tabulated_values() {
        for (z, expected) in [
            (0.0, 0.5),
            (1.0, 0.841_344_746_068_542_9),
            (1.96, 0.975_002_104_851_779_5),
            (-3.0, 0.001_349_898_031_630_094_6),
            (-5.0, 2.866_515_718_791_939e-7),
            (6.0, 0.999_999_999_013_412_4),
        ] {
            let found = normal_cdf(z);
            assert!((found - expected).abs() <= 1e-12 * expected, "{z}: {found} against {expected}");
        }
    }

    #[test]
    fn certain_gain_equals_the_difference_of_two_volumes() {
        let observed = [[1.0, 5.0], [2.0, 3.0], [4.0, 1.0], [3.0, 4.0]];
        let reference = [6.0, 7.0];
        let stairs = Staircase::new(&observed, reference);
        for candidate in [[0.5, 6.0], [1.5, 2.0], [2.0, 3.0], [3.0, 0.5], [5.0, 0.0], [7.0, 0.0], [1.0, 8.0]]
        {
            let mut more = observed.to_vec();
            more.push(candidate);
            let expected = hypervolume(&more, &reference) - hypervolume(&observed, &reference);
            close(stairs.gain(candidate[0], candidate[1]), expected);
        }
    }

    #[test]
    fn log_normal_improvement_equals_its_integral() {
        for (mean, sd, floor, target) in
            [(0.0, 1.5, 0.0, 1.0), (1.1, 1.5, 0.2, 1.0), (2.3, 1.5, 0.01, 1.0), (-1.0, 0.3, 0.0, 2.0)]
        {
            let belief = Belief::LogNormal { log: Prediction { mean, sd }, floor };
            // The trapezoidal rule over the normal variable.
            let steps = 200_000;
            let integral: f64 = (0..=steps)
                .map(|i| -9.0 + 18.0 * f64::from(i) / f64::from(steps))
                .map(|u| {
                    let loss = (mean + sd * u).exp() - floor;
                    (target - loss).max(0.0) * (-0.5 * u * u).exp() / (2.0 * std::f64::consts::PI).sqrt()
                })
                .sum::<f64>()
                * 18.0
                / f64::from(steps);
            let found = belief.expected_improvement(target);
            assert!((found - integral).abs() < 1e-6, "{mean} {sd} {floor} {target}: {found} and {integral}");
            assert!(found <= target + floor);
        }
        let certain = Belief::LogNormal { log: Prediction { mean: 0.0, sd: 0.0 }, floor: 0.5 };
        close(certain.expected_improvement(2.0), 1.5);
        assert_eq!(certain.expected_improvement(f64::NEG_INFINITY), 0.0);
    }

    #[test]
    fn uncertainty_adds_expected_gain() {
        let sure = ehvi(2.0, Prediction { mean: 3.0, sd: 0.0 }, &[[1.0, 3.0]], [4.0, 5.0]);
        let unsure = ehvi(2.0, Prediction { mean: 3.0, sd: 1.0 }, &[[1.0, 3.0]], [4.0, 5.0]);
        assert_eq!(sure, 0.0);
        // Width 2 times E[max(0, N(0,1))] = 2 / sqrt(2 pi).
        close(unsure, 2.0 / (2.0 * std::f64::consts::PI).sqrt());
    }
}
