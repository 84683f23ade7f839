//! What ranks say to one another, and what becomes of those whose partner is gone.

use std::{
    collections::BTreeMap,
    thread,
    time::{Duration, Instant},
};

use kiln_distributed::{Communicator, Error, threads};

use crate::on_threads;

#[test]
fn everybody_hears_everybody_in_order() {
    let found = on_threads(3, |ranks| {
        let me = ranks.rank() as u8;
        (0..50_u8)
            .map(|round| {
                let parts = (0..3_u8).map(|to| vec![round, me, to]).collect();
                let all = ranks.all_to_all(parts).unwrap();
                assert_eq!(all, (0..3_u8).map(|from| vec![round, from, me]).collect::<Vec<_>>());
                ranks.broadcast(vec![me; usize::from(round)]).unwrap()
            })
            .collect::<Vec<_>>()
    });
    let expected: Vec<Vec<u8>> = (0..50).map(|round| vec![0; round]).collect();
    assert!(found.iter().all(|found| *found == expected));
}

#[test]
fn an_error_of_one_is_an_error_of_all() {
    let errors = on_threads(3, |ranks| {
        ranks.agree(Ok(())).unwrap();
        let own = if ranks.rank() == 1 { Err("no space left".to_owned()) } else { Ok(()) };
        ranks.agree(own).unwrap_err().to_string()
    });
    assert_eq!(errors, ["rank 1 failed: no space left"; 3]);
    // An error without a text is one too.
    for error in on_threads(2, |ranks| ranks.agree(Err(String::new())).unwrap_err().to_string()) {
        assert_eq!(error, "rank 0 failed: ");
    }
}

#[test]
fn what_differs_is_named() {
    let facts = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
    };
    let both = facts(&[("data", "a"), ("model", "b")]);
    let cases = [
        (both.clone(), "nothing"),
        (facts(&[("data", "a"), ("model", "c")]), "rank 1: model: expected b, as rank 0 has, found c"),
        (facts(&[("data", "a")]), "rank 1: model: expected b, as rank 0 has, found nothing"),
        (
            facts(&[("data", "a"), ("model", "b"), ("seed", "")]),
            "rank 1: seed: expected nothing, as rank 0 has, found ",
        ),
    ];
    for (other, expected) in cases {
        for found in on_threads(2, |ranks| ranks.same(if ranks.rank() == 0 { &both } else { &other })) {
            assert_eq!(found.map_or_else(|error| error.to_string(), |()| "nothing".into()), expected);
        }
    }
}

#[test]
fn a_rank_that_ends_ends_the_others() {
    let started = Instant::now();
    let mut ranks = threads(3, Duration::from_secs(600));
    let last = ranks.pop().unwrap();
    thread::scope(|scope| {
        let wait = |rank: kiln_distributed::Thread| {
            scope.spawn(move || {
                let first = rank.all_gather(vec![1]).unwrap_err();
                // Nothing is waited for after that.
                assert!(matches!(rank.all_gather(vec![1]), Err(Error::Lost { .. })));
                first
            })
        };
        let waiting: Vec<_> = ranks.into_iter().map(wait).collect();
        thread::sleep(Duration::from_millis(20));
        drop(last);
        for waiting in waiting {
            let error = waiting.join().unwrap();
            assert!(matches!(error, Error::Lost { size: 3, lost: Some(_), .. }), "{error}");
        }
    });
    assert!(started.elapsed() < Duration::from_secs(60));
}

#[test]
fn a_rank_that_panics_ends_the_others() {
    let ranks = threads(2, Duration::from_secs(600));
    let found = thread::scope(|scope| {
        let handles: Vec<_> = ranks
            .into_iter()
            .map(|rank| {
                scope.spawn(move || {
                    if rank.rank() == 0 {
                        std::panic::resume_unwind(Box::new("a panic"));
                    }
                    rank.agree(Ok(())).unwrap_err().to_string()
                })
            })
            .collect();
        handles.into_iter().map(|handle| handle.join().ok()).collect::<Vec<_>>()
    });
    assert_eq!(found[0], None);
    assert!(found[1].as_ref().unwrap().contains("rank 0 has ended"), "{found:?}");
}

#[test]
fn a_rank_that_does_not_answer_is_given_up() {
    let ranks = threads(2, Duration::from_millis(50));
    let error = ranks[1].all_gather(Vec::new()).unwrap_err();
    assert!(matches!(error, Error::Lost { rank: 1, lost: Some(0), .. }), "{error}");
    // And the late one hears of it at once.
    let error = ranks[0].all_gather(Vec::new()).map(|_| ranks[0].all_gather(Vec::new()));
    assert!(matches!(error, Ok(Err(Error::Lost { rank: 0, .. }))), "{error:?}");
}

#[test]
fn parts_for_other_ranks_are_refused() {
    let error = threads(2, Duration::ZERO)[0].all_to_all(vec![Vec::new(); 3]).unwrap_err();
    assert_eq!(error.to_string(), "parts: expected one for each of 2 ranks, found 3");
}
