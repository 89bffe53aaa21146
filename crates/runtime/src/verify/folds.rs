//! Scales that a method moved between the tensors of a block, found again from the tensors.
//!
//! A fold (AWQ, SmoothQuant) multiplies column `c` of all readers of an input by `s_c > 0` and divides what makes that
//! channel by it. Where a norm makes it, `s` is the ratio of the norms, exactly. Where rows of another linear do, `s` is
//! estimated by least squares, once from the columns of the reader and once from the rows of the maker, and both must
//! agree.

use std::collections::BTreeMap;

use lite_decoder::{BlockSpec, NormKind, Producer, Role, SiteId};
use rayon::prelude::*;

use super::Judged;
use super::findings::Findings;
use super::original::Original;
use crate::RuntimeError;

/// One linear of a block, dequantized, and the original's weight, both `[N, K]`.
pub(super) struct Pair {
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) ours: Vec<f32>,
    pub(super) theirs: Vec<f32>,
}

/// What the columns and rows of each linear of a block were multiplied by.
#[derive(Default)]
pub(super) struct Scales {
    pub(super) columns: BTreeMap<SiteId, Vec<f32>>,
    pub(super) rows: BTreeMap<SiteId, Vec<f32>>,
}

/// Finds the folds of one block. `exact` is whether codes are fine enough (4 bits or more) for strict comparisons.
pub(super) fn find(
    block: &BlockSpec,
    judged: &Judged<'_>,
    original: &Original,
    pairs: &BTreeMap<SiteId, Pair>,
    exact: bool,
    findings: &mut Findings,
) -> Result<Scales, RuntimeError> {
    let mut scales = Scales::default();
    for fold in &block.folds {
        let Producer::Norm { weight, kind, .. } = &fold.producer else { continue };
        let ratio = of_norm(judged, original, weight, *kind, findings)?;
        for router in &fold.plain_consumers {
            check_router(judged, original, router, ratio.as_deref(), findings)?;
        }
        if let Some(ratio) = ratio {
            for consumer in &fold.consumers {
                scales.columns.insert(*consumer, ratio.clone());
            }
        }
    }
    for fold in &block.folds {
        if let Producer::Rows { site, rows } = &fold.producer
            && let Some(maker) = pairs.get(site)
            && let [consumer] = fold.consumers.as_slice()
            && let Some(reader) = pairs.get(consumer)
            && rows.len() == reader.k
        {
            let by_rows = row_ratios(maker, scales.columns.get(site).map(Vec::as_slice));
            let by_columns = column_ratios(reader);
            let name = block.sites.iter().find(|s| s.id == *site).map_or("", |s| s.module.as_str());
            // Codes solved on little data leave channels that were seldom seen: only routed experts have so little.
            let stretch = if matches!(site.role, Role::Expert(..)) { 2.0 } else { 1.0 };
            let found = between(name, rows, &by_rows, &by_columns, exact, stretch, findings);
            if let Some((row_scales, column_scales)) = found {
                scales.rows.insert(*site, row_scales);
                scales.columns.insert(*consumer, column_scales);
            }
        }
    }
    Ok(scales)
}

/// `original / ours` of a norm's factors; `None` where they are equal, or cannot be compared.
fn of_norm(
    judged: &Judged<'_>,
    original: &Original,
    name: &str,
    kind: NormKind,
    findings: &mut Findings,
) -> Result<Option<Vec<f32>>, RuntimeError> {
    if original.holds_same(judged.checkpoint, name) {
        return Ok(None);
    }
    let (Ok(ours), Some((_, theirs))) = (judged.checkpoint.tensor_f32(name), original.load(name)?) else {
        return Ok(None);
    };
    if ours.len() != theirs.len() {
        return Ok(None);
    }
    let ratio = |(a, b): (&f32, &f32)| match (kind.factor(*a), kind.factor(*b)) {
        (0.0, 0.0) => 1.0,
        (a, b) => b / a,
    };
    let ratios: Vec<f32> = ours.iter().zip(&theirs).map(ratio).collect();
    let bad = ratios.iter().filter(|ratio| !(**ratio > 0.0 && ratio.is_finite())).count();
    if bad > 0 {
        let message = format!(
            "{bad} of its values have lost their sign or become zero against the original's: no fold of positive scales \
             does that; copy the original's or quantize again"
        );
        findings.error("fold-inconsistent", Some(name), message);
        return Ok(Some(ratios.iter().map(|r| if *r > 0.0 && r.is_finite() { *r } else { 1.0 }).collect()));
    }
    Ok(Some(ratios))
}

/// Largest relative error of a router: two bits of bfloat16.
const ROUTER_TOLERANCE: f64 = 1.0 / 128.0;

/// A router reads the same norm as the experts: its columns must have been multiplied by what the norm was divided by,
/// or tokens go to other experts.
fn check_router(
    judged: &Judged<'_>,
    original: &Original,
    name: &str,
    ratio: Option<&[f32]>,
    findings: &mut Findings,
) -> Result<(), RuntimeError> {
    if ratio.is_none() && original.holds_same(judged.checkpoint, name) {
        return Ok(());
    }
    let (Ok(ours), Some((_, theirs))) = (judged.checkpoint.tensor_f32(name), original.load(name)?) else {
        return Ok(());
    };
    if ours.len() != theirs.len() || ratio.is_some_and(|ratio| ratio.is_empty()) {
        return Ok(());
    }
    let (mut error, mut energy) = (0f64, 0f64);
    for (i, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
        let wanted = f64::from(*theirs) * ratio.map_or(1.0, |ratio| f64::from(ratio[i % ratio.len()]));
        error += (f64::from(*ours) - wanted).powi(2);
        energy += wanted * wanted;
    }
    let relative = (error / energy.max(f64::MIN_POSITIVE)).sqrt();
    if relative.is_nan() || relative > ROUTER_TOLERANCE {
        let message = format!(
            "is off by {:.2} % from the original's times what the norm before it was divided by: tokens go to other \
             experts; quantize again with a tool that rescales routers, or without scales",
            relative * 100.0
        );
        findings.error("router-not-rescaled", Some(name), message);
    }
    Ok(())
}

/// Scales between the rows of a maker and the columns of a reader: (rows of the maker, columns of the reader); `None`
/// where there is no fold. What disagrees by up to `stretch` times the limit is a warning.
fn between(
    maker: &str,
    rows: &[u32],
    by_rows: &[f32],
    by_columns: &[f32],
    exact: bool,
    stretch: f32,
    findings: &mut Findings,
) -> Option<(Vec<f32>, Vec<f32>)> {
    let usable = |value: f32| value > 0.0 && value.is_finite();
    let row = |channel: usize| by_rows.get(*rows.get(channel)? as usize).copied();
    // A channel whose weights are all zero has no ratio and needs none.
    let products: Vec<Option<f32>> = (0..by_columns.len())
        .map(|c| row(c).filter(|r| !r.is_nan() && !by_columns[c].is_nan()).map(|r| r * by_columns[c]))
        .collect();
    let mut sorted: Vec<f32> = products.iter().flatten().copied().collect();
    sorted.sort_by(f32::total_cmp);
    let middle = *sorted.get(sorted.len() / 2)?;
    let mut apart: Vec<f32> = sorted.iter().map(|p| (p - middle).abs()).collect();
    apart.sort_by(f32::total_cmp);
    let spread = apart.get(apart.len() / 2).copied().unwrap_or(0.0);
    let limit = (if exact { 0.15f32 } else { 0.4 }).max(12.0 * spread);
    let beyond =
        |limit: f32| products.iter().flatten().filter(move |p| !((**p - middle).abs() <= limit && usable(**p)));
    let wrong = beyond(limit).count();
    if wrong > 0 {
        let message = format!(
            "its rows and the columns that read them were not rescaled by inverse factors in {wrong} of {} channels: one \
             of the two is damaged",
            by_columns.len()
        );
        if beyond(stretch * limit).next().is_some() {
            findings.error("fold-inconsistent", Some(maker), message);
        } else {
            findings.warning("fold-inconsistent", Some(maker), message + ", or both were solved on little data");
        }
    }
    let moved = |value: f32, by: f32| usable(value) && value.ln().abs() > by;
    let active = by_columns.iter().filter(|ratio| moved(**ratio, 0.05)).count();
    // A fold of few channels: coarse codes move as many by themselves.
    let few = 5 * active < by_columns.len();
    if few && !exact {
        return None;
    }
    // One factor for each row: the geometric mean of what its readers and itself say.
    let mut sums = vec![(0f64, 0u32); by_rows.len()];
    for (channel, ratio) in by_columns.iter().enumerate() {
        if let Some(r) = row(channel).filter(|r| usable(*r) && usable(*ratio)) {
            let sum = sums.get_mut(*rows.get(channel)? as usize)?;
            sum.0 += 0.5 * (f64::from(*ratio).ln() - f64::from(r).ln());
            sum.1 += 1;
        }
    }
    let factor: Vec<f32> =
        sums.iter().map(|(sum, count)| if *count > 0 { (sum / f64::from(*count)).exp() as f32 } else { 1.0 }).collect();
    let factor: Vec<f32> = factor.into_iter().map(|f| if few && !moved(f, 0.01) { 1.0 } else { f }).collect();
    if factor.iter().all(|f| *f == 1.0) {
        return None;
    }
    let columns = (0..by_columns.len()).map(|c| factor.get(rows[c] as usize).copied().unwrap_or(1.0)).collect();
    Some((factor.iter().map(|f| 1.0 / f).collect(), columns))
}

/// Least-squares factor of each row of `ours` over `theirs` with its columns scaled; NaN where that is zero.
fn row_ratios(pair: &Pair, columns: Option<&[f32]>) -> Vec<f32> {
    let k = pair.k.max(1);
    let rows = pair.ours.par_chunks(k).zip(pair.theirs.par_chunks(k));
    rows.map(|(ours, theirs)| {
        let (mut dot, mut square) = (0f64, 0f64);
        for (j, (a, b)) in ours.iter().zip(theirs).enumerate() {
            let b = f64::from(*b) * f64::from(columns.map_or(1.0, |columns| columns[j]));
            dot += f64::from(*a) * b;
            square += b * b;
        }
        (dot / square) as f32
    })
    .collect()
}

/// The same of each column.
pub(super) fn column_ratios(pair: &Pair) -> Vec<f32> {
    let mut sums = vec![(0f64, 0f64); pair.k];
    for (ours, theirs) in pair.ours.chunks(pair.k.max(1)).zip(pair.theirs.chunks(pair.k.max(1))) {
        for ((sum, a), b) in sums.iter_mut().zip(ours).zip(theirs) {
            sum.0 += f64::from(*a) * f64::from(*b);
            sum.1 += f64::from(*b) * f64::from(*b);
        }
    }
    sums.into_iter().map(|(dot, square)| (dot / square) as f32).collect()
}
