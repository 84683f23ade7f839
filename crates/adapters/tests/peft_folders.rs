//! Folders that PEFT wrote, and folders that nobody should have written.

use std::{collections::BTreeMap, fs, path::Path};

use burn::{
    nn::LinearConfig,
    tensor::{Device, Tensor},
};
use kiln_adapters::{
    Adapted, AdapterConfig, CONFIG_FILE, Dropout, Error, Lora, LoraAttacher, PeftConfig, PeftFolder,
    TargetModules, WEIGHTS_FILE, save_peft,
};
use kiln_testkit::{Golden, read, tensor, testdata};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

type Slots = Vec<(String, [usize; 2])>;

/// The linears of a LLaMA of `layers` blocks.
fn llama(layers: usize, hidden: usize, kv: usize, mlp: usize) -> Slots {
    let block = |i: usize| {
        [
            ("self_attn.q_proj", [hidden, hidden]),
            ("self_attn.k_proj", [hidden, kv]),
            ("self_attn.v_proj", [hidden, kv]),
            ("self_attn.o_proj", [hidden, hidden]),
            ("mlp.gate_proj", [hidden, mlp]),
            ("mlp.up_proj", [hidden, mlp]),
            ("mlp.down_proj", [mlp, hidden]),
        ]
        .map(|(name, shape)| (format!("model.layers.{i}.{name}"), shape))
    };
    (0..layers).flat_map(block).collect()
}

fn attach_all(attacher: &LoraAttacher, slots: &Slots) -> Vec<(String, Lora)> {
    let device = Device::flex();
    let adapted = slots.iter().map(|(path, [d_input, d_output])| {
        let base = LinearConfig::new(*d_input, *d_output).init(&device);
        let adapted: Adapted<_, Lora> = attacher.attach(path, base).unwrap();
        adapted.adapter.map(|lora| (path.clone(), lora))
    });
    adapted.flatten().collect()
}

fn save(folder: &Path, config: &AdapterConfig, adapters: &[(String, Lora)]) -> Result<(), Error> {
    save_peft(folder, config, adapters.iter().map(|(path, lora)| (path, lora)))
}

#[test]
fn folders_of_peft_load_whole_and_are_written_back_the_same() {
    let folders = [
        ("tiny-lora-r8-all", llama(2, 64, 32, 128), 14, 8, 2.0),
        ("smollm2-lora-r4-qv", llama(30, 576, 192, 1536), 60, 4, 2.0),
    ];
    for (name, slots, count, r, scaling) in folders {
        let folder = PeftFolder::open(testdata("peft").join(name)).unwrap();
        assert!(folder.config().unknown_keys.is_empty());
        let attacher = folder.attacher::<Lora>(&slots, 0).unwrap();
        assert!(attacher.targets().unmatched.is_empty());
        let adapters = attach_all(&attacher, &slots);
        assert_eq!(adapters.len(), count, "{name}");
        let file = Golden::open(&format!("peft/{name}/{WEIGHTS_FILE}"));
        assert_eq!(file.names().count(), 2 * count);
        for (path, lora) in &adapters {
            assert_eq!((lora.rank(), lora.scaling()), (r, scaling), "{path}");
            for (factor, values) in [("A", &lora.lora_a), ("B", &lora.lora_b)] {
                let key = format!("base_model.model.{path}.lora_{factor}.weight");
                let stored = values.val().transpose();
                assert_eq!(stored.dims(), file.shape(&key), "{key}");
                assert_eq!(read(stored), file.floats(&key), "{key}");
            }
        }

        let written = tempfile::tempdir().unwrap();
        save(written.path(), attacher.config(), &adapters).unwrap();
        assert_eq!(fs::read_dir(written.path()).unwrap().count(), 2);
        let tensors = |bytes: &[u8]| -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
            let file = SafeTensors::deserialize(bytes).unwrap();
            let tensors = file.tensors().into_iter();
            tensors.map(|(name, t)| (name, (t.dtype(), t.shape().into(), t.data().into()))).collect()
        };
        let ours = fs::read(written.path().join(WEIGHTS_FILE)).unwrap();
        let theirs = fs::read(testdata("peft").join(name).join(WEIGHTS_FILE)).unwrap();
        assert_eq!(tensors(&ours), tensors(&theirs), "{name}");
        let (_, header) = SafeTensors::read_metadata(&ours).unwrap();
        assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
        assert_eq!(&PeftConfig::read(written.path().join(CONFIG_FILE)).unwrap(), folder.config());
    }
}

/// A small folder, changed before it is opened.
struct Bad {
    folder: tempfile::TempDir,
    tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
}

const A: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
const B: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";

fn small_slots() -> Slots {
    llama(1, 8, 4, 16)
}

impl Bad {
    /// q_proj and v_proj of one block, rank 2.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let names = ["q_proj", "v_proj"].map(String::from);
        let config = PeftConfig::new(2, 4.0, TargetModules::Names(names.into()));
        config.write(folder.path().join(CONFIG_FILE)).unwrap();
        let mut tensors = BTreeMap::new();
        for (projection, d_output) in [("q_proj", 8), ("v_proj", 4)] {
            for (factor, shape) in [("A", [2, 8]), ("B", [d_output, 2])] {
                let name =
                    format!("base_model.model.model.layers.0.self_attn.{projection}.lora_{factor}.weight");
                tensors.insert(name, (Dtype::F32, shape.to_vec(), vec![0; 4 * shape[0] * shape[1]]));
            }
        }
        Self { folder, tensors }
    }

    fn write(&self) {
        let views = self.tensors.iter().map(|(name, (dtype, shape, data))| {
            (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        fs::write(self.folder.path().join(WEIGHTS_FILE), safetensors::serialize(views, None).unwrap())
            .unwrap();
    }

    fn load(&self) -> Result<LoraAttacher, Error> {
        PeftFolder::open(self.folder.path())?.attacher(&small_slots(), 0)
    }

    /// The error's file, field, expectation and finding.
    #[track_caller]
    fn error(&self) -> [String; 4] {
        self.write();
        match self.load().unwrap_err() {
            Error::File { path, field, expected, found } => {
                [path.file_name().unwrap().to_str().unwrap().into(), field, expected, found]
            }
            other => panic!("{other}"),
        }
    }
}

fn four(parts: [&str; 4]) -> [String; 4] {
    parts.map(Into::into)
}

#[test]
fn the_small_folder_is_good_until_it_is_changed() {
    let good = Bad::new();
    good.write();
    assert_eq!(attach_all(&good.load().unwrap(), &small_slots()).len(), 2);
}

#[test]
fn a_missing_tensor_is_named() {
    let mut bad = Bad::new();
    bad.tensors.remove(B);
    assert_eq!(bad.error(), four([WEIGHTS_FILE, B, "F32, F16 or BF16 [8, 2]", "no such tensor"]));
}

#[test]
fn a_tensor_that_nothing_uses_is_named() {
    for name in [
        "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight",
        "base_model.model.lm_head.weight",
    ] {
        let mut bad = Bad::new();
        bad.tensors.insert(name.into(), (Dtype::F32, vec![2, 8], vec![0; 64]));
        let [file, field, ..] = bad.error();
        assert_eq!([file.as_str(), &field], [WEIGHTS_FILE, name]);
    }
}

#[test]
fn wrong_shapes_and_types_are_named() {
    for (dtype, shape, found) in [
        (Dtype::F32, vec![8, 2], "F32 [8, 2]"),
        (Dtype::F32, vec![16], "F32 [16]"),
        (Dtype::F32, vec![3, 8], "F32 [3, 8]"),
        (Dtype::I32, vec![2, 8], "I32 [2, 8]"),
        (Dtype::F64, vec![2, 8], "F64 [2, 8]"),
    ] {
        let mut bad = Bad::new();
        let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        bad.tensors.insert(A.into(), (dtype, shape, vec![0; bytes]));
        assert_eq!(bad.error(), four([WEIGHTS_FILE, A, "F32, F16 or BF16 [2, 8]", found]));
    }
}

#[test]
fn values_that_are_not_finite_are_named() {
    for (value, found) in [(f32::NAN, "NaN at index 3"), (f32::NEG_INFINITY, "-inf at index 3")] {
        let mut bad = Bad::new();
        bad.tensors.get_mut(A).unwrap().2[12..16].copy_from_slice(&value.to_le_bytes());
        assert_eq!(bad.error(), four([WEIGHTS_FILE, A, "finite values", found]));
    }
}

#[test]
fn half_precision_is_read_exactly() {
    let mut folder = Bad::new();
    // 1, -2, 0.5 and 3 as the upper halves of f32.
    let bf16 = [0x3f80u16, 0xc000, 0x3f00, 0x4040].map(u16::to_le_bytes).concat();
    folder.tensors.insert(A.into(), (Dtype::BF16, vec![2, 8], bf16.repeat(4)));
    let f16 = [0x3c00u16, 0xc000, 0x3800, 0x4200].map(u16::to_le_bytes).concat();
    folder.tensors.insert(B.into(), (Dtype::F16, vec![8, 2], f16.repeat(4)));
    folder.write();
    let adapters = attach_all(&folder.load().unwrap(), &small_slots());
    let expected = [1.0, -2.0, 0.5, 3.0].repeat(4);
    assert_eq!(read(adapters[0].1.lora_a.val().transpose()), expected);
    assert_eq!(read(adapters[0].1.lora_b.val().transpose()), expected);
}

#[test]
fn every_truncation_is_an_error_that_names_the_file() {
    let bad = Bad::new();
    bad.write();
    let path = bad.folder.path().join(WEIGHTS_FILE);
    let whole = fs::read(&path).unwrap();
    for length in (0..whole.len()).step_by(7) {
        fs::write(&path, &whole[..length]).unwrap();
        assert!(bad.load().unwrap_err().to_string().contains(WEIGHTS_FILE), "{length}");
    }
    fs::remove_file(&path).unwrap();
    assert!(matches!(bad.load(), Err(Error::Io { path: named, .. }) if named == path));
}

#[test]
fn keys_of_the_configuration_are_reported_or_refused() {
    let folder = Bad::new();
    folder.write();
    let path = folder.folder.path().join(CONFIG_FILE);
    let text = fs::read_to_string(&path).unwrap();
    let with =
        |key: &str, value: &str| fs::write(&path, text.replacen('{', &format!("{{\"{key}\": {value},"), 1));
    with("no_such_key", "[1, 2]").unwrap();
    assert_eq!(PeftFolder::open(folder.folder.path()).unwrap().config().unknown_keys, ["no_such_key"]);
    folder.load().unwrap();
    fs::write(&path, text.replace(r#""lora_bias": false"#, r#""lora_bias": true"#)).unwrap();
    assert!(matches!(folder.load(), Err(Error::Unsupported { key, .. }) if key == "lora_bias"));
    fs::write(&path, text.replace("q_proj", "c_attn").replace("v_proj", "c_proj")).unwrap();
    let error = folder.load().unwrap_err();
    assert!(matches!(&error, Error::File { field, .. } if field == "target_modules"), "{error}");
    // Names of other architectures are listed, and change nothing.
    fs::write(&path, text.replace("\"q_proj\"", "\"q_proj\", \"c_attn\"")).unwrap();
    let unmatched = folder.load().unwrap().targets().unmatched.clone();
    assert_eq!(unmatched.iter().map(|entry| entry.entry.as_str()).collect::<Vec<_>>(), ["c_attn"]);
}

#[test]
fn a_base_of_another_shape_is_refused() {
    let folder = Bad::new();
    folder.write();
    let base = LinearConfig::new(8, 9).init(&Device::flex());
    let error = folder.load().unwrap().attach("model.layers.0.self_attn.q_proj", base).unwrap_err();
    assert!(error.to_string().contains("q_proj"), "{error}");
}

fn lora(seed: u64, r: usize, scaling: f64) -> Lora {
    let device = Device::flex();
    let dropout = Dropout::new(0.0, "", 0);
    Lora::new(tensor(seed, [8, r], &device), tensor(seed + 1, [r, 4], &device), scaling, dropout)
}

#[test]
fn what_could_not_be_loaded_again_is_not_saved() {
    let folder = tempfile::tempdir().unwrap();
    let config = AdapterConfig::lora(2, 4.0).with_targets(["v_proj"]);
    let refused = |config: &AdapterConfig, path: &str, lora: Lora, reason: &str| {
        let error = save(folder.path(), config, &[(path.into(), lora)]).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    };
    refused(&config, "a.v_proj", lora(1, 3, 2.0), "rank 2 and scaling 2, as configured, found rank 3");
    refused(&config, "a.v_proj", lora(1, 2, 1.0), "found rank 2 and scaling 1");
    refused(&config, "a.q_proj", lora(1, 2, 2.0), "targets");
    let mut bad = lora(1, 2, 2.0);
    bad.lora_b = bad.lora_b.map(|b: Tensor<2>| b / 0.0);
    refused(&config, "a.v_proj", bad, "a.v_proj.lora_B.weight: expected finite values");
    let dora = AdapterConfig::dora(2, 4.0).with_targets(["v_proj"]);
    refused(&dora, "a.v_proj", lora(1, 2, 2.0), "magnitudes, as configured, found rank 2");
    let two = [("a.v_proj".into(), lora(1, 2, 2.0)), ("a.v_proj".into(), lora(3, 2, 2.0))];
    assert!(save(folder.path(), &config, &two).is_err());
    let one = [("a.v_proj".into(), lora(1, 2, 2.0)), ("a.q_proj".into(), lora(3, 2, 2.0))];
    assert!(save(folder.path(), &config, &one).unwrap_err().to_string().contains("a.q_proj"));
    assert!(save(folder.path(), &config, &[]).is_err());
}

#[test]
fn a_folder_that_can_not_be_made_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    fs::write(&path, "").unwrap();
    let config = AdapterConfig::lora(2, 4.0).with_targets(["v_proj"]);
    let adapters = [("v_proj".into(), lora(1, 2, 2.0))];
    let error = save(&path.join("adapter"), &config, &adapters).unwrap_err();
    assert!(matches!(&error, Error::Io { .. }) && error.to_string().contains("file"), "{error}");
}
