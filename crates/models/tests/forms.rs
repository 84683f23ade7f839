//! Checkpoints in other programs' layouts, each made by the program that owns it, and broken ones.

use std::path::Path;

use burn::tensor::Device;
use kiln_models::{Checkpoint, LoadOptions, StoredWeight, hf::RawTensor};
use kiln_quant_core::{QuantLinear, Slots, safetensors_file::SafetensorsFile};
use kiln_testkit::testdata;

/// Folder, and the scheme of a linear, which stays packed; dense where there is none.
const FORMS: [(&str, &str); 10] = [
    ("pytorch", ""),
    ("no-prefix", ""),
    ("bnb-int8", "affine8:col:sym"),
    ("compressed-w4-group", "affine4:32:sym"),
    ("compressed-w4-asymmetric", "affine4:32:int"),
    ("compressed-w3-channel", "affine3:col:sym"),
    ("compressed-w8-channel", "affine8:col:sym"),
    ("fp8-blocks", ""),
    ("fp8-outputs", ""),
    // Each linear in another way; this one's single bits are two of two bits.
    ("hqq", "affine2:32"),
];

fn folder(name: &str) -> std::path::PathBuf {
    testdata(&format!("forms/{name}"))
}

#[test]
fn every_form_has_the_values_that_its_program_reads() {
    for (name, scheme) in FORMS {
        let checkpoint = Checkpoint::open(folder(name)).unwrap();
        let reference = SafetensorsFile::open(folder(name).join("expected.safetensors.reference")).unwrap();
        for tensor in reference.names() {
            let (shape, expected) = reference.read_f32(tensor).unwrap();
            let found = checkpoint.source().dense(tensor).unwrap();
            assert_eq!(found.shape, shape, "{name}: {tensor}");
            let largest = expected.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
            // Scales times codes are rounded once here, there once or twice; under zero points and scales of 32 bits offsets
            // are rounded too, and may cancel.
            let cancelled = if name.contains("asymmetric") || name == "hqq" { 2.0 * largest } else { 0.0 };
            for (found, expected) in found.values.iter().zip(&expected) {
                let close = (found - expected).abs() <= 2.0 * f32::EPSILON * (expected.abs() + cancelled);
                assert!(close, "{name}: {tensor}: {found}, not {expected}");
            }
        }
        let stored = match checkpoint.source().weight("model.layers.0.mlp.down_proj").unwrap() {
            StoredWeight::Packed(weight) => weight.scheme.to_string(),
            StoredWeight::Dense(_) => String::new(),
        };
        assert_eq!(stored, scheme, "{name}");
        let (model, report) = checkpoint.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
        let packed =
            model.slots().into_iter().filter(|(_, slot)| matches!(slot, QuantLinear::Packed(_))).count();
        // HQQ's groups across outputs are read to dense.
        let all = if name == "hqq" { 5 } else { 7 };
        assert_eq!(packed, if scheme.is_empty() { 0 } else { all }, "{name}");
        let prefix = report.notes.iter().filter(|note| note.contains("prefix")).count();
        let unused = report.notes.iter().any(|note| note.contains("not used"));
        assert_eq!((prefix, unused), (usize::from(name == "no-prefix"), false), "{name}: {:?}", report.notes);
    }
}

/// The form's folder with one tensor changed, or taken out.
fn changed(name: &str, tensor: &str, change: impl Fn(RawTensor) -> Option<RawTensor>) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    std::fs::copy(folder(name).join("config.json"), copy.path().join("config.json")).unwrap();
    let file = SafetensorsFile::open(folder(name).join("model.safetensors")).unwrap();
    let mut tensors = Vec::new();
    for other in file.names() {
        let raw = file.read(other).unwrap();
        let raw = if other == tensor { change(raw) } else { Some(raw) };
        tensors.extend(raw.map(|raw| (other.to_owned(), raw)));
    }
    write_raw(&copy.path().join("model.safetensors"), &tensors);
    copy
}

/// A safetensors file of these bytes.
fn write_raw(path: &Path, tensors: &[(String, RawTensor)]) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, raw) in tensors {
        let offsets = [data.len(), data.len() + raw.bytes.len()];
        let entry =
            serde_json::json!({"dtype": raw.dtype.to_string(), "shape": raw.shape, "data_offsets": offsets});
        header.insert(name.clone(), entry);
        data.extend_from_slice(&raw.bytes);
    }
    let header = serde_json::Value::Object(header).to_string();
    std::fs::write(path, [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()).unwrap();
}

fn up(part: &str) -> String {
    format!("model.layers.0.mlp.up_proj.{part}")
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let none = |_: RawTensor| None;
    let shorter = |mut raw: RawTensor| {
        let row = raw.bytes.len() / raw.shape[0];
        raw.bytes.truncate(raw.bytes.len() - row);
        raw.shape[0] -= 1;
        Some(raw)
    };
    let infinite = |mut raw: RawTensor| {
        let end = raw.bytes.len();
        raw.bytes[end - 4..].copy_from_slice(&f32::INFINITY.to_le_bytes());
        Some(raw)
    };
    let ones = |mut raw: RawTensor| {
        raw.bytes.fill(255);
        Some(raw)
    };
    type Change<'a> = &'a dyn Fn(RawTensor) -> Option<RawTensor>;
    let twos = |mut raw: RawTensor| {
        raw.bytes.fill(0);
        raw.bytes[0] = 2;
        Some(raw)
    };
    let cases: [(&str, String, Change, &str); 23] = [
        ("bnb-int8", up("SCB"), &shorter, "up_proj.SCB"),
        ("bnb-int8", up("SCB"), &infinite, "up_proj.SCB"),
        ("bnb-int8", up("weight_format"), &ones, "up_proj.weight_format"),
        ("compressed-w4-group", up("weight_shape"), &ones, "weight_shape"),
        ("compressed-w4-group", up("weight_shape"), &none, "up_proj.weight_shape"),
        ("compressed-w4-group", up("weight_scale"), &none, "up_proj.weight_scale"),
        ("compressed-w4-group", up("weight_packed"), &shorter, "up_proj.weight_packed"),
        ("compressed-w4-asymmetric", up("weight_zero_point"), &shorter, "up_proj.weight_zero_point"),
        ("fp8-blocks", up("weight_scale_inv"), &none, "up_proj.weight_scale_inv"),
        ("fp8-blocks", up("weight_scale_inv"), &shorter, "up_proj.weight_scale_inv"),
        ("fp8-blocks", up("weight"), &ones, "up_proj.weight"),
        ("fp8-outputs", up("weight_scale"), &infinite, "up_proj.weight_scale"),
        ("hqq", up("W_q"), &shorter, "up_proj.W_q"),
        ("hqq", up("scale"), &infinite, "up_proj.scale"),
        ("hqq", up("scale"), &none, "up_proj.scale"),
        ("hqq", "model.layers.0.self_attn.q_proj.zero".into(), &shorter, "q_proj.zero"),
        ("hqq", up("shape"), &ones, "up_proj.shape"),
        ("hqq", up("shape"), &none, "up_proj.shape"),
        ("hqq", up("nbits"), &twos, "up_proj.nbits"),
        ("hqq", up("axis"), &twos, "up_proj.axis"),
        ("hqq", up("packing"), &ones, "up_proj.packing"),
        ("hqq", up("quant_zero"), &ones, "up_proj.quant_zero"),
        ("hqq", up("view_as_float"), &ones, "up_proj.view_as_float"),
    ];
    for (name, tensor, change, part) in cases {
        let copy = changed(name, &tensor, change);
        let error = Checkpoint::open(copy.path())
            .and_then(|checkpoint| {
                checkpoint.load(&LoadOptions::default().in_f32(), &Device::flex()).map(|_| ())
            })
            .unwrap_err()
            .to_string();
        assert!(error.contains(part), "{name}, {tensor}: {error}");
    }
}

/// Groups that don't follow the inputs, by the definition of a weight.
#[test]
fn groups_of_compressed_tensors_may_follow_activations() {
    for name in ["compressed-w4-group", "compressed-w4-asymmetric"] {
        let down = "model.layers.0.mlp.down_proj.";
        let file = SafetensorsFile::open(folder(name).join("model.safetensors")).unwrap();
        let copy = tempfile::tempdir().unwrap();
        std::fs::copy(folder(name).join("config.json"), copy.path().join("config.json")).unwrap();
        let mut tensors: Vec<(String, RawTensor)> =
            file.names().map(|name| (name.to_owned(), file.read(name).unwrap())).collect();
        let group = |input: usize| (input * 5 % 7 % 2) as u32;
        let mut index = file.read(&format!("{down}weight_packed")).unwrap();
        index.shape = vec![64];
        index.bytes = (0..64).flat_map(|input| group(input).to_le_bytes()).collect();
        tensors.push((format!("{down}weight_g_idx"), index));
        write_raw(&copy.path().join("model.safetensors"), &tensors);
        let plain = Checkpoint::open(folder(name)).unwrap();
        let StoredWeight::Packed(plain) = plain.source().weight(down.trim_end_matches('.')).unwrap() else {
            panic!("a dense weight")
        };
        let (scales, offsets) = (plain.effective_scales(), plain.effective_offsets());
        let (values, outputs) = (plain.dequantize(), plain.d_output);
        let grouped = Checkpoint::open(copy.path()).unwrap();
        let found = grouped.source().dense(&format!("{down}weight")).unwrap().values;
        for (place, found) in found.iter().enumerate() {
            let (output, input) = (place / 64, place % 64);
            let of = |values: &[f32], group: usize| values[group * outputs + output];
            // What the code times its scale was, in steps of another.
            let own = input / 32;
            let offset = |group| offsets.as_ref().map_or(0.0, |offsets| of(offsets, group));
            let code = (values[place] - offset(own)) / of(&scales, own);
            let code = (code * 2.0).round() / 2.0;
            let group = group(input) as usize;
            let expected = code * of(&scales, group) + offset(group);
            assert!((found - expected).abs() < 1e-6, "{name}, {output}, {input}: {found}, not {expected}");
        }
        let StoredWeight::Packed(packed) = grouped.source().weight(down.trim_end_matches('.')).unwrap()
        else {
            panic!("a dense weight")
        };
        assert!(packed.input_order.is_some());
    }
    let copy = changed("compressed-w4-group", "", Some);
    let file = SafetensorsFile::open(copy.path().join("model.safetensors")).unwrap();
    let mut tensors: Vec<(String, RawTensor)> =
        file.names().map(|name| (name.to_owned(), file.read(name).unwrap())).collect();
    let mut index = file.read(&up("weight_packed")).unwrap();
    (index.shape, index.bytes) = (vec![32], vec![1; 128]);
    tensors.push((up("weight_g_idx"), index));
    write_raw(&copy.path().join("model.safetensors"), &tensors);
    let message =
        Checkpoint::open(copy.path()).unwrap().source().dense(&up("weight")).unwrap_err().to_string();
    assert!(message.contains("weight_g_idx"), "{message}");
}

#[test]
fn settings_of_compressed_tensors_that_round_activations_are_refused() {
    let config = std::fs::read_to_string(folder("compressed-w4-group").join("config.json")).unwrap();
    for (from, to, part) in [
        ("\"pack-quantized\"", "\"marlin-24\"", "format"),
        ("\"num_bits\": 4", "\"num_bits\": 7", "num_bits"),
        ("\"input_activations\": null", "\"input_activations\": {\"num_bits\": 8}", "input_activations"),
        ("\"type\": \"int\"", "\"type\": \"float\"", "type"),
    ] {
        let copy = changed("compressed-w4-group", "", Some);
        assert!(config.contains(from), "{from}");
        std::fs::write(copy.path().join("config.json"), config.replace(from, to)).unwrap();
        let error = Checkpoint::open(copy.path()).unwrap_err().to_string();
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[test]
fn pickles_that_call_something_or_are_cut_are_errors() {
    let bytes = std::fs::read(folder("pytorch").join("pytorch_model.bin")).unwrap();
    let config = std::fs::read(folder("pytorch").join("config.json")).unwrap();
    let error = |bytes: &[u8]| {
        let copy = tempfile::tempdir().unwrap();
        std::fs::write(copy.path().join("config.json"), &config).unwrap();
        std::fs::write(copy.path().join("pytorch_model.bin"), bytes).unwrap();
        let loaded = Checkpoint::open(copy.path())
            .and_then(|checkpoint| checkpoint.load(&LoadOptions::default(), &Device::flex()).map(|_| ()));
        loaded.err().map(|error| error.to_string())
    };
    assert_eq!(error(&bytes), None);
    for cut in [0, 1, 100, bytes.len() / 2, bytes.len() - 1] {
        let message = error(&bytes[..cut]).unwrap();
        assert!(message.contains("pytorch_model.bin"), "{cut}: {message}");
    }
    // `os.system("true")`, which unpickling in Python would run.
    let message = error(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.").unwrap();
    assert!(message.contains("pytorch_model.bin"), "{message}");
    // Any byte changed: an error or other numbers, never a panic.
    for place in (0..bytes.len()).step_by(bytes.len() / 97) {
        let mut changed = bytes.clone();
        changed[place] ^= 0x55;
        let _ = error(&changed);
    }
}
