//! A part of a matrix in two factors: its leading singular vectors (LoftQ, PiSSA) or the first columns of its QR
//! decomposition (OLoRA).

use faer::{Mat, MatRef};
use kiln_quant_core::hash::Fnv1a;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::{Result, json_fields::Problem, random::box_muller};

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
/// equally by the factors. Signs of singular vectors are nobody's to fix: a column of A and its row of B may both be
/// negated against another program's. `name` is for errors.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) naming `name` if sizes don't fit, for values that aren't finite, and for
/// a decomposition that doesn't converge.
pub fn low_rank(name: &str, matrix: &[f32], d_input: usize, rank: usize, svd: Svd) -> Result<Factors> {
    low_rank_scaled(name, matrix, d_input, rank, svd, 1.0)
}

/// [`low_rank`] of `matrix / scaling`: the factors of a LoRA adapter with that scaling. It is what
/// [PiSSA](https://arxiv.org/abs/2404.02948) starts from, as PEFT computes it.
pub(crate) fn low_rank_scaled(
    name: &str,
    matrix: &[f32],
    d_input: usize,
    rank: usize,
    svd: Svd,
    scaling: f64,
) -> Result<Factors> {
    let matrix = checked(name, matrix, d_input, rank)?;
    let d_output = matrix.nrows();
    let failed = || Problem::new(name, "a singular value decomposition that converges", "none").argument();
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
        if k < s.len() { (vectors[(row, k)] * (s[k].max(0.0) / scaling).sqrt()) as f32 } else { 0.0 }
    };
    Ok(Factors {
        rank,
        a: (0..d_input * rank).map(|at| factor(&v, at / rank, at % rank)).collect(),
        b: (0..rank * d_output).map(|at| factor(&u, at % d_output, at / d_output)).collect(),
    })
}

/// The first `rank` columns of Q as B and rows of R as A of `matrix = Q · R`, `[d_output, d_input]` row-major: what
/// [OLoRA](https://arxiv.org/abs/2406.01775) starts from, as PEFT computes it. Signs are LAPACK's: a diagonal element of
/// R has the opposite sign of what stood there, unless all below it was zero already.
///
/// `rank` is at most the smaller size.
pub(crate) fn leading_qr(name: &str, matrix: &[f32], d_input: usize, rank: usize) -> Result<Factors> {
    let matrix = checked(name, matrix, d_input, rank)?;
    // The first columns of Q are those of the first columns' own decomposition.
    let q = matrix.subcols(0, rank).qr().compute_thin_Q();
    let r = q.transpose() * &matrix;
    // Below the diagonal R is zero but for rounding.
    let r_at = |k: usize, i: usize| if i < k { 0.0 } else { r[(k, i)] as f32 };
    Ok(Factors {
        rank,
        a: (0..d_input * rank).map(|at| r_at(at % rank, at / rank)).collect(),
        b: (0..rank * matrix.nrows())
            .map(|at| q[(at % matrix.nrows(), at / matrix.nrows())] as f32)
            .collect(),
    })
}

/// `matrix` in f64.
fn checked(name: &str, matrix: &[f32], d_input: usize, rank: usize) -> Result<Mat<f64>> {
    let fail = |expected: String, found: String| Err(Problem::new(name, expected, found).argument());
    if d_input == 0 || matrix.is_empty() || !matrix.len().is_multiple_of(d_input) {
        return fail(format!("rows of {d_input} values, at least one"), format!("{} values", matrix.len()));
    }
    if rank == 0 {
        return fail("a rank from 1".into(), "0".into());
    }
    if let Some(at) = matrix.iter().position(|value| !value.is_finite()) {
        let found = format!("{} at output {}, input {}", matrix[at], at / d_input, at % d_input);
        return fail("finite values, for a decomposition".into(), found);
    }
    Ok(Mat::from_fn(matrix.len() / d_input, d_input, |j, i| f64::from(matrix[j * d_input + i])))
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
    ChaCha8Rng::seed_from_u64(Fnv1a::of(seed.to_le_bytes().into_iter().chain(name.bytes())).value())
}

fn normal(rng: &mut ChaCha8Rng) -> f64 {
    let unit = |rng: &mut ChaCha8Rng| (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    let within = 1.0 - unit(rng);
    box_muller(1.0, within, unit(rng))
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
            let svd = low_rank("layers.0.fc1", &matrix, 2, 1, Svd::Exact).unwrap_err();
            let qr = leading_qr("layers.0.fc1", &matrix, 2, 1).unwrap_err();
            for error in [svd, qr] {
                assert!(error.to_string().starts_with("layers.0.fc1"), "{error}");
            }
        }
    }

    /// Householder's reflections one after another, as LAPACK's `dgeqr2` makes them: the first columns of Q.
    fn by_reflections(matrix: MatRef<'_, f64>, count: usize) -> Mat<f64> {
        let (rows, columns) = (matrix.nrows(), count);
        let (mut work, mut q) = (matrix.to_owned(), Mat::<f64>::identity(rows, rows));
        for k in 0..count {
            let tail: f64 = (k + 1..rows).map(|i| work[(i, k)].powi(2)).sum();
            if tail == 0.0 {
                continue;
            }
            let mut v: Vec<f64> = (k..rows).map(|i| work[(i, k)]).collect();
            v[0] += (v[0] * v[0] + tail).sqrt().copysign(v[0]);
            let norm: f64 = v.iter().map(|x| x * x).sum();
            for j in 0..columns {
                let along: f64 = (k..rows).map(|i| v[i - k] * work[(i, j)]).sum();
                (k..rows).for_each(|i| work[(i, j)] -= 2.0 * along / norm * v[i - k]);
            }
            for j in 0..rows {
                let along: f64 = (k..rows).map(|i| q[(j, i)] * v[i - k]).sum();
                (k..rows).for_each(|i| q[(j, i)] -= 2.0 * along / norm * v[i - k]);
            }
        }
        q.subcols(0, count).to_owned()
    }

    #[test]
    fn qr_has_lapacks_signs() {
        let identity: Vec<f32> = (0..36).map(|at| f32::from(u8::from(at % 7 == 0))).collect();
        let upper: Vec<f32> =
            values(6, 36).iter().enumerate().map(|(at, x)| if at % 6 < at / 6 { 0.0 } else { *x }).collect();
        let dead: Vec<f32> =
            values(7, 60).iter().enumerate().map(|(at, x)| if at % 6 == 1 { 0.0 } else { *x }).collect();
        for (case, d_output, matrix) in [
            ("tall", 14, values(4, 14 * 6)),
            ("wide", 4, values(5, 4 * 6)),
            ("identity", 6, identity),
            ("triangular", 6, upper),
            ("a dead input", 10, dead),
        ] {
            for rank in 1..=d_output.min(6) {
                let found = leading_qr("w", &matrix, 6, rank).unwrap();
                let whole = Mat::from_fn(d_output, 6, |j, i| f64::from(matrix[j * 6 + i]));
                let q = by_reflections(whole.as_ref(), rank);
                let r = q.transpose() * &whole;
                for (k, b) in found.b.chunks(d_output).enumerate() {
                    for (j, b) in b.iter().enumerate() {
                        assert!((f64::from(*b) - q[(j, k)]).abs() < 1e-6, "{case} {rank}: Q {j} {k}");
                    }
                }
                for (i, a) in found.a.chunks(rank).enumerate() {
                    for (k, a) in a.iter().enumerate() {
                        assert!((f64::from(*a) - r[(k, i)]).abs() < 1e-6, "{case} {rank}: R {k} {i}");
                        assert!(i >= k || *a == 0.0, "{case} {rank}: R {k} {i}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_scaling_is_divided_out_of_both_factors_alike() {
        let matrix = values(8, 20 * 12);
        let plain = low_rank("w", &matrix, 20, 3, Svd::Exact).unwrap();
        let scaled = low_rank_scaled("w", &matrix, 20, 3, Svd::Exact, 4.0).unwrap();
        let halves = |values: &[f32]| values.iter().map(|x| x / 2.0).collect::<Vec<f32>>();
        assert_eq!((scaled.a, scaled.b), (halves(&plain.a), halves(&plain.b)));
    }
}
