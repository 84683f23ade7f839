//! The same checks on a GPU, or on software Vulkan, where this file is about correctness only. Small and serial: it is
//! slow there.
//!
//! Without a Vulkan adapter, or the feature `wgpu`, the tests say so and pass, unless `KILN_REQUIRE_VULKAN=1`.

use burn::{
    module::Module,
    tensor::{Device, FloatDType, Int, Tensor},
};
use kiln_quant_core::{
    Compute, DeviceLimits, LogitSpec, PackedTensor,
    fused::{AdamWStep, AttentionSpec, plain},
};
use kiln_testkit::{Vulkan, assert_close, read, relative_difference, tensor, vulkan};

use crate::{
    fused::{self, On},
    ops::{self, Case, random_weight},
};

/// All kinds of values, blocks and scales once, ragged runs and blocks, and a last cube of outputs that is not full.
const CASES: &[Case] = &[
    ("affine4:64", 128, 64),
    ("affine3:24", 70, 50),
    ("affine2:8x4", 40, 30),
    ("affine8:32:sym:f16", 96, 24),
    ("affine4:col:f16", 33, 5),
    ("affine3:32:int", 96, 33),
    ("affine4:16x64:sym:bf16", 130, 50),
    ("nf4:64:double", 320, 70),
    ("nf3:64", 128, 16),
    ("nf2:32", 64, 19),
    ("fp4:64", 192, 32),
    ("affine5:32:super8", 512, 40),
    ("affine6:16:sym:super8", 272, 50),
    ("affine2:16:super4", 256, 33),
    ("iq4nl:32:super8", 256, 20),
    ("mxfp4:32:bf16", 64, 17),
];

/// A few of them, for what depends little on the format.
const FEW_CASES: &[Case] = &[("affine4:64", 128, 64), ("affine3:24", 70, 50), ("nf4:64:double", 320, 70)];

#[test]
fn fused_operations_equal_the_plain_ones_on_the_cpu() {
    let Some(Vulkan { device, .. }) = &vulkan() else { return };
    // Exponentials are less precise there.
    let on = On { device, tolerance: 2e-5 };
    fused::check_elementwise(on);
    fused::check_add_matmul(on);
    fused::check_low_rank(on);
    fused::check_narrow(on);
    fused::check_seeded(on);
    fused::check_dropout(on);
    fused::check_cross_entropy(on);
    fused::check_attention(on);
    fused::check_groups(on);
}

#[test]
fn sums_of_squares_miss_no_element() {
    let Some(Vulkan { device, .. }) = &vulkan() else { return };
    // One part with room left, one that is full, one element more, and more than the parts have units.
    let sizes = [(777, 1), (4096, 1), (4097, 2), (300_001, 64)];
    let tensors = sizes.map(|(count, _)| tensor::<1>(count as u64, [count], device));
    let here = tensor::<1>(5, [99], &Device::flex());
    let expected = tensors.each_ref().map(|x| {
        let squares = read(x.clone()).into_iter().map(|x| f64::from(x).powi(2));
        squares.sum::<f64>()
    });
    let square = read(here.clone().square().sum())[0];
    let mut all = tensors.to_vec();
    all.insert(2, here);
    let sums: Vec<Vec<f32>> = kiln_quant_core::fused::square_sums(all).into_iter().map(read).collect();
    assert_eq!(sums.len(), 2, "one tensor of sums for each device");
    assert_eq!(sums[1], [square]);
    let mut parts = sums[0].as_slice();
    for ((count, number), expected) in sizes.into_iter().zip(expected) {
        let (these, others) = parts.split_at(number);
        parts = others;
        let found: f64 = these.iter().copied().map(f64::from).sum();
        assert!((found - expected).abs() < 1e-5 * expected, "{count}: {found} {expected}");
    }
    assert!(parts.is_empty());
}

#[test]
fn a_step_of_adamw_is_that_of_the_formula() {
    let Some(Vulkan { device, .. }) = &vulkan() else { return };
    let leaf = |seed| tensor::<2>(seed, [37, 21], device);
    let [parameter, gradient, first, second] = [leaf(1), leaf(2), leaf(3), leaf(4).square()];
    let corrections = [0.19, 0.02];
    let step = AdamWStep { lr: 0.1, betas: [0.9, 0.99], corrections, eps: 1e-3, decay: 0.95, factor: 0.3 };
    let before = [&parameter, &gradient, &first, &second].map(|x| read(x.clone()));
    let found = kiln_quant_core::fused::adamw(parameter, gradient, [first, second], step).map(read);
    for i in 0..37 * 21 {
        let [parameter, gradient, first, second] = before.each_ref().map(|values| f64::from(values[i]));
        let gradient = 0.3 * gradient;
        let first = 0.9 * first + 0.1 * gradient;
        let second = 0.99 * second + 0.01 * gradient * gradient;
        let parameter = 0.95 * parameter - 0.1 * (first / 0.19) / ((second / 0.02).sqrt() + 1e-3);
        for (found, expected) in found.iter().zip([parameter, first, second]) {
            assert!((f64::from(found[i]) - expected).abs() < 2e-6 * (1.0 + expected.abs()), "{i}");
        }
    }
}

/// Products of f32, relatively: rounding of some hundred terms.
const TOLERANCE: f64 = 2e-6;

#[test]
fn dequantize_equals_the_host_but_for_a_rounding() {
    let Some(Vulkan { device, .. }) = &vulkan() else { return };
    ops::check_dequantize(device, CASES, 1.0);
}

#[test]
fn forward_equals_a_dense_product() {
    let Some(Vulkan { device, .. }) = &vulkan() else { return };
    ops::check_forward(device, CASES, &[1, 5], TOLERANCE);
    ops::check_forward(device, FEW_CASES, &[3, 4, 9], TOLERANCE);
    // Rows of several cubes, inputs of several shares.
    ops::check_forward(device, &[("affine4:64", 600, 530)], &[2, 9, 16, 17], TOLERANCE);
}

#[test]
fn input_gradient_equals_autodiff_through_the_dense_weight() {
    let Some(Vulkan { device, .. }) = &vulkan() else { return };
    ops::check_input_gradient(device, CASES, &[5], TOLERANCE);
    ops::check_input_gradient(device, FEW_CASES, &[1, 9], TOLERANCE);
}

#[test]
fn a_product_with_a_low_rank_update_equals_the_two_after_each_other() {
    let Some(Vulkan { device, .. }) = &vulkan() else { return };
    ops::check_low_rank(device, &[("affine4:64", 128, 64), ("affine3:24", 70, 50)], 4e-6);
}

#[test]
fn gradients_of_input_scales_and_offsets_equal_finite_differences() {
    let Some(Vulkan { device, .. }) = &vulkan() else { return };
    // More outputs than are reduced at a time.
    let wide = [("affine4:64", 64, 1040), ("affine2:24x4", 12, 1050)];
    ops::check_parameter_gradients(device, &[CASES, &wide].concat(), &[5]);
}

#[test]
fn dequantize_passes_gradients_to_scales_and_offsets() {
    let Some(Vulkan { device, .. }) = &vulkan() else { return };
    let schemes = ["affine4:64", "affine3:24", "affine2:8x4", "affine8:32:sym", "nf4:64"];
    ops::check_dequantize_gradients(device, &schemes.map(|scheme| (scheme, 72, 40)));
}

#[test]
fn any_rank_any_strides_and_any_input_order_go_in() {
    let Some(Vulkan { device, .. }) = &vulkan() else { return };
    ops::check_strides(device);
    ops::check_input_order(device);
}

#[test]
fn outputs_are_rows_of_the_checkpoint() {
    let Some(Vulkan { device, .. }) = &vulkan() else { return };
    ops::check_outputs(device, &["affine8:32:sym:f16", "affine2:8x4", "nf4:64:double"], 4e-6);
}

#[test]
fn half_precision_activations_keep_their_type() {
    let Some(Vulkan { device, .. }) = &vulkan() else { return };
    if device.supports_dtype(FloatDType::F16) {
        // f16 keeps 11 bits: inputs, weights and outputs are each off by up to 2^-12 of their size.
        ops::check_half_precision(device, FloatDType::F16, &[3, 5], 2e-3);
    }
}

#[test]
fn elementwise_operations_fuse_around_the_product() {
    let Some(Vulkan { device, .. }) = &vulkan() else { return };
    let host = random_weight("affine4:64", 128, 64, 21);
    for rows in [2, 6] {
        let run = |device: &Device| {
            let packed = PackedTensor::new(&host, device);
            let x = tensor::<2>(22, [rows, 128], &device.clone().autodiff()).require_grad();
            let y = packed.forward(x.clone() * x.clone() * 0.5 + 0.01);
            let y = (y.clone() * y + 1.0).sqrt();
            let gradients = (y.clone() * y.clone()).sum().backward();
            (read(y.inner()), read(x.grad(&gradients).unwrap()))
        };
        let (found, expected) = (run(device), run(&Device::flex()));
        for (what, found, expected) in [("y", found.0, expected.0), ("dx", found.1, expected.1)] {
            let difference = relative_difference(&found, &expected);
            assert!(difference < TOLERANCE, "{rows} rows, {what}: {difference:e}");
        }
    }
}

#[test]
fn packed_weights_move_between_devices_and_records_unchanged() {
    let Some(Vulkan { device, .. }) = &vulkan() else { return };
    for (scheme, ordered) in [
        ("affine3:32", false),
        ("affine8:32:sym:f16", false),
        ("nf4:64:double", false),
        ("affine4:32:int", true),
    ] {
        let mut host = random_weight(scheme, 96, 50, 23);
        host.input_order = ordered.then(|| (0..96).map(|k| (k * 37) % 96).collect());
        let there = PackedTensor::new(&host, &Device::flex()).to_device(device);
        assert_eq!(there.to_host().unwrap(), host, "{scheme}: there");
        let x = tensor::<2>(24, [5, 96], device);
        let product = read(there.forward(x.clone()));
        let mut other = random_weight(scheme, 96, 50, 25);
        other.input_order = ordered.then(|| (0..96).rev().collect());
        let blank = PackedTensor::new(&other, device);
        let loaded = blank.load_record(there.clone().into_record());
        assert_close(scheme, &read(loaded.forward(x)), &product, 0.0);
        let back = there.to_device(&Device::flex());
        assert_eq!(back.to_host().unwrap(), host, "{scheme}: back");
    }
}

#[test]
fn no_rows_give_no_rows() {
    let Some(Vulkan { device, .. }) = &vulkan() else { return };
    let packed = PackedTensor::new(&random_weight("affine4:32", 64, 24, 26), device);
    assert_eq!(packed.forward(Tensor::<2>::zeros([0, 64], device)).dims(), [0, 24]);
    let mut ordered = random_weight("affine4:32", 64, 24, 26);
    ordered.input_order = Some((0..64).rev().collect());
    for weight in [packed, PackedTensor::new(&ordered, device)] {
        assert_eq!(weight.forward(Tensor::<3>::zeros([2, 0, 64], device)).dims(), [2, 0, 24]);
    }
}

/// By the pools' own accounting: what is kept for the backward pass is the result and a number for each query and head; what
/// both passes need beside that grows with the length, where all scores would grow with its square.
#[test]
fn memory_of_attention_grows_with_the_length() {
    let Some(Vulkan { device, .. }) = &vulkan() else { return };
    let [batch, heads, kv_heads, head_dim] = [2, 64, 2, 4];
    let usage = || {
        device.sync().unwrap();
        device.memory_pool_usage().unwrap()
    };
    let needed = |length: usize| {
        let leaf = |seed, heads| {
            let x = tensor::<4>(seed, [batch, length, heads, head_dim], &device.clone().autodiff());
            x.require_grad()
        };
        let (q, k, v) = (leaf(1, heads), leaf(2, kv_heads), leaf(3, kv_heads));
        let segments = kiln_quant_core::fused::segments(&vec![1; batch * length], [batch, length], device);
        let spec = AttentionSpec {
            scale: 0.5,
            alibi: 0.0,
            softcap: None,
            window: None,
            compute: Compute::F32,
            query_segments: segments.clone(),
            key_segments: segments,
        };
        device.memory_cleanup();
        let before = usage();
        let y = kiln_quant_core::fused::attention(q, k, v, &spec);
        let kept = usage().bytes_in_use - before.bytes_in_use;
        // What launches are told lies there too.
        let expected = 4 * batch * length * heads * (head_dim + 1);
        assert!((expected..expected + 4096).contains(&(kept as usize)), "{kept} bytes of {length} are kept");
        let gradients = y.sum().backward();
        let most = usage().bytes_reserved - before.bytes_reserved;
        drop(gradients);
        most
    };
    // From 256 queries on there are several blocks of them; 1024 tokens are in docs/performance.md, they take long here.
    let [shorter, longer] = [256, 512].map(needed);
    assert!(longer < 2 * shorter, "{shorter} bytes became {longer}");
}

/// So many heads that a cube's share of the keys is as large as it may be, and one is smaller.
#[test]
fn a_few_queries_of_many_heads_see_all_keys() {
    let Some(Vulkan { device, .. }) = &vulkan() else { return };
    let [length, keys, heads, kv_heads, head_dim] = [2, 700, 128, 2, 4];
    let attended = |device: &Device, plainly: bool| {
        let leaf = |seed, shape| tensor::<4>(seed, shape, device);
        let q = leaf(41, [1, length, heads, head_dim]);
        let [k, v] = [42, 43].map(|seed| leaf(seed, [1, keys, kv_heads, head_dim]));
        let spec = AttentionSpec {
            scale: 1.3,
            alibi: 0.0,
            softcap: None,
            window: None,
            compute: Compute::F32,
            query_segments: kiln_quant_core::fused::segments(&vec![1; length], [1, length], device),
            key_segments: kiln_quant_core::fused::segments(&vec![1; keys], [1, keys], device),
        };
        read(match plainly {
            true => plain::attention(q, k, v, &spec),
            false => kiln_quant_core::fused::attention(q, k, v, &spec),
        })
    };
    let difference = relative_difference(&attended(device, false), &attended(&Device::flex(), true));
    assert!(difference < 1e-5, "{difference:e}");
}

/// As a head of a large vocabulary, on a device whose largest tensor is small.
#[test]
fn large_weights_are_unpacked_in_parts() {
    let Some(Vulkan { device, .. }) = &vulkan() else { return };
    let page = DeviceLimits::of(device).largest_tensor.unwrap();
    for case in [("affine4:32", 96, 100_000), ("affine2:32x8", 96, 100_001)] {
        assert!(page / 4 < 4 * 96 * 100_000, "{page} bytes: this weight isn't unpacked in parts");
        ops::check_forward(device, &[case], &[17], TOLERANCE);
        // A sum of a hundred thousand terms.
        ops::check_input_gradient(device, &[case], &[17], 10.0 * TOLERANCE);
    }
}

/// Losses and gradient by the plain operations on the CPU, of a dense head.
fn plain_head_loss(
    dense: &Tensor<2>,
    x: &[f32],
    targets: &[i64],
    weights: Option<&[f32]>,
    spec: LogitSpec,
) -> [Vec<f32>; 2] {
    let cpu = Device::flex();
    let rows = targets.len();
    let x = Tensor::<1>::from_data(x, &cpu.clone().autodiff()).reshape([rows as i32, -1]).require_grad();
    let z: Tensor<2> = x.clone().matmul(dense.clone()) * spec.factor;
    let logits = match spec.softcap {
        Some(cap) => (z / cap).tanh() * cap,
        None => z,
    };
    let losses = plain::cross_entropy(logits, Tensor::<1, Int>::from_data(targets, &cpu));
    let weighted = match weights {
        Some(weights) => losses.clone() * Tensor::<1>::from_data(weights, &cpu),
        None => losses.clone(),
    };
    let dx = x.grad(&weighted.sum().backward()).unwrap();
    [read(losses), read(dx)]
}

#[test]
fn a_packed_head_has_its_loss_and_gradient_in_parts_of_the_vocabulary() {
    let Some(Vulkan { device, .. }) = &vulkan() else { return };
    let factor = 3.0;
    for (scheme, d_input, vocabulary, ordered, softcap) in [
        ("affine4:64", 128, 300, false, None),
        ("affine2:8x4", 40, 30, false, Some(2.0)),
        ("nf4:64:double", 320, 70, true, None),
        ("affine6:16:sym:super8", 272, 50, false, Some(30.0)),
    ] {
        let mut host = random_weight(scheme, d_input, vocabulary, 31);
        host.input_order = ordered.then(|| (0..d_input as u32).rev().collect());
        let head = PackedTensor::new(&host, device);
        let dense = PackedTensor::new(&host, &Device::flex()).dequantize_reference();
        let spec = LogitSpec { factor, softcap };
        for rows in [1, 9, 21] {
            let x = tensor::<2>(32, [rows, d_input], device);
            let targets: Vec<i64> = (0..rows).map(|row| ((row * 37 + 5) % vocabulary) as i64).collect();
            let weights: Vec<f32> = (0..rows).map(|row| 0.5 + (row % 3) as f32).collect();
            for weights in [None, Some(weights.as_slice())] {
                let expected = plain_head_loss(&dense, &read(x.clone()), &targets, weights, spec);
                // Parts of one block, several whole and a last one that isn't, and all at once.
                for columns in [1, 13, 1000] {
                    let (losses, dx) = head.cross_entropy(
                        x.clone(),
                        Tensor::from_data(targets.as_slice(), device),
                        weights.map(|weights| Tensor::from_data(weights, device)),
                        spec,
                        columns,
                    );
                    for (what, found, expected) in
                        [("losses", read(losses), &expected[0]), ("dx", read(dx), &expected[1])]
                    {
                        let difference = relative_difference(&found, expected);
                        assert!(
                            difference < 2e-5,
                            "{scheme}, {rows} rows, {columns} ids at a time, {what}: {difference:e}"
                        );
                    }
                }
            }
        }
    }
}

/// By the pools' own accounting.
#[test]
fn the_loss_of_a_packed_head_holds_neither_all_logits_nor_the_dense_head() {
    let Some(Vulkan { device, .. }) = &vulkan() else { return };
    let [rows, width, vocabulary, columns] = [20, 256, 60_000, 1500];
    let head = PackedTensor::new(&random_weight("affine4:64", width, vocabulary, 33), device);
    let x = tensor::<2>(34, [rows, width], device);
    let targets = Tensor::<1, Int>::from_data(vec![7i64; rows].as_slice(), device);
    device.sync().unwrap();
    device.memory_cleanup();
    let before = device.memory_pool_usage().unwrap().bytes_reserved;
    let (losses, dx) =
        head.cross_entropy(x, targets, None, LogitSpec { factor: 1.0, softcap: None }, columns);
    assert!(read(losses).into_iter().chain(read(dx)).all(f32::is_finite));
    let reserved = device.memory_pool_usage().unwrap().bytes_reserved - before;
    // A part's weights are 1.5 MB, its logits 0.1; scales and offsets of all 1.9 in f32. Dense, the head has 61 MB.
    assert!(reserved < (width * vocabulary) as u64, "{reserved} bytes");
}
