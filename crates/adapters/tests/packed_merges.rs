//! Merges into packed weights: exact where they are allowed, refused elsewhere.

use burn::{
    module::{Param, ParamId},
    tensor::{Device, Tensor},
};
use kiln_adapters::{Adapted, Adapter, AnyAdapter, Core, Lora, PackedMerge, PooledAdapter, Pooling, QaHira};
use kiln_quant_core::{
    HostQuantizer, MinMax, PackedLinear, PackedTensor, PackedWeight, Projection, QuantLinear, ScaleType,
    Scales, packing::CodePacker, quantizers,
};
use kiln_testkit::{assert_close, read, relative_difference, tensor, values};
use proptest::prelude::*;
use serde_json::Value;

use crate::{
    balanced_rank::no_dropout,
    vectors::{floats, matrix, open, size},
};

/// The weight of codes `[d_output, d_input]`, scales and zero points `[output blocks, input blocks]`.
fn packed(case: &Value, scheme: &str) -> PackedWeight {
    let codes = case["codes"].as_array().unwrap();
    let (d_output, d_input) = (codes.len(), codes[0].as_array().unwrap().len());
    let scheme: kiln_quant_core::QuantScheme = scheme.parse().unwrap();
    let mut packer = CodePacker::new(d_input, d_output, scheme.bits());
    for (output, row) in codes.iter().enumerate() {
        packer.set_column(output, &floats(row).iter().map(|code| *code as u8).collect::<Vec<_>>());
    }
    let device = Device::flex();
    let by_block = |value: Tensor<2>| read(value.transpose());
    let (scales, zeros) = (matrix(&case["scales"], &device), matrix(&case["zeros"], &device));
    PackedWeight {
        scheme,
        d_input,
        d_output,
        codes: packer.into_words(),
        scales: Scales::Plain(by_block(scales.clone())),
        offsets: Some(by_block((scales * zeros).neg())),
        input_order: None,
    }
}

fn floats_of(scales: &Scales) -> &[f32] {
    match scales {
        Scales::Plain(scales) => scales,
        Scales::Double(_) | Scales::Super(_) => panic!("plain scales"),
    }
}

/// Merges, and checks against the vector's merged zero points, weight and outputs: all dyadic, so all exact.
#[track_caller]
fn check_exact(adapter: PooledAdapter, base: PackedWeight, expected: &Value, x: &Value) {
    let device = Device::flex();
    let merged = adapter.merge_packed(PackedTensor::new(&base, &device)).unwrap();
    let found = merged.to_host().unwrap();
    assert_eq!(found.codes, base.codes);
    assert_eq!(found.scales, base.scales);
    let scales = matrix(&expected["scales"], &device);
    let offsets = read((scales * matrix(&expected["zeros_merged"], &device)).transpose().neg());
    assert_eq!(found.offsets.as_deref(), Some(offsets.as_slice()));
    assert_eq!(found.dequantize(), floats(&expected["w_merged"]));
    assert_eq!(read(merged.forward(matrix(x, &device))), floats(&expected["y"]));
}

#[test]
fn qa_lora_merges_are_those_of_the_specification() {
    let (vectors, device) = (open("qalora_merge"), Device::flex());
    let inputs = &vectors["inputs"];
    let base = packed(inputs, "affine4:4");
    for (key, pooling) in [("avg", Pooling::Average), ("sum", Pooling::Sum)] {
        let transposed = |name: &str| matrix(&inputs[name], &device).transpose();
        let core = Core::low_rank(transposed("A"), transposed("B"));
        let scaling = inputs["scaling"].as_f64().unwrap();
        let adapter = PooledAdapter::new(core, [size(&inputs["group"]), 1], pooling, scaling, no_dropout());
        let mut expected = vectors["expected"][key].clone();
        expected["scales"] = inputs["scales"].clone();
        check_exact(adapter, base.clone(), &expected, &inputs["x"]);
    }
}

#[test]
fn qa_hira_merges_are_those_of_the_specification() {
    let (vectors, device) = (open("qahira_merge"), Device::flex());
    let cases = vectors["cases"].as_object().unwrap();
    assert_eq!(cases.len(), 5);
    for (name, case) in cases {
        let (tile, bits) = (floats(&case["quant_tile"]), &case["bits"]);
        let base = packed(case, &format!("affine{bits}:{}x{}", tile[0], tile[1]));
        let core = Core::full(matrix(&case["H"], &device).transpose());
        let sizes = [size(&case["pool_in"]), size(&case["repeat_out"])];
        let scaling = case["scaling"].as_f64().unwrap();
        let adapter = PooledAdapter::new(core, sizes, Pooling::Average, scaling, no_dropout());
        assert_eq!(read(adapter.update().transpose()), floats(&case["delta_w"]), "{name}");
        if case["mergeable"].as_bool().unwrap() {
            check_exact(adapter, base, case, &case["x"]);
        } else {
            let error = adapter.merge_packed(PackedTensor::new(&base, &device)).unwrap_err().to_string();
            let expected = "pool: expected a multiple of the 4 inputs of the blocks of affine4:4 that divides 8: \
                            4, 8, found 2";
            assert_eq!(error, expected);
        }
    }
}

const SCHEMES: [&str; 9] = [
    "affine2:8x4",
    "affine3:4x6:int",
    "affine4:8",
    "affine4:4:sym",
    "affine8:5:f16",
    "affine4:3:int:bf16",
    "affine3:2xcol",
    "affine2:7",
    "affine4:16x2:sym:f16",
];

/// A packed weight of random values, with a bias.
fn random_base(scheme: &str, [d_input, d_output]: [usize; 2], seed: u64) -> QuantLinear {
    let device = Device::flex();
    let weight = values(seed, d_input * d_output);
    let weight = MinMax.quantize("w", &weight, d_input, d_output, &scheme.parse().unwrap()).unwrap();
    let bias = Param::initialized(ParamId::new(), tensor(seed + 1, [d_output], &device));
    QuantLinear::Packed(PackedLinear { weight: PackedTensor::new(&weight, &device), bias: Some(bias) })
}

fn random_adapter(map: [usize; 2], sizes: [usize; 2], rank: Option<usize>, seed: u64) -> PooledAdapter {
    let device = Device::flex();
    let core = match rank {
        Some(rank) => {
            Core::low_rank(tensor(seed, [map[0], rank], &device), tensor(seed + 1, [rank, map[1]], &device))
        }
        None => Core::full(tensor(seed, map, &device)),
    };
    PooledAdapter::new(core, sizes, Pooling::Average, 1.5, no_dropout())
}

fn host(layer: &QuantLinear) -> PackedWeight {
    match layer {
        QuantLinear::Packed(linear) => linear.weight.to_host().unwrap(),
        QuantLinear::Dense(_) => panic!("packed"),
    }
}

/// Whether the change of the weight is one number on each of the base's blocks.
fn constant_on_blocks(update: &[f32], base: &PackedWeight) -> bool {
    let (inputs, outputs) = (base.scheme.block.inputs_of(base.d_input), base.scheme.block.outputs);
    let at = |input: usize, output: usize| update[input * base.d_output + output];
    (0..base.d_input).all(|input| {
        (0..base.d_output)
            .all(|output| at(input, output) == at(input / inputs * inputs, output / outputs * outputs))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn merges_are_exact_or_refused_and_never_refused_where_they_could_be_exact(
        scheme in prop::sample::select(&SCHEMES[..]),
        map in [1usize..5, 1usize..5],
        sizes in [1usize..18, 1usize..18],
        rank in prop::option::of(1usize..4),
        seed in 0u64..1000,
    ) {
        let shape = [map[0] * sizes[0], map[1] * sizes[1]];
        let (base, adapter) = (random_base(scheme, shape, seed), random_adapter(map, sizes, rank, seed + 7));
        let before = host(&base);
        let possible = constant_on_blocks(&read(adapter.update()), &before);
        let adapted = Adapted::new(base, Some(adapter));
        let x = tensor::<2>(seed + 9, [3, shape[0]], &Device::flex());
        let expected = read(adapted.forward(x.clone()));
        let dense = read(adapted.weight().transpose());
        match adapted.merge_packed("up_proj") {
            Ok(merged) => {
                prop_assert!(possible);
                let after = host(&merged);
                prop_assert_eq!(&after.codes, &before.codes);
                prop_assert_eq!(after.effective_scales(), before.effective_scales());
                prop_assert_eq!(after.scheme.block, before.scheme.block);
                prop_assert_eq!(after.scheme.scales, ScaleType::F32);
                prop_assert!(relative_difference(&after.dequantize(), &dense) < 3e-7);
                prop_assert!(relative_difference(&read(merged.forward(x)), &expected) < 2e-6);
            }
            Err(error) => {
                prop_assert!(!possible, "{}", error);
                // What the message offers does fit.
                let text = error.to_string();
                let (option, rest) = text.split_once(": expected ").unwrap();
                let offered = rest.rsplit_once(", found").unwrap().0.rsplit_once(": ").unwrap().1;
                let offered: usize = offered.split(", ").next().unwrap().parse().unwrap();
                let mut better = sizes;
                better[usize::from(option == "up_proj.repeat")] = offered;
                let map = [shape[0] / better[0], shape[1] / better[1]];
                let adapter = random_adapter(map, better, rank, seed);
                let base = random_base(scheme, shape, seed);
                if let Err(again) = Adapted::new(base, Some(adapter)).merge_packed("up_proj") {
                    // The other axis may not fit either.
                    prop_assert!(option == "up_proj.pool" && again.to_string().starts_with("up_proj.repeat"));
                }
            }
        }
    }
}

#[test]
fn dense_layers_and_layers_without_adapters_merge_too() {
    let device = Device::flex();
    let base = random_base("affine4:8", [16, 6], 1);
    let before = host(&base);
    let none = Adapted::<_, PooledAdapter>::new(base.clone(), None).merge_packed("a").unwrap();
    assert_eq!(host(&none), before);
    let weight = Param::from_tensor(tensor(2, [16, 6], &device));
    let dense = QuantLinear::Dense(burn::nn::Linear { weight, bias: None });
    let adapted = Adapted::new(dense, Some(random_adapter([4, 3], [4, 2], None, 3)));
    let x = tensor::<2>(4, [5, 16], &device);
    let expected = read(adapted.forward(x.clone()));
    assert_close("dense", &read(adapted.merge_packed("a").unwrap().forward(x)), &expected, 1e-5);
}

#[test]
fn bases_and_adapters_that_can_not_merge_are_named() {
    let device = Device::flex();
    let adapter = || random_adapter([2, 6], [8, 1], None, 3);
    let refused = |base: QuantLinear, adapter: AnyAdapter, message: &str| {
        let error = Adapted::new(base, Some(adapter)).merge_packed("mlp.up_proj").unwrap_err().to_string();
        assert_eq!(error, format!("mlp.up_proj.{message}"));
    };
    let codebook = "scheme: expected affine codes, whose offsets can take an adapter, found nf4:8";
    refused(random_base("nf4:8", [16, 6], 1), adapter().into(), codebook);
    let mut permuted = host(&random_base("affine4:8", [16, 6], 1));
    permuted.input_order = Some((0..16).rev().collect());
    let permuted = PackedLinear { weight: PackedTensor::new(&permuted, &device), bias: None };
    let order = "input_order: expected inputs in their own order, found inputs sorted by group (act-order)";
    refused(QuantLinear::Packed(permuted), adapter().into(), order);
    let lora = Lora::new(tensor(1, [16, 2], &device), tensor(2, [2, 6], &device), 1.0, no_dropout());
    let method = "method: expected an adapter that pools: Q-BaRA, QA-LoRA, QA-HiRA or QA-BLoRA, \
                  found LoRA, which merges into dense weights only";
    refused(random_base("affine4:8", [16, 6], 1), lora.into(), method);
    let shape = "shape: expected a base of [16, 6], found [16, 7]";
    refused(random_base("affine4:8", [16, 7], 1), adapter().into(), shape);
    let mut broken = adapter();
    broken.core = Core::full(tensor::<2>(1, [2, 6], &device) * f32::NAN);
    refused(
        random_base("affine4:8", [16, 6], 1),
        broken.into(),
        "map: expected finite trained values, found NaN",
    );
}

/// A constant block has scale 0, by which a zero point could not be divided.
#[test]
fn blocks_of_one_value_merge() {
    let device = Device::flex();
    let weight = MinMax.quantize("w", &[0.5; 32], 8, 4, &"affine4:4".parse().unwrap()).unwrap();
    assert!(floats_of(&weight.scales).iter().all(|scale| *scale == 0.0));
    let adapter = random_adapter([2, 4], [4, 1], None, 1);
    let expected: Vec<f32> = read(adapter.update().transpose()).iter().map(|update| update + 0.5).collect();
    let merged = adapter.merge_packed(PackedTensor::new(&weight, &device)).unwrap().to_host().unwrap();
    assert_close("merged", &merged.dequantize(), &expected, 1e-7);
}

/// Normal values, by Box and Muller's transformation.
fn normal(seed: u64, count: usize) -> Vec<f32> {
    let pair = |pair: &[f32]| {
        let radius = (-2.0 * ((1.0 - pair[0]) / 2.0).ln()).sqrt();
        radius * (std::f32::consts::PI * pair[1]).cos()
    };
    values(seed, 2 * count).chunks(2).map(pair).collect()
}

/// How much of a light fine-tune each storage of the merged zero points loses: the specification's section 6.1.
#[test]
fn zero_points_must_stay_float() {
    let (device, [d_input, d_output]) = (Device::flex(), [512, 256]);
    // Of a usual size: where it lies among the powers of two matters to 16-bit offsets.
    const DEVIATION: f32 = 0.02;
    let weight: Vec<f32> = normal(1, d_input * d_output).iter().map(|value| DEVIATION * value).collect();
    let scheme = "affine4:32".parse().unwrap();
    let base = MinMax.quantize("w", &weight, d_input, d_output, &scheme).unwrap();
    let qa_hira = QaHira::for_groups(32).geometry();
    let shift: Vec<f32> =
        normal(2, d_input / 32 * d_output).iter().map(|value| 0.1 * DEVIATION * value).collect();
    // Scaling and average pooling would divide by 32; an adapter that learned `shift` has H 32 times as large.
    let h: Vec<f32> = shift.iter().map(|value| value * 32.0).collect();
    let h = Tensor::from_data(burn::tensor::TensorData::new(h, [d_input / 32, d_output]), &device);
    let sizes = [qa_hira.pool, qa_hira.repeat];
    let adapter = PooledAdapter::new(Core::full(h), sizes, qa_hira.pooling, 1.0, no_dropout());
    let merged = adapter.merge_packed(PackedTensor::new(&base, &device)).unwrap().to_host().unwrap();
    let (scales, offsets) = (floats_of(&merged.scales), merged.offsets.as_ref().unwrap());
    let exact: Vec<f64> = base
        .offsets
        .as_ref()
        .unwrap()
        .iter()
        .zip(&shift)
        .map(|(offset, shift)| f64::from(*offset) + f64::from(*shift))
        .collect();
    let rms = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let size = rms(&mut shift.iter().map(|shift| f64::from(*shift)));
    // The error of the offset that a stored value stands for, over the learned shift.
    let lost = |stored: &dyn Fn(f32, f32) -> f64| {
        let errors = offsets.iter().zip(scales).zip(&exact);
        rms(&mut errors.map(|((offset, scale), exact)| stored(*offset, *scale) - exact)) / size
    };
    let zero = |offset: f32, scale: f32| -offset / scale;
    let of_zero = |zero: f32, scale: f32| -f64::from(zero) * f64::from(scale);
    let round = |kind: ScaleType| {
        [
            lost(&|offset, scale| of_zero(kind.round(zero(offset, scale)), scale)),
            lost(&|offset, _| f64::from(kind.round(offset))),
        ]
    };
    let integer = lost(&|offset, scale| of_zero(zero(offset, scale).round(), scale));
    assert!((integer - 0.81).abs() < 0.02, "integer: {integer}");
    let [zeros, offsets] = round(ScaleType::Bf16);
    assert!((zeros - 0.036).abs() < 0.002 && (offsets - 0.035).abs() < 0.002, "bf16: {zeros} {offsets}");
    let [zeros, offsets] = round(ScaleType::F16);
    assert!((zeros - 0.0045).abs() < 2e-4 && (offsets - 0.0044).abs() < 2e-4, "f16: {zeros} {offsets}");
    let [zeros, offsets] = round(ScaleType::F32);
    assert!(zeros < 1e-6 && offsets < 1e-6, "f32: {zeros} {offsets}");
}

#[test]
fn requantizing_reports_what_it_loses() {
    let device = Device::flex();
    let (base, x) = (random_base("affine4:16", [64, 24], 1), tensor::<2>(5, [40, 64], &device));
    let light = random_adapter([4, 24], [16, 1], None, 3).scaled(0.01);
    let adapted = Adapted::new(base.clone(), Some(light));
    let merged = read(adapted.weight().transpose());
    let y = read(adapted.forward(x.clone()));
    let scheme = "affine3:32:int".parse().unwrap();
    let (layer, error) = adapted.clone().requantize("up", &scheme, &MinMax, Some(x.clone())).unwrap();
    let error = error.unwrap();
    assert_eq!(host(&layer).scheme, scheme);
    assert_eq!(error.weight, quantizers::error(&merged, &host(&layer)));
    let output = error.output.unwrap();
    let (z, b) = (read(layer.forward(x.clone())), read(base.forward(x.clone())));
    assert!((output.relative - relative_difference(&z, &y)).abs() < 1e-9);
    let shift = relative_difference(&y, &b) * relative_difference(&b, &vec![0.0; b.len()]);
    let lost = relative_difference(&z, &y) * relative_difference(&y, &vec![0.0; y.len()]);
    assert!((output.of_shift / (lost / shift) - 1.0).abs() < 1e-6);
    // Three bits drown a hundredth.
    assert!(output.of_shift > 1.0, "{output:?}");
    let (_, error) = adapted.clone().requantize("up", &scheme, &MinMax, None).unwrap();
    assert!(error.unwrap().output.is_none());
    let none = Adapted::<_, PooledAdapter>::new(base.clone(), None);
    let (layer, error) = none.requantize("up", &scheme, &MinMax, Some(x)).unwrap();
    assert_eq!((host(&layer), error), (host(&base), None));
}

#[test]
fn an_exact_merge_and_a_dense_one_agree() {
    let base = random_base("affine4:8:f16", [32, 12], 1);
    let adapted = Adapted::new(base.clone(), Some(random_adapter([4, 12], [8, 1], Some(2), 3)));
    let dense = read(adapted.clone().merge_dense().weight.val());
    let packed = read(adapted.clone().merge_packed("up").unwrap().weight());
    assert!(relative_difference(&packed, &dense) < 1e-6);
    let adapter = adapted.adapter.unwrap();
    assert!(relative_difference(&read(adapter.merged_weight(&base)), &dense) < 1e-7);
}

/// The codes of a weight, output after output.
fn codes(weight: &PackedWeight) -> Vec<f32> {
    let column = |output| {
        let mut codes = vec![0; weight.d_input];
        kiln_quant_core::packing::unpack_column(
            &weight.codes,
            weight.d_output,
            weight.scheme.bits(),
            output,
            &mut codes,
        );
        codes.into_iter().map(f32::from)
    };
    (0..weight.d_output).flat_map(|output| column(output).collect::<Vec<_>>()).collect()
}

/// The bases that merges start from are those of the specification.
#[test]
fn quantized_bases_are_those_of_the_specification() {
    let vectors = open("affine_quant");
    let weight = floats(&vectors["inputs"]["w"]);
    for bits in [2, 3, 4] {
        let expected = &vectors["expected"][format!("bits{bits}")];
        let packed =
            MinMax.quantize("w", &weight, 8, 2, &format!("affine{bits}:4").parse().unwrap()).unwrap();
        assert_eq!(codes(&packed), floats(&expected["codes"]), "{bits} bits");
        let by_block = |name| read(matrix(&expected[name], &Device::flex()).transpose());
        assert_close("scales", floats_of(&packed.scales), &by_block("scales"), 1e-6);
        assert_close("offsets", packed.offsets.as_ref().unwrap(), &by_block("betas"), 1e-6);
        assert_close("values", &packed.dequantize(), &floats(&expected["dequant"]), 1e-6);
        let largest = quantizers::error(&weight, &packed).max_abs;
        assert!((largest - expected["max_abs_err"].as_f64().unwrap()).abs() < 1e-6);
    }
    let vectors = open("nf4");
    let (weight, expected) = (floats(&vectors["inputs"]["w"]), &vectors["expected"]);
    let packed = MinMax.quantize("w", &weight, 64, 2, &"nf4:64".parse().unwrap()).unwrap();
    assert_eq!(codes(&packed), floats(&expected["indices"]));
    assert_close("absmax", floats_of(&packed.scales), &floats(&expected["absmax"]), 1e-6);
    assert_close("values", &packed.dequantize(), &floats(&expected["dequant"]), 1e-6);
    let rms = quantizers::error(&weight, &packed).mean_squared.sqrt();
    assert!((rms - expected["rms_error"].as_f64().unwrap()).abs() < 1e-6);
}
