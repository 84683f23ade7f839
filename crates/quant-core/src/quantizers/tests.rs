//! One battery for every quantizer, every scheme, any size.

mod references;

use proptest::prelude::*;

use super::{HostQuantizer, Hqq, LeastSquares, MinMax, MseClipped, error};
use crate::{
    Block, Codebook, Error, Grid, PackedWeight, QuantScheme, ScaleType, Scales, Value, packing::unpack_column,
};

/// Rounding of the f32 arithmetic that reads a value back, relative to the largest weight.
const F32_ROUNDING: f32 = 4.0 * f32::EPSILON;

/// Heavy-tailed numbers about 1 in size.
pub(super) fn random_weight(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..count).map(|_| ((0..4).map(|_| uniform()).sum::<f32>() - 2.0) / (uniform() + 0.1)).collect()
}

fn quantizers() -> [(&'static str, Box<dyn HostQuantizer>); 4] {
    [
        ("MinMax", Box::new(MinMax)),
        ("MseClipped", Box::new(MseClipped::default())),
        ("LeastSquares", Box::new(LeastSquares::default())),
        ("Hqq", Box::new(Hqq::default())),
    ]
}

fn values() -> impl Strategy<Value = Value> {
    let grid = prop::sample::select(vec![Grid::Float, Grid::Integer, Grid::Symmetric]);
    prop_oneof![
        (prop::sample::select(vec![2u32, 3, 4, 5, 6, 8]), grid)
            .prop_map(|(bits, grid)| Value::Affine { bits, grid }),
        prop::sample::select(vec![
            Codebook::Nf2,
            Codebook::Nf3,
            Codebook::Nf4,
            Codebook::Fp4,
            Codebook::Iq4Nl,
            Codebook::Mxfp4
        ])
        .prop_map(Value::Codebook),
    ]
}

fn schemes() -> impl Strategy<Value = QuantScheme> {
    let inputs = prop_oneof![Just(None), (1usize..40).prop_map(Some)];
    let scales =
        prop::sample::select(vec![ScaleType::F32, ScaleType::F16, ScaleType::Bf16, ScaleType::Double]);
    (values(), 1usize..5, inputs, scales).prop_map(|(value, outputs, inputs, scales)| {
        let affine = matches!(value, Value::Affine { .. });
        let scales = if affine && scales == ScaleType::Double { ScaleType::F32 } else { scales };
        QuantScheme { value, block: Block { outputs, inputs }, scales }
    })
}

/// The codes `[d_output][d_input]`.
pub(super) fn codes(packed: &PackedWeight) -> Vec<u8> {
    let mut codes = vec![0; packed.d_input * packed.d_output];
    for (output, codes) in codes.chunks_exact_mut(packed.d_input).enumerate() {
        unpack_column(&packed.codes, packed.d_output, packed.scheme.bits(), output, codes);
    }
    codes
}

/// Every value that a code of the block of (`input`, `output`) can read back as.
fn reachable(packed: &PackedWeight, input: usize, output: usize) -> Vec<f32> {
    let scheme = packed.scheme;
    let [_, columns] = scheme.scale_shape(packed.d_input, packed.d_output);
    let block = input / scheme.block.inputs_of(packed.d_input) * columns + output / scheme.block.outputs;
    let scale = packed.effective_scales()[block];
    let offset = packed.offsets.as_ref().map_or(0.0, |offsets| offsets[block]);
    match scheme.value {
        Value::Codebook(codebook) => codebook.levels().iter().map(|level| scale * level).collect(),
        Value::Affine { bits, grid } => {
            let low = if grid == Grid::Symmetric { -(1 << (bits - 1)) } else { 0 };
            (low..low + (1 << bits)).map(|level: i32| scale * level as f32 + offset).collect()
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn packs_every_weight_at_its_nearest_reachable_value(
        scheme in schemes(), d_input in 1usize..80, d_output in 1usize..20, seed in any::<u64>(),
    ) {
        let weight = random_weight(seed, d_input * d_output);
        let largest = weight.iter().fold(0.0f32, |max, w| max.max(w.abs()));
        for (name, quantizer) in quantizers() {
            let packed = match quantizer.quantize("w", &weight, d_input, d_output, &scheme) {
                Err(Error::Scheme { .. }) if name == "Hqq" && !scheme.has_offsets() => continue,
                packed => packed.unwrap(),
            };
            packed.validate("w").unwrap();
            prop_assert_eq!(packed.scheme, scheme);
            let dense = packed.dequantize();
            if scheme.scales == ScaleType::Double {
                // Codes belong to the scales before double quantization; see the references.
                continue;
            }
            for (i, (&w, &q)) in weight.iter().zip(&dense).enumerate() {
                let nearest = reachable(&packed, i % d_input, i / d_input)
                    .into_iter()
                    .fold(f32::INFINITY, |least, value| least.min((w - value).abs()));
                prop_assert!(
                    (w - q).abs() <= nearest + F32_ROUNDING * largest,
                    "{} {} at {}: {} became {}, but {} is possible", name, scheme, i, w, q, nearest
                );
            }
        }
    }

    #[test]
    fn min_max_errs_by_half_a_step_and_the_rounding_of_its_scale(
        scheme in schemes(), d_input in 1usize..80, d_output in 1usize..20, seed in any::<u64>(),
    ) {
        let weight = random_weight(seed, d_input * d_output);
        let packed = MinMax.quantize("w", &weight, d_input, d_output, &scheme).unwrap();
        let (dense, stored) = (packed.dequantize(), packed.effective_scales());
        let [rows, columns] = scheme.scale_shape(d_input, d_output);
        let inputs = scheme.block.inputs_of(d_input);
        prop_assert_eq!(stored.len(), rows * columns);
        for (block, stored) in stored.into_iter().enumerate() {
            let indices: Vec<usize> = (0..weight.len())
                .filter(|i| i % d_input / inputs == block / columns)
                .filter(|i| i / d_input / scheme.block.outputs == block % columns)
                .collect();
            let range = indices.iter().map(|&i| weight[i]);
            let (min, max) = (range.clone().fold(f32::MAX, f32::min), range.fold(f32::MIN, f32::max));
            let largest = min.abs().max(max.abs());
            // The exact scale, half its widest step, and how far a wrong scale can move a level.
            let (scale, half, reach) = match scheme.value {
                Value::Codebook(codebook) => {
                    let mut levels = codebook.levels().to_vec();
                    levels.sort_by(f32::total_cmp);
                    let gap = levels.windows(2).map(|pair| pair[1] - pair[0]).fold(0.0, f32::max);
                    let ends = [-levels[0], levels[levels.len() - 1]];
                    // The smaller end reaches the largest weight, so that neither sign is cut off.
                    let scale = largest / ends[0].min(ends[1]);
                    (scale, scale * gap / 2.0, ends[0].max(ends[1]))
                }
                Value::Affine { bits, grid: Grid::Symmetric } => {
                    let scale = largest / ((1 << (bits - 1)) - 1) as f32;
                    (scale, scale / 2.0, (1 << (bits - 1)) as f32)
                }
                Value::Affine { bits, .. } => {
                    let scale = (max - min) / ((1 << bits) - 1) as f32;
                    (scale, scale / 2.0, ((1 << bits) - 1) as f32)
                }
            };
            // A 16-bit offset is off by its last bit, of numbers up to half a step beyond the range.
            let offset = match (scheme.scales, scheme.has_offsets()) {
                (ScaleType::F16, true) => (largest + half) * 2f32.powi(-11),
                (ScaleType::Bf16, true) => (largest + half) * 2f32.powi(-8),
                _ => 0.0,
            };
            let integer = matches!(scheme.value, Value::Affine { grid: Grid::Integer, .. });
            let constant = integer && min == max;
            let bound = if constant {
                // One step of size |value|, rounded.
                2.0 * offset
            } else if integer {
                // A wrong scale also moves the zero point's multiple of it.
                half + ((scale - stored) * (reach + largest / scale)).abs() + offset
            } else {
                half + ((scale - stored) * reach).abs() + offset
            };
            for i in indices {
                let difference = (weight[i] - dense[i]).abs();
                prop_assert!(
                    difference <= bound + F32_ROUNDING * largest,
                    "{} at {}: {} became {}, allowed {}", scheme, i, weight[i], dense[i], bound
                );
            }
        }
    }

    #[test]
    fn clipping_is_never_worse_than_the_whole_range(
        scheme in schemes(), d_input in 1usize..80, d_output in 1usize..20, seed in any::<u64>(),
        norm in prop::sample::select(vec![1.0f32, 2.0, 2.4]),
    ) {
        // Double quantization comes after the search.
        prop_assume!(scheme.scales != ScaleType::Double);
        let weight = random_weight(seed, d_input * d_output);
        let error = |quantizer: &dyn HostQuantizer| -> f64 {
            let dense = quantizer.quantize("w", &weight, d_input, d_output, &scheme).unwrap().dequantize();
            weight.iter().zip(&dense).map(|(w, q)| f64::from((w - q).abs()).powf(norm.into())).sum()
        };
        let (clipped, whole) = (error(&MseClipped { norm, ..MseClipped::default() }), error(&MinMax));
        // `powf` in f32 against f64.
        prop_assert!(clipped <= whole * (1.0 + 1e-6), "{} > {}", clipped, whole);
    }
}

#[test]
fn searching_pays_on_heavy_tails() {
    let weight = random_weight(21, 64 * 64);
    let scheme = QuantScheme::affine(2, 64);
    let dense = |quantizer: &dyn HostQuantizer| {
        quantizer.quantize("w", &weight, 64, 64, &scheme).unwrap().dequantize()
    };
    let sum = |quantizer: &dyn HostQuantizer, norm: i32| -> f64 {
        weight.iter().zip(dense(quantizer)).map(|(w, q)| f64::from((w - q).abs()).powi(norm)).sum()
    };
    assert!(sum(&MseClipped::default(), 2) < 0.8 * sum(&MinMax, 2));
    assert!(sum(&Hqq::default(), 1) < 0.97 * sum(&MinMax, 1));
}

#[test]
fn constant_blocks_and_zeros_are_exact() {
    for text in ["affine4:8", "affine4:8:int", "affine2:4x2:int", "nf4:8", "fp4:8", "nf2:3", "nf4:8:double"] {
        let scheme: QuantScheme = text.parse().unwrap();
        for value in [0.0f32, 0.37, -1.0e-30, -2.5e8, 1e-41] {
            let weight = vec![value; 8 * 4];
            for (name, quantizer) in quantizers() {
                let Ok(packed) = quantizer.quantize("w", &weight, 8, 4, &scheme) else {
                    assert!(name == "Hqq" && !scheme.has_offsets());
                    continue;
                };
                assert_eq!(packed.dequantize(), weight, "{name} {text} {value}");
                if text == "affine4:8" {
                    assert_eq!(packed.scales, Scales::Plain(vec![0.0; 4]));
                    assert_eq!(packed.offsets, Some(vec![value; 4]));
                }
            }
        }
    }
    let packed = MinMax.quantize("w", &[0.7; 16], 8, 2, &"affine4:8:sym".parse().unwrap()).unwrap();
    assert!(packed.dequantize().iter().all(|q| (q - 0.7).abs() < 1e-7));
}

#[test]
fn sixteen_bit_offsets_of_narrow_blocks_keep_the_upper_end() {
    // 1.0004 lies between the f16 numbers 1 and 1.001; the range must reach 1.01 from there.
    let weight: Vec<f32> = (0..32).map(|i| 1.0004 + 0.01 * i as f32 / 31.0).collect();
    let packed = MinMax.quantize("w", &weight, 32, 1, &"affine4:32:f16".parse().unwrap()).unwrap();
    assert_eq!(packed.offsets, Some(vec![1.0]));
    assert!(error(&weight, &packed).max_abs < 0.5 * 0.0104 / 15.0 + 1e-5);
}

#[test]
fn weights_that_are_not_finite_are_named() {
    for (name, quantizer) in quantizers() {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut weight = vec![0.5; 12];
            (weight[7], weight[11]) = (value, value);
            let message =
                quantizer.quantize("q_proj", &weight, 4, 3, &"affine4:4".parse().unwrap()).unwrap_err();
            let expected = format!("weight \"q_proj\": output 1, input 3 is {value}, which is not finite");
            assert_eq!(message.to_string(), expected, "{name}");
        }
    }
}

#[test]
fn scales_beyond_their_storage_type_are_named() {
    let mut weight = vec![0.5; 64];
    weight[40] = 3e6;
    weight[41] = -3e38;
    weight[42] = 3e38;
    for text in ["affine4:16:f16", "affine4:16:int:f16", "affine4:16:sym:f16", "nf4:16:f16"] {
        for quantizer in [&MinMax as &dyn HostQuantizer, &MseClipped::default(), &LeastSquares::default()] {
            let result = quantizer.quantize("up_proj", &weight, 32, 2, &text.parse().unwrap());
            let message = result.unwrap_err().to_string();
            assert!(message.contains("\"up_proj\"") && message.contains("output 1, input 0"), "{message}");
            assert!(message.contains(text) && message.contains(&3e38f32.to_string()), "{message}");
        }
    }
    // In 32 bits, the whole range of 6e38.
    assert!(MinMax.quantize("up_proj", &weight, 32, 2, &"affine4:16".parse().unwrap()).is_err());
}

#[test]
fn clipping_avoids_the_overflow_of_an_outlier() {
    // The whole range exceeds f16, a shrunken one doesn't.
    let mut weight = random_weight(5, 64);
    weight[3] = 70_000.0;
    let scheme = "nf4:64:f16".parse().unwrap();
    assert!(MinMax.quantize("w", &weight, 64, 1, &scheme).is_err());
    let packed = MseClipped::default().quantize("w", &weight, 64, 1, &scheme).unwrap();
    assert!(packed.effective_scales()[0] > 60_000.0);
}

#[test]
fn sizes_schemes_and_options_out_of_range_are_errors() {
    let good = QuantScheme::affine(4, 8);
    let fails = |quantizer: &dyn HostQuantizer, count, d_input, d_output, scheme: &QuantScheme| {
        let weight = vec![0.5; count];
        quantizer.quantize("w", &weight, d_input, d_output, scheme).unwrap_err().to_string()
    };
    assert!(fails(&MinMax, 9, 4, 2, &good).contains("2 outputs of 4 values"));
    assert!(fails(&MinMax, 9, usize::MAX, 3, &good).contains("found 9 values"));
    assert!(fails(&MinMax, 0, 0, 3, &good).contains("at least one value"));
    for block in [Block { outputs: 0, inputs: None }, Block { outputs: 1, inputs: Some(0) }] {
        assert!(fails(&MinMax, 8, 4, 2, &QuantScheme { block, ..good }).contains("at least one weight"));
    }
    assert!(fails(&MinMax, 8, 4, 2, &QuantScheme::affine(7, 8)).contains("affine7:8"));
    assert!(fails(&MinMax, 8, 4, 2, &good.with_scales(ScaleType::Double)).contains("codebook"));
    let default = MseClipped::default();
    assert!(fails(&MseClipped { grid: 0, ..default }, 8, 4, 2, &good).contains("MseClipped.grid"));
    assert!(fails(&MseClipped { shrink_to: f32::NAN, ..default }, 8, 4, 2, &good).contains("shrink_to"));
    assert!(fails(&MseClipped { norm: 0.0, ..default }, 8, 4, 2, &good).contains("norm"));
    let default = Hqq::default();
    assert!(fails(&Hqq { lp_norm: 1.5, ..default }, 8, 4, 2, &good).contains("Hqq.lp_norm"));
    assert!(fails(&Hqq { beta: 0.0, ..default }, 8, 4, 2, &good).contains("Hqq.beta"));
    assert!(fails(&Hqq { kappa: 0.9, ..default }, 8, 4, 2, &good).contains("Hqq.kappa"));
    assert!(fails(&Hqq { iters: 0, ..default }, 8, 4, 2, &good).contains("Hqq.iters"));
    let symmetric = "affine4:8:sym".parse().unwrap();
    assert!(fails(&default, 8, 4, 2, &symmetric).contains("with an offset"));
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let weight = random_weight(9, 70 * 50);
    for text in ["affine3:16:f16", "nf4:16:double", "affine2:8x4:int"] {
        let scheme = text.parse().unwrap();
        for (name, quantizer) in quantizers() {
            let run = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| quantizer.quantize("w", &weight, 70, 50, &scheme)).ok()
            };
            assert_eq!(run(1), run(3), "{name} {text}");
        }
    }
}

#[test]
fn errors_are_measured_against_the_dense_weight() {
    // On a grid of 0, 1, 2, 3: only 1.25 and -0.0 are not levels.
    let weight = [0.0, 1.25, 3.0, 2.0, -0.0, 1.0, 2.0, 3.0];
    let packed = MinMax.quantize("w", &weight, 4, 2, &"affine2:4".parse().unwrap()).unwrap();
    let measured = error(&weight, &packed);
    assert_eq!(measured.mean_squared, 0.0625 / 8.0);
    assert_eq!(measured.max_abs, 0.25);
    assert_eq!(measured.relative, (0.0625f64 / (1.5625 + 9.0 + 4.0 + 1.0 + 4.0 + 9.0)).sqrt());
    let zeros = MinMax.quantize("w", &[0.0; 8], 4, 2, &"nf4:4".parse().unwrap()).unwrap();
    assert_eq!(error(&[0.0; 8], &zeros).relative, 0.0);
}

#[test]
fn scales_as_small_integers_cost_little_and_fit_the_k_types() {
    let weight = random_weight(31, 512 * 6);
    for (integers, floats, largest) in [
        ("affine4:32:super8", "affine4:32", 63),
        ("affine5:32:super8", "affine5:32", 63),
        ("affine2:16:super4", "affine2:16", 15),
        ("affine3:16:sym:super8", "affine3:16:sym", 31),
        ("affine6:16:sym:super8", "affine6:16:sym", 127),
        ("iq4nl:32:super8", "iq4nl:32", 31),
    ] {
        for (name, quantizer) in quantizers() {
            let on = |scheme: &str| quantizer.quantize("w", &weight, 512, 6, &scheme.parse().unwrap());
            let (Ok(packed), Ok(plain)) = (on(integers), on(floats)) else {
                assert!(name == "Hqq" && !integers.parse::<QuantScheme>().unwrap().has_offsets());
                continue;
            };
            packed.validate("w").unwrap();
            let ratio = error(&weight, &packed).relative / error(&weight, &plain).relative;
            assert!(ratio < 1.25, "{name}, {integers}: {ratio}");
            let layout = packed.scheme.super_layout(512, 6).unwrap();
            let Scales::Super(both) = &packed.scales else { panic!("{integers}") };
            for blocks in [Some(&both.scales), both.offsets.as_ref()].into_iter().flatten() {
                for (row, column) in (0..layout.rows).flat_map(|row| (0..6).map(move |column| (row, column)))
                {
                    assert!((0..=largest).contains(&i32::from(blocks.get(&layout, row, column))));
                }
            }
        }
    }
    // What lies above zero begins there.
    let weight: Vec<f32> = (0..256).map(|i| 5.0 + (i as f32).sin()).collect();
    let packed = MinMax.quantize("w", &weight, 256, 1, &"affine4:32:super8".parse().unwrap()).unwrap();
    assert!(error(&weight, &packed).max_abs < 0.5 * 6.1 / 15.0);
}
