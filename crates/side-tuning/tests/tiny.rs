//! Whole side-tuned models against the reference: states, logits, losses, gradients.

use std::collections::BTreeMap;

use kiln_models::{CausalLm, Recompute, TokenBatch};
use kiln_quant_core::safetensors_file::{NewTensor, Values, write_safetensors};
use kiln_side_tuning::{GateShape, HeadMix, Share, SideConfig, SideTuned, WEIGHTS_FILE};
use kiln_testkit::{assert_close, read, testdata};
use serde_json::{Value, json};

use crate::common::{self, Base, next_token_gradients};

fn open(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(testdata("vectors").join(name)).unwrap()).unwrap()
}

fn shape(value: &Value) -> Vec<usize> {
    match value.as_array() {
        Some(items) => [vec![items.len()], shape(&items[0])].concat(),
        None => vec![],
    }
}

fn floats(value: &Value) -> Vec<f32> {
    match value {
        Value::Array(items) => items.iter().flat_map(floats).collect(),
        number => vec![number.as_f64().expect("a number") as f32],
    }
}

fn write(path: &std::path::Path, tensors: &BTreeMap<String, &Value>) {
    let values: Vec<_> =
        tensors.iter().map(|(name, value)| (name.clone(), shape(value), floats(value))).collect();
    let tensors: Vec<_> = values
        .iter()
        .map(|(name, shape, values)| NewTensor {
            name: name.clone(),
            shape: shape.clone(),
            values: Values::F32(values),
        })
        .collect();
    write_safetensors(path, &tensors, &BTreeMap::new()).unwrap();
}

/// `[reference, checkpoint]` names of a block's tensors.
type Names = &'static [[&'static str; 2]];

const LLAMA: Names = &[
    ["q", "self_attn.q_proj.weight"],
    ["k", "self_attn.k_proj.weight"],
    ["v", "self_attn.v_proj.weight"],
    ["o", "self_attn.o_proj.weight"],
    ["gate", "mlp.gate_proj.weight"],
    ["up", "mlp.up_proj.weight"],
    ["down", "mlp.down_proj.weight"],
    ["n1", "input_layernorm.weight"],
    ["n2", "post_attention_layernorm.weight"],
];

const OPT: Names = &[
    ["q_w", "self_attn.q_proj.weight"],
    ["q_b", "self_attn.q_proj.bias"],
    ["k_w", "self_attn.k_proj.weight"],
    ["k_b", "self_attn.k_proj.bias"],
    ["v_w", "self_attn.v_proj.weight"],
    ["v_b", "self_attn.v_proj.bias"],
    ["o_w", "self_attn.out_proj.weight"],
    ["o_b", "self_attn.out_proj.bias"],
    ["ln1_w", "self_attn_layer_norm.weight"],
    ["ln1_b", "self_attn_layer_norm.bias"],
    ["fc1_w", "fc1.weight"],
    ["fc1_b", "fc1.bias"],
    ["fc2_w", "fc2.weight"],
    ["fc2_b", "fc2.bias"],
    ["ln2_w", "final_layer_norm.weight"],
    ["ln2_b", "final_layer_norm.bias"],
];

/// What a reference's side network is called in files.
fn side_tensors(side: &Value, blocks: Names) -> BTreeMap<String, &Value> {
    let mut tensors = BTreeMap::new();
    for (index, module) in side["down"].as_array().unwrap().iter().enumerate() {
        for [key, name] in
            [["A", "down.weight"], ["B", "up.weight"], ["ln_w", "norm.weight"], ["ln_b", "norm.bias"]]
        {
            tensors.insert(format!("downsample.{index}.{name}"), &module[key]);
        }
    }
    for (index, block) in side["layers"].as_array().unwrap().iter().enumerate() {
        for [key, name] in blocks {
            tensors.insert(format!("blocks.{index}.{name}"), &block[*key]);
        }
    }
    for [key, name] in [
        ["norm", "norm.weight"],
        ["lnf_w", "norm.weight"],
        ["lnf_b", "norm.bias"],
        ["up_W", "upsample.weight"],
        ["up_b", "upsample.bias"],
    ] {
        if let Some(value) = side.get(key) {
            tensors.insert(name.into(), value);
        }
    }
    tensors
}

fn backbone(file: &Value, folder: &std::path::Path) -> Base {
    let weights = &file["inputs"]["backbone"];
    let mut tensors = BTreeMap::new();
    let is_opt = weights.get("pos").is_some();
    let (prefix, blocks) = if is_opt { ("model.decoder", OPT) } else { ("model", LLAMA) };
    tensors.insert(format!("{prefix}.embed_tokens.weight"), &weights["embed"]);
    for (index, block) in weights["layers"].as_array().unwrap().iter().enumerate() {
        for [key, name] in blocks {
            tensors.insert(format!("{prefix}.layers.{index}.{name}"), &block[*key]);
        }
    }
    let config = if is_opt {
        tensors.insert("model.decoder.embed_positions.weight".into(), &weights["pos"]);
        tensors.insert("model.decoder.final_layer_norm.weight".into(), &weights["lnf_w"]);
        tensors.insert("model.decoder.final_layer_norm.bias".into(), &weights["lnf_b"]);
        json!({
            "model_type": "opt", "architectures": ["OPTForCausalLM"], "vocab_size": 11, "hidden_size": 8,
            "word_embed_proj_dim": 8, "ffn_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "max_position_embeddings": 5, "do_layer_norm_before": true, "activation_function": "relu",
            "enable_bias": true, "layer_norm_elementwise_affine": true, "tie_word_embeddings": true,
        })
    } else {
        tensors.insert("model.norm.weight".into(), &weights["norm"]);
        tensors.insert("lm_head.weight".into(), &weights["lm_head"]);
        json!({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "vocab_size": 11,
            "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "max_position_embeddings": 16, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "tie_word_embeddings": false, "attention_bias": false, "mlp_bias": false,
        })
    };
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    write(&folder.join("model.safetensors"), &tensors);
    common::load(folder, None)
}

/// The reference's side network beside `base`, as [`SideTuned::load`] reads it.
fn side_tuned(file: &Value, case: &Value, base: Base, blocks: Names) -> SideTuned<Base> {
    let shape = |value: &Value| if floats(value).len() == 1 { GateShape::Scalar } else { GateShape::Vector };
    let init = 0.0;
    let mix = match case["head_mode"].as_str().unwrap() {
        "raw" => HeadMix::Raw { init },
        "sigmoid_backbone" => HeadMix::Sigmoid { init, share: Share::Backbone },
        "sigmoid_side" => HeadMix::Sigmoid { init, share: Share::Side },
        other => panic!("{other}"),
    };
    let config = SideConfig::qst()
        .with_reduction(2)
        .with_rank(2)
        .with_gate(shape(&case["gamma"][0]), 0.0)
        .with_mix(mix, shape(&case["alpha"]));
    let folder = tempfile::tempdir().unwrap();
    SideTuned::new(base.clone(), &config, 1).unwrap().save(folder.path()).unwrap();
    let mut tensors = side_tensors(&file["inputs"]["side"], blocks);
    for (index, gamma) in case["gamma"].as_array().unwrap().iter().enumerate() {
        tensors.insert(format!("gates.{index}.gamma"), gamma);
    }
    tensors.insert("mix.alpha".into(), &case["alpha"]);
    write(&folder.path().join(WEIGHTS_FILE), &tensors);
    common::without_hash(folder.path());
    SideTuned::load(base, folder.path()).unwrap()
}

fn check_states(model: &SideTuned<Base>, expected: &Value, ids: &[u32], tolerance: f32) {
    let context = model.context(&TokenBatch::new(&[ids.to_vec()]).unwrap(), None).unwrap();
    let streams: Vec<_> = (0..2).fold(vec![model.embed(&context)], |mut streams, index| {
        streams.push(model.block(index, streams[index].clone(), &context, None));
        streams
    });
    for (index, stream) in streams.iter().enumerate() {
        let part = |from, size| read(stream.clone().narrow(2, from, size));
        assert_close(&format!("h_f {index}"), &part(0, 8), &floats(&expected["h_f"][index]), tolerance);
        assert_close(&format!("h_g {index}"), &part(8, 4), &floats(&expected["h_g"][index]), tolerance);
    }
}

fn check(name: &str, blocks: Names) {
    let file = open(name);
    let folder = tempfile::tempdir().unwrap();
    let base = backbone(&file, folder.path());
    let ids: Vec<u32> = floats(&file["inputs"]["ids"]).iter().map(|&id| id as u32).collect();
    let tolerance = file["tolerance"].as_f64().unwrap() as f32;
    for (case_name, case) in file["cases"].as_object().unwrap() {
        let expected = &case["expected"];
        let model = side_tuned(&file, case, base.clone(), blocks);
        if expected.get("h_f").is_some() {
            check_states(&model, expected, &ids, tolerance);
        }
        let context = model.context(&TokenBatch::new(std::slice::from_ref(&ids)).unwrap(), None).unwrap();
        let x = model.residual(&context, None);
        let mixed = model.final_norm(x);
        if let Some(values) = expected.get("mixed") {
            assert_close(&format!("{case_name} mixed"), &read(mixed.clone()), &floats(values), tolerance);
        }
        let logits = read(model.lm_head(mixed));
        assert_close(&format!("{case_name} logits"), &logits, &floats(&expected["logits"]), tolerance);
        let plain = read(
            base.forward(&base.context(&TokenBatch::new(std::slice::from_ref(&ids)).unwrap(), None).unwrap()),
        );
        if case_name == "paper" {
            assert_eq!(logits, plain, "the paper's mix starts at the backbone");
        }
        if let Some(values) = expected.get("backbone_logits") {
            assert_close("backbone", &plain, &floats(values), tolerance);
        }
        let training = burn::module::Module::train(model);
        for recompute in [Recompute::None, Recompute::Block] {
            let (loss, gradients) = next_token_gradients(&training, &ids, recompute);
            let what = format!("{case_name} {recompute:?}");
            assert!(
                (loss - expected["loss"].as_f64().unwrap()).abs() < f64::from(tolerance),
                "{what} {loss}"
            );
            check_gradients(&what, &gradients, expected, blocks, tolerance);
        }
    }
}

fn check_gradients(
    what: &str,
    gradients: &BTreeMap<String, Vec<f32>>,
    expected: &Value,
    blocks: Names,
    tolerance: f32,
) {
    assert!(gradients.keys().all(|name| name.starts_with("side.")), "{what}: {:?}", gradients.keys());
    let norm = gradients.values().flatten().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
    let wanted = expected["grad_global_norm"].as_f64().unwrap();
    assert!((norm / wanted - 1.0).abs() < f64::from(tolerance), "{what}: {norm} {wanted}");
    let compare = |name: &str, values: &Value| {
        let found = gradients.get(&format!("side.{name}")).unwrap_or_else(|| panic!("{what}: no {name}"));
        assert_close(&format!("{what} {name}"), found, &floats(values), tolerance);
    };
    for (index, gamma) in expected["grad_gamma"].as_array().unwrap().iter().enumerate() {
        compare(&format!("gates.{index}.gamma"), gamma);
    }
    compare("mix.alpha", &expected["grad_alpha"]);
    if let Some(side) = expected.get("grad_side") {
        let all = side_tensors(side, blocks);
        assert_eq!(all.len() + 3, gradients.len(), "{what}: every parameter is compared");
        all.iter().for_each(|(name, values)| compare(name, values));
    }
    for (key, name) in [("grad_down0_A", "downsample.0.down.weight"), ("grad_up_W", "upsample.weight")] {
        if let Some(values) = expected.get(key) {
            compare(name, values);
        }
    }
}

#[test]
fn llama_is_as_the_reference() {
    check("side_tuning_llama_tiny.json", LLAMA);
}

#[test]
fn opt_is_as_the_reference() {
    check("side_tuning_opt_tiny.json", OPT);
}
