//! A packed weight in host memory: unpacked tile by tile.

use std::{
    cell::RefCell,
    sync::atomic::{AtomicUsize, Ordering},
};

use burn::backend::flex::FlexTensor;
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::integer_dot;
use super::{
    buffers::{floats, words},
    kernels::{HALF, Levels, Tile, decode, row_times, row_times_transposed},
    product::{Matrix, SharedMut, Tiles, product},
};
use crate::{
    Value,
    ops::{FEW_ROWS, PackedSpec},
    packing::RUN,
};

/// Inputs whose dense gradient is held at a time when scales and offsets are learned.
const GRADIENT_INPUTS: usize = 256;
/// Words of codes up to which integer products of one row stay on one thread: they are done before another one has
/// woken up and fetched its half into its own cache.
const SERIAL_WORDS: usize = 1 << 17;

thread_local! {
    /// One tile and its spread scales per thread, kept to save page faults.
    static SCRATCH: RefCell<[Vec<f32>; 3]> = const { RefCell::new([const { Vec::new() }; 3]) };
}

/// Host view of a packed weight's parts.
pub(super) struct View<'a> {
    codes: &'a [u32],
    scales: &'a [f32],
    offsets: Option<&'a [f32]>,
    levels: Levels,
    spec: PackedSpec,
}

impl<'a> View<'a> {
    pub(super) fn new(
        codes: &'a FlexTensor,
        scales: &'a FlexTensor,
        offsets: &'a FlexTensor,
        spec: PackedSpec,
    ) -> Self {
        let [rows, columns] = spec.scale_shape();
        let view = Self {
            codes: words(codes),
            scales: floats(scales),
            offsets: spec.has_offsets().then(|| floats(offsets)),
            levels: Levels::new(spec.value),
            spec,
        };
        // The kernels read through pointers: these lengths are what makes that sound.
        let expected = crate::packing::code_rows(spec.d_input, spec.value.bits()) * spec.d_output;
        assert_eq!(view.codes.len(), expected, "words of a packed weight {spec:?}");
        assert_eq!(view.scales.len(), rows * columns, "scales of a packed weight {spec:?}");
        assert_eq!(view.offsets.map_or(rows * columns, <[f32]>::len), rows * columns, "offsets of {spec:?}");
        view
    }

    /// Runs `f` on the rectangle `k0..k1` × `n0..n1`; scales shared by several outputs are spread into scratch first.
    fn tile<R>(
        &self,
        (k0, k1): (usize, usize),
        (n0, n1): (usize, usize),
        scratch: &mut [Vec<f32>],
        f: impl FnOnce(&Tile) -> R,
    ) -> R {
        let spec = &self.spec;
        let [_, columns] = spec.scale_shape();
        let (first, last) = (k0 / spec.inputs, (k1 - 1) / spec.inputs);
        let mut tile = Tile {
            words: self.codes[k0 / RUN * spec.value.bits() as usize * spec.d_output + n0..].as_ptr(),
            word_stride: spec.d_output,
            scales: self.scales[first * columns + n0 / spec.outputs..].as_ptr(),
            offsets: self
                .offsets
                .map_or(std::ptr::null(), |offsets| offsets[first * columns + n0 / spec.outputs..].as_ptr()),
            scale_stride: columns,
            k0,
            k1,
            columns: n1 - n0,
            inputs: spec.inputs,
            levels: self.levels,
        };
        if spec.outputs > 1 {
            let spread = |values: &[f32], into: &mut Vec<f32>| {
                into.clear();
                for block in first..=last {
                    let row = &values[block * columns..][..columns];
                    for (block, &value) in
                        row.iter().enumerate().take(n1.div_ceil(spec.outputs)).skip(n0 / spec.outputs)
                    {
                        let end = n1.min((block + 1) * spec.outputs);
                        into.resize(into.len() + end - n0.max(block * spec.outputs), value);
                    }
                }
            };
            let [scales, offsets] = scratch else { unreachable!("two scratch buffers") };
            spread(self.scales, scales);
            tile.scales = scales.as_ptr();
            if let Some(values) = self.offsets {
                spread(values, offsets);
                tile.offsets = offsets.as_ptr();
            }
            tile.scale_stride = n1 - n0;
        }
        f(&tile)
    }

    /// Unpacks the rectangle and hands it to `f`, row-major with `n1 - n0` columns.
    fn dense_tile(&self, k: (usize, usize), n: (usize, usize), f: impl FnOnce(&[f32])) {
        SCRATCH.with_borrow_mut(|[dense, scratch @ ..]| {
            let columns = n.1 - n.0;
            let size = (k.1 - k.0) * columns;
            if dense.len() < size {
                dense.resize(size, 0.0);
            }
            self.tile(k, n, scratch, |tile| {
                // SAFETY: `new` checked the parts against the spec; the rectangle lies inside it; `dense` holds it.
                unsafe { decode(tile, dense.as_mut_ptr(), columns) }
            });
            f(&dense[..size]);
        });
    }

    /// Whether blocks begin and end with runs, or with halves of them, as the fused kernels need.
    fn fits_runs(&self) -> bool {
        self.whole_runs() || self.spec.inputs == HALF
    }

    fn whole_runs(&self) -> bool {
        self.spec.inputs.is_multiple_of(RUN) || self.spec.inputs >= self.spec.d_input
    }

    /// One row times the weight.
    fn row_forward(&self, x: &[f32], y: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if self.integer_row_forward(x, y) {
            return;
        }
        let spec = &self.spec;
        let mut padded = x.to_vec();
        padded.resize(spec.d_input.next_multiple_of(RUN), 0.0);
        let sums: Vec<f32> = x.chunks(spec.inputs).map(|block| block.iter().sum()).collect();
        // Each task takes some blocks of inputs, whose words lie one after the other, and has sums of its own.
        let (blocks, threads) = (spec.d_input.div_ceil(spec.inputs), rayon::current_num_threads());
        let step = blocks.div_ceil(threads).next_multiple_of(RUN.div_ceil(spec.inputs));
        let mut partial = vec![0.0; (blocks.div_ceil(step) - 1) * spec.d_output];
        let (out, others) = (SharedMut(y.as_mut_ptr()), SharedMut(partial.as_mut_ptr()));
        share(blocks, step, |(first, last)| {
            let into =
                if first == 0 { out } else { SharedMut(others.at((first / step - 1) * spec.d_output)) };
            // SAFETY: the first part is `y`, the others are rows of `partial`, one for each task.
            let y = unsafe { std::slice::from_raw_parts_mut(into.at(0), spec.d_output) };
            y.fill(0.0);
            let k = (first * spec.inputs, spec.d_input.min(last * spec.inputs));
            SCRATCH.with_borrow_mut(|[raw, scratch @ ..]| {
                if raw.len() < y.len() {
                    raw.resize(y.len(), 0.0);
                }
                self.tile(k, (0, spec.d_output), scratch, |tile| {
                    let (x, sums) = (padded[k.0..].as_ptr(), sums[first..].as_ptr());
                    // SAFETY: parts were checked in `new`; `padded` holds whole runs from the tile's first input on,
                    // `sums` its blocks, `y` and `raw` its columns; the caller made sure of `fits_runs`.
                    unsafe { row_times(tile, x, sums, y.as_mut_ptr(), raw.as_mut_ptr()) }
                });
            });
        });
        for part in partial.chunks_exact(spec.d_output) {
            y.iter_mut().zip(part).for_each(|(y, part)| *y += part);
        }
    }

    /// [`Self::row_forward`] by integer products, where processor, codes and values allow it.
    #[cfg(target_arch = "x86_64")]
    fn integer_row_forward(&self, x: &[f32], y: &mut [f32]) -> bool {
        let (spec, Levels { bits, center, .. }) = (&self.spec, self.levels);
        let inputs = spec.inputs.min(spec.d_input);
        if !matches!(spec.value, Value::Affine { .. })
            || !self.whole_runs()
            || !integer_dot::supported(bits, inputs)
        {
            return false;
        }
        let Some(row) = integer_dot::DigitRow::new(x, inputs, bits, center) else { return false };
        let out = SharedMut(y.as_mut_ptr());
        let part = |n: (usize, usize)| {
            SCRATCH.with_borrow_mut(|[_, scratch @ ..]| {
                self.tile((0, spec.d_input), n, scratch, |tile| {
                    // SAFETY: `supported` was asked; parts were checked in `new`; parts are disjoint, inside `y`;
                    // `row` was made from this weight's inputs, blocks and width, which are whole runs.
                    unsafe { integer_dot::row_times(tile, &row, out.at(n.0)) }
                });
            });
        };
        if self.codes.len() <= SERIAL_WORDS {
            part((0, spec.d_output));
        } else {
            share(spec.d_output, row_part(spec.d_output), part);
        }
        true
    }

    /// One row times the transposed weight.
    fn row_backward(&self, dy: &[f32], dx: &mut [f32]) {
        let out = SharedMut(dx.as_mut_ptr());
        share(dx.len(), self.spec.inputs.max(RUN), |k| {
            // SAFETY: parts are disjoint and lie inside `dx`.
            let dx = unsafe { std::slice::from_raw_parts_mut(out.at(k.0), k.1 - k.0) };
            SCRATCH.with_borrow_mut(|[scaled, scratch @ ..]| {
                // Of each block in a run.
                if scaled.len() < 2 * dy.len() {
                    scaled.resize(2 * dy.len(), 0.0);
                }
                self.tile(k, (0, dy.len()), scratch, |tile| {
                    // SAFETY: parts were checked in `new`; the tile is one block row, or one run of two; `dx` holds its
                    // inputs and `scaled` the columns of both; the caller made sure of `fits_runs`.
                    unsafe {
                        row_times_transposed(tile, dy.as_ptr(), dx.as_mut_ptr(), scaled.as_mut_ptr());
                    }
                });
            });
        });
    }

    pub(super) fn forward(&self, x: &[f32], rows: usize) -> Vec<f32> {
        let (d_input, d_output) = (self.spec.d_input, self.spec.d_output);
        if rows <= FEW_ROWS && self.fits_runs() {
            let mut y = vec![0.0; rows * d_output];
            for (x, y) in x.chunks_exact(d_input).zip(y.chunks_exact_mut(d_output)) {
                self.row_forward(x, y);
            }
            return y;
        }
        let x = Matrix::rows(x, d_input);
        product([rows, d_output, d_input], x, &Unpacked(self), self.spec.compute)
    }

    pub(super) fn backward(&self, dy: &[f32], rows: usize) -> Vec<f32> {
        let (d_input, d_output) = (self.spec.d_input, self.spec.d_output);
        if rows <= FEW_ROWS && self.fits_runs() {
            let mut dx = vec![0.0; rows * d_input];
            for (dy, dx) in dy.chunks_exact(d_output).zip(dx.chunks_exact_mut(d_input)) {
                self.row_backward(dy, dx);
            }
            return dx;
        }
        let dy = Matrix::rows(dy, d_output);
        product([rows, d_input, d_output], dy, &Turned(self), self.spec.compute)
    }

    pub(super) fn dense(&self) -> Vec<f32> {
        let (d_input, d_output) = (self.spec.d_input, self.spec.d_output);
        let mut dense = vec![0.0; d_input * d_output];
        dense.par_chunks_mut(RUN * d_output).enumerate().for_each(|(i, rows)| {
            let k = (i * RUN, d_input.min((i + 1) * RUN));
            SCRATCH.with_borrow_mut(|[_, scratch @ ..]| {
                self.tile(k, (0, d_output), scratch, |tile| {
                    // SAFETY: parts were checked in `new`; `rows` holds these inputs of every output.
                    unsafe { decode(tile, rows.as_mut_ptr(), d_output) }
                });
            });
        });
        dense
    }

    /// Adds the gradients of one block row, given `dw` of its inputs `[k1 - k0, d_output]`.
    fn reduce_block(
        &self,
        (k0, k1): (usize, usize),
        dw: &[f32],
        d_scales: &mut [f32],
        d_offsets: &mut [f32],
    ) {
        let (d_output, bits) = (self.spec.d_output, self.spec.value.bits());
        for k in k0..k1 {
            let (row, shift) = crate::packing::position(k, bits);
            for n in 0..d_output {
                let mut code = self.codes[row * d_output + n] >> shift;
                if shift + bits > 32 {
                    code |= self.codes[(row + 1) * d_output + n] << (32 - shift);
                }
                let dw = dw[(k - k0) * d_output + n];
                d_scales[n / self.spec.outputs] += dw * self.levels.of(code & ((1 << bits) - 1));
                d_offsets[n / self.spec.outputs] += dw;
            }
        }
    }

    /// Gradients of scales and offsets, given a function that fills `dw` of some inputs.
    pub(super) fn parameter_gradients(
        &self,
        dw: impl Fn((usize, usize), &mut [f32]) + Sync,
    ) -> (Vec<f32>, Vec<f32>) {
        let [rows, columns] = self.spec.scale_shape();
        let (mut d_scales, mut d_offsets) = (vec![0.0; rows * columns], vec![0.0; rows * columns]);
        d_scales.par_chunks_mut(columns).zip(d_offsets.par_chunks_mut(columns)).enumerate().for_each(
            |(block, (d_scales, d_offsets))| {
                let end = self.spec.d_input.min((block + 1) * self.spec.inputs);
                // Long blocks (whole columns) in parts, so that `dw` stays small.
                for k0 in (block * self.spec.inputs..end).step_by(GRADIENT_INPUTS) {
                    let k = (k0, end.min(k0 + GRADIENT_INPUTS));
                    let mut part = vec![0.0; (k.1 - k.0) * self.spec.d_output];
                    dw(k, &mut part);
                    self.reduce_block(k, &part, d_scales, d_offsets);
                }
            },
        );
        if !self.spec.has_offsets() {
            d_offsets.fill(0.0);
        }
        (d_scales, d_offsets)
    }
}

/// The weight as the right side of a product.
struct Unpacked<'a>(&'a View<'a>);

impl Tiles for Unpacked<'_> {
    fn tile(&self, k: (usize, usize), n: (usize, usize), f: impl FnOnce(Matrix<'_>)) {
        self.0.dense_tile(k, n, |w| f(Matrix::rows(w, n.1 - n.0)));
    }
}

/// The transposed weight as the right side of a product.
struct Turned<'a>(&'a View<'a>);

impl Tiles for Turned<'_> {
    fn tile(&self, n: (usize, usize), k: (usize, usize), f: impl FnOnce(Matrix<'_>)) {
        self.0.dense_tile(k, n, |w| f(Matrix::columns(w, n.1 - n.0)));
    }
}

/// Outputs of a task of one row: a part for each thread, in whole vectors.
fn row_part(d_output: usize) -> usize {
    d_output.div_ceil(rayon::current_num_threads()).next_multiple_of(64)
}

/// Runs `f` on `0..size` in parts of `step`, on this thread and the pool's: for work so short that waking another
/// thread must not delay its beginning.
fn share(size: usize, step: usize, f: impl Fn((usize, usize)) + Sync) {
    let next = AtomicUsize::new(0);
    let work = || {
        loop {
            let start = next.fetch_add(step, Ordering::Relaxed);
            if start >= size {
                break;
            }
            f((start, size.min(start + step)));
        }
    };
    rayon::in_place_scope(|scope| {
        for _ in 1..rayon::current_num_threads().min(size.div_ceil(step)) {
            scope.spawn(|_| work());
        }
        work();
    });
}
