//! The driver against plain autodiff and torch's gradients.

use std::collections::BTreeMap;

use burn::{
    module::{Module, ModuleVisitor, Param},
    optim::{GradientsAccumulator, GradientsParams},
    tensor::{Device, Tensor},
};
use kiln_models::{
    CausalLm, Checkpoint, Decoder, DriverOptions, LoadOptions, Recompute, Targets, TokenBatch,
    loss_and_gradients,
};
use kiln_quant_core::QuantLinear;
use kiln_testkit::{Golden, read, relative_difference, testdata};

/// All gradients in the module's order.
fn gradients<M: Module>(model: &M, gradients: &GradientsParams) -> Vec<Vec<f32>> {
    struct Collect<'a>(&'a GradientsParams, Vec<Vec<f32>>);
    impl ModuleVisitor for Collect<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.1.push(read(self.0.get::<D>(param.id).expect("a gradient for every parameter")));
        }
    }
    let mut collect = Collect(gradients, Vec::new());
    model.visit(&mut collect);
    collect.1
}

fn model(folder: &str) -> Decoder<QuantLinear> {
    let checkpoint = Checkpoint::open(testdata(folder)).unwrap();
    let (model, _) = checkpoint.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
    model.unfreeze().train()
}

/// Two packed rows with padding, of which some places are scored.
fn batch(vocabulary: u32) -> (TokenBatch, Vec<u32>, Vec<bool>) {
    let ids: Vec<u32> = (0..40).map(|i| (i * 37 + 11) % vocabulary).collect();
    let mut tokens = TokenBatch::masked(ids.clone(), vec![1; 40], 2, 20).unwrap();
    for place in 0..40 {
        tokens.segments[place] = [1, 1, 2, 0][place % 20 / 5];
        tokens.positions[place] = [0, 5, 0, 0][place % 20 / 5] + (place % 5) as u32;
    }
    let targets = (0..40).map(|place| ids[(place + 1) % 40]).collect();
    let scored = (0..40).map(|place| place % 20 < 14 && place % 3 != 0 && place % 20 != 9).collect();
    (tokens, targets, scored)
}

#[test]
fn recomputation_and_chunked_loss_equal_plain_autodiff() {
    let tiny = ["tiny/llama-tied-f32-sharded", "tiny/qwen3-untied-f32", "tiny/opt-f32"];
    // Keys of several blocks, inputs of single ones, embeddings that are projected, recurrent blocks.
    let others = ["gemma4_text-shared", "gemma4_text-moe", "opt-post", "qwen3_5_text"];
    let others: Vec<String> = others.iter().map(|folder| format!("arch/{folder}")).collect();
    for folder in tiny.into_iter().chain(others.iter().map(String::as_str)) {
        let model = model(folder);
        let vocabulary = model.vocab_size();
        let (tokens, targets, scored) = batch(vocabulary as u32);
        // Plain autodiff over everything at once, with Burn's own cross-entropy.
        let logits = model.forward(&model.context(&tokens, None).unwrap()).reshape([40, vocabulary]);
        let ids: Vec<i64> = targets.iter().map(|&id| i64::from(id)).collect();
        let device = Device::flex();
        let nll =
            kiln_quant_core::fused::plain::cross_entropy(logits, Tensor::from_data(ids.as_slice(), &device));
        let mask: Vec<f32> = scored.iter().map(|&scored| f32::from(u8::from(scored))).collect();
        let loss = (nll * Tensor::from_data(mask.as_slice(), &device)).sum();
        let expected_loss: f32 = loss.clone().into_scalar();
        let expected = gradients(&model, &GradientsParams::from_grads(loss.backward(), &model));
        let norm = |values: &[f32]| values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let largest = expected.iter().map(|values| norm(values)).fold(0.0, f64::max);
        for recompute in [Recompute::None, Recompute::Block] {
            for logit_rows in [5, 1000] {
                let mut accumulator = GradientsAccumulator::new();
                let options = DriverOptions { recompute, logit_rows, ..DriverOptions::default() };
                let targets = Targets { ids: &targets, scored: &scored };
                let loss = loss_and_gradients(&model, &tokens, targets, &options, &mut accumulator).unwrap();
                assert!((loss - f64::from(expected_loss)).abs() < 1e-3, "{folder}: {loss} {expected_loss}");
                for (i, (found, expected)) in
                    gradients(&model, &accumulator.grads()).iter().zip(&expected).enumerate()
                {
                    // A key bias shifts all of a query's scores alike, so its gradient is zero but for rounding.
                    let difference = if norm(expected) < 1e-5 * largest {
                        norm(found) / largest
                    } else {
                        relative_difference(found, expected)
                    };
                    assert!(
                        difference < 1e-5,
                        "{folder} {recompute:?} {logit_rows} parameter {i}: {difference:e}"
                    );
                }
            }
        }
    }
}

#[test]
fn targets_that_do_not_fit_are_refused() {
    let model = model("tiny/llama-tied-f32-sharded");
    let (tokens, targets, scored) = batch(256);
    let run = |tokens: &TokenBatch, ids: &[u32], scored: &[bool]| {
        let targets = Targets { ids, scored };
        loss_and_gradients(
            &model,
            tokens,
            targets,
            &DriverOptions::default(),
            &mut GradientsAccumulator::new(),
        )
    };
    assert!(run(&tokens, &targets[1..], &scored).is_err());
    assert!(run(&tokens, &targets, &[false; 40]).is_err());
    assert!(run(&tokens, &[256; 40], &scored).is_err());
    let mut wrong = tokens.clone();
    wrong.ids[3] = 999;
    assert!(run(&wrong, &targets, &scored).is_err());
}

/// Gradients by the names that transformers has in memory, `[d_output, d_input]`.
fn named_gradients(model: &Decoder<QuantLinear>, found: &GradientsParams) -> BTreeMap<String, Vec<f32>> {
    struct Named<'a>(&'a GradientsParams, Vec<String>, BTreeMap<String, Vec<f32>>);
    impl ModuleVisitor for Named<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let parts: Vec<&str> = self.1.iter().map(String::as_str).collect();
            let name = parts.into_iter().filter(|part| !kiln_quant_core::is_variant(part));
            let name = name.collect::<Vec<_>>().join(".").replace("block_sparse_moe.gate", "mlp.gate");
            let name = name.replace("router.layer", "router");
            if let Some(gradient) = self.0.get::<D>(param.id) {
                let linear = name.contains("_proj") && D == 2;
                let gradient = if linear { gradient.swap_dims(0, 1) } else { gradient };
                self.2.insert(name, read(gradient));
            }
        }
        fn enter_module(&mut self, name: &str, _: &str) {
            self.1.push(name.to_string());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.1.pop();
        }
    }
    let mut named = Named(found, Vec::new(), BTreeMap::new());
    model.visit(&mut named);
    named.2
}

#[test]
fn the_load_balancing_loss_equals_transformers() {
    let golden = Golden::open("training/router_loss.safetensors");
    for folder in ["mixtral", "granitemoe"] {
        let model = model(&format!("arch/{folder}"));
        let ids = Golden::open(&format!("arch/{folder}/golden.safetensors")).ints("input_ids");
        let ids: Vec<u32> = ids.into_iter().map(|id| id as u32).collect();
        let (length, padding) = (24, 6);
        let mask: Vec<u32> = (0..2 * length).map(|place| u32::from(place >= padding)).collect();
        let targets: Vec<u32> = (0..2 * length).map(|place| ids[(place + 1) % (2 * length)]).collect();
        let scored: Vec<bool> =
            (0..2 * length).map(|place| place >= padding && place % length != length - 1).collect();
        let count = scored.iter().filter(|scored| **scored).count() as f64;
        let tokens = TokenBatch::masked(ids, mask, 2, length).unwrap();
        for recompute in [Recompute::None, Recompute::Block] {
            let run = |router_loss| {
                let options = DriverOptions { recompute, router_loss, ..DriverOptions::default() };
                let mut accumulator = GradientsAccumulator::new();
                let targets = Targets { ids: &targets, scored: &scored };
                let loss = loss_and_gradients(&model, &tokens, targets, &options, &mut accumulator);
                (loss.unwrap() / count, named_gradients(&model, &accumulator.grads()))
            };
            let (loss, found) = run(Some(0.3));
            let expected = f64::from(golden.floats(&format!("{folder}.loss"))[0]);
            assert!(
                (loss / expected - 1.0).abs() < 1e-5,
                "{folder} {recompute:?}: {loss}, expected {expected}"
            );
            let (plain, without) = run(None);
            let aux = (loss - plain) / 0.3;
            let expected = f64::from(golden.floats(&format!("{folder}.aux_loss"))[0]);
            assert!(
                (aux / expected - 1.0).abs() < 1e-4,
                "{folder} {recompute:?}: {aux}, expected {expected}"
            );

            let prefix = format!("{folder}.grad.");
            let names: Vec<&str> = golden.names().filter_map(|name| name.strip_prefix(&prefix)).collect();
            assert_eq!(names.len(), 5);
            for name in names {
                let expected = golden.floats(&format!("{prefix}{name}"));
                let mut scaled: Vec<f32> = found[name].iter().map(|value| value / count as f32).collect();
                if ["mlp.gate.weight", "router.weight"].iter().any(|router| name.ends_with(router)) {
                    // A linear: `[d_input, d_output]` here.
                    let experts = golden.shape(&format!("{prefix}{name}"))[0];
                    let rows = (0..experts).flat_map(|row| scaled[row..].iter().step_by(experts));
                    scaled = rows.copied().collect();
                }
                let difference = relative_difference(&scaled, &expected);
                assert!(difference < 1e-4, "{folder} {recompute:?} {name}: {difference:e}");
                assert!(relative_difference(&found[name], &without[name]) > 1e-3, "{folder} {name}");
            }
        }
    }
    let dense = model("tiny/llama-tied-f32-sharded");
    let (tokens, targets, scored) = batch(256);
    let options = DriverOptions { router_loss: Some(0.1), ..DriverOptions::default() };
    let targets = Targets { ids: &targets, scored: &scored };
    let error = loss_and_gradients(&dense, &tokens, targets, &options, &mut GradientsAccumulator::new());
    assert!(error.unwrap_err().to_string().contains("router_loss"));
}
