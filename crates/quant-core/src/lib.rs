//! Packed low-bit weights for [Burn](burn).
#![cfg_attr(docsrs, feature(doc_cfg))]

mod codebook;
mod dynamic_map;
mod error;
mod linear;
pub mod ops;
pub mod packing;
mod projection;
mod scheme;
mod tensor;
mod weight;

pub use codebook::Codebook;
pub use error::{Error, Result};
pub use linear::{PackedLinear, QuantLinear};
pub use projection::Projection;
pub use scheme::{Block, Grid, QuantScheme, ScaleType, Scheme, Value};
pub use tensor::PackedTensor;
pub use weight::{DoubleScales, PackedWeight, Scales};
