//! Every weight comes back from every layout that takes it, and no damaged tensor gets through or
//! brings the reader down.

use lite_pack::{ErrorKind, Layout, PackError, PackedTensor, TensorRef, layout};
use lite_quant::{GroupSize, QuantizedLinear, ScaleDtype, Scheme, Weights};
use proptest::prelude::*;
use safetensors::Dtype;

/// The layouts of integers alone; `small_floats.rs` has the others.
fn integer_layouts() -> [&'static dyn Layout; 3] {
    ["awq", "compressed-tensors", "gptq"].map(|name| layout(name).unwrap())
}

fn scale_dtypes() -> impl Strategy<Value = ScaleDtype> {
    prop_oneof![Just(ScaleDtype::F16), Just(ScaleDtype::BF16), Just(ScaleDtype::F32)]
}

/// A weight with random codes. `seed` feeds a small generator, since shrinking thousands of codes one
/// by one finds nothing that shrinking the shape does not.
fn weight(scheme: Scheme, n: usize, k: usize, seed: u64) -> QuantizedLinear {
    let groups = scheme.groups(k).unwrap();
    let mut state = seed;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as u32
    };
    let codes = (0..n * k).map(|_| next() as u8 & scheme.max_code()).collect();
    let scales = (0..n * groups).map(|_| scheme.scale_dtype.round(1e-3 + next() as f32 * 1e-8)).collect();
    let zero = |next: u32| if scheme.symmetric { scheme.middle_code() } else { next as u8 & scheme.max_code() };
    let zeros = (0..n * groups).map(|_| zero(next())).collect();
    QuantizedLinear { scheme, out_features: n, in_features: k, codes, scales, zeros }
}

fn weights() -> impl Strategy<Value = QuantizedLinear> {
    let group = prop_oneof![Just(None), (1usize..5).prop_map(|power| Some(8 << power))];
    let shape = (1usize..40, 1usize..5, 1usize..150);
    (2u8..=8, group, any::<bool>(), scale_dtypes(), shape, any::<u64>()).prop_map(
        |(bits, group, symmetric, scale_dtype, (n, groups, width), seed)| {
            let group_size = group.map_or(GroupSize::Channel, GroupSize::Channels);
            let k = group.map_or(width, |group| group * groups);
            weight(Scheme { bits, group_size, symmetric, scale_dtype }, n, k, seed)
        },
    )
}

fn lookup<'a>(tensors: &'a [PackedTensor]) -> impl Fn(&str) -> Option<TensorRef<'a>> {
    move |suffix| {
        let tensor = tensors.iter().find(|tensor| tensor.suffix == suffix)?;
        Some(TensorRef { dtype: tensor.dtype, shape: &tensor.shape, data: &tensor.data })
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn unpacking_a_packed_weight_gives_it_back(weight in weights(), wide in 1usize..20) {
        for layout in integer_layouts() {
            // Every case should reach every layout that can hold its kind of scheme.
            let mut weight = weight.clone();
            if layout.name() == "awq" {
                let scheme = Scheme { bits: 4, ..weight.scheme };
                weight = self::weight(scheme, 8 * wide, weight.in_features, wide as u64);
            } else if layout.name() == "gptq" {
                let scheme = Scheme { bits: [2, 3, 4, 8][wide % 4], ..weight.scheme };
                // The next multiple of 32 is a whole number of groups of 16 and more.
                let k = match scheme.group_size {
                    GroupSize::Channels(width) => weight.in_features / width * width.max(32),
                    GroupSize::Channel => 32 * (1 + weight.in_features % 6),
                };
                weight = self::weight(scheme, 32 * (1 + wide % 4), k, wide as u64);
            }
            let QuantizedLinear { scheme, out_features: n, in_features: k, .. } = weight;
            let specs = layout.describe(&scheme.into(), n, k).unwrap();
            let packed = layout.pack(&weight.clone().into(), None, None).unwrap();
            prop_assert_eq!(specs.len(), packed.len());
            for (spec, tensor) in specs.iter().zip(&packed) {
                prop_assert_eq!((spec.suffix, spec.dtype, &spec.shape), (tensor.suffix, tensor.dtype, &tensor.shape));
                prop_assert!(layout.suffixes().contains(&spec.suffix));
                let bytes = spec.shape.iter().product::<usize>() * spec.dtype.bitsize() / 8;
                prop_assert_eq!(tensor.data.len(), bytes);
            }
            let blank = Scheme { scale_dtype: ScaleDtype::F32, ..scheme };
            let back = layout.unpack(&blank.into(), n, k, &lookup(&packed)).unwrap();
            prop_assert_eq!(back, Weights::Int(weight).into(), "{}", layout.name());
        }
    }

    /// One byte short, one dimension off, another type, or gone: an error that names the tensor.
    #[test]
    fn damaged_tensors_are_named(which in any::<prop::sample::Index>(), damage in 0..4, bits in 2u8..=8) {
        for layout in integer_layouts() {
            let bits = match layout.name() {
                "awq" => 4,
                "gptq" => [2, 3, 4, 8][usize::from(bits) % 4],
                _ => bits,
            };
            let scheme = scheme(bits, false);
            let mut packed = layout.pack(&weight(scheme, 32, 96, 7).into(), None, None).unwrap();
            let at = which.index(packed.len());
            let suffix = packed[at].suffix;
            match damage {
                0 => { packed[at].data.pop(); }
                1 => packed[at].shape[0] += 1,
                2 => packed[at].dtype = Dtype::U8,
                _ => { packed.remove(at); }
            }
            let error = layout.unpack(&scheme.into(), 32, 96, &lookup(&packed)).unwrap_err();
            prop_assert!(error.to_string().contains(&format!("`{suffix}`")), "{}", error);
            prop_assert_eq!(error.kind(), ErrorKind::Input);
        }
    }

    /// Any shape, scheme and tensors: an answer, never a panic.
    #[test]
    fn nothing_brings_the_reader_down(
        bits in any::<u8>(), group in any::<usize>(), symmetric in any::<bool>(),
        n in any::<usize>(), k in any::<usize>(), small in any::<bool>(),
        shape in prop::collection::vec(any::<usize>(), 0..4),
        data in prop::collection::vec(any::<u8>(), 0..200), dtype in 0usize..5,
    ) {
        let (n, k) = if small { (n % 40, k % 40) } else { (n, k) };
        let group_size = if group % 3 == 0 { GroupSize::Channel } else { GroupSize::Channels(group % 50) };
        let scheme = Scheme { bits: bits % 12, group_size, symmetric, scale_dtype: ScaleDtype::F16 };
        let dtype = [Dtype::I32, Dtype::F16, Dtype::I64, Dtype::F32, Dtype::F4][dtype];
        for layout in integer_layouts() {
            let get = |_: &str| Some(TensorRef { dtype, shape: &shape, data: &data });
            prop_assert!(layout.unpack(&scheme.into(), n, k, &get).is_err());
            prop_assert_eq!(layout.check(&scheme.into(), n, k).is_ok(), layout.describe(&scheme.into(), n, k).is_ok());
        }
    }
}

fn scheme(bits: u8, symmetric: bool) -> Scheme {
    Scheme { bits, group_size: GroupSize::Channels(16), symmetric, scale_dtype: ScaleDtype::F16 }
}

#[test]
fn layouts_refuse_what_they_cannot_hold() {
    let (awq, ct) = (layout("awq").unwrap(), layout("compressed-tensors").unwrap());
    assert!(matches!(awq.check(&scheme(8, false).into(), 16, 32), Err(PackError::Bits { found: 8, .. })));
    assert!(matches!(awq.check(&scheme(4, false).into(), 12, 32), Err(PackError::Shape { .. })));
    assert!(matches!(ct.check(&scheme(9, false).into(), 16, 32), Err(PackError::Bits { found: 9, .. })));
    assert!(ct.check(&scheme(4, true).into(), 13, 32).is_ok());
    let gptq = layout("gptq").unwrap();
    for bits in 2..=8 {
        let found = gptq.check(&scheme(bits, true).into(), 32, 64);
        assert_eq!(matches!(found, Err(PackError::Bits { .. })), matches!(bits, 5..=7), "{bits}");
    }
    assert!(matches!(gptq.check(&scheme(4, true).into(), 40, 64), Err(PackError::Shape { .. })));
    assert!(matches!(gptq.check(&scheme(4, true).into(), 32, 48), Err(PackError::Shape { .. })));
    for layout in integer_layouts() {
        assert!(
            matches!(layout.check(&scheme(4, false).into(), 16, 40), Err(PackError::Quant(_))),
            "K is not whole groups"
        );
        assert!(matches!(layout.check(&scheme(4, false).into(), 0, 32), Err(PackError::Shape { .. })));
        assert!(matches!(
            layout.check(&scheme(4, false).into(), usize::MAX / 8 * 8, 32),
            Err(PackError::TooLarge { .. })
        ));
    }
}

#[test]
fn a_weight_that_breaks_its_invariants_is_not_packed() {
    type Breaks = fn(&mut QuantizedLinear);
    let cases: [(&str, bool, Breaks); 6] = [
        ("codes", false, |weight| weight.codes[37] = 16),
        ("zeros", false, |weight| weight.zeros[2] = 16),
        ("zeros", true, |weight| weight.zeros[2] = 7),
        ("scales", false, |weight| weight.scales[3] = f32::NAN),
        ("scales", false, |weight| weight.scales[3] = 0.1),
        ("codes", false, |weight| weight.codes.truncate(7)),
    ];
    for layout in integer_layouts() {
        for (what, symmetric, breaks) in cases {
            let mut weight = weight(scheme(4, symmetric), 32, 32, 5);
            breaks(&mut weight);
            let error = layout.pack(&weight.clone().into(), None, None).unwrap_err();
            assert!(error.to_string().contains(what), "{error}");
            assert_eq!(error.kind(), ErrorKind::Input, "{error}");
        }
    }
}

#[test]
fn values_in_a_file_are_checked() {
    // A NaN scale, at row 1 of the file.
    for (layout, suffix) in [("awq", "scales"), ("gptq", "scales"), ("compressed-tensors", "weight_scale")] {
        let layout = layout_of(layout);
        let mut packed = layout.pack(&weight(scheme(4, false), 32, 32, 1).into(), None, None).unwrap();
        let scales = packed.iter_mut().find(|tensor| tensor.suffix == suffix).unwrap();
        let row = scales.data.len() / scales.shape[0];
        scales.data[row..row + 2].copy_from_slice(&[0xff, 0x7e]);
        let error = layout.unpack(&scheme(4, false).into(), 32, 32, &lookup(&packed)).unwrap_err();
        assert!(matches!(error, PackError::Value { what, row: 1, column: 0, .. } if what == suffix), "{error}");
    }
    // Asymmetric zero points where the config says symmetric.
    let awq = layout_of("awq").pack(&weight(scheme(4, false), 8, 32, 1).into(), None, None).unwrap();
    let error = layout_of("awq").unpack(&scheme(4, true).into(), 8, 32, &lookup(&awq)).unwrap_err();
    assert!(error.to_string().contains("`qzeros`"), "{error}");
    let ct = layout_of("compressed-tensors");
    let mut packed = ct.pack(&weight(scheme(4, false), 8, 32, 1).into(), None, None).unwrap();
    let error = ct.unpack(&scheme(4, true).into(), 8, 32, &lookup(&packed)).unwrap_err();
    assert!(matches!(error, PackError::Unexpected { suffix: "weight_zero_point", .. }), "{error}");
    // A shape that says otherwise, and the 32-bit one of old releases.
    let shape = packed.len() - 1;
    packed[shape].data[0] = 9;
    let error = ct.unpack(&scheme(4, false).into(), 8, 32, &lookup(&packed)).unwrap_err();
    assert!(error.to_string().contains("`weight_shape` is 9"), "{error}");
    packed[shape].data = [8i32, 32].iter().flat_map(|dim| dim.to_le_bytes()).collect();
    packed[shape].dtype = Dtype::I32;
    assert!(ct.unpack(&scheme(4, false).into(), 8, 32, &lookup(&packed)).is_ok());
    packed.push(PackedTensor { suffix: "weight_g_idx", dtype: Dtype::I32, shape: vec![32], data: vec![0; 128] });
    let error = ct.unpack(&scheme(4, false).into(), 8, 32, &lookup(&packed)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
}

fn layout_of(name: &str) -> &'static dyn lite_pack::Layout {
    layout(name).unwrap()
}
