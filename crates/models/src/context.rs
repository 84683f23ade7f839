//! What every block of one forward pass shares: rotary tables, masks and, when decoding, earlier keys and values.

use std::{cell::RefCell, collections::HashMap};

use burn::tensor::{Bool, Device, Int, Tensor, TensorData};

use crate::TokenBatch;

/// Token ids on the device, and what attention needs to know about them.
#[derive(Debug)]
pub struct Context {
    /// Ids `[batch, length]`.
    pub ids: Tensor<2, Int>,
    /// Positions `[batch, length]`.
    pub positions: Tensor<2, Int>,
    /// Cosines and sines `[batch * length, head_dim / 2]`, for models with rotary positions.
    pub rotary: Option<[Tensor<2>; 2]>,
    /// Segments of the queries `[batch, length]`.
    query_segments: Vec<u32>,
    /// Segments of the keys `[batch, past + length]`.
    key_segments: Vec<u32>,
    batch: usize,
    length: usize,
    past: usize,
    device: Device,
    /// Masks already made, by window.
    masks: RefCell<HashMap<Option<usize>, Tensor<4, Bool>>>,
}

impl Context {
    /// `past` holds the segments of earlier keys, `[batch, past length]` row-major; empty without a cache.
    pub(crate) fn new(
        tokens: &TokenBatch,
        past: &[u32],
        rotary: Option<[Tensor<2>; 2]>,
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
            query_segments: tokens.segments.clone(),
            key_segments,
            batch,
            length,
            past: past_length,
            device: device.clone(),
            masks: RefCell::default(),
        }
    }

    /// Rows.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Tokens in a row, earlier ones not counted.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Segments of the keys `[batch, past + length]`, to be kept with a cache.
    pub(crate) fn key_segments(&self) -> &[u32] {
        &self.key_segments
    }

    /// Whether query `query` of `row` sees key `key` (counted with the past).
    fn sees(&self, row: usize, query: usize, key: usize, window: Option<usize>) -> bool {
        let at = query + self.past;
        key <= at
            && window.is_none_or(|window| at - key < window)
            && self.query_segments[row * self.length + query]
                == self.key_segments[row * (self.past + self.length) + key]
    }

    /// `true` where a query must not look, `[batch, 1, length, past + length]`.
    pub(crate) fn hidden(&self, window: Option<usize>) -> Tensor<4, Bool> {
        let make = || {
            let keys = self.past + self.length;
            let mut hidden = Vec::with_capacity(self.batch * self.length * keys);
            for row in 0..self.batch {
                for query in 0..self.length {
                    hidden.extend((0..keys).map(|key| !self.sees(row, query, key, window)));
                }
            }
            Tensor::from_data(TensorData::new(hidden, [self.batch, 1, self.length, keys]), &self.device)
        };
        self.masks.borrow_mut().entry(window).or_insert_with(make).clone()
    }
}

/// Keys and values of earlier tokens, block by block.
#[derive(Debug, Clone, Default)]
pub struct KvCache {
    pub(crate) blocks: Vec<Option<[Tensor<4>; 2]>>,
    pub(crate) segments: Vec<u32>,
    pub(crate) length: usize,
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
