//! Bad input.

use kiln_calibration::{
    ApiqConfig, CalibrationConfig, Calibrator, Error, GptqConfig, LoftqConfig, Method, Rounding, Svd, loftq,
};
use kiln_models::{
    Checkpoint, Decoder, DenseTensor, Embedding, StoredWeight, TensorSource, Windows,
    families::{LinearRole, NormPlace},
};
use kiln_quant_core::{Plan, QuantLinear, QuantScheme, ScaleType, Scheme};

use crate::setup::*;

fn refused(model: Decoder<QuantLinear>, config: &CalibrationConfig, windows: &Windows) -> Error {
    Calibrator::new(config, windows).run(model).map(|_| ()).unwrap_err()
}

#[test]
fn windows_that_do_not_fit_the_model_are_refused() {
    let config = config(Method::Rtn(Rounding::MinMax), "affine2:64");
    for (windows, part) in [
        (vec![vec![1; 513]], "at most 512 tokens"),
        (vec![vec![1, 2048]], "ids below 2048, the vocabulary, found 2048"),
    ] {
        let windows = Windows::new(windows).unwrap();
        let message = refused(tiny(), &config, &windows).to_string();
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn options_out_of_range_are_refused_by_name() {
    let apiq = ApiqConfig::default();
    let bad = [
        (Method::ApiqBlock(ApiqConfig { epochs: 0, ..apiq.clone() }), "epochs"),
        (Method::ApiqLayer(ApiqConfig { lr_lora: -1.0, ..apiq.clone() }), "lr_lora"),
        (Method::Clipping(ApiqConfig { lr_clipping: f64::NAN, ..apiq.clone() }), "lr_clipping"),
        (Method::ApiqBlock(ApiqConfig { weight_decay: f32::INFINITY, ..apiq.clone() }), "weight_decay"),
        (Method::ApiqBlock(ApiqConfig { final_ratio: 1.5, ..apiq.clone() }), "final_ratio"),
        (Method::ApiqBlock(ApiqConfig { initial_logit: f32::NAN, ..apiq }), "initial_logit"),
        (Method::Gptq(GptqConfig { damping: 0.0, ..GptqConfig::default() }), "damping"),
        (Method::Gptq(GptqConfig { block: 0, ..GptqConfig::default() }), "block"),
    ];
    for (method, name) in bad {
        let message = refused(tiny(), &config(method, "affine2:64"), &windows(1)).to_string();
        assert!(message.contains(name), "{message}");
    }
    let mut both = config(Method::Loftq(LoftqConfig::default()), "affine2:64");
    both.correction = Some(Svd::Exact);
    assert!(refused(tiny(), &both, &windows(1)).to_string().contains("correction"));
    for method in [Method::ApiqBlock(ApiqConfig::default()), Method::Gptq(GptqConfig::default())] {
        for scheme in ["nf4:64", "affine2:8x4"] {
            // Known before the first block is calibrated.
            let last = "layers.3.mlp.up_proj";
            let mut config = config(method.clone(), "affine2:64");
            config.schemes = config.schemes.with_path(last, scheme.parse().unwrap());
            let run = |progress: kiln_calibration::Progress| panic!("{progress:?}");
            let windows = windows(1);
            let error =
                Calibrator::new(&config, &windows).run_with(tiny(), &mut { run }).map(|_| ()).unwrap_err();
            let message = error.to_string();
            assert!(
                message.contains(last) && message.contains("affine") && message.contains(scheme),
                "{message}"
            );
        }
        let double = QuantScheme::affine(2, 64).with_scales(ScaleType::Double);
        let config = CalibrationConfig::new(method, Plan::uniform(Scheme::Packed(double)));
        let message = refused(tiny(), &config, &windows(1)).to_string();
        assert!(message.contains("q_proj") && message.contains("scales not quantized"), "{message}");
    }
}

#[test]
fn what_starts_adapters_needs_some() {
    let mut corrected = config(Method::Rtn(Rounding::MinMax), "affine2:64");
    corrected.correction = Some(Svd::Exact);
    let pissa = Method::Pissa { rounding: Rounding::MinMax, svd: Svd::Exact };
    for config in
        [config(Method::Loftq(LoftqConfig::default()), "affine2:64"), config(pissa, "affine2:64"), corrected]
    {
        let message = refused(tiny(), &config, &windows(1)).to_string();
        assert!(message.contains("with_adapters"), "{message}");
    }
    let weight = vec![1.0; 64];
    let scheme = QuantScheme::affine(2, 64);
    let error = loftq("w", &weight, 64, 0, &scheme, &LoftqConfig { iterations: 1, ..LoftqConfig::default() });
    assert!(error.unwrap_err().to_string().contains("rank"));
}

#[test]
fn activations_and_weights_that_are_not_finite_name_the_projection() {
    let methods = [
        Method::Rtn(Rounding::MinMax),
        Method::Gptq(GptqConfig::default()),
        Method::ApiqLayer(apiq(1)),
        Method::ApiqBlock(apiq(1)),
    ];
    for method in methods {
        let config = config(method, "affine2:64");
        let mut model = tiny();
        let norm = model.blocks[1].norm_mut(NormPlace::PreMlp).unwrap();
        norm.weight = norm.weight.take().map(|weight| weight.map(|weight| weight * f32::NAN));
        let error = refused(model, &config, &windows(2));
        assert!(
            matches!(&error, Error::NotFinite { place, .. } if place == "model.layers.1.mlp.gate_proj"),
            "{error}"
        );

        let mut model = tiny();
        let QuantLinear::Dense(linear) = model.blocks[2].linear_mut(LinearRole::Down).unwrap() else {
            panic!("dense")
        };
        linear.weight = linear.weight.clone().map(|weight| weight.slice_fill([3..4, 5..6], f32::INFINITY));
        let error = refused(model, &config, &windows(2));
        assert!(
            matches!(&error, Error::NotFinite { place, .. } if place == "model.layers.2.mlp.down_proj"),
            "{error}"
        );
    }
}

/// A source of weights that changes what another one reads.
struct Changed<'a, F>(&'a dyn TensorSource, F);

impl<F: Fn(&str, StoredWeight) -> StoredWeight + Send + Sync> TensorSource for Changed<'_, F> {
    fn contains(&self, name: &str) -> bool {
        self.0.contains(name)
    }

    fn names(&self) -> Vec<String> {
        self.0.names()
    }

    fn describe(&self, name: &str) -> kiln_models::Result<kiln_models::Described> {
        self.0.describe(name)
    }

    fn dense(&self, name: &str) -> kiln_models::Result<DenseTensor> {
        self.0.dense(name)
    }

    fn weight(&self, module: &str) -> kiln_models::Result<StoredWeight> {
        Ok((self.1)(module, self.0.weight(module)?))
    }
}

#[test]
fn weights_of_a_source_are_checked() {
    let (checkpoint, model) = dense("models/tiny-llama");
    let config = config(Method::ApiqBlock(apiq(1)), "affine2:64");
    let path = "model.layers.0.mlp.up_proj";
    let run = |change: fn(DenseTensor) -> DenseTensor| {
        let source = Changed(checkpoint.source(), |module: &str, weight| match weight {
            StoredWeight::Dense(tensor) if module == path => StoredWeight::Dense(change(tensor)),
            weight => weight,
        });
        let windows = windows(1);
        let calibrator = Calibrator::new(&config, &windows).with_weights(&source);
        calibrator.run(model.clone()).map(|_| ()).unwrap_err()
    };
    let error = run(|mut tensor| {
        tensor.shape.reverse();
        tensor
    });
    let message = error.to_string();
    assert!(message.contains(path) && message.contains("a weight of shape"), "{message}");
    let error = run(|mut tensor| {
        tensor.values[7] = f32::NAN;
        tensor
    });
    assert!(matches!(&error, Error::NotFinite { place, .. } if place == path), "{error}");

    let other = Checkpoint::open(kiln_testkit::testdata("tiny/opt-f32")).unwrap();
    let windows = windows(1);
    let missing = Calibrator::new(&config, &windows).with_weights(other.source());
    let message = missing.run(model).map(|_| ()).unwrap_err().to_string();
    assert!(message.contains("model.layers.0"), "{message}");
}

#[test]
fn embeddings_that_are_not_finite_and_missing_folders_are_refused() {
    let config = config(Method::Rtn(Rounding::MinMax), "affine2:64");
    let mut model = tiny();
    let Embedding::Dense(embedding) = &mut model.embed_tokens else { panic!("dense") };
    let windows = windows(2);
    let id = windows.as_slice()[1][3] as usize;
    embedding.weight = embedding.weight.clone().map(|weight| weight.slice_fill([id..id + 1, 0..1], f32::NAN));
    let error = refused(model, &config, &windows);
    assert!(matches!(&error, Error::NotFinite { place, .. } if place == "embedding"), "{error}");

    let missing = std::path::Path::new("no/such/folder");
    let calibrator = Calibrator::new(&config, &windows).with_spill(missing);
    let message = calibrator.run(tiny()).map(|_| ()).unwrap_err().to_string();
    assert!(message.contains("no/such/folder"), "{message}");
}

#[test]
fn a_loss_that_is_not_finite_ends_the_run_and_names_the_place() {
    let wild = ApiqConfig { lr_clipping: 0.0, lr_lora: 1e30, ..apiq(3) };
    for (method, place) in [
        (Method::ApiqBlock(wild.clone()), "block 0"),
        (Method::ApiqLayer(wild), "model.layers.0.self_attn.q_proj"),
    ] {
        let (model, config, windows) = (tiny(), config(method, "affine2:64"), windows(2));
        let attacher = attacher(&model);
        let run = Calibrator::new(&config, &windows).with_adapters(&attacher).run(model);
        let error = run.map(|_| ()).unwrap_err();
        assert!(matches!(&error, Error::Diverged { place: found, .. } if found == place), "{error}");
    }
}

#[test]
fn options_survive_json_and_unknown_ones_are_refused() {
    for method in [
        Method::Rtn(Rounding::Hqq),
        Method::Gptq(GptqConfig::default()),
        Method::Loftq(LoftqConfig { svd: Svd::Exact, ..LoftqConfig::default() }),
        Method::ApiqBlock(ApiqConfig::default()),
    ] {
        let config = config(method, "affine2:64");
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<CalibrationConfig>(&text).unwrap(), config, "{text}");
    }
    let text = r#"{"method": {"apiq-block": {"epoch": 3}}, "schemes": {"default": "affine2:64"}}"#;
    let error = serde_json::from_str::<CalibrationConfig>(text).unwrap_err().to_string();
    assert!(error.contains("epoch"), "{error}");
    let text = r#"{"pissa": {"rounding": "min_max", "svd": "exact", "iterations": 3}}"#;
    assert!(serde_json::from_str::<Method>(text).unwrap_err().to_string().contains("iterations"));
}
