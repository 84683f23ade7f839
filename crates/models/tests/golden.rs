//! Small checkpoints of every architecture and format against transformers' outputs.

use burn::{
    module::Module,
    tensor::{Device, Tensor, TensorData, activation::log_softmax},
};
use kiln_models::{CausalLm, Checkpoint, Decoder, KvCache, LoadOptions, TokenBatch};
use kiln_quant_core::QuantLinear;
use kiln_testkit::{Golden, assert_close, read, testdata};

/// The references are f32 arithmetic on the stored weights.
const TOLERANCE: f32 = 1e-4;

fn load(folder: &str) -> (Decoder<QuantLinear>, Golden) {
    let checkpoint = Checkpoint::open(testdata(&format!("tiny/{folder}"))).unwrap();
    let (model, report) = checkpoint.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
    assert!(!report.notes.iter().any(|note| note.starts_with("tensor ")), "{folder}: {:?}", report.notes);
    (model, Golden::open(&format!("tiny/{folder}/golden.safetensors")))
}

fn rows(golden: &Golden, name: &str) -> Vec<Vec<u32>> {
    let length = golden.shape(name)[1];
    golden.ints(name).chunks(length).map(|row| row.iter().map(|&id| id as u32).collect()).collect()
}

const DENSE: [&str; 12] = [
    "llama-tied-f32-sharded",
    "llama-untied-bf16",
    "llama-untied-f16",
    "llama-rope3-headdim24-f32",
    "llama-rope-linear",
    "llama-rope-dynamic",
    "llama-rope-yarn",
    "qwen2-tied-f32",
    "qwen3-untied-f32",
    "mistral-swa8-f32",
    "opt-f32",
    "gemma3-text-f32",
];

const ROPE_SCALINGS: [&str; 3] = ["llama-rope-linear", "llama-rope-dynamic", "llama-rope-yarn"];

#[test]
fn logits_and_hidden_states_equal_transformers() {
    for folder in DENSE.into_iter().chain([
        "llama-untied-gptq4-v1",
        "llama-untied-gptq3-v2-actorder",
        "llama-untied-bnb-nf4-double",
    ]) {
        let (model, golden) = load(folder);
        let context = model.context(&TokenBatch::new(&rows(&golden, "input_ids")).unwrap(), None);
        assert_close(folder, &read(model.forward(&context)), &golden.floats("logits"), TOLERANCE);
        if golden.contains("hidden.0") {
            for (index, state) in model.hidden_states(&context).into_iter().enumerate() {
                let name = format!("hidden.{index}");
                assert_close(&format!("{folder} {name}"), &read(state), &golden.floats(&name), TOLERANCE);
            }
        }
    }
}

/// Mean next-token cross-entropy over all rows.
fn loss<M: CausalLm>(model: &M, rows: &[Vec<u32>]) -> Tensor<1> {
    let (batch, length) = (rows.len(), rows[0].len());
    let logits = model.forward(&model.context(&TokenBatch::new(rows).unwrap(), None));
    let vocabulary = logits.dims()[2];
    let targets: Vec<i64> = rows.iter().flat_map(|row| row[1..].iter().map(|&id| i64::from(id))).collect();
    let targets = Tensor::from_data(TensorData::new(targets, [batch * (length - 1), 1]), &model.device());
    let logits = logits.narrow(1, 0, length - 1).reshape([batch * (length - 1), vocabulary]);
    log_softmax(logits, 1).gather(1, targets).mean().neg()
}

#[test]
fn every_gradient_equals_torch() {
    for folder in DENSE {
        let (model, golden) = load(folder);
        let model = model.unfreeze().train();
        let loss = loss(&model, &rows(&golden, "input_ids"));
        assert_close(folder, &read(loss.clone()), &golden.floats("loss"), 1e-5);
        let gradients = loss.backward();
        let mut seen = 0;
        for (name, tensor) in dense_parameters(&model) {
            let expected = format!("grad.{name}");
            // The files of the RoPE scalings keep the gradients of what the scaling touches.
            if ROPE_SCALINGS.contains(&folder) && !golden.contains(&expected) {
                continue;
            }
            let expected = golden.floats(&expected);
            let found = match tensor {
                Parameter::Vector(tensor) => tensor.grad(&gradients).map(read),
                Parameter::Linear(tensor) => tensor.grad(&gradients).map(|g| read(g.transpose())),
                Parameter::Table(tensor) => tensor.grad(&gradients).map(read),
            };
            let found = found.unwrap_or_else(|| panic!("{folder} {name}: no gradient"));
            assert_close(&format!("{folder} {name}"), &found, &expected, TOLERANCE);
            seen += 1;
        }
        assert_eq!(seen, golden.names().filter(|name| name.starts_with("grad.")).count(), "{folder}");
    }
}

enum Parameter {
    Vector(Tensor<1>),
    /// `[d_input, d_output]`, transposed in the checkpoint.
    Linear(Tensor<2>),
    Table(Tensor<2>),
}

/// All parameters of a dense model under the checkpoint's names.
fn dense_parameters(model: &Decoder<QuantLinear>) -> Vec<(String, Parameter)> {
    use burn::module::{ModuleVisitor, Param};
    struct Collect {
        path: Vec<String>,
        found: Vec<(String, Parameter)>,
    }
    impl ModuleVisitor for Collect {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let path: Vec<&str> = self.path.iter().map(String::as_str).collect();
            // The enum variants' names are not part of checkpoint paths.
            let path: Vec<&str> =
                path.into_iter().filter(|part| !part.starts_with(|c: char| c.is_uppercase())).collect();
            let mut name = path.join(".");
            if name.starts_with("decoder.") {
                name = format!("model.{name}");
            }
            if name.ends_with("embed_positions") {
                name += ".weight";
            }
            let tensor = param.val();
            let table = name.contains("embed_");
            // The same leaf under its own rank: a reshape would be another node of the graph.
            let leaf = tensor.into_dispatch();
            let parameter = if D == 1 {
                Parameter::Vector(Tensor::from_dispatch(leaf))
            } else if table {
                Parameter::Table(Tensor::from_dispatch(leaf))
            } else {
                Parameter::Linear(Tensor::from_dispatch(leaf))
            };
            self.found.push((name, parameter));
        }
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.to_string());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
    }
    let mut collect = Collect { path: Vec::new(), found: Vec::new() };
    model.visit(&mut collect);
    collect.found
}

#[test]
fn left_padding_changes_nothing() {
    for folder in DENSE {
        let (model, golden) = load(folder);
        if !golden.contains("padded.input_ids") {
            continue;
        }
        let ids = rows(&golden, "padded.input_ids");
        let mask = rows(&golden, "padded.attention_mask");
        let (batch, length) = (ids.len(), ids[0].len());
        let tokens = TokenBatch::masked(ids.concat(), mask.concat(), batch, length).unwrap();
        let logits = model.forward(&model.context(&tokens, None)).narrow(1, length - 1, 1);
        assert_close(folder, &read(logits), &golden.floats("padded.logits_last"), TOLERANCE);
    }
}

#[test]
fn greedy_decoding_with_a_cache_equals_transformers() {
    for folder in DENSE {
        let (model, golden) = load(folder);
        if !golden.contains("greedy.prompt") {
            continue;
        }
        let mut cache = KvCache::new();
        let mut ids: Vec<u32> = rows(&golden, "greedy.prompt").concat();
        let expected = rows(&golden, "greedy.out").concat();
        let mut fresh = ids.clone();
        while ids.len() < expected.len() {
            let tokens = TokenBatch::continuing(fresh, cache.length() as u32);
            let context = model.context(&tokens, Some(&cache));
            let x = model.residual(&context, Some(&mut cache));
            let last = x.narrow(1, tokens.length - 1, 1);
            let next: i64 = model.lm_head(model.final_norm(last)).argmax(2).into_scalar();
            ids.push(next as u32);
            fresh = vec![next as u32];
        }
        assert_eq!(ids, expected, "{folder}");
    }
}
