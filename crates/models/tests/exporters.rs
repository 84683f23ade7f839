//! One list of promises for every exporter, on schemes that some of them hold exactly, some rounded and some not at all.

use std::path::Path;

use burn::tensor::Device;
use kiln_models::{
    Checkpoint, Decoder, Error, LoadOptions, Slots,
    export::{
        ExportOptions, ExportReport, FloatType, GgufOptions, export_awq, export_bitsandbytes, export_gguf,
        export_gptq, export_hf, export_mlx, save_model, verify_export,
    },
};
use kiln_quant_core::{Projection, QuantLinear};
use kiln_testkit::{max_difference, read, testdata};

type Export = fn(&Decoder<QuantLinear>, &Checkpoint, &Path) -> Result<ExportReport, Error>;

/// Each with a scheme that it holds exactly.
const EXPORTERS: [(&str, &str, Export); 7] = [
    ("own", "nf4:64:double", |model, source, path| save_model(model, source, path)),
    ("Hugging Face", "nf4:64", |model, source, path| {
        export_hf(model, source, path, &ExportOptions::new(FloatType::F32))
    }),
    ("MLX", "affine4:64", |model, source, path| {
        export_mlx(model, source, path, &ExportOptions::new(FloatType::F32))
    }),
    ("GGUF", "affine4:32:f16", |model, source, path| {
        export_gguf(model, source, path, &GgufOptions::default())
    }),
    ("GPTQ", "affine8:32:sym:f16", |model, source, path| {
        export_gptq(model, source, path, &ExportOptions::new(FloatType::F32))
    }),
    ("AWQ", "affine4:32:sym:f16", |model, source, path| {
        export_awq(model, source, path, &ExportOptions::new(FloatType::F32))
    }),
    ("bitsandbytes", "nf4:64:double", |model, source, path| {
        export_bitsandbytes(model, source, path, &ExportOptions::new(FloatType::F32))
    }),
];

const SCHEMES: [&str; 8] = [
    "dense",
    "affine4:64",
    "affine4:32:sym:f16",
    "affine4:32:f16",
    "affine8:32:sym:f16",
    "affine2:8x4",
    "nf4:64",
    "nf4:64:double",
];

#[test]
fn every_exporter_writes_what_it_reports_or_refuses_by_name() {
    for folder in ["llama-untied-bf16", "qwen2-tied-f32"] {
        for scheme in SCHEMES {
            let source = Checkpoint::open(testdata(&format!("tiny/{folder}"))).unwrap();
            let options = LoadOptions::uniform(scheme.parse().unwrap()).in_f32();
            let (model, _) = source.load(&options, &Device::flex()).unwrap();
            for (format, held_exactly, export) in EXPORTERS {
                let what = format!("{format}, {folder}, {scheme}");
                let place = tempfile::tempdir().unwrap();
                let path = place.path().join("model.gguf");
                match export(&model, &source, &path) {
                    Ok(report) => check(&what, &model, &source, &report, scheme == held_exactly),
                    Err(error) => {
                        assert_ne!(scheme, held_exactly, "{what}: {error}");
                        assert!(error.to_string().contains("model."), "{what} names no tensor: {error}");
                        assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 0, "{what}: files stay");
                    }
                }
            }
        }
    }
}

/// Reads an export again, and compares the linears with the model and with what the report says of each.
fn check(what: &str, model: &Decoder<QuantLinear>, source: &Checkpoint, report: &ExportReport, exact: bool) {
    let again = Checkpoint::open(&report.path).unwrap();
    assert_eq!(again.config(), source.config(), "{what}");
    // GGUF files have these with the tokenizer, which the tiny checkpoints lack.
    if report.path.is_dir() {
        assert_eq!(again.special_tokens(), source.special_tokens(), "{what}");
    }
    let (reloaded, _) = again.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
    for ((path, before), (_, after)) in model.slots().into_iter().zip(reloaded.slots()) {
        let row = report.rows.iter().find(|row| row.name.trim_end_matches(".weight") == path);
        let row = row.unwrap_or_else(|| panic!("{what}: no row of {path}"));
        let [before, after] = [before, after].map(|slot| read(slot.weight()));
        let found = max_difference(&after, &before);
        assert!(
            found <= row.max_difference,
            "{what} {path}: off by {found}, reported {}",
            row.max_difference
        );
        assert!(!exact || found == 0.0, "{what} {path}: off by {found}");
    }
    let prompt = [3, 200, 17, 99, 255, 0, 1, 42, 128];
    let moved = verify_export(&report.path, model, &prompt).unwrap();
    assert!(moved.max.is_finite(), "{what}");
    // Packed and dense products add in another order; heads of GGUF files are in f16.
    assert!(!exact || moved.relative < 1e-3, "{what}: logits move by {}", moved.relative);
}
