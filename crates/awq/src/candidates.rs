//! Candidate scales from activation and weight statistics.

use lite_quant::{GroupSize, Scheme};
use rayon::prelude::*;

use crate::{Consumer, FoldProblem};

/// Number of ratios tried: 0, 0.05, … 0.95.
pub const RATIOS: usize = 20;

/// LMDeploy's ratio when it does not search.
pub const FIXED_RATIO: f32 = 0.5;

/// Keeps scales away from zero, where an inverse would overflow.
const SMALLEST: f32 = 1e-4;

/// Which formula and exponent a scale vector came from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Candidate {
    /// `s = 1`: leave the weights alone.
    Identity,
    /// `s = a^r`.
    Plain {
        /// The exponent r.
        ratio: f32,
    },
    /// `s = a^r / w̄^(1−r)`.
    Duo {
        /// The exponent r.
        ratio: f32,
    },
}

/// Everything that is tried: 20 duo, 19 plain (plain with r = 0 is the identity).
pub(crate) fn all() -> Vec<Candidate> {
    let ratio = |i: usize| i as f32 / RATIOS as f32;
    let duo = (0..RATIOS).map(|i| Candidate::Duo { ratio: ratio(i) });
    let plain = (1..RATIOS).map(|i| Candidate::Plain { ratio: ratio(i) });
    duo.chain(plain).collect()
}

/// Per channel, the activation and weight statistics that scales are made of, tied where one producer
/// row feeds several channels.
pub(crate) struct ChannelStats {
    activation: Vec<f32>,
    weight: Vec<f32>,
    /// Channels that must keep `s = 1`.
    frozen: Vec<bool>,
}

impl ChannelStats {
    pub(crate) fn new(problem: &FoldProblem, scheme: &Scheme) -> Self {
        let weight = mean_normalised_weight(&problem.consumers, problem.in_features, scheme.group_size);
        let tie = |values: &[f32]| match problem.ties {
            Some(ties) => tied_mean(values, ties),
            None => values.to_vec(),
        };
        let frozen = match problem.frozen {
            Some(frozen) => frozen.to_vec(),
            None => vec![false; problem.in_features],
        };
        Self { activation: tie(problem.activation), weight: tie(&weight), frozen }
    }

    pub(crate) fn scales(&self, candidate: Candidate) -> Vec<f32> {
        let raw: Vec<f32> = match candidate {
            Candidate::Identity => return vec![1.0; self.activation.len()],
            Candidate::Plain { ratio } => self.activation.iter().map(|a| a.powf(ratio).max(SMALLEST)).collect(),
            Candidate::Duo { ratio } => self
                .activation
                .iter()
                .zip(&self.weight)
                .map(|(a, w)| (a.powf(ratio) / w.max(SMALLEST).powf(1.0 - ratio)).max(SMALLEST))
                .collect(),
        };
        let live = raw.iter().zip(&self.frozen).filter(|&(_, frozen)| !frozen).map(|(s, _)| *s);
        let (min, max) = live.fold((f32::INFINITY, 0f32), |(min, max), s| (min.min(s), max.max(s)));
        let middle = (f64::from(max) * f64::from(min)).sqrt() as f32;
        let scale = |(s, &frozen): (&f32, &bool)| {
            let scale = s / middle;
            if frozen || !scale.is_normal() { 1.0 } else { scale }
        };
        raw.iter().zip(&self.frozen).map(scale).collect()
    }
}

/// LMDeploy's scales without a search: duo with r = 0.5, where `problem.activation` is max |x|.
pub fn fixed_scales(problem: &FoldProblem, scheme: &Scheme) -> Vec<f32> {
    ChannelStats::new(problem, scheme).scales(Candidate::Duo { ratio: FIXED_RATIO })
}

/// `w̄[c]`: mean over the rows of all consumers of `|W[n, c]| / max |W|` of the row's group.
fn mean_normalised_weight(consumers: &[Consumer], k: usize, group_size: GroupSize) -> Vec<f32> {
    let width = match group_size {
        GroupSize::Channel => k,
        GroupSize::Channels(width) => width,
    };
    // Fixed blocks of rows, summed in order: the same bits for any number of threads.
    const ROWS: usize = 64;
    let mut total = vec![0f64; k];
    let mut rows = 0usize;
    for consumer in consumers {
        rows += consumer.out_features;
        let partial: Vec<Vec<f32>> = consumer
            .weight
            .par_chunks(ROWS * k)
            .map(|block| {
                let mut sum = vec![0f32; k];
                for row in block.chunks_exact(k) {
                    for (values, sums) in row.chunks(width).zip(sum.chunks_mut(width)) {
                        let largest = values.iter().fold(0f32, |m, v| m.max(v.abs()));
                        if largest > 0.0 {
                            sums.iter_mut().zip(values).for_each(|(s, v)| *s += v.abs() / largest);
                        }
                    }
                }
                sum
            })
            .collect();
        for sum in &partial {
            total.iter_mut().zip(sum).for_each(|(t, s)| *t += f64::from(*s));
        }
    }
    total.iter().map(|t| (t / rows.max(1) as f64) as f32).collect()
}

/// Replaces each value by the mean over the channels with the same tie.
fn tied_mean(values: &[f32], ties: &[u32]) -> Vec<f32> {
    let groups = ties.iter().map(|&t| t as usize + 1).max().unwrap_or(0);
    let (mut sums, mut counts) = (vec![0f64; groups], vec![0u32; groups]);
    for (value, &tie) in values.iter().zip(ties) {
        sums[tie as usize] += f64::from(*value);
        counts[tie as usize] += 1;
    }
    ties.iter().map(|&t| (sums[t as usize] / f64::from(counts[t as usize])) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use lite_quant::ScaleDtype;

    /// Values worked out by hand from LMDeploy's formula.
    #[test]
    fn the_fixed_ratio_is_lmdeploys() {
        // Two rows, one group of four: |W| / max = [1, .5, .25, .5] and [.2, .4, 1, .6].
        let weight = [4.0, -2.0, 1.0, 2.0, 1.0, 2.0, -5.0, 3.0];
        let problem = FoldProblem {
            consumers: vec![Consumer { weight: &weight, out_features: 2 }],
            in_features: 4,
            gram: &[0.0; 16],
            activation: &[9.0, 4.0, 1.0, 16.0],
            ties: None,
            frozen: None,
        };
        let scheme = Scheme { bits: 4, group_size: GroupSize::Channel, symmetric: false, scale_dtype: ScaleDtype::F32 };
        let raw: Vec<f64> = [(9.0, 0.6), (4.0, 0.45), (1.0, 0.625), (16.0, 0.55f64)]
            .iter()
            .map(|(a, w): &(f64, f64)| a.sqrt() / w.sqrt())
            .collect();
        let middle = (raw[3] * raw[2]).sqrt();
        for (got, wanted) in fixed_scales(&problem, &scheme).iter().zip(raw) {
            assert!((f64::from(*got) - wanted / middle).abs() < 1e-5, "{got} {}", wanted / middle);
        }
    }

    #[test]
    fn ties_share_a_scale_and_frozen_channels_keep_one() {
        let weight = [1.0, 2.0, 3.0, 4.0];
        let frozen = [false, false, true, false];
        let problem = FoldProblem {
            consumers: vec![Consumer { weight: &weight, out_features: 1 }],
            in_features: 4,
            gram: &[0.0; 16],
            activation: &[1.0, 2.0, 50.0, 8.0],
            ties: Some(&[0, 1, 2, 0]),
            frozen: Some(&frozen),
        };
        let scheme = Scheme { bits: 4, group_size: GroupSize::Channel, symmetric: false, scale_dtype: ScaleDtype::F32 };
        let stats = ChannelStats::new(&problem, &scheme);
        for candidate in all() {
            let scales = stats.scales(candidate);
            assert_eq!(scales[0], scales[3]);
            assert_eq!(scales[2], 1.0);
            assert!(scales.iter().all(|s| s.is_finite() && *s > 0.0));
        }
    }

    #[test]
    fn dead_inputs_give_finite_scales() {
        let weight = [0.0; 8];
        let problem = FoldProblem {
            consumers: vec![Consumer { weight: &weight, out_features: 2 }],
            in_features: 4,
            gram: &[0.0; 16],
            activation: &[0.0, 0.0, 0.0, 0.0],
            ties: None,
            frozen: None,
        };
        let scheme = Scheme { bits: 4, group_size: GroupSize::Channel, symmetric: false, scale_dtype: ScaleDtype::F32 };
        let stats = ChannelStats::new(&problem, &scheme);
        for candidate in all() {
            assert!(stats.scales(candidate).iter().all(|s| s.is_finite() && *s > 0.0), "{candidate:?}");
        }
    }
}
