//! `config.json` in its spellings, and what it must not hold.

use super::*;
use crate::config::{Biases, RopeConfig, RopeScaling};
use proptest::prelude::*;

/// Reads a configuration alone.
fn read(config: &Value) -> Result<FolderConfig> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    config::read_folder(folder.path())
}

fn llama(config: &Value) -> ModelConfig {
    read(config).unwrap().model
}

fn tiny_file(folder: &str, file: &str) -> Value {
    let path = testdata("tiny").join(folder).join(file);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn both_spellings_are_the_same_model() {
    for folder in [
        "llama-rope3-headdim24-f32",
        "llama-tied-f32-sharded",
        "llama-untied-bf16",
        "llama-untied-bnb-nf4-double",
        "mistral-swa8-f32",
        "qwen2-tied-f32",
    ] {
        let new = read(&tiny_file(folder, "config.json")).unwrap();
        let old = read(&tiny_file(folder, "config.v4style.json")).unwrap();
        assert_eq!(new, old, "{folder}");
    }
}

#[test]
fn the_fixtures_say_what_their_table_says() {
    let rope = |folder| llama(&tiny_file(folder, "config.json")).rope.remove(0);
    assert_eq!(rope("llama-rope-linear").scaling, RopeScaling::Linear { factor: 2.0 });
    assert_eq!(
        rope("llama-rope-dynamic").scaling,
        RopeScaling::Dynamic { factor: 2.0, original_max_position_embeddings: 16 }
    );
    let RopeScaling::Yarn { original_max_position_embeddings: 64, attention_factor, .. } =
        rope("llama-rope-yarn").scaling
    else {
        panic!()
    };
    assert!((attention_factor - 1.138_629_436_111_989).abs() < 1e-15);
    let llama3 = llama(&tiny_file("llama-rope3-headdim24-f32", "config.json"));
    assert_eq!(
        llama3.rope[0].scaling,
        RopeScaling::Llama3 {
            factor: 4.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 64
        }
    );
    assert_eq!((llama3.head_dim, llama3.biases), (24, Biases { qkv: true, o: true, mlp: true, head: false }));
    let mistral = llama(&tiny_file("mistral-swa8-f32", "config.json"));
    assert_eq!(mistral.sliding_windows(), [Some(8), Some(8)]);
    let qwen2 = llama(&tiny_file("qwen2-tied-f32", "config.json"));
    assert_eq!((qwen2.biases, qwen2.tie_word_embeddings), (Biases { qkv: true, ..Biases::default() }, true));
    assert_eq!(qwen2.sliding_windows(), [None, None]);
    let qwen3 = llama(&tiny_file("qwen3-untied-f32", "config.json"));
    assert_eq!((qwen3.biases, qwen3.tie_word_embeddings), (Biases::default(), false));
    let opt = read(&tiny_file("opt-f32", "config.json")).unwrap();
    let config = opt.model;
    assert_eq!((config.intermediate_size, config.max_position_embeddings, config.biases.o), (128, 64, true));
    assert_eq!(opt.special_tokens, SpecialTokens { bos: Some(2), eos: vec![2], pad: Some(1) });
}

/// Defaults of transformers' configuration classes.
#[test]
fn absent_keys_take_the_defaults_of_the_class() {
    let llama1 = llama(&with(tiny_config(), json!({"num_key_value_heads": null})));
    assert_eq!((llama1.num_key_value_heads, llama1.head_dim, llama1.max_position_embeddings), (4, 16, 2048));
    assert_eq!(llama1.rope, [RopeConfig::plain(10_000.0)]);
    assert_eq!((llama1.norm_eps, llama1.tie_word_embeddings, llama1.biases.qkv), (1e-6, false, false));
    let mut mistral = with(
        tiny_config(),
        json!({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_attention_heads": 8}),
    );
    mistral.as_object_mut().unwrap().remove("num_key_value_heads");
    assert_eq!(llama(&mistral).sliding_windows(), [Some(4096), Some(4096)]);
    assert_eq!(llama(&mistral).num_key_value_heads, 8);
    assert_eq!(llama(&with(mistral, json!({"sliding_window": null}))).sliding_windows(), [None, None]);
    let qwen3 = json!({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"});
    assert_eq!(llama(&with(tiny_config(), qwen3)).head_dim, 128);
    let mut by_type = tiny_config();
    by_type.as_object_mut().unwrap().remove("architectures");
    assert!(read(&by_type).is_ok());
}

#[test]
fn classes_for_sequence_classification_are_of_the_language_models_family() {
    let mut renamed = 0;
    for entry in std::fs::read_dir(testdata("arch")).unwrap() {
        let Ok(text) = std::fs::read(entry.unwrap().path().join("config.json")) else { continue };
        let mut config: Value = serde_json::from_slice(&text).unwrap();
        let class = config["architectures"][0].as_str().unwrap_or_default().to_owned();
        let suffixes = ["ForCausalLM", "LMHeadModel"];
        let Some(stem) = suffixes.iter().find_map(|suffix| class.strip_suffix(suffix)) else { continue };
        let language_model = read(&config).unwrap();
        assert_eq!(language_model.classifier, None);
        let class = format!("{stem}ForSequenceClassification");
        config["architectures"] = json!([class]);
        let found = read(&config).unwrap();
        assert_eq!(found.model.family, language_model.model.family, "{class}");
        assert_eq!((found.classifier, found.model.tie_word_embeddings), (Some(class), true));
        renamed += 1;
    }
    assert!(renamed >= 40, "{renamed}");
}

#[test]
fn qwen_windows_follow_layer_types_or_max_window_layers() {
    let qwen = |extra| {
        let qwen =
            json!({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 3});
        with(with(tiny_config(), qwen), extra)
    };
    let windows = |extra| llama(&qwen(extra)).sliding_windows();
    assert_eq!(windows(json!({"sliding_window": 8, "max_window_layers": 1})), [None; 3]);
    let used = json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 1});
    assert_eq!(windows(used.clone()), [None, Some(8), Some(8)]);
    let types = json!({"layer_types": ["sliding_attention", "full_attention", "full_attention"]});
    assert_eq!(windows(with(used.clone(), types.clone())), [Some(8), None, None]);
    assert_eq!(windows(json!({"use_sliding_window": true, "max_window_layers": 0})), [Some(4096); 3]);
    assert_error(read(&qwen(types)), &["sliding_window"]);
    assert_error(read(&qwen(json!({"layer_types": ["full_attention"]}))), &["layer_types", "3 entries"]);
    let chunked = json!({"layer_types": ["chunked_attention", "full_attention", "full_attention"]});
    assert_error(read(&qwen(chunked)), &["layer_types", "chunked_attention"]);
}

#[test]
fn every_family_refuses_what_it_does_not_compute_by_name() {
    for (folder, change, parts) in [
        ("stablelm", json!({"qk_layernorm": true}), &["qk_layernorm", "true"][..]),
        ("granitemoehybrid", json!({"layer_types": ["mamba", "attention"]}), &["layer_types", "mamba"]),
        ("granitemoehybrid", json!({"num_local_experts": 8}), &["num_local_experts", "8"]),
        ("gemma2", json!({"use_bidirectional_attention": true}), &["use_bidirectional_attention"]),
        ("gemma2", json!({"hidden_activation": "relu"}), &["hidden_activation", "relu"]),
        ("gpt2", json!({"scale_attn_by_inverse_layer_idx": true}), &["scale_attn_by_inverse_layer_idx"]),
        ("gpt2", json!({"add_cross_attention": true}), &["add_cross_attention"]),
        ("bloom", json!({"apply_residual_connection_post_layernorm": true}), &["apply_residual_connection"]),
        ("falcon", json!({"num_kv_heads": 3}), &["num_kv_heads", "divisor"]),
        ("ministral", json!({"sliding_window": 0}), &["sliding_window", "0"]),
        (
            "olmo3",
            json!({"layer_types": ["linear_attention", "full_attention"]}),
            &["layer_types", "linear_attention"],
        ),
        (
            "exaone4",
            json!({"sliding_window_pattern": "LLGL", "layer_types": null}),
            &["sliding_window_pattern", "LLGL"],
        ),
        ("smollm3", json!({"no_rope_layers": [1]}), &["no_rope_layers", "2 numbers"]),
        ("mixtral", json!({"num_experts_per_tok": 5}), &["num_experts_per_tok", "4 experts"]),
        ("mixtral", json!({"num_local_experts": 0}), &["num_local_experts", "0"]),
        ("qwen3_moe", json!({"mlp_only_layers": ["a"]}), &["mlp_only_layers"]),
        (
            "phi3-longrope",
            json!({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}),
            &["short_factor", "4 numbers"],
        ),
        (
            "phi3-partial",
            json!({"rope_parameters": {"partial_rotary_factor": 1.5}}),
            &["partial_rotary_factor", "1.5"],
        ),
    ] {
        let path = testdata(&format!("arch/{folder}/config.json"));
        let config: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let message = read(&with(config, change.clone())).unwrap_err().to_string();
        assert!(parts.iter().all(|part| message.contains(part)), "{folder} {change}: {message}");
    }
}

#[test]
fn what_changes_the_mathematics_is_refused_by_name() {
    for (change, parts) in [
        (json!({"architectures": ["MambaForCausalLM"]}), &["architectures", "MambaForCausalLM"][..]),
        (json!({"architectures": ["Gemma3ForCausalML"]}), &["architectures", "nearest: Gemma3ForCausalLM"]),
        (json!({"architectures": ["LlamaModel"]}), &["architectures", "LlamaModel"]),
        (json!({"architectures": ["Qwen2ForCausalLM"]}), &["model_type", "qwen2", "llama"]),
        (json!({"architectures": [], "model_type": "rwkv"}), &["model_type", "rwkv"]),
        (json!({"architectures": null, "model_type": null}), &["architectures"]),
        (json!({"hidden_act": "gelu"}), &["hidden_act", "gelu", "silu"]),
        (json!({"hidden_size": 0}), &["hidden_size", "found 0"]),
        (json!({"hidden_size": -64}), &["hidden_size", "-64"]),
        (json!({"hidden_size": 1e30}), &["hidden_size"]),
        (json!({"hidden_size": null}), &["hidden_size", "null"]),
        (json!({"num_hidden_layers": 1_000_000_000_000u64}), &["num_hidden_layers"]),
        (json!({"vocab_size": u64::MAX}), &["vocab_size"]),
        (json!({"num_key_value_heads": 3}), &["num_key_value_heads", "divisor"]),
        (json!({"num_attention_heads": 6, "num_key_value_heads": 2}), &["num_attention_heads", "divisor"]),
        (json!({"head_dim": 15}), &["head_dim", "even"]),
        (json!({"rms_norm_eps": -1.0}), &["rms_norm_eps"]),
        (json!({"tie_word_embeddings": "yes"}), &["tie_word_embeddings", "yes"]),
        (json!({"eos_token_id": "</s>"}), &["eos_token_id"]),
        (json!({"rope_scaling": {"rope_type": "ntk"}}), &["rope_scaling.rope_type", "ntk"]),
        (json!({"quantization": {"bits": 4}}), &["quantization.group_size", "nothing"]),
        (json!({"quantization": {"bits": 7, "group_size": 64}}), &["quantization.bits", "7"]),
        (json!({"quantization": {"bits": 4, "group_size": 16}}), &["quantization.group_size", "16"]),
        (
            json!({"quantization": {"bits": 4, "group_size": 64, "mode": "mxfp4"}}),
            &["quantization.mode", "mxfp4"],
        ),
        (
            json!({"quantization": {"bits": 4, "group_size": 64, "a.b": {"group_size": 64, "bits": 7}}}),
            &["quantization.a.b.bits", "7"],
        ),
        (
            json!({"quantization_config": {"quant_method": "awq", "bits": 3, "group_size": 32}}),
            &["quantization_config.bits", "3"],
        ),
        (
            json!({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}}),
            &["quantization_config.version", "gemv"],
        ),
        (
            json!({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": false}}),
            &["quantization_config.zero_point", "false"],
        ),
        (json!({"quantization_config": {"quant_method": "kiln"}}), &["quantization_config.version"]),
        (
            json!({"quantization_config": {"quant_method": "kiln", "version": 2}}),
            &["quantization_config.version", "2"],
        ),
        (
            json!({"quantization_config": {"quant_method": "kiln", "version": 1, "extra": 0}}),
            &["quantization_config.extra"],
        ),
        (
            json!({"quantization_config": {"quant_method": "quanto", "bits": 4}}),
            &["quantization_config.quant_method", "quanto"],
        ),
        (
            json!({"quantization_config": {"bits": 4, "group_size": 64}}),
            &["quantization_config.quant_method"],
        ),
        (
            json!({"quantization_config": {"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": {
                "group_0": {"weights": {"num_bits": 4}}}}}),
            &["quantization_config.format", "marlin-24"],
        ),
        (
            json!({"quantization_config": {"load_in_4bit": true, "bnb_4bit_quant_type": "nf3"}}),
            &["quantization_config.bnb_4bit_quant_type", "nf3"],
        ),
    ] {
        let message = read(&with(tiny_config(), change.clone())).unwrap_err().to_string();
        assert!(message.contains("config.json: "), "{message}");
        assert!(parts.iter().all(|part| message.contains(part)), "{change}: {message}");
    }
    let opt = tiny_file("opt-f32", "config.json");
    for (change, part) in [
        (json!({"word_embed_proj_dim": 0}), "word_embed_proj_dim"),
        (json!({"activation_function": "gelu"}), "activation_function"),
        (json!({"num_attention_heads": 5}), "num_attention_heads"),
    ] {
        assert_error(read(&with(opt.clone(), change)), &["config.json", part]);
    }
}

#[test]
fn gemma4s_that_contradict_themselves_are_refused() {
    let config = |folder: &str| {
        let text = std::fs::read(testdata(&format!("arch/{folder}/config.json"))).unwrap();
        serde_json::from_slice::<Value>(&text).unwrap()
    };
    for (change, part) in [
        // The last block is full, and so finds no earlier one of its kind.
        (json!({"num_kv_shared_layers": 1}), "num_kv_shared_layers"),
        (json!({"num_kv_shared_layers": 2}), "num_kv_shared_layers"),
        (json!({"per_layer_config": {"1": {"head_dim": 7}}}), "head_dim"),
        (json!({"per_layer_config": {"2": {"head_dim": 8}}}), "per_layer_config"),
        (json!({"per_layer_config": {"1": {"head_dim": 16}, "01": {"head_dim": 8}}}), "per_layer_config"),
        (json!({"sliding_window": null}), "sliding_window"),
        (json!({"use_bidirectional_attention": "all"}), "use_bidirectional_attention"),
        (json!({"enable_moe_block": true}), "num_local_experts"),
    ] {
        let error = read(&with(config("gemma4_text"), change.clone()));
        assert_error(error, &["config.json", part]);
    }
    // Full blocks of two widths; a sharer whose heads are others than those of its source.
    for (change, part) in [
        (json!({"3": {"head_dim": 12}}), "head_dim"),
        (json!({"3": {"num_key_value_heads": 1, "head_dim": 16}}), "num_kv_shared_layers"),
    ] {
        let mut blocks = json!({"1": {"head_dim": 16}});
        blocks.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let changed = with(config("gemma4_text-shared"), json!({"per_layer_config": blocks}));
        assert_error(read(&changed), &["config.json", part]);
    }
    // Silence about single blocks means the class's widths, said once.
    let mut old = config("gemma4_text");
    old.as_object_mut().unwrap().remove("per_layer_config");
    let widths = |config: &Value| read(config).unwrap().model.layer_head_dims;
    assert_eq!(widths(&old), [8, 512]);
    assert_eq!(widths(&with(old, json!({"global_head_dim": 16, "per_layer_config": null}))), [8, 16]);
}

#[test]
fn gptq_settings_that_are_not_implemented_are_refused() {
    for (change, part) in [
        (json!({"bits": 5}), "quantization_config.bits"),
        (json!({"bits": null}), "quantization_config.bits"),
        (json!({"group_size": 0}), "quantization_config.group_size"),
        (json!({"group_size": null}), "quantization_config.group_size"),
        (json!({"group_size": -2}), "quantization_config.group_size"),
        (json!({"checkpoint_format": "marlin"}), "quantization_config.checkpoint_format"),
        (json!({"format": "bitblas"}), "quantization_config.format"),
        (json!({"pack_dtype": "int16"}), "quantization_config.pack_dtype"),
        (json!({"dynamic": {"a": {"bits": 7}}}), "quantization_config.dynamic.a.bits"),
        (json!({"adapter": {"rank": 4}}), "quantization_config.adapter"),
    ] {
        let gptq = with(json!({"quant_method": "gptq", "bits": 4, "group_size": 32}), change);
        assert_error(
            read(&with(tiny_config(), json!({"quantization_config": gptq}))),
            &["config.json", part],
        );
    }
}

#[test]
fn unknown_keys_are_listed_with_their_place() {
    let config = with(
        tiny_config(),
        json!({
            "surprise": 1,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "colour": "red"},
            "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": -1, "mood": "good"},
        }),
    );
    assert_eq!(
        read(&config).unwrap().unknown_keys,
        ["surprise", "rope_parameters.colour", "quantization_config.mood"]
    );
}

#[test]
fn special_tokens_come_from_both_files() {
    let folder = tempfile::tempdir().unwrap();
    let write =
        |name: &str, value: Value| std::fs::write(folder.path().join(name), value.to_string()).unwrap();
    let tokens = || config::read_folder(folder.path()).unwrap().special_tokens;
    write(
        "config.json",
        with(tiny_config(), json!({"bos_token_id": 5, "eos_token_id": 6, "pad_token_id": -1})),
    );
    assert_eq!(tokens(), SpecialTokens { bos: Some(5), eos: vec![6], pad: None });
    write("generation_config.json", json!({"eos_token_id": [7, 8], "pad_token_id": 9, "temperature": 0.6}));
    assert_eq!(tokens(), SpecialTokens { bos: Some(5), eos: vec![7, 8], pad: Some(9) });
    write("config.json", tiny_config());
    write("generation_config.json", json!({}));
    assert_eq!(tokens(), SpecialTokens { bos: Some(1), eos: vec![2], pad: None });
    write("config.json", with(tiny_config(), json!({"bos_token_id": null, "eos_token_id": null})));
    assert_eq!(tokens(), SpecialTokens::default());
    write("generation_config.json", json!({"eos_token_id": 1u64 << 40}));
    assert_error(config::read_folder(folder.path()), &["generation_config.json", "eos_token_id"]);
}

/// Any JSON value of small depth.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-4i64..300).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z0-9_:-]{0,9}".prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 8, 3, |inner| {
        let key =
            prop::sample::select(vec!["rope_type", "factor", "bits", "group_size", "quant_method", "x"]);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::vec((key.prop_map(String::from), inner), 0..3)
                .prop_map(|entries| Value::Object(entries.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn changed_configurations_never_panic(
        folder in prop::sample::select(vec!["llama-rope-yarn", "llama-rope3-headdim24-f32", "qwen3-untied-f32", "opt-f32", "llama-untied-gptq4-v1", "llama-untied-bnb-nf4-double"]),
        place in any::<prop::sample::Index>(), inner in any::<prop::sample::Index>(), value in any_json(),
    ) {
        let mut config = tiny_file(folder, "config.json");
        let object = config.as_object_mut().unwrap();
        let slot = object.values_mut().nth(place.index(30) % 24);
        match slot {
            Some(Value::Object(nested)) if !nested.is_empty() => {
                let length = nested.len();
                *nested.values_mut().nth(inner.index(length)).unwrap() = value;
            }
            Some(slot) => *slot = value,
            None => {}
        }
        if let Ok(FolderConfig { model: config, .. }) = read(&config) {
            prop_assert_eq!(config.layer_attention.len(), config.num_hidden_layers);
            prop_assert_eq!(config.num_attention_heads % config.num_key_value_heads, 0);
        }
    }
}
