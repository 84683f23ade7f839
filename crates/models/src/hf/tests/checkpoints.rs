//! The small checkpoints of `testdata/tiny`.

use kiln_testkit::Golden;

use super::*;

const FOLDERS: [&str; 14] = [
    "llama-rope-dynamic",
    "llama-rope-linear",
    "llama-rope-yarn",
    "llama-rope3-headdim24-f32",
    "llama-tied-f32-sharded",
    "llama-untied-bf16",
    "llama-untied-bnb-nf4-double",
    "llama-untied-f16",
    "llama-untied-gptq3-v2-actorder",
    "llama-untied-gptq4-v1",
    "mistral-swa8-f32",
    "opt-f32",
    "qwen2-tied-f32",
    "qwen3-untied-f32",
];

fn tiny(name: &str) -> HfFolder {
    HfFolder::open(testdata("tiny").join(name)).unwrap()
}

/// Names and shapes by the model's definition in transformers, written out independently of the reader.
fn expected_tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let mut expected = Vec::new();
    let mut add = |name: String, shape: &[usize]| expected.push((name, shape.to_vec()));
    let c = config;
    match c.family.model_type {
        "llama" | "mistral" | "qwen2" | "qwen3" => {
            let (query, key) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
            add("model.embed_tokens.weight".into(), &[c.vocab_size, c.hidden_size]);
            add("model.norm.weight".into(), &[c.hidden_size]);
            if !c.tie_word_embeddings {
                add("lm_head.weight".into(), &[c.vocab_size, c.hidden_size]);
            }
            for layer in 0..c.num_hidden_layers {
                let linears = [
                    ("self_attn.q_proj", query, c.hidden_size, c.biases.qkv),
                    ("self_attn.k_proj", key, c.hidden_size, c.biases.qkv),
                    ("self_attn.v_proj", key, c.hidden_size, c.biases.qkv),
                    ("self_attn.o_proj", c.hidden_size, query, c.biases.o),
                    ("mlp.gate_proj", c.intermediate_size, c.hidden_size, c.biases.mlp),
                    ("mlp.up_proj", c.intermediate_size, c.hidden_size, c.biases.mlp),
                    ("mlp.down_proj", c.hidden_size, c.intermediate_size, c.biases.mlp),
                ];
                for (name, outputs, inputs, bias) in linears {
                    add(format!("model.layers.{layer}.{name}.weight"), &[outputs, inputs]);
                    if bias {
                        add(format!("model.layers.{layer}.{name}.bias"), &[outputs]);
                    }
                }
                for name in ["input_layernorm", "post_attention_layernorm"] {
                    add(format!("model.layers.{layer}.{name}.weight"), &[c.hidden_size]);
                }
                if c.family.model_type == "qwen3" {
                    for name in ["q_norm", "k_norm"] {
                        add(format!("model.layers.{layer}.self_attn.{name}.weight"), &[c.head_dim]);
                    }
                }
            }
        }
        "opt" => {
            add("model.decoder.embed_tokens.weight".into(), &[c.vocab_size, c.hidden_size]);
            add(
                "model.decoder.embed_positions.weight".into(),
                &[c.max_position_embeddings + 2, c.hidden_size],
            );
            let mut modules = vec![("model.decoder.final_layer_norm".to_owned(), vec![c.hidden_size])];
            for layer in 0..c.num_hidden_layers {
                let square = vec![c.hidden_size, c.hidden_size];
                let mut module = |name: &str, shape| {
                    modules.push((format!("model.decoder.layers.{layer}.{name}"), shape));
                };
                for name in ["q_proj", "k_proj", "v_proj", "out_proj"] {
                    module(&format!("self_attn.{name}"), square.clone());
                }
                module("fc1", vec![c.intermediate_size, c.hidden_size]);
                module("fc2", vec![c.hidden_size, c.intermediate_size]);
                module("self_attn_layer_norm", vec![c.hidden_size]);
                module("final_layer_norm", vec![c.hidden_size]);
            }
            for (name, shape) in modules {
                add(format!("{name}.bias"), &shape[..1]);
                add(format!("{name}.weight"), &shape);
            }
        }
        other => panic!("no table for {other}"),
    }
    expected.sort();
    expected
}

#[test]
fn every_folder_has_the_tensors_of_its_configuration() {
    for name in FOLDERS {
        let folder = tiny(name);
        assert_eq!(folder.unknown_keys(), [""; 0], "{name}");
        assert_eq!(folder.notes(), [""; 0], "{name}");
        let found: Vec<_> = folder
            .names()
            .into_iter()
            .map(|tensor| {
                let shape = folder.dense(&tensor).unwrap_or_else(|error| panic!("{name}: {error}")).shape;
                assert!(folder.contains(&tensor));
                (tensor, shape)
            })
            .collect();
        assert_eq!(found, expected_tensors(folder.config()), "{name}");
    }
}

#[test]
fn packed_modules_are_packed_and_others_dense() {
    for (name, scheme) in [
        ("llama-untied-bnb-nf4-double", "nf4:64:double"),
        ("llama-untied-gptq4-v1", "affine4:32:int"),
        ("llama-untied-gptq3-v2-actorder", "affine3:32:int"),
    ] {
        let folder = tiny(name);
        let weight = packed(&folder, "model.layers.1.mlp.down_proj");
        assert_eq!((weight.d_input, weight.d_output), (128, 64), "{name}");
        assert_eq!(weight.scheme.to_string(), scheme, "{name}");
        assert_eq!(weight.input_order.is_some(), name.ends_with("actorder"), "{name}");
        assert_eq!(folder.dense("model.layers.1.mlp.down_proj.weight").unwrap().values, weight.dequantize());
        let StoredWeight::Dense(head) = folder.weight("lm_head").unwrap() else {
            panic!("{name}: packed head")
        };
        assert_eq!(head.shape, [256, 64]);
        assert_error(
            folder.weight("model.layers.9.mlp.down_proj"),
            &[name, "model.layers.9.mlp.down_proj.weight"],
        );
    }
    assert_eq!(
        tiny("llama-untied-bnb-nf4-double").storage(),
        &Quantization::BitsAndBytes { codebook: Codebook::Nf4, double: true }
    );
    assert_eq!(
        tiny("llama-untied-gptq3-v2-actorder").storage(),
        &Quantization::Gptq(GptqConfig {
            bits: 3,
            group_size: Some(32),
            desc_act: true,
            sym: false,
            zeros: Some(ZeroFormat::V2),
            overrides: vec![],
        })
    );
    assert_eq!(tiny("llama-untied-f16").storage(), &Quantization::None);
}

/// The bnb folder was saved from `llama-untied-bf16`: no weight is further from it than half the widest gap of NF4
/// (0.304 between -1 and -0.696), with 2 % of the largest weight for the rounded scales.
#[test]
fn bitsandbytes_weights_stay_near_the_model_they_were_made_from() {
    let (packed, original) = (tiny("llama-untied-bnb-nf4-double"), tiny("llama-untied-bf16"));
    assert_eq!(packed.names(), original.names());
    for name in packed.names().iter().filter(|name| name.contains("proj")) {
        let (found, expected) = (packed.dense(name).unwrap().values, original.dense(name).unwrap().values);
        let largest = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        for (block, original) in found.chunks(64).zip(expected.chunks(64)) {
            let absmax = original.iter().fold(0f32, |largest, value| largest.max(value.abs()));
            for (found, expected) in block.iter().zip(original) {
                assert!(
                    (found - expected).abs() <= 0.152 * absmax + 0.02 * largest,
                    "{name}: {found} {expected}"
                );
            }
        }
    }
}

#[test]
fn a_checkpoint_reads_the_same_from_shards_and_from_one_file() {
    let sharded = tiny("llama-tied-f32-sharded");
    let tensors: Vec<_> =
        sharded.names().iter().map(|name| (name.clone(), sharded.tensors.read(name).unwrap())).collect();
    let borrowed: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.clone())).collect();
    let single = folder(&tiny_config(), &borrowed);
    let single = HfFolder::open(single.path()).unwrap();
    assert_eq!(single.names(), sharded.names());
    for name in sharded.names() {
        assert_eq!(single.dense(&name).unwrap(), sharded.dense(&name).unwrap());
    }
}

#[test]
fn missing_shards_and_truncated_files_name_the_file() {
    let source = testdata("tiny/llama-tied-f32-sharded");
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(source).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    assert!(HfFolder::open(copy.path()).is_ok());
    let shard = copy.path().join("model-00003-of-00004.safetensors");
    let bytes = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &bytes[..bytes.len() - 4]).unwrap();
    assert_error(HfFolder::open(copy.path()), &["model-00003-of-00004.safetensors", "header"]);
    std::fs::remove_file(&shard).unwrap();
    assert_error(HfFolder::open(copy.path()), &["model-00003-of-00004.safetensors"]);
    assert_error(HfFolder::open(copy.path().join("nowhere")), &["nowhere", "config.json"]);
}

#[test]
fn a_file_cut_while_open_is_an_error() {
    let made = folder(&tiny_config(), &[("a", f32s(&[1.0, 2.0]))]);
    let open = HfFolder::open(made.path()).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(made.path().join("model.safetensors")).unwrap();
    file.set_len(file.metadata().unwrap().len() - 1).unwrap();
    assert_error(open.dense("a"), &["model.safetensors"]);
}

#[test]
fn values_that_are_not_finite_are_refused_by_name() {
    let made = folder(&tiny_config(), &[("a.weight", f32s(&[1.0, f32::NAN])), ("b", f32s(&[f32::INFINITY]))]);
    let folder = HfFolder::open(made.path()).unwrap();
    assert_error(folder.weight("a"), &["model.safetensors: a.weight", "NaN at element 1"]);
    assert_error(folder.dense("b"), &["model.safetensors: b", "inf at element 0"]);
}

#[test]
fn experts_in_mxfp4_are_what_transformers_makes_of_them() {
    let golden = Golden::open("arch/mxfp4/golden.safetensors");
    let made = tempfile::tempdir().unwrap();
    let config = json!({
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "vocab_size": 96, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    });
    std::fs::write(made.path().join("config.json"), config.to_string()).unwrap();
    let bytes = std::fs::read(testdata("arch/mxfp4/golden.safetensors")).unwrap();
    let all = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let stored = all.tensors().into_iter().filter(|(name, _)| !name.starts_with("expected"));
    let weights = made.path().join("model.safetensors");
    safetensors::serialize_to_file(stored, None, &weights).unwrap();
    let folder = HfFolder::open(made.path()).unwrap();
    assert_eq!(folder.unknown_keys(), Vec::<String>::new());
    // `[d_input, d_output]` of each expert.
    let expected = |name: &str, expert: usize, input: usize, output: usize| {
        let shape = golden.shape(&format!("expected.{name}"));
        let at = (expert * shape[1] + input) * shape[2] + output;
        golden.floats(&format!("expected.{name}"))[at]
    };
    for expert in 0..2 {
        for (linear, name, first, step) in [
            ("gate_proj", "gate_up_proj", 0, 2),
            ("up_proj", "gate_up_proj", 1, 2),
            ("down_proj", "down_proj", 0, 1),
        ] {
            let found =
                folder.dense(&format!("model.layers.0.mlp.experts.{expert}.{linear}.weight")).unwrap();
            let stored = folder.weight(&format!("model.layers.0.mlp.experts.{expert}.{linear}")).unwrap();
            let StoredWeight::Packed(packed) = stored else { panic!("a dense expert") };
            assert_eq!(packed.scheme.to_string(), "mxfp4:32:bf16");
            let [rows, inputs] = found.shape.as_slice().try_into().unwrap();
            for row in [0, 1, rows / 2, rows - 1] {
                for input in 0..inputs {
                    let value = found.values[row * inputs + input];
                    assert_eq!(
                        value,
                        expected(name, expert, input, first + row * step),
                        "{linear} {row} {input}"
                    );
                }
            }
        }
    }
    // A stack of other sizes is refused by name.
    let mut config = config;
    config["num_local_experts"] = json!(3);
    std::fs::write(made.path().join("config.json"), config.to_string()).unwrap();
    let message = HfFolder::open(made.path()).unwrap_err().to_string();
    assert!(message.contains("gate_up_proj") && message.contains("[3,"), "{message}");
}
