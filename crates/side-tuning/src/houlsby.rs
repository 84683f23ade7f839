//! Bottleneck adapters after the sub-layers: a baseline.

use burn::{
    module::Module,
    nn::Linear,
    tensor::{
        Tensor,
        activation::{gelu_approximate, relu, silu},
    },
};
use kiln_models::{CausalLm, Slots};
use kiln_quant_core::Projection;
use serde::{Deserialize, Serialize};

use crate::{Error, Result, init::Init};

/// The nonlinearity of a [`Houlsby`] adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Activation {
    /// GELU by its tanh approximation.
    GeluTanh,
    /// SiLU.
    Silu,
    /// ReLU.
    Relu,
}

impl Activation {
    fn apply<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Self::GeluTanh => gelu_approximate(x),
            Self::Silu => silu(x),
            Self::Relu => relu(x),
        }
    }
}

/// A [bottleneck adapter](https://arxiv.org/abs/1902.00751): `y = x + up(act(down(x)))`, with biases.
#[derive(Module, Debug)]
pub struct Houlsby {
    /// `[width, bottleneck]`.
    pub down: Linear,
    /// `[bottleneck, width]`; zero at first, so that training starts at the base.
    pub up: Linear,
    #[module(skip)]
    activation: Activation,
}

impl Houlsby {
    /// An adapter of given linears.
    pub fn new(down: Linear, up: Linear, activation: Activation) -> Self {
        Self { down, up, activation }
    }

    /// # Shapes
    /// `[.., width]` → the same.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let update = self.up.forward(self.activation.apply(self.down.forward(x.clone())));
        x + update
    }
}

/// A linear layer whose output goes through a [`Houlsby`] adapter, where there is one.
///
/// It stands in a model's slot, but it isn't linear: [`weight`](Projection::weight) and [`bias`](Projection::bias) are
/// the base's, without the adapter, which can't be merged.
#[derive(Module, Debug)]
pub struct HoulsbySlot<P: Projection> {
    /// The layer, frozen.
    pub base: P,
    /// The adapter.
    pub adapter: Option<Houlsby>,
}

impl<P: Projection> Projection for HoulsbySlot<P> {
    fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let y = self.base.forward(x);
        match &self.adapter {
            Some(adapter) => adapter.forward(y),
            None => y,
        }
    }

    fn weight(&self) -> Tensor<2> {
        self.base.weight()
    }

    fn bias(&self) -> Option<Tensor<1>> {
        self.base.bias()
    }

    fn shape(&self) -> [usize; 2] {
        self.base.shape()
    }
}

/// The last linears of the sub-layers.
const OUTPUTS: [&str; 4] = [".self_attn.o_proj", ".mlp.down_proj", ".self_attn.out_proj", ".fc2"];

/// Puts an adapter after the attention and after the MLP of every block, before the residual sums, and freezes the rest.
///
/// ```
/// # use burn::tensor::Device;
/// # use kiln_models::{Checkpoint, LoadOptions};
/// # use kiln_side_tuning::{Activation, attach_houlsby};
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/models/tiny-llama");
/// let (model, _) = Checkpoint::open(folder)?.load(&LoadOptions::default(), &Device::flex())?;
/// // Width 192, bottleneck 12.
/// let model = attach_houlsby(model, 12, Activation::GeluTanh, 0)?;
/// # let _ = model;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// A bottleneck of zero or wider than the model.
pub fn attach_houlsby<M: CausalLm + Slots>(
    model: M,
    bottleneck: usize,
    activation: Activation,
    seed: u64,
) -> Result<M::With<HoulsbySlot<M::Slot>>> {
    let init = Init { seed, device: model.device() };
    model.freeze().try_map(|path, base| {
        if !OUTPUTS.iter().any(|name| path.ends_with(name)) {
            return Ok(HoulsbySlot { base, adapter: None });
        }
        let [_, width] = base.shape();
        if !(1..=width).contains(&bottleneck) {
            return Err(Error::argument(
                "bottleneck",
                format!("1 to {width}, the model's width"),
                bottleneck,
            ));
        }
        let mut down = init.linear(&format!("{path}.adapter.down"), [width, bottleneck], false);
        down.bias = Some(init.full(bottleneck, 0.0));
        let up = init.zero_linear([bottleneck, width]);
        Ok(HoulsbySlot { base, adapter: Some(Houlsby::new(down, up, activation)) })
    })
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use kiln_testkit::{assert_close, read};

    use super::*;
    use crate::vectors::{floats, matrix, open, tensor3, vector};

    #[test]
    fn outputs_are_those_of_the_reference() {
        let (file, device) = (open("side_tuning_houlsby.json"), Device::flex());
        let (inputs, tolerance) = (&file["inputs"], file["tolerance"].as_f64().unwrap() as f32);
        let linear = |weight: &str, bias: &str| Linear {
            weight: matrix(&inputs[weight], &device),
            bias: Some(vector(&inputs[bias], &device)),
        };
        for (name, activation) in
            [("gelu_tanh", Activation::GeluTanh), ("silu", Activation::Silu), ("relu", Activation::Relu)]
        {
            let adapter = Houlsby::new(linear("down_W", "down_b"), linear("up_W", "up_b"), activation);
            let found = read(adapter.forward(tensor3(&inputs["x"], &device)));
            assert_close(name, &found, &floats(&file["expected"][name]), tolerance);
        }
    }
}
