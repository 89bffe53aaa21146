//! The poisoned corpus: sound checkpoints of every layout, each damaged in one way, and what `verify` must say.

pub(crate) mod codes;
pub(crate) mod files;
pub(crate) mod floats;
pub(crate) mod integers;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::Value;
use tempfile::TempDir;

use crate::e2e::support::{Raw, config, lite, model, tensors, write_tensors};

/// The linears that are damaged: `[256, 256]`, and three others.
pub(crate) const Q: &str = "model.layers.1.self_attn.q_proj";
pub(crate) const K: &str = "model.layers.1.self_attn.k_proj";
pub(crate) const V: &str = "model.layers.1.self_attn.v_proj";
pub(crate) const UP: &str = "model.layers.1.mlp.up_proj";

/// One way to damage a checkpoint.
pub(crate) struct Poison {
    /// What is done.
    pub(crate) name: &'static str,
    /// Which sound checkpoint it is done to.
    pub(crate) base: &'static str,
    /// Codes of errors of which at least one must be found.
    pub(crate) codes: &'static [&'static str],
    /// Does it.
    pub(crate) apply: fn(&mut Checkpoint),
}

/// A checkpoint in memory, to be damaged and written.
pub(crate) struct Checkpoint {
    pub(crate) tensors: BTreeMap<String, Raw>,
    pub(crate) config: Value,
    /// Other files by name.
    pub(crate) files: BTreeMap<String, Vec<u8>>,
    /// The original.
    pub(crate) original: BTreeMap<String, Raw>,
    /// Written into these shards instead of one file: name and tensors.
    pub(crate) shards: Vec<(String, Vec<String>)>,
    /// The index of the shards, where it is not the true one.
    pub(crate) index: Option<Value>,
    /// Done to the folder last.
    pub(crate) after: Option<fn(&Path)>,
}

impl Checkpoint {
    /// Reads a folder.
    pub(crate) fn read(dir: &Path, original: &Path) -> Self {
        let mut files = crate::e2e::support::files(dir);
        files.retain(|name, _| !name.ends_with(".safetensors") && name != "config.json");
        Self {
            tensors: tensors(dir),
            config: config(dir),
            files,
            original: tensors(original),
            shards: Vec::new(),
            index: None,
            after: None,
        }
    }

    /// Writes it into a new folder.
    pub(crate) fn write(&self) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in &self.files {
            std::fs::write(dir.path().join(name), bytes).unwrap();
        }
        std::fs::write(dir.path().join("config.json"), self.config.to_string()).unwrap();
        if self.shards.is_empty() {
            write_tensors(dir.path(), &self.tensors, &[("format", "pt")]);
        }
        let mut map = serde_json::Map::new();
        for (shard, names) in &self.shards {
            let part: BTreeMap<String, Raw> = names.iter().map(|n| (n.clone(), self.tensors[n].clone())).collect();
            write_tensors(dir.path(), &part, &[("format", "pt")]);
            std::fs::rename(dir.path().join("model.safetensors"), dir.path().join(shard)).unwrap();
            map.extend(names.iter().map(|name| (name.clone(), Value::from(shard.as_str()))));
        }
        if !self.shards.is_empty() {
            let index = self.index.clone().unwrap_or_else(|| serde_json::json!({"metadata": {}, "weight_map": map}));
            std::fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        }
        if let Some(after) = self.after {
            after(dir.path());
        }
        dir
    }

    pub(crate) fn tensor(&mut self, name: &str) -> &mut Raw {
        self.tensors.get_mut(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// The tensor of this linear with the first of these suffixes that there is.
    pub(crate) fn part(&mut self, module: &str, suffixes: &[&str]) -> &mut Raw {
        let name = suffixes.iter().map(|s| format!("{module}.{s}")).find(|name| self.tensors.contains_key(name));
        let name = name.unwrap_or_else(|| panic!("{module} has none of {suffixes:?}"));
        self.tensor(&name)
    }

    /// The scales of a linear, whatever the layout calls them.
    pub(crate) fn scales(&mut self, module: &str) -> &mut Raw {
        self.part(module, &["scales", "weight_scale", "weight_scale_inv", "scale"])
    }

    /// The zero points.
    pub(crate) fn zeros(&mut self, module: &str) -> &mut Raw {
        self.part(module, &["qzeros", "weight_zero_point"])
    }

    /// The codes.
    pub(crate) fn codes(&mut self, module: &str) -> &mut Raw {
        self.part(module, &["qweight", "weight_packed", "weight"])
    }

    /// Names of all tensors of a linear.
    pub(crate) fn parts_of(&self, module: &str) -> Vec<String> {
        let prefix = format!("{module}.");
        self.tensors.keys().filter(|name| name.starts_with(&prefix)).cloned().collect()
    }

    /// Removes a linear's tensors and returns them by suffix.
    pub(crate) fn take(&mut self, module: &str) -> Vec<(String, Raw)> {
        let names = self.parts_of(module);
        let take = |name: String| {
            let raw = self.tensors.remove(&name).unwrap();
            (name[module.len() + 1..].to_owned(), raw)
        };
        names.into_iter().map(take).collect()
    }

    pub(crate) fn put(&mut self, module: &str, parts: Vec<(String, Raw)>) {
        for (suffix, raw) in parts {
            self.tensors.insert(format!("{module}.{suffix}"), raw);
        }
    }

    /// `quantization_config`.
    pub(crate) fn declared(&mut self) -> &mut Value {
        &mut self.config["quantization_config"]
    }

    /// `weights` of the first group of a compressed-tensors config.
    pub(crate) fn group_weights(&mut self) -> &mut Value {
        &mut self.config["quantization_config"]["config_groups"]["group_0"]["weights"]
    }
}

impl Raw {
    /// Sets one value of a tensor of floats.
    pub(crate) fn set(&mut self, at: usize, value: f32) {
        match self.dtype {
            Dtype::F32 => self.data[4 * at..4 * at + 4].copy_from_slice(&value.to_le_bytes()),
            Dtype::F16 => self.data[2 * at..2 * at + 2].copy_from_slice(&half::f16::from_f32(value).to_le_bytes()),
            Dtype::BF16 => self.data[2 * at..2 * at + 2].copy_from_slice(&half::bf16::from_f32(value).to_le_bytes()),
            other => panic!("{other:?} is no float type"),
        }
    }

    /// Multiplies one value of a tensor of floats.
    pub(crate) fn scale(&mut self, at: usize, factor: f32) {
        let value = self.floats()[at];
        self.set(at, value * factor);
    }

    /// Changes every 32-bit word.
    pub(crate) fn each_word(&mut self, change: impl Fn(u32) -> u32) {
        for word in self.data.chunks_exact_mut(4) {
            let value = u32::from_le_bytes(word.try_into().unwrap());
            word.copy_from_slice(&change(value).to_le_bytes());
        }
    }

    /// Changes one 32-bit word.
    pub(crate) fn word(&mut self, at: usize, change: impl Fn(u32) -> u32) {
        let word = &mut self.data[4 * at..4 * at + 4];
        let value = u32::from_le_bytes(word.try_into().unwrap());
        word.copy_from_slice(&change(value).to_le_bytes());
    }
}

/// A word with nibble `i` moved to where `order` says.
pub(crate) fn reorder(word: u32, order: [u32; 8]) -> u32 {
    (0..8).fold(0, |out, i| out | ((word >> (4 * i)) & 15) << (4 * order[i as usize]))
}

/// Sound checkpoints by name, and the original they were made from.
pub(crate) struct Sound {
    _root: TempDir,
    pub(crate) original: PathBuf,
    pub(crate) made: BTreeMap<&'static str, PathBuf>,
}

/// How each sound checkpoint is made.
pub(crate) const MADE: [(&str, &[&str]); 14] = [
    ("awq", &["auto_awq", "--dtype", "float16", "--no-search-scale", "--range", "minmax", "--eval-samples", "0"]),
    ("gptq", &["auto_gptq", "--layout", "gptq", "--effort", "fast", "--eval-samples", "0"]),
    ("gptq-v2", &["rtn", "--scheme", "W4A16_ASYM", "--layout", "gptq"]),
    ("ct-asym", &["auto_awq", "--layout", "compressed-tensors", "--no-search-scale", "--eval-samples", "0"]),
    ("ct-sym", &["rtn", "--scheme", "W4A16", "--layout", "compressed-tensors"]),
    ("ct-8", &["rtn", "--scheme", "W8A16"]),
    ("int8", &["rtn", "--scheme", "W8A8"]),
    ("fp8", &["rtn", "--scheme", "FP8_DYNAMIC", "--kv-cache", "fp8"]),
    ("fp8-block", &["rtn", "--scheme", "FP8_BLOCK"]),
    ("nvfp4", &["rtn", "--scheme", "NVFP4A16"]),
    ("mxfp4", &["rtn", "--scheme", "MXFP4A16"]),
    ("lmdeploy-w8a8", &["smooth_quant", "--eval-samples", "0"]),
    ("block-fp8", &["blocked_fp8"]),
    ("modelopt", &["rtn", "--scheme", "FP8", "--layout", "modelopt"]),
];

impl Sound {
    /// Quantizes the first two blocks of the bundled model in every way.
    pub(crate) fn make() -> Self {
        let root = tempfile::tempdir().unwrap();
        let original = root.path().join("original");
        shorten(&original);
        let mut made = BTreeMap::new();
        for (name, command) in MADE {
            let out = root.path().join(name);
            let mut run = lite();
            run.arg(command[0]).arg(&original).arg("--work-dir").arg(&out).args(&command[1..]);
            if command[0] != "blocked_fp8" {
                run.args(["--calib-dataset", "builtin", "--calib-samples", "2", "--calib-seqlen", "64"]);
            }
            let output = run.output().unwrap();
            assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
            made.insert(name, out);
        }
        Self { _root: root, original, made }
    }
}

/// The bundled model with two of its blocks.
fn shorten(dir: &Path) {
    std::fs::create_dir(dir).unwrap();
    for entry in std::fs::read_dir(model()).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.join(path.file_name().unwrap())).unwrap();
    }
    let mut all = tensors(&model());
    let later = |name: &str| (2..6).any(|block| name.contains(&format!("layers.{block}.")));
    all.retain(|name, _| !later(name));
    write_tensors(dir, &all, &[("format", "pt")]);
    let mut config = config(dir);
    config["num_hidden_layers"] = 2.into();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}
