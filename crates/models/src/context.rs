//! What every block of one forward pass shares: rotary tables, segments and, when decoding, earlier keys and values.

use std::{
    borrow::Cow,
    sync::{Arc, Mutex, PoisonError},
};

use burn::tensor::{Device, Int, Tensor, TensorData};
use kiln_quant_core::{
    Compute,
    fused::{self, AttentionSpec},
};

use crate::TokenBatch;

/// Token ids on the device, and what attention needs to know about them.
#[derive(Debug, Clone)]
pub struct Context {
    /// Ids `[batch, length]`.
    pub ids: Tensor<2, Int>,
    /// Positions `[batch, length]`.
    pub positions: Tensor<2, Int>,
    /// Cosines and sines `[batch * length, rotated channels / 2]` of the model's rotary tables; none with other positions.
    pub rotary: Vec<[Tensor<2>; 2]>,
    /// Factors on queries by their positions, `[batch, length, 1, 1]`.
    pub query_factors: Option<Tensor<4>>,
    /// The same tokens as a network beside the model sees them (side tuning): other rotary tables.
    pub beside: Option<Arc<Context>>,
    /// What operands of attention's products are rounded to.
    pub compute: Compute,
    query_segments: Tensor<2, Int>,
    key_segments: Tensor<2, Int>,
    /// `key_segments` in host memory.
    seen: Arc<[u32]>,
    /// The same on further devices, as blocks there asked for it.
    elsewhere: Arc<Mutex<Vec<Context>>>,
}

impl Context {
    /// `past` holds the segments of earlier keys, `[batch, past length]` row-major; empty without a cache.
    pub(crate) fn new(
        tokens: &TokenBatch,
        past: &[u32],
        rotary: Vec<[Tensor<2>; 2]>,
        compute: Compute,
        device: &Device,
    ) -> Self {
        let (batch, length) = (tokens.batch, tokens.length);
        let past_length = past.len() / batch;
        let mut key_segments = Vec::with_capacity(past.len() + tokens.segments.len());
        for (row, segments) in tokens.segments.chunks_exact(length).enumerate() {
            key_segments.extend_from_slice(&past[row * past_length..][..past_length]);
            key_segments.extend_from_slice(segments);
        }
        let ints = |values: &[u32]| {
            let values: Vec<i64> = values.iter().map(|&value| i64::from(value)).collect();
            Tensor::<2, Int>::from_data(TensorData::new(values, [batch, length]), device)
        };
        Self {
            ids: ints(&tokens.ids),
            positions: ints(&tokens.positions),
            rotary,
            query_factors: None,
            beside: None,
            compute,
            query_segments: fused::segments(&tokens.segments, [batch, length], device),
            key_segments: fused::segments(&key_segments, [batch, past_length + length], device),
            seen: key_segments.into(),
            elsewhere: Arc::default(),
        }
    }

    /// Tokens in a row, earlier ones not counted.
    pub fn length(&self) -> usize {
        self.ids.dims()[1]
    }

    /// The same on `device`.
    pub(crate) fn on(&self, device: &Device) -> Cow<'_, Self> {
        if self.ids.device() == *device {
            return Cow::Borrowed(self);
        }
        let mut elsewhere = self.elsewhere.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = elsewhere.iter().find(|context| context.ids.device() == *device) {
            return Cow::Owned(found.clone());
        }
        let rotary = self.rotary.iter();
        let moved = Self {
            ids: self.ids.clone().to_device(device),
            positions: self.positions.clone().to_device(device),
            rotary: rotary.map(|tables| tables.clone().map(|table| table.to_device(device))).collect(),
            query_factors: self.query_factors.clone().map(|factors| factors.to_device(device)),
            beside: self.beside.clone(),
            compute: self.compute,
            query_segments: self.query_segments.clone().to_device(device),
            key_segments: self.key_segments.clone().to_device(device),
            seen: self.seen.clone(),
            elsewhere: Arc::default(),
        };
        elsewhere.push(moved.clone());
        Cow::Owned(moved)
    }

    /// Segments of the keys `[batch, past + length]`, to be kept with a cache.
    pub(crate) fn key_segments(&self) -> &[u32] {
        &self.seen
    }

    /// Segments of the tokens, `[batch, length]`, row-major.
    pub fn segments(&self) -> Vec<u32> {
        let length = self.length();
        let keys = self.seen.len() / self.ids.dims()[0];
        self.seen.chunks_exact(keys).flat_map(|row| &row[keys - length..]).copied().collect()
    }

    /// What queries may see, and the factor on their scores.
    pub fn attention(&self, scale: f32, window: Option<usize>) -> AttentionSpec {
        AttentionSpec {
            scale,
            alibi: 0.0,
            softcap: None,
            window,
            compute: self.compute,
            query_segments: self.query_segments.clone(),
            key_segments: self.key_segments.clone(),
        }
    }
}

/// Keys and values of earlier tokens, block by block.
#[derive(Debug, Clone, Default)]
pub struct KvCache {
    pub(crate) blocks: Vec<Option<[Tensor<4>; 2]>>,
    pub(crate) segments: Vec<u32>,
    pub(crate) length: usize,
    /// Of a network beside the model.
    beside: Option<Box<KvCache>>,
}

impl KvCache {
    /// An empty cache.
    pub fn new() -> Self {
        Self::default()
    }

    /// Tokens of a row that are in the cache.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Says that the tokens of `context` have gone through all blocks.
    pub fn advance(&mut self, context: &Context) {
        self.segments = context.key_segments().to_vec();
        self.length += context.length();
    }

    /// Keys and values of a network beside the model (side tuning), whose blocks are numbered from 0 too. Length and
    /// segments are the model's.
    pub fn beside(&mut self) -> &mut KvCache {
        self.beside.get_or_insert_default()
    }

    /// The rows of the cache with the given indices, in that order; a row may be taken several times, to continue it in
    /// several ways.
    ///
    /// # Panics
    /// If there is no such row.
    #[must_use]
    pub fn select_rows(&self, rows: &[usize]) -> Self {
        let select = |tensor: &Tensor<4>| {
            let indices: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
            let indices = TensorData::new(indices, [rows.len()]);
            tensor.clone().select(0, Tensor::<1, Int>::from_data(indices, &tensor.device()))
        };
        let blocks = self.blocks.iter().map(|block| block.as_ref().map(|[k, v]| [select(k), select(v)]));
        let segments = rows.iter().flat_map(|&row| &self.segments[row * self.length..][..self.length]);
        let beside = self.beside.as_ref().map(|beside| Box::new(beside.select_rows(rows)));
        Self { blocks: blocks.collect(), segments: segments.copied().collect(), length: self.length, beside }
    }

    /// Appends `[batch, length, heads, head_dim]` keys and values of one block and returns all.
    pub(crate) fn extend(&mut self, block: usize, keys: Tensor<4>, values: Tensor<4>) -> [Tensor<4>; 2] {
        if self.blocks.len() <= block {
            self.blocks.resize_with(block + 1, || None);
        }
        let all = match self.blocks[block].take() {
            Some([k, v]) => [Tensor::cat(vec![k, keys], 1), Tensor::cat(vec![v, values], 1)],
            None => [keys, values],
        };
        self.blocks[block].insert(all).clone()
    }
}
