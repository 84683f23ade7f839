//! Classification heads.

use burn::{
    module::Module,
    optim::{AdamWConfig, GradientsAccumulator},
};
use kiln_models::{DriverOptions, Targets, TokenBatch, fingerprint, loss_and_gradients};
use kiln_side_tuning::{
    Backbone, GateShape, HeadMix, SideClassifier, SideConfig, SideTuned, load_classifier, save_classifier,
    side_classifier,
};
use kiln_testkit::{assert_close, read};

use crate::common::embedded;

/// Rows of two kinds of tokens.
fn rows() -> (TokenBatch, Vec<u32>) {
    let rows: Vec<Vec<u32>> =
        (0..8).map(|row| (0..6).map(|i| (row % 2) * 1000 + 7 * row + 31 * i + 3).collect()).collect();
    (TokenBatch::new(&rows).unwrap(), (0..8).map(|row| row % 2).collect())
}

/// As the trainer asks for them: the class at each row's last place.
fn gradients_of<M: Backbone>(
    model: &SideClassifier<M>,
    tokens: &TokenBatch,
    labels: &[u32],
    gradients: &mut GradientsAccumulator<SideClassifier<M>>,
) -> kiln_models::Result<f64> {
    let last = |place: usize| (place + 1).is_multiple_of(tokens.length);
    let ids: Vec<u32> = (0..tokens.ids.len()).map(|place| labels[place / tokens.length]).collect();
    let scored: Vec<bool> = (0..tokens.ids.len()).map(last).collect();
    let targets = Targets { ids: &ids, scored: &scored };
    loss_and_gradients(model, tokens, targets, &DriverOptions::default(), gradients)
}

#[test]
fn a_classifier_learns_and_is_saved() {
    let config = SideConfig::qst().with_mix(HeadMix::Additive, GateShape::Scalar);
    let base = embedded();
    let before = fingerprint(&base).unwrap();
    let mut model = side_classifier(base.clone(), 2, &config, 5).unwrap().train();
    let (tokens, labels) = rows();
    let mut optimizer = AdamWConfig::new().init();
    let mut losses = Vec::new();
    for _ in 0..25 {
        let mut gradients = GradientsAccumulator::new();
        losses.push(gradients_of(&model, &tokens, &labels, &mut gradients).unwrap());
        model = optimizer.step(5e-3, model, gradients.grads());
    }
    assert!(losses[24] < 0.2 * losses[0], "{losses:?}");
    let model = model.valid();
    let scores = read(model.scores(&tokens).unwrap());
    assert!(
        scores.chunks(2).zip(&labels).all(|(row, label)| row[*label as usize] > row[1 - *label as usize])
    );
    assert_eq!(fingerprint(model.model.backbone()).unwrap(), before);

    let folder = tempfile::tempdir().unwrap();
    save_classifier(&model, folder.path()).unwrap();
    let loaded = load_classifier(base.clone(), folder.path()).unwrap();
    assert_eq!(read(loaded.scores(&tokens).unwrap()), scores);
    // A classifier isn't a language model, nor the other way round.
    assert!(SideTuned::load(base.clone(), folder.path()).is_err());
    SideTuned::new(base.clone(), &config, 5).unwrap().save(folder.path()).unwrap();
    assert!(load_classifier(base, folder.path()).is_err());
}

#[test]
fn the_last_token_is_the_last_that_is_not_padding() {
    let model = side_classifier(embedded(), 3, &SideConfig::lst(), 5).unwrap();
    let ids = vec![5, 900, 17, 33];
    let plain = read(model.scores(&TokenBatch::new(std::slice::from_ref(&ids)).unwrap()).unwrap());
    let padded = |left: usize, right: usize| {
        let ids = [vec![1; left], ids.clone(), vec![1; right]].concat();
        let mask = [vec![0; left], vec![1; 4], vec![0; right]].concat();
        read(model.scores(&TokenBatch::masked(ids, mask, 1, 4 + left + right).unwrap()).unwrap())
    };
    for (left, right) in [(0, 0), (0, 3), (3, 0), (2, 1)] {
        assert_close("scores", &padded(left, right), &plain, 1e-4);
    }
    let only_padding = TokenBatch::masked(vec![1, 1], vec![0, 0], 1, 2).unwrap();
    assert!(model.scores(&only_padding).unwrap_err().to_string().contains("row 0"));
}

#[test]
fn labels_and_tokens_that_do_not_fit_are_refused() {
    assert!(side_classifier(embedded(), 0, &SideConfig::qst(), 5).is_err());
    let model = side_classifier(embedded(), 2, &SideConfig::qst(), 5).unwrap().train();
    let (tokens, labels) = rows();
    let refused = |tokens: &TokenBatch, labels: &[u32]| {
        gradients_of(&model, tokens, labels, &mut GradientsAccumulator::new()).is_err()
    };
    assert!(refused(&tokens, &[2; 8]));
    let mut wrong = tokens.clone();
    wrong.ids[0] = 1 << 20;
    assert!(refused(&wrong, &labels));
}
