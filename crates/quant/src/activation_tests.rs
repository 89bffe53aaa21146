use super::*;
use proptest::prelude::*;

const INT8: ActivationFormat = ActivationFormat::Int { bits: 8, symmetric: true };
const UINT8: ActivationFormat = ActivationFormat::Int { bits: 8, symmetric: false };
const E4M3: ActivationFormat = ActivationFormat::Float(FloatFormat::E4M3);
const E2M1: ActivationFormat = ActivationFormat::Float(FloatFormat::E2M1);

fn run(x: &[f32], width: usize, format: ActivationFormat, scale: ActivationScale) -> Vec<f32> {
    let mut x = x.to_vec();
    let scheme = ActivationScheme { format, scale };
    let mut range = StaticRange::default();
    range.update(&x, width).unwrap();
    fake_quantize_tokens(&mut x, width, &scheme, range.quantization(&scheme).unwrap().as_ref()).unwrap();
    x
}

/// By hand: absmax 12.7, so the scale is 0.1 and the second token's 1.
#[test]
fn each_token_has_its_own_scale() {
    let x = [12.7, 0.26, -0.14, 0.0, -127.0, 2.4, 100.6, 3.6];
    let got = run(&x, 4, INT8, ActivationScale::DynamicToken);
    for (g, wanted) in got.iter().zip([12.7, 0.3, -0.1, 0.0, -127.0, 2.0, 101.0, 4.0]) {
        assert!((g - wanted).abs() < 1e-5, "{got:?}");
    }
    // Groups of two: the quiet half of the first token gets finer steps, 0.14 / 127.
    let grouped = run(&x, 4, INT8, ActivationScale::DynamicGroup(2));
    assert!((grouped[2] + 0.14).abs() < 1e-6 && (grouped[7] - 3.6).abs() < 0.4);
}

#[test]
fn asymmetric_codes_use_the_whole_range() {
    // min −1, max 24.5: scale 0.1, zero −118.
    let x = [-1.0, 24.5, 0.33, 10.07];
    let got = run(&x, 4, UINT8, ActivationScale::DynamicToken);
    for (g, wanted) in got.iter().zip([-1.0, 24.5, 0.3, 10.1]) {
        assert!((g - wanted).abs() < 1e-5, "{got:?}");
    }
    // Symmetric steps are almost twice as wide here.
    let symmetric = run(&x, 4, INT8, ActivationScale::DynamicToken);
    assert!((symmetric[2] - 0.33).abs() > (got[2] - 0.33).abs());
}

/// The parameters of compressed-tensors: int8 symmetric / 127.5, asymmetric / 255 with a signed zero point.
#[test]
fn static_parameters_are_those_of_compressed_tensors() {
    let range = StaticRange::from_bounds(-1.0, 3.0).unwrap();
    let find = |format, scale| range.quantization(&ActivationScheme { format, scale }).unwrap();
    let tensor = |format| find(format, ActivationScale::StaticTensor).unwrap();
    assert_eq!(tensor(INT8), InputQuantization { scale: 3.0 / 127.5, zero_point: 0 });
    // −128 − (−1 / (4 / 255)) = −64.25.
    assert_eq!(tensor(UINT8), InputQuantization { scale: 4.0 / 255.0, zero_point: -64 });
    assert_eq!(tensor(E4M3), InputQuantization { scale: 3.0 / 448.0, zero_point: 0 });
    let nvfp4 = find(E2M1, ActivationScale::StaticTensorLocal(16)).unwrap();
    assert_eq!(nvfp4, InputQuantization { scale: 3.0 / 2688.0, zero_point: 0 });
    assert_eq!(find(INT8, ActivationScale::DynamicToken), None);
    // The range always holds zero; an empty one has a scale all the same.
    assert_eq!(StaticRange::from_bounds(2.0, 5.0).unwrap().bounds(), (0.0, 5.0));
    for (format, scale) in [(INT8, 1.192_092_9e-7), (UINT8, 1.192_092_9e-7)] {
        let scheme = ActivationScheme { format, scale: ActivationScale::StaticTensor };
        let found = StaticRange::default().quantization(&scheme).unwrap().unwrap();
        assert_eq!(found, InputQuantization { scale, zero_point: 0 });
    }
}

/// compressed-tensors' checks of MX scales: absmax 1.74 gives an fp4 scale of 0.25, 1.75 gives 0.5.
#[test]
fn mx_scales_are_powers_of_two() {
    let grid = FloatGrid::new(FloatFormat::E2M1);
    assert_eq!((grid.mx_scale(1.74), grid.mx_scale(1.75)), (0.25, 0.5));
    let got = run(&[1.75, 0.3, -0.8, 0.0], 4, E2M1, ActivationScale::DynamicMx(4));
    // In steps of the scale: 3.5 is a tie and goes to 4, 0.6 to 0.5, −1.6 to −1.5.
    assert_eq!(got, [2.0, 0.25, -0.75, 0.0]);
}

#[test]
fn zeros_stay_zeros_and_tiny_values_stay_finite() {
    let scales = [
        ActivationScale::DynamicToken,
        ActivationScale::DynamicGroup(2),
        ActivationScale::StaticTensor,
        ActivationScale::DynamicMx(4),
        ActivationScale::StaticTensorLocal(4),
    ];
    for scale in scales {
        let ints: &[ActivationFormat] = match scale {
            ActivationScale::DynamicMx(_) | ActivationScale::StaticTensorLocal(_) => &[],
            _ => &[INT8, UINT8],
        };
        for &format in ints.iter().chain(&[E4M3, E2M1, ActivationFormat::Float(FloatFormat::E5M2)]) {
            assert_eq!(run(&[0.0; 8], 4, format, scale), [0.0; 8], "{format:?} {scale:?}");
            for tiny in [1e-45f32, 1e-39, 1e-30, -1e-12] {
                let got = run(&[tiny, -tiny, 0.0, tiny / 2.0], 4, format, scale);
                assert!(got.iter().all(|v| v.abs() <= 2.0 * tiny.abs()), "{format:?} {scale:?} {tiny} {got:?}");
            }
        }
    }
}

#[test]
fn what_no_engine_can_do_is_an_error() {
    let call = |x: &[f32], width, format, scale, found: Option<InputQuantization>| {
        let mut y = x.to_vec();
        let result = fake_quantize_tokens(&mut y, width, &ActivationScheme { format, scale }, found.as_ref());
        if result.is_err() {
            assert_eq!(format!("{x:?}"), format!("{y:?}"), "unchanged on error");
        }
        result
    };
    let x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
    let token = ActivationScale::DynamicToken;
    let tensor = ActivationScale::StaticTensor;
    assert_eq!(call(&x, 3, INT8, token, None), Ok(()));
    assert!(matches!(call(&x, 4, INT8, token, None), Err(QuantError::Length { found: 6, wanted: 8, .. })));
    assert!(matches!(call(&x, 0, INT8, token, None), Err(QuantError::Length { .. })));
    let group = ActivationScale::DynamicGroup(2);
    assert!(matches!(call(&x, 3, INT8, group, None), Err(QuantError::NotDivisible { in_features: 3, group_size: 2 })));
    let empty = ActivationScale::DynamicGroup(0);
    assert!(matches!(call(&x, 3, INT8, empty, None), Err(QuantError::NotDivisible { .. })));
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let result = call(&[1.0, 2.0, 3.0, 4.0, bad, 6.0], 3, INT8, token, None);
        assert_eq!(result, Err(QuantError::ActivationNotFinite { count: 1, token: 1, channel: 1 }));
    }
    let five = ActivationFormat::Int { bits: 5, symmetric: true };
    let found = |scale, zero_point| Some(InputQuantization { scale, zero_point });
    for (format, scale, found) in [
        (five, token, None),
        (INT8, ActivationScale::DynamicMx(3), None),
        (INT8, ActivationScale::StaticTensorLocal(3), found(1.0, 0)),
        (INT8, tensor, None),
        (INT8, tensor, found(f32::NAN, 0)),
        (INT8, tensor, found(0.0, 0)),
        (INT8, tensor, found(-1.0, 0)),
        (INT8, tensor, found(1e-40, 0)),
        (INT8, tensor, found(1.0, 3)),
        (E4M3, tensor, found(1.0, 3)),
        (UINT8, tensor, found(1.0, 128)),
    ] {
        let result = call(&x, 3, format, scale, found);
        assert!(matches!(result, Err(QuantError::Activation { .. })), "{format:?} {scale:?} {found:?} {result:?}");
    }
    assert!(StaticRange::from_bounds(f32::NAN, 1.0).is_err());
    assert!(StaticRange::default().update(&[1.0, f32::INFINITY], 2).is_err());
}

#[test]
fn the_range_does_not_depend_on_the_batches() {
    let x: Vec<f32> = (0..60_000).map(|i| ((i * 7919 % 10_007) as f32 / 777.0) - 6.0).collect();
    let (mut whole, mut parts) = (StaticRange::default(), StaticRange::default());
    whole.update(&x, 60).unwrap();
    x.chunks(3 * 60).rev().for_each(|part| parts.update(part, 60).unwrap());
    assert_eq!(whole, parts);
    assert_eq!(whole.bounds(), (-6.0, 10_006.0 / 777.0 - 6.0));
}

proptest! {
    /// The branch-free rounding against the definition by codes, ties and subnormals included.
    #[test]
    fn float_rounding_is_that_of_the_codes(bits in any::<u32>(), code in any::<u8>(), next in 0u8..=1) {
        for format in [FloatFormat::E4M3, FloatFormat::E5M2, FloatFormat::E2M1] {
            let grid = FloatGrid::new(format);
            let x = f32::from_bits(bits);
            if !x.is_nan() {
                prop_assert_eq!(grid.round(x).to_bits(), format.round(x).to_bits(), "{:?} {}", format, x);
            }
            // A code's value, or halfway to the next.
            let (a, b) = (format.decode(code), format.decode(code.saturating_add(next)));
            let x = a + (b - a) / 2.0;
            if x.is_finite() {
                prop_assert_eq!(grid.round(x).to_bits(), format.round(x).to_bits(), "{:?} {}", format, x);
            }
        }
    }

    #[test]
    fn values_move_by_half_a_step_at_most(seed in any::<u32>(), symmetric in any::<bool>(), group in prop::sample::select(vec![8usize, 16, 64])) {
        let x: Vec<f32> = (0..256u32)
            .map(|i| (i.wrapping_mul(747_796_405).wrapping_add(seed) >> 9) as f32 / 4e6 - 1.0)
            .collect();
        let format = ActivationFormat::Int { bits: 8, symmetric };
        let got = run(&x, 64, format, ActivationScale::DynamicGroup(group));
        for (got, x) in got.chunks(group).zip(x.chunks(group)) {
            let (min, max) = min_max(x);
            let step = if symmetric { max.max(-min) / 127.0 } else { (max - min) / 255.0 };
            // The asymmetric zero point is rounded, so that one end may be clipped by half a step more.
            let bound = if symmetric { 0.501 } else { 1.001 } * step;
            prop_assert!(got.iter().zip(x).all(|(g, x)| (g - x).abs() <= bound));
        }
    }
}
