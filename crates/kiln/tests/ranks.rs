//! All stages, shared by ranks.

use std::sync::Arc;

use kiln::{
    Base,
    adapters::{AdapterConfig, Svd},
    calibration::{CalibrationConfig, GptqConfig, Method},
    distributed::{Alone, Communicator, Sharing},
    models::Windows,
    pruning::{BlockPruning, Criterion},
    quant::{Plan, Scheme, fingerprint},
    training::{BatchOptions, Dataset, TrainerConfig},
};
use kiln_testkit::{ids, on_ranks, testdata};

/// Prunes, calibrates and tunes in four parts: what there is of parameters in the end, and the losses.
fn composed(ranks: Arc<dyn Communicator>) -> (String, Vec<u64>) {
    let base = Base::open(testdata("models/tiny-llama")).unwrap().with_scheme(Scheme::Dense).load().unwrap();
    let base = base.with_sharing(Sharing::new(ranks.clone(), 4));
    let text = ids("shift_test_moby");
    let windows = Windows::disjoint(&text, 32, 4, 1).unwrap().with_rows(1);
    let (base, report) = base.prune(&BlockPruning::new(Criterion::TaylorFirst, 0.5), Some(&windows)).unwrap();
    assert!(report.parameters_after < report.parameters_before);
    let gptq = Method::Gptq(GptqConfig::default());
    let mut config = CalibrationConfig::new(gptq, Plan::uniform("affine3:64".parse().unwrap()));
    (config.scaling, config.correction) = (Some(Default::default()), Some(Svd::default()));
    let start = base.calibrate(AdapterConfig::lora(4, 4.0).with_seed(1), &config, &windows).unwrap();
    let data = Dataset::from_ids(text[..1024].to_vec(), &base.data_options(32)).unwrap();
    let trainer = TrainerConfig::new(3, BatchOptions::new(2)).with_lr(5e-3).with_accumulate(4);
    let tuned = start.finetune(data).with_trainer(trainer).with_ranks(ranks).run().unwrap();
    let losses = tuned.report().unwrap().steps.iter().map(|step| step.loss.to_bits()).collect();
    (fingerprint(tuned.model(), |_| true).unwrap(), losses)
}

#[test]
fn pruned_calibrated_and_tuned_by_ranks_is_as_by_one() {
    let expected = composed(Arc::new(Alone));
    for size in [2, 4] {
        assert!(on_ranks(size, composed).into_iter().all(|found| found == expected), "{size} ranks");
    }
}
