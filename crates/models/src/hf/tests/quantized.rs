//! bitsandbytes and GPTQ layers of the fixtures, bit for bit, and damaged ones.

use super::*;
use kiln_quant_core::{Scales, packing::unpack_column};
use proptest::prelude::*;

/// The tensor `name` of a fixture.
fn fixture(file: &str, name: &str) -> RawTensor {
    SafetensorsFile::open(testdata(file)).unwrap().read(name).unwrap()
}

fn fixture_f32(file: &str, name: &str) -> Vec<f32> {
    SafetensorsFile::open(testdata(file)).unwrap().read_f32(name).unwrap().1
}

fn fixture_words(file: &str, name: &str) -> Vec<u32> {
    let bytes = fixture(file, name).bytes;
    bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
}

// --- bitsandbytes ---

fn bnb_config() -> Value {
    let bnb = json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4"});
    with(tiny_config(), json!({"quantization_config": bnb}))
}

const STATE: &str = "m.weight.quant_state.bitsandbytes__nf4";

/// The layer of a fixture file as module `m`.
fn bnb_parts(file: &str) -> Vec<(String, RawTensor)> {
    let file = SafetensorsFile::open(testdata(file)).unwrap();
    let parts = file.names().filter(|name| name.starts_with("weight"));
    parts.map(|name| (format!("m.{name}"), file.read(name).unwrap())).collect()
}

fn open_parts(config: &Value, parts: &[(String, RawTensor)]) -> Result<HfFolder> {
    let parts: Vec<_> = parts.iter().map(|(name, tensor)| (name.as_str(), tensor.clone())).collect();
    let folder = folder(config, &parts);
    let opened = HfFolder::open(folder.path());
    // Reading goes on through the open file.
    drop(folder);
    opened
}

#[test]
fn bitsandbytes_fixtures_decode_exactly() {
    for (name, scheme) in [
        ("fp4_128x256", "fp4:64"),
        ("nf4_128x256", "nf4:64"),
        ("nf4_128x256_double", "nf4:64:double"),
        ("nf4_64x160_bs128_outlier", "nf4:32"),
    ] {
        let file = format!("bnb/{name}.safetensors");
        let folder = open_parts(&bnb_config(), &bnb_parts(&file)).unwrap();
        assert_eq!(folder.names(), ["m.weight"]);
        let weight = packed(&folder, "m");
        assert_eq!(weight.scheme.to_string(), scheme, "{name}");
        assert_eq!(weight.dequantize(), fixture_f32(&file, "dequantized"), "{name}");
        assert_eq!(folder.dense("m.weight").unwrap().shape, fixture(&file, "dequantized").shape, "{name}");
        // The first of two codes is in the high nibble.
        let bytes = fixture(&file, "weight").bytes;
        let mut row = vec![0; weight.d_input];
        for output in 0..weight.d_output {
            unpack_column(&weight.codes, weight.d_output, 4, output, &mut row);
            let expected = &bytes[output * row.len() / 2..][..row.len() / 2];
            assert!(
                row.chunks(2).zip(expected).all(|(pair, &byte)| pair[0] << 4 | pair[1] == byte),
                "{name}"
            );
        }
        // Scales are [input blocks, outputs]; the fixture's are flat.
        let (flat, scales) = (fixture_f32(&file, "absmax_effective"), weight.effective_scales());
        let per_row = scales.len() / weight.d_output;
        let inputs = weight.d_input / per_row;
        let block = weight.d_input * weight.d_output / flat.len();
        for (i, &scale) in scales.iter().enumerate() {
            let (row, output) = (i / weight.d_output, i % weight.d_output);
            assert_eq!(scale, flat[(output * weight.d_input + row * inputs) / block], "{name}");
        }
    }
}

#[test]
fn double_scales_stay_as_they_are_stored() {
    let file = "bnb/nf4_128x256_double.safetensors";
    let weight = packed(&open_parts(&bnb_config(), &bnb_parts(file)).unwrap(), "m");
    let Scales::Double(double) = weight.scales else { panic!("scales were decoded") };
    assert_eq!(double.codes, fixture(file, "weight.absmax").bytes);
    assert_eq!(double.nested, fixture_f32(file, "weight.nested_absmax"));
    assert_eq!(double.offset, 0.131_839_42);
}

/// The double-quantized layer as `[256, 128]` with blocks of 256: each flat block is two rows, so its scale is repeated.
#[test]
fn double_scales_of_blocks_that_cross_rows_are_decoded() {
    let file = "bnb/nf4_128x256_double.safetensors";
    let mut parts = bnb_parts(file);
    let state = br#"{"shape": [256, 128], "nested_offset": 0.13183942437171936, "blocksize": 256, "quant_type": "nf4"}"#;
    for (name, tensor) in &mut parts {
        match name.as_str() {
            STATE => *tensor = u8s(*state),
            "m.weight.absmax" => *tensor = u8s(&tensor.bytes[..128]),
            "m.weight.nested_absmax" => *tensor = f32s(&fixture_f32(file, "weight.nested_absmax")[..1]),
            _ => {}
        }
    }
    let weight = packed(&open_parts(&bnb_config(), &parts).unwrap(), "m");
    assert_eq!(weight.scheme.to_string(), "nf4:128");
    let effective = fixture_f32(file, "absmax_effective");
    let scales = weight.effective_scales();
    assert_eq!(scales.len(), 256);
    assert!(scales.iter().enumerate().all(|(output, &scale)| scale == effective[output / 2]));
}

#[test]
fn other_nested_blocks_and_maps_are_decoded() {
    let state = |nested: usize| {
        u8s(format!(
            r#"{{"nested_blocksize": {nested}, "nested_offset": 0.5, "shape": [2, 4], "blocksize": 4, "quant_type": "nf4"}}"#
        ))
    };
    let levels = f32s(Codebook::Nf4.levels());
    let mut map = vec![0.0; 256];
    (map[3], map[9]) = (0.25, -0.125);
    let parts = [
        (STATE, state(1)),
        ("m.weight", u8s([0xF0, 0x7F, 0x0F, 0x70])),
        ("m.weight.absmax", u8s([3, 9])),
        ("m.weight.nested_absmax", f32s(&[2.0, 4.0])),
        ("m.weight.nested_quant_map", f32s(&map)),
        ("m.weight.quant_map", levels),
    ];
    let made = folder(&bnb_config(), &parts);
    // Scales 0.25 * 2 + 0.5 = 1 and -0.125 * 4 + 0.5 = 0.
    let weight = packed(&HfFolder::open(made.path()).unwrap(), "m");
    assert_eq!(weight.scales, Scales::Plain(vec![1.0, 0.0]));
    assert_eq!(weight.dequantize()[..4], [1.0, -1.0, 0.0, 1.0]);
}

#[test]
fn other_storage_types_hold_the_same_bytes() {
    let mut parts = bnb_parts("bnb/nf4_128x256.safetensors");
    for (name, tensor) in &mut parts {
        if name == "m.weight" {
            tensor.dtype = Dtype::BF16;
            tensor.shape[0] /= 2;
        }
    }
    let folder = open_parts(&bnb_config(), &parts).unwrap();
    assert_eq!(
        folder.dense("m.weight").unwrap().values,
        fixture_f32("bnb/nf4_128x256.safetensors", "dequantized")
    );
}

#[test]
fn odd_widths_start_rows_inside_a_byte() {
    // [3, 3] in one block of 16: nine codes, and one of padding.
    let parts = [
        (STATE, u8s(*br#"{"quant_type": "nf4", "blocksize": 16, "shape": [3, 3]}"#)),
        ("m.weight", u8s([0x01, 0x23, 0x45, 0x67, 0x8F])),
        ("m.weight.absmax", f32s(&[2.0])),
        ("m.weight.quant_map", f32s(Codebook::Nf4.levels())),
    ];
    let made = folder(&bnb_config(), &parts);
    let values = HfFolder::open(made.path()).unwrap().dense("m.weight").unwrap();
    let expected: Vec<f32> = Codebook::Nf4.levels()[..9].iter().map(|level| 2.0 * level).collect();
    assert_eq!(values, DenseTensor { shape: vec![3, 3], values: expected });
}

#[test]
fn damaged_bitsandbytes_layers_name_the_tensor() {
    let change = |target: &str, replacement: Option<RawTensor>| {
        let mut parts = bnb_parts("bnb/nf4_128x256.safetensors");
        match replacement {
            Some(new) => {
                parts.iter_mut().filter(|part| part.0 == target).for_each(|part| part.1 = new.clone())
            }
            None => parts.retain(|part| part.0 != target),
        }
        open_parts(&bnb_config(), &parts).unwrap().weight("m")
    };
    let state = |text: &str| change(STATE, Some(u8s(text)));
    assert_error(change("m.weight.absmax", None), &["m.weight.absmax", "none of that name"]);
    assert_error(change("m.weight.quant_map", None), &["m.weight.quant_map"]);
    assert_error(change("m.weight", None), &["m.weight:"]);
    assert_error(change(STATE, None), &["m.weight", "found U8"]);
    assert_error(change("m.weight.absmax", Some(f32s(&[1.0; 511]))), &["m.weight.absmax", "512", "511"]);
    assert_error(change("m.weight.absmax", Some(f32s(&[f32::NAN; 512]))), &["m.weight.absmax", "NaN"]);
    assert_error(change("m.weight.quant_map", Some(f32s(&[0.5; 16]))), &["m.weight.quant_map", "0.5"]);
    assert_error(change("m.weight", Some(u8s([0; 7]))), &["m.weight", "16384 bytes", "[7]"]);
    assert_error(state("{"), &[STATE, "JSON"]);
    assert_error(state(r#"{"quant_type": "nf5"}"#), &["quant_type", "nf5"]);
    assert_error(
        state(r#"{"quant_type": "fp4", "blocksize": 64, "shape": [128, 256]}"#),
        &["quant_type", "fp4"],
    );
    assert_error(
        state(r#"{"quant_type": "nf4", "blocksize": 63, "shape": [128, 256]}"#),
        &["blocksize", "63"],
    );
    assert_error(state(r#"{"quant_type": "nf4", "blocksize": 64, "shape": [128]}"#), &["shape"]);
    assert_error(
        state(r#"{"quant_type": "nf4", "blocksize": 64, "shape": [4294967295, 4294967295]}"#),
        &["m.weight", "[16384, 1]"],
    );
    assert_error(state(r#"{"quant_type": "nf4", "blocksize": 64, "shape": [4294967296, 1]}"#), &["shape"]);
    assert_error(state(r#"{"quant_type": "nf4", "blocksize": 64, "shape": [0, 9]}"#), &["m.weight"]);
    let second = ("m.weight.quant_state.bitsandbytes__fp4".to_owned(), u8s(*b"{}"));
    let parts = [bnb_parts("bnb/nf4_128x256.safetensors"), vec![second]].concat();
    assert_error(open_parts(&bnb_config(), &parts).unwrap().weight("m"), &["quant_state", "two"]);
}

// --- GPTQ ---

fn gptq_config(bits: u32, group_size: i64, extra: Value) -> Value {
    let gptq = with(json!({"quant_method": "gptq", "bits": bits, "group_size": group_size}), extra);
    with(tiny_config(), json!({"quantization_config": gptq}))
}

/// The layer of a fixture file as module `m`, with the zeros of one format.
fn gptq_parts(file: &str, zeros: &str) -> Vec<(String, RawTensor)> {
    let read = |name: &str| fixture(file, &format!("gptq.{name}"));
    vec![
        ("m.qweight".into(), read("qweight")),
        ("m.qzeros".into(), read(zeros)),
        ("m.scales".into(), read("scales")),
        ("m.g_idx".into(), read("g_idx")),
        ("m.bias".into(), f32s(&[0.5; 32])),
    ]
}

#[test]
fn gptq_fixtures_decode_exactly_in_both_formats() {
    for (name, bits, group) in [
        ("2bit_64x32", 2, 32),
        ("3bit_64x32", 3, 32),
        ("4bit_64x32", 4, 32),
        ("4bit_64x32_actorder", 4, 16),
        ("8bit_64x32", 8, 32),
    ] {
        let file = format!("gptq/gptq_{name}.safetensors");
        let act_order = name.ends_with("actorder");
        for (format, zeros) in [("gptq", "qzeros_v1"), ("gptq_v2", "qzeros_v2")] {
            for key in ["checkpoint_format", "format"] {
                let config = gptq_config(bits, group, json!({key: format, "desc_act": act_order}));
                let folder = open_parts(&config, &gptq_parts(&file, zeros)).unwrap();
                assert_eq!(folder.names(), ["m.bias", "m.weight"]);
                let weight = packed(&folder, "m");
                assert_eq!(weight.scheme.to_string(), format!("affine{bits}:{group}:int"));
                assert_eq!(weight.dequantize(), fixture_f32(&file, "dequantized"), "{name} {format}");
                assert_eq!(weight.input_order.is_some(), act_order);
                if !act_order {
                    assert_eq!(weight.codes, fixture_words(&file, "gptq.qweight"), "{name}");
                }
            }
        }
    }
}

#[test]
fn act_order_sorts_inputs_by_group_and_keeps_their_order_within() {
    let file = "gptq/gptq_4bit_64x32_actorder.safetensors";
    let config = gptq_config(4, 16, json!({"checkpoint_format": "gptq_v2", "desc_act": true}));
    let weight = packed(&open_parts(&config, &gptq_parts(file, "qzeros_v2")).unwrap(), "m");
    let (order, index) = (weight.input_order.unwrap(), fixture_words(file, "gptq.g_idx"));
    let keys: Vec<_> = order.iter().map(|&input| (index[input as usize], input)).collect();
    assert!(keys.is_sorted());
    let (mut sorted, mut plain) = ([0; 64], [0; 64]);
    let stored = fixture_words(file, "gptq.qweight");
    for output in 0..32 {
        unpack_column(&weight.codes, 32, 4, output, &mut sorted);
        unpack_column(&stored, 32, 4, output, &mut plain);
        assert!(order.iter().zip(sorted).all(|(&input, code)| plain[input as usize] == code));
    }
    let parts: Vec<_> =
        gptq_parts(file, "qzeros_v2").into_iter().filter(|(name, _)| name != "m.g_idx").collect();
    assert_error(open_parts(&config, &parts).unwrap().weight("m"), &["m.g_idx", "desc_act"]);
}

#[test]
fn an_absent_group_index_means_contiguous_groups() {
    let file = "gptq/gptq_3bit_64x32.safetensors";
    let config = gptq_config(3, 32, json!({"checkpoint_format": "gptq_v2"}));
    for empty in [false, true] {
        let mut parts = gptq_parts(file, "qzeros_v2");
        parts.retain(|(name, _)| name != "m.g_idx");
        if empty {
            parts.push(("m.g_idx".into(), i32s(&[0], [])));
        }
        let folder = open_parts(&config, &parts).unwrap();
        assert_eq!(folder.dense("m.weight").unwrap().values, fixture_f32(file, "dequantized"));
    }
}

#[test]
fn zeros_of_files_that_do_not_say_are_guessed_and_noted() {
    let file = "gptq/gptq_4bit_64x32.safetensors";
    let config = gptq_config(4, 32, json!({}));
    let folder = open_parts(&config, &gptq_parts(file, "qzeros_v1")).unwrap();
    assert_eq!(folder.notes().len(), 1);
    assert!(folder.notes()[0].contains("checkpoint_format") && folder.notes()[0].contains("V1"));
    assert_eq!(folder.dense("m.weight").unwrap().values, fixture_f32(file, "dequantized"));
    // Symmetric zeros as they are: 8 everywhere. The same minus one is version 1.
    for (stored, expected) in [(0x8888_8888, ZeroFormat::V2), (0x7777_7777, ZeroFormat::V1)] {
        let mut parts = gptq_parts(file, "qzeros_v1");
        parts[1].1 = i32s(&[2, 4], [stored; 8]);
        let folder = open_parts(&config, &parts).unwrap();
        let Quantization::Gptq(gptq) = folder.storage() else { panic!() };
        assert_eq!(gptq.zeros, Some(expected));
        let weight = packed(&folder, "m");
        let Scales::Plain(scales) = &weight.scales else { panic!() };
        assert!(weight.offsets.unwrap().iter().zip(scales).all(|(offset, scale)| *offset == -8.0 * scale));
    }
}

#[test]
fn wrongly_labelled_zeros_can_be_overridden() {
    let file = "gptq/gptq_4bit_64x32.safetensors";
    let config = gptq_config(4, 32, json!({"checkpoint_format": "gptq"}));
    let folder = open_parts(&config, &gptq_parts(file, "qzeros_v2")).unwrap();
    assert_ne!(folder.dense("m.weight").unwrap().values, fixture_f32(file, "dequantized"));
    let folder = folder.with_gptq_zeros(ZeroFormat::V2);
    assert_eq!(folder.dense("m.weight").unwrap().values, fixture_f32(file, "dequantized"));
    assert!(folder.notes()[0].contains("V2"));
}

/// A version 1 field of all ones is a zero of 0.
#[test]
fn a_wrapped_zero_is_zero() {
    let parts = [
        ("m.qweight".into(), i32s(&[1, 8], [0x7654_3210; 8])),
        ("m.qzeros".into(), i32s(&[1, 1], [0xFFFF_FFFF])),
        ("m.scales".into(), RawTensor { shape: vec![1, 8], ..f32s(&[2.0; 8]) }),
    ];
    let folder = open_parts(&gptq_config(4, -1, json!({"checkpoint_format": "gptq"})), &parts).unwrap();
    let weight = packed(&folder, "m");
    assert_eq!(weight.scheme.to_string(), "affine4:col:int");
    assert_eq!(weight.dequantize()[..8], [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0]);
}

#[test]
fn groups_of_unequal_sizes_become_blocks_of_their_common_divisor() {
    // Inputs 0..8 in groups 1 1 0 1 1 0 0 0 | group 1 last: counts 4 and 4; then counts 2 and 6.
    let layer = |index: [u32; 8]| {
        let parts = [
            ("m.qweight".into(), i32s(&[1, 8], [0x7654_3210; 8])),
            ("m.qzeros".into(), i32s(&[2, 1], [0x1111_1111, 0x2222_2222])),
            ("m.scales".into(), RawTensor { shape: vec![2, 8], ..f32s(&[[1.0; 8], [10.0; 8]].concat()) }),
            ("m.g_idx".into(), i32s(&[8], index)),
        ];
        let config = gptq_config(4, 4, json!({"checkpoint_format": "gptq_v2", "desc_act": true}));
        packed(&open_parts(&config, &parts).unwrap(), "m")
    };
    for index in [
        [1, 1, 0, 1, 1, 0, 0, 0],
        [1, 0, 1, 1, 1, 0, 1, 1],
        [0, 0, 0, 0, 0, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 1],
    ] {
        let weight = layer(index);
        // (code - zero) * scale by the definition, code = input.
        let expected: Vec<f32> = (0u32..8)
            .map(|input| match index[input as usize] {
                0 => input as f32 - 1.0,
                _ => 10.0 * (input as f32 - 2.0),
            })
            .collect();
        assert_eq!(weight.dequantize()[..8], expected, "{index:?}");
        assert_eq!(weight.input_order.is_none(), index.is_sorted(), "{index:?}");
    }
}

#[test]
fn incomplete_runs_of_three_bits_are_read() {
    // 40 inputs of 3 bits: 120 bits, four words, in the file without (4 rows) or with (6 rows) the rest of the run.
    let codes: Vec<u8> = (0..40).map(|input| (input * 5 % 8) as u8).collect();
    let stream = codes.iter().rev().fold(0u128, |stream, &code| stream << 3 | u128::from(code));
    let words: Vec<u32> = (0..4).map(|word| (stream >> (32 * word)) as u32).collect();
    for rows in [4, 6] {
        // Rubbish in the padding must not reach the codes.
        let rubbish = |row: usize| {
            words.get(row).map_or(0xDEAD_BEEF, |&word| word | if row == 3 { 0xFF << 24 } else { 0 })
        };
        let parts = [
            ("m.qweight".into(), i32s(&[rows, 32], (0..rows * 32).map(|i| rubbish(i / 32)))),
            ("m.qzeros".into(), i32s(&[2, 3], [0; 6])),
            ("m.scales".into(), RawTensor { shape: vec![2, 32], ..f32s(&[1.0; 64]) }),
            ("m.g_idx".into(), i32s(&[40], (0..40).map(|input| input / 32))),
        ];
        let config = gptq_config(3, 32, json!({"checkpoint_format": "gptq_v2"}));
        let weight = packed(&open_parts(&config, &parts).unwrap(), "m");
        assert_eq!((weight.d_input, weight.d_output), (40, 32));
        let mut run = [9; 64];
        unpack_column(&weight.codes, 32, 3, 31, &mut run);
        assert_eq!(run[..40], codes);
        assert_eq!(run[40..], [0; 24]);
    }
}

#[test]
fn dynamic_overrides_give_other_bits_and_groups() {
    let three = gptq_parts("gptq/gptq_3bit_64x32.safetensors", "qzeros_v2");
    let rename = |parts: Vec<(String, RawTensor)>, module: &str| -> Vec<_> {
        parts.into_iter().map(|(name, tensor)| (name.replacen('m', module, 1), tensor)).collect()
    };
    let act_order = gptq_parts("gptq/gptq_4bit_64x32_actorder.safetensors", "qzeros_v2");
    let parts = [
        rename(three, "three"),
        rename(act_order, "four"),
        vec![("plain.weight".to_owned(), RawTensor { shape: vec![1, 2], ..f32s(&[1.0, 2.0]) })],
    ]
    .concat();
    let dynamic = json!({"-:^plain": {}, "+:^three(?!x)": {"bits": 3}, ".*four": {"group_size": 16}});
    let config = gptq_config(4, 32, json!({"checkpoint_format": "gptq_v2", "dynamic": dynamic}));
    let folder = open_parts(&config, &parts).unwrap();
    let Quantization::Gptq(gptq) = folder.storage() else { panic!() };
    assert_eq!(
        gptq.overrides,
        [
            GptqOverride { pattern: "^three(?!x)".into(), bits: 3, group_size: Some(32) },
            GptqOverride { pattern: ".*four".into(), bits: 4, group_size: Some(16) },
        ]
    );
    assert_eq!(packed(&folder, "three").scheme.to_string(), "affine3:32:int");
    assert_eq!(packed(&folder, "four").scheme.to_string(), "affine4:16:int");
    assert_eq!(
        packed(&folder, "four").dequantize(),
        fixture_f32("gptq/gptq_4bit_64x32_actorder.safetensors", "dequantized")
    );
    assert_eq!(folder.dense("plain.weight").unwrap().values, [1.0, 2.0]);
    // Without the overrides both contradict the configuration.
    let folder = open_parts(&gptq_config(4, 32, json!({"checkpoint_format": "gptq_v2"})), &parts).unwrap();
    assert_error(folder.weight("three"), &["three.qzeros", "[4]"]);
    assert_error(folder.weight("four"), &["four.scales", "2 groups of 32", "4 groups"]);
}

#[test]
fn quantize_config_json_stands_in() {
    let file = "gptq/gptq_4bit_64x32.safetensors";
    let parts = gptq_parts(file, "qzeros_v1");
    let parts: Vec<_> = parts.iter().map(|(name, tensor)| (name.as_str(), tensor.clone())).collect();
    let made = folder(&tiny_config(), &parts);
    assert_error(HfFolder::open(made.path()), &["m.qweight", "quantization_config"]);
    let config =
        json!({"bits": 4, "group_size": 32, "desc_act": false, "checkpoint_format": "gptq", "odd": 1});
    std::fs::write(made.path().join("quantize_config.json"), config.to_string()).unwrap();
    let folder = HfFolder::open(made.path()).unwrap();
    assert_eq!(folder.unknown_keys(), ["quantize_config.json: odd"]);
    assert_eq!(folder.dense("m.weight").unwrap().values, fixture_f32(file, "dequantized"));
    std::fs::write(made.path().join("quantize_config.json"), r#"{"quant_method": "awq"}"#).unwrap();
    assert_error(HfFolder::open(made.path()), &["quantize_config.json: quant_method", "awq"]);
}

#[test]
fn damaged_gptq_layers_name_the_tensor() {
    let config = gptq_config(4, 32, json!({"checkpoint_format": "gptq_v2"}));
    let change = |target: &str, replacement: Option<RawTensor>| {
        let mut parts = gptq_parts("gptq/gptq_4bit_64x32.safetensors", "qzeros_v2");
        match replacement {
            Some(new) => {
                parts.iter_mut().filter(|part| part.0 == target).for_each(|part| part.1 = new.clone())
            }
            None => parts.retain(|part| part.0 != target),
        }
        open_parts(&config, &parts).unwrap().weight("m")
    };
    let scales = |value: f32| RawTensor { shape: vec![2, 32], ..f32s(&[value; 64]) };
    assert!(change("m.scales", Some(scales(1.0))).is_ok());
    assert_error(change("m.scales", None), &["m.scales", "none of that name"]);
    assert_error(change("m.qzeros", None), &["m.qzeros", "none of that name"]);
    assert_error(change("m.scales", Some(scales(f32::NAN))), &["m.scales", "NaN"]);
    assert_error(change("m.scales", Some(f32s(&[1.0; 64]))), &["m.scales", "[64]"]);
    assert_error(
        change("m.scales", Some(RawTensor { shape: vec![4, 16], ..scales(1.0) })),
        &["m.scales", "[4, 16]"],
    );
    assert_error(change("m.qzeros", Some(i32s(&[2, 3], [0; 6]))), &["m.qzeros", "[2, 3]"]);
    assert_error(change("m.qzeros", Some(i32s(&[0, 3], []))), &["m.qzeros", "[0, 3]"]);
    assert_error(change("m.qweight", Some(u8s([1; 4]))), &["m.qweight", "[4]"]);
    assert_error(
        change("m.qweight", Some(RawTensor { shape: vec![8, 32], ..f32s(&[0.0; 256]) })),
        &["m.qweight", "F32"],
    );
    assert_error(change("m.g_idx", Some(i32s(&[64], [2; 64]))), &["m.g_idx", "found 2"]);
    assert_error(change("m.g_idx", Some(i32s(&[64], [u32::MAX; 64]))), &["m.g_idx", "found -1"]);
    assert_error(change("m.g_idx", Some(i32s(&[32], [0; 32]))), &["m.qzeros", "32 inputs"]);
}

proptest! {
    #[test]
    fn changed_bitsandbytes_states_never_panic(
        edits in prop::collection::vec((0usize..169, 32u8..127), 1..4), blocksize in 0u64..300, out in 0u64..300, input in 0u64..300,
    ) {
        let mut parts = bnb_parts("bnb/nf4_128x256_double.safetensors");
        let state = parts.iter_mut().find(|part| part.0 == STATE).unwrap();
        for (place, value) in edits {
            let place = place % state.1.bytes.len();
            state.1.bytes[place] = value;
        }
        let _ = open_parts(&bnb_config(), &parts).unwrap().weight("m");
        let state = parts.iter_mut().find(|part| part.0 == STATE).unwrap();
        state.1 = u8s(format!(r#"{{"quant_type": "nf4", "blocksize": {blocksize}, "shape": [{out}, {input}]}}"#));
        prop_assert!(open_parts(&bnb_config(), &parts).unwrap().weight("m").is_err());
    }

    #[test]
    fn gptq_layers_of_any_shape_never_panic(
        bits in prop::sample::select(vec![2u32, 3, 4, 8]), group in prop::sample::select(vec![-1i64, 1, 3, 8, 32]),
        rows in 0usize..10, out in 0usize..10, groups in 0usize..5, zero_columns in 0usize..4,
        index in prop::option::of(prop::collection::vec(0u32..5, 0..70)),
    ) {
        let mut parts = vec![
            ("m.qweight".to_owned(), i32s(&[rows, out], (0..(rows * out) as u32).map(|i| i.wrapping_mul(0x9E37_79B9)))),
            ("m.qzeros".to_owned(), i32s(&[groups, zero_columns], (0..(groups * zero_columns) as u32).map(|i| i.wrapping_mul(0x85EB_CA6B)))),
            ("m.scales".to_owned(), RawTensor { shape: vec![groups, out], ..f32s(&vec![0.5; groups * out]) }),
        ];
        if let Some(index) = index {
            parts.push(("m.g_idx".to_owned(), i32s(&[index.len()], index)));
        }
        if let Ok(folder) = open_parts(&gptq_config(bits, group, json!({})), &parts)
            && let Ok(StoredWeight::Packed(weight)) = folder.weight("m")
        {
            prop_assert_eq!(weight.d_output, out);
            prop_assert!(weight.dequantize().iter().all(|value| value.is_finite()));
        }
    }
}

// --- AWQ ---

fn awq_config(changes: Value) -> Value {
    let awq =
        json!({"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": true, "version": "gemm"});
    with(tiny_config(), json!({"quantization_config": with(awq, changes)}))
}

const AWQ: &str = "gptq/gptq_4bit_64x32.safetensors";

/// The layer of the fixture as module `m`.
fn awq_parts() -> Vec<(String, RawTensor)> {
    ["qweight", "qzeros", "scales"]
        .map(|part| (format!("m.{part}"), fixture(AWQ, &format!("awq.{part}"))))
        .into()
}

/// Inputs of a group in the fixture.
fn awq_group() -> usize {
    64 / fixture(AWQ, "awq.scales").shape[0]
}

#[test]
fn awq_fixture_decodes_exactly() {
    let config = awq_config(json!({"group_size": awq_group(), "modules_to_not_convert": null}));
    let folder = open_parts(&config, &awq_parts()).unwrap();
    assert_eq!(folder.names(), ["m.weight"]);
    assert_eq!(folder.unknown_keys(), Vec::<String>::new());
    let weight = packed(&folder, "m");
    assert_eq!((weight.d_input, weight.d_output), (64, 32));
    assert_eq!(weight.dequantize(), fixture_f32(AWQ, "dequantized"));
    assert_eq!(folder.dense("m.weight").unwrap().shape, [32, 64]);
}

/// The words that AutoAWQ's packing gives, from the codes that they hold.
#[test]
fn awq_words_are_those_of_the_fixture() {
    for part in ["awq.qweight", "awq.qzeros"] {
        let words = fixture_words(AWQ, part);
        let codes: Vec<u8> = match part {
            "awq.qzeros" => {
                // A zero is an offset by its scale.
                let scales = fixture_f32(AWQ, "awq.scales");
                let config = awq_config(json!({"group_size": awq_group()}));
                let weight = packed(&open_parts(&config, &awq_parts()).unwrap(), "m");
                let offsets = weight.offsets.unwrap();
                offsets.iter().zip(&scales).map(|(offset, scale)| (-offset / scale).round() as u8).collect()
            }
            _ => {
                let config = awq_config(json!({"group_size": awq_group()}));
                let weight = packed(&open_parts(&config, &awq_parts()).unwrap(), "m");
                let mut column = vec![0; 64];
                let mut by_input = vec![0; 64 * 32];
                for output in 0..32 {
                    unpack_column(&weight.codes, 32, 4, output, &mut column);
                    for (input, code) in column.iter().enumerate() {
                        by_input[input * 32 + output] = *code;
                    }
                }
                by_input
            }
        };
        assert_eq!(crate::hf::pack_awq(&codes), words, "{part}");
    }
}

#[test]
fn damaged_awq_layers_are_refused_by_name() {
    let config = awq_config(json!({"group_size": awq_group()}));
    for (part, shape, expected) in [
        ("m.qzeros", vec![1, 4], "m.qzeros"),
        ("m.qweight", vec![32, 8], "m.qweight"),
        ("m.qweight", vec![32, 4], "m.scales"),
    ] {
        let mut parts = awq_parts();
        for (_, tensor) in parts.iter_mut().filter(|(name, _)| name == part) {
            *tensor = i32s(&shape, vec![0; shape.iter().product()]);
        }
        assert_error(open_parts(&config, &parts).unwrap().weight("m"), &[expected]);
    }
    let wrong_group = awq_config(json!({"group_size": 24}));
    assert_error(
        open_parts(&wrong_group, &awq_parts()).unwrap().weight("m"),
        &["m.scales", "3 groups of 24"],
    );
    assert_error(open_parts(&tiny_config(), &awq_parts()), &["m.qweight", "awq"]);
    let without_scales = &awq_parts()[..2];
    assert_error(open_parts(&config, without_scales).unwrap().weight("m"), &["m.scales"]);
}

// --- MLX ---

/// Two outputs of 32 inputs with codes `input % 2^bits` and `7`, as a continuous stream of low bits first, written
/// here bit by bit.
fn mlx_parts(bits: usize) -> Vec<(String, RawTensor)> {
    let words_per_row = bits;
    let mut words = vec![0u32; 2 * words_per_row];
    for output in 0..2 {
        for input in 0..32 {
            let code = if output == 0 { input % (1 << bits) } else { 7 % (1 << bits) };
            for bit in (0..bits).filter(|bit| code >> bit & 1 == 1) {
                let place = input * bits + bit;
                words[output * words_per_row + place / 32] |= 1 << (place % 32);
            }
        }
    }
    let mut weight = i32s(&[2, words_per_row], words);
    weight.dtype = Dtype::U32;
    let column = |values: &[f32]| RawTensor { shape: vec![2, 1], ..f32s(values) };
    vec![
        ("m.weight".into(), weight),
        ("m.scales".into(), column(&[0.5, -2.0])),
        ("m.biases".into(), column(&[-1.0, 0.25])),
    ]
}

fn mlx_config(bits: usize, changes: Value) -> Value {
    let quantization = with(json!({"group_size": 32, "bits": bits, "mode": "affine"}), changes);
    with(tiny_config(), json!({"quantization": quantization, "quantization_config": quantization}))
}

#[test]
fn mlx_weights_are_scale_times_code_plus_bias() {
    for bits in [2, 3, 4, 8] {
        let folder = open_parts(&mlx_config(bits, json!({})), &mlx_parts(bits)).unwrap();
        assert_eq!(folder.names(), ["m.weight"]);
        assert_eq!(folder.unknown_keys(), Vec::<String>::new());
        let weight = packed(&folder, "m");
        assert_eq!(weight.scheme.to_string(), format!("affine{bits}:32"));
        let mut expected: Vec<f32> = (0..32).map(|i| 0.5 * (i % (1 << bits)) as f32 - 1.0).collect();
        expected.extend([-2.0 * (7 % (1 << bits)) as f32 + 0.25; 32]);
        assert_eq!(weight.dequantize(), expected);
    }
    // The path's own layout goes before the general one.
    let own = mlx_config(4, json!({"m": {"bits": 2, "group_size": 32}}));
    assert_eq!(packed(&open_parts(&own, &mlx_parts(2)).unwrap(), "m").scheme.bits(), 2);
}

#[test]
fn mlx_layers_that_contradict_themselves_are_refused_by_name() {
    let refused = |config: &Value, parts: &[(String, RawTensor)], expected: &[&str]| {
        assert_error(open_parts(config, parts).unwrap().weight("m"), expected);
    };
    refused(&mlx_config(3, json!({})), &mlx_parts(4), &["m.scales", "4 words of 3-bit codes"]);
    refused(&mlx_config(4, json!({"group_size": 64})), &mlx_parts(4), &["m.scales"]);
    refused(&mlx_config(4, json!({"m": false})), &mlx_parts(4), &["m.scales", "false"]);
    let mut parts = mlx_parts(4);
    parts[2].1.dtype = Dtype::I32;
    refused(&mlx_config(4, json!({})), &parts, &["m.biases"]);
    let mut parts = mlx_parts(4);
    parts[1].1 = RawTensor { shape: vec![2, 1], ..f32s(&[1.0, f32::NAN]) };
    refused(&mlx_config(4, json!({})), &parts, &["m.scales", "finite"]);
    let mut parts = mlx_parts(4);
    parts[0].1.dtype = Dtype::I32;
    refused(&mlx_config(4, json!({})), &parts, &["m.weight", "U32"]);
    refused(&mlx_config(4, json!({})), &mlx_parts(4)[..2], &["m.biases"]);
}
