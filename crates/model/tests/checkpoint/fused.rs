//! Experts stored in one tensor per layer are seen one by one, in every layout that is published.

use std::fs;

use lite_model::{Checkpoint, Dtype, ErrorKind, ModelError};
use tempfile::TempDir;

use crate::support::{CONFIG, container, folder, index, refused, resident};

const GPT_OSS: &str = "{\"model_type\": \"gpt_oss\"}";
/// Experts, inputs and outputs, width.
const SIZES: (usize, usize, usize) = (3, 5, 4);

/// Name, dtype, shape, data.
type Stored = (String, &'static str, Vec<usize>, Vec<u8>);

fn file(tensors: &[Stored]) -> Vec<u8> {
    let (mut entries, mut data) = (Vec::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let begin = data.len();
        data.extend_from_slice(bytes);
        let end = data.len();
        entries.push(format!("{name:?}:{{\"dtype\":{dtype:?},\"shape\":{shape:?},\"data_offsets\":[{begin},{end}]}}"));
    }
    container(&format!("{{{}}}", entries.join(",")), &data)
}

fn model(config: &str, tensors: &[Stored]) -> TempDir {
    folder(&[("config.json", config.as_bytes()), ("model.safetensors", &file(tensors))])
}

/// A number that names its place: expert, part (gate 0, up 1, down 2), output and input.
fn value(e: usize, part: usize, o: usize, i: usize) -> f32 {
    (e * 1000 + part * 100 + o * 10 + i) as f32
}

fn f32s(values: impl Iterator<Item = f32>) -> Vec<u8> {
    values.flat_map(f32::to_le_bytes).collect()
}

/// All indices below these, the last one fastest.
fn indices<const N: usize>(sizes: [usize; N]) -> impl Iterator<Item = [usize; N]> {
    (0..sizes.iter().product()).map(move |mut at: usize| {
        let mut found = [0; N];
        for (found, size) in found.iter_mut().zip(sizes).rev() {
            (*found, at) = (at % size, at / size);
        }
        found
    })
}

/// Which layout is written.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Layout {
    Rows,
    Columns,
    Turns,
}

const LAYOUTS: [Layout; 3] = [Layout::Rows, Layout::Columns, Layout::Turns];

impl Layout {
    fn config(self) -> &'static str {
        if self == Self::Turns { GPT_OSS } else { CONFIG }
    }

    /// Part and output of one of the `2I` places of gate and up.
    fn place(self, at: usize) -> (usize, usize) {
        let i = SIZES.2;
        if self == Self::Turns { (at % 2, at / 2) } else { (at / i, at % i) }
    }

    /// Weights and biases of the experts of layer `x`.
    fn tensors(self) -> Vec<Stored> {
        let (e, h, i) = SIZES;
        let rows = self == Self::Rows;
        let gate_up = |[e, a, b]: [usize; 3]| {
            let (at, input) = if rows { (a, b) } else { (b, a) };
            let (part, o) = self.place(at);
            value(e, part, o, input)
        };
        let down = |[e, a, b]: [usize; 3]| if rows { value(e, 2, a, b) } else { value(e, 2, b, a) };
        let bias = |[e, at]: [usize; 2]| {
            let (part, o) = self.place(at);
            -value(e, part, o, 0)
        };
        let shapes = if rows { ([e, 2 * i, h], [e, h, i]) } else { ([e, h, 2 * i], [e, i, h]) };
        let name = |leaf: &str| format!("x.experts.{leaf}");
        vec![
            (name("gate_up_proj"), "F32", shapes.0.to_vec(), f32s(indices(shapes.0).map(gate_up))),
            (name("down_proj"), "F32", shapes.1.to_vec(), f32s(indices(shapes.1).map(down))),
            (name("gate_up_proj_bias"), "F32", vec![e, 2 * i], f32s(indices([e, 2 * i]).map(bias))),
            (name("down_proj_bias"), "F32", vec![e, h], f32s(indices([e, h]).map(|[e, o]| -value(e, 2, o, 0)))),
        ]
    }
}

#[test]
fn every_layout_gives_the_same_experts() {
    let (experts, h, i) = SIZES;
    for layout in LAYOUTS {
        let mut stored = vec![("a".to_owned(), "F32", vec![1], f32s([7.0].into_iter()))];
        stored.extend(layout.tensors());
        stored.push(("z".to_owned(), "U8", vec![3], vec![1, 2, 3]));
        let dir = model(layout.config(), &stored);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.fused_tensors(), 4);
        assert_eq!(checkpoint.total_bytes() as usize, stored.iter().map(|tensor| tensor.3.len()).sum::<usize>());
        // Expert by expert, where the first of them was.
        let names: Vec<&str> = checkpoint.names().collect();
        assert_eq!(names.len(), 2 + experts * 6);
        assert_eq!((names[0], names[1 + experts * 6]), ("a", "z"));
        assert_eq!(
            names[7..13],
            [
                "down_proj.bias",
                "down_proj.weight",
                "gate_proj.bias",
                "gate_proj.weight",
                "up_proj.bias",
                "up_proj.weight"
            ]
            .map(|part| format!("x.experts.1.{part}"))
        );
        assert!(checkpoint.info("x.experts.gate_up_proj").is_none());
        for e in 0..experts {
            for (part, (name, n, k)) in [("gate", i, h), ("up", i, h), ("down", h, i)].into_iter().enumerate() {
                let name = format!("x.experts.{e}.{name}_proj");
                let wanted: Vec<f32> = indices([n, k]).map(|[o, i]| value(e, part, o, i)).collect();
                let (weight, bias) = (format!("{name}.weight"), format!("{name}.bias"));
                let info = checkpoint.info(&weight).unwrap();
                assert_eq!((info.dtype, &info.shape[..], info.bytes), (Dtype::F32, &[n, k][..], 4 * (n * k) as u64));
                let view = checkpoint.tensor(&weight).unwrap();
                assert_eq!(
                    (view.shape, &view.data[..]),
                    (&[n, k][..], &f32s(wanted.iter().copied())[..]),
                    "{layout:?}"
                );
                assert_eq!(checkpoint.tensor_f32(&weight).unwrap(), wanted, "{layout:?} {weight}");
                for first in 0..n * k {
                    for length in 0..=n * k - first {
                        let mut some = vec![0.0; length];
                        checkpoint.tensor_f32_part(&weight, first, &mut some).unwrap();
                        assert_eq!(some, wanted[first..first + length]);
                    }
                }
                let error = checkpoint.tensor_f32_part(&weight, 1, &mut vec![0.0; n * k]).unwrap_err();
                assert!(matches!(error, ModelError::Length { .. }), "{error}");
                let wanted: Vec<f32> = (0..n).map(|o| -value(e, part, o, 0)).collect();
                assert_eq!(checkpoint.info(&bias).unwrap().shape, [n]);
                assert_eq!(checkpoint.tensor_f32(&bias).unwrap(), wanted, "{layout:?} {bias}");
                // Of any part: it is read again.
                checkpoint.read_ahead(&weight, 0..8);
                checkpoint.release_part(&weight, 0..4 * n * k);
                checkpoint.release([weight.as_str(), &bias]);
                assert_eq!(checkpoint.tensor_f32(&bias).unwrap(), wanted);
            }
        }
    }
}

#[test]
fn what_lies_in_one_piece_is_not_copied() {
    use std::borrow::Cow::{Borrowed, Owned};
    for layout in LAYOUTS {
        let dir = model(layout.config(), &layout.tensors());
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let view = |name: &str| checkpoint.tensor(&format!("x.experts.2.{name}")).unwrap().data;
        let whole = layout == Layout::Rows;
        for name in ["gate_proj.weight", "up_proj.weight", "down_proj.weight"] {
            assert!(matches!((view(name), whole), (Borrowed(_), true) | (Owned(_), false)), "{layout:?} {name}");
        }
        assert!(matches!(view("down_proj.bias"), Borrowed(_)));
    }
}

#[test]
fn parts_in_different_shards() {
    let (all, order) = (Layout::Columns.tensors(), [1, 0]);
    let names = ["m1.safetensors", "m2.safetensors"];
    let places: Vec<(&str, &str)> = order.iter().zip(names).map(|(i, shard)| (all[*i].0.as_str(), shard)).collect();
    let total = (all[0].3.len() + all[1].3.len()) as u64;
    let dir = folder(&[
        ("config.json", CONFIG.as_bytes()),
        (names[0], &file(&all[1..2])),
        (names[1], &file(&all[..1])),
        ("model.safetensors.index.json", &index(&places, total)),
    ]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert!(checkpoint.warnings.is_empty(), "{:?}", checkpoint.warnings);
    let found: Vec<(&str, usize)> =
        checkpoint.names().map(|name| (name, checkpoint.info(name).unwrap().shard)).collect();
    assert_eq!(found[..2], [("x.experts.0.down_proj.weight", 0), ("x.experts.1.down_proj.weight", 0)]);
    assert_eq!(found[3..5], [("x.experts.0.gate_proj.weight", 1), ("x.experts.0.up_proj.weight", 1)]);
    assert_eq!(checkpoint.tensor_f32("x.experts.2.up_proj.weight").unwrap()[..3], [2100.0, 2101.0, 2102.0]);
}

#[test]
fn the_fingerprint_is_that_of_the_headers() {
    let digest = |tensors: &[Stored]| {
        let dir = model(CONFIG, tensors);
        Checkpoint::open(dir.path()).unwrap().header_digest().to_owned()
    };
    let rows = Layout::Rows.tensors();
    assert_ne!(digest(&rows[..2]), digest(&Layout::Columns.tensors()[..2]));
    assert_eq!(digest(&rows[..2]), digest(&rows[..2]));
}

/// MXFP4: two experts of 32 inputs and a width of 32, every byte naming its place.
fn coded() -> Vec<Stored> {
    let bytes = |shape: &[usize], start: usize| -> Vec<u8> {
        (0..shape.iter().product()).map(|i: usize| ((i + start) % 251) as u8).collect()
    };
    let tensor =
        |leaf: &str, shape: &[usize], start| (format!("x.experts.{leaf}"), "U8", shape.to_vec(), bytes(shape, start));
    vec![
        tensor("gate_up_proj_blocks", &[2, 64, 1, 16], 0),
        tensor("gate_up_proj_scales", &[2, 64, 1], 5),
        tensor("down_proj_blocks", &[2, 32, 1, 16], 9),
        tensor("down_proj_scales", &[2, 32, 1], 3),
    ]
}

#[test]
fn codes_of_gpt_oss_are_matrices_with_scales() {
    let dir = model(GPT_OSS, &coded());
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!((checkpoint.names().len(), checkpoint.fused_tensors()), (12, 4));
    let shapes = |name: &str| {
        let info = checkpoint.info(&format!("x.experts.1.{name}")).unwrap();
        (info.dtype, info.shape.clone(), info.bytes)
    };
    assert_eq!(shapes("gate_proj.weight"), (Dtype::F4, vec![32, 32], 512));
    assert_eq!(shapes("down_proj.weight_scale"), (Dtype::F8_E8M0, vec![32, 1], 32));
    let data = |name: &str| checkpoint.tensor(&format!("x.experts.{name}")).unwrap().data.into_owned();
    // Rows of gate and up in turn: the rows of `up` of expert 1 are 65, 67, …
    let rows: Vec<u8> = (0..32)
        .flat_map(|r| (0..16).map(move |b| ((64 + 2 * r + 1) * 16 + b) as u32))
        .map(|v| (v % 251) as u8)
        .collect();
    assert_eq!(data("1.up_proj.weight"), rows);
    let scales: Vec<u8> = (0..32).map(|r| ((64 + 2 * r + 5) % 251) as u8).collect();
    assert_eq!(data("1.gate_proj.weight_scale"), scales);
    let down: Vec<u8> = (0..512).map(|i| ((i + 9) % 251) as u8).collect();
    assert_eq!(data("0.down_proj.weight"), down);
    // Of any other model they are what they are.
    let dir = model(CONFIG, &coded());
    assert_eq!(Checkpoint::open(dir.path()).unwrap().names().len(), 4);
}

#[test]
fn other_forms_are_refused_by_name_and_shape() {
    let tensor = |leaf: &str, dtype: &'static str, shape: &[usize], size: usize| {
        (format!("x.experts.{leaf}"), dtype, shape.to_vec(), vec![0; shape.iter().product::<usize>() * size])
    };
    let up = |shape: &[usize]| tensor("gate_up_proj", "BF16", shape, 2);
    let down = |shape: &[usize]| tensor("down_proj", "BF16", shape, 2);
    let with = |i: usize, stored: Stored| {
        let mut all = coded();
        all[i] = stored;
        all
    };
    let good = || vec![up(&[2, 8, 3]), down(&[2, 3, 4])];
    let and = |more: Stored| good().into_iter().chain([more]).collect::<Vec<_>>();
    let cases: Vec<(&str, Vec<Stored>, &[&str])> = vec![
        (
            CONFIG,
            vec![up(&[2, 8, 3])],
            &["`x.experts.gate_up_proj`", "`x.experts.down_proj` is missing", "wanted both"],
        ),
        (CONFIG, vec![down(&[2, 3, 4])], &["`x.experts.down_proj`", "`x.experts.gate_up_proj` is missing"]),
        (CONFIG, vec![up(&[16, 3]), down(&[2, 3, 4])], &["`x.experts.gate_up_proj`", "[16, 3]", "three dimensions"]),
        (
            CONFIG,
            vec![up(&[2, 8, 3]), down(&[2, 3, 4, 1])],
            &["`x.experts.down_proj`", "[2, 3, 4, 1]", "three dimensions"],
        ),
        (CONFIG, vec![up(&[2, 8, 0]), down(&[2, 0, 4])], &["[2, 8, 0]", "none of them 0"]),
        (
            CONFIG,
            vec![up(&[2, 8, 3]), down(&[3, 3, 4])],
            &["`x.experts.down_proj`", "[3, 3, 4]", "2 experts", "[2, 8, 3]"],
        ),
        (CONFIG, vec![up(&[2, 7, 3]), down(&[2, 3, 4])], &["[2, 7, 3]", "[2, 3, 4]", "[E, 2I, H] and [E, H, I]"]),
        (CONFIG, vec![up(&[2, 8, 5]), down(&[2, 3, 4])], &["[2, 8, 5]", "[E, H, 2I] and [E, I, H]"]),
        (GPT_OSS, good(), &["[2, 8, 3]", "wanted [E, H, 2I] and [E, I, H]"]),
        (
            CONFIG,
            vec![tensor("gate_up_proj", "I8", &[2, 8, 3], 1), down(&[2, 3, 4])],
            &["`x.experts.gate_up_proj`", "dtype I8", "BF16"],
        ),
        (
            CONFIG,
            and(tensor("down_proj_bias", "BF16", &[2, 4], 2)),
            &["`x.experts.down_proj_bias`", "[2, 4]", "wanted [2, 3]"],
        ),
        (CONFIG, and(tensor("gate_up_proj_bias", "I8", &[2, 8], 1)), &["`x.experts.gate_up_proj_bias`", "dtype I8"]),
        (CONFIG, vec![tensor("gate_up_proj_bias", "BF16", &[2, 8], 2)], &["`x.experts.gate_up_proj` is missing"]),
        (CONFIG, and(tensor("1.up_proj.weight", "BF16", &[1], 2)), &["`x.experts.1.up_proj.weight` is there as well"]),
        (CONFIG, vec![up(&[300_000, 2, 1]), down(&[300_000, 1, 1])], &["[300000, 2, 1]", "at most 262144 experts"]),
        (GPT_OSS, coded()[..3].to_vec(), &["`x.experts.down_proj_scales` is missing"]),
        (
            GPT_OSS,
            with(0, tensor("gate_up_proj_blocks", "U8", &[2, 64, 16], 1)),
            &["[2, 64, 16]", "[E, outputs, inputs / 32, 16]"],
        ),
        (
            GPT_OSS,
            with(1, tensor("gate_up_proj_scales", "U8", &[2, 64, 2], 1)),
            &["`x.experts.gate_up_proj_scales`", "wanted [2, 64, 1]"],
        ),
        (GPT_OSS, with(1, tensor("gate_up_proj_scales", "I8", &[2, 64, 1], 1)), &["dtype I8", "wanted U8"]),
        (
            GPT_OSS,
            [
                with(2, tensor("down_proj_blocks", "U8", &[2, 33, 1, 16], 1))[..3].to_vec(),
                vec![tensor("down_proj_scales", "U8", &[2, 33, 1], 1)],
            ]
            .concat(),
            &["`x.experts.down_proj_blocks`", "[2, 33, 1, 16]", "2 experts of [32, 32]"],
        ),
        (GPT_OSS, [coded(), vec![up(&[2, 3, 8])]].concat(), &["`x.experts.gate_up_proj_blocks` is there as well"]),
    ];
    for (config, tensors, words) in cases {
        let error = refused(model(config, &tensors).path(), ErrorKind::Input, words);
        assert!(matches!(error, ModelError::FusedExperts { .. }), "{error}");
    }
    // Names as long as a header allows, once more for every expert.
    let long = |leaf: &str, shape: &[usize]| {
        (
            format!("{}.experts.{leaf}", "x".repeat(4000)),
            "BF16",
            shape.to_vec(),
            vec![0; 2 * shape.iter().product::<usize>()],
        )
    };
    let many = model(CONFIG, &[long("gate_up_proj", &[20_000, 2, 1]), long("down_proj", &[20_000, 1, 1])]);
    refused(many.path(), ErrorKind::Input, &["names of a usual length"]);
    // Inside a wrapper gpt-oss is gpt-oss: gate and up alternate.
    let wrapped = "{\"model_type\": \"internvl\", \"text_config\": {\"model_type\": \"gpt_oss\"}}";
    let dir = model(wrapped, &Layout::Turns.tensors());
    let gate = Checkpoint::open(dir.path()).unwrap().tensor_f32("x.experts.1.gate_proj.weight").unwrap();
    assert_eq!(gate[..2], [value(1, 0, 0, 0), value(1, 0, 0, 1)]);
    // Codes of another quantizer are not taken apart.
    let codes = [tensor("gate_up_proj", "I8", &[2, 8, 3], 1), tensor("down_proj", "I8", &[2, 3, 4], 1)];
    assert_eq!(Checkpoint::open(model(CONFIG, &codes).path()).unwrap().fused_tensors(), 0);
    // Good ones, and names that only look like them.
    assert_eq!(Checkpoint::open(model(CONFIG, &good()).path()).unwrap().names().len(), 6);
    let other = |name: &str| (name.to_owned(), "BF16", vec![2, 8, 3], vec![0; 96]);
    let names = ["x.myexperts.gate_up_proj", "x.mlp.gate_up_proj", "experts.gate_up_proj.weight", "gate_up_proj"];
    let all: Vec<Stored> = names.iter().map(|name| other(name)).collect();
    let dir = model(CONFIG, &all);
    assert_eq!(Checkpoint::open(dir.path()).unwrap().names().collect::<Vec<_>>(), names);
}

/// Sizes that no file has, and a file that is cut.
#[test]
fn hostile_headers_do_not_overflow() {
    for (up, down) in [("[0,18446744073709551615,2]", "[0,1,1]"), ("[4294967296,4294967296,0]", "[1,1,0]")] {
        let entry = |shape: &str| format!("{{\"dtype\":\"BF16\",\"shape\":{shape},\"data_offsets\":[0,0]}}");
        let json = format!("{{\"experts.gate_up_proj\":{},\"experts.down_proj\":{}}}", entry(up), entry(down));
        let dir = folder(&[("config.json", CONFIG.as_bytes()), ("model.safetensors", &container(&json, &[]))]);
        let error = Checkpoint::open(dir.path()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Input, "{error}");
    }
    let dir = model(CONFIG, &Layout::Columns.tensors());
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    fs::File::options().write(true).open(dir.path().join("model.safetensors")).unwrap().set_len(300).unwrap();
    for name in checkpoint.names().filter(|name| name.ends_with(".weight")) {
        assert!(matches!(checkpoint.tensor(name), Err(ModelError::Changed { .. })));
        assert!(matches!(checkpoint.tensor_f32(name), Err(ModelError::Changed { .. })));
    }
}

#[test]
fn a_released_expert_is_no_longer_resident() {
    let (e, h, i) = (8, 512, 512);
    let zeros = |shape: [usize; 3]| vec![0; shape.iter().product::<usize>() * 2];
    let (up, down) = ([e, h, 2 * i], [e, i, h]);
    let dir = model(
        CONFIG,
        &[
            ("m.experts.gate_up_proj".to_owned(), "BF16", up.to_vec(), zeros(up)),
            ("m.experts.down_proj".to_owned(), "BF16", down.to_vec(), zeros(down)),
        ],
    );
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let path = dir.path().canonicalize().unwrap().join("model.safetensors");
    for expert in 0..e {
        let names = ["gate_proj", "up_proj", "down_proj"].map(|part| format!("m.experts.{expert}.{part}.weight"));
        for name in &names {
            checkpoint.tensor_f32(name).unwrap();
        }
        checkpoint.release(names.iter().map(String::as_str));
    }
    match resident(&path) {
        // 12 MiB were read; neighbours that were faulted in around them may stay.
        Some(after) => assert!(after < 3 << 20, "{after} bytes are resident"),
        None => println!("skipped the count: /proc/self/smaps is not there"),
    }
}
