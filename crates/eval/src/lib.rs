#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod error;
#[cfg(test)]
mod golden;
mod memory;
mod metrics;
mod perplexity;
mod probe;
mod python;
mod random;
mod run;
mod scorer;
mod task;
pub mod wikitext;

pub use error::{Error, Result};
pub use memory::peak_rss_bytes;
pub use perplexity::{
    OnProgress, Perplexity, Progress, RollingDocument, RollingPerplexity, RollingResult, StandardError,
    StridedPerplexity, WindowedPerplexity,
};
pub use probe::{Probe, Usage, disk_bytes};
pub use random::PythonRandom;
pub use run::{
    Comparison, Evaluation, GroupReport, MetricComparison, MetricReport, OnTaskProgress, PROTOCOL, Report,
    Sample, SignificanceTest, TaskProgress, TaskReport, read_samples,
};
pub use scorer::{GenerateRequest, ModelScorer, OnAnswer, Scorer, SharedScorer};
pub use task::{
    DataFolder, DatasetFiles, Document, FewshotOptions, Filter, FilterPipeline, GenerationOptions, Gold,
    Group, Metric, MetricOptions, OneOrMany, OutputType, PreparedDocument, Requests, Response, Sampler,
    Score, Scored, Task, TaskData, TaskDescription, read_documents,
};
