//! One block under calibration: its original weights, its slots, passes through it.

use std::collections::HashMap;

use burn::{
    module::{Param, ParamId},
    nn::Linear,
    tensor::{Device, Tensor},
};
use kiln_adapters::{Adapted, Lora};
use kiln_distributed::{Shares, agreed};
use kiln_models::{Call, CausalLm, Context, Keep, Tape};
use kiln_quant_core::{
    HostQuantizer, MinMax, PackedLinear, PackedTensor, PackedWeight, Projection, QuantLinear, Scheme,
    hash::Fnv1a, to_host,
};

use crate::{
    Error, Factors, Observer, Progress, ProjectionReport, Result,
    clipping::transpose,
    station::{Slot, Station},
    stream::{Store, Stream},
    values::{finite, ratio, squares, tensor},
};

/// One projection of the block.
pub(crate) struct Place {
    pub(crate) path: String,
    pub(crate) station: Station,
    pub(crate) scheme: Scheme,
    /// The original, `[d_output, d_input]` row-major.
    pub(crate) weight: Vec<f32>,
    /// `[d_input, d_output]`.
    pub(crate) shape: [usize; 2],
    pub(crate) bias: Option<Param<Tensor<1>>>,
    /// The adapter as it would start by itself.
    pub(crate) adapter: Option<Lora>,
    /// What the slot keeps where its scheme is dense.
    pub(crate) kept: QuantLinear,
}

impl Place {
    /// Of the original weight and bias.
    pub(crate) fn fingerprint(&self) -> Result<String> {
        let mut hash = Fnv1a::default();
        hash.update_values(&self.weight);
        if let Some(bias) = &self.bias {
            hash.update_values(&to_host(&self.path, bias.val())?);
        }
        Ok(hash.text())
    }

    /// The original weight, dense, without an adapter.
    pub(crate) fn original(&self, device: &Device) -> Slot {
        let [d_input, d_output] = self.shape;
        let weight = tensor(transpose(&self.weight, d_output, d_input), self.shape, device);
        let weight = Param::initialized(ParamId::new(), weight);
        Adapted { base: QuantLinear::Dense(Linear { weight, bias: self.bias.clone() }), adapter: None }
    }

    /// A packed weight with an adapter; the adapter as it starts, if none is given.
    pub(crate) fn packed(&self, weight: &PackedWeight, adapter: Option<Lora>, device: &Device) -> Slot {
        let weight = PackedTensor::new(weight, device);
        let base = QuantLinear::Packed(PackedLinear { weight, bias: self.bias.clone() });
        Adapted::new(base, adapter.or_else(|| self.adapter.clone()))
    }

    /// What stays where the scheme is dense.
    pub(crate) fn dense(&self) -> Slot {
        Adapted::new(self.kept.clone(), self.adapter.clone())
    }

    /// Round to nearest, as a yardstick.
    fn rounded(&self, original: &Slot, device: &Device) -> Result<Slot> {
        let Scheme::Packed(scheme) = self.scheme else { return Ok(original.clone()) };
        let [d_input, d_output] = self.shape;
        let packed = MinMax.quantize(&self.path, &self.weight, d_input, d_output, &scheme)?;
        let weight = PackedTensor::new(&packed, device);
        let base = QuantLinear::Packed(PackedLinear { weight, bias: self.bias.clone() });
        Ok(Adapted { base, adapter: None })
    }

    /// Its inputs when its block runs `forward` on `input`; none of an expert that no token goes through.
    pub(crate) fn inputs(
        &self,
        tape: &Tape,
        forward: &dyn Fn(Tensor<2>) -> Tensor<2>,
        input: Tensor<2>,
    ) -> Option<Tensor<2>> {
        let (_, calls) = tape.record_of(&[&self.path], Keep::Inputs, || forward(input));
        calls.into_iter().next_back().map(|call| call.input)
    }

    /// The adapter with factors; where their product is to be added to the weight, its scaling is divided out of B.
    pub(crate) fn with_factors(
        &self,
        factors: &Factors,
        compensated: bool,
        device: &Device,
    ) -> Result<Option<Lora>> {
        let Some(mut lora) = self.adapter.clone() else { return Ok(None) };
        let scaling = if compensated { lora.scaling() } else { 1.0 };
        if scaling == 0.0 {
            return Err(Error::argument(format!("{}: LoRA scaling", self.path), "a number other than 0", 0));
        }
        let [d_input, d_output] = self.shape;
        let b = factors.b.iter().map(|b| (f64::from(*b) / scaling) as f32).collect();
        lora.lora_a = Param::from_tensor(tensor(factors.a.clone(), [d_input, factors.rank], device));
        lora.lora_b = Param::from_tensor(tensor(b, [factors.rank, d_output], device));
        Ok(Some(lora))
    }
}

/// Runs a model's block on one window, `[rows, width]` → `[rows, width]`.
pub(crate) fn pass<W: CausalLm>(model: &W, index: usize, context: &Context, x: Tensor<2>) -> Tensor<2> {
    let [rows, width] = x.dims();
    model.block(index, x.reshape([1, rows, width]), context, None).reshape([rows, width])
}

/// The block, the streams before it and what it takes to run it.
pub(crate) struct Block<'a> {
    pub(crate) index: usize,
    pub(crate) total: usize,
    pub(crate) places: Vec<Place>,
    /// Runs the block with what stands in its stations, `[rows, width]` → `[rows, width]`.
    pub(crate) forward: &'a dyn Fn(Tensor<2>) -> Tensor<2>,
    /// Hears the model's projections.
    pub(crate) tape: &'a Tape,
    pub(crate) device: Device,
    pub(crate) store: Store,
    /// Who has which windows.
    pub(crate) shares: &'a Shares,
    /// The original residual stream of this rank's windows.
    pub(crate) x: &'a Stream,
    /// The residual stream behind the blocks quantized so far.
    pub(crate) quantized: &'a Stream,
    pub(crate) observer: Observer<'a>,
}

impl Block<'_> {
    /// Tells the observer, who may end the run.
    pub(crate) fn tell(&mut self, progress: Progress) -> Result<()> {
        if (self.observer)(progress).is_break() {
            return Err(Error::Cancelled { blocks: self.index, total: self.total });
        }
        Ok(())
    }

    /// Puts one slot into each station.
    pub(crate) fn install(&self, slots: &[Slot]) {
        self.places.iter().zip(slots).for_each(|(place, slot)| place.station.set(slot.clone()));
    }

    /// The original block.
    pub(crate) fn originals(&self) -> Vec<Slot> {
        self.places.iter().map(|place| place.original(&self.device)).collect()
    }

    /// The block's output for one window; NaN and infinity are errors that name the projection they come from.
    pub(crate) fn pass(&self, input: Tensor<2>, window: usize) -> Result<Vec<f32>> {
        let output = to_host(&format!("block {}", self.index), (self.forward)(input.clone()))?;
        if finite(&output) { Ok(output) } else { Err(self.blame(input, window)?) }
    }

    /// The block's outputs for all windows of a stream.
    pub(crate) fn pass_all(&self, input: &Stream) -> Result<Stream> {
        let mut output = Stream::new(&self.store, input.shape())?;
        for window in 0..input.len() {
            output.set(window, self.pass(input.tensor(window, &self.device)?, window)?)?;
        }
        Ok(output)
    }

    /// The number, among those of all ranks, of this rank's window `window`.
    pub(crate) fn number(&self, window: usize) -> usize {
        self.shares.own().start + window
    }

    /// Finds the first projection with a bad output.
    fn blame(&self, input: Tensor<2>, window: usize) -> Result<Error> {
        for call in self.listen(Keep::Outputs, input).into_iter().flatten() {
            for (what, values) in [("inputs", Some(call.input)), ("outputs", call.output)] {
                let Some(values) = values else { continue };
                if !finite(&to_host(&call.path, values)?) {
                    let quantity = format!("{what} in window {} are", self.number(window));
                    return Ok(Error::NotFinite { place: call.path, quantity });
                }
            }
        }
        Ok(Error::NotFinite {
            place: format!("block {}", self.index),
            quantity: format!("activations in window {} are", self.number(window)),
        })
    }

    /// Runs the block; the call of each of its projections.
    fn listen(&self, keep: Keep, input: Tensor<2>) -> Vec<Option<Call>> {
        let (_, calls) = self.tape.record(keep, || (self.forward)(input));
        let mut heard: HashMap<String, Call> =
            calls.into_iter().map(|call| (call.path.clone(), call)).collect();
        self.places.iter().map(|place| heard.remove(&place.path)).collect()
    }

    /// Inputs of the projection `listener` for one window of a residual stream; none of an expert that no token goes through.
    pub(crate) fn inputs(&self, listener: usize, input: Tensor<2>) -> Option<Tensor<2>> {
        self.places[listener].inputs(self.tape, self.forward, input)
    }

    /// Projections that see the same inputs in the first window, in the order in which data flows.
    pub(crate) fn input_groups(&self, originals: &[Slot]) -> Result<Vec<Vec<usize>>> {
        let ranks = self.shares.ranks();
        let groups = if ranks.rank() == 0 { self.groups(originals) } else { Ok(Vec::new()) };
        let groups = agreed(ranks, groups)?;
        let told = ranks.broadcast(serde_json::to_vec(&groups).expect("numbers"))?;
        serde_json::from_slice(&told).map_err(|error| Error::argument("groups", "those of rank 0", error))
    }

    fn groups(&self, originals: &[Slot]) -> Result<Vec<Vec<usize>>> {
        self.install(originals);
        let calls = self.listen(Keep::Inputs, self.quantized.tensor(0, &self.device)?);
        let mut groups: Vec<Vec<usize>> = Vec::new();
        let mut last = Vec::new();
        for (index, call) in calls.into_iter().enumerate() {
            let inputs = call.map(|call| to_host(&call.path, call.input)).transpose()?.unwrap_or_default();
            match groups.last_mut() {
                // What isn't called has inputs of its own, which nobody knows.
                Some(group) if !inputs.is_empty() && inputs == last => group.push(index),
                _ => groups.push(vec![index]),
            }
            last = inputs;
        }
        Ok(groups)
    }

    /// Errors of the block's projections, weight and activations, with `slots` in place of the originals. Experts see other
    /// tokens in one stream than in the other: of their activations no error is measured, and 0 reported.
    pub(crate) fn measure(
        &self,
        slots: &[Slot],
        seconds: &[f64],
        windows: usize,
    ) -> Result<Vec<ProjectionReport>> {
        let originals = self.originals();
        let rounded: Vec<Slot> = (self.places.iter().zip(&originals))
            .map(|(place, original)| place.rounded(original, &self.device))
            .collect::<Result<_>>()?;
        let measured = self.shares.in_order(self.squares(&originals, &rounded, slots, windows))?;
        let mut sums = vec![[0.0; 3]; self.places.len()];
        for of_window in measured.chunks_exact(3 * self.places.len().max(1)) {
            let both = sums.as_flattened_mut().iter_mut().zip(of_window);
            both.for_each(|(sum, value)| *sum += value);
        }
        let reports = self.places.iter().zip(slots).zip(&originals).zip(sums.iter().zip(seconds));
        reports
            .map(|(((place, slot), original), (sums, seconds))| {
                let host = |slot: &Slot| to_host(&place.path, slot.weight());
                let (weight, found) = (host(original)?, host(slot)?);
                let error = squares(weight.iter().zip(&found).map(|(a, b)| a - b));
                Ok(ProjectionReport {
                    path: place.path.clone(),
                    scheme: place.scheme,
                    weight_error: ratio(error, squares(weight.iter().copied())),
                    activation_error_before: ratio(sums[1], sums[0]),
                    activation_error_after: ratio(sums[2], sums[0]),
                    seconds: *seconds,
                })
            })
            .collect()
    }

    /// Sums of squares for each of this rank's windows among the first `windows`, and each projection: of its outputs, of
    /// their errors when rounded, and of those with `slots`.
    fn squares(
        &self,
        originals: &[Slot],
        rounded: &[Slot],
        slots: &[Slot],
        windows: usize,
    ) -> Result<Vec<f64>> {
        let mut all = Vec::new();
        let measured = (0..self.x.len()).take_while(|&window| self.number(window) < windows);
        for window in measured {
            let mut sums = vec![[0.0; 3]; self.places.len()];
            let reference = self.outputs(originals, true, window)?;
            let rows = self.x.shape()[0];
            for (k, slots) in [(1, rounded), (2, slots)] {
                let found = self.outputs(slots, false, window)?;
                for (((sums, y), found), place) in
                    sums.iter_mut().zip(&reference).zip(found).zip(&self.places)
                {
                    if y.len() == rows * place.shape[1] && found.len() == y.len() {
                        sums[k] = squares(y.iter().zip(&found).map(|(a, b)| a - b));
                    }
                }
            }
            for ((sums, y), place) in sums.iter_mut().zip(&reference).zip(&self.places) {
                if y.len() == rows * place.shape[1] {
                    sums[0] = squares(y.iter().copied());
                }
            }
            all.extend(sums.into_flattened());
        }
        Ok(all)
    }

    /// Outputs of all projections with `slots` in place, for a window of the original or the quantized stream.
    fn outputs(&self, slots: &[Slot], original: bool, window: usize) -> Result<Vec<Vec<f32>>> {
        self.install(slots);
        let stream = if original { self.x } else { self.quantized };
        let input = stream.tensor(window, &self.device)?;
        let outputs = self.listen(Keep::Outputs, input).into_iter().map(|call| {
            let output = call.and_then(|call| Some((call.path, call.output?)));
            Ok(output.map(|(path, y)| to_host(&path, y)).transpose()?.unwrap_or_default())
        });
        outputs.collect()
    }
}
