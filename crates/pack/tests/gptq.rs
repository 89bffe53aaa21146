//! Zero points of GPTQ files are told apart by value, columns out of order are refused, and AutoGPTQ's
//! published kernel outputs come out of its files.
// A test that is skipped says so.
#![allow(clippy::print_stdout)]

use std::path::PathBuf;

use lite_pack::{ErrorKind, Layout, PackError, PackedTensor, TensorRef, detect, layout};
use lite_quant::{QuantizedLinear, ScaleDtype, Scheme, Weights};
use safetensors::SafeTensors;
use serde_json::{Value, json};

const N: usize = 64;
const K: usize = 128;

fn scheme(bits: i64, symmetric: bool) -> Scheme {
    Scheme::new(bits, 32, symmetric, ScaleDtype::F16).unwrap()
}

/// A weight whose zero points are `zero(row, group)`.
fn weight(scheme: Scheme, zero: impl Fn(usize, usize) -> u8) -> QuantizedLinear {
    let groups = scheme.groups(K).unwrap();
    QuantizedLinear {
        scheme,
        out_features: N,
        in_features: K,
        codes: (0..N * K).map(|i| (i * 31 / 7 % 256) as u8 & scheme.max_code()).collect(),
        scales: vec![0.5; N * groups],
        zeros: (0..N * groups).map(|i| zero(i / groups, i % groups)).collect(),
    }
}

fn tensor<'t>(tensors: &'t mut [PackedTensor], suffix: &str) -> &'t mut PackedTensor {
    tensors.iter_mut().find(|tensor| tensor.suffix == suffix).unwrap()
}

fn read(layout: &dyn Layout, scheme: &Scheme, tensors: &[PackedTensor]) -> Result<QuantizedLinear, PackError> {
    let get = |suffix: &str| {
        let tensor = tensors.iter().find(|tensor| tensor.suffix == suffix)?;
        Some(TensorRef { dtype: tensor.dtype, shape: &tensor.shape, data: &tensor.data })
    };
    match layout.unpack(&(*scheme).into(), N, K, &get)?.weights {
        Weights::Int(linear) => Ok(linear),
        Weights::Float(_) => unreachable!("an integer scheme"),
    }
}

/// The layout that a config of this label asks for.
fn labelled(scheme: &Scheme, label: Value) -> &'static dyn Layout {
    let config = json!({ "quantization_config": {
        "quant_method": "gptq", "bits": scheme.bits, "group_size": scheme.group_size.to_flag(),
        "sym": scheme.symmetric, "desc_act": false, "checkpoint_format": label,
    } });
    detect(config.as_object().unwrap()).unwrap().unwrap().0
}

fn labels() -> [Value; 3] {
    [json!("gptq"), json!("gptq_v2"), json!(null)]
}

#[test]
fn symmetric_zero_points_are_read_by_value() {
    for bits in [2, 3, 4, 8] {
        let scheme = scheme(bits, true);
        let wanted = weight(scheme, |_, _| scheme.middle_code());
        let v1 = layout("gptq").unwrap().pack(&wanted.clone().into(), None, None).unwrap();
        // The zero points of v2 are those of an asymmetric weight, which are stored as they are.
        let asymmetric = QuantizedLinear { scheme: Scheme { symmetric: false, ..scheme }, ..wanted.clone() };
        let v2 = layout("gptq").unwrap().pack(&asymmetric.clone().into(), None, None).unwrap();
        assert_ne!(v1[1], v2[1]);
        if bits == 4 {
            let all = |tensors: &[PackedTensor], byte| tensors[1].data.iter().all(|found| *found == byte);
            assert!(all(&v1, 0x77) && all(&v2, 0x88));
        }
        let mut both = v1.clone();
        let half = both[1].data.len() / 2;
        both[1].data[half..].copy_from_slice(&v2[1].data[half..]);
        for label in labels() {
            let layout = labelled(&scheme, label);
            assert_eq!(read(layout, &scheme, &v1).unwrap(), wanted, "{bits} bits");
            assert_eq!(read(layout, &scheme, &v2).unwrap(), wanted, "{bits} bits");
            let error = read(layout, &scheme, &both).unwrap_err();
            assert!(matches!(error, PackError::Value { what: "qzeros", column: 2, .. }), "{error}");
        }
    }
}

#[test]
fn asymmetric_zero_points_are_read_by_label_unless_it_is_impossible() {
    for bits in [2, 3, 4, 8] {
        let scheme = scheme(bits, false);
        let max = scheme.max_code();
        // Below the largest, so that both readings are possible.
        let low = weight(scheme, |row, group| ((row * 5 + group) % usize::from(max)) as u8);
        let packed = layout("gptq").unwrap().pack(&low.clone().into(), None, None).unwrap();
        assert_eq!(read(labelled(&scheme, json!("gptq_v2")), &scheme, &packed).unwrap(), low);
        let plus_one = QuantizedLinear { zeros: low.zeros.iter().map(|zero| zero + 1).collect(), ..low };
        assert_eq!(read(labelled(&scheme, json!("gptq")), &scheme, &packed).unwrap(), plus_one);
        // As engines take it, and as AutoRound writes it.
        assert_eq!(read(labelled(&scheme, json!(null)), &scheme, &packed).unwrap(), plus_one);

        let high = weight(scheme, |row, group| if (row, group) == (3, 1) { max } else { 0 });
        let packed = layout("gptq").unwrap().pack(&high.clone().into(), None, None).unwrap();
        assert_eq!(read(labelled(&scheme, json!("gptq_v2")), &scheme, &packed).unwrap(), high);
        for (label, says) in [(json!("gptq"), "`checkpoint_format` is \"gptq\""), (json!(null), "is not given")] {
            let error = read(labelled(&scheme, label), &scheme, &packed).unwrap_err();
            assert!(matches!(error, PackError::AmbiguousZeros { .. }), "{error}");
            assert!(error.to_string().contains("row 3, group 1") && error.to_string().contains(says), "{error}");
            assert_eq!(error.kind(), ErrorKind::Input);
        }
    }
}

#[test]
fn columns_out_of_order_are_refused() {
    let scheme = scheme(4, true);
    let packed = layout("gptq").unwrap().pack(&weight(scheme, |_, _| 8).into(), None, None).unwrap();
    let with = |g_idx: &dyn Fn(usize) -> i32| {
        let mut changed = packed.clone();
        tensor(&mut changed, "g_idx").data = (0..K).flat_map(|column| g_idx(column).to_le_bytes()).collect();
        read(layout("gptq").unwrap(), &scheme, &changed)
    };
    assert!(with(&|column| (column / 32) as i32).is_ok());
    // As `desc_act` leaves it, and whole groups in another order.
    for order in [(|column| (column % 4) as i32) as fn(usize) -> i32, |column| 3 - (column / 32) as i32] {
        let error = with(&order).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("`g_idx`") && error.to_string().contains("desc_act"), "{error}");
    }
    for wild in [-1, 4, i32::MAX] {
        let error = with(&|column| if column == 77 { wild } else { (column / 32) as i32 }).unwrap_err();
        assert!(matches!(error, PackError::Value { what: "g_idx", column: 77, .. }), "{error}");
    }
}

/// AutoGPTQ, `tests/test_q4.py`: inputs, packed layers and the outputs of its kernels.
#[test]
fn autogptq_published_outputs() {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/golden/autogptq-q4");
    let Ok(files) = std::fs::read_dir(&dir) else {
        println!("skipped: {} is absent", dir.display());
        return;
    };
    let scheme = Scheme::new(4, 128, false, ScaleDtype::F16).unwrap();
    let mut seen = 0;
    for path in
        files.map(|entry| entry.unwrap().path()).filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
    {
        let bytes = std::fs::read(&path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let view = |name: &str| file.tensor(name).unwrap();
        let tensors = ["qweight", "qzeros", "scales", "g_idx"].map(|suffix| (suffix, view(&format!("layer.{suffix}"))));
        let get = |suffix: &str| {
            let (_, view) = tensors.iter().find(|(known, _)| *known == suffix)?;
            Some(TensorRef { dtype: view.dtype(), shape: view.shape(), data: view.data() })
        };
        let floats = |name: &str| -> Vec<f32> {
            view(name).data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
        };
        let k = tensors[3].1.shape()[0];
        let n = tensors[0].1.shape()[1];
        let linear = labelled(&scheme, json!("gptq")).unpack(&scheme.into(), n, k, &get).unwrap().weights;
        let dense = linear.dequantize();
        let wanted = floats("dequant_weight_in_out");
        for row in 0..n {
            for column in 0..k {
                let (found, wanted) = (dense[row * k + column], wanted[column * n + row]);
                assert!((found - wanted).abs() <= 1e-6, "{}: {found} for {wanted}", path.display());
            }
        }
        let halves = view("input");
        let x: Vec<f32> =
            halves.data().chunks_exact(2).map(|b| half::f16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect();
        for (row, wanted) in floats("expected_output").iter().enumerate() {
            let y: f64 = (0..k).map(|column| f64::from(dense[row * k + column]) * f64::from(x[column])).sum();
            // Half a unit of fp16 between 8 and 16, where the largest outputs are, is 0.004.
            assert!((y - f64::from(*wanted)).abs() < 0.0045, "{}: {y} for {wanted}", path.display());
        }
        seen += 1;
    }
    assert_eq!(seen, 3, "{}", dir.display());
}
