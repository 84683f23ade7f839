//! The block types of GGUF: how many weights a block holds, in how many bytes, and how they read back.
//!
//! All blocks run along the innermost axis. `d` and `m` below are the block's f16 scale and offset, `q` a code.
//! Layouts are those of the format's reference implementation (ggml).

use half::{bf16, f16};
use kiln_quant_core::QuantScheme;

/// How the values of a tensor are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum BlockType {
    /// 32-bit floats.
    F32,
    /// IEEE halves.
    F16,
    /// bfloat16.
    Bf16,
    /// 32 × 4 bits, `d (q - 8)`.
    Q4_0,
    /// 32 × 4 bits, `d q + m`.
    Q4_1,
    /// 32 × 5 bits, `d (q - 16)`.
    Q5_0,
    /// 32 × 5 bits, `d q + m`.
    Q5_1,
    /// 32 × 8 bits, `d (q - 128)`.
    Q8_0,
    /// 256 × 2 bits under 4-bit scales and minima.
    Q2K,
    /// 256 × 3 bits under 6-bit scales.
    Q3K,
    /// 256 × 4 bits under 6-bit scales and minima.
    Q4K,
    /// 256 × 5 bits under 6-bit scales and minima.
    Q5K,
    /// 256 × 6 bits under 8-bit scales.
    Q6K,
}

/// Weights in a block of the simple types.
const SMALL: usize = 32;
/// Weights in a block of the K types.
const LARGE: usize = 256;

impl BlockType {
    const ALL: [Self; 13] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// Number in the file, name, weights and bytes of a block.
    const fn layout(self) -> (u32, &'static str, usize, usize) {
        match self {
            Self::F32 => (0, "F32", 1, 4),
            Self::F16 => (1, "F16", 1, 2),
            Self::Bf16 => (30, "BF16", 1, 2),
            Self::Q4_0 => (2, "Q4_0", SMALL, 18),
            Self::Q4_1 => (3, "Q4_1", SMALL, 20),
            Self::Q5_0 => (6, "Q5_0", SMALL, 22),
            Self::Q5_1 => (7, "Q5_1", SMALL, 24),
            Self::Q8_0 => (8, "Q8_0", SMALL, 34),
            Self::Q2K => (10, "Q2_K", LARGE, 84),
            Self::Q3K => (11, "Q3_K", LARGE, 110),
            Self::Q4K => (12, "Q4_K", LARGE, 144),
            Self::Q5K => (13, "Q5_K", LARGE, 176),
            Self::Q6K => (14, "Q6_K", LARGE, 210),
        }
    }

    /// The type's number in files.
    pub const fn id(self) -> u32 {
        self.layout().0
    }

    pub(super) fn from_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.id() == id)
    }

    /// The names of all types, for errors.
    pub(super) fn list() -> String {
        Self::ALL.map(Self::name).join(", ")
    }

    /// The type's usual name, e.g. `Q4_K`.
    pub const fn name(self) -> &'static str {
        self.layout().1
    }

    /// Weights in a block.
    pub const fn weights(self) -> usize {
        self.layout().2
    }

    /// Bytes of a block.
    pub const fn bytes(self) -> usize {
        self.layout().3
    }

    /// Bytes of `count` weights in whole blocks; `None` if that overflows.
    pub(super) const fn bytes_of(self, count: usize) -> Option<usize> {
        (count / self.weights()).checked_mul(self.bytes())
    }

    /// The packed format that holds this type exactly, code by code.
    pub fn packed_scheme(self) -> Option<QuantScheme> {
        use kiln_quant_core::{Block, Grid, ScaleType, Value};
        let (bits, grid) = match self {
            Self::Q4_0 => (4, Grid::Symmetric),
            Self::Q4_1 => (4, Grid::Float),
            Self::Q8_0 => (8, Grid::Symmetric),
            _ => return None,
        };
        Some(QuantScheme {
            value: Value::Affine { bits, grid },
            block: Block::group(SMALL),
            scales: ScaleType::F16,
        })
    }

    /// Decodes whole blocks.
    pub(super) fn decode(self, bytes: &[u8], values: &mut [f32]) {
        let decode: fn(&[u8], &mut [f32]) = match self {
            Self::F32 => |block, out| out[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]),
            Self::F16 => |block, out| out[0] = half_at(block, 0),
            Self::Bf16 => |block, out| out[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32(),
            Self::Q4_0 => |block, out| small::<8>(Self::Q4_0, block, out),
            Self::Q4_1 => |block, out| small::<0>(Self::Q4_1, block, out),
            Self::Q5_0 => |block, out| small::<16>(Self::Q5_0, block, out),
            Self::Q5_1 => |block, out| small::<0>(Self::Q5_1, block, out),
            Self::Q8_0 => |block, out| small::<128>(Self::Q8_0, block, out),
            Self::Q2K => q2_k,
            Self::Q3K => q3_k,
            Self::Q4K => q4_k,
            Self::Q5K => q5_k,
            Self::Q6K => q6_k,
        };
        let blocks = bytes.chunks_exact(self.bytes());
        for (block, out) in blocks.zip(values.chunks_exact_mut(self.weights())) {
            decode(block, out);
        }
    }

    /// Codes, scale and offset (zero where the type has none) of one block of 32; only for the simple types.
    pub(super) fn codes(self, block: &[u8], codes: &mut [u8]) -> (f32, f32) {
        match self {
            Self::Q4_0 => {
                nibbles(&block[2..], codes);
                (half_at(block, 0), 0.0)
            }
            Self::Q4_1 => {
                nibbles(&block[4..], codes);
                (half_at(block, 0), half_at(block, 2))
            }
            Self::Q5_0 => {
                nibbles(&block[6..], codes);
                fifth_bits(&block[2..], codes);
                (half_at(block, 0), 0.0)
            }
            Self::Q5_1 => {
                nibbles(&block[8..], codes);
                fifth_bits(&block[4..], codes);
                (half_at(block, 0), half_at(block, 2))
            }
            Self::Q8_0 => {
                // A signed byte plus 128 is the byte with its top bit turned.
                for (code, &byte) in codes.iter_mut().zip(&block[2..]) {
                    *code = byte ^ 0x80;
                }
                (half_at(block, 0), 0.0)
            }
            _ => unreachable!("{} has no codes of one scale", self.name()),
        }
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// 16 bytes: low nibbles are the first 16 codes, high ones the last.
fn nibbles(bytes: &[u8], codes: &mut [u8]) {
    let (low, high) = codes.split_at_mut(SMALL / 2);
    for ((low, high), byte) in low.iter_mut().zip(high).zip(bytes) {
        (*low, *high) = (byte & 15, byte >> 4);
    }
}

/// Bit `i` of four bytes is the top bit of code `i`.
fn fifth_bits(bytes: &[u8], codes: &mut [u8]) {
    for (i, code) in codes.iter_mut().enumerate() {
        *code |= (bytes[i / 8] >> (i % 8) & 1) << 4;
    }
}

/// A block of 32: `d (q - ZERO) + m`, where at most one of `ZERO` and `m` isn't zero.
fn small<const ZERO: u8>(kind: BlockType, block: &[u8], out: &mut [f32]) {
    let mut codes = [0; SMALL];
    let (scale, offset) = kind.codes(block, &mut codes);
    for (value, code) in out.iter_mut().zip(codes) {
        *value = scale * (f32::from(code) - f32::from(ZERO)) + offset;
    }
}

/// 16 bytes of (scale, minimum) nibbles, 64 of codes, d, dmin.
fn q2_k(block: &[u8], out: &mut [f32]) {
    let (scales, codes) = (&block[..16], &block[16..80]);
    let (d, minimum) = (half_at(block, 80), half_at(block, 82));
    for (group, values) in out.chunks_exact_mut(16).enumerate() {
        let (scale, offset) = (d * f32::from(scales[group] & 15), minimum * f32::from(scales[group] >> 4));
        let (bytes, shift) = strided(codes, group);
        for (value, byte) in values.iter_mut().zip(bytes) {
            *value = scale * f32::from(byte >> shift & 3) - offset;
        }
    }
}

/// 32 bytes of third bits, 64 of low bits, 12 of 6-bit scales, d.
fn q3_k(block: &[u8], out: &mut [f32]) {
    let (top, codes, packed) = (&block[..32], &block[32..96], &block[96..108]);
    let d = half_at(block, 108);
    for (group, values) in out.chunks_exact_mut(16).enumerate() {
        let low = if group < 8 { packed[group] & 15 } else { packed[group - 8] >> 4 };
        let high = packed[8 + group % 4] >> (2 * (group / 4)) & 3;
        let scale = d * (f32::from(low | high << 4) - 32.0);
        let (bytes, shift) = strided(codes, group);
        for ((value, byte), top) in values.iter_mut().zip(bytes).zip(&top[group % 2 * 16..]) {
            let code = byte >> shift & 3 | (top >> (group / 2) & 1) << 2;
            *value = scale * (f32::from(code) - 4.0);
        }
    }
}

/// Where the 2-bit codes of the `group`-th 16 weights lie: each 32 bytes hold four times 32 weights, two bits apart.
fn strided(codes: &[u8], group: usize) -> (&[u8], usize) {
    let start = group / 8 * 32 + group % 2 * 16;
    (&codes[start..start + 16], group % 8 / 2 * 2)
}

/// The `index`-th of eight pairs of a 6-bit scale and a 6-bit minimum in 12 bytes.
fn scale_and_minimum(packed: &[u8], index: usize) -> (f32, f32) {
    let (scale, minimum) = if index < 4 {
        (packed[index] & 63, packed[index + 4] & 63)
    } else {
        let low = packed[index + 4];
        (low & 15 | packed[index - 4] >> 6 << 4, low >> 4 | packed[index] >> 6 << 4)
    };
    (f32::from(scale), f32::from(minimum))
}

/// d, dmin, 12 bytes of scales and minima, 128 of codes.
fn q4_k(block: &[u8], out: &mut [f32]) {
    let codes = &block[16..];
    large_nibbles(block, codes, out, |_, _| 0);
}

/// d, dmin, 12 bytes of scales and minima, 32 of fifth bits, 128 of low bits.
fn q5_k(block: &[u8], out: &mut [f32]) {
    let (top, codes) = (&block[16..48], &block[48..]);
    large_nibbles(block, codes, out, |group, i| (top[i] >> group & 1) << 4);
}

/// Eight groups of 32; each 32 bytes hold one group in the low and the next in the high nibbles.
fn large_nibbles(block: &[u8], codes: &[u8], out: &mut [f32], top: impl Fn(usize, usize) -> u8) {
    let (d, minimum) = (half_at(block, 0), half_at(block, 2));
    for (group, values) in out.chunks_exact_mut(32).enumerate() {
        let (scale, offset) = scale_and_minimum(&block[4..16], group);
        let (scale, offset) = (d * scale, minimum * offset);
        let bytes = &codes[group / 2 * 32..];
        for (i, (value, byte)) in values.iter_mut().zip(bytes).enumerate() {
            let code = byte >> (group % 2 * 4) & 15 | top(group, i);
            *value = scale * f32::from(code) - offset;
        }
    }
}

/// 128 bytes of low nibbles, 64 of top bit pairs, 16 signed scales, d.
fn q6_k(block: &[u8], out: &mut [f32]) {
    let (low, top, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half_at(block, 208);
    for (group, values) in out.chunks_exact_mut(16).enumerate() {
        let scale = d * f32::from(scales[group] as i8);
        // Each half of 128 weights is four quarters of 32: the first two in low nibbles, the last two in high ones.
        let (part, quarter, start) = (group / 8, group % 8 / 2, group % 2 * 16);
        let low = &low[part * 64 + quarter % 2 * 32 + start..];
        let top = &top[part * 32 + start..];
        for ((value, low), top) in values.iter_mut().zip(low).zip(top) {
            let code = low >> (quarter / 2 * 4) & 15 | (top >> (2 * quarter) & 3) << 4;
            *value = scale * (f32::from(code) - 32.0);
        }
    }
}
