//! Small checkpoints of every architecture and format against transformers' outputs.

use std::collections::BTreeSet;

use burn::{
    module::Module,
    tensor::{Device, Tensor, TensorData, activation::log_softmax},
};
use kiln_models::{
    CausalLm, Checkpoint, Decoder, GenerateOptions, KvCache, LoadOptions, TokenBatch, config::ModelConfig,
    generate,
};
use kiln_quant_core::QuantLinear;
use kiln_testkit::{Golden, assert_close, read, testdata};

/// The references are f32 arithmetic on the stored weights.
const TOLERANCE: f32 = 1e-4;

/// Of logits and states; of those of `testdata/arch`, where some mistakes move them by little, relative to the largest.
fn tolerance(folder: &str, expected: &[f32]) -> f32 {
    match ARCHITECTURES.contains(&folder) {
        true => 1e-5 * expected.iter().fold(0.0, |max, value| value.abs().max(max)),
        false => TOLERANCE,
    }
}

fn load(folder: &str) -> (Decoder<QuantLinear>, Golden) {
    let place = if ARCHITECTURES.contains(&folder) { "arch" } else { "tiny" };
    let checkpoint = Checkpoint::open(testdata(&format!("{place}/{folder}"))).unwrap();
    let (model, report) = checkpoint.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
    assert!(!report.notes.iter().any(|note| note.starts_with("tensor ")), "{folder}: {:?}", report.notes);
    (model, Golden::open(&format!("{place}/{folder}/golden.safetensors")))
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

/// Folders of `testdata/arch`.
const ARCHITECTURES: [&str; 47] = [
    "apertus",
    "arcee",
    "bloom",
    "cohere2",
    "ernie4_5",
    "exaone4",
    "falcon",
    "gemma",
    "gemma2",
    "gemma4_text",
    "gemma4_text-moe",
    "gemma4_text-shared",
    "glm4",
    "gpt2",
    "gpt_neox",
    "gpt_neox-rotary",
    "gpt_oss",
    "gpt_oss-yarn",
    "granite",
    "granitemoe",
    "granitemoehybrid",
    "granitemoehybrid-nope",
    "helium",
    "hunyuan_v1_dense",
    "ministral",
    "ministral3",
    "ministral3-temperature",
    "mixtral",
    "nanochat",
    "olmo2",
    "olmo3",
    "olmoe",
    "opt-post",
    "phi",
    "phi-norms",
    "phi3",
    "phi3-longrope",
    "phi3-partial",
    "qwen2_moe",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_moe-mixed",
    "seed_oss",
    "smollm3",
    "stablelm",
    "stablelm-rotary",
    "starcoder2",
];

fn dense_folders() -> impl Iterator<Item = &'static str> {
    DENSE.into_iter().chain(ARCHITECTURES)
}

/// Their files keep the gradients of what the scaling, the window or the type touches.
const PARTLY: [&str; 8] = [
    "llama-untied-f16",
    "llama-untied-bf16",
    "qwen2-tied-f32",
    "llama-rope-linear",
    "llama-rope-dynamic",
    "llama-rope-yarn",
    "llama-rope3-headdim24-f32",
    "mistral-swa8-f32",
];

#[test]
fn logits_and_hidden_states_equal_transformers() {
    for folder in dense_folders().chain([
        "llama-untied-gptq4-v1",
        "llama-untied-gptq3-v2-actorder",
        "llama-untied-bnb-nf4-double",
    ]) {
        let (model, golden) = load(folder);
        let context = model.context(&TokenBatch::new(&rows(&golden, "input_ids")).unwrap(), None).unwrap();
        let close = |name: &str, found: Tensor<3>| {
            let expected = golden.floats(name);
            assert_close(&format!("{folder} {name}"), &read(found), &expected, tolerance(folder, &expected));
        };
        close("logits", model.forward(&context));
        if golden.contains("hidden.0") {
            for (index, state) in model.hidden_states(&context).into_iter().enumerate() {
                // transformers tells OPT's last state as the head reads it.
                let state = if index == model.num_blocks() { model.head_input(state) } else { state };
                close(&format!("hidden.{index}"), state);
            }
        }
    }
}

/// Mean next-token cross-entropy over all rows.
fn loss<M: CausalLm>(model: &M, rows: &[Vec<u32>]) -> Tensor<1> {
    let (batch, length) = (rows.len(), rows[0].len());
    let logits = model.forward(&model.context(&TokenBatch::new(rows).unwrap(), None).unwrap());
    let vocabulary = logits.dims()[2];
    let targets: Vec<i64> = rows.iter().flat_map(|row| row[1..].iter().map(|&id| i64::from(id))).collect();
    let targets = Tensor::from_data(TensorData::new(targets, [batch * (length - 1), 1]), &model.device());
    let logits = logits.narrow(1, 0, length - 1).reshape([batch * (length - 1), vocabulary]);
    log_softmax(logits, 1).gather(1, targets).mean().neg()
}

#[test]
fn every_gradient_equals_torch() {
    for folder in dense_folders() {
        let (model, golden) = load(folder);
        let model = model.unfreeze().train();
        let loss = loss(&model, &rows(&golden, "input_ids"));
        assert_close(folder, &read(loss.clone()), &golden.floats("loss"), 1e-5);
        let gradients = loss.backward();
        let mut seen = BTreeSet::new();
        for (name, tensor) in dense_parameters(&model) {
            let (expected, values) = match expert_gradient(&golden, &name, model.config()) {
                Some(found) => found,
                None => {
                    let expected = format!("grad.{}", in_memory(&name));
                    if PARTLY.contains(&folder) && !golden.contains(&expected) {
                        continue;
                    }
                    let values = golden.floats(&expected);
                    (expected, values)
                }
            };
            let found = match tensor {
                Parameter::Vector(tensor) => tensor.grad(&gradients).map(read),
                Parameter::Linear(tensor) => tensor.grad(&gradients).map(|g| read(g.transpose())),
                Parameter::Table(tensor) => tensor.grad(&gradients).map(read),
            };
            let found = found.unwrap_or_else(|| panic!("{folder} {name}: no gradient"));
            assert_close(&format!("{folder} {name}"), &found, &values, TOLERANCE);
            seen.insert(expected);
        }
        assert_eq!(seen.len(), golden.names().filter(|name| name.starts_with("grad.")).count(), "{folder}");
    }
}

/// The name that transformers gives a parameter in memory, where it isn't that of its files.
fn in_memory(name: &str) -> String {
    match name {
        "embed_out.weight" => "lm_head.weight".into(),
        name => name.replace("block_sparse_moe.gate", "mlp.gate").replace("router.layer", "router"),
    }
}

/// The gradient of one expert's linear, out of those of all experts, which transformers stacks in memory.
fn expert_gradient(golden: &Golden, name: &str, config: &ModelConfig) -> Option<(String, Vec<f32>)> {
    let (block, rest) = name.split_once(".experts.")?;
    let [expert, linear, kind] = rest.split('.').collect::<Vec<_>>().try_into().ok()?;
    let (stacked, half) = match linear {
        "gate_proj" | "w1" => ("gate_up_proj", Some(0)),
        "up_proj" | "w3" => ("gate_up_proj", Some(1)),
        _ => ("down_proj", None),
    };
    let bias = if kind == "bias" { "_bias" } else { "" };
    let names = [block.to_owned(), block.replace("block_sparse_moe", "mlp")];
    let mut names = names.iter().map(|block| format!("grad.{block}.experts.{stacked}{bias}"));
    let stacked = names.find(|name| golden.contains(name)).unwrap();
    let (all, shape) = (golden.floats(&stacked), golden.shape(&stacked).to_vec());
    let expert = &all[expert.parse::<usize>().unwrap() * all.len() / shape[0]..][..all.len() / shape[0]];
    // gpt-oss: `[d_input, d_output]`, gate and up channel by channel.
    let interleaved = config.family.model_type == "gpt_oss";
    let (rows, columns) = match (shape.as_slice(), interleaved) {
        ([_, rows], _) => (*rows, 1),
        ([_, columns, rows], true) => (*rows, *columns),
        ([_, rows, columns], _) => (*rows, *columns),
        _ => panic!("{stacked}: {shape:?}"),
    };
    let at = |row: usize, column: usize| match interleaved {
        true => expert[column * rows + row],
        false => expert[row * columns + column],
    };
    let chosen: Vec<usize> = match (half, interleaved) {
        (Some(half), true) => (half..rows).step_by(2).collect(),
        (Some(half), false) => (half * rows / 2..(half + 1) * rows / 2).collect(),
        (None, _) => (0..rows).collect(),
    };
    Some((stacked, chosen.into_iter().flat_map(|row| (0..columns).map(move |c| at(row, c))).collect()))
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
    const TABLES: [&str; 10] = [
        "embed_tokens",
        "embed_tokens_per_layer",
        "per_layer_model_projection",
        "project_in",
        "project_out",
        "embed_positions",
        "wte",
        "wpe",
        "word_embeddings",
        "embed_in",
    ];
    struct Collect {
        conv1d: bool,
        path: Vec<String>,
        found: Vec<(String, Parameter)>,
    }
    impl ModuleVisitor for Collect {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let path: Vec<&str> = self.path.iter().map(String::as_str).collect();
            // The enum variants' names are not part of checkpoint paths.
            let path: Vec<&str> =
                path.into_iter().filter(|part| !kiln_quant_core::is_variant(part)).collect();
            let mut name = path.join(".");
            if name.starts_with("decoder.") {
                name = format!("model.{name}");
            }
            if ["embed_positions", "wpe"].iter().any(|table| name.ends_with(table)) {
                name += ".weight";
            }
            let tensor = param.val();
            let table = TABLES.iter().any(|table| name.ends_with(&format!("{table}.weight")));
            // GPT-2's linears stand the other way round in its files.
            let table = table || name.starts_with("transformer.h") && self.conv1d;
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
    let mut collect = Collect { conv1d: model.config().family.conv1d, path: Vec::new(), found: Vec::new() };
    model.visit(&mut collect);
    collect.found
}

#[test]
fn left_padding_changes_nothing() {
    for folder in dense_folders() {
        let (model, golden) = load(folder);
        if !golden.contains("padded.input_ids") {
            continue;
        }
        let ids = rows(&golden, "padded.input_ids");
        let mask = rows(&golden, "padded.attention_mask");
        let (batch, length) = (ids.len(), ids[0].len());
        let tokens = TokenBatch::masked(ids.concat(), mask.concat(), batch, length).unwrap();
        let logits = model.forward(&model.context(&tokens, None).unwrap()).narrow(1, length - 1, 1);
        assert_close(folder, &read(logits), &golden.floats("padded.logits_last"), TOLERANCE);
    }
}

#[test]
fn a_padded_row_of_a_batch_equals_the_row_alone() {
    const PADDING: usize = 6;
    for folder in ARCHITECTURES {
        let (model, golden) = load(folder);
        let ids = rows(&golden, "input_ids");
        // The first row without its end, padded on the left to the length of the second.
        let (short, long) = (&ids[0][..ids[0].len() - PADDING], &ids[1]);
        let alone =
            model.forward(&model.context(&TokenBatch::new(&[short.to_vec()]).unwrap(), None).unwrap());
        let padded = [&[0; PADDING][..], short, long].concat();
        let mask = [&[0; PADDING][..], &vec![1; 2 * long.len() - PADDING]].concat();
        let tokens = TokenBatch::masked(padded, mask, 2, long.len()).unwrap();
        let together = model.forward(&model.context(&tokens, None).unwrap());
        // LongRoPE's factors are those of the longest row: the others differ where it is beyond the limit.
        if !model.cache_limit().is_some_and(|limit| short.len() <= limit && long.len() > limit) {
            let together = together.clone().narrow(0, 0, 1).narrow(1, PADDING, short.len());
            let alone = read(alone);
            assert_close(folder, &read(together), &alone, tolerance(folder, &alone));
        }
        let long_alone = model
            .forward(&model.context(&TokenBatch::new(std::slice::from_ref(long)).unwrap(), None).unwrap());
        let long_alone = read(long_alone);
        assert_close(folder, &read(together.narrow(0, 1, 1)), &long_alone, tolerance(folder, &long_alone));
    }
}

/// Longer than what a cache keeps of a window, and than a chunk of recurrent blocks.
#[test]
fn tokens_one_by_one_see_what_the_windows_of_a_whole_text_show() {
    for folder in ["ministral", "gemma2", "gemma4_text-shared", "gpt_oss", "qwen3_5_text", "mistral-swa8-f32"]
    {
        let (model, _) = load(folder);
        let length = model.max_positions().min(128);
        let ids: Vec<u32> = (0..length as u32).map(|i| (i * i * 7 + i * 31 + 5) % 96).collect();
        let whole = model
            .forward(&model.context(&TokenBatch::new(std::slice::from_ref(&ids)).unwrap(), None).unwrap());
        let mut cache = KvCache::new();
        for (place, id) in ids.iter().enumerate() {
            let tokens = TokenBatch::continuing(vec![*id], place as u32);
            let context = model.context(&tokens, Some(&cache)).unwrap();
            let found = read(model.lm_head(model.final_norm(model.residual(&context, Some(&mut cache)))));
            let expected = read(whole.clone().narrow(1, place, 1));
            assert_close(&format!("{folder}, token {place}"), &found, &expected, TOLERANCE);
        }
    }
}

#[test]
fn greedy_decoding_with_a_cache_equals_transformers() {
    for folder in dense_folders() {
        let (model, golden) = load(folder);
        if !golden.contains("greedy.prompt") {
            continue;
        }
        let mut cache = KvCache::new();
        let mut ids: Vec<u32> = rows(&golden, "greedy.prompt").concat();
        let expected = rows(&golden, "greedy.out").concat();
        let generated = generate(&model, &ids, &GenerateOptions::new(expected.len() - ids.len())).unwrap();
        assert_eq!([ids.clone(), generated.ids].concat(), expected, "{folder}, generated");
        if model.cache_limit().is_some() {
            continue;
        }
        let mut fresh = ids.clone();
        while ids.len() < expected.len() {
            let tokens = TokenBatch::continuing(fresh, cache.length() as u32);
            let context = model.context(&tokens, Some(&cache)).unwrap();
            let x = model.residual(&context, Some(&mut cache));
            let last = x.narrow(1, tokens.length - 1, 1);
            let next: i64 = model.lm_head(model.final_norm(last)).argmax(2).into_scalar();
            ids.push(next as u32);
            fresh = vec![next as u32];
        }
        assert_eq!(ids, expected, "{folder}");
    }
}
