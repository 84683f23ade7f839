//! Host decompositions in f64 for initialisations: Householder QR and leading singular vectors.

use crate::json_fields::Problem;

/// A row-major matrix.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Matrix {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) values: Vec<f64>,
}

impl Matrix {
    pub(crate) fn new(rows: usize, columns: usize, values: Vec<f64>) -> Self {
        assert_eq!(values.len(), rows * columns, "values of {rows} × {columns}");
        Self { rows, columns, values }
    }

    pub(crate) fn zeros(rows: usize, columns: usize) -> Self {
        Self::new(rows, columns, vec![0.0; rows * columns])
    }

    pub(crate) fn row(&self, row: usize) -> &[f64] {
        &self.values[row * self.columns..][..self.columns]
    }

    fn row_mut(&mut self, row: usize) -> &mut [f64] {
        &mut self.values[row * self.columns..][..self.columns]
    }

    pub(crate) fn transpose(&self) -> Self {
        let values = (0..self.columns).flat_map(|c| (0..self.rows).map(move |r| (r, c)));
        Self::new(self.columns, self.rows, values.map(|(r, c)| self.values[r * self.columns + c]).collect())
    }

    /// `self · other`.
    pub(crate) fn multiply(&self, other: &Self) -> Self {
        assert_eq!(self.columns, other.rows, "sizes of a product");
        let mut product = Self::zeros(self.rows, other.columns);
        for row in 0..self.rows {
            for inner in 0..self.columns {
                let factor = self.values[row * self.columns + inner];
                add_scaled(product.row_mut(row), factor, other.row(inner));
            }
        }
        product
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    // Sixteen sums, so that the compiler may use wide registers.
    let mut lanes = [0.0; 16];
    let (a_chunks, b_chunks) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f64 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        lanes.iter_mut().zip(a.iter().zip(b)).for_each(|(lane, (x, y))| *lane += x * y);
    }
    lanes.iter().sum::<f64>() + rest
}

fn add_scaled(to: &mut [f64], factor: f64, from: &[f64]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += factor * from);
}

/// The first `count` columns of Q and rows of R of `matrix = Q · R`, by Householder's reflections with LAPACK's signs:
/// a diagonal element of R has the opposite sign of what stood there, unless all below it was zero already.
///
/// `count` is at most the smaller size.
pub(crate) fn qr(matrix: &Matrix, count: usize) -> (Matrix, Matrix) {
    let (rows, columns) = (matrix.rows, matrix.columns);
    assert!(count <= rows.min(columns), "{count} of {rows} × {columns}");
    // Columns as rows: reflections go along them.
    let mut work = matrix.transpose();
    let mut reflections: Vec<Vec<f64>> = Vec::with_capacity(count);
    for k in 0..count {
        let reflection = reflection(&work.row(k)[k..]);
        for column in k..columns {
            reflect(&reflection, &mut work.row_mut(column)[k..]);
        }
        reflections.push(reflection);
    }
    let mut r = Matrix::zeros(count, columns);
    for row in 0..count {
        for column in row..columns {
            r.values[row * columns + column] = work.values[column * rows + row];
        }
    }
    let mut q = Matrix::zeros(count, rows);
    for column in 0..count {
        q.row_mut(column)[column] = 1.0;
        for (k, reflection) in reflections.iter().enumerate().rev() {
            reflect(reflection, &mut q.row_mut(column)[k..]);
        }
    }
    (q.transpose(), r)
}

/// The unit vector v for which `x - 2 v (v · x)` is a multiple of the first axis; empty where x already is.
fn reflection(x: &[f64]) -> Vec<f64> {
    let below = dot(&x[1..], &x[1..]);
    if below == 0.0 {
        return Vec::new();
    }
    let length = (x[0] * x[0] + below).sqrt();
    let mut v = x.to_vec();
    v[0] += length.copysign(x[0]);
    let norm = (v[0] * v[0] + below).sqrt();
    v.iter_mut().for_each(|value| *value /= norm);
    v
}

fn reflect(v: &[f64], x: &mut [f64]) {
    if !v.is_empty() {
        let along = dot(v, x);
        add_scaled(x, -2.0 * along, v);
    }
}

/// The largest singular values of a matrix, with their vectors in rows: `[count, rows]` and `[count, columns]`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Singular {
    pub(crate) values: Vec<f64>,
    pub(crate) left: Matrix,
    pub(crate) right: Matrix,
}

/// The `count` largest singular values and their vectors, from the eigenvectors of the smaller Gram matrix. In f64 that
/// loses digits only of values far below the largest. Vectors of a value that is zero to rounding are zero.
///
/// # Errors
/// Values that aren't finite.
pub(crate) fn singular(matrix: &Matrix, count: usize) -> Result<Singular, Problem> {
    if matrix.rows > matrix.columns {
        let Singular { values, left, right } = singular(&matrix.transpose(), count)?;
        return Ok(Singular { values, left: right, right: left });
    }
    let n = matrix.rows;
    let mut gram = Matrix::zeros(n, n);
    for i in 0..n {
        for j in 0..=i {
            let value = dot(matrix.row(i), matrix.row(j));
            gram.values[i * n + j] = value;
            gram.values[j * n + i] = value;
        }
    }
    let (eigenvalues, eigenvectors) = symmetric_eigen(gram)?;
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|a, b| eigenvalues[*b].total_cmp(&eigenvalues[*a]));
    let largest = eigenvalues[order[0]].max(0.0);
    let (mut values, mut left) = (Vec::new(), Matrix::zeros(count, n));
    for (to, from) in order.into_iter().take(count).enumerate() {
        let zero = eigenvalues[from] <= largest * f64::EPSILON * n as f64;
        values.push(if zero { 0.0 } else { eigenvalues[from].sqrt() });
        left.row_mut(to).copy_from_slice(eigenvectors.row(from));
    }
    let mut right = left.multiply(matrix);
    for (row, value) in values.iter().enumerate() {
        let factor = if *value == 0.0 { 0.0 } else { value.recip() };
        right.row_mut(row).iter_mut().for_each(|x| *x *= factor);
        if *value == 0.0 {
            left.row_mut(row).fill(0.0);
        }
    }
    Ok(Singular { values, left, right })
}

/// Approximates [`singular`] by `iterations` of subspace iteration from the columns of `start`
/// `[matrix.columns, count]`.
pub(crate) fn singular_from(matrix: &Matrix, start: &Matrix, iterations: usize) -> Result<Singular, Problem> {
    let count = start.columns;
    let transposed = matrix.transpose();
    let basis = |x: &Matrix| qr(x, count).0;
    let mut q = basis(&matrix.multiply(start));
    for _ in 0..iterations {
        q = basis(&matrix.multiply(&basis(&transposed.multiply(&q))));
    }
    let qt = q.transpose();
    let Singular { values, left, right } = singular(&qt.multiply(matrix), count)?;
    Ok(Singular { values, left: left.multiply(&qt), right })
}

/// Eigenvalues of a symmetric matrix and their vectors in rows, in no particular order: Householder's reduction to
/// three diagonals, then QL steps with implicit shifts (Golub and Van Loan, Matrix Computations, 8.3).
///
/// # Errors
/// Values that aren't finite.
fn symmetric_eigen(mut a: Matrix) -> Result<(Vec<f64>, Matrix), Problem> {
    let n = a.rows;
    let mut reflections = Vec::new();
    for k in 0..n.saturating_sub(2) {
        let v = reflection(&a.row(k)[k + 1..]);
        if !v.is_empty() {
            reflect_both_sides(&mut a, &v, k + 1);
            // Row and column k, which hold only what the reflection leaves.
            let mut row = a.row(k)[k + 1..].to_vec();
            reflect(&v, &mut row);
            a.row_mut(k)[k + 1..].copy_from_slice(&row);
        }
        reflections.push(v);
    }
    let mut diagonal: Vec<f64> = (0..n).map(|i| a.values[i * n + i]).collect();
    let mut beside: Vec<f64> = (1..n).map(|i| a.values[(i - 1) * n + i]).chain([0.0]).collect();
    let mut vectors = Matrix::zeros(n, n);
    for i in 0..n {
        let row = vectors.row_mut(i);
        row[i] = 1.0;
        for (k, v) in reflections.iter().enumerate().rev() {
            reflect(v, &mut row[k + 1..]);
        }
    }
    ql(&mut diagonal, &mut beside, &mut vectors)?;
    Ok((diagonal, vectors))
}

/// `a ← H a H` on rows and columns from `first`, with H the reflection along the unit vector `v`.
fn reflect_both_sides(a: &mut Matrix, v: &[f64], first: usize) {
    let product: Vec<f64> = (0..v.len()).map(|i| dot(&a.row(first + i)[first..], v)).collect();
    let along = dot(&product, v);
    let w: Vec<f64> = product.iter().zip(v).map(|(p, v)| p - along * v).collect();
    for i in 0..v.len() {
        let row = &mut a.row_mut(first + i)[first..];
        add_scaled(row, -2.0 * v[i], &w);
        add_scaled(row, -2.0 * w[i], v);
    }
}

/// Makes the matrix of `diagonal` and `beside` it diagonal, and turns the rows of `vectors` with it.
fn ql(diagonal: &mut [f64], beside: &mut [f64], vectors: &mut Matrix) -> Result<(), Problem> {
    const MOST_STEPS: usize = 60;
    let n = diagonal.len();
    for l in 0..n {
        for step in 0.. {
            let small = |m: &usize| {
                *m + 1 == n || beside[*m].abs() <= f64::EPSILON * (diagonal[*m].abs() + diagonal[m + 1].abs())
            };
            let m = (l..n).find(small).unwrap_or(n - 1);
            if m == l {
                break;
            }
            if step == MOST_STEPS {
                return Err(Problem::new("weight", "finite values, for a decomposition", "no convergence"));
            }
            ql_step(diagonal, beside, vectors, [l, m]);
        }
    }
    Ok(())
}

/// One sweep of rotations over rows l to m, shifted by the eigenvalue of the leading two rows that is nearer.
fn ql_step(diagonal: &mut [f64], beside: &mut [f64], vectors: &mut Matrix, [l, m]: [usize; 2]) {
    let shift = (diagonal[l + 1] - diagonal[l]) / (2.0 * beside[l]);
    let mut g = diagonal[m] - diagonal[l] + beside[l] / (shift + shift.hypot(1.0).copysign(shift));
    let (mut sine, mut cosine, mut moved) = (1.0, 1.0, 0.0);
    for i in (l..m).rev() {
        let (f, b) = (sine * beside[i], cosine * beside[i]);
        let length = f.hypot(g);
        beside[i + 1] = length;
        if length == 0.0 {
            diagonal[i + 1] -= moved;
            beside[m] = 0.0;
            return;
        }
        (sine, cosine) = (f / length, g / length);
        let difference = diagonal[i + 1] - moved;
        let r = (diagonal[i] - difference) * sine + 2.0 * cosine * b;
        moved = sine * r;
        diagonal[i + 1] = difference + moved;
        g = cosine * r - b;
        let (upper, lower) = vectors.values[i * vectors.columns..].split_at_mut(vectors.columns);
        for (x, y) in upper.iter_mut().zip(lower) {
            (*x, *y) = (cosine * *x - sine * *y, sine * *x + cosine * *y);
        }
    }
    diagonal[l] -= moved;
    beside[l] = g;
    beside[m] = 0.0;
}

#[cfg(test)]
mod tests {
    use kiln_testkit::values;
    use proptest::prelude::*;

    use super::*;

    fn random(seed: u64, rows: usize, columns: usize) -> Matrix {
        Matrix::new(rows, columns, values(seed, rows * columns).into_iter().map(f64::from).collect())
    }

    #[track_caller]
    fn close(found: &Matrix, expected: &Matrix, tolerance: f64) {
        assert_eq!((found.rows, found.columns), (expected.rows, expected.columns));
        for (a, b) in found.values.iter().zip(&expected.values) {
            assert!((a - b).abs() <= tolerance, "{a} and {b}");
        }
    }

    fn identity(n: usize) -> Matrix {
        let mut one = Matrix::zeros(n, n);
        (0..n).for_each(|i| one.values[i * n + i] = 1.0);
        one
    }

    proptest! {
        #[test]
        fn qr_is_orthogonal_triangular_and_gives_the_matrix(seed in 0u64..1000, rows in 1usize..14, columns in 1usize..14) {
            let matrix = random(seed, rows, columns);
            let (q, r) = qr(&matrix, rows.min(columns));
            close(&q.transpose().multiply(&q), &identity(rows.min(columns)), 1e-13);
            close(&q.multiply(&r), &matrix, 1e-13);
            for row in 0..r.rows {
                prop_assert!(r.row(row)[..row].iter().all(|x| *x == 0.0));
            }
        }

        #[test]
        fn all_singular_vectors_are_orthogonal_and_give_the_matrix(seed in 0u64..1000, rows in 1usize..14, columns in 1usize..14) {
            let matrix = random(seed, rows, columns);
            let count = rows.min(columns);
            let Singular { values, left, right } = singular(&matrix, count).unwrap();
            prop_assert!(values.is_sorted_by(|a, b| a >= b));
            let mut scaled = right.clone();
            for (row, value) in values.iter().enumerate() {
                scaled.row_mut(row).iter_mut().for_each(|x| *x *= value);
            }
            close(&left.transpose().multiply(&scaled), &matrix, 1e-12);
            // The smallest of a square random matrix may be far below the rest, and has lost digits.
            let sure = values.iter().filter(|value| **value > 1e-3 * values[0]).count();
            let cut = |m: &Matrix| Matrix::new(sure, m.columns, m.values[..sure * m.columns].to_vec());
            close(&cut(&left).multiply(&cut(&left).transpose()), &identity(sure), 1e-9);
            close(&cut(&right).multiply(&cut(&right).transpose()), &identity(sure), 1e-9);
        }
    }

    #[test]
    fn a_matrix_of_low_rank_has_zero_values_behind() {
        let matrix = random(1, 20, 3).multiply(&random(2, 3, 30));
        let Singular { values, left, right } = singular(&matrix, 5).unwrap();
        assert!(values[2] > 0.1 && values[3..] == [0.0, 0.0], "{values:?}");
        assert!(left.row(4).iter().chain(right.row(4)).all(|x| *x == 0.0));
        let zero = singular(&Matrix::zeros(4, 6), 2).unwrap();
        assert_eq!(zero.values, [0.0, 0.0]);
    }

    #[test]
    fn subspace_iteration_finds_the_largest() {
        // Singular values 1, 1/2, 1/4, ..: each iteration gains a factor of four squared.
        let (q, _) = qr(&random(3, 40, 12), 12);
        let (p, _) = qr(&random(4, 30, 12), 12);
        let mut scaled = p.transpose();
        for row in 0..12 {
            scaled.row_mut(row).iter_mut().for_each(|x| *x *= 0.5f64.powi(row as i32));
        }
        let matrix = q.multiply(&scaled);
        let exact = singular(&matrix, 4).unwrap();
        let found = singular_from(&matrix, &random(5, 30, 4), 16).unwrap();
        for (i, (a, b)) in found.values.iter().zip(&exact.values).enumerate() {
            assert!((a - b).abs() < 1e-8 && (b - 0.5f64.powi(i as i32)).abs() < 1e-12, "{a} {b}");
        }
        for i in 0..4 {
            assert!((dot(found.left.row(i), exact.left.row(i)).abs() - 1.0).abs() < 1e-6);
        }
    }

    #[test]
    fn values_that_are_not_finite_end_in_an_error() {
        let mut matrix = random(1, 6, 6);
        matrix.values[7] = f64::NAN;
        assert!(singular(&matrix, 2).is_err());
    }
}
