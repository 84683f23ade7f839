//! Products with packed weights and their low-rank updates in one.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn_cubecl::CubeBackend;

use crate::{
    fused::{
        LowRankSpec,
        autodiff::low,
        packed::{PackedLowRank, PackedUpdate, one_after_the_other},
    },
    ops::{PackedSpec, cube::packed_product_and_update},
};

impl PackedUpdate for CubeBackend {
    fn packed_update(
        x: FloatTensor<Self>,
        codes: IntTensor<Self>,
        scales: FloatTensor<Self>,
        offsets: FloatTensor<Self>,
        left: FloatTensor<Self>,
        right: FloatTensor<Self>,
        spec: PackedSpec,
        transposed: bool,
    ) -> FloatTensor<Self> {
        let parts = || (codes.clone(), scales.clone(), offsets.clone());
        if let Some(y) = packed_product_and_update(&x, parts(), [&left, &right], spec, transposed) {
            return y;
        }
        one_after_the_other::<Self>(x, (codes, scales, offsets), [left, right], spec, transposed)
    }
}

impl PackedLowRank for CubeBackend {
    fn packed_low_rank(
        x: FloatTensor<Self>,
        codes: IntTensor<Self>,
        scales: FloatTensor<Self>,
        offsets: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        spec: PackedSpec,
        update: LowRankSpec,
    ) -> FloatTensor<Self> {
        let low = low::<Self>(x.clone(), a, update);
        Self::packed_update(x, codes, scales, offsets, low, b, spec, false)
    }
}
