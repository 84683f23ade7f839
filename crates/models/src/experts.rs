//! A mixture of experts: each token goes through the few that its router chooses. Tokens are gathered by expert, so that work
//! grows with the chosen ones.

use burn::tensor::{
    Int, Tensor, TensorData,
    activation::{sigmoid, softmax},
};
use kiln_quant_core::{Compute, Projection, fused, operand_of, to_host};

use crate::{
    balance::{Routed, RouterLog},
    config::{ClampedSwiglu, ExpertsConfig},
};

/// The linears of one expert: gate, way in, way out.
pub type Expert<P> = [P; 3];

/// Which experts tokens go through.
struct Routes {
    /// For each token the chosen experts, the best first.
    chosen: Vec<usize>,
    per_token: usize,
}

impl Routes {
    /// The experts with the highest of `scores` `[tokens, experts]`, the first of equal ones.
    fn new(scores: &[f32], experts: &ExpertsConfig) -> Self {
        let mut chosen = Vec::with_capacity(scores.len() / experts.count * experts.per_token);
        for row in scores.chunks_exact(experts.count) {
            let mut order: Vec<usize> = (0..experts.count).collect();
            order.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
            chosen.extend_from_slice(&order[..experts.per_token]);
        }
        Self { chosen, per_token: experts.per_token }
    }

    /// Places in `chosen`, sorted by their expert, and how many each expert has.
    fn by_expert(&self, count: usize) -> (Vec<usize>, Vec<usize>) {
        let mut order: Vec<usize> = (0..self.chosen.len()).collect();
        order.sort_by_key(|place| self.chosen[*place]);
        let mut counts = vec![0; count];
        self.chosen.iter().for_each(|expert| counts[*expert] += 1);
        (order, counts)
    }
}

/// The weighted sum of the chosen experts' results; `scores` `[tokens, experts]` are the router's, `factors` `[experts]` go onto
/// the weights that come of them. What is chosen is told to `log`.
///
/// # Shapes
/// `x` `[tokens, width]` → the same.
///
/// # Panics
/// If the device can't be read.
pub(crate) fn mixture<P: Projection>(
    all: &[Expert<P>],
    x: Tensor<2>,
    scores: Tensor<2>,
    factors: Option<Tensor<1>>,
    log: Option<&RouterLog>,
    config: &ExpertsConfig,
    gated: impl Fn(Tensor<2>, Tensor<2>, Compute) -> Tensor<2>,
) -> Tensor<2> {
    let [tokens, width] = x.dims();
    let device = x.device().without_autodiff();
    let indices = |values: Vec<usize>| {
        let values: Vec<i64> = values.into_iter().map(|value| value as i64).collect();
        Tensor::<1, Int>::from_data(values.as_slice(), &device)
    };
    let host = to_host("the router's scores", scores.clone()).unwrap_or_else(|error| panic!("{error}"));
    let routes = Routes::new(&host, config);
    let (order, counts) = routes.by_expert(config.count);
    if let Some(log) = log {
        log.add(Routed { scores: scores.clone(), chosen: routes.chosen.as_slice().into() });
    }

    let per_token = routes.per_token;
    let chosen: Vec<i64> = routes.chosen.iter().map(|expert| *expert as i64).collect();
    let chosen = Tensor::<2, Int>::from_data(TensorData::new(chosen, [tokens, per_token]), &device);
    let mut weights = softmax(scores, 1).gather(1, chosen.clone());
    if config.normalise {
        weights = weights.clone() / weights.sum_dim(1);
    }
    if let Some(factors) = factors {
        let factors = factors.select(0, chosen.reshape([tokens * per_token]));
        weights = weights * factors.reshape([tokens, per_token]);
    }
    let weights = weights.reshape([tokens * per_token]).select(0, indices(order.clone()));

    // Rows of `x`, once for each expert that they go through, expert by expert.
    let gathered = x.select(0, indices(order.iter().map(|place| place / per_token).collect()));
    let mut results = Vec::new();
    let mut first = 0;
    for ([gate, up, down], count) in all.iter().zip(counts) {
        if count > 0 {
            let x = operand_of(gathered.clone().narrow(0, first, count), &[gate, up]);
            let inner = gated(gate.forward(x.clone()), up.forward(x), down.compute());
            results.push(down.forward(operand_of(inner, &[down])));
            first += count;
        }
    }
    let results = Tensor::cat(results, 0) * weights.unsqueeze_dim(1);
    // Back to the tokens' order.
    let mut back = vec![0; order.len()];
    order.into_iter().enumerate().for_each(|(row, place)| back[place] = row);
    let results = results.select(0, indices(back)).reshape([tokens, per_token, width]);
    results.sum_dim(1).reshape([tokens, width])
}

/// See [`ClampedSwiglu`].
pub(crate) fn clamped_swiglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>, by: ClampedSwiglu) -> Tensor<D> {
    let gate = gate.clamp_max(by.limit);
    let up = up.clamp(-by.limit, by.limit);
    up.add_scalar(1.0) * gate.clone() * sigmoid(gate.mul_scalar(by.alpha))
}

/// What the shared expert gives is multiplied by the sigmoid of `score` `[tokens, 1]`.
pub(crate) fn shared<P: Projection>([gate, up, down]: [&P; 3], x: Tensor<2>, score: Tensor<2>) -> Tensor<2> {
    let x = operand_of(x, &[gate, up]);
    let inner = fused::swiglu(gate.forward(x.clone()), up.forward(x), down.compute());
    down.forward(operand_of(inner, &[down])) * sigmoid(score)
}
