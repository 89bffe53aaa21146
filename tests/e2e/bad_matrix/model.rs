//! Rows 19 to 39: config.json, side files, weights, numbers.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::super::support::{Raw, edit_tensor, tensors, write_tensors};
use super::{Row, row};

const DOWN: &str = "model.layers.3.mlp.down_proj.weight";

fn text(dir: &Path, text: impl AsRef<[u8]>) {
    fs::write(dir.join("config.json"), text).unwrap();
}

fn original(dir: &Path) -> String {
    fs::read_to_string(dir.join("config.json")).unwrap()
}

/// One key of config.json.
fn set(dir: &Path, key: &str, value: Value) {
    let mut config: Value = serde_json::from_str(&original(dir)).unwrap();
    config[key] = value;
    text(dir, config.to_string());
}

fn sparse(path: &Path, bytes: u64) {
    fs::File::create(path).unwrap().set_len(bytes).unwrap();
}

/// Every element of `down_proj` of block 3 as `bits` of BF16.
fn fill(dir: &Path, bits: u16) {
    edit_tensor(dir, DOWN, |raw| raw.data.chunks_exact_mut(2).for_each(|b| b.copy_from_slice(&bits.to_le_bytes())));
}

fn one(dir: &Path, name: &str, bits: u16) {
    edit_tensor(dir, name, |raw| raw.data[10..12].copy_from_slice(&bits.to_le_bytes()));
}

fn add(dir: &Path, name: &str, shape: &[usize]) {
    let mut all = tensors(dir);
    let data = vec![0; shape.iter().product::<usize>() * 2];
    all.insert(name.to_owned(), Raw { dtype: safetensors::Dtype::BF16, shape: shape.to_vec(), data });
    write_tensors(dir, &all, &[("format", "pt")]);
}

pub(super) const ROWS: &[Row] = &[
    row("19a", "no config.json", |m, _| fs::remove_file(m.join("config.json")).unwrap(), "RTN", 3),
    row("19b", "an empty config.json", |m, _| text(m, ""), "RTN", 3),
    row("19c", "a config.json of 1 GB", |m, _| sparse(&m.join("config.json"), 1 << 30), "RTN", 3),
    row("19d", "a config.json that is no UTF-8", |m, _| text(m, b"{\"a\": \"\xff\"}"), "RTN", 3),
    row("19e", "a byte order mark", |m, _| text(m, format!("\u{feff}{}", original(m))), "RTN", 0),
    row("19f", "comments in config.json", |m, _| text(m, original(m).replacen('{', "{ // a model", 1)), "RTN", 3),
    row("19g", "NaN in config.json", |m, _| text(m, original(m).replace("1e-06", "NaN")), "RTN", 3),
    row("19h", "a key twice", |m, _| text(m, original(m).replacen('{', "{\"hidden_size\": 128,", 1)), "RTN", 3),
    row("20a", "a hidden size of 0", |m, _| set(m, "hidden_size", 0.into()), "CAL", 3),
    row("20b", "a negative hidden size", |m, _| set(m, "hidden_size", json!(-256)), "CAL", 3),
    row("20c", "a hidden size of 1e18", |m, _| set(m, "hidden_size", json!(1_000_000_000_000_000_000u64)), "CAL", 3),
    row("20d", "a hidden size in words", |m, _| set(m, "hidden_size", "256".into()), "CAL", 3),
    row("20e", "heads that do not divide", |m, _| set(m, "num_key_value_heads", 3.into()), "CAL", 3),
    row("20f", "more layers than tensors", |m, _| set(m, "num_hidden_layers", 8.into()), "CAL", 3),
    row("20g", "fewer layers than tensors", |m, _| set(m, "num_hidden_layers", 4.into()), "CAL", 3),
    row(
        "21",
        "code of its own",
        |m, _| {
            set(m, "auto_map", json!({"AutoModelForCausalLM": "modeling_x.X"}));
            fs::write(m.join("modeling_x.py"), "raise SystemExit").unwrap();
        },
        "RTN",
        0,
    ),
    row("22a", "an unknown decoder, calibrated", |m, _| set(m, "architectures", json!(["XForCausalLM"])), "CAL", 4),
    row("22b", "an unknown decoder, without data", |m, _| set(m, "architectures", json!(["XForCausalLM"])), "RTN", 0),
    row("23a", "no architecture", |m, _| set(m, "architectures", json!([])), "CAL", 0),
    row(
        "23b",
        "two architectures",
        |m, _| set(m, "architectures", json!(["XForCausalLM", "LlamaForCausalLM"])),
        "CAL",
        3,
    ),
    row("24a", "a head beside a tied embedding", |m, _| add(m, "lm_head.weight", &[4096, 256]), "RTN", 0),
    row("24b", "no head and no tie", |m, _| set(m, "tie_word_embeddings", false.into()), "CAL", 3),
    row(
        "25a",
        "codes of GPTQ",
        |m, _| set(m, "quantization_config", json!({"quant_method": "gptq", "bits": 4})),
        "RTN",
        4,
    ),
    row(
        "25b",
        "codes of nobody",
        |m, _| set(m, "quantization_config", json!({"quant_method": "\u{1b}[31mzip"})),
        "RTN",
        4,
    ),
    row("26a", "no tokenizer", |m, _| fs::remove_file(m.join("tokenizer.json")).unwrap(), "CAL", 3),
    row("26b", "a tokenizer that is no JSON", |m, _| fs::write(m.join("tokenizer.json"), "{").unwrap(), "CAL", 3),
    row("26c", "a tokenizer of 500 MB", |m, _| sparse(&m.join("tokenizer.json"), 500_000_000), "CAL", 3),
    row(
        "26d",
        "a tokenizer of another model",
        |m, _| {
            edit_tensor(m, "model.embed_tokens.weight", |raw| {
                raw.shape[0] = 1000;
                raw.data.truncate(1000 * 256 * 2);
            });
            set(m, "vocab_size", 1000.into());
        },
        "CAL",
        3,
    ),
    row("26e", "no tokenizer, without data", |m, _| fs::remove_file(m.join("tokenizer.json")).unwrap(), "RTN", 0),
    row(
        "28",
        "files of the writer's own names",
        |m, _| {
            fs::write(m.join("hf_quant_config.json"), "{\"old\": 1}").unwrap();
            fs::write(m.join("Quantize_Config.json"), "{\"old\": 1}").unwrap();
        },
        "RTN",
        0,
    ),
    row("29a", "NaN in a weight", |m, _| one(m, DOWN, 0x7fc0), "CAL", 3),
    row("29b", "NaN in a weight, without data", |m, _| one(m, DOWN, 0x7fc0), "RTN", 3),
    row("29c", "nothing but NaN", |m, _| fill(m, 0x7fc0), "RTN", 3),
    row("29d", "Inf in the embedding", |m, _| one(m, "model.embed_tokens.weight", 0x7f80), "RTN", 3),
    row("30a", "a weight of zeros", |m, _| fill(m, 0), "CAL", 0),
    row("30b", "a weight of one value", |m, _| fill(m, 0x3c23), "CAL", 0),
    row("30c", "an outlier of 1e30", |m, _| one(m, DOWN, 0x7149), "RTN", 0),
    row("30d", "subnormal weights", |m, _| fill(m, 0x0001), "RTN", 0),
    row("31a", "a norm beyond float16", |m, _| one(m, "model.norm.weight", 0x7149), "RTN --dtype float16", 3),
    row("32", "scales below float16", |m, _| fill(m, 0x2f00), "RTN --dtype float16", 0),
    row("33a", "a group that does not divide", |_, _| (), "CAL --w-group-size 96", 2),
    row("33b", "a group wider than a row", |_, _| (), "CAL --w-group-size 512", 2),
    row("34", "a split that does not divide", |_, _| (), "CAL --target turbomind --tp 3", 4),
    row("36", "a tensor that nobody reads", |m, _| add(m, "model.rotary.inv_freq", &[32]), "RTN", 0),
    row(
        "37a",
        "experts in one tensor of no known shape",
        |m, _| {
            add(m, "model.layers.0.mlp.experts.gate_up_proj", &[4, 3, 8]);
            add(m, "model.layers.0.mlp.experts.down_proj", &[4, 8, 3]);
        },
        "RTN",
        3,
    ),
    row(
        "37b",
        "experts without their second half",
        |m, _| add(m, "model.layers.0.mlp.experts.gate_up_proj", &[4, 8, 3]),
        "RTN",
        3,
    ),
    row("39a", "alpha -1", |_, _| (), "smooth_quant MODEL --work-dir OUT --alpha -1", 2),
    row("39b", "alpha NaN", |_, _| (), "smooth_quant MODEL --work-dir OUT --alpha nan", 2),
];
