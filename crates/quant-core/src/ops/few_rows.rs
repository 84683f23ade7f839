//! Products of few rows with weights whose scales aren't floats, without a copy of the scales as floats: on Flex.

use burn::backend::{
    Dispatch, DispatchDevice, backend_extension,
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::{Device, Int, Tensor};

use super::{FEW_ROWS, PackedSpec};
use crate::SuperLayout;

/// How scales, and offsets beside them, are stored; a block has one output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StoredScales {
    /// Integers under factors.
    Integers(SuperLayout),
    /// Double-quantized, without offsets.
    Double,
}

/// Not differentiable.
#[backend_extension(Flex)]
pub(crate) trait FewRows: burn::backend::Backend {
    /// See [`few_rows`].
    #[allow(clippy::too_many_arguments)] // the macro takes tensors one by one
    fn few_rows(
        x: FloatTensor<Self>,
        codes: IntTensor<Self>,
        scales: FloatTensor<Self>,
        scale_codes: IntTensor<Self>,
        offsets: FloatTensor<Self>,
        offset_codes: IntTensor<Self>,
        spec: PackedSpec,
        form: StoredScales,
        transposed: bool,
    ) -> FloatTensor<Self>;
}

/// `x · W`, or `x · Wᵀ` if `transposed`, where it is [`taken`].
///
/// Scales and offsets, and the integers of both, are as [`PackedTensor`](crate::PackedTensor) holds them. Where there are no
/// offsets other tensors stand in their place, with [`StoredScales::Double`] the offset of all scales.
///
/// # Shapes
/// `[rows, d_input]` → `[rows, d_output]`; transposed the other way.
pub(crate) fn few_rows(
    x: Tensor<2>,
    codes: Tensor<2, Int>,
    [scales, offsets]: [Tensor<2>; 2],
    [scale_codes, offset_codes]: [Tensor<1, Int>; 2],
    spec: PackedSpec,
    form: StoredScales,
    transposed: bool,
) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::few_rows(
        x.into_dispatch(),
        codes.into_dispatch(),
        scales.into_dispatch(),
        scale_codes.into_dispatch(),
        offsets.into_dispatch(),
        offset_codes.into_dispatch(),
        spec,
        form,
        transposed,
    ))
}

/// Whether [`few_rows`] is for so many rows with scales in this form, on devices of `x` and of the weight: Flex, without a
/// graph. Scales are unpacked once for each row; double-quantized ones are slow to unpack, and read so for one row alone.
pub(crate) fn taken(devices: [&Device; 2], rows: usize, form: StoredScales) -> bool {
    let most = if form == StoredScales::Double { 1 } else { FEW_ROWS };
    let plain = |device: &Device| matches!(device.as_dispatch(), DispatchDevice::Flex(_));
    (1..=most).contains(&rows) && devices.into_iter().all(plain)
}
