//! Files that llama.cpp quantized: read packed, saved, and written back as they were.

use burn::tensor::Device;
use kiln_models::{
    CausalLm, Checkpoint, Decoder, LoadOptions, StoredWeight, TensorSource, TokenBatch,
    export::{GgufOptions, export_gguf, save_model},
    gguf::Gguf,
};
use kiln_quant_core::{QuantLinear, Scheme, safetensors_file::SafetensorsFile};
use kiln_testkit::{max_difference, read, testdata};

const FILES: [&str; 2] = ["Q2_K", "Q4_K_M"];

fn open(name: &str) -> Checkpoint {
    Checkpoint::open(testdata(&format!("gguf/llama-{name}.gguf"))).unwrap()
}

fn load(checkpoint: &Checkpoint) -> Decoder<QuantLinear> {
    checkpoint.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap().0
}

/// The prompt of the fixture, and the logits of the values that each file stands for.
fn reference() -> (Vec<u32>, impl Fn(&str) -> Vec<f32>) {
    let file = SafetensorsFile::open(testdata("gguf/llama_logits.safetensors")).unwrap();
    let ids = file.read("input_ids").unwrap().bytes;
    let ids = ids.chunks_exact(8).map(|id| u32::from_le_bytes([id[0], id[1], id[2], id[3]])).collect();
    (ids, move |name: &str| file.read_f32(name).unwrap().1)
}

fn logits(model: &Decoder<QuantLinear>, ids: &[u32]) -> Vec<f32> {
    let tokens = TokenBatch::new(&[ids.to_vec()]).unwrap();
    read(model.forward(&model.context(&tokens, None).unwrap()))
}

#[test]
fn logits_are_those_of_the_files_values_and_nothing_is_dense_but_norms() {
    let (ids, expected) = reference();
    for name in FILES {
        let checkpoint = open(name);
        let (model, report) = checkpoint.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
        let expected = expected(name);
        let most = expected.iter().fold(0.0f32, |most, value| most.max(value.abs()));
        let difference = max_difference(&logits(&model, &ids), &expected);
        assert!(difference < 1e-5 * most, "{name}: {difference} of {most}");
        for row in &report.storage.rows {
            assert!(row.scheme != Scheme::Dense || row.shape.len() == 1, "{name}: {} is dense", row.path);
        }
        let (held, file) =
            (report.storage.total_bytes(), std::fs::metadata(checkpoint.path()).unwrap().len());
        assert!((held as f64) < 1.03 * file as f64, "{name}: {held} bytes of a file of {file}");
    }
}

#[test]
fn files_are_written_back_block_for_block() {
    for name in FILES {
        let checkpoint = open(name);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("back.gguf");
        let options = GgufOptions { tokenizer: false, ..GgufOptions::default() };
        let report = export_gguf(&load(&checkpoint), &checkpoint, &path, &options).unwrap();
        assert!(report.is_exact(), "{report}");
        let (before, after) = (Gguf::open(checkpoint.path()).unwrap(), Gguf::open(&path).unwrap());
        for tensor in before.names() {
            let kinds = [&before, &after].map(|file| file.tensor(&tensor).unwrap().kind);
            assert_eq!(kinds[0], kinds[1], "{name}: {tensor}");
            assert_eq!(before.dense(&tensor).unwrap(), after.dense(&tensor).unwrap(), "{name}: {tensor}");
            // Codes, integers and factors, of which the blocks are made without loss.
            let packed = |file: &Gguf| match file.weight(tensor.strip_suffix(".weight").unwrap()).ok() {
                Some(StoredWeight::Packed(weight)) => Some(weight),
                _ => None,
            };
            assert_eq!(packed(&before), packed(&after), "{name}: {tensor}");
        }
    }
}

#[test]
fn kilns_own_folder_holds_them_bit_for_bit() {
    let (ids, _) = reference();
    for name in FILES {
        let checkpoint = open(name);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        let model = load(&checkpoint);
        save_model(&model, &checkpoint, &path).unwrap();
        let again = load(&Checkpoint::open(&path).unwrap());
        assert_eq!(logits(&model, &ids), logits(&again, &ids), "{name}");
    }
}

#[test]
fn a_model_quantized_to_their_formats_becomes_such_a_file() {
    for (scheme, kind) in [
        ("affine2:16:super4", "Q2_K"),
        ("affine3:16:sym:super8", "Q3_K"),
        ("affine4:32:super8", "Q4_K"),
        ("affine5:32:super8", "Q5_K"),
        ("affine6:16:sym:super8", "Q6_K"),
        ("iq4nl:32:super8", "IQ4_XS"),
        ("iq4nl:32:f16", "IQ4_NL"),
        ("affine5:32:f16", "Q5_1"),
    ] {
        let checkpoint = open("Q4_K_M");
        let options = LoadOptions::uniform(scheme.parse().unwrap()).in_f32();
        let (model, _) = checkpoint.load(&options, &Device::flex()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new.gguf");
        let options = GgufOptions { tokenizer: false, ..GgufOptions::default() };
        let report = export_gguf(&model, &checkpoint, &path, &options).unwrap();
        assert!(report.is_exact(), "{report}");
        let file = Gguf::open(&path).unwrap();
        let up = file.tensor("model.layers.0.mlp.up_proj.weight").unwrap();
        assert_eq!(up.kind.name(), kind);
        let (ids, _) = reference();
        let again = load(&Checkpoint::open(&path).unwrap());
        assert_eq!(logits(&model, &ids), logits(&again, &ids), "{scheme}");
    }
}

#[test]
fn a_model_in_several_files_is_opened_by_any_of_them() {
    let checkpoint = open("Q4_K_M");
    let folder = tempfile::tempdir().unwrap();
    let options = GgufOptions { tokenizer: false, max_part_bytes: Some(100_000), ..GgufOptions::default() };
    let report =
        export_gguf(&load(&checkpoint), &checkpoint, folder.path().join("m.gguf"), &options).unwrap();
    assert_eq!(report.path, folder.path().join("m-00001-of-00005.gguf"));
    let again = export_gguf(&load(&checkpoint), &checkpoint, folder.path().join("m.gguf"), &options);
    assert!(again.unwrap_err().to_string().contains("a new name for each part"));
    let size = |part: u32| {
        std::fs::metadata(folder.path().join(format!("m-0000{part}-of-00005.gguf"))).unwrap().len()
    };
    assert_eq!(report.bytes, (1..=5).map(size).sum::<u64>());
    let (ids, _) = reference();
    let expected = logits(&load(&checkpoint), &ids);
    for part in [1, 3] {
        let path = folder.path().join(format!("m-0000{part}-of-00005.gguf"));
        assert_eq!(logits(&load(&Checkpoint::open(path).unwrap()), &ids), expected);
    }
    // A part that is another's, that has another name, that is missing.
    let parts = [1, 2, 3].map(|part| folder.path().join(format!("m-0000{part}-of-00005.gguf")));
    let error = |path: &std::path::Path| Checkpoint::open(path).unwrap_err().to_string();
    std::fs::copy(&parts[2], &parts[1]).unwrap();
    assert!(error(&parts[0]).contains("split.no"), "{}", error(&parts[0]));
    let renamed = folder.path().join("renamed.gguf");
    std::fs::rename(&parts[2], &renamed).unwrap();
    assert!(error(&renamed).contains("-00003-of-00005.gguf"), "{}", error(&renamed));
    std::fs::remove_file(&parts[1]).unwrap();
    assert!(error(&parts[0]).contains("m-00002-of-00005.gguf"), "{}", error(&parts[0]));
}
