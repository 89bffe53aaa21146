//! Flags about mixtures of experts, shared by the verbs that calibrate.

use clap::{Args, ValueEnum};
use lite_job::{ExpertPolicy, ExpertSettings};

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Mixtures of experts")]
pub(crate) struct ExpertArgs {
    /// Calibration tokens that are enough for an expert's own statistics
    #[arg(long, default_value_t = ExpertSettings::default().min_tokens, value_name = "N")]
    pub(crate) min_expert_tokens: u64,

    /// What stands for experts that fewer tokens reach; each of them is reported
    #[arg(long, value_enum, default_value_t = PolicyName::Weighted, value_name = "POLICY")]
    pub(crate) expert_policy: PolicyName,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PolicyName {
    /// All tokens, each weighted by the router's score for that expert
    Weighted,
    /// Nearest rounding, with ranges searched on the weights
    Nearest,
    /// The run fails
    Fail,
}

impl ExpertArgs {
    pub(crate) fn settings(&self) -> ExpertSettings {
        let policy = match self.expert_policy {
            PolicyName::Weighted => ExpertPolicy::Weighted,
            PolicyName::Nearest => ExpertPolicy::Nearest,
            PolicyName::Fail => ExpertPolicy::Fail,
        };
        ExpertSettings { min_tokens: self.min_expert_tokens, policy }
    }
}
