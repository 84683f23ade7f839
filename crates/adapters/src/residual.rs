//! Initialisations that move a part of the base's weight into the adapter: PiSSA and OLoRA.
//!
//! Both leave the model's function as it is (but for the rounding of packed bases): the base becomes
//! `W - scaling · A · B`.

use burn::{
    module::{Param, ParamId},
    nn::Linear,
    tensor::{DType, Device, Tensor, TensorData},
};
use kiln_quant_core::{HostQuantizer, MinMax, PackedLinear, PackedTensor, Projection, QuantLinear};

use crate::{
    Result,
    json_fields::Problem,
    linear_algebra::{Matrix, Singular, qr, singular, singular_from},
    random::{Purpose, generator, normal, path_hash},
};

/// A linear layer whose weight can be replaced.
pub trait ReplaceWeight: Projection {
    /// The same layer with the dense `weight` `[d_input, d_output]`, frozen. A packed layer quantizes it to its own
    /// scheme, by [`MinMax`] and in the inputs' own order. `path` is for errors.
    ///
    /// # Errors
    /// A weight of another shape, or one that can't be quantized.
    fn with_weight(self, path: &str, weight: Tensor<2>) -> Result<Self>;
}

fn check_shape(path: &str, expected: [usize; 2], found: [usize; 2]) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Problem::new(path, format!("a weight of {expected:?}"), format!("{found:?}")).argument())
}

impl ReplaceWeight for Linear {
    fn with_weight(self, path: &str, weight: Tensor<2>) -> Result<Self> {
        check_shape(path, self.shape(), weight.dims())?;
        let dtype = self.weight.val().dtype();
        let weight = Param::initialized(ParamId::new(), weight.without_autodiff().cast(dtype));
        Ok(Self { weight, bias: self.bias })
    }
}

impl ReplaceWeight for QuantLinear {
    fn with_weight(self, path: &str, weight: Tensor<2>) -> Result<Self> {
        match self {
            Self::Dense(linear) => linear.with_weight(path, weight).map(Self::Dense),
            Self::Packed(PackedLinear { weight: packed, bias }) => {
                check_shape(path, packed.shape(), weight.dims())?;
                let ([d_input, d_output], device) = (packed.shape(), packed.codes.val().device());
                let values = to_host(path, weight.transpose())?;
                let weight = MinMax.quantize(path, &values, d_input, d_output, packed.scheme())?;
                Ok(Self::Packed(PackedLinear { weight: PackedTensor::new(&weight, &device), bias }))
            }
        }
    }
}

/// A tensor's values in f32.
pub(crate) fn to_host<const D: usize>(name: &str, tensor: Tensor<D>) -> Result<Vec<f32>> {
    tensor
        .try_into_vec_as()
        .map_err(|error| Problem::new(name, "values on a device that can be read", error).argument())
}

/// A part of a weight as factors A `[d_input, r]` and B `[r, d_output]`.
type Factors = [Vec<f32>; 2];

/// [PiSSA](https://arxiv.org/abs/2404.02948), as PEFT computes it: with `Wᵀ = U S V` (W `[d_input, d_output]`), the r
/// largest singular values split between `A = Vᵀ √(S / scaling)` and `B = √(S / scaling) Uᵀ`. With `iterations`, by that
/// many steps of subspace iteration from random vectors (PEFT's `pissa_niter_N`): quick for wide layers, approximate.
/// Signs of singular vectors are nobody's to fix: A and B may both be negated against PEFT's, row by row.
pub(crate) fn pissa(
    path: &str,
    weight: &[f32],
    [d_input, d_output]: [usize; 2],
    r: usize,
    scaling: f64,
    iterations: Option<(u32, u64)>,
) -> Result<Factors> {
    check(path, "pissa", [d_input, d_output], r, scaling)?;
    let matrix = Matrix::new(d_input, d_output, weight.iter().map(|w| f64::from(*w)).collect());
    let found = match iterations {
        None => singular(&matrix, r),
        Some((iterations, seed)) => {
            let mut rng = generator(Purpose::Subspace, seed, path_hash(path), 0, 0);
            let start = normal(&mut rng, 1.0, d_output * r).into_iter().map(f64::from).collect();
            singular_from(&matrix, &Matrix::new(d_output, r, start), iterations as usize)
        }
    };
    let Singular { values, left, right } = found.map_err(|problem| problem.within(path).argument())?;
    let split = |vectors: &Matrix| -> Vec<f64> {
        let rows = values.iter().enumerate();
        rows.flat_map(|(i, value)| vectors.row(i).iter().map(move |x| x * (value / scaling).sqrt())).collect()
    };
    let a = Matrix::new(r, d_input, split(&left)).transpose().values;
    Ok([narrow(&a), narrow(&split(&right))])
}

/// [OLoRA](https://arxiv.org/abs/2406.01775), as PEFT computes it: with the decomposition `Wᵀ = Q R` of the weight
/// `[d_output, d_input]`, `Bᵀ` is the first r columns of Q and `Aᵀ` the first r rows of R.
pub(crate) fn olora(
    path: &str,
    weight: &[f32],
    [d_input, d_output]: [usize; 2],
    r: usize,
    scaling: f64,
) -> Result<Factors> {
    check(path, "olora", [d_input, d_output], r, scaling)?;
    let matrix = Matrix::new(d_input, d_output, weight.iter().map(|w| f64::from(*w)).collect()).transpose();
    let (q, r) = qr(&matrix, r);
    Ok([narrow(&r.transpose().values), narrow(&q.transpose().values)])
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|value| *value as f32).collect()
}

fn check(path: &str, rule: &str, shape: [usize; 2], r: usize, scaling: f64) -> Result<()> {
    let most = shape[0].min(shape[1]);
    if r > most {
        let expected = format!("a rank of at most {most} for {rule} on a weight of {shape:?}");
        return Err(Problem::new(format!("{path}.r"), expected, r).argument());
    }
    if scaling > 0.0 {
        return Ok(());
    }
    let expected = format!("a positive scaling for {rule}");
    Err(Problem::new(format!("{path}.lora_alpha"), expected, format!("scaling {scaling}")).argument())
}

/// `base` less `scaling · A · B`.
pub(crate) fn subtract<P: ReplaceWeight>(
    path: &str,
    base: P,
    [a, b]: &Factors,
    r: usize,
    scaling: f64,
) -> Result<P> {
    let ([d_input, d_output], weight) = (base.shape(), base.weight().without_autodiff().cast(DType::F32));
    let device: Device = weight.device();
    let tensor = |values: &[f32], shape: [usize; 2]| {
        Tensor::<2>::from_data(TensorData::new(values.to_vec(), shape), (&device, DType::F32))
    };
    let update = tensor(a, [d_input, r]).matmul(tensor(b, [r, d_output])).mul_scalar(scaling);
    base.with_weight(path, weight - update)
}
