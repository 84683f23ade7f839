//! A synthetic model whose front is known by enumeration.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use kiln_mixq_search::{
    Choice, Config, Cost, Evaluation, Fidelity, KeepGoing, Measurement, MemoryModel, Objective, Request,
    SearchSpace, Setting, Unit,
};

/// Fidelity of a full measurement.
pub(crate) const FULL: Fidelity = Fidelity::kl(1000);

/// `units` layers with 2, 3, 4 or 8 bits and sizes of their own.
pub(crate) fn space(units: usize) -> SearchSpace {
    let unit = |u: usize| Unit {
        name: format!("model.layers.{u}"),
        paths: vec![format!("model.layers.{u}.mlp.up_proj")],
        choices: [2u64, 3, 4, 8]
            .into_iter()
            .map(|bits| Choice {
                setting: Setting::scheme(format!("affine{bits}:64")),
                cost: Cost::storage(bits * (100 + 17 * (u as u64 % 5))),
            })
            .collect(),
    };
    SearchSpace::new((0..units).map(unit).collect(), MemoryModel::new(1000)).unwrap()
}

/// Numbers in 0..1 that look random: a hash of their place, so that the objective needs no generator.
fn number(seed: u64, place: u64) -> f64 {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ place.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    for _ in 0..3 {
        x ^= x >> 30;
        x = x.wrapping_mul(0x94d0_49bb_1331_11eb);
    }
    (x >> 11) as f64 / (1u64 << 53) as f64
}

/// Harm falls by a factor with every choice; neighbours amplify each other, so that the sum of single harms misleads.
pub(crate) struct Synthetic {
    pub model: u64,
    pub calls: Arc<AtomicUsize>,
    /// Fails after so many calls, like a process that is killed.
    pub dies_after: usize,
    /// Standard deviation of noise that depends on plan and evaluation seed.
    pub noise: f64,
    pub pause: std::time::Duration,
}

impl Synthetic {
    pub(crate) fn new(model: u64) -> Self {
        Self { model, calls: Arc::default(), dies_after: usize::MAX, noise: 0.0, pause: Default::default() }
    }

    pub(crate) fn loss(&self, config: &Config) -> f64 {
        let harm = |u: usize| {
            let weight = (3.0 * number(self.model, u as u64) - 1.5).exp();
            let fall = 0.15 + 0.3 * number(self.model, 100 + u as u64);
            weight * fall.powi(i32::from(config.0[u]))
        };
        let units = config.0.len();
        let alone: f64 = (0..units).map(harm).sum();
        let pair =
            |u: usize| 1.5 * (number(self.model, 200 + u as u64) - 0.3) * (harm(u) * harm(u - 1)).sqrt();
        let together: f64 = (1..units).map(pair).sum();
        0.1 * (alone + together).max(0.05 * alone)
    }

    pub(crate) fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }
}

impl Objective for Synthetic {
    fn fingerprint(&self) -> String {
        format!("synthetic {}", self.model)
    }

    fn evaluate(&mut self, request: &Request<'_>, keep_going: &mut KeepGoing<'_>) -> Evaluation {
        if self.calls() >= self.dies_after {
            return Err("killed".into());
        }
        self.calls.fetch_add(1, Ordering::SeqCst);
        std::thread::sleep(self.pause);
        let place = request.config.0.iter().fold(request.seed + 1, |hash, &c| hash * 31 + u64::from(c));
        let noise = self.noise * (number(self.model, place) + number(self.model + 1, place) - 1.0);
        let score = self.loss(request.config) + noise;
        for part in 1..=4 {
            if !keep_going(request.fidelity.amount * part / 4, score * (2.0 - part as f64 / 4.0)) {
                break;
            }
        }
        Ok(Measurement::new(score))
    }
}
