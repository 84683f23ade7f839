//! The pass over a model, block by block.

use std::{path::PathBuf, time::Instant};

use burn::tensor::{Device, Tensor};
use kiln_adapters::{Adapted, Lora, LoraAttacher};
use kiln_models::{CausalLm, Context, ScaleSites, ScaleSource, Slots, StoredWeight, TensorSource, TokenBatch};
use kiln_quant_core::{Projection, QuantLinear, Scheme};

use crate::{
    BlockReport, CalibrationConfig, CalibrationReport, Error, Observer, Progress, Result, awq,
    block::{Block, Place, pass, ratio, squares},
    checkpoint::{Folder, Norm, Resumed, fingerprint},
    clipping::transpose,
    station::{Slot, Station},
    stream::{Store, Stream},
    values::{Fingerprint, host, tensor},
};

/// What a calibration makes of a model: its slots hold packed weights and, where there are adapters, these.
pub type Calibrated<M> = <<M as Slots>::With<Station> as Slots>::With<Adapted<QuantLinear, Lora>>;

/// Calibrates a model block by block.
///
/// Two residual streams of all windows go through the model: the original one, and the one behind the blocks calibrated
/// so far, their adapters included. Each block is solved for its own inputs in both and then replaced.
///
/// The original weights are those in the model's slots, dense or packed (a GGUF file's, say), or, with
/// [`with_weights`](Self::with_weights), those of a checkpoint, read block by block: then the model needs its slots for
/// their shapes and biases only, and may be loaded at 2 bits.
///
/// # Memory
/// Beside the model: the dense weights of one block (ApiQ: about five times, with their gradients), and four streams of
/// `windows * length * width` values in f32 (five with ApiQ's second target; layer by layer two streams of one
/// projection's inputs and one of its outputs more). [`with_spill`](Self::with_spill) puts streams on disk.
///
/// # Example
/// ```no_run
/// use std::ops::ControlFlow;
/// use burn::tensor::Device;
/// use kiln_adapters::{AdapterConfig, LoraAttacher};
/// use kiln_calibration::{ApiqConfig, CalibrationConfig, Calibrator, Method, random_windows};
/// use kiln_models::{Checkpoint, LoadOptions, Slots};
/// use kiln_quant_core::Plan;
///
/// let checkpoint = Checkpoint::open("SmolLM2-135M-Instruct.Q4_1.gguf")?;
/// let (model, _) = checkpoint.load(&LoadOptions::default(), &Device::flex())?;
/// let ids = checkpoint.tokenizer()?.encode(&std::fs::read_to_string("text.txt")?, false)?;
/// let windows = random_windows(&ids, 512, 32, 2)?;
///
/// let attacher = LoraAttacher::new(&AdapterConfig::lora(16, 16.0), &model.slot_shapes())?;
/// let method = Method::ApiqBlock(ApiqConfig::default());
/// let config = CalibrationConfig::new(method, Plan::uniform("affine2:64".parse()?));
/// let (model, report) = Calibrator::new(&config, &windows)
///     .with_adapters(&attacher)
///     .run(model, &mut |_| ControlFlow::Continue(()))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Calibrator<'a> {
    config: &'a CalibrationConfig,
    windows: &'a [Vec<u32>],
    attacher: Option<&'a LoraAttacher>,
    weights: Option<&'a dyn TensorSource>,
    folder: Option<PathBuf>,
    spill: Option<PathBuf>,
}

impl<'a> Calibrator<'a> {
    /// For windows of equal length, see [`random_windows`](crate::random_windows).
    pub fn new(config: &'a CalibrationConfig, windows: &'a [Vec<u32>]) -> Self {
        Self { config, windows, attacher: None, weights: None, folder: None, spill: None }
    }

    /// Adapters for the slots that `attacher` selects.
    pub fn with_adapters(mut self, attacher: &'a LoraAttacher) -> Self {
        self.attacher = Some(attacher);
        self
    }

    /// Takes the original weights from `weights` rather than from the model's slots.
    pub fn with_weights(mut self, weights: &'a dyn TensorSource) -> Self {
        self.weights = Some(weights);
        self
    }

    /// Saves every finished block in `folder`, and goes on behind the last one found there. A resumed calibration gives
    /// the same bits as an uninterrupted one on the same device.
    pub fn with_folder(mut self, folder: impl Into<PathBuf>) -> Self {
        self.folder = Some(folder.into());
        self
    }

    /// Keeps streams in temporary files of `folder` rather than in memory.
    pub fn with_spill(mut self, folder: impl Into<PathBuf>) -> Self {
        self.spill = Some(folder.into());
        self
    }

    /// Calibrates `model`.
    ///
    /// # Errors
    /// [`Error::Argument`] for windows that don't fit the model, or options out of range; [`Error::NotFinite`] naming
    /// the projection whose weights or activations hold NaN or infinity; [`Error::Singular`]; [`Error::Diverged`];
    /// [`Error::Cancelled`]; [`Error::File`] for a folder of another run; whatever reading weights refuses.
    pub fn run<M>(&self, model: M, observer: Observer) -> Result<(Calibrated<M>, CalibrationReport)>
    where
        M: ScaleSites<Slot = QuantLinear>,
        M::With<Station>: ScaleSites<Slot = Station>,
    {
        self.config.check()?;
        if self.attacher.is_none()
            && (self.config.method.needs_adapters() || self.config.correction.is_some())
        {
            let expected = "adapters: the method or the correction starts them";
            return Err(Error::argument("Calibrator::with_adapters", expected, "none"));
        }
        for (path, _) in model.slot_shapes() {
            self.config.method.check_scheme(&path, self.config.schemes.get(&path))?;
        }
        let tokens = self.tokens(&model)?;
        let mut slots = Vec::new();
        let mut model = model.try_map(|path, slot| -> Result<Station> {
            let station = Station::new(Adapted { base: slot, adapter: None });
            slots.push((path.to_string(), station.clone()));
            Ok(station)
        })?;
        let report = self.calibrate(&mut model, &tokens, slots, observer)?;
        let model = model.try_map(|_, station| -> Result<Slot> { Ok(station.slot()) })?;
        Ok((model, report))
    }

    /// Checks the windows against the model.
    fn tokens<M: CausalLm>(&self, model: &M) -> Result<Vec<TokenBatch>> {
        let fail =
            |expected: String, found: String| Err(Error::argument("calibration windows", expected, found));
        let length = self.windows.first().map_or(0, Vec::len);
        if length == 0 || length > model.max_positions() {
            let expected = format!("at least one, of 1 to {} tokens", model.max_positions());
            return fail(expected, format!("{} of {length} tokens", self.windows.len()));
        }
        if let Some(window) = self.windows.iter().find(|window| window.len() != length) {
            return fail("windows of one length".into(), format!("{length} and {} tokens", window.len()));
        }
        let vocabulary = model.vocab_size();
        if let Some(id) = self.windows.iter().flatten().find(|id| **id as usize >= vocabulary) {
            return fail(format!("ids below {vocabulary}, the vocabulary"), id.to_string());
        }
        self.windows.iter().map(|window| Ok(TokenBatch::new(std::slice::from_ref(window))?)).collect()
    }

    fn calibrate<W: ScaleSites<Slot = Station>>(
        &self,
        model: &mut W,
        tokens: &[TokenBatch],
        slots: Vec<(String, Station)>,
        observer: Observer,
    ) -> Result<CalibrationReport> {
        let (device, total) = (model.device(), model.num_blocks());
        let context = model.context(&tokens[0], None);
        let store = self.spill.clone().map_or(Store::Memory, Store::Folder);
        let mut blocks = by_block(slots, total)?;
        let embedded = embed(model, tokens, &store)?;
        let folder = match &self.folder {
            Some(path) => Some(Folder::new(path, self.fingerprint(&embedded, &blocks, &device)?)?),
            None => None,
        };
        let mut report = CalibrationReport::default();
        let (windows, shape) = (embedded.len(), embedded.shape());
        let resumed = match &folder {
            Some(folder) => folder.resume(&store, windows, shape)?,
            None => None,
        };
        let Resumed { blocks: finished, streams: [mut x, mut quantized] } = match resumed {
            Some(resumed) => resumed,
            None => Resumed { blocks: 0, streams: [copy(&embedded, &store)?, embedded] },
        };
        for (index, slots) in blocks.drain(..).enumerate() {
            if index < finished {
                let folder = folder.as_ref().expect("only a folder holds finished blocks");
                report.blocks.push(self.restore(folder, model, index, slots)?);
                continue;
            }
            let start = Instant::now();
            let places = slots.into_iter().map(|(path, station)| self.place(path, station, &device));
            let mut places = places.collect::<Result<Vec<Place>>>()?;
            let mut originals: Vec<_> =
                places.iter().map(|place| (place.path.clone(), place.fingerprint())).collect();
            originals
                .extend(norms(model, index).into_iter().map(|norm| (norm.name, fingerprint(&norm.values))));
            let scalings = match &self.config.scaling {
                Some(awq) => awq::scale(awq, model, index, &mut places, &context, &x)?,
                None => Vec::new(),
            };
            let forward = |x: Tensor<2>| pass(model, index, &context, x);
            let mut block = Block {
                index,
                total,
                places,
                forward: &forward,
                device: device.clone(),
                store: store.clone(),
                x: &x,
                quantized: &quantized,
                observer: &mut *observer,
            };
            let Finished { streams, slots, report: mut found } = block.calibrate(self.config)?;
            found.scalings = scalings;
            found.seconds = start.elapsed().as_secs_f64();
            [x, quantized] = streams;
            if let Some(folder) = &folder {
                let norms = norms(model, index);
                folder.save(&slots, &norms, &originals, &found, [&x, &quantized])?;
            }
            tracing::info!(
                block = index,
                error = found.activation_error,
                seconds = found.seconds,
                "calibrated"
            );
            let ended = observer(Progress::Block { report: &found, total }).is_break();
            report.blocks.push(found);
            if ended && index + 1 < total {
                return Err(Error::Cancelled { blocks: index + 1, total });
            }
        }
        Ok(report)
    }

    /// A projection with its original weight.
    fn place(&self, path: String, station: Station, device: &Device) -> Result<Place> {
        let slot = station.slot();
        let shape @ [d_input, d_output] = slot.shape();
        let weight = match self.weights {
            None => transpose(&host(slot.base.weight()), d_input, d_output),
            Some(source) => {
                let (found, values) = match source.weight(&path)? {
                    StoredWeight::Dense(tensor) => (tensor.shape, tensor.values),
                    StoredWeight::Packed(packed) => {
                        (vec![packed.d_output, packed.d_input], packed.dequantize())
                    }
                };
                if found != [d_output, d_input] {
                    let expected = format!("a weight of shape [{d_output}, {d_input}]");
                    return Err(Error::argument(path, expected, format!("{found:?}")));
                }
                values
            }
        };
        if weight.iter().any(|value| !value.is_finite()) {
            return Err(Error::NotFinite { place: path, quantity: "the weight is".into() });
        }
        let adapter = match self.attacher {
            Some(attacher) => attacher.attach(&path, slot.base.clone())?.adapter,
            None => None,
        };
        let bias = match &slot.base {
            QuantLinear::Packed(linear) => linear.bias.clone(),
            QuantLinear::Dense(linear) => linear.bias.clone(),
        };
        let scheme = *self.config.schemes.get(&path);
        let mut place = Place { path, station, scheme, weight, shape, bias, adapter, kept: slot.base };
        if self.weights.is_some() && scheme == Scheme::Dense {
            place.kept = place.original(device).base;
        }
        Ok(place)
    }

    /// Puts a finished block back; returns its report.
    fn restore<W: ScaleSites>(
        &self,
        folder: &Folder,
        model: &mut W,
        index: usize,
        slots: Vec<(String, Station)>,
    ) -> Result<BlockReport> {
        let saved = folder.load(index)?;
        let device = &model.device();
        for Norm { name, values } in norms(model, index) {
            saved.check_original(&name, &fingerprint(&values))?;
            if let Some(parameter) = model.norm_parameter(&name) {
                let values = saved.norm(&name, values.len())?;
                *parameter = parameter.clone().map(|old| tensor(values, old.dims(), device));
            }
        }
        for (path, station) in slots {
            let mut place = self.place(path, station, device)?;
            saved.check_original(&place.path, &place.fingerprint())?;
            if let (Scheme::Packed(_), Some(bias)) = (place.scheme, place.bias.take()) {
                place.bias = Some(saved.bias(&place.path, bias)?);
            }
            let adapter = match place.adapter.clone() {
                Some(lora) => Some(saved.factors(&place.path, lora)?),
                None => None,
            };
            let slot = match place.scheme {
                Scheme::Packed(_) => place.packed(&saved.packed(&place.path, place.shape)?, adapter, device),
                Scheme::Dense => place.dense(),
            };
            place.station.set(slot);
        }
        Ok(saved.report)
    }

    /// Tells runs apart: options, windows, shapes, adapters, and the weights of embedding and first block. Those of a
    /// later block are compared when it is restored.
    fn fingerprint(
        &self,
        embedded: &Stream,
        blocks: &[Vec<(String, Station)>],
        device: &Device,
    ) -> Result<String> {
        let mut hash = Fingerprint::new();
        let config = serde_json::to_string(self.config).expect("options are numbers and names");
        hash.bytes(config.bytes());
        for window in 0..embedded.len() {
            hash.bytes(self.windows[window].iter().flat_map(|id| id.to_le_bytes()));
            hash.values(&embedded.get(window)?);
        }
        for (path, station) in blocks.iter().flatten() {
            let target = self.attacher.and_then(|attacher| attacher.targets().get(path));
            let target = target.map(|target| (target.r, target.scaling));
            hash.bytes(format!("{path} {:?} {target:?}\n", station.shape()).bytes());
        }
        for (path, station) in blocks.iter().take(1).flatten() {
            let place = self.place(path.clone(), station.clone(), device)?;
            hash.values(&place.weight);
            hash.values(&place.adapter.map(|lora| host(lora.lora_a.val())).unwrap_or_default());
        }
        Ok(hash.text())
    }
}

/// A block that is done.
struct Finished {
    /// The original stream behind the block, and the quantized one.
    streams: [Stream; 2],
    slots: Vec<(String, Slot)>,
    /// Without the time and what was scaled before.
    report: BlockReport,
}

impl Block<'_> {
    /// Solves, measures and replaces the block.
    fn calibrate(&mut self, config: &CalibrationConfig) -> Result<Finished> {
        self.install(&self.originals());
        let targets = self.pass_all(self.x)?;
        let solution = self.solve(config, &targets)?;
        let projections = self.measure(&solution.slots, &solution.seconds, config.measured_windows)?;
        self.install(&solution.slots);
        let quantized = self.pass_all(self.quantized)?;
        let (mut error, mut norm) = (0.0, 0.0);
        for window in 0..targets.len() {
            let (y, found) = (targets.get(window)?, quantized.get(window)?);
            error += squares(y.iter().zip(&found).map(|(a, b)| a - b));
            norm += squares(y.into_iter());
        }
        let report = BlockReport {
            index: self.index,
            activation_error: ratio(error, norm),
            losses: solution.losses,
            seconds: 0.0,
            scalings: Vec::new(),
            projections,
        };
        let paths = self.places.iter().map(|place| place.path.clone());
        let slots = paths.zip(solution.slots).collect();
        Ok(Finished { streams: [targets, quantized], slots, report })
    }
}

/// The parameters of the norms before the projections of a block, in host memory.
fn norms<W: ScaleSites>(model: &mut W, index: usize) -> Vec<Norm> {
    let names = model.scale_sites(index).into_iter().flat_map(|site| match site.source {
        ScaleSource::Norm(names) => names,
        ScaleSource::Projection(_) => Vec::new(),
    });
    let mut norms = Vec::new();
    for name in names {
        if let Some(parameter) = model.norm_parameter(&name) {
            norms.push(Norm { values: host(parameter.val()), name });
        }
    }
    norms
}

/// Slots by the block they belong to: the first number in their path.
fn by_block(slots: Vec<(String, Station)>, total: usize) -> Result<Vec<Vec<(String, Station)>>> {
    let mut blocks: Vec<Vec<(String, Station)>> = (0..total).map(|_| Vec::new()).collect();
    for (path, station) in slots {
        let index = path.split('.').find_map(|part| part.parse::<usize>().ok());
        match index.and_then(|index| blocks.get_mut(index)) {
            Some(block) => block.push((path, station)),
            None => {
                return Err(Error::argument(path, format!("the path of one of {total} blocks"), "another"));
            }
        }
    }
    Ok(blocks)
}

/// The residual stream before the first block.
fn embed<W: CausalLm>(model: &W, tokens: &[TokenBatch], store: &Store) -> Result<Stream> {
    let mut stream: Option<Stream> = None;
    for (window, tokens) in tokens.iter().enumerate() {
        let x = model.embed(&model.context(tokens, None));
        let [_, rows, width] = x.dims();
        let stream = match &mut stream {
            Some(stream) => stream,
            None => stream.insert(Stream::new(store, [rows, width])?),
        };
        let values = host(x);
        if !crate::block::finite(&values) {
            let quantity = format!("activations of window {window} are");
            return Err(Error::NotFinite { place: "embedding".into(), quantity });
        }
        stream.set(window, values)?;
    }
    stream.ok_or_else(|| Error::argument("calibration windows", "at least one", 0))
}

fn copy(stream: &Stream, store: &Store) -> Result<Stream> {
    let mut copy = Stream::new(store, stream.shape())?;
    for window in 0..stream.len() {
        copy.set(window, stream.get(window)?)?;
    }
    Ok(copy)
}

/// `‖X - X^q‖ / ‖X‖` of the residual stream after every block, over `windows`, for two models of the same shape: the
/// errors of a [`BlockReport`] for any text, held-out ones too.
///
/// # Errors
/// [`Error::Argument`] if the models differ in their number of blocks; whatever the windows' tokens refuse.
pub fn block_errors<A: CausalLm, B: CausalLm>(original: &A, found: &B, windows: &[Vec<u32>]) -> Result<Vec<f64>> {
    let total = original.num_blocks();
    if found.num_blocks() != total {
        return Err(Error::argument("blocks", total.to_string(), found.num_blocks()));
    }
    let mut sums = vec![[0.0; 2]; total];
    for window in windows {
        let tokens = TokenBatch::new(std::slice::from_ref(window))?;
        let contexts: [Context; 2] = [original.context(&tokens, None), found.context(&tokens, None)];
        let (mut x, mut quantized) = (original.embed(&contexts[0]), found.embed(&contexts[1]));
        for (index, sums) in sums.iter_mut().enumerate() {
            x = original.block(index, x, &contexts[0], None);
            quantized = found.block(index, quantized, &contexts[1], None);
            let (y, found) = (host(x.clone()), host(quantized.clone()));
            sums[0] += squares(y.iter().zip(&found).map(|(a, b)| a - b));
            sums[1] += squares(y.into_iter());
        }
    }
    Ok(sums.into_iter().map(|[error, norm]| ratio(error, norm)).collect())
}
