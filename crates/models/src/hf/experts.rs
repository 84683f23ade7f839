//! Experts that a file holds stacked, one tensor for all of a block's, under the names that each would have alone.

use std::{collections::BTreeMap, ops::Range};

use kiln_quant_core::{
    Block, Codebook, PackedWeight, QuantScheme, ScaleType, Scales, Value, packing::CodePacker,
    safetensors_file::Dtype,
};

use super::shards::SafetensorsSet;
use crate::{
    Result,
    config::ModelConfig,
    families::{Channels, ExpertsPart, StackedExperts},
    source::{DenseTensor, power_of_two, transposed},
};

/// Values to a scale of MXFP4.
const MXFP4_BLOCK: usize = 32;
const MXFP4_BLOCKS: &str = "_blocks";
const MXFP4_SCALES: &str = "_scales";

/// A tensor of one expert within a stacked one.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Slice {
    /// The stacked tensor's name; of MXFP4's two without their endings.
    tensor: String,
    mxfp4: bool,
    expert: usize,
    /// Sizes of all that is stacked for an expert, as a linear has them: `[d_output, d_input]`, or `[d_output]`.
    shape: Vec<usize>,
    /// Whether it stands as `[d_input, d_output]`.
    transposed: bool,
    /// The first row of this expert's linear, how many rows it has, and the distance between two of them.
    first: usize,
    rows: usize,
    step: usize,
}

/// The slices of all stacked experts that `tensors` hold, by the names of the tensors of single experts.
pub(super) fn slices(tensors: &SafetensorsSet, model: &ModelConfig) -> Result<BTreeMap<String, Slice>> {
    let mut slices = BTreeMap::new();
    for index in 0..model.num_hidden_layers {
        let Some(part) = model.parts(index).experts() else { continue };
        let usual = [format!("{}.gate_up_proj", part.name), format!("{}.down_proj", part.name)];
        let own = part.stacked.map(|stacked| stacked.tensors.map(str::to_owned));
        let interleaved = part.stacked.is_some_and(|stacked| stacked.interleaved);
        let width = model.width(Channels::Expert, index);
        let inner = [2 * width, model.hidden_size];
        let outer = [model.hidden_size, width];
        // As transformers has them in memory, whatever the family's own files are.
        let usual = (own.as_ref() != Some(&usual)).then_some((usual, false));
        for (names, transposed) in own.map(|names| (names, interleaved)).into_iter().chain(usual) {
            let block = Stack { index, part, model, interleaved: transposed };
            for (name, shape, gated) in [(&names[0], inner, true), (&names[1], outer, false)] {
                let name = model.family.path(index, name);
                block.add(tensors, &name, &shape, gated, "weight", &mut slices)?;
            }
        }
        if let Some(StackedExperts { biases, interleaved, .. }) = part.stacked {
            let block = Stack { index, part, model, interleaved };
            for (name, size, gated) in [(biases[0], inner[0], true), (biases[1], outer[0], false)] {
                let name = model.family.path(index, name);
                block.add(tensors, &name, &[size], gated, "bias", &mut slices)?;
            }
        }
    }
    Ok(slices)
}

/// A block whose experts are stacked.
struct Stack<'a> {
    index: usize,
    part: &'static ExpertsPart,
    model: &'a ModelConfig,
    interleaved: bool,
}

impl Stack<'_> {
    /// Adds the slices of the tensor `name`, if there is one; `gated` says whether it holds gate and way in.
    fn add(
        &self,
        tensors: &SafetensorsSet,
        name: &str,
        shape: &[usize],
        gated: bool,
        kind: &str,
        slices: &mut BTreeMap<String, Slice>,
    ) -> Result<()> {
        let count = self.model.experts.map_or(0, |experts| experts.count);
        let blocks = format!("{name}{MXFP4_BLOCKS}");
        let mxfp4 = shape.len() == 2 && tensors.contains(&blocks);
        if !mxfp4 && !tensors.contains(name) {
            return Ok(());
        }
        // MXFP4's rows are outputs, whatever the family's own matrices are.
        let transposed = self.interleaved && shape.len() == 2 && !mxfp4;
        let mut expected = vec![count];
        expected.extend(shape);
        if transposed {
            expected[1..].reverse();
        }
        if mxfp4 && !shape[1].is_multiple_of(MXFP4_BLOCK) {
            let expected = format!("rows of a multiple of {MXFP4_BLOCK}");
            return Err(tensors.wrong(&blocks, expected, shape[1].to_string()));
        }
        if mxfp4 {
            let scales = [&expected[..2], &[shape[1] / MXFP4_BLOCK]].concat();
            check(tensors, &format!("{name}{MXFP4_SCALES}"), &scales)?;
            expected = [&scales[..], &[MXFP4_BLOCK / 2]].concat();
        }
        check(tensors, if mxfp4 { &blocks } else { name }, &expected)?;
        for expert in 0..count {
            let kinds: Range<usize> = if gated { 0..2 } else { 2..3 };
            for (place, which) in kinds.enumerate() {
                let rows = if gated { shape[0] / 2 } else { shape[0] };
                let (first, step) = match (gated, self.interleaved) {
                    (true, true) => (place, 2),
                    (true, false) => (place * rows, 1),
                    (false, _) => (0, 1),
                };
                let path = self.model.family.path(self.index, &self.part.path(expert, which));
                let (tensor, shape) = (name.to_owned(), shape.to_vec());
                slices.insert(
                    format!("{path}.{kind}"),
                    Slice { tensor, mxfp4, expert, shape, transposed, first, rows, step },
                );
            }
        }
        Ok(())
    }
}

fn check(tensors: &SafetensorsSet, name: &str, expected: &[usize]) -> Result<()> {
    let (_, found) = tensors.describe(name)?;
    if found == expected {
        return Ok(());
    }
    let expected = format!("shape {expected:?}, as the configuration says");
    Err(tensors.wrong(name, expected, format!("{found:?}")))
}

impl Slice {
    /// Names of the stacked tensors that it is read from.
    pub(super) fn sources(&self) -> Vec<String> {
        match self.mxfp4 {
            true => [MXFP4_BLOCKS, MXFP4_SCALES].map(|ending| format!("{}{ending}", self.tensor)).to_vec(),
            false => vec![self.tensor.clone()],
        }
    }

    /// Bytes of it in MXFP4; none if it is dense.
    pub(super) fn packed_bytes(&self) -> Option<u64> {
        let block = MXFP4_BLOCK / 2 + 1;
        self.mxfp4.then(|| (self.rows * self.shape[1] / MXFP4_BLOCK * block) as u64)
    }

    /// The expert's dense tensor; only its part of the file is read.
    pub(super) fn read(&self, tensors: &SafetensorsSet) -> Result<DenseTensor> {
        let mut values = tensors.read_f32_part(&self.tensor, self.expert)?.values;
        if self.transposed {
            values = transposed(&values, self.shape[1], self.shape[0]);
        }
        let width: usize = self.shape[1..].iter().product();
        let rows = (0..self.rows).map(|row| self.first + row * self.step);
        let values = rows.flat_map(|row| values[row * width..][..width].iter().copied()).collect();
        let shape = [&[self.rows], &self.shape[1..]].concat();
        Ok(DenseTensor { shape, values })
    }

    /// The expert's linear, code by code, where it is stored in MXFP4.
    pub(super) fn packed(&self, tensors: &SafetensorsSet) -> Result<Option<PackedWeight>> {
        if !self.mxfp4 {
            return Ok(None);
        }
        let [blocks, scales] = self.mxfp4(tensors)?;
        let (d_input, d_output) = (self.shape[1], self.rows);
        let groups = d_input / MXFP4_BLOCK;
        let mut packer = CodePacker::new(d_input, d_output, 4);
        let mut of_blocks = vec![0.0; groups * d_output];
        let mut codes = Vec::with_capacity(d_input);
        for output in 0..d_output {
            let row = self.first + output * self.step;
            codes.clear();
            codes.extend(
                blocks[row * d_input / 2..][..d_input / 2].iter().flat_map(|byte| [byte & 15, byte >> 4]),
            );
            packer.set_column(output, &codes);
            for (group, scale) in scales[row * groups..][..groups].iter().enumerate() {
                of_blocks[group * d_output + output] = power_of_two(*scale);
            }
        }
        tensors.check_finite(&format!("{}{MXFP4_SCALES}", self.tensor), &of_blocks)?;
        let weight = PackedWeight {
            scheme: QuantScheme {
                value: Value::Codebook(Codebook::Mxfp4),
                block: Block::group(MXFP4_BLOCK),
                scales: ScaleType::Bf16,
            },
            d_input,
            d_output,
            codes: packer.into_words(),
            scales: Scales::Plain(of_blocks),
            offsets: None,
            input_order: None,
        };
        weight.validate(&self.tensor)?;
        Ok(Some(weight))
    }

    /// Codes and scales of all that is stacked for the expert.
    fn mxfp4(&self, tensors: &SafetensorsSet) -> Result<[Vec<u8>; 2]> {
        let [blocks, scales] = [MXFP4_BLOCKS, MXFP4_SCALES].map(|ending| {
            let name = format!("{}{ending}", self.tensor);
            let raw = tensors.read_part(&name, self.expert)?;
            match raw.dtype {
                Dtype::U8 => Ok(raw.bytes),
                other => Err(tensors.wrong(&name, "type U8", other.to_string())),
            }
        });
        Ok([blocks?, scales?])
    }
}
