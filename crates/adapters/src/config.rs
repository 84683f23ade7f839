//! What is trained, and where.

use kiln_quant_core::TokenTables;

use crate::{
    InitLoraWeights, MAX_RANK, Method, PeftConfig, Pooling, QaHira, QaLora, Result, Target, TargetModules,
    Targets, json_fields::Problem, outline::Outline, part::Description,
};

/// Which adapters a model gets: the method, the modules, and the options that all methods share.
///
/// | option | default | meaning | range |
/// | --- | --- | --- | --- |
/// | `method` | required | what stands beside a linear, with the options of that method | |
/// | `rank` | required | rank r; of QA-HiRA a divisor of the scaling only | 1 to [`MAX_RANK`] |
/// | `alpha` | required | numerator of the scaling alpha / r | finite |
/// | `rslora` | false | scaling alpha / √r ([rank-stabilised LoRA](https://arxiv.org/abs/2312.03732)) | |
/// | `targets` | all linears | the modules that get adapters | |
/// | `exclude` | none | modules that don't, whatever `targets` says | |
/// | `layers` | all | numbers of the layers that get adapters; needs a list of names as `targets` | |
/// | `layers_pattern` | any name | regular expressions for the name before the layer's number; needs `layers` | |
/// | `rank_pattern`, `alpha_pattern` | none | rank and alpha of modules whose name ends in a match of the regular expression; the first pattern wins | as `rank`, `alpha` |
/// | `dropout` | 0 | share of an adapter's inputs that is dropped in training | 0 to below 1 |
/// | `modules_to_save` | none | embedding, head and norms that are trained whole, by the ends of their names, such as `embed_tokens` | |
/// | `trainable_tokens` | none | tokens whose rows of the embedding are trained | distinct |
/// | `keep_tied` | false | whether a head that is the embedding stays it where the embedding is trained whole; otherwise the head keeps the old one, as with PEFT | |
/// | `save_tables` | false | whether folders get embedding and head even if they are frozen, as for tokens that were added | |
/// | `seed` | 0 | of initial values and dropout; not stored in adapter folders | any |
///
/// ```
/// use kiln_adapters::{AdapterConfig, Method, QBara, QaHira};
/// let lora = AdapterConfig::lora(16, 32.0).with_dropout(0.05).with_targets(["q_proj", "v_proj"]);
/// lora.validate()?;
/// let bara = AdapterConfig::new(Method::QBara(QBara { lambda: 2 }), 64, 16.0);
/// bara.validate()?;
/// let hira = AdapterConfig::qa_hira(QaHira::for_groups(64), 32.0).with_seed(7);
/// hira.validate()?;
/// # Ok::<(), kiln_adapters::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct AdapterConfig {
    /// The method with its own options.
    pub method: Method,
    /// Rank; of QA-HiRA a divisor of the scaling only.
    pub rank: usize,
    /// Numerator of the scaling.
    pub alpha: f64,
    /// Scaling alpha / √r in place of alpha / r.
    pub rslora: bool,
    /// The modules that get adapters.
    pub targets: TargetModules,
    /// The modules that don't, whatever `targets` says.
    pub exclude: Option<TargetModules>,
    /// The layers that get adapters; `None` or empty: all.
    pub layers: Option<Vec<usize>>,
    /// Regular expressions for the name before the layer's number; empty: any name.
    pub layers_pattern: Vec<String>,
    /// Ranks by regular expression.
    pub rank_pattern: Vec<(String, usize)>,
    /// Alphas by regular expression.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Share of an adapter's inputs that is dropped in training.
    pub dropout: f64,
    /// Modules that are trained whole, by the ends of their names.
    pub modules_to_save: Vec<String>,
    /// Tokens whose rows of the embedding are trained.
    pub trainable_tokens: Vec<u32>,
    /// Whether a head that is the embedding stays it where the embedding is trained whole.
    pub keep_tied: bool,
    /// Whether folders get embedding and head even if they are frozen.
    pub save_tables: bool,
    /// Seed of initial values and dropout.
    pub seed: u64,
    /// What adapter folders say about themselves.
    pub metadata: AdapterMetadata,
}

/// What adapter folders say besides what an adapter computes, under PEFT's names.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct AdapterMetadata {
    /// Name or folder of the base model.
    pub base_model_name_or_path: Option<String>,
    /// Revision of the base model.
    pub revision: Option<String>,
    /// `CAUSAL_LM` for language models.
    pub task_type: Option<String>,
    /// True in every file that PEFT saves.
    pub inference_mode: bool,
    /// The PEFT version whose keys the file has.
    pub peft_version: Option<String>,
}

impl Default for AdapterMetadata {
    fn default() -> Self {
        Self {
            base_model_name_or_path: None,
            revision: None,
            task_type: Some("CAUSAL_LM".into()),
            inference_mode: true,
            peft_version: Some(crate::peft_config::PEFT_VERSION.into()),
        }
    }
}

impl AdapterConfig {
    /// `method` at rank `rank` and scaling `alpha / rank` on all linears.
    pub fn new(method: Method, rank: usize, alpha: f64) -> Self {
        Self {
            method,
            rank,
            alpha,
            rslora: false,
            targets: TargetModules::AllLinear,
            exclude: None,
            layers: None,
            layers_pattern: Vec::new(),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            dropout: 0.0,
            modules_to_save: Vec::new(),
            trainable_tokens: Vec::new(),
            keep_tied: false,
            save_tables: false,
            seed: 0,
            metadata: AdapterMetadata::default(),
        }
    }

    /// [LoRA](crate::Lora) of rank `rank` and scaling `alpha / rank` on all linears.
    pub fn lora(rank: usize, alpha: f64) -> Self {
        Self::new(Method::lora(), rank, alpha)
    }

    /// [DoRA](crate::Dora) of rank `rank` and scaling `alpha / rank` on all linears.
    pub fn dora(rank: usize, alpha: f64) -> Self {
        Self::new(Method::dora(), rank, alpha)
    }

    /// [QA-HiRA](QaHira), which has no rank, with scaling `scaling` on all linears.
    pub fn qa_hira(method: QaHira, scaling: f64) -> Self {
        Self::new(Method::QaHira(method), 1, scaling)
    }

    /// Sets `method`.
    #[must_use]
    pub fn with_method(mut self, method: Method) -> Self {
        self.method = method;
        self
    }

    /// Sets `targets`: names such as `["q_proj", "v_proj"]`, or a [`TargetModules`].
    #[must_use]
    pub fn with_targets(mut self, targets: impl Into<TargetModules>) -> Self {
        self.targets = targets.into();
        self
    }

    /// Sets `exclude`.
    #[must_use]
    pub fn with_exclude(mut self, exclude: impl Into<TargetModules>) -> Self {
        self.exclude = Some(exclude.into());
        self
    }

    /// Sets `layers`.
    #[must_use]
    pub fn with_layers(mut self, layers: impl Into<Vec<usize>>) -> Self {
        self.layers = Some(layers.into());
        self
    }

    /// Sets `rslora`: scaling alpha / √r.
    #[must_use]
    pub fn with_rslora(mut self) -> Self {
        self.rslora = true;
        self
    }

    /// Adds a rank for the modules whose name ends in a match of the regular expression `pattern`.
    #[must_use]
    pub fn with_rank_of(mut self, pattern: impl Into<String>, rank: usize) -> Self {
        self.rank_pattern.push((pattern.into(), rank));
        self
    }

    /// Adds an alpha for the modules whose name ends in a match of the regular expression `pattern`.
    #[must_use]
    pub fn with_alpha_of(mut self, pattern: impl Into<String>, alpha: f64) -> Self {
        self.alpha_pattern.push((pattern.into(), alpha));
        self
    }

    /// Sets `dropout`.
    #[must_use]
    pub fn with_dropout(mut self, dropout: f64) -> Self {
        self.dropout = dropout;
        self
    }

    /// Sets `modules_to_save`: embedding, head and norms that are trained whole, such as `["embed_tokens", "lm_head"]`.
    #[must_use]
    pub fn with_modules_to_save<S: Into<String>>(mut self, modules: impl IntoIterator<Item = S>) -> Self {
        self.modules_to_save = modules.into_iter().map(Into::into).collect();
        self
    }

    /// For a model with a score head, `kiln_models::Classifier`: that head is trained whole, and folders say `SEQ_CLS`, so that
    /// PEFT opens them as such.
    #[must_use]
    pub fn with_score_head(mut self) -> Self {
        self.modules_to_save.push("score".into());
        self.metadata.task_type = Some("SEQ_CLS".into());
        self
    }

    /// Sets `trainable_tokens`: only their rows of the embedding are trained, of a head that is the embedding too.
    #[must_use]
    pub fn with_trainable_tokens(mut self, ids: impl IntoIterator<Item = u32>) -> Self {
        self.trainable_tokens = ids.into_iter().collect();
        self
    }

    /// Sets `keep_tied`: a head that is the embedding stays it where the embedding is trained whole.
    #[must_use]
    pub fn with_keep_tied(mut self) -> Self {
        self.keep_tied = true;
        self
    }

    /// Sets `save_tables`: folders get embedding and head even if they are frozen.
    #[must_use]
    pub fn with_save_tables(mut self) -> Self {
        self.save_tables = true;
        self
    }

    /// Sets `seed`.
    #[must_use]
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Sets the name of the base model that adapter folders mention.
    #[must_use]
    pub fn with_base_model(mut self, name: impl Into<String>) -> Self {
        self.metadata.base_model_name_or_path = Some(name.into());
        self
    }

    /// What PEFT's keys say, QA-LoRA included.
    ///
    /// # Errors
    /// [`PeftConfig::supported`]'s and [`PeftConfig::validate`]'s, with PEFT's names.
    pub fn from_peft(config: &PeftConfig) -> Result<Self> {
        config.supported(crate::CONFIG_FILE.as_ref())?;
        config.validate()?;
        if let Some(parameter) = config.target_parameters.first() {
            let expected = "none: which slots they are a model says, `PeftFolder::attacher_for`";
            return Err(Problem::new("target_parameters", expected, format!("\"{parameter}\"")).argument());
        }
        Ok(config.adapter())
    }

    /// The configuration of a PEFT folder of such adapters, where PEFT knows the method: LoRA, DoRA, and QA-LoRA,
    /// whatever its pooling (saving converts the weights).
    ///
    /// # Errors
    /// Another method.
    pub fn to_peft(&self) -> Result<PeftConfig> {
        let mut config = self.peft_keys();
        match self.method {
            Method::Lora { .. } | Method::Dora { .. } => {}
            Method::QaLora(QaLora { pool, .. }) => {
                (config.use_qalora, config.qalora_group_size) = (true, pool);
            }
            other => {
                let expected = "lora, dora or qa-lora, which PEFT's folders can hold";
                return Err(Problem::new("method", expected, other.name()).argument());
            }
        }
        Ok(config)
    }

    /// Everything but the numbers of a method that pools, under PEFT's names.
    pub(crate) fn peft_keys(&self) -> PeftConfig {
        let mut config = PeftConfig::new(self.rank, self.alpha, self.targets.clone());
        config.base_model_name_or_path = self.metadata.base_model_name_or_path.clone();
        config.revision = self.metadata.revision.clone();
        config.task_type = self.metadata.task_type.clone();
        config.inference_mode = self.metadata.inference_mode;
        config.peft_version = self.metadata.peft_version.clone();
        config.lora_dropout = self.dropout;
        config.use_rslora = self.rslora;
        config.use_dora = matches!(self.method, Method::Dora { .. });
        config.init_lora_weights = self.method.init();
        config.exclude_modules = self.exclude.clone();
        config.layers_to_transform = self.layers.clone();
        config.layers_pattern = self.layers_pattern.clone();
        config.rank_pattern = self.rank_pattern.clone();
        config.alpha_pattern = self.alpha_pattern.clone();
        config.modules_to_save = self.modules_to_save.clone();
        config.trainable_token_indices = self.trainable_tokens.clone();
        config.ensure_weight_tying = self.keep_tied;
        config
    }

    /// Checks ranges and combinations.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) naming the first offending option.
    pub fn validate(&self) -> Result<()> {
        if let Some(problem) = self.problem() {
            return Err(problem.argument());
        }
        match self.method {
            Method::Dora { init } if init.changes_base() => {
                let expected = "an initialisation that leaves the base as it is, for DoRA";
                Err(Problem::new("init", expected, init).argument())
            }
            _ => Ok(()),
        }
    }

    /// The first option that is out of range.
    pub(crate) fn problem(&self) -> Option<Problem> {
        let ranks = self.rank_pattern.iter().map(|(pattern, r)| (format!("rank_pattern.{pattern}"), *r));
        for (name, r) in std::iter::once(("rank".to_owned(), self.rank)).chain(ranks) {
            if !(1..=MAX_RANK).contains(&r) {
                return Some(Problem::new(name, format!("a rank from 1 to {MAX_RANK}"), r));
            }
        }
        let alphas =
            self.alpha_pattern.iter().map(|(pattern, alpha)| (format!("alpha_pattern.{pattern}"), *alpha));
        for (name, alpha) in std::iter::once(("alpha".to_owned(), self.alpha)).chain(alphas) {
            if !alpha.is_finite() {
                return Some(Problem::new(name, "a finite number", alpha));
            }
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Some(Problem::new("dropout", "a number from 0 to below 1", self.dropout));
        }
        let layers = self.layers.is_some();
        if !matches!(self.targets, TargetModules::Names(_)) && (layers || !self.layers_pattern.is_empty()) {
            let key = if layers { "layers" } else { "layers_pattern" };
            return Some(Problem::new(key, "nothing, because the targets are no list of names", "a value"));
        }
        if !layers && !self.layers_pattern.is_empty() {
            return Some(Problem::new("layers", "a value, because layers_pattern has one", "nothing"));
        }
        let mut ids = self.trainable_tokens.clone();
        ids.sort_unstable();
        if let Some(twice) = ids.windows(2).find(|ids| ids[0] == ids[1]) {
            return Some(Problem::new("trainable_tokens", "distinct ids", format!("{} twice", twice[0])));
        }
        None
    }

    /// The modules among a model's that get adapters, whose sizes the method's divide.
    ///
    /// # Errors
    /// [`Targets::resolve`]'s, a size that doesn't divide, and adapters on embedding or head that aren't plain LoRA.
    pub(crate) fn select(&self, outline: &Outline) -> Result<Targets> {
        let tables = outline.tables.as_ref().map(TokenTables::shapes).into_iter().flatten();
        let all_linear = self.targets == TargetModules::AllLinear;
        let tables: Vec<_> = tables.filter(|_| !all_linear).collect();
        // Their sizes are not made to be divided, and there are no packed weights to merge into.
        let left_out = |path: &String| {
            let low_rank = matches!(self.method, Method::Lora { .. } | Method::Dora { .. });
            all_linear && !low_rank && outline.dense.contains(path)
        };
        let all = || outline.slots.iter().filter(|(path, _)| !left_out(path)).chain(&tables);
        let paths: Vec<&str> = all().map(|(path, _)| path.as_str()).collect();
        let targets = Targets::resolve(self, &paths, None)?;
        for target in &targets.adapted {
            let plain = matches!(self.method, Method::Lora { init } if !init.changes_base());
            if !plain && tables.iter().any(|(path, _)| *path == target.path) {
                let expected =
                    "LoRA with an initialisation that leaves the base as it is, on embedding and head";
                return Err(Problem::new("method", expected, self.method.name()).argument());
            }
            if let Some((path, shape)) = all().find(|(path, _)| *path == target.path) {
                let problem = self.method.problem(path, *shape, target.r);
                problem.map_or(Ok(()), |problem| Err(problem.argument()))?;
            }
        }
        Ok(targets)
    }

    /// The adapter that `target`, a layer of `shape`, gets.
    pub(crate) fn describe(&self, target: &Target, shape: [usize; 2]) -> Description {
        Description {
            geometry: self.method.geometry(shape, target.r),
            scaling: target.scaling,
            magnitudes: matches!(self.method, Method::Dora { .. }),
        }
    }
}

impl PeftConfig {
    /// What the keys say, whether or not they go together.
    pub(crate) fn adapter(&self) -> AdapterConfig {
        let init: InitLoraWeights = self.init_lora_weights;
        let method = match (self.use_qalora, self.use_dora) {
            (true, _) => {
                Method::QaLora(QaLora { pool: self.qalora_group_size, pooling: Pooling::AverageTimesGroups })
            }
            (false, true) => Method::Dora { init },
            (false, false) => Method::Lora { init },
        };
        AdapterConfig {
            method,
            rank: self.r,
            alpha: self.lora_alpha,
            rslora: self.use_rslora,
            targets: self.target_modules.clone(),
            exclude: self.exclude_modules.clone(),
            layers: self.layers_to_transform.clone(),
            layers_pattern: self.layers_pattern.clone(),
            rank_pattern: self.rank_pattern.clone(),
            alpha_pattern: self.alpha_pattern.clone(),
            dropout: self.lora_dropout,
            modules_to_save: self.modules_to_save.clone(),
            trainable_tokens: self.trainable_token_indices.clone(),
            keep_tied: self.ensure_weight_tying,
            save_tables: false,
            seed: 0,
            metadata: AdapterMetadata {
                base_model_name_or_path: self.base_model_name_or_path.clone(),
                revision: self.revision.clone(),
                task_type: self.task_type.clone(),
                inference_mode: self.inference_mode,
                peft_version: self.peft_version.clone(),
            },
        }
    }
}
