//! Tasks on a scorer: the run, its log, its report, and the comparison of two.

mod compare;
mod evaluation;
mod report;
mod samples;

pub use compare::{Comparison, MetricComparison, SignificanceTest};
pub use evaluation::{Evaluation, OnTaskProgress, TaskProgress};
pub use report::{GroupReport, MetricReport, PROTOCOL, Report, TaskReport};
pub use samples::{Sample, read_samples};
