//! DoRA.

use burn::{
    module::{Module, Param, ParamId},
    tensor::{DType, Tensor},
};
use kiln_quant_core::{Place, Projection, fused};

use crate::{Adapter, Dropout, Lora};

/// [DoRA](https://arxiv.org/abs/2402.09353): LoRA whose merged weight has a trained length for each output,
/// `y = (base(x) + scaling · x · A · B) · m / n`, the bias outside, with n the length of each output's column of
/// `W + scaling · A · B`. As in the paper's section 4.3 and in PEFT, n counts as a constant for the gradients.
///
/// The magnitudes m start as the lengths of the base's columns, so that training starts at the base model. Trained
/// values: LoRA's and one an output. Merges into dense weights only: the change scales the base's weight.
///
/// With dropout, base and adapter both see the dropped input, as in PEFT.
///
/// # Memory
/// The lengths n need no dense weight: ‖w + σ d‖² = ‖w‖² + 2 σ ⟨w, d⟩ + σ² ‖d‖², where the first term is computed once
/// and the second is a product of the base with r rows. The graph keeps one tensor of the base's output more than
/// LoRA's; dropout costs a second product with the base.
#[derive(Module, Debug)]
pub struct Dora {
    /// A, `[d_input, r]`.
    pub lora_a: Param<Tensor<2>>,
    /// B, `[r, d_output]`.
    pub lora_b: Param<Tensor<2>>,
    /// m, `[d_output]`.
    pub magnitude: Param<Tensor<1>>,
    /// Squared lengths of the base's columns, `[d_output]`; not trained.
    base_squares: Param<Tensor<1>>,
    #[module(skip)]
    scaling: f64,
    dropout: Dropout,
}

impl Dora {
    /// An adapter of A `[d_input, r]` and B `[r, d_output]` for `base`, whose dense weight is made once to measure it.
    /// Without a `magnitude` `[d_output]`, that of the base; exact only for B = 0.
    ///
    /// # Panics
    /// If the sizes don't fit together.
    pub fn new<P: Projection>(
        base: &P,
        lora_a: Tensor<2>,
        lora_b: Tensor<2>,
        magnitude: Option<Tensor<1>>,
        scaling: f64,
        dropout: Dropout,
    ) -> Self {
        let ([d_input, d_output], r) = (base.shape(), lora_a.dims()[1]);
        assert_eq!([lora_a.dims(), lora_b.dims()], [[d_input, r], [r, d_output]], "A and B beside the base");
        let weight = base.weight().without_autodiff().cast(DType::F32);
        let squares: Tensor<1> = (weight.clone() * weight).sum_dim(0).squeeze_dim(0);
        let magnitude = magnitude.unwrap_or_else(|| squares.clone().sqrt());
        assert_eq!(magnitude.dims(), [d_output], "magnitudes");
        Self {
            lora_a: Param::from_tensor(lora_a),
            lora_b: Param::from_tensor(lora_b),
            magnitude: Param::from_tensor(magnitude),
            base_squares: Param::initialized(ParamId::new(), squares),
            scaling,
            dropout,
        }
    }

    /// DoRA that starts where `lora` on `base` is: its factors, and the lengths of the columns of `W + scaling · A · B`.
    ///
    /// # Panics
    /// If the sizes don't fit together.
    pub fn from_lora<P: Projection>(base: &P, lora: Lora) -> Self {
        let scaling = lora.scaling();
        let (a, b) = (lora.lora_a.val().inner(), lora.lora_b.val().inner());
        let weight = base.weight().without_autodiff().cast(DType::F32);
        let sum = weight + a.clone().matmul(b.clone()).mul_scalar(scaling);
        let lengths: Tensor<1> = sum.square().sum_dim(0).sqrt().squeeze_dim(0);
        Self::new(base, a, b, Some(lengths), scaling, lora.into_dropout())
    }

    /// The rank r.
    pub fn rank(&self) -> usize {
        self.lora_a.lazy_shape().dims::<2>()[1]
    }

    /// The factor of A · B.
    pub fn scaling(&self) -> f64 {
        self.scaling
    }

    /// `[d_input, d_output]` of the base.
    pub fn base_shape(&self) -> [usize; 2] {
        [self.lora_a.lazy_shape().dims::<2>()[0], self.magnitude.lazy_shape().dims::<1>()[0]]
    }

    /// m / n, `[d_output]`, differentiable in m only.
    fn scale<P: Projection>(&self, base: &P, dtype: DType) -> Tensor<1> {
        let (a, b) = (self.lora_a.val().detach(), self.lora_b.val().detach());
        // A product with the base as it computes for x, its bias taken off again.
        let mut along = base.forward(a.clone().transpose().cast(dtype));
        if let Some(bias) = base.bias() {
            along = along - bias.unsqueeze();
        }
        let cross = (along.detach().cast(DType::F32) * b.clone()).sum_dim(0);
        let gram = a.clone().transpose().matmul(a);
        let update = (gram.matmul(b.clone()) * b).sum_dim(0);
        let change: Tensor<1> = (cross.mul_scalar(2.0 * self.scaling)
            + update.mul_scalar(self.scaling * self.scaling))
        .squeeze_dim(0);
        let squares = self.base_squares.val() + change;
        // A column of zeros has magnitude zero, too, and stays what it is.
        self.magnitude.val() / squares.clamp_min(f32::MIN_POSITIVE).sqrt()
    }
}

impl Adapter for Dora {
    fn adapt<P: Projection>(&self, base: &P, x: Tensor<2>, y: Tensor<2>) -> Tensor<2> {
        let dtype = x.dtype();
        let (x, y) = match self.dropout.apply(x.clone()) {
            (dropped, compensation) if compensation != 1.0 => {
                let x = dropped.mul_scalar(compensation);
                (x.clone(), base.forward(x))
            }
            (x, _) => (x, y),
        };
        let bias = base.bias();
        let y = match &bias {
            Some(bias) => y - bias.clone().unsqueeze(),
            None => y,
        };
        let compute = base.compute();
        let low = fused::matmul(x, self.lora_a.val().cast(dtype), compute).mul_scalar(self.scaling);
        let y = fused::add_matmul(y, low, self.lora_b.val().cast(dtype), compute);
        let y = y * self.scale(base, dtype).cast(dtype).unsqueeze();
        match bias {
            Some(bias) => y + bias.unsqueeze(),
            None => y,
        }
    }

    fn merged_weight<P: Projection>(&self, base: &P) -> Tensor<2> {
        let weight = base.weight();
        let dtype = weight.dtype();
        let update = self.lora_a.val().mul_scalar(self.scaling).matmul(self.lora_b.val());
        (weight + update.cast(dtype)) * self.scale(base, dtype).cast(dtype).unsqueeze()
    }
    fn at(&self, place: Place) {
        self.dropout.at(place);
    }
}
