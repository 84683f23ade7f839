//! `config.json` from a model's shape.

use serde_json::{Map, Value, json};

use super::{FloatType, Format, config_keys::set};
use crate::{
    Result,
    config::{ModelConfig, SpecialTokens},
    families::Family,
    hf,
};

/// The configuration in the spelling that transformers, mlx-lm and Kiln's own reader understand. It is read back before
/// it is returned, so that no setting gets lost.
pub(super) fn config_json(
    config: &ModelConfig,
    special: &SpecialTokens,
    float: FloatType,
) -> Result<Map<String, Value>> {
    let mut map = Map::new();
    let family = Family::expressing(config);
    let config = &ModelConfig { family, ..config.clone() };
    set(
        &mut map,
        [("architectures", json!([family.architecture])), ("model_type", json!(family.model_type))],
    );
    family.class.write(config, &mut map);
    let eos = match special.eos.as_slice() {
        [one] => json!(one),
        [] => Value::Null,
        several => json!(several),
    };
    set(
        &mut map,
        [
            ("bos_token_id", json!(special.bos)),
            ("eos_token_id", eos),
            ("pad_token_id", json!(special.pad)),
            ("torch_dtype", json!(float.name())),
            ("use_cache", json!(true)),
        ],
    );
    let refuse = |found: String| {
        let expected = "a model that Hugging Face's keys describe";
        Format::HuggingFace.refuse("config.json", expected, found)
    };
    match hf::parse_config(&map) {
        Ok(found) if found == *config => Ok(map),
        Ok(_) => Err(refuse(format!("{config:?}"))),
        Err(error) => Err(refuse(error.to_string())),
    }
}
