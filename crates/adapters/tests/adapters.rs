//! One battery for every adapter on every kind of base.

use burn::{
    module::{Module, Param, ParamId},
    nn::Linear,
    optim::GradientsParams,
    tensor::{Device, Tensor},
};
use kiln_adapters::{
    Adapted, Adapter, AdapterConfig, AnyAdapter, AnyAttacher, Core, InitLoraWeights, Lora, LoraAttacher,
    Method, PeftFolder, Pooling, QBara, QaBlora, QaHira, QaLora, save_peft,
};
use kiln_quant_core::{HostQuantizer, MinMax, PackedLinear, PackedTensor, Projection, QuantLinear};
use kiln_testkit::{assert_close, read, relative_difference, tensor, values};

const PATH: &str = "model.layers.0.mlp.up_proj";
const SIZE: [usize; 2] = [96, 40];
/// f32 sums of 96 products of values below 1.
const TOLERANCE: f32 = 1e-5;

fn dense(device: &Device) -> Linear {
    Linear {
        weight: Param::from_tensor(tensor::<2>(1, SIZE, device) * 0.2),
        bias: Some(Param::from_tensor(tensor(2, [SIZE[1]], device))),
    }
}

fn packed(scheme: &str, device: &Device) -> QuantLinear {
    let weight: Vec<f32> = values(1, SIZE[0] * SIZE[1]).iter().map(|value| value * 0.2).collect();
    let weight = MinMax.quantize(PATH, &weight, SIZE[0], SIZE[1], &scheme.parse().unwrap()).unwrap();
    let bias = Param::initialized(ParamId::new(), tensor(2, [SIZE[1]], device));
    QuantLinear::Packed(PackedLinear { weight: PackedTensor::new(&weight, device), bias: Some(bias) })
}

const SCHEMES: [&str; 5] = ["affine4:32", "affine3:40:f16", "affine2:8x4", "nf4:32", "nf4:32:double"];

fn slots() -> Vec<(String, [usize; 2])> {
    vec![(PATH.into(), SIZE)]
}

fn config() -> AdapterConfig {
    AdapterConfig::lora(6, 9.0).with_targets(["up_proj"]).with_seed(7)
}

/// A LoRA adapter as after training: B is no longer zero.
fn lora<P: Projection>(base: P, config: &AdapterConfig) -> Adapted<P, Lora> {
    let adapted = LoraAttacher::new(config, &slots()).unwrap().attach(PATH, base).unwrap();
    let device = adapted.devices()[0].clone();
    let trained = |mut lora: Lora| {
        let shape = lora.lora_b.val().dims();
        lora.lora_b = Param::from_tensor(tensor::<2>(3, shape, &device) * 0.3);
        lora
    };
    Adapted { base: adapted.base, adapter: adapted.adapter.map(trained) }
}

/// What every adapter promises on every base.
fn battery<P: Projection, A: Adapter>(
    what: &str,
    adapted: Adapted<P, A>,
    base: &P,
    adapter_parameters: usize,
) {
    let device = Device::flex();
    let x3 = tensor::<3>(4, [2, 5, SIZE[0]], &device);
    let x2 = x3.clone().reshape([10, SIZE[0]]);

    // Forward equals merged, whatever the rank of the input.
    let merged_weight = adapted.weight();
    assert_eq!(adapted.shape(), SIZE);
    let expected = read(x2.clone().matmul(merged_weight.clone()) + adapted.bias().unwrap().unsqueeze());
    let y = read(adapted.forward(x2.clone()));
    assert_close(&format!("{what}: merged weight"), &y, &expected, TOLERANCE);
    let y3 = adapted.forward(x3);
    assert_eq!(y3.dims(), [2, 5, SIZE[1]]);
    assert_close(&format!("{what}: three dimensions"), &read(y3), &y, TOLERANCE);
    let row = adapted.forward(x2.clone().narrow(0, 0, 1).reshape([SIZE[0]]));
    assert_close(&format!("{what}: one dimension"), &read::<1>(row), &y[..SIZE[1]], TOLERANCE);
    let linear = adapted.clone().merge_dense();
    assert_close(&format!("{what}: merged layer"), &read(linear.forward(x2.clone())), &y, TOLERANCE);
    // The adapter does something, and without it the base is back.
    assert!(relative_difference(&y, &read(base.forward(x2.clone()))) > 0.01, "{what}");
    assert_eq!(read(adapted.clone().into_base().forward(x2.clone())), read(base.forward(x2.clone())));

    // Gradients reach the adapter only, and pass through to the input.
    let model = adapted.clone().train();
    let x = Tensor::from_inner(x2.clone()).require_grad();
    let dy = tensor::<2>(5, [10, SIZE[1]], &device);
    let mut gradients = (model.forward(x.clone()) * dy.clone()).sum().backward();
    let dx = x.grad_remove(&mut gradients).unwrap();
    let expected = dy.matmul(merged_weight.transpose());
    assert_close(&format!("{what}: input gradient"), &read(dx), &read(expected), TOLERANCE);
    let found = GradientsParams::from_grads(gradients, &model).len();
    assert_eq!(found, adapter_parameters, "{what}: parameters with gradients");

    // A record holds the whole of it.
    let record = adapted.clone().into_record();
    assert_eq!(read(adapted.load_record(record).forward(x2)), y, "{what}: record");
}

#[test]
fn lora_keeps_the_promises_on_every_base() {
    let device = Device::flex();
    battery("dense", lora(dense(&device), &config()), &dense(&device), 2);
    let base = QuantLinear::Dense(dense(&device));
    battery("dense choice", lora(base.clone(), &config()), &base, 2);
    for scheme in SCHEMES {
        let base = packed(scheme, &device);
        battery(scheme, lora(base.clone(), &config()), &base, 2);
    }
    let base = packed("nf4:32", &device);
    battery::<_, AnyAdapter>("any", lora(base.clone(), &config()).into_any(), &base, 2);
}

/// Adapters of the other kinds as after training.
fn others<P: Projection>(base: &P) -> Vec<(&'static str, AnyAdapter, usize)> {
    let device = Device::flex();
    let methods = [
        ("Q-BaRA", Method::QBara(QBara { lambda: 4 }), 2),
        ("QA-LoRA", Method::QaLora(QaLora { pool: 32, pooling: Pooling::Sum }), 2),
        ("QA-HiRA", Method::QaHira(QaHira::for_tiles(8, 4)), 1),
        ("QA-BLoRA", Method::QaBlora(QaBlora { pool: 32, repeat: 5, rank: None }), 2),
        ("DoRA", Method::dora(), 3),
    ];
    let make = |(name, method, parameters)| {
        let config = config().with_method(method);
        let adapted = AnyAttacher::new(&config, &slots()).unwrap().attach(PATH, base.clone()).unwrap();
        let adapter = match adapted.adapter.unwrap() {
            AnyAdapter::Dora(mut dora) => {
                dora.lora_b = Param::from_tensor(tensor::<2>(3, dora.lora_b.val().dims(), &device) * 0.3);
                dora.magnitude = Param::from_tensor(dora.magnitude.val() * 1.2);
                dora.into()
            }
            AnyAdapter::Pooled(mut pooled) => {
                pooled.core = match pooled.core {
                    Core::LowRank(mut core) => {
                        core.b = Param::from_tensor(tensor::<2>(3, core.b.val().dims(), &device) * 0.3);
                        Core::LowRank(core)
                    }
                    Core::Full(core) => Core::full(tensor::<2>(3, core.h.val().dims(), &device)),
                };
                pooled.into()
            }
            other => panic!("{other:?}"),
        };
        (name, adapter, parameters)
    };
    methods.map(make).into()
}

#[test]
fn every_other_adapter_keeps_the_promises_on_every_base() {
    let device = Device::flex();
    let dense = dense(&device);
    for (name, adapter, parameters) in others(&dense) {
        battery(name, Adapted::new(dense.clone(), Some(adapter)), &dense, parameters);
    }
    for scheme in SCHEMES {
        let base = packed(scheme, &device);
        for (name, adapter, parameters) in others(&base) {
            let what = format!("{name} on {scheme}");
            battery(&what, Adapted::new(base.clone(), Some(adapter)), &base, parameters);
        }
    }
    let lower = lora(packed("affine4:32", &device), &config());
    for (name, adapter, parameters) in others(&lower) {
        battery(name, Adapted::new(lower.clone(), Some(adapter)), &lower, parameters);
    }
}

#[test]
fn an_adapter_stands_on_an_adapted_base_too() {
    let device = Device::flex();
    let lower = lora(packed("affine4:32", &device), &config());
    battery("two", lora(lower.clone(), &config().with_rslora()), &lower, 2);
}

#[test]
fn lora_gradients_are_those_of_the_formula() {
    let device = Device::flex();
    for scheme in SCHEMES {
        let model = lora(packed(scheme, &device), &config()).train();
        let adapter = model.adapter.as_ref().unwrap();
        let (x, dy) = (tensor::<2>(4, [7, SIZE[0]], &device), tensor::<2>(5, [7, SIZE[1]], &device));
        let gradients = (model.forward(x.clone()) * dy.clone()).sum().backward();
        // y = .. + s x A B, s = 9 / 6: dA = s xᵀ dy Bᵀ, dB = s (x A)ᵀ dy.
        let (a, b) = (adapter.lora_a.val().inner(), adapter.lora_b.val().inner());
        let da = x.clone().transpose().matmul(dy.clone()).matmul(b.transpose()) * 1.5;
        let db = x.matmul(a).transpose().matmul(dy) * 1.5;
        let found = read(adapter.lora_a.grad(&gradients).unwrap());
        assert!(relative_difference(&found, &read(da)) < 1e-5, "{scheme}: A");
        let found = read(adapter.lora_b.grad(&gradients).unwrap());
        assert!(relative_difference(&found, &read(db)) < 1e-5, "{scheme}: B");
    }
}

#[test]
fn a_new_lora_adapter_changes_nothing() {
    let device = Device::flex();
    let base = packed("affine4:32", &device);
    let adapted = LoraAttacher::new(&config(), &slots()).unwrap().attach(PATH, base.clone()).unwrap();
    let adapter = adapted.adapter.as_ref().unwrap();
    assert_eq!((adapter.lora_a.val().dims(), adapter.lora_b.val().dims()), ([96, 6], [6, 40]));
    let x = tensor::<2>(4, [10, SIZE[0]], &device);
    assert_eq!(read(adapted.forward(x.clone())), read(base.forward(x)));
}

#[test]
fn scalings_are_alpha_over_rank_and_over_its_root() {
    let scaling = |config: &AdapterConfig| lora(dense(&Device::flex()), config).adapter.unwrap().scaling();
    let mut config = config();
    assert_eq!(scaling(&config), 1.5);
    config.alpha_pattern = vec![("up_proj".into(), 3.0)];
    assert_eq!(scaling(&config), 0.5);
    config.rslora = true;
    assert_eq!(scaling(&config), 3.0 / 6f64.sqrt());
    config.rank_pattern = vec![("up_proj".into(), 4)];
    assert_eq!(scaling(&config), 1.5);
    assert_eq!(lora(dense(&Device::flex()), &config).adapter.unwrap().rank(), 4);
}

#[test]
fn the_seed_decides_the_initial_values() {
    let a = |seed| {
        let attacher = LoraAttacher::new(&config().with_seed(seed), &slots()).unwrap();
        read(attacher.attach(PATH, dense(&Device::flex())).unwrap().adapter.unwrap().lora_a.val())
    };
    assert_eq!(a(1), a(1));
    assert_ne!(a(1), a(2));
}

#[test]
fn modules_that_are_not_selected_stay_as_they_are() {
    let device = Device::flex();
    let slots = [slots(), vec![("model.layers.0.mlp.down_proj".into(), SIZE)]].concat();
    let attacher = LoraAttacher::new(&config(), &slots).unwrap();
    let other = attacher.attach("model.layers.0.mlp.down_proj", dense(&device)).unwrap();
    assert!(other.adapter.is_none());
    // Not even they are trained.
    let model = other.train();
    let y = model.forward(Tensor::from_inner(tensor::<2>(4, [3, SIZE[0]], &device)).require_grad());
    assert_eq!(GradientsParams::from_grads(y.sum().backward(), &model).len(), 0);
}

#[test]
fn options_that_would_be_ignored_are_refused() {
    let refused = |change: fn(&mut AdapterConfig), key: &str| {
        let mut config = config();
        change(&mut config);
        let error = LoraAttacher::new(&config, &slots()).unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
    };
    refused(|c| c.method = Method::dora(), "method: expected lora");
    refused(|c| c.method = Method::Lora { init: InitLoraWeights::Orthogonal }, "init");
    refused(|c| c.rank_pattern = vec![("down_proj".into(), 2)], "rank_pattern");
    refused(|c| c.targets = ["c_attn"].into(), "targets");
    refused(|c| c.dropout = 1.0, "dropout");
    refused(|c| c.rank = 0, "rank: expected");
}

#[test]
fn a_saved_adapter_loads_with_the_same_output() {
    let (device, folder) = (Device::flex(), tempfile::tempdir().unwrap());
    let folder = folder.path().join("made/on/demand");
    let x = tensor::<2>(4, [10, SIZE[0]], &device);
    let config = config().with_rslora().with_dropout(0.1);
    for scheme in SCHEMES {
        let base = packed(scheme, &device);
        let adapted = lora(base.clone(), &config);
        save_peft(&folder, &config, adapted.adapter.iter().map(|lora| (PATH, lora))).unwrap();
        let opened = PeftFolder::open(&folder).unwrap();
        assert_eq!(opened.config(), &config.to_peft().unwrap());
        let loaded = opened.attacher::<Lora>(&slots(), 0).unwrap().attach(PATH, base).unwrap();
        assert_eq!(read(loaded.forward(x.clone())), read(adapted.forward(x.clone())), "{scheme}");
    }
}
