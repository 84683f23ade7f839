//! A PEFT folder: the first byte says where the bytes of `adapter_config.json` end, the rest are the weights.
#![no_main]

use kiln_adapters::{AnyAdapter, PeftFolder};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&split, data)) = data.split_first() else { return };
    let (config, weights) = data.split_at(data.len() * usize::from(split) / 255);
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(folder.path().join("adapter_config.json"), config).expect("a written file");
    std::fs::write(folder.path().join("adapter_model.safetensors"), weights).expect("a written file");
    if let Ok(adapter) = PeftFolder::open(folder.path()) {
        let slots = [("model.layers.0.self_attn.q_proj".to_string(), [8, 8])];
        let _ = adapter.attacher::<AnyAdapter>(&slots, 0);
    }
});
