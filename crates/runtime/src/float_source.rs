//! Checkpoints whose weights are fp8 or MXFP4 codes, read as the values they stand for.

use lite_decoder::{CheckpointSource, DecoderError, WeightSource};
use lite_model::{Checkpoint, Dtype, TensorInfo, printable};
use lite_quant::ScaleDtype;
use lite_quant::floats::{FloatFormat, FloatLinear, FloatScheme, Grain, ScaleKind, e8m0};
use serde_json::{Map, Value};

use crate::RuntimeError;

/// What follows the name of a coded tensor in the name of its scales; both are multipliers (DeepSeek's `_inv` means
/// the inverse of the factor the weight was multiplied by).
const SCALES: [&str; 2] = ["_scale_inv", "_scale"];
/// Scales of a module's inputs or outputs, which mean nothing once its weight is no longer coded.
const ACTIVATION_SCALES: [&str; 4] = ["input_scale", "activation_scale", "input_scale_ub", "output_scale"];
/// Scales of an 8-bit key/value cache, in the attention module or its projections.
const CACHE_SCALES: [&str; 4] = ["k_scale", "v_scale", "kv_scale", "q_scale"];
/// Rows and columns of a block where the file does not say: DeepSeek's.
const USUAL_BLOCK: (usize, usize) = (128, 128);
/// Where wrapper models keep the config of their language model.
const INNER_CONFIGS: [&str; 3] = ["text_config", "llm_config", "language_config"];

/// A checkpoint as a source of weights: BF16, F16 and F32 as they are, fp8 and MXFP4 codes times their scales.
///
/// A tensor of dtype F8_E4M3 or F8_E5M2 is coded; its scales are the tensor `<name>_scale_inv` or `<name>_scale`. What
/// they cover follows from their shape: one value for the tensor, `[N]` or `[N, 1]` for output channels, `[N, K/g]` for
/// groups, else blocks of the size in the config (`weight_block_size`, or `block_structure` in compressed-tensors).
/// Reads what DeepSeek, transformers, AutoFP8, compressed-tensors and ModelOpt write. A tensor of dtype F4 is coded where
/// the config says `mxfp4`, as gpt-oss's does: two E2M1 codes to a byte, the lower half first (OCP Microscaling Formats
/// v1.0), and a power of two for every 32 inputs.
#[derive(Debug, Clone, Copy)]
pub struct FloatSource<'a> {
    checkpoint: &'a Checkpoint,
    plain: CheckpointSource<'a>,
    block: Option<(usize, usize)>,
    mxfp4: bool,
}

impl<'a> FloatSource<'a> {
    /// A source over `checkpoint`, which need not hold any codes.
    pub fn new(checkpoint: &'a Checkpoint) -> Self {
        let quantization = quantization(checkpoint.config());
        let method = quantization.and_then(|found| found.get("quant_method")?.as_str());
        Self {
            checkpoint,
            plain: CheckpointSource::new(checkpoint),
            block: quantization.and_then(block_size),
            mxfp4: method == Some("mxfp4"),
        }
    }

    /// Whether tensor `name` holds fp8 or MXFP4 codes.
    pub fn is_coded(&self, name: &str) -> bool {
        self.checkpoint.info(name).is_some_and(|info| self.format_of(info.dtype).is_some())
    }

    /// What the codes are called that it reads as values.
    pub fn kind_of_codes(&self) -> &'static str {
        if self.mxfp4 { "MXFP4" } else { "fp8" }
    }

    fn format_of(&self, dtype: Dtype) -> Option<FloatFormat> {
        match dtype {
            Dtype::F4 if self.mxfp4 => Some(FloatFormat::E2M1),
            other => format_of(other),
        }
    }

    /// Checks the headers of all coded tensors and their scales, and returns how many there are.
    ///
    /// # Errors
    /// [`RuntimeError::Codes`] naming the tensor: scales that are missing or do not fit, a coded tensor that is no
    /// matrix.
    pub fn check(&self) -> Result<usize, RuntimeError> {
        let mut coded = 0;
        for info in self.checkpoint.names().filter_map(|name| self.checkpoint.info(name)) {
            if self.format_of(info.dtype).is_some() {
                self.scheme(info)?;
                coded += 1;
            }
        }
        Ok(coded)
    }

    /// Why tensor `name` is not part of the weights: it only serves codes that are read as values.
    pub fn dropped(&self, name: &str) -> Option<&'static str> {
        if SCALES.iter().any(|suffix| name.strip_suffix(suffix).is_some_and(|base| self.is_coded(base))) {
            return Some(if self.mxfp4 {
                "scales of MXFP4 codes, which are read as the values they stand for"
            } else {
                "scales of fp8 codes, which are read as the values they stand for"
            });
        }
        let (module, leaf) = name.rsplit_once('.')?;
        if ACTIVATION_SCALES.contains(&leaf) && self.is_coded(&format!("{module}.weight")) {
            return Some("scales of the source's own quantization of activations");
        }
        let of_module = || {
            let projections = ["", ".q_proj", ".k_proj", ".v_proj"].iter();
            projections.clone().any(|own| self.is_coded(&format!("{module}{own}.weight")))
        };
        (CACHE_SCALES.contains(&leaf) && of_module()).then_some("scales of the source's own key/value cache")
    }

    /// Codes and scales of tensor `name`.
    ///
    /// # Errors
    /// [`RuntimeError::Codes`]: it is not coded, its scales are missing or do not fit, or a value is NaN or infinite.
    pub fn codes(&self, name: &str) -> Result<FloatLinear, RuntimeError> {
        let info = self.checkpoint.info(name).filter(|info| self.format_of(info.dtype).is_some());
        let info = info.ok_or_else(|| broken(name, "holds no fp8 or MXFP4 codes"))?;
        let (scheme, scales, [n, k]) = self.scheme(info)?;
        let view = self.checkpoint.tensor(&scales.name)?;
        let values = decode_scales(view.dtype, &view.data);
        let largest = f32::MAX / if scheme.format == FloatFormat::E2M1 { scheme.format.largest() } else { 1.0 };
        if let Some(bad) = values.iter().find(|value| !value.is_finite() || value.abs() > largest) {
            return Err(broken(&scales.name, format!("holds {bad}; the file is damaged: download it again")));
        }
        let data = self.checkpoint.tensor(name)?.data;
        let codes = match scheme.format {
            FloatFormat::E2M1 => data.iter().flat_map(|pair| [pair & 15, pair >> 4]).collect(),
            _ => data.into_owned(),
        };
        let special: [bool; 256] = std::array::from_fn(|code| !scheme.format.decode(code as u8).is_finite());
        let count = codes.iter().filter(|code| special[usize::from(**code)]).count();
        if count > 0 {
            let reason = format!("holds {count} codes that mean NaN or Inf; the file is damaged: download it again");
            return Err(broken(name, reason));
        }
        let linear = FloatLinear { scheme, out_features: n, in_features: k, codes, scales: values, global_scale: 1.0 };
        linear.check().map_err(|error| broken(name, error.to_string()))?;
        Ok(linear)
    }

    /// Values of tensor `name` in f32, row-major: as [`Checkpoint::tensor_f32`], and of coded tensors too.
    ///
    /// # Errors
    /// As [`FloatSource::codes`]; [`RuntimeError::Model`].
    pub fn tensor_f32(&self, name: &str) -> Result<Vec<f32>, RuntimeError> {
        if self.is_coded(name) { Ok(self.codes(name)?.dequantize()) } else { Ok(self.checkpoint.tensor_f32(name)?) }
    }

    /// How a coded tensor is coded, its scales, and `[N, K]`.
    fn scheme(&self, info: &TensorInfo) -> Result<(FloatScheme, &'a TensorInfo, [usize; 2]), RuntimeError> {
        let name = &info.name;
        let format = self.format_of(info.dtype).ok_or_else(|| broken(name, "holds no fp8 or MXFP4 codes"))?;
        let &[n, k] = info.shape.as_slice() else {
            let kind = self.kind_of_codes();
            let reason = format!("holds {kind} codes of shape {:?}; only matrices [N, K] are read", info.shape);
            return Err(broken(name, reason));
        };
        let mut found = SCALES.iter().filter_map(|suffix| self.checkpoint.info(&format!("{name}{suffix}")));
        let (scales, more) = (found.next(), found.next());
        let Some(scales) = scales else {
            let reason = format!(
                "holds {1} codes, but their scales, `{0}_scale_inv` or `{0}_scale`, are missing; the checkpoint is \
                 incomplete: download it again",
                printable(name),
                self.kind_of_codes()
            );
            return Err(broken(name, reason));
        };
        if let Some(more) = more {
            let reason =
                format!("has two tensors of scales, `{}` and `{}`", printable(&scales.name), printable(&more.name));
            return Err(broken(name, reason));
        }
        let scale = match scales.dtype {
            Dtype::F32 => ScaleKind::Float(ScaleDtype::F32),
            Dtype::BF16 => ScaleKind::Float(ScaleDtype::BF16),
            Dtype::F16 => ScaleKind::Float(ScaleDtype::F16),
            Dtype::U8 | Dtype::F8_E8M0 => ScaleKind::E8M0,
            other => return Err(broken(&scales.name, format!("has dtype {other:?}, wanted F32, BF16, F16 or E8M0"))),
        };
        let grain = self.grain(scales, n, k).ok_or_else(|| {
            let wanted = match self.block {
                Some((rows, columns)) => format!("blocks of {rows}×{columns}"),
                None => "blocks (`weight_block_size` in the config)".to_owned(),
            };
            let reason = format!(
                "has shape {:?}, which fits no way to scale a weight [{n}, {k}]: one value, one per output channel, \
                 groups, {wanted}",
                scales.shape
            );
            broken(&scales.name, reason)
        })?;
        Ok((FloatScheme { format, grain, scale }, scales, [n, k]))
    }

    fn grain(&self, scales: &TensorInfo, n: usize, k: usize) -> Option<Grain> {
        let (rows, columns) = match scales.shape.as_slice() {
            [] => (1, 1),
            &[rows] => (rows, 1),
            &[rows, columns] => (rows, columns),
            // ModelOpt's blocks.
            &[rows, 1, columns, 1] => (rows, columns),
            _ => return None,
        };
        let fits = |grain: Grain| grain.grid(n, k) == Ok((rows, columns));
        let block = |(rows, columns)| Grain::Block { rows, columns };
        let declared = self.block.map(block).filter(|grain| fits(*grain));
        let by_shape = || {
            let group = (columns > 1 && k.is_multiple_of(columns)).then(|| Grain::Group(k / columns));
            [Some(Grain::Tensor), Some(Grain::Channel), group].into_iter().flatten().find(|grain| fits(*grain))
        };
        let usual = || Some(block(USUAL_BLOCK)).filter(|grain| self.block.is_none() && fits(*grain));
        declared.or_else(by_shape).or_else(usual)
    }
}

impl WeightSource for FloatSource<'_> {
    fn load(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), DecoderError> {
        if !self.is_coded(name) {
            return self.plain.load(name);
        }
        let unreadable = |error: RuntimeError| DecoderError::Tensor {
            tensor: printable(name).to_string(),
            reason: match error {
                RuntimeError::Codes { tensor, reason } if tensor == name => reason,
                other => other.to_string(),
            },
        };
        let linear = self.codes(name).map_err(unreadable)?;
        Ok((vec![linear.out_features, linear.in_features], linear.dequantize()))
    }

    fn contains(&self, name: &str) -> bool {
        self.plain.contains(name)
    }

    fn release(&self, names: &[String]) {
        self.plain.release(names);
        for suffix in SCALES {
            self.plain.release(&names.iter().map(|name| format!("{name}{suffix}")).collect::<Vec<_>>());
        }
    }

    fn rows(&self, name: &str, rows: &[u32]) -> Result<Vec<f32>, DecoderError> {
        if !self.is_coded(name) {
            return self.plain.rows(name, rows);
        }
        let (shape, values) = self.load(name)?;
        let (height, width) = (shape[0], shape[1]);
        let mut out = Vec::with_capacity(rows.len().saturating_mul(width));
        for &row in rows {
            let found = (row as usize).checked_mul(width).and_then(|at| values.get(at..at.checked_add(width)?));
            out.extend_from_slice(found.ok_or_else(|| DecoderError::Tensor {
                tensor: printable(name).to_string(),
                reason: format!("has {height} rows, row {row} was wanted"),
            })?);
        }
        Ok(out)
    }
}

/// The fp8 type of a dtype.
pub(crate) fn format_of(dtype: Dtype) -> Option<FloatFormat> {
    match dtype {
        Dtype::F8_E4M3 => Some(FloatFormat::E4M3),
        Dtype::F8_E5M2 => Some(FloatFormat::E5M2),
        _ => None,
    }
}

fn decode_scales(dtype: Dtype, data: &[u8]) -> Vec<f32> {
    let pairs = || data.chunks_exact(2).map(|b| [b[0], b[1]]);
    match dtype {
        Dtype::F32 => data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::BF16 => pairs().map(|b| half::bf16::from_le_bytes(b).to_f32()).collect(),
        Dtype::F16 => pairs().map(|b| half::f16::from_le_bytes(b).to_f32()).collect(),
        _ => data.iter().map(|code| e8m0::decode(*code)).collect(),
    }
}

/// What the config says of the codes.
fn quantization(config: &Map<String, Value>) -> Option<&Map<String, Value>> {
    let inner = INNER_CONFIGS.iter().filter_map(|key| config.get(*key)?.as_object());
    std::iter::once(config).chain(inner).find_map(|c| c.get("quantization_config")?.as_object())
}

/// Rows and columns of a block, where the config says.
fn block_size(quantization: &Map<String, Value>) -> Option<(usize, usize)> {
    let pair = |value: &Value| {
        let [rows, columns] = value.as_array()?.as_slice() else { return None };
        let side = |value: &Value| usize::try_from(value.as_u64()?).ok().filter(|side| *side > 0);
        Some((side(rows)?, side(columns)?))
    };
    if let Some(block) = quantization.get("weight_block_size") {
        return pair(block);
    }
    let groups = quantization.get("config_groups")?.as_object()?;
    groups.values().find_map(|group| pair(group.get("weights")?.get("block_structure")?))
}

fn broken(tensor: &str, reason: impl Into<String>) -> RuntimeError {
    RuntimeError::Codes { tensor: tensor.to_owned(), reason: reason.into() }
}

#[cfg(test)]
#[path = "float_source_tests.rs"]
mod tests;
