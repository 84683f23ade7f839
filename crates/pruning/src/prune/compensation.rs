//! FLAP's biases in place of what pruned inputs gave.

use std::collections::BTreeMap;

use kiln_models::Decoder;
use kiln_quant_core::QuantLinear;

use super::matrix;
use crate::{
    Result, criterion::Matrix, importance::Statistics, kept::Kept, selection::without, structure::Structure,
};

/// FLAP's biases: `W[:, removed] · mean(X[:, removed])` of each o and down that loses inputs.
pub(super) fn compensation(
    model: &Decoder<QuantLinear>,
    structure: &Structure,
    kept: &Kept,
    statistics: &Statistics,
) -> Result<BTreeMap<String, Vec<f32>>> {
    let mut biases = BTreeMap::new();
    for linear in structure.linears.iter().filter(|linear| linear.loses_inputs()) {
        let Some(stays) = kept.positions(structure, linear.layer, linear, linear.input) else { continue };
        let Some(inputs) = statistics.inputs.get(&linear.path) else { continue };
        let matrix = matrix(model, &linear.path)?;
        let removed = without(inputs.mean.len(), &stays);
        biases.insert(linear.path.clone(), bias_of(&matrix, &removed, &inputs.mean));
    }
    Ok(biases)
}

/// What the inputs `removed` of a linear gave on average: `Σ mean(xⱼ) · wⱼ` over them, `[d_output]`.
///
/// # Panics
/// If an index is beyond the weight's inputs or the means.
pub fn bias_of(matrix: &Matrix, removed: &[usize], means: &[f64]) -> Vec<f32> {
    let mut bias = vec![0.0; matrix.d_output];
    for &input in removed {
        let row = &matrix.weight[input * matrix.d_output..][..matrix.d_output];
        for (sum, &weight) in bias.iter_mut().zip(row) {
            *sum += means[input] * f64::from(weight);
        }
    }
    bias.into_iter().map(|sum| sum as f32).collect()
}
