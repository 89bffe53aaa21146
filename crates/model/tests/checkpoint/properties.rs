//! Round trips over random checkpoints, and random damage.

use std::fs;

use lite_model::{Checkpoint, CheckpointWriter, Dtype, OutputTensor, edit_config};
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::{Map, Value};

use crate::support::{CONFIG, bytes_file, folder, index};

const DTYPES: [Dtype; 9] =
    [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::U8, Dtype::I8, Dtype::I32, Dtype::I64, Dtype::F8_E4M3, Dtype::BOOL];

#[derive(Debug, Clone)]
struct Random {
    tensor: OutputTensor,
    data: Vec<u8>,
}

fn random_tensors() -> impl Strategy<Value = Vec<Random>> {
    let shape = prop::collection::vec(0_usize..5, 0..4);
    let one = (any::<String>(), 0..DTYPES.len(), shape, any::<u8>());
    prop::collection::vec(one, 0..12).prop_map(|all| {
        let make = |(i, (name, dtype, shape, seed)): (usize, (String, usize, Vec<usize>, u8))| {
            let dtype = DTYPES[dtype];
            let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            let data = (0..bytes).map(|b| (b as u8).wrapping_mul(31).wrapping_add(seed)).collect();
            // The position keeps names apart.
            Random { tensor: OutputTensor { name: format!("{name}{i}"), dtype, shape }, data }
        };
        all.into_iter().enumerate().map(make).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn what_is_written_is_read(tensors in random_tensors(), max in 1_u64..300) {
        let dir = tempfile::tempdir().unwrap();
        let list = tensors.iter().map(|t| t.tensor.clone()).collect();
        let writer = CheckpointWriter::create(dir.path(), list, max).unwrap();
        for random in tensors.iter().rev() {
            writer.write(&random.tensor.name, &random.data).unwrap();
        }
        let written = writer.finish().unwrap();
        fs::write(dir.path().join("config.json"), CONFIG).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        prop_assert!(checkpoint.warnings.is_empty());
        prop_assert_eq!(checkpoint.names().len(), tensors.len());
        prop_assert_eq!(checkpoint.total_bytes(), written.total_bytes);
        for random in &tensors {
            let view = checkpoint.tensor(&random.tensor.name).unwrap();
            prop_assert_eq!(view.dtype, random.tensor.dtype);
            prop_assert_eq!(view.shape, &random.tensor.shape[..]);
            prop_assert_eq!(view.data, &random.data[..]);
        }
        // And by a reader that shares no code with the writer.
        let mut seen = 0;
        for path in checkpoint.shards() {
            let bytes = fs::read(path).unwrap();
            let (header, _) = SafeTensors::read_metadata(&bytes).unwrap();
            let file = SafeTensors::deserialize(&bytes).unwrap();
            let mut held = 0;
            for (name, view) in file.tensors() {
                let random = tensors.iter().find(|t| t.tensor.name == name).unwrap();
                prop_assert_eq!(view.data(), &random.data[..]);
                prop_assert_eq!(view.shape(), &random.tensor.shape[..]);
                prop_assert_eq!(view.dtype(), random.tensor.dtype);
                let offset = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
                prop_assert_eq!(offset % (view.dtype().bitsize() / 8), 0);
                held += view.data().len() as u64;
                seen += 1;
            }
            prop_assert_eq!((header + 8) % 8, 0);
            prop_assert!(held <= max || file.tensors().iter().filter(|(_, v)| !v.data().is_empty()).count() == 1);
        }
        prop_assert_eq!(seen, tensors.len());
    }
}

/// Damage to a file.
#[derive(Debug, Clone)]
enum Damage {
    Flip(usize, u8),
    Set(usize, u8),
    Cut(usize),
    Insert(usize, Vec<u8>),
    Swap(usize, usize),
}

impl Damage {
    fn apply(&self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        let len = bytes.len();
        match self {
            Self::Flip(at, bit) => bytes[at % len] ^= 1 << (bit % 8),
            Self::Set(at, byte) => bytes[at % len] = *byte,
            Self::Cut(at) => bytes.truncate(at % len),
            Self::Insert(at, new) => drop(bytes.splice(at % len..at % len, new.iter().copied())),
            Self::Swap(a, b) => bytes.swap(a % len, b % len),
        }
    }
}

fn damage() -> impl Strategy<Value = Vec<Damage>> {
    // Most of the parsing happens in the first bytes.
    let at = prop_oneof![0_usize..12, 0_usize..400, any::<usize>()];
    let ascii = prop_oneof![any::<u8>(), prop::sample::select(b"{}[]\",:0123456789.-eE\\ ".to_vec())];
    let one = prop_oneof![
        (at.clone(), any::<u8>()).prop_map(|(a, b)| Damage::Flip(a, b)),
        (at.clone(), ascii.clone()).prop_map(|(a, b)| Damage::Set(a, b)),
        at.clone().prop_map(Damage::Cut),
        (at.clone(), prop::collection::vec(ascii, 0..6)).prop_map(|(a, b)| Damage::Insert(a, b)),
        (at.clone(), at).prop_map(|(a, b)| Damage::Swap(a, b)),
    ];
    prop::collection::vec(one, 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn damage_is_an_error_or_harmless(which in 0_usize..4, damage in damage()) {
        let names = ["config.json", "m1.safetensors", "m2.safetensors", "model.safetensors.index.json"];
        let config = b"{\"model_type\": \"llama\", \"rms_norm_eps\": 1e-06, \"x\": [1, {\"y\": null}]}";
        let mut files = [
            config.to_vec(),
            bytes_file(&[("model.embed", 5), ("model.norm", 3)]),
            bytes_file(&[("head", 2)]),
            index(&[("model.embed", "m1.safetensors"), ("model.norm", "m1.safetensors"), ("head", "m2.safetensors")], 10),
        ];
        for damage in &damage {
            damage.apply(&mut files[which]);
        }
        let list: Vec<_> = names.iter().zip(&files).map(|(name, bytes)| (*name, bytes.as_slice())).collect();
        let dir = folder(&list);
        match Checkpoint::open(dir.path()) {
            Ok(checkpoint) => {
                for name in checkpoint.names() {
                    let view = checkpoint.tensor(name).unwrap();
                    let bits = view.shape.iter().product::<usize>() * view.dtype.bitsize();
                    prop_assert_eq!(8 * view.data.len(), bits);
                    let _ = checkpoint.tensor_f32(name);
                }
                prop_assert!(checkpoint.warnings.iter().all(|w| !w.chars().any(char::is_control)));
            }
            Err(error) => {
                let message = error.to_string();
                prop_assert!(!message.chars().any(char::is_control), "{message:?}");
            }
        }
    }

    #[test]
    fn edited_configs_differ_in_the_edited_keys_alone(
        old in prop::collection::vec((any::<String>(), leaf()), 0..8),
        set in prop::collection::vec((any::<String>(), leaf()), 0..4),
        replaced in any::<prop::sample::Index>(),
    ) {
        let old: Map<String, Value> = old.into_iter().collect();
        let mut set: Vec<_> = set.iter().map(|(k, v)| (k.as_str(), v.clone())).collect();
        if !old.is_empty() {
            set.push((old.keys().nth(replaced.index(old.len())).unwrap(), Value::from("new")));
        }
        let text = serde_json::to_string(&old).unwrap();
        let edited: Map<String, Value> = serde_json::from_str(&edit_config(&text, &set).unwrap()).unwrap();
        let mut wanted = old.clone();
        for (key, value) in set {
            wanted.insert(key.to_owned(), value);
        }
        prop_assert_eq!(edited.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>());
        prop_assert_eq!(edited, wanted);
    }
}

fn leaf() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<String>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<bool>().prop_map(Value::from),
        Just(Value::Null),
        prop::collection::vec(any::<String>(), 0..3).prop_map(Value::from),
    ]
}
