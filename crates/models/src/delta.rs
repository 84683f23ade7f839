//! The gated delta net: a block that keeps a matrix for each head in place of keys and values, and so costs the same at every
//! position.
//!
//! With keys `k`, queries `q`, values `v`, decays `γ` and strengths `β` of the tokens, each head's `S` `[key_dim, value_dim]`
//! goes `S ← γ S`, `S ← S + k (β (v - Sᵀk))ᵀ`, and says `Sᵀq`. Tokens are taken in chunks within which all is products of
//! matrices: what the tokens of a chunk write solves a triangular system.
//!
//! Source: Gated Delta Networks, [arXiv:2412.06464](https://arxiv.org/abs/2412.06464), sections 3.2 and 3.3; Qwen 3.5's form of it
//! as transformers 5.24 computes it.

use burn::tensor::{
    Tensor, TensorData,
    activation::{sigmoid, silu, softplus},
};
use kiln_quant_core::{Projection, fused, operand_of};

use crate::{Context, config::DeltaNetConfig};

/// Tokens of a chunk.
pub(crate) const CHUNK: usize = 64;
/// Added to the squared length of queries and keys.
const LENGTH_EPS: f64 = 1e-6;

/// What a block of this kind is made of.
pub(crate) struct DeltaNet<'a, P: Projection> {
    pub config: DeltaNetConfig,
    pub norm_eps: f64,
    /// To queries, keys and values.
    pub mixed: &'a P,
    /// To the gate of the output.
    pub gate: &'a P,
    /// To strengths.
    pub strength: &'a P,
    /// To decays.
    pub decay: &'a P,
    pub output: &'a P,
    /// `[channels * width]`, the last of each being for the token itself.
    pub convolution: Tensor<1>,
    /// `[value_heads]`.
    pub log_rate: Tensor<1>,
    pub time_bias: Tensor<1>,
    /// `[value_dim]`.
    pub norm: Tensor<1>,
}

/// What a block remembers of the tokens before.
#[derive(Debug, Clone)]
pub(crate) struct DeltaState {
    /// Inputs of the convolution that further tokens see, `[batch, width - 1, channels]`.
    pub tail: Tensor<3>,
    /// `[batch, value_heads, key_dim, value_dim]`.
    pub memory: Tensor<4>,
}

/// Where documents begin and end, from the segments of tokens in host memory; nothing where all are of one.
struct Segments {
    length: usize,
    past: usize,
    /// For each row the segments of earlier tokens and of these.
    rows: Vec<Vec<u32>>,
}

impl Segments {
    fn new(context: &Context) -> Self {
        let [batch, length] = context.ids.dims();
        let all = context.key_segments();
        let width = all.len() / batch;
        let rows = all.chunks_exact(width).map(<[u32]>::to_vec).collect();
        Self { length, past: width - length, rows }
    }

    fn is_one(&self) -> bool {
        self.rows.iter().all(|row| row.iter().all(|segment| *segment == row[0]))
    }

    /// Segment of a token; beyond the last one that of the last one.
    fn of(&self, row: usize, token: usize) -> u32 {
        let row = &self.rows[row];
        row[(self.past + token).min(row.len() - 1)]
    }

    /// 1 for tokens of the segment of the one `back` before them.
    fn tap(&self, back: usize, like: &Tensor<3>) -> Tensor<3> {
        let same = |row: usize, token: usize| {
            let before = (self.past + token).checked_sub(back);
            before.is_some_and(|before| self.rows[row][before] == self.of(row, token))
        };
        self.numbers([self.rows.len(), self.length, 1], like, |row, token, _| same(row, token))
    }

    fn numbers(
        &self,
        sizes: [usize; 3],
        like: &Tensor<3>,
        holds: impl Fn(usize, usize, usize) -> bool,
    ) -> Tensor<3> {
        let mut values = Vec::with_capacity(sizes.iter().product());
        for row in 0..sizes[0] {
            for token in 0..sizes[1] {
                values.extend((0..sizes[2]).map(|other| f32::from(u8::from(holds(row, token, other)))));
            }
        }
        Tensor::from_data(TensorData::new(values, sizes), &like.device())
    }
}

impl<P: Projection> DeltaNet<'_, P> {
    /// `[batch, length, hidden_size]` → the same; `state` is that before the tokens and becomes that behind them.
    pub(crate) fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        state: Option<&mut Option<DeltaState>>,
    ) -> Tensor<3> {
        let [batch, length, _] = x.dims();
        let DeltaNetConfig { key_heads, value_heads, key_dim, value_dim, .. } = self.config;
        let segments = Segments::new(context);
        let before = state.as_ref().and_then(|state| state.as_ref().cloned());

        let x = operand_of(x, &[self.mixed, self.gate, self.strength, self.decay]);
        let mixed = self.mixed.forward(x.clone());
        let (mixed, tail) = self.convolved(mixed, before.as_ref().map(|state| state.tail.clone()), &segments);
        let part = |first: usize, heads: usize, dim: usize| {
            mixed.clone().narrow(2, first, heads * dim).reshape([batch, length, heads, dim])
        };
        let keys = key_heads * key_dim;
        let repeat = value_heads / key_heads;
        let of_heads = |x: Tensor<4>| {
            let lengths = x.clone().square().sum_dim(3).add_scalar(LENGTH_EPS).sqrt();
            let x: Tensor<5> = (x / lengths).unsqueeze_dim(3);
            x.expand([batch, length, key_heads, repeat, key_dim]).reshape([
                batch,
                length,
                value_heads,
                key_dim,
            ])
        };
        let q = of_heads(part(0, key_heads, key_dim)).mul_scalar((key_dim as f64).powf(-0.5));
        let k = of_heads(part(keys, key_heads, key_dim));
        let v = part(2 * keys, value_heads, value_dim);
        let strength = sigmoid(self.strength.forward(x.clone()));
        let rate = self.log_rate.clone().exp().neg().unsqueeze();
        let log_decay =
            rate * softplus(self.decay.forward(x.clone()) + self.time_bias.clone().unsqueeze(), 1.0);

        let memory = before.map(|state| state.memory);
        let (said, memory) = delta_rule([q, k, v], log_decay, strength, memory, &segments);
        if let Some(state) = state {
            *state = Some(DeltaState { tail, memory });
        }
        let rows = batch * length * value_heads;
        let said = fused::rms_norm(said.reshape([rows, value_dim]), self.norm.clone(), self.norm_eps);
        let gated = said.reshape([batch, length, value_heads * value_dim]) * silu(self.gate.forward(x));
        self.output.forward(operand_of(gated, &[self.output]))
    }

    /// Each channel's sum over the latest tokens of a document, through SiLU; and what further tokens see of them.
    fn convolved(
        &self,
        mixed: Tensor<3>,
        tail: Option<Tensor<3>>,
        segments: &Segments,
    ) -> (Tensor<3>, Tensor<3>) {
        let [batch, length, channels] = mixed.dims();
        let width = self.config.convolution;
        let weights = self.convolution.clone().reshape([channels, width]);
        let of_tap = |tap: usize| weights.clone().narrow(1, tap, 1).reshape([1, 1, channels]);
        if width == 1 {
            let none = mixed.clone().narrow(1, 0, 0);
            return (silu(mixed * of_tap(0)), none);
        }
        let options = (&mixed.device().without_autodiff(), mixed.dtype());
        let tail = tail.unwrap_or_else(|| Tensor::zeros([batch, width - 1, channels], options));
        let all = Tensor::cat(vec![tail, mixed], 1);
        let one = segments.is_one();
        let mut sum: Option<Tensor<3>> = None;
        for tap in 0..width {
            let mut term = all.clone().narrow(1, tap, length) * of_tap(tap);
            let back = width - 1 - tap;
            if back > 0 && !one {
                term = term.clone() * segments.tap(back, &term);
            }
            sum = Some(match sum {
                Some(sum) => sum + term,
                None => term,
            });
        }
        let sum = sum.unwrap_or_else(|| panic!("a convolution of width 0"));
        (silu(sum), all.narrow(1, length, width - 1))
    }
}

/// What the heads say, `[batch, length, heads, value_dim]`, and their matrices behind the tokens.
///
/// # Shapes
/// `q`, `k` `[batch, length, heads, key_dim]`, `v` `[.., value_dim]`; `log_decay`, `strength` `[batch, length, heads]`; `memory`
/// `[batch, heads, key_dim, value_dim]`.
fn delta_rule(
    [q, k, v]: [Tensor<4>; 3],
    log_decay: Tensor<3>,
    strength: Tensor<3>,
    memory: Option<Tensor<4>>,
    segments: &Segments,
) -> (Tensor<4>, Tensor<4>) {
    let [batch, length, heads, key_dim] = q.dims();
    let value_dim = v.dims()[3];
    let chunk = CHUNK.min(length.next_power_of_two());
    let chunks = length.div_ceil(chunk);
    let all = batch * heads;
    // `[batch * heads, chunks, chunk, dim]`; tokens beyond the last one write nothing and take nothing away.
    let by_chunk = |x: Tensor<4>| {
        let dim = x.dims()[3];
        let x = x.swap_dims(1, 2).reshape([all, length, dim]);
        let x = match chunks * chunk - length {
            0 => x,
            missing => {
                let none = Tensor::zeros([all, missing, dim], (&x.device().without_autodiff(), x.dtype()));
                Tensor::cat(vec![x, none], 1)
            }
        };
        x.reshape([all, chunks, chunk, dim])
    };
    let [q, k, v] = [q, k, v].map(by_chunk);
    let [log_decay, strength] = [log_decay, strength].map(|x| by_chunk(x.unsqueeze_dim(3)));
    let device = q.device().without_autodiff();
    let triangle = |diagonal: i64| {
        let lower = Tensor::<2>::ones([chunk, chunk], &device).tril(diagonal);
        lower.reshape([1, 1, chunk, chunk])
    };

    // Sums of logarithms from the chunk's begin on, and what is left at token `i` of what token `j` wrote.
    let sums = triangle(0).expand([all, chunks, chunk, chunk]).matmul(log_decay);
    let causal = triangle(0).expand([all, chunks, chunk, chunk]);
    let one = segments.is_one();
    // For each row and chunk numbers of its tokens, the same for all heads.
    let of_tokens = |columns: usize, holds: &dyn Fn(usize, usize, usize, usize) -> bool| {
        let like = Tensor::<3>::zeros([1, 1, 1], &device);
        let holds = |row: usize, place: usize, other: usize| holds(row, place / chunk, place % chunk, other);
        let values = segments.numbers([batch, chunks * chunk, columns], &like, holds);
        let values: Tensor<5> = values.reshape([batch, 1, chunks, chunk, columns]);
        values.expand([batch, heads, chunks, chunk, columns]).reshape([all, chunks, chunk, columns])
    };
    let seen = match one {
        true => causal,
        false => {
            let same = of_tokens(chunk, &|row, at, token, other| {
                segments.of(row, at * chunk + token) == segments.of(row, at * chunk + other)
            });
            causal * same
        }
    };
    let left = sums.clone().expand([all, chunks, chunk, chunk]);
    let left = (left.clone() - left.swap_dims(2, 3)).mask_fill(seen.equal_elem(0.0), f32::NEG_INFINITY).exp();

    let within = k.clone().matmul(k.clone().swap_dims(2, 3)) * left.clone() * strength.clone() * triangle(-1);
    let solved = inverse_of_one_plus(within);
    let mut from_before = sums.clone().exp();
    let last = sums.clone().narrow(2, chunk - 1, 1);
    let mut to_end = (last.clone() - sums).exp();
    let mut kept = last.exp();
    if !one {
        let before = |row: usize, at: usize| match at {
            0 if segments.past == 0 => None,
            0 => Some(segments.rows[row][segments.past - 1]),
            at => Some(segments.of(row, at * chunk - 1)),
        };
        let end = |row: usize, at: usize| segments.of(row, (at + 1) * chunk - 1);
        from_before = from_before
            * of_tokens(1, &|row, at, token, _| {
                before(row, at) == Some(segments.of(row, at * chunk + token))
            });
        to_end =
            to_end * of_tokens(1, &|row, at, token, _| end(row, at) == segments.of(row, at * chunk + token));
        kept = kept
            * of_tokens(1, &|row, at, _, _| before(row, at) == Some(end(row, at))).narrow(2, chunk - 1, 1);
    }
    let written = solved.clone().matmul(v * strength.clone());
    let unlearned = solved.matmul(k.clone() * strength * from_before.clone());
    let scores = q.clone().matmul(k.clone().swap_dims(2, 3)) * left;
    let asked = q * from_before;
    let stored = (k * to_end).swap_dims(2, 3);

    let at = |x: &Tensor<4>, index: usize| x.clone().narrow(1, index, 1).squeeze_dim::<3>(1);
    let mut memory = memory.map(|memory| memory.reshape([all, key_dim, value_dim]));
    let mut said = Vec::with_capacity(chunks);
    for index in 0..chunks {
        let written = match &memory {
            Some(memory) => at(&written, index) - at(&unlearned, index).matmul(memory.clone()),
            None => at(&written, index),
        };
        let mut of_chunk = at(&scores, index).matmul(written.clone());
        let mut next = at(&stored, index).matmul(written);
        if let Some(memory) = memory {
            of_chunk = of_chunk + at(&asked, index).matmul(memory.clone());
            next = next + memory * at(&kept, index);
        }
        said.push(of_chunk);
        memory = Some(next);
    }
    let said = Tensor::cat(said, 1).narrow(1, 0, length);
    let said = said.reshape([batch, heads, length, value_dim]).swap_dims(1, 2);
    let memory = memory.unwrap_or_else(|| panic!("no tokens"));
    (said, memory.reshape([batch, heads, key_dim, value_dim]))
}

/// `(1 + a)⁻¹` for matrices `a` with nothing on and above the diagonal, whose size is a power of two: from the inverses of
/// halves, `[[A, 0], [B, C]]⁻¹ = [[A⁻¹, 0], [-C⁻¹ B A⁻¹, C⁻¹]]`, as exact as substitution row by row.
fn inverse_of_one_plus(a: Tensor<4>) -> Tensor<4> {
    let [all, chunks, size, _] = a.dims();
    let count = all * chunks;
    let a = a.reshape([count, size, size]);
    let options = (&a.device().without_autodiff(), a.dtype());
    let mut inverse = Tensor::<4>::ones([count, size, 1, 1], options);
    let mut half = 1;
    while half < size {
        let pairs = size / (2 * half);
        let blocks: Tensor<5> = a.clone().reshape([count, pairs, 2 * half, pairs, 2 * half]);
        let diagonal = Tensor::<2>::eye(pairs, options.0).cast(options.1).reshape([1, pairs, 1, pairs, 1]);
        let blocks = (blocks * diagonal).sum_dim(3).squeeze_dim::<4>(3);
        let below = blocks.narrow(2, half, half).narrow(3, 0, half);
        let both: Tensor<5> = inverse.reshape([count, pairs, 2, half, half]);
        let part = |index| both.clone().narrow(2, index, 1).squeeze_dim::<4>(2);
        let (first, second) = (part(0), part(1));
        let corner = second.clone().matmul(below).matmul(first.clone()).neg();
        let none = Tensor::zeros([count, pairs, half, half], options);
        let top = Tensor::cat(vec![first, none], 3);
        inverse = Tensor::cat(vec![top, Tensor::cat(vec![corner, second], 3)], 2);
        half *= 2;
    }
    inverse.reshape([all, chunks, size, size])
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use kiln_testkit::{assert_close, read, tensor};

    use super::*;

    /// Token by token, in 64 bits: what the heads say and their matrices at the end.
    fn recurrent(
        [q, k, v]: [&[f32]; 3],
        log_decay: &[f32],
        strength: &[f32],
        rows: &[Vec<u32>],
        [heads, key_dim, value_dim]: [usize; 3],
    ) -> [Vec<f32>; 2] {
        let length = rows[0].len();
        let (mut said, mut end) = (vec![0.0; rows.len() * length * heads * value_dim], Vec::new());
        for (row, segments) in rows.iter().enumerate() {
            for head in 0..heads {
                let mut memory = vec![0.0f64; key_dim * value_dim];
                for token in 0..length {
                    if token > 0 && segments[token] != segments[token - 1] {
                        memory.fill(0.0);
                    }
                    let place = (row * length + token) * heads + head;
                    let vector = |all: &[f32], dim: usize| -> Vec<f64> {
                        all[place * dim..][..dim].iter().map(|x| f64::from(*x)).collect()
                    };
                    let (q, k, v) = (vector(q, key_dim), vector(k, key_dim), vector(v, value_dim));
                    let decay = f64::from(log_decay[place]).exp();
                    memory.iter_mut().for_each(|x| *x *= decay);
                    let recalled = |memory: &[f64], by: &[f64], column: usize| -> f64 {
                        by.iter().enumerate().map(|(i, x)| x * memory[i * value_dim + column]).sum()
                    };
                    let update: Vec<f64> = (0..value_dim)
                        .map(|j| f64::from(strength[place]) * (v[j] - recalled(&memory, &k, j)))
                        .collect();
                    for (i, k) in k.iter().enumerate() {
                        update.iter().enumerate().for_each(|(j, u)| memory[i * value_dim + j] += k * u);
                    }
                    for column in 0..value_dim {
                        said[place * value_dim + column] = recalled(&memory, &q, column) as f32;
                    }
                }
                end.extend(memory.into_iter().map(|x| x as f32));
            }
        }
        [said, end]
    }

    fn run(length: usize, rows: &[Vec<u32>], same_keys: bool, cut: Option<usize>) {
        let [heads, key_dim, value_dim] = [2, 4, 3];
        let device = Device::flex();
        let batch = rows.len();
        let lengthened = |x: Tensor<4>| {
            let lengths = x.clone().square().sum_dim(3).sqrt();
            x / lengths
        };
        let q = lengthened(tensor(1, [batch, length, heads, key_dim], &device));
        let k = match same_keys {
            true => lengthened(tensor::<4>(2, [batch, 1, heads, key_dim], &device))
                .expand([batch, length, heads, key_dim]),
            false => lengthened(tensor(2, [batch, length, heads, key_dim], &device)),
        };
        let v = tensor::<4>(3, [batch, length, heads, value_dim], &device);
        let log_decay = match same_keys {
            true => Tensor::zeros([batch, length, heads], &device),
            false => tensor::<3>(4, [batch, length, heads], &device).abs().neg(),
        };
        let strength = match same_keys {
            true => Tensor::ones([batch, length, heads], &device),
            false => sigmoid(tensor::<3>(5, [batch, length, heads], &device)),
        };
        let host = [&q, &k, &v].map(|x| read(x.clone()));
        let [expected, expected_end] = recurrent(
            host.each_ref().map(Vec::as_slice),
            &read(log_decay.clone()),
            &read(strength.clone()),
            rows,
            [heads, key_dim, value_dim],
        );
        let part = |first: usize, count: usize, memory: Option<Tensor<4>>| {
            let segments = Segments {
                length: count,
                past: first,
                rows: rows.iter().map(|row| row[..first + count].to_vec()).collect(),
            };
            let of = |x: &Tensor<4>| x.clone().narrow(1, first, count);
            let three = |x: &Tensor<3>| x.clone().narrow(1, first, count);
            delta_rule([of(&q), of(&k), of(&v)], three(&log_decay), three(&strength), memory, &segments)
        };
        let (said, end) = match cut {
            None => part(0, length, None),
            Some(cut) => {
                let (first, memory) = part(0, cut, None);
                let (second, end) = part(cut, length - cut, Some(memory));
                (Tensor::cat(vec![first, second], 1), end)
            }
        };
        let what = format!("{length} {rows:?} {same_keys} {cut:?}");
        assert_close(&what, &read(said), &expected, 1e-5);
        assert_close(&what, &read(end), &expected_end, 1e-5);
    }

    #[test]
    fn chunks_say_what_tokens_one_by_one_do() {
        for length in [1, 2, 5, 64, 65, 130, 200] {
            let one = vec![vec![1; length]; 2];
            run(length, &one, false, None);
            // Every token asks for the same: what the chunk's inverse must not lose.
            run(length, &one, true, None);
        }
        run(130, &vec![vec![1; 130]; 2], false, Some(129));
        run(130, &vec![vec![1; 130]; 2], false, Some(70));
    }

    #[test]
    fn documents_of_a_row_know_nothing_of_each_other() {
        let row = |parts: &[(u32, usize)]| -> Vec<u32> {
            parts.iter().flat_map(|(segment, count)| vec![*segment; *count]).collect()
        };
        let rows = [row(&[(0, 3), (1, 127)]), row(&[(1, 64), (2, 1), (3, 65)])];
        run(130, &rows, false, None);
        for cut in [1, 3, 64, 65, 129] {
            run(130, &rows, false, Some(cut));
        }
    }

    #[test]
    fn a_triangle_is_inverted() {
        let device = Device::flex();
        for size in [1, 2, 8, 64] {
            let lower = Tensor::<2>::ones([size, size], &device).tril(-1).reshape([1, 1, size, size]);
            // As keys and queries of length 1 make them: with larger numbers the inverse itself grows without bound.
            let a = tensor::<4>(7, [2, 3, size, size], &device).mul_scalar(0.2) * lower.clone();
            for a in [a, lower.expand([2, 3, size, size])] {
                let eye = Tensor::<2>::eye(size, &device).reshape([1, 1, size, size]);
                let product = inverse_of_one_plus(a.clone()).matmul(a + eye.clone());
                let expected = read(eye.expand([2, 3, size, size]));
                assert_close("identity", &read(product), &expected, 1e-4);
            }
        }
    }
}
