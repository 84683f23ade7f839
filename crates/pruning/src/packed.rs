//! Cutting packed weights: exactly, on the codes, where blocks allow it.

use kiln_quant_core::{
    PackedWeight, ScaleType, Scales,
    packing::{CodePacker, unpack_column},
};

/// The weight with only the given inputs and outputs (rising; `None` keeps all), its codes, scales and offsets untouched;
/// `None` if blocks would have to be split or joined.
///
/// Outputs of a scheme with one output per block can always be cut so; inputs if every new block lies within one old
/// block, as when whole blocks go. Scales that share a factor become the f32 values they stand for, since what shares it
/// would be cut.
pub fn cut_packed(
    weight: &PackedWeight,
    inputs: Option<&[usize]>,
    outputs: Option<&[usize]>,
) -> Option<PackedWeight> {
    let (d_input, d_output) = (weight.d_input, weight.d_output);
    let outputs: Vec<usize> = outputs.map_or_else(|| (0..d_output).collect(), <[usize]>::to_vec);
    let (rows, input_order) = packed_rows(weight, inputs);
    let block = weight.scheme.block;
    let block_rows = new_blocks(&rows, block.inputs_of(d_input), block.inputs_of(rows.len()))?;
    let block_columns = new_blocks(&outputs, block.outputs, block.outputs)?;

    let mut scheme = weight.scheme;
    if scheme.scales == ScaleType::Double || scheme.scales.integer_bits().is_some() {
        scheme.scales = ScaleType::F32;
    }
    let [_, columns] = weight.scheme.scale_shape(d_input, d_output);
    let cut = |values: &[f32]| -> Vec<f32> {
        let row = |&row: &usize| block_columns.iter().map(move |column| (row, *column));
        block_rows.iter().flat_map(row).map(|(row, column)| values[row * columns + column]).collect()
    };
    let mut packer = CodePacker::new(rows.len(), outputs.len(), scheme.bits());
    let (mut codes, mut kept) = (vec![0; d_input], vec![0; rows.len()]);
    for (new, &old) in outputs.iter().enumerate() {
        unpack_column(&weight.codes, d_output, scheme.bits(), old, &mut codes);
        for (kept, &row) in kept.iter_mut().zip(&rows) {
            *kept = codes[row];
        }
        packer.set_column(new, &kept);
    }
    Some(PackedWeight {
        scheme,
        d_input: rows.len(),
        d_output: outputs.len(),
        codes: packer.into_words(),
        scales: Scales::Plain(cut(&weight.effective_scales())),
        offsets: weight.effective_offsets().as_deref().map(cut),
        input_order,
    })
}

/// The packed rows that hold the kept inputs, and the inputs' new order among themselves.
fn packed_rows(weight: &PackedWeight, inputs: Option<&[usize]>) -> (Vec<usize>, Option<Vec<u32>>) {
    let Some(inputs) = inputs else {
        return ((0..weight.d_input).collect(), weight.input_order.clone());
    };
    let Some(order) = &weight.input_order else { return (inputs.to_vec(), None) };
    let kept = order.iter().enumerate().filter_map(|(row, &input)| {
        let new = inputs.binary_search(&(input as usize)).ok()?;
        Some((row, new as u32))
    });
    let (rows, order) = kept.unzip();
    (rows, Some(order))
}

/// The old block of each new one; `None` if a new one would hold parts of two.
fn new_blocks(kept: &[usize], old_size: usize, new_size: usize) -> Option<Vec<usize>> {
    kept.chunks(new_size)
        .map(|block| {
            let old = block[0] / old_size;
            block.iter().all(|position| position / old_size == old).then_some(old)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use kiln_quant_core::{HostQuantizer, MinMax};
    use kiln_testkit::values;

    use super::*;

    const INPUTS: usize = 96;
    const OUTPUTS: usize = 24;

    /// `[d_output, d_input]` of the kept rows and columns.
    fn expected(dense: &[f32], inputs: &[usize], outputs: &[usize]) -> Vec<f32> {
        outputs.iter().flat_map(|o| inputs.iter().map(move |i| dense[o * INPUTS + i])).collect()
    }

    fn packed(scheme: &str) -> PackedWeight {
        MinMax.quantize("w", &values(7, INPUTS * OUTPUTS), INPUTS, OUTPUTS, &scheme.parse().unwrap()).unwrap()
    }

    #[test]
    fn whole_blocks_are_cut_exactly_in_every_scheme() {
        let inputs: Vec<usize> = (32..96).collect();
        for scheme in [
            "affine4:32",
            "affine3:32:int",
            "affine2:32:sym:f16",
            "nf4:32:double",
            "affine8:col",
            "affine4:8x32",
            "affine5:16:super8",
        ] {
            let weight = packed(scheme);
            let outputs: Vec<usize> = match weight.scheme.block.outputs {
                1 => vec![0, 3, 4, 11, 23],
                size => (size..OUTPUTS).collect(),
            };
            let cut = cut_packed(&weight, Some(&inputs), Some(&outputs)).unwrap();
            cut.validate("w").unwrap();
            assert_eq!(cut.dequantize(), expected(&weight.dequantize(), &inputs, &outputs), "{scheme}");
        }
    }

    #[test]
    fn a_column_block_survives_any_cut_and_a_group_none_through_it() {
        let inputs: Vec<usize> = (0..INPUTS).filter(|i| i % 3 != 1).collect();
        let all: Vec<usize> = (0..OUTPUTS).collect();
        let column = packed("affine4:col");
        let cut = cut_packed(&column, Some(&inputs), None).unwrap();
        assert_eq!(cut.dequantize(), expected(&column.dequantize(), &inputs, &all));
        assert!(cut_packed(&packed("affine4:32"), Some(&inputs), None).is_none());
        // Half of the second group: the third would begin within its block.
        let half: Vec<usize> = (0..48).chain(64..96).collect();
        assert!(cut_packed(&packed("affine4:32"), Some(&half), None).is_none());
        // Half of the last one: it stays the last.
        let ragged: Vec<usize> = (0..80).collect();
        assert!(cut_packed(&packed("affine4:32"), Some(&ragged), None).is_some());
        assert!(cut_packed(&packed("affine4:8x32"), None, Some(&[0, 1, 9])).is_none());
    }

    #[test]
    fn activation_order_is_kept_among_what_stays() {
        let mut weight = packed("affine4:32");
        // Groups of the packed rows hold every third input.
        weight.input_order = Some((0..96).map(|k| (k % 32) * 3 + k / 32).collect());
        let inputs: Vec<usize> = (0..96).filter(|input| input % 3 != 1).collect();
        let all: Vec<usize> = (0..OUTPUTS).collect();
        let cut = cut_packed(&weight, Some(&inputs), None).unwrap();
        cut.validate("w").unwrap();
        assert_eq!(cut.dequantize(), expected(&weight.dequantize(), &inputs, &all));
    }
}
