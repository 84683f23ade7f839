//! What every stage does with Gemma 3, the family whose description has most in it: adapters, a side network, a space to
//! search. Its logits and gradients are compared with transformers in `kiln-models`.

use std::sync::Arc;

use burn::{module::Module, tensor::Device};
use kiln::{
    Tuned,
    adapters::AdapterConfig,
    models::{
        CausalLm, Checkpoint, Decoder, LoadOptions, Recompute, Slots, TokenBatch,
        export::{ExportOptions, FloatType, export_hf},
    },
    quant::QuantLinear,
    training::{BatchOptions, DataOptions, Dataset, RunOptions, Trainer, TrainerConfig},
};
use kiln_testkit::{Golden, max_difference, read, relative_difference, testdata};

const FOLDER: &str = "tiny/gemma3-text-f32";

fn load(scheme: &str) -> (Checkpoint, Decoder<QuantLinear>) {
    let checkpoint = Checkpoint::open(testdata(FOLDER)).unwrap();
    let options = LoadOptions::uniform(scheme.parse().unwrap()).in_f32();
    let (model, _) = checkpoint.load(&options, &Device::flex()).unwrap();
    (checkpoint, model)
}

fn tokens() -> TokenBatch {
    let ids = Golden::open(&format!("{FOLDER}/golden.safetensors")).ints("input_ids");
    let rows: Vec<Vec<u32>> = ids.chunks(24).map(|row| row.iter().map(|&id| id as u32).collect()).collect();
    TokenBatch::new(&rows).unwrap()
}

fn logits<M: CausalLm>(model: &M) -> Vec<f32> {
    read(model.forward(&model.context(&tokens(), None).unwrap()))
}

/// A few steps on the fixture's tokens; the losses.
fn train<M: CausalLm>(model: M, recompute: Recompute) -> (M, Vec<f64>) {
    let data = Dataset::from_ids(tokens().ids, &DataOptions::new(23, model.vocab_size())).unwrap();
    let mut config = TrainerConfig::new(6, BatchOptions::new(2));
    (config.lr, config.recompute) = (1e-2, recompute);
    let mut trainer = Trainer::new(model, Arc::new(data), config).unwrap();
    let losses = trainer.run(&RunOptions::new()).unwrap().steps.iter().map(|step| step.loss).collect();
    (trainer.into_model(), losses)
}

#[test]
fn an_adapter_of_gemma3_is_trained_saved_as_peft_and_merged_into_an_export() {
    let (checkpoint, base) = load("affine4:16");
    let config = AdapterConfig::lora(4, 8.0).with_dropout(0.1).with_seed(3);
    let tuned = Tuned::attach(base.clone(), &config).unwrap();
    assert_eq!(tuned.adapters().len(), 2 * 7);
    let (model, adapters) = tuned.into_parts();
    let (trained, losses) = train(model.clone(), Recompute::None);
    assert!(losses[5] < losses[0], "{losses:?}");
    // Recomputed blocks drop the same elements.
    for (again, plain) in train(model, Recompute::Block).1.iter().zip(&losses) {
        assert!((again / plain - 1.0).abs() < 1e-6, "{again} and {plain}");
    }
    let tuned = Tuned::<kiln::models::Decoder<_>>::from_parts(trained, adapters);
    let expected = logits(tuned.model());
    assert!(max_difference(&expected, &logits(&base)) > 1e-2);

    let folder = tempfile::tempdir().unwrap();
    let adapter = folder.path().join("adapter");
    tuned.save_peft(&adapter).unwrap();
    let loaded = Tuned::load(base, &adapter).unwrap();
    assert_eq!(logits(loaded.model()), expected);

    let merged = loaded.merge_dense();
    let exported = folder.path().join("merged");
    export_hf(&merged, &checkpoint, &exported, &ExportOptions::new(FloatType::F32)).unwrap();
    let again = Checkpoint::open(&exported).unwrap();
    assert_eq!(again.config(), checkpoint.config());
    let (again, report) = again.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
    assert_eq!(report.notes, Vec::<String>::new());
    assert!(relative_difference(&logits(&again), &expected) < 1e-5);
}

#[cfg(feature = "side-tuning")]
#[test]
fn a_side_network_has_gemma3s_blocks() {
    use kiln::side_tuning::{SideConfig, SideTuned};
    let (_, base) = load("affine4:16");
    let config = SideConfig::qst().with_reduction(4);
    let counts = config.parameter_counts(base.config()).unwrap();
    let model = SideTuned::new(base.clone(), &config, 5).unwrap();
    assert_eq!(model.side.blocks[0].parts().count(), 13);
    assert_eq!(kiln::quant::trained_values(&model.side.clone().train()), counts.total());
    // Alpha 1: training starts at the backbone.
    assert_eq!(logits(&model), logits(&base));
    let (_, losses) = train(model, Recompute::None);
    assert!(losses[5] < losses[0], "{losses:?}");
}

#[cfg(feature = "mixq-search")]
#[test]
fn a_space_of_gemma3_counts_the_bytes_of_the_loaded_plan() {
    use kiln::mixq::{Choices, load_options, space_of};
    let (checkpoint, base) = load("dense");
    let choices = Choices::new(["affine2:16", "affine4:16"].map(|scheme| scheme.parse().unwrap()));
    let space = space_of(&base, &choices).unwrap();
    let config = space.highest();
    let plan = space.plan(&config);
    let (loaded, report) = checkpoint.load(&load_options(&plan).unwrap(), &Device::flex()).unwrap();
    assert_eq!(loaded.stored_bytes() as u64, space.bytes(&config));
    assert_eq!(report.storage.total_bytes(), loaded.stored_bytes());
    assert_eq!(loaded.slots().len(), 14);
}
