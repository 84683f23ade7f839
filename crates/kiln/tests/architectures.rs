//! What Kiln does with every family, on the checkpoints of `testdata/arch`. Logits and gradients of the dense models are
//! compared with transformers in `kiln-models`.

use std::{convert::Infallible, sync::Arc};

use burn::{
    module::{Module, Param, ParamId},
    nn::Linear,
    optim::GradientsAccumulator,
    tensor::{Device, Tensor, TensorData, activation::log_softmax},
};
use kiln::{
    Tuned,
    adapters::{AdapterConfig, InitLoraWeights, Method},
    models::{
        CausalLm, Checkpoint, Decoder, DriverOptions, Embedding, LoadOptions, Recompute, Slots, Targets,
        TokenBatch, Windows,
        export::{ExportOptions, FloatType, export_hf, save_model, verify_export},
        loss_and_gradients,
    },
    quant::{Compute, Projection, QuantLinear},
    training::{BatchOptions, DataOptions, Dataset, RunOptions, Trainer, TrainerConfig},
};
use kiln_testkit::{Golden, assert_close, max_difference, read, relative_difference, testdata};

use crate::gradients;

/// All folders of `testdata/arch`.
fn folders() -> Vec<String> {
    let mut folders: Vec<String> = std::fs::read_dir(testdata("arch"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().join("config.json").exists())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    folders.sort();
    assert!(folders.len() >= 46, "{folders:?}");
    folders
}

fn load(folder: &str, scheme: &str) -> (Checkpoint, Decoder<QuantLinear>) {
    let checkpoint = Checkpoint::open(testdata(&format!("arch/{folder}"))).unwrap();
    let options = LoadOptions::uniform(scheme.parse().unwrap()).in_f32();
    let (model, report) = checkpoint.load(&options, &Device::flex()).unwrap();
    assert_eq!(report.notes, Vec::<String>::new(), "{folder}");
    (checkpoint, model)
}

fn rows(folder: &str) -> Vec<Vec<u32>> {
    let ids = Golden::open(&format!("arch/{folder}/golden.safetensors")).ints("input_ids");
    ids.chunks(24).map(|row| row.iter().map(|&id| id as u32).collect()).collect()
}

fn logits<M: CausalLm>(model: &M, folder: &str) -> Vec<f32> {
    read(model.forward(&model.context(&TokenBatch::new(&rows(folder)).unwrap(), None).unwrap()))
}

/// The same model with its linears' weights dequantized.
fn plain(model: Decoder<QuantLinear>) -> Decoder<QuantLinear> {
    let mapped = model.try_map(|_, slot| {
        let weight = Param::initialized(ParamId::new(), slot.weight());
        let bias = slot.bias().map(|bias| Param::initialized(ParamId::new(), bias));
        Ok::<_, Infallible>(QuantLinear::Dense(Linear { weight, bias }))
    });
    mapped.unwrap()
}

/// The gradient of the embedding.
fn embedding_gradient(model: Decoder<QuantLinear>, folder: &str) -> Vec<f32> {
    let mut model = model.train();
    let Embedding::Dense(table) = model.embed_tokens else { panic!("a packed table") };
    let weight = table.weight.val().require_grad();
    model.embed_tokens = Embedding::Dense(kiln::models::DenseEmbedding {
        weight: Param::initialized(ParamId::new(), weight.clone()),
    });
    let rows = rows(folder);
    let logits = model.forward(&model.context(&TokenBatch::new(&rows).unwrap(), None).unwrap());
    let [batch, length, vocabulary] = logits.dims();
    let targets: Vec<i64> = rows.iter().flat_map(|row| row[1..].iter().map(|&id| i64::from(id))).collect();
    let targets = Tensor::from_data(TensorData::new(targets, [batch * (length - 1), 1]), &model.device());
    let logits = logits.narrow(1, 0, length - 1).reshape([batch * (length - 1), vocabulary]);
    let gradients = log_softmax(logits, 1).gather(1, targets).mean().neg().backward();
    read(weight.grad(&gradients).unwrap())
}

#[test]
fn packed_linears_compute_what_their_dequantized_weights_do() {
    for folder in folders() {
        let (_, packed) = load(&folder, "affine4:32");
        for (path, slot) in packed.slots() {
            assert_eq!(matches!(slot, QuantLinear::Packed(_)), !packed.stays_dense(&path), "{folder} {path}");
        }
        let plain = plain(packed.clone());
        assert_close(&folder, &logits(&packed, &folder), &logits(&plain, &folder), 1e-5);
        let gradients = [packed, plain].map(|model| embedding_gradient(model, &folder));
        assert_close(&folder, &gradients[0], &gradients[1], 1e-4);
    }
}

/// The head of a classifier reads what transformers tells as the last state.
#[test]
fn classifiers_read_the_last_state() {
    for folder in ["opt-post", "gemma4_text-shared", "gemma2"] {
        let (_, model) = load(folder, "dense");
        let golden = Golden::open(&format!("arch/{folder}/golden.safetensors"));
        let last = format!("hidden.{}", model.config().num_hidden_layers);
        let (states, width) = (golden.floats(&last), golden.shape(&last)[2]);
        let classifier = kiln::models::Classifier::new(model, 3, 7).unwrap();
        let found = read(classifier.scores(&TokenBatch::new(&rows(folder)).unwrap()).unwrap());
        let weight = read(classifier.score.weight.val());
        let expected: Vec<f32> = [23, 47]
            .into_iter()
            .flat_map(|row: usize| {
                let (state, weight) = (&states[row * width..][..width], &weight);
                (0..3).map(move |label| (0..width).map(|i| state[i] * weight[i * 3 + label]).sum())
            })
            .collect();
        assert_close(folder, &found, &expected, 1e-5);
    }
}

#[test]
fn packed_tables_are_what_their_dequantized_rows_are() {
    use kiln::{
        models::{DenseEmbedding, PerLayerInputs, Tables},
        quant::Scheme,
    };
    let dense = |table: Embedding| {
        let Embedding::Packed(table) = table else { panic!("a dense table") };
        let weight = Param::initialized(ParamId::new(), table.dequantize().transpose());
        Embedding::Dense(DenseEmbedding { weight })
    };
    // Tied and not; a table for single blocks; one narrower than the residual stream.
    for folder in ["gemma2", "granite", "mixtral", "gemma4_text-shared", "opt-post"] {
        let checkpoint = Checkpoint::open(testdata(&format!("arch/{folder}"))).unwrap();
        let options = LoadOptions::uniform("affine4:32".parse().unwrap()).in_f32();
        let options = options.with_tables(Tables::Packed("affine6:8".parse().unwrap()));
        let (model, report) = checkpoint.load(&options, &Device::flex()).unwrap();
        assert_eq!(
            report.storage.total_bytes(),
            checkpoint.predicted_storage(&options).unwrap().total_bytes()
        );
        if let Some(head) = &model.lm_head {
            assert!(matches!(head.scheme(), Scheme::Packed(_)), "{folder}");
        }
        let found = logits(&model, folder);
        let mut plain = model.clone();
        plain.embed_tokens = dense(plain.embed_tokens);
        plain.per_layer =
            plain.per_layer.map(|inputs| PerLayerInputs { table: dense(inputs.table), ..inputs });
        assert_eq!(plain.per_layer.is_some(), folder.starts_with("gemma4"));
        plain.lm_head = plain.lm_head.map(|head| {
            let weight = Param::initialized(ParamId::new(), head.weight());
            QuantLinear::Dense(Linear { weight, bias: None })
        });
        assert_close(folder, &found, &logits(&plain, folder), 1e-5);
        let (_, stored) = load(folder, "affine4:32");
        let change = relative_difference(&found, &logits(&stored, folder));
        assert!((1e-4..0.2).contains(&change), "{folder}: {change}");

        let tuned = Tuned::attach(model, &AdapterConfig::lora(4, 8.0).with_seed(3)).unwrap();
        let losses = [Recompute::None, Recompute::Block]
            .map(|recompute| train(tuned.model().clone(), folder, recompute).1);
        assert!(losses[0][5] < losses[0][0], "{folder}: {losses:?}");
        for (one, other) in losses[0].iter().zip(&losses[1]) {
            assert!((one / other - 1.0).abs() < 1e-5, "{folder}: {losses:?}");
        }
        let place = tempfile::tempdir().unwrap();
        let saved = place.path().join("saved");
        let (model, _) = checkpoint.load(&options, &Device::flex()).unwrap();
        save_model(&model, &checkpoint, &saved).unwrap();
        assert_eq!(verify_export(&saved, &model, &rows(folder)[0]).unwrap().max, 0.0, "{folder}");
    }
}

/// A few steps on the fixture's tokens; the losses.
fn train<M: CausalLm>(model: M, folder: &str, recompute: Recompute) -> (M, Vec<f64>) {
    let data = Dataset::from_ids(rows(folder).concat(), &DataOptions::new(23, model.vocab_size())).unwrap();
    let mut config = TrainerConfig::new(6, BatchOptions::new(2));
    (config.lr, config.recompute) = (1e-2, recompute);
    let mut trainer = Trainer::new(model, Arc::new(data), config).unwrap();
    let losses = trainer.run(&RunOptions::new()).unwrap().steps.iter().map(|step| step.loss).collect();
    (trainer.into_model(), losses)
}

#[test]
fn adapters_are_trained_saved_as_peft_merged_and_exported() {
    for folder in folders() {
        let (checkpoint, base) = load(&folder, "affine4:32");
        let tuned =
            Tuned::attach(base.clone(), &AdapterConfig::lora(4, 8.0).with_dropout(0.1).with_seed(3)).unwrap();
        assert_eq!(tuned.adapters().len(), base.slots().len(), "{folder}");
        let (model, adapters) = tuned.into_parts();
        let (trained, losses) = train(model.clone(), &folder, Recompute::None);
        assert!(losses[5] < losses[0], "{folder}: {losses:?}");
        // Recomputed blocks drop the same elements and route tokens to the same experts.
        for (again, plain) in train(model, &folder, Recompute::Block).1.iter().zip(&losses) {
            assert!((again / plain - 1.0).abs() < 1e-5, "{folder}: {again} and {plain}");
        }
        let tuned = Tuned::<Decoder<_>>::from_parts(trained, adapters);
        let expected = logits(tuned.model(), &folder);
        assert!(max_difference(&expected, &logits(&base, &folder)) > 1e-3, "{folder}");

        let place = tempfile::tempdir().unwrap();
        let adapter = place.path().join("adapter");
        tuned.save_peft(&adapter).unwrap();
        let loaded = Tuned::load(base, &adapter).unwrap();
        assert_eq!(logits(loaded.model(), &folder), expected, "{folder}");

        let merged = loaded.merge_dense();
        let exported = place.path().join("merged");
        export_hf(&merged, &checkpoint, &exported, &ExportOptions::new(FloatType::F32)).unwrap();
        let again = Checkpoint::open(&exported).unwrap();
        assert_eq!(again.config(), checkpoint.config(), "{folder}");
        let (again, report) = again.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
        assert_eq!(report.notes, Vec::<String>::new(), "{folder}");
        assert!(relative_difference(&logits(&again, &folder), &expected) < 1e-5, "{folder}");
    }
}

#[test]
fn models_are_saved_as_they_are() {
    for folder in folders() {
        let (checkpoint, model) = load(&folder, "affine4:32");
        let place = tempfile::tempdir().unwrap();
        let saved = place.path().join("saved");
        save_model(&model, &checkpoint, &saved).unwrap();
        let ids: Vec<u32> = rows(&folder)[0].clone();
        assert_eq!(verify_export(&saved, &model, &ids).unwrap().max, 0.0, "{folder}");
        // As records keep it.
        let text = serde_json::to_string(model.config()).unwrap();
        let read: kiln::models::config::ModelConfig = serde_json::from_str(&text).unwrap();
        assert_eq!(read, *model.config(), "{folder}");
    }
}

#[cfg(feature = "side-tuning")]
#[test]
fn side_networks_have_the_backbones_blocks() {
    use kiln::side_tuning::{SideConfig, SideTuned};
    for folder in folders() {
        let (_, base) = load(&folder, "affine4:32");
        let config = SideConfig::qst().with_reduction(2);
        let counts = config.parameter_counts(base.config()).unwrap();
        let model = SideTuned::new(base.clone(), &config, 5).unwrap();
        assert_eq!(kiln::quant::trained_values(&model.side.clone().train()), counts.total(), "{folder}");
        // Alpha 1: training starts at the backbone.
        assert_eq!(logits(&model, &folder), logits(&base, &folder), "{folder}");
        let (_, losses) = train(model, &folder, Recompute::None);
        assert!(losses[5] < losses[0], "{folder}: {losses:?}");
    }
}

#[cfg(feature = "calibration")]
#[test]
fn weights_are_calibrated_by_gptq_and_apiq_and_norms_scaled() {
    use kiln::{
        adapters::LoraAttacher,
        calibration::{ApiqConfig, CalibrationConfig, Calibrator, GptqConfig, Method},
        quant::Plan,
    };
    for folder in folders() {
        let (_, dense) = load(&folder, "dense");
        let expected = logits(&dense, &folder);
        let windows = Windows::new(rows(&folder)).unwrap();
        let schemes = Plan::uniform("affine4:16".parse().unwrap());
        let attacher = LoraAttacher::new(&AdapterConfig::lora(2, 2.0), &dense.slot_shapes()).unwrap();
        let apiq = Method::ApiqBlock(ApiqConfig {
            epochs: 10,
            lr_clipping: 1e-2,
            lr_lora: 2e-3,
            ..ApiqConfig::default()
        });
        let error = |method: Method, scaling: bool| {
            let mut config = CalibrationConfig::new(method, schemes.clone());
            config.scaling = scaling.then(Default::default);
            let calibrator = Calibrator::new(&config, &windows).with_adapters(&attacher);
            let (model, _) = calibrator.run(dense.clone()).unwrap();
            relative_difference(&logits(&model, &folder), &expected)
        };
        let rounded = load(&folder, "affine4:16").1;
        let rounded = relative_difference(&logits(&rounded, &folder), &expected);
        let gptq = Method::Gptq(GptqConfig::default());
        for (method, scaling) in [(gptq.clone(), false), (gptq, true), (apiq, false)] {
            let error = error(method.clone(), scaling);
            let what = format!("{folder}, {method:?}, scaling {scaling}");
            assert!(error < 1.2 * rounded, "{what}: {error}, rounded to nearest {rounded}");
        }
    }
}

#[test]
fn adapters_made_by_peft_give_its_logits() {
    let adapters = std::fs::read_dir(testdata("peft/arch")).unwrap();
    let mut seen = 0;
    for adapter in adapters.map(|entry| entry.unwrap().path()) {
        let name = adapter.file_name().unwrap().to_str().unwrap();
        let place = match name.strip_suffix("-experts").unwrap_or(name) {
            "gemma3_text" => "tiny/gemma3-text-f32".to_owned(),
            base => format!("arch/{base}"),
        };
        let checkpoint = Checkpoint::open(testdata(&place)).unwrap();
        let options = LoadOptions::uniform("dense".parse().unwrap()).in_f32();
        let (base, _) = checkpoint.load(&options, &Device::flex()).unwrap();
        let tuned = Tuned::load(base.clone(), &adapter).unwrap();
        let ids = Golden::open(&format!("{place}/golden.safetensors")).ints("input_ids");
        let row: Vec<u32> = ids[..24].iter().map(|&id| id as u32).collect();
        let batch = TokenBatch::new(&[row]).unwrap();
        let logits = |tuned: &Tuned<Decoder<QuantLinear>>| {
            let model = tuned.model();
            read(model.forward(&model.context(&batch, None).unwrap()))
        };
        let golden = Golden::open(&format!("peft/arch/{name}/golden.safetensors"));
        assert_close(name, &logits(&tuned), &golden.floats("logits"), 1e-5);
        // And again from the folder that is written of them.
        let saved = tempfile::tempdir().unwrap();
        tuned.save_peft(saved.path()).unwrap();
        let again = Tuned::load(base, saved.path()).unwrap();
        assert_close(name, &logits(&again), &logits(&tuned), 1e-6);
        seen += 1;
    }
    assert_eq!(seen, 15);
}

#[test]
fn an_adapter_on_a_multimodal_checkpoint_is_read_for_its_text_part() {
    let place = testdata("peft/arch/gemma3_text");
    let checkpoint = Checkpoint::open(testdata("tiny/gemma3-text-f32")).unwrap();
    let options = LoadOptions::uniform("dense".parse().unwrap()).in_f32();
    let (base, _) = checkpoint.load(&options, &Device::flex()).unwrap();
    let ids = [[3, 14, 15, 92, 65, 35].to_vec()];
    let logits = |folder: &std::path::Path| {
        let tuned = Tuned::load(base.clone(), folder).unwrap();
        let model = tuned.model();
        read(model.forward(&model.context(&TokenBatch::new(&ids).unwrap(), None).unwrap()))
    };
    let bytes = std::fs::read(place.join("adapter_model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    for prefix in ["model.language_model.", "language_model.model."] {
        let folder = tempfile::tempdir().unwrap();
        // Targets by the last segments of their names, as adapters on wrappers have them.
        let text = std::fs::read_to_string(place.join("adapter_config.json")).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
        let names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
        config["target_modules"] = serde_json::json!(names);
        std::fs::write(folder.path().join("adapter_config.json"), config.to_string()).unwrap();
        let renamed = tensors.tensors().into_iter().map(|(name, view)| {
            (name.replace("base_model.model.model.", &format!("base_model.model.{prefix}")), view)
        });
        safetensors::serialize_to_file(renamed, None, &folder.path().join("adapter_model.safetensors"))
            .unwrap();
        assert_eq!(logits(folder.path()), logits(&place), "{prefix}");
    }
}

#[test]
fn gguf_files_hold_the_families_that_they_have_an_architecture_for() {
    use kiln::models::{
        config::{AttentionScale, LayerAttention},
        export::{GgufOptions, export_gguf},
        gguf::BlockType,
    };
    let mut seen = std::collections::BTreeSet::new();
    // Biases that only `llama` has, beside what it hasn't.
    for (folder, part) in [("smollm3", "layer_attention"), ("granite", "multiplier")] {
        let place = tempfile::tempdir().unwrap();
        let text = std::fs::read_to_string(testdata(&format!("arch/{folder}/config.json"))).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
        config["kiln"] = serde_json::json!({"qkv_bias": true});
        let config = kiln::models::config::ModelConfig::from_json(&config.to_string()).unwrap();
        let checkpoint = Checkpoint::open(testdata(&format!("arch/{folder}"))).unwrap();
        let (model, _) = checkpoint.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
        let model = with_biases(model, config);
        let path = place.path().join("model.gguf");
        let options = GgufOptions { tokenizer: false, ..GgufOptions::default() };
        let message = export_gguf(&model, &checkpoint, &path, &options).unwrap_err().to_string();
        assert!(message.contains(part), "{folder}: {message}");
    }
    let gemma3 = "../tiny/gemma3-text-f32".to_owned();
    for folder in folders().into_iter().chain([gemma3]) {
        let checkpoint = Checkpoint::open(testdata(&format!("arch/{folder}"))).unwrap();
        let options = LoadOptions::uniform("dense".parse().unwrap()).in_f32();
        let (mut model, _) = checkpoint.load(&options, &Device::flex()).unwrap();
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("model.gguf");
        let options = GgufOptions { dense: BlockType::F32, tokenizer: false, ..GgufOptions::default() };
        let refusal = |model: &Decoder<QuantLinear>, part: &str| {
            let message = export_gguf(model, &checkpoint, &path, &options).unwrap_err().to_string();
            assert!(message.contains(part), "{folder}: {message}");
        };
        let mut config = model.config().clone();
        if config.family.gguf.is_none() {
            refusal(&model, "architecture");
            continue;
        }
        if folder == "phi3-longrope" {
            refusal(&model, "rope.scaling");
            continue;
        }
        if folder == "qwen3_moe-mixed" || folder == "phi-norms" {
            refusal(&model, "block_kinds");
            continue;
        }
        // Keys can't say what these fixtures scale scores by, nor that one of their two blocks doesn't slide or isn't rotated.
        if let AttentionScale::Scalar(_) = config.attention_scale {
            refusal(&model, "attention_scale");
            config.attention_scale = AttentionScale::Scalar(config.head_dim as f64);
            model = model.with_config(config.clone()).unwrap();
        }
        if ["gemma3_text", "smollm3", "cohere2", "olmo3", "exaone4"].contains(&config.family.model_type) {
            refusal(&model, "layer_attention");
            config.layer_attention[1] = config.layer_attention[0];
            if config.family.model_type == "exaone4" {
                // Only its largest model slides.
                let plain = LayerAttention { sliding_window: None, rope: Some(0) };
                config.layer_attention = vec![plain; 2];
            }
            model = model.with_config(config.clone()).unwrap();
        }
        export_gguf(&model, &checkpoint, &path, &options).unwrap();
        let again = Checkpoint::open(&path).unwrap();
        assert_eq!(again.config().family, config.family, "{folder}");
        let (again, report) = again.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
        assert_eq!(report.notes, Vec::<String>::new(), "{folder}");
        assert_close(&folder, &logits(&again, &folder), &logits(&model, &folder), 1e-5);
        seen.insert(config.family.model_type);
    }
    let expected = "apertus arcee bloom cohere2 ernie4_5 exaone4 falcon gemma gemma2 gemma3_text gemma4_text glm4 gpt2 gpt_neox \
                    gpt_oss granite granitemoe hunyuan_v1_dense ministral3 mixtral olmo2 olmo3 phi phi3 qwen2_moe qwen3_5_text qwen3_moe \
                    seed_oss smollm3 \
                    stablelm starcoder2";
    assert_eq!(seen.into_iter().collect::<Vec<_>>().join(" "), expected);
}

#[test]
fn experts_stay_packed_in_gguf_files() {
    use kiln::{
        models::export::{Fallback, GgufOptions, export_gguf},
        quant::Scheme,
    };
    let (checkpoint, model) = load("qwen3_moe", "affine4:32:f16");
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("model.gguf");
    let options = GgufOptions { tokenizer: false, ..GgufOptions::default() };
    // Rows of 16, the way out, are no whole blocks.
    let message = export_gguf(&model, &checkpoint, &path, &options).unwrap_err().to_string();
    assert!(message.contains("experts.0.down_proj"), "{message}");
    let options = GgufOptions { fallback: Fallback::Dense, ..options };
    export_gguf(&model, &checkpoint, &path, &options).unwrap();
    let (again, _) =
        Checkpoint::open(&path).unwrap().load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
    for ((path, slot), (_, before)) in again.slots().into_iter().zip(model.slots()) {
        let down = path.contains(".experts.") && path.ends_with("down_proj");
        assert_eq!(slot.scheme() == Scheme::Dense, down || model.stays_dense(&path), "{path}");
        let tolerance = if down { 1e-3 } else { 0.0 };
        assert!(max_difference(&read(slot.weight()), &read(before.weight())) <= tolerance, "{path}");
    }
    assert!(relative_difference(&logits(&again, "qwen3_moe"), &logits(&model, "qwen3_moe")) < 1e-3);
}

/// Value heads of delta nets stand in another order in files, and with them the columns of what reads them: packed weights go there
/// group by group and come back code by code, and from a file to a file as they are.
#[test]
fn delta_nets_stay_packed_in_gguf_files() {
    use kiln::{
        models::{
            StoredWeight, TensorSource,
            export::{Fallback, GgufOptions, export_gguf},
            gguf::{BlockType, Gguf},
        },
        quant::{Plan, Scheme},
    };
    let (checkpoint, model) = load("qwen3_5_text", "affine4:8:f16");
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name);
    let options = GgufOptions { dense: BlockType::F32, tokenizer: false, ..GgufOptions::default() };
    // Groups of 8 are no block type's; what is written dense is the same model.
    let message = export_gguf(&model, &checkpoint, path("a.gguf"), &options).unwrap_err().to_string();
    assert!(message.contains("multiple of 32"), "{message}");
    let dense = GgufOptions { fallback: Fallback::Dense, ..options.clone() };
    let report = export_gguf(&model, &checkpoint, path("a.gguf"), &dense).unwrap();
    assert!(report.rows.iter().all(|row| row.max_difference < 1e-6), "{report}");
    let read_back = |name: &str| {
        let checkpoint = Checkpoint::open(path(name)).unwrap();
        let (model, _) = checkpoint.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
        (checkpoint, model)
    };
    let expected = logits(&model, "qwen3_5_text");
    assert_close("dense", &logits(&read_back("a.gguf").1, "qwen3_5_text"), &expected, 1e-5);
    // The output's inputs are one group, within which they change places.
    let plan: Plan<Scheme> = Plan::uniform("affine4:32:f16".parse().unwrap());
    let mut load = LoadOptions::default().in_f32();
    load.schemes = Some(plan.with_override("mlp.down_proj", Scheme::Dense).unwrap());
    let (model, _) = checkpoint.load(&load, &Device::flex()).unwrap();
    export_gguf(&model, &checkpoint, path("b.gguf"), &options).unwrap();
    let (again, packed) = read_back("b.gguf");
    for ((path, slot), (_, before)) in packed.slots().into_iter().zip(model.slots()) {
        assert_eq!(slot.scheme() == Scheme::Dense, path.ends_with("mlp.down_proj"), "{path}");
        assert!(max_difference(&read(slot.weight()), &read(before.weight())) < 1e-6, "{path}");
    }
    // From there to a file again: what was read with its inputs in the file's order is written as it was.
    let report = export_gguf(&packed, &again, path("c.gguf"), &options).unwrap();
    let exact = |name: &str| {
        report.rows.iter().filter(move |row| row.name.contains(name)).all(|row| row.max_difference == 0.0)
    };
    assert!(exact("proj"), "{report}");
    let stored = |name: &str| {
        let file = Gguf::open(path(name)).unwrap();
        match file.weight("model.layers.0.linear_attn.out_proj").unwrap() {
            StoredWeight::Packed(weight) => weight,
            StoredWeight::Dense(_) => panic!("a dense weight"),
        }
    };
    let weight = stored("b.gguf");
    // Two value heads use each key head; the file has one of each in turn.
    let order: Vec<u32> = [0, 2, 1, 3].into_iter().flat_map(|head| head * 8..(head + 1) * 8).collect();
    assert_eq!((weight.scheme.to_string().as_str(), &weight.input_order), ("affine4:32:f16", &Some(order)));
    assert_eq!(weight, stored("c.gguf"));
    // As Q8_0, dense weights change places before they are packed.
    let q8 = GgufOptions { dense: BlockType::Q8_0, ..options };
    let (checkpoint, model) = self::load("qwen3_5_text", "dense");
    export_gguf(&model, &checkpoint, path("d.gguf"), &q8).unwrap();
    assert_eq!(stored("d.gguf").input_order, weight.input_order);
    for ((path, slot), (_, before)) in read_back("d.gguf").1.slots().into_iter().zip(model.slots()) {
        let (found, expected) = (read(slot.weight()), read(before.weight()));
        let largest = expected.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        assert!(max_difference(&found, &expected) <= 0.6 / 127.0 * largest, "{path}");
    }
}

/// The same with biases of zero on queries, keys and values.
fn with_biases(
    model: Decoder<QuantLinear>,
    config: kiln::models::config::ModelConfig,
) -> Decoder<QuantLinear> {
    let mapped = model.try_map(|path, slot| {
        let asked = ["q_proj", "k_proj", "v_proj"].iter().any(|name| path.ends_with(name));
        let QuantLinear::Dense(mut linear) = slot else { panic!("a packed linear") };
        let [_, width] = linear.weight.val().dims();
        linear.bias =
            asked.then(|| Param::initialized(ParamId::new(), Tensor::zeros([width], &Device::flex())));
        Ok::<_, Infallible>(QuantLinear::Dense(linear))
    });
    mapped.unwrap().with_config(config).unwrap()
}

/// The README's table of families.
fn table() -> String {
    use kiln::models::families::{FAMILIES, NormAxis};
    let mut rows = String::from(
        "| `model_type` | class | heads and channels are pruned | AWQ scales norms | GGUF |\n| --- | --- | --- | --- | --- |\n",
    );
    for family in FAMILIES {
        let parts = family.blocks[0];
        let over_all =
            parts.norms().any(|norm| matches!(norm.place.axis(), NormAxis::Queries | NormAxis::Keys));
        let any =
            |is: fn(kiln::models::families::Parts) -> bool| family.blocks.iter().any(|parts| is(*parts));
        let pruned = match over_all || family.gguf.is_some_and(|gguf| gguf.alibi) {
            true => "channels",
            false if any(|parts| !parts.has_keys()) => "channels; heads where no keys are shared",
            false if any(|parts| parts.is_recurrent()) => "yes, but delta nets' heads",
            false => "yes",
        };
        let before = parts.norms().any(|norm| {
            use kiln::models::families::NormPlace::{PreAttention, PreMlp};
            matches!(norm.place, PreAttention | PreMlp)
        });
        // NanoChat's norms have no weights.
        let scaled = if before && family.model_type != "nanochat" { "yes" } else { "" };
        let gguf = family.gguf.map_or(String::new(), |gguf| format!("`{}`", gguf.name));
        let (model_type, class) = (family.model_type, family.architecture);
        rows += &format!("| `{model_type}` | `{class}` | {pruned} | {scaled} | {gguf} |\n");
    }
    rows
}

#[test]
fn the_readme_has_the_table_of_families() {
    let readme = std::fs::read_to_string(testdata("../README.md")).unwrap();
    let table = table();
    assert!(readme.contains(&table), "README.md should contain:\n{table}");
}

/// What a folder says of experts and the model doesn't have is refused by name.
#[test]
fn adapters_on_stacks_that_do_not_fit_are_refused() {
    let checkpoint = Checkpoint::open(testdata("arch/mixtral")).unwrap();
    let (base, _) = checkpoint.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
    let dense = Checkpoint::open(testdata("arch/granite")).unwrap();
    let (dense, _) = dense.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
    let text = std::fs::read_to_string(testdata("peft/arch/mixtral-experts/adapter_config.json")).unwrap();
    let changed = |key: &str, value: serde_json::Value, base: &Decoder<QuantLinear>| {
        let folder = tempfile::tempdir().unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
        config[key] = value;
        std::fs::write(folder.path().join("adapter_config.json"), config.to_string()).unwrap();
        let weights = "adapter_model.safetensors";
        std::fs::copy(testdata("peft/arch/mixtral-experts").join(weights), folder.path().join(weights))
            .unwrap();
        match Tuned::load(base.clone(), folder.path()) {
            Ok(tuned) => Ok(tuned.adapters().len()),
            Err(error) => Err(error.to_string()),
        }
    };
    let parameters = |names: &[&str]| serde_json::json!(names);
    let given = ["gate.weight", "gate_up_proj", "down_proj"];
    assert!(changed("target_parameters", parameters(&given), &base).is_ok());
    let cases = [
        (parameters(&["experts.weight"]), "target_parameters"),
        // What stands below `base_layer` then has no owner.
        (parameters(&["down_proj"]), "base_layer"),
        (parameters(&["gate_up_proj"]), "experts.lora_A"),
    ];
    for (value, part) in cases {
        let message = changed("target_parameters", value, &base).unwrap_err();
        assert!(message.contains(part), "{message}");
    }
    let message = changed("rank_pattern", serde_json::json!({}), &base).unwrap_err();
    assert!(message.contains("base_layer.lora_A"), "{message}");
    let message = changed("target_parameters", parameters(&given), &dense).unwrap_err();
    assert!(message.contains("target_parameters"), "{message}");
}

/// Routers take adapters like other linears, and no plan, calibration or search quantizes them.
#[test]
fn routers_are_adapted_and_stay_dense() {
    for (folder, routers) in [("mixtral", 2), ("qwen2_moe", 4), ("gpt_oss", 2), ("gemma4_text-moe", 2)] {
        let checkpoint = Checkpoint::open(testdata(&format!("arch/{folder}"))).unwrap();
        let options = LoadOptions::uniform("affine4:16".parse().unwrap()).in_f32();
        let (model, _) = checkpoint.load(&options, &Device::flex()).unwrap();
        let dense = |model: &Decoder<QuantLinear>| {
            let slots = model.slots().into_iter();
            slots.filter(|(_, slot)| matches!(slot, QuantLinear::Dense(_))).count()
        };
        assert_eq!(dense(&model), routers, "{folder}");
        let tuned = Tuned::attach(model, &AdapterConfig::lora(2, 4.0)).unwrap();
        let adapters = tuned.adapters();
        let paths: Vec<&str> = adapters.iter().map(|(path, _)| path.as_ref()).collect();
        let adapted = paths.iter().filter(|path| tuned.model().stays_dense(path)).count();
        assert_eq!(adapted, routers, "{folder}: {paths:?}");
        let plan = kiln::quant::Plan::uniform("affine2:16".parse().unwrap());
        let (again, _) = tuned.requantize(&plan, &kiln::quant::MinMax).unwrap();
        assert_eq!(dense(&again), routers, "{folder}");
    }
}

/// A slot that says whether it takes rounded operands, and counts those that it hears.
#[derive(Module, Debug)]
struct Hears<P: Projection> {
    inner: P,
    #[module(skip)]
    takes: bool,
    #[module(skip)]
    heard: Heard,
}

#[derive(Debug, Clone, Default)]
struct Heard(Arc<std::sync::atomic::AtomicUsize>);

impl<P: Projection> Projection for Hears<P> {
    fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let rounded = x.dtype() == burn::tensor::DType::BF16;
        self.heard.0.fetch_add(usize::from(rounded), std::sync::atomic::Ordering::Relaxed);
        self.inner.forward(x)
    }

    fn takes_operands(&self) -> bool {
        self.takes && self.inner.takes_operands()
    }

    fn weight(&self) -> Tensor<2> {
        self.inner.weight()
    }

    fn bias(&self) -> Option<Tensor<1>> {
        self.inner.bias()
    }

    fn shape(&self) -> [usize; 2] {
        self.inner.shape()
    }

    fn compute(&self) -> Compute {
        self.inner.compute()
    }

    fn set_compute(&mut self, compute: Compute) {
        self.inner.set_compute(compute);
    }
}

#[test]
fn operands_that_are_kept_rounded_change_no_gradient_of_any_family() {
    if !Compute::Bf16.keeps_rounded(&Device::flex()) {
        kiln_testkit::skipped("this processor doesn't multiply bf16");
        return;
    }
    for folder in folders() {
        let checkpoint = Checkpoint::open(testdata(&format!("arch/{folder}"))).unwrap();
        let options = LoadOptions::uniform("affine4:32".parse().unwrap()).with_compute(Some(Compute::Bf16));
        let (model, _) = checkpoint.load(&options, &Device::flex()).unwrap();
        let config = AdapterConfig::lora(4, 8.0).with_method(Method::Lora { init: InitLoraWeights::Random });
        let adapted = Tuned::attach(model, &config).unwrap().into_model();
        let rows = rows(&folder);
        let tokens = TokenBatch::new(&rows).unwrap();
        let ids: Vec<u32> = rows.iter().flat_map(|row| row[1..].iter().chain(&row[..1])).copied().collect();
        let scored = vec![true; ids.len()];
        let run = |takes: bool| {
            let heard = Heard::default();
            let wrapped = adapted
                .clone()
                .try_map(|_, inner| Ok::<_, Infallible>(Hears { inner, takes, heard: heard.clone() }));
            let model = wrapped.unwrap().train();
            let mut sums = GradientsAccumulator::new();
            let targets = Targets { ids: &ids, scored: &scored };
            let loss =
                loss_and_gradients(&model, &tokens, targets, &DriverOptions::default(), &mut sums).unwrap();
            (loss, gradients::of(&model, &sums.grads()), heard.0.load(std::sync::atomic::Ordering::Relaxed))
        };
        let ((loss, found, rounded), (expected_loss, expected, none)) = (run(true), run(false));
        assert!(rounded > 0 && none == 0, "{folder}: {rounded} operands rounded, and {none}");
        assert!(loss.is_finite() && loss == expected_loss, "{folder}: {loss}, expected {expected_loss}");
        assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{folder}");
        // Where routers read the state too, its gradient is summed in another order, and its last bits decide how it is rounded
        // further down.
        let exact = checkpoint.config().experts.is_none();
        for (name, (shape, gradient)) in &found {
            let (expected_shape, expected) = &expected[name];
            let difference = relative_difference(gradient, expected);
            assert_eq!(shape, expected_shape);
            let same = if exact { gradient == expected } else { difference < 1e-3 };
            assert!(same, "{folder}: {name}, {difference:e}");
        }
    }
}
