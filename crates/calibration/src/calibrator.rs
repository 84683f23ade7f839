//! What calibrates a model: options, text, where it is kept.

use std::{fmt, ops::ControlFlow, path::PathBuf};

use kiln_adapters::{Adapted, LoraAttacher};
use kiln_distributed::Sharing;
use kiln_models::{Probe, ScaleSites, Slots, Tape, TensorSource, Windows};
use kiln_quant_core::QuantLinear;

use crate::{
    CalibrationConfig, CalibrationReport, Error, Observer, Result,
    station::{Slot, Station},
};

/// What a calibration makes of a model: its slots hold packed weights and, where there are adapters, these.
pub type Calibrated<M> = <M as Slots>::With<Slot>;

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
/// use burn::tensor::Device;
/// use kiln_adapters::{AdapterConfig, LoraAttacher};
/// use kiln_calibration::{ApiqConfig, CalibrationConfig, Calibrator, Method};
/// use kiln_models::{Checkpoint, LoadOptions, Slots, Windows};
/// use kiln_quant_core::Plan;
///
/// let checkpoint = Checkpoint::open("SmolLM2-135M-Instruct.Q4_1.gguf")?;
/// let (model, _) = checkpoint.load(&LoadOptions::default(), &Device::flex())?;
/// let ids = checkpoint.tokenizer()?.encode(&std::fs::read_to_string("text.txt")?, false)?;
/// let windows = Windows::random(&ids, 512, 32, 2)?;
///
/// let attacher = LoraAttacher::new(&AdapterConfig::lora(16, 16.0), &model.slot_shapes())?;
/// let method = Method::ApiqBlock(ApiqConfig::default());
/// let config = CalibrationConfig::new(method, Plan::uniform("affine2:64".parse()?));
/// let (model, report) = Calibrator::new(&config, &windows)
///     .with_adapters(&attacher)
///     .run(model)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Calibrator<'a> {
    pub(crate) config: &'a CalibrationConfig,
    pub(crate) windows: &'a Windows,
    pub(crate) attacher: Option<&'a LoraAttacher>,
    pub(crate) weights: Option<&'a dyn TensorSource>,
    pub(crate) folder: Option<PathBuf>,
    pub(crate) spill: Option<PathBuf>,
    pub(crate) sharing: Sharing,
}

impl fmt::Debug for Calibrator<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Calibrator")
            .field("config", self.config)
            .field("folder", &self.folder)
            .field("spill", &self.spill)
            .finish_non_exhaustive()
    }
}

impl<'a> Calibrator<'a> {
    /// By `config`, on the text in `windows`.
    pub fn new(config: &'a CalibrationConfig, windows: &'a Windows) -> Self {
        let sharing = Sharing::default();
        Self { config, windows, attacher: None, weights: None, folder: None, spill: None, sharing }
    }

    /// Adapters for the slots that `attacher` selects.
    #[must_use]
    pub fn with_adapters(mut self, attacher: &'a LoraAttacher) -> Self {
        self.attacher = Some(attacher);
        self
    }

    /// Takes the original weights from `weights` rather than from the model's slots.
    #[must_use]
    pub fn with_weights(mut self, weights: &'a dyn TensorSource) -> Self {
        self.weights = Some(weights);
        self
    }

    /// Saves every finished block in `folder`, and goes on behind the last one found there. A resumed calibration gives
    /// the same bits as an uninterrupted one on the same device.
    #[must_use]
    pub fn with_folder(mut self, folder: impl Into<PathBuf>) -> Self {
        self.folder = Some(folder.into());
        self
    }

    /// Keeps streams in temporary files of `folder` rather than in memory.
    #[must_use]
    pub fn with_spill(mut self, folder: impl Into<PathBuf>) -> Self {
        self.spill = Some(folder.into());
        self
    }

    /// Shares the windows, and the projections that can be solved at the same time, with other ranks, which run the same
    /// program: each keeps the streams of its own windows, and all end up with the same model. Statistics are sums in
    /// [`Sharing::parts`] parts, on which the last bits depend; not on how many ranks there are. A rank holds at most one
    /// such sum of a projection for each power of two of its parts, and one more.
    ///
    /// The folder is rank 0's. Every rank's observer hears of what is done there, and may end the run for all.
    #[must_use]
    pub fn with_sharing(mut self, sharing: Sharing) -> Self {
        self.sharing = sharing;
        self
    }

    /// Calibrates `model`.
    ///
    /// # Errors
    /// [`Error::Argument`] for several ranks and a method that learns from one window after another (ApiQ, clipping);
    /// [`Error::Ranks`] for ranks that have other options, windows or models, or one that failed;
    /// [`Error::Model`] for windows that don't fit the model; [`Error::Argument`] for options out of range;
    /// [`Error::NotFinite`] naming the projection whose weights or activations hold NaN or infinity;
    /// [`Error::Singular`]; [`Error::Diverged`]; [`Error::File`] for a folder of another run; whatever reading weights
    /// refuses.
    pub fn run<M>(&self, model: M) -> Result<(Calibrated<M>, CalibrationReport)>
    where
        M: ScaleSites<Slot = QuantLinear>,
        M::With<Probe<Station>>: ScaleSites<Slot = Probe<Station>> + Slots<With<Slot> = M::With<Slot>>,
    {
        self.run_with(model, &mut |_| ControlFlow::Continue(()))
    }

    /// As [`run`](Self::run), with a callback that may end it.
    ///
    /// # Errors
    /// As [`run`](Self::run), and [`Error::Cancelled`].
    pub fn run_with<M>(&self, model: M, observer: Observer) -> Result<(Calibrated<M>, CalibrationReport)>
    where
        M: ScaleSites<Slot = QuantLinear>,
        M::With<Probe<Station>>: ScaleSites<Slot = Probe<Station>> + Slots<With<Slot> = M::With<Slot>>,
    {
        self.config.check()?;
        model.check_one_device("calibration")?;
        if self.attacher.is_none()
            && (self.config.method.needs_adapters() || self.config.correction.is_some())
        {
            let expected = "adapters: the method or the correction starts them";
            return Err(Error::argument("Calibrator::with_adapters", expected, "none"));
        }
        let dense = model.dense_slots();
        for (path, _) in model.slot_shapes().into_iter().filter(|(path, _)| !dense.contains(path)) {
            self.config.method.check_scheme(&path, self.config.schemes.get(&path))?;
        }
        if self.sharing.ranks().size() > 1 && self.config.method.learns_by_windows() {
            let expected = "one rank, for a method that learns from one window after another";
            let found = format!("{} ranks", self.sharing.ranks().size());
            return Err(Error::argument("Calibrator::with_sharing", expected, found));
        }
        self.windows.check(&model)?;
        let (tape, mut slots) = (Tape::default(), Vec::new());
        let mut model = model.try_map(|path, slot| -> Result<Probe<Station>> {
            let station = Station::new(Adapted { base: slot, adapter: None }, dense.contains(path));
            slots.push((path.to_string(), station.clone()));
            Ok(Probe::new(path, station, &tape))
        })?;
        let report = self.pass(&mut model, &tape, slots, observer)?;
        let model = model.try_map(|_, probe| -> Result<Slot> { Ok(probe.base.slot()) })?;
        Ok((model, report))
    }
}
