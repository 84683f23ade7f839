//! Quantizers on the host: from a dense weight to a [`PackedWeight`], looking at nothing but the weight.
//!
//! | quantizer | scale of a block | schemes |
//! | --- | --- | --- |
//! | [`MinMax`] | the block's whole range | all |
//! | [`MseClipped`] | the shrunken range with the least error | all |
//! | [`LeastSquares`] | the best for the codes, in turns with the codes | all |
//! | [`Hqq`] | the block's range; the zero point by the half-quadratic solver | affine, float or integer offset |
//!
//! All of them round scale and offset to the scheme's storage type **first** and choose codes against the rounded
//! values, so that what is stored and what was measured agree. (Double-quantized scales are the one exception, as
//! in bitsandbytes: see [`double_quantize`].) Work is shared by outputs among threads; the result doesn't depend
//! on their number.
//!
//! ```
//! use kiln_quant_core::quantizers::{HostQuantizer, MinMax, error};
//! let weight: Vec<f32> = (0..64).map(|i| (i as f32).sin()).collect();
//! let packed = MinMax.quantize("layer", &weight, 32, 2, &"affine4:16".parse()?)?;
//! assert!(error(&weight, &packed).max_abs < 0.5 * 2.0 / 15.0 + 1e-6);
//! # Ok::<(), kiln_quant_core::Error>(())
//! ```

mod blocks;
mod clip;
mod codebook;
mod double;
mod encode;
mod hqq;
mod least_squares;
mod report;
mod rtn;
mod super_blocks;

pub use clip::MseClipped;
pub use double::double_quantize;
pub use hqq::Hqq;
pub use least_squares::LeastSquares;
pub use report::{QuantError, error};
pub use rtn::MinMax;

use crate::{PackedWeight, QuantScheme, Result};

/// A quantizer that needs only the weight.
pub trait HostQuantizer: Send + Sync {
    /// Quantizes `weight`, `[d_output, d_input]` row-major as checkpoints store it. `name` is used in errors.
    ///
    /// A block of zeros is exact under every scheme. A block of one repeated value becomes scale 0 and that value
    /// as offset on the float grid, scale `|value|` and zero point 0 or 1 on the integer grid, and the outermost
    /// level otherwise: exact but for the rounding of the storage type.
    ///
    /// # Errors
    /// - [`Error::NotFinite`](crate::Error::NotFinite) for a weight that holds NaN or infinity;
    /// - [`Error::Tensor`](crate::Error::Tensor) if the sizes don't fit, or a scale or offset exceeds the range of
    ///   its storage type;
    /// - [`Error::Scheme`](crate::Error::Scheme) for a scheme that can't be made, or not by this quantizer;
    /// - [`Error::Option`](crate::Error::Option) for an option out of range.
    fn quantize(
        &self,
        name: &str,
        weight: &[f32],
        d_input: usize,
        d_output: usize,
        scheme: &QuantScheme,
    ) -> Result<PackedWeight>;
}

#[cfg(test)]
mod tests;
