//! The fused operations against their plain versions, values and gradients (Burn's own autodiff).

use burn::tensor::{Device, Int, Tensor, TensorData};
use kiln_quant_core::fused::{self, AttentionSpec, plain};
use kiln_testkit::{read, relative_difference, tensor};

/// Both versions sum in another order.
const TOLERANCE: f64 = 3e-6;

/// Runs both functions on leaves made from seeds and compares values and all gradients.
fn compare<const D: usize, const E: usize>(
    what: &str,
    shapes: &[[usize; D]],
    found: impl Fn(&[Tensor<D>]) -> Tensor<E>,
    expected: impl Fn(&[Tensor<D>]) -> Tensor<E>,
) {
    let device = Device::flex().autodiff();
    let run = |f: &dyn Fn(&[Tensor<D>]) -> Tensor<E>| {
        let leaves: Vec<Tensor<D>> =
            shapes.iter().enumerate().map(|(i, s)| tensor(i as u64, *s, &device).require_grad()).collect();
        let y = f(&leaves);
        let weight = tensor::<E>(77, y.dims(), &device);
        let gradients = (y.clone() * weight).sum().backward();
        let mut all = vec![read(y)];
        all.extend(leaves.iter().map(|leaf| read(leaf.grad(&gradients).unwrap())));
        all
    };
    for (i, (found, expected)) in run(&found).iter().zip(run(&expected)).enumerate() {
        let difference = relative_difference(found, &expected);
        assert!(difference < TOLERANCE, "{what}, output {i}: {difference:e}");
    }
}

#[test]
fn norm_activation_and_rotation_equal_the_plain_versions() {
    for [rows, width] in [[1, 5], [3, 64], [70, 96], [33, 100]] {
        compare(
            "rms_norm",
            &[[rows, width], [1, width]],
            |x| fused::rms_norm(x[0].clone(), x[1].clone().reshape([width]), 1e-5),
            |x| plain::rms_norm(x[0].clone(), x[1].clone().reshape([width]), 1e-5),
        );
        let wide = |x: &[Tensor<2>]| (x[0].clone().mul_scalar(20.0), x[1].clone());
        compare(
            "swiglu",
            &[[rows, width]; 2],
            |x| fused::swiglu(wide(x).0, wide(x).1),
            |x| plain::swiglu(wide(x).0, wide(x).1),
        );
        compare(
            "geglu",
            &[[rows, width]; 2],
            |x| fused::geglu(wide(x).0, wide(x).1),
            |x| plain::geglu(wide(x).0, wide(x).1),
        );
    }
    let device = Device::flex();
    let (cos, sin) = (tensor::<2>(8, [14, 12], &device), tensor::<2>(9, [14, 12], &device));
    compare(
        "rotate",
        &[[2, 7, 3, 24]],
        |x| fused::rotate(x[0].clone(), cos.clone(), sin.clone()),
        |x| plain::rotate(x[0].clone(), cos.clone(), sin.clone()),
    );
}

#[test]
fn sums_of_products_are_added_in_place_without_harm() {
    let device = Device::flex().autodiff();
    let run = |f: &dyn Fn(Tensor<2>, Tensor<2>, Tensor<2>) -> Tensor<2>| {
        let y = tensor::<2>(1, [37, 20], &device).require_grad();
        let (a, b) = (tensor(2, [37, 4], &device).require_grad(), tensor(3, [4, 20], &device).require_grad());
        let out = f(y.clone(), a.clone(), b.clone());
        let gradients = (out.clone() * tensor(4, [37, 20], &device)).sum().backward();
        let mut all = vec![read(out), read(y.clone())];
        all.extend([&y, &a, &b].map(|leaf| read(leaf.grad(&gradients).unwrap())));
        all
    };
    for (found, expected) in run(&fused::add_matmul).iter().zip(run(&|y, a, b| y + a.matmul(b))) {
        assert!(relative_difference(found, &expected) < TOLERANCE);
    }
}

#[test]
fn cross_entropy_equals_the_plain_version() {
    let device = Device::flex();
    for [rows, classes] in [[1, 3], [40, 257], [5, 5000]] {
        let targets: Vec<i64> = (0..rows).map(|i| ((i * 7919) % classes) as i64).collect();
        let targets = Tensor::<1, Int>::from_data(TensorData::new(targets, [rows]), &device);
        compare(
            "cross_entropy",
            &[[rows, classes]],
            |x| fused::cross_entropy(x[0].clone().mul_scalar(30.0), targets.clone()),
            |x| plain::cross_entropy(x[0].clone().mul_scalar(30.0), targets.clone()),
        );
    }
}

#[test]
fn attention_equals_the_plain_version_under_every_mask() {
    // batch, length, past, heads, kv_heads, head_dim, window, packed documents
    for (batch, length, past, heads, kv_heads, head_dim, window, packed) in [
        (1, 1, 0, 1, 1, 4, None, false),
        (2, 24, 0, 4, 2, 16, None, false),
        (2, 24, 0, 4, 2, 16, Some(8), false),
        (1, 130, 0, 6, 2, 24, None, true),
        (2, 100, 0, 3, 1, 8, Some(70), true),
        (2, 3, 9, 4, 4, 8, None, false),
        (1, 1, 70, 2, 1, 8, Some(5), false),
    ] {
        let keys = past + length;
        let segment = |place: usize| match packed {
            // Padding in front, then documents of 40 tokens.
            true => (place + 20) as u32 / 40,
            false => 1,
        };
        let spec = AttentionSpec {
            scale: 1.7,
            window,
            query_segments: (0..batch * length).map(|i| segment(i % length + past)).collect(),
            key_segments: (0..batch * keys).map(|i| segment(i % keys)).collect(),
        };
        let (q, k) = ([batch, length, heads, head_dim], [batch, keys, kv_heads, head_dim]);
        compare(
            &format!("attention {length}+{past} window {window:?} packed {packed}"),
            &[q, k, k],
            |x| fused::attention(x[0].clone(), x[1].clone(), x[2].clone(), &spec),
            |x| plain::attention(x[0].clone(), x[1].clone(), x[2].clone(), &spec),
        );
    }
}

#[test]
fn sums_of_groups_and_repeated_updates_equal_the_plain_versions() {
    for (rows, columns, size) in [(1, 1, 1), (3, 5, 2), (37, 96, 4), (130, 72, 8), (9, 7, 33), (2, 9000, 3)] {
        compare(
            &format!("sum_groups {rows}x{columns} of {size}"),
            &[[rows, columns * size]],
            |x| fused::sum_groups(x[0].clone(), size),
            |x| plain::sum_groups(x[0].clone(), size),
        );
        compare(
            &format!("add_repeated {rows}x{columns} {size} times"),
            &[[rows, columns * size], [rows, columns]],
            |x| fused::add_repeated(x[0].clone(), x[1].clone(), size),
            |x| plain::add_repeated(x[0].clone(), x[1].clone(), size),
        );
    }
}
