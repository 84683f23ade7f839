//! One list of promises for every projection and every quantizer of this crate.

use burn::{
    module::{Param, ParamId},
    nn::LinearConfig,
    tensor::Device,
};
use kiln_quant_core::{
    Error, HostQuantizer, Hqq, LeastSquares, MinMax, MseClipped, PackedLinear, PackedTensor, QuantLinear,
    QuantScheme, quantizers::error,
};
use kiln_testkit::{check_projection, tensor, values};

use crate::ops::{CASES, random_weight};

#[test]
fn every_projection_computes_what_its_weight_and_bias_say() {
    let device = Device::flex();
    for bias in [false, true] {
        let dense = LinearConfig::new(40, 24).with_bias(bias).init(&device);
        check_projection(&format!("dense, bias {bias}"), &dense, &device);
        check_projection(&format!("dense slot, bias {bias}"), &QuantLinear::Dense(dense), &device);
        for &(scheme, d_input, d_output) in CASES {
            let weight = PackedTensor::new(&random_weight(scheme, d_input, d_output, 31), &device);
            let values = || Param::initialized(ParamId::new(), tensor(32, [d_output], &device));
            let packed = QuantLinear::Packed(PackedLinear { weight, bias: bias.then(values) });
            check_projection(&format!("{scheme}, bias {bias}"), &packed, &device);
        }
    }
}

fn quantizers() -> [(&'static str, Box<dyn HostQuantizer>); 4] {
    [
        ("min-max", Box::new(MinMax)),
        ("mse", Box::new(MseClipped::default())),
        ("least-squares", Box::new(LeastSquares::default())),
        ("hqq", Box::new(Hqq::default())),
    ]
}

const SCHEMES: [&str; 12] = [
    "affine2:32",
    "affine3:32",
    "affine4:32",
    "affine8:32",
    "affine4:32:int",
    "affine4:32:sym",
    "affine4:col:f16",
    "affine4:8x4",
    "nf3:32",
    "nf4:32",
    "nf4:32:double",
    "fp4:32",
];

/// Whether a quantizer makes a scheme; those that it doesn't must be refused.
fn makes(quantizer: &str, scheme: &str) -> bool {
    quantizer != "hqq" || (scheme.starts_with("affine") && !scheme.contains(":sym"))
}

/// The most that rounding may cost values spread evenly, relatively: a step of the grid over √12, and as much again for
/// codebooks, whose levels aren't spread evenly, for symmetric grids and for coarse scales.
fn bound(scheme: &QuantScheme) -> f64 {
    let step = 2.0 / f64::from((1u32 << scheme.bits()) - 1);
    2.0 * (step / 12f64.sqrt()) / (1.0 / 3f64.sqrt())
}

#[test]
fn every_quantizer_keeps_its_promises_on_every_scheme() {
    const SIZE: [usize; 2] = [96, 20];
    let weight = values(41, SIZE[0] * SIZE[1]);
    for (name, quantizer) in quantizers() {
        for text in SCHEMES {
            let what = format!("{name}, {text}");
            let scheme: QuantScheme = text.parse().unwrap();
            let quantize = |weight: &[f32]| quantizer.quantize("up_proj", weight, SIZE[0], SIZE[1], &scheme);
            if !makes(name, text) {
                assert!(matches!(quantize(&weight), Err(Error::Scheme { .. })), "{what}");
                continue;
            }
            let packed = quantize(&weight).unwrap();
            assert_eq!(
                (packed.d_input, packed.d_output, packed.scheme),
                (SIZE[0], SIZE[1], scheme),
                "{what}"
            );
            assert_eq!(quantize(&weight).unwrap(), packed, "{what}: the same again");
            let found = error(&weight, &packed).relative;
            assert!(found <= bound(&scheme), "{what}: {found} of {}", bound(&scheme));
            let zeros = quantize(&vec![0.0; weight.len()]).unwrap().dequantize();
            assert!(zeros.iter().all(|value| *value == 0.0), "{what}: zeros are exact");

            let mut bad = weight.clone();
            bad[7] = f32::NAN;
            let refused = quantize(&bad).unwrap_err();
            assert!(matches!(refused, Error::NotFinite { .. }), "{what}: {refused}");
            assert!(refused.to_string().contains("up_proj"), "{what}: {refused}");
            let refused = quantize(&weight[1..]).unwrap_err().to_string();
            assert!(refused.contains("up_proj"), "{what}: {refused}");
        }
    }
}
