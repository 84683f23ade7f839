//! The methods by name: which numbers they choose, and what they start from.

mod qablora;
mod qahira;
mod qalora;
mod qbara;

pub use qablora::QaBlora;
pub use qahira::{InitH, QaHira};
pub use qalora::QaLora;
pub use qbara::QBara;

use rand_chacha::ChaCha8Rng;

use crate::{Geometry, InitLoraWeights, json_fields::Problem, part::Part};

/// What is trained beside each selected linear layer.
///
/// | method | pool × repeat | between | trained values | largest rank of the change | merges into packed weights |
/// | --- | --- | --- | --- | --- | --- |
/// | LoRA, DoRA | 1 × 1 | A · B of rank r | r (in + out) | r | no |
/// | [`QBara`] | λ × λ | A · B of rank λr | r (in + out) | λr | blocks that fit λ × λ |
/// | [`QaLora`] | g × 1 | A · B of rank r | r (in / g + out) | r | row groups |
/// | [`QaHira`] | p × q | H | in · out / (p q) | min(in / p, out / q) | row groups, tiles |
/// | [`QaBlora`] | p × q | A · B of rank ρ | ρ (in / p + out / q) | ρ | row groups, tiles |
///
/// Source: the method specification of balanced-rank adapters (Q-BaRA/QA-HiRA, arXiv 2407.17029; QA-LoRA, arXiv
/// 2309.14717). In all of them the scaling is alpha over the *nominal* rank r of the configuration, and dropout comes
/// after the pooling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Method {
    /// LoRA; PiSSA and OLoRA by their initialisation.
    Lora {
        /// A and B before training.
        init: InitLoraWeights,
    },
    /// DoRA: LoRA with trained magnitudes.
    Dora {
        /// A and B before training; none that changes the base.
        init: InitLoraWeights,
    },
    /// Q-BaRA.
    QBara(QBara),
    /// QA-LoRA.
    QaLora(QaLora),
    /// QA-HiRA.
    QaHira(QaHira),
    /// QA-BLoRA.
    QaBlora(QaBlora),
}

impl Method {
    /// LoRA that starts as the base model.
    pub const fn lora() -> Self {
        Self::Lora { init: InitLoraWeights::Kaiming }
    }

    /// DoRA that starts as the base model.
    pub const fn dora() -> Self {
        Self::Dora { init: InitLoraWeights::Kaiming }
    }

    /// The initialisation of LoRA and DoRA; the methods that pool have their own.
    pub(crate) fn init(&self) -> InitLoraWeights {
        match self {
            Self::Lora { init } | Self::Dora { init } => *init,
            _ => InitLoraWeights::Kaiming,
        }
    }

    /// The name in messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Lora { .. } => "lora",
            Self::Dora { .. } => "dora",
            Self::QBara(_) => "q-bara",
            Self::QaLora(_) => "qa-lora",
            Self::QaHira(_) => "qa-hira",
            Self::QaBlora(_) => "qa-blora",
        }
    }

    /// The numbers for a linear layer of `shape` `[d_input, d_output]` at the nominal rank `r`.
    pub fn geometry(&self, shape: [usize; 2], r: usize) -> Geometry {
        match self {
            Self::Lora { .. } | Self::Dora { .. } => {
                Geometry { pool: 1, repeat: 1, pooling: Default::default(), rank: Some(r) }
            }
            Self::QBara(method) => method.geometry(r),
            Self::QaLora(method) => method.geometry(r),
            Self::QaHira(method) => method.geometry(),
            Self::QaBlora(method) => method.geometry(shape, r),
        }
    }

    /// Trained values beside linear layers of `shapes` `[d_input, d_output]`, DoRA's magnitudes left out.
    pub fn parameters(&self, shapes: &[[usize; 2]], r: usize) -> usize {
        shapes.iter().map(|shape| self.geometry(*shape, r).parameters(*shape)).sum()
    }

    /// Values of `part` `[rows, columns]` before training.
    pub(crate) fn initial(&self, part: Part, [rows, columns]: [usize; 2], rng: &mut ChaCha8Rng) -> Vec<f32> {
        let count = rows * columns;
        match (self, part) {
            (Self::QaHira(method), Part::H) => method.initial([rows, columns], rng),
            (Self::QaLora(_), Part::A) => QaLora::initial_a([rows, columns], rng),
            (_, Part::A) => kaiming(rows, count, rng),
            _ => vec![0.0; count],
        }
    }

    /// The first option that is out of range, or that doesn't divide the layer `path` of `shape`.
    pub(crate) fn problem(&self, path: &str, shape: [usize; 2], r: usize) -> Option<Problem> {
        let geometry = self.geometry(shape, r);
        let [pool, repeat] = match self {
            Self::QBara(_) => ["lambda", "lambda"],
            _ => ["pool", "repeat"],
        };
        indivisible(path, pool, geometry.pool, "inputs", shape[0])
            .or_else(|| indivisible(path, repeat, geometry.repeat, "outputs", shape[1]))
            .or_else(|| match geometry.rank {
                Some(rank) if !(1..=crate::MAX_RANK).contains(&rank) => {
                    let expected = format!("a stored rank from 1 to {}", crate::MAX_RANK);
                    Some(Problem::new(format!("{path}.rank"), expected, rank))
                }
                _ => None,
            })
    }
}

/// torch's `kaiming_uniform_` with a = √5: within one over the root of the number of inputs.
fn kaiming(inputs: usize, count: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
    kiln_quant_core::random::uniform(rng, (inputs as f64).sqrt().recip(), count)
}

/// The divisors of `size`, ascending.
pub(crate) fn divisors(size: usize) -> Vec<usize> {
    let small: Vec<usize> = (1..).take_while(|d| d * d <= size).filter(|d| size.is_multiple_of(*d)).collect();
    let large = small.iter().rev().map(|d| size / d).filter(|d| d * d > size);
    small.iter().copied().chain(large).collect()
}

/// Numbers for a message, cut where there are many.
pub(crate) fn list(sizes: &[usize]) -> String {
    const MOST: usize = 24;
    let shown: Vec<String> = sizes.iter().take(MOST).map(usize::to_string).collect();
    let more = if sizes.len() > MOST { ", .." } else { "" };
    format!("{}{more}", shown.join(", "))
}

fn indivisible(path: &str, option: &str, size: usize, what: &str, whole: usize) -> Option<Problem> {
    if size > 0 && whole.is_multiple_of(size) {
        return None;
    }
    let expected = format!("a divisor of the {whole} {what}: {}", list(&divisors(whole)));
    Some(Problem::new(format!("{path}.{option}"), expected, size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divisors_are_all_and_ascending() {
        for size in [1, 2, 12, 16, 97, 576, 11008] {
            let expected: Vec<usize> = (1..=size).filter(|d| size % d == 0).collect();
            assert_eq!(divisors(size), expected);
        }
    }

    #[test]
    fn sizes_that_do_not_divide_are_named_with_those_that_do() {
        let text = |method: Method| match method.problem("up_proj", [12, 10], 4).map(Problem::argument) {
            Some(error) => error.to_string(),
            None => String::new(),
        };
        let lambda = |lambda| text(Method::QBara(QBara { lambda }));
        assert_eq!(lambda(2), "");
        let expected = "up_proj.lambda: expected a divisor of the 10 outputs: 1, 2, 5, 10, found 3";
        assert_eq!(lambda(3), expected);
        assert!(lambda(0).contains("12 inputs: 1, 2, 3, 4, 6, 12, found 0"), "{}", lambda(0));
        let hira = QaHira { pool: 5, repeat: 2, ..QaHira::default() };
        assert!(text(Method::QaHira(hira)).starts_with("up_proj.pool"), "{}", text(Method::QaHira(hira)));
        let blora = QaBlora { pool: 4, repeat: 4, rank: None };
        assert!(text(Method::QaBlora(blora)).starts_with("up_proj.repeat"));
        let blora = QaBlora { pool: 4, repeat: 5, rank: Some(0) };
        assert!(text(Method::QaBlora(blora)).starts_with("up_proj.rank"));
        let lora = QaLora { pool: 7, ..QaLora::default() };
        assert!(text(Method::QaLora(lora)).starts_with("up_proj.pool"));
    }
}
