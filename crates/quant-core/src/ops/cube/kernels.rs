//! The kernels. They index through strides, read and write only where the sizes allow, and compute in f32.

use cubecl::prelude::*;

use crate::{
    Codebook, Grid, Value,
    packing::{RUN, position},
};

/// Outputs of a cube of [`rows_times_weight`], so that neighbouring units read neighbouring words.
pub(super) const COLUMNS: usize = 32;
/// Parts of the inputs in a cube of [`rows_times_weight`], and the most rows of a cube. Together with [`COLUMNS`] 256 units,
/// which every device has.
pub(super) const PARTS: usize = 8;

/// What a kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Format {
    /// How a code becomes a number.
    pub value: Value,
    /// Whether offsets are read.
    pub has_offsets: bool,
    /// Neighbouring codes of a run of 32 that lie in one block wherever the run is, so that their scale is read once.
    pub in_block: usize,
    /// Whether the last run of 32 inputs is not full.
    pub ragged: bool,
}

impl Format {
    fn bits(self) -> usize {
        self.value.bits() as usize
    }

    fn codebook(self) -> Option<Codebook> {
        match self.value {
            Value::Affine { .. } => None,
            Value::Codebook(codebook) => Some(codebook),
        }
    }

    /// Taken off the codes of a symmetric grid.
    fn center(self) -> f32 {
        match self.value {
            Value::Affine { bits, grid: Grid::Symmetric } => (1u32 << (bits - 1)) as f32,
            _ => 0.0,
        }
    }
}

/// Element `[row, column]` in f32.
#[cube]
fn at<T: Float>(tensor: &Tensor<T>, row: usize, column: usize) -> f32 {
    f32::cast_from(tensor[row * tensor.stride(0) + column * tensor.stride(1)])
}

/// Entry `code` of a codebook, found by halving its entries from `first` on: a table in memory would be slower on some
/// devices and is not to be had on others.
#[cube]
fn entry(code: u32, #[comptime] codebook: Codebook, #[comptime] first: usize, #[comptime] bits: u32) -> f32 {
    if comptime!(bits == 0) {
        f32::new(comptime!(codebook.levels()[first]))
    } else {
        let half = comptime!(1u32 << (bits - 1));
        let low = entry(code, codebook, first, comptime!(bits - 1));
        let high = entry(code, codebook, comptime!(first + half as usize), comptime!(bits - 1));
        select((code & half) != 0u32, high, low)
    }
}

/// The number that a code stands for before scaling.
#[cube]
fn level(code: u32, #[comptime] format: Format) -> f32 {
    if comptime!(format.codebook().is_some()) {
        entry(code, comptime!(format.codebook().unwrap()), 0usize, comptime!(format.bits() as u32))
    } else {
        f32::cast_from(code) - comptime!(format.center())
    }
}

/// The code of any input of an output.
#[cube]
fn code_at(codes: &Tensor<u32>, input: usize, output: usize, #[comptime] format: Format) -> u32 {
    let bits = comptime!(format.bits());
    let bit = (input % RUN) * bits;
    let row = (input / RUN) * bits + bit / 32;
    let shift = (bit % 32) as u32;
    let mut code = codes[row * codes.stride(0) + output * codes.stride(1)] >> shift;
    if shift + comptime!(bits as u32) > 32 {
        code |= codes[(row + 1) * codes.stride(0) + output * codes.stride(1)] << (32 - shift);
    }
    code & comptime!((1u32 << bits) - 1)
}

/// The 32 weights of a run of one output, zero beyond `d_input`.
#[cube]
fn run_weights<S: Float, O: Float>(
    codes: &Tensor<u32>,
    scales: &Tensor<S>,
    offsets: &Tensor<O>,
    run: usize,
    output: usize,
    d_input: usize,
    inputs: usize,
    outputs: usize,
    #[comptime] format: Format,
) -> Array<f32> {
    let bits = comptime!(format.bits());
    let mut words = Array::<u32>::new(bits);
    #[unroll]
    for row in 0..bits {
        words[row] = codes[(run * bits + row) * codes.stride(0) + output * codes.stride(1)];
    }

    let column = output / outputs;
    let mut scale = 0.0f32;
    let mut offset = 0.0f32;
    let mut weights = Array::<f32>::new(RUN);
    #[unroll]
    for input in 0..RUN {
        let k = run * RUN + input;
        if comptime!(input % format.in_block == 0) {
            let block = select(k < d_input, k, d_input - 1) / inputs;
            scale = at::<S>(scales, block, column);
            if comptime!(format.has_offsets) {
                offset = at::<O>(offsets, block, column);
            }
        }
        let (row, shift) = comptime!(position(input, format.value.bits()));
        let mut code = words[row] >> shift;
        if comptime!(shift as usize + bits > 32) {
            code |= words[comptime!(row + 1)] << comptime!(32 - shift);
        }
        let mut weight = level(code & comptime!((1u32 << bits) - 1), format) * scale;
        if comptime!(format.has_offsets) {
            weight += offset;
        }
        if comptime!(format.ragged) {
            weight = select(k < d_input, weight, 0.0f32);
        }
        weights[input] = weight;
    }
    weights
}

/// The dense weight. One unit per run and output; neighbouring units write neighbouring outputs.
#[cube(launch_unchecked)]
pub(super) fn dequantize<S: Float, O: Float, F: Float>(
    codes: &Tensor<u32>,
    scales: &Tensor<S>,
    offsets: &Tensor<O>,
    dense: &mut Tensor<F>,
    inputs: usize,
    outputs: usize,
    #[comptime] format: Format,
    #[define(S, O, F)] _types: [ElemType; 3],
) {
    let d_input = dense.shape(0);
    let d_output = dense.shape(1);
    let run = ABSOLUTE_POS / d_output;
    let output = ABSOLUTE_POS % d_output;
    if run * RUN >= d_input {
        terminate!();
    }
    let weights = run_weights::<S, O>(codes, scales, offsets, run, output, d_input, inputs, outputs, format);
    #[unroll]
    for input in 0..RUN {
        let k = run * RUN + input;
        if k < d_input {
            let index = k * dense.stride(0) + output * dense.stride(1);
            dense[index] = F::cast_from(weights[input]);
        }
    }
}

/// A few rows times the weight, unpacked on the way. A cube has `COLUMNS` outputs × `PARTS` parts of the inputs of up to
/// `rows` rows; every unit sums its part of the runs for all of them, then the parts are summed. Cubes in the direction x
/// have other outputs, in y others of the `splits` shares of the inputs, in z other rows; share after share lies in `y`
/// `[splits * all rows, d_output]`.
#[cube(launch_unchecked)]
pub(super) fn rows_times_weight<S: Float, O: Float, F: Float, Y: Float>(
    x: &Tensor<F>,
    codes: &Tensor<u32>,
    scales: &Tensor<S>,
    offsets: &Tensor<O>,
    y: &mut Tensor<Y>,
    inputs: usize,
    outputs: usize,
    splits: usize,
    #[comptime] rows: usize,
    #[comptime] format: Format,
    #[define(S, O, F, Y)] _types: [ElemType; 4],
) {
    let all_rows = x.shape(0);
    let d_input = x.shape(1);
    let d_output = y.shape(1);
    let column = UNIT_POS_X as usize;
    let part = UNIT_POS_Y as usize;
    let output = CUBE_POS_X as usize * COLUMNS + column;
    let split = CUBE_POS_Y as usize;
    let first_row = CUBE_POS_Z as usize * rows;

    let mut sums = Array::<f32>::new(rows);
    if output < d_output {
        for run in range_stepped(split * PARTS + part, d_input.div_ceil(RUN), splits * PARTS) {
            let weights =
                run_weights::<S, O>(codes, scales, offsets, run, output, d_input, inputs, outputs, format);
            #[unroll]
            for input in 0..RUN {
                let mut k = run * RUN + input;
                if comptime!(format.ragged) {
                    // Read anywhere: the weight is zero. A branch would make every load wait for the one before.
                    k = select(k < d_input, k, 0usize);
                }
                #[unroll]
                for row in 0..rows {
                    // A row beyond the last is read as the last one, and not written.
                    let row_of_x = select(first_row + row < all_rows, first_row + row, all_rows - 1);
                    sums[row] += at::<F>(x, row_of_x, k) * weights[input];
                }
            }
        }
    }

    let mut partial = Shared::<[f32]>::new_slice(comptime!(rows * PARTS * COLUMNS));
    #[unroll]
    for row in 0..rows {
        partial[(row * PARTS + part) * COLUMNS + column] = sums[row];
    }
    sync_cube();
    // There are at least as many parts as rows: the first ones add up one row each.
    if output < d_output && part < rows && first_row + part < all_rows {
        let mut sum = 0.0f32;
        for other in 0..PARTS {
            sum += partial[(part * PARTS + other) * COLUMNS + column];
        }
        let index = (split * all_rows + first_row + part) * y.stride(0) + output * y.stride(1);
        y[index] = Y::cast_from(sum);
    }
}

/// The sum of shares that lie one after the other, each of `count` elements.
#[cube(launch_unchecked)]
pub(super) fn sum_shares<F: Float>(
    shares: &Tensor<f32>,
    sums: &mut Tensor<F>,
    count: usize,
    splits: usize,
    #[define(F)] _type: ElemType,
) {
    if ABSOLUTE_POS < count {
        let mut sum = 0.0f32;
        for split in 0..splits {
            sum += shares[split * count + ABSOLUTE_POS];
        }
        sums[ABSOLUTE_POS] = F::cast_from(sum);
    }
}

/// Gradients of scales and offsets, given the gradients `dw` of the outputs from `first_output` on (the first of a
/// block). One unit per block.
#[cube(launch)]
pub(super) fn reduce_blocks<S: Float, O: Float>(
    dw: &Tensor<f32>,
    codes: &Tensor<u32>,
    d_scales: &mut Tensor<S>,
    d_offsets: &mut Tensor<O>,
    first_output: usize,
    inputs: usize,
    outputs: usize,
    #[comptime] format: Format,
    #[define(S, O)] _types: [ElemType; 2],
) {
    let d_input = dw.shape(0);
    let width = dw.shape(1);
    let columns = width.div_ceil(outputs);
    let block_row = ABSOLUTE_POS / columns;
    let block_column = ABSOLUTE_POS % columns;
    let first_input = block_row * inputs;
    if first_input >= d_input {
        terminate!();
    }
    let last_input = select(first_input + inputs < d_input, first_input + inputs, d_input);
    let first = block_column * outputs;
    let last = select(first + outputs < width, first + outputs, width);

    let mut d_scale = 0.0f32;
    let mut d_offset = 0.0f32;
    for input in first_input..last_input {
        for output in first..last {
            let gradient = at::<f32>(dw, input, output);
            d_scale += gradient * level(code_at(codes, input, first_output + output, format), format);
            if comptime!(format.has_offsets) {
                d_offset += gradient;
            }
        }
    }
    let column = first_output / outputs + block_column;
    let index = block_row * d_scales.stride(0) + column * d_scales.stride(1);
    d_scales[index] = S::cast_from(d_scale);
    let index = block_row * d_offsets.stride(0) + column * d_offsets.stride(1);
    d_offsets[index] = O::cast_from(d_offset);
}
