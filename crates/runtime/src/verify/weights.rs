//! Dequantized weights against the original's, folds undone.

mod levels;
mod resemblance;
mod steps;

use std::collections::BTreeMap;

use lite_decoder::{BlockSpec, SiteId};
use lite_quant::floats::FloatFormat;
use lite_quant::{LinearScheme, WeightScheme, Weights};

use self::steps::{Grid, Summary};
use super::findings::Findings;
use super::folds::{self, Pair, Scales};
use super::original::Original;
use super::{Judged, values};
use crate::RuntimeError;
use crate::compare::CompareProgress;

/// Bits of information in a code.
pub(super) fn bits(scheme: &LinearScheme) -> u8 {
    match scheme.weights {
        WeightScheme::Int(int) => int.bits,
        WeightScheme::Float(float) if float.format == FloatFormat::E2M1 => 4,
        WeightScheme::Float(_) => 8,
    }
}

/// Smallest cosine between dequantized and original weights that any known quantizer of so many bits leaves.
fn least_cosine(bits: u8) -> f64 {
    match bits {
        0..=2 => 0.6,
        3 => 0.8,
        4 => 0.92,
        5 | 6 => 0.97,
        _ => 0.985,
    }
}

/// Root mean square error of rounding to nearest, in steps: `1/√12`, and a little for scales that are rounded too.
const NEAREST_STEPS: f64 = 0.3;
/// What else may be behind a finding.
const LITTLE_DATA: &str = ", or they were solved on little data";

/// How the weight of a linear is stored.
enum Stored {
    Packed(Weights),
    /// As values that codes of so many bits stand for.
    Dequantized(u8),
    Plain,
}

impl Stored {
    fn bits(&self) -> u8 {
        match self {
            Self::Packed(weights) => bits(&LinearScheme::from(weights.scheme())),
            Self::Dequantized(bits) => *bits,
            Self::Plain => 16,
        }
    }
}

/// What was compared.
pub(super) struct Compared {
    /// Packed linears.
    pub(super) linears: usize,
    /// Fewest bits of linears that are stored as the values of their codes.
    pub(super) dequantized: Option<u8>,
}

impl Compared {
    fn add(&mut self, stored: &Stored) {
        match stored {
            Stored::Packed(_) => self.linears += 1,
            Stored::Dequantized(bits) => self.dequantized = Some(self.dequantized.map_or(*bits, |b| b.min(*bits))),
            Stored::Plain => {}
        }
    }
}

/// Every linear against the original's weight. Holds one block of both.
pub(super) fn check(
    judged: &Judged<'_>,
    original: &Original,
    progress: CompareProgress<'_>,
    findings: &mut Findings,
) -> Result<Compared, RuntimeError> {
    let Some(spec) = judged.spec else { return without_decoder(judged, original, progress, findings) };
    let mut compared = Compared { linears: 0, dequantized: None };
    for block in &spec.blocks {
        if !progress("weights", block.index, spec.blocks.len()) {
            return Err(RuntimeError::Interrupted);
        }
        block_weights(judged, original, block, &mut compared, findings)?;
    }
    let head = judged.linears.last().filter(|linear| linear.module == spec.head.module);
    if let Some(head) = head
        && let Some((pair, stored)) = load(judged, original, &head.module, head.n, head.k, findings)?
    {
        compared.add(&stored);
        judge(judged, original, &head.module, &pair, &stored, None, None, findings)?;
    }
    Ok(compared)
}

fn without_decoder(
    judged: &Judged<'_>,
    original: &Original,
    progress: CompareProgress<'_>,
    findings: &mut Findings,
) -> Result<Compared, RuntimeError> {
    let mut compared = Compared { linears: 0, dequantized: None };
    for (done, linear) in judged.linears.iter().enumerate() {
        if !progress("weights", done, judged.linears.len()) {
            return Err(RuntimeError::Interrupted);
        }
        if let Some((pair, stored)) = load(judged, original, &linear.module, linear.n, linear.k, findings)? {
            // Folds are not known: what one may change is told by its column ratios alone.
            let columns: Vec<f32> =
                folds::column_ratios(&pair).iter().map(|r| if *r > 0.0 && r.is_finite() { *r } else { 1.0 }).collect();
            judge(judged, original, &linear.module, &pair, &stored, Some(&columns), None, findings)?;
            compared.add(&stored);
        }
    }
    Ok(compared)
}

fn block_weights(
    judged: &Judged<'_>,
    original: &Original,
    block: &BlockSpec,
    compared: &mut Compared,
    findings: &mut Findings,
) -> Result<(), RuntimeError> {
    let mut pairs = BTreeMap::new();
    let mut coded = BTreeMap::new();
    for site in &block.sites {
        let found = load(judged, original, &site.module, site.out_features, site.in_features, findings)?;
        if let Some((pair, stored)) = found {
            pairs.insert(site.id, pair);
            compared.add(&stored);
            coded.insert(site.id, stored);
        }
    }
    let exact = judged.quantized.is_none_or(|quantized| {
        let config = quantized.config();
        config.overrides.iter().map(|(_, scheme)| scheme).chain([&config.scheme]).all(|scheme| bits(scheme) >= 4)
    }) && coded.values().all(|stored| stored.bits() >= 4);
    let scales = folds::find(block, judged, original, &pairs, exact, findings)?;
    for site in &block.sites {
        let Some((pair, stored)) = pairs.get(&site.id).zip(coded.get(&site.id)) else { continue };
        let of = |map: &BTreeMap<SiteId, Vec<f32>>| map.get(&site.id).cloned();
        let (columns, rows) = (of(&scales.columns), of(&scales.rows));
        judge(judged, original, &site.module, pair, stored, columns.as_deref(), rows.as_deref(), findings)?;
        if site.bias {
            bias(judged, original, &site.module, &scales, site.id, findings)?;
        }
    }
    Ok(())
}

/// Both weights of a linear, and how ours is stored; `None` where one of them cannot be read, which is a finding of its
/// own.
fn load(
    judged: &Judged<'_>,
    original: &Original,
    module: &str,
    n: usize,
    k: usize,
    findings: &mut Findings,
) -> Result<Option<(Pair, Stored)>, RuntimeError> {
    let name = format!("{module}.weight");
    let mut weights = None;
    let ours = if judged.is_packed(module) {
        let unpacked = judged.quantized.and_then(|quantized| quantized.linear(module, n, k).ok());
        values::release(judged, module);
        let Some(unpacked) = unpacked else { return Ok(None) };
        let values = unpacked.weights.dequantize();
        weights = Some(unpacked.weights);
        values
    } else {
        match judged.checkpoint.tensor_f32(&name) {
            Ok(values) if values.len() == n.saturating_mul(k) => values,
            _ => return Ok(None),
        }
    };
    let Some((shape, theirs)) = original.load(&name)? else {
        findings.warning("weights-differ", Some(module), "the original has no weight of this name to compare with");
        return Ok(None);
    };
    if shape != [n, k] || theirs.len() != ours.len() {
        let message = format!("is [{n}, {k}], the original's weight is {shape:?}");
        findings.error("weights-differ", Some(module), message);
        return Ok(None);
    }
    let stored = match weights {
        Some(weights) => Stored::Packed(weights),
        None if ours == theirs => Stored::Plain,
        None => levels::bits(&ours, n, k).map_or(Stored::Plain, Stored::Dequantized),
    };
    Ok(Some((Pair { n, k, ours, theirs }, stored)))
}

/// One linear: in all, by column, by group, by code.
fn judge(
    judged: &Judged<'_>,
    original: &Original,
    module: &str,
    pair: &Pair,
    stored: &Stored,
    columns: Option<&[f32]>,
    rows: Option<&[f32]>,
    findings: &mut Findings,
) -> Result<(), RuntimeError> {
    let grid = match stored {
        Stored::Packed(weights) => Grid::of(weights),
        Stored::Dequantized(_) | Stored::Plain => Grid::plain(pair.n, pair.k),
    };
    let Some(grid) = grid else { return Ok(()) };
    let found = Summary::of(pair, &grid, columns, rows);
    let bits = stored.bits();
    if found.cosine.is_nan() || found.cosine < least_cosine(bits) {
        let like = resemblance::find(judged, original, module, pair)?;
        let message = format!(
            "its weights have a cosine of {:.3} with the original's, wanted {} or more for {bits} bits{like}",
            found.cosine,
            least_cosine(bits)
        );
        findings.error("weights-differ", Some(module), message);
        return Ok(());
    }
    match stored {
        Stored::Packed(_) => {}
        Stored::Dequantized(bits) => {
            let message = format!(
                "is stored plain, but as the values of {bits}-bit codes: a quantized model saved as floats, judged by that; \
                 engines load it as a plain one"
            );
            findings.note("plain-on-grid", Some(module), message);
            return Ok(());
        }
        Stored::Plain => {
            // Rounded to the file's type after a fold.
            if found.relative > 0.01 {
                let message = format!(
                    "stored plain, but differs from the original's by {:.2} %, and no fold explains it",
                    100.0 * found.relative
                );
                findings.error("plain-differs", Some(module), message);
            }
            return Ok(());
        }
    }
    let loose = bits < 4;
    // Codes that make up for others (GPTQ) are farther from the weights the less their inputs were determined: few tokens
    // of an expert. What such codes may do by themselves is a warning.
    let slack = (found.steps / NEAREST_STEPS).max(1.0);
    let factor = found.factor();
    if (factor - 1.0).abs() > if loose { 0.5 } else { 0.2 } {
        let message = format!(
            "its weights are {factor:.3e} times the original's as a whole: its scales, or the scale over them, are wrong or \
             read as their reciprocals"
        );
        findings.error("group-scale", Some(module), message);
        return Ok(());
    }
    let least = if loose { 0.5 } else { 0.2 };
    if let Some((count, worst)) = found.columns_off(least) {
        let message = format!(
            "{} scaled by another factor than the tensors around them say, the worst by {worst:.2}: a norm or scales of a \
             fold are damaged",
            counted(count, "input channel is", "input channels are")
        );
        if found.columns_off(least * slack).is_some() {
            findings.error("column-scale", Some(module), message);
        } else {
            findings.warning("column-scale", Some(module), message + LITTLE_DATA);
        }
    }
    if let Some((count, worst, at)) = found.groups_off(if loose { 0.35 } else { 0.08 }) {
        let message = format!(
            "{} not fit the original's weights; that of row {}, group {} is off by a factor of {worst:.3}",
            counted(count, "scale does", "scales do"),
            at.0,
            at.1
        );
        findings.error("group-scale", Some(module), message);
    }
    if let Some((count, worst, at)) = found.shifted() {
        let message = format!(
            "{} shifted against the original's weights; row {}, group {} by {worst:.2} steps: a zero point is wrong",
            counted(count, "group is", "groups are"),
            at.0,
            at.1
        );
        findings.error("zero-shift", Some(module), message);
    }
    if bits >= 4
        && let Some((count, worst, at)) = steps::outliers(pair, &grid, columns, rows, found.steps)
    {
        let message = format!(
            "{} far from the original's weights; that of row {}, column {} by {worst:.1} steps, where the usual error is \
             {:.2}: bits are flipped",
            counted(count, "code is", "codes are"),
            at.0,
            at.1,
            found.steps
        );
        if worst.abs() > steps::outlier_limit(found.steps) * slack {
            findings.error("code-outlier", Some(module), message);
        } else {
            findings.warning("code-outlier", Some(module), message + LITTLE_DATA);
        }
    }
    Ok(())
}

/// How many, with the words for one or for several.
fn counted(count: usize, one: &str, several: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { several })
}

/// A bias, which a fold divides like the rows of its weight.
fn bias(
    judged: &Judged<'_>,
    original: &Original,
    module: &str,
    scales: &Scales,
    site: SiteId,
    findings: &mut Findings,
) -> Result<(), RuntimeError> {
    let name = format!("{module}.bias");
    let (Ok(ours), Some((_, theirs))) = (judged.checkpoint.tensor_f32(&name), original.load(&name)?) else {
        return Ok(());
    };
    let rows = scales.rows.get(&site);
    let largest = theirs.iter().fold(0f32, |most, value| most.max(value.abs()));
    let wanted = |i: usize, value: f32| value * rows.and_then(|rows| rows.get(i)).copied().unwrap_or(1.0);
    let near = |(i, (a, b)): (usize, (&f32, &f32))| {
        let b = wanted(i, *b);
        (a - b).abs() <= 0.03 * b.abs() + 1e-3 * largest
    };
    let off = ours.len().abs_diff(theirs.len()) + ours.iter().zip(&theirs).enumerate().filter(|x| !near(*x)).count();
    if off > 0 {
        let message = format!("{off} of {} values differ from the original's, and no fold explains them", theirs.len());
        findings.warning("plain-differs", Some(&name), message);
    }
    Ok(())
}
