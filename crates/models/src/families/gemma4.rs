//! Gemma 4, text only: heads of two widths, values without gains, keys and values that later blocks share, inputs of single
//! blocks, experts beside the MLP.

use serde_json::{Map, Value, json};

use super::{
    ByBlock, ExpertsPart, Family, GgufArchitecture, LLAMA_NAMES, LinearRole, ModulePath, Names, NormKind,
    NormPlace, Part, Parts, PerLayerNames, StackedExperts, VectorRole,
    class::{
        self, ATTENTION_BIAS, Class, ExpertKeys, GELU_TANH, HeadDim, Keys, LLAMA_KEYS, Multipliers, Rope,
        Windows,
    },
    linear,
    llama::LIKE_LLAMA,
    norm, vector,
};
use crate::{
    Result,
    config::{AttentionScale, LayerAttention, LayerShape, ModelConfig, PerLayerInputConfig, SpecialTokens},
    export::config_keys::set,
    hf::{
        Fields,
        config::{MAX_HEADS, MAX_LAYERS, MAX_POSITIONS, MAX_VOCABULARY, MAX_WIDTH},
        rope::RopeKeys,
    },
};

const ALL: [Part; 24] = [
    norm("input_layernorm", NormPlace::PreAttention, "attn_norm"),
    linear("self_attn.q_proj", LinearRole::Query, "attn_q"),
    linear("self_attn.k_proj", LinearRole::Key, "attn_k"),
    linear("self_attn.v_proj", LinearRole::Value, "attn_v"),
    linear("self_attn.o_proj", LinearRole::Output, "attn_output"),
    norm("self_attn.q_norm", NormPlace::QueryHead, "attn_q_norm"),
    norm("self_attn.k_norm", NormPlace::KeyHead, "attn_k_norm"),
    norm("post_attention_layernorm", NormPlace::PostAttention, "post_attention_norm"),
    norm("pre_feedforward_layernorm", NormPlace::PreMlp, "ffn_norm"),
    linear("mlp.gate_proj", LinearRole::Gate, "ffn_gate"),
    linear("mlp.up_proj", LinearRole::Up, "ffn_up"),
    linear("mlp.down_proj", LinearRole::Down, "ffn_down"),
    norm("post_feedforward_layernorm_1", NormPlace::PostDense, "post_ffw_norm_1"),
    vector("router.scale", VectorRole::RouterScale),
    linear("router.proj", LinearRole::Router, "ffn_gate_inp"),
    vector("router.per_expert_scale", VectorRole::ExpertScales),
    norm("pre_feedforward_layernorm_2", NormPlace::PreExperts, "pre_ffw_norm_2"),
    Part::Experts(ExpertsPart {
        name: "experts",
        linears: ["gate_proj", "up_proj", "down_proj"],
        gguf: ["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"],
        stacked: Some(StackedExperts {
            tensors: ["experts.gate_up_proj", "experts.down_proj"],
            biases: [""; 2],
            interleaved: false,
        }),
        module: "experts",
        router: None,
    }),
    norm("post_feedforward_layernorm_2", NormPlace::PostExperts, "post_ffw_norm_2"),
    norm("post_feedforward_layernorm", NormPlace::PostMlp, "post_ffw_norm"),
    linear("per_layer_input_gate", LinearRole::PerLayerGate, "inp_gate"),
    linear("per_layer_projection", LinearRole::PerLayerProjection, "proj"),
    norm("post_per_layer_input_norm", NormPlace::PostPerLayerInput, "post_norm"),
    vector("layer_scalar", VectorRole::LayerScalar),
];

/// What a kind of blocks has; [`Kind::index`] is its place in [`BLOCKS`].
#[derive(Clone, Copy, PartialEq, Eq)]
struct Kind {
    keys: Keyed,
    experts: bool,
    input: bool,
}

/// Whence keys and values come.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keyed {
    /// A linear each.
    Both = 0,
    /// The keys' linear gives the values too.
    KeysOnly = 1,
    /// An earlier block.
    Shared = 2,
}

impl Kind {
    const fn index(self) -> usize {
        self.keys as usize + 3 * self.experts as usize + 6 * self.input as usize
    }

    const fn of(index: usize) -> Self {
        let keys = match index % 3 {
            0 => Keyed::Both,
            1 => Keyed::KeysOnly,
            _ => Keyed::Shared,
        };
        Self { keys, experts: index / 3 % 2 == 1, input: index >= 6 }
    }

    const fn has(self, part: Part) -> bool {
        match part {
            Part::Linear(linear) => match linear.role {
                LinearRole::Value => matches!(self.keys, Keyed::Both),
                LinearRole::Key => !matches!(self.keys, Keyed::Shared),
                LinearRole::PerLayerGate | LinearRole::PerLayerProjection => self.input,
                LinearRole::Router => self.experts,
                _ => true,
            },
            Part::Norm(norm) => match norm.place {
                NormPlace::KeyHead => !matches!(self.keys, Keyed::Shared),
                NormPlace::PostDense | NormPlace::PreExperts | NormPlace::PostExperts => self.experts,
                NormPlace::PostPerLayerInput => self.input,
                _ => true,
            },
            Part::Vector(vector) => match vector.role {
                VectorRole::RouterScale | VectorRole::ExpertScales => self.experts,
                _ => true,
            },
            Part::Experts(_) => self.experts,
        }
    }
}

/// The parts of a kind, at the front, and how many they are.
const fn table(index: usize) -> ([Part; ALL.len()], usize) {
    let (kind, mut parts, mut count, mut place) = (Kind::of(index), ALL, 0, 0);
    while place < ALL.len() {
        if kind.has(ALL[place]) {
            parts[count] = ALL[place];
            count += 1;
        }
        place += 1;
    }
    (parts, count)
}

macro_rules! blocks {
    ($($index:literal),*) => { &[$({
        const TABLE: ([Part; ALL.len()], usize) = table($index);
        Parts(TABLE.0.split_at(TABLE.1).0)
    }),*] };
}

const BLOCKS: &[Parts] = blocks![0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11];

const EXPERTS: ExpertKeys = ExpertKeys {
    width: "moe_intermediate_size",
    normalise: None,
    sparse_layers: false,
    shared_width: "",
    optional: true,
};

pub(super) static GEMMA4: Family = Family {
    model_type: "gemma4_text",
    architecture: "Gemma4ForCausalLM",
    aliases: &["gemma4_unified_text"],
    names: Names {
        per_layer: Some(PerLayerNames {
            embedding: "model.embed_tokens_per_layer",
            projection: "model.per_layer_model_projection",
            norm: "model.per_layer_projection_norm",
        }),
        ..LLAMA_NAMES
    },
    norm: NormKind::Rms,
    norms_values: true,
    gguf: Some(GgufArchitecture {
        name: "gemma4",
        by_block: Some(ByBlock::Gemma4),
        ..GgufArchitecture::PLAIN
    }),
    blocks: BLOCKS,
    special_tokens: || SpecialTokens { bos: Some(2), eos: vec![1], pad: Some(0) },
    module: ModulePath { root: "Gemma4", left_out: "" },
    class: Class {
        keys: Keys { activation: &["hidden_activation", "hidden_act"], ..LLAMA_KEYS },
        head_dim: HeadDim::Default(256),
        key_value_heads: Some(4),
        max_positions: 131_072,
        tied: true,
        activations: GELU_TANH,
        bias_keys: &[ATTENTION_BIAS],
        windows: Windows::Pattern { window: Some(512), period: 6, keys: &[] },
        head_dims: true,
        experts: Some(EXPERTS),
        rope: Rope::ByKind([
            RopeKeys {
                theta: 1e6,
                partial: Some(1.0),
                absent: Some(r#"{"rope_type": "proportional", "partial_rotary_factor": 0.25}"#),
                known: &[],
            },
            RopeKeys::DEFAULT,
        ]),
        scales_embedding: true,
        multipliers: Multipliers {
            logit_softcap: Some(("final_logit_softcapping", None)),
            ..class::LLAMA.multipliers
        },
        read_more,
        write_more,
        ..class::LLAMA
    },
    ..LIKE_LLAMA
};

fn read_more(fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
    if fields.str("use_bidirectional_attention")?.is_some_and(|which| which != "vision") {
        return Err(fields.unsupported("use_bidirectional_attention", "null or vision"));
    }
    if fields.present("sliding_window") && fields.size("sliding_window", MAX_POSITIONS)?.is_none() {
        return Err(fields.wrong("sliding_window", "a window, as some layers slide"));
    }
    config.attention_scale = AttentionScale::Factor(1.0);
    let layers = config.num_hidden_layers;
    if let Some(last) = config.layer_attention.last_mut() {
        *last = LayerAttention { sliding_window: None, rope: Some(0) };
    }

    // 0 stands for none, which `size` refuses.
    let none = |key: &str| fields.get(key).is_some_and(|value| value.as_u64() == Some(0));
    let shared = match none("num_kv_shared_layers") {
        true => 0,
        false => fields.size("num_kv_shared_layers", MAX_LAYERS)?.unwrap_or(0),
    };
    if shared >= layers {
        return Err(fields.wrong("num_kv_shared_layers", &format!("fewer than the {layers} layers")));
    }
    let width = match (none("hidden_size_per_layer_input"), fields.present("hidden_size_per_layer_input")) {
        (true, _) => None,
        (false, true) => fields.size("hidden_size_per_layer_input", MAX_WIDTH)?,
        (false, false) => Some(256),
    };
    let vocab_size = fields.size("vocab_size_per_layer_input", MAX_VOCABULARY)?;
    config.per_layer_input =
        width.map(|width| PerLayerInputConfig { width, vocab_size: vocab_size.unwrap_or(config.vocab_size) });
    let experts = fields.bool("enable_moe_block")?.unwrap_or(false);
    if experts {
        EXPERTS.read(fields, config)?;
    }
    fields.know(&["num_experts", "num_local_experts", "top_k_experts", "moe_intermediate_size"]);
    let keys_only = fields.bool("attention_k_eq_v")?.unwrap_or(false);
    let double = fields.bool("use_double_wide_mlp")?.unwrap_or(false);

    let is_full = |config: &ModelConfig, index: usize| config.layer_attention[index].sliding_window.is_none();
    let kind = |index: usize| Kind {
        keys: match index {
            index if index >= layers - shared => Keyed::Shared,
            index if keys_only && is_full(config, index) => Keyed::KeysOnly,
            _ => Keyed::Both,
        },
        experts,
        input: width.is_some(),
    };
    let kinds: Vec<usize> = (0..layers).map(|index| kind(index).index()).collect();
    if kinds.iter().any(|kind| *kind != 0) {
        config.block_kinds = kinds;
    }

    // Files of transformers 5.23 and later say it layer by layer in `per_layer_config`.
    let of_full = fields.size("global_head_dim", MAX_WIDTH)?;
    let key_value_heads = fields.size("num_global_key_value_heads", MAX_HEADS)?;
    let listed = fields.object("per_layer_config")?.is_some();
    let (mut shapes, mut head_dims) = (vec![config.common_shape(); layers], vec![config.head_dim; layers]);
    for index in 0..layers {
        if is_full(config, index) && !listed {
            head_dims[index] = of_full.unwrap_or(512);
            if let Some(heads) = key_value_heads.filter(|_| keys_only) {
                shapes[index].num_key_value_heads = heads;
            }
        }
        if double && index >= layers - shared {
            shapes[index].intermediate_size *= 2;
        }
        let LayerShape { num_attention_heads, num_key_value_heads, .. } = shapes[index];
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            let expected = format!("a divisor of num_attention_heads, {num_attention_heads}");
            return Err(fields.wrong("num_global_key_value_heads", &expected));
        }
    }
    config.set_layers(shapes);
    config.set_head_dims(head_dims);
    Ok(())
}

fn write_more(config: &ModelConfig, map: &mut Map<String, Value>) {
    let layers = config.num_hidden_layers;
    let kinds: Vec<Kind> =
        (0..layers).map(|index| Kind::of(config.block_kinds.get(index).copied().unwrap_or(0))).collect();
    let is_shared = |index: &usize| kinds[*index].keys == Keyed::Shared;
    let shared = (0..layers).filter(is_shared).count();
    let common = config.common_shape().intermediate_size;
    let is_double = |index: usize| config.layer(index).intermediate_size == 2 * common;
    let double = shared > 0 && (0..layers).filter(is_shared).all(is_double);
    if let Some(blocks) = map.get_mut("per_layer_config").and_then(Value::as_object_mut).filter(|_| double) {
        // Said by the key.
        for index in (0..layers).filter(is_shared) {
            let name = index.to_string();
            if let Some(block) = blocks.get_mut(&name).and_then(Value::as_object_mut) {
                block.remove("intermediate_size");
                if block.is_empty() {
                    blocks.remove(&name);
                }
            }
        }
    }
    let experts = kinds.iter().any(|kind| kind.experts);
    set(
        map,
        [
            ("num_kv_shared_layers", json!(shared)),
            ("use_double_wide_mlp", json!(double)),
            ("attention_k_eq_v", json!(kinds.iter().any(|kind| kind.keys == Keyed::KeysOnly))),
            ("enable_moe_block", json!(experts)),
            ("hidden_size_per_layer_input", json!(config.per_layer_input.map_or(0, |inputs| inputs.width))),
        ],
    );
    if let Some(inputs) = config.per_layer_input {
        set(map, [("vocab_size_per_layer_input", json!(inputs.vocab_size))]);
    }
    if let (true, Some(experts)) = (experts, &config.experts) {
        set(
            map,
            [
                ("num_experts", json!(experts.count)),
                ("top_k_experts", json!(experts.per_token)),
                (EXPERTS.width, json!(experts.width)),
            ],
        );
    }
    // Where nothing is listed, silence would mean the class's widths.
    if map.get("per_layer_config").and_then(Value::as_object).is_none_or(Map::is_empty) {
        map.remove("per_layer_config");
        set(map, [("global_head_dim", json!(config.head_dim))]);
    }
}
