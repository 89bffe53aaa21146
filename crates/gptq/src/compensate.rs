//! The GPTQ solve of one chunk: column by column, the rounding error of each column is made up for by those that follow.

use lite_linalg::{Mat, Threads, gemm_into};
use lite_quant::{GroupGrid, nearest_code};

use crate::chunk::{Grids, subtract_combination};

/// Columns whose errors reach each other by vector loops; beyond it by products.
pub(crate) const INNER: usize = 16;

/// Quantizes a chunk.
///
/// * `weight`: `[K, R]` in visiting order; destroyed.
/// * `steps`: `[K, R]` in the original order, receives `code − zero`.
/// * `order`: the column visited at each step; `factor`: U, `[K, K]`, in visiting order.
pub(crate) fn compensate(
    weight: &mut [f32],
    steps: &mut [f32],
    grids: &Grids,
    order: &[usize],
    factor: &[f32],
    block: usize,
    errors: &mut Vec<f32>,
) {
    let (k, lanes) = (order.len(), grids.lanes);
    errors.resize(block.min(k) * lanes, 0.0);
    for start in (0..k).step_by(block) {
        let end = k.min(start + block);
        for inner in (start..end).step_by(INNER) {
            let inner_end = end.min(inner + INNER);
            for step in inner..inner_end {
                let mut coefficients = [0f32; INNER];
                for (c, earlier) in coefficients.iter_mut().zip(inner..step) {
                    *c = factor[earlier * k + step];
                }
                let (before, own) = errors.split_at_mut((step - start) * lanes);
                let column = &mut weight[step * lanes..(step + 1) * lanes];
                subtract_combination(column, &before[(inner - start) * lanes..], &coefficients[..step - inner]);
                let channel = order[step];
                let steps = &mut steps[channel * lanes..(channel + 1) * lanes];
                round_column(column, grids, channel, factor[step * k + step], steps, &mut own[..lanes]);
            }
            // What follows inside the block, then (once per block) everything after it.
            let from = &errors[(inner - start) * lanes..(inner_end - start) * lanes];
            feed_back(weight, factor, k, lanes, inner..inner_end, inner_end..end, from);
        }
        feed_back(weight, factor, k, lanes, start..end, end..k, &errors[..(end - start) * lanes]);
    }
}

/// Rounds one `[R]` column: `steps = code − zero`, `errors = (w − ŵ) / U_jj`.
fn round_column(column: &[f32], grids: &Grids, channel: usize, pivot: f32, steps: &mut [f32], errors: &mut [f32]) {
    let (scales, zeros) = grids.of_column(channel);
    let inverse = 1.0 / pivot;
    for ((((w, &scale), &zero), step), error) in column.iter().zip(scales).zip(zeros).zip(steps).zip(errors) {
        *step = nearest_code(*w, GroupGrid { scale, zero }, grids.top) - f32::from(zero);
        *error = (w - *step * scale) * inverse;
    }
}

/// `weight[to] −= U[from, to]ᵀ · errors`.
fn feed_back(
    weight: &mut [f32],
    factor: &[f32],
    k: usize,
    lanes: usize,
    from: std::ops::Range<usize>,
    to: std::ops::Range<usize>,
    errors: &[f32],
) {
    if to.is_empty() {
        return;
    }
    let coefficients = Mat::window(factor, from.start * k + to.start, from.len(), to.len(), k).t();
    let errors = Mat::new(errors, from.len(), lanes);
    gemm_into(&mut weight[to.start * lanes..], lanes, 1.0, -1.0, coefficients, errors, Threads::One);
}
