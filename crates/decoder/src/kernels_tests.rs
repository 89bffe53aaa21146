//! Kernels against their definitions.

use super::*;
use proptest::prelude::*;

/// Distance of `found` from `wanted` in units in the last place of `wanted`.
fn ulps(found: f32, wanted: f64) -> f64 {
    let rounded = wanted as f32;
    let unit = f64::from(f32::from_bits(rounded.to_bits() + 1)) - f64::from(rounded);
    (f64::from(found) - wanted).abs() / unit
}

#[test]
fn exp_is_within_two_ulps() {
    let mut worst = 0f64;
    for i in 0..2_000_000 {
        let x = -87.3 + i as f32 * (175.6 / 2_000_000.0);
        worst = worst.max(ulps(exp(x), f64::from(x).exp()));
    }
    assert!(worst <= 2.0, "{worst}");
    assert_eq!(exp(0.0), 1.0);
    assert!(exp(f32::NAN).is_nan());
    assert!(exp(f32::NEG_INFINITY) <= 2.4e-38 && exp(-1e30) <= 2.4e-38);
    assert!(exp(1e30).is_finite());
}

fn values(n: usize, seed: u32) -> Vec<f32> {
    (0..n).map(|i| (((i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed)) >> 8) as f32 / 2e6 - 4.2).collect()
}

proptest! {
    #[test]
    fn rows_agree_with_the_definitions(rows in 1usize..40, width in 1usize..150, seed in any::<u32>()) {
        let (x, y, w) = (values(rows * width, seed), values(rows * width, seed ^ 77), values(width, seed ^ 5));
        let normed = rms_norm(&x, &w, 0.01);
        let sum = add(&x, &y);
        let mut biased = x.clone();
        add_row(&mut biased, &w);
        for r in 0..rows {
            let row: Vec<f64> = x[r * width..(r + 1) * width].iter().map(|v| f64::from(*v)).collect();
            let mean = row.iter().map(|v| v * v).sum::<f64>() / width as f64;
            for c in 0..width {
                let i = r * width + c;
                let wanted = f64::from(w[c]) * row[c] / (mean + f64::from(0.01f32)).sqrt();
                prop_assert!((f64::from(normed[i]) - wanted).abs() <= 2e-6 * wanted.abs().max(1e-3));
                prop_assert_eq!(sum[i], x[i] + y[i]);
                prop_assert_eq!(biased[i], x[i] + w[c]);
            }
        }
    }

    #[test]
    fn softmax_sums_to_one_inside_its_span(
        keys in 1usize..120, seed in any::<u32>(), a in 0usize..120, b in 0usize..120,
        sink in proptest::option::of(-9f32..9.0),
    ) {
        let (start, end) = (a.min(b) % keys, (a.max(b) % keys).max(a.min(b) % keys) + 1);
        let scores = values(keys, seed);
        let (mut out, mut scale) = (scores.clone(), [0f32]);
        softmax_rows(&mut out, keys, &[(start, end)], sink, &mut scale);
        let total: f64 = scores[start..end].iter().chain(&sink).map(|s| f64::from(*s).exp()).sum();
        for i in 0..keys {
            let wanted = if (start..end).contains(&i) { f64::from(scores[i]).exp() / total } else { 0.0 };
            prop_assert!((f64::from(out[i] * scale[0]) - wanted).abs() <= 2e-6 * wanted.max(1e-9));
        }
    }
}

#[test]
fn capped_scores_stay_in_their_span() {
    let scores = values(70, 9);
    let mut out = scores.clone();
    softcap_rows(&mut out, 35, &[(3, 30), (0, 35)], 2.5);
    for (i, (found, score)) in out.iter().zip(&scores).enumerate() {
        let inside = i >= 35 || (3..30).contains(&i);
        let wanted = if inside { 2.5 * (f64::from(*score) / 2.5).tanh() } else { f64::from(*score) };
        assert!((f64::from(*found) - wanted).abs() < 1e-6, "{i}: {found} {wanted}");
    }
    let mut far = [f32::MAX, f32::MIN, f32::NAN];
    softcap_rows(&mut far, 3, &[(0, 3)], 50.0);
    assert!(far[0] == 50.0 && far[1] == -50.0 && far[2].is_nan());
}

#[test]
fn undefined_values_are_not_hidden() {
    let (mut scores, mut scale) = ([0.0, f32::NAN, 1.0], [0f32]);
    softmax_rows(&mut scores, 3, &[(0, 3)], None, &mut scale);
    assert!(scale[0].is_nan());
    softmax_rows(&mut [0.0; 3], 3, &[(0, 3)], Some(f32::NAN), &mut scale);
    assert!(scale[0].is_nan());
}
