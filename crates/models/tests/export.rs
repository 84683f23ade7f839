//! Models written to every format, and read again.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use burn::tensor::Device;
use kiln_models::{
    Checkpoint, Decoder, Error, LoadOptions, Slots, StoredWeight, Tokenizer,
    export::{
        ExportOptions, ExportReport, Fallback, FloatType, GgufOptions, LoraFactors, export_awq,
        export_bitsandbytes, export_gguf, export_gguf_lora, export_gptq, export_hf, export_mlx, save_model,
        verify_export,
    },
    gguf::{BlockType, Gguf},
};
use kiln_quant_core::{
    PackedLinear, PackedTensor, PackedWeight, Plan, Projection, QuantLinear, Scales, Scheme,
    files::interruption::killed_at, packed_file::fingerprint, safetensors_file::SafetensorsFile,
};
use kiln_testkit::{max_difference, read, testdata};
use serde_json::Value;

type Model = Decoder<QuantLinear>;

const PROMPT: [u32; 9] = [3, 20, 17, 95, 55, 0, 1, 42, 28];

const LLAMA_FAMILY: [&str; 9] = [
    "llama-tied-f32-sharded",
    "llama-untied-bf16",
    "llama-untied-f16",
    "llama-rope3-headdim24-f32",
    "llama-rope-linear",
    "llama-rope-yarn",
    "qwen2-tied-f32",
    "qwen3-untied-f32",
    "mistral-swa8-f32",
];

fn open(folder: &str) -> Checkpoint {
    Checkpoint::open(testdata(&format!("tiny/{folder}"))).unwrap()
}

fn load(checkpoint: &Checkpoint) -> Model {
    checkpoint.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap().0
}

fn quantized(folder: &str, scheme: &str) -> (Checkpoint, Model) {
    let checkpoint = open(folder);
    let options = LoadOptions::uniform(scheme.parse().unwrap()).in_f32();
    let model = checkpoint.load(&options, &Device::flex()).unwrap().0;
    (checkpoint, model)
}

/// A folder and a place in it that doesn't exist.
fn place(name: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    (folder, path)
}

/// The packed linears of the blocks.
fn packed(model: &Model) -> BTreeMap<String, PackedWeight> {
    let mut weights = BTreeMap::new();
    for (path, slot) in model.slots() {
        if let QuantLinear::Packed(linear) = slot {
            weights.insert(path.to_owned(), linear.weight.to_host().unwrap());
        }
    }
    weights
}

/// The dense values of all linears of the blocks, `[d_input, d_output]`.
fn dense(model: &Model) -> BTreeMap<String, Vec<f32>> {
    let mut weights = BTreeMap::new();
    for (path, slot) in model.slots() {
        weights.insert(path.to_owned(), read(slot.weight()));
    }
    weights
}

/// `model` with the packed weight of one linear changed.
fn with_changed(model: Model, target: &str, change: impl Fn(&mut PackedWeight)) -> Model {
    let device = Device::flex();
    model
        .try_map(|path, slot| {
            Ok::<_, Error>(match slot {
                QuantLinear::Packed(linear) if path == target => {
                    let mut weight = linear.weight.to_host()?;
                    change(&mut weight);
                    QuantLinear::Packed(PackedLinear {
                        weight: PackedTensor::new(&weight, &device),
                        bias: linear.bias,
                    })
                }
                slot => slot,
            })
        })
        .unwrap()
}

/// What f16 makes of a packed weight's scales and offsets, by definition: `f16(s) * code + f16(m)`.
fn rounded_to_f16(weight: &PackedWeight) -> Vec<f32> {
    let round = |value: f32| half::f16::from_f32(value).to_f32();
    let mut weight = weight.clone();
    if let Scales::Plain(scales) = &mut weight.scales {
        scales.iter_mut().for_each(|scale| *scale = round(*scale));
    }
    weight.offsets.iter_mut().flatten().for_each(|offset| *offset = round(*offset));
    weight.dequantize()
}

fn stored(checkpoint: &Checkpoint, path: &str) -> PackedWeight {
    match checkpoint.source().weight(path).unwrap() {
        StoredWeight::Packed(weight) => weight,
        StoredWeight::Dense(_) => panic!("{path} is dense"),
    }
}

#[track_caller]
fn assert_error<T>(result: Result<T, Error>, parts: &[&str]) {
    let message = match result {
        Ok(_) => panic!("no error where {parts:?} was expected"),
        Err(error) => error.to_string(),
    };
    for part in parts {
        assert!(message.contains(part), "no \"{part}\" in: {message}");
    }
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

// --- Kiln's own ---

#[test]
fn saved_models_load_bit_for_bit() {
    let stored =
        ["llama-untied-gptq3-v2-actorder", "llama-untied-gptq4-v1", "llama-untied-bnb-nf4-double", "opt-f32"];
    let mut cases: Vec<(Checkpoint, Model)> =
        stored.iter().map(|name| (open(name), load(&open(name)))).collect();
    for (index, folder) in
        LLAMA_FAMILY.into_iter().chain(["llama-rope-dynamic", "opt-f32", "gemma3-text-f32"]).enumerate()
    {
        let schemes = [
            "nf4:64:double",
            "affine2:8x4",
            "affine3:col:int:f16",
            "affine4:48:bf16",
            "dense",
            "affine8:32:sym",
        ];
        cases.push(quantized(folder, schemes[index % schemes.len()]));
    }
    for (source, model) in cases {
        let (_folder, path) = place("saved");
        let report = save_model(&model, &source, &path).unwrap();
        assert!(report.is_exact() && report.bytes > 0);
        let again = Checkpoint::open(&path).unwrap();
        assert_eq!(again.config(), source.config());
        assert_eq!(again.special_tokens(), source.special_tokens());
        assert_eq!(again.notes(), Vec::<String>::new());
        let (reloaded, load_report) = again.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
        assert_eq!(load_report.notes, Vec::<String>::new());
        let (before, after) = (packed(&model), packed(&reloaded));
        assert_eq!(before, after, "{}", source.path().display());
        let print = |weights: &BTreeMap<String, PackedWeight>| {
            fingerprint(weights.iter().map(|(path, weight)| (path.as_str(), weight)))
        };
        assert_eq!(print(&before), print(&after));
        let difference = verify_export(&path, &model, &PROMPT).unwrap();
        assert_eq!((difference.max, difference.relative), (0.0, 0.0), "{}", source.path().display());
        // Saved once more, the weights are the same file.
        let (_other, second) = place("second");
        save_model(&reloaded, &again, &second).unwrap();
        let bytes = |folder: &Path| std::fs::read(folder.join("model.safetensors")).unwrap();
        assert!(bytes(&path) == bytes(&second));
    }
}

#[test]
fn saved_folders_that_were_changed_are_refused() {
    let (source, model) = quantized("llama-untied-bf16", "affine4:64");
    let (_folder, path) = place("saved");
    save_model(&model, &source, &path).unwrap();
    let config = json(&path.join("config.json"));
    let mut newer = config.clone();
    newer["quantization_config"]["version"] = 2.into();
    std::fs::write(path.join("config.json"), newer.to_string()).unwrap();
    assert_error(Checkpoint::open(&path), &["config.json", "quantization_config.version", "2"]);
    std::fs::write(path.join("config.json"), config.to_string()).unwrap();
    assert_error(kiln_models::hf::HfFolder::open(&path), &["quant_method", "kiln"]);
    let file = path.join("model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
    assert_error(Checkpoint::open(&path), &["model.safetensors", "header"]);
}

// --- Hugging Face ---

#[test]
fn dense_folders_hold_the_model() {
    for folder in LLAMA_FAMILY.into_iter().chain(["llama-rope-dynamic", "opt-f32", "gemma3-text-f32"]) {
        let (source, model) = quantized(folder, "nf4:32");
        let (_folder, path) = place("dense");
        let report = export_hf(&model, &source, &path, &ExportOptions::new(FloatType::F32)).unwrap();
        assert!(report.is_exact(), "{folder}");
        let again = Checkpoint::open(&path).unwrap();
        assert_eq!(again.config(), source.config(), "{folder}");
        assert_eq!(again.special_tokens(), source.special_tokens());
        let reloaded = load(&again);
        assert_eq!(dense(&reloaded), dense(&model), "{folder}");
        // Packed and dense products add in another order.
        assert!(verify_export(&path, &model, &PROMPT).unwrap().relative < 1e-5, "{folder}");
    }
}

#[test]
fn shards_are_no_larger_than_asked_and_indexed() {
    let source = open("llama-untied-bf16");
    let model = load(&source);
    let (_folder, path) = place("dense");
    let most = 20_000;
    let options = ExportOptions { float: FloatType::Bf16, max_shard_bytes: most, ..ExportOptions::default() };
    let report = export_hf(&model, &source, &path, &options).unwrap();
    // The checkpoint is bf16, so nothing is rounded.
    assert!(report.is_exact());
    let index = json(&path.join("model.safetensors.index.json"));
    let tensors: u64 = report.rows.iter().map(|row| row.bytes).sum();
    assert_eq!(index["metadata"]["total_size"], tensors);
    let map = index["weight_map"].as_object().unwrap();
    assert_eq!(map.len(), report.rows.len());
    let mut shards: Vec<&str> = map.values().map(|file| file.as_str().unwrap()).collect();
    shards.sort();
    shards.dedup();
    assert!(shards.len() >= 5, "{shards:?}");
    assert_eq!(shards[0], format!("model-00001-of-{:05}.safetensors", shards.len()));
    let mut bytes = 0;
    for shard in shards {
        let file = SafetensorsFile::open(path.join(shard)).unwrap();
        let names: Vec<&str> = file.names().collect();
        let size: usize = names.iter().map(|name| file.read(name).unwrap().bytes.len()).sum();
        assert!(size as u64 <= most || names.len() == 1, "{shard}: {size}");
        bytes += std::fs::metadata(path.join(shard)).unwrap().len();
    }
    assert_eq!(bytes, report.bytes);
    assert_eq!(dense(&load(&Checkpoint::open(&path).unwrap())), dense(&model));
}

#[test]
fn what_a_float_type_rounds_is_reported() {
    let source = open("llama-tied-f32-sharded");
    let model = load(&source);
    for float in [FloatType::F16, FloatType::Bf16] {
        let (_folder, path) = place("dense");
        let report = export_hf(&model, &source, &path, &ExportOptions::new(float)).unwrap();
        let reloaded = load(&Checkpoint::open(&path).unwrap());
        let (before, after) = (dense(&model), dense(&reloaded));
        let round = |value: &f32| match float {
            FloatType::F16 => half::f16::from_f32(*value).to_f32(),
            _ => half::bf16::from_f32(*value).to_f32(),
        };
        for (path, values) in &before {
            assert_eq!(after[path], values.iter().map(round).collect::<Vec<_>>());
            let row = report.rows.iter().find(|row| row.name == format!("{path}.weight")).unwrap();
            assert_eq!(row.max_difference, max_difference(&after[path], values));
            assert!(row.max_difference > 0.0 && row.relative_difference > 0.0);
        }
        assert!(!report.is_exact());
    }
}

// --- MLX ---

fn mlx(scheme: &str, float: FloatType) -> (Checkpoint, Model, tempfile::TempDir, PathBuf, ExportReport) {
    let (source, model) = quantized("llama-untied-bf16", scheme);
    let (folder, path) = place("mlx");
    let report = export_mlx(&model, &source, &path, &ExportOptions::new(float)).unwrap();
    (source, model, folder, path, report)
}

/// Decodes a linear of an MLX folder from its tensors alone, bit by bit, into `[d_output, d_input]`.
fn decode_mlx(folder: &Path, path: &str, bits: usize) -> Vec<f32> {
    let file = SafetensorsFile::open(folder.join("model.safetensors")).unwrap();
    let (shape, words) = file.read_u32(&format!("{path}.weight")).unwrap();
    let (scale_shape, scales) = file.read_f32(&format!("{path}.scales")).unwrap();
    let (_, biases) = file.read_f32(&format!("{path}.biases")).unwrap();
    let inputs = shape[1] * 32 / bits;
    let group = inputs / scale_shape[1];
    let mut values = Vec::new();
    for output in 0..shape[0] {
        for input in 0..inputs {
            let bit = |bit: usize| {
                words[output * shape[1] + (input * bits + bit) / 32] >> ((input * bits + bit) % 32) & 1
            };
            let code: u32 = (0..bits).map(|b| bit(b) << b).sum();
            let index = output * scale_shape[1] + input / group;
            values.push(scales[index] * code as f32 + biases[index]);
        }
    }
    values
}

#[test]
fn mlx_holds_affine_row_groups_exactly() {
    for (scheme, float) in [
        ("affine4:32:f16", FloatType::F16),
        ("affine2:64:f16", FloatType::F16),
        ("affine3:32:bf16", FloatType::Bf16),
        ("affine8:64:bf16", FloatType::Bf16),
        ("affine4:64", FloatType::F32),
        ("affine3:64:int", FloatType::F32),
        ("affine2:32:sym:f16", FloatType::F16),
        ("affine8:64:sym:f16", FloatType::F16),
        // Whole columns are cut into groups of 64 or 128, blocks of several outputs into rows.
        ("affine4:col:f16", FloatType::F16),
        ("affine2:8x32:f16", FloatType::F16),
    ] {
        let (source, model, _folder, path, report) = mlx(scheme, float);
        assert!(report.lossy().all(|row| !row.stored.contains("bits")), "{scheme}: {report}");
        let again = Checkpoint::open(&path).unwrap();
        assert_eq!((again.config(), again.notes()), (source.config(), vec![]), "{scheme}");
        for (path_of, weight) in packed(&model) {
            let found = stored(&again, &path_of);
            assert_eq!(found.codes, weight.codes, "{scheme}");
            assert_eq!(found.dequantize(), weight.dequantize(), "{scheme} {path_of}");
            let bits = weight.scheme.bits() as usize;
            assert_eq!(decode_mlx(&path, &path_of, bits), weight.dequantize(), "{scheme} {path_of}");
        }
        // The head is dense, in bf16 in the checkpoint.
        let limit = if float == FloatType::F16 { 1e-3 } else { 1e-5 };
        assert!(verify_export(&path, &model, &PROMPT).unwrap().relative < limit, "{scheme}");
    }
}

#[test]
fn mlx_rounds_scales_and_offsets_and_nothing_else() {
    for scheme in ["affine4:64", "affine2:32", "affine3:64:int"] {
        let (_, model, _folder, path, report) = mlx(scheme, FloatType::F16);
        let again = Checkpoint::open(&path).unwrap();
        for (path, weight) in packed(&model) {
            let (found, exact) = (stored(&again, &path).dequantize(), weight.dequantize());
            assert_eq!(found, rounded_to_f16(&weight), "{scheme} {path}");
            let row = report.rows.iter().find(|row| row.name == format!("{path}.weight")).unwrap();
            assert_eq!(row.max_difference, max_difference(&found, &exact));
            assert!(row.max_difference > 0.0);
        }
    }
}

#[test]
fn mlx_states_layers_that_differ_by_path() {
    let source = open("llama-untied-bf16");
    let plan: Plan<Scheme> = Plan::uniform("affine4:64:f16".parse().unwrap())
        .with_override("layers.0.mlp.down_proj", "affine2:32:f16".parse().unwrap())
        .unwrap()
        .with_override("layers.1.self_attn.q_proj", Scheme::Dense)
        .unwrap();
    let options = LoadOptions::planned(plan).in_f32();
    let model = source.load(&options, &Device::flex()).unwrap().0;
    let (_folder, path) = place("mlx");
    export_mlx(&model, &source, &path, &ExportOptions::new(FloatType::Bf16)).unwrap();
    let config = json(&path.join("config.json"));
    let quantization = &config["quantization"];
    assert_eq!(quantization, &config["quantization_config"]);
    assert_eq!(quantization["bits"], 4);
    assert_eq!(quantization["group_size"], 64);
    let down = &quantization["model.layers.0.mlp.down_proj"];
    // A group of 32 within 128 inputs is what was asked for.
    assert_eq!((down["bits"].as_u64(), down["group_size"].as_u64()), (Some(2), Some(32)));
    assert_eq!(quantization["model.layers.1.self_attn.q_proj"], false);
    let again = load(&Checkpoint::open(&path).unwrap());
    assert_eq!(packed(&again).len(), 13);
    assert_eq!(packed(&again)["model.layers.0.mlp.down_proj"].scheme.bits(), 2);
}

#[test]
fn what_mlx_cannot_hold_is_named_or_written_dense() {
    for scheme in ["nf4:64", "affine2:8x4", "affine4:48", "affine4:16"] {
        let (source, model) = quantized("llama-untied-bf16", scheme);
        let (_folder, path) = place("mlx");
        let refused = export_mlx(&model, &source, &path, &ExportOptions::default());
        assert_error(refused, &["MLX", "model.layers.0.", "_proj.weight", scheme]);
        assert!(!path.exists());
        let options = ExportOptions::new(FloatType::F32).with_fallback(Fallback::Dense);
        let report = export_mlx(&model, &source, &path, &options).unwrap();
        assert!(report.is_exact());
        assert_eq!(report.notes.iter().filter(|note| note.starts_with("written dense")).count(), 14);
        assert_eq!(dense(&load(&Checkpoint::open(&path).unwrap())), dense(&model));
    }
    let source = open("llama-untied-gptq3-v2-actorder");
    let (_folder, path) = place("mlx");
    assert_error(export_mlx(&load(&source), &source, &path, &ExportOptions::default()), &["act-order"]);
}

// --- GGUF ---

#[test]
fn gguf_holds_the_codes_of_every_architecture() {
    let schemes =
        ["affine4:32:f16", "affine3:64:f16", "affine2:32:f16", "affine4:64:sym:f16", "affine8:32:sym:f16"];
    for (index, folder) in LLAMA_FAMILY.into_iter().enumerate() {
        let scheme = schemes[index % schemes.len()];
        let (source, model) = quantized(folder, scheme);
        let (_folder, path) = place("model.gguf");
        let options = GgufOptions { dense: BlockType::F32, ..GgufOptions::default() };
        let report = export_gguf(&model, &source, &path, &options).unwrap();
        let wide = folder == "llama-rope3-headdim24-f32";
        assert!(report.is_exact(), "{folder}: {report}");
        assert_eq!(report.bytes, std::fs::metadata(&path).unwrap().len());
        let again = Checkpoint::open(&path).unwrap();
        let mut config = source.config().clone();
        // YaRN's attention factor goes through f32.
        use kiln_models::config::RopeScaling::Yarn;
        if let (Yarn { attention_factor: a, .. }, Yarn { attention_factor: b, .. }) =
            (&mut config.rope[0].scaling, &again.config().rope[0].scaling)
        {
            assert!((*a - b).abs() < 1e-6);
            *a = *b;
        }
        assert_eq!(again.config(), &config, "{folder}");
        let reloaded = load(&again);
        for (path, weight) in packed(&model) {
            let found = &packed(&reloaded)[&path];
            assert_eq!(found.dequantize(), weight.dequantize(), "{folder} {path}");
        }
        assert!(wide || packed(&reloaded).len() == 14, "{folder}");
        assert!(verify_export(&path, &model, &PROMPT).unwrap().relative < 1e-5, "{folder}");
    }
}

#[test]
fn gguf_rounds_scales_and_offsets_and_nothing_else() {
    for (scheme, kind) in [
        ("affine4:64", "Q4_1"),
        ("affine3:col", "Q4_1"),
        ("affine2:32", "Q4_1"),
        ("affine4:32:int", "Q4_1"),
        ("affine4:64:sym", "Q4_0"),
        ("affine3:64:sym", "Q4_0"),
        ("affine2:64:sym", "Q4_0"),
        ("affine8:64:sym", "Q8_0"),
    ] {
        let (source, model) = quantized("llama-untied-bf16", scheme);
        let (_folder, path) = place("model.gguf");
        let report = export_gguf(&model, &source, &path, &GgufOptions::default()).unwrap();
        let again = Checkpoint::open(&path).unwrap();
        for (path, weight) in packed(&model) {
            let (found, exact) = (stored(&again, &path).dequantize(), weight.dequantize());
            assert_eq!(found, rounded_to_f16(&weight), "{scheme} {path}");
            let row = report.rows.iter().find(|row| row.name == format!("{path}.weight")).unwrap();
            assert_eq!(row.stored, kind, "{scheme}");
            assert_eq!(row.max_difference, max_difference(&found, &exact));
            assert!(row.relative_difference < 1e-2);
        }
    }
    // GPTQ's zero points around 8 need no offset.
    let (source, model) = quantized("llama-untied-bf16", "affine4:32:int");
    let model = with_changed(model, "model.layers.1.mlp.up_proj", |weight| {
        let scales = weight.effective_scales();
        weight.offsets = Some(scales.iter().map(|scale| -(scale * 8.0)).collect());
    });
    let (_folder, path) = place("model.gguf");
    let report = export_gguf(&model, &source, &path, &GgufOptions::default()).unwrap();
    let row = report.rows.iter().find(|row| row.name == "model.layers.1.mlp.up_proj.weight").unwrap();
    assert_eq!(row.stored, "Q4_0");
    let again = stored(&Checkpoint::open(&path).unwrap(), "model.layers.1.mlp.up_proj");
    assert_eq!(again.dequantize(), rounded_to_f16(&packed(&model)["model.layers.1.mlp.up_proj"]));
}

#[test]
fn dense_models_become_gguf_in_any_dense_type() {
    let source = open("qwen2-tied-f32");
    let model = load(&source);
    for (kind, limit) in
        [(BlockType::F32, 1e-6), (BlockType::F16, 2e-3), (BlockType::Bf16, 1.5e-2), (BlockType::Q8_0, 3e-2)]
    {
        let (_folder, path) = place("model.gguf");
        let options = GgufOptions { dense: kind, name: Some("tiny".into()), ..GgufOptions::default() };
        let report = export_gguf(&model, &source, &path, &options).unwrap();
        assert_eq!(report.is_exact(), kind == BlockType::F32);
        let file = Gguf::open(&path).unwrap();
        assert_eq!(file.metadata().str("general.name").unwrap(), Some("tiny"));
        let embedding = file.tensor("model.embed_tokens.weight").unwrap();
        assert_eq!(embedding.kind, kind);
        assert!(file.tensor("lm_head.weight").is_none());
        assert_eq!(file.tensor("model.norm.weight").unwrap().kind, BlockType::F32);
        let relative = verify_export(&path, &model, &PROMPT).unwrap().relative;
        assert!(relative < limit, "{}: {relative}", kind.name());
    }
    let options = GgufOptions { dense: BlockType::Q4K, ..GgufOptions::default() };
    let (_folder, path) = place("model.gguf");
    assert_error(export_gguf(&model, &source, &path, &options), &["GgufOptions.dense", "Q4_K"]);
}

/// A packed embedding (Q8_0) goes from GGUF to MLX and to Kiln's own format code by code, and dense where a format wants
/// it so.
#[test]
fn packed_embeddings_and_heads_stay_packed_where_they_can() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["llama-tied-f32-sharded", "llama-untied-bf16"] {
        let place = |kind: &str| folder.path().join(format!("{name}-{kind}"));
        let source = open(name);
        let options = GgufOptions { dense: BlockType::Q8_0, ..GgufOptions::default() };
        export_gguf(&load(&source), &source, place("gguf"), &options).unwrap();
        let source = Checkpoint::open(place("gguf")).unwrap();
        // The file has no tokenizer, and a folder needs one: another checkpoint's will do.
        let tokenizer = Checkpoint::open(testdata("models/tiny-llama")).unwrap();
        let model = load(&source);
        save_model(&model, &tokenizer, place("own")).unwrap();
        export_mlx(&model, &tokenizer, place("mlx"), &ExportOptions::default()).unwrap();
        let bits = ExportOptions::new(FloatType::F32);
        export_gptq(&model, &tokenizer, place("gptq"), &bits).unwrap();
        for kind in ["own", "mlx"] {
            let again = Checkpoint::open(place(kind)).unwrap();
            let mut modules = vec!["model.embed_tokens"];
            modules.extend(again.source().contains("lm_head.weight").then_some("lm_head"));
            for module in modules {
                let (expected, found) = (stored(&source, module), stored(&again, module));
                assert_eq!(
                    (&found.codes, found.dequantize()),
                    (&expected.codes, expected.dequantize()),
                    "{kind}"
                );
            }
        }
        assert!(verify_export(place("own"), &model, &PROMPT).unwrap().max == 0.0);
        assert!(verify_export(place("mlx"), &model, &PROMPT).unwrap().relative < 1e-3);
        let dense = Checkpoint::open(place("gptq")).unwrap();
        assert!(matches!(dense.source().weight("model.embed_tokens").unwrap(), StoredWeight::Dense(_)));
        assert!(verify_export(place("gptq"), &model, &PROMPT).unwrap().relative < 1e-5);
    }
}

#[test]
fn what_gguf_cannot_hold_is_named_or_written_dense() {
    for scheme in ["nf4:64", "affine2:8x4", "affine4:48", "affine8:32", "affine4:16:sym"] {
        let (source, model) = quantized("llama-untied-bf16", scheme);
        let (_folder, path) = place("model.gguf");
        let refused = export_gguf(&model, &source, &path, &GgufOptions::default());
        assert_error(refused, &["GGUF", "model.layers.0.self_attn.q_proj.weight", scheme]);
        assert!(!path.exists());
        let options =
            GgufOptions { dense: BlockType::F32, fallback: Fallback::Dense, ..GgufOptions::default() };
        let report = export_gguf(&model, &source, &path, &options).unwrap();
        assert!(report.is_exact());
        assert_eq!(report.notes.iter().filter(|note| note.starts_with("written F32")).count(), 14);
        assert_eq!(dense(&load(&Checkpoint::open(&path).unwrap())), dense(&model));
    }
    let (_folder, path) = place("model.gguf");
    let refused = |folder: &str, parts: &[&str]| {
        let source = open(folder);
        assert_error(export_gguf(&load(&source), &source, &path, &GgufOptions::default()), parts);
    };
    refused("opt-f32", &["GGUF", "architecture", "opt"]);
    refused("llama-rope-dynamic", &["GGUF", "rope.scaling", "Dynamic"]);
    refused("llama-untied-gptq3-v2-actorder", &["GGUF", "act-order"]);
}

// --- Tokenizers ---

const TEXTS: [&str; 5] =
    ["The President shall have power", "it's 1234 x=y; \n\n  naïve café 🦀", "", " ", "a<|endoftext|>b"];

fn assert_same_tokenizer(expected: &Tokenizer, found: &Tokenizer) {
    assert_eq!(found.special(), expected.special());
    assert_eq!(found.chat_template(), expected.chat_template());
    assert_eq!(found.vocab_size(), expected.vocab_size());
    for text in TEXTS {
        for special in [false, true] {
            let ids = expected.encode(text, special).unwrap();
            assert_eq!(found.encode(text, special).unwrap(), ids, "{text:?}");
            assert_eq!(found.decode(&ids, false).unwrap(), expected.decode(&ids, false).unwrap());
        }
    }
}

#[test]
fn tokenizers_go_with_the_model_through_every_format() {
    let folder = tempfile::tempdir().unwrap();
    // The embedded model, with a chat template.
    let origin = folder.path().join("origin");
    std::fs::create_dir(&origin).unwrap();
    for name in [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ] {
        std::fs::copy(testdata("models/tiny-llama").join(name), origin.join(name)).unwrap();
    }
    std::fs::write(origin.join("chat_template.jinja"), "{{ messages[0].content }}").unwrap();
    let source = Checkpoint::open(&origin).unwrap();
    let expected = source.tokenizer().unwrap();
    let model = source
        .load(&LoadOptions::uniform("affine4:64:f16".parse().unwrap()).in_f32(), &Device::flex())
        .unwrap()
        .0;
    let gguf = folder.path().join("model.gguf");
    export_gguf(&model, &source, &gguf, &GgufOptions::default()).unwrap();
    let from_gguf = Checkpoint::open(&gguf).unwrap();
    assert_same_tokenizer(&expected, &from_gguf.tokenizer().unwrap());
    // From GGUF to GGUF, keys are carried over; from GGUF to a folder, files are made.
    let second = folder.path().join("second.gguf");
    export_gguf(&load(&from_gguf), &from_gguf, &second, &GgufOptions::default()).unwrap();
    assert_same_tokenizer(&expected, &Checkpoint::open(&second).unwrap().tokenizer().unwrap());
    let keys = |path: &Path| {
        let file = Gguf::open(path).unwrap();
        let metadata = file.metadata().clone();
        let names: Vec<String> = metadata.keys().map(str::to_owned).collect();
        names.into_iter().map(|key| (metadata.get(&key).unwrap().clone(), key)).collect::<Vec<_>>()
    };
    assert_eq!(keys(&gguf), keys(&second));
    for (name, checkpoint) in [("from-folder", &source), ("from-gguf", &from_gguf)] {
        let path = folder.path().join(name);
        save_model(&load(checkpoint), checkpoint, &path).unwrap();
        let again = Checkpoint::open(&path).unwrap();
        assert_same_tokenizer(&expected, &again.tokenizer().unwrap());
        assert_eq!(again.special_tokens(), source.special_tokens());
        assert_eq!(again.config(), source.config());
        assert!(again.chat_template().unwrap().is_some());
    }
    // Without one, and asked not to.
    let bare = open("llama-tied-f32-sharded");
    let path = folder.path().join("bare.gguf");
    let report = export_gguf(&load(&bare), &bare, &path, &GgufOptions::default()).unwrap();
    assert!(report.notes.iter().any(|note| note.contains("no tokenizer")), "{:?}", report.notes);
    let path = folder.path().join("asked.gguf");
    let options = GgufOptions { tokenizer: false, ..GgufOptions::default() };
    export_gguf(&model, &source, &path, &options).unwrap();
    assert!(Gguf::open(&path).unwrap().metadata().keys().all(|key| !key.starts_with("tokenizer.")));
}

// --- GPTQ ---

#[test]
fn gptq_holds_integer_zero_points_exactly() {
    for scheme in
        ["affine4:32:int:f16", "affine3:64:int", "affine2:col:int", "affine8:32:sym:f16", "affine4:48:int"]
    {
        let (source, model) = quantized("llama-untied-bf16", scheme);
        // Scales as GPTQ has them: f16, with the offsets that belong to them.
        let model = model
            .try_map(|_, slot| {
                let QuantLinear::Packed(linear) = slot else { return Ok::<_, Error>(slot) };
                let mut weight = linear.weight.to_host()?;
                let Scales::Plain(scales) = &mut weight.scales else { panic!("plain scales") };
                for (i, scale) in scales.iter_mut().enumerate() {
                    let before = *scale;
                    *scale = half::f16::from_f32(*scale).to_f32();
                    if let Some(offsets) = &mut weight.offsets {
                        offsets[i] = -(*scale * (-offsets[i] / before).round());
                    }
                }
                weight.scheme.scales = kiln_quant_core::ScaleType::F32;
                let weight = PackedTensor::new(&weight, &Device::flex());
                Ok(QuantLinear::Packed(PackedLinear { weight, bias: linear.bias }))
            })
            .unwrap();
        let (_folder, path) = place("gptq");
        let report = export_gptq(&model, &source, &path, &ExportOptions::new(FloatType::F32)).unwrap();
        assert!(report.is_exact(), "{scheme}: {report}");
        assert_eq!(report.notes.iter().filter(|note| note.contains("zero points")).count(), 0);
        let again = Checkpoint::open(&path).unwrap();
        assert_eq!((again.config(), again.notes()), (source.config(), vec![]));
        for (path, weight) in packed(&model) {
            let found = stored(&again, &path);
            assert_eq!(found.codes, weight.codes);
            assert_eq!(found.dequantize(), weight.dequantize(), "{scheme} {path}");
        }
    }
}

/// The linears of a model whose groups differ, in AWQ's files of one group size, and what they can't hold.
#[test]
fn awq_folders_hold_integer_zeros_in_groups_of_one_size() {
    let (source, model) = quantized("llama-untied-bf16", "affine4:32:sym:f16");
    let (_folder, path) = place("awq");
    let options = ExportOptions::new(FloatType::F32);
    export_awq(&model, &source, &path, &options).unwrap();
    let again = Checkpoint::open(&path).unwrap();
    assert_eq!((again.config(), again.notes()), (source.config(), vec![]));
    for (path, weight) in packed(&model) {
        let found = stored(&again, &path);
        assert_eq!((&found.codes, found.dequantize()), (&weight.codes, weight.dequantize()), "{path}");
    }
    // And once more from there, the words as they were.
    let (_folder, second) = place("awq");
    export_awq(&load(&again), &again, &second, &options).unwrap();
    let files = [&path, &second].map(|path| SafetensorsFile::open(path.join("model.safetensors")).unwrap());
    for part in ["qweight", "qzeros", "scales"] {
        let name = format!("model.layers.1.mlp.down_proj.{part}");
        assert_eq!(files[0].read(&name).unwrap(), files[1].read(&name).unwrap(), "{name}");
    }
    // Larger groups have their scales repeated; smaller ones, other bits and codebooks are named.
    let mixed = |other: &str| {
        let plan: Plan<Scheme> = Plan::uniform("affine4:32:sym:f16".parse().unwrap());
        let plan = plan.with_override("down_proj", other.parse().unwrap()).unwrap();
        let source = open("llama-untied-bf16");
        let mut options = LoadOptions::default().in_f32();
        options.schemes = Some(plan);
        let (model, _) = source.load(&options, &Device::flex()).unwrap();
        (source, model)
    };
    let (source, model) = mixed("affine4:64:sym:f16");
    let (_folder, path) = place("awq");
    let report = export_awq(&model, &source, &path, &options).unwrap();
    assert!(
        report.rows.iter().filter(|row| row.name.contains("down_proj")).all(|row| row.max_difference == 0.0)
    );
    for (other, part) in [("affine4:16:sym:f16", "16"), ("affine3:32:int", "4 bits"), ("nf4:32", "nf4:32")] {
        let (source, model) = mixed(other);
        let (_folder, path) = place("awq");
        let refused = export_awq(&model, &source, &path, &options);
        assert_error(refused, &["AWQ", "layers.0.mlp.down_proj.weight", part]);
        let dense = options.clone().with_fallback(Fallback::Dense);
        export_awq(&model, &source, &path, &dense).unwrap();
        let text = std::fs::read_to_string(path.join("config.json")).unwrap();
        let config: Value = serde_json::from_str(&text).unwrap();
        let names = config["quantization_config"]["modules_to_not_convert"].as_array().unwrap();
        assert_eq!(names, &["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]);
        let again = load(&Checkpoint::open(&path).unwrap());
        assert!(
            again
                .slots()
                .iter()
                .all(|(path, slot)| { (slot.scheme() == Scheme::Dense) == path.ends_with("down_proj") })
        );
    }
    let (source, model) =
        (open("llama-untied-gptq3-v2-actorder"), load(&open("llama-untied-gptq3-v2-actorder")));
    assert_error(export_awq(&model, &source, &path, &options), &["AWQ", "4 bits"]);
}

#[test]
fn gptq_folders_of_others_are_written_as_they_were() {
    for folder in ["llama-untied-gptq4-v1", "llama-untied-gptq3-v2-actorder"] {
        let source = open(folder);
        let model = load(&source);
        let (_folder, path) = place("gptq");
        let report = export_gptq(&model, &source, &path, &ExportOptions::new(FloatType::F32)).unwrap();
        assert!(report.is_exact(), "{folder}: {report}");
        assert_eq!(packed(&load(&Checkpoint::open(&path).unwrap())), packed(&model));
        // The words themselves, where the other writer's are at hand.
        let (theirs, ours) = (
            SafetensorsFile::open(source.path().join("model.safetensors")).unwrap(),
            SafetensorsFile::open(path.join("model.safetensors")).unwrap(),
        );
        for part in ["qweight", "scales", "g_idx"] {
            let name = format!("model.layers.0.self_attn.q_proj.{part}");
            assert_eq!(ours.read(&name).unwrap(), theirs.read(&name).unwrap(), "{folder} {name}");
        }
    }
}

#[test]
fn the_cost_of_integer_zero_points_is_reported() {
    let (source, model) = quantized("llama-untied-bf16", "affine4:32");
    let (_folder, path) = place("gptq");
    let report = export_gptq(&model, &source, &path, &ExportOptions::new(FloatType::F32)).unwrap();
    let notes = report.notes.iter().filter(|note| note.contains("integer zero points"));
    assert_eq!(notes.count(), 14);
    let reloaded = load(&Checkpoint::open(&path).unwrap());
    for (path, weight) in packed(&model) {
        let after = &packed(&reloaded)[&path];
        assert_eq!(after.codes, weight.codes);
        let row = report.rows.iter().find(|row| row.name == format!("{path}.weight")).unwrap();
        let difference = max_difference(&after.dequantize(), &weight.dequantize());
        assert_eq!(row.max_difference, difference);
        // Half a step of the grid at most, and the scales' rounding.
        let step = weight.effective_scales().into_iter().fold(0.0, f32::max);
        assert!(difference > 0.0 && difference < 0.51 * step, "{difference} of {step}");
    }
    // A constant group has no step to speak of, and stays what it is.
    let path_of = "model.layers.0.mlp.gate_proj";
    let model = with_changed(model, path_of, |weight| {
        let Scales::Plain(scales) = &mut weight.scales else { panic!("plain scales") };
        (scales[5], weight.offsets.as_mut().unwrap()[5]) = (0.0, 0.375);
    });
    let (_folder, path) = place("gptq");
    export_gptq(&model, &source, &path, &ExportOptions::new(FloatType::F32)).unwrap();
    let values = stored(&Checkpoint::open(&path).unwrap(), path_of).dequantize();
    // Output 5, its first 32 inputs of 64.
    assert_eq!(values[5 * 64..5 * 64 + 32], [0.375; 32]);
}

#[test]
fn what_gptq_cannot_hold_is_named_or_written_dense() {
    let (source, model) = quantized("llama-untied-bf16", "nf4:64");
    let (_folder, path) = place("gptq");
    let refused = export_gptq(&model, &source, &path, &ExportOptions::default());
    assert_error(refused, &["GPTQ", "model.layers.0.self_attn.q_proj.weight", "nf4:64"]);
    let (source, model) = quantized("llama-rope3-headdim24-f32", "affine4:32:int");
    let refused = export_gptq(&model, &source, &path, &ExportOptions::default());
    assert_error(refused, &["GPTQ", "k_proj.weight", "multiples of 32", "48 outputs"]);
    let options = ExportOptions::new(FloatType::F32).with_fallback(Fallback::Dense);
    let report = export_gptq(&model, &source, &path, &options).unwrap();
    // k, v (48 outputs), in two blocks.
    assert_eq!(
        report.notes.iter().filter(|note| note.starts_with("written dense")).count(),
        4,
        "{:?}",
        report.notes
    );
    let reloaded = load(&Checkpoint::open(&path).unwrap());
    assert_eq!(packed(&reloaded).len(), 10);
    assert_eq!(
        dense(&reloaded)["model.layers.1.self_attn.k_proj"],
        dense(&model)["model.layers.1.self_attn.k_proj"]
    );
}

// --- bitsandbytes ---

#[test]
fn bitsandbytes_holds_codebooks_exactly() {
    for scheme in ["nf4:64", "nf4:64:double", "fp4:64", "fp4:64:double", "nf4:64:f16"] {
        let (source, model) = quantized("llama-untied-bf16", scheme);
        let (_folder, path) = place("bnb");
        let report =
            export_bitsandbytes(&model, &source, &path, &ExportOptions::new(FloatType::Bf16)).unwrap();
        assert!(report.is_exact(), "{scheme}: {report}");
        let again = Checkpoint::open(&path).unwrap();
        assert_eq!((again.config(), again.notes()), (source.config(), vec![]));
        for (path, weight) in packed(&model) {
            let found = stored(&again, &path);
            assert_eq!((&found.codes, &found.scales), (&weight.codes, &weight.scales), "{scheme} {path}");
            assert_eq!(found.dequantize(), weight.dequantize());
        }
        assert_eq!(verify_export(&path, &model, &PROMPT).unwrap().max, 0.0, "{scheme}");
    }
    // The folder that transformers wrote: the same bytes in every tensor of the linears but the state's JSON.
    let source = open("llama-untied-bnb-nf4-double");
    let (_folder, path) = place("bnb");
    export_bitsandbytes(&load(&source), &source, &path, &ExportOptions::new(FloatType::Bf16)).unwrap();
    let theirs = SafetensorsFile::open(source.path().join("model.safetensors")).unwrap();
    let ours = SafetensorsFile::open(path.join("model.safetensors")).unwrap();
    assert_eq!(ours.names().collect::<Vec<_>>(), theirs.names().collect::<Vec<_>>());
    for name in theirs.names().filter(|name| name.contains("_proj.") && !name.contains("quant_state")) {
        assert_eq!(ours.read(name).unwrap(), theirs.read(name).unwrap(), "{name}");
    }
}

#[test]
fn what_bitsandbytes_cannot_hold_is_named() {
    for scheme in ["affine4:64", "nf3:64", "nf4:32", "nf4:8x64"] {
        let (source, model) = quantized("llama-untied-bf16", scheme);
        let (_folder, path) = place("bnb");
        let refused = export_bitsandbytes(&model, &source, &path, &ExportOptions::default());
        assert_error(refused, &["bitsandbytes", "model.layers.0.self_attn.q_proj.weight", scheme]);
    }
}

// --- LoRA for llama.cpp ---

#[test]
fn lora_files_are_adapters_with_names_of_the_base() {
    let source = open("llama-tied-f32-sharded");
    let (a, b): (Vec<f32>, Vec<f32>) =
        ((0..128).map(|i| i as f32).collect(), (0..128).map(|i| -(i as f32)).collect());
    let q = LoraFactors { path: "model.layers.0.self_attn.q_proj", rank: 2, a: &a, b: &b, scale: 0.5 };
    let (_folder, path) = place("adapter.gguf");
    export_gguf_lora(&path, source.config(), &[q]).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let holds = |text: &str| bytes.windows(text.len()).any(|window| window == text.as_bytes());
    for text in
        ["adapter.type", "adapter.lora.alpha", "blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"]
    {
        assert!(holds(text), "{text}");
    }
    // B stands last: row 1 of the file is row 8 (half of a head of 16) of ours, times the scale.
    let tail: Vec<f32> =
        bytes[bytes.len() - 512..].chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!(tail[..4], [0.0, -0.5, -8.0, -8.5]);
    // A base model it isn't.
    assert_error(Gguf::open(&path), &["general.type", "adapter"]);
    let refused = |factors: LoraFactors, parts: &[&str]| {
        assert_error(export_gguf_lora(&path, source.config(), &[factors]), parts);
    };
    refused(LoraFactors { path: "lm_head", ..q }, &["lm_head"]);
    refused(LoraFactors { rank: 3, ..q }, &["q_proj", "rank 3"]);
    refused(LoraFactors { scale: f32::NAN, ..q }, &["q_proj", "finite"]);
    refused(LoraFactors { b: &b[..64], ..q }, &["q_proj", "64 outputs"]);
    let mixture = Checkpoint::open(testdata("arch/mixtral")).unwrap();
    let expert = LoraFactors { path: "model.layers.0.block_sparse_moe.experts.1.w1", ..q };
    assert_error(export_gguf_lora(&path, mixture.config(), &[expert]), &["experts.1.w1", "ffn_gate_exps"]);
}

// --- Refusals that all formats share ---

#[test]
fn scales_beyond_the_range_of_f16_are_refused_by_name() {
    let (source, model) = quantized("llama-untied-bf16", "affine4:64");
    let path_of = "model.layers.1.mlp.down_proj";
    let model = with_changed(model, path_of, |weight| {
        let Scales::Plain(scales) = &mut weight.scales else { panic!("plain scales") };
        scales[7] = 1e6;
    });
    let (_folder, path) = place("out");
    let part = format!("{path_of}.scales");
    let options = ExportOptions::default();
    assert_error(export_mlx(&model, &source, &path, &options), &["MLX", &part, "float16", "1e6"]);
    assert_error(export_gptq(&model, &source, &path, &options), &["GPTQ", &part, "float16", "1e6"]);
    let gguf = export_gguf(&model, &source, &path, &GgufOptions::default());
    assert_error(gguf, &["GGUF", &part, "float16", "1e6"]);
    let dense = export_hf(&model, &source, &path, &options);
    assert_error(dense, &["Hugging Face", "down_proj.weight", "float16"]);
    assert!(!path.exists());
    export_hf(&model, &source, &path, &ExportOptions::new(FloatType::Bf16)).unwrap();
    let nan = with_changed(model, path_of, |weight| {
        weight.offsets.as_mut().unwrap()[3] = f32::NAN;
    });
    let (_folder, path) = place("out");
    let part = format!("{path_of}.offsets");
    assert_error(save_model(&nan, &source, &path), &[&part, "finite"]);
    assert_error(export_mlx(&nan, &source, &path, &options), &[&part, "finite"]);
    assert_error(export_gguf(&nan, &source, &path, &GgufOptions::default()), &[&part, "finite"]);
}

/// A changed value of a packed or dense tensor, or a configuration beside another model's weights: refused on loading, unless
/// it is asked for otherwise.
#[test]
fn own_folders_whose_parts_were_changed_are_refused() {
    let (source, model) = quantized("llama-untied-bf16", "affine4:64");
    let folder = tempfile::tempdir().unwrap();
    let saved = |name: &str, model: &Model| {
        let path = folder.path().join(name);
        save_model(model, &source, &path).unwrap();
        path
    };
    let path = saved("model", &model);
    let weights = path.join("model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    let load = |options: &LoadOptions| Checkpoint::open(&path)?.load(options, &Device::flex()).map(drop);
    let data = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for place in (data..whole.len()).step_by((whole.len() - data) / 40) {
        let mut changed = whole.clone();
        changed[place] ^= 1;
        std::fs::write(&weights, changed).unwrap();
        let error = load(&LoadOptions::default()).unwrap_err().to_string();
        assert!(error.contains("model.safetensors") && error.contains("fingerprint"), "{place}: {error}");
        let _ = load(&LoadOptions::default().with_verify(false));
    }
    let (_, other) = quantized("llama-untied-bf16", "affine4:32");
    std::fs::copy(saved("other", &other).join("model.safetensors"), &weights).unwrap();
    let error = load(&LoadOptions::default()).unwrap_err().to_string();
    assert!(error.contains("config.json: quantization_config.fingerprint"), "{error}");
    std::fs::write(&weights, &whole).unwrap();
    load(&LoadOptions::default()).unwrap();
}

/// A process that is killed before any of a save's operations on files leaves no folder or a whole one, of a file the old or
/// the new one; the next save works and cleans up.
#[test]
fn kills_at_every_operation_leave_whole_exports() {
    let (source, model) = quantized("llama-untied-bf16", "affine4:64");
    let work = tempfile::tempdir().unwrap();
    let folder = work.path().join("model");
    let dense = ExportOptions::new(FloatType::Bf16);
    let kinds: [(&str, &dyn Fn()); 3] = [
        ("own", &|| drop(save_model(&model, &source, &folder).unwrap())),
        ("Hugging Face", &|| drop(export_hf(&model, &source, &folder, &dense).unwrap())),
        ("MLX", &|| drop(export_mlx(&model, &source, &folder, &dense).unwrap())),
    ];
    let mut kills = 0;
    for (name, save) in kinds {
        let expected = {
            save();
            let files = contents(&folder);
            std::fs::remove_dir_all(&folder).unwrap();
            files
        };
        for first in 0.. {
            let done = killed_at(first, save).is_some();
            let check = |place: &str| {
                assert!(!folder.exists() || contents(&folder) == expected, "{name}, {place}");
                folder.exists()
            };
            let is_whole = check(&format!("killed at {first}"));
            assert!(is_whole || !done);
            // The next one is killed too, at a place that moves, then one is left alone.
            if !is_whole {
                killed_at(first * 7 % 11, save);
                kills += 1;
                if !check(&format!("killed again at {}", first * 7 % 11)) {
                    save();
                }
            }
            assert!(check("at last"));
            std::fs::remove_dir_all(&folder).unwrap();
            kills += 1;
            if done {
                break;
            }
        }
    }
    let file = work.path().join("model.gguf");
    let export = |model: &_| drop(export_gguf(model, &source, &file, &GgufOptions::default()).unwrap());
    let (_, other) = quantized("llama-untied-bf16", "affine8:32:sym");
    export(&other);
    let old = std::fs::read(&file).unwrap();
    export(&model);
    let new = std::fs::read(&file).unwrap();
    for operation in 0.. {
        export(&other);
        let done = killed_at(operation, || export(&model)).is_some();
        let found = std::fs::read(&file).unwrap();
        assert!(found == new || (found == old && !done), "killed at {operation}");
        kills += 1;
        if done {
            break;
        }
    }
    assert!(kills > 100, "{kills}");
    export(&model);
    // Locks are left by the killed; everything else is gone.
    let left: Vec<_> =
        std::fs::read_dir(work.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| name == "model.gguf" || name == ".model.kiln-lock"), "{left:?}");
}

/// Names and bytes of a folder's files.
fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap())).collect()
}

#[test]
fn places_that_cannot_be_written_are_errors_and_stay_clean() {
    let (source, model) = quantized("llama-untied-bf16", "affine4:64");
    let folder = tempfile::tempdir().unwrap();
    let (options, gguf) = (ExportOptions::default(), GgufOptions::default());
    let file = folder.path().join("file");
    std::fs::write(&file, "mine").unwrap();
    let below = file.join("no/where");
    assert_error(save_model(&model, &source, &below), &["no"]);
    assert_error(export_hf(&model, &source, &below, &options), &["no"]);
    assert_error(export_gguf(&model, &source, &below, &gguf), &["no/where"]);
    assert_error(export_gguf(&model, &source, folder.path().join("no/where"), &gguf), &["no/where"]);
    assert_error(export_mlx(&model, &source, &file, &options), &["file"]);
    let full = folder.path().join("full");
    std::fs::create_dir(&full).unwrap();
    std::fs::write(full.join("notes.txt"), "mine").unwrap();
    for result in [
        save_model(&model, &source, &full),
        export_hf(&model, &source, &full, &options),
        export_mlx(&model, &source, &full, &options),
        export_gptq(&model, &source, &full, &options),
    ] {
        assert_error(result, &["folder", "full", "holds files"]);
    }
    // A failure halfway leaves what was there, and nothing beside it.
    let target = folder.path().join("model.gguf");
    std::fs::write(&target, "old").unwrap();
    let broken = with_changed(model, "model.layers.1.mlp.down_proj", |weight| {
        weight.offsets.as_mut().unwrap()[0] = f32::INFINITY;
    });
    assert!(export_gguf(&broken, &source, &target, &gguf).is_err());
    assert!(export_hf(&broken, &source, folder.path().join("dense"), &options).is_err());
    assert_eq!(std::fs::read(&target).unwrap(), b"old");
    let mut names: Vec<_> =
        std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["file", "full", "model.gguf"]);
    // An empty folder is as good as none.
    let empty = folder.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    let source = open("llama-untied-bf16");
    save_model(&load(&source), &source, &empty).unwrap();
    assert!(empty.join("model.safetensors").exists());
}

#[test]
fn verification_refuses_prompts_that_are_none() {
    let source = open("llama-untied-bf16");
    let model = load(&source);
    let path = source.path();
    assert_error(verify_export(path, &model, &[]), &["prompt", "found 0"]);
    assert_error(verify_export(path, &model, &[256]), &["prompt", "below 256"]);
    assert_error(verify_export(path, &model, &[1; 257]), &["prompt", "1..=256"]);
    assert_eq!(verify_export(path, &model, &PROMPT).unwrap().max, 0.0);
    // Another model's logits are seen to differ.
    let other = verify_export(testdata("tiny/llama-untied-f16"), &model, &PROMPT).unwrap();
    assert!(other.relative > 0.1);
    assert_error(verify_export(testdata("models/tiny-llama"), &model, &PROMPT), &["vocabulary", "2048"]);
}
