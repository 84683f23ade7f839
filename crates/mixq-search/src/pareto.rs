//! Domination, fronts, crowding, hypervolume. Every objective is minimised; negate what is to grow.

use std::cmp::Ordering;

/// Whether `a` dominates `b`: nowhere worse, somewhere better. Duplicates don't dominate each other.
///
/// # Panics
/// If the lengths differ.
pub fn dominates(a: &[f64], b: &[f64]) -> bool {
    assert_eq!(a.len(), b.len(), "points have the same objectives");
    a.iter().zip(b).all(|(a, b)| a <= b) && a.iter().zip(b).any(|(a, b)| a < b)
}

/// Rank of every point: 0 for the front, then the front of what is left, and so on (fast non-dominated sort).
pub fn non_dominated_ranks<P: AsRef<[f64]>>(points: &[P]) -> Vec<usize> {
    let mut dominated_by = vec![0usize; points.len()];
    let mut dominated: Vec<Vec<usize>> = vec![Vec::new(); points.len()];
    for (i, a) in points.iter().enumerate() {
        for (j, b) in points.iter().enumerate() {
            if dominates(a.as_ref(), b.as_ref()) {
                dominated[i].push(j);
                dominated_by[j] += 1;
            }
        }
    }
    let mut ranks = vec![0; points.len()];
    let mut front: Vec<usize> = (0..points.len()).filter(|&i| dominated_by[i] == 0).collect();
    let mut rank = 0;
    while !front.is_empty() {
        let mut next = Vec::new();
        for i in front {
            ranks[i] = rank;
            for &j in &dominated[i] {
                dominated_by[j] -= 1;
                if dominated_by[j] == 0 {
                    next.push(j);
                }
            }
        }
        rank += 1;
        front = next;
    }
    ranks
}

/// Indices of the points that no other dominates, in their order; duplicates all stay.
pub fn pareto_front<P: AsRef<[f64]>>(points: &[P]) -> Vec<usize> {
    let free = |&i: &usize| !points.iter().any(|other| dominates(other.as_ref(), points[i].as_ref()));
    (0..points.len()).filter(free).collect()
}

/// Crowding distance of every point within its own rank: the ends of each objective are infinite, the others add the
/// span between their neighbours over the front's span (nothing where that is 0). Ties are sorted by index.
pub fn crowding_distances<P: AsRef<[f64]>>(points: &[P], ranks: &[usize]) -> Vec<f64> {
    let mut distances = vec![0.0; points.len()];
    let objectives = points.first().map_or(0, |point| point.as_ref().len());
    let last = ranks.iter().max().map_or(0, |rank| rank + 1);
    for rank in 0..last {
        let mut front: Vec<usize> = (0..points.len()).filter(|&i| ranks[i] == rank).collect();
        for objective in 0..objectives {
            let value = |i: usize| points[i].as_ref()[objective];
            front.sort_by(|&a, &b| value(a).total_cmp(&value(b)).then(a.cmp(&b)));
            let (first, last) = (front[0], front[front.len() - 1]);
            let span = value(last) - value(first);
            distances[first] = f64::INFINITY;
            distances[last] = f64::INFINITY;
            for window in front.windows(3).filter(|_| span > 0.0) {
                distances[window[1]] += (value(window[2]) - value(window[0])) / span;
            }
        }
    }
    distances
}

/// Volume that the points dominate up to `reference`, exactly, in any number of dimensions. Points that don't lie
/// below the reference everywhere add nothing. Two dimensions take `O(n log n)`, each further one a factor `n`.
///
/// ```
/// use kiln_mixq_search::hypervolume;
/// assert_eq!(hypervolume(&[[1.0, 2.0], [2.0, 1.0]], &[3.0, 3.0]), 3.0);
/// ```
///
/// # Panics
/// If a point has another length than the reference.
pub fn hypervolume<P: AsRef<[f64]>>(points: &[P], reference: &[f64]) -> f64 {
    let inside = |point: &&[f64]| point.iter().zip(reference).all(|(value, limit)| value < limit);
    let points: Vec<&[f64]> = points
        .iter()
        .map(|point| point.as_ref())
        .inspect(|point| assert_eq!(point.len(), reference.len(), "points have the reference's objectives"))
        .filter(inside)
        .collect();
    slices(points, reference)
}

/// Sweeps along the last objective: between two values of it, the volume is that of the points passed so far.
fn slices(mut points: Vec<&[f64]>, reference: &[f64]) -> f64 {
    let last = match reference.len() {
        0 => return 0.0,
        1 => return points.iter().map(|point| reference[0] - point[0]).fold(0.0, f64::max),
        2 => return staircase(points, reference),
        objectives => objectives - 1,
    };
    points.sort_by(|a, b| a[last].total_cmp(&b[last]));
    let mut volume = 0.0;
    for i in 0..points.len() {
        let end = points.get(i + 1).map_or(reference[last], |next| next[last]);
        if end > points[i][last] {
            let passed = points[..=i].iter().map(|point| &point[..last]).collect();
            volume += (end - points[i][last]) * slices(passed, &reference[..last]);
        }
    }
    volume
}

fn staircase(mut points: Vec<&[f64]>, reference: &[f64]) -> f64 {
    points.sort_by(|a, b| a[0].total_cmp(&b[0]).then(a[1].total_cmp(&b[1])));
    let (mut area, mut best) = (0.0, reference[1]);
    for point in points {
        if point[1] < best {
            area += (reference[0] - point[0]) * (best - point[1]);
            best = point[1];
        }
    }
    area
}

/// Index of the best second value with a first value of at most `budget`; ties go to the smaller first value, then to
/// the lower index.
pub fn best_under_budget(points: &[[f64; 2]], budget: f64) -> Option<usize> {
    let order = |a: &usize, b: &usize| -> Ordering {
        let (a, b) = (points[*a], points[*b]);
        a[1].total_cmp(&b[1]).then(a[0].total_cmp(&b[0]))
    };
    (0..points.len()).filter(|&i| points[i][0] <= budget).min_by(order)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{close, vector};

    /// The vectors' points as `(memory, -score)`.
    fn minimised(set: &serde_json::Value) -> Vec<[f64; 2]> {
        let points: Vec<[f64; 2]> = serde_json::from_value(set["points_mem_score"].clone()).unwrap();
        points.into_iter().map(|[memory, score]| [memory, -score]).collect()
    }

    #[test]
    fn reference_sets_have_the_reference_fronts_and_volumes() {
        let file = vector("automixq_pareto.json");
        let sets = file["sets"].as_array().unwrap();
        assert_eq!(sets.len(), 2);
        for set in sets {
            let points = minimised(set);
            let ranks = non_dominated_ranks(&points);
            assert_eq!(serde_json::json!(ranks), set["non_domination_rank"]);
            assert_eq!(serde_json::json!(pareto_front(&points)), set["front0"]);
            let [memory, score]: [f64; 2] = serde_json::from_value(set["reference"].clone()).unwrap();
            close(hypervolume(&points, &[memory, -score]), set["hypervolume"].as_f64().unwrap());
            // Crowding knows no direction; ties are broken along the score as it was given.
            let raw: Vec<[f64; 2]> = points.iter().map(|[memory, loss]| [*memory, -loss]).collect();
            for (found, expected) in
                crowding_distances(&raw, &ranks).iter().zip(set["crowding_distance"].as_array().unwrap())
            {
                match expected.as_f64() {
                    Some(expected) => close(*found, expected),
                    None => assert_eq!(*found, f64::INFINITY),
                }
            }
            for case in set["best_under_budget"].as_array().unwrap() {
                let best = best_under_budget(&points, case["budget"].as_f64().unwrap());
                assert_eq!(serde_json::json!(best), case["index"]);
            }
        }
    }

    /// Counts unit cells of the integer grid: an independent definition of the volume.
    fn counted(points: &[Vec<f64>], side: usize, objectives: usize) -> f64 {
        let cells = side.pow(objectives as u32);
        let corner = |cell: usize, objective: usize| (cell / side.pow(objective as u32) % side) as f64;
        let covered =
            |cell: &usize| points.iter().any(|point| (0..objectives).all(|o| point[o] <= corner(*cell, o)));
        (0..cells).filter(covered).count() as f64
    }

    proptest! {
        #[test]
        fn volume_equals_counted_cells(
            objectives in 1usize..5,
            values in prop::collection::vec(0u8..6, 0..32),
        ) {
            let points: Vec<Vec<f64>> = values
                .chunks_exact(objectives)
                .map(|chunk| chunk.iter().map(|&value| f64::from(value)).collect())
                .collect();
            let reference = vec![5.0; objectives];
            prop_assert_eq!(hypervolume(&points, &reference), counted(&points, 5, objectives));
        }

        #[test]
        fn ranks_peel_fronts_and_order_does_not_matter(
            points in prop::collection::vec(prop::array::uniform2(0u8..8), 1..24),
        ) {
            let points: Vec<[f64; 2]> = points.iter().map(|point| point.map(f64::from)).collect();
            let ranks = non_dominated_ranks(&points);
            let mut left: Vec<usize> = (0..points.len()).collect();
            let mut rank = 0;
            while !left.is_empty() {
                let remaining: Vec<[f64; 2]> = left.iter().map(|&i| points[i]).collect();
                let front: Vec<usize> = pareto_front(&remaining).iter().map(|&i| left[i]).collect();
                for &i in &front {
                    prop_assert_eq!(ranks[i], rank);
                }
                left.retain(|i| !front.contains(i));
                rank += 1;
            }
            let mut reversed = points.clone();
            reversed.reverse();
            prop_assert_eq!(hypervolume(&points, &[9.0, 9.0]), hypervolume(&reversed, &[9.0, 9.0]));
        }
    }
}
