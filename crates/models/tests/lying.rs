//! Files whose headers say more than the configuration, and batches that say more than the model.

use std::{
    fs::{self, OpenOptions},
    path::Path,
    time::{Duration, Instant},
};

use burn::tensor::Device;
use kiln_models::{CausalLm, Checkpoint, LoadOptions, TokenBatch};
use kiln_testkit::testdata;

/// Loads what must be refused at once, without memory being asked for.
#[track_caller]
fn refused(path: &Path, what: &str) {
    let start = Instant::now();
    let load = || Checkpoint::open(path)?.load(&LoadOptions::default(), &Device::flex());
    let error = load().map(drop).unwrap_err().to_string();
    assert!(start.elapsed() < Duration::from_secs(2), "{what}: {:?}", start.elapsed());
    assert!(error.contains(path.file_name().unwrap().to_str().unwrap()), "{what}: {error}");
}

/// Every tensor of a GGUF file in turn says that it has 2^28 rows, of which the file has the room (it is sparse).
#[test]
fn gguf_tensors_that_are_larger_than_the_configuration_are_refused_before_they_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let whole = fs::read(testdata("gguf/llama-Q2_K.gguf")).unwrap();
    let weights = ["attn_q", "attn_output", "ffn_up", "ffn_down"].map(|name| format!("blk.0.{name}.weight"));
    let others = ["token_embd.weight", "output_norm.weight"].map(str::to_owned);
    let names: Vec<String> = weights.into_iter().chain(others).collect();
    let mut found = 0;
    for name in &names {
        let Some(place) = whole.windows(name.len()).position(|window| window == name.as_bytes()) else {
            continue;
        };
        let dimensions = place + name.len();
        let count = u32::from_le_bytes(whole[dimensions..dimensions + 4].try_into().unwrap()) as usize;
        let mut changed = whole.clone();
        let last = dimensions + 4 + 8 * (count - 1);
        changed[last..last + 8].copy_from_slice(&(1u64 << 28).to_le_bytes());
        let path = folder.path().join("sparse.gguf");
        fs::write(&path, changed).unwrap();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 43).unwrap();
        refused(&path, name);
        found += 1;
    }
    assert_eq!(found, names.len());
}

/// The last tensor of a safetensors file, in dense and packed folders: as large as the (sparse) file has room for.
#[test]
fn safetensors_that_are_larger_than_the_configuration_are_refused_before_they_are_read() {
    for folder in [
        "tiny/llama-untied-f16",
        "tiny/llama-untied-gptq4-v1",
        "forms/compressed-w4-group",
        "forms/bnb-int8",
        "forms/fp8-blocks",
    ] {
        let copy = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(testdata(folder)).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
        }
        let path = copy.path().join("model.safetensors");
        let bytes = fs::read(&path).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        let tensors = header.as_object_mut().unwrap();
        let end = |tensor: &serde_json::Value| tensor["data_offsets"][1].as_u64().unwrap_or(0);
        let last =
            tensors.iter().max_by_key(|(_, tensor)| end(tensor)).map(|(name, _)| name.clone()).unwrap();
        let tensor = &mut tensors[&last];
        let begin = tensor["data_offsets"][0].as_u64().unwrap();
        // A scalar gets rows, too.
        let rows = tensor["shape"][0].as_u64().unwrap_or(1).max(1);
        let row = (end(tensor) - begin) / rows;
        let shape = tensor["shape"].as_array_mut().unwrap();
        match shape.first_mut() {
            Some(first) => *first = (1u64 << 34).into(),
            None => shape.push((1u64 << 34).into()),
        }
        tensor["data_offsets"][1] = (begin + (row << 34)).into();
        let (size, header) = (begin + (row << 34), header.to_string());
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.extend(&bytes[8 + length..]);
        let total = 8 + header.len() as u64 + size;
        fs::write(&path, file).unwrap();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(total).unwrap();
        let start = Instant::now();
        let load = || Checkpoint::open(copy.path())?.load(&LoadOptions::default(), &Device::flex());
        let error = load().map(drop).unwrap_err().to_string();
        assert!(start.elapsed() < Duration::from_secs(2), "{folder}: {:?}", start.elapsed());
        let module = last.rsplit_once('.').map_or(last.as_str(), |(module, _)| module);
        assert!(error.contains(module), "{folder}, {last}: {error}");
    }
}

#[test]
fn ids_and_positions_that_a_model_does_not_know_are_errors() {
    for folder in ["tiny/opt-f32", "tiny/llama-untied-bf16", "tiny/mistral-swa8-f32"] {
        let checkpoint = Checkpoint::open(testdata(folder)).unwrap();
        let (model, _) = checkpoint.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
        let (limit, vocabulary) = (model.max_positions(), model.vocab_size() as u32);
        let context = |row: Vec<u32>| model.context(&TokenBatch::new(&[row]).unwrap(), None).map(drop);
        context(vec![1; limit]).unwrap();
        let error = context(vec![1; limit + 1]).unwrap_err().to_string();
        assert_eq!(
            error,
            format!("tokens: expected positions below {limit}, as the model has, found {limit}"),
            "{folder}"
        );
        let error = context(vec![1, vocabulary]).unwrap_err().to_string();
        assert_eq!(
            error,
            format!("tokens: expected ids below {vocabulary}, as the model has, found {vocabulary}")
        );
        context(vec![0, vocabulary - 1]).unwrap();
    }
}
