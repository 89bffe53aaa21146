//! What the distribution of codes and scales tells without the original.
//!
//! A quantizer that fits the range of a group to its weights leaves traces that damage breaks: codes reach an end of the
//! grid; their mean lies at the zero point, since weights have mean zero; groups with a wide range for their spread have a
//! large scale and codes that spread little, so that both are anticorrelated.

use lite_quant::floats::{FloatLinear, ScaleKind};
use lite_quant::{QuantizedLinear, ScaleDtype, Weights};
use rayon::prelude::*;

use super::findings::Findings;

/// Weights below which a tensor is too small for its distribution to mean anything.
const ENOUGH: usize = 4096;
/// Output channels of a packed word of 4-bit codes.
const WORD: usize = 8;

/// Codes under one scale.
#[derive(Debug, Clone, Copy)]
struct Cell {
    /// Smallest and largest code; for floats largest magnitude over the format's.
    low: f32,
    high: f32,
    mean: f32,
    std: f32,
    /// Whether any weight is not zero.
    live: bool,
}

/// Judges codes, scales and zero points of `module`.
pub(super) fn judge(module: &str, weights: &Weights, layout: &str, findings: &mut Findings) {
    match weights {
        Weights::Int(linear) => judge_int(module, linear, layout, findings),
        Weights::Float(linear) => judge_float(module, linear, findings),
    }
}

fn judge_int(module: &str, q: &QuantizedLinear, layout: &str, findings: &mut Findings) {
    let (k, groups) = (q.in_features, q.groups());
    if k == 0 || groups == 0 || q.check().is_err() {
        return;
    }
    let width = k / groups;
    let cells: Vec<Cell> = q
        .codes
        .par_chunks(width)
        .zip(q.zeros.par_chunks(1))
        .map(|(codes, zero)| {
            let (mut low, mut high, mut sum, mut squares, mut live) = (u8::MAX, 0u8, 0u64, 0u64, false);
            for &code in codes {
                (low, high) = (low.min(code), high.max(code));
                sum += u64::from(code);
                squares += u64::from(code) * u64::from(code);
                live |= code != zero[0];
            }
            let mean = sum as f64 / codes.len() as f64;
            let variance = (squares as f64 / codes.len() as f64 - mean * mean).max(0.0);
            Cell { low: low.into(), high: high.into(), mean: mean as f32, std: variance.sqrt() as f32, live }
        })
        .collect();
    let kind = Some(q.scheme.scale_dtype);
    scales(module, &q.scales, &cells, kind, findings);
    let max = f32::from(q.scheme.max_code());
    let counts = histogram(&q.codes);
    constant_int(module, q, &counts, &cells, groups, findings);
    if q.codes.len() < ENOUGH {
        return;
    }
    let ends = counts[0] + counts[usize::from(q.scheme.max_code())];
    if q.scheme.bits >= 4 && 2 * ends > q.codes.len() {
        saturated(module, ends, q.codes.len(), findings);
    }
    let middle = usize::from(q.scheme.middle_code());
    if q.zeros.iter().all(|zero| usize::from(*zero) == middle) {
        one_sided(module, counts[..middle].iter().sum(), counts[middle + 1..].iter().sum(), findings);
    }
    let live = cells.iter().filter(|cell| cell.live).count().max(1);
    let near = 0.1 * max;
    let reach = |cell: &&Cell| cell.live && (cell.low <= near || cell.high >= max - near);
    ranged(module, cells.iter().filter(reach).count(), live, findings);
    let offset: f64 = cells.iter().zip(&q.zeros).map(|(cell, zero)| f64::from(cell.mean) - f64::from(*zero)).sum();
    let offset = offset / cells.len() as f64;
    if q.scheme.bits <= 4 && offset.abs() > 0.5 {
        let message = format!(
            "codes lie {:.2} steps {} their zero points on average, where weights have mean zero: the zero points are \
             read off by one; check `checkpoint_format` (gptq stores them minus one, gptq_v2 as they are)",
            offset.abs(),
            if offset > 0.0 { "above" } else { "below" }
        );
        findings.error("zero-offset", Some(module), message);
    }
    order(module, q, &cells, groups, layout, findings);
}

/// Whether codes, zero points and scales belong to the same output channels.
fn order(module: &str, q: &QuantizedLinear, cells: &[Cell], groups: usize, layout: &str, findings: &mut Findings) {
    let n = q.out_features;
    if !n.is_multiple_of(WORD) || cells.len() < 256 {
        return;
    }
    let means: Vec<f32> = cells.iter().map(|cell| cell.mean).collect();
    let zeros: Vec<f32> = q.zeros.iter().map(|zero| f32::from(*zero)).collect();
    let same: Vec<usize> = (0..WORD).collect();
    if q.scheme.bits >= 3
        && let Some(found) = correlation(&means, &zeros, groups, &same)
        && found < 0.4
    {
        let message = format!(
            "mean codes and zero points of neighbouring output channels have a correlation of {found:.2}, wanted near 1: \
             codes and zero points do not belong together; they are packed in another order than the layout's, or \
             transposed"
        );
        findings.error("pack-order", Some(module), message);
        return;
    }
    if layout != "awq" {
        return;
    }
    let spread: Vec<f32> = cells.iter().map(|cell| (cell.std + 1e-6).ln()).collect();
    let scales: Vec<f32> = q.scales.iter().map(|scale| scale.abs().max(f32::MIN_POSITIVE).ln()).collect();
    // Rows differ in size, groups of a row hardly do: what remains is how well the range fits each group.
    let (spread, scales) = (row_centred(&spread, groups), row_centred(&scales, groups));
    let Some(stored) = correlation(&spread, &scales, groups, &same) else { return };
    // AutoAWQ's interleaving applied once too often, or not at all.
    for other in [[0, 2, 4, 6, 1, 3, 5, 7], [0, 4, 1, 5, 2, 6, 3, 7]] {
        if let Some(found) = correlation(&spread, &scales, groups, &other)
            && found < -0.3
            && found < stored - 0.25
        {
            let message = format!(
                "spread of codes and scales fit together better with the nibbles of each word in another order \
                 (correlation {found:.2} instead of {stored:.2}): the file is not packed in AutoAWQ's order"
            );
            findings.error("pack-order", Some(module), message);
            return;
        }
    }
}

/// Correlation of two `[n, groups]` tables over the eight channels of each word, each group by itself, the first with
/// its channels in `order`; `None` where either does not vary.
fn correlation(a: &[f32], b: &[f32], groups: usize, order: &[usize]) -> Option<f64> {
    let (mut ab, mut aa, mut bb) = (0f64, 0f64, 0f64);
    for word in 0..a.len() / groups / WORD {
        for group in 0..groups {
            let at = |channel: usize| (word * WORD + channel) * groups + group;
            let values: Vec<(f64, f64)> =
                (0..WORD).map(|i| (f64::from(a[at(order[i])]), f64::from(b[at(i)]))).collect();
            let mean = |of: fn(&(f64, f64)) -> f64| values.iter().map(of).sum::<f64>() / WORD as f64;
            let (x, y) = (mean(|v| v.0), mean(|v| v.1));
            for (v, w) in values {
                ab += (v - x) * (w - y);
                aa += (v - x) * (v - x);
                bb += (w - y) * (w - y);
            }
        }
    }
    let norm = (aa * bb).sqrt();
    (norm > 1e-9 && norm.is_finite()).then(|| ab / norm)
}

/// A `[n, groups]` table less the mean of each row, where a row has several groups.
fn row_centred(values: &[f32], groups: usize) -> Vec<f32> {
    if groups < 2 {
        return values.to_vec();
    }
    let centre = |row: &[f32]| {
        let mean = row.iter().sum::<f32>() / row.len() as f32;
        row.iter().map(|value| value - mean).collect::<Vec<f32>>()
    };
    values.chunks(groups).flat_map(centre).collect()
}

fn judge_float(module: &str, q: &FloatLinear, findings: &mut Findings) {
    if q.check().is_err() || q.codes.is_empty() {
        return;
    }
    let (n, k) = (q.out_features, q.in_features);
    let Ok((rows, columns)) = q.scheme.grain.grid(n, k) else { return };
    let (tall, wide) = q.scheme.grain.cover(n, k);
    let largest = q.scheme.format.largest();
    let table: Vec<f32> = (0..=255).map(|code| q.scheme.format.decode(code)).collect();
    let cells: Vec<Cell> = (0..rows * columns)
        .into_par_iter()
        .map(|at| {
            let (top, left) = (at / columns * tall, at % columns * wide);
            let mut high = 0f32;
            for row in top..(top + tall).min(n) {
                let codes = &q.codes[row * k + left..row * k + (left + wide).min(k)];
                high = codes.iter().fold(high, |high, code| high.max(table[usize::from(*code)].abs()));
            }
            Cell { low: 0.0, high, mean: 0.0, std: 0.0, live: high > 0.0 }
        })
        .collect();
    let kind = match q.scheme.scale {
        ScaleKind::Float(dtype) => Some(dtype),
        ScaleKind::E8M0 | ScaleKind::E4M3WithGlobal => None,
    };
    scales(module, &q.scales, &cells, kind, findings);
    if !(q.global_scale > 0.0 && q.global_scale.is_finite()) {
        let message = format!("the scale of the whole tensor is {}, wanted a positive number", q.global_scale);
        findings.error("scale-zero", Some(module), message);
    }
    let counts = histogram(&q.codes);
    let share = |keep: &dyn Fn(f32) -> bool| -> usize {
        counts.iter().zip(&table).filter(|(_, value)| keep(**value)).map(|(count, _)| *count).sum()
    };
    let broken = share(&|value| !value.is_finite());
    if broken > 0 {
        let message = format!("{broken} codes mean NaN or Inf; the file is damaged: make it again");
        findings.error("value-not-finite", Some(module), message);
    }
    if q.codes.len() < ENOUGH {
        return;
    }
    if counts.iter().filter(|count| **count > 0).count() == 1 {
        constant(module, findings);
        return;
    }
    let ends = share(&|value| value.abs() == largest);
    if 2 * ends > q.codes.len() {
        saturated(module, ends, q.codes.len(), findings);
    }
    one_sided(module, share(&|value| value < 0.0), share(&|value| value > 0.0), findings);
    let live = cells.iter().filter(|cell| cell.live).count().max(1);
    ranged(module, cells.iter().filter(|cell| cell.high >= 0.4 * largest).count(), live, findings);
}

fn histogram(codes: &[u8]) -> Vec<usize> {
    let count = |mut counts: Vec<usize>, codes: &[u8]| {
        codes.iter().for_each(|code| counts[usize::from(*code)] += 1);
        counts
    };
    let add = |mut a: Vec<usize>, b: Vec<usize>| {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        a
    };
    codes.par_chunks(1 << 16).map(|codes| count(vec![0; 256], codes)).reduce(|| vec![0; 256], add)
}

/// Scales: positive, normal, of one magnitude.
fn scales(module: &str, scales: &[f32], cells: &[Cell], kind: Option<ScaleDtype>, findings: &mut Findings) {
    let live = |at: usize| cells.get(at).is_none_or(|cell| cell.live);
    let positions = |keep: &dyn Fn(usize, f32) -> bool| -> Vec<usize> {
        scales.iter().enumerate().filter(|(at, scale)| keep(*at, **scale)).map(|(at, _)| at).collect()
    };
    let zero = positions(&|_, scale| scale == 0.0);
    if let Some(first) = zero.iter().find(|at| live(**at)) {
        let message = format!("{} scales are zero, the first at position {first}: their weights are lost", zero.len());
        findings.error("scale-zero", Some(module), message);
    } else if !zero.is_empty() {
        let message =
            format!("{} scales of groups that are all zero are zero; some kernels divide by them", zero.len());
        findings.warning("scale-zero", Some(module), message);
    }
    let negative = positions(&|_, scale| scale < 0.0);
    if let Some(first) = negative.first() {
        let message =
            format!("{} of {} scales are negative, the first at position {first}", negative.len(), scales.len());
        if 10 * negative.len() > scales.len() {
            // AutoRound's full-range symmetric scheme.
            let message = format!("{message}: a full-range symmetric scheme; most engines take it");
            findings.warning("scale-negative", Some(module), message);
        } else {
            findings.error("scale-negative", Some(module), format!("{message}: a sign bit is flipped"));
        }
    }
    let tiny = kind.map_or(0.0, ScaleDtype::smallest_scale);
    let subnormal = positions(&|_, scale| scale != 0.0 && scale.abs() < tiny);
    if let Some(first) = subnormal.iter().find(|at| live(**at)) {
        let message = format!(
            "{} scales are subnormal, the first at position {first} is {:e}: engines that flush them read zero; quantize \
             again with larger groups or bf16 scales",
            subnormal.len(),
            scales[*first]
        );
        findings.error("scale-subnormal", Some(module), message);
    } else if !subnormal.is_empty() {
        let message = format!("{} scales of groups that are all zero are subnormal", subnormal.len());
        findings.note("scale-subnormal", Some(module), message);
    }
    let mut sizes: Vec<f32> =
        positions(&|at, scale| scale != 0.0 && live(at)).iter().map(|at| scales[*at].abs()).collect();
    sizes.sort_by(f32::total_cmp);
    let Some(&median) = sizes.get(sizes.len() / 2) else { return };
    if let Some(&most) = sizes.last().filter(|most| **most > 1e4 * median) {
        let message = format!("a scale is {most:e} where the median is {median:e}: a bit of its exponent is flipped");
        findings.error("scale-outlier", Some(module), message);
    }
}

fn constant_int(
    module: &str,
    q: &QuantizedLinear,
    counts: &[usize],
    cells: &[Cell],
    groups: usize,
    findings: &mut Findings,
) {
    if counts.iter().filter(|count| **count > 0).count() == 1 {
        constant(module, findings);
        return;
    }
    if q.in_features < 32 {
        return;
    }
    let equal = |row: &&[Cell]| row.iter().all(|cell| cell.low == cell.high && cell.low == row[0].low);
    let rows: Vec<&[Cell]> = cells.chunks(groups).filter(equal).collect();
    let live = rows.iter().filter(|row| row.iter().any(|cell| cell.live)).count();
    if live > 0 {
        let message = format!("{live} output channels use one code only, and it does not mean zero");
        findings.error("codes-constant", Some(module), message);
    } else if !rows.is_empty() {
        findings.note("codes-constant", Some(module), format!("{} output channels are zero", rows.len()));
    }
}

fn constant(module: &str, findings: &mut Findings) {
    let message = "all codes are the same: the weight is lost; quantize again";
    findings.error("codes-constant", Some(module), message);
}

fn saturated(module: &str, ends: usize, all: usize, findings: &mut Findings) {
    let message = format!(
        "{:.0} % of the codes are at the ends of their range: scales are too small, or codes of fewer bits are read as \
         these",
        100.0 * ends as f64 / all as f64
    );
    findings.error("codes-saturated", Some(module), message);
}

fn one_sided(module: &str, below: usize, above: usize, findings: &mut Findings) {
    if below.min(above) * 50 < below + above {
        let message = format!(
            "{below} codes mean negative weights and {above} positive ones: signs are lost, or signed codes are read as \
             unsigned"
        );
        findings.error("codes-one-sided", Some(module), message);
    }
}

fn ranged(module: &str, reach: usize, live: usize, findings: &mut Findings) {
    if 2 * reach < live {
        let message = format!(
            "only {reach} of {live} groups have a code near an end of the grid, where a quantizer fits the grid to each: \
             codes and scales do not belong together, or the bits are wrong"
        );
        findings.error("codes-range", Some(module), message);
    }
}
