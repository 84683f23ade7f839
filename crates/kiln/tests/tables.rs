//! Adapters that train embedding, head and norms, against PEFT.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use burn::{module::Module, optim::GradientsAccumulator, tensor::Device};
use kiln::{
    Base, Tuned,
    adapters::AdapterConfig,
    models::{
        CausalLm, Checkpoint, Decoder, DriverOptions, Embedding, LoadOptions, Recompute, Slots, Targets,
        TokenBatch,
        export::{ExportOptions, FloatType, export_hf, save_model, verify_export},
        loss_and_gradients,
    },
    quant::{Compute, QuantLinear, safetensors_file::SafetensorsFile},
    training::{BatchOptions, DataOptions, Dataset, RunOptions, Trainer, TrainerConfig},
};
use kiln_testkit::{Golden, assert_close, max_difference, read, testdata};

use crate::gradients::{self, transposed_from};

type TunedModel = Tuned<Decoder<QuantLinear>>;

/// Folders of `testdata/peft/tables`, each called after the checkpoint that it belongs to.
const FOLDERS: [&str; 9] = [
    "gemma2-added",
    "gemma2-embedding",
    "gemma2-lora",
    "gemma2-rows",
    "gemma2-saved",
    "gemma2-tying",
    "granite-lora",
    "granite-rows",
    "granite-saved",
];

fn checkpoint(name: &str) -> Checkpoint {
    let base = name.split('-').next().unwrap();
    Checkpoint::open(testdata(&format!("arch/{base}"))).unwrap()
}

fn base(name: &str) -> Decoder<QuantLinear> {
    checkpoint(name).load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap().0
}

fn peft(name: &str) -> std::path::PathBuf {
    testdata(&format!("peft/tables/{name}"))
}

fn ids(golden: &Golden) -> Vec<u32> {
    golden.ints("input_ids").into_iter().map(|id| id as u32).collect()
}

fn logits<M: CausalLm>(model: &M, ids: &[u32]) -> Vec<f32> {
    read(model.forward(&model.context(&TokenBatch::new(&[ids.to_vec()]).unwrap(), None).unwrap()))
}

/// PEFT's name of a gradient, and whether it is transposed there.
fn peft_gradient(path: &str) -> (String, bool) {
    let (module, parameter) = path.rsplit_once('.').unwrap();
    let module = module.trim_end_matches(".adapter");
    let (rest, transposed) = match (module, parameter) {
        ("model.embed_tokens", "lora_a") => ("lora_embedding_A.default", true),
        ("model.embed_tokens", "lora_b") => ("lora_embedding_B.default", true),
        (_, "lora_a") => ("lora_A.default.weight", true),
        (_, "lora_b") => ("lora_B.default.weight", true),
        (_, "token_rows") => ("token_adapter.trainable_tokens_delta.default", false),
        _ => ("modules_to_save.default.weight", module == "lm_head"),
    };
    (format!("grad.base_model.model.{module}.{rest}"), transposed)
}

#[test]
fn folders_of_peft_give_its_logits_losses_and_gradients() {
    for name in FOLDERS {
        let golden = Golden::open(&format!("peft/tables/{name}/golden.safetensors"));
        let tuned =
            TunedModel::load(base(name), peft(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        let ids = ids(&golden);
        assert_close(name, &logits(tuned.model(), &ids), &golden.floats("logits"), 1e-5);
        let model = tuned.into_model().train();
        let tokens = TokenBatch::new(std::slice::from_ref(&ids)).unwrap();
        let targets: Vec<u32> = ids[1..].iter().copied().chain([0]).collect();
        let scored: Vec<bool> = (0..ids.len()).map(|place| place + 1 < ids.len()).collect();
        let count = ids.len() as f64 - 1.0;
        for recompute in [Recompute::None, Recompute::Block] {
            // The head's rows in several parts.
            let options = DriverOptions { recompute, logit_rows: 5, ..DriverOptions::default() };
            let mut sums = GradientsAccumulator::new();
            let targets = Targets { ids: &targets, scored: &scored };
            let loss = loss_and_gradients(&model, &tokens, targets, &options, &mut sums).unwrap() / count;
            assert_close(name, &[loss as f32], &golden.floats("loss"), 1e-5);
            let found = gradients::of(&model, &sums.grads());
            let expected: Vec<&str> = golden.names().filter(|name| name.starts_with("grad.")).collect();
            assert_eq!(found.len(), expected.len(), "{name}: {:?}", found.keys());
            for (path, (shape, values)) in found {
                let (gradient, transposed) = peft_gradient(&path);
                let mut values: Vec<f32> = values.iter().map(|value| value / count as f32).collect();
                if transposed {
                    values = transposed_from(&shape, &values);
                }
                assert_close(&format!("{name} {gradient}"), &values, &golden.floats(&gradient), 1e-5);
            }
        }
    }
}

fn tensors(file: &Path) -> BTreeMap<String, Vec<usize>> {
    let file = SafetensorsFile::open(file).unwrap();
    file.names().map(|name| (name.to_owned(), file.describe(name).unwrap().1.to_vec())).collect()
}

#[test]
fn what_was_loaded_is_saved_with_the_same_tensors_and_loads_again() {
    for name in FOLDERS {
        let ids = ids(&Golden::open(&format!("peft/tables/{name}/golden.safetensors")));
        let tuned = TunedModel::load(base(name), peft(name)).unwrap();
        let expected = logits(tuned.model(), &ids);
        let folder = tempfile::tempdir().unwrap();
        let [as_peft, own] = ["peft", "own"].map(|name| folder.path().join(name));
        tuned.save_peft(&as_peft).unwrap();
        tuned.save(&own).unwrap();
        let (found, mut wanted) = (
            tensors(&as_peft.join("adapter_model.safetensors")),
            tensors(&peft(name).join("adapter_model.safetensors")),
        );
        if name == "gemma2-added" {
            // One table is enough where both are the same.
            assert!(wanted.remove("base_model.model.lm_head.weight").is_some());
        }
        if ["gemma2-lora", "gemma2-rows"].contains(&name) {
            wanted.retain(|name, _| !(name.contains("lm_head") && name.ends_with("base_layer.weight")));
        }
        assert_eq!(found, wanted, "{name}");
        for folder in [as_peft, own] {
            let again = TunedModel::load(base(name), &folder).unwrap();
            assert!(logits(again.model(), &ids) == expected, "{name}");
            assert_eq!(again.config().modules_to_save.is_empty(), tuned.config().modules_to_save.is_empty());
        }
    }
}

#[test]
fn merged_tables_compute_the_same_and_are_exported() {
    for name in FOLDERS {
        let ids = ids(&Golden::open(&format!("peft/tables/{name}/golden.safetensors")));
        let tuned = TunedModel::load(base(name), peft(name)).unwrap();
        let expected = logits(tuned.model(), &ids);
        let stays_tied = ["gemma2-added", "gemma2-rows", "gemma2-tying"].contains(&name);
        let merged = tuned.merge_dense();
        assert_close(name, &logits(&merged, &ids), &expected, 1e-5);
        assert_eq!(merged.config().tie_word_embeddings, stays_tied, "{name}");
        assert!(merged.table_updates().unwrap().is_empty());
        let folder = tempfile::tempdir().unwrap();
        let [own, hf] = ["own", "hf"].map(|name| folder.path().join(name));
        save_model(&merged, &checkpoint(name), &own).unwrap();
        export_hf(&merged, &checkpoint(name), &hf, &ExportOptions::new(FloatType::F32)).unwrap();
        for folder in [own, hf] {
            assert_eq!(verify_export(&folder, &merged, &ids).unwrap().max, 0.0, "{name}");
        }
    }
}

#[test]
fn unmerged_updates_are_not_exported() {
    let tuned = TunedModel::load(base("gemma2"), peft("gemma2-lora")).unwrap();
    let bare = tuned.into_model().try_map(|_, slot| Ok::<_, std::convert::Infallible>(slot.into_base()));
    let folder = tempfile::tempdir().unwrap();
    let error = save_model(&bare.unwrap(), &checkpoint("gemma2"), folder.path().join("model")).unwrap_err();
    assert!(error.to_string().contains("merged"), "{error}");
}

fn data(vocab_size: usize) -> Arc<Dataset> {
    let ids: Vec<u32> = (0..96u32).map(|i| i * 7 % vocab_size as u32).collect();
    Arc::new(Dataset::from_ids(ids, &DataOptions::new(24, vocab_size)).unwrap())
}

fn trainer(tuned: &TunedModel) -> Trainer<<Decoder<QuantLinear> as Slots>::With<kiln::AdaptedLinear>> {
    let mut config = TrainerConfig::new(6, BatchOptions::new(4));
    config.lr = 2e-2;
    let model = tuned.model().clone();
    let data = data(model.vocab_size());
    Trainer::new(model, data, config).unwrap().with_identity(tuned.identity())
}

/// How many rows of logits are held at once decides memory and nothing else, dropout on the head included.
#[test]
fn dropout_on_the_head_does_not_depend_on_the_rows_held_at_once() {
    let config = AdapterConfig::lora(3, 6.0).with_targets(["lm_head"]).with_seed(5).with_dropout(0.4);
    let tuned = TunedModel::attach(base("granite"), &config).unwrap();
    let losses = |rows: usize, dropout_at: u64| {
        let model = tuned.model().clone().train();
        let place = kiln::training::Place { step: dropout_at, micro_batch: 0, training: true };
        model.at(place);
        let ids: Vec<u32> = (0..24).map(|i| i * 5 % 96).collect();
        let tokens = TokenBatch::new(std::slice::from_ref(&ids)).unwrap();
        let targets = Targets { ids: &ids, scored: &[true; 24] };
        let options = DriverOptions { logit_rows: rows, ..DriverOptions::default() };
        let mut sums = GradientsAccumulator::new();
        loss_and_gradients(&model, &tokens, targets, &options, &mut sums).unwrap();
        let found = gradients::of(&model, &sums.grads());
        found["lm_head.lora_b"].1.clone()
    };
    let whole = losses(24, 1);
    assert!(max_difference(&whole, &losses(24, 2)) > 1e-3, "another step, another mask");
    for rows in [1, 5, 7, 23] {
        assert_close("gradients", &losses(rows, 1), &whole, 1e-5);
    }
}

fn options() -> Vec<AdapterConfig> {
    let lora = || AdapterConfig::lora(3, 6.0).with_seed(5).with_dropout(0.1);
    vec![
        lora().with_targets(["q_proj", "embed_tokens", "lm_head"]),
        lora().with_targets(["embed_tokens"]),
        lora().with_targets(["lm_head"]),
        lora().with_targets(["q_proj"]).with_modules_to_save(["embed_tokens"]),
        lora().with_targets(["q_proj"]).with_modules_to_save(["embed_tokens"]).with_keep_tied(),
        lora().with_targets(["q_proj"]).with_modules_to_save(["lm_head", "model.norm"]),
        lora().with_targets(["q_proj"]).with_trainable_tokens([3, 50, 7]),
    ]
}

/// Whatever may be trained, on a tied and an untied model: it begins as the base, learns, and a run that is cut and goes on
/// ends with the same bits.
#[test]
fn what_is_trained_outside_the_slots_learns_and_resumes_bit_for_bit() {
    for name in ["gemma2", "granite"] {
        for config in options() {
            let what = format!("{name} {:?} {:?}", config.targets, config.modules_to_save);
            let base = base(name);
            let ids: Vec<u32> = (0..24).map(|i| i * 5 % 96).collect();
            let tuned = TunedModel::attach(base.clone(), &config).unwrap();
            assert_close(&what, &logits(tuned.model(), &ids), &logits(&base, &ids), 1e-6);
            let mut whole = trainer(&tuned);
            let losses: Vec<f64> =
                whole.run(&RunOptions::new()).unwrap().steps.iter().map(|step| step.loss).collect();
            assert!(losses[5] < losses[0] - 0.01, "{what}: {losses:?}");
            let folder = tempfile::tempdir().unwrap();
            let mut first = trainer(&tuned);
            for _ in 0..3 {
                first.step().unwrap();
            }
            first.save(folder.path().join("last")).unwrap();
            let mut second = trainer(&tuned).resumed(folder.path().join("last")).unwrap();
            let rest: Vec<f64> =
                second.run(&RunOptions::new()).unwrap().steps.iter().map(|step| step.loss).collect();
            assert_eq!(rest, losses[3..], "{what}");
            let [whole, second] = [whole.into_model(), second.into_model()];
            let expected = logits(&whole, &ids);
            assert!(logits(&second, &ids) == expected, "{what}");
            assert!(max_difference(&expected, &logits(&base, &ids)) > 1e-3, "{what}");
            // What was trained is what is saved.
            let trained = TunedModel::from_parts(whole, config);
            let saved = folder.path().join("saved");
            trained.save_peft(&saved).unwrap();
            let again = TunedModel::load(base, &saved).unwrap();
            assert!(logits(again.model(), &ids) == expected, "{what}");
        }
    }
}

#[test]
fn a_packed_embedding_can_have_updates_and_becomes_dense_when_it_is_trained_whole() {
    let checkpoint = Checkpoint::open(testdata("gguf/llama-Q4_K_M.gguf")).unwrap();
    let (base, _) = checkpoint.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
    assert!(matches!(base.embed_tokens, Embedding::Packed(_)));
    let ids: Vec<u32> = (0..24).map(|i| i * 5 % 96).collect();
    let expected = logits(&base, &ids);
    for config in options() {
        let whole = config.modules_to_save.iter().any(|module| module == "embed_tokens");
        let tuned = TunedModel::attach(base.clone(), &config).unwrap();
        assert_eq!(matches!(tuned.model().embed_tokens, Embedding::Dense(_)), whole);
        assert_close("packed", &logits(tuned.model(), &ids), &expected, 1e-5);
        let mut trainer = trainer(&tuned);
        let losses = trainer.run(&RunOptions::new()).unwrap().steps;
        assert!(losses[5].loss < losses[0].loss, "{losses:?}");
        let merged = TunedModel::from_parts(trainer.into_model(), config).merge_dense();
        assert!(max_difference(&logits(&merged, &ids), &expected) > 1e-3);
    }
}

#[test]
fn added_tokens_are_trained_saved_and_found_again_with_their_tokenizer() {
    let open = || {
        Base::open(testdata("models/tiny-llama"))
            .unwrap()
            .with_bits(4)
            .with_compute(Compute::F32)
            .load()
            .unwrap()
    };
    let plain = open();
    let known = plain.model().vocab_size();
    let (base, added) = plain.with_added_tokens(&["<|call|>", "<|result|>"], true).unwrap();
    assert_eq!(added.len(), 2);
    assert_eq!(base.model().vocab_size(), known.max(*added.iter().max().unwrap() as usize + 1));
    let text = "The whale<|call|> was white<|result|>.";
    let prompt = base.tokenizer().encode(text, false).unwrap();
    assert!(added.iter().all(|id| prompt.contains(id)), "{prompt:?}");
    assert_eq!(base.tokenizer().decode(&prompt, false).unwrap(), text);
    // A new row is the mean of the others.
    let rows = read(base.model().table_rows(&(0..known as u32).collect::<Vec<_>>()));
    let width = rows.len() / known;
    let mean: Vec<f32> = (0..width)
        .map(|column| {
            let values = rows[column..].iter().step_by(width).map(|value| f64::from(*value));
            (values.sum::<f64>() / known as f64) as f32
        })
        .collect();
    let row = read(base.model().table_rows(&[*added.iter().max().unwrap()]));
    assert_close("a new row", &row, &mean, 1e-5);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("rows.jsonl");
    let row = format!("{{\"text\": \"{text}\"}}\n").repeat(4);
    std::fs::write(&file, row).unwrap();
    for (name, adapters) in [
        ("rows", AdapterConfig::lora(4, 8.0).with_trainable_tokens(added.clone())),
        ("whole", AdapterConfig::lora(4, 8.0).with_modules_to_save(["embed_tokens"])),
        ("frozen", AdapterConfig::lora(4, 8.0)),
    ] {
        let data = base.data(&file, 32).unwrap();
        let tuned = base.finetune(adapters, data).with_steps(4).with_lr(1e-2).run().unwrap();
        let expected = logits(tuned.model(), &prompt);
        let [own, as_peft] = ["own", "peft"].map(|kind| folder.path().join(format!("{name}-{kind}")));
        tuned.save(&own).unwrap();
        tuned.save_peft(&as_peft).unwrap();
        let merged = folder.path().join(format!("{name}-merged"));
        let dense = tuned.merge_dense();
        dense.save(&merged).unwrap();
        for folder in [own, as_peft] {
            let again = open().load_adapters(&folder).unwrap();
            assert!(logits(again.model(), &prompt) == expected, "{name}");
            let (again, gguf) = (again.merge_dense(), folder.join("model.gguf"));
            assert_eq!(again.tokenizer().encode(text, false).unwrap(), prompt, "{name}");
            again.export_gguf(&gguf).unwrap();
            let exported = Base::open(&gguf).unwrap().load().unwrap();
            assert_eq!(exported.tokenizer().encode(text, false).unwrap(), prompt, "{name}");
        }
        let merged = Base::open(&merged).unwrap().with_compute(Compute::F32).load().unwrap();
        assert_eq!(merged.tokenizer().encode(text, false).unwrap(), prompt, "{name}");
        assert_close(name, &logits(merged.model(), &prompt), &expected, 1e-4);
    }
    for wrong in [vec!["<|call|>"], vec![" "], vec!["<|new|>", "<|new|>"]] {
        assert!(
            base.with_added_tokens(&wrong, true).unwrap_err().to_string().contains("tokens"),
            "{wrong:?}"
        );
    }
}

/// `what` is in the message of what `config` gives.
fn refused(config: &AdapterConfig, what: &[&str]) {
    let error = TunedModel::attach(base("gemma2"), config).unwrap_err().to_string();
    assert!(what.iter().all(|what| error.contains(what)), "{error}");
}

#[test]
fn what_can_not_be_trained_is_refused_by_name() {
    let lora = || AdapterConfig::lora(3, 6.0).with_targets(["q_proj"]);
    refused(&lora().with_modules_to_save(["score"]), &["modules_to_save", "score"]);
    refused(&lora().with_modules_to_save(["down_proj"]), &["modules_to_save", "down_proj"]);
    refused(&lora().with_trainable_tokens([96]), &["trainable_tokens", "96"]);
    refused(&lora().with_trainable_tokens([9, 9]), &["trainable_tokens", "9 twice"]);
    refused(&lora().with_trainable_tokens([1]).with_modules_to_save(["embed_tokens"]), &["not both"]);
    refused(
        &AdapterConfig::dora(3, 6.0).with_targets(["q_proj", "lm_head"]),
        &["method", "embedding and head", "dora"],
    );
    // Slots alone have no embedding.
    let slots = base("gemma2").slot_shapes();
    let attach = |config: AdapterConfig| kiln::adapters::AnyAttacher::new(&config, &slots).unwrap_err();
    assert!(attach(lora().with_trainable_tokens([1])).to_string().contains("trainable_tokens"));
    assert!(attach(lora().with_modules_to_save(["lm_head"])).to_string().contains("modules_to_save"));
    assert!(attach(lora().with_targets(["lm_head"])).to_string().contains("targets"));
}

/// Changes sizes and values of a tensor; whether it stays.
type Change<'a> = dyn Fn(&str, &mut Vec<usize>, &mut Vec<f32>) -> bool + 'a;

/// Every tensor of a folder in turn is missing, too small, or a stranger.
#[test]
fn folders_that_do_not_fit_are_refused_by_tensor() {
    use kiln::quant::safetensors_file::{NewTensor, Values, write_safetensors};
    for name in FOLDERS {
        let file = SafetensorsFile::open(peft(name).join("adapter_model.safetensors")).unwrap();
        let names: Vec<String> = file.names().map(str::to_owned).collect();
        let load = |change: &Change<'_>| {
            let folder = tempfile::tempdir().unwrap();
            std::fs::copy(peft(name).join("adapter_config.json"), folder.path().join("adapter_config.json"))
                .unwrap();
            let tensors = names.iter().filter_map(|name| {
                let (mut shape, mut values) = file.read_f32(name).unwrap();
                change(name, &mut shape, &mut values).then_some((name.clone(), shape, values))
            });
            let tensors: Vec<_> = tensors.collect();
            let tensors: Vec<NewTensor<'_>> = tensors
                .iter()
                .map(|(name, shape, values)| NewTensor {
                    name: name.clone(),
                    shape: shape.clone(),
                    values: Values::F32(values),
                })
                .collect();
            write_safetensors(&folder.path().join("adapter_model.safetensors"), &tensors, &BTreeMap::new())
                .unwrap();
            TunedModel::load(base(name), folder.path())
        };
        for wanted in &names {
            let cut = load(&|name, shape, values| {
                if name == wanted {
                    shape[0] -= 1;
                    values.truncate(shape.iter().product());
                }
                true
            });
            let error = cut.unwrap_err().to_string();
            assert!(error.contains("adapter_model.safetensors"), "{name} {wanted}: {error}");
            let infinite = load(&|name, _, values| {
                if name == wanted {
                    values[0] = f32::INFINITY;
                }
                true
            });
            assert!(infinite.unwrap_err().to_string().contains("inf"), "{name} {wanted}");
        }
        let without = |part: &str| load(&|name, _, _| !name.contains(part));
        if name.ends_with("saved") {
            let error = without("embed_tokens.weight").unwrap_err().to_string();
            assert!(error.contains("model.embed_tokens.weight"), "{error}");
        }
        if name.ends_with("lora") {
            let error = without("lora_embedding_B").unwrap_err().to_string();
            assert!(error.contains("lora_embedding_B"), "{error}");
        }
        if name.ends_with("rows") {
            // Without its table nothing says that there are more tokens.
            let error = without("base_layer").and_then(|_| without("weight")).unwrap_err().to_string();
            assert!(error.contains("96") || error.contains("lora_A"), "{error}");
        }
    }
}
