//! A score head in the place of a language model's: classes, or one number.

use burn::{
    module::{Module, Param},
    nn::Linear,
    tensor::{Device, Int, Tensor, TensorData},
};
use kiln_quant_core::{
    OwnTables, Place, Projection, Slots, Stack, TableUpdates, TokenTables,
    random::{Purpose, generator, normal, path_hash},
};

use crate::{CausalLm, Context, Error, KvCache, Result, TokenBatch, nll::check_tokens};

/// A language model that says of a whole text what class it is of, or a number: a linear without bias on the state of the
/// text's last token, as transformers' models for sequence classification, which
/// [`Checkpoint::load_classifier`](crate::Checkpoint::load_classifier) reads.
///
/// To trainers it is a language model whose head has as many outputs as there are labels: with one label it is a regression,
/// whose loss is the squared error; with more its loss is the cross-entropy of the classes.
///
/// ```
/// use burn::tensor::Device;
/// use kiln_models::{Checkpoint, Classifier, LoadOptions, TokenBatch};
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/models/tiny-llama");
/// let (model, _) = Checkpoint::open(folder)?.load(&LoadOptions::default(), &Device::flex())?;
/// let classifier = Classifier::new(model, 3, 0)?;
/// let scores = classifier.scores(&TokenBatch::new(&[vec![5, 7, 9], vec![8, 6, 4]])?)?;
/// assert_eq!(scores.dims(), [2, 3]);
/// # Ok::<(), kiln_models::Error>(())
/// ```
#[derive(Module, Debug)]
pub struct Classifier<M: Module> {
    /// What reads the text.
    pub model: M,
    /// `[width, labels]`, without bias.
    pub score: Linear,
}

/// The score head's name in checkpoints.
pub(crate) const SCORE: &str = "score";
/// The field before the names of what reads.
const MODEL: &str = "model.";

impl<M: CausalLm + Slots> Classifier<M> {
    /// A model of a new score head: normal of deviation 0.02, as transformers', a function of `seed`.
    ///
    /// # Errors
    /// No label; a model without a token embedding, which tells the width.
    pub fn new(model: M, labels: usize, seed: u64) -> Result<Self> {
        const DEVIATION: f64 = 0.02;
        let width = model.token_tables().map(|tables| tables.width);
        let width = width.ok_or_else(|| argument("model", "one with a token embedding", "none"))?;
        if labels == 0 {
            return Err(argument("labels", "at least 1", labels));
        }
        let mut rng = generator(Purpose::Initialization, seed, path_hash(SCORE), 0, 0);
        let values = TensorData::new(normal(&mut rng, DEVIATION, width * labels), [width, labels]);
        let weight = Param::from_tensor(Tensor::from_data(values, &model.head_device()));
        Ok(Self { model, score: Linear { weight, bias: None } })
    }
}

impl<M: CausalLm> Classifier<M> {
    /// Number of outputs; 1 of a regression.
    pub fn outputs(&self) -> usize {
        self.score.weight.lazy_shape().dims::<2>()[1]
    }

    /// A score for each row and label, `[batch, labels]`, of each row's last token that isn't padding (segment 0).
    ///
    /// # Errors
    /// Token ids beyond the vocabulary, positions beyond the model's, a row of padding only.
    pub fn scores(&self, tokens: &TokenBatch) -> Result<Tensor<2>> {
        check_tokens(&self.model, tokens)?;
        let last = last_tokens(tokens)?;
        let x = self.model.residual(&self.model.context(tokens, None)?, None);
        let [batch, length, width] = x.dims();
        let index = Tensor::<1, Int>::from_data(TensorData::new(last, [batch]), &x.device());
        let rows = x.reshape([batch * length, width]).select(0, index);
        Ok(self.lm_head(self.final_norm(rows)))
    }
}

/// Place of each row's last token, in the flattened batch.
fn last_tokens(tokens: &TokenBatch) -> Result<Vec<i64>> {
    let rows = tokens.segments.chunks_exact(tokens.length).enumerate();
    rows.map(|(row, segments)| {
        let last = segments.iter().rposition(|&segment| segment != 0);
        let last = last.ok_or_else(|| {
            argument("rows", "at least one token that isn't padding", format!("none in row {row}"))
        })?;
        Ok((row * tokens.length + last) as i64)
    })
    .collect()
}

fn argument(name: &str, expected: &str, found: impl ToString) -> Error {
    Error::Argument { name: name.into(), expected: expected.into(), found: found.to_string() }
}

impl<M: CausalLm> CausalLm for Classifier<M> {
    fn context(&self, tokens: &TokenBatch, cache: Option<&KvCache>) -> Result<Context> {
        self.model.context(tokens, cache)
    }

    fn embed(&self, context: &Context) -> Tensor<3> {
        self.model.embed(context)
    }

    fn hidden_width(&self) -> Option<usize> {
        self.model.hidden_width()
    }

    fn trains_embedding(&self) -> bool {
        self.model.trains_embedding()
    }

    fn num_blocks(&self) -> usize {
        self.model.num_blocks()
    }

    fn block(&self, index: usize, x: Tensor<3>, context: &Context, cache: Option<&mut KvCache>) -> Tensor<3> {
        self.model.block(index, x, context, cache)
    }

    fn block_again(&self, index: usize, x: Tensor<3>, output: Tensor<3>, context: &Context) -> Tensor<3> {
        self.model.block_again(index, x, output, context)
    }

    fn final_norm<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        self.model.final_norm(x)
    }

    fn lm_head<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        self.score.forward(self.model.head_input(x))
    }

    fn vocab_size(&self) -> usize {
        self.model.vocab_size()
    }

    fn labels(&self) -> Option<usize> {
        Some(self.outputs())
    }

    fn max_positions(&self) -> usize {
        self.model.max_positions()
    }

    fn cache_limit(&self) -> Option<usize> {
        self.model.cache_limit()
    }

    fn device(&self) -> Device {
        self.model.device()
    }

    fn head_device(&self) -> Device {
        self.model.head_device()
    }

    fn at(&self, place: Place) {
        self.model.at(place);
    }

    fn residual(&self, context: &Context, cache: Option<&mut KvCache>) -> Tensor<3> {
        self.model.residual(context, cache)
    }

    fn residual_from(&self, x: Tensor<3>, context: &Context, cache: Option<&mut KvCache>) -> Tensor<3> {
        self.model.residual_from(x, context, cache)
    }
}

impl<M: Slots> Slots for Classifier<M> {
    type Slot = M::Slot;
    type With<Q: Projection> = Classifier<M::With<Q>>;

    fn try_map<Q: Projection, E>(
        self,
        f: impl FnMut(&str, M::Slot) -> std::result::Result<Q, E>,
    ) -> std::result::Result<Classifier<M::With<Q>>, E> {
        Ok(Classifier { model: self.model.try_map(f)?, score: self.score })
    }

    fn stays_dense(&self, path: &str) -> bool {
        self.model.stays_dense(path)
    }

    fn stacks(&self) -> Vec<Stack> {
        self.model.stacks()
    }

    fn slots(&self) -> Vec<(String, &M::Slot)> {
        self.model.slots()
    }

    fn token_tables(&self) -> Option<TokenTables> {
        // The language model's head is not used.
        self.model.token_tables().map(|tables| TokenTables { head: None, tied: true, ..tables })
    }

    fn table_updates(&self) -> Option<&TableUpdates> {
        self.model.table_updates()
    }

    fn with_table_updates(self, updates: TableUpdates) -> Self {
        Self { model: self.model.with_table_updates(updates), ..self }
    }

    fn with_own_tables(self, own: OwnTables, vocab_size: usize) -> Self {
        let own = OwnTables { head: false, tied: true, ..own };
        Self { model: self.model.with_own_tables(own, vocab_size), ..self }
    }

    fn table_rows(&self, ids: &[u32]) -> Tensor<2> {
        self.model.table_rows(ids)
    }

    fn checkpoint_name(&self, path: &str) -> String {
        match path.strip_prefix(MODEL) {
            Some(inner) => self.model.checkpoint_name(inner),
            None => path.to_owned(),
        }
    }

    fn is_stored_transposed(&self, name: &str) -> bool {
        name == "score.weight" || self.model.is_stored_transposed(name)
    }

    fn with_merged_tables(self) -> Self {
        Self { model: self.model.with_merged_tables(), ..self }
    }
}
