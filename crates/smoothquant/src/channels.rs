//! Per-channel statistics, checked and tied.

use rayon::prelude::*;

use crate::{Constraints, SmoothQuantError};

/// Rows per partial result: fixed, so that sums do not depend on the number of threads.
const ROWS: usize = 64;

/// Weights that share an input of `k` channels have the shape they claim and hold finite values.
pub(crate) fn check_weights(weights: &[(&[f32], usize)], k: usize) -> Result<(), SmoothQuantError> {
    if k == 0 {
        return Err(SmoothQuantError::Empty { what: "channels" });
    }
    if weights.iter().all(|(_, n)| *n == 0) {
        return Err(SmoothQuantError::Empty { what: "weights" });
    }
    for (index, (weight, n)) in weights.iter().enumerate() {
        let wanted = n.saturating_mul(k);
        if weight.len() != wanted {
            return Err(SmoothQuantError::Length { what: "weight", found: weight.len(), wanted });
        }
        if let Some(at) = weight.par_iter().position_first(|v| !v.is_finite()) {
            return Err(SmoothQuantError::WeightNotFinite {
                weight: index,
                found: weight[at],
                row: at / k,
                column: at % k,
            });
        }
    }
    Ok(())
}

/// `values` are maxima or means of magnitudes, one for each of `k` channels.
pub(crate) fn check_statistic(values: &[f32], k: usize) -> Result<(), SmoothQuantError> {
    if values.len() != k {
        return Err(SmoothQuantError::Length { what: "activation statistic", found: values.len(), wanted: k });
    }
    // Written so that NaN fails.
    match values.iter().position(|v| !(*v >= 0.0 && v.is_finite())) {
        Some(channel) => Err(SmoothQuantError::Statistic { channel, found: values[channel] }),
        None => Ok(()),
    }
}

impl Constraints<'_> {
    pub(crate) fn check(&self, k: usize) -> Result<(), SmoothQuantError> {
        let lengths = [("frozen", self.frozen.map(<[bool]>::len)), ("ties", self.ties.map(<[u32]>::len))];
        for (what, found) in lengths {
            if let Some(found) = found.filter(|found| *found != k) {
                return Err(SmoothQuantError::Length { what, found, wanted: k });
            }
        }
        let stray = self.ties.and_then(|ties| ties.iter().enumerate().find(|(_, t)| **t as usize >= k));
        match stray {
            Some((channel, &found)) => Err(SmoothQuantError::Tie { channel, found, channels: k }),
            None => Ok(()),
        }
    }

    /// Replaces each value by `join` over the channels with the same tie; `ties` were checked to be below K.
    pub(crate) fn tied(&self, mut values: Vec<f64>, mean: bool) -> Vec<f64> {
        let Some(ties) = self.ties else { return values };
        let (mut joined, mut count) = (vec![0f64; values.len()], vec![0u32; values.len()]);
        for (value, &tie) in values.iter().zip(ties) {
            let slot = &mut joined[tie as usize];
            *slot = if mean { *slot + value } else { slot.max(*value) };
            count[tie as usize] += 1;
        }
        for (value, &tie) in values.iter_mut().zip(ties) {
            let of = if mean { f64::from(count[tie as usize]) } else { 1.0 };
            *value = joined[tie as usize] / of;
        }
        values
    }

    /// Which of `k` channels keep scale 1: those that are frozen, and those tied to one of them.
    pub(crate) fn frozen_channels(&self, k: usize) -> Vec<bool> {
        let (Some(frozen), Some(ties)) = (self.frozen, self.ties) else {
            return self.frozen.map_or_else(|| vec![false; k], <[bool]>::to_vec);
        };
        let mut rows = vec![false; k];
        ties.iter().zip(frozen).for_each(|(tie, frozen)| rows[*tie as usize] |= frozen);
        ties.iter().map(|tie| rows[*tie as usize]).collect()
    }
}

/// `max |W_j|` of each column of one `[n, k]` weight.
pub(crate) fn column_maxima(weight: &[f32], k: usize) -> Vec<f32> {
    let join = |mut a: Vec<f32>, b: &[f32]| {
        a.iter_mut().zip(b).for_each(|(a, b)| *a = a.max(b.abs()));
        a
    };
    weight
        .par_chunks(ROWS * k)
        .map(|block| block.chunks_exact(k).fold(vec![0f32; k], join))
        .reduce(|| vec![0f32; k], |a, b| join(a, &b))
}

/// LMDeploy's `w̄_j`: the mean over the rows of all weights of `|W_ij| / max_k |W_ik|`. A row of zeros counts as zeros.
pub(crate) fn mean_normalised(weights: &[(&[f32], usize)], k: usize) -> Vec<f64> {
    let mut total = vec![0f64; k];
    for (weight, _) in weights {
        let partial: Vec<Vec<f64>> = weight
            .par_chunks(ROWS * k)
            .map(|block| {
                let mut sum = vec![0f64; k];
                for row in block.chunks_exact(k) {
                    let largest = f64::from(row.iter().fold(0f32, |m, v| m.max(v.abs())));
                    if largest > 0.0 {
                        sum.iter_mut().zip(row).for_each(|(s, v)| *s += f64::from(v.abs()) / largest);
                    }
                }
                sum
            })
            .collect();
        partial.iter().for_each(|sum| total.iter_mut().zip(sum).for_each(|(t, s)| *t += s));
    }
    let rows: usize = weights.iter().map(|(_, n)| n).sum();
    total.iter().map(|t| t / rows.max(1) as f64).collect()
}
