//! What holds for every layer.

mod support;

use lite_gptq::{Fallback, GptqError, GptqSettings, Hessian, NearestReason, Problem, Solution, solve};
use lite_linalg::FactorError;
use lite_quant::{QuantError, Range, RangeContext, ScaleDtype, Scheme, gram_loss, quantize_nearest};
use proptest::prelude::*;
use support::{correlated, gram, noise};

const DTYPES: [ScaleDtype; 3] = [ScaleDtype::F16, ScaleDtype::BF16, ScaleDtype::F32];

fn run(
    weight: &[f32],
    k: usize,
    gram: &[f32],
    scheme: &Scheme,
    settings: &GptqSettings,
) -> Result<Solution, GptqError> {
    solve(&Problem { weight, out_features: weight.len() / k, in_features: k, gram, scheme }, settings)
}

fn four_bits() -> Scheme {
    Scheme::new(4, 32, false, ScaleDtype::F16).unwrap()
}

/// A Gram matrix of pairs of channels, each pair with ones on the diagonal and `off` beside it.
fn pairs(k: usize, off: f32) -> Vec<f32> {
    (0..k * k)
        .map(|at| match (at / k, at % k) {
            (i, j) if i == j => 1.0,
            (i, j) if i ^ 1 == j => off,
            _ => 0.0,
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn never_worse_than_nearest_and_always_well_formed(
        bits in 2i64..=8,
        symmetric in any::<bool>(),
        act_order in any::<bool>(),
        group in prop::sample::select(vec![-1i64, 16, 32, 64, 128]),
        dtype in prop::sample::select(DTYPES.to_vec()),
        sweeps in 0usize..4,
        n in 1usize..90,
        tokens in 1usize..300,
        seed in any::<u32>(),
    ) {
        let k = 128;
        let weight = noise(n * k, u64::from(seed));
        let gram = gram(&correlated(tokens, k, u64::from(seed) + 7), k);
        let scheme = Scheme::new(bits, group, symmetric, dtype).unwrap();
        let settings = GptqSettings { act_order, refine_sweeps: sweeps, ..GptqSettings::default() };
        let solution = run(&weight, k, &gram, &scheme, &settings).unwrap();
        let q = &solution.quantized;
        q.check().unwrap();
        prop_assert!(solution.loss <= solution.nearest_loss);
        prop_assert!(q.codes.iter().all(|&code| code <= scheme.max_code()));
        prop_assert!(q.scales.iter().all(|&s| s.is_normal() && s > 0.0 && dtype.round(s) == s));
        let context = RangeContext { weight: &weight, out_features: n, in_features: k, gram: Some(&gram) };
        let nearest = quantize_nearest(&context, &scheme, Range::Search).unwrap();
        prop_assert_eq!(&q.zeros, &nearest.zeros);
        for (found, linear) in [(solution.loss, q), (solution.nearest_loss, &nearest)] {
            let exact = gram_loss(&weight, &linear.dequantize(), &gram, n, k);
            let energy = gram_loss(&weight, &vec![0.0; n * k], &gram, n, k);
            prop_assert!((found - exact).abs() <= 1e-4 * exact + 1e-8 * energy, "{found} {exact}");
        }
    }
}

#[test]
fn correlated_inputs_make_it_worth_it() {
    let (n, k) = (96, 256);
    let weight = noise(n * k, 1);
    let (calibration, unseen) = (gram(&correlated(2000, k, 2), k), gram(&correlated(2000, k, 3), k));
    for (bits, symmetric) in [(4, false), (4, true), (3, false), (8, true)] {
        let scheme = Scheme::new(bits, 64, symmetric, ScaleDtype::F16).unwrap();
        let solved = |sweeps, act_order| {
            let settings = GptqSettings { refine_sweeps: sweeps, act_order, ..GptqSettings::default() };
            run(&weight, k, &calibration, &scheme, &settings).unwrap()
        };
        let (plain, refined) = (solved(0, true), solved(3, true));
        assert!(plain.loss < 0.4 * plain.nearest_loss, "{bits}: {} {}", plain.loss, plain.nearest_loss);
        assert!(refined.loss < 0.97 * plain.loss, "{bits}: {} {}", refined.loss, plain.loss);
        assert!(plain.loss < solved(0, false).loss, "activation order helps where some channels are loud");
        assert_eq!((plain.nearest_rows, refined.nearest_rows), (0, 0));
        let loss = |solution: &Solution| gram_loss(&weight, &solution.quantized.dequantize(), &unseen, n, k);
        assert!(loss(&refined) < loss(&plain), "{bits}: refinement carries over to unseen inputs");
    }
}

#[test]
fn threads_do_not_change_the_bits() {
    let (n, k) = (200, 320);
    let (weight, gram) = (noise(n * k, 4), gram(&correlated(400, k, 5), k));
    for group in [32, -1] {
        let scheme = Scheme::new(4, group, false, ScaleDtype::BF16).unwrap();
        let solved = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| run(&weight, k, &gram, &scheme, &GptqSettings::default()).unwrap())
        };
        let one = solved(1);
        assert!(one == solved(2) && one == solved(3));
    }
}

#[test]
fn stacked_linears_are_solved_as_they_are_alone() {
    let k = 128;
    let (weight, gram) = (noise(150 * k, 6), gram(&correlated(300, k, 7), k));
    let hessian = Hessian::new(&gram, k, &GptqSettings::default()).unwrap();
    let whole = hessian.solve(&weight, 150, &four_bits()).unwrap();
    let part = hessian.solve(&weight[64 * k..], 86, &four_bits()).unwrap();
    assert_eq!(whole.quantized.codes[64 * k..], part.quantized.codes);
    assert_eq!(part, run(&weight[64 * k..], k, &gram, &four_bits(), &GptqSettings::default()).unwrap());
}

#[test]
fn dead_channels_become_zero_and_leave_the_range_alone() {
    let (n, k, dead) = (40, 64, [0usize, 17, 63]);
    let mut x = correlated(200, k, 8);
    x.chunks_exact_mut(k).for_each(|row| dead.iter().for_each(|&d| row[d] = 0.0));
    let gram = gram(&x, k);
    let mut weight = noise(n * k, 9);
    weight.chunks_exact_mut(k).for_each(|row| dead.iter().for_each(|&d| row[d] = 50.0));
    for (symmetric, range) in [(false, Range::MinMax), (true, Range::Search)] {
        let scheme = Scheme::new(4, 32, symmetric, ScaleDtype::F16).unwrap();
        let settings = GptqSettings { range, ..GptqSettings::default() };
        let solution = run(&weight, k, &gram, &scheme, &settings).unwrap();
        assert_eq!(solution.fallback, Fallback::None);
        let back = solution.quantized.dequantize();
        assert!(back.chunks_exact(k).all(|row| dead.iter().all(|&d| row[d] == 0.0)));
        assert!(solution.quantized.scales.iter().all(|&s| s < 1.0), "a range without the dead weights");
    }
}

#[test]
fn an_input_that_no_token_reached_is_rounded_to_nearest() {
    let (n, k) = (10, 64);
    let (weight, gram) = (noise(n * k, 10), vec![0.0; k * k]);
    let solution = run(&weight, k, &gram, &four_bits(), &GptqSettings::default()).unwrap();
    let context = RangeContext { weight: &weight, out_features: n, in_features: k, gram: Some(&gram) };
    assert_eq!(solution.quantized, quantize_nearest(&context, &four_bits(), Range::Search).unwrap());
    assert_eq!(solution.fallback, Fallback::Nearest { reason: NearestReason::NoSignal });
    assert!(solution.kept_nearest && solution.nearest_rows == n && solution.loss == 0.0);
    let strict = GptqSettings { fallback: false, ..GptqSettings::default() };
    assert_eq!(run(&weight, k, &gram, &four_bits(), &strict), Err(GptqError::NoSignal));
}

#[test]
fn one_token_is_enough_to_solve() {
    let (n, k) = (20, 128);
    let (weight, x) = (noise(n * k, 11), correlated(1, k, 12));
    for scale in [1.0, 1e-9, 1e9] {
        let x: Vec<f32> = x.iter().map(|v| v * scale).collect();
        let solution = run(&weight, k, &gram(&x, k), &four_bits(), &GptqSettings::default()).unwrap();
        assert!(solution.loss < 0.1 * solution.nearest_loss, "{} {}", solution.loss, solution.nearest_loss);
        assert_eq!(solution.fallback, Fallback::None);
    }
}

#[test]
fn damping_grows_until_the_matrix_factors() {
    let k = 32;
    let weight = noise(8 * k, 13);
    let fallback = |off: f32| {
        let gram = pairs(k, off);
        let settings = GptqSettings::default();
        let hessian = Hessian::new(&gram, k, &settings).unwrap();
        let solution = hessian.solve(&weight, 8, &four_bits()).unwrap();
        assert_eq!(solution.fallback, hessian.fallback());
        assert!(solution.quantized.check().is_ok() && solution.loss <= solution.nearest_loss);
        solution.fallback
    };
    assert_eq!(fallback(0.9), Fallback::None);
    assert!(matches!(fallback(1.05), Fallback::Damped { damp } if (damp - 0.1).abs() < 1e-6));
    assert_eq!(fallback(1.5), Fallback::Damped { damp: 1.0 });
    let reason = |fallback| matches!(fallback, Fallback::Nearest { reason: NearestReason::NotFactored(_) });
    assert!(reason(fallback(2.5)));
    let strict = GptqSettings { fallback: false, ..GptqSettings::default() };
    let error = run(&weight, k, &pairs(k, 2.5), &four_bits(), &strict).unwrap_err();
    assert!(matches!(error, GptqError::NotFactored { damp: 1.0, reason: FactorError::NotPositiveDefinite { .. } }));
}

#[test]
fn bad_inputs_are_named() {
    let (n, k) = (4, 64);
    let (weight, good) = (noise(n * k, 14), gram(&correlated(100, k, 15), k));
    let settings = GptqSettings::default();
    for damp in [0.0, -0.01, 1.5, f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let result = run(&weight, k, &good, &four_bits(), &GptqSettings { damp, ..settings });
        assert!(matches!(result, Err(GptqError::Damp { .. })), "{damp}");
    }
    let result = run(&weight, k, &good, &four_bits(), &GptqSettings { block: 0, ..settings });
    assert_eq!(result, Err(GptqError::Block));
    for bad in [f32::NAN, f32::INFINITY] {
        let mut gram = good.clone();
        gram[3 * k + 7] = bad;
        let wanted = GptqError::NotFinite { what: "Gram matrix", row: 3, column: 7 };
        assert_eq!(run(&weight, k, &gram, &four_bits(), &settings), Err(wanted));
        let mut weight = weight.clone();
        weight[2 * k + 5] = bad;
        let wanted = QuantError::NotFinite { count: 1, row: 2, column: 5 };
        assert_eq!(run(&weight, k, &good, &four_bits(), &settings), Err(GptqError::Quant(wanted)));
    }
    let mut gram = good.clone();
    gram[9 * k + 9] = -1.0;
    let wanted = GptqError::NegativeDiagonal { channel: 9, value: -1.0 };
    assert_eq!(run(&weight, k, &gram, &four_bits(), &settings), Err(wanted));
    let result = run(&weight, k, &good[1..], &four_bits(), &settings);
    assert!(matches!(result, Err(GptqError::Length { what: "Gram matrix", .. })));
    let hessian = Hessian::new(&good, k, &settings).unwrap();
    assert!(matches!(hessian.solve(&weight, n + 1, &four_bits()), Err(GptqError::Quant(QuantError::Length { .. }))));
    let wide = Scheme::new(4, 128, false, ScaleDtype::F16).unwrap();
    assert!(matches!(hessian.solve(&weight, n, &wide), Err(GptqError::Quant(QuantError::NotDivisible { .. }))));
    let empty = hessian.solve(&[], 0, &four_bits()).unwrap();
    assert!(empty.quantized.codes.is_empty() && !empty.kept_nearest);
}
