//! Hashes by which files and runs are told apart.

use std::{fmt::Write, fs::File, io::Read, path::Path};

use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// The bytes of a digest in hexadecimal, two lower-case digits each.
///
/// ```
/// assert_eq!(kiln_quant_core::hash::hex([0x0f, 0xa0]), "0fa0");
/// ```
pub fn hex(digest: impl AsRef<[u8]>) -> String {
    digest.as_ref().iter().fold(String::new(), |mut text, byte| {
        // Writing to a string doesn't fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// SHA-256 of a file, in hexadecimal.
///
/// # Errors
/// The operating system's refusal.
pub fn sha256_of(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    let mut file = File::open(path).map_err(Error::io(path))?;
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer).map_err(Error::io(path))? {
            0 => return Ok(hex(hash.finalize())),
            count => hash.update(&buffer[..count]),
        }
    }
}

/// 64-bit FNV-1a: quick, the same in every build, and no protection against malice.
///
/// ```
/// use kiln_quant_core::hash::Fnv1a;
/// assert_eq!(Fnv1a::of("foobar".bytes()).value(), 0x8594_4171_f739_67e8);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fnv1a(u64);

impl Default for Fnv1a {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv1a {
    /// The hash of these bytes.
    pub fn of(bytes: impl IntoIterator<Item = u8>) -> Self {
        let mut hash = Self::default();
        hash.update(bytes);
        hash
    }

    /// Adds bytes.
    pub fn update(&mut self, bytes: impl IntoIterator<Item = u8>) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    /// Adds values, as their bytes in little-endian order.
    pub fn update_values(&mut self, values: &[f32]) {
        self.update(values.iter().flat_map(|value| value.to_le_bytes()));
    }

    /// The hash.
    pub fn value(self) -> u64 {
        self.0
    }

    /// The hash as 16 hexadecimal digits.
    pub fn text(self) -> String {
        format!("{:016x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The test vectors of the function's authors.
    #[test]
    fn fnv_1a_gives_its_authors_values() {
        assert_eq!(Fnv1a::default().value(), 0xcbf2_9ce4_8422_2325);
        assert_eq!(Fnv1a::of(*b"a").text(), "af63dc4c8601ec8c");
        assert_eq!(Fnv1a::of(*b"foobar").value(), 0x8594_4171_f739_67e8);
    }
}
