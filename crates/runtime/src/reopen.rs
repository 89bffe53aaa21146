//! A quantized checkpoint read back from disk.

use std::borrow::Cow;
use std::path::Path;

use lite_decoder::{CheckpointSource, DecoderError, WeightSource};
use lite_model::Checkpoint;
use lite_pack::{Layout, ParsedConfig, TensorRef, Unpacked, detect};

use crate::RuntimeError;

/// A checkpoint whose config declares a layout we can unpack.
#[derive(Debug)]
pub struct QuantizedCheckpoint {
    checkpoint: Checkpoint,
    layout: &'static dyn Layout,
    config: ParsedConfig,
}

impl QuantizedCheckpoint {
    /// Opens a folder and finds its layout in `config.json`.
    ///
    /// # Errors
    /// Broken files, an unknown layout, or no quantization at all.
    pub fn open(dir: &Path) -> Result<Self, RuntimeError> {
        let checkpoint = Checkpoint::open(dir)?;
        let (layout, config) = detect(checkpoint.config())?.ok_or(RuntimeError::NotQuantized)?;
        Ok(Self { checkpoint, layout, config })
    }

    /// The files.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// The layout that the config names.
    pub fn layout(&self) -> &'static dyn Layout {
        self.layout
    }

    /// What the config says of the scheme.
    pub fn config(&self) -> &ParsedConfig {
        &self.config
    }

    /// Whether `module` is stored packed.
    pub fn is_packed(&self, module: &str) -> bool {
        let has = |suffix: &&str| {
            *suffix != "bias" && *suffix != "weight" && self.checkpoint.info(&format!("{module}.{suffix}")).is_some()
        };
        self.layout.suffixes().iter().any(has)
    }

    /// Unpacks `module`, whose weight is `[n, k]`.
    ///
    /// # Errors
    /// Tensors that are missing, of the wrong type or shape, or hold values out of range.
    pub fn linear(&self, module: &str, n: usize, k: usize) -> Result<Unpacked, RuntimeError> {
        let get = |suffix: &str| {
            let view = self.checkpoint.tensor(&format!("{module}.{suffix}")).ok()?;
            // What layouts write lies in one piece.
            let Cow::Borrowed(data) = view.data else { return None };
            Some(TensorRef { dtype: view.dtype, shape: view.shape, data })
        };
        self.layout
            .unpack(self.config.scheme_of(module), n, k, &get)
            .map_err(|source| RuntimeError::Linear { module: module.to_owned(), source })
    }
}

/// The weights of a [`QuantizedCheckpoint`], dequantized as they are asked for.
///
/// `shape_of` gives `[N, K]` of a packed linear's `<module>.weight`.
pub struct QuantizedSource<'a> {
    quantized: &'a QuantizedCheckpoint,
    plain: CheckpointSource<'a>,
    shape_of: &'a dyn Fn(&str) -> Option<(usize, usize)>,
}

impl std::fmt::Debug for QuantizedSource<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QuantizedSource").field("layout", &self.quantized.layout.name()).finish_non_exhaustive()
    }
}

impl<'a> QuantizedSource<'a> {
    /// A source over `quantized`.
    pub fn new(quantized: &'a QuantizedCheckpoint, shape_of: &'a dyn Fn(&str) -> Option<(usize, usize)>) -> Self {
        Self { quantized, plain: CheckpointSource::new(&quantized.checkpoint), shape_of }
    }

    fn packed<'n>(&self, name: &'n str) -> Option<&'n str> {
        let module = name.strip_suffix(".weight")?;
        self.quantized.is_packed(module).then_some(module)
    }
}

impl WeightSource for QuantizedSource<'_> {
    fn release(&self, names: &[String]) {
        for name in names {
            match self.packed(name) {
                Some(module) => {
                    let parts: Vec<String> =
                        self.quantized.layout.suffixes().iter().map(|suffix| format!("{module}.{suffix}")).collect();
                    self.plain.release(&parts);
                }
                None => self.plain.release(std::slice::from_ref(name)),
            }
        }
    }

    fn load(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), DecoderError> {
        let Some(module) = self.packed(name) else { return self.plain.load(name) };
        let Some((n, k)) = (self.shape_of)(module) else {
            return Err(unreadable(name, "is stored packed, but the decoder has no such linear"));
        };
        let linear = self.quantized.linear(module, n, k).map_err(|error| unreadable(name, error))?;
        Ok((vec![n, k], linear.weights.dequantize()))
    }

    fn contains(&self, name: &str) -> bool {
        self.packed(name).is_some() || self.plain.contains(name)
    }

    fn rows(&self, name: &str, rows: &[u32]) -> Result<Vec<f32>, DecoderError> {
        self.plain.rows(name, rows)
    }
}

/// A failure of `tensor`, for the decoder.
fn unreadable(tensor: &str, reason: impl ToString) -> DecoderError {
    DecoderError::Tensor { tensor: lite_model::printable(tensor).to_string(), reason: reason.to_string() }
}
