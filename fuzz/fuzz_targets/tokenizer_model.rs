//! Any bytes as SentencePiece's `tokenizer.model`: a tokenizer that encodes, or an error.
#![no_main]

use kiln_models::Tokenizer;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(folder.path().join("tokenizer.model"), data).expect("a written file");
    if let Ok(tokenizer) = Tokenizer::from_folder(folder.path()) {
        let _ = tokenizer.encode("The whale, naïve 日本", true).map(|ids| tokenizer.decode(&ids, false));
    }
});
