//! Against traces of other programs: torch's AdamW for a layer, an f64 autodiff for a stack of blocks.

use kiln_adapters::Dropout;
use kiln_quant_core::{Compute, Projection, fused, packing::unpack_column};
use kiln_testkit::{assert_close, max_difference, read, relative_difference, testdata};
use serde_json::Value as Json;

use super::*;
use crate::{ClippingGrid, clipping::transpose};

fn vectors(name: &str) -> Json {
    serde_json::from_slice(&std::fs::read(testdata(name)).unwrap()).unwrap()
}

fn floats(value: &Json) -> Vec<f32> {
    match value {
        Json::Array(values) => values.iter().flat_map(floats).collect(),
        value => vec![value.as_f64().unwrap() as f32],
    }
}

fn sizes(value: &Json) -> [usize; 2] {
    let rows = value.as_array().unwrap();
    [rows.len(), rows[0].as_array().unwrap().len()]
}

/// A rank-2 layer of groups of 4 at 2 bits; `weight` `[out, in]`, `a` `[rank, in]`.
fn layer(weight: &Json, a: &Json, symmetric: bool, device: &Device) -> Layer {
    let [d_output, d_input] = sizes(weight);
    let [rank, _] = sizes(a);
    let grid = ClippingGrid { bits: 2, group: 4, symmetric, include_zero: false };
    let a = tensor(transpose(&floats(a), rank, d_input), [d_input, rank], device);
    let b = Tensor::zeros([rank, d_output], device);
    let dropout = Dropout::new(0.0, "w", 0);
    Layer {
        path: "w".into(),
        weight: ClippedWeight::new("w", &floats(weight), d_input, d_output, grid).unwrap(),
        bias: None,
        scheme: (if symmetric { "affine2:4:sym" } else { "affine2:4:int" }).parse().unwrap(),
        lora: Some(Lora::new(a, b, 0.25, dropout)),
    }
}

fn config(epochs: usize) -> ApiqConfig {
    ApiqConfig { epochs, lr_clipping: 5e-2, lr_lora: 5e-3, include_zero: false, ..ApiqConfig::default() }
}

/// The whole batch as one window.
struct OneLayer {
    x: Tensor<2>,
    target: Tensor<2>,
    loss: ApiqLoss,
}

impl Objective for OneLayer {
    fn windows(&self) -> usize {
        1
    }

    fn loss(&mut self, slots: Vec<Slot>, _: usize) -> Result<Tensor<1>> {
        Ok(self.loss.of(slots[0].forward(self.x.clone()), self.target.clone()))
    }
}

/// Parameters of a state as the reference orders them: gamma and beta by output, A `[rank, in]`, B `[out, rank]`.
fn state(apiq: &Apiq, index: usize) -> [Vec<f32>; 4] {
    let [rows, columns] = apiq.layers[index].weight.groups();
    let [gamma, beta] = apiq.logits(index).unwrap().map(|logits| transpose(&logits, rows, columns));
    let lora = apiq.loras[index].as_ref().unwrap();
    let flip = |factor: &Param<Tensor<2>>| read(factor.val().inner().transpose());
    [gamma, beta, flip(&lora.lora_a), flip(&lora.lora_b)]
}

#[test]
fn layer_wise_steps_are_torchs() {
    let vectors = vectors("vectors/apiq_lw_trace.json");
    let device = Device::flex();
    let matrix = |name: &str| tensor::<2>(floats(&vectors[name]), sizes(&vectors[name]), &device);
    for trace in vectors["traces"].as_array().unwrap() {
        let symmetric = trace["symmetric"].as_bool().unwrap();
        let config = config(200);
        let layers = vec![layer(&vectors["W"], &vectors["A0"], symmetric, &device)];
        let mut apiq = Apiq::new(&config, layers, &device);
        let target = matrix("X").matmul(matrix("W").transpose());
        let mut objective = OneLayer { x: matrix("Xq"), target, loss: ApiqLoss::MeanSquared };
        let mut log = trace["log"].as_array().unwrap().iter().peekable();
        for step in 0..=200u64 {
            let before = state(&apiq, 0);
            let [gamma, beta] = apiq.logits(0).unwrap();
            let levels = apiq.layers[0].weight.levels(&gamma, &beta);
            let loss = apiq.step(&mut objective, 0, 1.0).unwrap();
            let Some(entry) = log.next_if(|entry| entry["step"] == step) else { continue };
            let what = format!("symmetric {symmetric}, step {step}");
            let expected = entry["loss"].as_f64().unwrap();
            let loss_tolerance = if step <= 20 { 1e-6 } else { 0.1 * expected };
            assert!((loss - expected).abs() < loss_tolerance, "{what}: loss {loss} for {expected}");
            for (found, name) in before.iter().zip(["gamma", "beta", "A", "B"]) {
                if step <= 20 {
                    assert_close(&format!("{what}: {name}"), found, &floats(&entry[name]), 1e-4);
                } else {
                    // Rounding is discrete: a code that flips a step earlier moves the logits of its group. The same
                    // steps in numpy's f32 end 0.074 (gamma) away from the reference, which is f64.
                    let difference = relative_difference(found, &floats(&entry[name]));
                    assert!(difference < 0.1, "{what}: {name} differs by {difference}");
                }
            }
            if step <= 20 {
                let groups = apiq.layers[0].weight.groups();
                let zero = transpose(&levels.zero, groups[0], groups[1]);
                assert_eq!(zero, floats(&entry["zero"]), "{what}");
                let scale = transpose(&levels.scale, groups[0], groups[1]);
                assert_close(&what, &scale, &floats(&entry["scale"]), 1e-5);
            }
        }
        assert!(log.next().is_none(), "every entry of the trace was reached");
    }
}

/// `y = x + down(silu(gate x) * up x)` for windows of four tokens.
struct Residual {
    x: Vec<Tensor<2>>,
    targets: Vec<Vec<Tensor<2>>>,
    losses: Vec<f64>,
}

fn residual<P: Projection>(slots: &[P], x: Tensor<2>) -> Tensor<2> {
    let (gate, up) = (slots[0].forward(x.clone()), slots[1].forward(x.clone()));
    x + slots[2].forward(fused::swiglu(gate, up, Compute::F32))
}

impl Objective for Residual {
    fn windows(&self) -> usize {
        self.x.len()
    }

    fn loss(&mut self, slots: Vec<Slot>, window: usize) -> Result<Tensor<1>> {
        let y = residual(&slots, self.x[window].clone());
        let losses = self.targets[window].iter().map(|target| (y.clone() - target.clone()).square().mean());
        let loss = losses.reduce(|sum, loss| sum + loss).unwrap();
        self.losses.push(f64::from(read(loss.clone().inner())[0]));
        Ok(loss)
    }
}

#[test]
fn block_wise_streams_are_the_reference() {
    let vectors = vectors("vectors/apiq_bw_trace.json");
    let device = Device::flex();
    for (mode, augmented) in [("plain", false), ("aug", true)] {
        let windows: Vec<Tensor<2>> = vectors["X0"]
            .as_array()
            .unwrap()
            .iter()
            .map(|window| tensor(floats(window), sizes(window), &device))
            .collect();
        let (mut x, mut quantized) = (windows.clone(), windows);
        for (block, result) in vectors["results"][mode].as_array().unwrap().iter().enumerate() {
            let names = ["gate", "up", "down"];
            let original: Vec<Linear> = names
                .iter()
                .map(|name| {
                    let weight = &vectors["W"][block][name];
                    let weight = tensor::<2>(floats(weight), sizes(weight), &device).transpose();
                    Linear { weight: Param::initialized(ParamId::new(), weight), bias: None }
                })
                .collect();
            let of = |x: &[Tensor<2>]| -> Vec<Tensor<2>> {
                x.iter().map(|x| residual(&original, x.clone())).collect()
            };
            let targets = of(&x);
            let mut both: Vec<Vec<Tensor<2>>> = targets.iter().map(|target| vec![target.clone()]).collect();
            if augmented {
                both.iter_mut().zip(of(&quantized)).for_each(|(both, target)| both.push(target));
            }
            let layers = names
                .map(|name| layer(&vectors["W"][block][name], &vectors["A0"][block][name], false, &device));
            let config = config(20);
            let mut apiq = Apiq::new(&config, layers.into(), &device);
            let mut objective = Residual { x: quantized.clone(), targets: both, losses: Vec::new() };
            apiq.run(block, None, &mut objective, &mut |_| Ok(())).unwrap();
            let what = format!("{mode}, block {block}");
            for (epoch, tolerance) in [(0, 2e-5), (1, 1e-3)] {
                let expected = floats(&result["epochs"][epoch]["losses"]);
                let found: Vec<f32> =
                    objective.losses[3 * epoch..3 * epoch + 3].iter().map(|&loss| loss as f32).collect();
                // The second block's inputs come from sixty steps of the first one.
                let tolerance = if block == 0 { tolerance } else { 0.05 };
                assert!(relative_difference(&found, &expected) < tolerance, "{what}: {found:?} {expected:?}");
            }
            let mut codes_that_agree = [0, 0];
            for (index, name) in names.iter().enumerate() {
                let [gamma, _, a, _] = state(&apiq, index);
                let reference = &result["final"][name];
                assert!(relative_difference(&a, &floats(&reference["A"])) < 0.1, "{what}: A of {name}");
                assert!(
                    max_difference(&gamma, &floats(&reference["gamma"])) < 2.0,
                    "{what}: gamma of {name}"
                );
            }
            let solved = apiq.finish().unwrap();
            let slots: Vec<Slot> = solved
                .iter()
                .map(|(packed, lora)| {
                    let weight = kiln_quant_core::PackedTensor::new(packed, &device);
                    let base = kiln_quant_core::PackedLinear { weight, bias: None };
                    Adapted::new(QuantLinear::Packed(base), lora.clone())
                })
                .collect();
            for (name, (packed, _)) in names.iter().zip(&solved) {
                let expected = floats(&result["final"][name]["codes"]);
                let mut codes = vec![0; packed.d_input];
                for (output, expected) in expected.chunks(packed.d_input).enumerate() {
                    unpack_column(&packed.codes, packed.d_output, 2, output, &mut codes);
                    codes_that_agree[0] +=
                        codes.iter().zip(expected).filter(|(a, b)| f32::from(**a) == **b).count();
                    codes_that_agree[1] += codes.len();
                }
            }
            let share = codes_that_agree[0] as f64 / codes_that_agree[1] as f64;
            assert!(share > 0.9, "{what}: {share} of the codes agree");
            x = targets;
            quantized = quantized.into_iter().map(|x| residual(&slots, x)).collect();
            let flat = |x: &[Tensor<2>]| -> Vec<f32> { x.iter().flat_map(|x| read(x.clone())).collect() };
            assert_close(&what, &flat(&x), &floats(&result["out_fp"]), 1e-5);
            let found = relative_difference(&flat(&quantized), &floats(&result["out_quant"]));
            assert!(found < 0.05, "{what}: quantized stream differs by {found}");
        }
    }
}

/// A layer of 32 inputs and 24 outputs in groups of 16 at 2 bits, and its weight `[in, out]`.
fn random_layer(with_lora: bool, device: &Device) -> (Layer, Tensor<2>) {
    let weight = kiln_testkit::values(1, 24 * 32);
    let scheme: QuantScheme = "affine2:16".parse().unwrap();
    let grid = ClippingGrid::for_scheme(&scheme, 32, true).unwrap();
    let lora = with_lora.then(|| {
        let a = kiln_testkit::tensor::<2>(3, [32, 4], device) / 5.0;
        Lora::new(a, Tensor::zeros([4, 24], device), 1.0, Dropout::new(0.0, "w", 0))
    });
    let clipped = ClippedWeight::new("w", &weight, 32, 24, grid).unwrap();
    let dense = tensor::<2>(weight, [24, 32], device).transpose();
    (Layer { path: "w".into(), weight: clipped, bias: None, scheme, lora }, dense)
}

#[test]
fn an_epoch_brings_the_loss_down_and_clipping_alone_less() {
    let device = Device::flex();
    let x = kiln_testkit::tensor::<2>(2, [60, 32], &device);
    let last = |with_lora: bool| {
        let (layer, dense) = random_layer(with_lora, &device);
        let config = ApiqConfig { lr_clipping: 5e-2, lr_lora: 5e-3, epochs: 150, ..ApiqConfig::default() };
        let mut apiq = Apiq::new(&config, vec![layer], &device);
        let target = x.clone().matmul(dense);
        let mut objective = OneLayer { x: x.clone(), target, loss: ApiqLoss::MeanSquared };
        let losses = apiq.run(0, Some("w"), &mut objective, &mut |_| Ok(())).unwrap();
        assert!(losses[149] < 0.95 * losses[0], "{} to {}", losses[0], losses[149]);
        losses[149]
    };
    assert!(last(true) < last(false));
}

#[test]
fn the_relative_loss_counts_every_row_alike() {
    let device = Device::flex();
    let (y, t) = (kiln_testkit::values(1, 12), kiln_testkit::values(2, 12));
    let loss = |y: &[f32], t: &[f32]| {
        let of =
            ApiqLoss::Relative.of(tensor(y.to_vec(), [3, 4], &device), tensor(t.to_vec(), [3, 4], &device));
        f64::from(read(of)[0])
    };
    let expected = (0..3).map(|row| {
        let row = 4 * row..4 * row + 4;
        relative_difference(&y[row.clone()], &t[row]).powi(2)
    });
    let expected = expected.sum::<f64>() / 3.0;
    assert!((loss(&y, &t) - expected).abs() < 1e-6 * expected, "{} for {expected}", loss(&y, &t));
    // The length of a row does not matter, and a target of zeros is no division by zero.
    let longer = |values: &[f32]| -> Vec<f32> {
        values.iter().enumerate().map(|(at, value)| if at < 4 { value * 1024.0 } else { *value }).collect()
    };
    assert!((loss(&longer(&y), &longer(&t)) - expected).abs() < 1e-6 * expected);
    assert_eq!(loss(&[0.0; 12], &[0.0; 12]), 0.0);
    assert!(loss(&y, &[0.0; 12]).is_finite());
}

#[test]
fn a_massive_row_hides_the_others_from_the_mean_square_only() {
    let device = Device::flex();
    let x = kiln_testkit::tensor::<2>(2, [60, 32], &device);
    let massive = x.clone().slice([0..1, 0..32]) * 300.0;
    let with_massive = x.clone().slice_assign([0..1, 0..32], massive);
    // The error of the other rows.
    let error = |loss| {
        let (layer, dense) = random_layer(true, &device);
        let config =
            ApiqConfig { lr_clipping: 5e-2, lr_lora: 5e-3, epochs: 150, loss, ..ApiqConfig::default() };
        let mut apiq = Apiq::new(&config, vec![layer], &device);
        let target = with_massive.clone().matmul(dense.clone());
        let mut objective = OneLayer { x: with_massive.clone(), target, loss };
        apiq.run(0, Some("w"), &mut objective, &mut |_| Ok(())).unwrap();
        let (packed, lora) = apiq.finish().unwrap().remove(0);
        let lora = lora.unwrap();
        let found = tensor::<2>(packed.dequantize(), [24, 32], &device).transpose()
            + lora.lora_a.val().matmul(lora.lora_b.val()) * lora.scaling();
        relative_difference(&read(x.clone().matmul(found)), &read(x.clone().matmul(dense)))
    };
    let (relative, squared) = (error(ApiqLoss::Relative), error(ApiqLoss::MeanSquared));
    assert!(relative < 0.8 * squared, "{relative}, mean squared {squared}");
}

#[test]
fn rates_fall_to_their_final_ratio() {
    let device = Device::flex();
    let x = kiln_testkit::tensor::<2>(2, [60, 32], &device);
    let after = |epochs, final_ratio| {
        let (layer, dense) = random_layer(true, &device);
        let config = ApiqConfig { epochs, final_ratio, lr_clipping: 5e-2, ..ApiqConfig::default() };
        let mut apiq = Apiq::new(&config, vec![layer], &device);
        let target = x.clone().matmul(dense);
        let mut objective = OneLayer { x: x.clone(), target, loss: ApiqLoss::MeanSquared };
        apiq.run(0, Some("w"), &mut objective, &mut |_| Ok(())).unwrap();
        state(&apiq, 0)
    };
    // The last of two steps is left out, the first of them whole.
    assert_eq!(after(2, 0.0), after(1, 1.0));
    assert_eq!(after(1, 0.0), after(1, 1.0));
    assert_ne!(after(2, 0.5), after(2, 1.0));
}

#[test]
fn budgets_end_at_the_published_values() {
    for bits in [2, 3, 4, 8] {
        let published = ApiqConfig { augmented: bits == 2, ..ApiqConfig::default() };
        assert_eq!(ApiqConfig::for_budget(bits, 128, 20), published);
        assert_eq!(ApiqConfig::for_budget(bits, 100, 20), published);
        let [few, some] = [ApiqConfig::for_budget(bits, 16, 4), ApiqConfig::for_budget(bits, 32, 10)];
        assert_eq!([few.final_ratio, some.final_ratio], [1.0, 0.05]);
        assert_eq!(ApiqConfig { final_ratio: 1.0, ..some.clone() }, ApiqConfig { epochs: 10, ..few.clone() });
        assert!(few.lr_lora > published.lr_lora && few.loss == ApiqLoss::Relative);
        few.check().unwrap();
    }
    let starts = [2, 3, 4].map(|bits| ApiqConfig::for_budget(bits, 16, 4).initial_logit);
    assert_eq!(starts, [1.0, 2.0, 4.0]);
    let error = ApiqConfig::for_budget(2, 16, 0).check().unwrap_err();
    assert!(error.to_string().contains("epochs"), "{error}");
    // 40 passes at 2 bits only.
    assert_eq!([2, 3].map(|bits| ApiqConfig::omniquant(bits).epochs), [40, 20]);
    assert!(ApiqConfig::omniquant(2).augmented && ApiqConfig::omniquant(4).weight_decay == 0.0);
}
