use proptest::prelude::*;

use super::*;
use crate::{
    HostQuantizer, MinMax,
    safetensors_file::{NewTensor, write_safetensors},
};

const SCHEMES: [&str; 27] = [
    "affine2:64",
    "affine3:64",
    "affine4:64",
    "affine8:64",
    "affine4:64:int",
    "affine3:32:int:f16",
    "affine4:64:sym",
    "affine8:col:sym:bf16",
    "affine2:8x4",
    "affine4:16x32:int:bf16",
    "affine3:col",
    "affine4:32:f16",
    "nf2:64",
    "nf3:32",
    "nf4:64",
    "fp4:64",
    "nf4:64:double",
    "fp4:32:double",
    "nf3:16:double",
    "nf4:8x16:double",
    "nf4:col:f16",
    "affine4:64:bf16",
    "affine5:32:super8",
    "affine3:16:sym:super8",
    "affine2:16:super4",
    "iq4nl:32:super8",
    "mxfp4:32:bf16",
];

/// 70 inputs and 37 outputs, so that last groups, runs and tiles are ragged.
fn weight(scheme: &str) -> PackedWeight {
    let values: Vec<f32> = (0..70 * 37).map(|i| (i as f32 * 0.7).sin() * (1.0 + (i % 11) as f32)).collect();
    MinMax.quantize(scheme, &values, 70, 37, &scheme.parse().unwrap()).unwrap()
}

/// The two weights of the reference fingerprint.
fn small() -> [(&'static str, PackedWeight); 2] {
    let double = DoubleScales { codes: vec![200], nested: vec![0.5], offset: -0.25 };
    let a = PackedWeight {
        scheme: "nf4:2:double".parse().unwrap(),
        d_input: 2,
        d_output: 1,
        codes: vec![0x21, 0, 0, 0],
        scales: Scales::Double(double),
        offsets: None,
        input_order: None,
    };
    let b = PackedWeight {
        scheme: "affine4:2:int:f16".parse().unwrap(),
        d_input: 3,
        d_output: 1,
        codes: vec![0xF07, 0, 0, 0],
        scales: Scales::Plain(vec![1.5, -2.0]),
        offsets: Some(vec![0.125, 3.0]),
        input_order: Some(vec![2, 0, 1]),
    };
    [("a", a), ("b", b)]
}

fn refs<'a>(weights: &'a [(&'a str, PackedWeight)]) -> impl Iterator<Item = (&'a str, &'a PackedWeight)> {
    weights.iter().map(|(name, weight)| (*name, weight))
}

/// A saved file of [`small`] and one dense tensor, under a folder that lives as long as the first value.
fn saved() -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("p.safetensors");
    let dense = [("norm.weight", &[2, 1][..], &[1.0, -0.5][..])];
    let extra = BTreeMap::from([("base".to_owned(), "tiny".to_owned())]);
    PackedFile::save(&path, refs(&small()), dense, &extra).unwrap();
    (folder, path)
}

/// Writes the saved file again with other metadata, or other tensors.
fn rewritten(
    change: impl FnOnce(&mut BTreeMap<String, String>, &mut BTreeMap<String, (Vec<usize>, Vec<u32>)>),
) -> Result<PackedFile> {
    let (folder, path) = saved();
    let file = SafetensorsFile::open(&path).unwrap();
    let mut metadata = file.metadata().clone().into_iter().collect();
    // The tensors of type U32 may be changed; the others stay.
    let mut words = BTreeMap::new();
    let mut floats = Vec::new();
    let mut bytes = Vec::new();
    for name in file.names() {
        match file.describe(name).unwrap().0 {
            Dtype::U32 => drop(words.insert(name.to_owned(), file.read_u32(name).unwrap())),
            Dtype::U8 => bytes.push((name, file.read(name).unwrap())),
            dtype => floats.push((name, dtype, file.read_f32(name).unwrap())),
        }
    }
    change(&mut metadata, &mut words);
    let tensor =
        |name: &str, shape: &[usize], values| NewTensor { name: name.into(), shape: shape.into(), values };
    let mut tensors = Vec::new();
    tensors.extend(words.iter().map(|(name, (shape, values))| tensor(name, shape, Values::U32(values))));
    tensors.extend(bytes.iter().map(|(name, raw)| tensor(name, &raw.shape, Values::U8(&raw.bytes))));
    tensors.extend(floats.iter().map(|(name, dtype, (shape, values))| {
        tensor(name, shape, if *dtype == Dtype::F16 { Values::F16(values) } else { Values::F32(values) })
    }));
    let changed = folder.path().join("changed.safetensors");
    write_safetensors(&changed, &tensors, &metadata).unwrap();
    PackedFile::open(changed)
}

#[track_caller]
fn assert_error<T>(result: Result<T>, parts: &[&str]) {
    let message = result.err().expect("an error").to_string();
    for part in parts {
        assert!(message.contains(part), "no \"{part}\" in: {message}");
    }
}

#[test]
fn every_scheme_round_trips_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("p.safetensors");
    let mut weights: Vec<(&str, PackedWeight)> =
        SCHEMES.iter().map(|scheme| (*scheme, weight(scheme))).collect();
    weights[4].1.input_order = Some((0..70).rev().collect());
    let dense = [("bias", &[3][..], &[0.1, f32::MIN_POSITIVE, -0.0][..]), ("empty", &[0, 4][..], &[][..])];
    PackedFile::save(&path, refs(&weights), dense, &BTreeMap::new()).unwrap();

    let file = PackedFile::open(&path).unwrap();
    file.verify().unwrap();
    let mut names: Vec<&str> = SCHEMES.into_iter().chain(["bias", "empty"]).collect();
    names.sort_unstable();
    assert_eq!(file.names().collect::<Vec<_>>(), names);
    for (name, weight) in &weights {
        let found = file.packed(name).unwrap();
        assert_eq!(&found, weight, "{name}");
        assert_eq!(file.scheme(name), Some(&weight.scheme));
        let bits =
            |weight: &PackedWeight| weight.dequantize().into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(&found), bits(weight), "{name}");
    }
    let (shape, values) = file.dense("bias").unwrap();
    assert_eq!(
        (shape, values.iter().map(|v| v.to_bits()).collect()),
        (vec![3], vec![0.1f32.to_bits(), f32::MIN_POSITIVE.to_bits(), (-0.0f32).to_bits()])
    );
    assert_eq!(file.dense("empty").unwrap(), (vec![0, 4], vec![]));
    assert_eq!(file.scheme("bias"), None);
    assert_error(file.packed("bias"), &["p.safetensors: bias", "a packed weight", "found a dense tensor"]);
    assert_error(file.dense("nf4:64"), &["nf4:64", "found a packed weight"]);
    assert_error(file.dense("nothing"), &["nothing", "none of that name"]);
}

#[test]
fn files_are_as_large_as_the_storage_report_says() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("p.safetensors");
    for scheme in SCHEMES {
        let weight = weight(scheme);
        PackedFile::save(&path, [("w", &weight)], [], &BTreeMap::new()).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        assert_eq!(bytes.len() - header, weight.scheme.storage_bytes(70, 37), "{scheme}");
    }
}

#[test]
fn the_fingerprint_is_the_documented_sha_256() {
    // Computed in Python: hashlib.sha256 over the lines and struct.pack of the values.
    const REFERENCE: &str = "88453b151e2233075adc2a973abd661f9b9c5410648492706471d8c1d8f88ece";
    assert_eq!(fingerprint(refs(&small())), REFERENCE);
    let mut turned = small();
    turned.reverse();
    assert_eq!(fingerprint(refs(&turned)), REFERENCE);
    let (_folder, path) = saved();
    let file = PackedFile::open(path).unwrap();
    assert_eq!(file.fingerprint(), REFERENCE);
    assert_eq!(file.metadata(), &BTreeMap::from([("base".to_owned(), "tiny".to_owned())]));
}

#[test]
fn saving_twice_gives_the_same_bytes() {
    let ((_a, one), (_b, two)) = (saved(), saved());
    assert_eq!(std::fs::read(one).unwrap(), std::fs::read(two).unwrap());
}

#[test]
fn verify_finds_what_opening_cannot() {
    rewritten(|_, _| ()).unwrap().verify().unwrap();
    let changed = rewritten(|_, words| words.get_mut("a.codes").unwrap().1[0] = 0x22).unwrap();
    assert_error(changed.verify(), &["changed.safetensors: kiln.fingerprint"]);
    let changed = rewritten(|_, words| words.get_mut("b.input_order").unwrap().1 = vec![0, 1, 2]).unwrap();
    assert_error(changed.verify(), &["kiln.fingerprint"]);
    let changed = rewritten(|metadata, _| {
        let schemes = metadata.get_mut("kiln.schemes").unwrap();
        *schemes = schemes.replace("nf4:", "fp4:");
    })
    .unwrap();
    assert_error(changed.verify(), &["kiln.fingerprint"]);
    let changed = rewritten(|_, words| words.get_mut("b.input_order").unwrap().1 = vec![0, 1, 1]).unwrap();
    assert_error(changed.verify(), &["changed.safetensors: b.input_order", "permutation"]);
}

#[test]
fn what_version_1_does_not_know_is_an_error() {
    let metadata = |key: &'static str, value: Option<&'static str>| {
        rewritten(move |metadata, _| match value {
            Some(value) => drop(metadata.insert(key.into(), value.into())),
            None => drop(metadata.remove(key)),
        })
    };
    assert_error(metadata("kiln.version", Some("2")), &["kiln.version", "version 1", "\"2\""]);
    assert_error(metadata("kiln.version", None), &["kiln.version", "no such metadata key"]);
    assert_error(metadata("kiln.schemes", None), &["kiln.schemes"]);
    assert_error(metadata("kiln.fingerprint", None), &["kiln.fingerprint"]);
    assert_error(metadata("kiln.fingerprint", Some("ABC")), &["kiln.fingerprint", "ABC"]);
    assert_error(metadata("kiln.rotation", Some("hadamard")), &["kiln.rotation", "unknown"]);
    assert_error(metadata("kiln.schemes", Some("[]")), &["kiln.schemes"]);
    assert_error(
        metadata("kiln.schemes", Some("{}")),
        &["a.codes", "F32, BF16 or F16 in a dense tensor", "U32"],
    );
    let schemes = |from: &'static str, to: &'static str| {
        rewritten(move |metadata, _| {
            let schemes = metadata.get_mut("kiln.schemes").unwrap();
            assert!(schemes.contains(from), "{schemes}");
            *schemes = schemes.replace(from, to);
        })
    };
    assert_error(schemes(r#""d_input":2"#, r#""zero":1,"d_input":2"#), &["kiln.schemes", "zero"]);
    assert_error(schemes("nf4:2:double", "nf5:2:double"), &["kiln.schemes", "nf5"]);
    assert_error(schemes(r#""d_input":2"#, r#""d_input":33"#), &["a.codes", "[8, 1]", "[4, 1]"]);
    assert_error(schemes(r#""d_input":2"#, r#""d_input":18446744073709551615"#), &["a.codes"]);
    assert_error(schemes(r#""d_input":2"#, r#""d_input":0"#), &["kiln.schemes: a", "0 inputs"]);
    assert_error(schemes("nf4:2:double", "nf4:2"), &["a.scale_codes", "none under the scheme nf4:2"]);
    assert_error(schemes("affine4:2:int:f16", "affine4:2:int"), &["b.scales", "F32", "F16"]);
    assert_error(schemes("affine4:2:int:f16", "affine4:2:sym:f16"), &["b.offsets", "none under"]);
}

#[test]
fn missing_and_stray_tensors_are_errors() {
    for part in ["a.codes", "b.codes"] {
        assert_error(
            rewritten(|_, words| drop(words.remove(part))),
            &["changed.safetensors", part, "none of that name"],
        );
    }
    let insert =
        |name: &'static str| rewritten(move |_, words| drop(words.insert(name.into(), (vec![1], vec![7]))));
    assert_error(insert("extra"), &["extra", "F32, BF16 or F16 in a dense tensor"]);
    assert_error(insert("a"), &["a", "path of a packed weight"]);
    assert_error(insert("a.offsets"), &["a.offsets", "none under the scheme nf4:2:double"]);
}

#[test]
fn what_could_not_be_read_back_is_not_saved() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("p.safetensors");
    let refused = |change: fn(&mut PackedWeight), parts: &[&str]| {
        let mut weights = small();
        change(&mut weights[1].1);
        assert_error(PackedFile::save(&path, refs(&weights), [], &BTreeMap::new()), parts);
    };
    refused(|w| w.scales = Scales::Plain(vec![0.1, 1.0]), &["b.scales", "F16", "1e-1"]);
    refused(|w| w.offsets = Some(vec![f32::NAN, 1.0]), &["b.offsets", "NaN at element 0"]);
    refused(|w| w.codes = vec![1], &["b.codes", "4 values"]);
    refused(|w| w.input_order = Some(vec![0, 0, 1]), &["b.input_order", "permutation"]);
    refused(|w| w.scheme.scales = ScaleType::Double, &["affine4:2:int:double"]);
    refused(|w| w.scheme.block.outputs = 0, &["0x2"]);
    refused(|w| (w.d_input, w.input_order, w.codes) = (0, None, vec![]), &["\"b\"", "0 inputs"]);
    let weights = small();
    let save = |dense, extra| PackedFile::save(&path, refs(&weights), [dense], &extra);
    for name in ["a", "a.codes", "a.offsets", "b.input_order"] {
        assert_error(save((name, &[1][..], &[1.0][..]), BTreeMap::new()), &[name, "name of its own"]);
    }
    assert_error(save(("x", &[1][..], &[f32::INFINITY][..]), BTreeMap::new()), &["\"x\"", "inf"]);
    assert_error(save(("x", &[2][..], &[1.0][..]), BTreeMap::new()), &["\"x\"", "[2]"]);
    let extra = BTreeMap::from([("kiln.version".to_owned(), "9".to_owned())]);
    assert_error(save(("x", &[1][..], &[1.0][..]), extra), &["kiln.version"]);
    let twice = [weights[0].clone(), weights[0].clone()];
    assert_error(PackedFile::save(&path, refs(&twice), [], &BTreeMap::new()), &["\"a\"", "same name"]);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    let nowhere = folder.path().join("no/such/folder.safetensors");
    assert_error(PackedFile::save(&nowhere, refs(&weights), [], &BTreeMap::new()), &["no/such/folder"]);
}

#[test]
fn truncated_files_are_refused() {
    let (_folder, path) = saved();
    let whole = std::fs::read(&path).unwrap();
    for length in 0..whole.len() {
        std::fs::write(&path, &whole[..length]).unwrap();
        assert_error(PackedFile::open(&path), &["p.safetensors"]);
    }
}

proptest! {
    #[test]
    fn mutated_files_never_panic_nor_verify_with_other_weights(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let (_folder, path) = saved();
        let whole = std::fs::read(&path).unwrap();
        let mut bytes = whole.clone();
        for (place, value) in edits {
            bytes[place.index(whole.len())] = value;
        }
        std::fs::write(&path, &bytes).unwrap();
        if let Ok(file) = PackedFile::open(&path) {
            for name in file.names() {
                let read = [file.packed(name).is_ok(), file.dense(name).is_ok()];
                prop_assert!(read != [true, true]);
            }
            // Paths, names of dense tensors and the writer's metadata may read differently without being wrong.
            if file.verify().is_ok() {
                let weights: Vec<_> = ["a", "b"].iter().map(|name| (*name, file.packed(name).unwrap())).collect();
                prop_assert_eq!(weights, small());
            }
        }
    }
}

#[test]
fn dense_values_take_the_smallest_type_that_holds_them() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dense.safetensors");
    let subnormal_f16 = 2f32.powi(-24);
    let tensors: [(&str, Dtype, Vec<f32>); 7] = [
        ("bf16", Dtype::BF16, vec![1.0, -0.0, 2f32.powi(127), -2f32.powi(-120)]),
        ("f16", Dtype::F16, vec![1.0, 1.0 + 2f32.powi(-10), subnormal_f16, 65504.0]),
        ("one too fine", Dtype::F32, vec![1.0, 1.0 + 2f32.powi(-11)]),
        ("one too large", Dtype::F32, vec![1.0 + 2f32.powi(-10), 65536.0]),
        ("one too small", Dtype::F32, vec![1.0 + 2f32.powi(-10), 2f32.powi(-25)]),
        ("any", Dtype::F32, vec![0.1]),
        ("none", Dtype::BF16, vec![]),
    ];
    let shapes: Vec<[usize; 1]> = tensors.iter().map(|(.., values)| [values.len()]).collect();
    let dense =
        tensors.iter().zip(&shapes).map(|((name, _, values), shape)| (*name, &shape[..], &values[..]));
    PackedFile::save(&path, [], dense, &BTreeMap::new()).unwrap();
    let (written, raw) = (PackedFile::open(&path).unwrap(), SafetensorsFile::open(&path).unwrap());
    written.verify().unwrap();
    for (name, dtype, values) in &tensors {
        assert_eq!(raw.describe(name).unwrap().0, *dtype, "{name}");
        let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&written.dense(name).unwrap().1), bits(values), "{name}");
        let bytes = values.len() * if *dtype == Dtype::F32 { 4 } else { 2 };
        assert_eq!(written.describe(name).unwrap().1, bytes as u64);
    }
}
