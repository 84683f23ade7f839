//! Attention on Flex, forward and backward, a block of queries at a time: scores of one block and one head are all that
//! ever exists. Parallel over rows and key heads.

use std::ops::Range;

use burn::backend::flex::FlexTensor;
use burn::tensor::DType;
use rayon::prelude::*;

use super::{
    super::{Scores, alibi_slope},
    shape_of,
};
use crate::ops::flex::{
    Matrix, Out, SharedMut, contiguous, floats, matmul,
    simd::{exp, vectorize},
    tensor, written,
};

/// Which keys queries see; segments `[batch, length]` and `[batch, keys]`, row-major.
#[derive(Clone, Copy)]
pub(super) struct Visible<'a> {
    pub scores: Scores,
    pub query_segments: &'a [u32],
    pub key_segments: &'a [u32],
}

/// Queries of a block.
const QUERIES: usize = 64;

/// Sizes of one attention.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    length: usize,
    keys: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Tokens of k and v from one row of the batch to the next.
    kv_row: usize,
}

impl Sizes {
    fn new(q: &FlexTensor, k: &FlexTensor, v: &FlexTensor, spec: Visible) -> Self {
        let (q, k, v) = (shape_of(q), shape_of(k), shape_of(v));
        let sizes = Self {
            batch: q[0],
            length: q[1],
            keys: k[1],
            heads: q[2],
            kv_heads: k[2],
            head_dim: q[3],
            kv_row: k[1],
        };
        let Self { batch, length, keys, heads, kv_heads, head_dim, .. } = sizes;
        assert!(
            k == v
                && k[0] == batch
                && k[3] == head_dim
                && keys >= length
                && heads.is_multiple_of(kv_heads)
                && spec.query_segments.len() == batch * length
                && spec.key_segments.len() == batch * keys,
            "attention: q {q:?}, k {k:?}, v {v:?}, {} query and {} key segments",
            spec.query_segments.len(),
            spec.key_segments.len(),
        );
        sizes
    }

    /// Floats between two tokens of q.
    fn q_stride(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Floats between two tokens of k and v.
    fn k_stride(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Runs `f` for every row and key head, in parallel.
    fn tasks(&self, f: impl Fn(usize, usize) + Sync) {
        (0..self.batch * self.kv_heads).into_par_iter().for_each(|i| f(i / self.kv_heads, i % self.kv_heads));
    }
}

/// One block of queries of one head.
struct Block<'a> {
    sizes: Sizes,
    spec: Visible<'a>,
    row: usize,
    queries: Range<usize>,
    /// Keys that any query of the block may see.
    keys: Range<usize>,
}

impl<'a> Block<'a> {
    fn of(sizes: Sizes, spec: Visible<'a>, row: usize) -> impl Iterator<Item = Self> {
        (0..sizes.length).step_by(QUERIES).map(move |start| {
            let queries = start..sizes.length.min(start + QUERIES);
            let past = sizes.keys - sizes.length;
            let first = spec.scores.window.map_or(0, |window| (start + past + 1).saturating_sub(window));
            Self { sizes, spec, row, keys: first..past + queries.end, queries }
        })
    }

    /// Offset of the block's queries of `head` in q.
    fn q_at(&self, head: usize) -> usize {
        ((self.row * self.sizes.length + self.queries.start) * self.sizes.heads + head) * self.sizes.head_dim
    }

    /// Offset of the block's keys of `kv_head` in k and v.
    fn k_at(&self, kv_head: usize) -> usize {
        ((self.row * self.sizes.kv_row + self.keys.start) * self.sizes.kv_heads + kv_head)
            * self.sizes.head_dim
    }

    /// Offset of the block's log-sums of `head`, `[batch, heads, length]`.
    fn lse_at(&self, head: usize) -> usize {
        (self.row * self.sizes.heads + head) * self.sizes.length + self.queries.start
    }

    /// A product on this thread.
    ///
    /// # Safety
    /// As [`matmul`].
    unsafe fn product(&self, sizes: [usize; 3], out: Out, lhs: Matrix<'_>, rhs: Matrix<'_>) {
        // SAFETY: this function's contract.
        unsafe { matmul(sizes, out, lhs, rhs, self.spec.scores.compute) }
    }

    /// Unscaled scores into `scores`, a row a query.
    fn scores(&self, q: &[f32], k: &[f32], scores: &mut [f32]) {
        let sizes = [self.queries.len(), self.keys.len(), self.sizes.head_dim];
        let (q, k) = (Matrix::rows(q, self.sizes.q_stride()), Matrix::columns(k, self.sizes.k_stride()));
        // SAFETY: `scores` holds the block's queries × keys.
        unsafe { self.product(sizes, Out::new(scores.as_mut_ptr(), self.keys.len(), false), q, k) }
    }

    /// Of the block's keys, those that `query` may see by place; segments are left to [`Self::hide`].
    fn visible(&self, query: usize) -> Range<usize> {
        let place = query + self.sizes.keys - self.sizes.length;
        let first = self.spec.scores.window.map_or(0, |window| (place + 1).saturating_sub(window));
        first.max(self.keys.start) - self.keys.start..place + 1 - self.keys.start
    }

    /// What scores are made by, but for their product.
    fn scoring(&self, head: usize, query: usize) -> Scoring {
        let Scores { scale, alibi, softcap, .. } = self.spec.scores;
        let slope = if alibi == 0.0 { 0.0 } else { alibi * alibi_slope(head, self.sizes.heads) };
        let place = query + self.sizes.keys - self.sizes.length;
        Scoring { scale, slope, softcap, behind: (place - self.keys.start) as f32 }
    }

    /// Sets to zero what belongs to keys of other segments.
    fn hide(&self, query: usize, visible: Range<usize>, weights: &mut [f32], value: f32) {
        let segment = self.spec.query_segments[self.row * self.sizes.length + query];
        let keys = &self.spec.key_segments[self.row * self.sizes.keys + self.keys.start..][visible.clone()];
        if keys.iter().all(|key| *key == segment) {
            return;
        }
        for (weight, key) in weights[visible].iter_mut().zip(keys) {
            if *key != segment {
                *weight = value;
            }
        }
    }
}

/// How a query's products with keys become scores.
#[derive(Clone, Copy)]
struct Scoring {
    scale: f32,
    /// ALiBi's, 0 where there is none.
    slope: f32,
    /// 0 where there is none.
    softcap: f32,
    /// Places from the block's first key to the query.
    behind: f32,
}

impl Scoring {
    /// Whether scores are products times the scale and nothing else.
    fn is_plain(self) -> bool {
        self.slope == 0.0 && self.softcap == 0.0
    }

    /// The score of the block's key `key`; what is hidden (minus infinity) stays so.
    fn score(self, product: f32, key: usize) -> f32 {
        if product == f32::NEG_INFINITY {
            return product;
        }
        let z = product * self.scale - self.slope * (self.behind - key as f32);
        if self.softcap == 0.0 { z } else { self.softcap * (z / self.softcap).tanh() }
    }

    /// The product's gradient as a multiple of the gradient of its score `z`.
    fn slope_at(self, z: f32) -> f32 {
        if self.softcap == 0.0 { self.scale } else { self.scale * (1.0 - (z / self.softcap).powi(2)) }
    }
}

/// The tokens from one row of the batch to the next, if nothing else keeps the values of `[batch, keys, heads, head_dim]`
/// from following each other: with a cache there is room behind each row.
fn row_of_tokens(x: &FlexTensor) -> Option<usize> {
    let ([.., keys, heads, head_dim], layout) = (shape_of(x).dims::<4>(), x.layout());
    let &[row, token, head, one] = layout.strides() else { return None };
    let sizes = [heads * head_dim, head_dim, 1].map(|size| size as isize);
    let row = usize::try_from(row).ok()?.checked_div(heads * head_dim)?;
    let apart = x.dtype() == DType::F32 && layout.start_offset() == 0 && [token, head, one] == sizes;
    (apart && row >= keys).then_some(row)
}

/// The result and the logarithm of each query's sum of exponentials, `[batch, heads, length]`.
pub(super) fn forward(q: FlexTensor, k: FlexTensor, v: FlexTensor, spec: Visible) -> (FlexTensor, Vec<f32>) {
    let (mut sizes, shape) = (Sizes::new(&q, &k, &v, spec), shape_of(&q));
    let row = row_of_tokens(&k).filter(|row| row_of_tokens(&v) == Some(*row));
    let [q, k, v] = match row {
        Some(row) => {
            sizes.kv_row = row;
            [contiguous(q), k, v]
        }
        None => [q, k, v].map(contiguous),
    };
    let (q, k, v) = (floats(&q), k.storage::<f32>(), v.storage::<f32>());
    let mut out = zeros(q.len());
    let mut lse = vec![0.0; sizes.batch * sizes.heads * sizes.length];
    let (shared_out, shared_lse) = (SharedMut(out.as_mut_ptr()), SharedMut(lse.as_mut_ptr()));
    let group = sizes.heads / sizes.kv_heads;
    sizes.tasks(|row, kv_head| {
        let mut scores = vec![0.0; QUERIES.min(sizes.length) * sizes.keys];
        for block in Block::of(sizes, spec, row) {
            let width = block.keys.len();
            let (k, v) = (&k[block.k_at(kv_head)..], &v[block.k_at(kv_head)..]);
            for head in kv_head * group..(kv_head + 1) * group {
                let scores = &mut scores[..block.queries.len() * width];
                block.scores(&q[block.q_at(head)..], k, scores);
                for (i, scores) in scores.chunks_exact_mut(width).enumerate() {
                    let query = block.queries.start + i;
                    let visible = block.visible(query);
                    block.hide(query, visible.clone(), scores, f32::NEG_INFINITY);
                    let log_sum = softmax(scores, visible.clone(), block.scoring(head, query));
                    block.hide(query, visible, scores, 0.0);
                    // SAFETY: each (row, head, query) belongs to one task.
                    unsafe { *shared_lse.at(block.lse_at(head) + i) = log_sum }
                }
                let weights = Matrix::rows(scores, width);
                let v = Matrix::rows(v, sizes.k_stride());
                // SAFETY: each (row, head) belongs to one task; the block's queries lie inside `out`.
                unsafe {
                    let out = Out::new(shared_out.at(block.q_at(head)), sizes.q_stride(), false);
                    block.product([block.queries.len(), sizes.head_dim, width], out, weights, v);
                }
            }
        }
    });
    (tensor(out, shape, DType::F32), lse)
}

/// Products to weights over `visible`, zero elsewhere; returns the logarithm of the sum of exponentials.
fn softmax(scores: &mut [f32], visible: Range<usize>, scoring: Scoring) -> f32 {
    let scale = if scoring.is_plain() { scoring.scale } else { 1.0 };
    vectorize(|| {
        scores[..visible.start].fill(0.0);
        scores[visible.end..].fill(0.0);
        let first = visible.start;
        let scores = &mut scores[visible];
        if !scoring.is_plain() {
            for (key, score) in scores.iter_mut().enumerate() {
                *score = scoring.score(*score, first + key);
            }
        }
        let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max) * scale;
        for score in scores.iter_mut() {
            *score = exp(*score * scale - largest);
        }
        let mut lanes = [0.0; 16];
        for chunk in scores.chunks(16) {
            lanes.iter_mut().zip(chunk).for_each(|(lane, x)| *lane += x);
        }
        let sum: f32 = lanes.iter().sum();
        let inverse = 1.0 / sum;
        scores.iter_mut().for_each(|score| *score *= inverse);
        largest + sum.ln()
    })
}

fn zeros(len: usize) -> Vec<f32> {
    written(len, 1 << 14, |_, _| {})
}

/// Gradients with respect to q, k and v.
pub(super) fn backward([q, k, v, d_out]: [FlexTensor; 4], lse: &[f32], spec: Visible) -> [FlexTensor; 3] {
    let (sizes, q_shape, k_shape) = (Sizes::new(&q, &k, &v, spec), shape_of(&q), shape_of(&k));
    let (q, k, v) = (contiguous(q), contiguous(k), contiguous(v));
    let d_out = contiguous(d_out);
    let (q, k, v, d_out) = (floats(&q), floats(&k), floats(&v), floats(&d_out));
    let (mut dq, mut dk, mut dv) = (zeros(q.len()), zeros(k.len()), zeros(v.len()));
    let shared = [&mut dq, &mut dk, &mut dv].map(|values| SharedMut(values.as_mut_ptr()));
    let group = sizes.heads / sizes.kv_heads;
    let (q_stride, k_stride, head_dim) = (sizes.q_stride(), sizes.k_stride(), sizes.head_dim);
    sizes.tasks(|row, kv_head| {
        let [dq, dk, dv] = shared;
        let most = QUERIES.min(sizes.length) * sizes.keys;
        let (mut weights, mut d_scores) = (vec![0.0; most], vec![0.0; most]);
        for block in Block::of(sizes, spec, row) {
            let (count, width, k_at) = (block.queries.len(), block.keys.len(), block.k_at(kv_head));
            let (k, v) = (&k[k_at..], &v[k_at..]);
            for head in kv_head * group..(kv_head + 1) * group {
                let q_at = block.q_at(head);
                let (q, d_out) = (&q[q_at..], &d_out[q_at..]);
                let (weights, d_scores) = (&mut weights[..count * width], &mut d_scores[..count * width]);
                block.scores(q, k, weights);
                let d_rows = Matrix::rows(d_out, q_stride);
                // SAFETY: `d_scores` holds the block's queries × keys.
                unsafe {
                    let v = Matrix::columns(v, k_stride);
                    let out = Out::new(d_scores.as_mut_ptr(), width, false);
                    block.product([count, width, head_dim], out, d_rows, v);
                }
                for (i, (weights, d_scores)) in
                    weights.chunks_exact_mut(width).zip(d_scores.chunks_exact_mut(width)).enumerate()
                {
                    let query = block.queries.start + i;
                    let visible = block.visible(query);
                    let log_sum = lse[block.lse_at(head) + i];
                    block.hide(query, visible.clone(), weights, f32::NEG_INFINITY);
                    block.hide(query, visible.clone(), d_scores, 0.0);
                    let scoring = block.scoring(head, query);
                    softmax_backward(weights, d_scores, visible.clone(), scoring, log_sum);
                    block.hide(query, visible.clone(), weights, 0.0);
                    block.hide(query, visible, d_scores, 0.0);
                }
                let (weights, d_scores): (&[f32], &[f32]) = (weights, d_scores);
                // SAFETY: each (row, key head) belongs to one task, with all query heads of its group.
                unsafe {
                    let k = Matrix::rows(k, k_stride);
                    let q = Matrix::rows(q, q_stride);
                    let rows = Matrix::rows(d_scores, width);
                    let columns = Matrix::columns(d_scores, width);
                    let dq = Out::new(dq.at(q_at), q_stride, false);
                    block.product([count, head_dim, width], dq, rows, k);
                    let [dk, dv] = [dk, dv].map(|to| Out::new(to.at(k_at), k_stride, true));
                    block.product([width, head_dim, count], dk, columns, q);
                    let weights = Matrix::columns(weights, width);
                    block.product([width, head_dim, count], dv, weights, d_rows);
                }
            }
        }
    });
    [
        tensor(dq, q_shape, DType::F32),
        tensor(dk, k_shape.clone(), DType::F32),
        tensor(dv, k_shape, DType::F32),
    ]
}

/// Products to weights, and gradients of weights to gradients of products; zero outside `visible`.
fn softmax_backward(
    weights: &mut [f32],
    d_scores: &mut [f32],
    visible: Range<usize>,
    scoring: Scoring,
    log_sum: f32,
) {
    vectorize(|| {
        for values in [&mut *weights, &mut *d_scores] {
            values[..visible.start].fill(0.0);
            values[visible.end..].fill(0.0);
        }
        let first = visible.start;
        let (weights, d_scores) = (&mut weights[visible.clone()], &mut d_scores[visible]);
        let mut scale = scoring.scale;
        if !scoring.is_plain() {
            scale = 1.0;
            for (key, weight) in weights.iter_mut().enumerate() {
                *weight = scoring.score(*weight, first + key);
            }
        }
        // The result times its gradient, as a sum over keys: what normalising takes from each gradient.
        let mut lanes = [0.0; 16];
        for (weights, d_scores) in weights.chunks_mut(16).zip(d_scores.chunks(16)) {
            for ((weight, d), lane) in weights.iter_mut().zip(d_scores).zip(&mut lanes) {
                let found = exp(*weight * scale - log_sum);
                *lane += found * d;
                // With a soft cap the score is needed once more.
                *weight = if scoring.softcap == 0.0 { found } else { *weight };
            }
        }
        let along: f32 = lanes.iter().sum();
        for (weight, d) in weights.iter_mut().zip(d_scores) {
            let slope = scoring.slope_at(*weight);
            if scoring.softcap != 0.0 {
                *weight = exp(*weight - log_sum);
            }
            *d = *weight * (*d - along) * slope;
        }
    });
}
