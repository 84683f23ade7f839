//! AutoMixQ on real models: what joins [`kiln_mixq_search`] to checkpoints, quantization, calibration and training.
//!
//! | | |
//! | --- | --- |
//! | [`space_of`], [`Choices`], [`TrainingShape`] | a model's search space, with the bytes that loading it takes |
//! | [`ModelObjective`] | KL, activation error, Fisher, short fine-tunes and tasks as one objective |
//! | [`Prunings`] | a model cut by several ratios, from which plans choose one for each block's heads and channels |
//! | [`Variants`] | a model's quantized projections, each made once; a plan's model in no time |
//! | [`LogitKl`], [`Moments`], [`Fisher`], [`FineTune`], [`TaskScore`] | the single measures |
//! | [`load_options`], [`schemes`], [`adapters`], [`attach`] | a plan for loading, calibration and training |
//!
//! Scores are always those of the quantized model. Figures "16-bit" of the literature are `dense` here, and a dense
//! value takes 4 bytes, as it does in the loaded model.
//!
//! # Example
//!
//! Two formats for each layer of the embedded model, searched by KL on 64 tokens:
//!
//! ```
//! use burn::tensor::Device;
//! use kiln::{
//!     mixq::{Choices, KlOptions, ModelObjective, Variants, load_options, space_of},
//!     mixq_search::{Fidelity, KlMix, SearchSettings, TrialLog, search},
//!     models::{Checkpoint, LoadOptions, Windows},
//! };
//!
//! let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/models/tiny-llama");
//! let checkpoint = Checkpoint::open(folder)?;
//! let (model, _) = checkpoint.load(&LoadOptions::default(), &Device::flex())?;
//! let space = space_of(&model, &Choices::new(["affine2:64".parse()?, "affine4:64".parse()?]))?;
//!
//! let ids: Vec<u32> = (0..64).map(|i| i * 37 % 2048).collect();
//! let windows = Windows::leading(&ids, 32, 2)?;
//! let mut objective = ModelObjective::new(Variants::new(model), &windows, &KlOptions::default())?;
//! let mut log = TrialLog::in_memory(&space);
//! let settings = SearchSettings::new(8, Fidelity::kl(64));
//! let outcome = search(&space, &mut objective, &mut log, &KlMix::default(), &settings)?;
//!
//! let best = outcome.front.select(space.largest() - 1)?;
//! let (_, report) = checkpoint.load(&load_options(&best.plan)?, &Device::flex())?;
//! assert_eq!(report.storage.total_bytes() as u64, best.bytes);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod apply;
mod fine_tune;
mod fisher;
mod kl;
mod moments;
mod objective;
mod prunings;
mod space;
mod starts;
mod task_score;
mod variants;

use crate::{Error, Result};
pub use apply::{adapters, attach, load_options, schemes};
pub use fine_tune::{FineTune, Outcome};
pub use fisher::Fisher;
pub use kl::{KlOptions, LogitKl};
pub use moments::Moments;
pub use objective::ModelObjective;
pub use prunings::Prunings;
pub use space::{Choices, TrainingShape, space_of};
pub use task_score::TaskScore;
pub use variants::Variants;
