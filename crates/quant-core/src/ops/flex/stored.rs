//! Scales and offsets in host memory, in the form that they are stored in.

use rayon::prelude::*;

use super::simd::{LANES, Lanes, dispatch};
use crate::{SuperLayout, dynamic_map::DYNAMIC_MAP, scheme::DOUBLE_BLOCK, weight::integer};

/// Columns of double-quantized scales that are unpacked together: their codes stay in the first-level cache while rows are
/// written from them.
const COLUMNS: usize = 64;
/// Values below which another thread isn't worth its waking.
const PER_TASK: usize = 1 << 15;

/// Scales, or offsets, of a whole weight.
#[derive(Clone, Copy)]
pub(crate) struct Stored<'a> {
    form: Form<'a>,
    /// Blocks of one output.
    rows: usize,
    /// Blocks beside each other.
    columns: usize,
}

#[derive(Clone, Copy)]
enum Form<'a> {
    /// `[rows, columns]`, each for so many neighbouring outputs.
    Floats { values: &'a [f32], outputs: usize },
    /// Integers under factors.
    Integers { words: &'a [u32], factors: &'a [f32], layout: SuperLayout },
    /// Codes of bitsandbytes' dynamic map, output-major, under nested scales, and an offset.
    Double { words: &'a [u32], nested: &'a [f32], offset: f32 },
}

// The gathers of double-quantized scales read through pointers: the lengths that are checked here are what makes that sound.
impl<'a> Stored<'a> {
    /// A value for each block; a block has so many `outputs`.
    ///
    /// # Panics
    /// If there are not `rows · columns` values.
    pub(crate) fn floats(values: &'a [f32], [rows, columns]: [usize; 2], outputs: usize) -> Self {
        assert_eq!(values.len(), rows * columns, "scales or offsets of {rows}x{columns} blocks");
        Self { form: Form::Floats { values, outputs }, rows, columns }
    }

    /// Integers in words, under factors.
    ///
    /// # Panics
    /// If these are not as many as `layout` says.
    pub(crate) fn integers(words: &'a [u32], factors: &'a [f32], layout: SuperLayout) -> Self {
        let SuperLayout { rows, columns, .. } = layout;
        assert_eq!(words.len(), layout.word_rows() * columns, "words of integer scales {layout:?}");
        assert_eq!(factors.len(), layout.factor_rows() * columns, "factors of integer scales {layout:?}");
        Self { form: Form::Integers { words, factors, layout }, rows, columns }
    }

    /// Double-quantized scales: four codes a word.
    ///
    /// # Panics
    /// If these are not as many as `[rows, columns]` blocks have.
    pub(crate) fn double(
        words: &'a [u32],
        nested: &'a [f32],
        offset: f32,
        [rows, columns]: [usize; 2],
    ) -> Self {
        let count = rows * columns;
        assert!(i32::try_from(count).is_ok(), "{count} double-quantized scales of one weight");
        assert_eq!(words.len(), count.div_ceil(4), "codes of {rows}x{columns} double-quantized scales");
        assert_eq!(nested.len(), count.div_ceil(DOUBLE_BLOCK), "nested scales of {rows}x{columns} scales");
        Self { form: Form::Double { words, nested, offset }, rows, columns }
    }

    /// All of them, `[rows, columns]`.
    pub(crate) fn unpack(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.rows * self.columns];
        let rows = PER_TASK.div_ceil(self.columns.max(1));
        let unpack = |first: usize, part: &mut [f32]| {
            let count = part.len() / self.columns.max(1);
            self.write([first, 0], [count, self.columns], part);
        };
        if self.rows <= rows {
            unpack(0, &mut values);
        } else {
            let parts = values.par_chunks_mut(rows * self.columns).enumerate();
            parts.for_each(|(index, part)| unpack(index * rows, part));
        }
        values
    }

    /// Those of a rectangle of blocks of inputs, from `block` on, and of outputs, from `output` on. They are written to
    /// `scratch` where they don't lie in memory as they are.
    pub(super) fn rows(
        &self,
        [block, output]: [usize; 2],
        [blocks, outputs]: [usize; 2],
        scratch: &mut Vec<f32>,
    ) -> Rows {
        if let Form::Floats { values, outputs: 1 } = self.form {
            let values = &values
                [block * self.columns + output..(block + blocks - 1) * self.columns + output + outputs];
            return Rows { at: values.as_ptr(), stride: self.columns };
        }
        if scratch.len() < blocks * outputs {
            scratch.resize(blocks * outputs, 0.0);
        }
        self.write([block, output], [blocks, outputs], &mut scratch[..blocks * outputs]);
        Rows { at: scratch.as_ptr(), stride: outputs }
    }

    /// Writes a rectangle row by row.
    fn write(&self, [block, output]: [usize; 2], [blocks, outputs]: [usize; 2], into: &mut [f32]) {
        #[inline(always)]
        fn lanes<L: Lanes>(stored: &Stored, at: [usize; 2], outputs: usize, into: &mut [f32]) {
            let step = if matches!(stored.form, Form::Double { .. }) { COLUMNS } else { outputs };
            for start in (0..outputs).step_by(step.max(1)) {
                let end = outputs.min(start + step);
                for (block, into) in into.chunks_exact_mut(outputs).enumerate() {
                    stored.write_row::<L>(at[0] + block, at[1] + start, &mut into[start..end]);
                }
            }
        }
        assert_eq!(into.len(), blocks * outputs, "room for scales");
        let (stored, at) = (self, [block, output]);
        dispatch!(lanes(stored: &Stored, at: [usize; 2], outputs: usize, into: &mut [f32]))
    }

    /// Writes those of neighbouring outputs.
    #[inline(always)]
    fn write_row<L: Lanes>(&self, block: usize, output: usize, into: &mut [f32]) {
        match self.form {
            Form::Floats { values, outputs } => {
                let row = &values[block * self.columns..][..self.columns];
                let (vectors, rest) = into.as_chunks_mut::<LANES>();
                let whole = vectors.len() * LANES;
                let aligned = LANES.is_multiple_of(outputs) && output.is_multiple_of(outputs);
                for (vector, c) in vectors.iter_mut().zip((output..).step_by(LANES)) {
                    if aligned {
                        let values = &row[c / outputs..][..LANES / outputs];
                        // SAFETY: so many values; an array of sixteen.
                        unsafe { L::spread(values.as_ptr(), outputs).store(vector.as_mut_ptr()) }
                    } else {
                        repeat(row, outputs, c, vector);
                    }
                }
                repeat(row, outputs, output + whole, rest);
            }
            Form::Integers { words, factors, layout } => {
                let (word, shift) = layout.place(block);
                let words = &words[word * self.columns + output..][..into.len()];
                let factors = &factors[block / layout.blocks * self.columns + output..][..into.len()];
                let (vectors, rest) = into.as_chunks_mut::<LANES>();
                let first = vectors.len() * LANES;
                // A loop for each width, without a question inside.
                match layout.bits {
                    8 => scaled(vectors, words, factors, |words| L::signed_byte(words, shift)),
                    _ => scaled(vectors, words, factors, |words| L::code(words, shift, 15)),
                }
                for ((value, word), factor) in rest.iter_mut().zip(&words[first..]).zip(&factors[first..]) {
                    *value = f32::from(integer(word >> shift, layout.bits)) * factor;
                }
            }
            Form::Double { words, nested, offset } => {
                let (first, step) = (output * self.rows + block, self.rows);
                let (vectors, rest) = into.as_chunks_mut::<LANES>();
                let whole = vectors.len() * LANES;
                for (vector, c) in vectors.iter_mut().zip((0..).step_by(LANES)) {
                    assert!(
                        first + (c + LANES - 1) * step < self.rows * self.columns,
                        "outputs beyond the last"
                    );
                    // SAFETY: the places of these outputs, as just seen, have codes and nested scales, and fit an i32.
                    unsafe {
                        let [level, nested] =
                            L::double_scales(words.as_ptr(), nested.as_ptr(), first + c * step, step);
                        level.mul(nested).add(L::splat(offset)).store(vector.as_mut_ptr());
                    }
                }
                for (c, value) in (whole..).zip(rest) {
                    let place = first + c * step;
                    let code = words[place / 4] >> (8 * (place % 4)) & 255;
                    *value = DYNAMIC_MAP[code as usize] * nested[place / DOUBLE_BLOCK] + offset;
                }
            }
        }
    }
}

/// Writes the values of outputs from `output` on, of which `outputs` neighbours share one.
fn repeat(row: &[f32], outputs: usize, output: usize, mut into: &mut [f32]) {
    let first = output / outputs;
    let mut count = (first + 1) * outputs - output;
    for value in &row[first..] {
        let (now, later) = into.split_at_mut(count.min(into.len()));
        now.fill(*value);
        (into, count) = (later, outputs);
        if into.is_empty() {
            break;
        }
    }
}

/// Writes the integers in `words` times their factors.
#[inline(always)]
fn scaled<L: Lanes>(
    vectors: &mut [[f32; LANES]],
    words: &[u32],
    factors: &[f32],
    integers: impl Fn(L::Words) -> L,
) {
    let (words, factors) = (words.as_chunks::<LANES>().0, factors.as_chunks::<LANES>().0);
    for ((vector, words), factors) in vectors.iter_mut().zip(words).zip(factors) {
        // SAFETY: arrays of sixteen.
        unsafe {
            integers(L::words(words.as_ptr())).mul(L::load(factors.as_ptr())).store(vector.as_mut_ptr());
        }
    }
}

/// Scales or offsets as floats: those of neighbouring outputs beside each other, those of blocks `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    at: *const f32,
    stride: usize,
}

impl Rows {
    /// Those of a block, counted from the first one's.
    #[inline(always)]
    pub(super) fn row(&self, block: usize) -> *const f32 {
        self.at.wrapping_add(block * self.stride)
    }
}
