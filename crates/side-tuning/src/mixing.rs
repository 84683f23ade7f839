//! Where the two networks meet: gates before the side blocks, the mix before the head.

use burn::{
    module::{Module, Param},
    tensor::{Tensor, activation::sigmoid},
};

use crate::{GateConfig, GateShape, HeadMix, Share, init::Init};

/// `m = (1 - beta) downsampled + beta side`, `beta = sigmoid(gamma / temperature)`.
///
/// Gamma is f32 whatever the backbone computes in: near 0.5 the next bf16 number is further away than a step goes.
#[derive(Module, Debug)]
pub struct Gate {
    /// `[1]` or `[side width]`.
    pub gamma: Param<Tensor<1>>,
    temperature: f64,
}

impl Gate {
    pub(crate) fn new(config: &GateConfig, width: usize, init: &Init) -> Self {
        Self { gamma: init.full(config.shape.size(width), config.init), temperature: config.temperature }
    }

    /// # Shapes
    /// Both and the result `[.., side width]`.
    pub fn forward<const D: usize>(&self, downsampled: Tensor<D>, side: Tensor<D>) -> Tensor<D> {
        let beta = sigmoid(self.gamma.val().div_scalar(self.temperature));
        downsampled.clone() + (side - downsampled) * beta.unsqueeze()
    }
}

/// What the head sees; see [`HeadMix`].
#[derive(Module, Debug)]
pub struct Mixer {
    /// Alpha or theta, `[1]` or `[width]`; in f32 as [`Gate::gamma`] is.
    pub alpha: Option<Param<Tensor<1>>>,
    #[module(skip)]
    kind: HeadMix,
}

impl Mixer {
    pub(crate) fn new(kind: HeadMix, shape: GateShape, width: usize, init: &Init) -> Self {
        let alpha = match kind {
            HeadMix::Raw { init: value } | HeadMix::Sigmoid { init: value, .. } => {
                Some(init.full(shape.size(width), value))
            }
            HeadMix::Additive | HeadMix::SideOnly => None,
        };
        Self { alpha, kind }
    }

    /// Mixes the side's state with the backbone's, which is asked for only if it counts.
    ///
    /// # Shapes
    /// Both and the result `[.., width]`.
    pub fn forward<const D: usize>(
        &self,
        backbone: impl FnOnce() -> Tensor<D>,
        side: Tensor<D>,
    ) -> Tensor<D> {
        // Two products rather than one of the difference: at alpha 1 the result is the backbone's bit for bit.
        let mix = |share: Tensor<1>, a: Tensor<D>, b: Tensor<D>| {
            a * share.clone().unsqueeze() + b * share.neg().add_scalar(1.0).unsqueeze()
        };
        let alpha = || self.alpha.as_ref().expect("an alpha, made with the mixer").val();
        match self.kind {
            HeadMix::Raw { .. } => mix(alpha(), backbone(), side),
            HeadMix::Sigmoid { share: Share::Backbone, .. } => mix(sigmoid(alpha()), backbone(), side),
            HeadMix::Sigmoid { share: Share::Side, .. } => mix(sigmoid(alpha()), side, backbone()),
            HeadMix::Additive => backbone() + side,
            HeadMix::SideOnly => side,
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use kiln_testkit::{assert_close, read};

    use super::*;
    use crate::vectors::{floats, open, tensor2, vector};

    #[test]
    fn gates_and_their_gradients_are_those_of_the_reference() {
        let (file, device) = (open("side_tuning_gate.json"), Device::flex());
        let tolerance = file["tolerance"].as_f64().unwrap() as f32;
        let input = |name: &str| tensor2(&file["inputs"][name], &device);
        for (name, case) in file["cases"].as_object().unwrap() {
            let gate = Gate { gamma: vector(&case["gamma"], &device), temperature: 1.0 }.train();
            let mix = gate.forward(input("down_hf"), input("hg_prev"));
            assert_close(name, &read(mix.clone().inner()), &floats(&case["mix"]), tolerance);
            let gradients = (mix * Tensor::from_inner(input("G"))).sum().backward();
            let found = read(gate.gamma.grad(&gradients).unwrap());
            assert_close(&format!("{name} gradient"), &found, &floats(&case["grad_gamma"]), tolerance);
        }
        for (name, case) in file["lst"].as_object().unwrap() {
            let alpha: f64 = name.strip_prefix("alpha_").unwrap().parse().unwrap();
            let config = GateConfig { init: alpha, ..crate::SideConfig::lst().gate };
            assert_eq!(config.temperature, case["T"].as_f64().unwrap());
            let gate = Gate::new(&config, 4, &Init { seed: 0, device: device.clone() });
            let mix = gate.forward(input("down_hf"), input("hg_prev"));
            assert_close(name, &read(mix), &floats(&case["mix"]), tolerance);
        }
    }

    #[test]
    fn mixes_and_their_gradients_are_those_of_the_reference() {
        let (file, device) = (open("side_tuning_head_mix.json"), Device::flex());
        let tolerance = file["tolerance"].as_f64().unwrap() as f32;
        let input = |name: &str| tensor2(&file["inputs"][name], &device);
        for (name, case) in file["cases"].as_object().unwrap() {
            let init = 0.0;
            let kind = match case["mode"].as_str().unwrap() {
                "raw" => HeadMix::Raw { init },
                "sigmoid_backbone" => HeadMix::Sigmoid { init, share: Share::Backbone },
                "sigmoid_side" => HeadMix::Sigmoid { init, share: Share::Side },
                "additive" => HeadMix::Additive,
                other => panic!("{other}"),
            };
            let additive = kind == HeadMix::Additive;
            let alpha = (!additive).then(|| vector(&case["alpha"], &device));
            let mixer = Mixer { alpha, kind }.train();
            // Additive mixes start with an upsampling of zero.
            let side = if additive { input("up").zeros_like() } else { input("up") };
            let side = Tensor::from_inner(side).require_grad();
            let out = mixer.forward(|| input("hN"), side.clone());
            let found = read(out.clone().inner());
            assert_close(name, &found, &floats(&case["out"]), tolerance);
            assert_eq!(found == read(input("hN")), case["equals_backbone"].as_bool().unwrap(), "{name}");
            let gradients = (out * Tensor::from_inner(input("G"))).sum().backward();
            let d_side = read(side.grad(&gradients).unwrap());
            assert_close(name, &d_side, &floats(&case["grad_upsampled"]), tolerance);
            if let Some(alpha) = &mixer.alpha {
                let found = read(alpha.grad(&gradients).unwrap());
                assert_close(name, &found, &floats(&case["grad_alpha"]), tolerance);
            }
        }
    }

    #[test]
    fn the_side_alone_never_asks_for_the_backbone() {
        let device = Device::flex();
        let mixer = Mixer { alpha: None, kind: HeadMix::SideOnly };
        let out = mixer.forward(|| panic!("asked"), Tensor::<2>::ones([1, 2], &device));
        assert_eq!(read(out), [1.0, 1.0]);
    }
}
