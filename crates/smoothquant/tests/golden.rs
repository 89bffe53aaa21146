//! Scales and quantized activations against other hands: see `tests/generators/smoothquant_golden.py`.

use lite_quant::floats::FloatFormat;
use lite_quant::{
    ActivationFormat, ActivationScale, ActivationScheme, InputQuantization, StaticRange, fake_quantize_tokens,
};
use lite_smoothquant::{Algorithm, Constraints, Normalisation, SmoothSettings, smooth_scales};
use serde_json::Value;

fn golden() -> Value {
    serde_json::from_str(include_str!("golden.json")).unwrap()
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

#[test]
fn scales_are_those_of_llm_compressor_and_lmdeploy() {
    let golden = golden();
    let data = &golden["scales"];
    let abs_max = floats(&data["abs_max"]);
    let frozen: Vec<bool> = data["frozen"].as_array().unwrap().iter().map(|v| v.as_bool().unwrap()).collect();
    let mut seen = Vec::new();
    for case in data["cases"].as_array().unwrap() {
        let weights: Vec<Vec<f32>> =
            data["weights"][case["weights"].as_str().unwrap()].as_array().unwrap().iter().map(floats).collect();
        let weights: Vec<(&[f32], usize)> =
            weights.iter().zip([5, 7]).map(|(weight, rows)| (weight.as_slice(), rows)).collect();
        let exponent = case["exponent"].as_f64().unwrap();
        let (algorithm, normalisation, frozen) = match case["algorithm"].as_str().unwrap() {
            "smoothquant" => (Algorithm::SmoothQuant { alpha: exponent }, Normalisation::None, None),
            "log_equalization" => (Algorithm::LogEqualization, Normalisation::None, None),
            "lmdeploy" => {
                (Algorithm::MeanNormalised { ratio: exponent }, Normalisation::Middle, Some(frozen.as_slice()))
            }
            other => panic!("{other}"),
        };
        let settings = SmoothSettings { algorithm, normalisation, constraints: Constraints { ties: None, frozen } };
        let got = smooth_scales(&abs_max, &weights, &settings).unwrap();
        for (got, wanted) in got.iter().zip(floats(&case["scales"])) {
            assert!((got - wanted).abs() <= 1e-6 * wanted, "{algorithm:?} {got} {wanted}");
        }
        // Normalised scales are the same up to a common factor.
        if let (Algorithm::SmoothQuant { .. }, "read") = (algorithm, case["weights"].as_str().unwrap()) {
            let middle =
                smooth_scales(&abs_max, &weights, &SmoothSettings { normalisation: Normalisation::Middle, ..settings })
                    .unwrap();
            let factor = middle[0] / got[0];
            assert!(middle.iter().zip(&got).all(|(m, g)| (m / g / factor - 1.0).abs() < 1e-5));
            let (min, max) = middle.iter().fold((f32::MAX, 0f32), |(a, b), s| (a.min(*s), b.max(*s)));
            assert!((min * max - 1.0).abs() < 1e-5);
        }
        seen.push(algorithm);
    }
    assert_eq!(seen.len(), 12);
}

#[test]
fn activations_are_quantized_as_engines_do() {
    let golden = golden();
    let data = &golden["activations"];
    let width = data["width"].as_u64().unwrap() as usize;
    let tokens = floats(&data["tokens"]);
    let mut range = StaticRange::default();
    range.update(&tokens, width).unwrap();
    let cases = data["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 12);
    for case in cases {
        let group = case["group"].as_u64().unwrap() as usize;
        let int = |bits, symmetric| ActivationFormat::Int { bits, symmetric };
        let format = match case["format"].as_str().unwrap() {
            "int4" => int(4, true),
            "int8" => int(8, true),
            "uint4" => int(4, false),
            "uint8" => int(8, false),
            "e4m3" => ActivationFormat::Float(FloatFormat::E4M3),
            "e2m1" => ActivationFormat::Float(FloatFormat::E2M1),
            other => panic!("{other}"),
        };
        let scale = match case["scale"].as_str().unwrap() {
            "token" => ActivationScale::DynamicToken,
            "group" => ActivationScale::DynamicGroup(group),
            "mx" => ActivationScale::DynamicMx(group),
            "tensor" => ActivationScale::StaticTensor,
            "local" => ActivationScale::StaticTensorLocal(group),
            other => panic!("{other}"),
        };
        let scheme = ActivationScheme { format, scale };
        let found = range.quantization(&scheme).unwrap();
        if let Some(wanted) = case.get("found") {
            let InputQuantization { scale, zero_point } = found.unwrap();
            let wanted_scale = wanted[0].as_f64().unwrap() as f32;
            assert!((scale - wanted_scale).abs() <= 2e-7 * wanted_scale, "{scheme:?} {scale} {wanted_scale}");
            assert_eq!(i64::from(zero_point), wanted[1].as_i64().unwrap(), "{scheme:?}");
        }
        let mut got = tokens.clone();
        fake_quantize_tokens(&mut got, width, &scheme, found.as_ref()).unwrap();
        let wanted = floats(&case["values"]);
        let absmax = wanted.iter().fold(0f32, |m, v| m.max(v.abs()));
        assert!(absmax > 1.0);
        for (i, (g, w)) in got.iter().zip(&wanted).enumerate() {
            assert!((g - w).abs() <= 1e-5 * w.abs().max(1e-3), "{scheme:?} {i}: {} becomes {g}, not {w}", tokens[i]);
        }
    }
}
