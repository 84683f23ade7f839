//! Every method on synthetic models whose front is known.

use kiln_mixq_search::{
    AdditiveProxy, Amq, Bo, Config, Direction, Error, Evaluation, Fidelity, Finalists, Halving, KeepGoing,
    KlMix, METHODS, Measure, Measurement, Nsga2, Objective, Outcome, Paper, Random, Released, Request,
    Screen, SearchMethod, SearchSettings, SearchSpace, Trial, TrialLog, Uniform, hypervolume, method,
    pareto_front, search,
};

use crate::common::{FULL, Synthetic, space};

pub(crate) fn run(
    space: &SearchSpace,
    objective: &mut dyn Objective,
    method: &dyn SearchMethod,
    settings: &SearchSettings,
) -> Outcome {
    search(space, objective, &mut TrialLog::in_memory(space), method, settings).unwrap()
}

/// Hypervolume of all plans, and where it ends.
fn exhaustive(space: &SearchSpace, model: &Synthetic) -> (f64, [f64; 2]) {
    let reference = [space.largest() as f64 + 1.0, 1.1 * model.loss(&space.lowest())];
    let points: Vec<[f64; 2]> =
        space.enumerate().map(|config| [space.bytes(&config) as f64, model.loss(&config)]).collect();
    (hypervolume(&points, &reference), reference)
}

#[test]
fn methods_beat_random_at_equal_evaluations_over_ten_seeds() {
    // 4,096 plans; 60 evaluations are 1.5 %, 120 are 3 %.
    let space = space(6);
    assert_eq!(space.size(), Some(4096));
    assert_eq!(space.enumerate().count(), 4096);
    for evaluations in [60, 120] {
        // Fewer rounds than by default: training the performance model is what takes the time here.
        let paper = Paper { picks: evaluations / 8, ..Paper::default() };
        let methods: [&dyn SearchMethod; 7] = [
            &Random,
            &KlMix::default(),
            &paper,
            &Nsga2::default(),
            &Bo::default(),
            &Amq::default(),
            &Released,
        ];
        let mut shares = [0.0; 7];
        for seed in 0..10 {
            let mut model = Synthetic::new(seed);
            let (best, [bytes, loss]) = exhaustive(&space, &model);
            let settings = SearchSettings::new(evaluations, FULL).with_seed(seed).with_reference(bytes, loss);
            for (share, method) in shares.iter_mut().zip(methods) {
                let outcome = run(&space, &mut model, method, &settings);
                assert!(outcome.evaluations <= evaluations as f64 + 1e-9);
                let fraction = outcome.hypervolume / best;
                assert!(fraction <= 1.0 + 1e-9, "{}: {fraction}", method.name());
                *share += fraction / 10.0;
            }
        }
        println!("{evaluations} evaluations: {:?}", methods.map(SearchMethod::name));
        println!("{shares:.5?}");
        // AMQ freezes units that matter at their largest choice, so it gives up the smallest plans: no promise there.
        let [random, klmix, paper, nsga2, bo, _, released] = shares;
        for (name, share) in [("klmix", klmix), ("paper", paper), ("nsga2", nsga2), ("bo", bo)] {
            assert!(share > random, "{name} {share} against random {random} with {evaluations} evaluations");
        }
        assert!((released - random).abs() < 0.05, "released samples as random does: {released}, {random}");
        assert!(
            klmix >= 0.98 && paper >= 0.98,
            "klmix {klmix}, paper {paper} with {evaluations} evaluations"
        );
    }
}

#[test]
fn same_seed_same_trials_other_seed_other_trials() {
    let space = space(9);
    for name in METHODS {
        let trials = |seed| {
            let settings = SearchSettings::new(60, FULL).with_seed(seed);
            let outcome = run(&space, &mut Synthetic::new(1), &*method(name).unwrap(), &settings);
            outcome.trials.into_iter().map(|trial| trial.config).collect::<Vec<_>>()
        };
        assert_eq!(trials(3), trials(3), "{name}");
        if name != "uniform" {
            assert_ne!(trials(3), trials(4), "{name}");
        }
    }
}

#[test]
fn every_front_respects_the_limit_and_nothing_is_measured_twice() {
    let space = space(5);
    let limit = space.smallest() + (space.largest() - space.smallest()) / 4;
    for name in METHODS {
        let mut model = Synthetic::new(2);
        let settings = SearchSettings::new(50, FULL).with_seed(1).with_max_bytes(limit);
        let outcome = run(&space, &mut model, &*method(name).unwrap(), &settings);
        assert!(!outcome.front.points.is_empty(), "{name}");
        assert!(outcome.front.points.iter().all(|point| point.bytes <= limit), "{name}");
        assert!(outcome.front.points.windows(2).all(|w| w[0].bytes < w[1].bytes && w[0].score > w[1].score));
        assert_eq!(model.calls(), outcome.trials.len(), "{name}");
        assert!(outcome.trials.len() <= 50, "{name}");
        // `released` measures plans beyond the limit, `klmix` and `amq` their anchors.
        if !["released", "klmix", "amq"].contains(&name) {
            assert!(outcome.trials.iter().all(|trial| trial.bytes <= limit), "{name}");
        }
        let best = outcome.front.select(limit).unwrap();
        assert_eq!(space.config(&best.plan).unwrap(), best.config);
    }
}

#[test]
fn released_is_uniform_sampling_with_replacement() {
    // 16 plans, 200 draws: about every plan is seen, no plan is measured twice, every draw counts.
    let space = space(2);
    let mut model = Synthetic::new(0);
    let outcome = run(&space, &mut model, &Released, &SearchSettings::new(200, FULL));
    assert_eq!(outcome.evaluations, 200.0);
    assert_eq!(model.calls(), 16);
}

#[test]
fn klmix_is_never_worse_than_uniform_plans_and_hardly_ever_than_prefix_plans() {
    let space = space(6);
    let (mut compared, mut worse) = (0, 0);
    for seed in 0..6 {
        let mut model = Synthetic::new(100 + seed);
        let settings = SearchSettings::new(150, FULL).with_seed(seed);
        let outcome = run(&space, &mut model, &KlMix::default(), &settings);
        let found = |rival: &Config| outcome.front.select(space.bytes(rival)).unwrap().score;
        for rival in space.uniform() {
            assert!(found(&rival) <= model.loss(&rival) + 1e-12, "seed {seed}: {rival:?}");
        }
        for (low, high) in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)] {
            for split in 1..6 {
                for first in [low, high] {
                    let unit = |u| if u < split { first } else { low + high - first };
                    let rival = Config((0..6).map(unit).collect());
                    compared += 1;
                    worse += usize::from(found(&rival) > model.loss(&rival) + 1e-12);
                }
            }
        }
    }
    println!("{worse} of {compared} prefix plans beat klmix");
    assert!(worse * 20 <= compared, "{worse} of {compared}");
}

#[test]
fn klmix_finds_the_exact_front_of_an_additive_model() {
    let space = space(4);
    let table: Vec<Vec<f64>> =
        (0..4).map(|u| [1.0, 0.37, 0.11, 0.0].map(|harm| harm * f64::from(u + 2).sqrt()).to_vec()).collect();
    let mut proxy = AdditiveProxy::new("additive", table);
    let points: Vec<[f64; 2]> =
        space.enumerate().map(|config| [space.bytes(&config) as f64, proxy.score(&config)]).collect();
    let front = pareto_front(&points);
    let outcome =
        run(&space, &mut proxy, &KlMix::default(), &SearchSettings::new(13 + 4 + 2 * front.len(), FULL));
    let expected: Vec<f64> = front.iter().map(|&i| points[i][0]).collect();
    let bytes: Vec<f64> = outcome.front.losses().iter().map(|point| point[0]).collect();
    let missed = expected.iter().filter(|bytes_of| !bytes.contains(bytes_of)).count();
    assert_eq!(missed, 0, "{} of {} points of the front are missing", missed, expected.len());
}

#[test]
fn screens_on_fewer_tokens_cost_their_share() {
    let space = space(6);
    let screens = vec![Screen { share: 1.0 / 16.0, keep: 4 }, Screen { share: 0.25, keep: 1 }];
    let klmix = KlMix { screened: 16, screens, budgets: Some(3), ..KlMix::default() };
    let outcome = run(&space, &mut Synthetic::new(3), &klmix, &SearchSettings::new(60, FULL));
    let at =
        |tokens| outcome.trials.iter().filter(|trial| trial.fidelity == Fidelity::kl(tokens)).count() as f64;
    let (full, quarter, sixteenth) = (at(1000), at(250), at(63));
    assert!(quarter > 0.0 && sixteenth > quarter && full > 20.0);
    assert!((outcome.evaluations - (full + quarter / 4.0 + sixteenth * 0.063)).abs() < 1e-6);
    assert!(outcome.evaluations <= 60.0 + 1e-6);
}

/// An accuracy, better when larger; fine-tuning helps plans whose first layer is precise.
struct Accuracy(Synthetic);

impl Objective for Accuracy {
    fn fingerprint(&self) -> String {
        "accuracy".into()
    }

    fn direction(&self) -> Direction {
        Direction::Maximize
    }

    fn evaluate(&mut self, request: &Request<'_>, keep_going: &mut KeepGoing<'_>) -> Evaluation {
        let loss = self.0.evaluate(request, keep_going)?.score;
        let tuned = match request.fidelity.measure {
            Measure::Finetune => {
                0.01 * (request.fidelity.amount as f64).ln() * f64::from(request.config.0[0])
            }
            _ => 0.0,
        };
        Ok(Measurement::new(1.0 - loss + tuned))
    }
}

#[test]
fn recoverability_halves_candidates_and_finalists_get_fresh_seeds() {
    let space = space(5);
    let limit = (space.smallest() + space.largest()) / 2;
    let mut objective = Accuracy(Synthetic { noise: 0.02, ..Synthetic::new(5) });
    let settings = SearchSettings::new(60, FULL)
        .with_max_bytes(limit)
        .with_evaluation_seed(7)
        .with_halving(Halving::default())
        .with_finalists(Finalists {
            top: 2,
            seeds: 3,
            fidelity: Some(Fidelity::finetune(800)),
            budgets: vec![],
        });
    let outcome = run(&space, &mut objective, &KlMix::default(), &settings);
    let sizes: Vec<usize> = outcome.rungs.iter().map(|rung| rung.ranking.len()).collect();
    assert_eq!(sizes, [8, 4, 2]);
    for rung in &outcome.rungs {
        assert!(rung.ranking.windows(2).all(|pair| pair[0].1 >= pair[1].1));
    }
    assert_eq!(outcome.finalists.len(), 2);
    for finalist in &outcome.finalists {
        assert_eq!(finalist.scores.len(), 3);
        assert!(finalist.bytes <= limit);
    }
    assert!(outcome.finalists[0].mean >= outcome.finalists[1].mean);
    let fresh: Vec<u64> = outcome
        .trials
        .iter()
        .filter(|trial| trial.fidelity == Fidelity::finetune(800) && trial.seed != 7)
        .map(|trial| trial.seed)
        .collect();
    assert_eq!(fresh, [8, 8, 9, 9, 10, 10]);
    assert!(outcome.evaluations <= 60.0 + 1e-9);

    // Without halving the finalists are chosen by a model's mean; the chosen score itself is never in the figure.
    let settings = SearchSettings::new(60, FULL).with_max_bytes(limit).with_finalists(Finalists::default());
    let outcome = run(&space, &mut objective, &Random, &settings);
    assert_eq!(outcome.finalists.len(), 3);
    assert!(outcome.finalists.iter().all(|finalist| finalist.scores.len() == 2));
}

#[test]
fn hopeless_trials_are_stopped_and_leave_the_front() {
    let space = space(5);
    let settings = SearchSettings::new(40, FULL).with_early_stopping();
    let outcome = run(&space, &mut Synthetic::new(4), &Nsga2::default(), &settings);
    let stopped: Vec<_> = outcome.trials.iter().filter(|trial| trial.stopped).collect();
    assert!(!stopped.is_empty() && stopped.len() < 35, "{} stopped", stopped.len());
    assert!(stopped.iter().all(|trial| trial.curve.len() == 1));
    for trial in &stopped {
        assert!(outcome.front.points.iter().all(|point| point.config != trial.config));
        // A plan of no more bytes was better at the same point: small plans aren't stopped for being small.
        let finished = outcome.trials.iter().filter(|seen| !seen.stopped && seen.bytes <= trial.bytes);
        let at =
            |seen: &Trial| seen.curve.iter().find(|(amount, _)| *amount == trial.curve[0].0).map(|c| c.1);
        assert!(finished.filter_map(at).any(|score| score < trial.curve[0].1));
    }

    // A search that stops nothing measures them in full.
    let log = &mut TrialLog::in_memory(&space);
    let mut model = Synthetic::new(4);
    let stopping = search(&space, &mut model, log, &Nsga2::default(), &settings).unwrap();
    assert!(stopping.trials.iter().any(|trial| trial.stopped));
    let settings = SearchSettings::new(40, FULL);
    let patient = search(&space, &mut model, log, &Nsga2::default(), &settings).unwrap();
    assert!(patient.trials.iter().all(|trial| !trial.stopped));
    assert_eq!(patient.front, run(&space, &mut Synthetic::new(4), &Nsga2::default(), &settings).front);
}

#[test]
fn klmix_measures_uniform_plans_and_a_knapsack_solution_however_few_evaluations_there_are() {
    let space = space(12);
    let settings = SearchSettings::new(10, FULL).with_seed(3);
    let outcome = run(&space, &mut Synthetic::new(1), &KlMix::default(), &settings);
    let measured = |config: &Config| outcome.trials.iter().any(|trial| trial.config == *config);
    assert!(space.uniform().iter().all(measured));
    // Neither uniform nor one unit alone below the largest.
    let highest = space.highest();
    let mixed = outcome.trials.iter().filter(|trial| {
        let below = trial.config.0.iter().zip(&highest.0).filter(|(choice, most)| choice < most).count();
        below > 1 && !space.uniform().contains(&trial.config)
    });
    assert!(mixed.count() > 0);
    assert!(outcome.front.select(space.smallest()).is_ok());
}

/// Fails to measure small plans: their loss is not a number.
struct Diverging(Synthetic);

impl Objective for Diverging {
    fn fingerprint(&self) -> String {
        "diverging".into()
    }

    fn evaluate(&mut self, request: &Request<'_>, keep_going: &mut KeepGoing<'_>) -> Evaluation {
        let diverges = request.config.0.iter().filter(|&&choice| choice == 0).count() > 1;
        let measured = self.0.evaluate(request, keep_going)?;
        Ok(if diverges { Measurement::new(f64::NAN) } else { measured })
    }
}

#[test]
fn plans_that_diverge_are_logged_but_never_on_the_front() {
    let space = space(5);
    for name in METHODS {
        let settings = SearchSettings::new(50, FULL).with_seed(1).with_finalists(Finalists::default());
        let outcome = run(&space, &mut Diverging(Synthetic::new(6)), &*method(name).unwrap(), &settings);
        assert!(outcome.trials.iter().any(|trial| trial.score.is_none()), "{name}");
        assert!(!outcome.front.points.is_empty(), "{name}");
        for point in &outcome.front.points {
            assert!(point.config.0.iter().filter(|&&choice| choice == 0).count() <= 1, "{name}");
        }
    }
    // Nothing can be measured at all: an empty front, no panic.
    struct Never;
    impl Objective for Never {
        fn fingerprint(&self) -> String {
            "never".into()
        }
        fn evaluate(&mut self, _: &Request<'_>, _: &mut KeepGoing<'_>) -> Evaluation {
            Ok(Measurement::new(f64::INFINITY))
        }
    }
    for name in METHODS {
        let settings = SearchSettings::new(30, FULL).with_finalists(Finalists::default());
        let outcome = run(&space, &mut Never, &*method(name).unwrap(), &settings);
        assert!(outcome.front.points.is_empty() && outcome.finalists.is_empty(), "{name}");
    }
}

#[test]
fn spaces_smaller_than_the_evaluations_are_searched_to_the_end() {
    let space = space(2);
    for name in METHODS {
        let outcome =
            run(&space, &mut Synthetic::new(8), &*method(name).unwrap(), &SearchSettings::new(500, FULL));
        assert!(outcome.trials.len() <= 16, "{name}");
    }
    let single = crate::common::space(1);
    for name in METHODS {
        let settings = SearchSettings::new(3, FULL).with_max_bytes(single.smallest());
        let outcome = run(&single, &mut Synthetic::new(8), &*method(name).unwrap(), &settings);
        assert!(outcome.front.points.len() <= 1, "{name}");
    }
}

#[test]
fn limits_that_no_plan_meets_state_the_smallest() {
    let space = space(3);
    let settings = SearchSettings::new(10, FULL).with_max_bytes(space.smallest() - 1);
    let mut model = Synthetic::new(0);
    let log = &mut TrialLog::in_memory(&space);
    let error = search(&space, &mut model, log, &Uniform, &settings).unwrap_err();
    assert!(matches!(error, Error::Limit { smallest, .. } if smallest == space.smallest()));
    assert!(error.to_string().contains(&space.smallest().to_string()));
    let finalists = Finalists { budgets: vec![1], ..Finalists::default() };
    let settings = SearchSettings::new(10, FULL).with_finalists(finalists);
    assert!(matches!(search(&space, &mut model, log, &Uniform, &settings), Err(Error::Limit { .. })));
    let none = SearchSettings::new(0, FULL);
    assert!(search(&space, &mut model, log, &Uniform, &none).unwrap_err().to_string().contains("at least 1"));
}

#[test]
fn options_out_of_range_are_errors() {
    let space = space(3);
    let bad: [Box<dyn SearchMethod>; 6] = [
        Box::new(Paper { initial: 1, ..Paper::default() }),
        Box::new(Bo { picks: 0, ..Bo::default() }),
        Box::new(Nsga2 { population: 2, ..Nsga2::default() }),
        Box::new(Amq { initial: f64::NAN, ..Amq::default() }),
        Box::new(KlMix { offspring: 0, ..KlMix::default() }),
        Box::new(KlMix { screens: vec![Screen { share: 1.5, keep: 1 }], ..KlMix::default() }),
    ];
    for method in bad {
        let log = &mut TrialLog::in_memory(&space);
        let result = search(&space, &mut Synthetic::new(0), log, &*method, &SearchSettings::new(10, FULL));
        assert!(matches!(result, Err(Error::Option { .. })), "{}", method.name());
    }
    assert!(method("optuna").map(|_| ()).unwrap_err().to_string().contains("klmix, paper"));
}
