//! From a recipe to a checkpoint: plan, run, check, commit.
//!
//! ```text
//! Recipe ─► Plan ─► per block: read ─► calibrate ─► fold ─► solve ─► pack ─► write ─► check ─► commit
//! ```
//!
//! One decoder block is in memory at a time. Nothing appears under its final name before the output
//! was reopened and compared with what was solved; `config.json` comes last. This crate prints
//! nothing: it sends [`Event`]s to an [`Observer`].
#![forbid(unsafe_code)]

mod bench;
mod calibrate;
mod check;
mod error;
mod estimate;
mod events;
mod fold;
mod from_statistics;
mod gather;
mod hidden;
mod layer;
mod limits;
mod locate;
mod passthrough;
mod plan;
mod recipe;
mod rows;
mod rules;
mod run;
mod sequential;
mod source;
mod statistics;
mod tensors;
mod workdir;

pub use bench::measured_gemm_rate;
pub use check::{CheckReport, SiteReport};
pub use error::{ErrorKind, JobError};
pub use estimate::{MemoryEstimate, Work};
pub use events::{Event, Observer, Silent};
pub use gather::{StatisticsPlan, StatisticsReport, calibrate};
pub use locate::{HubFetcher, locate_model};
pub use plan::{Plan, prepare};
pub use recipe::{
    CalibSettings, DeviceChoice, DtypeChoice, EvalSettings, Method, Override, Recipe, Rounding, Solver, StatsSource,
};
pub use run::{RunReport, run};
pub use statistics::Statistics;
pub use tensors::{Action, QuantSite, TensorPlan};
pub use workdir::WorkDir;
