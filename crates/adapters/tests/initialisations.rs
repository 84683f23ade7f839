//! PiSSA, OLoRA, DoRA and QA-LoRA against PEFT: `testdata/peft/initialisations.safetensors`.

use burn::{
    module::{Module, Param, ParamId},
    nn::Linear,
    tensor::{Device, Tensor, TensorData},
};
use kiln_adapters::{
    Adapted, Adapter, AdapterConfig, AnyAdapter, Attacher, Core, Dora, Dropout, Error, InitLoraWeights, Lora,
    LoraAttacher, LowRank, Method, PooledAdapter, Pooling,
};
use kiln_quant_core::{
    HostQuantizer, MinMax, PackedLinear, PackedTensor, Place, Projection, QuantLinear, quantizers,
};
use kiln_testkit::{Golden, assert_close, kept, max_difference, read, relative_difference, tensor, values};

use crate::balanced_rank::no_dropout;

/// f32 arithmetic on values around 1; PEFT's decompositions are f32, ours f64.
const TOLERANCE: f32 = 5e-6;
const SCALING: f64 = 1.5;
const SHAPES: [(&str, [usize; 2]); 2] = [("wide", [24, 10]), ("tall", [10, 24])];

fn golden() -> Golden {
    Golden::open("peft/initialisations.safetensors")
}

/// A tensor of torch's orientation in ours.
fn transposed(golden: &Golden, name: &str) -> Tensor<2> {
    let shape: [usize; 2] = golden.shape(name).try_into().unwrap();
    plain(golden, name, shape).transpose()
}

fn plain<const D: usize>(golden: &Golden, name: &str, shape: [usize; D]) -> Tensor<D> {
    Tensor::from_data(TensorData::new(golden.floats(name), shape), &Device::flex())
}

fn base(weight: Tensor<2>, bias: Option<Tensor<1>>) -> Linear {
    let frozen = |tensor| Param::initialized(ParamId::new(), tensor);
    let bias = bias.map(|bias| Param::initialized(ParamId::new(), bias));
    Linear { weight: frozen(weight), bias }
}

fn config(init: InitLoraWeights) -> AdapterConfig {
    AdapterConfig::new(Method::Lora { init }, 4, 6.0).with_targets(["proj"]).with_seed(7)
}

fn attach(init: InitLoraWeights, base: impl Into<QuantLinear>) -> Result<Adapted<QuantLinear, Lora>, Error> {
    let base = base.into();
    LoraAttacher::new(&config(init), &[("proj".to_owned(), base.shape())])?.attach_to_residual("proj", base)
}

#[test]
fn pissa_and_olora_split_the_weight_as_peft_does() {
    let golden = golden();
    let pissa = InitLoraWeights::Pissa { iterations: None };
    for (rule, init) in [("pissa", pissa), ("olora", InitLoraWeights::Olora)] {
        for (name, _) in SHAPES {
            let tensor = |part: &str| transposed(&golden, &format!("{rule}.{name}.{part}"));
            let adapted = attach(init, base(tensor("weight"), None)).unwrap();
            let lora = adapted.adapter.as_ref().unwrap();
            let what = |part: &str| format!("{rule} {name}: {part}");
            assert_close(
                &what("residual"),
                &read(adapted.base.weight()),
                &read(tensor("residual")),
                TOLERANCE,
            );
            let (a, b) = (lora.lora_a.val(), lora.lora_b.val());
            let (their_a, their_b) = (tensor("lora_A"), tensor("lora_B"));
            for rank in 0..4 {
                let a = read(a.clone().narrow(1, rank, 1));
                let their_a = read(their_a.clone().narrow(1, rank, 1));
                let b = read(b.clone().narrow(0, rank, 1));
                let their_b = read(their_b.clone().narrow(0, rank, 1));
                // Singular vectors have no sign of their own; a QR decomposition by reflections does.
                let dot: f32 = a.iter().zip(&their_a).map(|(x, y)| x * y).sum();
                let sign = if rule == "pissa" { dot.signum() } else { 1.0 };
                let signed = |values: &[f32]| values.iter().map(|x| sign * x).collect::<Vec<_>>();
                assert_close(&what("A"), &signed(&a), &their_a, TOLERANCE);
                assert_close(&what("B"), &signed(&b), &their_b, TOLERANCE);
            }
            // The function is as before.
            assert_close(&what("sum"), &read(adapted.weight()), &read(tensor("weight")), TOLERANCE);
        }
    }
}

#[test]
fn random_iterations_come_near_the_exact_decomposition() {
    let weight = transposed(&golden(), "pissa.wide.weight");
    let exact = attach(InitLoraWeights::Pissa { iterations: None }, base(weight.clone(), None)).unwrap();
    let near = attach(InitLoraWeights::Pissa { iterations: Some(64) }, base(weight, None)).unwrap();
    let difference = relative_difference(&read(near.base.weight()), &read(exact.base.weight()));
    assert!(difference < 1e-3, "{difference}");
}

fn quantized(weight: &[f32], [d_input, d_output]: [usize; 2], scheme: &str) -> QuantLinear {
    let weight = MinMax.quantize("proj", weight, d_input, d_output, &scheme.parse().unwrap()).unwrap();
    QuantLinear::Packed(PackedLinear { weight: PackedTensor::new(&weight, &Device::flex()), bias: None })
}

#[test]
fn packed_bases_keep_their_scheme_and_lose_less_than_a_second_rounding() {
    let shape = [64, 48];
    // A weight with a few strong directions, as trained ones have.
    let device = Device::flex();
    let strong = tensor::<2>(1, [48, 4], &device).matmul(tensor(2, [4, 64], &device));
    let weight = read(strong + tensor::<2>(3, [48, 64], &device) * 0.1);
    for scheme in ["affine3:32", "nf4:16:double", "affine4:8x4:f16", "affine4:32:sym"] {
        for init in [InitLoraWeights::Pissa { iterations: None }, InitLoraWeights::Olora] {
            let packed = quantized(&weight, shape, scheme);
            let before = packed.weight();
            let adapted = attach(init, packed).unwrap();
            let QuantLinear::Packed(linear) = &adapted.base else { panic!("packed") };
            assert_eq!(linear.weight.scheme().to_string(), scheme);
            // The residual's rounding is all that is lost.
            let residual = before.clone() - update(&adapted);
            let dense = read(residual.transpose());
            let again = MinMax.quantize("r", &dense, 64, 48, linear.weight.scheme()).unwrap();
            let lost = quantizers::error(&dense, &again);
            let found = read(adapted.weight() - before);
            let rms = (found.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / found.len() as f64).sqrt();
            assert!((rms / lost.mean_squared.sqrt() - 1.0).abs() < 1e-3, "{scheme} {init:?}: {rms} {lost:?}");
        }
        let pissa = attach(
            InitLoraWeights::Pissa { iterations: None },
            QuantLinear::Dense(base(
                Tensor::<2>::from_data(TensorData::new(weight.clone(), [48, 64]), &device).transpose(),
                None,
            )),
        );
        // With the strong directions in the adapter, the residual is small and so is its rounding.
        let residual = read(pissa.unwrap().base.weight().transpose());
        let direct = quantizers::error(&weight, &pack(&weight, scheme)).mean_squared;
        let split = quantizers::error(&residual, &pack(&residual, scheme)).mean_squared;
        assert!(split < 0.25 * direct, "{scheme}: {split} {direct}");
    }
}

fn pack(weight: &[f32], scheme: &str) -> kiln_quant_core::PackedWeight {
    MinMax.quantize("w", weight, 64, 48, &scheme.parse().unwrap()).unwrap()
}

fn update<P: Projection>(adapted: &Adapted<P, Lora>) -> Tensor<2> {
    let lora = adapted.adapter.as_ref().unwrap();
    lora.lora_a.val().matmul(lora.lora_b.val()) * lora.scaling()
}

#[test]
fn a_trained_adapter_can_be_put_on_the_untouched_base() {
    let weight = transposed(&golden(), "pissa.wide.weight");
    let x = tensor::<2>(4, [5, 24], &Device::flex());
    for init in [InitLoraWeights::Pissa { iterations: Some(2) }, InitLoraWeights::Olora] {
        let adapted = attach(init, base(weight.clone(), None)).unwrap();
        let initial = adapted.adapter.clone().unwrap();
        let mut trained = initial.clone();
        trained.lora_a =
            Param::from_tensor(trained.lora_a.val() + tensor::<2>(5, [24, 4], &Device::flex()) * 0.2);
        trained.lora_b =
            Param::from_tensor(trained.lora_b.val() + tensor::<2>(6, [4, 10], &Device::flex()) * 0.2);
        let expected = read(trained.forward(&adapted.base, x.clone()));
        let portable = trained.relative_to(&initial);
        assert_eq!((portable.rank(), portable.scaling()), (8, SCALING));
        let found = read(portable.forward(&base(weight.clone(), None), x.clone()));
        assert_close("portable", &found, &expected, TOLERANCE);
    }
}

#[test]
fn initialisations_that_change_the_base_need_one_that_can_change() {
    let slots = [("proj".to_owned(), [24, 10])];
    let weight = || base(transposed(&golden(), "pissa.wide.weight"), None);
    let attacher = LoraAttacher::new(&config(InitLoraWeights::Olora), &slots).unwrap();
    let error = attacher.attach("proj", weight()).unwrap_err().to_string();
    assert!(error.starts_with("init") && error.contains("olora"), "{error}");
    for (change, name) in [
        (
            (|config: &mut AdapterConfig| config.rank = 11) as fn(&mut AdapterConfig),
            "proj.r: expected a rank of at most 10",
        ),
        (|config| config.alpha = -1.0, "proj.lora_alpha: expected a positive scaling"),
    ] {
        for init in [InitLoraWeights::Pissa { iterations: None }, InitLoraWeights::Olora] {
            let mut config = config(init);
            change(&mut config);
            let attacher = LoraAttacher::new(&config, &slots).unwrap();
            let error = attacher.attach_to_residual("proj", weight().into()).unwrap_err().to_string();
            assert!(error.starts_with(name), "{error}");
        }
    }
    let mut broken = weight();
    broken.weight = Param::initialized(ParamId::new(), broken.weight.val() * f32::NAN);
    assert!(attach(InitLoraWeights::Pissa { iterations: None }, broken).is_err());
}

#[test]
fn dora_outputs_gradients_and_merged_weights_equal_peft() {
    let golden = golden();
    for (name, [d_input, d_output]) in SHAPES {
        let key = |part: &str| format!("dora.{name}.{part}");
        let vector = |part: &str| plain::<1>(&golden, &key(part), [d_output]);
        let (a, b) = (transposed(&golden, &key("lora_A")), transposed(&golden, &key("lora_B")));
        let linear = || base(transposed(&golden, &key("weight")), Some(vector("bias")));
        let fresh = Dora::new(&linear(), a.clone(), b.clone() * 0.0, None, SCALING, no_dropout());
        let first = golden.floats(&key("first_magnitude"));
        assert_close(&key("first"), &read(fresh.magnitude.val()), &first, TOLERANCE);

        let dora = Dora::new(&linear(), a, b, Some(vector("magnitude")), SCALING, no_dropout());
        let adapted = Adapted::new(linear(), Some(dora));
        let merged = read(adapted.weight().transpose());
        assert_close(&key("merged"), &merged, &golden.floats(&key("merged")), TOLERANCE);
        let model = adapted.train();
        let x = Tensor::from_inner(plain(&golden, &key("x"), [3, d_input])).require_grad();
        let y = model.forward(x.clone());
        assert_close(&key("y"), &read(y.clone()), &golden.floats(&key("y")), TOLERANCE);
        let mut gradients = (y * plain(&golden, &key("dy"), [3, d_output])).sum().backward();
        let dora = model.adapter.as_ref().unwrap();
        for (part, found) in [
            ("grad_A", read(dora.lora_a.grad(&gradients).unwrap().transpose())),
            ("grad_B", read(dora.lora_b.grad(&gradients).unwrap().transpose())),
            ("grad_magnitude", read(dora.magnitude.grad(&gradients).unwrap())),
        ] {
            assert_close(&key(part), &found, &golden.floats(&key(part)), 4.0 * TOLERANCE);
        }
        let dx = read(x.grad_remove(&mut gradients).unwrap());
        assert_close(&key("grad_x"), &dx, &golden.floats(&key("grad_x")), 4.0 * TOLERANCE);
    }
}

#[test]
fn dora_with_dropout_sees_the_dropped_input_only() {
    let (device, dropout) = (Device::flex(), Dropout::new(0.4, "proj", 3));
    dropout.at(Place { step: 0, micro_batch: 0, training: true });
    let linear = base(tensor(1, [24, 10], &device), Some(tensor(2, [10], &device)));
    let (a, b) = (tensor::<2>(3, [24, 4], &device), tensor::<2>(4, [4, 10], &device));
    let with = |dropout| {
        let magnitude = Some(tensor::<1>(5, [10], &device));
        Dora::new(&linear, a.clone(), b.clone(), magnitude, SCALING, dropout)
    };
    let x = tensor::<2>(6, [7, 24], &device);
    let kept = kept(&dropout.drops().unwrap().mask(168), [7, 24], &device);
    let found = read(Adapter::forward(&with(dropout), &linear, x.clone()));
    let expected = read(Adapter::forward(&with(no_dropout()), &linear, x * kept / 0.6));
    assert!(relative_difference(&found, &expected) < 1e-6);
}

#[test]
fn a_column_of_zeros_is_left_alone_by_dora() {
    let device = Device::flex();
    let weight = tensor::<2>(1, [6, 2], &device) * Tensor::<2>::from_floats([[1.0, 0.0]], &device);
    let linear = base(weight, None);
    let dora = Dora::new(
        &linear,
        tensor(2, [6, 2], &device),
        Tensor::zeros([2, 2], &device),
        None,
        1.0,
        no_dropout(),
    );
    let x = tensor::<2>(3, [4, 6], &device);
    assert_eq!(read(Adapter::forward(&dora, &linear, x.clone())), read(Projection::forward(&linear, x)));
}

#[test]
fn qa_lora_under_pefts_pooling_equals_peft() {
    let golden = golden();
    for (name, [d_input, d_output]) in SHAPES {
        let key = |part: &str| format!("qalora.{name}.{part}");
        let core = Core::low_rank(transposed(&golden, &key("lora_A")), transposed(&golden, &key("lora_B")));
        let pooling = Pooling::AverageTimesGroups;
        let adapter = PooledAdapter::new(core, [2, 1], pooling, SCALING, no_dropout());
        let model = Adapted::new(base(transposed(&golden, &key("weight")), None), Some(adapter)).train();
        let x = Tensor::from_inner(plain(&golden, &key("x"), [3, d_input])).require_grad();
        let y = model.forward(x.clone());
        // Sums of up to 12 pooled inputs, times the number of groups.
        let tolerance = 10.0 * TOLERANCE;
        assert_close(&key("y"), &read(y.clone()), &golden.floats(&key("y")), tolerance);
        let mut gradients = (y * plain(&golden, &key("dy"), [3, d_output])).sum().backward();
        let Core::LowRank(LowRank { a, b }) = &model.adapter.as_ref().unwrap().core else {
            panic!("factors")
        };
        for (part, parameter) in [("grad_A", a), ("grad_B", b)] {
            let found = read(parameter.grad(&gradients).unwrap().transpose());
            assert_close(&key(part), &found, &golden.floats(&key(part)), tolerance);
        }
        let dx = read(x.grad_remove(&mut gradients).unwrap());
        assert_close(&key("grad_x"), &dx, &golden.floats(&key("grad_x")), tolerance);
    }
}

#[test]
fn new_adapters_of_every_kind_leave_the_base_as_it_is() {
    let (device, slots) = (Device::flex(), [("proj".to_owned(), [24, 10])]);
    let weight = values(1, 240);
    let packed = quantized(&weight, [24, 10], "affine4:8");
    let x = tensor::<2>(4, [5, 24], &device);
    let expected = read(packed.forward(x.clone()));
    let dora = AdapterConfig::dora(4, 6.0).with_targets(["proj"]).with_seed(1);
    let adapted = Attacher::<AnyAdapter>::new(&dora, &slots).unwrap().attach("proj", packed.clone()).unwrap();
    assert!(matches!(adapted.adapter, Some(AnyAdapter::Dora(_))));
    let found = read(adapted.forward(x));
    assert!(max_difference(&found, &expected) < 1e-6);
}
