//! How far a packed weight is from the dense one.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::PackedWeight;

/// Distance of a packed weight `Q` from the dense `W` it stands for; f64 sums.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct QuantError {
    /// Mean of `(w - q)^2`.
    pub mean_squared: f64,
    /// `‖W - Q‖ / ‖W‖` in the Frobenius norm; 0 where both norms are 0.
    pub relative: f64,
    /// Largest `|w - q|`.
    pub max_abs: f64,
}

/// Measures `packed` against the weight `[d_output, d_input]` it was made from. Dequantizes the whole weight.
///
/// # Panics
/// If `weight` doesn't hold `d_input * d_output` values.
pub fn error(weight: &[f32], packed: &PackedWeight) -> QuantError {
    let dense = packed.dequantize();
    assert_eq!(
        weight.len(),
        dense.len(),
        "values of a weight with {} outputs of {} inputs",
        packed.d_output,
        packed.d_input
    );
    // Chunks have a fixed size, so that the order of the sums doesn't depend on the number of threads.
    let parts: Vec<[f64; 3]> = weight
        .par_chunks(1 << 14)
        .zip(dense.par_chunks(1 << 14))
        .map(|(weight, dense)| {
            weight.iter().zip(dense).fold([0.0; 3], |[error, norm, max], (&w, &q)| {
                let (w, difference) = (f64::from(w), f64::from(w) - f64::from(q));
                [error + difference * difference, norm + w * w, max.max(difference.abs())]
            })
        })
        .collect();
    let [error, norm, max_abs] = parts
        .iter()
        .fold([0.0, 0.0, 0.0f64], |sum, part| [sum[0] + part[0], sum[1] + part[1], sum[2].max(part[2])]);
    QuantError {
        mean_squared: error / weight.len().max(1) as f64,
        relative: if error == 0.0 { 0.0 } else { (error / norm).sqrt() },
        max_abs,
    }
}
