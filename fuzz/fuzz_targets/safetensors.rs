//! Any bytes as a safetensors file: an error or tensors, never a panic or an allocation beyond the file's size.
#![no_main]

use kiln_models::hf::SafetensorsFile;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(file.path(), data).expect("a written file");
    if let Ok(tensors) = SafetensorsFile::open(file.path()) {
        let names: Vec<String> = tensors.names().map(str::to_string).collect();
        for name in names {
            let _ = tensors.read(&name);
            let _ = tensors.read_f32(&name);
        }
    }
});
