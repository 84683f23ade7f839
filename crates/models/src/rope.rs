//! Rotary position embedding: frequencies as transformers 5 computes them.

use burn::tensor::{Device, Tensor, TensorData};

use crate::config::{RopeConfig, RopeScaling};

/// Inverse frequencies `[rotated / 2]` and the factor on cos and sin, for a sequence whose last position is
/// `length - 1` (only dynamic scaling and LongRoPE look at it).
///
/// Source: transformers `modeling_rope_utils.py`.
pub(crate) fn frequencies(rope: &RopeConfig, head_dim: usize, length: usize) -> (Vec<f32>, f32) {
    let kept = (head_dim as f64 * rope.partial_rotary_factor / 2.0) as usize;
    let head_dim = rope.rotated(head_dim);
    let plain = |theta: f64| -> Vec<f64> {
        (0..head_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64)).collect()
    };
    let base = plain(rope.theta);
    let (frequencies, factor) = match &rope.scaling {
        RopeScaling::Default => (base, 1.0),
        RopeScaling::Linear { factor } => (base.iter().map(|f| f / factor).collect(), 1.0),
        RopeScaling::Proportional { factor } => {
            let frequency = |(i, f): (usize, &f64)| if i < kept { f / factor } else { 0.0 };
            (base.iter().enumerate().map(frequency).collect(), 1.0)
        }
        RopeScaling::Dynamic { factor, original_max_position_embeddings: original } => {
            let (length, original) = (length.max(*original) as f64, *original as f64);
            let stretch = factor * length / original - (factor - 1.0);
            let d = head_dim as f64;
            (plain(rope.theta * stretch.powf(d / (d - 2.0))), 1.0)
        }
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast,
            beta_slow,
            attention_factor,
            truncate,
        } => {
            let (d, original) = (head_dim as f64, *original_max_position_embeddings as f64);
            // The dimension whose frequency makes this many rotations over the original context.
            let dimension = |rotations: f64| {
                d * (original / (rotations * std::f64::consts::TAU)).ln() / (2.0 * rope.theta.ln())
            };
            let (mut low, mut high) = (dimension(*beta_fast), dimension(*beta_slow));
            if *truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            (low, high) = (low.max(0.0), high.min(d - 1.0));
            if low == high {
                high += 0.001;
            }
            let blend = |(i, f): (usize, &f64)| {
                let stretched = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                f / factor * stretched + f * (1.0 - stretched)
            };
            (base.iter().enumerate().map(blend).collect(), *attention_factor)
        }
        RopeScaling::Alpha { .. } => (plain(rope.stretched_theta(head_dim)), 1.0),
        RopeScaling::LongRope {
            short_factor,
            long_factor,
            original_max_position_embeddings: original,
            attention_factor,
        } => {
            let factors = if length > *original { long_factor } else { short_factor };
            (base.iter().zip(factors).map(|(f, factor)| f / factor).collect(), *attention_factor)
        }
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            let original = *original_max_position_embeddings as f64;
            let blend = |f: &f64| {
                let wavelength = std::f64::consts::TAU / f;
                if wavelength > original / low_freq_factor {
                    f / factor
                } else if wavelength < original / high_freq_factor {
                    *f
                } else {
                    let kept =
                        (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - kept) * f / factor + kept * f
                }
            };
            (base.iter().map(blend).collect(), 1.0)
        }
    };
    (frequencies.into_iter().map(|f| f as f32).collect(), factor as f32)
}

impl RopeConfig {
    /// The length of sequences from which on earlier keys would have to be rotated anew, as LongRoPE's other factors hold for
    /// all of a longer sequence.
    pub(crate) fn changes_beyond(&self) -> Option<usize> {
        match &self.scaling {
            RopeScaling::LongRope { original_max_position_embeddings, .. } => {
                Some(*original_max_position_embeddings)
            }
            _ => None,
        }
    }

    /// Cosines and sines `[positions, rotated channels / 2]`, as [`Context::rotary`](crate::Context::rotary) holds them.
    pub fn tables(&self, head_dim: usize, positions: &[u32], device: &Device) -> [Tensor<2>; 2] {
        let length = positions.iter().max().map_or(1, |last| *last as usize + 1);
        let (frequencies, factor) = frequencies(self, head_dim, length);
        let table = |f: fn(f32) -> f32| {
            let values: Vec<f32> = positions
                .iter()
                .flat_map(|&position| frequencies.iter().map(move |w| f(position as f32 * w) * factor))
                .collect();
            Tensor::from_data(TensorData::new(values, [positions.len(), frequencies.len()]), device)
        };
        [table(f32::cos), table(f32::sin)]
    }
}
