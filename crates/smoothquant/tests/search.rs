//! The search: what it wins, and that it never loses.
#![allow(dead_code, reason = "each test file uses its part of the support module")]

mod support;

use lite_quant::floats::{FloatFormat, FloatScheme, Grain, ScaleKind};
use lite_quant::{
    ActivationFormat, ActivationScale, ActivationScheme, LinearScheme, ScaleDtype, Scheme, fake_quantize_tokens,
};
use lite_smoothquant::{
    Constraints, Sample, SearchSettings, SmoothQuantError, SmoothSettings, awq_act_scales, exponent_grid,
    quantized_loss, search_alpha, smooth_scales,
};
use proptest::prelude::*;
use support::{E4M3, Layer, noise, w8a8};

fn float_scheme(grain: Grain, scale: ActivationScale) -> LinearScheme {
    let scheme = FloatScheme { format: FloatFormat::E4M3, grain, scale: ScaleKind::Float(ScaleDtype::F32) };
    LinearScheme { weights: scheme.into(), activations: Some(ActivationScheme { format: E4M3, scale }) }
}

/// Loud channels take all the codes of every token, whatever reads them; in trained models quiet weights do.
#[test]
fn smoothing_outlier_channels_is_worth_five_times_the_error() {
    let even = Layer::new(128, 300.0, 7);
    let mut trained = Layer::new(128, 300.0, 7);
    for row in trained.first.chunks_exact_mut(128).chain(trained.second.chunks_exact_mut(128)) {
        row.iter_mut().skip(5).step_by(31).for_each(|w| *w *= 0.02);
    }
    for symmetric in [true, false] {
        for scale in [ActivationScale::DynamicToken, ActivationScale::StaticTensor] {
            let settings = SearchSettings::new(w8a8(symmetric, scale));
            for (layer, squared_gain) in [(&even, 5.0), (&trained, 25.0)] {
                let found = search_alpha(&layer.sample(), &layer.weights(), &settings).unwrap();
                let gain = found.identity_loss / found.loss;
                assert!(gain > squared_gain, "{symmetric} {scale:?}: {gain}");
                assert!((0.3..=0.95).contains(&found.exponent.unwrap()), "{:?}", found.exponent);
                assert!(found.scales[5] > 3.0 * found.scales[6], "the loud channel is divided most");
                let relative = (found.loss / found.energy).sqrt();
                assert!(relative < 0.05, "{relative}");
            }
        }
    }
}

/// Against the definition, with products in f64.
#[test]
fn the_loss_is_the_output_error() {
    let layer = Layer::new(64, 30.0, 3);
    let k = layer.k;
    let scheme = w8a8(true, ActivationScale::DynamicToken);
    let scales = smooth_scales(&layer.abs_max, &layer.weights(), &SmoothSettings::alpha(0.5)).unwrap();
    let mut tokens: Vec<f32> = layer.tokens.iter().enumerate().map(|(i, x)| x / scales[i % k]).collect();
    fake_quantize_tokens(&mut tokens, k, &scheme.activations.unwrap(), None).unwrap();
    let mut wanted = 0f64;
    for row in layer.first.chunks_exact(k).chain(layer.second.chunks_exact(k)) {
        let scaled: Vec<f32> = row.iter().zip(&scales).map(|(w, s)| w * s).collect();
        let step = scaled.iter().fold(0f32, |m, w| m.max(w.abs())) / 127.5;
        for (x, quantized) in layer.tokens.chunks_exact(k).zip(tokens.chunks_exact(k)) {
            let plain: f64 = x.iter().zip(row).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
            let code = |w: f32| f64::from((w / step).round_ties_even().clamp(-128.0, 127.0) * step);
            let got: f64 = quantized.iter().zip(&scaled).map(|(x, w)| f64::from(*x) * code(*w)).sum();
            wanted += (got - plain).powi(2);
        }
    }
    let got = quantized_loss(&layer.sample(), &layer.weights(), &scales, &scheme, 0).unwrap();
    assert!((got - wanted).abs() < 1e-3 * wanted, "{got} {wanted}");
}

#[test]
fn every_scheme_of_weights_and_activations_can_be_searched() {
    let layer = Layer::new(64, 100.0, 11);
    let float = |format, grain, scale| FloatScheme { format, grain, scale };
    let (f32s, half) = (ScaleKind::Float(ScaleDtype::F32), ScaleKind::Float(ScaleDtype::BF16));
    let token = Some(ActivationScheme { format: E4M3, scale: ActivationScale::DynamicToken });
    let e2m1 = |scale| Some(ActivationScheme { format: ActivationFormat::Float(FloatFormat::E2M1), scale });
    let cases: Vec<(LinearScheme, f64)> = vec![
        (w8a8(true, ActivationScale::DynamicGroup(16)), 0.03),
        (float_scheme(Grain::Channel, ActivationScale::DynamicToken), 0.05),
        (float_scheme(Grain::Tensor, ActivationScale::StaticTensor), 0.05),
        (LinearScheme { weights: float(FloatFormat::E5M2, Grain::Channel, half).into(), activations: token }, 0.12),
        (
            LinearScheme {
                weights: float(FloatFormat::E4M3, Grain::Block { rows: 16, columns: 16 }, f32s).into(),
                activations: Some(ActivationScheme { format: E4M3, scale: ActivationScale::DynamicGroup(16) }),
            },
            0.05,
        ),
        (
            LinearScheme {
                weights: float(FloatFormat::E2M1, Grain::Group(32), ScaleKind::E8M0).into(),
                activations: e2m1(ActivationScale::DynamicMx(32)),
            },
            0.35,
        ),
        (
            LinearScheme {
                weights: float(FloatFormat::E2M1, Grain::Group(16), ScaleKind::E4M3WithGlobal).into(),
                activations: e2m1(ActivationScale::StaticTensorLocal(16)),
            },
            0.35,
        ),
        // Weights only.
        (Scheme::new(4, 16, false, ScaleDtype::F16).unwrap().into(), 0.2),
    ];
    for (scheme, bound) in cases {
        for max_rows in [0, 20] {
            let settings = SearchSettings { max_rows, ..SearchSettings::new(scheme) };
            let found = search_alpha(&layer.sample(), &layer.weights(), &settings).unwrap();
            let relative = (found.loss / found.energy).sqrt();
            assert!(relative > 0.0 && relative < bound, "{scheme:?}: {relative}");
            assert!(found.loss <= found.identity_loss);
        }
    }
}

#[test]
fn what_cannot_be_searched_is_refused() {
    let layer = Layer::new(48, 10.0, 1);
    let run = |scheme| search_alpha(&layer.sample(), &layer.weights(), &SearchSettings::new(scheme)).map(|_| ());
    assert!(matches!(
        run(w8a8(true, ActivationScale::DynamicGroup(32))),
        Err(SmoothQuantError::Quant(lite_quant::QuantError::NotDivisible { in_features: 48, group_size: 32 }))
    ));
    assert!(matches!(
        run(Scheme::new(4, 64, true, ScaleDtype::F16).unwrap().into()),
        Err(SmoothQuantError::Quant(lite_quant::QuantError::NotDivisible { .. }))
    ));
    assert!(matches!(
        run(w8a8(true, ActivationScale::DynamicMx(16))),
        Err(SmoothQuantError::Quant(lite_quant::QuantError::Activation { .. }))
    ));
    let odd = FloatScheme { format: FloatFormat::E2M1, grain: Grain::Tensor, scale: ScaleKind::E8M0 };
    let message = run(odd.into()).unwrap_err().to_string();
    assert!(message.contains("one scale per Tensor of type E8M0"), "{message}");
    // Every product overflows, whatever the scales.
    let huge = vec![3e38f32; 48];
    let sample = Sample { tokens: &huge, abs_max: &huge };
    let settings = SearchSettings::new(w8a8(true, ActivationScale::DynamicToken));
    assert!(matches!(search_alpha(&sample, &[(&huge, 1)], &settings), Err(SmoothQuantError::NoFiniteLoss)));
}

#[test]
fn silence_is_left_alone() {
    let weight = noise(16 * 32, 9);
    let sample = Sample { tokens: &[0.0; 5 * 32], abs_max: &[0.0; 32] };
    for scale in [ActivationScale::DynamicToken, ActivationScale::StaticTensor] {
        let found = search_alpha(&sample, &[(&weight, 16)], &SearchSettings::new(w8a8(false, scale))).unwrap();
        assert_eq!((found.exponent, found.loss, found.identity_loss, found.energy), (None, 0.0, 0.0, 0.0));
        assert_eq!(found.scales, [1.0; 32]);
        assert_eq!(found.losses.len(), 21);
    }
}

/// Frozen channels everywhere: all candidates are the same, and the tie goes to none of them.
#[test]
fn ties_go_to_doing_nothing_then_to_the_smaller_exponent() {
    let layer = Layer::new(48, 100.0, 4);
    let mut settings = SearchSettings::new(w8a8(true, ActivationScale::DynamicToken));
    settings.constraints = Constraints { ties: None, frozen: Some(&[true; 48]) };
    let found = search_alpha(&layer.sample(), &layer.weights(), &settings).unwrap();
    assert_eq!((found.exponent, found.loss), (None, found.identity_loss));
    assert!(found.losses.iter().all(|l| l.loss == found.identity_loss));

    // One scale for all channels, which normalisation makes 1.
    settings.constraints = Constraints { ties: Some(&[0; 48]), frozen: None };
    assert_eq!(search_alpha(&layer.sample(), &layer.weights(), &settings).unwrap().exponent, None);

    // The grid's order and repetitions do not matter.
    settings.constraints = Constraints::default();
    let sorted = search_alpha(&layer.sample(), &layer.weights(), &settings).unwrap();
    settings.grid = exponent_grid().into_iter().rev().flat_map(|alpha| [alpha, alpha]).collect();
    assert_eq!(search_alpha(&layer.sample(), &layer.weights(), &settings).unwrap(), sorted);
    let best = sorted.losses.iter().find(|l| l.loss == sorted.loss).unwrap();
    assert_eq!(Some(best.exponent), sorted.exponent, "the first of the best");
}

#[test]
fn awq_scales_see_the_quantized_activations() {
    let layer = Layer::new(128, 300.0, 21);
    let settings = SearchSettings::new(w8a8(true, ActivationScale::DynamicToken));
    let found = awq_act_scales(&layer.sample(), &layer.abs_mean, &layer.weights(), &settings).unwrap();
    assert!(found.loss * 5.0 < found.identity_loss, "{} {}", found.loss, found.identity_loss);
    // s = mean|x|^r up to a common factor.
    let r = found.exponent.unwrap();
    let ratio = |c: usize| f64::from(found.scales[c]) / f64::from(layer.abs_mean[c]).powf(r);
    assert!((1..128).all(|c| (ratio(c) / ratio(0) - 1.0).abs() < 1e-5));
    assert_eq!(found.losses[0].loss, found.identity_loss, "r = 0 is the identity");
}

#[test]
fn threads_do_not_change_the_result() {
    let layer = Layer::new(128, 80.0, 5);
    for scheme in
        [w8a8(false, ActivationScale::StaticTensor), float_scheme(Grain::Tensor, ActivationScale::DynamicToken)]
    {
        let settings = SearchSettings::new(scheme);
        let run = |threads| {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
                let found = search_alpha(&layer.sample(), &layer.weights(), &settings).unwrap();
                let awq = awq_act_scales(&layer.sample(), &layer.abs_mean, &layer.weights(), &settings).unwrap();
                (found, awq)
            })
        };
        let one = run(1);
        assert_eq!(one, run(2));
        assert_eq!(one, run(5));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn never_worse_than_half_or_nothing(seed in any::<u32>(), loud in 1f32..500.0, symmetric in any::<bool>(), which in 0usize..4, max_rows in prop::sample::select(vec![0usize, 10, 33])) {
        let layer = Layer::new(64, loud, u64::from(seed));
        let scheme = [
            w8a8(symmetric, ActivationScale::DynamicToken),
            w8a8(symmetric, ActivationScale::StaticTensor),
            float_scheme(Grain::Channel, ActivationScale::DynamicToken),
            float_scheme(Grain::Tensor, ActivationScale::StaticTensor),
        ][which];
        let weights = layer.weights();
        let settings = SearchSettings { max_rows, ..SearchSettings::new(scheme) };
        let found = search_alpha(&layer.sample(), &weights, &settings).unwrap();
        let half = smooth_scales(&layer.abs_max, &weights, &SmoothSettings::alpha(0.5)).unwrap();
        let loss = |scales: &[f32]| quantized_loss(&layer.sample(), &weights, scales, &scheme, max_rows).unwrap();
        prop_assert!(found.loss <= loss(&half));
        prop_assert!(found.loss <= loss(&[1.0; 64]));
        prop_assert_eq!(found.loss, loss(&found.scales));
        prop_assert_eq!(found.identity_loss, loss(&[1.0; 64]));
        prop_assert!(found.losses.iter().all(|l| found.loss <= l.loss));
    }
}
