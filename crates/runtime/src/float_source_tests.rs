//! Codes and scales written by hand.

use std::path::Path;

use lite_model::{CheckpointWriter, OutputTensor};

use super::*;

/// e4m3 codes of 1, 2, −1 and 0.5, by the OCP table.
const ONE: u8 = 0x38;
const TWO: u8 = 0x40;
const MINUS_ONE: u8 = 0xb8;
const HALF: u8 = 0x30;

/// Name, type, shape and bytes.
type Stored<'a> = (&'a str, Dtype, &'a [usize], Vec<u8>);

fn write(dir: &Path, config: &str, tensors: &[Stored<'_>]) -> Checkpoint {
    let specs = tensors.iter().map(|(name, dtype, shape, _)| OutputTensor {
        name: (*name).to_owned(),
        dtype: *dtype,
        shape: shape.to_vec(),
    });
    let writer = CheckpointWriter::create(dir, specs.collect(), u64::MAX).unwrap();
    for (name, _, _, data) in tensors {
        writer.write(name, data).unwrap();
    }
    writer.finish().unwrap();
    std::fs::write(dir.join("config.json"), config).unwrap();
    Checkpoint::open(dir).unwrap()
}

fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn bf16s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| half::bf16::from_f32(*value).to_le_bytes()).collect()
}

const CODES: [u8; 6] = [ONE, TWO, MINUS_ONE, HALF, ONE, TWO];
const VALUES: [f32; 6] = [1.0, 2.0, -1.0, 0.5, 1.0, 2.0];

fn scaled(scales: [f32; 6]) -> Vec<f32> {
    VALUES.iter().zip(scales).map(|(value, scale)| value * scale).collect()
}

#[test]
fn every_grain_is_found_by_the_shape_of_its_scales() {
    let block = r#"{"quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 2]}}"#;
    let structure = r#"{"text_config": {"quantization_config": {"config_groups": {"group_0": {"weights": {"block_structure": [2, 2]}}}}}}"#;
    // A weight [2, 3] (and [3, 2] for blocks of two rows): rows, columns, config, scales' type, shape and bytes.
    type Case = (usize, usize, &'static str, &'static str, Dtype, Vec<usize>, Vec<u8>, [f32; 6]);
    let cases: Vec<Case> = vec![
        (2, 3, "{}", "_scale", Dtype::F32, vec![], f32s(&[0.3]), [0.3; 6]),
        (2, 3, "{}", "_scale", Dtype::F32, vec![1], f32s(&[0.3]), [0.3; 6]),
        (2, 3, "{}", "_scale", Dtype::BF16, vec![2, 1], bf16s(&[0.5, 3.0]), [0.5, 0.5, 0.5, 3.0, 3.0, 3.0]),
        (2, 3, "{}", "_scale", Dtype::F32, vec![2], f32s(&[0.1, 3.0]), [0.1, 0.1, 0.1, 3.0, 3.0, 3.0]),
        (
            2,
            3,
            "{}",
            "_scale",
            Dtype::U8,
            vec![2, 3],
            vec![126, 127, 128, 127, 127, 130],
            [0.5, 1.0, 2.0, 1.0, 1.0, 8.0],
        ),
        (2, 3, block, "_scale_inv", Dtype::F32, vec![1, 2], f32s(&[2.0, 0.1]), [2.0, 2.0, 0.1, 2.0, 2.0, 0.1]),
        (3, 2, block, "_scale_inv", Dtype::F32, vec![2, 1], f32s(&[2.0, 0.1]), [2.0, 2.0, 2.0, 2.0, 0.1, 0.1]),
        (3, 2, structure, "_scale", Dtype::BF16, vec![2, 1], bf16s(&[2.0, 0.5]), [2.0, 2.0, 2.0, 2.0, 0.5, 0.5]),
        (2, 3, "{}", "_scale_inv", Dtype::F32, vec![1, 1, 1, 1], f32s(&[0.7]), [0.7; 6]),
    ];
    for (i, (n, k, config, suffix, dtype, shape, data, scales)) in cases.into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let name = format!("m.weight{suffix}");
        let weight = ("m.weight", Dtype::F8_E4M3, &[n, k][..], CODES.to_vec());
        let checkpoint = write(dir.path(), config, &[weight, (&name, dtype, &shape, data)]);
        let source = FloatSource::new(&checkpoint);
        assert_eq!(source.check().unwrap(), 1);
        assert_eq!(source.tensor_f32("m.weight").unwrap(), scaled(scales), "case {i}");
        assert_eq!(source.load("m.weight").unwrap(), (vec![n, k], scaled(scales)), "case {i}");
        assert_eq!(source.rows("m.weight", &[1]).unwrap(), scaled(scales)[k..2 * k], "case {i}");
        assert!(source.rows("m.weight", &[3]).is_err());
        assert!(source.dropped(&name).is_some() && source.dropped("m.weight").is_none());
    }
}

/// DeepSeek's blocks at the edges: 130×129 in blocks of 128 has a grid of 2×2, whether or not the config says so.
#[test]
fn blocks_of_128_are_cut_at_the_edges() {
    let (n, k) = (130, 129);
    for config in [r#"{"quantization_config": {"weight_block_size": [128, 128]}}"#, "{}"] {
        let dir = tempfile::tempdir().unwrap();
        let tensors: [(&str, Dtype, &[usize], Vec<u8>); 2] = [
            ("m.weight", Dtype::F8_E4M3, &[n, k], vec![TWO; n * k]),
            ("m.weight_scale_inv", Dtype::F32, &[2, 2], f32s(&[1.0, 10.0, 100.0, 1000.0])),
        ];
        let checkpoint = write(dir.path(), config, &tensors);
        let values = FloatSource::new(&checkpoint).tensor_f32("m.weight").unwrap();
        assert_eq!((values[0], values[127], values[128]), (2.0, 2.0, 20.0));
        assert_eq!((values[127 * k], values[128 * k], values[129 * k + 128]), (2.0, 200.0, 2000.0));
    }
}

#[test]
fn what_cannot_be_read_is_named() {
    let codes = || ("m.weight", Dtype::F8_E4M3, &[2usize, 3][..], CODES.to_vec());
    let nan = || ("m.weight", Dtype::F8_E4M3, &[2usize, 3][..], vec![0x7f; 6]);
    let scale = |dtype, shape: &'static [usize], data| ("m.weight_scale", dtype, shape, data);
    let cases: Vec<(Vec<Stored<'_>>, &str)> = vec![
        (vec![codes()], "`m.weight_scale_inv` or `m.weight_scale`, are missing"),
        (vec![codes(), scale(Dtype::F32, &[3, 1], f32s(&[1.0; 3]))], "fits no way"),
        (vec![codes(), scale(Dtype::I32, &[1], vec![0; 4])], "I32"),
        (vec![codes(), scale(Dtype::F32, &[], f32s(&[f32::NAN]))], "NaN"),
        (vec![nan(), scale(Dtype::F32, &[], f32s(&[1.0]))], "6 codes"),
        (
            vec![codes(), scale(Dtype::F32, &[], f32s(&[1.0])), ("m.weight_scale_inv", Dtype::F32, &[], f32s(&[1.0]))],
            "two tensors",
        ),
        (vec![("m.weight", Dtype::F8_E5M2, &[1, 2, 3], CODES.to_vec())], "only matrices"),
    ];
    for (tensors, words) in cases {
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = write(dir.path(), "{}", &tensors);
        let error = FloatSource::new(&checkpoint).tensor_f32("m.weight").unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        let error = FloatSource::new(&checkpoint).load("m.weight").unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    }
}

#[test]
fn only_what_serves_codes_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let one = || f32s(&[1.0]);
    let tensors: [(&str, Dtype, &[usize], Vec<u8>); 9] = [
        ("a.k_proj.weight", Dtype::F8_E4M3, &[1, 1], vec![ONE]),
        ("a.k_proj.weight_scale", Dtype::F32, &[], one()),
        ("a.k_proj.input_scale", Dtype::F32, &[], one()),
        ("a.k_proj.k_scale", Dtype::F32, &[], one()),
        ("a.k_scale", Dtype::F32, &[], one()),
        ("a.k_proj.bias", Dtype::F32, &[1], one()),
        ("b.weight", Dtype::F32, &[1, 1], one()),
        ("b.weight_scale", Dtype::F32, &[], one()),
        ("b.k_scale", Dtype::F32, &[], one()),
    ];
    let checkpoint = write(dir.path(), "{}", &tensors);
    let source = FloatSource::new(&checkpoint);
    let dropped: Vec<&str> = checkpoint.names().filter(|name| source.dropped(name).is_some()).collect();
    let mut wanted = vec!["a.k_proj.weight_scale", "a.k_proj.input_scale", "a.k_proj.k_scale", "a.k_scale"];
    wanted.sort_unstable();
    let mut found = dropped;
    found.sort_unstable();
    assert_eq!(found, wanted);
}

/// The experts of a tiny gpt-oss, against what transformers makes of their codes.
#[test]
fn mxfp4_of_gpt_oss_is_what_transformers_reads() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/fused/gpt-oss-mxfp4");
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let source = FloatSource::new(&checkpoint);
    assert_eq!((source.check().unwrap(), source.kind_of_codes()), (2 * 3 * 3, "MXFP4"));
    let plain = tempfile::tempdir().unwrap();
    std::fs::copy(dir.join("values.safetensors"), plain.path().join("model.safetensors")).unwrap();
    std::fs::write(plain.path().join("config.json"), "{}").unwrap();
    let values = Checkpoint::open(plain.path()).unwrap();
    assert_eq!(values.names().len(), 2 * 3 * 6);
    for name in values.names().map(str::to_owned) {
        let wanted = values.tensor_f32(&name).unwrap();
        assert_eq!(source.tensor_f32(&name).unwrap(), wanted, "{name}");
        let (shape, loaded) = source.load(&name).unwrap();
        assert_eq!((&shape, &loaded), (&values.info(&name).unwrap().shape, &wanted), "{name}");
        let coded = name.ends_with(".weight");
        assert_eq!(source.is_coded(&name), coded);
        if coded {
            let width = shape[1];
            assert_eq!(source.rows(&name, &[3, 0]).unwrap()[..width], wanted[3 * width..4 * width]);
            let dropped = source.dropped(&format!("{name}_scale")).unwrap();
            assert!(dropped.contains("MXFP4"), "{dropped}");
        }
        source.release(&[name]);
    }
    let (linears, unknown) = crate::stored_linears(&checkpoint);
    assert_eq!((linears.len(), unknown.len()), (18, 0));
    let down = linears.iter().find(|linear| linear.module.ends_with("0.mlp.experts.2.down_proj")).unwrap();
    assert_eq!((down.out_features, down.in_features, down.bits), (64, 32, 4));
    assert_eq!(down.float_format(&checkpoint), Some(FloatFormat::E2M1));
}

/// Scales under which the largest code would be infinite, or that are NaN; and codes under another name of the method.
#[test]
fn mxfp4_scales_out_of_range_are_damage() {
    let config = |method: &str| format!("{{\"quantization_config\": {{\"quant_method\": \"{method}\"}}}}");
    let weight = || ("m.weight", Dtype::F4, &[1usize, 32][..], vec![0x7fu8; 16]);
    for (scale, good) in [(0, true), (127, true), (252, true), (253, false), (254, false), (255, false)] {
        let dir = tempfile::tempdir().unwrap();
        let scales = ("m.weight_scale", Dtype::F8_E8M0, &[1usize, 1][..], vec![scale]);
        let checkpoint = write(dir.path(), &config("mxfp4"), &[weight(), scales]);
        let found = FloatSource::new(&checkpoint).tensor_f32("m.weight");
        assert_eq!(found.is_ok(), good, "{scale}");
        if let Ok(found) = found {
            // Codes 15 and 7, the lower half first.
            let one = 2f32.powi(i32::from(scale) - 127);
            assert_eq!(found[..2], [-6.0 * one, 6.0 * one]);
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = write(dir.path(), &config("other"), &[weight()]);
    assert!(!FloatSource::new(&checkpoint).is_coded("m.weight"));
}
