//! Qwen 3.5, text only: gated delta nets and, every fourth block where a file is silent, gated attention.

use serde_json::{Map, Value, json};

use super::{
    ByBlock, Family, GgufArchitecture, LinearRole, ModulePath, NormKind, NormPlace, Part, Parts, VectorRole,
    class::{self, ATTENTION_BIAS, Class, HeadDim, Rope},
    linear,
    llama::{BLOCK, LIKE_LLAMA, NO_TOKENS},
    norm, vector,
};
use crate::{
    Result,
    config::{DeltaNetConfig, ModelConfig},
    export::config_keys::set,
    hf::{
        Fields,
        config::{MAX_HEADS, MAX_LAYERS, MAX_WIDTH},
        rope::RopeKeys,
    },
};

/// LLaMA's MLP behind its norm.
const MLP: [Part; 4] = [
    norm("post_attention_layernorm", NormPlace::PreMlp, "post_attention_norm"),
    BLOCK[6],
    BLOCK[7],
    BLOCK[8],
];

const ATTENTION: [Part; 11] = {
    let [pre_mlp, gate, up, down] = MLP;
    [
        BLOCK[0],
        linear("self_attn.q_proj", LinearRole::GatedQuery, "attn_q"),
        BLOCK[2],
        BLOCK[3],
        BLOCK[4],
        norm("self_attn.q_norm", NormPlace::QueryHead, "attn_q_norm"),
        norm("self_attn.k_norm", NormPlace::KeyHead, "attn_k_norm"),
        pre_mlp,
        gate,
        up,
        down,
    ]
};

const DELTA_NET: [Part; 14] = {
    let [pre_mlp, gate, up, down] = MLP;
    [
        BLOCK[0],
        linear("linear_attn.in_proj_qkv", LinearRole::DeltaMixed, "attn_qkv"),
        linear("linear_attn.in_proj_z", LinearRole::DeltaGate, "attn_gate"),
        linear("linear_attn.in_proj_b", LinearRole::DeltaStrength, "ssm_beta"),
        linear("linear_attn.in_proj_a", LinearRole::DeltaDecay, "ssm_alpha"),
        vector("linear_attn.conv1d.weight", VectorRole::DeltaConvolution),
        vector("linear_attn.A_log", VectorRole::DeltaLogRate),
        vector("linear_attn.dt_bias", VectorRole::DeltaTimeBias),
        vector("linear_attn.norm.weight", VectorRole::DeltaNorm),
        linear("linear_attn.out_proj", LinearRole::DeltaOutput, "ssm_out"),
        pre_mlp,
        gate,
        up,
        down,
    ]
};

/// The kind of blocks that are delta nets.
const RECURRENT: usize = 1;

pub(super) static QWEN3_5: Family = Family {
    model_type: "qwen3_5_text",
    architecture: "Qwen3_5ForCausalLM",
    norm: NormKind::RmsOnePlus,
    gguf: Some(GgufArchitecture {
        name: "qwen35",
        norms_plus_one: true,
        by_block: Some(ByBlock::Qwen3_5),
        ..GgufArchitecture::PLAIN
    }),
    blocks: &[Parts(&ATTENTION), Parts(&DELTA_NET)],
    special_tokens: NO_TOKENS,
    module: ModulePath { root: "Qwen35", left_out: "" },
    class: Class {
        head_dim: HeadDim::Default(256),
        key_value_heads: Some(4),
        max_positions: 32_768,
        bias_keys: &[ATTENTION_BIAS],
        rope: Rope::One(RopeKeys {
            partial: Some(0.25),
            known: &["mrope_section", "mrope_interleaved"],
            ..RopeKeys::DEFAULT
        }),
        only: &[("attn_output_gate", true)],
        ignored: &["mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"],
        read_more,
        write_more,
        ..class::LLAMA
    },
    ..LIKE_LLAMA
};

fn read_more(fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
    let layers = config.num_hidden_layers;
    let interval = fields.size("full_attention_interval", MAX_LAYERS)?.unwrap_or(4);
    let types = fields.strings("layer_types")?;
    let kinds: Vec<usize> = match types {
        Some(types) if types.len() != layers => {
            return Err(fields.wrong("layer_types", &format!("a list of {layers} entries")));
        }
        Some(types) => {
            let kind = |name: &&str| match *name {
                "full_attention" => Ok(0),
                "linear_attention" => Ok(RECURRENT),
                _ => Err(fields.unsupported("layer_types", "full_attention, linear_attention")),
            };
            types.iter().map(kind).collect::<Result<_>>()?
        }
        None => (1..=layers).map(|layer| if layer % interval == 0 { 0 } else { RECURRENT }).collect(),
    };
    if kinds.contains(&RECURRENT) {
        config.block_kinds = kinds;
    }
    let heads =
        |key: &str, usual: usize| Ok::<_, crate::Error>(fields.size(key, MAX_HEADS)?.unwrap_or(usual));
    let width =
        |key: &str, usual: usize| Ok::<_, crate::Error>(fields.size(key, MAX_WIDTH)?.unwrap_or(usual));
    let delta = DeltaNetConfig {
        key_heads: heads("linear_num_key_heads", 16)?,
        value_heads: heads("linear_num_value_heads", 32)?,
        key_dim: width("linear_key_head_dim", 128)?,
        value_dim: width("linear_value_head_dim", 128)?,
        convolution: width("linear_conv_kernel_dim", 4)?,
    };
    if !delta.value_heads.is_multiple_of(delta.key_heads) {
        let expected = format!("a multiple of linear_num_key_heads, {}", delta.key_heads);
        return Err(fields.wrong("linear_num_value_heads", &expected));
    }
    config.delta_net = Some(delta);
    Ok(())
}

fn write_more(config: &ModelConfig, map: &mut Map<String, Value>) {
    let kind = |index: usize| match config.parts(index).is_recurrent() {
        true => "linear_attention",
        false => "full_attention",
    };
    let kinds: Vec<&str> = (0..config.num_hidden_layers).map(kind).collect();
    set(map, [("layer_types", json!(kinds))]);
    if let Some(delta) = config.delta_net {
        set(
            map,
            [
                ("linear_num_key_heads", json!(delta.key_heads)),
                ("linear_num_value_heads", json!(delta.value_heads)),
                ("linear_key_head_dim", json!(delta.key_dim)),
                ("linear_value_head_dim", json!(delta.value_dim)),
                ("linear_conv_kernel_dim", json!(delta.convolution)),
            ],
        );
    }
}
