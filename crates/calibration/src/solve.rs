//! The methods, on one block.

use std::time::Instant;

use burn::{
    module::{Param, ParamId},
    tensor::Tensor,
};
use kiln_adapters::Adapted;
use kiln_distributed::added;
use kiln_quant_core::{PackedWeight, Projection, QuantLinear, QuantScheme, Scheme, to_host};

use crate::{
    ApiqConfig, ApiqLoss, CalibrationConfig, ClippedWeight, ClippingGrid, Error, GptqConfig, Hessian, Method,
    Progress, Result, Rounding, Svd,
    apiq::{Apiq, Layer, Objective},
    block::{Block, Place},
    gptq::{SharedFactor, gptq_shared},
    loftq,
    loftq::difference,
    low_rank, pissa,
    station::Slot,
    stream::Stream,
    values::finite,
};

/// What a method made of a block.
pub(crate) struct Solution {
    pub(crate) slots: Vec<Slot>,
    /// Of each projection.
    pub(crate) seconds: Vec<f64>,
    /// Of each epoch, where the block was optimised as a whole.
    pub(crate) losses: Vec<f64>,
}

impl Block<'_> {
    /// Solves the block; `targets` are its original outputs.
    pub(crate) fn solve(&mut self, config: &CalibrationConfig, targets: &Stream) -> Result<Solution> {
        match &config.method {
            Method::Gptq(gptq) => self.gptq(gptq, config.correction),
            Method::ApiqLayer(apiq) => self.layer_wise(apiq),
            Method::ApiqBlock(apiq) => self.block_wise(apiq, targets, true, None),
            Method::Clipping(apiq) => self.block_wise(apiq, targets, false, config.correction),
            data_free => self.one_by_one(data_free, config.correction),
        }
    }

    /// Methods that look at the weights only.
    fn one_by_one(&mut self, method: &Method, correction: Option<Svd>) -> Result<Solution> {
        let all: Vec<usize> = (0..self.places.len()).collect();
        let solved = self.dealt(&all, |block, index| {
            let place = &block.places[index];
            match place.scheme {
                Scheme::Dense => Ok(place.dense()),
                Scheme::Packed(scheme) => block.solve_weight(place, &scheme, method, correction),
            }
        })?;
        let (slots, seconds) = solved.into_iter().unzip();
        Ok(Solution { slots, seconds, losses: Vec::new() })
    }

    fn solve_weight(
        &self,
        place: &Place,
        scheme: &QuantScheme,
        method: &Method,
        correction: Option<Svd>,
    ) -> Result<Slot> {
        let (path, weight, [d_input, d_output]) = (&place.path, &place.weight, place.shape);
        let rank = place.adapter.as_ref().map(|lora| lora.rank());
        let mut compensated = true;
        let found = match (method, rank) {
            (Method::Loftq(config), Some(rank)) => {
                compensated = config.compensate_scaling;
                loftq(path, weight, d_input, rank, scheme, config)?
            }
            (Method::Pissa { rounding, svd }, Some(rank)) => {
                pissa(path, weight, d_input, rank, scheme, *rounding, *svd)?
            }
            // Without an adapter all of them round.
            _ => {
                let rounding = match method {
                    Method::Rtn(rounding) | Method::Pissa { rounding, .. } => *rounding,
                    Method::Loftq(config) => config.rounding,
                    _ => Rounding::default(),
                };
                let packed = rounding.quantizer().quantize(path, weight, d_input, d_output, scheme)?;
                return self.corrected(place, packed, correction);
            }
        };
        let adapter = place.with_factors(&found.factors, compensated, &self.device)?;
        Ok(place.packed(&found.weight, adapter, &self.device))
    }

    /// A packed weight whose adapter starts from its error, if that is asked for.
    fn corrected(&self, place: &Place, packed: PackedWeight, correction: Option<Svd>) -> Result<Slot> {
        let adapter = match (correction, &place.adapter) {
            (Some(svd), Some(lora)) => {
                let residual = difference(&place.weight, &packed.dequantize());
                let factors = low_rank(&place.path, &residual, place.shape[0], lora.rank(), svd)?;
                place.with_factors(&factors, true, &self.device)?
            }
            _ => None,
        };
        Ok(place.packed(&packed, adapter, &self.device))
    }

    /// Group after group of projections with the same inputs, which come from the quantized ones before.
    fn gptq(&mut self, config: &GptqConfig, correction: Option<Svd>) -> Result<Solution> {
        let mut slots = self.originals();
        let mut seconds = vec![0.0; slots.len()];
        for group in self.input_groups(&slots)? {
            self.install(&slots);
            let start = Instant::now();
            let hessian = self.hessian(group[0])?;
            let mut factor = None;
            let mut shared = start.elapsed().as_secs_f64();
            let solved = self.dealt(&group, |block, index| {
                let place = &block.places[index];
                let [_, d_output] = place.shape;
                Ok(match place.scheme {
                    Scheme::Dense => place.dense(),
                    // An expert that no token went through.
                    Scheme::Packed(scheme) if hessian.samples() == 0 => {
                        let rounding = Method::Rtn(Rounding::default());
                        block.solve_weight(place, &scheme, &rounding, correction)?
                    }
                    Scheme::Packed(scheme) => {
                        let (path, weight) = (&place.path, &place.weight);
                        let factor = match &mut factor {
                            Some(factor) => factor,
                            none => none.insert(SharedFactor::new(path, &hessian, config)?),
                        };
                        let found = gptq_shared(path, weight, d_output, factor, &scheme, config)?;
                        block.corrected(place, found.weight, correction)?
                    }
                })
            })?;
            for (index, (slot, took)) in group.into_iter().zip(solved) {
                slots[index] = slot;
                seconds[index] = std::mem::take(&mut shared) + took;
            }
        }
        Ok(Solution { slots, seconds, losses: Vec::new() })
    }

    /// Second moments of a projection's inputs in the quantized stream, over all windows.
    fn hessian(&self, projection: usize) -> Result<Hessian> {
        let Place { path, shape: [d_input, _], .. } = &self.places[projection];
        let (own, mut samples) = (self.shares.own(), 0);
        let sums = self.shares.partial_sums(
            |windows| {
                let mut hessian = Hessian::new(*d_input);
                for window in windows {
                    let input = self.quantized.tensor(window - own.start, &self.device)?;
                    if let Some(inputs) = self.inputs(projection, input) {
                        hessian.add_window(path, window, inputs)?;
                    }
                }
                samples += hessian.samples();
                Ok(hessian.sum)
            },
            added,
        );
        let sum = self.shares.sum::<_, Error>(sums, d_input * d_input)?;
        let samples = self.shares.in_order::<Error>(Ok(vec![samples as f64]))?;
        Ok(Hessian { d_input: *d_input, samples: samples.iter().sum::<f64>() as usize, sum })
    }

    /// ApiQ, one projection after another: its inputs in the quantized model against its outputs in the original.
    fn layer_wise(&mut self, config: &ApiqConfig) -> Result<Solution> {
        let originals = self.originals();
        let mut slots = originals.clone();
        let mut seconds = vec![0.0; slots.len()];
        for group in self.input_groups(&originals)? {
            let start = Instant::now();
            self.install(&originals);
            let inputs = self.all_inputs(group[0], true)?;
            self.install(&slots);
            let quantized = self.all_inputs(group[0], false)?;
            let mut shared = start.elapsed().as_secs_f64();
            for index in group {
                let start = Instant::now();
                slots[index] = match self.places[index].scheme {
                    Scheme::Dense => self.places[index].dense(),
                    Scheme::Packed(scheme) => {
                        let layer = self.layer(index, &scheme, config, true)?;
                        let path = self.places[index].path.clone();
                        let mut objective = LayerOutput {
                            inputs: &quantized,
                            targets: self.outputs_of(&path, &originals[index], &inputs)?,
                            loss: config.loss,
                            device: self.device.clone(),
                        };
                        let mut apiq = Apiq::new(config, vec![layer], &self.device);
                        let block = self.index;
                        apiq.run(block, Some(&path), &mut objective, &mut |progress| self.tell(progress))?;
                        let (packed, lora) = apiq.finish()?.remove(0);
                        self.places[index].packed(&packed, lora, &self.device)
                    }
                };
                seconds[index] = std::mem::take(&mut shared) + start.elapsed().as_secs_f64();
                self.tell_solved(index)?;
            }
        }
        Ok(Solution { slots, seconds, losses: Vec::new() })
    }

    /// ApiQ, or clipping alone, for all projections of the block together.
    fn block_wise(
        &mut self,
        config: &ApiqConfig,
        targets: &Stream,
        adapters: bool,
        correction: Option<Svd>,
    ) -> Result<Solution> {
        let start = Instant::now();
        let originals = self.originals();
        self.install(&originals);
        let second = config.augmented.then(|| self.pass_all(self.quantized)).transpose()?;
        let (mut layers, mut trained) = (Vec::new(), Vec::new());
        for (index, original) in originals.iter().enumerate() {
            match self.places[index].scheme {
                Scheme::Packed(scheme) => {
                    layers.push(self.layer(index, &scheme, config, adapters)?);
                    trained.push(index);
                }
                // Inside the graph like its neighbours, but a constant.
                Scheme::Dense => self.places[index].station.set(constant(original)),
            }
        }
        drop(originals);
        let mut apiq = Apiq::new(config, layers, &self.device);
        let losses = if trained.is_empty() {
            Vec::new()
        } else {
            let mut objective = BlockOutput {
                stations: trained.iter().map(|&index| self.places[index].station.clone()).collect(),
                forward: self.forward,
                inputs: self.quantized,
                targets,
                second: second.as_ref(),
                loss: config.loss,
                device: self.device.clone(),
            };
            apiq.run(self.index, None, &mut objective, &mut |progress| self.tell(progress))?
        };
        let mut slots: Vec<Slot> = self.places.iter().map(Place::dense).collect();
        for (index, (packed, lora)) in trained.into_iter().zip(apiq.finish()?) {
            let place = &self.places[index];
            slots[index] = match lora {
                Some(lora) => place.packed(&packed, Some(lora), &self.device),
                None => self.corrected(place, packed, correction)?,
            };
        }
        let seconds = self.shares(start.elapsed().as_secs_f64());
        for index in 0..self.places.len() {
            self.tell_solved(index)?;
        }
        Ok(Solution { slots, seconds, losses })
    }

    fn layer(
        &self,
        index: usize,
        scheme: &QuantScheme,
        config: &ApiqConfig,
        adapters: bool,
    ) -> Result<Layer> {
        let place = &self.places[index];
        let [d_input, d_output] = place.shape;
        let grid = ClippingGrid::for_scheme(scheme, d_input, config.include_zero)?;
        Ok(Layer {
            path: place.path.clone(),
            weight: ClippedWeight::new(&place.path, &place.weight, d_input, d_output, grid)?,
            bias: place.bias.clone(),
            scheme: *scheme,
            lora: if adapters { place.adapter.clone() } else { None },
        })
    }

    /// Inputs of one projection for all windows, with what stands in the stations.
    fn all_inputs(&self, listener: usize, original: bool) -> Result<Stream> {
        let stream = if original { self.x } else { self.quantized };
        let mut inputs = Stream::new(&self.store, [stream.shape()[0], self.places[listener].shape[0]])?;
        for window in 0..stream.len() {
            let input = stream.tensor(window, &self.device)?;
            let path = &self.places[listener].path;
            let heard = self.inputs(listener, input.clone()).filter(|x| x.dims()[0] == stream.shape()[0]);
            let Some(heard) = heard else {
                let expected = "a projection that all tokens go through; experts are calibrated by block";
                return Err(Error::argument(path, expected, "one that some tokens go through"));
            };
            let values = to_host(path, heard)?;
            if !finite(&values) {
                self.pass(input, window)?;
            }
            inputs.set(window, values)?;
        }
        Ok(inputs)
    }

    /// A projection's outputs for a stream of its inputs.
    fn outputs_of(&self, path: &str, slot: &Slot, inputs: &Stream) -> Result<Stream> {
        let mut outputs = Stream::new(&self.store, [inputs.shape()[0], slot.shape()[1]])?;
        for window in 0..inputs.len() {
            let y = slot.forward(inputs.tensor(window, &self.device)?);
            outputs.set(window, to_host(path, y)?)?;
        }
        Ok(outputs)
    }

    /// Time shared by the projections' weights.
    fn shares(&self, seconds: f64) -> Vec<f64> {
        let total: usize = self.places.iter().map(|place| place.weight.len()).sum();
        self.places.iter().map(|place| seconds * place.weight.len() as f64 / total.max(1) as f64).collect()
    }

    pub(crate) fn tell_solved(&mut self, index: usize) -> Result<()> {
        let (block, path) = (self.index, self.places[index].path.clone());
        self.tell(Progress::Projection { block, path: &path })
    }
}

/// A dense slot inside autodiff that gets no gradient.
fn constant(slot: &Slot) -> Slot {
    let mut slot = slot.clone();
    if let QuantLinear::Dense(linear) = &mut slot.base {
        linear.weight = Param::initialized(ParamId::new(), Tensor::from_inner(linear.weight.val()));
    }
    Adapted { base: slot.base, adapter: None }
}

/// The distance of a projection's outputs.
struct LayerOutput<'a> {
    inputs: &'a Stream,
    targets: Stream,
    loss: ApiqLoss,
    device: burn::tensor::Device,
}

impl Objective for LayerOutput<'_> {
    fn windows(&self) -> usize {
        self.inputs.len()
    }

    fn loss(&mut self, slots: Vec<Slot>, window: usize) -> Result<Tensor<1>> {
        let y = slots[0].forward(self.inputs.tensor(window, &self.device)?);
        Ok(self.loss.of(y, self.targets.tensor(window, &self.device)?))
    }
}

/// The distance of a block's outputs, from one target or from two.
struct BlockOutput<'a> {
    stations: Vec<crate::station::Station>,
    forward: &'a dyn Fn(Tensor<2>) -> Tensor<2>,
    inputs: &'a Stream,
    targets: &'a Stream,
    second: Option<&'a Stream>,
    loss: ApiqLoss,
    device: burn::tensor::Device,
}

impl Objective for BlockOutput<'_> {
    fn windows(&self) -> usize {
        self.inputs.len()
    }

    fn loss(&mut self, slots: Vec<Slot>, window: usize) -> Result<Tensor<1>> {
        for (station, slot) in self.stations.iter().zip(slots) {
            station.set(slot);
        }
        let y = (self.forward)(self.inputs.tensor(window, &self.device)?);
        let mut loss = self.loss.of(y.clone(), self.targets.tensor(window, &self.device)?);
        if let Some(second) = self.second {
            loss = loss + self.loss.of(y, second.tensor(window, &self.device)?);
        }
        Ok(loss)
    }
}
