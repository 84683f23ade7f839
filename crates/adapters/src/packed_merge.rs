//! Merging into packed weights without touching a code.

use burn::tensor::Tensor;
use kiln_quant_core::{
    Grid, PackedLinear, PackedTensor, PackedWeight, QuantLinear, QuantScheme, ScaleType, Scales, Value,
    to_host,
};

use crate::{
    Adapted, Adapter, AnyAdapter, Core, Error, Full, Geometry, LowRank, PooledAdapter, Result,
    json_fields::Problem,
    methods::{divisors, list},
};

/// An adapter that a packed weight can take in without loss.
///
/// Where every block of the weight lies inside one of the adapter's tiles, the adapter adds one number to all weights of
/// a block, and `scale · code + offset` takes it into the offset. Codes and scales stay as they are, bit for bit; what
/// remains is the rounding of the offset, which is therefore kept in f32, whatever type the base has: an integer zero
/// point would lose four fifths of a light fine-tune, bf16 some percent of it.
#[diagnostic::on_unimplemented(
    message = "packed weights can't take `{Self}` without loss",
    note = "adapters that pool (Q-BaRA, QA-LoRA, QA-HiRA, QA-BLoRA) merge into packed weights; LoRA and DoRA merge into \
            dense weights (`merge_dense`), or with loss (`requantize`)"
)]
pub trait PackedMerge: Adapter {
    /// `base` with the adapter in its offsets. The result has float offsets and scales and offsets in f32.
    ///
    /// # Errors
    /// [`Error::Argument`] for another shape; a codebook, which has no offsets; inputs that are not in their own order;
    /// blocks that meet two tiles, with the sizes that would fit; trained values that aren't finite.
    fn merge_packed(self, base: PackedTensor) -> Result<PackedTensor>;
}

impl PackedMerge for PooledAdapter {
    fn merge_packed(self, base: PackedTensor) -> Result<PackedTensor> {
        let (geometry, shape) = (self.geometry(), base.shape());
        if self.base_shape() != shape {
            let expected = format!("a base of {:?}", self.base_shape());
            return Err(Problem::new("shape", expected, format!("{shape:?}")).argument());
        }
        if let Some(problem) = misfit(&geometry, base.scheme(), shape, base.input_order.is_some()) {
            return Err(problem.argument());
        }
        let (device, base) = (base.codes.val().device(), base.to_host()?);
        let added = self.tile_values()?;
        Ok(PackedTensor::new(&add_to_offsets(base, &added, &geometry), &device))
    }
}

impl PackedMerge for AnyAdapter {
    fn merge_packed(self, base: PackedTensor) -> Result<PackedTensor> {
        let found = match self {
            Self::Pooled(pooled) => return pooled.merge_packed(base),
            Self::Lora(_) => "LoRA, which merges into dense weights only",
            Self::Dora(_) => "DoRA, which merges into dense weights only",
        };
        let expected = "an adapter that pools: Q-BaRA, QA-LoRA, QA-HiRA or QA-BLoRA";
        Err(Problem::new("method", expected, found).argument())
    }
}

impl PooledAdapter {
    /// What each tile of weights gets, `[d_input / pool, d_output / repeat]`.
    fn tile_values(&self) -> Result<Vec<f64>> {
        let read = |tensor: Tensor<2>| -> Result<Vec<f64>> {
            Ok(to_host("map", tensor)?.into_iter().map(f64::from).collect())
        };
        let factor = self.update_factor();
        let map = match &self.core {
            Core::Full(Full { h }) => read(h.val())?,
            Core::LowRank(LowRank { a, b }) => {
                let ([rows, rank], [_, columns]) = (a.val().dims(), b.val().dims());
                let (a, b) = (read(a.val())?, read(b.val())?);
                let mut map = vec![0.0; rows * columns];
                for (row, a) in map.chunks_mut(columns.max(1)).zip(a.chunks(rank.max(1))) {
                    for (a, b) in a.iter().zip(b.chunks(columns.max(1))) {
                        row.iter_mut().zip(b).for_each(|(sum, b)| *sum += a * b);
                    }
                }
                map
            }
        };
        match map.iter().find(|value| !value.is_finite()) {
            Some(value) => Err(Problem::new("map", "finite trained values", value).argument()),
            None => Ok(map.into_iter().map(|value| value * factor).collect()),
        }
    }
}

/// Why the adapter can't go into such a weight, if it can't.
fn misfit(
    geometry: &Geometry,
    scheme: &QuantScheme,
    [d_input, d_output]: [usize; 2],
    permuted: bool,
) -> Option<Problem> {
    if let Value::Codebook(_) = scheme.value {
        let expected = "affine codes, whose offsets can take an adapter";
        return Some(Problem::new("scheme", expected, scheme));
    }
    if permuted {
        let expected = "inputs in their own order";
        return Some(Problem::new("input_order", expected, "inputs sorted by group (act-order)"));
    }
    let axis = |option: &str, what: &str, tile: usize, block: usize, whole: usize| {
        let fits = |tile: usize| tile.is_multiple_of(block) || tile == whole;
        if fits(tile) {
            return None;
        }
        let fitting: Vec<usize> = divisors(whole).into_iter().filter(|size| fits(*size)).collect();
        let expected = format!(
            "a multiple of the {block} {what} of the blocks of {scheme} that divides {whole}: {}",
            list(&fitting)
        );
        Some(Problem::new(option, expected, tile))
    };
    axis("pool", "inputs", geometry.pool, scheme.block.inputs_of(d_input), d_input)
        .or_else(|| axis("repeat", "outputs", geometry.repeat, scheme.block.outputs, d_output))
}

/// The weight with `added`'s tile value on each block's offset; the block must lie inside one tile.
fn add_to_offsets(base: PackedWeight, added: &[f64], geometry: &Geometry) -> PackedWeight {
    let PackedWeight { scheme, d_input, d_output, .. } = base;
    let [rows, columns] = scheme.scale_shape(d_input, d_output);
    let tile_columns = d_output / geometry.repeat;
    let (scales, offsets) = (base.effective_scales(), base.effective_offsets());
    let bits = scheme.bits();
    let offset = |block: usize| match (&offsets, scheme.value) {
        (Some(offsets), _) => f64::from(offsets[block]),
        (None, _) => -f64::from(scales[block]) * f64::from(1u32 << (bits - 1)),
    };
    let blocks = (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column)));
    let offsets = blocks.map(|(row, column)| {
        let tile_row = row * scheme.block.inputs_of(d_input) / geometry.pool;
        let tile_column = column * scheme.block.outputs / geometry.repeat;
        (offset(row * columns + column) + added[tile_row * tile_columns + tile_column]) as f32
    });
    let offsets = Some(offsets.collect());
    let value = Value::Affine { bits, grid: Grid::Float };
    let scheme = QuantScheme { value, scales: ScaleType::F32, ..scheme };
    PackedWeight { scheme, scales: Scales::Plain(scales), offsets, ..base }
}

impl<A: PackedMerge> Adapted<QuantLinear, A> {
    /// The layer alone, with the adapter in its offsets: [`PackedMerge`]. A dense layer takes it into its dense weight,
    /// rounding once. `path` is for errors.
    ///
    /// # Errors
    /// As [`PackedMerge::merge_packed`].
    pub fn merge_packed(self, path: &str) -> Result<QuantLinear> {
        let Self { base, adapter } = self;
        let Some(adapter) = adapter else { return Ok(base) };
        match base {
            QuantLinear::Packed(PackedLinear { weight, bias }) => {
                let weight = adapter.merge_packed(weight).map_err(|error| within(error, path))?;
                Ok(QuantLinear::Packed(PackedLinear { weight, bias }))
            }
            dense => Ok(QuantLinear::Dense(Adapted { base: dense, adapter: Some(adapter) }.merge_dense())),
        }
    }
}

fn within(error: Error, path: &str) -> Error {
    match error {
        Error::Argument { name, expected, found } => {
            Error::Argument { name: format!("{path}.{name}"), expected, found }
        }
        other => other,
    }
}
