//! A part of a matrix in two factors: its leading singular vectors (LoftQ, PiSSA) or the first columns of its QR
//! decomposition (OLoRA).

use faer::{Mat, MatRef};
use kiln_quant_core::{hash::Fnv1a, random::box_muller};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::{Result, json_fields::Problem};

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
    let found = match svd {
        Svd::Exact => thin_svd(matrix.as_ref()),
        Svd::Randomized { iterations, oversampling, seed } => {
            let columns = rank.saturating_add(oversampling).min(d_input).min(matrix.nrows());
            let mut rng = generator(seed, name);
            let start = Mat::from_fn(d_input, columns, |_, _| normal(&mut rng));
            near_svd(matrix.as_ref(), &start, iterations)
        }
    };
    split(name, found, rank, scaling)
}

/// As [`low_rank_scaled`] by subspace iteration from `start`, `rank` directions `[d_output, rank]` row-major in the space
/// of outputs.
pub(crate) fn low_rank_from(
    name: &str,
    matrix: &[f32],
    d_input: usize,
    rank: usize,
    start: &[f32],
    iterations: usize,
    scaling: f64,
) -> Result<Factors> {
    let matrix = checked(name, matrix, d_input, rank)?;
    let start = Mat::from_fn(matrix.nrows(), rank, |j, k| f64::from(start[j * rank + k]));
    let found = near_svd(matrix.transpose(), &start, iterations);
    split(name, found.map(|(inputs, values, outputs)| (outputs, values, inputs)), rank, scaling)
}

/// Singular vectors as factors, of which each gets the root of `value / scaling`.
fn split(name: &str, found: Option<Singular>, rank: usize, scaling: f64) -> Result<Factors> {
    let failed = || Problem::new(name, "a singular value decomposition that converges", "none").argument();
    let (u, s, v) = found.ok_or_else(failed)?;
    // Beyond the matrix's own rank the factors are zero.
    let factor = |vectors: &Mat<f64>, row: usize, k: usize| {
        if k < s.len() { (vectors[(row, k)] * (s[k].max(0.0) / scaling).sqrt()) as f32 } else { 0.0 }
    };
    let (d_input, d_output) = (v.nrows(), u.nrows());
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
    let q = leading_q(matrix.as_ref(), rank);
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

/// The first columns of Q by Householder's reflections, which faer's decomposition leaves out for a column of zeros (a
/// dead input), where LAPACK counts it.
fn leading_q(matrix: MatRef<'_, f64>, count: usize) -> Mat<f64> {
    let rows = matrix.nrows();
    let mut columns: Vec<Vec<f64>> =
        (0..count).map(|k| (0..rows).map(|j| matrix[(j, k)]).collect()).collect();
    let mut reflections: Vec<Vec<f64>> = Vec::new();
    for k in 0..count {
        let reflection = reflection(&columns[k][k..]);
        columns[k + 1..].iter_mut().for_each(|column| reflect(&reflection, &mut column[k..]));
        reflections.push(reflection);
    }
    for (k, column) in columns.iter_mut().enumerate() {
        column.fill(0.0);
        column[k] = 1.0;
        reflections.iter().enumerate().rev().for_each(|(i, v)| reflect(v, &mut column[i..]));
    }
    Mat::from_fn(rows, count, |j, k| columns[k][j])
}

/// The unit vector v for which `x - 2 v (v · x)` is a multiple of the first axis; empty where x already is.
fn reflection(x: &[f64]) -> Vec<f64> {
    let squares = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>();
    if squares(&x[1..]) == 0.0 {
        return Vec::new();
    }
    let mut v = x.to_vec();
    v[0] += squares(x).sqrt().copysign(x[0]);
    let norm = squares(&v).sqrt();
    v.iter_mut().for_each(|value| *value /= norm);
    v
}

fn reflect(v: &[f64], x: &mut [f64]) {
    let along: f64 = v.iter().zip(&*x).map(|(v, x)| v * x).sum();
    x.iter_mut().zip(v).for_each(|(x, v)| *x -= 2.0 * along * v);
}

/// Left vectors, values, right vectors.
type Singular = (Mat<f64>, Vec<f64>, Mat<f64>);

fn thin_svd(matrix: MatRef<'_, f64>) -> Option<Singular> {
    let svd = matrix.thin_svd().ok()?;
    let values = svd.S().column_vector();
    let values = (0..values.nrows()).map(|k| values[k]).collect();
    Some((svd.U().to_owned(), values, svd.V().to_owned()))
}

/// The leading singular vectors, about, by subspace iteration from the columns of `start`.
fn near_svd(matrix: MatRef<'_, f64>, start: &Mat<f64>, iterations: usize) -> Option<Singular> {
    let mut basis = orthonormal(matrix * start);
    for _ in 0..iterations {
        let back = orthonormal(matrix.transpose() * &basis);
        basis = orthonormal(matrix * &back);
    }
    let (u, s, v) = thin_svd((basis.transpose() * matrix).as_ref())?;
    Some((basis * u, s, v))
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

    #[test]
    fn qr_is_the_leading_part_of_the_decomposition_with_lapacks_signs() {
        let whole =
            |d_output: usize, matrix: &[f32]| Mat::from_fn(d_output, 6, |j, i| f64::from(matrix[j * 6 + i]));
        for (d_output, matrix) in [(14, values(4, 14 * 6)), (4, values(5, 4 * 6)), (6, values(6, 36))] {
            let qr = whole(d_output, &matrix).qr();
            let (q, r) = (qr.compute_thin_Q(), qr.thin_R());
            for rank in 1..=d_output.min(6) {
                let found = leading_qr("w", &matrix, 6, rank).unwrap();
                let b = (0..rank * d_output).map(|at| (found.b[at], q[(at % d_output, at / d_output)]));
                let a = (0..6 * rank).map(|at| (found.a[at], r[(at % rank, at / rank)]));
                for (found, expected) in b.chain(a) {
                    assert!((f64::from(found) - expected).abs() < 1e-6, "{d_output} {rank}");
                }
            }
        }
    }

    #[test]
    fn qr_counts_dead_inputs_and_leaves_what_is_triangular() {
        let zero_where = |seed, zero: fn(usize) -> bool| -> Vec<f32> {
            values(seed, 60).into_iter().enumerate().map(|(at, x)| if zero(at) { 0.0 } else { x }).collect()
        };
        // LAPACK turns no column that is zero below the diagonal: not an input that is always zero either.
        let triangular = zero_where(6, |at| at % 6 < at / 6);
        let found = leading_qr("w", &triangular, 6, 6).unwrap();
        let axes: Vec<f32> = (0..60).map(|at| f32::from(u8::from(at % 10 == at / 10))).collect();
        assert_eq!(found.b, axes);
        let dead = zero_where(7, |at| at % 6 == 1);
        let Factors { a, b, .. } = leading_qr("w", &dead, 6, 6).unwrap();
        let product = Factors { rank: 6, a: a.clone(), b: b.clone() }.product();
        assert!(relative_difference(&product, &dead) < 1e-6);
        // Its row of A is zero, its column of Q the second axis as the first reflection leaves it.
        assert!(a[6..12].iter().all(|x| x.abs() < 1e-7), "{:?}", &a[6..12]);
        let first: Vec<f64> = (0..10).map(|j| f64::from(dead[j * 6])).collect();
        let v = reflection(&first);
        for (j, b) in b[10..20].iter().enumerate() {
            let axis = f64::from(u8::from(j == 1));
            assert!((f64::from(*b) - (axis - 2.0 * v[1] * v[j])).abs() < 1e-6, "{j}");
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
