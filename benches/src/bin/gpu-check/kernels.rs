//! Kernels of a 1B model's shapes beside the least they must move or multiply.

use std::time::Instant;

use burn::tensor::{Device, Int, Tensor};
use kiln::quant::{
    Compute, LogitSpec, PackedTensor,
    fused::{self, AdamWStep, AttentionSpec, Drops, RotaryPairs},
};

use crate::{
    Result, random,
    synthetic::{Words, packed},
};

/// Timed runs, after two that are not.
const RUNS: u32 = 10;

struct Bench<'a> {
    device: &'a Device,
    /// Measured: bytes a second of a copy, multiplications and additions a second of a square product.
    ceilings: [f64; 2],
}

impl Bench<'_> {
    fn time<T>(&self, f: &dyn Fn() -> T) -> Result<f64> {
        let sync = || self.device.sync().map_err(|error| format!("{error:?}"));
        for _ in 0..2 {
            f();
        }
        sync()?;
        let start = Instant::now();
        for _ in 0..RUNS {
            f();
        }
        sync()?;
        Ok(start.elapsed().as_secs_f64() / f64::from(RUNS))
    }

    /// A row of the table: `bytes` and `flops` are what it must at least move and do.
    fn row<T>(&self, what: &str, bytes: f64, flops: f64, f: impl Fn() -> T) -> Result<()> {
        let seconds = self.time(&f)?;
        let floor = (bytes / self.ceilings[0]).max(flops / self.ceilings[1]);
        let (gigabytes, tera) = (bytes / seconds / 1e9, flops / seconds / 1e12);
        println!(
            "{what:44} {:10.1} us {gigabytes:8.0} GB/s {tera:8.2} TFLOP/s {:7.1} % of the ceiling",
            seconds * 1e6,
            100.0 * floor / seconds
        );
        Ok(())
    }
}

pub(crate) fn run(device: &Device, compute: Compute) -> Result<()> {
    let mut bench = Bench { device, ceilings: [f64::INFINITY; 2] };
    let x = random([1 << 13, 1 << 13], device);
    let copied = bench.time(&|| x.clone().add_scalar(1.0))?;
    let side = 4096;
    let (a, b) = (random([side, side], device), random([side, side], device));
    let flops = 2.0 * (side as f64).powi(3);
    let product = bench.time(&|| fused::matmul(a.clone(), b.clone(), compute))?;
    bench.ceilings = [8.0 * (1u64 << 26) as f64 / copied, flops / product];
    let [bytes, multiplied] = bench.ceilings;
    println!(
        "measured ceilings: {:.0} GB/s elementwise, {:.1} TFLOP/s in {compute} ({side} cubed, rounding included)",
        bytes / 1e9,
        multiplied / 1e12
    );
    drop((x, a, b));

    let rows = 4096;
    for [d_input, d_output] in [[2048, 8192], [8192, 2048], [2048, 2048], [2048, 512]] {
        let mut weight: PackedTensor = packed([d_input, d_output], &mut Words(7), device)?;
        let codes = 0.5625 * (d_input * d_output) as f64;
        bench.row(
            &format!("unpack {d_input}x{d_output} to f32"),
            codes + 4.0 * (d_input * d_output) as f64,
            0.0,
            || weight.dequantize(),
        )?;
        for &rounding in roundings(compute) {
            weight.set_compute(rounding);
            let few: &[usize] = if rounding == compute { &[64, 16, 4, 1] } else { &[] };
            for &rows in [rows].iter().chain(few) {
                let flops = 2.0 * (rows * d_input * d_output) as f64;
                let moved = codes + 4.0 * (rows * (d_input + d_output)) as f64;
                let x = random([rows, d_input], device);
                bench.row(&format!("packed {rows}x{d_input}x{d_output} {rounding}"), moved, flops, || {
                    weight.forward(x.clone())
                })?;
            }
            let flops = 2.0 * (rows * d_input * d_output) as f64;
            let dy = random([rows, d_output], device);
            bench.row(&format!("packed dx {rows}x{d_input}x{d_output} {rounding}"), 0.0, flops, || {
                weight.backward(dy.clone())
            })?;
        }
    }
    others(&bench, rows, compute)
}

/// Unrounded operands, and those asked for.
fn roundings(compute: Compute) -> &'static [Compute] {
    match compute {
        Compute::F32 => &[Compute::F32],
        Compute::Bf16 => &[Compute::F32, Compute::Bf16],
        Compute::F16 => &[Compute::F32, Compute::F16],
    }
}

fn others(bench: &Bench, rows: usize, compute: Compute) -> Result<()> {
    let device = bench.device;
    let (width, inner, rank) = (2048, 8192, 16);
    let moved = |tensors: usize, width: usize| (tensors * 4 * rows * width) as f64;
    let (x, y) = (random([rows, width], device), random([rows, inner], device));
    let weight = Tensor::<1>::ones([width], device);
    bench.row("rms_norm 4096x2048", moved(2, width), 0.0, || {
        fused::rms_norm(x.clone(), weight.clone(), 1e-5)
    })?;
    bench.row("swiglu 4096x8192", moved(3, inner), 0.0, || {
        fused::swiglu(y.clone(), y.clone(), Compute::F32)
    })?;
    let drops = Drops { key: [1, 2], threshold: 1 << 28 };
    bench.row("dropout 4096x8192", moved(2, inner), 0.0, || fused::dropout(y.clone(), drops))?;
    let heads = random([2, 2048, 32, 64], device);
    let (cos, sin) = (random([rows, 32], device), random([rows, 32], device));
    bench.row("rotate 4096x32x64", moved(2, width), 0.0, || {
        fused::rotate(heads.clone(), cos.clone(), sin.clone(), RotaryPairs::Halves)
    })?;

    for (what, a, b) in [
        ("x A", [rows, width], [width, rank]),
        ("x A, wide", [rows, inner], [inner, rank]),
        ("dy Bt", [rows, inner], [inner, rank]),
        ("xt d", [width, rows], [rows, rank]),
        ("lowt dy", [rank, rows], [rows, inner]),
        ("d At", [rows, rank], [rank, width]),
    ] {
        // Transposed as the backward pass has them.
        let turned = |shape: [usize; 2]| random([shape[1], shape[0]], device).transpose();
        let left = if what.contains("xt") || what.contains("lowt") { turned(a) } else { random(a, device) };
        let right = if what.contains("Bt") || what.contains("At") { turned(b) } else { random(b, device) };
        let bytes = 4.0 * (a[0] * a[1] + b[0] * b[1] + a[0] * b[1]) as f64;
        let flops = 2.0 * (a[0] * a[1] * b[1]) as f64;
        for &compute in roundings(compute) {
            let what = format!("low rank {what} {}x{}x{} {compute}", a[0], a[1], b[1]);
            bench.row(&what, bytes, flops, || fused::matmul(left.clone(), right.clone(), compute))?;
        }
    }
    let (low, b) = (random([rows, rank], device), random([rank, inner], device));
    bench.row("low rank update 4096x16x8192", moved(2, inner), 0.0, || {
        fused::add_matmul(y.clone(), low.clone(), b.clone(), compute)
    })?;

    let classes = 128_256;
    let table = random([classes, width], device);
    let part = random([256, width], device);
    let flops = 2.0 * (256 * width * classes) as f64;
    bench.row("head 256x2048x128256", 4.0 * (classes * width) as f64, flops, || {
        fused::matmul(part.clone(), table.clone().transpose(), compute)
    })?;
    let logits = random([256, classes], device);
    let targets = Tensor::<1, Int>::zeros([256], device);
    bench.row("cross_entropy 256x128256", 2.0 * 4.0 * (256 * classes) as f64, 0.0, || {
        fused::cross_entropy(logits.clone(), targets.clone())
    })?;

    // By so many ids at once as 128 rows of logits hold; three products where the head is unpacked for every few rows takes two.
    let head = packed([width, classes], &mut Words(9), device)?;
    let (x, targets) = (random([rows, width], device), Tensor::<1, Int>::zeros([rows], device));
    let spec = LogitSpec { factor: 1.0, softcap: None };
    let flops = 3.0 * 2.0 * (rows * width * classes) as f64;
    bench.row("packed head and loss 4096x2048x128256", 0.0, flops, || {
        head.cross_entropy(x.clone(), targets.clone(), None, spec, 128 * classes / rows)
    })?;
    for keys in [512, 4096] {
        let cached = random([1, keys, 8, 64], device);
        let spec = AttentionSpec {
            scale: 0.125,
            alibi: 0.0,
            softcap: None,
            window: None,
            compute,
            query_segments: fused::segments(&[1], [1, 1], device),
            key_segments: fused::segments(&vec![1; keys], [1, keys], device),
        };
        let query = random([1, 1, 32, 64], device);
        let bytes = (2 * 4 * keys * 8 * 64) as f64;
        bench.row(&format!("attention of one query, {keys} keys"), bytes, 0.0, || {
            fused::attention(query.clone(), cached.clone(), cached.clone(), &spec)
        })?;
    }

    let (batch, length) = (2, 2048);
    let device = &device.clone().autodiff();
    let q = random([batch, length, 32, 64], device).require_grad();
    let k = random([batch, length, 8, 64], device).require_grad();
    let segments = fused::segments(&vec![1; batch * length], [batch, length], bench.device);
    let spec = AttentionSpec {
        scale: 0.125,
        alibi: 0.0,
        softcap: None,
        window: None,
        compute,
        query_segments: segments.clone(),
        key_segments: segments,
    };
    // Half of the scores are seen.
    let flops = 2.0 * 2.0 * (batch * 32 * length * length / 2 * 64) as f64;
    bench.row("attention 2x2048x32x64", 0.0, flops, || {
        fused::attention(q.clone().inner(), k.clone().inner(), k.clone().inner(), &spec)
    })?;
    let gradient = q.clone().inner();
    bench.row("attention and its backward pass", 0.0, 3.5 * flops, || {
        let out = fused::attention(q.clone(), k.clone(), k.clone(), &spec);
        fused::seeded(out, gradient.clone()).backward()
    })?;
    let weights = random([2048, 16], bench.device);
    bench.row("adamw 2048x16", 4.0 * 7.0 * (2048 * 16) as f64, 0.0, || {
        let (betas, corrections) = ([0.9, 0.99], [0.1, 0.01]);
        let step = AdamWStep { lr: 1e-3, betas, corrections, eps: 1e-8, decay: 1.0, factor: 1.0 };
        let averages = [weights.clone(), weights.clone()];
        fused::has_adamw(&weights).then(|| fused::adamw(weights.clone(), weights.clone(), averages, step))
    })?;
    println!();
    Ok(())
}
