#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod codebook;
mod compute;
mod device;
mod dropout;
mod dynamic_map;
mod error;
pub mod files;
pub mod fused;
pub mod hash;
mod head_loss;
mod host;
mod linear;
pub mod ops;
pub mod packed_file;
pub mod packing;
mod parameters;
mod plan;
mod projection;
pub mod quantizers;
pub mod random;
pub mod safetensors_file;
mod scheme;
mod slots;
mod storage;
mod tables;
mod tensor;
mod trained_parts;
mod weight;

pub use codebook::Codebook;
pub use compute::Compute;
pub use device::DeviceLimits;
pub use dropout::Dropout;
pub use error::{Error, Result, shortened};
pub use files::write_atomically;
pub use head_loss::LogitSpec;
pub use host::{ints_to_host, to_host, to_host_together};
pub use linear::{PackedLinear, QuantLinear};
pub use parameters::{
    HostValues, Parameter, fingerprint, for_each_parameter, is_variant, stable_name, trained_values,
};
pub use plan::{PathPattern, Plan};
pub use projection::{Place, Projection, operand_of};
pub use quantizers::{HostQuantizer, Hqq, LeastSquares, MinMax, MseClipped, QuantError};
pub use scheme::{
    Block, DOUBLE_BLOCK, Grid, QuantScheme, SUPER_BLOCK, ScaleType, Scheme, SuperLayout, Value,
};
pub use slots::{OwnTables, Slots, Stack};
pub use storage::{StorageReport, StorageRow};
pub use tables::{LowRankUpdate, TableUpdates, TokenRows, TokenTables};
pub use tensor::PackedTensor;
pub use trained_parts::{TrainedParts, with_settled_parts, with_trained_parts};
pub use weight::{DoubleScales, PackedWeight, Scales, SuperBlocks, SuperScales};
