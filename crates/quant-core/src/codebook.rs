//! Fixed tables of levels: NF4, NF3, NF2 (QLoRA, LoftQ), FP4 (bitsandbytes), IQ4_NL (GGUF) and MXFP4 (OCP).

use serde::{Deserialize, Serialize};

/// A table of `2^bits` levels; a weight is `scale * level[code]`. Levels lie in -1..=1, with the block's absolute maximum as
/// scale, but for the last two, whose levels are those of their formats.
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
    /// Sixteen integers from -127 to 113, denser around 0: GGUF's IQ4_NL and IQ4_XS.
    Iq4Nl,
    /// Sixteen levels of a 4-bit float up to 6 (sign, 2 exponent bits, 1 mantissa bit), in the code order of the Open
    /// Compute Project's Microscaling formats (OCP MX 1.0, E2M1).
    Mxfp4,
}

impl Codebook {
    /// Width of a code.
    pub const fn bits(self) -> u32 {
        match self {
            Self::Nf2 => 2,
            Self::Nf3 => 3,
            Self::Nf4 | Self::Fp4 | Self::Iq4Nl | Self::Mxfp4 => 4,
        }
    }

    /// The levels, indexed by code.
    pub const fn levels(self) -> &'static [f32] {
        match self {
            Self::Nf2 => &NF2,
            Self::Nf3 => &NF3,
            Self::Nf4 => &NF4,
            Self::Fp4 => &FP4,
            Self::Iq4Nl => &IQ4_NL,
            Self::Mxfp4 => &MXFP4,
        }
    }

    /// What a block's absolute maximum is divided by for its scale, so that nothing is cut off on either side.
    pub(crate) const fn reach(self) -> f32 {
        match self {
            Self::Iq4Nl => 113.0,
            Self::Mxfp4 => 6.0,
            _ => 1.0,
        }
    }

    /// The name used in scheme strings and in bitsandbytes' `quant_type`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nf2 => "nf2",
            Self::Nf3 => "nf3",
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
            Self::Iq4Nl => "iq4nl",
            Self::Mxfp4 => "mxfp4",
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
const IQ4_NL: [f32; 16] = [
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
];
const MXFP4: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];
