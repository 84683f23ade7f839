//! Scales and offsets of a packed weight, filled block by block of its file.

use kiln_quant_core::{QuantScheme, Scales, SuperBlocks, SuperLayout, SuperScales};

use super::blocks::Parts;

/// Scales and offsets of a weight whose blocks are being read.
pub(super) enum Numbers {
    /// A float for each block.
    Floats { columns: usize, scales: Vec<f32>, offsets: Option<Vec<f32>> },
    /// Integers under the floats of each block.
    Integers { layout: SuperLayout, scales: SuperBlocks, offsets: Option<SuperBlocks> },
}

impl Numbers {
    pub(super) fn new(scheme: &QuantScheme, d_input: usize, d_output: usize) -> Self {
        if let Some(layout) = scheme.super_layout(d_input, d_output) {
            let offsets = scheme.has_offsets().then(|| SuperBlocks::new(&layout));
            return Self::Integers { layout, scales: SuperBlocks::new(&layout), offsets };
        }
        let [rows, columns] = scheme.scale_shape(d_input, d_output);
        let zeros = || vec![0.0; rows * columns];
        Self::Floats { columns, scales: zeros(), offsets: scheme.has_offsets().then(zeros) }
    }

    /// Sets those of the `index`-th block of an output.
    pub(super) fn set(&mut self, index: usize, output: usize, parts: &Parts) {
        match self {
            Self::Floats { columns, scales, offsets } => {
                let at = index * *columns + output;
                scales[at] = parts.scale;
                if let Some(offsets) = offsets {
                    offsets[at] = parts.offset;
                }
            }
            Self::Integers { layout, scales, offsets } => {
                let both = [
                    (Some(scales), parts.scale, &parts.scales),
                    (offsets.as_mut(), parts.offset, &parts.offsets),
                ];
                for (blocks, factor, integers) in both {
                    let Some(blocks) = blocks else { continue };
                    blocks.factors[index * layout.columns + output] = factor;
                    for (row, integer) in (index * layout.blocks..).zip(integers) {
                        blocks.set(layout, row, output, *integer);
                    }
                }
            }
        }
    }

    /// All floats, to be checked.
    pub(super) fn floats(&self) -> impl Iterator<Item = &[f32]> {
        let (first, second) = match self {
            Self::Floats { scales, offsets, .. } => (scales.as_slice(), offsets.as_deref()),
            Self::Integers { scales, offsets, .. } => {
                (scales.factors.as_slice(), offsets.as_ref().map(|offsets| offsets.factors.as_slice()))
            }
        };
        std::iter::once(first).chain(second)
    }

    pub(super) fn into_parts(self) -> (Scales, Option<Vec<f32>>) {
        match self {
            Self::Floats { scales, offsets, .. } => (Scales::Plain(scales), offsets),
            Self::Integers { scales, offsets, .. } => (Scales::Super(SuperScales { scales, offsets }), None),
        }
    }
}
