//! Bottleneck adapters in whole models.

use burn::module::Module;
use kiln_models::{CausalLm, Recompute, TokenBatch};
use kiln_side_tuning::{Activation, attach_houlsby};
use kiln_testkit::{read, testdata};
use kiln_training::{RunOptions, Trainer};

use crate::common::{embedded, load, next_token_gradients, text, trained, trainer_config};

#[test]
fn adapters_start_at_the_base_and_learn() {
    let base = embedded();
    let model = attach_houlsby(base.clone(), 12, Activation::GeluTanh, 3).unwrap();
    let tokens = TokenBatch::new(&[vec![5, 900, 17, 33]]).unwrap();
    assert_eq!(
        read(model.forward(&model.context(&tokens, None))),
        read(base.forward(&base.context(&tokens, None)))
    );
    // Two adapters in each of four blocks.
    assert_eq!(trained(&model.clone().train()), 8 * (2 * 192 * 12 + 12 + 192));
    let mut trainer = Trainer::new(model, text(64), trainer_config(20, 4)).unwrap();
    let reports = trainer.run(&RunOptions::default(), &mut ()).unwrap();
    let mean = |reports: &[kiln_training::StepReport]| {
        reports.iter().map(|report| report.loss).sum::<f64>() / reports.len() as f64
    };
    assert!(mean(&reports[15..]) < mean(&reports[..5]) - 0.05, "{reports:?}");
}

#[test]
fn every_sub_layer_has_one_and_nothing_else_is_trained() {
    let model = attach_houlsby(load(testdata("tiny/opt-f32"), None), 4, Activation::Relu, 3).unwrap().train();
    let (_, gradients) = next_token_gradients(&model, &[1, 2, 3, 4], Recompute::None);
    assert_eq!(gradients.len(), 2 * 2 * 4);
    assert!(
        gradients
            .keys()
            .all(|name| { name.contains("self_attn.out_proj.adapter") || name.contains("fc2.adapter") })
    );
}

#[test]
fn bottlenecks_out_of_range_are_refused() {
    for bottleneck in [0, 193, usize::MAX] {
        assert!(attach_houlsby(embedded(), bottleneck, Activation::Silu, 3).is_err());
    }
}
