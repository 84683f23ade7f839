//! The driver against plain autodiff and torch's gradients.

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
use kiln_testkit::{read, relative_difference, testdata};

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
    let checkpoint = Checkpoint::open(testdata(&format!("tiny/{folder}"))).unwrap();
    let (model, _) = checkpoint.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
    model.unfreeze().train()
}

/// Two packed rows with padding, of which some places are scored.
fn batch() -> (TokenBatch, Vec<u32>, Vec<bool>) {
    let ids: Vec<u32> = (0..40).map(|i| (i * 37 + 11) % 256).collect();
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
    for folder in ["llama-tied-f32-sharded", "qwen3-untied-f32", "opt-f32"] {
        let model = model(folder);
        let (tokens, targets, scored) = batch();
        // Plain autodiff over everything at once, with Burn's own cross-entropy.
        let logits = model.forward(&model.context(&tokens, None).unwrap()).reshape([40, 256]);
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
    let model = model("llama-tied-f32-sharded");
    let (tokens, targets, scored) = batch();
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
