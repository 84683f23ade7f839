//! Adapters of PEFT on the base that they were trained on, against PEFT's outputs.

use burn::{
    module::Module,
    tensor::{Device, Tensor, TensorData, activation::log_softmax},
};
use kiln_adapters::{Adapted, Lora, PeftFolder};
use kiln_models::{CausalLm, Checkpoint, Decoder, LoadOptions, Slots, TokenBatch};
use kiln_quant_core::QuantLinear;
use kiln_testkit::{Golden, assert_close, read, smollm2, testdata};

/// The references are f32 arithmetic on the stored weights.
const TOLERANCE: f32 = 1e-4;
/// As for the logits of SmolLM2 without adapters.
const SMOLLM2_TOLERANCE: f32 = 2e-3;
/// Relative, of the vector of norms: six times what is found.
const SMOLLM2_GRADIENT_TOLERANCE: f64 = 1e-4;

type Model = Decoder<Adapted<QuantLinear, Lora>>;

fn load(base: impl AsRef<std::path::Path>, adapter: &str) -> Model {
    let checkpoint = Checkpoint::open(base.as_ref()).unwrap();
    let (base, _) = checkpoint.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
    let folder = PeftFolder::open(testdata(adapter)).unwrap();
    let attacher = folder.attacher::<kiln_adapters::Lora>(&base.slot_shapes(), 0).unwrap();
    base.try_map(|path, slot| attacher.attach(path, slot)).unwrap()
}

/// Logits `[length, vocabulary]` of one sequence.
fn logits<M: CausalLm>(model: &M, ids: &[u32]) -> Tensor<2> {
    let logits = model.forward(&model.context(&TokenBatch::new(&[ids.to_vec()]).unwrap(), None).unwrap());
    logits.squeeze_dim(0)
}

/// Mean next-token cross-entropy.
fn loss(logits: Tensor<2>, ids: &[u32]) -> Tensor<1> {
    let targets: Vec<i64> = ids[1..].iter().map(|&id| id.into()).collect();
    let count = targets.len();
    let targets = Tensor::from_data(TensorData::new(targets, [count, 1]), &logits.device());
    log_softmax(logits.narrow(0, 0, count), 1).gather(1, targets).mean().neg()
}

fn ids(golden: &Golden, prompt: usize) -> Vec<u32> {
    golden.ints(&format!("p{prompt}.ids")).into_iter().map(|id| id as u32).collect()
}

/// The largest logits at the last position after merging.
fn merged_top(model: Model, ids: &[u32], count: usize) -> Vec<f32> {
    let merged = model.try_map(|_, slot| Ok::<_, std::convert::Infallible>(slot.merge_dense()));
    let Ok(merged) = merged;
    let mut last = read(logits(&merged, ids).narrow(0, ids.len() - 1, 1));
    last.sort_by(|a, b| b.total_cmp(a));
    last.truncate(count);
    last
}

#[test]
fn logits_and_gradients_of_a_lora_adapter_equal_peft() {
    let model = load(testdata("tiny/llama-tied-f32-sharded"), "peft/tiny-lora-r8-all");
    let golden = Golden::open("peft/tiny-lora-r8-all/golden.safetensors");
    let trained = model.clone().train();
    for prompt in 0..2 {
        let ids = ids(&golden, prompt);
        let what = |name: &str| format!("p{prompt}.{name}");
        let found = logits(&trained, &ids);
        assert_close(&what("logits"), &read(found.clone()), &golden.floats(&what("logits")), TOLERANCE);
        let loss = loss(found, &ids);
        assert_close(&what("loss"), &read(loss.clone()), &golden.floats(&what("loss")), 1e-5);
        let gradients = loss.backward();
        let mut seen = 0;
        for (path, slot) in trained.slots() {
            let lora = slot.adapter.as_ref().expect("adapters everywhere");
            for (factor, parameter) in [("A", &lora.lora_a), ("B", &lora.lora_b)] {
                let name = what(&format!("grad.base_model.model.{path}.lora_{factor}.default.weight"));
                let found = read(parameter.grad(&gradients).expect("a gradient").transpose());
                assert_close(&name, &found, &golden.floats(&name), TOLERANCE);
                seen += 1;
            }
        }
        let prefix = what("grad.");
        assert_eq!(seen, golden.names().filter(|name| name.starts_with(&prefix)).count());
    }
    let name = "p0.merged_logits_last_top";
    assert_close(name, &merged_top(model, &ids(&golden, 0), 16), &golden.floats(name), TOLERANCE);
}

/// Runs where `KILN_SMOLLM2` names the model's file.
#[test]
fn an_adapter_of_smollm2_equals_peft() {
    let Some(path) = smollm2() else { return };
    let model = load(path, "peft/smollm2-lora-r4-qv");
    let golden = Golden::open("peft/smollm2-lora-r4-qv/golden.safetensors");
    let trained = model.clone().train();
    for prompt in 0..2 {
        let ids = ids(&golden, prompt);
        let what = |name: &str| format!("p{prompt}.{name}");
        let close = |name: &str, found: &[f32]| {
            assert_close(&what(name), found, &golden.floats(&what(name)), SMOLLM2_TOLERANCE);
        };
        let found = logits(&trained, &ids);
        let last = read(found.clone().inner().narrow(0, ids.len() - 1, 1));
        close("logits_last_every16", &last.iter().step_by(16).copied().collect::<Vec<_>>());
        let top: Vec<f32> = golden.ints(&what("top32_ids")).into_iter().map(|id| last[id as usize]).collect();
        close("top32_values", &top);
        let loss = loss(found, &ids);
        close("loss", &read(loss.clone()));
        let gradients = loss.backward();
        let mut norms = Vec::new();
        for (_, slot) in trained.slots() {
            let Some(lora) = &slot.adapter else { continue };
            for parameter in [&lora.lora_a, &lora.lora_b] {
                let gradient = read(parameter.grad(&gradients).expect("a gradient"));
                norms.push(gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt() as f32);
            }
        }
        let name = what("grad_l2");
        let relative = kiln_testkit::relative_difference(&norms, &golden.floats(&name));
        assert!(relative < SMOLLM2_GRADIENT_TOLERANCE, "{name}: {relative:e}");
    }
    let name = "p0.merged_logits_last_top";
    let found = merged_top(model, &ids(&golden, 0), 16);
    assert_close(name, &found, &golden.floats(name), SMOLLM2_TOLERANCE);
}
