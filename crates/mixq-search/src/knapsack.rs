//! The multiple-choice knapsack: one choice per unit, least total loss, for every budget at once.

use crate::{Config, Error, Result};

/// Losses closer than this share of the largest possible loss are ties, which go to the smaller weight.
const TIE: f64 = 1e-12;

/// States kept per unit; beyond, weights are rounded up to a coarser unit so that budgets still hold.
const MAX_STATES: usize = 1 << 18;

/// A solution: what it weighs, what it loses, what it chooses.
#[derive(Debug, Clone, PartialEq)]
pub struct KnapsackPoint {
    /// Sum of the chosen weights.
    pub weight: u64,
    /// Sum of the chosen losses.
    pub loss: f64,
    /// The choices.
    pub config: Config,
}

#[derive(Clone, Copy)]
struct State {
    /// Rounded weight, exact unless the state count forced rounding.
    weight: u64,
    loss: f64,
    choice: u8,
    previous: u32,
}

/// Every Pareto-optimal solution, by growing weight and falling loss: the optimum of a budget is the last one that
/// fits. Dynamic programming over units that keeps, per unit, only the states that no other dominates.
///
/// The result is exact as long as a unit has at most 2^18 such states; beyond, weights are rounded up (to a
/// power of two), which keeps every budget but may miss optima that differ by less than the rounding.
///
/// ```
/// use kiln_mixq_search::knapsack;
/// let front = knapsack(&[vec![1, 3], vec![2, 4]], &[vec![5.0, 1.0], vec![2.0, 1.5]])?;
/// let optimum = front.iter().rev().find(|point| point.weight <= 6).unwrap();
/// assert_eq!((optimum.weight, optimum.loss, &optimum.config.0[..]), (5, 3.0, &[1, 0][..]));
/// # Ok::<(), kiln_mixq_search::Error>(())
/// ```
///
/// # Errors
/// [`Error::Option`] if the tables' shapes differ, a unit has no choice or more than 255, a loss is not finite, or
/// the weights overflow.
pub fn knapsack(weights: &[Vec<u64>], losses: &[Vec<f64>]) -> Result<Vec<KnapsackPoint>> {
    check(weights, losses)?;
    let largest: f64 =
        losses.iter().map(|unit| unit.iter().fold(0.0f64, |max, loss| max.max(loss.abs()))).sum();
    let tie = TIE * largest;
    let mut granule = 1u64;
    let mut layers: Vec<Vec<State>> = Vec::with_capacity(weights.len());
    let start = [State { weight: 0, loss: 0.0, choice: 0, previous: 0 }];
    for (weights, losses) in weights.iter().zip(losses) {
        let before: &[State] = layers.last().map_or(&start, Vec::as_slice);
        let mut states = extend(before, weights, losses);
        prune(&mut states, tie);
        while states.len() > MAX_STATES {
            granule = granule.saturating_mul(2);
            for state in &mut states {
                state.weight = state.weight.div_ceil(granule).saturating_mul(granule);
            }
            prune(&mut states, tie);
        }
        layers.push(states);
    }
    let ends = 0..layers.last().map_or(0, Vec::len);
    let mut front: Vec<_> = ends.map(|end| trace(&layers, end, weights, losses)).collect();
    if granule > 1 {
        // Exact weights may dominate where rounded ones didn't.
        front.sort_by(|a, b| a.weight.cmp(&b.weight).then(a.loss.total_cmp(&b.loss)));
        let mut best = f64::INFINITY;
        front.retain(|point| {
            let better = point.loss < best - tie;
            best = best.min(point.loss);
            better
        });
    }
    Ok(front)
}

fn check(weights: &[Vec<u64>], losses: &[Vec<f64>]) -> Result<()> {
    let shapes = |len: usize| format!("{len} units");
    if weights.len() != losses.len() {
        return Err(Error::option("knapsack.losses", &shapes(weights.len()), losses.len()));
    }
    for (unit, (weights, losses)) in weights.iter().zip(losses).enumerate() {
        if weights.is_empty() || weights.len() > 255 || weights.len() != losses.len() {
            let found = format!("{} weights and {} losses at unit {unit}", weights.len(), losses.len());
            return Err(Error::option("knapsack.choices", "1 to 255, as many losses as weights", found));
        }
        if let Some(loss) = losses.iter().find(|loss| !loss.is_finite()) {
            return Err(Error::option("knapsack.losses", "finite losses", format!("{loss} at unit {unit}")));
        }
    }
    // Half the range leaves room for rounding up.
    let heaviest = weights.iter().try_fold(0u64, |sum, unit| sum.checked_add(*unit.iter().max()?));
    match heaviest {
        Some(sum) if sum < u64::MAX / 2 => Ok(()),
        _ => Err(Error::option("knapsack.weights", "a sum below 2^63", "an overflow")),
    }
}

fn extend(before: &[State], weights: &[u64], losses: &[f64]) -> Vec<State> {
    let mut states = Vec::with_capacity(before.len() * weights.len());
    for (choice, (weight, loss)) in weights.iter().zip(losses).enumerate() {
        states.extend(before.iter().enumerate().map(|(previous, state)| State {
            weight: state.weight + weight,
            loss: state.loss + loss,
            choice: choice as u8,
            previous: previous as u32,
        }));
    }
    states
}

/// Sorts by weight and keeps the states that lose less than every lighter one.
fn prune(states: &mut Vec<State>, tie: f64) {
    states.sort_by(|a, b| {
        a.weight.cmp(&b.weight).then(a.loss.total_cmp(&b.loss)).then(a.choice.cmp(&b.choice))
    });
    let mut best = f64::INFINITY;
    states.retain(|state| {
        let better = state.loss < best - tie;
        if better {
            best = state.loss;
        }
        better
    });
}

fn trace(layers: &[Vec<State>], end: usize, weights: &[Vec<u64>], losses: &[Vec<f64>]) -> KnapsackPoint {
    let mut config = Config(vec![0; layers.len()]);
    let mut index = end;
    for (unit, states) in layers.iter().enumerate().rev() {
        config.0[unit] = states[index].choice;
        index = states[index].previous as usize;
    }
    let chosen = || config.0.iter().map(|&choice| usize::from(choice)).enumerate();
    let weight = chosen().map(|(unit, choice)| weights[unit][choice]).sum();
    let loss = chosen().map(|(unit, choice)| losses[unit][choice]).sum();
    KnapsackPoint { weight, loss, config }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{close, vector};

    #[test]
    fn reference_front_and_every_reference_budget() {
        let file = vector("automixq_mckp.json");
        let sizes: Vec<u64> = serde_json::from_value(file["size"].clone()).unwrap();
        let bits: Vec<u64> = serde_json::from_value(file["bit_options"].clone()).unwrap();
        let losses: Vec<Vec<f64>> = serde_json::from_value(file["sensitivity"].clone()).unwrap();
        let weights: Vec<Vec<u64>> =
            sizes.iter().map(|size| bits.iter().map(|bits| size * bits).collect()).collect();
        let front = knapsack(&weights, &losses).unwrap();
        let chosen = |point: &KnapsackPoint| -> Vec<u64> {
            point.config.0.iter().map(|&choice| bits[usize::from(choice)]).collect()
        };

        let expected = file["pareto_front"].as_array().unwrap();
        assert_eq!(front.len(), expected.len());
        for (point, expected) in front.iter().zip(expected) {
            assert_eq!(serde_json::json!(point.weight), expected["memory"]);
            close(point.loss, expected["loss"].as_f64().unwrap());
            assert_eq!(serde_json::json!(chosen(point)), expected["bits"]);
        }
        let mut beats_greedy = 0;
        for case in file["budgets"].as_array().unwrap() {
            let budget = case["budget"].as_u64().unwrap();
            let best = front.iter().rev().find(|point| point.weight <= budget).unwrap();
            close(best.loss, case["optimal_loss"].as_f64().unwrap());
            assert_eq!(serde_json::json!(best.weight), case["optimal_memory"]);
            assert_eq!(serde_json::json!(chosen(best)), case["optimal_bits"]);
            beats_greedy += usize::from(best.loss < case["greedy_loss"].as_f64().unwrap() - 1e-9);
        }
        assert_eq!(beats_greedy, 1, "greedy is worse at one budget");
    }

    fn tables() -> impl Strategy<Value = (Vec<Vec<u64>>, Vec<Vec<f64>>)> {
        let unit = (1usize..5).prop_flat_map(|choices| {
            let weights = prop::collection::vec(0u64..1000, choices);
            (weights, prop::collection::vec(-2.0f64..10.0, choices))
        });
        prop::collection::vec(unit, 1..6).prop_map(|units| units.into_iter().unzip())
    }

    proptest! {
        #[test]
        fn optimum_of_every_budget_equals_brute_force((weights, losses) in tables(), budget in 0u64..5000) {
            let front = knapsack(&weights, &losses).unwrap();
            let found = front.iter().rev().find(|point| point.weight <= budget);

            let mut best: Option<(f64, u64)> = None;
            let mut index = vec![0usize; weights.len()];
            'all: loop {
                let weight: u64 = index.iter().enumerate().map(|(u, &c)| weights[u][c]).sum();
                let loss: f64 = index.iter().enumerate().map(|(u, &c)| losses[u][c]).sum();
                if weight <= budget && best.is_none_or(|(least, _)| loss < least) {
                    best = Some((loss, weight));
                }
                for unit in 0..index.len() {
                    index[unit] += 1;
                    if index[unit] < weights[unit].len() {
                        continue 'all;
                    }
                    index[unit] = 0;
                }
                break;
            }
            prop_assert_eq!(found.is_some(), best.is_some());
            if let (Some(found), Some((loss, _))) = (found, best) {
                prop_assert!((found.loss - loss).abs() < 1e-9, "{} against {}", found.loss, loss);
            }
            prop_assert!(front.windows(2).all(|w| w[0].weight < w[1].weight && w[0].loss > w[1].loss));
        }
    }

    #[test]
    fn equal_sizes_and_two_choices_take_prefixes_of_the_sorted_sensitivities() {
        let gains = [3.0, 0.5, 7.0, 1.0, 2.0];
        let weights = vec![vec![4, 8]; gains.len()];
        let losses: Vec<Vec<f64>> = gains.iter().map(|gain| vec![*gain, 0.0]).collect();
        let front = knapsack(&weights, &losses).unwrap();
        assert_eq!(front.len(), 6);
        let mut sorted = gains;
        sorted.sort_by(|a, b| b.total_cmp(a));
        for (upgraded, point) in front.iter().enumerate() {
            close(point.loss, sorted[upgraded..].iter().sum::<f64>());
        }
    }

    #[test]
    fn too_many_states_are_rounded_but_budgets_hold() {
        // Powers of two: 2^20 distinct weights, each with its own optimum.
        let weights: Vec<Vec<u64>> = (0..20).map(|unit| vec![0, 1 << unit]).collect();
        let losses: Vec<Vec<f64>> = (0..20).map(|unit| vec![f64::from(1 << unit), 0.0]).collect();
        let front = knapsack(&weights, &losses).unwrap();
        assert!(front.len() <= MAX_STATES && front.len() > 1000);
        let total = f64::from((1 << 20) - 1);
        for point in front.iter().step_by(997) {
            close(point.loss, total - point.weight as f64);
        }
    }

    #[test]
    fn bad_tables_are_errors() {
        let fail =
            |weights: &[Vec<u64>], losses: &[Vec<f64>]| knapsack(weights, losses).unwrap_err().to_string();
        assert!(fail(&[vec![1]], &[]).contains("1 units"));
        assert!(fail(&[vec![1, 2]], &[vec![1.0]]).contains("unit 0"));
        assert!(fail(&[vec![]], &[vec![]]).contains("1 to 255"));
        assert!(fail(&[vec![1]], &[vec![f64::NAN]]).contains("NaN"));
        assert!(fail(&[vec![u64::MAX], vec![1]], &[vec![1.0], vec![1.0]]).contains("overflow"));
    }
}
