//! What the tests share.

use burn::tensor::Device;
use kiln_adapters::{Adapted, AdapterConfig, Lora, LoraAttacher};
use kiln_calibration::{ApiqConfig, CalibrationConfig, Method};
use kiln_models::{Checkpoint, Decoder, LoadOptions, Slots, Windows};
use kiln_quant_core::{PackedWeight, Plan, QuantLinear, Scheme};
pub(crate) use kiln_testkit::ids;
use kiln_testkit::{read, testdata};

/// A calibrated model.
pub(crate) type Model = Decoder<Adapted<QuantLinear, Lora>>;

/// Packed weight and factors of one slot.
pub(crate) type Contents = (String, Option<PackedWeight>, Vec<Vec<f32>>);

/// The embedded model, or another below `testdata`, with dense weights.
pub(crate) fn dense(folder: &str) -> (Checkpoint, Decoder<QuantLinear>) {
    let checkpoint = Checkpoint::open(testdata(folder)).unwrap();
    let (model, _) = checkpoint.load(&LoadOptions::uniform(Scheme::Dense).in_f32(), &Device::flex()).unwrap();
    (checkpoint, model)
}

pub(crate) fn tiny() -> Decoder<QuantLinear> {
    dense("models/tiny-llama").1
}

/// Calibration windows.
pub(crate) fn windows(count: usize) -> Windows {
    Windows::random(&ids("indomain_heldout_sotu_2011"), 48, count, 2).unwrap()
}

/// Windows of the same text that are not calibrated on, but for chance.
pub(crate) fn held_out() -> Windows {
    Windows::random(&ids("indomain_heldout_sotu_2011"), 48, 6, 77).unwrap()
}

pub(crate) fn attacher<M: Slots>(model: &M) -> LoraAttacher {
    // A scaling other than 1, as the published runs have.
    LoraAttacher::new(&AdapterConfig::lora(8, 2.0).with_seed(3), &model.slot_shapes()).unwrap()
}

pub(crate) fn config(method: Method, scheme: &str) -> CalibrationConfig {
    CalibrationConfig::new(method, Plan::uniform(scheme.parse().unwrap()))
}

/// Larger rates than the published ones, for small budgets.
pub(crate) fn apiq(epochs: usize) -> ApiqConfig {
    ApiqConfig { epochs, lr_clipping: 1e-2, lr_lora: 2e-3, ..ApiqConfig::default() }
}

/// Everything that a calibration decides.
pub(crate) fn contents(model: &Model) -> Vec<Contents> {
    let mut all = Vec::new();
    for (path, slot) in model.slots() {
        let packed = match &slot.base {
            QuantLinear::Packed(linear) => Some(linear.weight.to_host().unwrap()),
            QuantLinear::Dense(_) => None,
        };
        let factors = slot.adapter.iter().flat_map(|lora| [read(lora.lora_a.val()), read(lora.lora_b.val())]);
        all.push((path.to_string(), packed, factors.collect()));
    }
    all
}
