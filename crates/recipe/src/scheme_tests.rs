//! Schemes as they are written.

use super::*;

#[test]
fn every_scheme_is_written_so_that_it_reads_back() {
    let mut schemes: Vec<LinearScheme> = PRESETS.iter().map(|name| preset(name, ScaleDtype::F32).unwrap()).collect();
    let named = schemes.len();
    let float = |grain, scale| LinearScheme {
        weights: FloatScheme { format: FloatFormat::E5M2, grain, scale }.into(),
        activations: Some(ActivationScheme {
            format: ActivationFormat::Float(FloatFormat::E5M2),
            scale: ActivationScale::DynamicGroup(64),
        }),
    };
    for grain in [Grain::Tensor, Grain::Channel, Grain::Group(64), Grain::Block { rows: 64, columns: 32 }] {
        for scale in [ScaleKind::Float(ScaleDtype::F32), ScaleKind::E8M0, ScaleKind::E4M3WithGlobal] {
            schemes.push(float(grain, scale));
        }
    }
    let inputs = ActivationScheme {
        format: ActivationFormat::Int { bits: 8, symmetric: false },
        scale: ActivationScale::StaticTensor,
    };
    schemes.push(LinearScheme { activations: Some(inputs), ..w8a8() });
    for (i, scheme) in schemes.iter().enumerate() {
        let choice = SchemeChoice::of(scheme);
        assert_eq!(matches!(choice, SchemeChoice::Preset(_)), i < named, "{choice:?}");
        let text = serde_yaml::to_string(&serde_json::to_value(&choice).unwrap()).unwrap();
        let node = crate::yaml::parse(&text, 0).unwrap();
        let back: SchemeChoice = crate::de::read(&node).unwrap_or_else(|e| panic!("{text}: {e:?}"));
        assert_eq!(back.scheme(usual(true)).unwrap(), *scheme, "{text}");
    }
}

#[test]
fn contradictions_are_refused() {
    for bad in [
        "W4A15",
        "{bits: 9}",
        "{group_size: 100}",
        "{bits: 4, weights: {type: int}}",
        "{weights: {type: int, block: [128, 128]}}",
        "{weights: {type: e4m3, bits: 8}}",
        "{weights: {type: e4m3, block: [0, 128]}}",
        "{weights: {type: e4m3, per_tensor: true, group_size: 32}}",
        "{activations: {type: e4m3, scale: group}}",
        "{activations: {type: int, scale: token, group_size: 128}}",
        "{activations: {type: int}}",
        "7",
        "[W4A16]",
    ] {
        let node = crate::yaml::parse(bad, 0).unwrap();
        assert!(crate::de::read::<SchemeChoice>(&node).is_err(), "{bad}");
    }
}
