//! Runs that are cancelled, resumed, spilled to disk, fed from a file.

use std::ops::ControlFlow;

use burn::tensor::Device;
use kiln_calibration::{CalibrationConfig, Calibrator, Error, GptqConfig, Method, Progress};
use kiln_models::LoadOptions;

use crate::setup::*;

fn uninterrupted(config: &CalibrationConfig, windows: &[Vec<u32>]) -> Vec<Contents> {
    let model = tiny();
    let attacher = attacher(&model);
    let (model, _) =
        Calibrator::new(config, windows).with_adapters(&attacher).run(model, &mut silent).unwrap();
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
            calibrator.with_folder(folder.path()).run(tiny(), observer)
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
        let (model, report) = run(&mut silent).unwrap();
        assert_eq!(contents(&model), expected, "{scheme}");
        assert_eq!(report.blocks.iter().map(|block| block.index).collect::<Vec<_>>(), [0, 1, 2, 3]);
        // A finished run is read, not repeated.
        let (model, again) = run(&mut |_| panic!("nothing is left to do")).unwrap();
        assert_eq!(contents(&model), expected);
        for (again, block) in again.blocks.iter().zip(&report.blocks) {
            // JSON keeps numbers to the last bit but one.
            assert!((again.activation_error - block.activation_error).abs() < 1e-12);
            assert_eq!(again.projections.len(), block.projections.len());
        }
    }
}

#[test]
fn another_runs_folder_and_damaged_files_are_refused() {
    let (folder, windows) = (tempfile::tempdir().unwrap(), windows(2));
    let run = |config: &CalibrationConfig, windows: &[Vec<u32>]| {
        Calibrator::new(config, windows).with_folder(folder.path()).run(tiny(), &mut silent).map(|_| ())
    };
    let gptq = config(Method::Gptq(GptqConfig::default()), "affine3:64");
    run(&gptq, &windows).unwrap();
    let refused = |result: Result<(), Error>, file: &str| {
        let message = result.unwrap_err().to_string();
        assert!(message.contains(file), "{message}");
    };
    let other = config(Method::Gptq(GptqConfig::default()), "affine2:64");
    refused(run(&other, &windows), "streams.bin");
    refused(run(&gptq, &crate::setup::windows(3)[1..]), "streams.bin");

    let streams = folder.path().join("streams.bin");
    let bytes = std::fs::read(&streams).unwrap();
    for damaged in [&bytes[..bytes.len() - 1], &b"{\n"[..], &[0xff; 5000]] {
        std::fs::write(&streams, damaged).unwrap();
        refused(run(&gptq, &windows), "streams.bin");
    }
    std::fs::write(&streams, &bytes).unwrap();
    let block = folder.path().join("block-00002.safetensors");
    let mut bytes = std::fs::read(&block).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&block, &bytes).unwrap();
    refused(run(&gptq, &windows), "block-00002.safetensors");
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
        let options = LoadOptions::uniform("affine2:64".parse().unwrap());
        let (skeleton, _) = checkpoint.load(&options, &Device::flex()).unwrap();
        let calibrator = Calibrator::new(&config, &windows).with_adapters(&attacher);
        let calibrator = calibrator.with_weights(checkpoint.source()).with_spill(spill.path());
        let (model, _) = calibrator.run(skeleton, &mut silent).unwrap();
        assert_eq!(contents(&model), expected);
    }
}
