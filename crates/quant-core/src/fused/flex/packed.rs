//! Products with packed weights and their low-rank updates in one.

use burn::backend::{
    flex::Flex,
    tensor::{FloatTensor, IntTensor},
};

use crate::{
    fused::{
        LowRankSpec,
        autodiff::low,
        packed::{PackedLowRank, PackedUpdate, one_after_the_other},
    },
    ops::PackedSpec,
};

impl PackedUpdate for Flex {
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
        one_after_the_other::<Self>(x, (codes, scales, offsets), [left, right], spec, transposed)
    }
}

impl PackedLowRank for Flex {
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
