//! Divergences between the next-token distributions of a reference model and a quantized one, from logits.

use crate::{Error, Result};

/// How two distributions are compared; natural logarithms, the reference first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Divergence {
    /// `KL(reference || quantized)` over the whole vocabulary.
    Kl,
    /// KL over the reference's `k` likeliest tokens and one bucket for the rest; never more than [`Self::Kl`].
    TopKWithRest(usize),
    /// KL between softmaxes of the logits of the reference's `k` likeliest tokens alone (EvoPress).
    TopKRenormalised(usize),
    /// Jensen-Shannon: symmetric and bounded (AMQ).
    JensenShannon,
}

impl Divergence {
    /// The divergence at one position.
    ///
    /// # Errors
    /// [`Error::Option`] if the lengths differ or are 0, `k` is 0 or larger than the vocabulary, or a logit is NaN or
    /// positive infinity.
    pub fn between(self, reference: &[f32], quantized: &[f32]) -> Result<f64> {
        if reference.is_empty() || reference.len() != quantized.len() {
            let expected = format!("{} logits, at least one", reference.len());
            return Err(Error::option("divergence.quantized", &expected, quantized.len()));
        }
        if let Some(bad) =
            reference.iter().chain(quantized).find(|logit| logit.is_nan() || **logit == f32::INFINITY)
        {
            return Err(Error::option("divergence.logits", "finite logits", bad));
        }
        let (p, q) = (log_softmax(reference.iter().copied()), log_softmax(quantized.iter().copied()));
        Ok(match self {
            Self::Kl => kl(&p, &q),
            Self::JensenShannon => {
                let middle: Vec<f64> =
                    p.iter().zip(&q).map(|(p, q)| (0.5 * (p.exp() + q.exp())).ln()).collect();
                0.5 * (kl(&p, &middle) + kl(&q, &middle))
            }
            Self::TopKWithRest(k) => {
                let top = likeliest(reference, k)?;
                let lump = |log: &[f64]| -> Vec<f64> {
                    let kept: Vec<f64> = top.iter().map(|&token| log[token]).collect();
                    let rest = 1.0 - kept.iter().map(|log| log.exp()).sum::<f64>();
                    kept.into_iter().chain([rest.max(f64::MIN_POSITIVE).ln()]).collect()
                };
                kl(&lump(&p), &lump(&q))
            }
            Self::TopKRenormalised(k) => {
                let top = likeliest(reference, k)?;
                let within = |logits: &[f32]| log_softmax(top.iter().map(|&token| logits[token]));
                kl(&within(reference), &within(quantized))
            }
        })
    }
}

/// Log-softmax in 64 bits, shifted by the largest logit.
fn log_softmax(logits: impl Iterator<Item = f32> + Clone) -> Vec<f64> {
    let largest = logits.clone().fold(f32::NEG_INFINITY, f32::max);
    let largest = f64::from(largest).max(f64::MIN);
    let total: f64 = logits.clone().map(|logit| (f64::from(logit) - largest).exp()).sum();
    logits.map(|logit| f64::from(logit) - largest - total.ln()).collect()
}

fn kl(p: &[f64], q: &[f64]) -> f64 {
    // A token that the reference rules out adds nothing, whatever the other says.
    let terms = p.iter().zip(q).filter(|(p, _)| p.exp() > 0.0);
    terms.map(|(p, q)| p.exp() * (p - q)).sum::<f64>().max(0.0)
}

fn likeliest(logits: &[f32], k: usize) -> Result<Vec<usize>> {
    if k == 0 || k > logits.len() {
        return Err(Error::option("divergence.k", &format!("1 to {}", logits.len()), k));
    }
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    order.truncate(k);
    Ok(order)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{close, vector};

    #[test]
    fn reference_divergences() {
        let file = vector("automixq_divergence.json");
        let reference: Vec<Vec<f32>> = serde_json::from_value(file["logits_ref"].clone()).unwrap();
        let quantized: Vec<Vec<f32>> = serde_json::from_value(file["logits_quant"].clone()).unwrap();
        let k = file["k"].as_u64().unwrap() as usize;
        for (name, divergence) in [
            ("kl", Divergence::Kl),
            ("topk_kl_with_rest", Divergence::TopKWithRest(k)),
            ("topk_kl_renormalised", Divergence::TopKRenormalised(k)),
            ("jsd", Divergence::JensenShannon),
        ] {
            let expected: Vec<f64> = serde_json::from_value(file[name].clone()).unwrap();
            assert_eq!(expected.len(), 3);
            for ((reference, quantized), expected) in reference.iter().zip(&quantized).zip(expected) {
                let found = divergence.between(reference, quantized).unwrap();
                // Logits are f32 here and decimal in the vectors: 2e-7 of a logit of 7, times a gap of the logits.
                assert!(
                    (found - expected).abs() <= 1e-6 * expected + 2e-7,
                    "{name}: {found} against {expected}"
                );
            }
        }
    }

    #[test]
    fn equal_logits_have_no_divergence_and_impossible_tokens_count_nothing() {
        let logits = [1.0, f32::NEG_INFINITY, -3.0];
        for divergence in [Divergence::Kl, Divergence::JensenShannon, Divergence::TopKWithRest(2)] {
            close(divergence.between(&logits, &logits).unwrap(), 0.0);
        }
    }

    #[test]
    fn bad_logits_are_errors() {
        assert!(Divergence::Kl.between(&[], &[]).is_err());
        assert!(Divergence::Kl.between(&[1.0], &[1.0, 2.0]).unwrap_err().to_string().contains('2'));
        assert!(Divergence::Kl.between(&[f32::NAN], &[1.0]).unwrap_err().to_string().contains("NaN"));
        for k in [0, 3] {
            assert!(Divergence::TopKWithRest(k).between(&[1.0, 2.0], &[1.0, 2.0]).is_err());
        }
    }
}
