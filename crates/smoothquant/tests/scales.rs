//! Scales by formula: what they preserve, what they refuse.
#![allow(dead_code, reason = "each test file uses its part of the support module")]

mod support;

use lite_quant::{ActivationScale, QuantError};
use lite_smoothquant::{
    Algorithm, Constraints, Normalisation, SmoothQuantError, SmoothSettings, awq_act_scales, search_alpha,
    smooth_scales,
};
use lite_smoothquant::{Sample, SearchSettings, quantized_loss};
use proptest::prelude::*;
use support::{Layer, noise, w8a8};

const ALGORITHMS: [Algorithm; 3] =
    [Algorithm::SmoothQuant { alpha: 0.5 }, Algorithm::LogEqualization, Algorithm::MeanNormalised { ratio: 0.5 }];

fn settings(algorithm: Algorithm) -> SmoothSettings<'static> {
    SmoothSettings { algorithm, ..SmoothSettings::alpha(0.5) }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    /// `(X / s) (W s)ᵀ = X Wᵀ` for any scales that come out.
    #[test]
    fn the_product_is_unchanged(seed in any::<u32>(), loud in 1f32..1e4, alpha in 0f64..=1.0, which in 0usize..3) {
        let layer = Layer::new(48, loud, u64::from(seed));
        let algorithm = [Algorithm::SmoothQuant { alpha }, ALGORITHMS[1], ALGORITHMS[2]][which];
        let scales = smooth_scales(&layer.abs_max, &layer.weights(), &settings(algorithm)).unwrap();
        prop_assert!(scales.iter().all(|s| s.is_normal() && *s > 0.0));
        for token in layer.tokens.chunks_exact(48) {
            for row in layer.first.chunks_exact(48) {
                let terms = || token.iter().zip(row).zip(&scales).map(|((x, w), s)| (f64::from(*x), f64::from(*w), f64::from(*s)));
                let plain: f64 = terms().map(|(x, w, _)| x * w).sum();
                let scaled: f64 = terms().map(|(x, w, s)| (x / s) * (w * s)).sum();
                let size: f64 = terms().map(|(x, w, _)| (x * w).abs()).sum();
                prop_assert!((plain - scaled).abs() <= 1e-6 * size);
            }
        }
    }

    /// α decides who gets even: at 1 all activations are alike, at 0 all weight columns.
    #[test]
    fn the_ends_even_out_one_side(seed in any::<u32>()) {
        let layer = Layer::new(64, 50.0, u64::from(seed));
        let weights = layer.weights();
        let spread = |values: &[f32]| {
            let (min, max) = values.iter().fold((f32::MAX, 0f32), |(a, b), v| (a.min(*v), b.max(*v)));
            max / min
        };
        let at = |alpha| smooth_scales(&layer.abs_max, &weights, &SmoothSettings::alpha(alpha)).unwrap();
        let activations: Vec<f32> = layer.abs_max.iter().zip(at(1.0)).map(|(a, s)| a / s).collect();
        prop_assert!(spread(&activations) < 1.0001);
        let scales = at(0.0);
        let mut columns = vec![0f32; 64];
        for row in layer.first.chunks_exact(64).chain(layer.second.chunks_exact(64)) {
            columns.iter_mut().zip(row).zip(&scales).for_each(|((c, w), s)| *c = c.max((w * s).abs()));
        }
        prop_assert!(spread(&columns) < 1.0001);
    }
}

#[test]
fn channels_without_activations_keep_one_and_shift_nobody() {
    let weight = noise(8 * 6, 3);
    let weights = [(weight.as_slice(), 8)];
    for algorithm in ALGORITHMS {
        let all_dead = smooth_scales(&[0.0; 6], &weights, &settings(algorithm)).unwrap();
        assert_eq!(all_dead, [1.0; 6], "{algorithm:?}");
        let scales = smooth_scales(&[4.0, 0.0, 9.0, 1.0, 0.0, 2.0], &weights, &settings(algorithm)).unwrap();
        assert_eq!((scales[1], scales[4]), (1.0, 1.0), "{algorithm:?}");
        let live = [scales[0], scales[2], scales[3], scales[5]];
        let (min, max) = live.iter().fold((f32::MAX, 0f32), |(a, b), s| (a.min(*s), b.max(*s)));
        assert!((min * max - 1.0).abs() < 1e-5, "{algorithm:?}");
    }
}

#[test]
fn extreme_statistics_give_usable_scales() {
    let weight = [1e-40, 1e30, 0.0, 1e-3, 1e38, 1e-38f32];
    let abs_max = [1e30, 1e-30, 1e38, 1e-40, 1.0, 3e38f32];
    for algorithm in ALGORITHMS.into_iter().chain([0.0, 1.0].map(|alpha| Algorithm::SmoothQuant { alpha })) {
        for normalisation in [Normalisation::None, Normalisation::Middle] {
            let settings = SmoothSettings { normalisation, ..settings(algorithm) };
            let scales = smooth_scales(&abs_max, &[(&weight, 1)], &settings).unwrap();
            assert!(scales.iter().all(|s| (0.99e-5..1.01e5).contains(s)), "{algorithm:?} {scales:?}");
        }
    }
}

#[test]
fn ties_share_a_scale_and_frozen_channels_keep_one() {
    let weight = noise(8 * 6, 5);
    let frozen = [false, true, false, false, false, false];
    let constraints = Constraints { ties: Some(&[0, 1, 0, 3, 4, 3]), frozen: Some(&frozen) };
    for algorithm in ALGORITHMS {
        let settings = SmoothSettings { constraints, ..settings(algorithm) };
        let scales = smooth_scales(&[1.0, 50.0, 3.0, 4.0, 5.0, 60.0], &[(&weight, 8)], &settings).unwrap();
        assert_eq!((scales[0], scales[3], scales[1]), (scales[2], scales[5], 1.0), "{algorithm:?}");
        assert!(scales[3] > scales[0], "the louder pair is smoothed more");
        let settings = SmoothSettings {
            constraints: Constraints { frozen: Some(&[true, false, false, false, false, false]), ..constraints },
            ..settings
        };
        let scales = smooth_scales(&[1.0, 50.0, 3.0, 4.0, 5.0, 60.0], &[(&weight, 8)], &settings).unwrap();
        assert_eq!((scales[0], scales[2]), (1.0, 1.0), "one producer row makes both");
    }
}

#[test]
fn nonsense_is_refused_with_words() {
    let layer = Layer::new(48, 10.0, 1);
    let (weights, abs_max) = (layer.weights(), layer.abs_max.clone());
    let refused = |result: Result<Vec<f32>, SmoothQuantError>, words: &str| {
        let message = result.unwrap_err().to_string();
        assert!(message.contains(words), "{message}");
    };
    for alpha in [f64::NAN, 2.0, -1.0, f64::INFINITY, 1.000_001] {
        for algorithm in [Algorithm::SmoothQuant { alpha }, Algorithm::MeanNormalised { ratio: alpha }] {
            refused(smooth_scales(&abs_max, &weights, &settings(algorithm)), &format!("alpha {alpha}"));
        }
        let mut search = SearchSettings::new(w8a8(true, ActivationScale::DynamicToken));
        search.grid = vec![0.5, alpha];
        let result = search_alpha(&layer.sample(), &weights, &search);
        assert!(matches!(result, Err(SmoothQuantError::Alpha { .. })));
    }
    for bad in [f32::NAN, f32::INFINITY, -1.0] {
        let mut abs_max = abs_max.clone();
        abs_max[7] = bad;
        refused(smooth_scales(&abs_max, &weights, &SmoothSettings::alpha(0.5)), "channel 7");
    }
    let half = SmoothSettings::alpha(0.5);
    refused(smooth_scales(&abs_max, &[], &half), "no weights");
    refused(smooth_scales(&[], &[(&[], 3)], &half), "no channels");
    refused(smooth_scales(&abs_max, &[(&layer.first[1..], 40)], &half), "1919 elements");
    refused(smooth_scales(&abs_max, &[(&layer.first, usize::MAX)], &half), "its shape asks for");
    let mut damaged = layer.second.clone();
    damaged[3 * 48 + 2] = f32::NAN;
    refused(
        smooth_scales(&abs_max, &[weights[0], (&damaged, 24)], &half),
        "weight 1 of this input holds NaN at row 3, column 2",
    );
    let stray = Constraints { ties: Some(&[48; 48]), frozen: None };
    refused(smooth_scales(&abs_max, &weights, &SmoothSettings { constraints: stray, ..half }), "tied to 48");
    let short = Constraints { ties: None, frozen: Some(&[false; 4]) };
    refused(smooth_scales(&abs_max, &weights, &SmoothSettings { constraints: short, ..half }), "frozen has 4");
}

#[test]
fn tokens_that_are_not_finite_are_errors() {
    let layer = Layer::new(48, 10.0, 2);
    let weights = layer.weights();
    let search = SearchSettings::new(w8a8(true, ActivationScale::DynamicToken));
    for bad in [f32::NAN, f32::INFINITY] {
        let mut tokens = layer.tokens.clone();
        tokens[2 * 48 + 11] = bad;
        let sample = Sample { tokens: &tokens, abs_max: &layer.abs_max };
        let at = |error: SmoothQuantError| {
            matches!(
                error,
                SmoothQuantError::Quant(QuantError::ActivationNotFinite { count: 1, token: 2, channel: 11 })
            )
        };
        assert!(at(search_alpha(&sample, &weights, &search).unwrap_err()));
        assert!(at(awq_act_scales(&sample, &layer.abs_mean, &weights, &search).unwrap_err()));
        assert!(at(quantized_loss(&sample, &weights, &[1.0; 48], &search.scheme, 0).unwrap_err()));
        let mut mean = layer.abs_mean.clone();
        mean[9] = bad;
        let result = awq_act_scales(&layer.sample(), &mean, &weights, &search);
        assert!(matches!(result, Err(SmoothQuantError::Statistic { channel: 9, .. })));
    }
    for (tokens, words) in [(&layer.tokens[..0], "no tokens"), (&layer.tokens[..49], "activations has 49 elements")] {
        let sample = Sample { tokens, abs_max: &layer.abs_max };
        let message = search_alpha(&sample, &weights, &search).unwrap_err().to_string();
        assert!(message.contains(words), "{message}");
    }
    for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let mut scales = vec![1.0; 48];
        scales[3] = bad;
        let result = quantized_loss(&layer.sample(), &weights, &scales, &search.scheme, 0);
        assert!(matches!(result, Err(SmoothQuantError::Scale { channel: 3, .. })));
    }
}
