//! Which device holds which part of a model that is larger than one.

use std::ops::Range;

use burn::{
    module::Module,
    tensor::{Device, Tensor},
};
use kiln_quant_core::{Compute, DeviceLimits, Projection, QuantLinear, Scheme, StorageReport, StorageRow};

use crate::{
    Block, Checkpoint, Embedding, Error, LoadOptions, Norm, Result, Tables,
    config::{ModelConfig, TensorRole, TensorShape},
};

/// Which device holds which part of a model: embedding, blocks, and final norm with the head. Activations cross where
/// neighbours are on different ones, forwards, backwards and in generation.
///
/// Each part computes where it is; the devices take turns. It is a way to hold models that are larger than one device, not
/// to make them faster.
///
/// ```
/// use burn::tensor::Device;
/// use kiln_models::Placement;
///
/// let (first, second) = (Device::flex(), Device::flex());
/// let placement = Placement::new(&first, [(0..20, &first), (20..32, &second)], &second)?;
/// assert_eq!(placement.num_blocks(), 32);
/// # Ok::<(), kiln_models::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Placement {
    embedding: Device,
    blocks: Vec<Device>,
    head: Device,
}

impl Placement {
    /// The embedding's device, blocks with theirs, and the device of final norm and head. Of a model whose head is its
    /// embedding both must be one.
    ///
    /// # Errors
    /// [`Error::Argument`] for blocks that are left out or named twice.
    pub fn new<'a>(
        embedding: &Device,
        blocks: impl IntoIterator<Item = (Range<usize>, &'a Device)>,
        head: &Device,
    ) -> Result<Self> {
        let mut parts: Vec<(Range<usize>, &Device)> = blocks.into_iter().collect();
        parts.sort_by_key(|(blocks, _)| blocks.start);
        let mut all = Vec::new();
        for (blocks, device) in parts {
            if blocks.start != all.len() || blocks.is_empty() {
                return Err(Error::Argument {
                    name: "placement".into(),
                    expected: format!("blocks from {} on, each once", all.len()),
                    found: format!("{blocks:?}"),
                });
            }
            // A range is the caller's; a model of so many blocks isn't.
            if blocks.end > MOST_BLOCKS {
                return Err(Error::Argument {
                    name: "placement".into(),
                    expected: format!("at most {MOST_BLOCKS} blocks"),
                    found: format!("{blocks:?}"),
                });
            }
            all.resize(blocks.end, plain(device));
        }
        Ok(Self { embedding: plain(embedding), blocks: all, head: plain(head) })
    }

    /// Consecutive parts of a model on `devices`, so that the fullest holds as little as it can. `embedding`,
    /// `blocks` and `head` (with the final norm) are bytes, `tied` is whether the head is the embedding, which stands on the first device then.
    ///
    /// # Errors
    /// [`Error::Argument`] for no devices.
    pub fn balanced(
        devices: &[Device],
        embedding: u64,
        blocks: &[u64],
        head: u64,
        tied: bool,
    ) -> Result<Self> {
        let Some(first) = devices.first() else {
            return Err(Error::Argument {
                name: "devices".into(),
                expected: "at least one".into(),
                found: "none".into(),
            });
        };
        let mut parts = blocks.to_vec();
        let on_first = if tied { embedding.saturating_add(head) } else { embedding };
        if !tied {
            parts.push(head);
        }
        let places = spread(devices.len(), on_first, &parts);
        let device = |part: usize| plain(&devices[places[part]]);
        let head = if tied { plain(first) } else { device(blocks.len()) };
        Ok(Self { embedding: plain(first), blocks: (0..blocks.len()).map(device).collect(), head })
    }

    /// Everything on one device.
    pub(crate) fn on_one(device: &Device, blocks: usize) -> Self {
        let device = plain(device);
        Self { embedding: device.clone(), blocks: vec![device.clone(); blocks], head: device }
    }

    /// Where these parts are; `None` if that is one place.
    pub(crate) fn of<P: Projection>(
        embedding: &Embedding,
        blocks: &[Block<P>],
        final_norm: &Norm,
        head: &Option<QuantLinear>,
    ) -> Option<Self> {
        let embedding = plain(&embedding.device());
        let place = |devices: Vec<Device>| devices.first().map_or(embedding.clone(), plain);
        let blocks: Vec<Device> = blocks.iter().map(|block| place(block.devices())).collect();
        // A norm may have no parameters.
        let head = place([final_norm.devices(), head.devices()].concat());
        let is_one = blocks.iter().chain([&head]).all(|device| *device == embedding);
        (!is_one).then_some(Self { embedding, blocks, head })
    }

    /// Bytes of each device's tensors, in the order of [`devices`](Self::devices): of a model as a [report](crate::LoadReport)
    /// or a [prediction](crate::Checkpoint::predicted_storage) lists them.
    pub fn bytes(&self, config: &ModelConfig, storage: &StorageReport) -> Vec<(Device, usize)> {
        let mut found: Vec<(Device, usize)> = self.devices().into_iter().map(|device| (device, 0)).collect();
        for row in &storage.rows {
            let device = match part(config, &row.path) {
                Part::Embedding => &self.embedding,
                Part::Block(index) => self.blocks.get(index).unwrap_or(&self.head),
                Part::Head => &self.head,
            };
            if let Some((_, bytes)) = found.iter_mut().find(|(found, _)| found == device) {
                *bytes = bytes.saturating_add(row.bytes);
            }
        }
        found
    }

    /// Whether it has every part of such a model, in a place where it can be.
    pub(crate) fn check(&self, config: &ModelConfig) -> Result<()> {
        let fail = |expected: String, found: String| {
            Err(Error::Argument { name: "placement".into(), expected, found })
        };
        let (expected, found) = (config.num_hidden_layers, self.blocks.len());
        if expected != found {
            return fail(format!("the model's {expected} blocks"), format!("{found}"));
        }
        if config.tie_word_embeddings && self.embedding != self.head {
            let expected = "embedding and head on one device, being one matrix";
            return fail(expected.into(), format!("{:?} and {:?}", self.embedding, self.head));
        }
        Ok(self.devices().iter().try_for_each(DeviceLimits::check_there)?)
    }

    /// Number of blocks.
    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Where the embedding is.
    pub fn embedding(&self) -> &Device {
        &self.embedding
    }

    /// Where block `index` is.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn block(&self, index: usize) -> &Device {
        &self.blocks[index]
    }

    /// Where final norm and head are.
    pub fn head(&self) -> &Device {
        &self.head
    }

    /// The devices, each once, in the order in which data passes them.
    pub fn devices(&self) -> Vec<Device> {
        let mut found: Vec<Device> = Vec::new();
        for device in [&self.embedding].into_iter().chain(&self.blocks).chain([&self.head]) {
            if !found.contains(device) {
                found.push(device.clone());
            }
        }
        found
    }

    /// What the block's output is moved to: its device, or, of the last one, that of the head.
    pub(crate) fn after(&self, index: usize) -> &Device {
        self.blocks.get(index + 1).unwrap_or(&self.head)
    }
}

/// A part that is placed as a whole.
enum Part {
    Embedding,
    Block(usize),
    Head,
}

/// To which part a tensor or module belongs, by its path in checkpoints.
fn part(config: &ModelConfig, path: &str) -> Part {
    let names = &config.family.names;
    let is_in =
        |module: &str| path.strip_prefix(module).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
    let index = path.strip_prefix(names.blocks).and_then(|rest| rest.strip_prefix('.'));
    let index = index.and_then(|rest| rest.split('.').next()?.parse().ok());
    let per_layer = names.per_layer.map(|paths| [paths.embedding, paths.projection, paths.norm]);
    let before = [Some(names.embedding), names.positions.map(|learned| learned.path), names.embedding_norm];
    let projection = names.projections.map(|[projection, _]| projection);
    let before = before.into_iter().flatten().chain(per_layer.into_iter().flatten()).chain(projection);
    match index {
        Some(index) => Part::Block(index),
        None if { before }.any(is_in) => Part::Embedding,
        None => Part::Head,
    }
}

impl Checkpoint {
    /// What [`load`](Self::load) will report of the model's storage, from headers alone: exact where schemes are given for all
    /// linears and products are in f32. Packed weights that stay as stored are taken to be as large as in the file, and dense
    /// tables of 16 bits to stay so where `compute` has 16 bits.
    ///
    /// # Errors
    /// A tensor that isn't there.
    pub fn predicted_storage(&self, options: &LoadOptions) -> Result<StorageReport> {
        self.predicted(options, options.compute.unwrap_or(Compute::F32))
    }

    fn predicted(&self, options: &LoadOptions, compute: Compute) -> Result<StorageReport> {
        let mut report = StorageReport::default();
        for TensorShape { name, shape, role } in self.config().tensors() {
            if role == TensorRole::Head && self.config().tie_word_embeddings && name.ends_with(".weight") {
                continue;
            }
            let path = name.strip_suffix(".weight").filter(|_| role != TensorRole::Plain);
            let scheme = match (&options.schemes, path, role) {
                (Some(plan), Some(path), TensorRole::Linear) => Some(*plan.get(path)),
                (_, Some(_), TensorRole::Embedding | TensorRole::Head) => match options.tables {
                    Tables::Packed(scheme) => Some(Scheme::Packed(scheme)),
                    Tables::AsStored | Tables::Dense => None,
                },
                _ => None,
            };
            let values = shape.iter().fold(1, |values: usize, size| values.saturating_mul(*size));
            let described = self.source().describe(&name)?;
            let (scheme, bytes) = match (scheme, &shape[..]) {
                (Some(Scheme::Packed(scheme)), [d_output, d_input]) => {
                    (Scheme::Packed(scheme), scheme.storage_bytes(*d_input, *d_output))
                }
                (None, _) if path.is_some() => {
                    let stored = usize::try_from(described.bytes).unwrap_or(usize::MAX);
                    let as_stored = options.tables == Tables::AsStored;
                    let dense = described.dense || role != TensorRole::Linear && !as_stored;
                    let frozen = options.tables != Tables::Dense;
                    let stays = compute != Compute::F32 && frozen && stored == values.saturating_mul(2);
                    let width = if stays { 2 } else { 4 };
                    (Scheme::Dense, if dense { values.saturating_mul(width) } else { stored })
                }
                _ => (Scheme::Dense, values.saturating_mul(4)),
            };
            let path = path.unwrap_or(&name).to_owned();
            report.rows.push(StorageRow { path, scheme, shape, bytes });
        }
        Ok(report)
    }

    /// A [placement](Placement::balanced) of the model on `devices` that fills them as evenly as whole blocks allow, by
    /// [`predicted_storage`](Self::predicted_storage).
    ///
    /// # Errors
    /// As those two.
    pub fn balanced(&self, options: &LoadOptions, devices: &[Device]) -> Result<Placement> {
        let config = self.config();
        let compute = self.compute_on(options, devices);
        let (mut embedding, mut blocks, mut head) = (0_u64, vec![0_u64; config.num_hidden_layers], 0_u64);
        for row in &self.predicted(options, compute)?.rows {
            let sum = match part(config, &row.path) {
                Part::Embedding => Some(&mut embedding),
                Part::Block(index) => blocks.get_mut(index),
                Part::Head => Some(&mut head),
            };
            if let Some(sum) = sum {
                *sum = sum.saturating_add(row.bytes as u64);
            }
        }
        Placement::balanced(devices, embedding, &blocks, head, config.tie_word_embeddings)
    }
}

const MOST_BLOCKS: usize = 1 << 16;

fn plain(device: &Device) -> Device {
    device.clone().without_autodiff()
}

/// `x` on `device`; gradients go back to where it was.
pub(crate) fn moved<const D: usize>(x: Tensor<D>, device: &Device) -> Tensor<D> {
    if x.device().without_autodiff() == *device { x } else { x.to_device(device) }
}

/// On which of `devices` each of consecutive `parts` is, so that the fullest device holds as little as it can, where the
/// first one holds `on_first` already: under the smallest limit under which all fit if each device takes what it can.
fn spread(devices: usize, on_first: u64, parts: &[u64]) -> Vec<usize> {
    let fill = |limit: u64| {
        let (mut index, mut held) = (0, on_first);
        let place = |bytes: &u64| {
            while held.saturating_add(*bytes) > limit {
                (index, held) = (index + 1, 0);
                if index == devices || *bytes > limit {
                    return None;
                }
            }
            held += bytes;
            Some(index)
        };
        if on_first > limit { None } else { parts.iter().map(place).collect::<Option<Vec<usize>>>() }
    };
    let (mut low, mut high) = (0, parts.iter().fold(on_first, |sum, bytes| sum.saturating_add(*bytes)));
    while low < high {
        let middle = low + (high - low) / 2;
        if fill(middle).is_some() { high = middle } else { low = middle + 1 }
    }
    fill(high).unwrap_or_else(|| vec![0; parts.len()])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The smallest load of the fullest device, by trying every way.
    fn smallest(devices: usize, on_first: u64, parts: &[u64]) -> u64 {
        if devices == 1 {
            return on_first + parts.iter().sum::<u64>();
        }
        let cuts = 0..=parts.len();
        cuts.map(|cut| {
            let here = on_first + parts[..cut].iter().sum::<u64>();
            here.max(smallest(devices - 1, 0, &parts[cut..]))
        })
        .min()
        .unwrap_or(0)
    }

    #[test]
    fn the_fullest_device_holds_as_little_as_it_can() {
        let sizes = |seed: u64, count: u64| {
            (0..count).map(move |i| (seed * 7 + i * i * 5 + i) % 11 + 1).collect::<Vec<u64>>()
        };
        for seed in 0..12 {
            for count in 0..7 {
                for devices in 1..4 {
                    let (parts, on_first) = (sizes(seed, count), seed % 9);
                    let places = spread(devices, on_first, &parts);
                    assert!(places.is_sorted() && places.iter().all(|place| *place < devices));
                    let held = |device: usize| {
                        let own: u64 = places
                            .iter()
                            .zip(&parts)
                            .filter(|(place, _)| **place == device)
                            .map(|(_, bytes)| bytes)
                            .sum();
                        own + if device == 0 { on_first } else { 0 }
                    };
                    let fullest = (0..devices).map(held).max().unwrap();
                    assert_eq!(
                        fullest,
                        smallest(devices, on_first, &parts),
                        "{devices} {on_first} {parts:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn blocks_are_named_once_and_none_is_left_out() {
        let device = Device::flex();
        let error = |blocks: Vec<Range<usize>>| {
            let blocks = blocks.into_iter().map(|blocks| (blocks, &device));
            Placement::new(&device, blocks, &device).unwrap_err().to_string()
        };
        assert_eq!(error(vec![0..2, 3..4]), "placement: expected blocks from 2 on, each once, found 3..4");
        assert_eq!(error(vec![0..2, 1..4]), "placement: expected blocks from 2 on, each once, found 1..4");
        assert_eq!(error(vec![1..2, 2..3]), "placement: expected blocks from 0 on, each once, found 1..2");
        assert_eq!(
            error(vec![0..1, 1..usize::MAX]),
            format!("placement: expected at most 65536 blocks, found 1..{}", usize::MAX)
        );
        let error = Placement::balanced(&[], 1, &[1], 1, false).unwrap_err();
        assert_eq!(error.to_string(), "devices: expected at least one, found none");
    }
}
