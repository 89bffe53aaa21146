//! Range search: how far to shrink the min/max range of each group.
//!
//! For every (row, group) the shrink factor with the least output error is kept,
//! `dᵀ G_gg d` where `d` is the group's rounding error and `G_gg` the group's own block of the Gram
//! matrix `G = XᵀX / T` of the linear's input. Peers weigh by the diagonal only, or by nothing. Without
//! a Gram matrix the weight is the identity.
//!
//! Groups wider than [`TILE`] (per-channel scales) are scored by the diagonal tiles of their block, so
//! that the cost stays `2 · N · K · min(g, TILE) · SHRINK_STEPS` flops.

use lite_linalg::{Mat, Threads, dot, gemm_into};

use crate::{GroupGrid, Scheme, grid_for_range, nearest_code};

/// Shrink factors tried: 1, 0.975, … 0.5.
pub const SHRINK_STEPS: usize = 21;

/// Widest diagonal block of the Gram matrix used to score one group.
const TILE: usize = 256;

/// The `step`-th shrink factor of the range.
pub fn shrink_factor(step: usize) -> f32 {
    1.0 - 0.025 * step as f32
}

/// The candidate grid of `step` for a group whose values span `[min, max]`.
///
/// A symmetric search starts from the divisor `2^(b−1) − 1`, which clips nothing, and passes the usual
/// `2^(b−1) − 1/2` on its way down.
fn candidate(scheme: &Scheme, min: f32, max: f32, step: usize) -> GroupGrid {
    let factor = shrink_factor(step);
    if scheme.symmetric {
        let middle = f32::from(scheme.middle_code());
        let widen = (middle - 0.5) / (middle - 1.0);
        grid_for_range(scheme, min * factor * widen, max * factor * widen)
    } else {
        grid_for_range(scheme, min * factor, max * factor)
    }
}

/// Scratch space of one thread.
#[derive(Default)]
pub(crate) struct SearchBuffers {
    errors: Vec<f32>,
    products: Vec<f32>,
    grids: Vec<GroupGrid>,
    losses: Vec<f64>,
}

/// Finds the best grid of group `group` for each row of `rows` (`[r, k]` row-major), writing `r` grids.
///
/// `gram` is the whole `[k, k]` matrix, or `None` for plain squared error.
pub(crate) fn search_group(
    rows: &[f32],
    k: usize,
    group: usize,
    width: usize,
    scheme: &Scheme,
    gram: Option<&[f32]>,
    buffers: &mut SearchBuffers,
    best: &mut [GroupGrid],
) {
    let count = rows.len() / k;
    let start = group * width;
    let top = f32::from(scheme.max_code());
    let SearchBuffers { errors, products, grids, losses } = buffers;
    grids.clear();
    for row in rows.chunks_exact(k) {
        let (min, max) = min_max(&row[start..start + width]);
        grids.extend((0..SHRINK_STEPS).map(|step| candidate(scheme, min, max, step)));
    }
    losses.clear();
    losses.resize(count * SHRINK_STEPS, 0.0);
    for tile in (start..start + width).step_by(TILE) {
        let tile_width = TILE.min(start + width - tile);
        errors.resize(count * SHRINK_STEPS * tile_width, 0.0);
        for (r, row) in rows.chunks_exact(k).enumerate() {
            let values = &row[tile..tile + tile_width];
            for step in 0..SHRINK_STEPS {
                let at = r * SHRINK_STEPS + step;
                rounding_errors(values, grids[at], top, &mut errors[at * tile_width..(at + 1) * tile_width]);
            }
        }
        let weighted: &[f32] = match gram {
            Some(gram) => {
                products.resize(errors.len(), 0.0);
                let block = Mat::window(gram, tile * k + tile, tile_width, tile_width, k);
                let left = Mat::new(errors, count * SHRINK_STEPS, tile_width);
                gemm_into(products, tile_width, 0.0, 1.0, left, block, Threads::One);
                products
            }
            None => errors,
        };
        for (loss, (d, m)) in
            losses.iter_mut().zip(errors.chunks_exact(tile_width).zip(weighted.chunks_exact(tile_width)))
        {
            *loss += f64::from(dot(d, m));
        }
    }
    for (r, best) in best.iter_mut().enumerate() {
        let losses = &losses[r * SHRINK_STEPS..(r + 1) * SHRINK_STEPS];
        // The first strict minimum: ties go to the wider range.
        let mut winner = 0;
        for step in 1..SHRINK_STEPS {
            if losses[step] < losses[winner] {
                winner = step;
            }
        }
        *best = grids[r * SHRINK_STEPS + winner];
    }
}

/// Smallest and largest value of a group.
pub(crate) fn min_max(values: &[f32]) -> (f32, f32) {
    values.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(min, max), &v| (min.min(v), max.max(v)))
}

fn rounding_errors(values: &[f32], grid: GroupGrid, top: f32, out: &mut [f32]) {
    let zero = f32::from(grid.zero);
    for (o, &v) in out.iter_mut().zip(values) {
        *o = v - (nearest_code(v, grid, top) - zero) * grid.scale;
    }
}
