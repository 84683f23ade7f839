//! Products of which one size is a rank: bound by memory, exact in f32, and too narrow for matrix units to gain.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{count_of, empty, units};

/// Largest rank that these kernels take.
pub(super) const MOST: usize = 64;

/// Rows of a tile.
const TILE_ROWS: usize = 64;
/// Inner places of a tile.
const TILE_INNER: usize = 32;
/// Between two inner places of a tile in shared memory; odd, so that neighbouring units use different banks.
const TILE_STRIDE: usize = TILE_ROWS + 1;
/// Rows, and columns, of which a unit computes the sums.
const SIDE: usize = 4;
/// Units of a cube.
const UNITS: usize = 256;
/// Cubes that keep a large device busy.
const BUSY: usize = 1024;

/// Rows that a unit of an outer product goes through with one column in registers.
const OUTER_ROWS: usize = 16;

/// Sizes and strides of a matrix.
#[derive(Clone, Copy)]
struct Sides {
    shape: [usize; 2],
    strides: [usize; 2],
}

impl Sides {
    fn of(x: &CubeTensor) -> Self {
        let (shape, strides) = (x.meta.shape(), x.meta.strides());
        Self { shape: [shape[0], shape[1]], strides: [strides[0], strides[1]] }
    }

    fn turned(self) -> Self {
        let ([rows, columns], [row, column]) = (self.shape, self.strides);
        Self { shape: [columns, rows], strides: [column, row] }
    }
}

/// `factor · a · b`, if one of the sizes is at most [`MOST`] and both are f32.
pub(super) fn product(a: &CubeTensor, b: &CubeTensor, factor: f32) -> Option<CubeTensor> {
    let (left, right) = (Sides::of(a), Sides::of(b));
    let ([rows, inner], columns) = (left.shape, right.shape[1]);
    assert_eq!(right.shape[0], inner, "a product of {:?} and {:?}", left.shape, right.shape);
    let f32s = a.dtype == DType::F32 && b.dtype == DType::F32;
    if !f32s || rows * inner * columns == 0 {
        return None;
    }
    if inner <= MOST {
        return Some(outer(None, a, b, factor));
    }
    let out = || empty(a, [rows, columns], DType::F32);
    if columns <= MOST {
        let out = out();
        narrow([a, b], [left, right], &out, Sides::of(&out).strides, factor);
        Some(out)
    } else if rows <= MOST {
        let out = out();
        let [row, column] = Sides::of(&out).strides;
        narrow([b, a], [right.turned(), left.turned()], &out, [column, row], factor);
        Some(out)
    } else {
        None
    }
}

/// `y + factor · a · b` for an inner size of at most [`MOST`], in place where the contiguous `y` is not used elsewhere.
pub(super) fn outer(y: Option<CubeTensor>, a: &CubeTensor, b: &CubeTensor, factor: f32) -> CubeTensor {
    let (left, right) = (Sides::of(a), Sides::of(b));
    let ([rows, inner], columns) = (left.shape, right.shape[1]);
    assert_eq!(right.shape[0], inner, "a product of {:?} and {:?}", left.shape, right.shape);
    if let Some(y) = &y {
        assert_eq!(count_of(y), rows * columns, "an update of {rows}x{columns}");
    }
    let (out, out_arg) = match &y {
        Some(y) if y.can_mut() => (y.clone(), y.as_tensor_alias(0)),
        _ => {
            let out = empty(a, [rows, columns], DType::F32);
            (out.clone(), out.into_tensor_arg())
        }
    };
    let (count, dim) = units(&out.client, rows.div_ceil(OUTER_ROWS) * columns);
    let adds = y.is_some();
    // SAFETY: rows, columns and inner places stay below the sizes that the strides belong to.
    unsafe {
        outer_kernel::launch_unchecked(
            &out.client,
            count,
            dim,
            y.unwrap_or_else(|| a.clone()).into_tensor_arg(),
            a.clone().into_tensor_arg(),
            b.clone().into_tensor_arg(),
            out_arg,
            rows,
            columns,
            left.strides[0],
            left.strides[1],
            right.strides[0],
            right.strides[1],
            factor,
            inner,
            adds,
        );
    }
    out
}

/// `[rows, inner]` times `[inner, columns]` for few columns, written with the strides `out_strides`.
fn narrow(
    [a, b]: [&CubeTensor; 2],
    [left, right]: [Sides; 2],
    out: &CubeTensor,
    out_strides: [usize; 2],
    factor: f32,
) {
    let ([rows, inner], columns) = (left.shape, right.shape[1]);
    let groups = columns.div_ceil(SIDE).next_power_of_two();
    let row_tiles = rows.div_ceil(TILE_ROWS);
    // Long sums are split over cubes and added up in their order, so that all of the device has work.
    let splits = (BUSY / row_tiles).clamp(1, inner.div_ceil(8 * TILE_INNER));
    let span = inner.div_ceil(splits).next_multiple_of(TILE_INNER);
    let splits = inner.div_ceil(span);
    let target = match splits {
        1 => out.clone(),
        _ => empty(out, [splits, rows * columns], DType::F32),
    };
    let strides = if splits == 1 { out_strides } else { [columns, 1] };
    // SAFETY: what is read and written is tested against the sizes that the strides belong to; tiles are as large as the loops over them.
    unsafe {
        narrow_kernel::launch_unchecked(
            &out.client,
            CubeCount::Static(row_tiles as u32, splits as u32, 1),
            CubeDim::new_1d(UNITS as u32),
            a.clone().into_tensor_arg(),
            b.clone().into_tensor_arg(),
            target.clone().into_tensor_arg(),
            rows,
            inner,
            columns,
            left.strides[0],
            left.strides[1],
            right.strides[0],
            right.strides[1],
            strides[0],
            strides[1],
            rows * columns,
            span,
            factor,
            groups,
            left.strides[0] == 1,
        );
    }
    if splits > 1 {
        let (count, dim) = units(&out.client, count_of(out));
        add_splits_kernel::launch(
            &out.client,
            count,
            dim,
            target.into_tensor_arg(),
            out.clone().into_tensor_arg(),
            rows,
            columns,
            splits,
            out_strides[0],
            out_strides[1],
        );
    }
}

/// One unit for each column and [`OUTER_ROWS`] rows.
#[cube(launch_unchecked)]
fn outer_kernel(
    y: &Tensor<f32>,
    a: &Tensor<f32>,
    b: &Tensor<f32>,
    out: &mut Tensor<f32>,
    rows: usize,
    columns: usize,
    a_row: usize,
    a_inner: usize,
    b_inner: usize,
    b_column: usize,
    factor: f32,
    #[comptime] inner: usize,
    #[comptime] adds: bool,
) {
    let column = ABSOLUTE_POS % columns;
    let first = ABSOLUTE_POS / columns * OUTER_ROWS;
    if first < rows {
        let mut factors = Array::<f32>::new(inner);
        #[unroll]
        for k in 0..inner {
            factors[k] = b[k * b_inner + column * b_column] * factor;
        }
        let end = min(first + OUTER_ROWS, rows);
        for row in first..end {
            let mut sum = 0.0f32;
            if comptime!(adds) {
                sum = y[row * columns + column];
            }
            #[unroll]
            for k in 0..inner {
                sum += a[row * a_row + k * a_inner] * factors[k];
            }
            out[row * columns + column] = sum;
        }
    }
}

/// A tile of rows and a part of the inner places for each cube; its units are `16 * groups` for the sums of 4 rows × 4
/// columns, as often as they fit, each time for another part of a tile's inner places.
#[cube(launch_unchecked)]
fn narrow_kernel(
    a: &Tensor<f32>,
    b: &Tensor<f32>,
    out: &mut Tensor<f32>,
    rows: usize,
    inner: usize,
    columns: usize,
    a_row: usize,
    a_inner: usize,
    b_inner: usize,
    b_column: usize,
    out_row: usize,
    out_column: usize,
    out_split: usize,
    span: usize,
    factor: f32,
    #[comptime] groups: usize,
    #[comptime] by_columns: bool,
) {
    let width = comptime!(groups * SIDE);
    let summing = comptime!(TILE_ROWS / SIDE * groups);
    let parts = comptime!(UNITS / (TILE_ROWS / SIDE * groups));
    let places = comptime!(TILE_INNER * (TILE_ROWS / SIDE * groups) / UNITS);

    let mut a_tile = Shared::<[f32]>::new_slice(comptime!(TILE_INNER * TILE_STRIDE));
    let mut b_tile = Shared::<[f32]>::new_slice(comptime!(TILE_INNER * groups * SIDE));
    let unit = UNIT_POS as usize;
    let first_row = CUBE_POS_X as usize * TILE_ROWS;
    let split = CUBE_POS_Y as usize;
    let first = split * span;
    let end = min(first + span, inner);
    let part = unit / summing;
    let within = unit % summing;
    let row_at = within % comptime!(TILE_ROWS / SIDE) * SIDE;
    let column_at = within / comptime!(TILE_ROWS / SIDE) * SIDE;

    let mut sums = Array::<f32>::new(comptime!(SIDE * SIDE));
    #[unroll]
    for i in 0..SIDE * SIDE {
        sums[i] = 0.0f32;
    }
    let tiles = (end - first).div_ceil(TILE_INNER);
    for tile in 0..tiles {
        let start = first + tile * TILE_INNER;
        // Everything is on its way before the first value is waited for.
        let mut of_a = Array::<f32>::new(comptime!(TILE_ROWS * TILE_INNER / UNITS));
        let mut of_b = Array::<f32>::new(comptime!((TILE_INNER * groups * SIDE).div_ceil(UNITS)));
        #[unroll]
        for i in 0..TILE_ROWS * TILE_INNER / UNITS {
            let (k, row) = place_of(unit + i * UNITS, by_columns);
            let mut value = 0.0f32;
            if first_row + row < rows && start + k < end {
                value = a[(first_row + row) * a_row + (start + k) * a_inner];
            }
            of_a[i] = value;
        }
        #[unroll]
        for i in 0..comptime!((TILE_INNER * groups * SIDE).div_ceil(UNITS)) {
            let index = unit + i * UNITS;
            let (k, column) = (index / width, index % width);
            let mut value = 0.0f32;
            if column < columns && start + k < end {
                value = b[(start + k) * b_inner + column * b_column];
            }
            of_b[i] = value;
        }
        sync_cube();
        #[unroll]
        for i in 0..TILE_ROWS * TILE_INNER / UNITS {
            let (k, row) = place_of(unit + i * UNITS, by_columns);
            a_tile[k * TILE_STRIDE + row] = of_a[i];
        }
        #[unroll]
        for i in 0..comptime!((TILE_INNER * groups * SIDE).div_ceil(UNITS)) {
            let index = unit + i * UNITS;
            if index < comptime!(TILE_INNER * groups * SIDE) {
                b_tile[index] = of_b[i];
            }
        }
        sync_cube();
        #[unroll]
        for place in 0..places {
            let k = part * places + place;
            let mut left = Array::<f32>::new(SIDE);
            let mut right = Array::<f32>::new(SIDE);
            #[unroll]
            for i in 0..SIDE {
                left[i] = a_tile[k * TILE_STRIDE + row_at + i];
                right[i] = b_tile[k * width + column_at + i];
            }
            #[unroll]
            for i in 0..SIDE {
                #[unroll]
                for j in 0..SIDE {
                    sums[comptime!(i * SIDE + j)] += left[i] * right[j];
                }
            }
        }
    }

    if comptime!(parts == 1) {
        #[unroll]
        for i in 0..SIDE * SIDE {
            let row = first_row + row_at + i / SIDE;
            let column = column_at + i % SIDE;
            if row < rows && column < columns {
                out[split * out_split + row * out_row + column * out_column] = sums[i] * factor;
            }
        }
    } else {
        let mut all = Shared::<[f32]>::new_slice(comptime!(UNITS * SIDE * SIDE));
        #[unroll]
        for i in 0..SIDE * SIDE {
            all[i * UNITS + unit] = sums[i];
        }
        sync_cube();
        #[unroll]
        for i in 0..groups {
            let index = unit + i * UNITS;
            let within = index % summing;
            let place = index / summing;
            let mut sum = 0.0f32;
            #[unroll]
            for part in 0..parts {
                sum += all[place * UNITS + part * summing + within];
            }
            let row = first_row + within % comptime!(TILE_ROWS / SIDE) * SIDE + place / SIDE;
            let column = within / comptime!(TILE_ROWS / SIDE) * SIDE + place % SIDE;
            if row < rows && column < columns {
                out[split * out_split + row * out_row + column * out_column] = sum * factor;
            }
        }
    }
}

/// Inner place and row of the value `index` of a tile, so that neighbouring units read neighbouring values.
#[cube]
fn place_of(index: usize, #[comptime] by_columns: bool) -> (usize, usize) {
    if comptime!(by_columns) {
        (index / TILE_ROWS, index % TILE_ROWS)
    } else {
        (index % TILE_INNER, index / TILE_INNER)
    }
}

/// One unit for each sum.
#[cube(launch)]
fn add_splits_kernel(
    parts: &Tensor<f32>,
    out: &mut Tensor<f32>,
    rows: usize,
    columns: usize,
    splits: usize,
    out_row: usize,
    out_column: usize,
) {
    if ABSOLUTE_POS < rows * columns {
        let mut sum = 0.0f32;
        for split in 0..splits {
            sum += parts[split * rows * columns + ABSOLUTE_POS];
        }
        out[ABSOLUTE_POS / columns * out_row + ABSOLUTE_POS % columns * out_column] = sum;
    }
}
