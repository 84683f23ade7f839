//! Products of matrices in memory: of f32 by the library that Flex itself uses, of operands rounded to bf16 by
//! instructions for them.

#[cfg(target_arch = "x86_64")]
mod avx512_bf16;

use burn::{backend::flex::FlexTensor, tensor::DType};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::{Compute, packing::RUN};

/// Columns, and the summed size, of a tile of f32: 256 KiB, a quarter of a typical second-level cache.
const TILE: usize = 256;

/// Whether this processor multiplies such operands.
pub(crate) fn multiplies(compute: Compute) -> bool {
    match compute {
        Compute::F32 => true,
        #[cfg(target_arch = "x86_64")]
        Compute::Bf16 => avx512_bf16::supported(),
        #[cfg(not(target_arch = "x86_64"))]
        Compute::Bf16 => false,
        Compute::F16 => false,
    }
}

/// A mutable pointer that tasks may share; each writes its own part.
#[derive(Clone, Copy)]
pub(crate) struct SharedMut(pub *mut f32);
// SAFETY: every use hands disjoint ranges to different tasks, as said there.
unsafe impl Send for SharedMut {}
// SAFETY: as above.
unsafe impl Sync for SharedMut {}
impl SharedMut {
    /// The pointer, moved on by `index` values.
    pub(crate) fn at(self, index: usize) -> *mut f32 {
        self.0.wrapping_add(index)
    }
}

/// Values of a matrix; 16-bit ones are widened as they are read.
#[derive(Clone, Copy)]
enum Values<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
}

/// A matrix in memory with its strides, of which one is 1.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    values: Values<'a>,
    row: usize,
    column: usize,
}

impl<'a> Matrix<'a> {
    /// Row-major.
    pub(crate) fn rows(values: &'a [f32], stride: usize) -> Self {
        Self { values: Values::F32(values), row: stride, column: 1 }
    }

    /// The transpose of a row-major matrix.
    pub(crate) fn columns(values: &'a [f32], stride: usize) -> Self {
        Self { values: Values::F32(values), row: 1, column: stride }
    }

    /// A matrix of a float type that is row-major or transposed; `None` for others.
    pub(crate) fn of(tensor: &'a FlexTensor) -> Option<Self> {
        let layout = tensor.layout();
        let [row, column] = <[isize; 2]>::try_from(layout.strides()).ok()?.map(usize::try_from);
        let (row, column) = (row.ok()?, column.ok()?);
        let [rows, columns] = [layout.shape()[0], layout.shape()[1]];
        let (lines, outer, inner) = if column == 1 { (rows, row, columns) } else { (columns, column, rows) };
        // Lines that lie inside one another are a repeated one.
        if row.min(column) != 1 || (lines > 1 && outer < inner) {
            return None;
        }
        let start = layout.start_offset();
        let values = match tensor.dtype() {
            DType::F32 => Values::F32(&tensor.storage()[start..]),
            DType::BF16 => Values::Bf16(&tensor.storage()[start..]),
            DType::F16 => Values::F16(&tensor.storage()[start..]),
            _ => return None,
        };
        Some(Self { values, row, column })
    }

    /// Whether columns lie in one piece.
    pub(crate) fn is_turned(&self) -> bool {
        self.row == 1 && self.column != 1
    }

    /// The matrix from a row and a column on.
    fn from(self, row: usize, column: usize) -> Self {
        let start = row * self.row + column * self.column;
        let values = match self.values {
            Values::F32(values) => Values::F32(&values[start..]),
            Values::Bf16(values) => Values::Bf16(&values[start..]),
            Values::F16(values) => Values::F16(&values[start..]),
        };
        Self { values, ..self }
    }

    /// Panics if the values end before `rows` rows of `columns` columns.
    fn holds(&self, rows: usize, columns: usize) {
        let count = match self.values {
            Values::F32(values) => values.len(),
            Values::Bf16(values) => values.len(),
            Values::F16(values) => values.len(),
        };
        let needed =
            if rows * columns == 0 { 0 } else { (rows - 1) * self.row + (columns - 1) * self.column + 1 };
        assert!(count >= needed, "a matrix of {rows} x {columns} needs {needed} values, found {count}");
    }
}

/// The right side of a product, a tile at a time.
pub(crate) trait Tiles: Sync {
    /// Hands `f` the rows `k` of the columns `n`.
    fn tile(&self, k: (usize, usize), n: (usize, usize), f: impl FnOnce(Matrix<'_>));
}

impl Tiles for Matrix<'_> {
    fn tile(&self, k: (usize, usize), n: (usize, usize), f: impl FnOnce(Matrix<'_>)) {
        f(self.from(k.0, n.0));
    }
}

/// Where a product is written: rows `stride` apart.
#[derive(Clone, Copy)]
pub(crate) struct Out {
    pub to: SharedMut,
    pub stride: usize,
    /// Whether it is added to what is there.
    pub add: bool,
}

impl Out {
    pub(crate) fn new(to: *mut f32, stride: usize, add: bool) -> Self {
        Self { to: SharedMut(to), stride, add }
    }

    fn at(self, row: usize, column: usize, add: bool) -> Self {
        Self::new(self.to.at(row * self.stride + column), self.stride, self.add || add)
    }
}

/// `out (+)= lhs · rhs` on one thread; sizes are rows, columns and the summed size. Operands are rounded as `compute` says
/// where the processor multiplies such ones; 16-bit ones need that.
///
/// # Panics
/// If a matrix doesn't hold the sizes.
///
/// # Safety
/// `out` must be writable for the rows of the columns.
pub(crate) unsafe fn matmul(sizes: [usize; 3], out: Out, lhs: Matrix<'_>, rhs: Matrix<'_>, compute: Compute) {
    let [m, n, k] = sizes;
    lhs.holds(m, k);
    rhs.holds(k, n);
    #[cfg(target_arch = "x86_64")]
    if compute == Compute::Bf16 && avx512_bf16::supported() {
        // SAFETY: `out` by this function's contract, the matrices as just seen, the instructions too.
        return unsafe { avx512_bf16::matmul(sizes, out, lhs, rhs) };
    }
    let _ = compute;
    let (Values::F32(a), Values::F32(b)) = (lhs.values, rhs.values) else {
        unreachable!("16-bit operands are widened where they can't be multiplied");
    };
    let stride = |of: usize| of as isize;
    // SAFETY: `out` by this function's contract, the matrices as just seen.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.to.0,
            1,
            out.stride as isize,
            out.add,
            a.as_ptr(),
            stride(lhs.column),
            stride(lhs.row),
            b.as_ptr(),
            stride(rhs.column),
            stride(rhs.row),
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// [`matmul`] on all threads, the right side a tile at a time. An element's sum doesn't depend on the threads.
///
/// # Safety
/// As there.
pub(crate) unsafe fn multiply(
    sizes: [usize; 3],
    out: Out,
    lhs: Matrix<'_>,
    rhs: &impl Tiles,
    compute: Compute,
) {
    let [m, n, k] = sizes;
    lhs.holds(m, k);
    if m == 0 || n == 0 {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if compute == Compute::Bf16 && avx512_bf16::supported() {
        // SAFETY: `out` by this function's contract, the matrix as just seen, the instructions too.
        return unsafe { avx512_bf16::multiply(sizes, out, lhs, rhs) };
    }
    spans(n, TILE).for_each(|n| {
        for k in (0..k).step_by(TILE).map(|start| (start, k.min(start + TILE))) {
            rhs.tile(k, n, |tile| {
                let sizes = [m, n.1 - n.0, k.1 - k.0];
                // SAFETY: tasks write columns of their own.
                unsafe { matmul(sizes, out.at(0, n.0, k.0 > 0), lhs.from(0, k.0), tile, compute) }
            });
        }
    });
}

/// `lhs · rhs`, row-major, as [`multiply`] does it.
pub(crate) fn product(sizes: [usize; 3], lhs: Matrix<'_>, rhs: &impl Tiles, compute: Compute) -> Vec<f32> {
    let [m, n, k] = sizes;
    if k == 0 {
        return vec![0.0; m * n];
    }
    // Not zeroed: that would be done by one thread, and costs a few hundredths of a training step.
    let mut out: Vec<f32> = Vec::with_capacity(m * n);
    // SAFETY: there is room for the rows; the first part of the summed size writes every element without reading it.
    unsafe {
        multiply(sizes, Out::new(out.as_mut_ptr(), n, false), lhs, rhs, compute);
        out.set_len(m * n);
    }
    out
}

/// `0..size` in parts of at most `step`, in parallel, and evenly so that no thread waits for a remainder.
fn spans(size: usize, step: usize) -> impl IndexedParallelIterator<Item = (usize, usize)> {
    let parts = size.div_ceil(step).next_multiple_of(rayon::current_num_threads());
    let step = size.div_ceil(parts).next_multiple_of(RUN);
    (0..size.div_ceil(step)).into_par_iter().map(move |i| (i * step, size.min((i + 1) * step)))
}

#[cfg(test)]
mod tests {
    use kiln_testkit::values;

    use super::*;

    /// A matrix in memory in one of the forms that products read.
    struct Stored {
        f32: Vec<f32>,
        bf16: Vec<bf16>,
        f16: Vec<f16>,
        rows: usize,
        columns: usize,
        turned: bool,
        gap: usize,
    }

    impl Stored {
        /// Rows have a gap of values after them that must not be read; `turned`: the transpose is what lies in memory.
        fn new(seed: u64, [rows, columns]: [usize; 2], turned: bool, gap: usize) -> Self {
            let (outer, inner) = if turned { (columns, rows) } else { (rows, columns) };
            let numbers = values(seed, outer * inner);
            let mut f32 = vec![f32::NAN; outer * (inner + gap)];
            for (row, numbers) in f32.chunks_mut((inner + gap).max(1)).zip(numbers.chunks(inner.max(1))) {
                row[..inner].copy_from_slice(numbers);
            }
            f32.truncate((outer * (inner + gap)).saturating_sub(gap));
            let bf16 = f32.iter().map(|x| bf16::from_f32(*x)).collect();
            let f16 = f32.iter().map(|x| f16::from_f32(*x)).collect();
            Self { f32, bf16, f16, rows, columns, turned, gap }
        }

        fn matrix(&self, form: usize) -> Matrix<'_> {
            let values = match form {
                0 => Values::F32(&self.f32),
                1 => Values::Bf16(&self.bf16),
                _ => Values::F16(&self.f16),
            };
            let (row, column) =
                if self.turned { (1, self.rows + self.gap) } else { (self.columns + self.gap, 1) };
            Matrix { values, row, column }
        }

        /// The value that is multiplied.
        fn rounded(&self, form: usize, row: usize, column: usize) -> f64 {
            let matrix = self.matrix(form);
            let at = row * matrix.row + column * matrix.column;
            let widened = match form {
                0 => self.f32[at],
                1 => self.bf16[at].to_f32(),
                _ => self.f16[at].to_f32(),
            };
            bf16::from_f32(widened).to_f64()
        }
    }

    /// `product` into memory with a frame around it, against the f64 product of rounded operands.
    fn compare(
        [m, n, k]: [usize; 3],
        turned: [bool; 2],
        forms: [usize; 2],
        add: bool,
        product: impl Fn(Out, Matrix<'_>, Matrix<'_>),
    ) {
        let (a, b) = (Stored::new(1, [m, k], turned[0], 3), Stored::new(2, [k, n], turned[1], 5));
        let stride = n + 7;
        let frame = 1e30f32;
        let mut out = vec![frame; (m + 2) * stride + 9];
        let before =
            |row: usize, column: usize| if add { (row as f32) - (column as f32) / 8.0 } else { f32::NAN };
        for row in 0..m {
            for column in 0..n {
                out[9 + (row + 1) * stride + column] = before(row, column);
            }
        }
        let first = out[9 + stride..].as_mut_ptr();
        product(Out::new(first, stride, add), a.matrix(forms[0]), b.matrix(forms[1]));
        let what = format!("{m} x {k} x {n}, turned {turned:?}, forms {forms:?}, add {add}");
        for (i, &found) in out.iter().enumerate() {
            let place = i.checked_sub(9 + stride).map(|i| [i / stride, i % stride]);
            let Some([row, column]) = place.filter(|&[row, column]| row < m && column < n) else {
                assert_eq!(found, frame, "{what}: written outside at {i}");
                continue;
            };
            let mut sum = if add { f64::from(before(row, column)) } else { 0.0 };
            let mut size = 1.0 + sum.abs();
            for inner in 0..k {
                let product = a.rounded(forms[0], row, inner) * b.rounded(forms[1], inner, column);
                sum += product;
                size += product.abs();
            }
            let error = (f64::from(found) - sum).abs() / size;
            assert!(error < 1e-6, "{what}: {found} at {row}, {column}, expected {sum}");
        }
    }

    /// Sizes around those of vectors, blocks, panels, tiles and slabs.
    const SIZES: [[usize; 3]; 17] = [
        [1, 1, 1],
        [1, 17, 31],
        [2, 16, 33],
        [11, 15, 2],
        [12, 32, 32],
        [13, 33, 64],
        [25, 31, 255],
        [16, 64, 256],
        [5, 65, 257],
        [49, 96, 511],
        [300, 40, 7],
        [64, 520, 16],
        [17, 1030, 3],
        [1030, 70, 5],
        [100, 8, 300],
        [289, 130, 40],
        [30, 70, 4200],
    ];

    #[test]
    fn products_of_rounded_operands_are_those_of_f64_to_the_rounding_of_sums() {
        if !multiplies(Compute::Bf16) {
            kiln_testkit::skipped("this processor doesn't multiply bf16");
            return;
        }
        for (i, sizes) in SIZES.into_iter().enumerate() {
            for turned in [[false, false], [false, true], [true, false], [true, true]] {
                let forms = [i % 3, (i / 3 + usize::from(turned[0])) % 3];
                let add = (i + usize::from(turned[1])) % 2 == 1;
                // SAFETY: `compare` gives room for the rows.
                compare(sizes, turned, forms, add, |out, a, b| unsafe {
                    matmul(sizes, out, a, b, Compute::Bf16)
                });
                // SAFETY: as above.
                compare(sizes, turned, forms, add, |out, a, b| unsafe {
                    multiply(sizes, out, a, &b, Compute::Bf16);
                });
            }
        }
    }

    #[test]
    fn rows_columns_and_transposes_are_read_where_they_lie_and_repeated_lines_are_not() {
        let values = |shape: [usize; 2]| {
            crate::ops::flex::tensor((0..shape[0] * shape[1]).map(|i| i as f32).collect(), shape, DType::F32)
        };
        for shape in [[1, 1], [1, 7], [7, 1], [3, 5]] {
            for (tensor, [rows, columns]) in
                [(values(shape), shape), (values(shape).transpose(0, 1), [shape[1], shape[0]])]
            {
                let expected = tensor.to_contiguous();
                let matrix = Matrix::of(&tensor).unwrap_or_else(|| panic!("{shape:?} as {rows} x {columns}"));
                matrix.holds(rows, columns);
                let Values::F32(found) = matrix.values else { unreachable!("f32") };
                for (i, value) in expected.as_slice::<f32>().unwrap().iter().enumerate() {
                    assert_eq!(found[i / columns * matrix.row + i % columns * matrix.column], *value);
                }
            }
        }
        let repeated = burn::tensor::Slice::from(0..1);
        let row = <burn::backend::flex::Flex as burn::backend::ops::FloatTensorOps<_>>::float_expand(
            <burn::backend::flex::Flex as burn::backend::ops::FloatTensorOps<_>>::float_slice(
                values([3, 5]),
                &[repeated],
            ),
            [3, 5].into(),
        );
        assert!(Matrix::of(&row).is_none());
    }

    #[test]
    fn products_of_nothing_are_empty_or_zero() {
        for compute in [Compute::F32, Compute::Bf16] {
            for sizes @ [m, n, k] in [[0, 5, 3], [0, 500, 3], [4, 0, 3], [4, 5, 0], [0, 0, 0]] {
                let (a, b) = (Stored::new(1, [m, k], false, 0), Stored::new(2, [k, n], false, 0));
                assert_eq!(product(sizes, a.matrix(0), &b.matrix(0), compute), vec![0.0; m * n], "{sizes:?}");
            }
        }
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let sizes @ [m, n, k] = [70, 200, 600];
        let (a, b) = (Stored::new(1, [m, k], false, 0), Stored::new(2, [k, n], false, 0));
        for compute in [Compute::F32, Compute::Bf16] {
            let on = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut out = vec![0.0; m * n];
                let to = Out::new(out.as_mut_ptr(), n, false);
                // SAFETY: `out` holds the rows.
                pool.install(|| unsafe { multiply(sizes, to, a.matrix(0), &b.matrix(0), compute) });
                out
            };
            let one = on(1);
            assert!(on(2) == one && on(5) == one, "{compute}");
        }
    }

    #[test]
    #[should_panic(expected = "needs")]
    fn a_matrix_that_is_too_short_is_not_read() {
        let values = [0.0; 11];
        let mut out = [0.0; 9];
        let sizes = [3, 3, 4];
        let a = Matrix::rows(&values, 4);
        // SAFETY: `out` holds the rows.
        unsafe { matmul(sizes, Out::new(out.as_mut_ptr(), 3, false), a, a, Compute::F32) }
    }
}
