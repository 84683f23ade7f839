//! Sums over ranks have the bits of one rank, and the value of exact arithmetic.

use std::sync::Arc;

use kiln_distributed::{Alone, Communicator, Error, PairwiseSum, Sharing, share, sum};
use proptest::prelude::*;

use crate::{on_ranks, on_threads};

fn added(a: Vec<f32>, b: Vec<f32>) -> Vec<f32> {
    a.into_iter().zip(b).map(|(a, b)| a + b).collect()
}

fn own_terms(terms: &[Vec<f32>], ranks: &dyn Communicator) -> PairwiseSum<Vec<f32>> {
    let mine = share(terms.len(), ranks.rank(), ranks.size());
    let mut own = PairwiseSum::new(mine.start);
    terms[mine].iter().for_each(|term| own.push(term.clone(), added));
    own
}

/// The sum by its definition: the largest power of two of terms, and the rest.
fn by_definition<T: Clone>(terms: &[T], add: fn(T, T) -> T) -> T {
    if let [term] = terms {
        return term.clone();
    }
    let largest = 1 << (usize::BITS - 1 - terms.len().leading_zeros());
    let (first, rest) = terms.split_at(if largest == terms.len() { largest / 2 } else { largest });
    add(by_definition(first, add), by_definition(rest, add))
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn every_number_of_ranks_gives_the_same_bits(
        terms in (1_usize..14, 0_usize..9).prop_flat_map(|(terms, length)| {
            let value = prop_oneof![4 => -1e6_f32..1e6, 1 => -1e-6_f32..1e-6, 1 => Just(-0.0), 1 => Just(f32::INFINITY)];
            prop::collection::vec(prop::collection::vec(value, length), terms)
        }),
        size in 1_usize..6,
    ) {
        let length = terms[0].len();
        let expected = by_definition(&terms, added);
        for found in on_threads(size, |ranks| sum(ranks, own_terms(&terms, ranks), terms.len(), length)) {
            prop_assert_eq!(bits(&found.unwrap()), bits(&expected));
        }
        for (index, value) in expected.iter().enumerate() {
            let exact: f64 = terms.iter().map(|term| f64::from(term[index])).sum();
            let size: f64 = terms.iter().map(|term| f64::from(term[index]).abs()).sum();
            let off = (f64::from(*value) - exact).abs();
            prop_assert!(!exact.is_finite() || off <= size * 4.0 * f64::from(f32::EPSILON));
        }
    }
}

#[test]
fn sums_that_go_in_several_parts() {
    // More than are on their way at once.
    let length = 2 * (1 << 22) + 12_345;
    let term =
        |number: usize| (0..length).map(|index| (index * (number + 3)) as f32 / 7.0).collect::<Vec<f32>>();
    let terms: Vec<Vec<f32>> = (0..3).map(term).collect();
    let expected = bits(&by_definition(&terms, added));
    for found in on_threads(2, |ranks| sum(ranks, own_terms(&terms, ranks), 3, length)) {
        assert!(bits(&found.unwrap()) == expected);
    }
}

#[test]
fn terms_of_another_rank_or_length_are_refused() {
    for error in on_threads(2, |ranks| {
        let other = PairwiseSum::<Vec<f32>>::new(0);
        sum(ranks, other, 2, 3).unwrap_err().to_string()
    }) {
        assert_eq!(error, "terms: expected sums of [1] terms, as this rank is dealt, found []");
    }
    for error in on_threads(2, |ranks| {
        sum(ranks, own_terms(&[vec![1.0], vec![2.0]], ranks), 2, 3).unwrap_err().to_string()
    }) {
        assert_eq!(error, "terms: expected 3 values, found 1");
    }
}

#[test]
fn shares_are_consecutive_and_even() {
    for count in 0..40 {
        for size in 1..9 {
            let shares: Vec<_> = (0..size).map(|rank| share(count, rank, size)).collect();
            let all: Vec<usize> = shares.iter().cloned().flatten().collect();
            assert_eq!(all, (0..count).collect::<Vec<_>>());
            let sizes = shares.iter().map(ExactSizeIterator::len);
            assert!(sizes.clone().max().unwrap() - sizes.min().unwrap() <= 1);
        }
    }
}

/// Sums of numbered things by ranks that are threads: what each rank has, the sum in f64, and the things' numbers.
fn shared(values: &[f64], parts: usize, size: usize) -> Vec<(Vec<usize>, u64, Vec<f64>)> {
    on_ranks(size, |ranks| {
        let shares = Sharing::new(ranks, parts).of(values.len()).unwrap();
        let of_part = |part: std::ops::Range<usize>| Ok(vec![values[part].iter().sum::<f64>()]);
        let add = |a: Vec<f64>, b: Vec<f64>| vec![a[0] + b[0]];
        let sum = shares.sum::<_, Error>(shares.partial_sums(of_part, add), 1).unwrap();
        let own: Vec<f64> = values[shares.own()].to_vec();
        (shares.own().collect(), sum[0].to_bits(), shares.in_order::<Error>(Ok(own)).unwrap())
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn shares_are_whole_and_their_sums_depend_on_the_parts_alone(
        values in prop::collection::vec(-1e9_f64..1e9, 1..20),
        parts in 1_usize..9,
        size in 1_usize..6,
    ) {
        prop_assume!(size <= parts && parts <= values.len());
        // By definition: parts by themselves, then in pairs.
        let of_parts: Vec<f64> =
            (0..parts).map(|part| values[share(values.len(), part, parts)].iter().sum()).collect();
        let expected = by_definition(&of_parts, |a, b| a + b).to_bits();
        let found = shared(&values, parts, size);
        prop_assert!(found.iter().all(|(_, sum, numbers)| *sum == expected && *numbers == values));
        let all: Vec<usize> = found.into_iter().flat_map(|(own, _, _)| own).collect();
        prop_assert_eq!(all, (0..values.len()).collect::<Vec<_>>());
    }
}

#[test]
fn shares_that_do_not_go_are_refused_and_an_error_of_one_is_an_error_of_all() {
    for (count, parts) in [(4, 5), (4, 0), (0, 0), (0, 2)] {
        let message = Sharing::new(Arc::new(Alone), parts).of(count).unwrap_err().to_string();
        assert!(message.starts_with("parts: expected from 1, the number of ranks, to "), "{message}");
    }
    let found = on_ranks(2, |ranks| {
        let few = Sharing::new(ranks.clone(), 1).of(4).unwrap_err().to_string();
        let shares = Sharing::new(ranks.clone(), 2).of(4).unwrap();
        let failed = ranks.rank() == 1;
        let own = shares.partial_sums(
            |_| {
                if failed {
                    Err(Error::Argument { name: "x".into(), expected: "y".into(), found: "z".into() })
                } else {
                    Ok(vec![0_f32])
                }
            },
            |a, _| a,
        );
        (few, shares.sum(own, 1).unwrap_err().to_string())
    });
    let few = "parts: expected from 2, the number of ranks, to 4, the number of things to share, found 1";
    assert!(found.iter().all(|(message, _)| message == few), "{found:?}");
    assert_eq!(found[0].1, "rank 1 failed: x: expected y, found z");
    assert_eq!(found[1].1, "x: expected y, found z");
}
