//! Own adapter folders, and the PEFT folders of methods other than LoRA.

use std::{fs, path::Path};

use burn::{
    module::{Param, ParamId},
    tensor::{Device, Tensor},
};
use kiln_adapters::{
    Adapted, AdapterConfig, AdapterFolder, AnyAdapter, AnyAttacher, CONFIG_FILE, Core, Dora, Error, InitH,
    KILN_CONFIG_FILE, KILN_WEIGHTS_FILE, Lora, LoraAttacher, Method, PeftFolder, PooledAdapter, Pooling,
    QBara, QaBlora, QaHira, QaLora, TargetModules, save_adapters, save_peft,
};
use kiln_quant_core::{
    HostQuantizer, MinMax, PackedLinear, PackedTensor, PackedWeight, Projection, QuantLinear,
    files::interruption::killed_at, packed_file::fingerprint,
};
use kiln_testkit::{read, relative_difference, tensor, values};
use safetensors::SafeTensors;
use serde_json::{Value, json};

const PATH: &str = "model.layers.0.mlp.up_proj";
const SIZE: [usize; 2] = [24, 12];

fn slots() -> Vec<(String, [usize; 2])> {
    vec![(PATH.into(), SIZE), ("model.layers.0.mlp.down_proj".into(), [12, 24])]
}

fn weight() -> PackedWeight {
    MinMax
        .quantize(PATH, &values(1, SIZE[0] * SIZE[1]), SIZE[0], SIZE[1], &"affine4:8".parse().unwrap())
        .unwrap()
}

fn base() -> QuantLinear {
    let weight = PackedTensor::new(&weight(), &Device::flex());
    let bias = Param::initialized(ParamId::new(), tensor(2, [SIZE[1]], &Device::flex()));
    QuantLinear::Packed(PackedLinear { weight, bias: Some(bias) })
}

fn config(method: Method) -> AdapterConfig {
    AdapterConfig::new(method, 3, 4.5).with_targets(["up_proj"])
}

fn methods() -> Vec<AdapterConfig> {
    vec![
        config(Method::lora()),
        config(Method::dora()).with_dropout(0.1),
        config(Method::QBara(QBara { lambda: 2 })),
        config(Method::QaLora(QaLora { pool: 8, pooling: Pooling::Average })),
        config(Method::QaLora(QaLora { pool: 8, pooling: Pooling::Sum })),
        config(Method::QaHira(QaHira { pool: 4, repeat: 3, init: InitH::Kaiming })),
        config(Method::QaBlora(QaBlora { pool: 8, repeat: 2, rank: None })),
    ]
}

/// Every trained value moved, as training would.
fn trained(adapter: AnyAdapter) -> AnyAdapter {
    let moved = |param: Param<Tensor<2>>, seed| {
        let shape = param.val().dims();
        param.map(|value: Tensor<2>| value + tensor::<2>(seed, shape, &Device::flex()) * 0.3)
    };
    match adapter {
        AnyAdapter::Lora(mut lora) => {
            lora.lora_b = moved(lora.lora_b, 5);
            lora.into()
        }
        AnyAdapter::Dora(mut dora) => {
            dora.lora_b = moved(dora.lora_b, 5);
            dora.magnitude = dora.magnitude.map(|m: Tensor<1>| m * 1.25);
            dora.into()
        }
        AnyAdapter::Pooled(mut pooled) => {
            pooled.core = match pooled.core {
                Core::LowRank(mut core) => {
                    core.b = moved(core.b, 5);
                    Core::LowRank(core)
                }
                Core::Full(mut core) => {
                    core.h = moved(core.h, 5);
                    Core::Full(core)
                }
            };
            pooled.into()
        }
        other => panic!("{other:?}"),
    }
}

fn adapted(config: &AdapterConfig) -> Adapted<QuantLinear, AnyAdapter> {
    let adapted =
        AnyAttacher::new(&config.clone().with_seed(7), &slots()).unwrap().attach(PATH, base()).unwrap();
    Adapted { base: adapted.base, adapter: adapted.adapter.map(trained) }
}

fn save(folder: &Path, config: &AdapterConfig, adapter: &AnyAdapter) -> Result<(), Error> {
    let weight = weight();
    save_adapters(folder, config, Some(&fingerprint([(PATH, &weight)])), [(PATH, adapter)])
}

#[test]
fn every_method_is_saved_and_loaded_with_the_same_output() {
    let x = tensor::<2>(4, [10, SIZE[0]], &Device::flex());
    for config in methods() {
        let folder = tempfile::tempdir().unwrap();
        let adapted = adapted(&config);
        let y = read(adapted.forward(x.clone()));
        let shift = relative_difference(&y, &read(base().forward(x.clone())));
        assert!(shift > 0.01, "{config:?}: {shift}");
        save(folder.path(), &config, adapted.adapter.as_ref().unwrap()).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
        let opened = AdapterFolder::open(folder.path()).unwrap();
        assert_eq!(opened.config(), &config);
        opened.check_base(Some(&fingerprint([(PATH, &weight())]))).unwrap();
        let attacher = opened.attacher::<AnyAdapter>(&slots(), 0).unwrap();
        assert_eq!(attacher.config(), &config);
        let loaded = attacher.attach(PATH, base()).unwrap();
        assert_eq!(read(loaded.forward(x.clone())), y, "{config:?}");
    }
}

#[test]
fn tensors_stand_in_the_papers_orientation() {
    let folder = tempfile::tempdir().unwrap();
    for (config, expected) in methods().iter().zip([
        vec![("A", vec![3, 24]), ("B", vec![12, 3])],
        vec![("A", vec![3, 24]), ("B", vec![12, 3]), ("magnitude", vec![12])],
        vec![("A", vec![6, 12]), ("B", vec![6, 6])],
        vec![("A", vec![3, 3]), ("B", vec![12, 3])],
        vec![("A", vec![3, 3]), ("B", vec![12, 3])],
        vec![("H", vec![4, 6])],
        // 3 · 36 / (3 + 6) = 12 values a rank.
        vec![("A", vec![12, 3]), ("B", vec![6, 12])],
    ]) {
        let adapter = adapted(config).adapter.unwrap();
        save(folder.path(), config, &adapter).unwrap();
        let bytes = fs::read(folder.path().join(KILN_WEIGHTS_FILE)).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let mut found: Vec<_> =
            file.tensors().into_iter().map(|(name, view)| (name, view.shape().to_vec())).collect();
        found.sort();
        let expected: Vec<_> =
            expected.into_iter().map(|(part, shape)| (format!("{PATH}.{part}"), shape)).collect();
        assert_eq!(found, expected);
        if let AnyAdapter::Pooled(PooledAdapter { core: Core::Full(core), .. }) = &adapter {
            let stored = file.tensor(&format!("{PATH}.H")).unwrap();
            let stored: Vec<f32> =
                stored.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
            assert_eq!(stored, read(core.h.val().transpose()));
        }
    }
}

#[test]
fn another_base_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(Method::QaHira(QaHira::for_groups(8)));
    let adapter = adapted(&config).adapter.unwrap();
    save(folder.path(), &config, &adapter).unwrap();
    let opened = AdapterFolder::open(folder.path()).unwrap();
    let mut other = weight();
    other.codes[0] ^= 1;
    for found in [Some(fingerprint([(PATH, &other)])), None] {
        let error = opened.check_base(found.as_deref()).unwrap_err();
        assert!(matches!(&error, Error::File { field, .. } if field == "base_fingerprint"), "{error}");
    }
    // What was trained on a dense base records none, and fits where its shapes do.
    save_adapters(folder.path(), &config, None, [(PATH, &adapter)]).unwrap();
    AdapterFolder::open(folder.path()).unwrap().check_base(None).unwrap();
}

#[test]
fn another_pooling_scale_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let method = |pooling| Method::QaLora(QaLora { pool: 8, pooling });
    let sum = config(method(Pooling::Sum));
    let adapter = adapted(&sum).adapter.unwrap();
    save(folder.path(), &sum, &adapter).unwrap();
    let error = save(folder.path(), &config(method(Pooling::Average)), &adapter).unwrap_err().to_string();
    let expected = "expected rank 3 and scaling 1.5, pool 8 by average, repeat 1, as configured, \
                    found rank 3 and scaling 1.5, pool 8 by sum, repeat 1";
    assert!(error.contains(expected), "{error}");
}

/// A saved folder, with its configuration changed.
struct Bad(tempfile::TempDir, Value);

impl Bad {
    fn new() -> Self {
        let (folder, config) = (tempfile::tempdir().unwrap(), config(Method::QBara(QBara { lambda: 2 })));
        save(folder.path(), &config, &adapted(&config).adapter.unwrap()).unwrap();
        let text = fs::read(folder.path().join(KILN_CONFIG_FILE)).unwrap();
        Self(folder, serde_json::from_slice(&text).unwrap())
    }

    fn load(&self) -> Result<AnyAttacher, Error> {
        fs::write(self.0.path().join(KILN_CONFIG_FILE), self.1.to_string()).unwrap();
        AdapterFolder::open(self.0.path())?.attacher(&slots(), 0)
    }

    #[track_caller]
    fn refused(change: impl FnOnce(&mut Value), name: &str) {
        let mut bad = Self::new();
        change(&mut bad.1);
        let error = bad.load().unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("kiln_adapter"), "{error}");
    }
}

#[test]
fn configurations_that_are_not_understood_are_refused_by_name() {
    Bad::new().load().unwrap();
    Bad::refused(|c| c["version"] = json!(2), "version: expected 1, found 2");
    Bad::refused(|c| c["version"] = json!("1"), "version");
    Bad::refused(|c| c["extra"] = json!(1), "extra");
    Bad::refused(|c| drop(c.as_object_mut().unwrap().remove("base_fingerprint")), "base_fingerprint");
    Bad::refused(|c| c["base_fingerprint"] = json!("abc"), "base_fingerprint");
    Bad::refused(|c| c["method"] = json!({"q-bara": {"lambda": 2, "mu": 1}}), "mu");
    Bad::refused(|c| c["method"] = json!({"q-bara": {"lambda": 5}}), "up_proj.lambda");
    Bad::refused(|c| c["method"] = json!({"q-bara": {"lambda": 0}}), "up_proj.lambda");
    Bad::refused(|c| c["method"] = json!({"q-bara": {"lambda": 4}}), "up_proj.A: expected F32");
    Bad::refused(|c| c["method"] = json!({"qa-lora": {"pool": 8}}), "pooling");
    Bad::refused(|c| c["method"] = json!({"q-bora": {"lambda": 2}}), "q-bora");
    Bad::refused(
        |c| c["method"] = json!({"qa-blora": {"pool": 4, "repeat": 2, "rank": usize::MAX}}),
        "up_proj.rank",
    );
    Bad::refused(|c| c["lora"]["r"] = json!(0), "r");
    Bad::refused(|c| c["lora"]["r"] = json!(65_536), "up_proj.rank");
    Bad::refused(|c| c["lora"]["unheard_of"] = json!(1), "lora.unheard_of");
    Bad::refused(|c| c["lora"]["use_dora"] = json!(true), "use_dora");
    Bad::refused(|c| c["lora"]["use_qalora"] = json!(true), "use_qalora");
    Bad::refused(|c| c["lora"]["init_lora_weights"] = json!("pissa"), "init_lora_weights");
    Bad::refused(|c| c["lora"]["target_modules"] = json!(["up_proj", "c_attn"]), "c_attn");
    let bad = Bad::new();
    fs::write(bad.0.path().join(KILN_CONFIG_FILE), "{").unwrap();
    assert!(AdapterFolder::open(bad.0.path()).unwrap_err().to_string().contains(KILN_CONFIG_FILE));
    fs::remove_file(bad.0.path().join(KILN_CONFIG_FILE)).unwrap();
    assert!(matches!(AdapterFolder::open(bad.0.path()), Err(Error::Io { .. })));
}

#[test]
fn weights_that_do_not_fit_are_refused_by_name() {
    let mut bad = Bad::new();
    let path = bad.0.path().join(KILN_WEIGHTS_FILE);
    let whole = fs::read(&path).unwrap();
    for place in (0..whole.len()).step_by(13) {
        let mut changed = whole.clone();
        changed[place] ^= 1;
        fs::write(&path, &changed).unwrap();
        assert!(bad.load().unwrap_err().to_string().contains("weights_sha256"), "{place}");
    }
    // Folders of earlier versions have no hash.
    bad.1.as_object_mut().unwrap().remove("weights_sha256");
    for length in (0..whole.len()).step_by(11) {
        fs::write(&path, &whole[..length]).unwrap();
        assert!(bad.load().unwrap_err().to_string().contains(KILN_WEIGHTS_FILE), "{length}");
    }
    let mut nan = whole.clone();
    let end = nan.len();
    nan[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, &nan).unwrap();
    let error = bad.load().unwrap_err().to_string();
    assert!(error.contains("up_proj.B: expected finite values, found NaN"), "{error}");
    fs::write(&path, &whole).unwrap();
    bad.load().unwrap();
    let mut other = Bad::new();
    other.1["lora"]["target_modules"] = json!(["up_proj", "down_proj"]);
    let error = other.load().unwrap_err().to_string();
    assert!(error.contains("down_proj.A") && error.contains("no such tensor"), "{error}");
    // What NaN did in training is not saved either.
    let config = config(Method::QaHira(QaHira::for_groups(8)));
    let broken = match adapted(&config).adapter.unwrap() {
        AnyAdapter::Pooled(mut pooled) => {
            pooled.core = Core::full(tensor::<2>(1, [3, 12], &Device::flex()) * f32::NAN);
            AnyAdapter::from(pooled)
        }
        other => panic!("{other:?}"),
    };
    let folder = tempfile::tempdir().unwrap();
    let error = save(folder.path(), &config, &broken).unwrap_err().to_string();
    assert!(error.contains("up_proj.H: expected finite values"), "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// What a folder holds: the output of its adapter, and which kind of folder it is.
fn loaded(folder: &Path) -> (bool, Vec<f32>) {
    let x = tensor::<2>(4, [10, SIZE[0]], &Device::flex());
    let own = AdapterFolder::open(folder).and_then(|folder| folder.attacher::<AnyAdapter>(&slots(), 0));
    let attacher = match &own {
        Ok(attacher) => attacher,
        Err(_) => &PeftFolder::open(folder).unwrap().attacher::<AnyAdapter>(&slots(), 0).unwrap(),
    };
    (own.is_ok(), read(attacher.attach(PATH, base()).unwrap().forward(x)))
}

/// An adapter takes the place of another one, of any kind of folder, as a whole or not at all, whenever the process is
/// killed, and again while that is cleaned up.
#[test]
fn an_adapter_replaces_another_as_a_whole() {
    let (bara, lora) = (config(Method::QBara(QBara { lambda: 2 })), config(Method::lora()));
    let mut louder = lora.clone();
    louder.alpha = 64.0;
    let adapter = |config: &AdapterConfig| adapted(config).adapter.unwrap();
    let adapters = [adapter(&bara), adapter(&lora), adapter(&louder)];
    let work = tempfile::tempdir().unwrap();
    let folder = work.path().join("adapter");
    let write = |kind: usize| match kind {
        0 => save(&folder, &bara, &adapters[0]).unwrap(),
        1 => save_peft(&folder, &lora, [(PATH, &adapters[1])]).unwrap(),
        _ => save_peft(&folder, &louder, [(PATH, &adapters[2])]).unwrap(),
    };
    let known: Vec<_> = (0..3)
        .map(|kind| {
            write(kind);
            loaded(&folder)
        })
        .collect();
    assert!(known[0].0 && !known[1].0 && known[1].1 != known[2].1);
    fs::write(folder.join("README.md"), "mine").unwrap();
    let mut kills = 0;
    for [old, new] in [[0, 1], [1, 0], [1, 2]] {
        for first in 0.. {
            write(old);
            let whole = killed_at(first, || write(new)).is_some();
            assert!(known.contains(&loaded(&folder)), "killed at {first}");
            if whole {
                break;
            }
            for second in 0.. {
                write(old);
                killed_at(first, || write(new));
                let whole = killed_at(second, || write(old)).is_some();
                assert!([&known[old], &known[new]].contains(&&loaded(&folder)), "{first}, {second}");
                kills += 1;
                if whole {
                    break;
                }
            }
        }
        write(new);
        assert_eq!(loaded(&folder), known[new]);
        let mut names: Vec<_> =
            fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        let expected = if new == 0 {
            ["README.md", KILN_CONFIG_FILE, KILN_WEIGHTS_FILE]
        } else {
            ["README.md", CONFIG_FILE, "adapter_model.safetensors"]
        };
        assert_eq!(names, expected);
        assert_eq!(fs::read(folder.join("README.md")).unwrap(), b"mine");
    }
    assert!(kills > 500, "{kills}");
    assert_eq!(fs::read_dir(work.path()).unwrap().count(), 1);
}

#[test]
fn kinds_are_told_apart() {
    let bara = config(Method::QBara(QBara { lambda: 2 }));
    let error = LoraAttacher::new(&bara, &slots()).unwrap_err().to_string();
    assert_eq!(error, "method: expected lora, found q-bara");
    let lora = config(Method::lora());
    let error = kiln_adapters::Attacher::<PooledAdapter>::new(&lora, &slots()).unwrap_err().to_string();
    assert_eq!(error, "method: expected one that pools, found lora");
    let error = kiln_adapters::Attacher::<Dora>::new(&lora, &slots()).unwrap_err().to_string();
    assert_eq!(error, "method: expected dora, found lora");
    let pooled: Adapted<_, PooledAdapter> =
        kiln_adapters::Attacher::new(&bara, &slots()).unwrap().attach(PATH, base()).unwrap();
    assert_eq!(pooled.adapter.unwrap().geometry().rank, Some(6));
}

#[test]
fn sizes_that_do_not_divide_are_refused_at_once() {
    let mut all = config(Method::QaLora(QaLora { pool: 8, pooling: Pooling::Average }));
    all.targets = TargetModules::AllLinear;
    let error = AnyAttacher::new(&all, &slots()).unwrap_err().to_string();
    let expected =
        "model.layers.0.mlp.down_proj.pool: expected a divisor of the 12 inputs: 1, 2, 3, 4, 6, 12, found 8";
    assert_eq!(error, expected);
}

#[test]
fn peft_folders_hold_dora_and_qa_lora() {
    let x = tensor::<2>(4, [10, SIZE[0]], &Device::flex());
    for config in methods() {
        let folder = tempfile::tempdir().unwrap();
        let adapted = adapted(&config);
        let adapter = adapted.adapter.as_ref().unwrap();
        let Ok(peft) = config.to_peft() else {
            let error = config.to_peft().unwrap_err().to_string();
            assert!(error.starts_with("method: expected lora, dora or qa-lora"), "{error}");
            assert!(!matches!(config.method, Method::Lora { .. } | Method::Dora { .. } | Method::QaLora(_)));
            // Nor does any other configuration of PEFT's take it.
            let other = config.clone().with_method(Method::lora());
            assert!(save_peft(folder.path(), &other, [(PATH, adapter)]).is_err());
            continue;
        };
        save_peft(folder.path(), &config, [(PATH, adapter)]).unwrap();
        assert!(folder.path().join(CONFIG_FILE).exists());
        let opened = PeftFolder::open(folder.path()).unwrap();
        assert_eq!(opened.config(), &peft);
        let loaded = opened.attacher::<AnyAdapter>(&slots(), 0).unwrap().attach(PATH, base()).unwrap();
        let (found, expected) = (read(loaded.forward(x.clone())), read(adapted.forward(x.clone())));
        assert!(relative_difference(&found, &expected) < 1e-6, "{config:?}");
        if matches!(config.method, Method::QaLora(_)) {
            let pooled = loaded.adapter.as_ref().unwrap().as_pooled().unwrap();
            assert_eq!(pooled.geometry().pooling, Pooling::AverageTimesGroups);
            assert!(opened.attacher::<Lora>(&slots(), 0).unwrap_err().to_string().contains("method"));
        }
        // Written again, nothing changes.
        let again = tempfile::tempdir().unwrap();
        save_peft(again.path(), &config, [(PATH, loaded.adapter.as_ref().unwrap())]).unwrap();
        for file in fs::read_dir(folder.path()).unwrap() {
            let file = file.unwrap();
            let copy = again.path().join(file.file_name());
            assert_eq!(fs::read(file.path()).unwrap(), fs::read(copy).unwrap(), "{config:?}");
        }
    }
}
