//! Folders: there and back, plain where they can be, padded for everybody.

use std::path::Path;

use kiln_models::export::{ExportOptions, FloatType};
use kiln_pruning::{
    BlockPruning, Criterion, CutOptions, HiddenPruning, LayerPruning, LayerRange, Pruned, PruningRecord,
    SaveFormat, SavedCheckpoint, load_pruned, save_padded, save_pruned,
};
use kiln_quant_core::safetensors_file::{NewTensor, Values, write_safetensors};
use kiln_testkit::assert_close;
use serde_json::{Value, json};

use super::*;

const TOLERANCE: f32 = 2e-5;

/// Prunes the given blocks by magnitude.
fn prune(folder: &str, start: usize, compensate: bool) -> (Pruned, PruningRecord) {
    let model = load(folder);
    let original = model.config().clone();
    let mut pruning = BlockPruning::new(Criterion::L1, 0.5);
    pruning.layers = LayerRange::Between { start, end: 2 };
    pruning.bias_compensation = compensate;
    let pruned = pruning.prune(model, Some(&calibration()), &CutOptions::default()).unwrap();
    let record = PruningRecord::new(original, &pruning, &pruned.report).unwrap();
    (pruned, record)
}

#[test]
fn a_record_written_before_families_had_descriptions_is_read() {
    let text = std::fs::read_to_string(testdata("pruning/record_of_e68b09a.json")).unwrap();
    let record: PruningRecord = serde_json::from_str(&text).unwrap();
    let original = Checkpoint::open(testdata("models/tiny-llama")).unwrap().config().clone();
    assert_eq!(record.original, original);
    // Written again it is today's form, and the same record.
    let again: PruningRecord = serde_json::from_value(serde_json::to_value(&record).unwrap()).unwrap();
    assert_eq!(again, record);
}

fn f32s() -> ExportOptions {
    ExportOptions::new(FloatType::F32)
}

fn save(pruned: &Pruned, record: &PruningRecord, folder: &Path, name: &str) -> SavedCheckpoint {
    let format = SaveFormat::HuggingFace(f32s());
    save_pruned(&pruned.model, record, &checkpoint(name), &format, folder).unwrap()
}

fn reload(folder: &Path) -> (Decoder<QuantLinear>, PruningRecord) {
    let (model, report, record) =
        load_pruned(folder, &LoadOptions::default().in_f32(), &Device::flex()).unwrap();
    assert_eq!(report.notes, [""; 0]);
    (model, record)
}

#[test]
fn folders_come_back_bit_for_bit_with_the_shape_of_each_block() {
    for name in FOLDERS {
        for (start, compensate) in [(0, false), (1, false), (0, true), (1, true)] {
            let (pruned, record) = prune(name, start, compensate);
            let folder = tempfile::tempdir().unwrap();
            let saved = save(&pruned, &record, folder.path(), name);
            assert_eq!(saved.extensions.contains(&"per_layer_config".to_string()), start == 1, "{name}");
            let (model, found) = reload(folder.path());
            assert_eq!(found, record);
            assert_eq!(model.slot_shapes(), pruned.model.slot_shapes());
            let tokens = tokens(name);
            assert_eq!(logits(&model, &tokens), logits(&pruned.model, &tokens), "{name}");
        }
    }
}

#[test]
fn equal_widths_make_a_plain_checkpoint() {
    let keys = |name: &str, compensate: bool| {
        let (pruned, record) = prune(name, 0, compensate);
        save(&pruned, &record, tempfile::tempdir().unwrap().path(), name).extensions
    };
    for name in &FOLDERS[..5] {
        assert_eq!(keys(name, false), [""; 0], "{name}");
    }
    // LLaMA's class can have all biases, and Qwen2 with all of them is LLaMA.
    for name in ["llama-untied-bf16", "llama-rope3-headdim24-f32", "qwen2-tied-f32"] {
        assert_eq!(keys(name, true), [""; 0], "{name}");
    }
    for name in ["mistral-swa8-f32", "qwen3-untied-f32"] {
        assert_eq!(keys(name, true), ["kiln"], "{name}");
    }
    // transformers' OPT can't have fewer heads than width / head_dim.
    assert_eq!(keys("opt-f32", false), ["head_dim"]);
}

#[test]
fn padding_changes_nothing_but_the_shape() {
    for name in FOLDERS {
        for compensate in [false, true] {
            let (pruned, record) = prune(name, 1, compensate);
            let folder = tempfile::tempdir().unwrap();
            save_padded(&pruned.model, &record, &checkpoint(name), &f32s(), folder.path()).unwrap();
            let padded = Checkpoint::open(folder.path()).unwrap();
            let (model, _) = padded.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
            if !compensate {
                assert_eq!(padded.config(), checkpoint(name).config(), "{name}");
            }
            assert_eq!(model.slot_shapes(), load(name).slot_shapes());
            let tokens = tokens(name);
            assert_close(name, &logits(&model, &tokens), &logits(&pruned.model, &tokens), TOLERANCE);
        }
    }
}

#[test]
fn narrow_and_shallow_models_come_back_too() {
    for name in FOLDERS {
        let (model, tokens) = (load(name), tokens(name));
        let hidden = HiddenPruning::new(Criterion::L2, 0.25);
        let layers = LayerPruning::new(1);
        let options = CutOptions::default();
        let narrow = hidden.prune(model.clone(), None, &options).unwrap();
        let shallow = layers.prune(model.clone(), &calibration(), &options).unwrap();
        for pruned in [narrow, shallow] {
            let record =
                PruningRecord::new(model.config().clone(), &json!("by hand"), &pruned.report).unwrap();
            let folder = tempfile::tempdir().unwrap();
            save(&pruned, &record, &folder.path().join("cut"), name);
            assert_eq!(
                logits(&reload(&folder.path().join("cut")).0, &tokens),
                logits(&pruned.model, &tokens),
                "{name}"
            );
            let padded = save_padded(&pruned.model, &record, &checkpoint(name), &f32s(), folder.path());
            let expected = format!("padding: expected all 2 blocks of width {}", model.config().hidden_size);
            assert!(padded.unwrap_err().to_string().contains(&expected), "{name}");
        }
    }
}

#[test]
fn a_pruned_checkpoint_can_be_pruned_again() {
    let (pruned, record) = prune("qwen2-tied-f32", 1, false);
    let folder = tempfile::tempdir().unwrap();
    save(&pruned, &record, folder.path(), "qwen2-tied-f32");
    let (model, record) = reload(folder.path());
    let mut pruning = BlockPruning::new(Criterion::TaylorFirst, 0.5);
    pruning.layers = LayerRange::All;
    // The second block has one key-value head left.
    let error = pruning.prune(model.clone(), Some(&calibration()), &CutOptions::default()).unwrap();
    assert_eq!(error.report.kept.layers[1].heads, [0]);
    pruning.head_rounding = kiln_pruning::HeadRounding::Nearest;
    let error = pruning.prune(model.clone(), Some(&calibration()), &CutOptions::default()).unwrap_err();
    assert!(
        error.to_string().contains("model.layers.1.self_attn: ratio 0.5 removes all 1 key-value"),
        "{error}"
    );
    pruning.head_rounding = kiln_pruning::HeadRounding::Floor;
    let again = pruning.prune(model, Some(&calibration()), &CutOptions::default()).unwrap();
    let record = record.then(&pruning, &again.report).unwrap();
    let widths: Vec<usize> = record.kept.layers.iter().map(|layer| layer.channels.len()).collect();
    assert_eq!(widths, [64, 32]);
    // The record counts from the first original.
    let tokens = tokens("qwen2-tied-f32");
    let expected = logits(&masked(load("qwen2-tied-f32"), &record.kept), &tokens);
    assert_close("again", &logits(&again.model, &tokens), &expected, TOLERANCE);
}

#[test]
fn other_types_and_packed_weights_come_back_as_they_are() {
    let (pruned, record) = prune("llama-untied-bf16", 1, false);
    let source = checkpoint("llama-untied-bf16");
    let folder = tempfile::tempdir().unwrap();
    // The fixture's weights are bf16, so writing them as such loses nothing.
    let format = SaveFormat::HuggingFace(ExportOptions::new(FloatType::Bf16));
    save_pruned(&pruned.model, &record, &source, &format, folder.path()).unwrap();
    let tokens = tokens("llama-untied-bf16");
    assert_eq!(logits(&reload(folder.path()).0, &tokens), logits(&pruned.model, &tokens));

    let options = LoadOptions::uniform("nf4:32".parse().unwrap()).in_f32();
    let (model, _) = source.load(&options, &Device::flex()).unwrap();
    let mut pruning = BlockPruning::new(Criterion::L1, 0.5);
    pruning.layers = LayerRange::Between { start: 1, end: 2 };
    let pruned = pruning.prune(model, None, &CutOptions::default()).unwrap();
    let record = PruningRecord::new(source.config().clone(), &pruning, &pruned.report).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let saved = save_pruned(&pruned.model, &record, &source, &SaveFormat::AsIs, folder.path()).unwrap();
    assert_eq!(saved.extensions, ["per_layer_config", "quantization_config"]);
    let (model, _) = reload(folder.path());
    for (path, slot) in model.slots() {
        assert!(matches!(slot, QuantLinear::Packed(_)), "{path}");
    }
    assert_eq!(logits(&model, &tokens), logits(&pruned.model, &tokens));
}

#[test]
fn a_record_of_another_model_is_not_written() {
    let (pruned, _) = prune("llama-untied-bf16", 1, false);
    let (_, other) = prune("llama-untied-bf16", 0, false);
    let folder = tempfile::tempdir().unwrap();
    let source = checkpoint("llama-untied-bf16");
    let error = save_pruned(&pruned.model, &other, &source, &SaveFormat::AsIs, folder.path()).unwrap_err();
    assert!(error.to_string().contains("record of model.layers.0.self_attn"), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// The error of opening a saved folder after a change of one of its files.
fn broken(file: &str, name: &str, change: impl FnOnce(&mut Value)) -> String {
    let (pruned, record) = prune(name, 1, false);
    let folder = tempfile::tempdir().unwrap();
    save(&pruned, &record, folder.path(), name);
    let path = folder.path().join(file);
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(&path, json.to_string()).unwrap();
    match load_pruned(folder.path(), &LoadOptions::default().in_f32(), &Device::flex()) {
        Ok(_) => panic!("{file} should be refused"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn wrong_configurations_and_records_are_refused_by_field() {
    let config = |name: &str, block: &str, value: Value, parts: &[&str]| {
        let message = broken("config.json", name, |json| json["per_layer_config"][block] = value);
        for part in parts {
            assert!(message.contains(part), "no \"{part}\" in: {message}");
        }
    };
    let llama = "llama-untied-bf16";
    config(llama, "2", json!({}), &["per_layer_config.2", "one of 2 layers"]);
    config(llama, "01", json!({}), &["per_layer_config.01"]);
    config(llama, "1", json!(7), &["per_layer_config.1", "an object"]);
    config(
        llama,
        "1",
        json!({"num_attention_heads": 3}),
        &["per_layer_config.1.num_key_value_heads", "divisor"],
    );
    config(llama, "1", json!({"intermediate_size": 0}), &["per_layer_config.1.intermediate_size"]);
    config(llama, "1", json!({"head_dim": 8}), &["per_layer_config.1.head_dim", "not supported"]);
    config("opt-f32", "1", json!({"intermediate_size": 8}), &["per_layer_config.1.intermediate_size"]);
    // Widths that are not those of the record, and tensors that are not those of the configuration.
    let widths = json!({"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 65});
    config(llama, "1", widths, &["record of model.layers.1.mlp"]);
    let message = broken("config.json", llama, |json| json["kiln"] = json!({"q_bias": true}));
    assert!(message.contains("kiln.q_bias"), "{message}");
    let record = |change: &dyn Fn(&mut Value), part: &str| {
        let message = broken("pruning.json", llama, change);
        assert!(message.contains(part), "no \"{part}\" in: {message}");
    };
    record(&|json| json["version"] = json!(2), "version 1");
    record(&|json| json["extra"] = json!(2), "extra");
    record(&|json| json["kept"]["layers"][1]["channels"] = json!([1, 0]), "model.layers.1.mlp");
    record(&|json| json["kept"]["layers"][1]["channels"] = json!([0, 1]), "record of model.layers.1");
}

/// Heads with sinks, padded with heads that add nothing whatever their sinks are.
#[test]
fn sinks_are_padded_too() {
    let model = architecture("gpt_oss");
    let original = model.config().clone();
    let mut pruning = BlockPruning::new(Criterion::L2, 0.5);
    pruning.layers = LayerRange::All;
    let pruned = pruning.prune(model, None, &CutOptions::default()).unwrap();
    assert!(pruned.model.config().layer(0).num_attention_heads < original.layer(0).num_attention_heads);
    let padded = kiln_pruning::pad(pruned.model.clone(), &pruned.report.kept, &original).unwrap();
    assert_eq!(padded.config().layer(0), original.layer(0));
    let tokens = rows_of("gpt_oss");
    assert_close("padded", &logits(&padded, &tokens), &logits(&pruned.model, &tokens), 1e-4);
}

/// Writes what scripts/check-pruned.py compares with transformers, where `KILN_PRUNED_OUT` names a folder.
#[test]
fn checkpoints_for_transformers_are_written() {
    let Ok(out) = std::env::var("KILN_PRUNED_OUT") else {
        println!("skipped: KILN_PRUNED_OUT names no folder");
        return;
    };
    let write = |kind: &str, name: &str, pruned: &Pruned, save: &dyn Fn(&Path) -> SavedCheckpoint| {
        let folder = Path::new(&out).join(format!("{name}-{kind}"));
        let saved = save(&folder);
        assert_eq!(saved.extensions, [""; 0], "{name} {kind}");
        let tokens = tokens(name);
        let (ids, logits) = (&tokens.ids, logits(&pruned.model, &tokens));
        let tensor = |name: &str, shape: Vec<usize>, values| NewTensor { name: name.into(), shape, values };
        let tensors = [
            tensor("ids", vec![2, 24], Values::U32(ids)),
            tensor("logits", vec![2, 24, 256], Values::F32(&logits)),
        ];
        write_safetensors(&folder.join("logits.safetensors"), &tensors, &Default::default()).unwrap();
    };
    for name in FOLDERS {
        let is_opt = checkpoint(name).config().family.model_type == "opt";
        let (pruned, record) = prune(name, 0, false);
        if !is_opt {
            write("uniform", name, &pruned, &|folder| save(&pruned, &record, folder, name));
        }
        let (pruned, record) = prune(name, 1, false);
        let padded =
            |folder: &Path| save_padded(&pruned.model, &record, &checkpoint(name), &f32s(), folder).unwrap();
        write("padded", name, &pruned, &padded);
        if ["llama-untied-bf16", "qwen2-tied-f32"].contains(&name) {
            let (pruned, record) = prune(name, 0, true);
            write("biases", name, &pruned, &|folder| save(&pruned, &record, folder, name));
        }
        let (model, options) = (load(name), CutOptions::default());
        let shallow = LayerPruning::new(1).prune(model.clone(), &calibration(), &options).unwrap();
        let record = |pruned: &Pruned| {
            PruningRecord::new(model.config().clone(), &json!("by hand"), &pruned.report).unwrap()
        };
        write("shallow", name, &shallow, &|folder| save(&shallow, &record(&shallow), folder, name));
        if !is_opt {
            let narrow =
                HiddenPruning::new(Criterion::L2, 0.25).prune(model.clone(), None, &options).unwrap();
            write("narrow", name, &narrow, &|folder| save(&narrow, &record(&narrow), folder, name));
        } else {
            let mut pruning = BlockPruning::new(Criterion::L1, 0.5);
            pruning.layers = LayerRange::All;
            pruning.ratio = kiln_quant_core::Plan::uniform(0.5).with_override("self_attn", 0.0).unwrap();
            let channels = pruning.prune(model.clone(), None, &options).unwrap();
            write("channels", name, &channels, &|folder| save(&channels, &record(&channels), folder, name));
        }
    }
}
