//! The seam between file formats and models: a checkpoint's tensors, read one at a time.

use kiln_quant_core::PackedWeight;

use crate::Result;

/// A dense tensor in host memory, converted to f32.
#[derive(Debug, Clone, PartialEq)]
pub struct DenseTensor {
    /// Sizes, outermost first, as in the checkpoint.
    pub shape: Vec<usize>,
    /// Row-major values.
    pub values: Vec<f32>,
}

/// The weight of a linear or embedding as the file holds it.
#[derive(Debug, Clone, PartialEq)]
pub enum StoredWeight {
    /// `[d_output, d_input]` (an embedding: `[vocabulary, width]`).
    Dense(DenseTensor),
    /// Packed; `d_output` is the row count of the checkpoint's matrix.
    Packed(PackedWeight),
}

/// What a file's header says of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Described {
    /// Its sizes as [`TensorSource::dense`] gives them; `None` where they follow from what is stored of it.
    pub shape: Option<Vec<usize>>,
    /// Bytes of all that is stored of it; 0 for a part of a tensor, which is read alone.
    pub bytes: u64,
    /// Whether it is read to dense values, not packed.
    pub dense: bool,
}

/// Tensors by their Hugging Face names, whatever the file calls them. Nothing is kept resident: every call reads.
pub trait TensorSource: Send + Sync {
    /// Whether the tensor `name` (with `.weight` or `.bias`) can be read by [`dense`](Self::dense), or, for `P.weight`, the
    /// module `P` by [`weight`](Self::weight).
    fn contains(&self, name: &str) -> bool;

    /// The names that [`contains`](Self::contains) accepts, sorted.
    fn names(&self) -> Vec<String>;

    /// What the header says of the tensor `name`, before anything of it is read.
    ///
    /// # Errors
    /// A missing tensor.
    fn describe(&self, name: &str) -> Result<Described>;

    /// The tensor `name` in f32; packed ones are dequantized.
    ///
    /// # Errors
    /// A missing tensor, an unknown type, a lying header, or the operating system's refusal.
    fn dense(&self, name: &str) -> Result<DenseTensor>;

    /// The weight of the linear or embedding `module` (`model.layers.0.self_attn.q_proj`), packed where the file is.
    ///
    /// # Errors
    /// As [`dense`](Self::dense).
    fn weight(&self, module: &str) -> Result<StoredWeight>;
}

/// `2^(exponent - 127)`: the scales of the OCP's Microscaling formats. The last exponent, which stands for no number, gives
/// infinity.
pub(crate) fn power_of_two(exponent: u8) -> f32 {
    match exponent {
        0 => f32::from_bits(1 << 22),
        _ => f32::from_bits(u32::from(exponent) << 23),
    }
}

/// A row-major matrix `[rows, columns]`, transposed in squares that fit the cache.
pub(crate) fn transposed<T: Copy + Default>(values: &[T], rows: usize, columns: usize) -> Vec<T> {
    const SQUARE: usize = 32;
    let mut result = vec![T::default(); values.len()];
    for row in (0..rows).step_by(SQUARE) {
        for column in (0..columns).step_by(SQUARE) {
            for r in row..rows.min(row + SQUARE) {
                for c in column..columns.min(column + SQUARE) {
                    result[c * rows + r] = values[r * columns + c];
                }
            }
        }
    }
    result
}
