//! A packed weight in host memory: unpacked tile by tile.

use std::cell::RefCell;

use burn::backend::flex::FlexTensor;
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::integer_dot;
use super::{
    buffers::{contiguous, floats, operand, words},
    kernels::{Levels, Scratch, Tile, blocks_of_run, decode, fits_runs, row_times, row_times_transposed},
    product::{Matrix, SharedMut, Tiles, product},
    share::share,
    stored::Stored,
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
const SERIAL_WORDS: usize = 1 << 15;

thread_local! {
    /// One tile, and its scales and offsets, per thread, kept to save page faults.
    static SCRATCH: RefCell<(Vec<f32>, Scratch)> = const { RefCell::new((Vec::new(), [const { Vec::new() }; 2])) };
}

/// Runs `f` on `size` values that this thread keeps, whatever they hold, and on room for scales and offsets.
fn with_scratch(size: usize, f: impl FnOnce(&mut [f32], &mut Scratch)) {
    SCRATCH.with_borrow_mut(|(values, scratch)| {
        if values.len() < size {
            values.resize(size, 0.0);
        }
        f(&mut values[..size], scratch);
    });
}

/// Host view of a packed weight's parts.
pub(super) struct View<'a> {
    codes: &'a [u32],
    scales: Stored<'a>,
    offsets: Option<Stored<'a>>,
    levels: Levels,
    spec: PackedSpec,
}

impl<'a> View<'a> {
    /// # Panics
    /// If the words are not as many as `spec` says.
    pub(super) fn new(
        codes: &'a FlexTensor,
        scales: Stored<'a>,
        offsets: Option<Stored<'a>>,
        spec: PackedSpec,
    ) -> Self {
        let codes = words(codes);
        // The kernels read through pointers: this length is what makes that sound, with those that `Stored` checked.
        let expected = crate::packing::code_rows(spec.d_input, spec.value.bits()) * spec.d_output;
        assert_eq!(codes.len(), expected, "words of a packed weight {spec:?}");
        Self { codes, scales, offsets, levels: Levels::new(spec.value), spec }
    }

    /// The rectangle `k0..k1` × `n0..n1`.
    fn tile(&self, (k0, k1): (usize, usize), (n0, n1): (usize, usize)) -> Tile<'_> {
        let spec = &self.spec;
        Tile {
            words: self.codes[k0 / RUN * spec.value.bits() as usize * spec.d_output + n0..].as_ptr(),
            word_stride: spec.d_output,
            scales: &self.scales,
            offsets: self.offsets.as_ref(),
            n0,
            k0,
            k1,
            columns: n1 - n0,
            inputs: spec.inputs,
            levels: self.levels,
        }
    }

    /// Unpacks the rectangle and hands it to `f`, row-major with `n1 - n0` columns.
    fn dense_tile(&self, k: (usize, usize), n: (usize, usize), f: impl FnOnce(&[f32])) {
        let columns = n.1 - n.0;
        with_scratch((k.1 - k.0) * columns, |dense, scratch| {
            // SAFETY: the parts were checked against the spec; the rectangle lies inside it; `dense` holds it.
            unsafe { decode(&self.tile(k, n), dense.as_mut_ptr(), columns, scratch) }
            f(dense);
        });
    }

    /// Whether so few rows are multiplied by kernels that unpack on the way.
    fn on_the_way(&self, rows: usize) -> bool {
        rows <= FEW_ROWS && fits_runs(self.spec.inputs, self.spec.d_input)
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
        let (blocks, tasks) = (spec.d_input.div_ceil(spec.inputs), 2 * rayon::current_num_threads());
        let step = blocks.div_ceil(tasks).next_multiple_of(blocks_of_run(spec.inputs));
        let mut partial = vec![0.0; (blocks.div_ceil(step) - 1) * spec.d_output];
        let (out, others) = (SharedMut(y.as_mut_ptr()), SharedMut(partial.as_mut_ptr()));
        share(blocks, step, |(first, last)| {
            let into =
                if first == 0 { out } else { SharedMut(others.at((first / step - 1) * spec.d_output)) };
            // SAFETY: the first part is `y`, the others are rows of `partial`, one for each task.
            let y = unsafe { std::slice::from_raw_parts_mut(into.at(0), spec.d_output) };
            y.fill(0.0);
            let k = (first * spec.inputs, spec.d_input.min(last * spec.inputs));
            with_scratch(spec.d_output, |raw, scratch| {
                let (tile, x, sums) =
                    (self.tile(k, (0, spec.d_output)), padded[k.0..].as_ptr(), sums[first..].as_ptr());
                // SAFETY: parts were checked; `padded` holds whole runs from the tile's first input on, `sums` its blocks,
                // `y` and `raw` its columns; the caller made sure of `fits_runs`.
                unsafe { row_times(&tile, x, sums, y.as_mut_ptr(), raw.as_mut_ptr(), scratch) }
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
            || !integer_dot::supported(bits, spec.inputs, spec.d_input)
        {
            return false;
        }
        let Some(row) = integer_dot::DigitRow::new(x, inputs, bits, center) else { return false };
        let out = SharedMut(y.as_mut_ptr());
        let part = |n: (usize, usize)| {
            with_scratch(0, |_, scratch| {
                let tile = self.tile((0, spec.d_input), n);
                // SAFETY: `supported` was asked; the weight's parts were checked; those of `y` are disjoint; `row` was made
                // from this weight's inputs, blocks and width.
                unsafe { integer_dot::row_times(&tile, &row, out.at(n.0), scratch) }
            });
        };
        if self.codes.len() <= SERIAL_WORDS {
            part((0, spec.d_output));
        } else {
            share(spec.d_output, row_part(spec.d_output, spec.scale_shape()[0]), part);
        }
        true
    }

    /// One row times the transposed weight.
    fn row_backward(&self, dy: &[f32], dx: &mut [f32]) {
        let out = SharedMut(dx.as_mut_ptr());
        share(dx.len(), self.spec.inputs.max(RUN), |k| {
            // SAFETY: parts are disjoint and lie inside `dx`.
            let dx = unsafe { std::slice::from_raw_parts_mut(out.at(k.0), k.1 - k.0) };
            with_scratch(blocks_of_run(self.spec.inputs) * dy.len(), |scaled, scratch| {
                let tile = self.tile(k, (0, dy.len()));
                // SAFETY: parts were checked; the tile is one block row, or one run of several; `dx` holds its inputs and
                // `scaled` the columns of all; the caller made sure of `fits_runs`.
                unsafe {
                    row_times_transposed(&tile, dy.as_ptr(), dx.as_mut_ptr(), scaled.as_mut_ptr(), scratch);
                }
            });
        });
    }

    pub(super) fn forward(&self, x: FlexTensor, rows: usize) -> Vec<f32> {
        let (d_input, d_output) = (self.spec.d_input, self.spec.d_output);
        if self.on_the_way(rows) {
            let (x, mut y) = (contiguous(x), vec![0.0; rows * d_output]);
            for (x, y) in floats(&x).chunks_exact(d_input).zip(y.chunks_exact_mut(d_output)) {
                self.row_forward(x, y);
            }
            return y;
        }
        let x = operand(x, self.spec.compute);
        let sizes = [rows, d_output, d_input];
        product(sizes, Matrix::of(&x).expect("an operand"), &Unpacked(self), self.spec.compute)
    }

    pub(super) fn backward(&self, dy: FlexTensor, rows: usize) -> Vec<f32> {
        let (d_input, d_output) = (self.spec.d_input, self.spec.d_output);
        if self.on_the_way(rows) {
            let (dy, mut dx) = (contiguous(dy), vec![0.0; rows * d_input]);
            for (dy, dx) in floats(&dy).chunks_exact(d_output).zip(dx.chunks_exact_mut(d_input)) {
                self.row_backward(dy, dx);
            }
            return dx;
        }
        let dy = operand(dy, self.spec.compute);
        let sizes = [rows, d_input, d_output];
        product(sizes, Matrix::of(&dy).expect("an operand"), &Turned(self), self.spec.compute)
    }

    pub(super) fn dense(&self) -> Vec<f32> {
        let (d_input, d_output) = (self.spec.d_input, self.spec.d_output);
        let mut dense = vec![0.0; d_input * d_output];
        dense.par_chunks_mut(RUN * d_output).enumerate().for_each(|(i, rows)| {
            let k = (i * RUN, d_input.min((i + 1) * RUN));
            with_scratch(0, |_, scratch| {
                // SAFETY: parts were checked; `rows` holds these inputs of every output.
                unsafe { decode(&self.tile(k, (0, d_output)), rows.as_mut_ptr(), d_output, scratch) }
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

/// Scales of a task of one row, and as many offsets: at most 128 KiB.
const ROW_SCALES: usize = 1 << 15;

/// Outputs of a task of one row, whole vectors: several tasks for each thread, since another one takes its time to wake up.
fn row_part(d_output: usize, blocks: usize) -> usize {
    let even = d_output.div_ceil(4 * rayon::current_num_threads()).next_multiple_of(64);
    even.min((ROW_SCALES / blocks.max(1) / 64 * 64).max(64))
}
