//! The fused operations against their plain versions, values and gradients (Burn's own autodiff).

use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData};
use kiln_quant_core::{
    Compute,
    fused::{self, AttentionSpec, Drops, LowRankSpec, RotaryPairs, plain},
};
use kiln_testkit::{kept, read, relative_difference, tensor};

/// A device, and how far its results may be from Flex's plain ones, relatively.
#[derive(Clone, Copy)]
pub(crate) struct On<'a> {
    pub device: &'a Device,
    pub tolerance: f64,
}

/// Both versions sum in another order.
const TOLERANCE: f64 = 3e-6;

fn on_flex(check: impl Fn(On)) {
    check(On { device: &Device::flex(), tolerance: TOLERANCE });
}

/// Runs `found` on the device and `expected` on Flex, on leaves made from seeds, and compares values and all gradients.
fn compare<const D: usize, const E: usize>(
    on: On,
    what: &str,
    shapes: &[[usize; D]],
    found: impl Fn(&[Tensor<D>]) -> Tensor<E>,
    expected: impl Fn(&[Tensor<D>]) -> Tensor<E>,
) {
    let run = |f: &dyn Fn(&[Tensor<D>]) -> Tensor<E>, device: &Device| {
        let device = device.clone().autodiff();
        let leaves: Vec<Tensor<D>> =
            shapes.iter().enumerate().map(|(i, s)| tensor(i as u64, *s, &device).require_grad()).collect();
        let y = f(&leaves);
        let weight = tensor::<E>(77, y.dims(), &device);
        let gradients = (y.clone() * weight).sum().backward();
        let mut all = vec![read(y)];
        all.extend(leaves.iter().map(|leaf| read(leaf.grad(&gradients).unwrap())));
        all
    };
    let expected = run(&expected, &Device::flex());
    for (i, (found, expected)) in run(&found, on.device).iter().zip(expected).enumerate() {
        let difference = relative_difference(found, &expected);
        assert!(difference < on.tolerance, "{what}, output {i}: {difference:e}");
    }
}

#[test]
fn norm_activation_and_rotation_equal_the_plain_versions() {
    on_flex(check_elementwise);
}

pub(crate) fn check_elementwise(on: On) {
    for [rows, width] in [[1, 5], [3, 64], [70, 96], [33, 100]] {
        compare(
            on,
            "rms_norm",
            &[[rows, width], [1, width]],
            |x| fused::rms_norm(x[0].clone(), x[1].clone().reshape([width]), 1e-5),
            |x| plain::rms_norm(x[0].clone(), x[1].clone().reshape([width]), 1e-5),
        );
        // Far from 0 beside its spread, which a norm that doubts its mean would lose.
        let shifted = |x: &Tensor<2>| x.clone().add_scalar(3.0);
        compare(
            on,
            "layer_norm",
            &[[rows, width], [1, width]],
            |x| fused::layer_norm(shifted(&x[0]), x[1].clone().reshape([width]), 1e-5),
            |x| plain::layer_norm(shifted(&x[0]), x[1].clone().reshape([width]), 1e-5),
        );
        let wide = |x: &[Tensor<2>]| (x[0].clone().mul_scalar(20.0), x[1].clone());
        compare(
            on,
            "swiglu",
            &[[rows, width]; 2],
            |x| fused::swiglu(wide(x).0, wide(x).1, Compute::F32),
            |x| plain::swiglu(wide(x).0, wide(x).1),
        );
        compare(
            on,
            "geglu",
            &[[rows, width]; 2],
            |x| fused::geglu(wide(x).0, wide(x).1, Compute::F32),
            |x| plain::geglu(wide(x).0, wide(x).1),
        );
    }
    // All channels of a head, some, one pair.
    for (head_dim, half) in [(24, 12), (24, 5), (7, 1), (6, 3)] {
        for pairs in [RotaryPairs::Halves, RotaryPairs::Neighbours] {
            let table = |seed, x: &Tensor<4>| tensor::<2>(seed, [14, half], &x.device().without_autodiff());
            compare(
                on,
                &format!("rotate {half} pairs of {head_dim}, {pairs:?}"),
                &[[2, 7, 3, head_dim]],
                |x| fused::rotate(x[0].clone(), table(8, &x[0]), table(9, &x[0]), pairs),
                |x| plain::rotate(x[0].clone(), table(8, &x[0]), table(9, &x[0]), pairs),
            );
        }
    }
}

#[test]
fn gates_kept_rounded_give_the_gradients_of_rounded_gates() {
    let device = Device::flex();
    if !Compute::Bf16.keeps_rounded(&device) {
        kiln_testkit::skipped("this processor doesn't multiply bf16");
        return;
    }
    let shapes = [[70, 96]; 2];
    let rounded = |x: &Tensor<2>| x.clone().cast(FloatDType::BF16).cast(FloatDType::F32);
    let gradients = |f: &dyn Fn(Tensor<2>, Tensor<2>) -> Tensor<2>, round: bool| {
        let device = device.clone().autodiff();
        let leaf = |seed, shape| {
            let values = tensor::<2>(seed, shape, &device.clone().without_autodiff()).mul_scalar(4.0);
            Tensor::from_inner(if round { rounded(&values) } else { values }).require_grad()
        };
        let [gate, up] = [leaf(1, shapes[0]), leaf(2, shapes[1])];
        let y = f(gate.clone(), up.clone());
        let gradients = (y.clone() * tensor(3, shapes[0], &device)).sum().backward();
        (read(y), [gate, up].map(|leaf| read(leaf.grad(&gradients).unwrap())))
    };
    type Gated = fn(Tensor<2>, Tensor<2>, Compute) -> Tensor<2>;
    type Plain = fn(Tensor<2>, Tensor<2>) -> Tensor<2>;
    let pairs: [(Gated, Plain); 2] = [(fused::swiglu, plain::swiglu), (fused::geglu, plain::geglu)];
    for (gated, plain) in pairs {
        let (y, found) = gradients(&|gate, up| gated(gate, up, Compute::Bf16), false);
        let (exact, unrounded) = gradients(&|gate, up| gated(gate, up, Compute::F32), false);
        assert_eq!(y, exact);
        let (_, expected) = gradients(&|gate, up| plain(gate, up), true);
        for ((found, unrounded), expected) in found.iter().zip(&unrounded).zip(&expected) {
            assert!(relative_difference(found, expected) < TOLERANCE);
            assert!(relative_difference(found, unrounded) > 1e-4, "nothing was rounded");
        }
    }
}

#[test]
fn attention_of_rounded_operands_is_near_the_plain_version() {
    let device = Device::flex();
    if !Compute::Bf16.is_native(&device) {
        kiln_testkit::skipped("this processor doesn't multiply bf16");
        return;
    }
    // Rounded weights are off by up to 2^-9 of their size, as are gradients of scores.
    let on = On { device: &device, tolerance: 4e-3 };
    let spec = |compute, device: &Device| AttentionSpec {
        scale: 0.2,
        alibi: 0.0,
        softcap: None,
        window: None,
        compute,
        query_segments: fused::segments(&[0; 140], [2, 70], device),
        key_segments: fused::segments(&[0; 140], [2, 70], device),
    };
    let run = |x: &[Tensor<4>], compute| {
        let rounded = |x: &Tensor<4>| x.clone().cast(FloatDType::BF16).cast(FloatDType::F32);
        let [q, k, v] = [&x[0], &x[1], &x[2]].map(rounded);
        let device = q.device().without_autodiff();
        match compute {
            Compute::F32 => plain::attention(q, k, v, &spec(compute, &device)),
            _ => fused::attention(q, k, v, &spec(compute, &device)),
        }
    };
    compare(
        on,
        "attention in bf16",
        &[[2, 70, 6, 24], [2, 70, 2, 24], [2, 70, 2, 24]],
        |x| run(x, Compute::Bf16),
        |x| run(x, Compute::F32),
    );
}

#[test]
fn sums_of_products_are_added_in_place_without_harm() {
    on_flex(check_add_matmul);
}

pub(crate) fn check_add_matmul(on: On) {
    // The last inner size has no kernel of its own on GPUs.
    for [rows, columns, inner] in [[37, 20, 4], [1, 33, 1], [50, 70, 64], [9, 12, 65]] {
        let run = |device: &Device, f: &dyn Fn(Tensor<2>, Tensor<2>, Tensor<2>) -> Tensor<2>| {
            let device = device.clone().autodiff();
            let leaf = |seed, shape| tensor::<2>(seed, shape, &device).require_grad();
            let (y, a, b) = (leaf(1, [rows, columns]), leaf(2, [rows, inner]), leaf(3, [inner, columns]));
            let out = f(y.clone(), a.clone(), b.clone());
            let gradients = (out.clone() * tensor(4, [rows, columns], &device)).sum().backward();
            // `y` is still what it was.
            let mut all = vec![read(out), read(y.clone())];
            all.extend([&y, &a, &b].map(|leaf| read(leaf.grad(&gradients).unwrap())));
            all
        };
        let found = run(on.device, &|y, a, b| fused::add_matmul(y, a, b, Compute::F32));
        let expected = run(&Device::flex(), &|y, a, b| y + a.matmul(b));
        for (found, expected) in found.iter().zip(expected) {
            assert!(relative_difference(found, &expected) < on.tolerance, "{rows}x{inner}x{columns}");
        }
        compare(
            on,
            &format!("matmul {rows}x{inner}x{columns}"),
            &[[rows, inner], [columns, inner]],
            |x| fused::matmul(x[0].clone(), x[1].clone().transpose(), Compute::F32),
            |x| x[0].clone().matmul(x[1].clone().transpose()),
        );
    }
}

#[test]
fn low_rank_updates_equal_the_plain_version_with_and_without_dropout() {
    on_flex(check_low_rank);
}

pub(crate) fn check_low_rank(on: On) {
    let drops = Drops { key: [3, 9], threshold: 1 << 30 };
    // The last rank has no kernels of its own on GPUs.
    for [rows, inputs, rank, columns] in [[37, 20, 4, 33], [1, 5, 1, 7], [130, 700, 16, 90], [9, 70, 65, 12]]
    {
        for drops in [None, Some(drops)] {
            let spec = LowRankSpec { factor: 1.7, drops, compute: Compute::F32 };
            let leaves = |x: &[Tensor<2>]| (x[0].clone(), x[1].clone(), x[2].clone(), x[3].clone());
            compare(
                on,
                &format!("low_rank {rows}x{inputs}x{rank}x{columns}, drops {}", drops.is_some()),
                &[[rows, columns], [rows, inputs], [inputs, rank], [rank, columns]],
                |x| {
                    let (y, x, a, b) = leaves(x);
                    fused::low_rank(y, x, a, b, spec)
                },
                |x| {
                    let (y, x, a, b) = leaves(x);
                    plain::low_rank(y, x, a, b, spec)
                },
            );
        }
    }
}

#[test]
fn narrow_products_equal_plain_ones_whatever_side_is_narrow() {
    on_flex(check_narrow);
}

pub(crate) fn check_narrow(on: On) {
    // Sums that GPUs split over cubes, tiles that are not full, every stride.
    for [rows, inner, columns] in [[70, 2100, 3], [130, 500, 17], [65, 333, 64], [5, 900, 200], [300, 40, 70]]
    {
        for (turn_a, turn_b) in [(false, false), (false, true), (true, false), (true, true)] {
            let shape = |[a, b]: [usize; 2], turned: bool| if turned { [b, a] } else { [a, b] };
            let turn = |x: &Tensor<2>, turned: bool| if turned { x.clone().transpose() } else { x.clone() };
            compare(
                on,
                &format!("{rows}x{inner}x{columns} {turn_a} {turn_b}"),
                &[shape([rows, inner], turn_a), shape([inner, columns], turn_b)],
                |x| fused::matmul(turn(&x[0], turn_a), turn(&x[1], turn_b), Compute::F32),
                |x| turn(&x[0], turn_a).matmul(turn(&x[1], turn_b)),
            );
        }
    }
}

#[test]
fn a_backward_pass_goes_on_from_a_gradient() {
    on_flex(check_seeded);
}

pub(crate) fn check_seeded(on: On) {
    let device = on.device.clone().autodiff();
    let x = tensor::<2>(1, [5, 7], &device).require_grad();
    let gradient = tensor::<2>(2, [5, 7], on.device);
    let gradients = fused::seeded(x.clone() * 3.0, gradient.clone()).backward();
    let difference = relative_difference(&read(x.grad(&gradients).unwrap()), &read(gradient * 3.0));
    assert!(difference < 1e-7, "{difference:e}");
}

#[test]
fn what_is_dropped_is_known_from_the_key_alone() {
    on_flex(check_dropout);
}

pub(crate) fn check_dropout(on: On) {
    for (rows, columns, threshold) in [(1, 1, u32::MAX), (7, 13, 1 << 30), (300, 130, 1 << 31), (2, 2, 0)] {
        let drops = Drops { key: [7, 0xffff_fff0], threshold };
        let mask = kept(&drops.mask(rows * columns), [rows, columns], &Device::flex());
        compare(
            on,
            &format!("dropout {rows}x{columns}"),
            &[[rows, columns]],
            |x| fused::dropout(x[0].clone(), drops),
            |x| x[0].clone() * Tensor::from_inner(mask.clone()),
        );
    }
}

#[test]
fn cross_entropy_equals_the_plain_version() {
    on_flex(check_cross_entropy);
}

pub(crate) fn check_cross_entropy(on: On) {
    for [rows, classes] in [[1, 3], [40, 257], [5, 5000]] {
        let targets: Vec<i64> = (0..rows).map(|i| ((i * 7919) % classes) as i64).collect();
        let targets = |x: &Tensor<2>| {
            let device = x.device().without_autodiff();
            Tensor::<1, Int>::from_data(TensorData::new(targets.clone(), [rows]), &device)
        };
        compare(
            on,
            "cross_entropy",
            &[[rows, classes]],
            |x| fused::cross_entropy(x[0].clone().mul_scalar(30.0), targets(&x[0])),
            |x| plain::cross_entropy(x[0].clone().mul_scalar(30.0), targets(&x[0])),
        );
    }
}

#[test]
fn attention_equals_the_plain_version_under_every_mask() {
    on_flex(check_attention);
}

pub(crate) fn check_attention(on: On) {
    // Neither, both, one of them.
    for (alibi, softcap) in [(0.0, None), (0.7, Some(3.0)), (1.0, None), (0.0, Some(2.0))] {
        check_attention_with(on, alibi, softcap);
    }
}

fn check_attention_with(on: On, alibi: f32, softcap: Option<f32>) {
    // batch, length, past, heads, kv_heads, head_dim, window, packed documents
    for (batch, length, past, heads, kv_heads, head_dim, window, packed) in [
        (1, 1, 0, 1, 1, 4, None, false),
        (2, 24, 0, 4, 2, 16, None, false),
        (2, 24, 0, 4, 2, 16, Some(8), false),
        (1, 130, 0, 6, 2, 24, None, true),
        (2, 100, 0, 3, 1, 8, Some(70), true),
        (2, 3, 9, 4, 4, 8, None, false),
        (1, 1, 70, 2, 1, 8, Some(5), false),
        // A few queries whose keys GPUs divide.
        (2, 2, 300, 4, 2, 80, None, false),
        (1, 3, 200, 2, 1, 8, Some(150), true),
        // So many heads that GPUs, too, take several blocks of queries.
        (2, 150, 0, 128, 64, 4, Some(70), true),
        (1, 130, 3, 256, 32, 4, None, true),
        // Heads whose width is no power of two.
        (2, 130, 0, 8, 2, 96, None, false),
        (1, 130, 0, 4, 2, 72, None, true),
    ] {
        let keys = past + length;
        let segment = |place: usize| match packed {
            // Padding in front, then documents of 40 tokens.
            true => (place + 20) as u32 / 40,
            false => 1,
        };
        let queries: Vec<u32> = (0..batch * length).map(|i| segment(i % length + past)).collect();
        let seen: Vec<u32> = (0..batch * keys).map(|i| segment(i % keys)).collect();
        let spec = |x: &Tensor<4>| {
            let device = x.device().without_autodiff();
            AttentionSpec {
                scale: 1.7,
                alibi,
                softcap,
                window,
                compute: Compute::F32,
                query_segments: fused::segments(&queries, [batch, length], &device),
                key_segments: fused::segments(&seen, [batch, keys], &device),
            }
        };
        let (q, k) = ([batch, length, heads, head_dim], [batch, keys, kv_heads, head_dim]);
        compare(
            on,
            &format!("attention {length}+{past} window {window:?} packed {packed} {alibi} {softcap:?}"),
            &[q, k, k],
            |x| fused::attention(x[0].clone(), x[1].clone(), x[2].clone(), &spec(&x[0])),
            |x| plain::attention(x[0].clone(), x[1].clone(), x[2].clone(), &spec(&x[0])),
        );
        if past > 0 && alibi == 0.0 && softcap.is_none() {
            // A cache has room behind each row of the batch: of both, of keys alone.
            let with_room = [batch, keys + 5, kv_heads, head_dim];
            let of_keys = |x: &Tensor<4>| x.clone().narrow(1, 0, keys);
            for of_values in [with_room, k] {
                compare(
                    on,
                    &format!("attention {length}+{past} with room, window {window:?}"),
                    &[q, with_room, of_values],
                    |x| fused::attention(x[0].clone(), of_keys(&x[1]), of_keys(&x[2]), &spec(&x[0])),
                    |x| plain::attention(x[0].clone(), of_keys(&x[1]), of_keys(&x[2]), &spec(&x[0])),
                );
            }
        }
        // Sinks below, beside and above the scores.
        let sinks = |x: &Tensor<4>| x.clone().reshape([heads]).mul_scalar(3.0);
        compare(
            on,
            &format!("sinks {length}+{past} window {window:?} packed {packed} {alibi} {softcap:?}"),
            &[q, k, k, [1, 1, 1, heads]],
            |x| {
                let [q, k, v] = [0, 1, 2].map(|i| x[i].clone());
                fused::attention_with_sinks(q, k, v, sinks(&x[3]), &spec(&x[0]))
            },
            |x| {
                let [q, k, v] = [0, 1, 2].map(|i| x[i].clone());
                plain::attention_with_sinks(q, k, v, sinks(&x[3]), &spec(&x[0]))
            },
        );
    }
}

#[test]
fn sums_of_groups_and_repeated_updates_equal_the_plain_versions() {
    on_flex(check_groups);
}

pub(crate) fn check_groups(on: On) {
    for (rows, columns, size) in [(1, 1, 1), (3, 5, 2), (37, 96, 4), (130, 72, 8), (9, 7, 33), (2, 9000, 3)] {
        compare(
            on,
            &format!("sum_groups {rows}x{columns} of {size}"),
            &[[rows, columns * size]],
            |x| fused::sum_groups(x[0].clone(), size),
            |x| plain::sum_groups(x[0].clone(), size),
        );
        compare(
            on,
            &format!("add_repeated {rows}x{columns} {size} times"),
            &[[rows, columns * size], [rows, columns]],
            |x| fused::add_repeated(x[0].clone(), x[1].clone(), size),
            |x| plain::add_repeated(x[0].clone(), x[1].clone(), size),
        );
    }
}
