//! HQQ's weights (half-quadratic quantization), as its `HQQLinear` and transformers save them.
//!
//! The weight of a linear `P`, `[out, in]` row by row, is cut into rows of one group each (`axis` 1), or into columns of one group
//! each (`axis` 0). `P.W_q` holds the codes: the first part of the rows in the highest bits of its numbers, the next part below
//! them, and so on. `P.scale` and `P.zero` have a number for each group; a weight is `(code - zero) * scale`. `P.nbits`, `P.axis`,
//! `P.shape`, `P.packing` and others say the rest. Source: the package `hqq`.

use kiln_quant_core::{
    Block, Grid, PackedWeight, QuantScheme, ScaleType, Scales, Value, packing::CodePacker,
    safetensors_file::Dtype,
};

use super::{gptq::matrix, json::Fields, shards::SafetensorsSet};
use crate::{
    Result,
    source::{DenseTensor, StoredWeight, transposed},
};

/// Behind a linear's name in that of its codes.
pub(super) const CODES: &str = ".W_q";
/// Tensors beside the codes.
pub(super) const COMPANIONS: [&str; 18] = [
    ".scale",
    ".zero",
    ".shape",
    ".nbits",
    ".axis",
    ".packing",
    ".quant_scale",
    ".quant_zero",
    ".view_as_float",
    ".group_size",
    ".unpack_view_dtype",
    ".compute_dtype",
    ".channel_wise",
    ".encoded_state_dict",
    ".offload_meta",
    ".optimize",
    ".round_zero",
    ".stores_quant_config",
];
/// Names of ways to pack, with the bits of a code and of the numbers they are packed into, and how many one holds.
const PACKINGS: [(&str, u32, usize, usize); 5] = [
    ("8bit_u8", 8, 1, 1),
    ("4bit_u8", 4, 1, 2),
    ("3bit_32", 3, 4, 10),
    ("2bit_u8", 2, 1, 4),
    ("1bit_u8", 1, 1, 8),
];
/// Longest name of a way.
const MAX_NAME: usize = 32;

/// Reads `quantization_config`, whose settings the tensors say once more.
pub(super) fn config(fields: &Fields<'_>) {
    fields.know(&["quant_config", "skip_modules"]);
}

/// Codes of a linear, unpacked where they are asked for.
struct Codes {
    numbers: Vec<u32>,
    /// Rows and columns of what is stored.
    sizes: [usize; 2],
    bits: u32,
    /// Codes in a number.
    lanes: usize,
}

impl Codes {
    /// The code at a place of the rows that are stored one part above the other.
    fn at(&self, row: usize, column: usize) -> u8 {
        let [step, width] = self.sizes;
        let (part, row) = (row / step, row % step);
        let shift = self.bits * (self.lanes - 1 - part) as u32;
        (self.numbers[row * width + column] >> shift & ((1 << self.bits) - 1)) as u8
    }
}

/// Reads the linear `module`: packed where groups lie along the inputs of one output, dense where they don't.
pub(super) fn weight(tensors: &SafetensorsSet, module: &str) -> Result<StoredWeight> {
    let name = |part: &str| format!("{module}{part}");
    let codes_name = name(CODES);
    for part in [".quant_scale", ".quant_zero", ".view_as_float"] {
        if tensors.contains(&name(part)) && integers(tensors, &name(part))? != [0] {
            return Err(tensors.wrong(&name(part), "0: plain numbers, codes as they are", "1"));
        }
    }
    let text = tensors.read(&name(".packing"))?;
    let packing = PACKINGS.iter().find(|(name, ..)| text.bytes == name.as_bytes());
    let Some(&(_, bits, bytes, lanes)) = packing else {
        let names: Vec<&str> = PACKINGS.iter().map(|(name, ..)| *name).collect();
        let found = String::from_utf8_lossy(&text.bytes[..text.bytes.len().min(MAX_NAME)]).into_owned();
        return Err(tensors.wrong(&name(".packing"), names.join(", "), found));
    };
    let stated = integers(tensors, &name(".nbits"))?;
    if stated != [i64::from(bits)] {
        return Err(tensors.wrong(
            &name(".nbits"),
            format!("{bits}, as packing says"),
            format!("{stated:?}"),
        ));
    }
    let axis = integers(tensors, &name(".axis"))?;
    if !matches!(axis[..], [0 | 1]) {
        return Err(tensors.wrong(&name(".axis"), "0 or 1", format!("{axis:?}")));
    }
    let shape = integers(tensors, &name(".shape"))?;
    let sizes: Vec<usize> =
        shape.iter().filter_map(|size| usize::try_from(*size).ok().filter(|size| *size > 0)).collect();
    let (&[d_output, d_input], 2) = (sizes.as_slice(), shape.len()) else {
        return Err(tensors.wrong(&name(".shape"), "two sizes above 0", format!("{shape:?}")));
    };
    let stored = matrix(tensors, &codes_name)?;
    let codes = Codes { numbers: numbers(tensors, &codes_name, bytes)?, sizes: stored, bits, lanes };
    let [step, width] = stored;
    let all = d_input.checked_mul(d_output);
    // Along the groups there may be rows that only fill a number up.
    let rows = all.filter(|all| width > 0 && all.is_multiple_of(width)).map(|all| all / width);
    let Some(rows) = rows.filter(|rows| rows.div_ceil(lanes) == step) else {
        let expected = format!("{d_output} x {d_input} codes, as shape says");
        return Err(tensors.wrong(&codes_name, expected, format!("{stored:?}")));
    };
    let groups = if axis == [1] { rows } else { width };
    let read = |part: &str| {
        let name = name(part);
        let values = tensors.read_f32(&name)?.values;
        tensors.check_finite(&name, &values)?;
        match values.len() == groups {
            true => Ok(values),
            false => Err(tensors.wrong(&name, format!("{groups} numbers"), values.len().to_string())),
        }
    };
    let (scales, zeros) = (read(".scale")?, read(".zero")?);
    if axis == [1] && d_input.is_multiple_of(width) {
        return packed(module, &codes, [d_input, d_output], &scales, &zeros).map(StoredWeight::Packed);
    }
    let value = |place: usize| {
        let (row, column) = (place / width, place % width);
        let group = if axis == [1] { row } else { column };
        (f32::from(codes.at(row, column)) - zeros[group]) * scales[group]
    };
    let values = (0..d_input * d_output).map(value).collect();
    Ok(StoredWeight::Dense(DenseTensor { shape: vec![d_output, d_input], values }))
}

fn packed(
    module: &str,
    codes: &Codes,
    [d_input, d_output]: [usize; 2],
    scales: &[f32],
    zeros: &[f32],
) -> Result<PackedWeight> {
    let [_, size] = codes.sizes;
    let groups = d_input / size;
    // Codes of one bit are two of two bits.
    let bits = codes.bits.max(2);
    let mut packer = CodePacker::new(d_input, d_output, bits);
    let mut column = vec![0; d_input];
    for output in 0..d_output {
        for (input, code) in column.iter_mut().enumerate() {
            *code = codes.at(output * groups + input / size, input % size);
        }
        packer.set_column(output, &column);
    }
    let offsets: Vec<f32> = scales.iter().zip(zeros).map(|(scale, zero)| -(scale * zero)).collect();
    let packed = PackedWeight {
        scheme: QuantScheme {
            value: Value::Affine { bits, grid: Grid::Float },
            block: Block { outputs: 1, inputs: (groups > 1).then_some(size) },
            scales: ScaleType::F32,
        },
        d_input,
        d_output,
        codes: packer.into_words(),
        scales: Scales::Plain(transposed(scales, d_output, groups)),
        offsets: Some(transposed(&offsets, d_output, groups)),
        input_order: None,
    };
    packed.validate(module)?;
    Ok(packed)
}

/// The numbers that codes are packed into, of `bytes` bytes each.
fn numbers(tensors: &SafetensorsSet, name: &str, bytes: usize) -> Result<Vec<u32>> {
    let tensor = tensors.read(name)?;
    let (expected, kind) = if bytes == 1 { ("U8", Dtype::U8) } else { ("I32", Dtype::I32) };
    if tensor.dtype != kind {
        return Err(tensors.wrong(name, format!("type {expected}"), format!("type {}", tensor.dtype)));
    }
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |number, byte| number << 8 | u32::from(*byte));
    Ok(tensor.bytes.chunks_exact(bytes).map(number).collect())
}

/// A few integers of any type.
fn integers(tensors: &SafetensorsSet, name: &str) -> Result<Vec<i64>> {
    let tensor = tensors.read(name)?;
    let size = match tensor.dtype {
        Dtype::I64 => 8,
        Dtype::I32 => 4,
        Dtype::U8 | Dtype::I8 | Dtype::BOOL => 1,
        other => return Err(tensors.wrong(name, "an integer", format!("type {other}"))),
    };
    if tensor.bytes.len() > 8 * size {
        return Err(tensors.wrong(name, "a few integers", format!("{} bytes", tensor.bytes.len())));
    }
    let number = |bytes: &[u8]| {
        let negative = size > 1 && bytes[size - 1] & 128 != 0;
        let mut all = [if negative { 255 } else { 0 }; 8];
        all[..size].copy_from_slice(bytes);
        i64::from_le_bytes(all)
    };
    Ok(tensor.bytes.chunks_exact(size).map(number).collect())
}
