//! From the backbone's width to the side network's.

use burn::{
    module::Module,
    nn::Linear,
    tensor::{Tensor, activation::silu},
};
use kiln_models::{Norm, families::NormKind};

use crate::{Downsample, SideConfig, init::Init};

/// One downsampling module; see [`Downsample`] for the formulas.
///
/// # Memory
/// One with weights keeps the backbone's state `[batch, length, width]` until its backward pass; a pool keeps nothing.
#[derive(Module, Debug)]
pub struct Downsampler {
    /// The linear, or the first one; `None` in pools.
    pub down: Option<Linear>,
    /// The second linear of low-rank downsampling.
    pub up: Option<Linear>,
    /// What follows.
    pub norm: Option<Norm>,
    #[module(skip)]
    kind: Downsample,
    #[module(skip)]
    side_width: usize,
}

impl Downsampler {
    pub(crate) fn new(config: &SideConfig, [width, side]: [usize; 2], path: &str, init: &Init) -> Self {
        let (kind, bias) = (config.downsample, config.downsample_bias);
        let linear =
            |name: &str, shape: [usize; 2]| Some(init.linear(&format!("{path}.{name}"), shape, bias));
        let (down, up) = match kind {
            Downsample::Linear => (linear("down", [width, side]), None),
            Downsample::Lora | Downsample::Adapter => {
                (linear("down", [width, config.rank]), linear("up", [config.rank, side]))
            }
            Downsample::MaxPool | Downsample::AvgPool => (None, None),
        };
        let norm = config.downsample_norm.then(|| init.norm(NormKind::Layer, side, 1e-5, true));
        Self { down, up, norm, kind, side_width: side }
    }

    /// What the trained part reads: the state itself, or the pooled one.
    ///
    /// # Shapes
    /// `[batch, length, width]` → the same, or `[batch, length, side width]`.
    pub fn features(&self, state: Tensor<3>) -> Tensor<3> {
        let [batch, length, width] = state.dims();
        let windows = |x: Tensor<3>| x.reshape([batch, length, self.side_width, width / self.side_width]);
        match self.kind {
            Downsample::MaxPool => windows(state).max_dim(3).squeeze_dim(3),
            Downsample::AvgPool => windows(state).mean_dim(3).squeeze_dim(3),
            _ => state,
        }
    }

    /// The trained part.
    ///
    /// # Shapes
    /// What [`features`](Self::features) gives → `[batch, length, side width]`.
    pub fn forward(&self, features: Tensor<3>) -> Tensor<3> {
        let mut x = features;
        if let Some(down) = &self.down {
            x = down.forward(x);
        }
        if let Some(up) = &self.up {
            x = up.forward(if self.kind == Downsample::Adapter { silu(x) } else { x });
        }
        match &self.norm {
            Some(norm) => norm.forward(x),
            None => x,
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use kiln_testkit::{assert_close, read};

    use super::*;
    use crate::vectors::{floats, matrix, open, tensor3, vector};

    #[test]
    fn outputs_and_gradients_are_those_of_the_reference() {
        let file = open("side_tuning_downsample.json");
        let (inputs, device) = (&file["inputs"], Device::flex());
        let (x, dy) = (tensor3(&inputs["x"], &device), tensor3(&inputs["G"], &device));
        let linear = |name: &str| Some(Linear { weight: matrix(&inputs[name], &device), bias: None });
        let norm = || {
            Some(Norm {
                weight: Some(vector(&inputs["ln_w"], &device)),
                bias: Some(vector(&inputs["ln_b"], &device)),
                eps: 1e-5,
                kind: NormKind::Layer,
            })
        };
        let tolerance = file["tolerance"].as_f64().unwrap() as f32;
        let layer = |kind, down, up, norm| Downsampler { down, up, norm, kind, side_width: 4 };
        use Downsample::{Adapter, AvgPool, Linear as Full, Lora, MaxPool};
        for (name, module) in [
            ("linear", layer(Full, linear("linear_W"), None, None)),
            ("lora", layer(Lora, linear("A"), linear("B"), None)),
            ("lora_ln", layer(Lora, linear("A"), linear("B"), norm())),
            ("adapter", layer(Adapter, linear("A"), linear("B"), norm())),
            ("adapter_no_ln", layer(Adapter, linear("A"), linear("B"), None)),
            ("maxpool", layer(MaxPool, None, None, None)),
            ("avgpool", layer(AvgPool, None, None, None)),
        ] {
            let expected = &file["expected"][name];
            let module = module.train();
            let y = module.forward(module.features(x.clone()));
            assert_close(name, &read(y.clone().inner()), &floats(&expected["y"]), tolerance);
            let trained = !module.kind.is_pool();
            assert_eq!(y.is_autodiff(), trained, "{name}: a pool has no graph");
            if !trained {
                continue;
            }
            let gradients = (y * Tensor::from_inner(dy.clone())).sum().backward();
            let check = |key: &str, found: Option<Vec<f32>>| {
                let found = found.unwrap_or_else(|| panic!("{name}: no gradient of {key}"));
                assert_close(&format!("{name} {key}"), &found, &floats(&expected["grad"][key]), tolerance);
            };
            let weight = |linear: &Option<Linear>| {
                let gradient = linear.as_ref()?.weight.grad(&gradients)?;
                Some(read(gradient.transpose()))
            };
            check(if name == "linear" { "linear_W" } else { "A" }, weight(&module.down));
            if module.up.is_some() {
                check("B", weight(&module.up));
            }
            if let Some(norm) = &module.norm {
                let gain = norm.weight.as_ref().and_then(|weight| weight.grad(&gradients));
                check("ln_w", gain.map(read));
                check("ln_b", norm.bias.as_ref().and_then(|bias| bias.grad(&gradients)).map(read));
            }
        }
    }
}
