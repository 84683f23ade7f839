//! The Rust blocks of docs/methods and docs/training.md, compiled as documentation tests.

#[doc = include_str!("../../docs/methods/apiq.md")]
struct Apiq;

#[doc = include_str!("../../docs/methods/automixq.md")]
struct Automixq;

#[doc = include_str!("../../docs/methods/awq.md")]
struct Awq;

#[doc = include_str!("../../docs/methods/dora.md")]
struct Dora;

#[doc = include_str!("../../docs/methods/evaluation.md")]
struct Evaluation;

#[doc = include_str!("../../docs/methods/formats.md")]
struct Formats;

#[doc = include_str!("../../docs/methods/gptq.md")]
struct Gptq;

#[doc = include_str!("../../docs/methods/loftq.md")]
struct Loftq;

#[doc = include_str!("../../docs/methods/pruning.md")]
struct Pruning;

#[doc = include_str!("../../docs/methods/q-bara.md")]
struct QBara;

#[doc = include_str!("../../docs/methods/side-tuning.md")]
struct SideTuning;

#[doc = include_str!("../../docs/training.md")]
struct Training;
