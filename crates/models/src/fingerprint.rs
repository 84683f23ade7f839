//! Which model something was made for.

use burn::module::Module;
use kiln_quant_core::{HostValues, for_each_parameter, hash::hex};
use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// SHA-256 over paths, shapes and values of all parameters of a model, in its order: 64 hexadecimal digits.
///
/// Floats are compared as f32, so that it doesn't depend on the device. One tensor at a time is copied to the host.
///
/// # Errors
/// A device that can't be read.
pub fn fingerprint<M: Module>(model: &M) -> Result<String> {
    let mut hash = Sha256::new();
    for_each_parameter(model, |parameter| {
        hash.update(format!("{}{:?}\n", parameter.name(), parameter.shape));
        let values: Vec<u8> = match parameter.values()? {
            HostValues::Floats(values) => values.into_iter().flat_map(f32::to_le_bytes).collect(),
            HostValues::Ints(values) => values.into_iter().flat_map(i64::to_le_bytes).collect(),
        };
        hash.update(values);
        Ok::<_, Error>(())
    })?;
    Ok(hex(hash.finalize()))
}
