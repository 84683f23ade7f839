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

use crate::{TokenBatch, balance::RouterLog, delta::DeltaState};

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
    /// Where routers of experts leave their scores, if they are asked for.
    pub(crate) routers: Option<RouterLog>,
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
            routers: None,
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

    /// The same for blocks that aren't trained: what their routers say is no part of a loss.
    pub fn unheard(&self) -> Cow<'_, Self> {
        match self.routers {
            None => Cow::Borrowed(self),
            Some(_) => Cow::Owned(Self { routers: None, elsewhere: Arc::default(), ..self.clone() }),
        }
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
            routers: self.routers.clone(),
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

    /// What queries may see of the last `keys` keys, and the factor on their scores.
    pub fn attention(&self, scale: f32, window: Option<usize>, keys: usize) -> AttentionSpec {
        let [_, all] = self.key_segments.dims();
        AttentionSpec {
            scale,
            alibi: 0.0,
            softcap: None,
            window,
            compute: self.compute,
            query_segments: self.query_segments.clone(),
            key_segments: match keys == all {
                true => self.key_segments.clone(),
                false => self.key_segments.clone().narrow(1, all - keys, keys),
            },
        }
    }
}

/// Places of room that a cache is given once tokens come one by one: half of what is there, within these bounds.
const ROOM: [usize; 2] = [64, 1024];

/// Keys and values of one block, `[batch, length and room, heads, head_dim]`.
#[derive(Debug, Clone)]
struct Kept {
    both: [Tensor<4>; 2],
    length: usize,
}

impl Kept {
    /// Without what lies more than `window - 1` tokens back, which no further token sees. Memory is moved only where that makes it
    /// half as long.
    fn trimmed(self, window: usize) -> Self {
        let seen = window.saturating_sub(1).max(1);
        if self.length < 2 * seen + ROOM[0] {
            return self;
        }
        let both = self.both.map(|all| {
            let [batch, _, heads, head_dim] = all.dims();
            let shorter =
                Tensor::zeros([batch, 2 * seen + ROOM[0], heads, head_dim], (&all.device(), all.dtype()));
            let last = all.narrow(1, self.length - seen, seen);
            shorter.slice_assign([0..batch, 0..seen, 0..heads, 0..head_dim], last)
        });
        Self { both, length: seen }
    }

    /// Without the room.
    fn both(&self) -> [Tensor<4>; 2] {
        self.both.each_ref().map(|all| match all.dims()[1] == self.length {
            true => all.clone(),
            false => all.clone().narrow(1, 0, self.length),
        })
    }

    /// With further keys and values: written in place where there is room. One token alone foretells more of them, for
    /// which the next piece of memory gets room, so that few tokens move what is there.
    fn extended(self, further: [Tensor<4>; 2]) -> Self {
        let [batch, count, heads, head_dim] = further[0].dims();
        let (start, length) = (self.length, self.length + count);
        for tensor in self.both.iter().chain(&further) {
            let [rows, _, columns, width] = tensor.dims();
            assert_eq!([rows, columns, width], [batch, heads, head_dim], "keys and values of a cache");
        }
        let room = if count == 1 { (length / 2).clamp(ROOM[0], ROOM[1]) } else { 0 };
        let fits = length <= self.both[0].dims()[1];
        let kept = if fits { self.both } else { self.both() };
        let [keys, values] = kept;
        let [further_keys, further_values] = further;
        let both = [(keys, further_keys), (values, further_values)].map(|(kept, further)| {
            let places = |range| [0..batch, range, 0..heads, 0..head_dim];
            let all = match fits {
                true => kept,
                false => {
                    let sizes = [batch, length + room, heads, head_dim];
                    let longer = Tensor::zeros(sizes, (&kept.device(), kept.dtype()));
                    longer.slice_assign(places(0..start), kept)
                }
            };
            all.slice_assign(places(start..length), further)
        });
        Self { both, length }
    }
}

/// Keys and values of earlier tokens, block by block.
#[derive(Debug, Clone, Default)]
pub struct KvCache {
    blocks: Vec<Option<Kept>>,
    /// Of blocks that are recurrent.
    states: Vec<Option<DeltaState>>,
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
        let select = |tensor: &Tensor<4>| chosen(tensor, rows);
        let blocks = self.blocks.iter().map(|block| {
            block.as_ref().map(|kept| Kept { both: kept.both().each_ref().map(select), length: kept.length })
        });
        let segments = rows.iter().flat_map(|&row| &self.segments[row * self.length..][..self.length]);
        let beside = self.beside.as_ref().map(|beside| Box::new(beside.select_rows(rows)));
        let states = self.states.iter().map(|state| {
            state.as_ref().map(|state| DeltaState {
                tail: chosen(&state.tail, rows),
                memory: chosen(&state.memory, rows),
            })
        });
        Self {
            blocks: blocks.collect(),
            states: states.collect(),
            segments: segments.copied().collect(),
            length: self.length,
            beside,
        }
    }

    /// What a recurrent block remembers.
    pub(crate) fn state(&mut self, block: usize) -> &mut Option<DeltaState> {
        if self.states.len() <= block {
            self.states.resize_with(block + 1, || None);
        }
        &mut self.states[block]
    }

    /// All keys and values of a block.
    ///
    /// # Panics
    /// If it has none yet.
    pub(crate) fn of(&self, block: usize) -> [Tensor<4>; 2] {
        let kept = self.blocks.get(block).and_then(Option::as_ref);
        kept.unwrap_or_else(|| panic!("no keys of block {block} in the cache")).both()
    }

    /// Appends `[batch, length, heads, head_dim]` keys and values of one block and returns all that are kept: with a sliding
    /// `window` those that its tokens see, and some before.
    pub(crate) fn extend(
        &mut self,
        block: usize,
        keys: Tensor<4>,
        values: Tensor<4>,
        window: Option<usize>,
    ) -> [Tensor<4>; 2] {
        if self.blocks.len() <= block {
            self.blocks.resize_with(block + 1, || None);
        }
        let kept = match self.blocks[block].take() {
            Some(kept) => {
                let kept = match window {
                    Some(window) => kept.trimmed(window),
                    None => kept,
                };
                kept.extended([keys, values])
            }
            None => Kept { length: keys.dims()[1], both: [keys, values] },
        };
        self.blocks[block].insert(kept).both()
    }
}

/// Rows of a tensor by their indices.
fn chosen<const D: usize>(tensor: &Tensor<D>, rows: &[usize]) -> Tensor<D> {
    let indices: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
    let indices = TensorData::new(indices, [rows.len()]);
    tensor.clone().select(0, Tensor::<1, Int>::from_data(indices, &tensor.device()))
}

#[cfg(test)]
mod tests {
    use kiln_testkit::{read, tensor};

    use super::*;

    fn both(seed: u64, count: usize) -> [Tensor<4>; 2] {
        [2 * seed, 2 * seed + 1].map(|seed| tensor(seed, [2, count, 3, 4], &Device::flex()))
    }

    /// A cache and, beside it, what it should hold.
    #[derive(Clone)]
    struct Beside {
        cache: KvCache,
        expected: [Tensor<4>; 2],
    }

    impl Beside {
        fn extend(&mut self, further: [Tensor<4>; 2]) {
            let found = self.cache.extend(0, further[0].clone(), further[1].clone(), None);
            for ((expected, further), found) in self.expected.iter_mut().zip(further).zip(found) {
                *expected = Tensor::cat(vec![expected.clone(), further], 1);
                assert_eq!(read(found), read(expected.clone()), "{:?}", expected.dims());
            }
        }
    }

    /// One by one, several at once, beyond the room more than once; a copy and chosen rows go on by themselves.
    #[test]
    fn a_cache_is_all_keys_and_values_one_after_the_other() {
        let mut cache = KvCache::new();
        let expected = both(0, 5);
        cache.extend(0, expected[0].clone(), expected[1].clone(), None);
        let mut beside = Beside { cache, expected };
        for step in 1..=2 * ROOM[0] as u64 + 9 {
            beside.extend(both(step, if step % 50 == 0 { 7 } else { 1 }));
        }
        let mut copy = beside.clone();
        copy.extend(both(1000, 1));
        beside.extend(both(2000, 1));
        copy.extend(both(1001, 2));

        let rows = [1, 0, 1];
        copy.cache.length = copy.expected[0].dims()[1];
        copy.cache.segments = vec![1; 2 * copy.cache.length];
        let chosen = |x: Tensor<4>| Tensor::cat(rows.map(|row| x.clone().narrow(0, row, 1)).to_vec(), 0);
        let mut some = Beside { cache: copy.cache.select_rows(&rows), expected: copy.expected.map(chosen) };
        for step in 3000..3003 {
            some.extend(both(step, 1).map(chosen));
        }
    }

    /// With a window, tokens see what they would of all keys, and memory stops growing.
    #[test]
    fn a_window_keeps_what_is_seen_and_little_more() {
        const WINDOW: usize = 6;
        for chunk in [1, 4, 90] {
            let mut cache = KvCache::new();
            let mut expected = both(0, 150);
            cache.extend(0, expected[0].clone(), expected[1].clone(), Some(WINDOW));
            for step in 1..=300 {
                let further = both(step, chunk);
                let [keys, values] = further.clone();
                let found = cache.extend(0, keys, values, Some(WINDOW));
                let count = chunk + WINDOW - 1;
                for ((expected, further), found) in expected.iter_mut().zip(further).zip(found) {
                    *expected = Tensor::cat(vec![expected.clone(), further], 1);
                    let [_, all, _, _] = expected.dims();
                    *expected = expected.clone().narrow(1, all - count, count);
                    let [_, kept, _, _] = found.dims();
                    assert!(kept <= 2 * WINDOW + ROOM[0] + chunk, "{kept} keys");
                    assert_eq!(read(found.narrow(1, kept - count, count)), read(expected.clone()));
                }
            }
        }
    }

    #[test]
    fn tokens_one_by_one_are_written_in_place() {
        let mut cache = KvCache::new();
        let [keys, values] = both(0, 5);
        cache.extend(0, keys, values, None);
        let mut moved = Vec::new();
        for step in 1..=3 * ROOM[0] as u64 {
            let [keys, values] = both(step, 1);
            let length = cache.extend(0, keys, values, None)[0].dims()[1];
            let room = cache.blocks[0].as_ref().unwrap().both[0].dims()[1];
            if moved.last() != Some(&room) {
                moved.push(room);
            }
            assert!(room >= length);
        }
        assert_eq!(moved, [6 + ROOM[0], 71 + ROOM[0], 136 + 68], "lengths of the memory");
    }
}
