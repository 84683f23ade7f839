//! The packed operation against references: the host's unpacking, the plain tensor version (with Burn's own
//! autodiff for gradients), and finite differences. Every check takes the device whose kernels it tries and compares
//! with what the CPU computes without kernels.

use burn::{
    module::{Module, Param},
    tensor::{DType, Device, FloatDType, Tensor, TensorData},
};
use kiln_quant_core::{
    Compute, PackedTensor, PackedWeight, QuantScheme, Scales, SuperBlocks, SuperScales,
    fused::{self, Drops, LowRankSpec, plain},
    ops,
    packing::CodePacker,
};
use kiln_testkit::{assert_close, read, relative_difference, tensor, values};

/// Scheme, inputs, outputs.
pub(crate) type Case = (&'static str, usize, usize);

/// Every kind of value, block and scale, with sizes that leave ragged runs, blocks, tiles and vectors.
pub(crate) const CASES: &[Case] = &[
    ("affine2:64", 128, 48),
    ("affine3:32", 96, 33),
    ("affine4:64", 128, 64),
    ("affine8:64", 128, 17),
    ("affine4:64", 100, 37),
    ("affine3:40", 100, 20),
    ("affine3:24", 70, 50),
    ("affine2:col", 300, 40),
    ("affine4:col:f16", 33, 5),
    ("affine4:64:int", 128, 40),
    ("affine4:64:sym", 128, 40),
    ("affine8:32:sym:f16", 96, 24),
    ("affine2:8x4", 40, 30),
    ("affine4:16x64:sym:bf16", 130, 50),
    ("nf4:64", 128, 65),
    ("nf4:64:double", 320, 70),
    ("nf3:64", 128, 16),
    ("nf2:32", 64, 19),
    ("fp4:64", 192, 32),
    ("affine4:64", 600, 530),
    ("nf4:32:bf16", 288, 270),
    ("affine5:64", 128, 33),
    ("affine5:col:f16", 70, 20),
    ("affine6:32:sym:f16", 100, 50),
    ("affine6:40", 130, 18),
    ("affine4:16", 80, 37),
    ("affine8:16:sym", 112, 20),
    ("affine4:8", 100, 37),
    ("affine3:4:sym", 70, 33),
    ("affine4:3x16", 80, 50),
    ("affine8:24x32:sym", 64, 70),
    ("nf2:16x8:double", 72, 50),
    ("affine2:16:super4", 512, 40),
    ("affine3:16:sym:super8", 304, 33),
    ("affine4:32:super8", 300, 37),
    ("affine5:32:super8", 512, 70),
    ("affine6:16:sym:super8", 272, 50),
    ("iq4nl:32:super8", 256, 20),
    ("iq4nl:32:f16", 64, 17),
    ("mxfp4:32:bf16", 96, 19),
];

/// A packed weight with random codes, scales and offsets.
pub(crate) fn random_weight(scheme: &str, d_input: usize, d_output: usize, seed: u64) -> PackedWeight {
    let scheme: QuantScheme = scheme.parse().unwrap();
    let [rows, columns] = scheme.scale_shape(d_input, d_output);
    let count = rows * columns;
    let mut packer = CodePacker::new(d_input, d_output, scheme.bits());
    let levels = 1u32 << scheme.bits();
    for output in 0..d_output {
        let codes: Vec<u8> = values(seed + 7 * output as u64, d_input)
            .iter()
            .map(|v| (((v + 1.0) * 0.5 * levels as f32) as u32).min(levels - 1) as u8)
            .collect();
        packer.set_column(output, &codes);
    }
    let rounded = |seed: u64, scale: f32, shift: f32| -> Vec<f32> {
        values(seed, count).iter().map(|v| scheme.scales.round(v * scale + shift)).collect()
    };
    let offsets = scheme.has_offsets();
    if let Some(layout) = scheme.super_layout(d_input, d_output) {
        let blocks = |seed: u64| {
            let mut blocks = SuperBlocks::new(&layout);
            let integers = values(seed, count);
            for (i, value) in integers.iter().enumerate() {
                let integer = if layout.bits == 4 { (value + 1.0) * 7.9 } else { value * 127.9 };
                blocks.set(&layout, i / columns, i % columns, integer as i8);
            }
            for (factor, value) in blocks.factors.iter_mut().zip(values(seed + 1, count)) {
                *factor = half::f16::from_f32(value * 1e-3).to_f32();
            }
            blocks
        };
        let scales = SuperScales { scales: blocks(seed + 1), offsets: offsets.then(|| blocks(seed + 3)) };
        let (codes, scales) = (packer.into_words(), Scales::Super(scales));
        return PackedWeight { scheme, d_input, d_output, codes, scales, offsets: None, input_order: None };
    }
    let scales = if scheme.to_string().ends_with("double") {
        Scales::Double(kiln_quant_core::DoubleScales {
            codes: values(seed + 1, count).iter().map(|v| ((v + 1.0) * 127.9) as u8).collect(),
            nested: values(seed + 2, count.div_ceil(256)).iter().map(|v| v.abs() * 0.1).collect(),
            offset: 0.2,
        })
    } else {
        Scales::Plain(rounded(seed + 1, 0.05, 0.1))
    };
    let offsets = offsets.then(|| rounded(seed + 3, 0.3, -0.2));
    PackedWeight { scheme, d_input, d_output, codes: packer.into_words(), scales, offsets, input_order: None }
}

/// Row counts around the border between the regimes, and beyond a tile.
const ROWS: [usize; 5] = [1, 3, 4, 5, 37];

/// `packed` agrees with the host's unpacking to `ulps` (of the largest weight), and comes back from the device as it
/// was.
pub(crate) fn check_dequantize(device: &Device, cases: &[Case], ulps: f32) {
    for &(scheme, d_input, d_output) in cases {
        let host = random_weight(scheme, d_input, d_output, 1);
        let packed = PackedTensor::new(&host, device);
        let expected = host.dequantize();
        let largest = expected.iter().fold(0.0, |max: f32, w| max.max(w.abs()));
        let what = format!("{scheme} {d_input}x{d_output}");
        let close = |found: Tensor<2>| {
            assert_close(&what, &read(found.transpose()), &expected, ulps * f32::EPSILON * largest);
        };
        close(packed.dequantize());
        close(packed.dequantize_reference());
        assert_eq!(packed.to_host().unwrap(), host, "{what}: back on the host");
    }
}

/// Products equal the dense ones of the CPU, relatively.
pub(crate) fn check_forward(device: &Device, cases: &[Case], rows: &[usize], tolerance: f64) {
    let cpu = Device::flex();
    for &(scheme, d_input, d_output) in cases {
        let host = random_weight(scheme, d_input, d_output, 2);
        let packed = PackedTensor::new(&host, device);
        let dense = PackedTensor::new(&host, &cpu).dequantize_reference();
        for &rows in rows {
            let shape = [rows, d_input];
            let found = read(packed.forward(tensor::<2>(3, shape, device)));
            let found = relative_difference(&found, &read(tensor::<2>(3, shape, &cpu).matmul(dense.clone())));
            assert!(found < tolerance, "{scheme} {d_input}x{d_output}, {rows} rows: {found:e}");
        }
    }
}

/// One row times a weight and its transpose, against sums in f64: blocks of values of other sizes, and zeros.
/// `tolerance` is relative to the sum of the row's sizes times the largest weight, since scale and offset of a weight
/// may cancel.
pub(crate) fn check_one_row(device: &Device, cases: &[Case], exponents: &[[i32; 2]], tolerance: f64) {
    for &(scheme, d_input, d_output) in cases {
        let host = random_weight(scheme, d_input, d_output, 21);
        let packed = PackedTensor::new(&host, device);
        let dense = host.dequantize();
        let largest = dense.iter().fold(0.0f32, |max, w| max.max(w.abs()));
        for exponents in exponents {
            let row = |seed: u64, size: usize| -> Vec<f32> {
                let sized = |(k, v): (usize, &f32)| match k % 5 {
                    3 => 0.0,
                    _ => v * (exponents[k / 32 % 2] as f32).exp2(),
                };
                values(seed, size).iter().enumerate().map(sized).collect()
            };
            let on_device =
                |row: &[f32]| Tensor::<2>::from_data(TensorData::new(row.to_vec(), [1, row.len()]), device);
            let check = |what: &str, found: f32, row: &[f32], weights: &[f32]| {
                let expected: f64 = row.iter().zip(weights).map(|(a, w)| f64::from(*a) * f64::from(*w)).sum();
                let difference = (f64::from(found) - expected).abs();
                let size = row.iter().map(|a| f64::from(a.abs())).sum::<f64>() * f64::from(largest);
                assert!(
                    difference <= tolerance * size,
                    "{scheme} {d_input}x{d_output}, 2^{exponents:?}, {what}: off by {difference:e} of {size:e}"
                );
            };
            let x = row(22, d_input);
            for (n, &y) in read(packed.forward(on_device(&x))).iter().enumerate() {
                check("forward", y, &x, &dense[n * d_input..][..d_input]);
            }
            let dy = row(23, d_output);
            for (k, &dx) in read(packed.backward(on_device(&dy))).iter().enumerate() {
                let weights: Vec<f32> = dense[k..].iter().step_by(d_input).copied().collect();
                check("gradient", dx, &dy, &weights);
            }
        }
    }
}

/// Gradients of the input equal those through the dense weight on the CPU, relatively.
pub(crate) fn check_input_gradient(device: &Device, cases: &[Case], rows: &[usize], tolerance: f64) {
    let cpu = Device::flex();
    for &(scheme, d_input, d_output) in cases {
        let host = random_weight(scheme, d_input, d_output, 4);
        let packed = PackedTensor::new(&host, device);
        let dense = PackedTensor::new(&host, &cpu).dequantize_reference();
        for &rows in rows {
            let gradient = |device: &Device, f: &dyn Fn(Tensor<2>) -> Tensor<2>| {
                let x = tensor::<2>(5, [rows, d_input], &device.clone().autodiff()).require_grad();
                let weight = tensor::<2>(6, [rows, d_output], device);
                let gradients = (f(x.clone()) * weight).sum().backward();
                read(x.grad(&gradients).unwrap())
            };
            let found = relative_difference(
                &gradient(device, &|x| packed.forward(x)),
                &gradient(&cpu, &|x| x.matmul(dense.clone())),
            );
            assert!(found < tolerance, "{scheme} {d_input}x{d_output}, {rows} rows: {found:e}");
        }
    }
}

/// Central differences of `f` along each of a few coordinates of `at`.
fn finite_differences(at: &[f32], step: f32, f: impl Fn(&[f32]) -> f64) -> Vec<(usize, f64)> {
    let every = (at.len() / 7).max(1);
    (0..at.len())
        .step_by(every)
        .map(|i| {
            let mut moved = at.to_vec();
            moved[i] = at[i] + step;
            let up = f(&moved);
            moved[i] = at[i] - step;
            (i, (up - f(&moved)) / (2.0 * f64::from(step)))
        })
        .collect()
}

/// A tensor that asks for gradients.
fn learned(values: &[f32], shape: [usize; 2], device: &Device) -> Tensor<2> {
    let data = TensorData::new(values.to_vec(), shape);
    Tensor::from_data(data, &device.clone().autodiff()).require_grad()
}

/// Gradients of input, scales and offsets equal finite differences of a product computed on the host.
pub(crate) fn check_parameter_gradients(device: &Device, cases: &[Case], rows: &[usize]) {
    for &(scheme, d_input, d_output) in cases {
        // Learned parameters are plain tensors, so scales in codes are left to the input's gradient.
        let host = random_weight(scheme, d_input, d_output, 8);
        let spec = ops::PackedSpec::new(&host.scheme, d_input, d_output);
        let packed = PackedTensor::new(&host, device);
        let shape = host.scheme.scale_shape(d_input, d_output);
        for &rows in rows {
            let x = values(9, rows * d_input);
            let scales = host.effective_scales();
            let (own, offsets) = (host.effective_offsets(), host.effective_offsets());
            let offsets = offsets.unwrap_or_else(|| scales.clone());
            let weight = values(10, rows * d_output);
            // The loss is linear in each argument, so a wide step has no truncation error.
            let loss = |x: &[f32], scales: &[f32], offsets: &[f32]| -> f64 {
                let mut moved = host.clone();
                moved.scheme.scales = kiln_quant_core::ScaleType::F32;
                moved.scales = Scales::Plain(scales.to_vec());
                moved.offsets = own.as_ref().map(|_| offsets.to_vec());
                let dense = moved.dequantize();
                let mut sum = 0.0;
                for row in 0..rows {
                    for (output, dense) in dense.chunks_exact(d_input).enumerate() {
                        let x = &x[row * d_input..][..d_input];
                        let y: f64 = x.iter().zip(dense).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                        sum += y * f64::from(weight[row * d_output + output]);
                    }
                }
                sum
            };
            let tx = learned(&x, [rows, d_input], device);
            let (ts, to) = (learned(&scales, shape, device), learned(&offsets, shape, device));
            let y = ops::packed_linear(tx.clone(), packed.codes.val(), ts.clone(), to.clone(), spec);
            let gradients = (y * tensor::<2>(10, [rows, d_output], device)).sum().backward();
            let check = |what: &str, gradient: Option<Tensor<2>>, expected: Vec<(usize, f64)>| {
                let gradient = read(gradient.unwrap_or_else(|| panic!("{scheme}: no gradient of {what}")));
                let (found, expected): (Vec<f32>, Vec<f32>) =
                    expected.iter().map(|&(i, d)| (gradient[i], d as f32)).unzip();
                let difference = relative_difference(&found, &expected);
                assert!(difference < 2e-4, "{scheme}, {rows} rows, {what}: {difference:e}");
            };
            check("x", tx.grad(&gradients), finite_differences(&x, 0.5, |x| loss(x, &scales, &offsets)));
            check("scales", ts.grad(&gradients), finite_differences(&scales, 0.5, |s| loss(&x, s, &offsets)));
            if own.is_some() {
                let expected = finite_differences(&offsets, 0.5, |o| loss(&x, &scales, o));
                check("offsets", to.grad(&gradients), expected);
            } else {
                assert!(to.grad(&gradients).is_none_or(|g| read(g).iter().all(|v| *v == 0.0)));
            }
        }
    }
}

/// Gradients that pass through the dense weight equal those of the plain version on the CPU.
pub(crate) fn check_dequantize_gradients(device: &Device, cases: &[Case]) {
    for &(scheme, d_input, d_output) in cases {
        let host = random_weight(scheme, d_input, d_output, 11);
        let spec = ops::PackedSpec::new(&host.scheme, d_input, d_output);
        let shape = host.scheme.scale_shape(d_input, d_output);
        let gradients = |device: &Device, f: fn(_, _, _, _) -> Tensor<2>| {
            let codes = PackedTensor::new(&host, device).codes.val();
            let values = host.effective_scales();
            let scales = learned(&values, shape, device);
            let offsets = learned(host.offsets.as_ref().unwrap_or(&values), shape, device);
            let weight = tensor::<2>(12, [d_input, d_output], device);
            let gradients = (f(codes, scales.clone(), offsets.clone(), spec) * weight).sum().backward();
            (read(scales.grad(&gradients).unwrap()), offsets.grad(&gradients).map(read))
        };
        let found = gradients(device, ops::packed_dequantize);
        let expected = gradients(&Device::flex(), ops::reference_dequantize);
        assert_close(&format!("{scheme}: scales"), &found.0, &expected.0, 2e-5);
        if let Some(expected) = expected.1 {
            assert_close(&format!("{scheme}: offsets"), &found.1.unwrap(), &expected, 2e-5);
        }
    }
}

/// Permuted and sliced inputs of any rank.
pub(crate) fn check_strides(device: &Device) {
    let packed = PackedTensor::new(&random_weight("affine4:32", 64, 24, 13), device);
    let dense = packed.dequantize();
    let x = tensor::<3>(14, [64, 2, 7], device).permute([1, 2, 0]);
    let expected = x.clone().reshape([14, 64]).matmul(dense.clone());
    assert_close("rank 3, permuted", &read(packed.forward(x)), &read(expected), 1e-5);
    let x = tensor::<2>(15, [64, 3], device).transpose();
    let expected = x.clone().matmul(dense.clone());
    assert_close("few rows, transposed", &read(packed.forward(x)), &read(expected), 1e-5);
    let x = tensor::<2>(15, [9, 128], device).slice([2..9, 64..128]);
    assert_close("sliced", &read(packed.forward(x.clone())), &read(x.matmul(dense)), 1e-5);
}

/// Act-order weights gather their input, and their backward pass gathers the gradient.
pub(crate) fn check_input_order(device: &Device) {
    let mut host = random_weight("affine3:32:int", 96, 10, 16);
    host.input_order = Some((0..96).map(|k| (k * 37) % 96).collect());
    let packed = PackedTensor::new(&host, device);
    assert_close("dense", &read(packed.dequantize().transpose()), &host.dequantize(), 1e-6);
    let x = tensor::<2>(17, [6, 96], device);
    let expected = read(x.clone().matmul(packed.dequantize()));
    assert_close("forward", &read(packed.forward(x)), &expected, 1e-5);

    let recorded = device.clone().autodiff();
    let x = tensor::<3>(18, [2, 3, 96], &recorded).require_grad();
    let dy = tensor::<3>(19, [2, 3, 10], &recorded);
    let gradients = (packed.forward(x.clone()) * dy.clone()).sum().backward();
    let found = read(x.grad(&gradients).unwrap());
    let dy = dy.inner().reshape([6, 10]);
    let expected = read(dy.clone().matmul(packed.dequantize().transpose()));
    assert_close("gradient", &found, &expected, 1e-5);
    assert_close("backward without a graph", &read(packed.backward(dy)), &expected, 1e-5);
}

/// Looked-up outputs equal the host's rows to `tolerance`.
pub(crate) fn check_outputs(device: &Device, schemes: &[&str], tolerance: f32) {
    for scheme in schemes {
        let host = random_weight(scheme, 96, 50, 18);
        let packed = PackedTensor::new(&host, device);
        let ids = [49i64, 0, 7, 7, 31];
        let found = read(packed.outputs(Tensor::from_data(ids, device)));
        let dense = host.dequantize();
        let expected: Vec<f32> =
            ids.iter().flat_map(|&id| dense[id as usize * 96..][..96].to_vec()).collect();
        assert_close(scheme, &found, &expected, tolerance);
    }
}

/// Half-precision activations give answers of their type, near those of f32.
pub(crate) fn check_half_precision(device: &Device, dtype: FloatDType, rows: &[usize], tolerance: f64) {
    let packed = PackedTensor::new(&random_weight("affine4:32", 64, 24, 19), device);
    for &rows in rows {
        let gradient = |dtype: FloatDType| {
            let x = tensor::<2>(20, [rows, 64], &device.clone().autodiff()).cast(dtype).require_grad();
            let y = packed.forward(x.clone());
            assert_eq!(y.dtype(), dtype.into());
            let gradients = y.clone().sum().backward();
            (read(y.inner()), read(x.grad(&gradients).unwrap()))
        };
        let (found, expected) = (gradient(dtype), gradient(FloatDType::F32));
        for (what, found, expected) in [("y", found.0, expected.0), ("dx", found.1, expected.1)] {
            let difference = relative_difference(&found, &expected);
            assert!(difference < tolerance, "{dtype:?}, {rows} rows, {what}: {difference:e}");
        }
    }
}

#[test]
fn dequantize_equals_the_host_and_the_plain_version_bit_for_bit() {
    check_dequantize(&Device::flex(), CASES, 0.0);
    // So many scales that several threads unpack them.
    check_dequantize(&Device::flex(), &[("nf4:8:double", 4800, 65), ("affine4:16:super8", 8192, 65)], 0.0);
}

#[test]
fn forward_equals_a_dense_product() {
    check_forward(&Device::flex(), CASES, &ROWS, 2e-6);
}

#[test]
fn one_row_walks_the_edges_of_runs_and_vectors() {
    let schemes = [
        "affine2:32",
        "affine3:32",
        "affine4:32:sym",
        "affine8:32:sym",
        "affine8:col",
        "nf4:32",
        "affine5:32",
        "affine6:32:sym",
        "affine2:16",
        "affine6:16:sym",
        // Several blocks in a run, scales that outputs share, scales that aren't floats.
        "affine3:8",
        "affine5:4:sym",
        "nf4:4",
        "affine2:8x4",
        "affine4:3x16",
        "affine8:24x32:sym",
        "affine4:16x32",
        "affine2:16:super4",
        "affine4:32:super8",
        "affine5:8:super8",
        "affine6:16:sym:super8",
        "iq4nl:32:super8",
        "nf4:8:double",
        "nf4:32:double",
    ];
    let inputs = [1, 15, 16, 17, 31, 32, 33, 48, 64];
    let outputs = [1, 15, 16, 17, 63, 64, 65, 80, 129, 257];
    let mut cases: Vec<Case> = Vec::new();
    for scheme in schemes {
        for k in inputs {
            cases.extend(outputs.map(|n| (scheme, k, n)));
        }
    }
    check_one_row(&Device::flex(), &cases, &[[0, 0]], 1e-6);
}

#[test]
fn few_rows_of_wide_weights_equal_dense_products() {
    // So many words that threads share the outputs; blocks that fit no run; scales in every form.
    let cases = [
        ("affine5:32:super8", 512, 530),
        ("affine3:16:sym:super8", 512, 700),
        ("affine6:64", 256, 1100),
        ("affine4:3x16", 512, 530),
        ("affine2:8x4", 64, 1100),
        ("affine4:2:super8", 70, 300),
        ("nf4:24:double", 100, 300),
        ("nf4:64:double", 320, 530),
    ];
    check_forward(&Device::flex(), &cases, &[1, 2, 4], 2e-6);
    check_one_row(&Device::flex(), &cases, &[[0, 0]], 1e-6);
}

#[test]
fn few_rows_take_input_orders_other_types_and_weights_of_a_model_in_training() {
    let device = Device::flex();
    for scheme in ["affine4:32:super8", "affine2:16:super4", "nf4:64:double"] {
        for rows in [1, 2, 4] {
            let mut host = random_weight(scheme, 128, 40, 9);
            host.input_order = Some((0..128).rev().collect());
            let packed = PackedTensor::new(&host, &device);
            let dense = packed.dequantize_reference();
            let (x, dy) = (tensor::<2>(3, [rows, 128], &device), tensor::<2>(4, [rows, 40], &device));
            let close = |what: &str, found: Tensor<2>, expected: Tensor<2>, tolerance: f64| {
                let difference = relative_difference(&read(found), &read(expected));
                assert!(difference < tolerance, "{scheme}, {rows} rows, {what}: {difference:e}");
            };
            let expected = x.clone().matmul(dense.clone());
            close("forward", packed.forward(x.clone()), expected.clone(), 2e-6);
            close("gradient", packed.backward(dy.clone()), dy.matmul(dense.transpose()), 2e-6);
            let rounded = packed.forward(x.clone().cast(FloatDType::BF16));
            assert_eq!(rounded.dtype(), burn::tensor::DType::BF16);
            close("bf16", rounded.cast(FloatDType::F32), expected.clone(), 1e-2);
            close("in training", packed.train().forward(x), expected, 2e-6);
        }
    }
}

#[test]
fn one_row_keeps_values_of_every_size() {
    let schemes = [
        "affine2:64",
        "affine3:64",
        "affine4:32",
        "affine4:col:sym",
        "affine8:64:sym",
        "nf4:64",
        "affine5:16",
    ];
    let exponents = [[-90, -70], [-30, 0], [0, 30], [60, 90]];
    check_one_row(&Device::flex(), &schemes.map(|scheme| (scheme, 192, 100)), &exponents, 1e-6);
}

#[test]
fn values_that_are_not_finite_stay_so() {
    for scheme in ["affine4:32", "affine8:32:sym", "nf4:32"] {
        let packed = PackedTensor::new(&random_weight(scheme, 96, 20, 23), &Device::flex());
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = values(24, 96);
            x[50] = bad;
            let x = Tensor::<2>::from_data(TensorData::new(x, [1, 96]), &Device::flex());
            assert!(read(packed.forward(x)).iter().all(|y| !y.is_finite()), "{scheme}, {bad}");
        }
    }
}

#[test]
fn input_gradient_equals_autodiff_through_the_dense_weight() {
    check_input_gradient(&Device::flex(), CASES, &ROWS, 2e-6);
}

#[test]
fn gradients_of_input_scales_and_offsets_equal_finite_differences() {
    let cases: Vec<Case> = CASES.iter().copied().filter(|case| case.1 * case.2 < 20_000).collect();
    check_parameter_gradients(&Device::flex(), &cases, &[2, 5]);
}

#[test]
fn dequantize_passes_gradients_to_scales_and_offsets() {
    let schemes = ["affine4:64", "affine3:24", "affine2:8x4", "affine8:32:sym", "nf4:64"];
    check_dequantize_gradients(&Device::flex(), &schemes.map(|scheme| (scheme, 72, 40)));
}

#[test]
fn any_rank_and_any_strides_go_in() {
    check_strides(&Device::flex());
}

#[test]
fn input_order_gathers_the_input() {
    check_input_order(&Device::flex());
}

#[test]
fn outputs_are_rows_of_the_checkpoint() {
    check_outputs(
        &Device::flex(),
        &["affine8:32:sym:f16", "affine2:8x4", "nf4:64:double", "affine4:16:super8"],
        0.0,
    );
}

#[test]
fn half_precision_activations_keep_their_type() {
    // bf16 keeps 8 bits: inputs and outputs are each off by up to 2^-9 of their size.
    check_half_precision(&Device::flex(), FloatDType::BF16, &[3, 5], 1e-2);
}

/// `a [rows, inner] · b [inner, columns]` of operands rounded to bf16, in f64, with the sum of the products' sizes.
fn rounded_product(a: &[f32], b: &[f32], [rows, inner, columns]: [usize; 3]) -> Vec<[f64; 2]> {
    let rounded = |x: f32| half::bf16::from_f32(x).to_f64();
    let element = |row: usize, column: usize| {
        (0..inner).fold([0.0; 2], |[sum, size], k| {
            let product = rounded(a[row * inner + k]) * rounded(b[k * columns + column]);
            [sum + product, size + product.abs()]
        })
    };
    (0..rows * columns).map(|i| element(i / columns, i % columns)).collect()
}

#[test]
fn bf16_products_of_packed_weights_are_those_of_rounded_operands() {
    let device = Device::flex();
    if !Compute::Bf16.is_native(&device) {
        kiln_testkit::skipped("this processor doesn't multiply bf16");
        return;
    }
    for &(scheme, d_input, d_output) in CASES {
        let mut weight = PackedTensor::new(&random_weight(scheme, d_input, d_output, 51), &device);
        let dense = read(weight.dequantize());
        let turned = read(weight.dequantize().transpose());
        for rows in [1, 3, 5, 40] {
            let (x, dy) =
                (tensor::<2>(52, [rows, d_input], &device), tensor::<2>(53, [rows, d_output], &device));
            let exact = [read(weight.forward(x.clone())), read(weight.backward(dy.clone()))];
            weight.set_compute(Compute::Bf16);
            let found = [read(weight.forward(x.clone())), read(weight.backward(dy.clone()))];
            weight.set_compute(Compute::F32);
            let expected = [
                rounded_product(&read(x), &dense, [rows, d_input, d_output]),
                rounded_product(&read(dy), &turned, [rows, d_output, d_input]),
            ];
            for ((found, exact), expected) in found.iter().zip(&exact).zip(&expected) {
                let agrees = found
                    .iter()
                    .zip(expected)
                    .all(|(found, [sum, size])| (f64::from(*found) - sum).abs() < 1e-6 * size + 1e-9);
                // Few rows are unpacked in registers and multiplied as they are.
                assert!(agrees || (rows <= 4 && found == exact), "{scheme}, {rows} rows");
            }
        }
    }
}

#[test]
fn products_of_what_a_graph_keeps_rounded_are_the_same_to_the_last_bit() {
    let device = Device::flex();
    if !Compute::Bf16.is_native(&device) {
        kiln_testkit::skipped("this processor doesn't multiply bf16");
        return;
    }
    let drops = Drops { key: [3, 9], threshold: 1 << 30 };
    for (scheme, rows, drops) in [
        ("affine4:64", 37, None),
        ("nf4:32", 5, Some(drops)),
        ("affine3:24", 40, None),
        ("affine4:64", 4, None),
    ] {
        let (d_input, d_output, rank) = (96, 50, 8);
        let mut packed = PackedTensor::new(&random_weight(scheme, d_input, d_output, 61), &device);
        packed.set_compute(Compute::Bf16);
        let dense = tensor::<2>(62, [d_input, d_output], &device).cast(FloatDType::BF16);
        let update = LowRankSpec { factor: 1.3, drops, compute: Compute::Bf16 };
        let run = |kept: bool| {
            let graph = device.clone().autodiff();
            let leaf = |seed, shape| tensor::<2>(seed, shape, &graph).require_grad();
            let [x, a, b] = [leaf(1, [rows, d_input]), leaf(2, [d_input, rank]), leaf(3, [rank, d_output])];
            let input = if kept { fused::operand(x.clone(), Compute::Bf16) } else { x.clone() };
            let rounded = if kept && rows > 4 { DType::BF16 } else { DType::F32 };
            assert_eq!(input.dtype(), rounded, "{scheme}, {rows} rows");
            let y = packed.forward_low_rank(input.clone(), a.clone(), b.clone(), update);
            let y = y + fused::matmul(input, dense.clone(), Compute::Bf16);
            assert_eq!(y.dtype(), DType::F32);
            let gradients = (y.clone() * tensor(4, y.dims(), &graph)).sum().backward();
            let mut all = vec![read(y)];
            all.extend([x, a, b].map(|leaf| {
                let gradient = leaf.grad(&gradients).unwrap();
                assert_eq!(gradient.dtype(), DType::F32);
                read(gradient)
            }));
            all
        };
        assert_eq!(run(true), run(false), "{scheme}, {rows} rows");
    }
}

#[test]
fn a_graph_rounds_what_it_keeps_to_the_nearest() {
    let device = Device::flex();
    let ties =
        [0x3f80_8000u32, 0x3f81_8000, 0x3f80_8001, 0x3f80_7fff, 0x7f7f_ffff, 1, 0x007f_ffff, 0x8000_0000];
    let mut values: Vec<f32> = ties.map(f32::from_bits).to_vec();
    values.extend([
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::from_bits(0x7f80_0001),
        f32::from_bits(0xffff_ffff),
    ]);
    values.extend((0..5000u32).map(|i| f32::from_bits(i.wrapping_mul(2_654_435_761))));
    let rows = values.len();
    let on = |device: &Device| Tensor::<2>::from_data(TensorData::new(values.clone(), [rows, 1]), device);
    for same in [
        fused::operand(on(&device), Compute::Bf16),
        fused::operand(on(&device.clone().autodiff()), Compute::Bf16),
        fused::operand(on(&device.clone().autodiff()).require_grad(), Compute::F32),
    ] {
        assert_eq!(same.dtype(), DType::F32);
    }
    if !Compute::Bf16.keeps_rounded(&device) {
        kiln_testkit::skipped("this processor doesn't multiply bf16");
        return;
    }
    let kept = fused::operand(on(&device.autodiff()).require_grad(), Compute::Bf16);
    let found = kept.into_data().try_into_vec::<half::bf16>().unwrap();
    for (value, found) in values.iter().zip(found) {
        let small = value.abs() < f32::MIN_POSITIVE;
        let expected = half::bf16::from_f32(if small { 0f32.copysign(*value) } else { *value });
        assert_eq!(found.to_bits(), expected.to_bits(), "{value:e} ({:#x})", value.to_bits());
    }
}

/// [`PackedTensor::forward_low_rank`] on `device` beside the dense product and the plain update on the CPU, with the
/// gradients of input, factors, scales and offsets; one of the ranks has no kernel of its own on GPUs.
pub(crate) fn check_low_rank(device: &Device, cases: &[Case], tolerance: f64) {
    let drops = Drops { key: [3, 9], threshold: 1 << 30 };
    for &(scheme, d_input, d_output) in cases {
        let host = random_weight(scheme, d_input, d_output, 31);
        for (rows, rank, drops) in [(3, 4, None), (37, 16, None), (37, 16, Some(drops)), (9, 65, None)] {
            let update = LowRankSpec { factor: 1.7, drops, compute: Compute::F32 };
            let run = |device: &Device, fused: bool| {
                let mut packed = PackedTensor::new(&host, device);
                let device = device.clone().autodiff();
                let leaf = |seed, shape| tensor::<2>(seed, shape, &device).require_grad();
                let [x, a, b] =
                    [leaf(1, [rows, d_input]), leaf(2, [d_input, rank]), leaf(3, [rank, d_output])];
                // Scales and offsets that are learned.
                let learned = |values: Tensor<2>| Tensor::from_inner(values).require_grad();
                let scales = learned(packed.scales.val());
                let offsets = packed.offsets.as_ref().map(|offsets| learned(offsets.val()));
                packed.scales = Param::from_tensor(scales.clone());
                packed.offsets = offsets.clone().map(Param::from_tensor);
                let y = if fused {
                    packed.forward_low_rank(x.clone(), a.clone(), b.clone(), update)
                } else {
                    let y = x.clone().matmul(packed.dequantize_reference());
                    plain::low_rank(y, x.clone(), a.clone(), b.clone(), update)
                };
                let gradients = (y.clone() * tensor(4, y.dims(), &device)).sum().backward();
                let leaves = [Some(x), Some(a), Some(b), Some(scales), offsets];
                let mut all = vec![read(y)];
                all.extend(leaves.iter().flatten().map(|leaf| read(leaf.grad(&gradients).unwrap())));
                all
            };
            let (found, expected) = (run(device, true), run(&Device::flex(), false));
            assert_eq!(found.len(), expected.len());
            for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
                let difference = relative_difference(found, &expected);
                let dropped = drops.is_some();
                assert!(
                    difference < tolerance,
                    "{scheme}, {rows} rows, rank {rank}, drops {dropped}, {i}: {difference:e}"
                );
            }
        }
    }
}

#[test]
fn a_product_with_a_low_rank_update_equals_the_two_after_each_other() {
    check_low_rank(
        &Device::flex(),
        &[("affine4:64", 128, 64), ("affine3:24", 70, 50), ("nf4:32", 96, 30)],
        4e-6,
    );
}
