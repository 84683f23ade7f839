//! Runs that are cancelled, resumed, spilled to disk, fed from a file.

use std::ops::ControlFlow;

use burn::tensor::{Device, Tensor};
use kiln_calibration::{CalibrationConfig, Calibrator, Error, GptqConfig, Method, Progress};
use kiln_models::{Decoder, LoadOptions, Windows, families::LinearRole};
use kiln_quant_core::QuantLinear;

use crate::setup::*;

fn uninterrupted(config: &CalibrationConfig, windows: &Windows) -> Vec<Contents> {
    let model = tiny();
    let attacher = attacher(&model);
    let (model, _) = Calibrator::new(config, windows).with_adapters(&attacher).run(model).unwrap();
    contents(&model)
}

#[test]
fn a_resumed_run_gives_the_same_bits() {
    let windows = windows(3);
    for (method, scheme) in [
        (Method::ApiqBlock(apiq(2)), "affine2:64"),
        (Method::ApiqLayer(apiq(1)), "affine3:64:f16"),
        (Method::Gptq(GptqConfig { act_order: true, ..GptqConfig::default() }), "affine4:64:sym:bf16"),
    ] {
        let config = config(method, scheme);
        let expected = uninterrupted(&config, &windows);
        let folder = tempfile::tempdir().unwrap();
        let model = tiny();
        let attacher = attacher(&model);
        let run = |observer: kiln_calibration::Observer| {
            let calibrator = Calibrator::new(&config, &windows).with_adapters(&attacher);
            calibrator.with_folder(folder.path()).run_with(tiny(), observer)
        };
        // In the middle of the second block; then after the third.
        let result = run(&mut |progress| match progress {
            Progress::Projection { block: 1, .. } => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        });
        assert!(matches!(result, Err(Error::Cancelled { blocks: 1, total: 4 })));
        let mut seen = Vec::new();
        let result = run(&mut |progress| match progress {
            Progress::Block { report, .. } => {
                seen.push(report.index);
                if report.index == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            }
            _ => ControlFlow::Continue(()),
        });
        assert!(matches!(result, Err(Error::Cancelled { blocks: 3, total: 4 })));
        assert_eq!(seen, [1, 2]);
        let (model, report) = run(&mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(contents(&model), expected, "{scheme}");
        assert_eq!(report.blocks.iter().map(|block| block.index).collect::<Vec<_>>(), [0, 1, 2, 3]);
        // A finished run is read, not repeated.
        let (model, again) = run(&mut |_| panic!("nothing is left to do")).unwrap();
        assert_eq!(contents(&model), expected);
        assert_eq!(again, report);
    }
}

#[test]
fn any_step_may_be_the_last() {
    let windows = windows(2);
    let steps = |method: Method, last: usize| {
        let (config, mut seen) = (config(method, "affine2:64"), Vec::new());
        let result = Calibrator::new(&config, &windows).run_with(tiny(), &mut |progress| {
            if let Progress::Step { block, projection, epoch, window, loss } = progress {
                assert!(loss > 0.0);
                seen.push((block, projection.map(str::to_string), epoch, window));
            }
            if seen.len() == last { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        let Err(Error::Cancelled { blocks, total: 4 }) = result else { panic!("not cancelled") };
        (blocks, seen)
    };
    let (blocks, seen) = steps(Method::ApiqBlock(apiq(2)), 7);
    let at = |block, epoch, window| (block, None, epoch, window);
    let expected =
        [at(0, 0, 0), at(0, 0, 1), at(0, 1, 0), at(0, 1, 1), at(1, 0, 0), at(1, 0, 1), at(1, 1, 0)];
    assert_eq!((blocks, &seen[..]), (1, &expected[..]));
    let (blocks, seen) = steps(Method::ApiqLayer(apiq(1)), 15);
    let expected = (1, Some("model.layers.1.self_attn.q_proj".to_string()), 0, 0);
    assert_eq!((blocks, &seen[14]), (1, &expected));
}

#[test]
fn an_epoch_may_be_the_last() {
    let (config, windows) = (config(Method::ApiqBlock(apiq(3)), "affine2:64"), windows(1));
    let mut epochs = Vec::new();
    let result = Calibrator::new(&config, &windows).run_with(tiny(), &mut |progress| {
        if let Progress::Epoch { block, projection: None, epoch, .. } = progress {
            epochs.push((block, epoch));
        }
        if epochs.len() == 5 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(matches!(result, Err(Error::Cancelled { blocks: 1, total: 4 })));
    assert_eq!(epochs, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]);
}

#[test]
fn streams_are_read_back_into_a_spill_folder() {
    let (config, windows) = (config(Method::ApiqBlock(apiq(1)), "affine2:64"), windows(3));
    let expected = uninterrupted(&config, &windows);
    let (folder, spill) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let attacher = attacher(&tiny());
    let run = |observer: kiln_calibration::Observer| {
        let calibrator = Calibrator::new(&config, &windows).with_adapters(&attacher);
        calibrator.with_folder(folder.path()).with_spill(spill.path()).run_with(tiny(), observer)
    };
    let result = run(&mut |progress| match progress {
        Progress::Block { .. } => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    });
    assert!(matches!(result, Err(Error::Cancelled { blocks: 1, total: 4 })));
    assert_eq!(contents(&run(&mut |_| ControlFlow::Continue(())).unwrap().0), expected);
    assert_eq!(std::fs::read_dir(spill.path()).unwrap().count(), 0);
}

/// A model whose down projection of a block is changed by `change`.
fn changed(block: usize, change: impl FnOnce(Tensor<2>) -> Tensor<2>) -> Decoder<QuantLinear> {
    let mut model = tiny();
    let down = model.blocks[block].linear_mut(LinearRole::Down).unwrap();
    let QuantLinear::Dense(linear) = down else { panic!("dense") };
    linear.weight = linear.weight.clone().map(change);
    model
}

#[test]
fn projections_of_zeros_are_calibrated_and_read_back() {
    let windows = windows(2);
    for method in [Method::ApiqBlock(apiq(2)), Method::Gptq(GptqConfig::default())] {
        let (config, folder) = (config(method, "affine2:64"), tempfile::tempdir().unwrap());
        let attacher = attacher(&tiny());
        let run = || {
            let calibrator = Calibrator::new(&config, &windows).with_adapters(&attacher);
            calibrator.with_folder(folder.path()).run(changed(1, |weight| weight.zeros_like())).unwrap()
        };
        let ((model, report), (again, reread)) = (run(), run());
        assert_eq!(contents(&again), contents(&model));
        assert_eq!(reread, report);
    }
}

#[test]
fn another_runs_folder_and_damaged_files_are_refused() {
    let (folder, windows) = (tempfile::tempdir().unwrap(), windows(2));
    let attacher = attacher(&tiny());
    let calibrate = |config: &CalibrationConfig, windows: &Windows, model| {
        let calibrator = Calibrator::new(config, windows).with_adapters(&attacher);
        calibrator.with_folder(folder.path()).run(model).map(|_| ())
    };
    let run = |config: &CalibrationConfig, windows: &Windows| calibrate(config, windows, tiny());
    let gptq = config(Method::Gptq(GptqConfig::default()), "affine3:64");
    run(&gptq, &windows).unwrap();
    let refused = |result: Result<(), Error>, file: &str| {
        let message = result.unwrap_err().to_string();
        assert!(message.contains(file), "{message}");
    };
    let other = config(Method::Gptq(GptqConfig::default()), "affine2:64");
    refused(run(&other, &windows), "streams.bin");
    refused(
        run(&gptq, &Windows::new(crate::setup::windows(3).as_slice()[1..].to_vec()).unwrap()),
        "streams.bin",
    );

    // A model that differs in one weight of a finished block, whichever it is.
    let other = |block| changed(block, |weight| weight.slice_fill([0..1, 0..1], 0.5));
    refused(calibrate(&gptq, &windows, other(0)), "streams.bin");
    refused(calibrate(&gptq, &windows, other(2)), "block-00002.safetensors");

    let streams = folder.path().join("streams.bin");
    let bytes = std::fs::read(&streams).unwrap();
    let mut flipped = bytes.clone();
    *flipped.last_mut().unwrap() ^= 1;
    for damaged in [&flipped[..], &bytes[..bytes.len() - 1], &b"{\n"[..], &[0xff; 5000]] {
        std::fs::write(&streams, damaged).unwrap();
        refused(run(&gptq, &windows), "streams.bin");
    }
    std::fs::write(&streams, &bytes).unwrap();
    let block = folder.path().join("block-00002.safetensors");
    // Factors and codes, wherever they lie.
    let bytes = std::fs::read(&block).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    for part in 0..16 {
        let mut damaged = bytes.clone();
        let at = header + (bytes.len() - header - 1) * part / 15;
        damaged[at] ^= 1;
        std::fs::write(&block, &damaged).unwrap();
        refused(run(&gptq, &windows), "block-00002.safetensors");
    }
    std::fs::write(&block, &bytes).unwrap();
    run(&gptq, &windows).unwrap();
    std::fs::remove_file(&block).unwrap();
    refused(run(&gptq, &windows), "block-00002.safetensors");
}

#[test]
fn spilled_streams_and_weights_from_the_file_give_the_same_bits() {
    let windows = windows(3);
    let (checkpoint, model) = dense("models/tiny-llama");
    let attacher = attacher(&model);
    let spill = tempfile::tempdir().unwrap();
    for method in [Method::ApiqBlock(apiq(1)), Method::ApiqLayer(apiq(1))] {
        let config = config(method, "affine2:64");
        let expected = uninterrupted(&config, &windows);
        // A skeleton at 2 bits; the weights come block by block.
        let options = LoadOptions::uniform("affine2:64".parse().unwrap()).in_f32();
        let (skeleton, _) = checkpoint.load(&options, &Device::flex()).unwrap();
        let calibrator = Calibrator::new(&config, &windows).with_adapters(&attacher);
        let calibrator = calibrator.with_weights(checkpoint.source()).with_spill(spill.path());
        let (model, _) = calibrator.run(skeleton).unwrap();
        assert_eq!(contents(&model), expected);
    }
}
