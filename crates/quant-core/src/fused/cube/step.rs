//! What an optimizer step does to each parameter, a launch each.

use burn::backend::tensor::FloatTensor;
use burn_cubecl::{CubeBackend, kernel::into_contiguous};
use cubecl::prelude::*;

use super::{count_of, rows::over_units, to_write, units};
use crate::fused::{AdamWStep, StepKernels, square_parts};

/// Units of a cube that adds up squares.
const UNITS: usize = 256;

impl StepKernels for CubeBackend {
    fn adamw(
        parameter: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        step: AdamWStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let [parameter, first, second] = [parameter, first, second].map(to_write);
        let gradient = into_contiguous(gradient);
        let (count, dim) = units(&parameter.client, count_of(&parameter));
        adamw_kernel::launch(
            &parameter.client,
            count,
            dim,
            parameter.clone().into_tensor_arg(),
            gradient.into_tensor_arg(),
            first.clone().into_tensor_arg(),
            second.clone().into_tensor_arg(),
            count_of(&parameter),
            step.lr,
            step.betas[0],
            step.betas[1],
            step.corrections[0],
            step.corrections[1],
            step.eps,
            step.decay,
            step.factor,
        );
        (parameter, first, second)
    }

    fn square_sums(x: FloatTensor<Self>, sums: FloatTensor<Self>, first: usize) -> FloatTensor<Self> {
        let (x, sums) = (into_contiguous(x), to_write(sums));
        let parts = square_parts(count_of(&x));
        assert!(first + parts <= count_of(&sums), "square_sums: {parts} parts at {first}");
        square_sums_kernel::launch(
            &x.client,
            CubeCount::Static(parts as u32, 1, 1),
            CubeDim::new_1d(UNITS as u32),
            x.clone().into_tensor_arg(),
            sums.clone().into_tensor_arg(),
            count_of(&x),
            parts * UNITS,
            first,
        );
        sums
    }
}

#[cube(launch)]
fn adamw_kernel(
    parameter: &mut Tensor<f32>,
    gradient: &Tensor<f32>,
    first: &mut Tensor<f32>,
    second: &mut Tensor<f32>,
    count: usize,
    lr: f32,
    beta_1: f32,
    beta_2: f32,
    correction_1: f32,
    correction_2: f32,
    eps: f32,
    decay: f32,
    factor: f32,
) {
    if ABSOLUTE_POS < count {
        let gradient = gradient[ABSOLUTE_POS] * factor;
        let mean = first[ABSOLUTE_POS] * beta_1 + gradient * (1.0 - beta_1);
        let square = second[ABSOLUTE_POS] * beta_2 + gradient * gradient * (1.0 - beta_2);
        first[ABSOLUTE_POS] = mean;
        second[ABSOLUTE_POS] = square;
        let update = mean / correction_1 / ((square / correction_2).sqrt() + eps);
        parameter[ABSOLUTE_POS] = parameter[ABSOLUTE_POS] * decay - update * lr;
    }
}

#[cube(launch)]
fn square_sums_kernel(x: &Tensor<f32>, sums: &mut Tensor<f32>, count: usize, units: usize, first: usize) {
    let mut squares = 0.0f32;
    for i in range_stepped(ABSOLUTE_POS, count, units) {
        squares += x[i] * x[i];
    }
    let total = over_units(squares, UNITS, false);
    if UNIT_POS == 0 {
        sums[first + CUBE_POS] = total;
    }
}
