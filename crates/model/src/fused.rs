//! Experts that a checkpoint stores in one tensor per layer, presented as one tensor per expert.
//!
//! With `E` experts of width `I` between `H` inputs and outputs, `X.experts.gate_up_proj` and `X.experts.down_proj` are
//!
//! | | gate and up | down |
//! |---|---|---|
//! | transformers 5 in memory | `[E, 2I, H]`: rows of gate, then of up | `[E, H, I]` |
//! | Qwen3-VL-MoE and Llama 4 as published | `[E, H, 2I]`: columns of gate, then of up | `[E, I, H]` |
//! | gpt-oss | `[E, H, 2I]`: columns of gate and up in turn | `[E, I, H]` |
//! | gpt-oss in MXFP4 | `…_blocks` U8 `[E, 2I, H/32, 16]`, rows of gate and up in turn; `…_scales` U8 `[E, 2I, H/32]` | `[E, H, I/32, 16]`, `[E, H, I/32]` |
//!
//! with biases `…_bias` `[E, 2I]` and `[E, H]`. They become `X.experts.{e}.{gate_proj, up_proj, down_proj}.weight` (and
//! `.bias`), `[out, in]`; MXFP4 as F4 (E2M1, the lower half of a byte first) with `.weight_scale` in E8M0, `[out, in/32]`.
//! Sources: transformers' `conversion_mapping.py`, `models/gpt_oss`, `models/llama4`, `integrations/mxfp4.py`.

use std::collections::{BTreeMap, HashSet};

use safetensors::Dtype;
use serde_json::{Map, Value};

use crate::convert::float_bytes;
use crate::error::ModelError;
use crate::tensor::TensorInfo;
use crate::text::printable;

/// Experts of all layers that are believed.
const MAX_EXPERTS: usize = 1 << 18;
/// Weights that share a scale in MXFP4, and the bytes of their codes.
const GROUP: (usize, usize) = (32, 16);
/// Where wrapper models keep the config of their language model.
const INNER_CONFIGS: [&str; 3] = ["text_config", "llm_config", "language_config"];
/// Bytes that the names of all single tensors may take.
const MAX_NAMES: usize = 256 << 20;
/// Names after `X.experts.`, in the order of [`Parts::found`].
const LEAVES: [&str; 8] = [
    "gate_up_proj",
    "down_proj",
    "gate_up_proj_bias",
    "down_proj_bias",
    "gate_up_proj_blocks",
    "down_proj_blocks",
    "gate_up_proj_scales",
    "down_proj_scales",
];

/// How gate and up share a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    /// First gate, then up.
    Halves,
    /// Even ones are gate's, odd ones up's.
    Turns,
}

/// The tensors of one layer's experts: positions in the list of all.
#[derive(Debug, Default)]
struct Parts {
    found: [Option<usize>; LEAVES.len()],
}

/// A tensor of one expert, and which one that is.
type Single = (usize, TensorInfo);

/// Replaces tensors of all experts of a layer by tensors of one expert each, where the first of them was. Returns how
/// many were replaced.
///
/// # Errors
/// [`ModelError::FusedExperts`]: a shape or type that nobody publishes, a part that is missing, names that are taken.
pub(crate) fn split(
    tensors: Vec<TensorInfo>,
    config: &Map<String, Value>,
) -> Result<(Vec<TensorInfo>, usize), ModelError> {
    let gpt_oss = is_gpt_oss(config);
    let known = if gpt_oss { LEAVES.len() } else { 4 };
    let mut layers: BTreeMap<&str, Parts> = BTreeMap::new();
    for (position, info) in tensors.iter().enumerate() {
        let Some((module, leaf)) = info.name.rsplit_once('.') else { continue };
        let leaf = LEAVES[..known].iter().position(|known| *known == leaf);
        if let Some(leaf) = leaf.filter(|_| module == "experts" || module.ends_with(".experts")) {
            layers.entry(module).or_default().found[leaf] = Some(position);
        }
    }
    // Codes of another quantizer stay what they are.
    layers.retain(|_, parts| {
        let mut weights = parts.found[..2].iter().flatten().filter_map(|at| tensors.get(*at)).peekable();
        weights.peek().is_none() || weights.any(|info| float_bytes(info.dtype).is_some())
    });
    if layers.is_empty() {
        return Ok((tensors, 0));
    }
    let taken: HashSet<&str> = tensors.iter().map(|info| info.name.as_str()).collect();
    // By the first of the tensors of one layer in one shard: what stands there instead.
    let mut instead: BTreeMap<usize, Vec<Single>> = BTreeMap::new();
    let (mut replaced, mut experts, mut names) = (HashSet::new(), 0usize, 0usize);
    for (module, parts) in &layers {
        let (left, names_left) = (MAX_EXPERTS - experts, MAX_NAMES - names);
        let layer = Layer { module, parts, tensors: &tensors, left, names_left };
        let singles = layer.singles(gpt_oss)?;
        // No more than were left.
        experts += singles.iter().map(|(e, _)| e + 1).max().unwrap_or(0);
        names += singles.iter().map(|(_, info)| info.name.len()).sum::<usize>();
        replaced.extend(parts.found.iter().flatten().copied());
        for single in singles {
            if taken.contains(single.1.name.as_str()) {
                return Err(layer.twice(&single.1.name));
            }
            let of_shard = |position: &&usize| tensors.get(**position).is_some_and(|info| info.shard == single.1.shard);
            let first = parts.found.iter().flatten().filter(of_shard).min();
            instead.entry(first.copied().unwrap_or_default()).or_default().push(single);
        }
    }
    let mut out = Vec::with_capacity(tensors.len() + instead.values().map(Vec::len).sum::<usize>());
    for (position, info) in tensors.into_iter().enumerate() {
        if let Some(mut singles) = instead.remove(&position) {
            singles.sort_by(|a, b| (a.0, &a.1.name).cmp(&(b.0, &b.1.name)));
            out.extend(singles.into_iter().map(|(_, info)| info));
        }
        if !replaced.contains(&position) {
            out.push(info);
        }
    }
    Ok((out, replaced.len()))
}

/// Whether the decoder is gpt-oss, by itself or inside a wrapper.
fn is_gpt_oss(config: &Map<String, Value>) -> bool {
    let named = |config: &Map<String, Value>| {
        let architecture = config.get("architectures").and_then(|names| names.get(0)?.as_str());
        config.get("model_type").and_then(Value::as_str) == Some("gpt_oss") || architecture == Some("GptOssForCausalLM")
    };
    let inner = INNER_CONFIGS.iter().filter_map(|key| config.get(*key)?.as_object());
    std::iter::once(config).chain(inner).any(named)
}

/// The experts of one layer.
struct Layer<'a> {
    module: &'a str,
    parts: &'a Parts,
    tensors: &'a [TensorInfo],
    /// Experts that are still believed.
    left: usize,
    /// Bytes of names that are.
    names_left: usize,
}

impl<'a> Layer<'a> {
    fn get(&self, leaf: usize) -> Option<&'a TensorInfo> {
        self.tensors.get(self.parts.found[leaf]?)
    }

    /// The tensor of this name, which the others need.
    fn need(&self, leaf: usize) -> Result<&'a TensorInfo, ModelError> {
        let beside = (0..LEAVES.len()).find(|leaf| self.get(*leaf).is_some()).unwrap_or_default();
        let found = || format!("`{}.{}` is missing", printable(self.module), LEAVES[leaf]);
        let wanted = "both, side by side: experts are not read in another form, or the checkpoint is incomplete";
        self.get(leaf).ok_or_else(|| self.wrong(beside, found(), wanted.to_owned()))
    }

    fn wrong(&self, leaf: usize, found: String, wanted: String) -> ModelError {
        let leaf = (leaf..LEAVES.len()).chain(0..leaf).find(|leaf| self.get(*leaf).is_some()).unwrap_or(leaf);
        ModelError::FusedExperts { tensor: format!("{}.{}", self.module, LEAVES[leaf]), found, wanted }
    }

    fn twice(&self, other: &str) -> ModelError {
        let found = format!("`{}` is there as well", printable(other));
        self.wrong(0, found, "the experts stored once".to_owned())
    }

    /// Refuses more experts than any model has: each becomes three tensors or more.
    fn believe(&self, leaf: usize, experts: usize) -> Result<(), ModelError> {
        // A module's name comes back in the names of each expert's tensors, of which there are up to six.
        let names = experts.saturating_mul(6).saturating_mul(self.module.len() + 40);
        if experts <= self.left && names <= self.names_left {
            return Ok(());
        }
        Err(self
            .wrong_shape(leaf, &format!("at most {MAX_EXPERTS} experts in all layers, with names of a usual length")))
    }

    fn wrong_shape(&self, leaf: usize, wanted: &str) -> ModelError {
        let shape = self.get(leaf).map(|info| info.shape.clone()).unwrap_or_default();
        self.wrong(leaf, format!("has shape {shape:?}"), wanted.to_owned())
    }

    /// All tensors of all experts.
    fn singles(&self, gpt_oss: bool) -> Result<Vec<Single>, ModelError> {
        let order = if gpt_oss { Order::Turns } else { Order::Halves };
        let coded = (4..8).find(|leaf| self.get(*leaf).is_some());
        let plain = (0..2).find(|leaf| self.get(*leaf).is_some());
        let mut out = Vec::new();
        let [e, h, i] = match (plain, coded) {
            (Some(_), Some(leaf)) => {
                return Err(self.twice(&format!("{}.{}", self.module, LEAVES[leaf])));
            }
            (_, Some(_)) => self.codes(order, &mut out)?,
            _ => self.floats(order, gpt_oss, &mut out)?,
        };
        self.biases([e, h, i], order, &mut out)?;
        Ok(out)
    }

    /// Weights as floats; returns E, H and I.
    fn floats(&self, order: Order, gpt_oss: bool, out: &mut Vec<Single>) -> Result<[usize; 3], ModelError> {
        let (gate_up, down) = (self.need(0)?, self.need(1)?);
        let cube = |leaf: usize, info: &TensorInfo| match *info.shape.as_slice() {
            [e, a, b] if e * a * b > 0 => Ok([e, a, b]),
            _ => Err(self.wrong_shape(leaf, "three dimensions, experts first, none of them 0")),
        };
        let [e, a, b] = cube(0, gate_up)?;
        self.believe(0, e)?;
        let [experts, c, d] = cube(1, down)?;
        if e != experts {
            let wanted = format!("{e} experts, as `{}` {:?} has", printable(&gate_up.name), gate_up.shape);
            return Err(self.wrong_shape(1, &wanted));
        }
        // Both would mean that I is 0.
        let (rows, columns) = (d.checked_mul(2) == Some(a) && b == c, a == d && c.checked_mul(2) == Some(b));
        let (h, i) = match (rows && !gpt_oss, columns) {
            (true, _) => (b, d),
            (_, true) => (a, c),
            _ => {
                let found = format!("has shape {:?} and `{}` {:?}", gate_up.shape, printable(&down.name), down.shape);
                let wanted = if gpt_oss { "" } else { "[E, 2I, H] and [E, H, I], or " };
                return Err(self.wrong(0, found, format!("{wanted}[E, H, 2I] and [E, I, H]")));
            }
        };
        let by_rows = !columns;
        for expert in 0..e {
            // In range: parts of tensors whose elements fit 64 bits.
            for (half, name) in ["gate_proj.weight", "up_proj.weight"].into_iter().enumerate() {
                let (first, strides) = match (by_rows, order) {
                    (true, _) => (half * i * h, (h, 1)),
                    (false, Order::Halves) => (half * i, (1, 2 * i)),
                    (false, Order::Turns) => (half, (2, 2 * i)),
                };
                let first = expert * 2 * i * h + first;
                out.push(self.single(0, expert, name, first, (i, h), strides)?);
            }
            let strides = if by_rows { (i, 1) } else { (1, h) };
            out.push(self.single(1, expert, "down_proj.weight", expert * h * i, (h, i), strides)?);
        }
        Ok([e, h, i])
    }

    /// Biases, where there are some.
    fn biases(&self, [e, h, i]: [usize; 3], order: Order, out: &mut Vec<Single>) -> Result<(), ModelError> {
        for (leaf, width) in [(2, 2 * i), (3, h)] {
            let Some(info) = self.get(leaf) else { continue };
            if info.shape != [e, width] {
                return Err(self.wrong_shape(leaf, &format!("[{e}, {width}], as the weights beside it have outputs")));
            }
            for expert in 0..e {
                if leaf == 3 {
                    out.push(self.single(3, expert, "down_proj.bias", expert * h, (1, h), (h, 1))?);
                    continue;
                }
                for (half, name) in ["gate_proj.bias", "up_proj.bias"].into_iter().enumerate() {
                    let (first, stride) = if order == Order::Turns { (half, 2) } else { (half * i, 1) };
                    let first = expert * 2 * i + first;
                    out.push(self.single(2, expert, name, first, (1, i), (i, stride))?);
                }
            }
        }
        Ok(())
    }

    /// Weights in MXFP4; returns E, H and I.
    fn codes(&self, order: Order, out: &mut Vec<Single>) -> Result<[usize; 3], ModelError> {
        let mut sizes = [[0; 3]; 2];
        for (half, size) in sizes.iter_mut().enumerate() {
            let (blocks, scales) = (self.need(4 + half)?, self.need(6 + half)?);
            *size = match *blocks.shape.as_slice() {
                [e, n, g, bytes] if e * n * g > 0 && bytes == GROUP.1 => [e, n, g],
                _ => return Err(self.wrong_shape(4 + half, "[E, outputs, inputs / 32, 16], none of them 0")),
            };
            if scales.shape != *size {
                return Err(self.wrong_shape(6 + half, &format!("{size:?}, one for every 16 bytes of codes")));
            }
            for (leaf, info) in [(4 + half, blocks), (6 + half, scales)] {
                if info.dtype != Dtype::U8 {
                    return Err(self.wrong(leaf, format!("has dtype {}", info.dtype), "U8".to_owned()));
                }
            }
        }
        let [[e, gate_up, of_h], [experts, h, of_i]] = sizes;
        // In range: the blocks beside them hold more bytes.
        let (inputs, i) = (of_h * GROUP.0, of_i * GROUP.0);
        if e != experts || gate_up != 2 * i || inputs != h {
            let wanted = format!("{e} experts of [{inputs}, {}]: 32 inputs to a group", gate_up / 2);
            return Err(self.wrong_shape(5, &wanted));
        }
        self.believe(4, e)?;
        for expert in 0..e {
            // Per row: bytes of codes and of scales.
            for (leaf, suffix, row) in [(4, ".weight", of_h * GROUP.1), (6, ".weight_scale", of_h)] {
                for (half, name) in ["gate_proj", "up_proj"].into_iter().enumerate() {
                    let (first, stride) = if order == Order::Turns { (half, 2) } else { (half * i, 1) };
                    let first = (expert * 2 * i + first) * row;
                    out.push(self.single(
                        leaf,
                        expert,
                        &format!("{name}{suffix}"),
                        first,
                        (i, row),
                        (stride * row, 1),
                    )?);
                }
            }
            for (leaf, name, row) in [(5, "down_proj.weight", of_i * GROUP.1), (7, "down_proj.weight_scale", of_i)] {
                out.push(self.single(leaf, expert, name, expert * h * row, (h, row), (row, 1))?);
            }
        }
        Ok([e, h, i])
    }

    /// One tensor of one expert: `size` units of the fused tensor, from unit `first` on. A unit is an element, of codes
    /// a byte.
    fn single(
        &self,
        leaf: usize,
        expert: usize,
        name: &str,
        first: usize,
        size: (usize, usize),
        strides: (usize, usize),
    ) -> Result<Single, ModelError> {
        let fused = self.need(leaf)?;
        let (unit, dtype, shape) = match leaf {
            // Two codes to a byte.
            4 | 5 => (1, Dtype::F4, vec![size.0, 2 * size.1]),
            6 | 7 => (1, Dtype::F8_E8M0, vec![size.0, size.1]),
            _ => {
                let wrong = || self.wrong(leaf, format!("has dtype {}", fused.dtype), "BF16, F16 or F32".to_owned());
                let shape = if leaf < 2 { vec![size.0, size.1] } else { vec![size.1] };
                (float_bytes(fused.dtype).ok_or_else(wrong)?, fused.dtype, shape)
            }
        };
        // Never: `first`, `size` and `strides` follow from the shape.
        let outside = || self.wrong_shape(leaf, "one that its data has room for");
        let place = fused.place.part(unit, first, size, strides).ok_or_else(outside)?;
        let name = format!("{}.{expert}.{name}", self.module);
        Ok((
            expert,
            TensorInfo { name, dtype, shape, bytes: place.bytes() as u64, shard: fused.shard, place, fused: true },
        ))
    }
}
