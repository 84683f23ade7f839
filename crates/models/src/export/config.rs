//! `config.json` from a model's shape.

use std::collections::BTreeSet;

use kiln_quant_core::QuantLinear;
use serde_json::{Map, Value, json};

use super::{FloatType, Format, config_keys::set};
use crate::{
    Classifier, Decoder, Error, Result,
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

/// As [`config_json`], of a classifier with the names of its outputs; with transformers' own if there are none.
pub(super) fn classifier_json(
    model: &Classifier<Decoder<QuantLinear>>,
    labels: &[String],
    special: &SpecialTokens,
    float: FloatType,
) -> Result<Map<String, Value>> {
    let outputs = model.outputs();
    let labels = match labels {
        [] => (0..outputs).map(|index| format!("LABEL_{index}")).collect(),
        labels => labels.to_vec(),
    };
    if labels.len() != outputs || labels.iter().collect::<BTreeSet<_>>().len() != outputs {
        let expected = format!("{outputs} different names, one of each output");
        return Err(Error::Argument { name: "labels".into(), expected, found: format!("{labels:?}") });
    }
    let mut map = config_json(model.model.config(), special, float)?;
    let class = hf::classifier_of(Family::expressing(model.model.config()).architecture);
    let names: Map<String, Value> =
        labels.iter().enumerate().map(|(index, label)| (index.to_string(), json!(label))).collect();
    let numbers: Map<String, Value> =
        labels.iter().enumerate().map(|(index, label)| (label.clone(), json!(index))).collect();
    set(
        &mut map,
        [
            ("architectures", json!([class])),
            ("id2label", Value::Object(names)),
            ("label2id", Value::Object(numbers)),
        ],
    );
    Ok(map)
}
