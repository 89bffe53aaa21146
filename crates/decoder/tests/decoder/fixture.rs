//! Small random checkpoints of every family, with the logits that transformers computes for them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use half::{bf16, f16};
use lite_decoder::{AttnSpec, Block, Compute, DecoderError, DecoderSpec, Embedding, Head, NoTap, Rope, WeightSource};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value};

/// Every case that must be there.
pub(crate) const CASES: &[&str] = &[
    "baichuan2",
    "chatglm3",
    "deepseek-v2",
    "deepseek-v2-lite",
    "deepseek-v3",
    "gemma2",
    "gemma3",
    "gemma3-types",
    "glm",
    "glm4",
    "glm4-chat",
    "glm4-moe",
    "glm4-moe-mtp",
    "gpt-oss",
    "granite",
    "internlm2",
    "internlm2-dynamic",
    "internlm3",
    "internlm3-bias",
    "llama-bias",
    "llama-dynamic-rope",
    "llama-linear-rope",
    "llama-yarn-options",
    "llama2",
    "llama3",
    "mistral",
    "mistral-nemo",
    "mixtral",
    "olmo2",
    "phi3",
    "phi3-longrope",
    "phi3-partial",
    "phi4-mini",
    "qwen2",
    "qwen2-moe",
    "qwen2-sliding",
    "qwen2-yarn",
    "qwen3",
    "qwen3-moe",
    "starcoder2",
    "starcoder2-plain",
];

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

pub(crate) fn object(path: &Path) -> Map<String, Value> {
    let text = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    match serde_json::from_slice(&text) {
        Ok(Value::Object(map)) => map,
        other => panic!("{}: {other:?}", path.display()),
    }
}

/// Weights in memory.
#[derive(Default)]
pub(crate) struct Weights {
    pub(crate) tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    /// Names that were loaded.
    pub(crate) read: RefCell<Vec<String>>,
}

impl WeightSource for Weights {
    fn load(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), DecoderError> {
        self.read.borrow_mut().push(name.to_owned());
        let missing = || DecoderError::Tensor { tensor: name.to_owned(), reason: "missing".to_owned() };
        self.tensors.get(name).cloned().ok_or_else(missing)
    }

    fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }
}

pub(crate) struct Batch {
    pub(crate) windows: Vec<Vec<u32>>,
    /// `(windows, tokens, vocab)`
    pub(crate) logits: Vec<f32>,
}

pub(crate) struct Fixture {
    pub(crate) spec: DecoderSpec,
    pub(crate) weights: Weights,
    pub(crate) batches: Vec<Batch>,
}

/// A tensor's name, shape and values.
type Named = (String, (Vec<usize>, Vec<f32>));

/// Experts `[E, in, out]` of one layer as Qwen3-VL-MoE is published, one by one; any other tensor as it is.
fn one_by_one(name: String, shape: Vec<usize>, values: Vec<f32>) -> Vec<Named> {
    let parts: &[&str] = match name.rsplit_once(".experts.") {
        Some((_, "gate_up_proj")) => &["gate_proj", "up_proj"],
        Some((_, "down_proj")) => &["down_proj"],
        _ => return vec![(name, (shape, values))],
    };
    let module = name.rsplit_once('.').unwrap().0;
    let [experts, k, all] = shape[..] else { panic!("{name}: {shape:?}") };
    let n = all / parts.len();
    let one = |(e, part): (usize, usize)| {
        let at = |o: usize, i: usize| values[(e * k + i) * all + part * n + o];
        let values = (0..n * k).map(|i| at(i / k, i % k)).collect();
        (format!("{module}.{e}.{}.weight", parts[part]), (vec![n, k], values))
    };
    (0..experts).flat_map(|e| (0..parts.len()).map(move |part| (e, part))).map(one).collect()
}

impl Fixture {
    pub(crate) fn open(case: &str) -> Self {
        Self::open_in("families", case)
    }

    pub(crate) fn open_in(folder: &str, case: &str) -> Self {
        let dir = root().join("tests/fixtures").join(folder).join(case);
        let bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.tensors().into_iter();
        let tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)> =
            tensors.flat_map(|(name, t)| one_by_one(name, t.shape().to_vec(), floats(t.dtype(), t.data()))).collect();
        let spec = DecoderSpec::from_config_for(&object(&dir.join("config.json")), &|name| tensors.contains_key(name))
            .unwrap_or_else(|e| panic!("{case}: {e}"));
        let bytes = std::fs::read(dir.join("expected.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let mut names: Vec<String> =
            file.names().into_iter().filter(|n| n.starts_with("input_ids")).map(str::to_owned).collect();
        names.sort();
        let batches = names.iter().map(|name| {
            let ids = file.tensor(name).unwrap();
            let logits = file.tensor(&name.replace("input_ids", "logits")).unwrap();
            let ids_flat: Vec<u32> =
                ids.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32).collect();
            Batch {
                windows: ids_flat.chunks(ids.shape()[1]).map(<[u32]>::to_vec).collect(),
                logits: floats(logits.dtype(), logits.data()),
            }
        });
        let batches: Vec<Batch> = batches.collect();
        assert!(!batches.is_empty(), "{case}");
        Self { spec, weights: Weights { tensors, ..Weights::default() }, batches }
    }

    pub(crate) fn block(&self, index: usize) -> Block {
        self.block_on(index, &Compute::cpu())
    }

    pub(crate) fn block_on(&self, index: usize, compute: &Compute) -> Block {
        Block::load(&self.spec, index, &self.weights, compute).unwrap()
    }

    /// Key and value heads that a cache can be made of.
    pub(crate) fn kv_heads(&self, index: usize) -> Option<usize> {
        match &self.spec.blocks[index].attn {
            AttnSpec::Gqa(attn) => Some(attn.kv_heads),
            _ => None,
        }
    }

    /// Whether a tensor is no weight: ChatGLM's files hold the frequencies of its rotary embedding.
    pub(crate) fn is_buffer(tensor: &str) -> bool {
        tensor.ends_with("rotary_pos_emb.inv_freq")
    }

    /// Whether a tensor belongs to a layer of multi-token prediction, which no forward pass reads.
    pub(crate) fn is_mtp(&self, tensor: &str) -> bool {
        let first = self.spec.blocks.len();
        (first..first + self.spec.mtp_layers).any(|i| tensor.starts_with(&format!("model.layers.{i}.")))
    }

    pub(crate) fn embed(&self, windows: &[Vec<u32>]) -> Tensor {
        Embedding::load(&self.spec, &self.weights, &Device::Cpu).unwrap().embed(windows).unwrap()
    }

    /// Logits `(windows, tokens, vocab)`.
    pub(crate) fn logits(&self, windows: &[Vec<u32>]) -> Vec<f32> {
        let rope = Rope::new(&self.spec, windows[0].len(), &Device::Cpu).unwrap();
        let mut x = self.embed(windows);
        for index in 0..self.spec.blocks.len() {
            x = self.block(index).forward(&x, &rope, &mut NoTap).unwrap();
        }
        let head = Head::load(&self.spec, &self.weights, &Device::Cpu).unwrap();
        values(&head.logits(&x.flatten(0, 1).unwrap()).unwrap())
    }
}

pub(crate) fn values(x: &Tensor) -> Vec<f32> {
    lite_decoder::with_cpu_slice(x, <[f32]>::to_vec).unwrap()
}

fn floats(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
        Dtype::BF16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect(),
        Dtype::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect(),
        other => panic!("{other:?}"),
    }
}

/// Reproducible values in `(0, 1)`.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 40) as f32 + 0.5) / (1u64 << 24) as f32
    }
}
