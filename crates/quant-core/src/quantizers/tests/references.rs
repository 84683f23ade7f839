//! Results of other programs.

use safetensors::SafeTensors;
use serde_json::Value as Json;

use super::*;
use crate::quantizers::double_quantize;

fn testdata(path: &str) -> Vec<u8> {
    let path = format!("{}/../../testdata/{path}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn json(path: &str) -> Json {
    serde_json::from_slice(&testdata(path)).unwrap()
}

fn floats(tensors: &SafeTensors, name: &str) -> Vec<f32> {
    let tensor = tensors.tensor(name).unwrap();
    assert_eq!(tensor.dtype(), safetensors::Dtype::F32, "{name}");
    let (values, _) = tensor.data().as_chunks();
    values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

fn numbers(json: &Json) -> Vec<f32> {
    json.as_array().unwrap().iter().map(|number| number.as_f64().unwrap() as f32).collect()
}

fn bytes(json: &Json) -> Vec<u8> {
    json.as_array().unwrap().iter().map(|number| number.as_u64().unwrap() as u8).collect()
}

/// Input-major `[rows, columns]` as `[columns, rows]`.
fn output_major(values: &[f32], columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| values.iter().skip(column).step_by(columns).copied()).collect()
}

fn plain(packed: &PackedWeight) -> Vec<f32> {
    output_major(&packed.effective_scales(), packed.d_output)
}

#[test]
fn rounding_to_nearest_equals_the_reference_grids() {
    let file = testdata("rtn/rtn_16x128.safetensors");
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let weight = floats(&tensors, "input");
    for (mode, grid) in [("floatmin", Grid::Float), ("intzero", Grid::Integer), ("sym", Grid::Symmetric)] {
        for (bits, group) in [2, 3, 4, 8].into_iter().flat_map(|bits| [(bits, 32), (bits, 64)]) {
            let name = |part: &str| format!("{mode}.{bits}bit.g{group}.{part}");
            let mut scheme = QuantScheme::affine(bits, group);
            scheme.value = Value::Affine { bits, grid };
            let packed = MinMax.quantize("input", &weight, 128, 16, &scheme).unwrap();

            let scales = floats(&tensors, &name("scale"));
            assert_eq!(plain(&packed), scales, "{}", name("scale"));
            let stored = floats(&tensors, &name("zero_or_min"));
            match packed.offsets.as_ref().map(|offsets| output_major(offsets, 16)) {
                None => assert_eq!(grid, Grid::Symmetric),
                Some(offsets) if grid == Grid::Float => assert_eq!(offsets, stored, "{}", name("min")),
                Some(offsets) => {
                    let expected: Vec<f32> = scales.iter().zip(&stored).map(|(s, z)| -s * z).collect();
                    assert_eq!(offsets, expected, "{}", name("zero"));
                }
            }
            let low = if grid == Grid::Symmetric { 1 << (bits - 1) } else { 0 };
            let reference = tensors.tensor(&name("codes")).unwrap();
            let (reference, _) = reference.data().as_chunks();
            let reference: Vec<u8> =
                reference.iter().map(|code| (i16::from_le_bytes(*code) + low) as u8).collect();
            assert_eq!(codes(&packed), reference, "{}", name("codes"));
            // `q * s` against `s * code + offset`: one more rounding.
            for (q, expected) in packed.dequantize().iter().zip(floats(&tensors, &name("dequantized"))) {
                assert!((q - expected).abs() <= 2.0 * f32::EPSILON * 0.25, "{}", name("dequantized"));
            }
        }
    }
}

#[test]
fn normal_float_codes_equal_the_vectors() {
    let vectors = json("vectors/apiq_nf.json");
    let weight = numbers(&vectors["nf4_example"]["w"]);
    for (codebook, count) in [(Codebook::Nf4, 128), (Codebook::Nf3, 64), (Codebook::Nf2, 64)] {
        let example = &vectors[format!("{}_example", codebook.name())];
        let scheme = QuantScheme::codebook(codebook, 64);
        let packed = MinMax.quantize("w", &weight[..count], count, 1, &scheme).unwrap();
        assert_eq!(plain(&packed), numbers(&example["absmax"]));
        assert_eq!(codes(&packed), bytes(&example["codes"]), "{}", codebook.name());
        assert_eq!(packed.dequantize(), numbers(&example["dequant"]), "{}", codebook.name());
    }
}

#[test]
fn double_quantization_equals_the_vector() {
    let example = &json("vectors/apiq_nf.json")["double_quant"];
    let double = double_quantize(&numbers(&example["absmax"]));
    assert_eq!(double.offset, numbers(&Json::Array(vec![example["offset"].clone()]))[0]);
    assert_eq!(double.nested, numbers(&example["nested_absmax"]));
    assert_eq!(double.codes, bytes(&example["codes"]));
    assert_eq!(double.decode(), numbers(&example["absmax_restored"]));
}

/// Codes of a file of bitsandbytes, one a weight.
fn nibbles(tensors: &SafeTensors) -> Vec<u8> {
    tensors.tensor("weight").unwrap().data().iter().flat_map(|byte| [byte >> 4, byte & 15]).collect()
}

#[test]
fn quantizing_again_gives_the_bytes_of_bitsandbytes() {
    for (file, scheme, d_input) in [
        ("nf4_128x256", "nf4:64", 256),
        ("fp4_128x256", "fp4:64", 256),
        ("nf4_128x256_double", "nf4:64:double", 256),
        // Blocks of 128 run over rows of 160: as one row of 64 * 160.
        ("nf4_64x160_bs128_outlier", "nf4:128", 64 * 160),
    ] {
        let bytes = testdata(&format!("bnb/{file}.safetensors"));
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let weight = floats(&tensors, "input");
        let d_output = weight.len() / d_input;
        let packed = MinMax.quantize(file, &weight, d_input, d_output, &scheme.parse().unwrap()).unwrap();
        assert_eq!(codes(&packed), nibbles(&tensors), "{file}");
        let dense = floats(&tensors, "dequantized");
        match &packed.scales {
            Scales::Plain(_) => {
                assert_eq!(plain(&packed), floats(&tensors, "weight.absmax"), "{file}");
                assert_eq!(packed.dequantize(), dense, "{file}");
            }
            Scales::Double(double) => check_double(&tensors, &weight, double),
            Scales::Super(_) => unreachable!("bitsandbytes has no such scales"),
        }
    }
}

/// The 8-bit codes, but for those that bitsandbytes' CPU library moves to a neighbour: it rounds the normalized
/// scale to 65,536 steps of -1..=1 before it looks for the nearest level.
fn check_double(tensors: &SafeTensors, weight: &[f32], double: &crate::DoubleScales) {
    let state = tensors.tensor("weight.quant_state.bitsandbytes__nf4").unwrap();
    let state: Json = serde_json::from_slice(state.data()).unwrap();
    assert_eq!(double.offset, state["nested_offset"].as_f64().unwrap() as f32);
    assert_eq!(double.nested, floats(tensors, "weight.nested_absmax"));
    let map = floats(tensors, "weight.nested_quant_map");
    let reference = tensors.tensor("weight.absmax").unwrap().data();
    let mut moved = 0;
    for (i, (&found, &expected)) in double.codes.iter().zip(reference).enumerate() {
        if found == expected {
            continue;
        }
        moved += 1;
        let absmax = weight[64 * i..64 * (i + 1)].iter().fold(0.0f32, |max, w| max.max(w.abs()));
        let x = (absmax - double.offset) / double.nested[i / 256];
        let table = ((x + 1.0) * 0.5 * 65535.0).round() / 65535.0 * 2.0 - 1.0;
        let distance = |x: f32, code: u8| (x - map[usize::from(code)]).abs();
        assert!(distance(x, found) < distance(x, expected), "scale {i}: {found} is not nearer");
        assert!(distance(table, expected) <= distance(table, found), "scale {i}: not the table's doing");
    }
    assert!(moved <= 1, "{moved} of {} codes differ", reference.len());
}

/// The package sums zero points in f32.
const HQQ_ZERO: f32 = 1e-4;

#[test]
fn half_quadratic_zero_points_equal_those_of_the_package() {
    let reference = json("quantizers/hqq_reference.json");
    for case in reference["cases"].as_array().unwrap() {
        let weight = numbers(&reference["weights"][case["weight"].as_str().unwrap()]);
        let (bits, group) = (case["bits"].as_u64().unwrap(), case["group"].as_u64().unwrap());
        let scheme = QuantScheme::affine(bits as u32, group as usize);
        let d_input = reference["d_input"].as_u64().unwrap() as usize;
        let d_output = weight.len() / d_input;
        let packed = Hqq::default().quantize("w", &weight, d_input, d_output, &scheme).unwrap();

        let offsets = output_major(packed.offsets.as_ref().unwrap(), d_output);
        let (scales, zeros) = (numbers(&case["scale"]), numbers(&case["zero"]));
        assert_eq!(plain(&packed).len(), scales.len());
        for (i, (scale, offset)) in plain(&packed).into_iter().zip(offsets).enumerate() {
            // The package divides twice: one more rounding.
            assert!((scale - scales[i]).abs() <= 2.0 * f32::EPSILON * scales[i], "{case} block {i}: scale");
            let zero = -offset / scale;
            assert!((zero - zeros[i]).abs() <= HQQ_ZERO * zeros[i].abs(), "{case} block {i}: {zero}");
        }
        let dense = packed.dequantize();
        let error = weight.iter().zip(&dense).map(|(w, q)| f64::from((w - q).abs())).sum::<f64>()
            / weight.len() as f64;
        let expected = case["mean_absolute_error"].as_f64().unwrap();
        assert!(error <= expected * (1.0 + 1e-6), "{case}: {error}");
    }
}

#[test]
fn half_quadratic_zero_points_of_the_integer_grid_are_integers() {
    let reference = json("quantizers/hqq_reference.json");
    let weight = numbers(&reference["weights"]["wide"]);
    let d_input = reference["d_input"].as_u64().unwrap() as usize;
    let scheme: QuantScheme = "affine3:32:int".parse().unwrap();
    let packed = Hqq::default().quantize("w", &weight, d_input, weight.len() / d_input, &scheme).unwrap();
    for (scale, offset) in packed.effective_scales().iter().zip(packed.offsets.as_ref().unwrap()) {
        let zero = -offset / scale;
        assert!((zero - zero.round()).abs() < 1e-5, "{zero}");
    }
}

#[test]
fn half_quadratic_quantization_keeps_the_scale_of_tiny_blocks() {
    // The package sets the scale of ranges up to 1e-4 to 1.
    let weight: Vec<f32> = random_weight(3, 128).iter().map(|w| 1e-6 * w).collect();
    let packed = Hqq::default().quantize("w", &weight, 64, 2, &QuantScheme::affine(4, 64)).unwrap();
    assert!(error(&weight, &packed).relative < 0.2);
}
