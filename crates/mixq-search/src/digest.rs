//! Names of what is told apart by its content.

use sha2::{Digest, Sha256};

/// SHA-256 in hexadecimal, 64 digits.
pub(crate) fn digest(content: impl AsRef<[u8]>) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}
