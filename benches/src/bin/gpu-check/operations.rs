//! Every operation and its gradients on the device, beside the same on the CPU in f32.

use crate::{Result, synthetic::Words};
use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData};
use kiln::quant::{
    Compute, HostQuantizer, LogitSpec, MinMax, PackedTensor,
    fused::{self, AttentionSpec, Drops, LowRankSpec, RotaryPairs},
};

/// Numbers between -1 and 1 made from a seed.
fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut words = Words((seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    (0..count).map(|_| words.next() as f32 / (1u32 << 31) as f32 - 1.0).collect()
}

fn tensor<const D: usize>(seed: u64, shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(numbers(seed, shape.iter().product()), shape), device)
}

fn read<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// The norm of the difference over the norm of what is expected.
fn relative_difference(found: &[f32], expected: &[f32]) -> f64 {
    let norm =
        |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let difference = norm(&mut found.iter().zip(expected).map(|(a, b)| a - b));
    difference / norm(&mut expected.iter().copied()).max(f64::MIN_POSITIVE)
}

/// Values and gradients of `f` on leaves made from seeds.
fn values<const D: usize, const E: usize>(
    device: &Device,
    shapes: &[[usize; D]],
    f: &dyn Fn(&[Tensor<D>]) -> Tensor<E>,
) -> Vec<Vec<f32>> {
    let device = device.clone().autodiff();
    let leaves: Vec<Tensor<D>> =
        shapes.iter().enumerate().map(|(i, s)| tensor(i as u64, *s, &device).require_grad()).collect();
    let y = f(&leaves);
    let weight = tensor::<E>(77, y.dims(), &device);
    let gradients = (y.clone() * weight).sum().backward();
    let mut all = vec![read(y)];
    all.extend(leaves.iter().map(|leaf| leaf.grad(&gradients).map(read).unwrap_or_default()));
    all
}

fn compare<const D: usize, const E: usize>(
    device: &Device,
    what: &str,
    shapes: &[[usize; D]],
    f: impl Fn(&[Tensor<D>]) -> Tensor<E>,
) {
    let expected = values(&Device::flex(), shapes, &f);
    let found = values(device, shapes, &f);
    let differences: Vec<f64> =
        found.iter().zip(&expected).map(|(found, expected)| relative_difference(found, expected)).collect();
    let shown: Vec<String> = differences.iter().map(|difference| format!("{difference:.1e}")).collect();
    println!("{what:44} {}", shown.join("  "));
}

pub(crate) fn run(device: &Device, compute: Compute) -> Result<()> {
    println!("relative differences from the CPU's f32: result, then gradient of each input");
    for scheme in [
        "affine2:64",
        "affine3:64",
        "affine4:64",
        "affine8:32:sym:f16",
        "nf4:64:double",
        "affine3:24",
        "affine5:32",
        "affine2:16:super4",
        "affine3:16:sym:super8",
        "affine4:32:super8",
        "affine6:16:sym:super8",
        "iq4nl:32:super8",
        "mxfp4:32:bf16",
    ] {
        let [d_input, d_output] = [320, 192];
        let weight: Vec<f32> = numbers(5, d_input * d_output);
        let host = MinMax.quantize("w", &weight, d_input, d_output, &scheme.parse()?)?;
        for rows in [3, 9, 130] {
            for compute in [Compute::F32, compute] {
                compare(
                    device,
                    &format!("packed {scheme}, {rows} rows, {compute}"),
                    &[[rows, d_input]],
                    |x| {
                        let mut weight = PackedTensor::new(&host, &x[0].device());
                        if x[0].device().without_autodiff() == *device {
                            weight.set_compute(compute);
                        }
                        weight.forward(x[0].clone())
                    },
                );
            }
        }
    }
    let wide = [[70, 2048], [1, 2048]];
    compare(device, "rms_norm", &wide, |x| fused::rms_norm(x[0].clone(), x[1].clone().reshape([2048]), 1e-5));
    compare(device, "layer_norm", &wide, |x| {
        fused::layer_norm(x[0].clone() + 3.0, x[1].clone().reshape([2048]), 1e-5)
    });
    let pair = [[70, 2048]; 2];
    compare(device, "swiglu", &pair, |x| fused::swiglu(x[0].clone() * 8.0, x[1].clone(), Compute::F32));
    compare(device, "geglu", &pair, |x| fused::geglu(x[0].clone() * 8.0, x[1].clone(), Compute::F32));
    for (half, pairs) in [(32, RotaryPairs::Halves), (12, RotaryPairs::Neighbours)] {
        compare(device, &format!("rotate {half} pairs of 64, {pairs:?}"), &[[2, 35, 8, 64]], |x| {
            let table = |seed| tensor::<2>(seed, [70, half], &x[0].device().without_autodiff());
            fused::rotate(x[0].clone(), table(8), table(9), pairs)
        });
    }
    compare(device, "dropout", &[[70, 2047]], |x| {
        fused::dropout(x[0].clone(), Drops { key: [3, u32::MAX], threshold: 1 << 30 })
    });
    compare(device, "cross_entropy", &[[40, 32003]], |x| {
        let targets: Vec<i64> = (0..40).map(|i| i * 7919 % 32003).collect();
        let targets = Tensor::<1, Int>::from_data(targets.as_slice(), &x[0].device().without_autodiff());
        fused::cross_entropy(x[0].clone() * 20.0, targets)
    });
    // Sizes around those of tiles; forwards and backwards, plain and transposed, every layout of both operands occurs.
    for [m, k, n] in
        [[256, 128, 256], [200, 72, 136], [330, 1000, 264], [64, 64, 520], [130, 96, 72], [1000, 1032, 64]]
    {
        let name = |layout: &str| format!("product {m}x{k}x{n}{layout}, {compute}");
        compare(device, &name(""), &[[m, k], [k, n]], |x| fused::matmul(x[0].clone(), x[1].clone(), compute));
        compare(device, &name(" transposed"), &[[k, m], [n, k]], |x| {
            fused::matmul(x[0].clone().transpose(), x[1].clone().transpose(), compute)
        });
    }
    // Stacks of products whose rows begin at multiples of 16, 8 and 4 bytes.
    for compute in [Compute::F32, compute] {
        for [m, k, n] in [[128, 520, 72], [130, 520, 72], [129, 516, 64], [130, 64, 130], [72, 130, 96]] {
            for (turn_a, turn_b) in [(false, false), (false, true), (true, false), (true, true)] {
                let turned =
                    |x: &Tensor<3>, turn: bool| if turn { x.clone().swap_dims(1, 2) } else { x.clone() };
                let sizes = |[a, b]: [usize; 2], turn: bool| if turn { [5, b, a] } else { [5, a, b] };
                let name = format!("stack of {m}x{k}x{n}, turned {turn_a}, {turn_b}, {compute}");
                let dtype = match compute {
                    Compute::F32 => FloatDType::F32,
                    Compute::Bf16 => FloatDType::BF16,
                    Compute::F16 => FloatDType::F16,
                };
                compare(device, &name, &[sizes([m, k], turn_a), sizes([k, n], turn_b)], |x| {
                    let rounded = |x: Tensor<3>| match x.device().without_autodiff() == *device {
                        true => x.cast(dtype),
                        false => x,
                    };
                    let [a, b] = [turned(&x[0], turn_a), turned(&x[1], turn_b)].map(rounded);
                    a.matmul(b).cast(FloatDType::F32)
                });
            }
        }
    }
    head_loss(device)?;
    // Ranks that go on with the packed product, and some that don't; rows below, at and above a tile.
    let [d_input, d_output] = [328, 200];
    let host =
        MinMax.quantize("w", &numbers(5, d_input * d_output), d_input, d_output, &"affine4:64".parse()?)?;
    for (rows, rank, drops) in [
        (3, 16, false),
        (64, 8, false),
        (130, 16, false),
        (130, 16, true),
        (257, 40, false),
        (256, 64, false),
        (130, 12, false),
    ] {
        for compute in [Compute::F32, compute] {
            let name = format!("packed and update, {rows} rows, rank {rank}, drops {drops}, {compute}");
            compare(device, &name, &[[rows, d_input], [d_input, rank], [rank, d_output]], |x| {
                let mut weight = PackedTensor::new(&host, &x[0].device());
                if x[0].device().without_autodiff() == *device {
                    weight.set_compute(compute);
                }
                let drops = drops.then_some(Drops { key: [3, 9], threshold: 1 << 30 });
                let update = LowRankSpec { factor: 1.7, drops, compute };
                weight.forward_low_rank(x[0].clone(), x[1].clone(), x[2].clone(), update)
            });
        }
    }
    for compute in [Compute::F32, compute] {
        compare(device, &format!("low-rank update, {compute}"), &[[130, 2048]], |x| {
            let (a, b) = (tensor(8, [2048, 16], &x[0].device()), tensor(9, [16, 2048], &x[0].device()));
            let low = fused::matmul(x[0].clone(), a, compute);
            fused::add_matmul(x[0].clone(), low, b, compute)
        });
        for (length, past, head_dim, window, alibi, softcap) in [
            (300, 0, 64, None, 0.0, None),
            (300, 0, 64, Some(100), 0.0, None),
            (300, 0, 64, Some(100), 1.0, Some(5.0)),
            (1, 77, 64, None, 0.0, None),
            (2, 1200, 64, None, 1.0, Some(5.0)),
            (3, 1200, 80, Some(1100), 0.0, None),
            (70, 33, 16, Some(3), 0.0, None),
            (130, 0, 96, None, 1.0, None),
            (129, 100, 128, Some(70), 0.0, Some(5.0)),
            // Without a kernel that keeps scores on the chip.
            (130, 0, 72, None, 0.0, None),
        ] {
            let (q, k) = ([2, length, 32, head_dim], [2, past + length, 8, head_dim]);
            compare(
                device,
                &format!(
                    "attention {length}+{past} of {head_dim}, {window:?}, {alibi}, {softcap:?}, {compute}"
                ),
                &[q, k, k, [1, 1, 1, 32]],
                |x| {
                    let device = x[0].device().without_autodiff();
                    let segment = |place: usize| u32::from(place >= 150) + 1;
                    let segments = |first: usize, count: usize| {
                        let row: Vec<u32> = (first..first + count).map(segment).collect();
                        fused::segments(&row.repeat(2), [2, count], &device)
                    };
                    let spec = AttentionSpec {
                        scale: 0.6,
                        alibi,
                        softcap,
                        window,
                        compute,
                        query_segments: segments(past, length),
                        key_segments: segments(0, past + length),
                    };
                    let [q, k, v] = [0, 1, 2].map(|i| x[i].clone());
                    let sinks = x[3].clone().reshape([32]);
                    fused::attention_with_sinks(q, k, v, sinks, &spec)
                },
            );
        }
    }
    println!();
    Ok(())
}

/// A packed head's loss, a part of the vocabulary at a time, beside all of it at once on the CPU.
fn head_loss(device: &Device) -> Result<()> {
    let [rows, width, vocabulary] = [70, 328, 5000];
    let head = MinMax.quantize(
        "head",
        &numbers(6, width * vocabulary),
        width,
        vocabulary,
        &"affine4:64".parse()?,
    )?;
    let targets: Vec<i64> = (0..rows).map(|row| (row * 7919 % vocabulary) as i64).collect();
    for softcap in [None, Some(5.0)] {
        let spec = LogitSpec { factor: 0.2, softcap };
        let targets = |device: &Device| Tensor::<1, Int>::from_data(targets.as_slice(), device);
        let cpu = Device::flex();
        let x = tensor::<2>(1, [rows, width], &cpu.clone().autodiff()).require_grad();
        let logits = PackedTensor::new(&head, &cpu).forward(x.clone()) * spec.factor;
        let logits = match softcap {
            Some(cap) => (logits / cap).tanh() * cap,
            None => logits,
        };
        let losses = fused::cross_entropy(logits, targets(&cpu));
        let gradients = losses.clone().sum().backward();
        let expected = [read(losses), read(x.grad(&gradients).expect("a gradient"))];
        let (losses, dx) = PackedTensor::new(&head, device).cross_entropy(
            tensor(1, [rows, width], device),
            targets(device),
            None,
            spec,
            700,
        );
        let differences =
            [relative_difference(&read(losses), &expected[0]), relative_difference(&read(dx), &expected[1])];
        println!("{:44} {:.1e}  {:.1e}", format!("packed head, {softcap:?}"), differences[0], differences[1]);
    }
    Ok(())
}
