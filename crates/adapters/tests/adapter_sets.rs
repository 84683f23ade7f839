//! Several adapters on one base.

use burn::{module::Module, tensor::Device};
use kiln_adapters::{
    Adapted, AdapterConfig, AdapterMix, AdapterSet, AdapterSetAttacher, AnyAdapter, AnyAttacher, Dora, Lora,
    PackedMerge, PooledAdapter, Pooling, QaHira,
};
use kiln_quant_core::{HostQuantizer, MinMax, PackedLinear, PackedTensor, Projection, QuantLinear};
use kiln_testkit::{assert_close, read, relative_difference, tensor, values};

use crate::balanced_rank::no_dropout;

const SIZE: [usize; 2] = [24, 12];

fn base() -> QuantLinear {
    let weight =
        MinMax.quantize("w", &values(1, SIZE[0] * SIZE[1]), SIZE[0], SIZE[1], &"affine4:8".parse().unwrap());
    QuantLinear::Packed(PackedLinear {
        weight: PackedTensor::new(&weight.unwrap(), &Device::flex()),
        bias: None,
    })
}

fn lora(seed: u64) -> AnyAdapter {
    let device = Device::flex();
    let (a, b) = (tensor(seed, [24, 3], &device), tensor(seed + 1, [3, 12], &device));
    Lora::new(a, b, 0.5, no_dropout()).into()
}

fn dora(seed: u64) -> AnyAdapter {
    let device = Device::flex();
    let (a, b) = (tensor(seed, [24, 3], &device), tensor(seed + 1, [3, 12], &device));
    Dora::new(&base(), a, b, None, 0.5, no_dropout()).into()
}

fn pooled(seed: u64) -> AnyAdapter {
    let core = kiln_adapters::Core::full(tensor(seed, [3, 12], &Device::flex()));
    PooledAdapter::new(core, [8, 1], Pooling::Average, 2.0, no_dropout()).into()
}

fn alone(adapter: &AnyAdapter) -> Adapted<QuantLinear, AnyAdapter> {
    Adapted::new(base(), Some(adapter.clone()))
}

#[test]
fn adapters_are_switched_and_weighted_at_run_time() {
    let x = tensor::<2>(4, [7, SIZE[0]], &Device::flex());
    let b = read(base().forward(x.clone()));
    let mix = AdapterMix::new(["lora", "dora", "pooled"]).unwrap();
    let adapters =
        vec![("lora".to_owned(), lora(5)), ("dora".to_owned(), dora(7)), ("pooled".to_owned(), pooled(9))];
    let model = Adapted::new(base(), Some(AdapterSet::new(adapters.clone(), &mix).unwrap()));
    // Clones, those in training and out of it, follow the same mix.
    let (copy, training) = (model.clone(), model.clone().train());
    let found = || read(model.forward(x.clone()));
    assert_eq!(found(), b);
    let outputs: Vec<Vec<f32>> =
        adapters.iter().map(|(_, adapter)| read(alone(adapter).forward(x.clone()))).collect();
    for ((name, _), expected) in adapters.iter().zip(&outputs) {
        mix.select(name).unwrap();
        assert_eq!(&found(), expected, "{name}");
        assert_eq!(&read(copy.forward(x.clone())), expected, "{name}");
        assert_eq!(&read(training.valid().forward(x.clone())), expected, "{name}");
        assert!(relative_difference(&found(), &b) > 0.01, "{name}");
    }
    mix.set(&[("pooled", -0.5), ("dora", 2.0)]).unwrap();
    let expected: Vec<f32> =
        (0..b.len()).map(|i| b[i] + 2.0 * (outputs[1][i] - b[i]) - 0.5 * (outputs[2][i] - b[i])).collect();
    assert_close("mix", &found(), &expected, 1e-5);
    let merged = x.clone().matmul(model.weight());
    assert_close("merged", &read(merged), &expected, 1e-5);
    mix.clear();
    assert_eq!(found(), b);
}

#[test]
fn names_and_weights_are_checked_and_mistakes_change_nothing() {
    let mix = AdapterMix::new(["a", "b"]).unwrap();
    mix.set(&[("a", 0.25)]).unwrap();
    let text = |result: kiln_adapters::Result<()>| result.unwrap_err().to_string();
    assert_eq!(text(mix.select("c")), "adapter: expected one of a, b, found c");
    assert!(text(mix.set(&[("a", f64::NAN)])).contains("a: expected a finite weight"));
    assert!(text(mix.set(&[("a", 1.0), ("a", 2.0)])).contains("one weight"));
    assert_eq!(mix.weights(), [("a".to_owned(), 0.25), ("b".to_owned(), 0.0)]);
    assert!(AdapterMix::new(["a", "a"]).is_err() && AdapterMix::new(Vec::<String>::new()).is_err());
    assert!(AdapterSet::new(vec![("c".to_owned(), lora(1))], &mix).is_err());
}

#[test]
fn a_weighted_set_merges_exactly_where_its_adapters_do() {
    let mix = AdapterMix::new(["one", "two", "lora"]).unwrap();
    let adapters =
        vec![("one".to_owned(), pooled(5)), ("two".to_owned(), pooled(7)), ("lora".to_owned(), lora(9))];
    let model = Adapted::new(base(), Some(AdapterSet::new(adapters, &mix).unwrap()));
    mix.set(&[("one", 0.75), ("two", -2.0)]).unwrap();
    let x = tensor::<2>(4, [7, SIZE[0]], &Device::flex());
    let expected = read(model.forward(x.clone()));
    let merged = model.clone().merge_packed("up_proj").unwrap();
    let (QuantLinear::Packed(before), QuantLinear::Packed(after)) = (base(), &merged) else {
        panic!("packed")
    };
    assert_eq!(after.weight.to_host().unwrap().codes, before.weight.to_host().unwrap().codes);
    assert!(relative_difference(&read(merged.forward(x)), &expected) < 1e-6);
    mix.set(&[("one", 1.0), ("lora", 0.1)]).unwrap();
    let error = model.merge_packed("up_proj").unwrap_err().to_string();
    assert!(error.starts_with("up_proj.method"), "{error}");
    let none = AdapterSet::<AnyAdapter>::new(vec![], &mix).unwrap().merge_packed(before.weight.clone());
    assert_eq!(none.unwrap().to_host().unwrap(), before.weight.to_host().unwrap());
}

#[test]
fn one_attacher_carries_the_sets_of_a_model() {
    let slots = [("a.q_proj".to_owned(), SIZE), ("a.v_proj".to_owned(), SIZE), ("a.o_proj".to_owned(), SIZE)];
    let lora = AdapterConfig::lora(2, 4.0).with_targets(["q_proj", "v_proj"]);
    let hira = AdapterConfig::qa_hira(QaHira::for_groups(8), 2.0).with_targets(["v_proj"]);
    let attacher = |config| AnyAttacher::new(config, &slots).unwrap();
    let sets = AdapterSetAttacher::new(vec![
        ("lora".to_owned(), attacher(&lora)),
        ("hira".to_owned(), attacher(&hira)),
    ])
    .unwrap();
    let attached = |path: &str| sets.attach(path, base()).unwrap().adapter;
    let has = |set: &AdapterSet<AnyAdapter>| ["lora", "hira"].map(|name| set.get(name).is_some());
    assert_eq!(attached("a.q_proj").as_ref().map(has), Some([true, false]));
    assert_eq!(attached("a.v_proj").as_ref().map(has), Some([true, true]));
    assert!(attached("a.o_proj").is_none());
    sets.mix().select("hira").unwrap();
    let twice = vec![("x".to_owned(), attacher(&lora)), ("x".to_owned(), attacher(&hira))];
    assert!(AdapterSetAttacher::new(twice).is_err());
}
