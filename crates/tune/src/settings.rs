use lite_decoder::Role;
use lite_quant::QuantizedLinear;

use crate::TuneError;

/// How a block is tuned. Both learning rates fall linearly to 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TuneSettings {
    /// Adam steps. 0 leaves every linear as it is.
    pub steps: usize,
    /// Calibration windows per step; at least 1.
    pub windows_per_step: usize,
    /// First learning rate of the relative change of a scale.
    pub lr_scale: f32,
    /// First learning rate of a code's shadow, in code units.
    pub lr_code: f32,
    /// How far from its solved code a shadow may start, in code units: 0 to below 0.5. A solver such as GPTQ puts
    /// many codes off their nearest; near 0.5 their shadows would all stand on the edge and the first noisy steps
    /// would tip them.
    pub reach: f32,
    /// Chooses the order of the windows.
    pub seed: u64,
}

impl Default for TuneSettings {
    /// 100 steps of 8 windows, rates 0.002 (scales) and 0.01 (codes), shadows within 0.15 of their codes.
    fn default() -> Self {
        Self { steps: 100, windows_per_step: 8, lr_scale: 2e-3, lr_code: 0.01, reach: 0.15, seed: 0 }
    }
}

impl TuneSettings {
    /// Checks the numbers.
    ///
    /// # Errors
    /// [`TuneError::Setting`].
    pub fn check(&self) -> Result<(), TuneError> {
        if self.windows_per_step == 0 {
            let found = self.windows_per_step.to_string();
            return Err(TuneError::Setting { name: "windows_per_step", found, wanted: "at least 1" });
        }
        if !(0.0..0.5).contains(&self.reach) {
            let found = self.reach.to_string();
            return Err(TuneError::Setting { name: "reach", found, wanted: "a number from 0 to below 0.5" });
        }
        for (name, rate) in [("lr_scale", self.lr_scale), ("lr_code", self.lr_code)] {
            if !(0.0..=1.0).contains(&rate) {
                return Err(TuneError::Setting { name, found: rate.to_string(), wanted: "a number from 0 to 1" });
            }
        }
        Ok(())
    }
}

/// A linear to tune.
#[derive(Debug, Clone, PartialEq)]
pub struct TuneLinear {
    /// Its place in the block.
    pub role: Role,
    /// Its solved codes, scales and zero points.
    pub quantized: QuantizedLinear,
    /// `[N, K]` row-major float weight that it was solved for, error-aware or not: where shadows start.
    pub target: Vec<f32>,
}

/// A side of the training data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// What the quantized block is fed: the quantized stream before it.
    Input,
    /// What its output should be: the float stream after it.
    Target,
}

impl Side {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Input => "inputs",
            Self::Target => "targets",
        }
    }
}

/// Hidden states before and after a block, for all calibration windows; in memory or on disk.
pub trait TuneData {
    /// Number of windows.
    fn windows(&self) -> usize;

    /// Hidden states of `count` windows from `first` on: `(count, tokens, hidden)`, f32, row-major.
    ///
    /// # Errors
    /// Whatever reading takes; ends tuning as [`TuneError::Data`].
    fn read(
        &self,
        side: Side,
        first: usize,
        count: usize,
    ) -> Result<Vec<f32>, Box<dyn std::error::Error + Send + Sync>>;
}

/// What tuning made of one linear.
#[derive(Debug, Clone, PartialEq)]
pub struct TunedLinear {
    /// Its place in the block.
    pub role: Role,
    /// The better of before and after.
    pub quantized: QuantizedLinear,
    /// Codes that differ from the given ones.
    pub changed_codes: usize,
}

/// What tuning made of a block.
#[derive(Debug, Clone, PartialEq)]
pub struct TuneOutcome {
    /// The linears, in the order given.
    pub linears: Vec<TunedLinear>,
    /// Mean squared error of the block's output before tuning, on windows not used for it.
    pub held_out_before: f64,
    /// The same of what tuning made, whether it was kept or not.
    pub held_out_after: f64,
    /// Whether tuning lowered it; else the linears are as given.
    pub kept: bool,
}
