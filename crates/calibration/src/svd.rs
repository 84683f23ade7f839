//! The best low-rank approximation of a matrix.

use faer::{Mat, MatRef};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::{Error, Result, values::Fingerprint};

/// How singular vectors are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Svd {
    /// All of them: `min(d_input, d_output)^2 * max(..)` operations.
    Exact,
    /// The leading ones by subspace iteration from random directions
    /// ([Halko, Martinsson and Tropp](https://arxiv.org/abs/0909.4061)): for large weights many times faster. The
    /// directions depend on the seed and the projection's name only.
    Randomized {
        /// Products with the matrix and its transpose after the first: the more, the closer to [`Exact`](Self::Exact).
        iterations: usize,
        /// Directions beyond the rank.
        oversampling: usize,
        /// Of the first directions.
        seed: u64,
    },
}

impl Default for Svd {
    fn default() -> Self {
        Self::Randomized { iterations: 4, oversampling: 8, seed: 0 }
    }
}

/// LoRA factors: A `[d_input, rank]` and B `[rank, d_output]`, row-major; the update is `A · B`.
#[derive(Debug, Clone, PartialEq)]
pub struct Factors {
    /// The rank.
    pub rank: usize,
    /// `[d_input, rank]`.
    pub a: Vec<f32>,
    /// `[rank, d_output]`.
    pub b: Vec<f32>,
}

impl Factors {
    /// `A · B` in the checkpoint's layout, `[d_output, d_input]`.
    pub fn product(&self) -> Vec<f32> {
        let rank = self.rank.max(1);
        let (d_input, d_output) = (self.a.len() / rank, self.b.len() / rank);
        let a = Mat::from_fn(d_input, self.rank, |i, k| self.a[i * self.rank + k]);
        let b = Mat::from_fn(self.rank, d_output, |k, j| self.b[k * d_output + j]);
        let product = &a * &b;
        (0..d_output).flat_map(|j| (0..d_input).map(move |i| (i, j))).map(|at| product[at]).collect()
    }
}

/// The best approximation of rank `rank` of `matrix`, `[d_output, d_input]` row-major: singular values are shared
/// equally by the factors.
///
/// # Errors
/// [`Error::Argument`] if sizes don't fit; [`Error::NotFinite`]; [`Error::Decomposition`]. All name `name`.
pub fn low_rank(name: &str, matrix: &[f32], d_input: usize, rank: usize, svd: Svd) -> Result<Factors> {
    if d_input == 0 || matrix.is_empty() || !matrix.len().is_multiple_of(d_input) {
        let found = format!("{} values", matrix.len());
        return Err(Error::argument(name, format!("rows of {d_input} values, at least one"), found));
    }
    if rank == 0 {
        return Err(Error::argument(name, "a rank from 1", rank));
    }
    if matrix.iter().any(|value| !value.is_finite()) {
        return Err(Error::NotFinite { place: name.into(), quantity: "the weight is".into() });
    }
    let d_output = matrix.len() / d_input;
    let matrix = Mat::from_fn(d_output, d_input, |j, i| f64::from(matrix[j * d_input + i]));
    let failed = || Error::Decomposition { projection: name.into() };
    let (u, s, v) = match svd {
        Svd::Exact => thin_svd(matrix.as_ref()).ok_or_else(failed)?,
        Svd::Randomized { iterations, oversampling, seed } => {
            let columns = rank.saturating_add(oversampling).min(d_input).min(d_output);
            let basis = range(matrix.as_ref(), columns, iterations, generator(seed, name));
            let (u, s, v) = thin_svd((basis.transpose() * &matrix).as_ref()).ok_or_else(failed)?;
            (basis * u, s, v)
        }
    };
    // Beyond the matrix's own rank the factors are zero.
    let factor = |vectors: &Mat<f64>, row: usize, k: usize| {
        if k < s.len() { (vectors[(row, k)] * s[k].max(0.0).sqrt()) as f32 } else { 0.0 }
    };
    Ok(Factors {
        rank,
        a: (0..d_input * rank).map(|at| factor(&v, at / rank, at % rank)).collect(),
        b: (0..rank * d_output).map(|at| factor(&u, at % d_output, at / d_output)).collect(),
    })
}

/// Left vectors, values, right vectors.
fn thin_svd(matrix: MatRef<'_, f64>) -> Option<(Mat<f64>, Vec<f64>, Mat<f64>)> {
    let svd = matrix.thin_svd().ok()?;
    let values = svd.S().column_vector();
    let values = (0..values.nrows()).map(|k| values[k]).collect();
    Some((svd.U().to_owned(), values, svd.V().to_owned()))
}

/// An orthonormal basis of about the range of the leading singular vectors.
fn range(matrix: MatRef<'_, f64>, columns: usize, iterations: usize, mut rng: ChaCha8Rng) -> Mat<f64> {
    let start = Mat::from_fn(matrix.ncols(), columns, |_, _| normal(&mut rng));
    let mut basis = orthonormal(matrix * &start);
    for _ in 0..iterations {
        let back = orthonormal(matrix.transpose() * &basis);
        basis = orthonormal(matrix * &back);
    }
    basis
}

fn orthonormal(matrix: Mat<f64>) -> Mat<f64> {
    matrix.qr().compute_thin_Q()
}

fn generator(seed: u64, name: &str) -> ChaCha8Rng {
    let mut hash = Fingerprint::new();
    hash.bytes(seed.to_le_bytes().into_iter().chain(name.bytes()));
    ChaCha8Rng::seed_from_u64(hash.value())
}

/// Box and Muller's transformation.
fn normal(rng: &mut ChaCha8Rng) -> f64 {
    let unit = |rng: &mut ChaCha8Rng| (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    let radius = (-2.0 * (1.0 - unit(rng)).ln()).sqrt();
    radius * (std::f64::consts::TAU * unit(rng)).cos()
}

#[cfg(test)]
mod tests {
    use kiln_testkit::{relative_difference, values};

    use super::*;

    const RANDOMIZED: Svd = Svd::Randomized { iterations: 6, oversampling: 8, seed: 1 };

    #[test]
    fn a_matrix_of_low_rank_is_its_own_approximation() {
        let factors = Factors { rank: 3, a: values(1, 40 * 3), b: values(2, 3 * 25) };
        let matrix = factors.product();
        for svd in [Svd::Exact, RANDOMIZED] {
            let found = low_rank("w", &matrix, 40, 3, svd).unwrap();
            assert!(relative_difference(&found.product(), &matrix) < 1e-6, "{svd:?}");
            // More rank than there is: nothing is added.
            let more = low_rank("w", &matrix, 40, 30, svd).unwrap();
            assert_eq!((more.a.len(), more.b.len()), (40 * 30, 30 * 25));
            assert!(relative_difference(&more.product(), &matrix) < 1e-6, "{svd:?}");
        }
    }

    #[test]
    fn randomized_is_close_to_exact_and_repeats_itself() {
        let matrix = values(3, 60 * 50);
        let error = |svd| {
            let found = low_rank("w", &matrix, 50, 8, svd).unwrap();
            relative_difference(&found.product(), &matrix)
        };
        let (exact, randomized) = (error(Svd::Exact), error(RANDOMIZED));
        assert!(randomized >= exact - 1e-9 && randomized < 1.01 * exact, "{randomized} and {exact}");
        let again = |name| low_rank(name, &matrix, 50, 8, Svd::default()).unwrap();
        assert_eq!(again("a"), again("a"));
    }

    #[test]
    fn bad_matrices_are_refused_by_name() {
        for matrix in [vec![1.0, f32::INFINITY], vec![], vec![1.0; 3]] {
            let error = low_rank("layers.0.fc1", &matrix, 2, 1, Svd::Exact).unwrap_err();
            assert!(error.to_string().contains("layers.0.fc1"), "{error}");
        }
    }
}
