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

mod batches;
mod bench;
mod cache;
mod calibrate;
mod check;
mod device;
mod documents;
mod entrance;
mod error;
mod estimate;
mod events;
mod expert_rows;
mod experts;
mod fold;
mod from_statistics;
mod gather;
mod hidden;
mod identity;
mod inputs;
mod journal;
mod lanes;
mod layer;
mod limits;
mod locate;
mod names;
mod observed;
mod passthrough;
mod plan;
mod poor;
mod recipe;
mod record;
mod replay;
mod routed;
mod rows;
mod rules;
mod run;
mod schemes;
mod sequential;
mod smooth;
mod source;
mod statistics;
mod stream;
mod tensors;
mod texts;
mod workdir;

pub use bench::measured_gemm_rate;
pub use check::{CheckReport, SiteReport};
pub use device::open_device;
pub use documents::{Documents, Finished, kept_name, set_aside, write_document};
pub use error::{ErrorKind, JobError};
pub use estimate::{MemoryEstimate, Work};
pub use events::{Event, Observer, Silent};
pub use gather::{StatisticsPlan, StatisticsReport, calibrate, gather_statistics};
pub use identity::{planned_identity, same_identity};
pub use journal::{RecordedCommand, recorded_command};
pub use locate::{HubFetcher, locate_model};
pub use plan::{Plan, prepare};
pub use recipe::{
    CalibSettings, DeviceChoice, DtypeChoice, EvalSettings, ExpertPolicy, ExpertSettings, Method, Override, Recipe,
    ResumeSettings, Rounding, SmoothScales, Solver, StatsSource,
};
pub use run::{RunReport, run, run_sharing, run_with};
pub use schemes::words as scheme_words;
pub use statistics::Statistics;
pub use tensors::{Action, QuantSite, TensorPlan};
pub use texts::TextCache;
pub use workdir::WorkDir;
