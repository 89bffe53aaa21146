//! A checkpoint to judge, plain or quantized.

use std::path::Path;

use lite_decoder::{DecoderError, DecoderSpec, WeightSource};
use lite_model::{Checkpoint, Dtype};
use lite_pack::detect;
use lite_quant::{WeightScheme, Weights};

use crate::{Engine, FloatSource, QuantizedCheckpoint, QuantizedSource, RuntimeError};

/// A checkpoint folder that can be run: plain, of fp8 codes, or of a layout that can be unpacked.
#[derive(Debug)]
pub struct EvalModel {
    files: Files,
    spec: DecoderSpec,
    /// What its engine computes with besides the weights; nothing of a plain model.
    engine: Option<Engine>,
    /// A tied embedding stored under the head's name: (asked for, stored as).
    rename: Option<(String, String)>,
}

#[derive(Debug)]
enum Files {
    Plain(Checkpoint),
    Quantized(QuantizedCheckpoint),
}

impl EvalModel {
    /// Opens a folder, and checks that all tensors of its decoder are there.
    ///
    /// # Errors
    /// Broken files, an architecture or a quantization that is not known, tensors that are missing.
    pub fn open(dir: &Path) -> Result<Self, RuntimeError> {
        let checkpoint = Checkpoint::open(dir)?;
        let spec = DecoderSpec::of(&checkpoint)?;
        // A config that is understood says more than the tensors do: of activations, of the cache. Codes under one that
        // is not are still values.
        let files = match detect(checkpoint.config()) {
            Ok(Some(_)) => Files::Quantized(QuantizedCheckpoint::open(dir)?),
            Ok(None) => {
                FloatSource::new(&checkpoint).check()?;
                Files::Plain(checkpoint)
            }
            Err(error) => match FloatSource::new(&checkpoint).check()? {
                0 => return Err(error.into()),
                _ => Files::Plain(checkpoint),
            },
        };
        let mut model = Self { files, spec, engine: None, rename: None };
        model.rename = stored_embedding(model.checkpoint(), &model.spec);
        let packed_shape = |name: &str| {
            let Files::Quantized(quantized) = &model.files else { return None };
            let module = name.strip_suffix(".weight").filter(|module| quantized.is_packed(module))?;
            model.shape_of(module).map(|(n, k)| vec![n, k])
        };
        model.spec.check_tensors(&|name| {
            let stored = model.rename.as_ref().filter(|(asked, _)| asked == name).map_or(name, |(_, stored)| stored);
            packed_shape(name).or_else(|| model.checkpoint().info(stored).map(|info| info.shape.clone()))
        })?;
        if let Files::Quantized(quantized) = &model.files {
            model.engine = Some(Engine::of(quantized, &model.spec)?).filter(|engine| !engine.is_empty());
        }
        Ok(model)
    }

    /// What engines do with this checkpoint besides multiplying by its weights: quantized activations, a quantized
    /// cache. `None`: nothing.
    pub fn engine(&self) -> Option<&Engine> {
        self.engine.as_ref()
    }

    /// The files.
    pub fn checkpoint(&self) -> &Checkpoint {
        match &self.files {
            Files::Plain(checkpoint) => checkpoint,
            Files::Quantized(quantized) => quantized.checkpoint(),
        }
    }

    /// The decoder.
    pub fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    /// The codes of a linear `[n, k]`, or the values of a coded float one; `None`: it is stored plain.
    pub(crate) fn codes(&self, module: &str, n: usize, k: usize) -> Result<Option<Weights>, RuntimeError> {
        match &self.files {
            Files::Quantized(quantized) if quantized.is_packed(module) => {
                Ok(Some(quantized.linear(module, n, k)?.weights))
            }
            _ => Ok(None),
        }
    }

    /// How a linear's weight is packed; `None`: it is stored plain.
    pub(crate) fn scheme(&self, module: &str) -> Option<WeightScheme> {
        match &self.files {
            Files::Quantized(quantized) if quantized.is_packed(module) => {
                Some(quantized.config().scheme_of(module).weights)
            }
            _ => None,
        }
    }

    /// Type of the stored tensor that is read for `name`.
    pub(crate) fn dtype(&self, name: &str) -> Option<Dtype> {
        self.checkpoint().info(self.source().stored(name)).map(|info| info.dtype)
    }

    /// Name of the layout of packed weights; `None` of a plain checkpoint.
    pub fn layout(&self) -> Option<&'static str> {
        match &self.files {
            Files::Plain(_) => None,
            Files::Quantized(quantized) => Some(quantized.layout().name()),
        }
    }

    /// The weights, dequantized as they are asked for.
    pub fn source(&self) -> EvalSource<'_> {
        EvalSource { model: self }
    }

    /// `[N, K]` of a linear.
    fn shape_of(&self, module: &str) -> Option<(usize, usize)> {
        let site = self.spec.sites().find(|site| site.module == module);
        site.map(|site| (site.out_features, site.in_features))
            .or_else(|| (self.spec.head.module == module).then_some((self.spec.vocab, self.spec.hidden)))
    }
}

/// A tied checkpoint may hold only the head: then (embedding name, head name).
fn stored_embedding(checkpoint: &Checkpoint, spec: &DecoderSpec) -> Option<(String, String)> {
    let embed = &spec.embed.weight;
    let head = format!("{}.weight", spec.head.module);
    let physical = |name: &str| checkpoint.info(name).is_some() && !checkpoint.is_alias(name);
    (spec.head.tied && !physical(embed) && physical(&head)).then(|| (embed.clone(), head))
}

/// The weights of an [`EvalModel`].
#[derive(Debug, Clone, Copy)]
pub struct EvalSource<'a> {
    model: &'a EvalModel,
}

impl EvalSource<'_> {
    fn with<R>(&self, work: impl FnOnce(&dyn WeightSource) -> R) -> R {
        match &self.model.files {
            Files::Plain(checkpoint) => work(&FloatSource::new(checkpoint)),
            Files::Quantized(quantized) => {
                let shape_of = |module: &str| self.model.shape_of(module);
                work(&QuantizedSource::new(quantized, &shape_of))
            }
        }
    }

    fn stored<'n>(&'n self, name: &'n str) -> &'n str {
        match &self.model.rename {
            Some((asked, stored)) if asked == name => stored,
            _ => name,
        }
    }
}

impl WeightSource for EvalSource<'_> {
    fn release(&self, names: &[String]) {
        let stored: Vec<String> = names.iter().map(|name| self.stored(name).to_owned()).collect();
        self.with(|source| source.release(&stored));
    }

    fn load(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), DecoderError> {
        self.with(|source| source.load(self.stored(name)))
    }

    fn contains(&self, name: &str) -> bool {
        self.with(|source| source.contains(self.stored(name)))
    }

    fn rows(&self, name: &str, rows: &[u32]) -> Result<Vec<f32>, DecoderError> {
        let name = self.stored(name);
        let packed = match &self.model.files {
            Files::Plain(_) => false,
            Files::Quantized(quantized) => {
                name.strip_suffix(".weight").is_some_and(|module| quantized.is_packed(module))
            }
        };
        if !packed {
            return self.with(|source| source.rows(name, rows));
        }
        // A packed head: its shape was checked when it was unpacked.
        let (shape, values) = self.load(name)?;
        let width = shape.last().copied().unwrap_or(0);
        let mut out = Vec::with_capacity(rows.len().saturating_mul(width));
        for &row in rows {
            let at = row as usize * width;
            let found = values.get(at..at + width).ok_or_else(|| DecoderError::Tensor {
                tensor: name.to_owned(),
                reason: format!("has shape {shape:?}, row {row} was wanted"),
            })?;
            out.extend_from_slice(found);
        }
        Ok(out)
    }
}
