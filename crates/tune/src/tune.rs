use candle_core::Tensor;
use lite_decoder::{Block, NoTap, Role, Rope, with_cpu_slice};
use lite_quant::QuantizedLinear;

use crate::network::{Network, Stage};
use crate::pass::Tape;
use crate::schedule::Schedule;
use crate::shadow::{Rates, Shadow};
use crate::{Side, TuneData, TuneError, TuneLinear, TuneOutcome, TuneSettings, TunedLinear};

/// One window in this many is held out to judge by, the last ones.
const HELD_OUT: usize = 8;

/// Rows whose intermediate values exist at a time (more only if one window is longer): bounds memory.
const ROWS_AT_ONCE: usize = 2048;

/// Tunes the scales and codes of a solved block: lowers the mean squared error between the block with quantized
/// weights, run on the quantized stream, and the float block's outputs on the float stream. Zero points stay.
///
/// `block` holds norms and biases as they will be stored, and the float weight of every linear that is not in
/// `linears`. `rope` must be for the windows of `data`. The last eighth of the windows (at least one) is held out: only
/// what lowers the error there is returned, else the linears come back as given. Scales are rounded to their storage
/// type in every step. The same input gives the same bytes for any number of threads.
///
/// Besides the data of a few thousand tokens, memory holds about six f32 per weight of the block.
///
/// `cancel` is asked before every step.
///
/// # Errors
/// [`TuneError`]: settings, linears or data that do not fit, fewer than two windows, NaN or Inf anywhere,
/// reading failed, or `cancel` said so.
pub fn tune_block(
    block: &Block,
    linears: Vec<TuneLinear>,
    rope: &Rope,
    data: &dyn TuneData,
    settings: &TuneSettings,
    cancel: &dyn Fn() -> bool,
) -> Result<TuneOutcome, TuneError> {
    settings.check()?;
    let windows = data.windows();
    if windows < 2 {
        return Err(TuneError::TooFewWindows { found: windows });
    }
    let held_out = (windows / HELD_OUT).max(1);
    let mut network = Network::new(block, rope)?;
    check(block, &linears)?;

    let before: Vec<(Role, &QuantizedLinear)> = linears.iter().map(|l| (l.role, &l.quantized)).collect();
    let judge = Judge { block, rope, data, first: windows - held_out, hidden: network.hidden };
    let held_out_before = judge.error(&before, cancel)?;
    let mut tuner = Tuner::new(&mut network, linears, settings.reach);
    // Nothing to gain, or nothing to do.
    if held_out_before == 0.0 || settings.steps == 0 || tuner.linears.is_empty() {
        let linears = tuner.linears.into_iter().map(|l| unchanged(l.role, l.shadow.into_solved())).collect();
        return Ok(TuneOutcome { linears, held_out_before, held_out_after: held_out_before, kept: false });
    }
    // Gradients towards outputs are errors in units of their root mean square: no size of activations under- or overflows,
    // and Adam's ε stays negligible.
    let seed = (1.0 / held_out_before.sqrt()) as f32;
    let mut schedule = Schedule::new(windows - held_out, settings.seed);
    for step in 0..settings.steps {
        if cancel() {
            return Err(TuneError::Cancelled);
        }
        let batch = schedule.deal(settings.windows_per_step);
        let left = 1.0 - step as f32 / settings.steps as f32;
        let rates = Rates::new(step, settings.lr_scale * left, settings.lr_code * left);
        let error = tuner.step(&mut network, data, &batch, seed, rates)?;
        if !error.is_finite() {
            let what = format!("hidden states or weights of block {} in tuning step {step}", block.spec().index);
            return Err(TuneError::NotFinite { what });
        }
    }
    let tuned: Vec<(Role, QuantizedLinear)> = tuner.linears.iter().map(|l| (l.role, l.shadow.quantized())).collect();
    let after: Vec<(Role, &QuantizedLinear)> = tuned.iter().map(|(role, quantized)| (*role, quantized)).collect();
    let held_out_after = judge.error(&after, cancel)?;
    let kept = held_out_after < held_out_before;
    let pairs = tuner.linears.into_iter().zip(tuned);
    let linears = pairs.map(|(linear, (role, quantized))| {
        let solved = linear.shadow.into_solved();
        if !kept {
            return unchanged(role, solved);
        }
        let changed_codes = solved.codes.iter().zip(&quantized.codes).filter(|(a, b)| a != b).count();
        TunedLinear { role, quantized, changed_codes }
    });
    Ok(TuneOutcome { linears: linears.collect(), held_out_before, held_out_after, kept })
}

fn unchanged(role: Role, quantized: QuantizedLinear) -> TunedLinear {
    TunedLinear { role, quantized, changed_codes: 0 }
}

/// Whether the linears are what they say and belong to the block.
fn check(block: &Block, linears: &[TuneLinear]) -> Result<(), TuneError> {
    for (index, TuneLinear { role, quantized, target }) in linears.iter().enumerate() {
        let role = *role;
        let wrong = |reason: String| Err(TuneError::Linear { role, reason });
        let Some(weight) = block.weight(role) else {
            return wrong(format!("is not a linear of block {}", block.spec().index));
        };
        if linears[..index].iter().any(|other| other.role == role) {
            return wrong("was given twice".to_owned());
        }
        let shape = [quantized.out_features, quantized.in_features];
        if weight.dims() != shape || shape.contains(&0) {
            return wrong(format!("is quantized as {shape:?}, the block has {:?}", weight.dims()));
        }
        quantized.check().map_err(|source| TuneError::Quant { role, source })?;
        if target.len() != quantized.codes.len() {
            return wrong(format!("has a target of {} values, wanted {}", target.len(), quantized.codes.len()));
        }
        let top = quantized.scheme.max_code();
        if let Some(code) = quantized.codes.iter().chain(&quantized.zeros).find(|code| **code > top) {
            return wrong(format!("holds the code {code}, wanted at most {top}"));
        }
        if let Some(scale) = quantized.scales.iter().find(|scale| !(scale.is_normal() && **scale > 0.0)) {
            return wrong(format!("holds the scale {scale}, wanted a positive normal number"));
        }
        if target.iter().any(|value| !value.is_finite()) {
            return Err(TuneError::NotFinite { what: format!("the target weights of {role:?}") });
        }
    }
    Ok(())
}

/// Hidden states of one window.
fn read(data: &dyn TuneData, side: Side, window: usize, wanted: usize) -> Result<Vec<f32>, TuneError> {
    let values = data.read(side, window, 1).map_err(TuneError::Data)?;
    if values.len() != wanted {
        return Err(TuneError::DataLength { what: side.name(), window, found: values.len(), wanted });
    }
    Ok(values)
}

/// Measures a quantized block on held-out windows, by the very forward pass that everything else uses.
struct Judge<'a> {
    block: &'a Block,
    rope: &'a Rope,
    data: &'a dyn TuneData,
    first: usize,
    hidden: usize,
}

impl Judge<'_> {
    /// Mean squared error of the block's output.
    fn error(&self, linears: &[(Role, &QuantizedLinear)], cancel: &dyn Fn() -> bool) -> Result<f64, TuneError> {
        let device = self.block.device();
        let mut block = self.block.clone();
        for (role, quantized) in linears {
            let shape = (quantized.out_features, quantized.in_features);
            block.set_weight(*role, Tensor::from_vec(quantized.dequantize(), shape, device)?)?;
        }
        let (tokens, mut sum) = (self.rope.tokens(), 0f64);
        let windows = self.first..self.data.windows();
        let values = tokens * self.hidden * windows.len();
        for window in windows {
            if cancel() {
                return Err(TuneError::Cancelled);
            }
            let input = read(self.data, Side::Input, window, tokens * self.hidden)?;
            let target = read(self.data, Side::Target, window, tokens * self.hidden)?;
            let x = Tensor::from_vec(input, (1, tokens, self.hidden), device)?;
            let y = block.forward(&x, self.rope, &mut NoTap)?;
            sum += with_cpu_slice(&y, |y| {
                y.iter().zip(&target).map(|(y, t)| f64::from(y - t) * f64::from(y - t)).sum::<f64>()
            })?;
        }
        if !sum.is_finite() {
            let what = format!("outputs or targets of block {} on held-out windows", self.block.spec().index);
            return Err(TuneError::NotFinite { what });
        }
        Ok(sum / values as f64)
    }
}

/// A linear and where its rows are.
struct Tuned {
    role: Role,
    stage: Stage,
    rows: std::ops::Range<usize>,
    shadow: Shadow,
    gradient: Vec<f32>,
}

struct Tuner {
    linears: Vec<Tuned>,
    /// Whether a weight before the feed-forward is tuned, o aside.
    attention: bool,
    tape: Option<(usize, Tape)>,
}

impl Tuner {
    /// Puts the dequantized weights into `network`. The linears were checked against its block.
    fn new(network: &mut Network, linears: Vec<TuneLinear>, reach: f32) -> Self {
        let mut tuned = Vec::new();
        for TuneLinear { role, quantized, target } in linears {
            let Some((stage, rows)) = network.find(role) else { continue };
            let weight = quantized.dequantize();
            let k = quantized.in_features;
            network.stage_mut(stage).weight[rows.start * k..rows.end * k].copy_from_slice(&weight);
            tuned.push(Tuned { role, stage, rows, shadow: Shadow::new(quantized, target, reach), gradient: weight });
        }
        let attention = tuned.iter().any(|linear| linear.stage == Stage::Qkv);
        Self { linears: tuned, attention, tape: None }
    }

    /// One Adam step on the windows `batch`; returns their mean squared error before it.
    fn step(
        &mut self,
        network: &mut Network,
        data: &dyn TuneData,
        batch: &[usize],
        seed: f32,
        rates: Rates,
    ) -> Result<f64, TuneError> {
        let one = network.tokens * network.hidden;
        let at_once = (ROWS_AT_ONCE / network.tokens).max(1);
        let mut sum = 0f64;
        for (index, windows) in batch.chunks(at_once).enumerate() {
            let (mut x, mut target) = (Vec::new(), Vec::new());
            for &window in windows {
                x.extend(read(data, Side::Input, window, one)?);
                target.extend(read(data, Side::Target, window, one)?);
            }
            let rows = windows.len() * network.tokens;
            let tape = match &mut self.tape {
                Some((found, tape)) if *found == rows => tape,
                tape => &mut tape.insert((rows, Tape::new(network, rows))).1,
            };
            sum += tape.run(network, &x, &target, seed, self.attention);
            let beta = if index == 0 { 0.0 } else { 1.0 };
            for linear in &mut self.linears {
                tape.add_weight_gradient(network, linear.stage, linear.rows.clone(), &mut linear.gradient, beta);
            }
        }
        for Tuned { stage, rows, shadow, gradient, .. } in &mut self.linears {
            let fused = network.stage_mut(*stage);
            let k = fused.inputs;
            shadow.step(gradient, &mut fused.weight[rows.start * k..rows.end * k], rates);
        }
        Ok(sum / (batch.len() * one) as f64)
    }
}
