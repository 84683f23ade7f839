//! `packed_linear` forward and input gradient beside the dense product of the same backend, in one run: operands in f32, and
//! in bf16 where the processor multiplies them.
//!
//! `cargo bench -p kiln-benches --bench packed_linear`; `-- 'forward/512x'` picks a part.

use std::time::Duration;

use burn::tensor::{Device, Distribution, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kiln::quant::{Compute, HostQuantizer, MinMax, PackedTensor, fused};

const SHAPES: [[usize; 2]; 2] = [[576, 1536], [4096, 4096]];
const ROWS: [usize; 3] = [1, 16, 512];
const SCHEMES: [&str; 16] = [
    "affine2:64",
    "affine3:64",
    "affine4:64",
    "affine4:64:sym",
    "affine8:64",
    "nf4:64",
    "nf4:64:double",
    "nf3:64",
    "affine2:8x4",
    "affine5:64",
    "affine6:64",
    "affine2:16:super4",
    "affine3:16:sym:super8",
    "affine4:32:super8",
    "affine5:32:super8",
    "affine6:16:sym:super8",
];

fn random(shape: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::random(shape, Distribution::Normal(0.0, 0.05), device)
}

/// Flex computes at once; the result only has to look used.
fn finish(y: Tensor<2>) {
    std::hint::black_box(y);
}

fn bench(c: &mut Criterion) {
    let device = Device::flex();
    for [d_input, d_output] in SHAPES {
        let dense = random([d_input, d_output], &device);
        let host: Vec<f32> = dense.clone().transpose().into_data().iter::<f32>().collect();
        let packed: Vec<(&str, PackedTensor)> = SCHEMES
            .iter()
            .map(|scheme| {
                let weight =
                    MinMax.quantize("w", &host, d_input, d_output, &scheme.parse().unwrap()).unwrap();
                (*scheme, PackedTensor::new(&weight, &device))
            })
            .collect();
        for rows in ROWS {
            let (x, dy) = (random([rows, d_input], &device), random([rows, d_output], &device));
            let flops = 2 * rows * d_input * d_output;
            for backward in [false, true] {
                let name = if backward { "backward" } else { "forward" };
                let mut group = c.benchmark_group(format!("{name}/{rows}x{d_input}x{d_output}"));
                group.throughput(Throughput::Elements(flops as u64));
                group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_millis(1500));
                group.sample_size(15);
                let native = |compute: &Compute| compute.is_native(&device);
                for compute in [Compute::F32, Compute::Bf16].into_iter().filter(native) {
                    group.bench_function(BenchmarkId::from_parameter(format!("dense {compute}")), |b| {
                        b.iter(|| match backward {
                            false => finish(fused::matmul(x.clone(), dense.clone(), compute)),
                            true => finish(fused::matmul(dy.clone(), dense.clone().transpose(), compute)),
                        });
                    });
                    for (scheme, weight) in &packed {
                        let mut weight = weight.clone();
                        weight.set_compute(compute);
                        group.bench_function(
                            BenchmarkId::from_parameter(format!("{scheme} {compute}")),
                            |b| {
                                b.iter(|| match backward {
                                    false => finish(weight.forward(x.clone())),
                                    true => finish(weight.backward(dy.clone())),
                                });
                            },
                        );
                    }
                }
                group.finish();
            }
        }
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
