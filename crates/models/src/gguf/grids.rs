//! Types whose weights are vectors of a table, with a sign each, or digits of base three: read to dense values.
//!
//! Source: the Python package `gguf`, whose values these are bit for bit. The tables are `iq_grids.bin`, made by
//! `scripts/make-iq-grids.py`.

use half::f16;

use super::BlockType;

/// Weights in a block.
const WEIGHTS: usize = 256;

const TABLES: &[u8] = include_bytes!("iq_grids.bin");

/// A table of vectors within [`TABLES`].
#[derive(Clone, Copy)]
struct Grid {
    first: usize,
    width: usize,
}

const IQ2_XXS: Grid = Grid { first: 0, width: 8 };
const IQ2_XS: Grid = Grid { first: IQ2_XXS.first + 256 * 8, width: 8 };
const IQ2_S: Grid = Grid { first: IQ2_XS.first + 512 * 8, width: 8 };
const IQ3_XXS: Grid = Grid { first: IQ2_S.first + 1024 * 8, width: 4 };
const IQ3_S: Grid = Grid { first: IQ3_XXS.first + 256 * 4, width: 4 };
const IQ1: Grid = Grid { first: IQ3_S.first + 512 * 4, width: 8 };
const _: () = assert!(TABLES.len() == IQ1.first + 2048 * 8);

impl Grid {
    fn vector(self, index: usize) -> impl Iterator<Item = f32> {
        let numbers = &TABLES[self.first + index * self.width..][..self.width];
        numbers.iter().map(|number| f32::from(*number as i8))
    }
}

/// Decodes a block of one of these types.
pub(super) fn decode(kind: BlockType, block: &[u8], values: &mut [f32]) {
    debug_assert_eq!((block.len(), values.len()), (kind.bytes(), WEIGHTS));
    match kind {
        BlockType::Iq2Xxs => iq2_xxs(block, values),
        BlockType::Iq2Xs => iq2_xs(block, values),
        BlockType::Iq2S => iq2_s(block, values),
        BlockType::Iq3Xxs => iq3_xxs(block, values),
        BlockType::Iq3S => iq3_s(block, values),
        BlockType::Iq1S => iq1_s(block, values),
        BlockType::Iq1M => iq1_m(block, values),
        BlockType::Tq1_0 => tq1_0(block, values),
        _ => tq2_0(block, values),
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_bits(u16_at(bytes, at)).to_f32()
}

/// The lower, then the higher four bits of each byte.
fn nibble(bytes: &[u8], index: usize) -> f32 {
    f32::from(bytes[index / 2] >> (index % 2 * 4) & 15)
}

/// Eight signs of seven bits: the last makes their number even.
fn even(signs: u32) -> u8 {
    let signs = (signs & 127) as u8;
    signs | ((signs.count_ones() % 2) as u8) << 7
}

/// `scale` times numbers with their signs, a bit each.
fn signed(values: &mut [f32], scale: f32, numbers: impl Iterator<Item = f32>, signs: u8) {
    for (bit, (value, number)) in values.iter_mut().zip(numbers).enumerate() {
        let sign = if signs >> bit & 1 == 0 { 1.0 } else { -1.0 };
        *value = scale * number * sign;
    }
}

fn iq2_xxs(block: &[u8], values: &mut [f32]) {
    let d = half_at(block, 0);
    for (group, values) in values.chunks_exact_mut(32).enumerate() {
        let codes = &block[2 + 8 * group..][..8];
        let rest = u32_at(codes, 4);
        let scale = d * (0.5 + (rest >> 28) as f32) * 0.25;
        for (place, values) in values.chunks_exact_mut(8).enumerate() {
            let signs = even(rest >> (7 * place));
            signed(values, scale, IQ2_XXS.vector(codes[place].into()), signs);
        }
    }
}

fn iq2_xs(block: &[u8], values: &mut [f32]) {
    let (d, scales) = (half_at(block, 0), &block[66..]);
    for (place, values) in values.chunks_exact_mut(8).enumerate() {
        let code = u16_at(block, 2 + 2 * place);
        let scale = d * (0.5 + nibble(scales, place / 2)) * 0.25;
        signed(values, scale, IQ2_XS.vector(usize::from(code & 511)), even(u32::from(code >> 9)));
    }
}

fn iq2_s(block: &[u8], values: &mut [f32]) {
    let (d, codes, signs, high, scales) =
        (half_at(block, 0), &block[2..34], &block[34..66], &block[66..74], &block[74..]);
    for (place, values) in values.chunks_exact_mut(8).enumerate() {
        let high = usize::from(high[place / 4] >> (place % 4 * 2) & 3);
        let scale = d * (0.5 + nibble(scales, place / 2)) * 0.25;
        signed(values, scale, IQ2_S.vector(usize::from(codes[place]) | high << 8), signs[place]);
    }
}

fn iq3_xxs(block: &[u8], values: &mut [f32]) {
    let (d, codes) = (half_at(block, 0), &block[2..66]);
    for (group, values) in values.chunks_exact_mut(32).enumerate() {
        let rest = u32_at(block, 66 + 4 * group);
        let scale = d * (0.5 + (rest >> 28) as f32) * 0.5;
        for (place, values) in values.chunks_exact_mut(8).enumerate() {
            let pair = &codes[8 * group + 2 * place..][..2];
            let numbers = pair.iter().flat_map(|code| IQ3_XXS.vector(usize::from(*code)));
            signed(values, scale, numbers, even(rest >> (7 * place)));
        }
    }
}

fn iq3_s(block: &[u8], values: &mut [f32]) {
    let (d, codes, high, signs, scales) =
        (half_at(block, 0), &block[2..66], &block[66..74], &block[74..106], &block[106..]);
    for (place, values) in values.chunks_exact_mut(8).enumerate() {
        let scale = d * (1.0 + 2.0 * nibble(scales, place / 4));
        let numbers = (2 * place..2 * place + 2).flat_map(|index| {
            let high = usize::from(high[index / 8] >> (index % 8) & 1);
            IQ3_S.vector(usize::from(codes[index]) | high << 8)
        });
        signed(values, scale, numbers, signs[place]);
    }
}

/// What vectors of one bit a weight are moved by.
const DELTA: f32 = 0.125;

fn moved(values: &mut [f32], scale: f32, index: usize, down: bool) {
    let delta = if down { -DELTA } else { DELTA };
    for (value, number) in values.iter_mut().zip(IQ1.vector(index)) {
        *value = scale * (number + delta);
    }
}

fn iq1_s(block: &[u8], values: &mut [f32]) {
    let (d, codes) = (half_at(block, 0), &block[2..34]);
    for (place, values) in values.chunks_exact_mut(8).enumerate() {
        let rest = u16_at(block, 34 + place / 4 * 2);
        let scale = d * f32::from(2 * (rest >> 12 & 7) + 1);
        let high = usize::from(rest >> (place % 4 * 3) & 7);
        moved(values, scale, usize::from(codes[place]) | high << 8, rest & 0x8000 != 0);
    }
}

fn iq1_m(block: &[u8], values: &mut [f32]) {
    let (codes, high, scales) = (&block[..32], &block[32..48], &block[48..]);
    // The scale of all lies in the highest four bits of four numbers.
    let bits = (0..4).fold(0, |bits, number| bits | (u16_at(scales, 2 * number) >> 12) << (4 * number));
    let d = f16::from_bits(bits).to_f32();
    for (place, values) in values.chunks_exact_mut(8).enumerate() {
        let group = place / 2;
        let scale = u16_at(scales, group / 4 * 2) >> (group % 4 * 3) & 7;
        let high = high[group] >> (place % 2 * 4);
        let index = usize::from(codes[place]) | usize::from(high & 7) << 8;
        moved(values, d * f32::from(2 * scale + 1), index, high & 8 != 0);
    }
}

fn tq1_0(block: &[u8], values: &mut [f32]) {
    let d = half_at(block, 52);
    let mut values = values.iter_mut();
    // Five digits a byte, in runs of as many bytes; four in the last run.
    for (first, run, digits) in [(0, 32, 5), (32, 16, 5), (48, 4, 4)] {
        for power in [1u8, 3, 9, 27, 81].into_iter().take(digits) {
            for (byte, value) in block[first..first + run].iter().zip(&mut values) {
                let digit = (u16::from(byte.wrapping_mul(power)) * 3) >> 8;
                *value = d * (f32::from(digit) - 1.0);
            }
        }
    }
}

fn tq2_0(block: &[u8], values: &mut [f32]) {
    let d = half_at(block, 64);
    for (place, value) in values.iter_mut().enumerate() {
        let byte = block[place / 128 * 32 + place % 32];
        let digit = byte >> (place % 128 / 32 * 2) & 3;
        *value = d * (f32::from(digit) - 1.0);
    }
}
