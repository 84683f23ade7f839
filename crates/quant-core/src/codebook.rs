//! Fixed tables of levels: NF4, NF3, NF2 (QLoRA, LoftQ) and FP4 (bitsandbytes).

use serde::{Deserialize, Serialize};

/// A table of `2^bits` levels in -1..=1; a weight is `scale * level[code]` with the block's absolute maximum as scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Codebook {
    /// Four levels of a normal distribution. Source: LoftQ's construction (QLoRA, appendix E) at 2 bits.
    Nf2,
    /// Eight levels of a normal distribution.
    Nf3,
    /// Sixteen levels of a normal distribution: bitsandbytes' table bit for bit.
    Nf4,
    /// Sixteen levels of a 4-bit float (sign, 2 exponent bits, 1 mantissa bit), in bitsandbytes' code order.
    Fp4,
}

impl Codebook {
    /// Width of a code.
    pub const fn bits(self) -> u32 {
        match self {
            Self::Nf2 => 2,
            Self::Nf3 => 3,
            Self::Nf4 | Self::Fp4 => 4,
        }
    }

    /// The levels, indexed by code.
    pub const fn levels(self) -> &'static [f32] {
        match self {
            Self::Nf2 => &NF2,
            Self::Nf3 => &NF3,
            Self::Nf4 => &NF4,
            Self::Fp4 => &FP4,
        }
    }

    /// The name used in scheme strings and in bitsandbytes' `quant_type`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nf2 => "nf2",
            Self::Nf3 => "nf3",
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
        }
    }

    /// The table stretched to 16 entries: entry `i` is the level of `i mod 2^bits`, so that a lookup may leave
    /// higher bits of its index unmasked.
    pub fn table16(self) -> [f32; 16] {
        let levels = self.levels();
        std::array::from_fn(|i| levels[i % levels.len()])
    }
}

const NF2: [f32; 4] = [-1.0, 0.0, 0.337_915_24, 1.0];
const NF3: [f32; 8] = [-1.0, -0.478_629_2, -0.217_141_79, 0.0, 0.160_930_2, 0.337_915_24, 0.562_617, 1.0];
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];
// Magnitudes of bitsandbytes' table: 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4.
const FP4: [f32; 16] = [
    0.0,
    0.005_208_333_3,
    0.666_666_7,
    1.0,
    0.333_333_34,
    0.5,
    0.166_666_67,
    0.25,
    0.0,
    -0.005_208_333_3,
    -0.666_666_7,
    -1.0,
    -0.333_333_34,
    -0.5,
    -0.166_666_67,
    -0.25,
];
