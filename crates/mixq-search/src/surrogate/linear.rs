//! Solving small dense systems.

/// A symmetric positive definite matrix as `L Lᵀ`, rows of `L` one after another.
#[derive(Debug, Clone)]
pub(crate) struct Cholesky {
    lower: Vec<f64>,
    size: usize,
}

impl Cholesky {
    /// Factors a row-major matrix; `None` unless it is positive definite.
    pub(crate) fn new(mut matrix: Vec<f64>, size: usize) -> Option<Self> {
        for row in 0..size {
            for column in 0..=row {
                let (a, b) = (
                    &matrix[row * size..row * size + column],
                    &matrix[column * size..column * size + column],
                );
                let rest = matrix[row * size + column] - dot(a, b);
                matrix[row * size + column] = if row == column {
                    if rest.is_nan() || rest <= 0.0 {
                        return None;
                    }
                    rest.sqrt()
                } else {
                    rest / matrix[column * size + column]
                };
            }
        }
        Some(Self { lower: matrix, size })
    }

    /// `L⁻¹ b`.
    pub(crate) fn forward(&self, b: &[f64]) -> Vec<f64> {
        let mut x = b.to_vec();
        for row in 0..self.size {
            let line = &self.lower[row * self.size..];
            x[row] = (x[row] - dot(&line[..row], &x[..row])) / line[row];
        }
        x
    }

    /// `(L Lᵀ)⁻¹ b`.
    pub(crate) fn solve(&self, b: &[f64]) -> Vec<f64> {
        let mut x = self.forward(b);
        for row in (0..self.size).rev() {
            x[row] /= self.lower[row * self.size + row];
            for above in 0..row {
                x[above] -= self.lower[row * self.size + above] * x[row];
            }
        }
        x
    }

    /// Half the logarithm of the determinant.
    pub(crate) fn half_log_determinant(&self) -> f64 {
        (0..self.size).map(|i| self.lower[i * self.size + i].ln()).sum()
    }
}

/// Solves a general row-major system by elimination with partial pivoting; `None` if it is singular.
pub(crate) fn solve(mut matrix: Vec<f64>, mut b: Vec<f64>) -> Option<Vec<f64>> {
    let size = b.len();
    for column in 0..size {
        let magnitude = |row: &usize| matrix[row * size + column].abs();
        let pivot = (column..size).max_by(|a, b| magnitude(a).total_cmp(&magnitude(b)))?;
        if magnitude(&pivot).is_nan() || magnitude(&pivot) < 1e-12 {
            return None;
        }
        for k in 0..size {
            matrix.swap(column * size + k, pivot * size + k);
        }
        b.swap(column, pivot);
        for row in column + 1..size {
            let factor = matrix[row * size + column] / matrix[column * size + column];
            let (above, below) = matrix.split_at_mut(row * size);
            for k in column..size {
                below[k] -= factor * above[column * size + k];
            }
            b[row] -= factor * b[column];
        }
    }
    for row in (0..size).rev() {
        b[row] = (b[row] - dot(&matrix[row * size + row + 1..(row + 1) * size], &b[row + 1..]))
            / matrix[row * size + row];
    }
    Some(b)
}

pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_solvers_solve() {
        let matrix = vec![4.0, 1.0, 0.5, 1.0, 3.0, -1.0, 0.5, -1.0, 2.0];
        let b = [1.0, -2.0, 3.0];
        let direct = solve(matrix.clone(), b.to_vec()).unwrap();
        let factored = Cholesky::new(matrix.clone(), 3).unwrap().solve(&b);
        for row in 0..3 {
            assert!((dot(&matrix[row * 3..row * 3 + 3], &direct) - b[row]).abs() < 1e-12);
            assert!((direct[row] - factored[row]).abs() < 1e-12);
        }
        assert!(solve(vec![0.0, 1.0, 1.0, 0.0], vec![2.0, 3.0]).is_some_and(|x| x == [3.0, 2.0]));
    }

    #[test]
    fn singular_and_indefinite_matrices_are_refused() {
        assert!(solve(vec![1.0, 2.0, 2.0, 4.0], vec![1.0, 1.0]).is_none());
        assert!(Cholesky::new(vec![1.0, 2.0, 2.0, 1.0], 2).is_none());
        assert!(Cholesky::new(vec![f64::NAN], 1).is_none());
    }
}
