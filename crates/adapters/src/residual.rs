//! Initialisations that move a part of the base's weight into the adapter: PiSSA and OLoRA.
//!
//! Both leave the model's function as it is (but for the rounding of packed bases): the base becomes
//! `W - scaling · A · B`.

use burn::tensor::{DType, Tensor, TensorData};
use kiln_quant_core::{
    Projection, QuantLinear,
    random::{Purpose, generator, normal, path_hash},
    to_host,
};

use crate::{
    Factors, InitLoraWeights, Result, Svd, Target,
    json_fields::Problem,
    low_rank::{leading_qr, low_rank_from, low_rank_scaled},
};

/// `base` without its part, and the part. `seed` is for PiSSA's approximation; without one it is exact, as adapters in
/// files need it.
pub(crate) fn split(
    init: InitLoraWeights,
    target: &Target,
    base: QuantLinear,
    seed: Option<u64>,
) -> Result<(QuantLinear, Factors)> {
    let (Target { path, r, scaling, .. }, [d_input, d_output]) = (target, base.shape());
    check(path, [d_input, d_output], *r, *scaling)?;
    let weight = base.weight().without_autodiff();
    let values = to_host(path, weight.clone().transpose())?;
    let factors = match (init, seed) {
        (InitLoraWeights::Olora, _) => leading_qr(path, &values, d_input, *r),
        (InitLoraWeights::Pissa { iterations: Some(iterations) }, Some(seed)) => {
            let mut rng = generator(Purpose::Subspace, seed, path_hash(path), 0, 0);
            let start = normal(&mut rng, 1.0, d_output * r);
            low_rank_from(path, &values, d_input, *r, &start, iterations as usize, *scaling)
        }
        _ => low_rank_scaled(path, &values, d_input, *r, Svd::Exact, *scaling),
    }?;
    let device = weight.device();
    let tensor = |values: &[f32], shape: [usize; 2]| {
        Tensor::<2>::from_data(TensorData::new(values.to_vec(), shape), (&device, DType::F32))
    };
    let update = tensor(&factors.a, [d_input, *r]).matmul(tensor(&factors.b, [*r, d_output]));
    let residual = weight.cast(DType::F32) - update.mul_scalar(*scaling);
    Ok((base.with_weight(path, residual)?, factors))
}

fn check(path: &str, shape: [usize; 2], r: usize, scaling: f64) -> Result<()> {
    let most = shape[0].min(shape[1]);
    if r > most {
        let expected = format!("a rank of at most {most} for a part of a weight of {shape:?}");
        return Err(Problem::new(format!("{path}.r"), expected, r).argument());
    }
    if scaling > 0.0 {
        return Ok(());
    }
    let found = format!("scaling {scaling}");
    Err(Problem::new(format!("{path}.lora_alpha"), "a positive scaling for a part of a weight", found)
        .argument())
}
