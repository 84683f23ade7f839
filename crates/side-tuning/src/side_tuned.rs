//! A frozen backbone with a side network, as one language model.

use std::sync::Arc;

use burn::{
    module::Module,
    tensor::{Device, Tensor},
};
use kiln_models::{CausalLm, Context, KvCache, Place, TokenBatch};

use crate::{
    Backbone, Result, SideConfig, SideNetwork,
    backbone::Frozen,
    hidden_cache::{HiddenCache, Lookup, StoredRows},
    init::Init,
};

/// A frozen backbone and the side network that reads its states: a [`CausalLm`], so that trainers, evaluators and
/// generators take it.
///
/// The backbone runs on plain tensors, without a graph, one block at a time, and each of its states is freed as soon as
/// the side block has what it needs of it; gradients reach the side network and the head's input only.
///
/// Its residual stream is the backbone's state and the side's side by side, `[batch, length, width + side width]`.
/// Recomputation (`Recompute::Block`) runs the side blocks again and never the backbone's.
///
/// # Memory
/// Beside the weights, training keeps for each token and block what the side block's backward pass needs (see
/// [`memory`](crate::memory)), and, where the downsampling is trained, the backbone's state.
#[derive(Module, Debug)]
pub struct SideTuned<M: Backbone> {
    backbone: Frozen<M>,
    /// What is trained.
    pub side: SideNetwork,
    #[module(skip)]
    config: SideConfig,
    #[module(skip)]
    hidden: Option<Arc<HiddenCache>>,
}

impl<M: Backbone> SideTuned<M> {
    /// Freezes `backbone` and puts a new side network beside it; initial values depend on `seed` and nothing else.
    ///
    /// # Errors
    /// Options that don't fit the backbone; for the reduction, with those that do.
    pub fn new(backbone: M, config: &SideConfig, seed: u64) -> Result<Self> {
        backbone.check_one_device("side tuning")?;
        let model = backbone.model_config().clone();
        let init = Init { seed, device: backbone.device() };
        let side = SideNetwork::new(config, &model, &init)?;
        let backbone = Frozen::new(backbone);
        Ok(Self { backbone, side, config: config.clone(), hidden: None })
    }

    /// The frozen model.
    pub fn backbone(&self) -> &M {
        self.backbone.get()
    }

    /// The model without its side network.
    pub fn into_backbone(self) -> M {
        self.backbone.into_inner()
    }

    /// What the side network looks like.
    pub fn config(&self) -> &SideConfig {
        &self.config
    }

    /// Keeps the backbone's states in `cache`, so that further epochs over the same rows don't run the backbone.
    ///
    /// It serves passes without recomputation and without keys and values of earlier tokens.
    #[must_use]
    pub fn with_hidden_cache(mut self, cache: Arc<HiddenCache>) -> Self {
        self.hidden = Some(cache);
        self
    }

    /// The backbone's state, outside autodiff, and the side's.
    fn split<const D: usize>(&self, x: Tensor<D>) -> [Tensor<D>; 2] {
        let side = self.side.width();
        let width = x.dims()[D - 1] - side;
        [x.clone().inner().narrow(D - 1, 0, width), x.narrow(D - 1, width, side)]
    }

    /// What the side network reads of a state of the backbone.
    fn features(&self, state: usize, x: Tensor<3>) -> Tensor<3> {
        self.side.features(state, self.hidden_state(x))
    }

    /// A state of the backbone without what its stream carries beside it.
    fn hidden_state(&self, x: Tensor<3>) -> Tensor<3> {
        match self.backbone().hidden_width() {
            Some(width) => x.narrow(2, 0, width),
            None => x,
        }
    }

    /// Runs the side network over what a cache holds of the backbone.
    fn over_stored(&self, context: &Context, rows: &StoredRows) -> Result<Tensor<3>> {
        let device = self.device();
        let mut side = self.side.start(rows.state(0, &device)?);
        for index in 0..self.num_blocks() {
            side = self.side.step(index, rows.state(index + 1, &device)?, side, context, None);
        }
        Ok(join(rows.top(&device)?, side))
    }

    /// Runs both networks; `record` gets the features of every state.
    fn over_backbone(
        &self,
        context: &Context,
        mut cache: Option<&mut KvCache>,
        mut record: impl FnMut(&Tensor<3>),
    ) -> [Tensor<3>; 2] {
        let mut features = |state: usize, x: Tensor<3>| {
            let features = self.features(state, x);
            record(&features);
            features
        };
        let unheard = context.unheard();
        let mut x = self.backbone().embed(context);
        let mut side = self.side.start(features(0, x.clone()));
        for index in 0..self.num_blocks() {
            x = self.backbone().block(index, x, &unheard, cache.as_deref_mut());
            let beside = cache.as_deref_mut().map(KvCache::beside);
            side = self.side.step(index, features(index + 1, x.clone()), side, context, beside);
        }
        if let Some(cache) = cache {
            cache.advance(context);
        }
        [x, side]
    }
}

/// The two states side by side.
fn join(backbone: Tensor<3>, side: Tensor<3>) -> Tensor<3> {
    let backbone = if side.is_autodiff() { Tensor::from_inner(backbone) } else { backbone };
    Tensor::cat(vec![backbone, side], 2)
}

impl<M: Backbone> CausalLm for SideTuned<M> {
    fn context(&self, tokens: &TokenBatch, cache: Option<&KvCache>) -> kiln_models::Result<Context> {
        Ok(self.side.context(self.backbone().context(tokens, cache)?, &tokens.positions))
    }

    fn embed(&self, context: &Context) -> Tensor<3> {
        let x = self.backbone().embed(context);
        let side = self.side.start(self.features(0, x.clone()));
        join(x, side)
    }

    fn trains_embedding(&self) -> bool {
        self.side.trains_start()
    }

    fn num_blocks(&self) -> usize {
        self.backbone().num_blocks()
    }

    fn block(
        &self,
        index: usize,
        x: Tensor<3>,
        context: &Context,
        mut cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        let [x, side] = self.split(x);
        let x = self.backbone().block(index, x, &context.unheard(), cache.as_deref_mut());
        let features = self.features(index + 1, x.clone());
        let side = self.side.step(index, features, side, context, cache.map(KvCache::beside));
        join(x, side)
    }

    fn block_again(&self, index: usize, x: Tensor<3>, output: Tensor<3>, context: &Context) -> Tensor<3> {
        let ([_, side], [x, _]) = (self.split(x), self.split(output));
        let features = self.features(index + 1, x.clone());
        join(x, self.side.step(index, features, side, context, None))
    }

    fn final_norm<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let [x, side] = self.split(x);
        self.side.finish(|| self.backbone().final_norm(x), side)
    }

    fn head_input<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        self.backbone().head_input(x)
    }

    fn lm_head<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        self.backbone().lm_head(x)
    }

    fn vocab_size(&self) -> usize {
        self.backbone().vocab_size()
    }

    fn max_positions(&self) -> usize {
        self.backbone().max_positions()
    }

    fn cache_limit(&self) -> Option<usize> {
        self.backbone().cache_limit()
    }

    fn device(&self) -> Device {
        self.backbone().device()
    }

    /// The backbone is frozen, and side networks draw nothing at random.
    fn at(&self, _place: Place) {}

    fn residual(&self, context: &Context, cache: Option<&mut KvCache>) -> Tensor<3> {
        let hidden = self.hidden.as_deref().filter(|_| cache.is_none());
        let lookup = hidden.map(|hidden| hidden.look_up(context, self.num_blocks()));
        if let Some(Lookup::Stored(rows)) = &lookup {
            match self.over_stored(context, rows) {
                Ok(x) => return x,
                Err(error) => {
                    tracing::warn!(%error, "a cached state can't be read; the backbone runs instead")
                }
            }
        }
        let mut states = Vec::new();
        let [x, side] = self.over_backbone(context, cache, |features| {
            if matches!(lookup, Some(Lookup::Missing(_))) {
                states.push(features.clone());
            }
        });
        if let (Some(hidden), Some(Lookup::Missing(missing))) = (hidden, &lookup) {
            hidden.store(missing, states, &self.hidden_state(x.clone()));
        }
        join(x, side)
    }
}
