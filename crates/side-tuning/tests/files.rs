//! Side networks on disk.

use std::{fs, path::Path};

use burn::module::Module;
use kiln_models::{CausalLm, TokenBatch};
use kiln_quant_core::trained_values;
use kiln_side_tuning::{CONFIG_FILE, Downsample, GateShape, HeadMix, SideConfig, SideTuned, WEIGHTS_FILE};
use kiln_testkit::{read, testdata};

use crate::common::{Base, embedded, load, without_hash};

fn logits(model: &SideTuned<Base>) -> Vec<f32> {
    let tokens = TokenBatch::new(&[vec![5, 90, 17, 33]]).unwrap();
    read(model.forward(&model.context(&tokens, None).unwrap()))
}

#[test]
fn what_was_saved_is_loaded() {
    let mix = HeadMix::Raw { init: 0.3 };
    for (base, config) in [
        (embedded(), SideConfig::qst().with_mix(mix, GateShape::Vector)),
        (embedded(), SideConfig::qst().with_heads(3).with_downsample(Downsample::MaxPool)),
        (load(testdata("tiny/opt-f32"), None), SideConfig::lst()),
        (load(testdata("tiny/qwen3-untied-f32"), None), SideConfig::lst().with_reduction(4)),
        (load(testdata("tiny/llama-rope3-headdim24-f32"), None), SideConfig::lst().with_reduction(4)),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let model = SideTuned::new(base.clone(), &config, 7).unwrap();
        model.save(folder.path()).unwrap();
        let loaded = SideTuned::load(base, folder.path()).unwrap();
        assert_eq!(loaded.config(), &config);
        assert_eq!(logits(&loaded), logits(&model));
        // Two files, and nothing of the backbone in them.
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
        let bytes = fs::metadata(folder.path().join(WEIGHTS_FILE)).unwrap().len() as usize;
        let backbone = model.backbone().config();
        let values = config.parameter_counts(backbone).unwrap().total();
        assert!(bytes > 4 * values && bytes < 4 * values + 20_000, "{bytes} {values}");
        // Training can go on.
        assert_eq!(trained_values(&loaded.train()), values);
    }
}

#[test]
fn another_base_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    SideTuned::new(embedded(), &SideConfig::qst(), 7).unwrap().save(folder.path()).unwrap();
    let refused = |base: Base| {
        let message = SideTuned::load(base, folder.path()).map(|_| ()).unwrap_err().to_string();
        assert!(message.contains("side_config.json: backbone: expected the base"), "{message}");
    };
    // The same model in other bits, and another model.
    refused(load(testdata("models/tiny-llama"), Some("affine4:64")));
    refused(load(testdata("tiny/llama-untied-bf16"), None));
    assert!(SideTuned::load(embedded(), folder.path()).is_ok());
}

fn message(folder: &Path, base: &Base) -> String {
    SideTuned::load(base.clone(), folder).map(|_| ()).unwrap_err().to_string()
}

#[test]
fn damaged_folders_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let base = embedded();
    SideTuned::new(base.clone(), &SideConfig::qst(), 7).unwrap().save(folder.path()).unwrap();
    let path = folder.path().join(CONFIG_FILE);
    let whole = fs::read_to_string(&path).unwrap();
    for (from, to, expected) in [
        ("\"rank\": 16", "\"rank\": 16, \"ranks\": 3", "ranks"),
        ("\"temperature\"", "\"temprature\"", "temprature"),
        ("\"version\": 1", "\"version\": 2", "version: expected 1, found 2"),
        ("\"version\": 1,", "", "version: expected 1, found null"),
        ("\"adapter\"", "\"adaptor\"", "adaptor"),
        ("\"reduction\": 16", "\"reduction\": 7", "reduction"),
        ("\"reduction\": 16", "\"reduction\": 8", "expected F32"),
        ("\"rank\": 16", "\"rank\": 9", "expected F32"),
        ("\"shared_embedding\": true", "\"shared_embedding\": false", "downsample.4"),
        ("\"labels\": null", "\"labels\": 3", "labels"),
        ("{", "", "JSON"),
    ] {
        assert!(whole.contains(from), "{from}");
        fs::write(&path, whole.replacen(from, to, 1)).unwrap();
        let message = message(folder.path(), &base);
        assert!(message.contains(expected), "{from} → {to}: {message}");
    }
    fs::write(&path, &whole).unwrap();
    let weights = folder.path().join(WEIGHTS_FILE);
    let bytes = fs::read(&weights).unwrap();
    for damage in [&bytes[..bytes.len() - 4], &bytes[..5], b"\xff\xff\xff\xff\xff\xff\xff\x7f"] {
        fs::write(&weights, damage).unwrap();
        assert!(message(folder.path(), &base).contains(WEIGHTS_FILE));
    }
    for place in (0..bytes.len()).step_by(bytes.len() / 20) {
        let mut changed = bytes.clone();
        changed[place] ^= 1;
        fs::write(&weights, changed).unwrap();
        assert!(message(folder.path(), &base).contains("weights_sha256"));
    }
    without_hash(folder.path());
    let mut not_finite = bytes.clone();
    let end = not_finite.len();
    not_finite[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&weights, not_finite).unwrap();
    assert!(message(folder.path(), &base).contains("finite"));
    fs::remove_file(&weights).unwrap();
    assert!(message(folder.path(), &base).contains(WEIGHTS_FILE));
}
