//! Running the binary, and reading what it wrote without its own code.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use safetensors::{Dtype, SafeTensors};
use tempfile::TempDir;

/// The bundled model.
pub(crate) fn model() -> PathBuf {
    root().join("tests/fixtures/novels-llama-6m")
}

/// The repository.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// The log of a run, no part of the checkpoint.
pub(crate) const LOG: &str = "lite.log.jsonl";

/// The binary, offline, with an empty hub cache.
pub(crate) fn lite() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lite"));
    command.env("HF_HUB_OFFLINE", "1").env("HF_HOME", "/nonexistent/hub").env_remove("HF_TOKEN");
    command
}

/// Settings that make a run on the bundled model take about a second.
pub(crate) const QUICK: [&str; 8] =
    ["--calib-dataset", "builtin", "--calib-samples", "6", "--calib-seqlen", "64", "--eval-samples", "4"];

/// Runs `lite auto_awq MODEL --work-dir DIR flags…`.
pub(crate) fn auto_awq(model: &Path, work_dir: &Path, flags: &[&str]) -> Output {
    lite().arg("auto_awq").arg(model).arg("--work-dir").arg(work_dir).args(flags).output().unwrap()
}

/// The same, which must succeed; returns standard output.
pub(crate) fn auto_awq_ok(model: &Path, work_dir: &Path, flags: &[&str]) -> String {
    let output = auto_awq(model, work_dir, flags);
    assert!(
        output.status.success(),
        "{:?}\nstdout: {}\nstderr: {}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Every file below `dir`, by relative path; not the log of the run, which holds times.
pub(crate) fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    fn walk(dir: &Path, base: &Path, into: &mut BTreeMap<String, Vec<u8>>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, base, into);
            } else {
                let name = path.strip_prefix(base).unwrap().to_string_lossy().into_owned();
                if name == LOG {
                    continue;
                }
                into.insert(name, std::fs::read(&path).unwrap());
            }
        }
    }
    let mut found = BTreeMap::new();
    if dir.exists() {
        walk(dir, dir, &mut found);
    }
    found
}

/// A tensor as read by the safetensors crate.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Raw {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Vec<u8>,
}

impl Raw {
    pub(crate) fn words(&self) -> Vec<u32> {
        assert_eq!(self.dtype, Dtype::I32);
        self.data.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    pub(crate) fn floats(&self) -> Vec<f32> {
        match self.dtype {
            Dtype::F32 => self.data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
            Dtype::BF16 => {
                let f = |b: &[u8]| half::bf16::from_le_bytes(b.try_into().unwrap()).to_f32();
                self.data.chunks_exact(2).map(f).collect()
            }
            Dtype::F16 => {
                let f = |b: &[u8]| half::f16::from_le_bytes(b.try_into().unwrap()).to_f32();
                self.data.chunks_exact(2).map(f).collect()
            }
            other => panic!("{other:?} is no float type"),
        }
    }
}

/// All tensors of a checkpoint folder, of all its shards.
pub(crate) fn tensors(dir: &Path) -> BTreeMap<String, Raw> {
    let mut found = BTreeMap::new();
    for (name, bytes) in files(dir) {
        if name.ends_with(".safetensors") {
            for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
                let raw = Raw { dtype: view.dtype(), shape: view.shape().to_vec(), data: view.data().to_vec() };
                assert!(found.insert(name.clone(), raw).is_none(), "{name} twice");
            }
        }
    }
    found
}

/// Writes tensors as one `model.safetensors` with `__metadata__`.
pub(crate) fn write_tensors(dir: &Path, tensors: &BTreeMap<String, Raw>, metadata: &[(&str, &str)]) {
    let views: Vec<(String, safetensors::tensor::TensorView<'_>)> = tensors
        .iter()
        .map(|(name, raw)| {
            (name.clone(), safetensors::tensor::TensorView::new(raw.dtype, raw.shape.clone(), &raw.data).unwrap())
        })
        .collect();
    let metadata = metadata.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    std::fs::write(dir.join("model.safetensors"), safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
}

/// A copy of the files of `from` (not of its sub-folders) in a new folder.
pub(crate) fn copy_of(from: &Path) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    dir
}

pub(crate) fn config(dir: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap()
}

/// Changes one tensor of the model in `dir`.
pub(crate) fn edit_tensor(dir: &Path, name: &str, change: impl FnOnce(&mut Raw)) {
    let mut all = tensors(dir);
    change(all.get_mut(name).unwrap());
    write_tensors(dir, &all, &[("format", "pt")]);
}

/// Codes `[N, K]` and zero points `[N, G]` of an AWQ linear, unpacked by AutoAWQ's published order.
pub(crate) fn decode_awq(tensors: &BTreeMap<String, Raw>, module: &str) -> Vec<f32> {
    let (qweight, qzeros) = (&tensors[&format!("{module}.qweight")], &tensors[&format!("{module}.qzeros")]);
    let scales = &tensors[&format!("{module}.scales")];
    let (k, n, groups) = (qweight.shape[0], scales.shape[1], scales.shape[0]);
    // AutoAWQ's AWQ_REVERSE_ORDER: column 8c + i is nibble REVERSE[i] of word c.
    const REVERSE: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];
    let nibble =
        |words: &[u32], row: usize, col: usize| (words[row * (n / 8) + col / 8] >> (4 * REVERSE[col % 8])) & 15;
    let (weights, zeros, scales) = (qweight.words(), qzeros.words(), scales.floats());
    let mut out = vec![0f32; n * k];
    for row in 0..k {
        let group = row / (k / groups);
        for col in 0..n {
            let code = nibble(&weights, row, col) as f32 - nibble(&zeros, group, col) as f32;
            out[col * k + row] = code * scales[group * n + col];
        }
    }
    out
}

/// The same of a compressed-tensors linear of 4 bits.
pub(crate) fn decode_compressed_tensors(tensors: &BTreeMap<String, Raw>, module: &str) -> Vec<f32> {
    let (packed, scale) = (&tensors[&format!("{module}.weight_packed")], &tensors[&format!("{module}.weight_scale")]);
    let (n, k, groups) = (packed.shape[0], packed.shape[1] * 8, scale.shape[1]);
    let zeros = tensors.get(&format!("{module}.weight_zero_point")).map(Raw::words);
    let (words, scales) = (packed.words(), scale.floats());
    let mut out = vec![0f32; n * k];
    for row in 0..n {
        for col in 0..k {
            let group = col / (k / groups);
            let code = (words[row * (k / 8) + col / 8] >> (4 * (col % 8))) & 15;
            let zero = zeros.as_ref().map_or(8, |z| (z[(row / 8) * groups + group] >> (4 * (row % 8))) & 15);
            out[row * k + col] = (code as f32 - zero as f32) * scales[row * groups + group];
        }
    }
    out
}
