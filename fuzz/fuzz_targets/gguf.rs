//! Any bytes as a GGUF file: configuration, tokenizer and every tensor, or errors.
#![no_main]

use kiln_models::{TensorSource, gguf::Gguf};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(file.path(), data).expect("a written file");
    if let Ok(gguf) = Gguf::open(file.path()) {
        let _ = (gguf.config(), gguf.special_tokens(), gguf.tokenizer(), gguf.chat_template());
        for name in gguf.names() {
            let _ = gguf.dense(&name);
            if let Some(module) = name.strip_suffix(".weight") {
                let _ = gguf.weight(module);
            }
        }
    }
});
