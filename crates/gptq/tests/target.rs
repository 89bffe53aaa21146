//! Error-aware targets against their definition on tokens.

mod support;

use lite_gptq::{GptqError, GptqSettings, Hessian, error_aware_target};
use lite_linalg::{Mat, Threads, gemm, gemm_into};
use support::{correlated, gram, noise};

const TOKENS: usize = 500;
const N: usize = 12;
const K: usize = 96;

/// A float input, and the same input as a quantized model would see it: mixed a little, and noisy.
fn inputs() -> (Vec<f32>, Vec<f32>) {
    let float = correlated(TOKENS, K, 21);
    let mut mix = noise(K * K, 22);
    mix.iter_mut().enumerate().for_each(|(i, m)| *m = 0.02 * *m + f32::from(u8::from(i / K == i % K)));
    let mut seen = gemm(Mat::new(&float, TOKENS, K), Mat::new(&mix, K, K), Threads::One);
    seen.iter_mut().zip(noise(TOKENS * K, 23)).for_each(|(x, n)| *x += 0.05 * n);
    (float, seen)
}

/// `X̃ᵀX / T`.
fn cross(float: &[f32], seen: &[f32]) -> Vec<f32> {
    let mut cross = vec![0f32; K * K];
    let scale = 1.0 / TOKENS as f32;
    gemm_into(&mut cross, K, 0.0, scale, Mat::new(float, TOKENS, K).t(), Mat::new(seen, TOKENS, K), Threads::One);
    cross
}

/// `‖W X̃ᵀ − W* Xᵀ‖² / T` on the tokens themselves.
fn error(weight: &[f32], float: &[f32], target: &[f32], seen: &[f32]) -> f64 {
    let output = |x: &[f32], w: &[f32]| gemm(Mat::new(x, TOKENS, K), Mat::new(w, N, K).t(), Threads::One);
    let (wanted, found) = (output(float, weight), output(seen, target));
    wanted.iter().zip(&found).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>() / TOKENS as f64
}

#[test]
fn the_target_makes_up_for_drifted_inputs() {
    let (float, seen) = inputs();
    let (weight, gram, cross) = (noise(N * K, 24), gram(&seen, K), cross(&float, &seen));
    let target = error_aware_target(&weight, K, &cross, &gram, 1e-4).unwrap();
    let (before, after) = (error(&weight, &float, &weight, &seen), error(&weight, &float, &target, &seen));
    assert!(after < 0.5 * before, "{after} {before}");
    // It is the minimum: no step in any direction is better.
    for seed in 0..6 {
        let moved: Vec<f32> = target.iter().zip(noise(N * K, 100 + seed)).map(|(t, n)| t + 0.01 * n).collect();
        assert!(error(&weight, &float, &moved, &seen) > after);
    }
    // More damping stays closer to W, and is still better than W.
    let cautious = error_aware_target(&weight, K, &cross, &gram, 0.1).unwrap();
    let distance = |a: &[f32]| a.iter().zip(&weight).map(|(a, b)| (a - b).powi(2)).sum::<f32>();
    assert!(distance(&cautious) < distance(&target));
    let between = error(&weight, &float, &cautious, &seen);
    assert!(after < between && between < before, "{after} {between} {before}");
}

#[test]
fn the_order_of_columns_does_not_matter() {
    let (float, seen) = inputs();
    let (weight, gram, cross) = (noise(N * K, 25), gram(&seen, K), cross(&float, &seen));
    let plain = error_aware_target(&weight, K, &cross, &gram, 0.01).unwrap();
    let settings = GptqSettings { damp: 0.01, act_order: true, ..GptqSettings::default() };
    let ordered = Hessian::new(&gram, K, &settings).unwrap().error_aware_target(&weight, &cross).unwrap();
    assert!(plain.iter().zip(&ordered).all(|(a, b)| (a - b).abs() < 1e-3), "same up to rounding");
}

#[test]
fn outputs_tell_the_same_as_inputs() {
    let (float, seen) = inputs();
    let (weight, gram, cross) = (noise(N * K, 28), gram(&seen, K), cross(&float, &seen));
    // (X̃Wᵀ)ᵀX / T, from the tokens and not from the cross-Gram matrix.
    let outputs = gemm(Mat::new(&float, TOKENS, K), Mat::new(&weight, N, K).t(), Threads::One);
    let mut product = gemm(Mat::new(&outputs, TOKENS, N).t(), Mat::new(&seen, TOKENS, K), Threads::One);
    product.iter_mut().for_each(|p| *p /= TOKENS as f32);
    let hessian = Hessian::new(&gram, K, &GptqSettings::default()).unwrap();
    let (a, b) = (
        hessian.error_aware_target(&weight, &cross).unwrap(),
        hessian.error_aware_target_from_outputs(&weight, &product).unwrap(),
    );
    assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-3), "same up to rounding");
    assert!(a != weight);
    assert!(matches!(
        hessian.error_aware_target_from_outputs(&weight, &product[1..]),
        Err(GptqError::Length { what: "product of outputs and inputs", .. })
    ));
    product[K + 3] = f32::NAN;
    assert!(matches!(
        hessian.error_aware_target_from_outputs(&weight, &product),
        Err(GptqError::NotFinite { row: 1, column: 3, .. })
    ));
}

#[test]
fn equal_inputs_keep_the_weight() {
    let (_, seen) = inputs();
    let (weight, gram) = (noise(N * K, 26), gram(&seen, K));
    assert_eq!(error_aware_target(&weight, K, &gram, &gram, 0.01).unwrap(), weight);
    let nothing = vec![0.0; K * K];
    assert_eq!(error_aware_target(&weight, K, &nothing, &nothing, 0.01).unwrap(), weight);
}

#[test]
fn bad_inputs_are_named() {
    let (_, seen) = inputs();
    let (weight, gram) = (noise(N * K, 27), gram(&seen, K));
    let run = |weight: &[f32], cross: &[f32], damp| error_aware_target(weight, K, cross, &gram, damp);
    assert!(matches!(run(&weight[1..], &gram, 0.01), Err(GptqError::Length { what: "weight", .. })));
    assert!(matches!(run(&weight, &gram[1..], 0.01), Err(GptqError::Length { what: "cross-Gram matrix", .. })));
    assert!(matches!(run(&weight, &gram, f32::NAN), Err(GptqError::Damp { .. })));
    let mut cross = gram.clone();
    cross[5] = f32::NAN;
    let wanted = GptqError::NotFinite { what: "cross-Gram matrix", row: 0, column: 5 };
    assert_eq!(run(&weight, &cross, 0.01), Err(wanted));
    // Not a Gram matrix: the damping asked for is not raised.
    let mut broken = gram.clone();
    (broken[1], broken[K]) = (2.0 * (gram[0] + gram[K + 1]), 2.0 * (gram[0] + gram[K + 1]));
    let result = error_aware_target(&weight, K, &gram, &broken, 0.01);
    assert!(matches!(result, Err(GptqError::NotFactored { damp: 0.01, .. })), "{result:?}");
}
