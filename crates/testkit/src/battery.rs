//! What every projection must do.

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::tensor::{Device, Tensor};
use kiln_quant_core::Projection;

use crate::{assert_close, read, relative_difference, tensor};

/// Products of f32 in two orders, relatively: rounding of some hundred terms.
const TOLERANCE: f64 = 1e-5;

/// Checks that `projection` computes `x · weight + bias` of its own weight and bias, for inputs of one row, of many, and of
/// three dimensions; that the input's gradient is that product's; that a copy of it computes the same; and that an
/// input of another width panics.
///
/// # Panics
/// At the first difference, with `what` in the message.
#[track_caller]
pub fn check_projection<P: Projection>(what: &str, projection: &P, device: &Device) {
    let [d_input, d_output] = projection.shape();
    let weight = projection.weight();
    assert_eq!(weight.dims(), [d_input, d_output], "{what}: the weight's sizes");
    let bias = projection.bias();
    if let Some(bias) = &bias {
        assert_eq!(bias.dims(), [d_output], "{what}: the bias's size");
    }
    let product = |x: Tensor<2>| {
        let y = x.matmul(weight.clone());
        match &bias {
            Some(bias) => y + bias.clone().unsqueeze::<2>(),
            None => y,
        }
    };
    // One row is decoding, which has kernels of its own.
    for rows in [1, 3, 9] {
        let x = tensor::<2>(rows as u64, [rows, d_input], device);
        let y = projection.forward(x.clone());
        assert_eq!(y.dims(), [rows, d_output], "{what}: the output's sizes");
        close(&format!("{what}, {rows} rows"), &y, &product(x));
    }

    let x = tensor::<3>(10, [2, 3, d_input], device);
    let y = projection.forward(x.clone());
    assert_eq!(y.dims(), [2, 3, d_output], "{what}: the output's sizes");
    close(&format!("{what}, three dimensions"), &y.reshape([6, d_output]), &product(x.reshape([6, d_input])));

    let x = tensor::<2>(11, [5, d_input], &device.clone().autodiff()).require_grad();
    let seed = tensor::<2>(12, [5, d_output], device);
    let y = projection.forward(x.clone());
    let gradients = (y * seed.clone()).sum().backward();
    let found = x.grad(&gradients).unwrap_or_else(|| panic!("{what}: no gradient of the input"));
    close(&format!("{what}: gradient of the input"), &found, &seed.matmul(weight.clone().transpose()));

    let x = tensor::<2>(13, [4, d_input], device);
    let [found, expected] = [projection.clone().forward(x.clone()), projection.forward(x)].map(read);
    assert_close(&format!("{what}: a copy"), &found, &expected, 0.0);

    let wrong = tensor::<2>(14, [2, d_input + 1], device);
    let refused = catch_unwind(AssertUnwindSafe(|| read(projection.forward(wrong)))).is_err();
    assert!(refused, "{what}: an input of {} values passed", d_input + 1);
}

#[track_caller]
fn close(what: &str, found: &Tensor<2>, expected: &Tensor<2>) {
    let difference = relative_difference(&read(found.clone()), &read(expected.clone()));
    assert!(difference <= TOLERANCE, "{what}: differs by {difference:e}, allowed {TOLERANCE:e}");
}
