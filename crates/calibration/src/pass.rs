//! The pass over a model, block by block.

use std::time::Instant;

use burn::tensor::{Device, Tensor};
use kiln_distributed::{Shares, agreed, gathered};
use kiln_models::{CausalLm, Context, Probe, ScaleSites, Tape, TokenBatch, Windows};
use kiln_quant_core::{hash::Fnv1a, to_host};

use crate::{
    BlockReport, CalibrationConfig, CalibrationReport, Calibrator, Error, Observer, Progress, Result, awq,
    block::{Block, Place, pass},
    checkpoint::{Folder, Resumed, SavedSlots},
    exchange::{collected, dealt_out, from_first},
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
        let shares = self.sharing.of(self.windows.count())?;
        let ranks = shares.ranks();
        let tokens = self.windows.batches_of(1);
        let context = model.context(&tokens[0], None)?;
        let store = self.spill.clone().map_or(Store::Memory, Store::Folder);
        let mut blocks = by_block(slots, total)?;
        let embedded = agreed(ranks, embed(model, &tokens, &shares, &store))?;
        let run = match self.folder.is_some() || ranks.size() > 1 {
            true => self.run_name(&shares, &embedded, &blocks, &device)?,
            false => String::new(),
        };
        let folder = match &self.folder {
            Some(path) if ranks.rank() == 0 => Folder::new(path, run).map(Some),
            _ => Ok(None),
        };
        let folder = agreed(ranks, folder)?;
        let mut report = CalibrationReport::default();
        let Resumed { blocks: finished, streams: [mut x, mut quantized] } =
            self.resumed(&shares, folder.as_ref(), embedded, &store)?;
        for (index, slots) in blocks.drain(..).enumerate() {
            if index < finished {
                report.blocks.push(self.read(&store, folder.as_ref(), model, index, slots)?);
                continue;
            }
            let start = Instant::now();
            let places = slots.into_iter().map(|(path, station)| self.place(path, station, &device));
            let mut places = agreed(ranks, places.collect::<Result<Vec<Place>>>())?;
            let originals = agreed(ranks, norms(model, index).and_then(|norms| originals(&places, norms)))?;
            ranks.same(&originals.iter().cloned().collect())?;
            let incoming = awq::Incoming { context: &context, shares: &shares, x: &x };
            let scalings = match &self.config.scaling {
                Some(awq) => awq::scale(awq, model, tape, index, &mut places, &incoming)?,
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
                shares: &shares,
                x: &x,
                quantized: &quantized,
                observer: &mut *observer,
            };
            let Finished { streams, slots, report: mut found } = block.calibrate(self.config)?;
            found.scalings = scalings;
            found.seconds = start.elapsed().as_secs_f64();
            [x, quantized] = streams;
            if self.folder.is_some() {
                let all = match ranks.size() {
                    1 => [None, None],
                    _ => [collected(&shares, &x, &store)?, collected(&shares, &quantized, &store)?],
                };
                let save = |folder: &Folder| {
                    let [x, quantized] =
                        [all[0].as_ref().unwrap_or(&x), all[1].as_ref().unwrap_or(&quantized)];
                    folder.save(&slots, &norms(model, index)?, &originals, &found, [x, quantized])
                };
                agreed(ranks, folder.as_ref().map_or(Ok(()), save))?;
            }
            tracing::info!(
                block = index,
                error = found.activation_error,
                seconds = found.seconds,
                "calibrated"
            );
            let ended = observer(Progress::Block { report: &found, total }).is_break();
            report.blocks.push(found);
            let ended = ended && index + 1 < total;
            agreed(ranks, if ended { Err(Error::Cancelled { blocks: index + 1, total }) } else { Ok(()) })?;
        }
        Ok(report)
    }

    /// What tells this run from others; fails if it isn't the same on all ranks.
    fn run_name(
        &self,
        shares: &Shares,
        embedded: &Stream,
        blocks: &[Vec<(String, Station)>],
        device: &Device,
    ) -> Result<String> {
        let hashes = || -> Result<Vec<u8>> {
            let hash = |window| {
                let mut hash = Fnv1a::default();
                hash.update_values(&embedded.get(window)?);
                Ok(hash.text().into_bytes())
            };
            Ok((0..embedded.len()).map(hash).collect::<Result<Vec<_>>>()?.concat())
        };
        let (_, hashes) = gathered(shares.ranks(), hashes(), Vec::clone)?;
        let mut embedding = Fnv1a::default();
        embedding.update(hashes.into_iter().flatten());
        let facts = agreed(shares.ranks(), self.facts(embedding.text(), blocks, device))?;
        shares.ranks().same(&facts)?;
        let mut run = Fnv1a::default();
        facts.iter().for_each(|(name, value)| run.update(format!("{name}: {value}\n").bytes()));
        Ok(run.text())
    }

    /// Where an interrupted run stands, by rank 0's folder, or the beginning.
    fn resumed(
        &self,
        shares: &Shares,
        folder: Option<&Folder>,
        embedded: Stream,
        store: &Store,
    ) -> Result<Resumed> {
        let (ranks, shape) = (shares.ranks(), embedded.shape());
        let found = folder.map_or(Ok(None), |folder| folder.resume(store, shares.count(), shape));
        let found = agreed(ranks, found)?;
        if ranks.size() == 1 {
            return match found {
                Some(resumed) => Ok(resumed),
                None => Ok(Resumed { blocks: 0, streams: [copy(&embedded, store)?, embedded] }),
            };
        }
        let blocks = found.as_ref().map_or(0, |found| found.blocks);
        let blocks = shares.in_order::<Error>(Ok(vec![blocks as f64]))?[0] as usize;
        if blocks == 0 {
            return Ok(Resumed { blocks, streams: [agreed(ranks, copy(&embedded, store))?, embedded] });
        }
        let own = |stream: usize| {
            dealt_out(shares, found.as_ref().map(|found| &found.streams[stream]), shape, store)
        };
        Ok(Resumed { blocks, streams: [own(0)?, own(1)?] })
    }

    /// Puts a finished block back, which rank 0 has in its folder; returns its report.
    fn read<W: ScaleSites>(
        &self,
        store: &Store,
        folder: Option<&Folder>,
        model: &mut W,
        index: usize,
        slots: Vec<(String, Station)>,
    ) -> Result<BlockReport> {
        let (ranks, name) = (self.sharing.ranks(), "block.safetensors");
        let path = folder.map(|folder| folder.block(index));
        let copy = from_first(ranks, path.as_deref(), name, store)?;
        let read = || -> Result<BlockReport> {
            let path = path.or_else(|| Some(copy.as_ref()?.path().join(name)));
            let saved = SavedSlots::open(&path.expect("rank 0's or a copy"))?;
            let report = saved.report(folder.map(Folder::run))?;
            self.restore(&saved, model, index, slots)?;
            Ok(report)
        };
        agreed(ranks, read())
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
        let ranks = self.shares.ranks();
        self.install(&self.originals());
        let targets = agreed(ranks, self.pass_all(self.x))?;
        let solution = self.solve(config, &targets)?;
        let projections = self.measure(&solution.slots, &solution.seconds, config.measured_windows)?;
        self.install(&solution.slots);
        let quantized = agreed(ranks, self.pass_all(self.quantized))?;
        let squares = || -> Result<Vec<f64>> {
            let mut all = Vec::with_capacity(2 * targets.len());
            for window in 0..targets.len() {
                let (y, found) = (targets.get(window)?, quantized.get(window)?);
                all.push(squares(y.iter().zip(&found).map(|(a, b)| a - b)));
                all.push(squares(y.into_iter()));
            }
            Ok(all)
        };
        let (mut error, mut norm) = (0.0, 0.0);
        for of_window in self.shares.in_order(squares())?.chunks_exact(2) {
            error += of_window[0];
            norm += of_window[1];
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

/// The residual stream of this rank's windows before the first block.
fn embed<W: CausalLm>(model: &W, tokens: &[TokenBatch], shares: &Shares, store: &Store) -> Result<Stream> {
    let mut stream: Option<Stream> = None;
    for window in shares.own() {
        let tokens = &tokens[window];
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
        stream.set(window - shares.own().start, values)?;
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
