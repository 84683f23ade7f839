//! What a calibration starts from: original projections and norms, how they are told apart, and finished blocks that
//! are put back in their place.

use std::collections::BTreeMap;

use burn::tensor::Device;
use kiln_models::{ScaleSites, ScaleSource, StoredWeight};
use kiln_quant_core::{Projection, Scheme, hash::Fnv1a, to_host};

use crate::{
    Calibrator, Error, Result,
    block::Place,
    checkpoint::{Norm, SavedSlots, fingerprint},
    station::Station,
    values::{finite, tensor},
};

impl Calibrator<'_> {
    /// A projection with its original weight.
    pub(crate) fn place(&self, path: String, station: Station, device: &Device) -> Result<Place> {
        let slot = station.slot();
        let shape @ [d_input, d_output] = slot.shape();
        let weight = match self.weights {
            None => to_host(&path, slot.base.weight().transpose())?,
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
        if !finite(&weight) {
            return Err(Error::NotFinite { place: path, quantity: "the weight is".into() });
        }
        let adapter = match self.attacher {
            Some(attacher) => attacher.attach(&path, slot.base.clone())?.adapter,
            None => None,
        };
        let bias = slot.base.bias_parameter().cloned();
        let scheme = station.scheme(&path, &self.config.schemes);
        let mut place = Place { path, station, scheme, weight, shape, bias, adapter, kept: slot.base };
        if self.weights.is_some() && scheme == Scheme::Dense {
            place.kept = place.original(device).base;
        }
        Ok(place)
    }

    /// Puts a finished block back, from its file.
    pub(crate) fn restore<W: ScaleSites>(
        &self,
        saved: &SavedSlots,
        model: &mut W,
        index: usize,
        slots: Vec<(String, Station)>,
    ) -> Result<()> {
        let device = &model.device();
        for Norm { name, values } in norms(model, index)? {
            saved.check_original(&name, &fingerprint(&values))?;
            if let Some(parameter) = model.norm_parameter(&name) {
                let values = saved.norm(&name, values.len())?;
                *parameter = parameter.clone().map(|old| tensor(values, old.dims(), device));
            }
        }
        for (path, station) in slots {
            let mut place = self.place(path, station, device)?;
            saved.check_original(&place.path, &place.fingerprint()?)?;
            if let (Scheme::Packed(_), Some(bias)) = (place.scheme, place.bias.take()) {
                place.bias = Some(saved.bias(&place.path, bias)?);
            }
            place.station.set(saved.slot(&place, device)?);
        }
        Ok(())
    }

    /// What tells runs apart: options, windows, shapes, adapters, and the weights of embedding (by `embedded`, a fingerprint
    /// of all windows' embeddings) and first block. Those of a later block are compared when it is solved or restored.
    pub(crate) fn facts(
        &self,
        embedded: String,
        blocks: &[Vec<(String, Station)>],
        device: &Device,
    ) -> Result<BTreeMap<String, String>> {
        let mut hash = Fnv1a::default();
        hash.update(self.windows.as_slice().iter().flatten().flat_map(|id| id.to_le_bytes()));
        let windows = hash.text();
        let mut hash = Fnv1a::default();
        for (path, station) in blocks.iter().flatten() {
            let target = self.attacher.and_then(|attacher| attacher.targets().get(path));
            let target = target.map(|target| (target.r, target.scaling));
            hash.update(format!("{path} {:?} {target:?}\n", station.shape()).bytes());
        }
        for (path, station) in blocks.iter().take(1).flatten() {
            let place = self.place(path.clone(), station.clone(), device)?;
            hash.update_values(&place.weight);
            if let Some(lora) = place.adapter {
                hash.update_values(&to_host(path, lora.lora_a.val())?);
            }
        }
        let config = serde_json::to_string(self.config).expect("options are numbers and names");
        let facts = [
            ("options", config),
            ("parts", self.sharing.parts().to_string()),
            ("windows", windows),
            ("embedding", embedded),
            ("first block and adapters", hash.text()),
        ];
        Ok(facts.map(|(name, value)| (name.to_owned(), value)).into())
    }
}

/// The parameters of the norms before the projections of a block, in host memory.
pub(crate) fn norms<W: ScaleSites>(model: &mut W, index: usize) -> Result<Vec<Norm>> {
    let names = model.scale_sites(index).into_iter().flat_map(|site| match site.source {
        ScaleSource::Norm { parameters, .. } => parameters,
        ScaleSource::Projection(_) => Vec::new(),
    });
    let mut norms = Vec::new();
    for name in names {
        if let Some(parameter) = model.norm_parameter(&name) {
            norms.push(Norm { values: to_host(&name, parameter.val())?, name });
        }
    }
    Ok(norms)
}

/// Names and fingerprints of a block's original projections and norms.
pub(crate) fn originals(places: &[Place], norms: Vec<Norm>) -> Result<Vec<(String, String)>> {
    let places = places.iter().map(|place| Ok((place.path.clone(), place.fingerprint()?)));
    let norms = norms.into_iter().map(|norm| Ok((norm.name, fingerprint(&norm.values))));
    places.chain(norms).collect()
}
