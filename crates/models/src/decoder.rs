//! Decoder-only language models of every family.

use std::collections::BTreeMap;

use burn::{
    module::{Module, Param},
    nn::Linear,
    tensor::{Device, FloatDType, Tensor, TensorData},
};
use kiln_quant_core::{
    Compute, LogitSpec, OwnTables, PackedLinear, Place, Projection, QuantLinear, Slots, Stack, TableUpdates,
    TokenTables,
};

use crate::{
    Block, BlockPart, CausalLm, Context, Embedding, Error, KvCache, Norm, PackedHead, PerLayerInputs,
    Placement, ScaleSite, ScaleSites, ScaleSource, TokenBatch,
    block::Beside,
    config::{ModelConfig, RopeConfig, RopeScaling, TensorRole, TensorShape},
    families::{Channels, FusedRows, LinearRole, NormAxis, NormKind, NormPlace},
    placement::moved,
};

/// A decoder-only language model; every linear of every block is a `P`.
///
/// One type for all families: what a family is stands in its [description](crate::families::Family).
#[derive(Debug, Clone)]
pub struct Decoder<P: Projection> {
    /// Token embedding.
    pub embed_tokens: Embedding,
    /// Learned positions, `[max_position_embeddings + offset, width]`; `None` where positions are rotary.
    pub embed_positions: Option<Param<Tensor<2>>>,
    /// Norm over the embedding; most families have none.
    pub embed_norm: Option<Norm>,
    /// From embeddings of another width to the residual stream `[hidden_size, width]`, and from there to the head
    /// `[width, hidden_size]`; most models have none.
    pub projections: Option<[Param<Tensor<2>>; 2]>,
    /// What makes the inputs that blocks have beside the residual stream; most families have none.
    pub per_layer: Option<PerLayerInputs>,
    /// Blocks.
    pub blocks: Vec<Block<P>>,
    /// Norm before the head.
    pub final_norm: Norm,
    /// The head; `None` when it is the embedding.
    pub lm_head: Option<QuantLinear>,
    /// What is trained beside embedding and head.
    pub(crate) updates: TableUpdates,
    pub(crate) config: ModelConfig,
    pub(crate) compute: Compute,
    /// Where the parts are, if not all are on one device.
    pub(crate) placement: Option<Placement>,
}

impl<P: Projection> Decoder<P> {
    /// Where the parts are; `None` if all are on one device.
    pub fn placement(&self) -> Option<&Placement> {
        self.placement.as_ref()
    }

    fn devices_in_order(&self) -> Vec<Device> {
        self.placement.as_ref().map_or_else(|| vec![self.device()], Placement::devices)
    }

    /// What operands of products are rounded to.
    pub fn compute(&self) -> Compute {
        self.compute
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// A model of its parts, without projections and inputs of single blocks.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the first tensor whose shape isn't that of `config`.
    pub fn from_parts(
        config: ModelConfig,
        embed_tokens: Embedding,
        embed_positions: Option<Param<Tensor<2>>>,
        embed_norm: Option<Norm>,
        blocks: Vec<Block<P>>,
        final_norm: Norm,
        lm_head: Option<QuantLinear>,
    ) -> crate::Result<Self> {
        let compute = Compute::F32;
        let updates = TableUpdates::default();
        let placement = Placement::of(&embed_tokens, &blocks, &final_norm, &lm_head);
        let decoder = Self {
            embed_tokens,
            embed_positions,
            embed_norm,
            projections: None,
            per_layer: None,
            blocks,
            final_norm,
            lm_head,
            updates,
            config,
            compute,
            placement,
        };
        decoder.check()?;
        Ok(decoder)
    }

    /// The same parts under another configuration, as after a cut.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the first tensor whose shape isn't that of `config`.
    pub fn with_config(mut self, config: ModelConfig) -> crate::Result<Self> {
        self.config = config;
        self.placement = Placement::of(&self.embed_tokens, &self.blocks, &self.final_norm, &self.lm_head);
        self.check()?;
        // Linears may be new.
        let compute = self.compute;
        self.with_compute(compute)
    }

    fn check(&self) -> crate::Result<()> {
        let config = &self.config;
        let count = |what: &str, expected: usize, found: usize| match expected == found {
            true => Ok(()),
            false => Err(differs(what, expected.to_string(), found.to_string())),
        };
        count("blocks", config.num_hidden_layers, self.blocks.len())?;
        count("blocks' attention", config.num_hidden_layers, config.layer_attention.len())?;
        config.check_heads().map_err(|wrong| Error::Argument {
            name: wrong.field.into(),
            expected: wrong.expected,
            found: wrong.found,
        })?;
        let mut found = self.shapes();
        for TensorShape { name, mut shape, .. } in config.tensors() {
            // Scalars are held as vectors.
            if shape.is_empty() {
                shape.push(1);
            }
            match found.remove(&name) {
                Some(found) if found == shape => {}
                found => {
                    let found = found.map_or("none".into(), |found| format!("{found:?}"));
                    return Err(differs(&name, format!("shape {shape:?}"), found));
                }
            }
        }
        if let Some((name, shape)) = found.into_iter().next() {
            return Err(differs(&name, "no such tensor".into(), format!("{shape:?}")));
        }
        match self.misfit(&self.updates) {
            Some((path, shape)) => Err(differs(&path, "updates of its shape".into(), format!("{shape:?}"))),
            None => Ok(()),
        }
    }

    /// The table that one of `updates` doesn't fit.
    fn misfit(&self, updates: &TableUpdates) -> Option<(String, [usize; 2])> {
        let tables = self.tables();
        let of_tables = tables.shapes().into_iter().zip([&updates.embedding, &updates.head]);
        let mut of_tables = of_tables.filter_map(|((path, shape), update)| {
            let found = update.as_ref()?.shape();
            (found != shape).then_some((path, found))
        });
        let rows = updates.rows.as_ref().map(|rows| rows.token_rows.lazy_shape().dims::<2>());
        let rows = rows.filter(|[_, width]| *width != tables.width);
        of_tables.next().or_else(|| rows.map(|shape| (tables.embedding.clone(), shape)))
    }

    fn tables(&self) -> TokenTables {
        let names = self.config.family.names;
        let [vocab_size, width] = self.embed_tokens.shape();
        TokenTables {
            embedding: names.embedding.into(),
            head: Some(names.head.into()),
            vocab_size,
            width,
            tied: self.lm_head.is_none(),
        }
    }

    /// Sizes of all tensors by their names in checkpoints, outermost first.
    fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let names = &self.config.family.names;
        let mut shapes = BTreeMap::new();
        let mut add = |path: &str, name: &str, shape: &[usize]| {
            shapes.insert(format!("{path}.{name}"), shape.to_vec());
        };
        add(names.embedding, "weight", &self.embed_tokens.shape());
        if let (Some(table), Some(learned)) = (&self.embed_positions, names.positions) {
            add(learned.path, "weight", &table.lazy_shape());
        }
        if let (Some(inputs), Some(paths)) = (&self.per_layer, names.per_layer) {
            add(paths.embedding, "weight", &inputs.table.shape());
        }
        for (path, norm) in self.norms() {
            for (name, parameter) in norm.parameters() {
                add(&path, name, &parameter.lazy_shape());
            }
        }
        for (path, slot) in self.slots() {
            let [d_input, d_output] = slot.shape();
            add(&path, "weight", &[d_output, d_input]);
            if let Some(bias) = slot.bias() {
                add(&path, "bias", &bias.dims());
            }
        }
        if let Some(head) = &self.lm_head {
            let [d_input, d_output] = head.shape();
            add(names.head, "weight", &[d_output, d_input]);
            if let Some(bias) = head.bias() {
                add(names.head, "bias", &bias.dims());
            }
        }
        for (name, values) in self.matrices() {
            shapes.insert(name, values.lazy_shape().to_vec());
        }
        for (name, shape, values) in self.vectors() {
            let found = values.lazy_shape().to_vec();
            // All are held in one dimension.
            let same = shape.len() > 1 && shape.iter().product::<usize>() == found[0];
            shapes.insert(name, if same { shape } else { found });
        }
        shapes
    }
}

fn differs(what: &str, expected: String, found: String) -> Error {
    Error::Argument { name: what.into(), expected: format!("{expected}, as the configuration says"), found }
}

impl<P: Projection> CausalLm for Decoder<P> {
    fn context(&self, tokens: &TokenBatch, cache: Option<&KvCache>) -> crate::Result<Context> {
        self.check_tokens(tokens)?;
        let device = self.device();
        let config = &self.config;
        let tables = config.rope.iter().enumerate();
        let tables = tables
            .map(|(table, rope)| rope.tables(config.rotary_head_dim(table), &tokens.positions, &device));
        let tables =
            tables.map(|[cos, sin]| if config.family.turns_back { [cos, sin.neg()] } else { [cos, sin] });
        let past = cache.map_or(&[][..], |cache| &cache.segments);
        let mut context = Context::new(tokens, past, tables.collect(), self.compute, &device);
        context.query_factors = config.query_temperature.map(|temperature| {
            let factors: Vec<f32> =
                tokens.positions.iter().map(|position| temperature.at(*position)).collect();
            Tensor::from_data(TensorData::new(factors, [tokens.batch, tokens.length, 1, 1]), &device)
        });
        Ok(context)
    }

    fn embed(&self, context: &Context) -> Tensor<3> {
        let x = self.embedded(context);
        // So whoever runs blocks one by one, forwards or backwards, need not know of shared keys.
        match self.config.carried_width() {
            0 => x,
            width => {
                let [batch, length, _] = x.dims();
                let none = Tensor::zeros([batch, length, width], (&x.device(), x.dtype()));
                Tensor::cat(vec![x, none], 2)
            }
        }
    }

    fn trains_embedding(&self) -> bool {
        let positions = self.embed_positions.as_ref();
        let projection = self.projections.as_ref().map(|[projection, _]| projection);
        let mut norm = self.embed_norm.iter().flat_map(Norm::parameters);
        self.embed_tokens.is_trained()
            || self.updates.train_lookups()
            || positions.into_iter().chain(projection).any(|table| table.val().is_require_grad())
            || norm.any(|(_, parameter)| parameter.val().is_require_grad())
    }

    fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    fn block(&self, index: usize, x: Tensor<3>, context: &Context, cache: Option<&mut KvCache>) -> Tensor<3> {
        match &self.placement {
            None => self.run_block(index, x, context, context, cache),
            Some(placement) => {
                let device = placement.block(index);
                let x = self.run_block(index, moved(x, device), context, &context.on(device), cache);
                moved(x, placement.after(index))
            }
        }
    }

    fn final_norm<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        self.final_norm.forward(match self.hidden_width() {
            Some(width) => x.narrow(D - 1, 0, width),
            None => x,
        })
    }

    fn hidden_width(&self) -> Option<usize> {
        (self.config.carried_width() > 0).then_some(self.config.hidden_size)
    }

    fn head_input<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match &self.projections {
            Some([_, projection]) => projected(x, projection),
            None => x,
        }
    }

    fn lm_head<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let x = self.head_input(x);
        let beside = (!self.updates.is_empty()).then(|| x.clone());
        let logits = match &self.lm_head {
            Some(head) => head.forward(x),
            None => self.embed_tokens.project(x, self.compute),
        };
        let logits = match beside {
            None => logits,
            Some(x) => {
                let [of_x, of_logits] = [x.dims(), logits.dims()];
                let rows: usize = of_x[..D - 1].iter().product();
                let x = x.reshape([rows, of_x[D - 1]]);
                let y = logits.reshape([rows, of_logits[D - 1]]);
                self.updates.scored(y, x, self.lm_head.is_none(), self.compute).reshape(of_logits)
            }
        };
        let logits = match self.config.logit_multiplier {
            1.0 => logits,
            factor => logits.mul_scalar(factor),
        };
        match self.config.logit_softcap {
            Some(cap) => logits.div_scalar(cap).tanh().mul_scalar(cap),
            None => logits,
        }
    }

    fn packed_head(&self) -> Option<PackedHead<'_>> {
        let weight = match (&self.lm_head, &self.embed_tokens) {
            _ if !self.updates.is_empty() => return None,
            (Some(QuantLinear::Packed(PackedLinear { weight, bias: None })), _) => weight,
            (None, Embedding::Packed(table)) => table,
            _ => return None,
        };
        let (factor, softcap) = (self.config.logit_multiplier, self.config.logit_softcap);
        let logits = LogitSpec { factor: factor as f32, softcap: softcap.map(|cap| cap as f32) };
        Some(PackedHead { weight, logits })
    }

    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    fn max_positions(&self) -> usize {
        // Dynamic scaling stretches frequencies for texts beyond what the model was trained on.
        let factors = self.config.rope.iter().map(|rope| match rope.scaling {
            RopeScaling::Dynamic { factor, .. } => factor.max(1.0),
            _ => 1.0,
        });
        (self.config.max_position_embeddings as f64 * factors.fold(1.0, f64::max)) as usize
    }

    fn cache_limit(&self) -> Option<usize> {
        self.config.rope.iter().filter_map(RopeConfig::changes_beyond).min()
    }

    fn device(&self) -> Device {
        self.embed_tokens.device().without_autodiff()
    }

    fn head_device(&self) -> Device {
        self.placement.as_ref().map_or_else(|| self.device(), |placement| placement.head().clone())
    }

    fn at(&self, place: Place) {
        for (_, slot) in self.slots() {
            slot.at(place);
        }
        self.updates.at(place);
    }

    fn at_row(&self, first: usize) {
        self.updates.at_row(first as u64);
    }
}

impl<P: Projection> Decoder<P> {
    /// The embedding of the tokens, `[batch, length, hidden_size]`.
    fn embedded(&self, context: &Context) -> Tensor<3> {
        let mut x = self.embed_tokens.forward(context.ids.clone());
        if !self.updates.is_empty() {
            let [batch, length, width] = x.dims();
            let ids = context.ids.clone().reshape([batch * length]);
            let rows = self.updates.looked_up(x.reshape([batch * length, width]), ids);
            x = rows.reshape([batch, length, width]);
        }
        if let Some([projection, _]) = &self.projections {
            x = projected(x, projection);
        }
        if self.config.embedding_multiplier != 1.0 {
            x = x.mul_scalar(self.config.embedding_multiplier);
        }
        let x = match (&self.embed_positions, self.config.family.names.positions) {
            (Some(table), Some(learned)) => {
                let [batch, length, width] = x.dims();
                let positions = context.positions.clone().add_scalar(learned.offset as i64);
                let rows = positions.reshape([batch * length]);
                x + table.val().select(0, rows).reshape([batch, length, width])
            }
            _ => x,
        };
        match &self.embed_norm {
            Some(norm) => norm.forward(x),
            None => x,
        }
    }

    /// Block `index` where its parts are; `first` is the context where the embedding is, `context` the same there.
    fn run_block(
        &self,
        index: usize,
        x: Tensor<3>,
        first: &Context,
        context: &Context,
        cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        let (block, config) = (&self.blocks[index], &self.config);
        let mut beside = Beside::default();
        if let (Some(inputs), Some(per_layer)) = (&self.per_layer, &config.per_layer_input)
            && block.linear(LinearRole::PerLayerGate).is_some()
        {
            let input = inputs.of_block(index, per_layer.width, first.ids.clone(), self.embedded(first));
            beside.input = Some(moved(input, &context.ids.device()));
        }
        let sources = config.shared_key_values();
        if sources.is_empty() {
            return block.forward_beside(index, x, &mut beside, context, cache, config);
        }
        let [batch, length, _] = x.dims();
        let mut parts = vec![x.clone().narrow(2, 0, config.hidden_size)];
        let mut start = config.hidden_size;
        for source in &sources {
            let width = 2 * config.width(Channels::KeyValue, *source);
            parts.push(x.clone().narrow(2, start, width));
            start += width;
        }
        let source = config.key_value_source(index);
        let place = sources.iter().position(|other| *other == source);
        if let Some(place) = place.filter(|_| source != index) {
            let heads = config.layer(source).num_key_value_heads;
            let both =
                parts[place + 1].clone().reshape([batch, length, 2 * heads, config.head_dim_of(source)]);
            beside.shared = Some([0, heads].map(|first| both.clone().narrow(2, first, heads)));
        }
        parts[0] = block.forward_beside(index, parts[0].clone(), &mut beside, context, cache, config);
        if let (Some(place), Some(own)) = (place, beside.own) {
            let [_, _, heads, head_dim] = own[0].dims();
            parts[place + 1] = Tensor::cat(own.to_vec(), 2).reshape([batch, length, 2 * heads * head_dim]);
        }
        Tensor::cat(parts, 2)
    }
}

impl<P: Projection> Slots for Decoder<P> {
    type Slot = P;
    type With<Q: Projection> = Decoder<Q>;

    fn try_map<Q: Projection, E>(self, mut f: impl FnMut(&str, P) -> Result<Q, E>) -> Result<Decoder<Q>, E> {
        let family = self.config.family;
        let blocks = self.blocks.into_iter().enumerate();
        let blocks = blocks
            .map(|(index, block)| {
                block.try_map(|name, linear| {
                    let mut linear = f(&family.path(index, name), linear)?;
                    linear.set_compute(self.compute);
                    Ok(linear)
                })
            })
            .collect::<Result<_, E>>()?;
        Ok(Decoder {
            embed_tokens: self.embed_tokens,
            embed_positions: self.embed_positions,
            embed_norm: self.embed_norm,
            projections: self.projections,
            per_layer: self.per_layer,
            blocks,
            final_norm: self.final_norm,
            lm_head: self.lm_head,
            updates: self.updates,
            config: self.config,
            compute: self.compute,
            placement: self.placement,
        })
    }

    fn slots(&self) -> Vec<(String, &P)> {
        let family = self.config.family;
        let blocks = self.blocks.iter().enumerate();
        let slots = blocks.flat_map(|(index, block)| {
            block.linears().map(move |(name, linear)| (family.path(index, &name), linear))
        });
        slots.collect()
    }

    fn stays_dense(&self, path: &str) -> bool {
        let place =
            path.strip_prefix(self.config.family.names.blocks).and_then(|rest| rest.strip_prefix('.'));
        let place = place.and_then(|rest| rest.split_once('.'));
        place.is_some_and(|(index, name)| {
            let block = index.parse().ok().and_then(|index: usize| self.blocks.get(index));
            let linear = block.and_then(|block| block.table.linears().find(|linear| linear.name == name));
            linear.is_some_and(|linear| linear.role.stays_dense())
        })
    }

    fn stacks(&self) -> Vec<Stack> {
        let family = self.config.family;
        let mut stacks = Vec::new();
        for (index, block) in self.blocks.iter().enumerate() {
            let Some(part) = block.table.experts() else { continue };
            let count = self.config.experts.map_or(0, |experts| experts.count);
            let path = |expert, kind| family.path(index, &part.path(expert, kind));
            let mut add = |name: &str, experts: Vec<Vec<String>>| {
                let alternates =
                    part.stacked.is_some_and(|stacked| stacked.interleaved) && experts[0].len() > 1;
                stacks.push(Stack { parameter: family.path(index, name), experts, alternates });
            };
            if count > 0 {
                let both = (0..count).map(|expert| vec![path(expert, 0), path(expert, 1)]);
                add(&format!("{}.gate_up_proj", part.module), both.collect());
                let down = (0..count).map(|expert| vec![path(expert, 2)]);
                add(&format!("{}.down_proj", part.module), down.collect());
            }
            if let (Some(parameter), Some(router)) = (part.router, block.table.linear(LinearRole::Router)) {
                add(parameter, vec![vec![family.path(index, router.name)]]);
            }
        }
        stacks
    }

    fn token_tables(&self) -> Option<TokenTables> {
        Some(self.tables())
    }

    fn table_updates(&self) -> Option<&TableUpdates> {
        Some(&self.updates)
    }

    fn with_table_updates(mut self, updates: TableUpdates) -> Self {
        if let Some((path, shape)) = self.misfit(&updates) {
            panic!("an update of {path} of shape {shape:?}");
        }
        self.updates = updates;
        if self.placement.is_some() {
            let device = self.head_device();
            self.updates.head = self.updates.head.take().map(|head| head.to_device(&device));
        }
        self
    }

    fn with_own_tables(mut self, own: OwnTables, vocab_size: usize) -> Self {
        let known = self.config.vocab_size;
        assert!(vocab_size >= known, "{vocab_size} tokens of a model that has {known}");
        let grows = vocab_size > known;
        if self.lm_head.is_none() && own.any() && !own.tied {
            self.lm_head = Some(match &self.embed_tokens {
                Embedding::Packed(table) => {
                    QuantLinear::Packed(PackedLinear { weight: table.clone(), bias: None })
                }
                Embedding::Dense(table) => dense_head(table.weight.val().transpose(), None),
            });
        }
        if own.embedding || grows {
            self.embed_tokens = Embedding::dense(grown(self.embed_tokens.table(), 0, vocab_size));
        }
        if let Some(head) = self.lm_head.take_if(|_| own.head || grows) {
            let bias = head.bias().map(|bias| grown(bias.unsqueeze::<2>(), 1, vocab_size).squeeze_dim(0));
            self.lm_head = Some(dense_head(grown(head.weight(), 1, vocab_size), bias));
        }
        self.config.vocab_size = vocab_size;
        self.config.tie_word_embeddings = self.lm_head.is_none();
        self
    }

    fn table_rows(&self, ids: &[u32]) -> Tensor<2> {
        let ids: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
        let count = ids.len();
        let ids = Tensor::from_data(TensorData::new(ids, [1, count]), &self.device());
        self.embed_tokens.forward(ids).squeeze_dim(0)
    }

    fn checkpoint_name(&self, path: &str) -> String {
        format!("{}{path}", self.config.family.module.left_out)
    }

    fn is_stored_transposed(&self, name: &str) -> bool {
        name.strip_suffix(".weight") == Some(self.config.family.names.head)
    }

    fn with_merged_tables(mut self) -> Self {
        let updates = std::mem::take(&mut self.updates);
        if updates.is_empty() {
            return self;
        }
        let changes_embedding = updates.embedding.is_some() || updates.rows.is_some();
        // A packed table that stays as it is is not unpacked.
        match self.lm_head.take_if(|_| updates.head.is_some()) {
            Some(head) => self.lm_head = Some(dense_head(updates.merged_head(head.weight()), head.bias())),
            None if self.lm_head.is_none() && updates.parts() => {
                let table = updates.with_rows(self.embed_tokens.table());
                self.lm_head = Some(dense_head(updates.merged_head(table.transpose()), None));
            }
            None => {}
        }
        if changes_embedding {
            self.embed_tokens = Embedding::dense(updates.merged_embedding(self.embed_tokens.table()));
        }
        self.config.tie_word_embeddings = self.lm_head.is_none();
        self
    }
}

/// `x` times a matrix `[d_output, d_input]`.
fn projected<const D: usize>(x: Tensor<D>, matrix: &Param<Tensor<2>>) -> Tensor<D> {
    let mut sizes = x.dims();
    let rows = sizes[..D - 1].iter().product();
    let y = x.reshape([rows, sizes[D - 1]]).matmul(matrix.val().transpose());
    sizes[D - 1] = y.dims()[1];
    y.reshape(sizes)
}

/// A frozen head of `weight` `[width, vocabulary]`.
fn dense_head(weight: Tensor<2>, bias: Option<Tensor<1>>) -> QuantLinear {
    QuantLinear::Dense(Linear {
        weight: Param::from_tensor(weight).set_require_grad(false),
        bias: bias.map(|bias| Param::from_tensor(bias).set_require_grad(false)),
    })
}

/// `table` with `count` rows or columns, those of `dim`; new ones are the mean of the others.
fn grown(table: Tensor<2>, dim: usize, count: usize) -> Tensor<2> {
    let mut shape = table.dims();
    let new = count - shape[dim];
    if new == 0 {
        return table;
    }
    shape[dim] = new;
    let mean = table.clone().cast(FloatDType::F32).mean_dim(dim).cast(table.dtype());
    Tensor::cat(vec![table, mean.expand(shape)], dim)
}

impl<P: Projection> ScaleSites for Decoder<P> {
    fn scale_sites(&self, index: usize) -> Vec<ScaleSite> {
        let (block, family) = (&self.blocks[index], self.config.family);
        let table = block.table;
        let path = |role| table.linear(role).map(|linear| family.path(index, linear.name));
        let site = |source, readers: &[LinearRole]| ScaleSite {
            source,
            readers: readers.iter().filter_map(|role| path(*role)).collect(),
        };
        let mut sites = Vec::new();
        let norm = |place| {
            let part = table.norm(place)?;
            let names = block.norm(place)?.parameters();
            let names: Vec<_> =
                names.map(|(name, _)| family.path(index, &format!("{}.{name}", part.name))).collect();
            let one_plus = family.norm == NormKind::RmsOnePlus;
            (!names.is_empty()).then_some(ScaleSource::Norm { parameters: names, one_plus })
        };
        let mut attention = vec![LinearRole::Query, LinearRole::Key, LinearRole::Value];
        attention.extend([FusedRows::Concatenated, FusedRows::Grouped].map(LinearRole::QueryKeyValue));
        attention.extend([
            LinearRole::GatedQuery,
            LinearRole::DeltaMixed,
            LinearRole::DeltaGate,
            LinearRole::DeltaStrength,
            LinearRole::DeltaDecay,
        ]);
        let mlp = [LinearRole::Gate, LinearRole::Up, LinearRole::GateUp];
        // Side by side, both may read one norm.
        if self.config.parallel && table.norm(NormPlace::PreMlp).is_none() {
            attention.extend(mlp);
        }
        if let Some(source) = norm(NormPlace::PreAttention) {
            sites.push(site(source, &attention));
        }
        // Where several query heads share a value head, its channel has several readers.
        let shape = self.config.layer(index);
        if shape.num_key_value_heads == shape.num_attention_heads
            && !family.norms_values
            && let Some(value) = path(LinearRole::Value)
        {
            sites.push(site(ScaleSource::Projection(value), &[LinearRole::Output]));
        }
        if let Some(source) = norm(NormPlace::PreMlp) {
            sites.push(site(source, &mlp));
        }
        if let Some(up) = path(LinearRole::Up)
            && (table.is_gated() || self.config.activation.passes_factors())
        {
            sites.push(site(ScaleSource::Projection(up), &[LinearRole::Down]));
        }
        sites
    }

    fn norm_parameter(&mut self, name: &str) -> Option<&mut Param<Tensor<1>>> {
        let family = self.config.family;
        let (index, name) = name.strip_prefix(family.names.blocks)?.strip_prefix('.')?.split_once('.')?;
        let (path, parameter) = name.rsplit_once('.')?;
        let block = self.blocks.get_mut(index.parse::<usize>().ok()?)?;
        let on_stream = |place: NormPlace| place.axis() == NormAxis::Hidden;
        let part = block.table.norms().find(|norm| norm.name == path && on_stream(norm.place))?;
        let norm = block.norm_mut(part.place)?;
        match parameter {
            "weight" => norm.weight.as_mut(),
            "bias" => norm.bias.as_mut(),
            _ => None,
        }
    }
}

impl<P: Projection> Decoder<P> {
    /// The norms, those over the embedding, of the blocks and the last one, with their paths.
    pub(crate) fn norms(&self) -> Vec<(String, &Norm)> {
        let family = self.config.family;
        let blocks = self.blocks.iter().enumerate();
        let norms = blocks.flat_map(|(index, block)| {
            block.parts().filter_map(move |(name, part)| match part {
                BlockPart::Norm(norm) => Some((family.path(index, name), norm)),
                _ => None,
            })
        });
        let first = self.embed_norm.iter().zip(family.names.embedding_norm);
        let per_layer = self.per_layer.iter().zip(family.names.per_layer);
        let per_layer = per_layer.map(|(inputs, paths)| (paths.norm, &inputs.norm));
        let first = first
            .map(|(norm, path)| (path, norm))
            .chain(per_layer)
            .map(|(path, norm)| (path.to_owned(), norm));
        first.chain(norms).chain([(family.names.final_norm.to_owned(), &self.final_norm)]).collect()
    }

    /// The blocks' parameters that are neither a linear's nor a norm's, with their names in checkpoints.
    /// Shapes are those of the checkpoints.
    pub(crate) fn vectors(&self) -> Vec<(String, Vec<usize>, &Param<Tensor<1>>)> {
        let blocks = self.blocks.iter().enumerate();
        let vectors = blocks.flat_map(|(index, block)| {
            block.vectors().map(move |(part, values)| {
                let shape = self.config.vector_shape(part.role, index);
                (self.config.family.path(index, part.name), shape, values)
            })
        });
        vectors.collect()
    }

    /// The matrices that are neither slots nor tables, with their names in checkpoints.
    pub(crate) fn matrices(&self) -> Vec<(String, &Param<Tensor<2>>)> {
        let per_layer = self.per_layer.iter().zip(self.config.family.names.per_layer);
        let per_layer =
            per_layer.map(|(inputs, paths)| (format!("{}.weight", paths.projection), &inputs.projection));
        let projections = self.projections.iter().flatten();
        let projections = self.config.family.names.projections.into_iter().flatten().zip(projections);
        let projections = projections.map(|(path, values)| (format!("{path}.weight"), values));
        projections.chain(per_layer).collect()
    }
}

impl<P: Projection> Decoder<P> {
    /// Rounds operands of products from now on: packed weights', attention's, the head's and those of adapters. Weights
    /// stay as they are. Dense linears of the blocks are not rounded.
    ///
    /// # Errors
    /// A device that doesn't multiply such operands.
    pub fn with_compute(mut self, compute: Compute) -> crate::Result<Self> {
        for device in self.devices_in_order() {
            compute.check(&device)?;
        }
        self.compute = compute;
        for block in &mut self.blocks {
            block.linears_mut().for_each(|linear| linear.set_compute(compute));
        }
        if let Some(head) = &mut self.lm_head {
            head.set_compute(compute);
        }
        if let Embedding::Packed(table) = &mut self.embed_tokens {
            table.set_compute(compute);
        }
        Ok(self)
    }
}

impl Decoder<QuantLinear> {
    /// Bytes of all tensors: packed ones as stored, others in their types.
    pub fn stored_bytes(&self) -> usize {
        let tables = [Some(&self.embed_tokens), self.per_layer.as_ref().map(|inputs| &inputs.table)];
        let tables: usize = tables.into_iter().flatten().map(Embedding::stored_bytes).sum();
        // Those that stay dense are among the plain ones.
        let slots = self.slots().into_iter().filter(|(path, _)| !self.stays_dense(path));
        let linears: usize = slots.map(|(_, slot)| slot.storage_bytes()).sum();
        let head = self.lm_head.as_ref().map_or(0, QuantLinear::storage_bytes);
        let plain = self.config.tensors().into_iter().filter(|tensor| tensor.role == TensorRole::Plain);
        let plain: usize = plain.map(|tensor| 4 * tensor.shape.iter().product::<usize>()).sum();
        tables + linears + head + plain
    }
}
