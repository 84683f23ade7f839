//! Logits of a part of the vocabulary, a cube for each row.

use burn::backend::{
    ops::IntTensorOps,
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::{DType, IntDType};
use burn_cubecl::{CubeBackend, kernel::into_contiguous, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    count_of, cubes,
    rows::{over_units, units_of},
    rows_of, to_write,
};
use crate::{LogitSpec, fused::vocabulary::VocabularyKernels};

/// Targets of `rows` rows, as the kernels read them.
fn targets_of(rows: usize, targets: CubeTensor) -> CubeTensor {
    assert_eq!(count_of(&targets), rows, "logits: targets of {rows} rows");
    into_contiguous(match targets.dtype {
        DType::I32 => targets,
        _ => CubeBackend::int_cast(targets, IntDType::I32),
    })
}

impl VocabularyKernels for CubeBackend {
    fn with_logits(
        state: FloatTensor<Self>,
        products: FloatTensor<Self>,
        targets: IntTensor<Self>,
        first: usize,
        spec: LogitSpec,
    ) -> FloatTensor<Self> {
        let [rows, width] = rows_of(&products);
        let (state, products, targets) =
            (to_write(state), into_contiguous(products), targets_of(rows, targets));
        assert_eq!(rows_of(&state), [rows, 3], "logits: what is known of {rows} rows");
        let units = units_of(width);
        let (count, dim) = cubes(rows, units);
        // SAFETY: a cube stays in its row of the tensors, whose sizes are asserted.
        unsafe {
            with_logits_kernel::launch_unchecked(
                &products.client.clone(),
                count,
                dim,
                products.into_tensor_arg(),
                targets.into_tensor_arg(),
                state.clone().into_tensor_arg(),
                rows,
                width,
                first,
                spec.factor,
                spec.softcap.unwrap_or(0.0),
                units,
            );
        }
        state
    }

    fn product_gradients(
        products: FloatTensor<Self>,
        state: FloatTensor<Self>,
        targets: IntTensor<Self>,
        weights: FloatTensor<Self>,
        first: usize,
        spec: LogitSpec,
    ) -> FloatTensor<Self> {
        let [rows, width] = rows_of(&products);
        let (products, targets) = (to_write(products), targets_of(rows, targets));
        let (state, weights) = (into_contiguous(state), into_contiguous(weights));
        assert_eq!([count_of(&state), count_of(&weights)], [3 * rows, rows], "logits: of {rows} rows");
        let units = units_of(width);
        let (count, dim) = cubes(rows, units);
        // SAFETY: a cube stays in its row of the tensors, whose sizes are asserted.
        unsafe {
            product_gradients_kernel::launch_unchecked(
                &products.client,
                count,
                dim,
                products.clone().into_tensor_arg(),
                targets.into_tensor_arg(),
                state.into_tensor_arg(),
                weights.into_tensor_arg(),
                rows,
                width,
                first,
                spec.factor,
                spec.softcap.unwrap_or(0.0),
                units,
            );
        }
        products
    }
}

/// See [`LogitSpec`]; no soft cap is 0.
#[cube]
fn logit(product: f32, factor: f32, softcap: f32) -> f32 {
    let mut logit = product * factor;
    if softcap != 0.0 {
        logit = softcap * (logit / softcap).tanh();
    }
    logit
}

#[cube(launch_unchecked)]
fn with_logits_kernel(
    products: &Tensor<f32>,
    targets: &Tensor<i32>,
    state: &mut Tensor<f32>,
    rows: usize,
    width: usize,
    first: usize,
    factor: f32,
    softcap: f32,
    #[comptime] units: usize,
) {
    if CUBE_POS < rows {
        let at = CUBE_POS * width;
        // Each unit's largest logit and its sum of exponentials below it.
        let mut largest = f32::new(f32::MIN);
        let mut sum = 0.0f32;
        for i in range_stepped(UNIT_POS as usize, width, units) {
            let logit = logit(products[at + i], factor, softcap);
            if logit > largest {
                sum = sum * (largest - logit).exp() + 1.0;
                largest = logit;
            } else {
                sum += (logit - largest).exp();
            }
        }
        let mut most = over_units(largest, units, true);
        let mut sum = over_units(sum * (largest - most).exp(), units, false);
        if UNIT_POS == 0 {
            let known = 3 * CUBE_POS;
            if first > 0 {
                let before = state[known];
                let both = max(before, most);
                sum = sum * (most - both).exp() + state[known + 1] * (before - both).exp();
                most = both;
            }
            state[known] = most;
            state[known + 1] = sum;
            let target = targets[CUBE_POS] as u32 as usize;
            if target >= first && target < first + width {
                state[known + 2] = logit(products[at + target - first], factor, softcap);
            }
        }
    }
}

#[cube(launch_unchecked)]
fn product_gradients_kernel(
    products: &mut Tensor<f32>,
    targets: &Tensor<i32>,
    state: &Tensor<f32>,
    weights: &Tensor<f32>,
    rows: usize,
    width: usize,
    first: usize,
    factor: f32,
    softcap: f32,
    #[comptime] units: usize,
) {
    if CUBE_POS < rows {
        let at = CUBE_POS * width;
        let log_sum = state[3 * CUBE_POS] + state[3 * CUBE_POS + 1].ln();
        let weight = weights[CUBE_POS] * factor;
        let target = targets[CUBE_POS] as u32 as usize;
        for i in range_stepped(UNIT_POS as usize, width, units) {
            let logit = logit(products[at + i], factor, softcap);
            let mut gradient = (logit - log_sum).exp() - select(first + i == target, 1.0f32, 0.0f32);
            if softcap != 0.0 {
                let share = logit / softcap;
                gradient *= 1.0 - share * share;
            }
            products[at + i] = gradient * weight;
        }
    }
}
