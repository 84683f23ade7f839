//! What most programs import: `use kiln::prelude::*`.
//!
//! `Result` isn't here, so that it hides nobody's own; it is [`kiln::Result`](crate::Result).

pub use burn::tensor::Device;
#[doc(no_inline)]
pub use kiln_adapters::AdapterConfig;
#[doc(no_inline)]
pub use kiln_models::{CausalLm, GenerateOptions, chat::Message};
#[doc(no_inline)]
pub use kiln_quant_core::{Projection, QuantLinear, Slots};
#[doc(no_inline)]
pub use kiln_training::{Dataset, Event, RunEnd};

#[doc(no_inline)]
pub use crate::{Base, FineTune, FineTuned, Tuned};
