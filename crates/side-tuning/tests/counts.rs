//! Sizes, memory and multiplications against the reference and the published figures.

use kiln_models::{Recompute, config::ModelConfig};
use kiln_side_tuning::{
    Downsample, GateShape, HeadMix, SideConfig,
    memory::{
        Method,
        paper::{PaperMemory, PaperMethod, PaperModel, kept_states},
        step_macs,
    },
};
use kiln_testkit::testdata;
use serde_json::{Value, json};

fn open(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(testdata("vectors").join(name)).unwrap()).unwrap()
}

pub(crate) fn llama(
    vocabulary: usize,
    hidden: usize,
    ffn: usize,
    layers: usize,
    heads: [usize; 2],
) -> ModelConfig {
    let text = json!({
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
    });
    ModelConfig::from_json(&text.to_string()).unwrap()
}

fn model(entry: &Value) -> ModelConfig {
    let size = |key: &str| entry[key].as_u64().unwrap() as usize;
    if entry["arch"] == "llama" {
        let heads = [size("heads"), size("kv_heads")];
        return llama(32000, size("hidden"), size("ffn"), size("layers"), heads);
    }
    let text = json!({
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": size("hidden"),
        "ffn_dim": size("ffn"),
        "num_hidden_layers": size("layers"),
        "num_attention_heads": size("heads"),
    });
    ModelConfig::from_json(&text.to_string()).unwrap()
}

/// The released code's shapes of gates and alpha.
fn released() -> SideConfig {
    SideConfig::qst()
        .with_gate(GateShape::Vector, 0.5)
        .with_mix(HeadMix::Raw { init: 1.0 }, GateShape::Vector)
}

fn compare(name: &str, config: &SideConfig, backbone: &ModelConfig, expected: &Value) {
    let counts = config.parameter_counts(backbone).unwrap();
    for (part, found) in [
        ("layers", counts.blocks),
        ("down", counts.downsample),
        ("up", counts.upsample),
        ("gates", counts.gates),
        ("norm", counts.norm),
        ("total", counts.total()),
    ] {
        assert_eq!(found as u64, expected[part].as_u64().unwrap(), "{name} {part}");
    }
}

#[test]
fn parameters_are_as_many_as_the_reference_counts() {
    let file = open("side_tuning_counts.json");
    for (name, entry) in file["expected"].as_object().unwrap() {
        let backbone = model(entry);
        let head = released().side_model(&backbone).unwrap().head_dim;
        assert_eq!(head as u64, entry["side_head_dim"].as_u64().unwrap(), "{name}");
        compare(name, &released(), &backbone, &entry["qst_r16_adapter16"]);
    }
    let backbone = model(&file["expected"]["LLaMA-2-7B"]);
    for (name, kind) in [
        ("linear", Downsample::Linear),
        ("lora", Downsample::Lora),
        ("adapter", Downsample::Adapter),
        ("maxpool", Downsample::MaxPool),
    ] {
        let mut config = released().with_downsample(kind);
        // The reference counts low-rank modules with their LayerNorm.
        config.downsample_norm = kind.is_low_rank();
        compare(name, &config, &backbone, &file["downsample_ablation_llama2_7b"][name]);
    }
}

/// All parameters, as the formula's weights count them.
fn parameters(name: &str) -> Option<f64> {
    let billions = match name {
        "LLaMA-2-7B" => 6.738_415_616,
        "LLaMA-2-13B" => 13.015_864_32,
        "LLaMA-2-70B" => 68.976_648_192,
        other => other.strip_prefix("OPT-")?.strip_suffix('B')?.parse().ok()?,
    };
    Some(billions * 1e9)
}

#[test]
fn the_memory_formula_gives_the_published_figures() {
    let (file, counts) = (open("side_tuning_memory.json"), open("side_tuning_counts.json"));
    let mut compared = 0;
    for row in file["rows"].as_array().unwrap() {
        let name = row["model"].as_str().unwrap();
        let (Some(parameters), Some(entry)) = (parameters(name), counts["expected"].get(name)) else {
            continue;
        };
        let number = |key: &str| entry[key].as_f64().unwrap();
        let model = PaperModel {
            parameters,
            width: number("hidden"),
            layers: number("layers"),
            heads: number("heads"),
        };
        let (batch, length) = (row["batch"].as_f64().unwrap(), row["seq"].as_f64().unwrap());
        let trained = entry["qst_r16_adapter16"]["total"].as_f64().unwrap();
        let memory = |method, fused| PaperMemory::new(&model, method, batch, length, fused);
        let qlora = PaperMethod::Qlora(number("qlora_r64_all_linear"));
        let qst = PaperMethod::Qst(trained, 16.0);
        let check = |what: &str, found: f64, expected: &Value| {
            // Two decimals, and the rounding of nominal parameter counts.
            let expected = expected.as_f64().unwrap();
            assert!((found / 1e9 - expected).abs() < 0.011, "{name} {what}: {found} {expected}");
        };
        let formula = &row["formula_gb"];
        check("qlora", memory(qlora, false).total(), &formula["qlora"]);
        check("qst", memory(qst, false).total(), &formula["qst"]);
        check("activations", memory(qlora, false).activations, &formula["activations_full"]);
        check("activations of qst", memory(qst, false).activations, &formula["activations_qst"]);
        let fused = &row["fused_attention_gb"];
        check("fused qlora", memory(qlora, true).total(), &fused["qlora"]);
        check("fused qst", memory(qst, true).total(), &fused["qst"]);
        check("states", kept_states(&model, batch, length), &row["saved_backbone_features_gb"]);
        if let Some(reported) = row["reported_gb"]["qst"].as_f64() {
            let found = memory(qst, false).total() / 1e9;
            assert!((found / reported - 1.0).abs() < 0.023, "{name}: {found} {reported}");
        }
        compared += 1;
    }
    assert_eq!(compared, 13);
}

#[test]
fn the_figure_of_the_70b_model_adds_up() {
    let model = PaperModel { parameters: 70e9, width: 8192.0, layers: 80.0, heads: 64.0 };
    let gigabytes = |method| {
        let memory = PaperMemory::new(&model, method, 16.0, 384.0, false);
        [memory.weights, memory.optimizer, memory.activations].map(|bytes| (bytes / 1e9).round())
    };
    assert_eq!(gigabytes(PaperMethod::Full), [140.0, 420.0, 197.0]);
    assert_eq!(gigabytes(PaperMethod::Lst(0.0, 8.0))[2], 78.0);
    assert_eq!(gigabytes(PaperMethod::Qst(282_944_000.0, 16.0)), [36.0, 4.0, 69.0]);
    assert_eq!(gigabytes(PaperMethod::Lora(0.0))[0], 140.0);
}

#[test]
fn multiplications_say_how_much_faster_a_step_can_be() {
    let ratio = |model: &ModelConfig, recompute| {
        let macs = |method: &Method, recompute| step_macs(model, method, recompute, 256).unwrap();
        let side = Method::Side(SideConfig::qst());
        macs(&Method::Lora { rank: 16 }, recompute) / macs(&side, Recompute::None)
    };
    let smollm2 = llama(49152, 576, 1536, 30, [9, 3]);
    let large = llama(32000, 4096, 11008, 32, [32, 32]);
    // The head, a fifth of SmolLM2, is gone through twice by both.
    let near = |found: f64, expected: f64| assert!((found - expected).abs() < 0.05, "{found} {expected}");
    near(ratio(&smollm2, Recompute::None), 1.74);
    near(ratio(&smollm2, Recompute::Block), 2.4);
    near(ratio(&large, Recompute::None), 2.0);
    near(ratio(&large, Recompute::Block), 2.9);
}
