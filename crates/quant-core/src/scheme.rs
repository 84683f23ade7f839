//! What a packed weight looks like: value type, block, type of the scales; and the strings that name it.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{Codebook, Error, packing::code_rows};

/// Where an affine grid puts its levels. All three read back as `scale * code + offset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Grid {
    /// A float offset: the block's minimum. Holds GGUF Q4_1, MLX and QA merges exactly.
    Float,
    /// An integer zero point (`offset = -scale * zero`), as GPTQ and most toolkits have.
    Integer,
    /// Centred: `offset = -scale * 2^(bits - 1)`, not stored.
    Symmetric,
}

/// How a code becomes a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Value {
    /// `scale * code + offset`.
    Affine {
        /// 2, 3, 4, 5, 6 or 8.
        bits: u32,
        /// Where the levels lie.
        grid: Grid,
    },
    /// `scale * level[code]`.
    Codebook(Codebook),
}

impl Value {
    /// Width of a code.
    pub const fn bits(self) -> u32 {
        match self {
            Self::Affine { bits, .. } => bits,
            Self::Codebook(codebook) => codebook.bits(),
        }
    }
}

/// The weights that share a scale: `outputs` × `inputs` of them; blocks at the border may be smaller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Block {
    /// Neighbouring outputs.
    pub outputs: usize,
    /// Neighbouring inputs; `None` is the whole column.
    pub inputs: Option<usize>,
}

impl Block {
    /// `inputs` neighbouring inputs of one output.
    pub const fn group(inputs: usize) -> Self {
        Self { outputs: 1, inputs: Some(inputs) }
    }

    /// Inputs of a block in a weight with `d_input` inputs.
    pub fn inputs_of(self, d_input: usize) -> usize {
        self.inputs.unwrap_or(d_input).max(1)
    }

    /// Shape of the scales: `[ceil(d_input / inputs), ceil(d_output / outputs)]`.
    pub fn grid_shape(self, d_input: usize, d_output: usize) -> [usize; 2] {
        [d_input.div_ceil(self.inputs_of(d_input)), d_output.div_ceil(self.outputs)]
    }
}

/// How scales and offsets are stored. Codes are always computed against the *stored* value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScaleType {
    /// 32-bit float.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
    /// 8-bit codes under one f32 per 256 scales and one f32 offset (QLoRA's double quantization).
    Double,
    /// Integers 0 to 15 under one f16 factor per 256 inputs, scales and offsets alike (GGUF's Q2_K).
    Super4,
    /// Integers -128 to 127 under one f16 factor per 256 inputs, scales and offsets alike (GGUF's other K types).
    Super8,
}

impl ScaleType {
    /// `value` as it reads back after storage ([`Self::Double`], [`Self::Super4`] and [`Self::Super8`] keep f32: they
    /// round many scales at once).
    pub fn round(self, value: f32) -> f32 {
        match self {
            Self::F32 | Self::Double | Self::Super4 | Self::Super8 => value,
            Self::F16 => half::f16::from_f32(value).to_f32(),
            Self::Bf16 => half::bf16::from_f32(value).to_f32(),
        }
    }

    /// Width of the integers that stand for scales and offsets; `None` where they are floats or double-quantized.
    pub const fn integer_bits(self) -> Option<u32> {
        match self {
            Self::Super4 => Some(4),
            Self::Super8 => Some(8),
            _ => None,
        }
    }
}

/// Scales that share one nested scale under [`ScaleType::Double`].
pub const DOUBLE_BLOCK: usize = 256;
/// Inputs whose scales share one factor under [`ScaleType::Super4`] and [`ScaleType::Super8`].
pub const SUPER_BLOCK: usize = 256;

/// Where the integers of [`ScaleType::Super4`] and [`ScaleType::Super8`] lie.
///
/// Integers of one output form a bit stream along the input axis, low bits first, in words `[word_rows, d_output]`; a
/// factor stands for `blocks` of them, in `[factor_rows, d_output]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SuperLayout {
    /// Width of an integer.
    pub bits: u32,
    /// Integers of one output.
    pub rows: usize,
    /// Outputs.
    pub columns: usize,
    /// Integers under one factor.
    pub blocks: usize,
}

impl SuperLayout {
    /// Words of one output.
    pub const fn word_rows(&self) -> usize {
        (self.rows * self.bits as usize).div_ceil(32)
    }

    /// Factors of one output.
    pub const fn factor_rows(&self) -> usize {
        self.rows.div_ceil(self.blocks)
    }

    /// Word row and shift of an integer.
    pub const fn place(&self, row: usize) -> (usize, u32) {
        let bit = row * self.bits as usize;
        (bit / 32, (bit % 32) as u32)
    }
}

/// A packed format, e.g. `affine4:64` or `nf4:64:double`.
///
/// | string | meaning |
/// | --- | --- |
/// | `affine4:64` | 4 bits, groups of 64 inputs, float offset |
/// | `affine4:64:int` | integer zero point |
/// | `affine4:64:sym` | symmetric, no offset stored |
/// | `affine5:32`, `affine6:32` | 5 and 6 bits; 2, 3, 4 and 8 likewise |
/// | `affine2:8x4` | tiles of 8 outputs × 4 inputs |
/// | `affine3:col` | one group per output |
/// | `nf4:64`, `nf3:64`, `nf2:64`, `fp4:64`, `iq4nl:32`, `mxfp4:32` | codebooks |
/// | `nf4:64:double` | double-quantized scales |
/// | `affine4:32:super8`, `affine2:16:super4` | scales and offsets as small integers under f16 factors of 256 inputs, as in GGUF's K types |
/// | suffix `:f32` (default), `:f16`, `:bf16` | type of scales and offsets |
///
/// ```
/// use kiln_quant_core::QuantScheme;
/// let scheme: QuantScheme = "affine4:64:int:f16".parse()?;
/// assert_eq!(scheme.to_string(), "affine4:64:int:f16");
/// assert_eq!(scheme.bits_per_weight(576, 1536), 4.0 + 2.0 * 16.0 / 64.0);
/// # Ok::<(), kiln_quant_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct QuantScheme {
    /// How a code becomes a number.
    pub value: Value,
    /// The weights that share a scale.
    pub block: Block,
    /// How scales and offsets are stored.
    pub scales: ScaleType,
}

impl QuantScheme {
    /// Affine codes with a float offset in groups of `inputs`, f32 scales.
    pub const fn affine(bits: u32, inputs: usize) -> Self {
        Self {
            value: Value::Affine { bits, grid: Grid::Float },
            block: Block::group(inputs),
            scales: ScaleType::F32,
        }
    }

    /// Codebook codes in groups of `inputs`, f32 scales.
    pub const fn codebook(codebook: Codebook, inputs: usize) -> Self {
        Self { value: Value::Codebook(codebook), block: Block::group(inputs), scales: ScaleType::F32 }
    }

    /// The same with another scale type.
    #[must_use]
    pub const fn with_scales(mut self, scales: ScaleType) -> Self {
        self.scales = scales;
        self
    }

    /// Width of a code.
    pub const fn bits(&self) -> u32 {
        self.value.bits()
    }

    /// Whether an offset is stored beside each scale.
    pub const fn has_offsets(&self) -> bool {
        matches!(self.value, Value::Affine { grid: Grid::Float | Grid::Integer, .. })
    }

    /// Shape of scales and offsets: `[ceil(d_input / inputs), ceil(d_output / outputs)]`.
    pub fn scale_shape(&self, d_input: usize, d_output: usize) -> [usize; 2] {
        self.block.grid_shape(d_input, d_output)
    }

    /// What can't be, of parts that each can.
    pub(crate) fn contradiction(&self) -> Option<&'static str> {
        let integers = self.scales.integer_bits().is_some();
        match self.value {
            Value::Affine { grid: Grid::Integer, .. } if integers => {
                Some("expected a float or no offset beside integer scales, found an integer zero point")
            }
            Value::Affine { .. } if self.scales == ScaleType::Double => {
                Some("double-quantized scales need a codebook")
            }
            _ if integers
                && (self.block.outputs != 1
                    || self.block.inputs.is_none_or(|inputs| !SUPER_BLOCK.is_multiple_of(inputs))) =>
            {
                Some("expected groups of inputs that divide 256 beside integer scales")
            }
            _ => None,
        }
    }

    /// Where scales and offsets lie as integers; `None` where they are floats or double-quantized.
    pub fn super_layout(&self, d_input: usize, d_output: usize) -> Option<SuperLayout> {
        let [rows, columns] = self.scale_shape(d_input, d_output);
        let blocks = (SUPER_BLOCK / self.block.inputs_of(d_input)).max(1);
        self.scales.integer_bits().map(|bits| SuperLayout { bits, rows, columns, blocks })
    }

    /// Bytes of codes, scales and offsets as stored, padding of the last run included.
    pub fn storage_bytes(&self, d_input: usize, d_output: usize) -> usize {
        let [rows, columns] = self.scale_shape(d_input, d_output);
        let count = rows * columns;
        let scales = match (self.super_layout(d_input, d_output), self.scales) {
            (Some(layout), _) => columns * (4 * layout.word_rows() + 2 * layout.factor_rows()),
            (None, ScaleType::F16 | ScaleType::Bf16) => 2 * count,
            (None, ScaleType::Double) => count + 4 * count.div_ceil(DOUBLE_BLOCK) + 4,
            (None, _) => 4 * count,
        };
        let offsets = if self.has_offsets() { scales } else { 0 };
        4 * code_rows(d_input, self.bits()) * d_output + scales + offsets
    }

    /// [`Self::storage_bytes`] in bits per weight.
    pub fn bits_per_weight(&self, d_input: usize, d_output: usize) -> f64 {
        8.0 * self.storage_bytes(d_input, d_output) as f64 / (d_input * d_output) as f64
    }
}

impl fmt::Display for QuantScheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.value {
            Value::Affine { bits, .. } => write!(f, "affine{bits}:")?,
            Value::Codebook(codebook) => write!(f, "{}:", codebook.name())?,
        }
        if self.block.outputs != 1 {
            write!(f, "{}x", self.block.outputs)?;
        }
        match self.block.inputs {
            Some(inputs) => write!(f, "{inputs}")?,
            None => f.write_str("col")?,
        }
        f.write_str(match self.value {
            Value::Affine { grid: Grid::Integer, .. } => ":int",
            Value::Affine { grid: Grid::Symmetric, .. } => ":sym",
            _ => "",
        })?;
        f.write_str(match self.scales {
            ScaleType::F32 => "",
            ScaleType::F16 => ":f16",
            ScaleType::Bf16 => ":bf16",
            ScaleType::Double => ":double",
            ScaleType::Super4 => ":super4",
            ScaleType::Super8 => ":super8",
        })
    }
}

impl FromStr for QuantScheme {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let fail = |reason: String| Error::Scheme { text: text.into(), reason };
        let mut parts = text.split(':');
        let name = parts.next().unwrap_or_default();
        let mut value = match name {
            "nf2" => Value::Codebook(Codebook::Nf2),
            "nf3" => Value::Codebook(Codebook::Nf3),
            "nf4" => Value::Codebook(Codebook::Nf4),
            "fp4" => Value::Codebook(Codebook::Fp4),
            "iq4nl" => Value::Codebook(Codebook::Iq4Nl),
            "mxfp4" => Value::Codebook(Codebook::Mxfp4),
            "affine2" | "affine3" | "affine4" | "affine5" | "affine6" | "affine8" => {
                Value::Affine { bits: u32::from(name.as_bytes()[6] - b'0'), grid: Grid::Float }
            }
            _ => {
                return Err(fail(format!(
                    "expected dense, affine2, affine3, affine4, affine5, affine6, affine8, nf2, nf3, nf4, fp4, iq4nl or \
                     mxfp4, found \"{name}\""
                )));
            }
        };
        let block = parts.next().ok_or_else(|| fail("expected a group size after a colon".into()))?;
        let (outputs, inputs) = block.split_once('x').unwrap_or(("1", block));
        let size = |text: &str| match text.parse::<usize>() {
            Ok(size) if size > 0 => Ok(size),
            _ => Err(fail(format!("expected a group size such as 64, 8x4 or col, found \"{block}\""))),
        };
        let block = Block {
            outputs: size(outputs)?,
            inputs: if inputs == "col" { None } else { Some(size(inputs)?) },
        };
        let (mut scales, mut grid) = (None, None);
        for part in parts {
            let seen = match (part, value) {
                ("f32", _) => scales.replace(ScaleType::F32).is_some(),
                ("f16", _) => scales.replace(ScaleType::F16).is_some(),
                ("bf16", _) => scales.replace(ScaleType::Bf16).is_some(),
                ("double", Value::Codebook(_)) => scales.replace(ScaleType::Double).is_some(),
                ("super4", _) => scales.replace(ScaleType::Super4).is_some(),
                ("super8", _) => scales.replace(ScaleType::Super8).is_some(),
                ("int", Value::Affine { .. }) => grid.replace(Grid::Integer).is_some(),
                ("sym", Value::Affine { .. }) => grid.replace(Grid::Symmetric).is_some(),
                _ => return Err(fail(format!("\"{part}\" is not an option of {name}"))),
            };
            if seen {
                return Err(fail(format!("\"{part}\" contradicts or repeats an earlier option")));
            }
        }
        if let (Value::Affine { grid: slot, .. }, Some(grid)) = (&mut value, grid) {
            *slot = grid;
        }
        let scheme = Self { value, block, scales: scales.unwrap_or(ScaleType::F32) };
        match scheme.contradiction() {
            Some(reason) => Err(fail(reason.into())),
            None => Ok(scheme),
        }
    }
}

/// How the weight of one projection is stored: the value of a `Plan` of bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// As dense floats; the string `dense`.
    Dense,
    /// Packed.
    Packed(QuantScheme),
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dense => f.write_str("dense"),
            Self::Packed(scheme) => scheme.fmt(f),
        }
    }
}

impl FromStr for Scheme {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        if text == "dense" { Ok(Self::Dense) } else { text.parse().map(Self::Packed) }
    }
}

/// Serde through the scheme string.
macro_rules! serde_as_string {
    ($type:ty) => {
        impl Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}
serde_as_string!(QuantScheme);
serde_as_string!(Scheme);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_scheme_string_of_the_table_round_trips() {
        for text in [
            "affine4:64",
            "affine4:64:int",
            "affine4:64:sym",
            "nf4:64",
            "nf4:64:double",
            "nf2:64",
            "nf3:32",
            "fp4:64",
            "affine2:8x4",
            "affine3:col",
            "affine8:16xcol:sym:bf16",
            "affine4:64:int:f16",
            "affine5:32:super8",
            "affine6:16:sym:super8",
            "affine2:16:super4",
            "iq4nl:32:super8",
            "mxfp4:32:bf16",
        ] {
            assert_eq!(text.parse::<QuantScheme>().unwrap().to_string(), text);
        }
        assert_eq!("affine4:64:f32".parse::<Scheme>().unwrap().to_string(), "affine4:64");
        assert_eq!("dense".parse::<Scheme>().unwrap(), Scheme::Dense);
    }

    #[test]
    fn bad_scheme_strings_are_errors_that_name_the_part() {
        for (text, part) in [
            ("affine7:64", "affine7"),
            ("affine4:32:int:super8", "integer zero point"),
            ("affine4:48:super8", "divide 256"),
            ("affine4:4x32:super8", "divide 256"),
            ("affine4:col:super4", "divide 256"),
            ("affine4", "group size"),
            ("affine4:0", "\"0\""),
            ("affine4:64x", "\"64x\""),
            ("affine4:-1", "\"-1\""),
            ("nf4:64:sym", "\"sym\""),
            ("affine4:64:double", "\"double\""),
            ("affine4:64:f16:bf16", "\"bf16\""),
            ("affine4:64:int:sym", "\"sym\""),
            ("", "expected dense"),
        ] {
            let message = text.parse::<Scheme>().unwrap_err().to_string();
            assert!(message.contains(part), "{text}: {message}");
        }
    }

    #[test]
    fn bits_per_weight_count_every_stored_byte() {
        let bits = |text: &str, i, o| text.parse::<QuantScheme>().unwrap().bits_per_weight(i, o);
        assert_eq!(bits("affine4:64", 128, 8), 5.0);
        assert_eq!(bits("affine4:64:sym:f16", 128, 8), 4.25);
        assert_eq!(bits("nf4:64:double", 64, 256), 4.0 + (8.0 * 256.0 + 64.0) / (64.0 * 256.0));
        // 33 inputs need two runs of 32 and two groups.
        assert_eq!(bits("affine3:32:f16", 33, 1), (2.0 * 96.0 + 4.0 * 16.0) / 33.0);
        assert_eq!(bits("affine2:8x4:bf16", 32, 8), 2.0 + 2.0 * 16.0 / 32.0);
        // GGUF's Q2_K to Q6_K have 2.625, 3.4375, 4.5, 5.5 and 6.5625; 6-bit integers take 8 bits here.
        assert_eq!(bits("affine2:16:super4", 512, 8), 2.625);
        assert_eq!(bits("affine3:16:sym:super8", 512, 8), 3.5625);
        assert_eq!(bits("affine4:32:super8", 512, 8), 4.625);
        assert_eq!(bits("affine5:32:super8", 512, 8), 5.625);
        assert_eq!(bits("affine6:16:sym:super8", 512, 8), 6.5625);
    }
}
