//! The text parts of multimodal checkpoints.

use std::path::Path;

use burn::tensor::Device;
use kiln_models::{CausalLm, Checkpoint, LoadOptions, TokenBatch};
use kiln_testkit::{read, testdata};
use safetensors::{SafeTensors, serialize_to_file, tensor::TensorView};
use serde_json::{Value, json};

const ALONE: &str = "tiny/gemma3-text-f32";

fn logits(folder: &Path) -> (Vec<f32>, Vec<String>) {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let (model, report) = checkpoint.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
    let tokens = TokenBatch::new(&[vec![5, 17, 33, 60, 2]]).unwrap();
    (read(model.forward(&model.context(&tokens, None).unwrap())), report.notes)
}

/// The text model in a wrapper: its configuration as an object, its tensors under `prefix`, a tower beside it.
fn wrapped(prefix: &str, change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let alone = testdata(ALONE);
    let text: Value = serde_json::from_slice(&std::fs::read(alone.join("config.json")).unwrap()).unwrap();
    let mut config = json!({
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "vision_config": {"hidden_size": 8},
        "bos_token_id": 3,
        "text_config": text,
    });
    let inner = config["text_config"].as_object_mut().unwrap();
    for key in ["architectures", "bos_token_id", "model_type"] {
        inner.remove(key);
    }
    change(&mut config);
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let bytes = std::fs::read(alone.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut views: Vec<(String, TensorView)> = tensors
        .tensors()
        .into_iter()
        .map(|(name, view)| (format!("{prefix}{}", name.strip_prefix("model.").unwrap()), view))
        .collect();
    let tower = views[0].1.clone();
    views.push(("vision_tower.encoder.weight".into(), tower));
    serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
    folder
}

#[test]
fn a_text_part_is_the_model_that_it_would_be_alone() {
    let (expected, notes) = logits(&testdata(ALONE));
    assert_eq!(notes, Vec::<String>::new());
    for prefix in ["language_model.model.", "model.language_model."] {
        let folder = wrapped(prefix, |_| ());
        let (found, notes) = logits(folder.path());
        assert_eq!(found, expected, "{prefix}");
        assert_eq!(
            notes,
            ["the text part of Gemma3ForConditionalGeneration; 1 tensors of its other parts were left out"]
        );
        // What only the whole says holds for its part.
        assert_eq!(Checkpoint::open(folder.path()).unwrap().special_tokens().bos, Some(3));
    }
}

#[test]
fn wrappers_without_a_text_part_or_with_an_unknown_one_are_refused_by_name() {
    type Change = fn(&mut Value);
    let cases: [(Change, &[&str]); 3] = [
        (|config| drop(config.as_object_mut().unwrap().remove("text_config")), &["text_config", "text part"]),
        (|config| config["text_config"]["model_type"] = "mamba".into(), &["text_config.model_type", "mamba"]),
        (
            |config| config["architectures"] = json!(["LlavaForConditionalGeneration"]),
            &["architectures", "Llava"],
        ),
    ];
    for (change, parts) in cases {
        let folder = wrapped("language_model.model.", change);
        let message = Checkpoint::open(folder.path()).unwrap_err().to_string();
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    }
}
