//! A language model's token embedding and head, and what can be trained beside them.
//!
//! Source: PEFT 0.21's LoRA on embeddings and its trainable tokens.

use burn::{
    module::{Module, Param},
    tensor::{IndexingUpdateOp, Int, Tensor, TensorData},
};

use crate::{
    Compute, Dropout, Place,
    fused::{self, Drops, LowRankSpec},
};

/// Where a model's token embedding and head are, by their names in checkpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenTables {
    /// Name of the embedding, such as `model.embed_tokens`.
    pub embedding: String,
    /// Name of the head, such as `lm_head`, which it has also where it is the embedding; `None` of a model that doesn't use
    /// it.
    pub head: Option<String>,
    /// Rows of the embedding, outputs of the head.
    pub vocab_size: usize,
    /// The residual stream's width.
    pub width: usize,
    /// Whether the head is the embedding, or there is none.
    pub tied: bool,
}

impl TokenTables {
    /// The names, the embedding first.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        [&self.embedding].into_iter().chain(&self.head).map(String::as_str)
    }

    /// Both by name, the embedding first, with the shapes `[d_input, d_output]` that they have as linears: an embedding
    /// multiplies the one-hot vector of a token.
    pub fn shapes(&self) -> Vec<(String, [usize; 2])> {
        let embedding = (self.embedding.clone(), [self.vocab_size, self.width]);
        let head = self.head.clone().map(|path| (path, [self.width, self.vocab_size]));
        [embedding].into_iter().chain(head).collect()
    }
}

/// A low-rank update of an embedding or of a head: `scaling · A · B`, A and B trained in f32.
#[derive(Module, Debug)]
pub struct LowRankUpdate {
    /// A, `[d_input, rank]`: of an embedding a row for each token.
    pub lora_a: Param<Tensor<2>>,
    /// B, `[rank, d_output]`.
    pub lora_b: Param<Tensor<2>>,
    #[module(skip)]
    scaling: f64,
    dropout: Dropout,
}

impl LowRankUpdate {
    /// An update of A `[d_input, rank]` and B `[rank, d_output]`, which require gradients. `dropout` drops inputs of a head; an
    /// embedding has none that could be dropped.
    ///
    /// # Panics
    /// If A and B differ in rank.
    pub fn new(lora_a: Tensor<2>, lora_b: Tensor<2>, scaling: f64, dropout: Dropout) -> Self {
        let (a, b) = (lora_a.dims(), lora_b.dims());
        assert_eq!(a[1], b[0], "A {a:?} and B {b:?} differ in rank");
        let [lora_a, lora_b] = [lora_a, lora_b].map(Param::from_tensor);
        Self { lora_a, lora_b, scaling, dropout }
    }

    /// The factor of A · B.
    pub fn scaling(&self) -> f64 {
        self.scaling
    }

    /// The rank.
    pub fn rank(&self) -> usize {
        self.lora_a.lazy_shape().dims::<2>()[1]
    }

    /// `[d_input, d_output]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.lora_a.lazy_shape().dims::<2>()[0], self.lora_b.lazy_shape().dims::<2>()[1]]
    }

    /// The update, `[d_input, d_output]`.
    pub fn product(&self) -> Tensor<2> {
        self.lora_a.val().mul_scalar(self.scaling).matmul(self.lora_b.val())
    }

    /// Rows of the update.
    ///
    /// # Shapes
    /// `[count]` → `[count, d_output]`.
    fn rows(&self, ids: Tensor<1, Int>) -> Tensor<2> {
        self.lora_a.val().select(0, ids).mul_scalar(self.scaling).matmul(self.lora_b.val())
    }

    /// `y` with the update's product with `x`.
    fn added(&self, y: Tensor<2>, x: Tensor<2>, compute: Compute) -> Tensor<2> {
        let [a, b] = [&self.lora_a, &self.lora_b].map(|factor| factor.val().cast(x.dtype()));
        let (x, compensation) = match self.dropout.drops() {
            Some(drops) => (self.kept(x, drops), self.dropout.compensation()),
            None => (x, 1.0),
        };
        let factor = (self.scaling * compensation) as f32;
        fused::low_rank(y, x, a, b, LowRankSpec { factor, drops: None, compute })
    }

    /// `x` with what is dropped set to zero. A head sees a batch some rows at a time, however many: the mask depends on where
    /// they stand in the batch.
    fn kept(&self, x: Tensor<2>, drops: Drops) -> Tensor<2> {
        let [rows, width] = x.dims();
        let first = self.dropout.first_row() * width as u64;
        let kept =
            drops.mask_from(first, rows * width).into_iter().map(|dropped| f32::from(u8::from(!dropped)));
        let kept = TensorData::new(kept.collect::<Vec<f32>>(), [rows, width]);
        let kept = Tensor::<2>::from_data(kept, &x.device()).cast(x.dtype());
        x * kept
    }

    fn is_trained(&self) -> bool {
        [&self.lora_a, &self.lora_b].into_iter().any(|factor| factor.val().is_require_grad())
    }
}

/// Rows of the embedding of some tokens, in place of the table's; of the head, too, where that is the embedding.
#[derive(Module, Debug)]
pub struct TokenRows {
    /// `[ids, width]`.
    pub token_rows: Param<Tensor<2>>,
    #[module(skip)]
    ids: Vec<u32>,
}

impl TokenRows {
    /// Rows `[ids, width]` of `ids`, which are in the vocabulary and each there once; they require gradients.
    ///
    /// # Panics
    /// If there are not as many rows as ids.
    pub fn new(ids: Vec<u32>, rows: Tensor<2>) -> Self {
        assert_eq!(rows.dims()[0], ids.len(), "a row for each id");
        Self { token_rows: Param::from_tensor(rows), ids }
    }

    /// Whose rows these are.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    fn ids_tensor(&self, like: &Tensor<2>) -> Tensor<1, Int> {
        let ids: Vec<i64> = self.ids.iter().map(|id| i64::from(*id)).collect();
        Tensor::from_data(TensorData::new(ids, [self.ids.len()]), &like.device())
    }

    /// `x` `[count, width]`, rows of the table for the tokens `ids` `[count]`, with those of these tokens.
    fn looked_up(&self, x: Tensor<2>, ids: Tensor<1, Int>) -> Tensor<2> {
        let [count] = ids.dims();
        let own = self.ids_tensor(&x).unsqueeze::<2>().expand([count, self.ids.len()]);
        let is_own = own.equal(ids.unsqueeze_dim::<2>(1).expand([count, self.ids.len()])).float();
        let others = is_own.clone().sum_dim(1).neg().add_scalar(1.0);
        x * others + is_own.matmul(self.token_rows.val())
    }

    /// `y` `[count, vocabulary]`, logits of `x` `[count, width]`, with those of these tokens.
    fn scored(&self, y: Tensor<2>, x: Tensor<2>, compute: Compute) -> Tensor<2> {
        let ids = self.ids_tensor(&y);
        let own = fused::matmul(x, self.token_rows.val().transpose(), compute);
        let change = own - y.clone().select(1, ids.clone());
        y.select_assign(1, ids, change, IndexingUpdateOp::Add)
    }

    /// `table` `[vocabulary, width]` with these rows.
    fn put_into(&self, table: Tensor<2>) -> Tensor<2> {
        let ids = self.ids_tensor(&table);
        let rows = self.token_rows.val().cast(table.dtype());
        let change = rows - table.clone().select(0, ids.clone());
        table.select_assign(0, ids, change, IndexingUpdateOp::Add)
    }
}

/// What is trained beside a frozen embedding and head.
#[derive(Module, Debug, Default)]
pub struct TableUpdates {
    /// Of the embedding's lookups; a head that is the embedding doesn't see it.
    pub embedding: Option<LowRankUpdate>,
    /// Of the head's product, also where the head is the embedding.
    pub head: Option<LowRankUpdate>,
    /// Rows of some tokens.
    pub rows: Option<TokenRows>,
}

impl TableUpdates {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.embedding.is_none() && self.head.is_none() && self.rows.is_none()
    }

    /// Whether lookups have parameters that require gradients.
    pub fn train_lookups(&self) -> bool {
        self.embedding.as_ref().is_some_and(LowRankUpdate::is_trained)
            || self.rows.as_ref().is_some_and(|rows| rows.token_rows.val().is_require_grad())
    }

    /// Tells dropout where training stands.
    pub fn at(&self, place: Place) {
        if let Some(head) = &self.head {
            head.dropout.at(place);
        }
    }

    /// Tells dropout that the next rows for the head are those from `first` on of a batch.
    pub fn at_row(&self, first: u64) {
        if let Some(head) = &self.head {
            head.dropout.at_row(first);
        }
    }

    /// `x`, rows of the embedding for the tokens `ids`, with the updates.
    ///
    /// # Shapes
    /// `x` `[count, width]`, `ids` `[count]` → `[count, width]`.
    pub fn looked_up(&self, x: Tensor<2>, ids: Tensor<1, Int>) -> Tensor<2> {
        let x = match &self.rows {
            Some(rows) => rows.looked_up(x, ids.clone()),
            None => x,
        };
        match &self.embedding {
            Some(update) => x + update.rows(ids),
            None => x,
        }
    }

    /// `y`, the head's product with `x`, with the updates. `tied`: the head is the embedding.
    ///
    /// # Shapes
    /// `y` `[count, vocabulary]`, `x` `[count, width]` → `[count, vocabulary]`.
    pub fn scored(&self, y: Tensor<2>, x: Tensor<2>, tied: bool, compute: Compute) -> Tensor<2> {
        let y = match &self.rows {
            Some(rows) if tied => rows.scored(y, x.clone(), compute),
            _ => y,
        };
        match &self.head {
            Some(update) => update.added(y, x, compute),
            None => y,
        }
    }

    /// Whether a head that is the embedding can't stay it when these are merged.
    pub fn parts(&self) -> bool {
        self.embedding.is_some() || self.head.is_some()
    }

    /// `table` `[vocabulary, width]`, the embedding's, with the rows of tokens.
    pub fn with_rows(&self, table: Tensor<2>) -> Tensor<2> {
        match &self.rows {
            Some(rows) => rows.put_into(table),
            None => table,
        }
    }

    /// `table` `[vocabulary, width]`, the embedding's, with rows and update, in its type.
    pub fn merged_embedding(&self, table: Tensor<2>) -> Tensor<2> {
        added(self.with_rows(table), &self.embedding)
    }

    /// `weight` `[width, vocabulary]`, the head's, with its update, in its type. Of a head that is the embedding it is that,
    /// [`with_rows`](Self::with_rows).
    pub fn merged_head(&self, weight: Tensor<2>) -> Tensor<2> {
        added(weight, &self.head)
    }
}

fn added(weight: Tensor<2>, update: &Option<LowRankUpdate>) -> Tensor<2> {
    match update {
        Some(update) => {
            let product = update.product().cast(weight.dtype());
            weight + product
        }
        None => weight,
    }
}
