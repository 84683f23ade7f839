//! Any bytes as the `pytorch_model.bin` of a small LLaMA: its tensors, or errors.
#![no_main]

use kiln_models::Checkpoint;
use libfuzzer_sys::fuzz_target;

const CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32, "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "tie_word_embeddings": true, "rms_norm_eps": 1e-5, "max_position_embeddings": 32}"#;

fuzz_target!(|data: &[u8]| {
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(folder.path().join("config.json"), CONFIG).expect("a written file");
    std::fs::write(folder.path().join("pytorch_model.bin"), data).expect("a written file");
    if let Ok(checkpoint) = Checkpoint::open(folder.path()) {
        for name in checkpoint.source().names() {
            let _ = checkpoint.source().dense(&name);
        }
    }
});
