//! A pruned model at its original shape.

use burn::{
    module::Param,
    nn::Linear,
    tensor::{IndexingUpdateOp, Tensor},
};
use kiln_models::{
    CausalLm, Decoder, Slots,
    config::ModelConfig,
    families::{Channels, VectorRole},
};
use kiln_quant_core::{Projection, QuantLinear};

use crate::{
    Error, Result,
    apply::{frozen, index_tensor},
    kept::Kept,
    structure::Structure,
};

/// Gives a model pruned in heads and channels its `original` shape again, with zeros for what was removed, all linears
/// dense: a head whose queries, keys, values and outputs are zero adds nothing, nor does such a channel. Biases that bias
/// compensation added stay.
///
/// # Errors
/// [`Error::Mismatch`] if `kept` doesn't fit `original`, or if blocks or channels of the residual stream were removed.
pub fn pad(model: Decoder<QuantLinear>, kept: &Kept, original: &ModelConfig) -> Result<Decoder<QuantLinear>> {
    model.check_one_device("pruning")?;
    let structure = Structure::of(original);
    kept.validate(&structure)?;
    if kept.layers.len() != structure.layers.len() || kept.hidden.len() != structure.hidden {
        let found = format!("{} blocks of width {}", kept.layers.len(), kept.hidden.len());
        let expected = format!("all {} blocks of width {}", structure.layers.len(), structure.hidden);
        return Err(Error::mismatch("padding", expected, found));
    }
    let shapes = structure.layers.iter().map(|layer| layer.shape).collect();
    let mut config = model.config().clone();
    // What differs block by block is listed beside these.
    config.num_attention_heads = original.num_attention_heads;
    config.num_key_value_heads = original.num_key_value_heads;
    config.intermediate_size = original.intermediate_size;
    config.experts = original.experts;
    config.set_layers(shapes);
    let (linears, device) = (structure.by_path(), model.device());
    let mut model = model.try_map(|path, slot| {
        let linear = linears.get(path).ok_or_else(|| Error::mismatch(path, "a known linear", "another"))?;
        let place = |channels: Channels| -> Option<(Vec<usize>, usize)> {
            let total = original.width(channels, linear.layer);
            kept.positions(&structure, linear.layer, linear, channels).map(|positions| (positions, total))
        };
        let (inputs, outputs) = (place(linear.input), place(linear.output));
        let [d_input, d_output] = slot.shape();
        for (positions, width) in [(&inputs, d_input), (&outputs, d_output)] {
            if positions.as_ref().is_some_and(|(positions, _)| positions.len() != width) {
                let expected = "as many inputs and outputs as the record keeps";
                return Err(Error::mismatch(path, expected, format!("[{d_input}, {d_output}]")));
            }
        }
        let spread = |rows: Tensor<2>, axis: usize, to: &Option<(Vec<usize>, usize)>| match to {
            None => rows,
            Some((positions, total)) => {
                let mut sizes = rows.dims();
                sizes[axis] = *total;
                let index = index_tensor(positions, &device);
                Tensor::zeros(sizes, &device).select_assign(axis, index, rows, IndexingUpdateOp::Add)
            }
        };
        let weight = spread(spread(slot.weight().without_autodiff(), 0, &inputs), 1, &outputs);
        let bias = slot.bias().map(|bias| {
            let bias = spread(bias.without_autodiff().unsqueeze(), 1, &outputs);
            let [_, width] = bias.dims();
            frozen(bias.reshape([width]))
        });
        let weight: Param<Tensor<2>> = frozen(weight);
        Ok(QuantLinear::Dense(Linear { weight, bias }))
    })?;
    for (place, block) in model.blocks.iter_mut().enumerate() {
        let groups = &structure.layers[place];
        if let (Some(heads), Some(sinks)) =
            (kept.layers[place].query_heads(groups), block.vector_mut(VectorRole::Sinks))
        {
            // What a head that adds nothing attends to is the same to all.
            let zeros = Tensor::<1>::zeros([groups.shape.num_attention_heads], &device);
            let values = sinks.val().without_autodiff();
            *sinks =
                frozen(zeros.select_assign(0, index_tensor(&heads, &device), values, IndexingUpdateOp::Add));
        }
    }
    Ok(model.with_config(config)?)
}
