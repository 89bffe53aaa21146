//! Errors of dequantized weights in steps of their grid.

use lite_quant::Weights;
use lite_quant::floats::ScaleKind;
use rayon::prelude::*;

use super::super::folds::Pair;

/// The grid of a weight: what a step is, and how far it reaches.
pub(super) struct Grid {
    k: usize,
    /// Rows and columns under one scale, and scales in a row of them.
    tall: usize,
    wide: usize,
    columns: usize,
    /// For each scale: step (of the smallest values, for floats), and the ends of the range.
    cells: Vec<(f32, f32, f32)>,
    /// For floats: step over value, `2^−mantissa bits`.
    relative: Option<f32>,
    /// Whether zero points are stored.
    shifts: bool,
}

impl Grid {
    /// A weight that is not quantized: a step is 1, so that steps mean nothing.
    pub(super) fn plain(n: usize, k: usize) -> Option<Self> {
        let cells = vec![(1.0, f32::NEG_INFINITY, f32::INFINITY)];
        (n > 0 && k > 0).then_some(Self { k, tall: n, wide: k, columns: 1, cells, relative: None, shifts: false })
    }

    /// `None` for a weight that breaks its own invariants.
    pub(super) fn of(weights: &Weights) -> Option<Self> {
        match weights {
            Weights::Int(q) => {
                q.check().ok()?;
                let (columns, max) = (q.groups(), f32::from(q.scheme.max_code()));
                let cell = |(scale, zero): (&f32, &u8)| {
                    let zero = f32::from(*zero);
                    let (a, b) = (-zero * scale, (max - zero) * scale);
                    (scale.abs(), a.min(b), a.max(b))
                };
                let cells = q.scales.iter().zip(&q.zeros).map(cell).collect();
                let wide = q.in_features.checked_div(columns).filter(|wide| *wide > 0)?;
                let shifts = !q.zeros.iter().all(|zero| *zero == q.scheme.middle_code());
                Some(Self { k: q.in_features, tall: 1, wide, columns, cells, relative: None, shifts })
            }
            Weights::Float(q) => {
                q.check().ok()?;
                let (n, k) = (q.out_features, q.in_features);
                let (_, columns) = q.scheme.grain.grid(n, k).ok()?;
                let (tall, wide) = q.scheme.grain.cover(n, k);
                let global = if q.scheme.scale == ScaleKind::E4M3WithGlobal { q.global_scale as f32 } else { 1.0 };
                // The smallest subnormal is the step around zero.
                let (smallest, largest) = (q.scheme.format.decode(1), q.scheme.format.largest());
                let mantissa = match q.scheme.format.bits() {
                    4 => 1,
                    _ if largest > 1000.0 => 2,
                    _ => 3,
                };
                let cell = |scale: &f32| {
                    let scale = (scale * global).abs();
                    (scale * smallest, -largest * scale, largest * scale)
                };
                let cells = q.scales.iter().map(cell).collect();
                let relative = Some(0.5f32.powi(mantissa));
                (k > 0 && wide > 0 && tall > 0).then_some(Self {
                    k,
                    tall,
                    wide,
                    columns,
                    cells,
                    relative,
                    shifts: false,
                })
            }
        }
    }

    fn rows(&self, pair: &Pair) -> usize {
        pair.n.div_ceil(self.tall)
    }

    /// `wanted`, what is beyond the range taken for its end; and the step; `None` where that is not a positive number.
    fn within(&self, cell: usize, wanted: f32) -> Option<(f32, f32)> {
        let (step, low, high) = *self.cells.get(cell)?;
        // NaN fails.
        (step > 0.0 && step.is_finite()).then(|| (wanted.max(low).min(high), step))
    }

    /// Error in steps of `ours` against `wanted`, what is beyond the range taken for its end; `None` where the step is
    /// not a positive number.
    fn error(&self, cell: usize, ours: f32, wanted: f32) -> Option<f32> {
        let (wanted, step) = self.within(cell, wanted)?;
        let step = self.relative.map_or(step, |relative| step.max(wanted.abs() * relative));
        Some((ours - wanted) / step)
    }

    fn cell(&self, row: usize, column: usize) -> usize {
        row / self.tall * self.columns + column / self.wide
    }
}

/// Sums over the weights of one scale.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    dot: f64,
    theirs: f64,
    /// Those two against the values that the range leaves: a range may be chosen to cut some off.
    inner_dot: f64,
    inner: f64,
    ours: f64,
    difference: f64,
    steps: f64,
    squares: f64,
    count: f64,
    /// A typical step.
    step: f64,
}

impl Sums {
    fn add(&mut self, other: &Self) {
        self.dot += other.dot;
        self.theirs += other.theirs;
        self.inner_dot += other.inner_dot;
        self.inner += other.inner;
        self.ours += other.ours;
        self.difference += other.difference;
        self.steps += other.steps;
        self.squares += other.squares;
        self.count += other.count;
        self.step = self.step.max(other.step);
    }
}

/// How a weight differs from the original's.
pub(super) struct Summary {
    /// Cosine of both as vectors.
    pub(super) cosine: f64,
    /// `‖ŵ − w‖ / ‖w‖`.
    pub(super) relative: f64,
    /// Root mean square error in steps.
    pub(super) steps: f64,
    /// Scales in a row of the grid.
    width: usize,
    cells: Vec<Sums>,
    column_ratios: Vec<f64>,
    shifts: bool,
}

impl Summary {
    /// Compares `ours` with `theirs` times the scales of `columns` and `rows`.
    pub(super) fn of(pair: &Pair, grid: &Grid, columns: Option<&[f32]>, rows: Option<&[f32]>) -> Self {
        let k = grid.k.max(1);
        // Bands of whole scales, each summed in order: the same for any number of threads.
        let band = |at: usize| -> (Vec<Sums>, Vec<(f64, f64)>) {
            let mut cells = vec![Sums::default(); grid.columns];
            let mut sums = vec![(0f64, 0f64); k];
            for row in at * grid.tall..((at + 1) * grid.tall).min(pair.n) {
                let ours = &pair.ours[row * k..][..k];
                let theirs = &pair.theirs[row * k..][..k];
                let factor = rows.and_then(|rows| rows.get(row)).copied().unwrap_or(1.0);
                for (j, (a, b)) in ours.iter().zip(theirs).enumerate() {
                    let b = b * factor * columns.and_then(|columns| columns.get(j)).copied().unwrap_or(1.0);
                    let cell = &mut cells[j / grid.wide];
                    let (x, y) = (f64::from(*a), f64::from(b));
                    cell.dot += x * y;
                    cell.theirs += y * y;
                    let inner = grid.within(grid.cell(row, j), b).map_or(y, |(inner, _)| f64::from(inner));
                    cell.inner_dot += x * inner;
                    cell.inner += inner * inner;
                    cell.ours += x * x;
                    cell.difference += (x - y) * (x - y);
                    if let Some(error) = grid.error(grid.cell(row, j), *a, b) {
                        cell.steps += f64::from(error);
                        cell.squares += f64::from(error) * f64::from(error);
                        cell.count += 1.0;
                    }
                    sums[j].0 += x * y;
                    sums[j].1 += y * y;
                }
            }
            (cells, sums)
        };
        let bands = grid.rows(pair);
        let mut cells = Vec::with_capacity(grid.cells.len());
        let mut sums = vec![(0f64, 0f64); k];
        // A few bands at a time bound the memory of their column sums.
        for first in (0..bands).step_by(64) {
            let some: Vec<_> = (first..(first + 64).min(bands)).into_par_iter().map(band).collect();
            for (own, by_column) in some {
                cells.extend(own);
                for (sum, own) in sums.iter_mut().zip(by_column) {
                    sum.0 += own.0;
                    sum.1 += own.1;
                }
            }
        }
        let mut all = Sums::default();
        for (at, cell) in cells.iter_mut().enumerate() {
            let size = (cell.theirs / cell.count.max(1.0)).sqrt();
            let step = grid.cells.get(at).map_or(0.0, |cell| f64::from(cell.0));
            cell.step = grid.relative.map_or(step, |relative| step.max(size * f64::from(relative)));
            all.add(cell);
        }
        Self {
            cosine: if all.ours + all.theirs == 0.0 { 1.0 } else { all.dot / (all.ours * all.theirs).sqrt() },
            relative: if all.theirs > 0.0 { (all.difference / all.theirs).sqrt() } else { 0.0 },
            steps: (all.squares / all.count.max(1.0)).sqrt(),
            width: grid.columns,
            cells,
            column_ratios: sums.into_iter().map(|(dot, square)| dot / square).collect(),
            shifts: grid.shifts,
        }
    }

    /// The median over columns of the factor by least squares; 1 for a weight without columns.
    pub(super) fn factor(&self) -> f64 {
        let mut sorted: Vec<f64> = self.column_ratios.iter().copied().filter(|ratio| ratio.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(1.0)
    }

    /// Columns whose factor is far from that of the others: how many, and the worst.
    pub(super) fn columns_off(&self, least: f64) -> Option<(usize, f64)> {
        let ratios: Vec<(usize, f64)> =
            self.column_ratios.iter().copied().enumerate().filter(|(_, ratio)| ratio.is_finite()).collect();
        let (count, worst, _) = far(&ratios, 10.0, least)?;
        Some((count, worst))
    }

    /// Scales that do not fit: how many, the worst factor, and its row and column in the grid.
    pub(super) fn groups_off(&self, least: f64) -> Option<(usize, f64, (usize, usize))> {
        let ratios: Vec<(usize, f64)> = self
            .cells
            .iter()
            .enumerate()
            .filter(|(_, cell)| cell.inner > 0.0)
            // The factor is least squares over the group: rounding alone moves it by step / norm. Eight times that is
            // taken for nothing.
            .map(|(at, cell)| (at, cell.inner_dot / cell.inner, 8.0 * self.steps * cell.step / cell.inner.sqrt()))
            .map(|(at, ratio, noise)| (at, 1.0 + (ratio - 1.0).signum() * ((ratio - 1.0).abs() - noise).max(0.0)))
            .collect();
        let (count, worst, at) = far(&ratios, 10.0, least)?;
        Some((count, worst, (at / self.width.max(1), at % self.width.max(1))))
    }

    /// Groups that are shifted by a good part of a step: how many, the worst shift, and its row and column in the grid.
    pub(super) fn shifted(&self) -> Option<(usize, f64, (usize, usize))> {
        if !self.shifts {
            return None;
        }
        let mean = |(at, cell): (usize, &Sums)| (cell.count >= 8.0).then(|| (at, cell.steps / cell.count));
        let means: Vec<(usize, f64)> = self.cells.iter().enumerate().filter_map(mean).collect();
        let (count, worst, at) = far_from(0.0, &means, 8.0, 0.5)?;
        Some((count, worst, (at / self.width.max(1), at % self.width.max(1))))
    }
}

/// Error in steps from which on a code is far off; `usual` is the root mean square error.
pub(super) fn outlier_limit(usual: f64) -> f64 {
    (12.0 * usual).max(4.0)
}

/// Codes that are far off: how many, the worst error in steps, and its row and column. `usual` is the root mean square
/// error in steps.
pub(super) fn outliers(
    pair: &Pair,
    grid: &Grid,
    columns: Option<&[f32]>,
    rows: Option<&[f32]>,
    usual: f64,
) -> Option<(usize, f64, (usize, usize))> {
    let k = grid.k.max(1);
    let limit = outlier_limit(usual) as f32;
    let row = |(row, (ours, theirs)): (usize, (&[f32], &[f32]))| {
        let factor = rows.and_then(|rows| rows.get(row)).copied().unwrap_or(1.0);
        let (mut count, mut worst, mut at) = (0usize, 0f32, 0usize);
        for (j, (a, b)) in ours.iter().zip(theirs).enumerate() {
            let b = b * factor * columns.and_then(|columns| columns.get(j)).copied().unwrap_or(1.0);
            let error = grid.error(grid.cell(row, j), *a, b).unwrap_or(0.0);
            if error.abs() > limit {
                count += 1;
                if error.abs() > worst.abs() {
                    (worst, at) = (error, j);
                }
            }
        }
        (count, worst, (row, at))
    };
    let found: Vec<(usize, f32, (usize, usize))> =
        pair.ours.par_chunks(k).zip(pair.theirs.par_chunks(k)).enumerate().map(row).collect();
    let count: usize = found.iter().map(|(count, _, _)| count).sum();
    let worst = found.iter().max_by(|a, b| a.1.abs().total_cmp(&b.1.abs()))?;
    (count > 0).then_some((count, f64::from(worst.1), worst.2))
}

/// Values that are farther from the median than `times` the spread and than `least`: how many, the farthest, its key.
fn far(values: &[(usize, f64)], times: f64, least: f64) -> Option<(usize, f64, usize)> {
    let mut sorted: Vec<f64> = values.iter().map(|(_, value)| *value).collect();
    sorted.sort_by(f64::total_cmp);
    let median = *sorted.get(sorted.len() / 2)?;
    if (median - 1.0).abs() > least {
        return Some((values.len(), median, values[0].0));
    }
    far_from(median, values, times, least)
}

fn far_from(middle: f64, values: &[(usize, f64)], times: f64, least: f64) -> Option<(usize, f64, usize)> {
    let mut apart: Vec<f64> = values.iter().map(|(_, value)| (value - middle).abs()).collect();
    apart.sort_by(f64::total_cmp);
    // The median of absolute deviations is 0.6745 standard deviations of a normal distribution.
    let spread = apart.get(apart.len() / 2)? / 0.6745;
    let limit = least.max(times * spread);
    let beyond = || values.iter().filter(|(_, value)| (value - middle).abs() > limit);
    let worst = beyond().max_by(|a, b| (a.1 - middle).abs().total_cmp(&(b.1 - middle).abs()))?;
    Some((beyond().count(), worst.1, worst.0))
}
