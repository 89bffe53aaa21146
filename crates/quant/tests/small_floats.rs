//! Every code and every rounding against torch's float8 types and compressed-tensors' e2m1
//! (`tests/generators/small_floats.py`), and what holds for every weight.

use lite_quant::floats::{FloatFormat, FloatRange, FloatScheme, Grain, ScaleKind, e8m0, mx_code, quantize_float};
use lite_quant::{QuantError, ScaleDtype};
use proptest::prelude::*;
use serde_json::Value;

fn fixture() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/small_floats.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn fnv(bytes: impl Iterator<Item = u8>) -> String {
    let hash =
        bytes.fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    format!("{hash:016x}")
}

/// Every bf16 number, which holds every code of fp8 and every tie between two.
fn numbers() -> impl Iterator<Item = f32> {
    (0..=u16::MAX).map(|bits| f32::from_bits(u32::from(bits) << 16)).filter(|number| !number.is_nan())
}

#[test]
fn every_code_has_the_value_that_torch_gives_it() {
    let fixture = fixture();
    type Decode = fn(u8) -> f32;
    let decoders: [(&str, Decode); 3] = [
        ("e4m3_values", |code| FloatFormat::E4M3.decode(code)),
        ("e5m2_values", |code| FloatFormat::E5M2.decode(code)),
        ("e8m0_values", e8m0::decode),
    ];
    for (key, decode) in decoders {
        let values = fixture[key].as_array().unwrap();
        assert_eq!(values.len(), 256);
        for (code, value) in values.iter().enumerate() {
            let found = decode(code as u8);
            match value {
                Value::Null => assert!(found.is_nan(), "{key} {code}"),
                Value::String(infinity) => assert_eq!(found, infinity.parse::<f32>().unwrap(), "{key} {code}"),
                value => {
                    let wanted = value.as_f64().unwrap() as f32;
                    assert_eq!(found.to_bits(), wanted.to_bits(), "{key} {code}");
                    if key == "e8m0_values" {
                        assert_eq!(e8m0::encode(wanted), Some(code as u8));
                    }
                }
            }
        }
    }
}

#[test]
fn every_bf16_number_gets_the_code_that_torch_gives_it() {
    let fixture = fixture();
    assert_eq!(numbers().count() as u64, fixture["numbers"].as_u64().unwrap());
    for (format, key) in [(FloatFormat::E4M3, "e4m3_codes"), (FloatFormat::E5M2, "e5m2_codes")] {
        assert_eq!(fnv(numbers().map(|number| format.encode(number))), fixture[key], "{key}");
    }
    // `cast_to_fp4` drops the sign of zero itself; each code fills both halves of a byte.
    let four = numbers().map(|number| FloatFormat::E2M1.encode(number + 0.0) * 17);
    assert_eq!(fnv(four), fixture["e2m1_codes"]);
    for (format, key) in [(FloatFormat::E4M3, "e4m3_mx_codes"), (FloatFormat::E2M1, "e2m1_mx_codes")] {
        let sizes = numbers().filter(|number| number.is_normal() && *number > 0.0 && *number < 1e38);
        assert_eq!(fnv(sizes.map(|size| mx_code(format, size))), fixture[key], "{key}");
    }
}

fn schemes() -> Vec<FloatScheme> {
    use FloatFormat::{E2M1, E4M3, E5M2};
    let float = |dtype| ScaleKind::Float(dtype);
    let kinds = [
        (E4M3, Grain::Tensor, float(ScaleDtype::F32)),
        (E4M3, Grain::Channel, float(ScaleDtype::BF16)),
        (E5M2, Grain::Channel, float(ScaleDtype::F16)),
        (E4M3, Grain::Group(16), float(ScaleDtype::F16)),
        (E5M2, Grain::Block { rows: 8, columns: 24 }, float(ScaleDtype::F32)),
        (E2M1, Grain::Group(16), ScaleKind::E4M3WithGlobal),
        (E2M1, Grain::Group(32), ScaleKind::E8M0),
        (E4M3, Grain::Group(32), ScaleKind::E8M0),
    ];
    kinds.into_iter().map(|(format, grain, scale)| FloatScheme { format, grain, scale }).collect()
}

/// Values over the whole range of f32 and zeros, in rows of their own size.
fn weights() -> impl Strategy<Value = (usize, Vec<f32>)> {
    let row = (-126i32..120, prop::collection::vec(prop_oneof![4 => -1f32..1.0, 1 => Just(0.0), 1 => Just(-0.0)], 64));
    prop::collection::vec(row, 1..20).prop_map(|rows| {
        let n = rows.len();
        let scaled = |(power, row): (i32, Vec<f32>)| row.into_iter().map(move |value| value * 2f32.powi(power));
        (n, rows.into_iter().flat_map(scaled).collect())
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_code_is_the_nearest_and_no_scale_is_unusable((n, weight) in weights()) {
        for scheme in schemes() {
            for range in [FloatRange::MinMax, FloatRange::Mse] {
                let linear = quantize_float(&weight, n, 64, &scheme, range, None).unwrap();
                linear.check().unwrap();
                let (_, columns) = scheme.grain.grid(n, 64).unwrap();
                let (tall, wide) = scheme.grain.cover(n, 64);
                let unit = if scheme.scale == ScaleKind::E4M3WithGlobal { (1.0 / linear.global_scale) as f32 } else { 1.0 };
                for scale in &linear.scales {
                    let exact = match scheme.scale {
                        ScaleKind::Float(dtype) => dtype.round(*scale) == *scale && *scale >= dtype.smallest_scale(),
                        ScaleKind::E8M0 => e8m0::encode(*scale).is_some_and(|code| code < 255),
                        ScaleKind::E4M3WithGlobal => FloatFormat::E4M3.round(*scale) == *scale,
                    };
                    prop_assert!(exact && *scale > 0.0 && scale.is_finite(), "{:?} {}", scheme, scale);
                }
                for (at, (&code, &value)) in linear.codes.iter().zip(&weight).enumerate() {
                    let scale = linear.scales[at / 64 / tall * columns + at % 64 / wide] / unit;
                    let back = scheme.format.decode(code);
                    prop_assert!(back.is_finite());
                    prop_assert_eq!(back, scheme.format.round(value / scale), "{:?} {} / {}", scheme, value, scale);
                }
                prop_assert!(linear.dequantize().iter().all(|value| value.is_finite()));
            }
        }
    }

    #[test]
    fn the_search_never_loses((n, weight) in weights()) {
        for scheme in schemes() {
            let error = |range| {
                let back = quantize_float(&weight, n, 64, &scheme, range, None).unwrap().dequantize();
                weight.iter().zip(back).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>()
            };
            let (plain, searched) = (error(FloatRange::MinMax), error(FloatRange::Mse));
            // Errors of numbers far below one underflow in f32.
            prop_assert!(searched <= plain * 1.0001 + 1e-60, "{:?} {} {}", scheme, searched, plain);
        }
    }
}

#[test]
fn bad_matrices_are_refused_and_empty_ones_are_not() {
    for scheme in schemes() {
        let run = |weight: &[f32], n, k| quantize_float(weight, n, k, &scheme, FloatRange::MinMax, None);
        assert!(matches!(run(&[0.0; 63], 1, 64), Err(QuantError::Length { .. })));
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut weight = [0.5; 192];
            weight[70] = bad;
            assert_eq!(run(&weight, 3, 64), Err(QuantError::NotFinite { count: 1, row: 1, column: 6 }));
        }
        assert!(run(&[], 0, 64).is_ok());
        let zeros = run(&[0.0; 128], 2, 64).unwrap();
        assert!(zeros.codes.iter().all(|&code| code == 0) && zeros.scales.iter().all(|&scale| scale > 0.0));
        let extreme = run(&[1e38; 128], 2, 64).unwrap();
        assert!(extreme.dequantize().iter().all(|value| value.is_finite() && *value > 0.0), "{scheme:?}");
    }
    let groups = FloatScheme { format: FloatFormat::E4M3, grain: Grain::Group(48), scale: ScaleKind::E8M0 };
    let error = quantize_float(&[0.0; 64], 1, 64, &groups, FloatRange::MinMax, None);
    assert_eq!(error, Err(QuantError::NotDivisible { in_features: 64, group_size: 48 }));
}
