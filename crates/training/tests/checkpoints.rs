//! What a checkpoint refuses, and what of it survives.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use burn::module::Module;
use kiln_quant_core::{
    Slots,
    files::{OutputFolder, interruption::killed_at, whole_folder},
    hash::hex,
};
use kiln_training::{DataOptions, Dataset, Error, RunOptions, Trainer, TrainerConfig};
use sha2::{Digest, Sha256};

use crate::trainer::{base, config, documents, dropout_model, lora_model, losses, parameters, trainer};

/// A folder with a checkpoint after one step.
fn saved() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let last = folder.path().join("last");
    let mut first = trainer(config(2, 1));
    first.step().unwrap();
    first.save(&last).unwrap();
    (folder, last)
}

fn refusal(config: TrainerConfig, dataset: Arc<Dataset>, last: &Path) -> String {
    Trainer::resume(dropout_model(), dataset, config, last).map(drop).unwrap_err().to_string()
}

#[test]
fn checkpoints_of_other_runs_are_refused_by_name() {
    let (folder, last) = saved();
    let message = refusal(config(2, 1).with_lr(1e-4), documents(), &last);
    assert!(message.contains("config.lr"), "{message}");
    let ids = (0..600u32).map(|i| i % 256).collect();
    let dataset = Dataset::from_ids(ids, &DataOptions::new(32, 256)).unwrap();
    assert!(refusal(config(2, 1), Arc::new(dataset), &last).contains("state.json: data"));

    let identity = |alpha: &str| BTreeMap::from([("adapters".to_owned(), format!("alpha {alpha}"))]);
    let named = folder.path().join("named");
    trainer(config(2, 1)).with_identity(identity("8")).save(&named).unwrap();
    let resumed = |alpha| trainer(config(2, 1)).with_identity(identity(alpha)).resumed(&named);
    assert!(resumed("8").is_ok());
    let error = resumed("64").unwrap_err().to_string();
    assert!(error.ends_with("state.json: model.adapters: expected alpha 64, found alpha 8"), "{error}");
    for (trainer, folder) in
        [(trainer(config(2, 1)), &named), (trainer(config(2, 1)).with_identity(identity("8")), &last)]
    {
        assert!(trainer.resumed(folder).unwrap_err().to_string().contains("model.adapters"));
    }
    assert!(trainer(config(2, 1)).resumed(&last).is_ok());
}

#[test]
fn a_checkpoint_of_another_base_is_refused() {
    let (_folder, last) = saved();
    // One value of one frozen tensor.
    let mut model = lora_model(0.2);
    model.final_norm.weight = model.final_norm.weight.map(|weight| weight.map(|w| w.mul_scalar(1.0 + 1e-6)));
    let error = Trainer::resume(model, documents(), config(2, 1), &last).map(drop).unwrap_err().to_string();
    assert!(error.contains("model.frozen parameters: expected"), "{error}");
}

/// Every file of a checkpoint, changed in any of its bytes, and exchanged for that of another checkpoint of the same run.
#[test]
fn what_was_changed_since_it_was_written_is_refused() {
    let (folder, last) = saved();
    let other = folder.path().join("other");
    let mut run = trainer(config(2, 1));
    for _ in 0..2 {
        run.step().unwrap();
    }
    run.save(&other).unwrap();
    for file in ["state.json", "trainable.safetensors", "optimizer.bpk"] {
        let (path, whole) = (last.join(file), fs::read(last.join(file)).unwrap());
        let mut found = Vec::new();
        for place in 0..24 {
            let place = place * (whole.len() - 1) / 23;
            let mut changed = whole.clone();
            changed[place] ^= 1 << (place % 7);
            if changed[place].is_ascii_whitespace() && whole[place].is_ascii_whitespace() {
                continue;
            }
            found.push((format!("byte {place}"), changed));
        }
        found.extend([("cut".into(), whole[..whole.len() / 2].to_vec()), ("emptied".into(), Vec::new())]);
        if file != "state.json" {
            found.push(("another's".into(), fs::read(other.join(file)).unwrap()));
        }
        for (what, bytes) in found {
            fs::write(&path, bytes).unwrap();
            let message = refusal(config(2, 1), documents(), &last);
            assert!(message.contains(file), "{file}, {what}: {message}");
        }
        fs::write(&path, whole).unwrap();
    }
    assert!(Trainer::resume(dropout_model(), documents(), config(2, 1), &last).is_ok());
}

/// Writes hashes that fit whatever the files are.
fn sign(folder: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let path = folder.join("state.json");
    let mut state: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for name in ["trainable.safetensors", "optimizer.bpk"] {
        state["files"][name] = hex(Sha256::digest(fs::read(folder.join(name)).unwrap())).into();
    }
    change(&mut state);
    state.as_object_mut().unwrap().remove("digest");
    state["digest"] = hex(Sha256::digest(state.to_string())).into();
    fs::write(&path, state.to_string()).unwrap();
}

/// Ids that parameters share or that moments don't know: errors, also where the hashes were made to fit.
#[test]
fn ids_that_dont_fit_are_refused_behind_fitting_hashes_too() {
    let (_folder, last) = saved();
    let path = last.join("trainable.safetensors");
    let whole = fs::read(&path).unwrap();
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&whole).unwrap();
    let ids: BTreeMap<String, u64> =
        serde_json::from_str(&metadata.metadata().as_ref().unwrap()["kiln.parameter_ids"]).unwrap();
    let names: Vec<&String> = ids.keys().collect();
    let (a, b) = (names[0].clone(), names[1].clone());
    assert!(a.ends_with("lora_a") && b.ends_with("lora_b"), "{a} {b}");
    let cases: [(&str, BTreeMap<String, u64>); 3] = [
        ("an id of its own", [(a.clone(), ids[&b])].into()),
        ("expected F32 [", [(a.clone(), ids[&b]), (b.clone(), ids[&a])].into()),
        ("a state of a saved parameter", [(a.clone(), 1)].into()),
    ];
    for (expected, change) in cases {
        let mut ids = ids.clone();
        ids.extend(change);
        let tensors = safetensors::SafeTensors::deserialize(&whole).unwrap();
        let metadata = [("kiln.parameter_ids".to_owned(), serde_json::to_string(&ids).unwrap())];
        let changed =
            safetensors::serialize(tensors.tensors(), Some(metadata.into_iter().collect())).unwrap();
        fs::write(&path, changed).unwrap();
        sign(&last, |_| {});
        let message = refusal(config(2, 1), documents(), &last);
        assert!(message.contains(expected), "{message}");
    }
    fs::write(&path, &whole).unwrap();
    sign(&last, |_| {});
    assert!(Trainer::resume(dropout_model(), documents(), config(2, 1), &last).is_ok());
    sign(&last, |state| state["version"] = 1.into());
    assert!(refusal(config(2, 1), documents(), &last).contains("version: expected 2, found 1"));
}

/// Kills before every operation on files of a save, and again in the next one: what is resumed is one of the saved steps, and
/// goes on to the same bits.
#[test]
fn kills_at_every_operation_of_a_save_once_and_twice_lose_nothing() {
    let expected = losses(&trainer(config(2, 1)).run(&RunOptions::new()).unwrap().steps);
    let folder = tempfile::tempdir().unwrap();
    let last = folder.path().join("last");
    let states: Vec<Trainer<_>> = (1..4)
        .map(|steps| {
            let mut run = trainer(config(2, 1));
            for _ in 0..steps {
                run.step().unwrap();
            }
            run
        })
        .collect();
    let resumed_at = |allowed: &[u64]| {
        let run = Trainer::resume(dropout_model(), documents(), config(2, 1), &last).unwrap();
        assert!(allowed.contains(&run.steps_done()), "{}", run.steps_done());
        run
    };
    let begin = || {
        fs::read_dir(folder.path()).unwrap().for_each(|entry| {
            let path = entry.unwrap().path();
            if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.unwrap();
        });
        states[0].save(&last).unwrap();
    };
    let (mut kills, mut first) = (0, 0);
    loop {
        begin();
        if killed_at(first, || states[1].save(&last).unwrap()).is_some() {
            break;
        }
        let mut run = resumed_at(&[1, 2]);
        let done = run.steps_done() as usize;
        assert_eq!(losses(&run.run(&RunOptions::new()).unwrap().steps), expected[done..]);
        kills += 1;
        for second in 0.. {
            begin();
            killed_at(first, || states[1].save(&last).unwrap());
            if killed_at(second, || states[2].save(&last).unwrap()).is_some() {
                break;
            }
            resumed_at(&[1, 2, 3]);
            kills += 1;
        }
        first += 1;
    }
    assert!(first > 20 && kills > 500, "{first} operations, {kills} kills");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_full_disk_leaves_the_old_checkpoint() {
    // A folder that can't be written to stands for any refusal of the operating system.
    let folder = tempfile::tempdir().unwrap();
    let last = folder.path().join("last");
    let mut trainer = trainer(config(2, 1));
    trainer.save(&last).unwrap();
    trainer.step().unwrap();
    fs::write(folder.path().join(".last.kiln-new"), b"in the way").unwrap();
    assert!(matches!(trainer.save(&last), Err(Error::Io { .. })));
    let saved = fs::read_to_string(last.join("state.json")).unwrap();
    let state: serde_json::Value = serde_json::from_str(&saved).unwrap();
    assert_eq!(state["step"], 0);
}

/// A step may make parameters of a finite gradient that are not: they aren't saved over good ones.
#[test]
fn what_cannot_be_loaded_is_not_saved_over_what_can() {
    let folder = tempfile::tempdir().unwrap();
    let last = folder.path().join("last");
    let mut config = config(2, 1).with_lr(1e38).with_steps(20);
    config.warmup = 3;
    let mut run = trainer(config.clone());
    // The rate of the first step is 0.
    let error = run.run(&RunOptions::new().with_folder(folder.path()).with_save_every(1)).unwrap_err();
    let message = error.to_string();
    assert!(matches!(error, Error::Diverged { .. }), "{message}");
    assert!(message.ends_with(&format!("the last checkpoint is {}", last.display())), "{message}");
    let resumed = Trainer::resume(dropout_model(), documents(), config, &last).unwrap();
    assert!(resumed.steps_done() >= 1);
    assert!(parameters(resumed.model()).iter().flatten().all(|value| value.is_finite()));
}

#[test]
fn a_folder_is_claimed_before_the_first_step() {
    let folder = tempfile::tempdir().unwrap();
    let claimed = OutputFolder::claim(folder.path()).unwrap();
    let mut run = trainer(config(2, 1));
    let error = run.run(&RunOptions::new().with_folder(folder.path())).unwrap_err().to_string();
    assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(run.run(&RunOptions::new().with_folder(file.join("below"))).is_err());
    assert_eq!(run.steps_done(), 0);
    run.run(&RunOptions::new().with_claimed(claimed)).unwrap();
    assert!(whole_folder(&folder.path().join("last")).exists());
}

#[test]
fn another_number_of_slots_is_another_model() {
    let (_folder, last) = saved();
    let model = base("tiny/llama-tied-f32-sharded", None).unfreeze();
    assert_eq!(model.slots().len(), dropout_model().slots().len());
    let error = Trainer::resume(model, documents(), config(2, 1), &last).map(drop).unwrap_err().to_string();
    assert!(error.contains("model.frozen parameters"), "{error}");
}
