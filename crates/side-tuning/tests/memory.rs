//! Predicted and measured peaks of training steps. Each measurement runs this binary again with the name of the one
//! test that does it, so that it has a process of its own.

use std::sync::Arc;

use burn::{module::Module, tensor::Device};
use kiln_adapters::{AdapterConfig, LoraAttacher};
use kiln_models::{CausalLm, Checkpoint, Decoder, LoadOptions, Recompute, Slots, config::ModelConfig};
use kiln_quant_core::{Compute, QuantLinear, Scheme};
use kiln_side_tuning::{
    SideConfig, SideTuned,
    memory::{Halves, Method, ProcessConstants, Step, estimate},
};
use kiln_testkit::{figures_of, peak, report, smollm2, task, tiny};
use kiln_training::{BatchOptions, DataOptions, Dataset, Trainer, TrainerConfig};

const LOGIT_ROWS: usize = 256;

/// A configuration whose memory is predicted and measured.
#[derive(Debug, Clone)]
struct Case {
    method: String,
    recompute: Recompute,
    batch: usize,
    seq_len: usize,
    compute: Compute,
}

impl Case {
    fn parse(text: &str) -> Self {
        let parts: Vec<&str> = text.split(' ').collect();
        let recompute = if parts[1] == "block" { Recompute::Block } else { Recompute::None };
        let size = |index: usize| parts[index].parse().unwrap();
        let compute = parts.get(4).map_or(Compute::F32, |compute| compute.parse().unwrap());
        Self { method: parts[0].into(), recompute, batch: size(2), seq_len: size(3), compute }
    }

    fn method(&self) -> Method {
        match self.method.as_str() {
            "full" => Method::Full,
            "lora" | "qlora" => Method::Lora { rank: 16 },
            "lst" => Method::Side(SideConfig::lst()),
            _ => Method::Side(SideConfig::qst()),
        }
    }

    fn scheme(&self) -> &'static str {
        if ["qlora", "qst"].contains(&self.method.as_str()) { "nf4:64:double" } else { "dense" }
    }
}

/// The model, its shape and the bytes of its weights; the checkpoint, whose header may be large, is gone.
fn load(path: &str, case: &Case) -> (Decoder<QuantLinear>, ModelConfig, usize) {
    let scheme: Scheme = case.scheme().parse().unwrap();
    let options = LoadOptions::uniform(scheme).with_compute(Some(case.compute));
    let checkpoint = Checkpoint::open(path).unwrap();
    let (model, report) = checkpoint.load(&options, &Device::flex()).unwrap();
    (model, checkpoint.config().clone(), report.storage.total_bytes())
}

/// Peak resident memory after two steps, and the prediction.
fn measure(model_path: &str, case: &Case) -> (f64, f64) {
    let (model, shape, weight_bytes) = load(model_path, case);
    let Case { batch, seq_len, recompute, compute, .. } = *case;
    let halves = match (compute.keeps_rounded(&Device::flex()), case.scheme()) {
        (true, "dense") => Halves::Attention,
        (true, _) => Halves::Operands,
        (false, _) => Halves::None,
    };
    let step = Step { batch, seq_len, recompute, logit_rows: LOGIT_ROWS, halves };
    let predicted = estimate(&shape, weight_bytes, &case.method(), &step).unwrap();
    let run = |case: &Case| match case.method() {
        Method::Full => steps(model.unfreeze(), case),
        Method::Lora { rank } => {
            let attacher = LoraAttacher::new(&AdapterConfig::lora(rank, 16.0), &model.slot_shapes()).unwrap();
            steps(model.try_map(|path, base| attacher.attach(path, base)).unwrap(), case)
        }
        Method::Side(config) => steps(SideTuned::new(model, &config, 0).unwrap(), case),
        other => panic!("{other:?}"),
    };
    let trainable = run(case);
    assert_eq!(trainable as f64, predicted.trainable, "{case:?}");
    (peak(), predicted.peak_rss(&ProcessConstants::CPU))
}

fn steps<M: CausalLm>(model: M, case: &Case) -> usize {
    let ids = (0..4096 * 4).map(|i: u32| i * 31 % 2000).collect();
    let data = DataOptions::new(case.seq_len, model.vocab_size());
    let dataset = Arc::new(Dataset::from_ids(ids, &data).unwrap());
    let mut config = TrainerConfig::new(2, BatchOptions::new(case.batch));
    (config.recompute, config.logit_rows) = (case.recompute, LOGIT_ROWS);
    let mut trainer = Trainer::new(model, dataset, config).unwrap();
    let trainable = kiln_quant_core::trained_values(trainer.model());
    for _ in 0..2 {
        trainer.step().unwrap();
    }
    trainable
}

/// Measured and predicted bytes of each case, each in a process of its own.
fn compare(test: &str, model: &str, cases: &[&str]) -> Vec<(f64, f64)> {
    let child = |case: &&str| {
        let figures = figures_of(
            test,
            &format!(
                "{model}
{case}"
            ),
        );
        let (found, predicted) = (figures[0], figures[1]);
        println!(
            "{case:<22} measured {:7.1} MB, predicted {:7.1} MB, {:+.1} %",
            found / 1e6,
            predicted / 1e6,
            100.0 * (predicted / found - 1.0)
        );
        (found, predicted)
    };
    cases.iter().map(child).collect()
}

/// Whether this process is a child; if so, it measures.
fn is_child() -> bool {
    let Some(task) = task() else { return false };
    let (model, case) = task.split_once('\n').unwrap();
    let (found, predicted) = measure(model, &Case::parse(case));
    report(&[found, predicted]);
    true
}

fn within(results: &[(f64, f64)], tolerance: f64) {
    assert!(
        results.iter().all(|(found, predicted)| (predicted / found - 1.0).abs() < tolerance),
        "{results:?}"
    );
}

/// The configurations by which the constants of the prediction were chosen.
#[test]
fn peaks_on_the_embedded_model_are_as_predicted() {
    if is_child() {
        return;
    }
    let model = tiny();
    let cases = [
        "full none 4 256",
        "full block 16 256",
        "lora none 16 256",
        "qlora none 16 256",
        "qlora block 16 256",
        "lst none 16 256",
        "qst none 16 256",
        "qst block 16 256",
    ];
    let in_bf16 = [
        "full none 4 256 bf16",
        "lora none 16 256 bf16",
        "qlora none 16 256 bf16",
        "qlora block 16 256 bf16",
        "qst none 16 256 bf16",
    ];
    let cases = match Compute::Bf16.is_native(&Device::flex()) {
        true => [&cases[..], &in_bf16].concat(),
        false => cases.to_vec(),
    };
    let test = "memory::peaks_on_the_embedded_model_are_as_predicted";
    within(&compare(test, &model.display().to_string(), &cases), 0.15);
}

/// Configurations that no constant was chosen by.
#[test]
fn peaks_on_smollm2_are_as_predicted() {
    if is_child() {
        return;
    }
    let Some(file) = smollm2() else { return };
    let cases = [
        "full block 2 160",
        "lora none 1 320",
        "lora block 4 160",
        "qlora none 3 160",
        "qlora block 4 224",
        "lst none 1 320",
        "lst block 4 192",
        "qst none 4 160",
        "qst none 2 384",
        "qst block 6 224",
    ];
    let test = "memory::peaks_on_smollm2_are_as_predicted";
    within(&compare(test, &file.display().to_string(), &cases), 0.15);
}
