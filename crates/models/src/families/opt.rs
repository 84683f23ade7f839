//! OPT. Its blocks have norms before attention and MLP; those of 350M, whose embedding is narrower than the residual stream,
//! norm that stream behind them.

use serde_json::{Map, Value, json};

use super::{
    Activation, Family, LearnedPositions, LinearRole, ModulePath, Names, NormKind, NormPlace, Part, Parts,
    class::{self, BLOCK as ALL, BiasKey, Class, HeadDim, Keys, LLAMA_KEYS, Rope},
    llama::LIKE_LLAMA,
    plain_linear, plain_norm,
};
use crate::{
    Result,
    config::{ModelConfig, SpecialTokens},
    export::config_keys::set,
    hf::{Fields, config::MAX_WIDTH},
};

const BLOCK: [Part; 8] = [
    plain_norm("self_attn_layer_norm", NormPlace::PreAttention),
    plain_linear("self_attn.q_proj", LinearRole::Query),
    plain_linear("self_attn.k_proj", LinearRole::Key),
    plain_linear("self_attn.v_proj", LinearRole::Value),
    plain_linear("self_attn.out_proj", LinearRole::Output),
    plain_norm("final_layer_norm", NormPlace::PreMlp),
    plain_linear("fc1", LinearRole::Up),
    plain_linear("fc2", LinearRole::Down),
];

/// Behind what they stand before in the others.
const POST_BLOCK: [Part; 8] = {
    let [_, a, b, c, d, _, e, f] = BLOCK;
    let attention = plain_norm("self_attn_layer_norm", NormPlace::StreamAfterAttention);
    let mlp = plain_norm("final_layer_norm", NormPlace::StreamAfterMlp);
    [a, b, c, d, attention, e, f, mlp]
};

pub(super) static OPT: Family = Family {
    model_type: "opt",
    architecture: "OPTForCausalLM",
    names: Names {
        embedding: "model.decoder.embed_tokens",
        positions: Some(LearnedPositions { path: "model.decoder.embed_positions", offset: 2 }),
        embedding_norm: None,
        blocks: "model.decoder.layers",
        final_norm: "model.decoder.final_layer_norm",
        head: "lm_head",
        per_layer: None,
        projections: Some(["model.decoder.project_in", "model.decoder.project_out"]),
    },
    norm: NormKind::Layer,
    blocks: &[Parts(&BLOCK), Parts(&POST_BLOCK)],
    special_tokens: || SpecialTokens { bos: Some(2), eos: vec![2], pad: Some(1) },
    module: ModulePath { root: "Opt", left_out: "model." },
    class: Class {
        keys: Keys {
            key_value_heads: &[],
            channels: &["ffn_dim"],
            // torch's default, for which there is no key.
            norm_eps: &[],
            activation: &["activation_function"],
            ..LLAMA_KEYS
        },
        head_dim: HeadDim::Implied,
        tied: true,
        norm_eps: 1e-5,
        activations: &[("relu", Activation::Relu)],
        bias_keys: &[BiasKey { key: "enable_bias", default: true, covers: ALL }],
        rope: Rope::Never,
        ignored: &["prefix"],
        read_more,
        write_more,
        ..class::LLAMA
    },
    ..LIKE_LLAMA
};

fn read_more(fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
    let embedding =
        fields.size("word_embed_proj_dim", MAX_WIDTH)?.filter(|width| *width != config.hidden_size);
    config.embedding_width = embedding;
    let before = fields.bool("do_layer_norm_before")?.unwrap_or(true);
    if !before {
        config.block_kinds = vec![1; config.num_hidden_layers];
    }
    let removed = fields.bool("_remove_final_layer_norm")?.unwrap_or(false);
    config.has_final_norm = before && !removed;
    config.norm_affine = fields.bool("layer_norm_elementwise_affine")?.unwrap_or(true);
    Ok(())
}

fn write_more(config: &ModelConfig, map: &mut Map<String, Value>) {
    let before = !config.block_kinds.contains(&1);
    set(
        map,
        [
            ("word_embed_proj_dim", json!(config.embedding_width.unwrap_or(config.hidden_size))),
            ("do_layer_norm_before", json!(before)),
            ("_remove_final_layer_norm", json!(before && !config.has_final_norm)),
            ("layer_norm_elementwise_affine", json!(config.norm_affine)),
        ],
    );
}
