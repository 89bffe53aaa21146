//! Schemes by the names of llm-compressor (compressed-tensors 0.18, `quant_scheme.py`: `PRESET_SCHEMES`).

use lite_quant::floats::{FloatFormat, FloatScheme, Grain, ScaleKind};
use lite_quant::{
    ActivationFormat, ActivationScale, ActivationScheme, GroupSize, LinearScheme, ScaleDtype, Scheme, WeightScheme,
};

/// Every preset, as it is spelled in upper case.
pub const PRESETS: [&str; 29] = [
    "W4A16",
    "W4A16_ASYM",
    "W8A16",
    "W8A8",
    "INT8",
    "W4A8",
    "W4AFP8",
    "FP8",
    "FP8_DYNAMIC",
    "FP8_BLOCK",
    "NVFP4",
    "NVFP4A16",
    "MXFP4",
    "MXFP4A16",
    "MXFP8",
    "MXFP8A16",
    "W2A16",
    "W3A16",
    "W5A16",
    "W6A16",
    "W7A16",
    "W2A8",
    "W3A8",
    "W5A8",
    "W6A8",
    "W7A8",
    "W2A4",
    "W3A4",
    "W4A4",
];

/// The scheme of a preset, in any case of letters; `None` for a name that is not among [`PRESETS`].
///
/// `scale_dtype` is the type of those scales that the preset leaves to the model: all but E8M0 and NVFP4's.
pub fn preset(name: &str, scale_dtype: ScaleDtype) -> Option<LinearScheme> {
    let name = name.to_ascii_uppercase();
    let int = |bits, group_size, symmetric| WeightScheme::Int(Scheme { bits, group_size, symmetric, scale_dtype });
    let group = |bits| int(bits, GroupSize::Channels(128), true);
    let float = |format, grain, scale| WeightScheme::Float(FloatScheme { format, grain, scale });
    let fp8 = |grain| float(FloatFormat::E4M3, grain, ScaleKind::Float(scale_dtype));
    let mx = |format| float(format, Grain::Group(32), ScaleKind::E8M0);
    let nvfp4 = float(FloatFormat::E2M1, Grain::Group(16), ScaleKind::E4M3WithGlobal);
    let plain = |weights| Some(LinearScheme { weights, activations: None });
    let with =
        |weights, format, scale| Some(LinearScheme { weights, activations: Some(ActivationScheme { format, scale }) });
    let integers = |bits| ActivationFormat::Int { bits, symmetric: true };
    let e4m3 = ActivationFormat::Float(FloatFormat::E4M3);
    let e2m1 = ActivationFormat::Float(FloatFormat::E2M1);
    match name.as_str() {
        "W4A16_ASYM" => plain(int(4, GroupSize::Channels(128), false)),
        "W8A8" | "INT8" => with(int(8, GroupSize::Channel, true), integers(8), ActivationScale::DynamicToken),
        "W4AFP8" => with(group(4), e4m3, ActivationScale::DynamicToken),
        "FP8" => with(fp8(Grain::Tensor), e4m3, ActivationScale::StaticTensor),
        "FP8_DYNAMIC" => with(fp8(Grain::Channel), e4m3, ActivationScale::DynamicToken),
        "FP8_BLOCK" => with(fp8(Grain::Block { rows: 128, columns: 128 }), e4m3, ActivationScale::DynamicGroup(128)),
        "NVFP4" => with(nvfp4, e2m1, ActivationScale::StaticTensorLocal(16)),
        "NVFP4A16" => plain(nvfp4),
        "MXFP4" => with(mx(FloatFormat::E2M1), e2m1, ActivationScale::DynamicMx(32)),
        "MXFP4A16" => plain(mx(FloatFormat::E2M1)),
        "MXFP8" => with(mx(FloatFormat::E4M3), e4m3, ActivationScale::DynamicMx(32)),
        "MXFP8A16" => plain(mx(FloatFormat::E4M3)),
        other => {
            let (bits, inputs) = other.strip_prefix('W')?.split_once('A')?;
            let bits: u8 = bits.parse().ok().filter(|bits| (2..=8).contains(bits) && !other.contains('+'))?;
            match (bits, inputs) {
                (_, "16") => plain(group(bits)),
                (2..=7, "8") => with(group(bits), integers(8), ActivationScale::DynamicToken),
                (2..=4, "4") => with(group(bits), integers(4), ActivationScale::DynamicToken),
                _ => None,
            }
        }
    }
}

/// The presets that share the longest beginning with `name`, for a message; none if not even the first letter.
pub fn near_presets(name: &str) -> Vec<&'static str> {
    let name = name.to_ascii_uppercase().replace(['-', ' '], "_");
    let shared = |known: &str| known.bytes().zip(name.bytes()).take_while(|(a, b)| a == b).count();
    let longest = PRESETS.iter().map(|known| shared(known)).max().unwrap_or(0);
    PRESETS.into_iter().filter(|known| shared(known) == longest.max(1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_a_scheme_in_any_case() {
        for name in PRESETS {
            let scheme = preset(name, ScaleDtype::BF16).unwrap_or_else(|| panic!("{name}"));
            assert_eq!(preset(&name.to_lowercase(), ScaleDtype::BF16), Some(scheme));
        }
        for unknown in ["", "W4", "W9A16", "W8A4", "W1A16", "W+4A16", "FP8_STATIC", "W8A8_ASYM", "UNQUANTIZED"] {
            assert_eq!(preset(unknown, ScaleDtype::BF16), None, "{unknown}");
        }
    }

    #[test]
    fn near_names_begin_alike() {
        assert_eq!(near_presets("fp8-dyn"), ["FP8_DYNAMIC"]);
        assert_eq!(near_presets("nvfp"), ["NVFP4", "NVFP4A16"]);
        assert!(near_presets("W8A4").contains(&"W8A8"));
        assert!(near_presets("zzz").is_empty());
    }
}
