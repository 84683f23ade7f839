//! The block types of GGUF: how many weights a block holds, in how many bytes, and how they read back.
//!
//! All blocks run along the innermost axis. `d` and `m` below are the block's f16 scale and offset, `q` a code, `s` and `o`
//! the small integers of a group. Layouts are those of the format's reference implementation (ggml), each written down
//! once, as a table of bit fields that blocks are taken apart and put together by.

use half::{bf16, f16};
use kiln_quant_core::{Block, Codebook, Grid, QuantScheme, ScaleType, Value};

use super::grids;
use crate::source::power_of_two;

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
    /// 256 × 2 bits in groups of 16 under 4-bit scales and minima, `d s q - m o`.
    Q2K,
    /// 256 × 3 bits in groups of 16 under 6-bit scales, `d s (q - 4)`.
    Q3K,
    /// 256 × 4 bits in groups of 32 under 6-bit scales and minima, `d s q - m o`.
    Q4K,
    /// 256 × 5 bits in groups of 32 under 6-bit scales and minima, `d s q - m o`.
    Q5K,
    /// 256 × 6 bits in groups of 16 under 8-bit scales, `d s (q - 32)`.
    Q6K,
    /// 32 × 4 bits, `d level[q]`.
    Iq4Nl,
    /// 256 × 4 bits in groups of 32 under 6-bit scales, `d s level[q]`.
    Iq4Xs,
    /// 32 × 4-bit floats under a power of two.
    Mxfp4,
    /// Vectors of eight of a table of 256, with signs, under 4-bit scales of 32.
    Iq2Xxs,
    /// Vectors of eight of 512, under scales of 16.
    Iq2Xs,
    /// Vectors of eight of 1024.
    Iq2S,
    /// Vectors of four of 256.
    Iq3Xxs,
    /// Vectors of four of 512.
    Iq3S,
    /// Vectors of eight of 2048, moved, under 3-bit scales of 32.
    Iq1S,
    /// The same under scales of 16.
    Iq1M,
    /// -1, 0 and 1 in base three.
    Tq1_0,
    /// -1, 0 and 1 in two bits.
    Tq2_0,
}

/// Weights in a block of the simple types.
const SMALL: usize = 32;
/// Weights in a block of the K types.
const LARGE: usize = 256;

/// A [`Field`]: a literal, so that tables of them are constants.
macro_rules! field {
    ($at:expr, $width:expr, $up:expr, $place:ident) => {
        Field { at: $at, width: $width, up: $up, place: $place }
    };
}

impl BlockType {
    const ALL: [Self; 25] = [
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
        Self::Iq4Nl,
        Self::Iq4Xs,
        Self::Mxfp4,
        Self::Iq2Xxs,
        Self::Iq2Xs,
        Self::Iq2S,
        Self::Iq3Xxs,
        Self::Iq3S,
        Self::Iq1S,
        Self::Iq1M,
        Self::Tq1_0,
        Self::Tq2_0,
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
            Self::Iq4Nl => (20, "IQ4_NL", SMALL, 18),
            Self::Iq4Xs => (23, "IQ4_XS", LARGE, 136),
            Self::Mxfp4 => (39, "MXFP4", SMALL, 17),
            Self::Iq2Xxs => (16, "IQ2_XXS", LARGE, 66),
            Self::Iq2Xs => (17, "IQ2_XS", LARGE, 74),
            Self::Iq2S => (22, "IQ2_S", LARGE, 82),
            Self::Iq3Xxs => (18, "IQ3_XXS", LARGE, 98),
            Self::Iq3S => (21, "IQ3_S", LARGE, 110),
            Self::Iq1S => (19, "IQ1_S", LARGE, 50),
            Self::Iq1M => (29, "IQ1_M", LARGE, 56),
            Self::Tq1_0 => (34, "TQ1_0", LARGE, 54),
            Self::Tq2_0 => (35, "TQ2_0", LARGE, 66),
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

    /// The packed format that holds this type exactly, code by code; `None` for float types, and for those that are read to
    /// dense values.
    pub fn packed_scheme(self) -> Option<QuantScheme> {
        let affine = |bits: u32, grid: Grid| Value::Affine { bits, grid };
        let (value, inputs, scales) = match self {
            Self::F32 | Self::F16 | Self::Bf16 => return None,
            Self::Iq2Xxs
            | Self::Iq2Xs
            | Self::Iq2S
            | Self::Iq3Xxs
            | Self::Iq3S
            | Self::Iq1S
            | Self::Iq1M
            | Self::Tq1_0
            | Self::Tq2_0 => return None,
            Self::Q4_0 => (affine(4, Grid::Symmetric), SMALL, ScaleType::F16),
            Self::Q4_1 => (affine(4, Grid::Float), SMALL, ScaleType::F16),
            Self::Q5_0 => (affine(5, Grid::Symmetric), SMALL, ScaleType::F16),
            Self::Q5_1 => (affine(5, Grid::Float), SMALL, ScaleType::F16),
            Self::Q8_0 => (affine(8, Grid::Symmetric), SMALL, ScaleType::F16),
            Self::Q2K => (affine(2, Grid::Float), 16, ScaleType::Super4),
            Self::Q3K => (affine(3, Grid::Symmetric), 16, ScaleType::Super8),
            Self::Q4K => (affine(4, Grid::Float), 32, ScaleType::Super8),
            Self::Q5K => (affine(5, Grid::Float), 32, ScaleType::Super8),
            Self::Q6K => (affine(6, Grid::Symmetric), 16, ScaleType::Super8),
            Self::Iq4Nl => (Value::Codebook(Codebook::Iq4Nl), SMALL, ScaleType::F16),
            Self::Iq4Xs => (Value::Codebook(Codebook::Iq4Nl), 32, ScaleType::Super8),
            Self::Mxfp4 => (Value::Codebook(Codebook::Mxfp4), SMALL, ScaleType::Bf16),
        };
        Some(QuantScheme { value, block: Block::group(inputs), scales })
    }

    /// Whether weights are vectors of a table or the like, and read to dense values.
    pub(super) fn is_of_table(self) -> bool {
        self.weights() > 1 && self.packed_scheme().is_none()
    }

    /// The type whose packed format this is.
    pub(crate) fn of_scheme(scheme: &QuantScheme) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.packed_scheme().as_ref() == Some(scheme))
    }

    /// Where the parts of a block lie.
    const fn fields(self) -> Fields {
        const NONE: Fields =
            Fields { scale: 0, offset: None, codes: &[], scales: &[], offsets: &[], bias: 0, turned: 0 };
        const SCALES_OF_12: &[Field] = &[field!(4, 4, 0, scale_low), field!(4, 2, 4, scale_high)];
        const MINIMA_OF_12: &[Field] = &[field!(4, 4, 0, minimum_low), field!(4, 2, 4, minimum_high)];
        match self {
            Self::Q4_0 | Self::Iq4Nl => Fields { codes: &[field!(2, 4, 0, nibbles)], ..NONE },
            Self::Q4_1 => Fields { offset: Some(2), codes: &[field!(4, 4, 0, nibbles)], ..NONE },
            Self::Q5_0 => Fields { codes: &[field!(6, 4, 0, nibbles), field!(2, 1, 4, bits)], ..NONE },
            Self::Q5_1 => {
                Fields { offset: Some(2), codes: &[field!(8, 4, 0, nibbles), field!(4, 1, 4, bits)], ..NONE }
            }
            // A signed byte plus 128 is the byte with its top bit turned.
            Self::Q8_0 => Fields { codes: &[field!(2, 8, 0, bytes)], turned: 0x80, ..NONE },
            Self::Q2K => Fields {
                scale: 80,
                offset: Some(82),
                codes: &[field!(16, 2, 0, pairs)],
                scales: &[field!(0, 4, 0, bytes)],
                offsets: &[field!(0, 4, 0, high_nibbles)],
                ..NONE
            },
            Self::Q3K => Fields {
                scale: 108,
                codes: &[field!(32, 2, 0, pairs), field!(0, 1, 2, top_bits)],
                scales: &[field!(96, 4, 0, eight_nibbles), field!(104, 2, 4, quarters)],
                bias: 32,
                ..NONE
            },
            Self::Q4K => Fields {
                offset: Some(2),
                codes: &[field!(16, 4, 0, wide_nibbles)],
                scales: SCALES_OF_12,
                offsets: MINIMA_OF_12,
                ..NONE
            },
            Self::Q5K => Fields {
                offset: Some(2),
                codes: &[field!(48, 4, 0, wide_nibbles), field!(16, 1, 4, top_bits)],
                scales: SCALES_OF_12,
                offsets: MINIMA_OF_12,
                ..NONE
            },
            Self::Q6K => Fields {
                scale: 208,
                codes: &[field!(0, 4, 0, quarter_nibbles), field!(128, 2, 4, pairs)],
                scales: &[field!(192, 8, 0, bytes)],
                ..NONE
            },
            Self::Iq4Xs => Fields {
                codes: &[field!(8, 4, 0, grouped_nibbles)],
                scales: &[field!(4, 4, 0, alternating), field!(2, 2, 4, fours)],
                bias: 32,
                ..NONE
            },
            Self::Mxfp4 => Fields { codes: &[field!(1, 4, 0, nibbles)], ..NONE },
            // Types without a packed scheme.
            _ => NONE,
        }
    }
}

/// Some bits of each of many numbers.
struct Field {
    /// Byte of the block where the field begins.
    at: usize,
    /// Bits of each number in this field.
    width: u32,
    /// Lowest of them in the number.
    up: u32,
    /// Byte of the field and shift within it, of each number.
    place: fn(usize) -> (usize, u32),
}

/// Where the parts of a block lie; `scale` and `offset` are those of `d` and `m`.
struct Fields {
    scale: usize,
    offset: Option<usize>,
    codes: &'static [Field],
    scales: &'static [Field],
    offsets: &'static [Field],
    /// Taken off the integers of scales.
    bias: u8,
    /// Bits of codes that are stored turned.
    turned: u8,
}

/// Number `i` is byte `i`.
fn bytes(i: usize) -> (usize, u32) {
    (i, 0)
}
/// The upper half of byte `i`.
fn high_nibbles(i: usize) -> (usize, u32) {
    (i, 4)
}
/// Bit `i`.
fn bits(i: usize) -> (usize, u32) {
    (i / 8, (i % 8) as u32)
}
/// 16 bytes: low nibbles are the first 16 numbers, high ones the last.
fn nibbles(i: usize) -> (usize, u32) {
    (i % 16, (i / 16 * 4) as u32)
}
/// Each 16 bytes as [`nibbles`].
fn grouped_nibbles(i: usize) -> (usize, u32) {
    (i / 32 * 16 + i % 16, (i % 32 / 16 * 4) as u32)
}
/// Each 32 bytes hold 32 numbers in the low and the next 32 in the high nibbles.
fn wide_nibbles(i: usize) -> (usize, u32) {
    (i / 64 * 32 + i % 32, (i % 64 / 32 * 4) as u32)
}
/// Each 32 bytes hold four times 32 numbers, two bits apart.
fn pairs(i: usize) -> (usize, u32) {
    (i / 128 * 32 + i % 32, (i % 128 / 32 * 2) as u32)
}
/// 32 bytes, in each the top bits of eight numbers 32 apart.
fn top_bits(i: usize) -> (usize, u32) {
    (i % 32, (i / 32) as u32)
}
/// Each half of 128 numbers is four quarters of 32: the first two in low nibbles, the last two in high ones.
fn quarter_nibbles(i: usize) -> (usize, u32) {
    (i / 128 * 64 + i % 64, (i % 128 / 64 * 4) as u32)
}
/// Eight bytes: low nibbles are the first eight numbers, high ones the last.
fn eight_nibbles(i: usize) -> (usize, u32) {
    (i % 8, (i / 8 * 4) as u32)
}
/// Four bytes, in each two bits of four numbers four apart.
fn quarters(i: usize) -> (usize, u32) {
    (i % 4, (i / 4 * 2) as u32)
}
/// Nibbles in turn.
fn alternating(i: usize) -> (usize, u32) {
    (i / 2, (i % 2 * 4) as u32)
}
/// Pairs of bits in turn.
fn fours(i: usize) -> (usize, u32) {
    (i / 4, (i % 4 * 2) as u32)
}
/// Eight 6-bit scales and eight 6-bit minima in twelve bytes: the first four of each in a byte of its own, whose two upper
/// bits are the upper bits of the others; these share four bytes.
fn scale_low(i: usize) -> (usize, u32) {
    if i < 4 { (i, 0) } else { (i + 4, 0) }
}
fn scale_high(i: usize) -> (usize, u32) {
    if i < 4 { (i, 4) } else { (i - 4, 6) }
}
fn minimum_low(i: usize) -> (usize, u32) {
    if i < 4 { (i + 4, 0) } else { (i + 4, 4) }
}
fn minimum_high(i: usize) -> (usize, u32) {
    if i < 4 { (i + 4, 4) } else { (i, 6) }
}

/// A block taken apart. The value of a weight is `(scale * scales[group]) * level + offset * offsets[group]`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Parts {
    /// A code for each weight.
    pub codes: Vec<u8>,
    /// An integer for each group; 1 for the types that have no integers.
    pub scales: Vec<i8>,
    /// Likewise.
    pub offsets: Vec<i8>,
    /// `d`.
    pub scale: f32,
    /// `m`, negative where the type takes it off; 0 for types without offsets.
    pub offset: f32,
}

/// Takes blocks of one type apart and puts them together.
pub(crate) struct Blocks {
    kind: BlockType,
    scheme: QuantScheme,
    fields: Fields,
    /// For each field of the codes, the place of each.
    codes: Vec<Vec<(usize, u32)>>,
}

impl Blocks {
    /// `None` for float types.
    pub(crate) fn new(kind: BlockType) -> Option<Self> {
        let (scheme, fields) = (kind.packed_scheme()?, kind.fields());
        let places = |field: &Field| {
            let place = |i: usize| {
                let (byte, shift) = (field.place)(i);
                (field.at + byte, shift)
            };
            (0..kind.weights()).map(place).collect()
        };
        let codes = fields.codes.iter().map(places).collect();
        Some(Self { kind, scheme, fields, codes })
    }

    /// Weights that share a scale.
    fn group(&self) -> usize {
        self.scheme.block.inputs_of(self.kind.weights())
    }

    fn groups(&self) -> usize {
        self.kind.weights() / self.group()
    }

    /// Parts with room for this type's numbers.
    pub(crate) fn parts(&self) -> Parts {
        let (scales, offsets) = (vec![1; self.groups()], vec![1; self.groups()]);
        Parts { codes: vec![0; self.kind.weights()], scales, offsets, scale: 0.0, offset: 0.0 }
    }

    /// Reads a block.
    pub(crate) fn take_apart(&self, block: &[u8], parts: &mut Parts) {
        parts.codes.fill(0);
        for (field, places) in self.fields.codes.iter().zip(&self.codes) {
            let mask = ((1u32 << field.width) - 1) as u8;
            for (code, &(byte, shift)) in parts.codes.iter_mut().zip(places) {
                *code |= (block[byte] >> shift & mask) << field.up;
            }
        }
        parts.codes.iter_mut().for_each(|code| *code ^= self.fields.turned);
        let integers = |fields: &[Field], into: &mut [i8], bias: u8| {
            if fields.is_empty() {
                return;
            }
            for (i, into) in into.iter_mut().enumerate() {
                let bits = |field: &Field| {
                    let (byte, shift) = (field.place)(i);
                    (block[field.at + byte] >> shift & ((1u32 << field.width) - 1) as u8) << field.up
                };
                *into = fields.iter().fold(0, |number, field| number | bits(field)).wrapping_sub(bias) as i8;
            }
        };
        integers(self.fields.scales, &mut parts.scales, self.fields.bias);
        integers(self.fields.offsets, &mut parts.offsets, 0);
        parts.scale = match self.kind {
            // A power of two, whose exponent is one byte.
            BlockType::Mxfp4 => power_of_two(block[0]),
            _ => half_at(block, self.fields.scale),
        };
        let offset = self.fields.offset.map_or(0.0, |at| half_at(block, at));
        parts.offset = if self.takes_off() { -offset } else { offset };
    }

    /// Whether `m` is taken off.
    fn takes_off(&self) -> bool {
        !self.fields.offsets.is_empty()
    }

    /// Writes a block: the inverse of [`take_apart`](Self::take_apart). `None` if the type can't hold the parts.
    pub(crate) fn put_together(&self, parts: &Parts, block: &mut [u8]) -> Option<()> {
        block.fill(0);
        for (field, places) in self.fields.codes.iter().zip(&self.codes) {
            let mask = ((1u32 << field.width) - 1) as u8;
            for (&code, &(byte, shift)) in parts.codes.iter().zip(places) {
                block[byte] |= ((code ^ self.fields.turned) >> field.up & mask) << shift;
            }
        }
        let mut integers = |fields: &[Field], from: &[i8], bias: u8| {
            let width: u32 = fields.iter().map(|field| field.width).sum();
            for (i, &integer) in from.iter().enumerate() {
                let number = (integer as u8).wrapping_add(bias);
                match fields.is_empty() {
                    true if integer != 1 => return None,
                    false if u32::from(number) >> width != 0 => return None,
                    _ => {}
                }
                for field in fields {
                    let (byte, shift) = (field.place)(i);
                    block[field.at + byte] |=
                        (number >> field.up & ((1u32 << field.width) - 1) as u8) << shift;
                }
            }
            Some(())
        };
        integers(self.fields.scales, &parts.scales, self.fields.bias)?;
        integers(self.fields.offsets, &parts.offsets, 0)?;
        match self.kind {
            BlockType::Mxfp4 => block[0] = (0..=u8::MAX).find(|byte| power_of_two(*byte) == parts.scale)?,
            _ => put_half(block, self.fields.scale, parts.scale)?,
        }
        match self.fields.offset {
            Some(at) => put_half(block, at, if self.takes_off() { -parts.offset } else { parts.offset }),
            None => Some(()),
        }
    }

    /// The values of a block.
    pub(crate) fn decode(&self, parts: &Parts, values: &mut [f32]) {
        let groups = parts.codes.chunks(self.group()).zip(values.chunks_mut(self.group()));
        let integers = parts.scales.iter().zip(&parts.offsets);
        for ((codes, values), (scale, offset)) in groups.zip(integers) {
            let (scale, offset) = (parts.scale * f32::from(*scale), parts.offset * f32::from(*offset));
            for (value, &code) in values.iter_mut().zip(codes) {
                *value = match self.scheme.value {
                    Value::Codebook(codebook) => scale * codebook.levels()[usize::from(code)],
                    Value::Affine { bits, grid: Grid::Symmetric } => {
                        scale * (f32::from(code) - f32::from(1u8 << (bits - 1)))
                    }
                    Value::Affine { .. } => scale * f32::from(code) + offset,
                };
            }
        }
    }
}

impl BlockType {
    /// Decodes whole blocks.
    pub(super) fn decode(self, bytes: &[u8], values: &mut [f32]) {
        let floats: fn(&[u8]) -> f32 = match self {
            Self::F32 => |block| f32::from_le_bytes([block[0], block[1], block[2], block[3]]),
            Self::F16 => |block| half_at(block, 0),
            _ => |block| bf16::from_le_bytes([block[0], block[1]]).to_f32(),
        };
        let blocks = bytes.chunks_exact(self.bytes());
        if self.is_of_table() {
            let values = values.chunks_exact_mut(self.weights());
            return blocks.zip(values).for_each(|(block, values)| grids::decode(self, block, values));
        }
        let Some(parser) = Blocks::new(self) else {
            return values.iter_mut().zip(blocks).for_each(|(value, block)| *value = floats(block));
        };
        let mut parts = parser.parts();
        for (block, values) in blocks.zip(values.chunks_exact_mut(self.weights())) {
            parser.take_apart(block, &mut parts);
            parser.decode(&parts, values);
        }
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// `None` for a value that f16 would round.
fn put_half(block: &mut [u8], at: usize, value: f32) -> Option<()> {
    let half = f16::from_f32(value);
    block[at..at + 2].copy_from_slice(&half.to_le_bytes());
    (half.to_f32() == value).then_some(())
}
