//! Models, data and gradients for the other modules.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use burn::{
    module::{ModuleVisitor, Param},
    optim::{GradientsAccumulator, GradientsParams},
    tensor::{Device, Tensor},
};
use kiln_models::{
    CausalLm, Checkpoint, Decoder, DriverOptions, LoadOptions, Recompute, Targets, TokenBatch,
    loss_and_gradients,
};
use kiln_quant_core::{QuantLinear, Scheme};
use kiln_testkit::{ids, testdata};
use kiln_training::{BatchOptions, Batches, DataOptions, Dataset, TrainerConfig};

pub(crate) type Base = Decoder<QuantLinear>;

pub(crate) fn load(folder: impl AsRef<Path>, scheme: Option<&str>) -> Base {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let options = match scheme {
        Some(scheme) => LoadOptions::uniform(scheme.parse::<Scheme>().unwrap()).in_f32(),
        None => LoadOptions::default().in_f32(),
    };
    checkpoint.load(&options, &Device::flex()).unwrap().0
}

/// The embedded model at 4 bits.
pub(crate) fn embedded() -> Base {
    load(testdata("models/tiny-llama"), Some("nf4:64:double"))
}

/// Rows of the embedded model's training text.
pub(crate) fn text(seq_len: usize) -> Arc<Dataset> {
    let ids = ids("shift_test_moby").into_iter().take(40 * seq_len);
    Arc::new(Dataset::from_ids(ids.collect(), &DataOptions::new(seq_len, 2048)).unwrap())
}

/// The first of those rows.
pub(crate) fn first_row(seq_len: usize) -> Vec<u32> {
    Batches::new(text(seq_len), BatchOptions::new(1)).unwrap().next_batch().unwrap().tokens.ids
}

pub(crate) fn trainer_config(steps: u64, batch: usize) -> TrainerConfig {
    let mut config = TrainerConfig::new(steps, BatchOptions::new(batch));
    config.lr = 3e-3;
    config
}

/// Path without segments of enum variants.
fn name(path: &[String]) -> String {
    let lower = |name: &&String| !kiln_quant_core::is_variant(name);
    path.iter().filter(lower).map(String::as_str).collect::<Vec<_>>().join(".")
}

/// Gradients by name, matrices `[d_output, d_input]`.
pub(crate) struct Gradients<'a> {
    path: Vec<String>,
    from: &'a GradientsParams,
    pub found: BTreeMap<String, Vec<f32>>,
}

impl ModuleVisitor for Gradients<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.from.get::<D>(param.id) {
            let shape = gradient.dims();
            let mut values = kiln_testkit::read(gradient);
            if let [rows, columns] = shape[..] {
                let at = |i: usize| values[i % rows * columns + i / rows];
                values = (0..rows * columns).map(at).collect();
            }
            self.found.insert(name(&self.path), values);
        }
    }
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_string());
    }
    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
}

/// Mean loss of next-token prediction over one row, and its gradients.
pub(crate) fn next_token_gradients<M: CausalLm>(
    model: &M,
    ids: &[u32],
    recompute: Recompute,
) -> (f64, BTreeMap<String, Vec<f32>>) {
    let tokens = TokenBatch::new(&[ids.to_vec()]).unwrap();
    let count = ids.len() - 1;
    let targets: Vec<u32> = ids[1..].iter().copied().chain([0]).collect();
    let scored: Vec<bool> = (0..ids.len()).map(|place| place < count).collect();
    let options = DriverOptions { recompute, logit_rows: 3, ..DriverOptions::default() };
    let mut sums = GradientsAccumulator::new();
    let targets = Targets { ids: &targets, scored: &scored };
    let loss = loss_and_gradients(model, &tokens, targets, &options, &mut sums).unwrap();
    let sums = sums.grads();
    let mut gradients = Gradients { path: Vec::new(), from: &sums, found: BTreeMap::new() };
    model.visit(&mut gradients);
    for values in gradients.found.values_mut() {
        values.iter_mut().for_each(|value| *value /= count as f32);
    }
    (loss / count as f64, gradients.found)
}

/// The same folder as earlier versions wrote it, without the hash of its weights, so that these may be exchanged.
pub(crate) fn without_hash(folder: &Path) {
    let path = folder.join(kiln_side_tuning::CONFIG_FILE);
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert!(config.as_object_mut().unwrap().remove("weights_sha256").is_some());
    std::fs::write(&path, config.to_string()).unwrap();
}
