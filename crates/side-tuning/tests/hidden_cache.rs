//! The backbone's states on disk.

use std::{fs, sync::Arc};

use burn::module::Module;
use kiln_models::{CausalLm, TokenBatch};
use kiln_side_tuning::{Downsample, HiddenCache, SideConfig, SideTuned, StatePrecision};
use kiln_testkit::{max_difference, read, testdata};
use kiln_training::{RunOptions, Trainer};

use crate::common::{embedded, load, text, trainer_config};

/// Fails unless two streams agree to rounding: products of other numbers of rows may be summed in another order.
#[track_caller]
fn assert_alike(found: Vec<f32>, expected: Vec<f32>) {
    let largest = expected.iter().fold(0f32, |max, value| max.max(value.abs()));
    let difference = max_difference(&found, &expected);
    assert!(difference < 1e-5 * largest, "{difference} of {largest}");
}

fn stream<M: CausalLm>(model: &M, rows: &[Vec<u32>]) -> Vec<f32> {
    let context = model.context(&TokenBatch::new(rows).unwrap(), None).unwrap();
    read(model.residual(&context, None))
}

#[test]
fn later_passes_read_what_the_first_one_wrote() {
    let rows = [vec![5, 900, 17, 33], vec![1, 2, 3, 4], vec![5, 900, 17, 34]];
    for kind in [Downsample::Adapter, Downsample::MaxPool] {
        let folder = tempfile::tempdir().unwrap();
        let plain = SideTuned::new(embedded(), &SideConfig::qst().with_downsample(kind), 3).unwrap();
        let open =
            |precision| Arc::new(HiddenCache::open(&plain, folder.path(), 1 << 30, precision).unwrap());
        let cache = open(StatePrecision::F32);
        let model = plain.clone().with_hidden_cache(cache.clone());
        assert_eq!(stream(&model, &rows[..2]), stream(&plain, &rows[..2]));
        assert_eq!((cache.report().hits, cache.report().misses), (0, 1));
        // Rows are found in any order and company.
        let turned = [rows[1].clone(), rows[0].clone()];
        assert_alike(stream(&model, &turned), stream(&plain, &turned));
        assert_alike(stream(&model, &rows[1..2]), stream(&plain, &rows[1..2]));
        assert_eq!((cache.report().hits, cache.report().misses), (2, 1));
        // One new row: the backbone runs, and only that row is written.
        assert_eq!(stream(&model, &rows), stream(&plain, &rows));
        assert_eq!((cache.report().misses, fs::read_dir(folder.path()).unwrap().count()), (2, 3));
        assert_eq!(cache.report().problem, None);
        // Another run finds them; another precision has files of its own.
        let again = open(StatePrecision::F32);
        assert!(again.report().bytes > 0);
        assert_alike(stream(&plain.clone().with_hidden_cache(again.clone()), &rows), stream(&plain, &rows));
        assert_eq!(again.report().hits, 1);
        let rounded = open(StatePrecision::Bf16);
        let model = plain.clone().with_hidden_cache(rounded.clone());
        stream(&model, &rows);
        let (found, expected) = (stream(&model, &rows), stream(&plain, &rows));
        let largest = expected.iter().fold(0f32, |max, value| max.max(value.abs()));
        let difference = max_difference(&found, &expected);
        assert!(
            rounded.report().hits == 1 && difference > 0.0 && difference < 0.05 * largest,
            "{difference}"
        );
    }
}

#[test]
fn damaged_files_and_full_folders_cost_time_only() {
    let rows = [vec![5, 900, 17, 33], vec![1, 2, 3, 4]];
    let folder = tempfile::tempdir().unwrap();
    let plain = SideTuned::new(embedded(), &SideConfig::qst(), 3).unwrap();
    let expected = stream(&plain, &rows);
    let open =
        |limit| Arc::new(HiddenCache::open(&plain, folder.path(), limit, StatePrecision::F32).unwrap());
    // Five states of 4 tokens and 192 features in f32 are 15,360 bytes a row.
    let small = open(20_000);
    let model = plain.clone().with_hidden_cache(small.clone());
    assert_eq!(stream(&model, &rows), expected);
    assert_eq!(stream(&model, &rows), expected);
    let report = small.report();
    assert_eq!((report.hits, report.misses, report.bytes), (0, 2, 15_360));
    let cache = open(1 << 20);
    let model = plain.clone().with_hidden_cache(cache.clone());
    stream(&model, &rows);
    let file = fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    assert_eq!(stream(&model, &rows), expected);
    assert!(cache.report().problem.is_some());
    // It was written again.
    assert_eq!(fs::read(&file).unwrap(), bytes);
    assert_eq!(stream(&model, &rows), expected);
    assert_eq!((cache.report().hits, cache.report().misses), (1, 2));
}

#[test]
fn epochs_over_the_same_rows_run_the_backbone_once() {
    let folder = tempfile::tempdir().unwrap();
    let run = |cached: bool| {
        let mut model = SideTuned::new(embedded(), &SideConfig::qst(), 3).unwrap();
        let cache = Arc::new(HiddenCache::open(&model, folder.path(), 1 << 30, StatePrecision::F32).unwrap());
        if cached {
            model = model.with_hidden_cache(cache.clone());
        }
        // About forty rows of 64 tokens: four epochs of five steps.
        let mut trainer = Trainer::new(model, text(64), trainer_config(20, 8)).unwrap();
        let reports = trainer.run(&RunOptions::new()).unwrap().steps;
        let losses: Vec<f64> = reports.iter().map(|report| report.loss).collect();
        let _ = trainer.into_model().valid();
        (losses, cache.report())
    };
    let ((plain, _), (cached, report)) = (run(false), run(true));
    assert!(plain.iter().zip(&cached).all(|(a, b)| (a - b).abs() < 1e-4), "{plain:?} {cached:?}");
    assert!(report.hits >= 10, "{report:?}");
}

#[test]
fn states_that_depend_on_the_batch_are_not_cached() {
    let base = load(testdata("tiny/llama-rope-dynamic"), None);
    let model = SideTuned::new(base, &SideConfig::lst().with_reduction(4), 3).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let error = HiddenCache::open(&model, folder.path(), 1 << 20, StatePrecision::F32).unwrap_err();
    assert!(error.to_string().contains("dynamic"), "{error}");
}
