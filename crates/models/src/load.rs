//! From a checkpoint to a model, one tensor at a time: quantized as it is read.

use burn::{
    module::{Param, ParamId},
    nn::Linear,
    tensor::{DType, Device, Tensor, TensorData},
};
use half::{bf16, f16};
use kiln_quant_core::{
    Compute, DeviceLimits, HostQuantizer, MinMax, PackedLinear, PackedTensor, PackedWeight, Plan, QuantError,
    QuantLinear, QuantScheme, Scheme, StorageReport, StorageRow, TableUpdates, quantizers,
};

use crate::{
    Block, BlockPart, Checkpoint, Classifier, Decoder, Embedding, Error, Norm, PartShape, PerLayerInputs,
    Placement, Result,
    classifier::SCORE,
    config::ModelConfig,
    embedding::DenseEmbedding,
    families::NormKind,
    source::{DenseTensor, StoredWeight, TensorSource, transposed},
};

/// How to load a model.
///
/// | option | default | purpose |
/// | --- | --- | --- |
/// | `schemes` | as stored | what becomes of the blocks' linears |
/// | `tables` | as stored | what becomes of embedding and head, and of the embedding of Gemma 4's single blocks |
/// | `quantizer` | [`MinMax`] | makes the packed weights |
/// | `measure` | no | whether to measure the error of each quantized weight |
/// | `compute` | best of the device | what operands of products are rounded to |
/// | `progress` | none | called after each tensor, with its path |
/// | `verify` | true | whether tensors are compared with the hashes that Kiln's own folders hold: they are read twice, a second more for each gigabyte or so |
#[non_exhaustive]
pub struct LoadOptions<'a> {
    /// `None` keeps every linear of the blocks as stored. `Some` gives each its scheme, by path; weights that are stored
    /// packed are dequantized first.
    pub schemes: Option<Plan<Scheme>>,
    /// What becomes of token embeddings and head.
    pub tables: Tables,
    /// Makes the packed weights.
    pub quantizer: &'a dyn HostQuantizer,
    /// Whether to measure the error of each quantized weight.
    pub measure: bool,
    /// What operands of products are rounded to; `None` is what suits the device best, [`Compute::best`], and f32 for models of
    /// fewer than 128 channels, whose products take too small a part of the time for rounding to pay. With 16 bits, dense
    /// weights as stored stay in 16 bits too, where that loses nothing of them; training widens those that it trains.
    pub compute: Option<Compute>,
    /// Called after each tensor, with its path.
    pub progress: Option<&'a dyn Fn(&str)>,
    /// Whether tensors are compared with the hashes that Kiln's own folders hold.
    pub verify: bool,
}

/// Channels below which products take no less time when their operands are rounded.
const NARROW: usize = 128;

/// What becomes of token embeddings and head.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Tables {
    /// Packed where the file is, else dense.
    #[default]
    AsStored,
    /// Dense, as full fine-tuning needs them.
    Dense,
    /// Packed as they are read, by [`LoadOptions::quantizer`]; what is stored packed is dequantized first. A look-up unpacks the
    /// rows that it needs.
    Packed(QuantScheme),
}

impl Default for LoadOptions<'_> {
    fn default() -> Self {
        Self {
            schemes: None,
            tables: Tables::AsStored,
            quantizer: &MinMax,
            measure: false,
            compute: None,
            progress: None,
            verify: true,
        }
    }
}

impl<'a> LoadOptions<'a> {
    /// One scheme for all linears of the blocks; with [`Scheme::Dense`] everything is dense.
    pub fn uniform(scheme: Scheme) -> Self {
        let tables = if scheme == Scheme::Dense { Tables::Dense } else { Tables::AsStored };
        Self { tables, ..Self::planned(Plan::uniform(scheme)) }
    }

    /// A scheme for each linear of the blocks.
    pub fn planned(schemes: Plan<Scheme>) -> Self {
        Self { schemes: Some(schemes), ..Self::default() }
    }

    /// Sets `tables`.
    #[must_use]
    pub fn with_tables(mut self, tables: Tables) -> Self {
        self.tables = tables;
        self
    }

    /// Sets `quantizer`.
    #[must_use]
    pub fn with_quantizer(mut self, quantizer: &'a dyn HostQuantizer) -> Self {
        self.quantizer = quantizer;
        self
    }

    /// Sets `measure`.
    #[must_use]
    pub fn with_measure(mut self, measure: bool) -> Self {
        self.measure = measure;
        self
    }

    /// Sets `compute`.
    #[must_use]
    pub fn with_compute(mut self, compute: Option<Compute>) -> Self {
        self.compute = compute;
        self
    }

    /// Sets `compute` to [`Compute::F32`]: operands of products are not rounded, whatever the device multiplies.
    #[must_use]
    pub fn in_f32(self) -> Self {
        self.with_compute(Some(Compute::F32))
    }

    /// Sets `verify`.
    #[must_use]
    pub fn with_verify(mut self, verify: bool) -> Self {
        self.verify = verify;
        self
    }

    /// Sets `progress`.
    #[must_use]
    pub fn with_progress(mut self, progress: &'a dyn Fn(&str)) -> Self {
        self.progress = Some(progress);
        self
    }
}

impl std::fmt::Debug for LoadOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LoadOptions")
            .field("schemes", &self.schemes)
            .field("tables", &self.tables)
            .field("measure", &self.measure)
            .field("compute", &self.compute)
            .finish_non_exhaustive()
    }
}

/// What was loaded.
#[derive(Debug, Clone, Default)]
pub struct LoadReport {
    /// Bytes by tensor.
    pub storage: StorageReport,
    /// Errors of the weights quantized on the way, by path, if asked for.
    pub errors: Vec<(String, QuantError)>,
    /// Unknown configuration keys, tensors that the model doesn't use, guesses.
    pub notes: Vec<String>,
}

impl Checkpoint {
    /// Loads the model. Peak memory is the loaded model and one dense tensor, not the dense model.
    ///
    /// On a GPU packed weights lie outside the pools of the memory that comes and goes: once a model is dropped, models of the
    /// same sizes go there, or [`Device::memory_cleanup`] gives it back.
    ///
    /// All parameters are frozen; make the ones to be trained require gradients
    /// ([`Module::unfreeze`](burn::module::Module::unfreeze) for all of a dense model).
    ///
    /// # Errors
    /// A missing tensor, a shape that contradicts the configuration, weights that are not finite, or whatever the file
    /// refuses.
    ///
    /// # Example
    /// ```no_run
    /// use burn::tensor::Device;
    /// use kiln_models::{Checkpoint, LoadOptions};
    /// let checkpoint = Checkpoint::open("SmolLM2-135M-Instruct.Q4_1.gguf")?;
    /// let (model, report) = checkpoint.load(&LoadOptions::default(), &Device::flex())?;
    /// println!("{}", report.storage);
    /// # Ok::<(), kiln_models::Error>(())
    /// ```
    pub fn load(&self, options: &LoadOptions, device: &Device) -> Result<(Decoder<QuantLinear>, LoadReport)> {
        self.load_placed(options, &Placement::on_one(device, self.config().num_hidden_layers))
    }

    /// What operands of products will be rounded to.
    pub(crate) fn compute_on(&self, options: &LoadOptions, devices: &[Device]) -> Compute {
        let best = devices.iter().map(Compute::best);
        match options.compute {
            Some(compute) => compute,
            None if self.config().hidden_size < NARROW => Compute::F32,
            // One for the whole model, which all of its devices like best.
            None => best.reduce(|a, b| if a == b { a } else { Compute::F32 }).unwrap_or(Compute::F32),
        }
    }

    /// As [`load`](Self::load), each part onto its device.
    ///
    /// # Errors
    /// As [`load`](Self::load), a placement that has another number of blocks or parts the two uses of one matrix, and a
    /// `compute` that one of the devices doesn't multiply.
    pub fn load_placed(
        &self,
        options: &LoadOptions,
        placement: &Placement,
    ) -> Result<(Decoder<QuantLinear>, LoadReport)> {
        if let Some(class) = self.classifier() {
            return Err(
                self.other_class(class, "a class of language models here; load_classifier loads this one")
            );
        }
        let mut loader = self.loader(options, placement)?;
        let model = loader.decoder(self.config(), placement)?;
        loader.note_unused();
        Ok((model, loader.report))
    }

    /// As [`load`](Self::load), a model for sequence classification with the score head that its folder holds, frozen like the
    /// rest: transformers' `…ForSequenceClassification`, reward models among them.
    ///
    /// # Errors
    /// As [`load`](Self::load), and a folder of another class.
    ///
    /// # Example
    /// ```no_run
    /// use burn::tensor::Device;
    /// use kiln_models::{Checkpoint, LoadOptions, TokenBatch};
    /// let checkpoint = Checkpoint::open("Skywork-Reward-V2-Qwen3-0.6B")?;
    /// let (model, _) = checkpoint.load_classifier(&LoadOptions::default(), &Device::flex())?;
    /// let ids = checkpoint.tokenizer()?.encode("The answer is 4.", true)?;
    /// println!("{}", model.scores(&TokenBatch::new(&[ids])?)?);
    /// # Ok::<(), kiln_models::Error>(())
    /// ```
    pub fn load_classifier(
        &self,
        options: &LoadOptions,
        device: &Device,
    ) -> Result<(Classifier<Decoder<QuantLinear>>, LoadReport)> {
        if self.classifier().is_none() {
            let class = self.config().family.architecture;
            return Err(self.other_class(class, "a class for sequence classification; load loads this one"));
        }
        let placement = Placement::on_one(device, self.config().num_hidden_layers);
        let mut loader = self.loader(options, &placement)?;
        let model = loader.decoder(self.config(), &placement)?;
        let ModelConfig { hidden_size, embedding_width, .. } = self.config();
        let score = loader.score(embedding_width.unwrap_or(*hidden_size))?;
        loader.note_unused();
        Ok((Classifier { model, score }, loader.report))
    }

    fn other_class(&self, class: &str, supported: &str) -> Error {
        Error::Unsupported {
            path: self.path().join("config.json"),
            field: "architectures".into(),
            found: class.into(),
            supported: supported.into(),
        }
    }

    fn loader<'a>(&'a self, options: &'a LoadOptions<'a>, placement: &Placement) -> Result<Loader<'a>> {
        placement.check(self.config())?;
        let devices = placement.devices();
        let compute = self.compute_on(options, &devices);
        for device in &devices {
            compute.check(device)?;
        }
        if options.verify {
            self.verify()?;
        }
        Ok(Loader {
            checkpoint: self,
            compute,
            source: self.source(),
            options,
            limits: DeviceLimits::of(placement.embedding()),
            device: placement.embedding().clone(),
            report: LoadReport { notes: self.notes(), ..LoadReport::default() },
            used: Vec::new(),
        })
    }
}

struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    compute: Compute,
    source: &'a dyn TensorSource,
    options: &'a LoadOptions<'a>,
    limits: DeviceLimits,
    device: Device,
    report: LoadReport,
    used: Vec<String>,
}

impl Loader<'_> {
    /// What is read from now on goes there.
    fn move_to(&mut self, device: &Device) {
        if self.device != *device {
            (self.device, self.limits) = (device.clone(), DeviceLimits::of(device));
        }
    }

    fn decoder(&mut self, config: &ModelConfig, placement: &Placement) -> Result<Decoder<QuantLinear>> {
        let (names, width) = (&config.family.names, config.hidden_size);
        let embedding_width = config.embedding_width.unwrap_or(width);
        let embed_tokens = self.embedding(names.embedding, config.vocab_size, embedding_width)?;
        let narrower = names.projections.zip(config.embedding_width);
        let to = narrower.map(|([to, _], narrow)| self.plain_matrix(to, [width, narrow])).transpose()?;
        let embed_positions = names.positions.map(|learned| {
            let shape = [config.max_position_embeddings + learned.offset, width];
            let name = format!("{}.weight", learned.path);
            let table = self.dense(&name, &shape)?;
            Ok::<_, Error>(frozen(self.tensor(&name, table.values, shape)?))
        });
        let embed_positions = embed_positions.transpose()?;
        let embed_norm = names.embedding_norm.map(|path| self.norm(path, width, config)).transpose()?;
        let per_layer = config.per_layer_input.zip(names.per_layer).map(|(inputs, paths)| {
            let values = inputs.width * config.num_hidden_layers;
            Ok::<_, Error>(PerLayerInputs {
                table: self.embedding(paths.embedding, inputs.vocab_size, values)?,
                projection: self.plain_matrix(paths.projection, [values, width])?,
                norm: self.norm(paths.norm, inputs.width, config)?,
            })
        });
        let per_layer = per_layer.transpose()?;
        let blocks = (0..config.num_hidden_layers).map(|index| {
            self.move_to(placement.block(index));
            Block::build(config, index, |name, shape| {
                let path = config.family.path(index, name);
                match shape {
                    PartShape::Norm(width) => self.norm(&path, width, config).map(BlockPart::Norm),
                    PartShape::Linear(shape, bias) => self.linear(&path, shape, bias).map(BlockPart::Linear),
                    PartShape::DenseLinear(shape) => self.dense_linear(&path, shape).map(BlockPart::Linear),
                    PartShape::Vector(length, role) => {
                        let values = self.dense(&path, &config.vector_shape(role, index))?.values;
                        Ok(BlockPart::Vector(frozen(self.tensor(&path, values, [length])?)))
                    }
                }
            })
        });
        let blocks = blocks.collect::<Result<Vec<_>>>()?;
        self.move_to(placement.head());
        let final_norm = match config.has_final_norm {
            true => self.norm(names.final_norm, width, config)?,
            false => Norm::identity(),
        };
        let from =
            narrower.map(|([_, from], narrow)| self.plain_matrix(from, [narrow, width])).transpose()?;
        let lm_head = self.head(names.head, config)?;
        let placement = (placement.devices().len() > 1).then(|| placement.clone());
        let decoder = Decoder {
            embed_tokens,
            embed_positions,
            embed_norm,
            projections: to.zip(from).map(|(to, from)| [to, from]),
            per_layer,
            blocks,
            final_norm,
            lm_head,
            updates: TableUpdates::default(),
            config: config.clone(),
            compute: Compute::F32,
            placement,
        };
        decoder.with_compute(self.compute)
    }

    /// The score head of a classifier of this width; how many labels there are its own header says.
    fn score(&mut self, width: usize) -> Result<Linear> {
        let name = format!("{SCORE}.weight");
        let labels = self.source.describe(&name)?.shape.and_then(|shape| shape.first().copied());
        let shape = [labels.unwrap_or(0).max(1), width];
        let values = transposed(&self.dense(&name, &shape)?.values, shape[0], shape[1]);
        Ok(Linear { weight: frozen(self.tensor(&name, values, [shape[1], shape[0]])?), bias: None })
    }

    /// A matrix that is neither slot nor table.
    fn plain_matrix(&mut self, path: &str, shape: [usize; 2]) -> Result<Param<Tensor<2>>> {
        let name = format!("{path}.weight");
        let values = self.dense(&name, &shape)?.values;
        Ok(frozen(self.tensor(&name, values, shape)?))
    }

    /// A linear without a bias that no plan quantizes.
    fn dense_linear(&mut self, path: &str, shape: [usize; 2]) -> Result<QuantLinear> {
        let [d_input, d_output] = shape;
        let name = format!("{path}.weight");
        let values = transposed(&self.dense(&name, &[d_output, d_input])?.values, d_output, d_input);
        let weight = frozen(self.tensor(&name, values, shape)?);
        Ok(QuantLinear::Dense(Linear { weight, bias: None }))
    }

    fn embedding(&mut self, path: &str, rows: usize, width: usize) -> Result<Embedding> {
        let stored = self.stored(path, [width, rows])?;
        let packed = match (stored, self.options.tables) {
            (StoredWeight::Packed(weight), Tables::AsStored) => weight,
            (stored, Tables::Packed(scheme)) => self.quantized(path, stored, [width, rows], &scheme)?,
            (stored, _) => {
                let weight = frozen(self.matrix(path, dense(stored).values, [rows, width])?);
                return Ok(Embedding::Dense(DenseEmbedding { weight }));
            }
        };
        self.record(path, Scheme::Packed(packed.scheme), &[width, rows], None);
        Ok(Embedding::Packed(self.packed(path, &packed)?))
    }

    fn head(&mut self, path: &str, config: &ModelConfig) -> Result<Option<QuantLinear>> {
        if config.tie_word_embeddings {
            // Some writers store the tied matrix twice.
            self.used.push(format!("{path}.weight"));
            return Ok(None);
        }
        let shape = [config.embedding_width.unwrap_or(config.hidden_size), config.vocab_size];
        let bias = self.bias(path, shape[1], config.biases.head)?;
        let stored = self.stored(path, shape)?;
        Ok(Some(match (stored, self.options.tables) {
            (StoredWeight::Packed(weight), Tables::AsStored) => {
                let scheme = Scheme::Packed(weight.scheme);
                self.place(path, StoredWeight::Packed(weight), scheme, shape, bias, true)?
            }
            (stored, Tables::Packed(scheme)) => {
                self.place(path, stored, Scheme::Packed(scheme), shape, bias, false)?
            }
            (stored, _) => {
                let values = transposed(&dense(stored).values, shape[1], shape[0]);
                let weight = frozen(self.matrix(path, values, shape)?);
                QuantLinear::Dense(Linear { weight, bias })
            }
        }))
    }

    fn linear(&mut self, path: &str, shape: [usize; 2], bias: bool) -> Result<QuantLinear> {
        let bias = self.bias(path, shape[1], bias)?;
        let stored = self.stored(path, shape)?;
        let scheme = match (&self.options.schemes, &stored) {
            (Some(plan), _) => *plan.get(path),
            (None, StoredWeight::Packed(weight)) => Scheme::Packed(weight.scheme),
            (None, StoredWeight::Dense(_)) => Scheme::Dense,
        };
        self.place(path, stored, scheme, shape, bias, self.options.schemes.is_none())
    }

    fn bias(&mut self, path: &str, d_output: usize, there: bool) -> Result<Option<Param<Tensor<1>>>> {
        if !there {
            return Ok(None);
        }
        let name = format!("{path}.bias");
        let bias = self.dense(&name, &[d_output])?;
        Ok(Some(frozen(self.tensor(&name, bias.values, [d_output])?)))
    }

    /// Brings a stored weight to `scheme` and onto the device; `as_stored` leaves it as it is.
    fn place(
        &mut self,
        path: &str,
        stored: StoredWeight,
        scheme: Scheme,
        [d_input, d_output]: [usize; 2],
        bias: Option<Param<Tensor<1>>>,
        as_stored: bool,
    ) -> Result<QuantLinear> {
        let packed = match (stored, scheme) {
            (StoredWeight::Packed(weight), Scheme::Packed(_)) if as_stored => weight,
            (stored, Scheme::Packed(scheme)) => self.quantized(path, stored, [d_input, d_output], &scheme)?,
            (stored, Scheme::Dense) => {
                let values = transposed(&dense(stored).values, d_output, d_input);
                // A plan's dense layers are f32, as the search that made it counts them.
                let weight = if as_stored {
                    self.matrix(path, values, [d_input, d_output])?
                } else {
                    self.record(path, scheme, &[d_input, d_output], None);
                    self.tensor(path, values, [d_input, d_output])?
                };
                return Ok(QuantLinear::Dense(Linear { weight: frozen(weight), bias }));
            }
        };
        self.record(path, scheme, &[d_input, d_output], packed.input_order.as_ref());
        Ok(QuantLinear::Packed(PackedLinear { weight: self.packed(path, &packed)?, bias }))
    }

    fn quantized(
        &mut self,
        path: &str,
        stored: StoredWeight,
        [d_input, d_output]: [usize; 2],
        scheme: &QuantScheme,
    ) -> Result<PackedWeight> {
        let values = dense(stored).values;
        let packed = self.options.quantizer.quantize(path, &values, d_input, d_output, scheme)?;
        if self.options.measure {
            self.report.errors.push((path.to_string(), quantizers::error(&values, &packed)));
        }
        Ok(packed)
    }

    fn norm(&mut self, path: &str, width: usize, config: &ModelConfig) -> Result<Norm> {
        let kind = config.family.norm;
        let mut part = |name: &str, there: bool| -> Result<Option<Param<Tensor<1>>>> {
            if !(there && config.norm_affine) {
                return Ok(None);
            }
            let name = format!("{path}.{name}");
            let values = self.dense(&name, &[width])?.values;
            Ok(Some(frozen(self.tensor(&name, values, [width])?)))
        };
        let (weight, bias) = (part("weight", true)?, part("bias", kind == NormKind::Layer)?);
        Ok(Norm { weight, bias, eps: config.norm_eps, kind })
    }

    /// The weight of a module as the file holds it, its shape checked.
    fn stored(&mut self, path: &str, [d_input, d_output]: [usize; 2]) -> Result<StoredWeight> {
        self.check_header(&format!("{path}.weight"), &[d_output, d_input])?;
        let stored = self.source.weight(path)?;
        let found = match &stored {
            StoredWeight::Dense(tensor) => tensor.shape.clone(),
            StoredWeight::Packed(PackedWeight { d_input, d_output, .. }) => vec![*d_output, *d_input],
        };
        self.check_shape(&format!("{path}.weight"), &[d_output, d_input], &found)?;
        self.used.push(format!("{path}.weight"));
        Ok(stored)
    }

    /// A dense tensor, its shape checked.
    fn dense(&mut self, name: &str, shape: &[usize]) -> Result<DenseTensor> {
        self.check_header(name, shape)?;
        let tensor = self.source.dense(name)?;
        self.check_shape(name, shape, &tensor.shape)?;
        self.used.push(name.to_string());
        self.record(name, Scheme::Dense, shape, None);
        Ok(tensor)
    }

    /// Before anything is read: the shape, where the header has it, and that no more is stored than such a tensor can take.
    fn check_header(&self, name: &str, expected: &[usize]) -> Result<()> {
        /// Bytes that any format takes for a value, and beside them.
        const MOST: [u64; 2] = [8, 1 << 16];
        let described = self.source.describe(name)?;
        if let Some(shape) = described.shape {
            self.check_shape(name, expected, &shape)?;
        }
        let values = expected.iter().fold(1u64, |count, size| count.saturating_mul(*size as u64));
        let most = values.saturating_mul(MOST[0]).saturating_add(MOST[1]);
        match described.bytes <= most {
            true => Ok(()),
            false => Err(Error::File {
                path: self.checkpoint.path().to_path_buf(),
                field: name.into(),
                expected: format!("at most {most} bytes, as the configuration's {expected:?} may take"),
                found: format!("{} bytes", described.bytes),
            }),
        }
    }

    fn check_shape(&self, name: &str, expected: &[usize], found: &[usize]) -> Result<()> {
        if expected == found {
            return Ok(());
        }
        Err(Error::File {
            path: self.checkpoint.path().to_path_buf(),
            field: name.into(),
            expected: format!("shape {expected:?}, as the configuration says"),
            found: format!("{found:?}"),
        })
    }

    fn tensor<const D: usize>(&self, name: &str, values: Vec<f32>, shape: [usize; D]) -> Result<Tensor<D>> {
        self.check_size(name, 4 * values.len())?;
        Ok(Tensor::from_data(TensorData::new(values, shape), &self.device))
    }

    /// A dense weight: in 16 bits where that loses nothing of it and the device multiplies that type, unless all of the
    /// model was asked for dense, to be trained.
    fn matrix(&mut self, path: &str, values: Vec<f32>, shape: [usize; 2]) -> Result<Tensor<2>> {
        let frozen = self.options.tables != Tables::Dense;
        let dtype = match self.compute {
            Compute::Bf16 if frozen && values.iter().all(|x| bf16::from_f32(*x).to_f32() == *x) => {
                DType::BF16
            }
            Compute::F16 if frozen && values.iter().all(|x| f16::from_f32(*x).to_f32() == *x) => DType::F16,
            _ => DType::F32,
        };
        let bytes = dtype.size() * values.len();
        self.check_size(path, bytes)?;
        self.record_bytes(path, Scheme::Dense, &shape, bytes);
        let data = TensorData::new(values, shape).convert_dtype(dtype);
        Ok(Tensor::from_data(data, (&self.device, dtype)))
    }

    /// Asks before the device is asked, which would fail later and elsewhere.
    fn check_size(&self, name: &str, bytes: usize) -> Result<()> {
        match self.limits.largest_tensor {
            Some(largest) if bytes as u64 > largest => Err(Error::File {
                path: self.checkpoint.path().to_path_buf(),
                field: name.into(),
                expected: format!(
                    "at most {:.2} GB, the largest tensor of {}; packed it would be smaller",
                    largest as f64 / 1e9,
                    self.limits.name
                ),
                found: format!("{:.2} GB", bytes as f64 / 1e9),
            }),
            _ => Ok(()),
        }
    }

    fn packed(&self, path: &str, weight: &PackedWeight) -> Result<PackedTensor> {
        self.check_size(path, 4 * weight.codes.len())?;
        // In memory of its own size: the pages of the device's pools are for what comes and goes, as dense weights do that are
        // trained, packed or merged.
        let device = &self.device;
        Ok(device.memory_persistent_allocations(weight, |weight| PackedTensor::new(weight, device)))
    }

    fn record(&mut self, path: &str, scheme: Scheme, shape: &[usize], order: Option<&Vec<u32>>) {
        let bytes = match scheme {
            Scheme::Dense => 4 * shape.iter().product::<usize>(),
            Scheme::Packed(scheme) => {
                scheme.storage_bytes(shape[0], shape[1]) + order.map_or(0, |o| 4 * o.len())
            }
        };
        self.record_bytes(path, scheme, shape, bytes);
    }

    fn record_bytes(&mut self, path: &str, scheme: Scheme, shape: &[usize], bytes: usize) {
        self.report.storage.rows.push(StorageRow { path: path.into(), scheme, shape: shape.to_vec(), bytes });
        if let Some(progress) = self.options.progress {
            progress(path);
        }
    }

    fn note_unused(&mut self) {
        for name in self.source.names() {
            // Rotary tables that old checkpoints store are derived from the configuration.
            if !self.used.contains(&name) && !name.ends_with("rotary_emb.inv_freq") {
                self.report.notes.push(format!("tensor {name} is not used by the model"));
            }
        }
    }
}

fn frozen<const D: usize>(tensor: Tensor<D>) -> Param<Tensor<D>> {
    // `Param::from_tensor` would ask for gradients.
    Param::initialized(ParamId::new(), tensor)
}

/// `[d_output, d_input]`, dequantized if need be.
fn dense(stored: StoredWeight) -> DenseTensor {
    match stored {
        StoredWeight::Dense(tensor) => tensor,
        StoredWeight::Packed(weight) => {
            DenseTensor { shape: vec![weight.d_output, weight.d_input], values: weight.dequantize() }
        }
    }
}
