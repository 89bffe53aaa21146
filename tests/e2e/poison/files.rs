//! Damage to files, headers, configs and the set of tensors; whatever the layout.

use std::path::Path;

use safetensors::Dtype;
use serde_json::{Value, json};

use super::{Checkpoint, Poison, Q, UP};
use crate::e2e::support::Raw;

const EMBED: &str = "model.embed_tokens.weight";
const NORM: &str = "model.layers.0.input_layernorm.weight";

pub(crate) const POISONS: &[Poison] = &[
    Poison { name: "shard truncated", base: "awq", codes: &["shard-truncated"], apply: |c| c.after = Some(truncate) },
    Poison {
        name: "header longer than the file",
        base: "awq",
        codes: &["shard-header"],
        apply: |c| c.after = Some(claim),
    },
    Poison { name: "header is not JSON", base: "int8", codes: &["shard-header"], apply: |c| c.after = Some(garble) },
    Poison {
        name: "tensor in two shards",
        base: "awq",
        codes: &["index-mismatch"],
        apply: |c| {
            two_shards(c);
            c.shards[1].1.push(NORM.to_owned());
        },
    },
    Poison {
        name: "index names the wrong shard",
        base: "ct-asym",
        codes: &["index-mismatch"],
        apply: |c| {
            two_shards(c);
            let map = |c: &Checkpoint| -> Value {
                let pairs =
                    c.shards.iter().flat_map(|(shard, names)| names.iter().map(move |n| (n.clone(), json!(shard))));
                Value::Object(pairs.collect())
            };
            let mut map = map(c);
            map[NORM] = json!(c.shards[1].0);
            c.index = Some(json!({"weight_map": map}));
        },
    },
    Poison {
        name: "index names a shard that is not there",
        base: "awq",
        codes: &["index-mismatch"],
        apply: |c| {
            two_shards(c);
            c.after = Some(|dir| std::fs::remove_file(dir.join("model-00002-of-00002.safetensors")).unwrap());
        },
    },
    Poison { name: "no config.json", base: "awq", codes: &["config-unreadable"], apply: |c| c.after = Some(no_config) },
    Poison {
        name: "one norm missing",
        base: "awq",
        codes: &["tensor-missing"],
        apply: |c| assert!(c.tensors.remove(NORM).is_some()),
    },
    Poison { name: "one linear missing", base: "ct-asym", codes: &["tensor-missing"], apply: |c| drop(c.take(UP)) },
    Poison {
        name: "extra tensor",
        base: "awq",
        codes: &["tensor-extra"],
        apply: |c| {
            let raw = c.tensors[NORM].clone();
            c.tensors.insert("model.layers.1.mlp.gate.extra".to_owned(), raw);
        },
    },
    Poison {
        name: "undeclared layer for speculative decoding",
        base: "ct-asym",
        codes: &["mtp-undeclared"],
        apply: |c| {
            let raw = c.original[&format!("{Q}.weight")].clone();
            c.tensors.insert("mtp.layers.0.self_attn.q_proj.weight".to_owned(), raw);
        },
    },
    Poison { name: "stale full-precision twin", base: "awq", codes: &["stale-twin"], apply: twin },
    Poison { name: "stale full-precision twin", base: "ct-asym", codes: &["stale-twin"], apply: twin },
    Poison {
        name: "packed linear in the ignore list",
        base: "awq",
        codes: &["ignored-but-packed"],
        apply: |c| c.declared()["modules_to_not_convert"] = json!(["lm_head", Q]),
    },
    Poison {
        name: "packed linear in the ignore list",
        base: "fp8",
        codes: &["ignored-but-packed"],
        apply: |c| c.declared()["ignore"] = json!(["lm_head", format!("re:.*layers.1.*q_proj$")]),
    },
    Poison { name: "plain linear not in the ignore list", base: "awq", codes: &["declared-but-plain"], apply: plain },
    Poison { name: "plain linear not in the ignore list", base: "int8", codes: &["declared-but-plain"], apply: plain },
    Poison {
        name: "head declared quantized but plain",
        base: "awq",
        codes: &["head-declared-plain"],
        apply: |c| c.declared()["lm_head"] = json!(true),
    },
    Poison {
        name: "head not in the ignore list",
        base: "ct-asym",
        codes: &["head-declared-plain"],
        apply: |c| c.declared()["ignore"] = json!([]),
    },
    Poison {
        name: "no quantization_config",
        base: "awq",
        codes: &["quantization-undeclared"],
        apply: |c| assert!(c.config.as_object_mut().unwrap().remove("quantization_config").is_some()),
    },
    Poison {
        name: "quant_method of another layout",
        base: "awq",
        codes: &["layout-mismatch", "quantization-config", "tensor-missing"],
        apply: |c| c.declared()["quant_method"] = json!("gptq"),
    },
    Poison {
        name: "quant_method nobody knows",
        base: "fp8-block",
        codes: &["quantization-config"],
        apply: |c| c.declared()["quant_method"] = json!("fp9"),
    },
    Poison {
        name: "tokenizer of another model",
        base: "awq",
        codes: &["tokenizer-differs"],
        apply: |c| edit_tokenizer(c, |vocab| vocab.rotate_left(300)),
    },
    Poison {
        name: "token ids beyond the embedding",
        base: "int8",
        codes: &["tokenizer-vocab"],
        apply: |c| edit_tokenizer(c, |vocab| vocab.iter_mut().for_each(|id| *id += 4000)),
    },
    Poison {
        name: "no tokenizer",
        base: "awq",
        codes: &["tokenizer-missing"],
        apply: |c| assert!(c.files.remove("tokenizer.json").is_some()),
    },
    Poison {
        name: "vocab_size is not the embedding's rows",
        base: "awq",
        codes: &["tensor-shape"],
        apply: |c| c.config["vocab_size"] = json!(4000),
    },
    Poison {
        name: "rotary base of another model",
        base: "awq",
        codes: &["decoder-differs"],
        apply: |c| c.config["rope_parameters"]["rope_theta"] = json!(500_000.0),
    },
    Poison {
        name: "epsilon of the norms",
        base: "ct-asym",
        codes: &["decoder-differs"],
        apply: |c| c.config["rms_norm_eps"] = json!(1e-2),
    },
    Poison {
        name: "too few layers in the config",
        base: "awq",
        codes: &["tensor-extra"],
        apply: |c| c.config["num_hidden_layers"] = json!(1),
    },
    Poison {
        name: "too many layers in the config",
        base: "awq",
        codes: &["tensor-missing"],
        apply: |c| c.config["num_hidden_layers"] = json!(3),
    },
    Poison {
        name: "heads of another width",
        base: "awq",
        codes: &["decoder-differs"],
        apply: |c| {
            c.config["num_attention_heads"] = json!(8);
            c.config["num_key_value_heads"] = json!(4);
            c.config["head_dim"] = json!(32);
        },
    },
    Poison { name: "norm zeroed", base: "awq", codes: &["norm-zero"], apply: |c| c.tensor(NORM).data.fill(0) },
    Poison {
        name: "one weight of a norm before folded linears",
        base: "awq",
        codes: &["column-scale"],
        apply: |c| c.tensor(NORM).scale(17, 1.5),
    },
    Poison {
        name: "one weight of a norm lost its sign",
        base: "awq",
        codes: &["fold-inconsistent"],
        apply: |c| c.tensor(NORM).scale(17, -1.0),
    },
    Poison {
        name: "one weight of the final norm",
        base: "fp8",
        codes: &["plain-differs"],
        apply: |c| c.tensor("model.norm.weight").scale(3, 1.25),
    },
    Poison {
        name: "rows of the embedding swapped",
        base: "awq",
        codes: &["plain-differs"],
        apply: |c| {
            let embed = &mut c.tensor(EMBED).data;
            let (first, second) = embed.split_at_mut(512 * 100);
            first[..512].swap_with_slice(&mut second[..512]);
        },
    },
    Poison {
        name: "NaN in the embedding",
        base: "ct-8",
        codes: &["value-not-finite"],
        apply: |c| c.tensor(EMBED).set(12345, f32::NAN),
    },
    Poison {
        name: "norm of type I16",
        base: "awq",
        codes: &["tensor-dtype"],
        apply: |c| c.tensor("model.norm.weight").dtype = Dtype::I16,
    },
    Poison {
        name: "a tied head that is another matrix",
        base: "awq",
        codes: &["tied-head"],
        apply: |c| {
            let mut raw = c.tensors[EMBED].clone();
            raw.data.reverse();
            c.tensors.insert("lm_head.weight".to_owned(), raw);
        },
    },
];

/// Half of the tensors in each of two shards.
fn two_shards(c: &mut Checkpoint) {
    let names: Vec<String> = c.tensors.keys().cloned().collect();
    let (first, second) = names.split_at(names.len() / 2);
    c.shards = vec![
        ("model-00001-of-00002.safetensors".to_owned(), first.to_vec()),
        ("model-00002-of-00002.safetensors".to_owned(), second.to_vec()),
    ];
    assert!(first.iter().any(|name| name == NORM));
}

fn truncate(dir: &Path) {
    let path = dir.join("model.safetensors");
    let length = std::fs::metadata(&path).unwrap().len();
    std::fs::File::options().write(true).open(path).unwrap().set_len(length - 1000).unwrap();
}

fn claim(dir: &Path) {
    let path = dir.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let length = bytes.len() as u64;
    bytes[..8].copy_from_slice(&length.to_le_bytes());
    std::fs::write(path, bytes).unwrap();
}

fn garble(dir: &Path) {
    let path = dir.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[20] = b'{';
    std::fs::write(path, bytes).unwrap();
}

fn no_config(dir: &Path) {
    std::fs::remove_file(dir.join("config.json")).unwrap();
}

fn twin(c: &mut Checkpoint) {
    let name = format!("{Q}.weight");
    let raw = c.original[&name].clone();
    c.tensors.insert(name, raw);
}

/// The original's weight instead of the packed one.
fn plain(c: &mut Checkpoint) {
    drop(c.take(UP));
    let name = format!("{UP}.weight");
    let raw: Raw = c.original[&name].clone();
    c.tensors.insert(name, raw);
}

/// Changes the ids of all tokens.
fn edit_tokenizer(c: &mut Checkpoint, change: fn(&mut Vec<u64>)) {
    let mut file: Value = serde_json::from_slice(&c.files["tokenizer.json"]).unwrap();
    let vocab = file["model"]["vocab"].as_object_mut().unwrap();
    let mut ids: Vec<u64> = vocab.values().map(|id| id.as_u64().unwrap()).collect();
    change(&mut ids);
    for (id, new) in vocab.values_mut().zip(ids) {
        *id = new.into();
    }
    c.files.insert("tokenizer.json".to_owned(), file.to_string().into_bytes());
}
