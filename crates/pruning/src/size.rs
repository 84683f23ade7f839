//! How large a model is.

use kiln_models::{AnyModel, Embedding, LayerNorm, Slots, config::ModelConfig};
use kiln_quant_core::{Projection, QuantLinear};

/// Parameters of a model of this shape: weights, biases, norms and tables, a tied head counted once.
///
/// ```
/// use kiln_models::Checkpoint;
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/models/tiny-llama");
/// assert_eq!(kiln_pruning::parameters(Checkpoint::open(folder)?.config()), 1_967_808);
/// # Ok::<(), kiln_models::Error>(())
/// ```
pub fn parameters(config: &ModelConfig) -> u64 {
    let count = |parts: &[usize]| parts.iter().map(|&part| part as u64).sum::<u64>();
    match config {
        ModelConfig::Llama(c) => {
            let table = c.vocab_size * c.hidden_size;
            let mut sum = count(&[table, c.hidden_size]);
            sum += if c.tie_word_embeddings { 0 } else { table as u64 };
            for layer in 0..c.num_hidden_layers {
                let shape = c.layer(layer);
                let (query, key) =
                    (shape.num_attention_heads * c.head_dim, shape.num_key_value_heads * c.head_dim);
                let inner = shape.intermediate_size;
                sum += count(&[(2 * query + 2 * key + 3 * inner) * c.hidden_size, 2 * c.hidden_size]);
                let flag = |on: bool, biases: usize| if on { biases } else { 0 };
                sum += count(&[
                    flag(c.qkv_bias, query + 2 * key),
                    flag(c.o_bias, c.hidden_size),
                    flag(c.mlp_bias, 2 * inner + c.hidden_size),
                    flag(c.qk_norm, 2 * c.head_dim),
                ]);
            }
            sum
        }
        ModelConfig::Opt(c) => {
            let table = c.vocab_size * c.hidden_size;
            let norm = if c.layer_norm_affine { 2 * c.hidden_size } else { 0 };
            let mut sum = count(&[table, (c.max_position_embeddings + 2) * c.hidden_size, norm]);
            sum += if c.tie_word_embeddings { 0 } else { table as u64 };
            for layer in 0..c.num_hidden_layers {
                let shape = c.layer(layer);
                let (heads, inner) = (shape.num_attention_heads * c.head_dim, shape.intermediate_size);
                let biases = if c.bias { 3 * heads + inner + 2 * c.hidden_size } else { 0 };
                sum += count(&[(4 * heads + 2 * inner) * c.hidden_size, biases, 2 * norm]);
            }
            sum
        }
        _ => 0,
    }
}

/// Bytes of all tensors of a model: packed ones as stored, others at 4 bytes a value.
pub fn model_bytes(model: &AnyModel<QuantLinear>) -> usize {
    let linear = |linear: &QuantLinear| {
        let [d_input, d_output] = linear.shape();
        let weight = match linear {
            QuantLinear::Packed(linear) => linear.weight.storage_bytes(),
            QuantLinear::Dense(_) => 4 * d_input * d_output,
        };
        weight + if linear.bias().is_some() { 4 * d_output } else { 0 }
    };
    let table = |table: &Embedding| match table {
        Embedding::Packed(table) => table.storage_bytes(),
        Embedding::Dense(_) => 4 * table.shape().iter().product::<usize>(),
    };
    let layer_norm = |norm: &LayerNorm| {
        let parts = [&norm.weight, &norm.bias].into_iter().flatten();
        parts.map(|part| 4 * part.lazy_shape().num_elements()).sum::<usize>()
    };
    let mut bytes = 0;
    model.for_each_slot(|_, slot| bytes += linear(slot));
    match model {
        AnyModel::Llama(model) => {
            bytes += table(&model.model.embed_tokens) + model.lm_head.as_ref().map_or(0, linear);
            let mut norms = vec![&model.model.norm];
            for block in &model.model.layers {
                norms.extend([&block.input_layernorm, &block.post_attention_layernorm]);
                norms.extend([&block.self_attn.q_norm, &block.self_attn.k_norm].into_iter().flatten());
            }
            bytes += norms.iter().map(|norm| 4 * norm.weight.lazy_shape().num_elements()).sum::<usize>();
        }
        AnyModel::Opt(model) => {
            bytes += table(&model.decoder.embed_tokens) + model.lm_head.as_ref().map_or(0, linear);
            bytes += 4 * model.decoder.embed_positions.lazy_shape().num_elements();
            bytes += layer_norm(&model.decoder.final_layer_norm);
            for block in &model.decoder.layers {
                bytes += layer_norm(&block.self_attn_layer_norm) + layer_norm(&block.final_layer_norm);
            }
        }
    }
    bytes
}
