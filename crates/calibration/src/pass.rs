//! The pass over a model, block by block.

use std::time::Instant;

use burn::tensor::Tensor;
use kiln_models::{CausalLm, Context, Probe, ScaleSites, Tape, TokenBatch, Windows};
use kiln_quant_core::to_host;

use crate::{
    BlockReport, CalibrationConfig, CalibrationReport, Calibrator, Error, Observer, Progress, Result, awq,
    block::{Block, Place, pass},
    checkpoint::{Folder, Resumed},
    original::{norms, originals},
    station::{Slot, Station},
    stream::{Store, Stream},
    values::{finite, ratio, squares},
};

impl Calibrator<'_> {
    /// Calibrates the model whose slots are `slots`, on `tape`.
    pub(crate) fn pass<W: ScaleSites<Slot = Probe<Station>>>(
        &self,
        model: &mut W,
        tape: &Tape,
        slots: Vec<(String, Station)>,
        observer: Observer,
    ) -> Result<CalibrationReport> {
        let (device, total) = (model.device(), model.num_blocks());
        let tokens = self.windows.batches_of(1);
        let context = model.context(&tokens[0], None)?;
        let store = self.spill.clone().map_or(Store::Memory, Store::Folder);
        let mut blocks = by_block(slots, total)?;
        let embedded = embed(model, &tokens, &store)?;
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
            let originals = originals(&places, norms(model, index)?)?;
            let scalings = match &self.config.scaling {
                Some(awq) => awq::scale(awq, model, tape, index, &mut places, &context, &x)?,
                None => Vec::new(),
            };
            let forward = |x: Tensor<2>| pass(model, index, &context, x);
            let mut block = Block {
                index,
                total,
                places,
                forward: &forward,
                tape,
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
                let norms = norms(model, index)?;
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
        let x = model.embed(&model.context(tokens, None)?);
        let [_, rows, width] = x.dims();
        let stream = match &mut stream {
            Some(stream) => stream,
            None => stream.insert(Stream::new(store, [rows, width])?),
        };
        let values = to_host("embedding", x)?;
        if !finite(&values) {
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
/// [`Error::Argument`] if the models differ in their number of blocks; [`Error::Model`] for windows that don't fit one.
pub fn block_errors<A: CausalLm, B: CausalLm>(
    original: &A,
    found: &B,
    windows: &Windows,
) -> Result<Vec<f64>> {
    let total = original.num_blocks();
    if found.num_blocks() != total {
        return Err(Error::argument("blocks", total.to_string(), found.num_blocks()));
    }
    let mut sums = vec![[0.0; 2]; total];
    windows.check(original)?;
    windows.check(found)?;
    for tokens in windows.batches_of(1) {
        let contexts: [Context; 2] = [original.context(&tokens, None)?, found.context(&tokens, None)?];
        let (mut x, mut quantized) = (original.embed(&contexts[0]), found.embed(&contexts[1]));
        for (index, sums) in sums.iter_mut().enumerate() {
            x = original.block(index, x, &contexts[0], None);
            quantized = found.block(index, quantized, &contexts[1], None);
            let (y, found) = (to_host("x", x.clone())?, to_host("x", quantized.clone())?);
            sums[0] += squares(y.iter().zip(&found).map(|(a, b)| a - b));
            sums[1] += squares(y.into_iter());
        }
    }
    Ok(sums.into_iter().map(|[error, norm]| ratio(error, norm)).collect())
}
