//! Everything that solving one block decided, as a file: enough to write the block's tensors again, and to put the
//! quantized block in the place of the float one, without statistics and without solving.
//!
//! A record is a safetensors file. `fold.I` are the scales of the block's fold `I` (`[K]`), `edit.TENSOR` a norm weight
//! or bias as it was written, `cache.TENSOR` the bytes of a cache scale; of each quantized linear there are
//! `MODULE.codes` (`[N·K]`, or `.codes4`: two codes a byte, the earlier one in the low half), `.scales`, `.zeros` or
//! `.global`, `.error` if it is known, `.tokens` of experts, and `.input_scale` with `.input_zero` for a static activation scheme.
//! What a //! solver fell back to is in the metadata, by module.

use std::collections::{BTreeMap, HashMap};

use lite_quant::floats::FloatLinear;
use lite_quant::{InputQuantization, QuantizedLinear, WeightScheme, Weights};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::check::Outcome;
use crate::fold::Edit;
use crate::layer::Folded;
use crate::{JobError, Plan, QuantSite};

/// Decisions of a block, gathered while it is solved.
#[derive(Debug, Default)]
pub(crate) struct Record {
    tensors: BTreeMap<String, (Dtype, Vec<u8>)>,
    fallbacks: HashMap<String, String>,
}

/// A quantized linear as it was solved.
#[derive(Debug)]
pub(crate) struct RecordedLinear<'p> {
    pub(crate) site: &'p QuantSite,
    pub(crate) weights: Weights,
    pub(crate) input: Option<InputQuantization>,
    pub(crate) outcome: Outcome,
}

/// A record, read and held against the plan.
#[derive(Debug)]
pub(crate) struct Recorded<'p> {
    /// The scales of each fold of the plan; none if the method folded nothing.
    pub(crate) folds: Vec<Vec<f32>>,
    pub(crate) edits: Vec<Edit>,
    /// Tensors of the cache's scales, with their bytes.
    pub(crate) cache: Vec<(String, Vec<u8>)>,
    /// In the order of the plan.
    pub(crate) linears: Vec<RecordedLinear<'p>>,
}

impl Record {
    fn put(&mut self, name: String, dtype: Dtype, data: Vec<u8>) {
        self.tensors.insert(name, (dtype, data));
    }

    fn put_f32(&mut self, name: String, values: &[f32]) {
        self.put(name, Dtype::F32, values.iter().flat_map(|v| v.to_le_bytes()).collect());
    }

    /// Notes what was folded.
    pub(crate) fn folded(&mut self, folded: &Folded) {
        for (i, scales) in folded.found.iter().enumerate() {
            self.put_f32(format!("fold.{i}"), scales);
        }
        for edit in &folded.edits {
            self.put_f32(format!("edit.{}", edit.tensor), &edit.values);
        }
    }

    /// Notes a cache scale.
    pub(crate) fn cache(&mut self, tensor: &str, data: &[u8]) {
        self.put(format!("cache.{tensor}"), Dtype::U8, data.to_vec());
    }

    /// Notes a solved linear.
    pub(crate) fn linear(
        &mut self,
        module: &str,
        weights: &Weights,
        input: Option<&InputQuantization>,
        outcome: &Outcome,
    ) {
        let (codes, scales) = match weights {
            Weights::Int(linear) => {
                self.put(format!("{module}.zeros"), Dtype::U8, linear.zeros.clone());
                (&linear.codes, &linear.scales)
            }
            Weights::Float(linear) => {
                let global = linear.global_scale.to_le_bytes().to_vec();
                self.put(format!("{module}.global"), Dtype::F64, global);
                (&linear.codes, &linear.scales)
            }
        };
        if codes.iter().all(|code| *code < 16) {
            let pairs = codes.chunks(2).map(|pair| pair[0] | pair.get(1).map_or(0, |high| high << 4)).collect();
            self.put(format!("{module}.codes4"), Dtype::U8, pairs);
        } else {
            self.put(format!("{module}.codes"), Dtype::U8, codes.clone());
        }
        self.put_f32(format!("{module}.scales"), scales);
        if let Some(input) = input {
            self.put_f32(format!("{module}.input_scale"), &[input.scale]);
            self.put(format!("{module}.input_zero"), Dtype::I32, input.zero_point.to_le_bytes().to_vec());
        }
        if let Some(error) = outcome.error {
            self.put(format!("{module}.error"), Dtype::F64, error.to_le_bytes().to_vec());
        }
        if let Some(tokens) = outcome.tokens {
            self.put(format!("{module}.tokens"), Dtype::U64, tokens.to_le_bytes().to_vec());
        }
        if let Some(fallback) = &outcome.fallback {
            self.fallbacks.insert(module.to_owned(), fallback.clone());
        }
    }

    /// The bytes of the file.
    ///
    /// # Errors
    /// [`JobError::State`] if they cannot be laid out, which no plan leads to.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, JobError> {
        let failed = |error: safetensors::SafeTensorError| JobError::State(format!("a block's record: {error}"));
        let mut views = Vec::with_capacity(self.tensors.len());
        for (name, (dtype, data)) in &self.tensors {
            let shape = vec![data.len() / (dtype.bitsize() / 8)];
            views.push((name.as_str(), TensorView::new(*dtype, shape, data).map_err(failed)?));
        }
        safetensors::serialize(views, Some(self.fallbacks.clone())).map_err(failed)
    }
}

/// Reads the record of block `index`.
///
/// # Errors
/// [`JobError::State`] naming what is missing or has another size than the plan asks for.
pub(crate) fn decode<'p>(bytes: &[u8], index: usize, plan: &'p Plan) -> Result<Recorded<'p>, JobError> {
    let broken = |what: String| JobError::State(format!("the record of block {index}: {what}"));
    let file = SafeTensors::deserialize(bytes).map_err(|error| broken(error.to_string()))?;
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|error| broken(error.to_string()))?;
    let fallbacks = header.metadata().clone().unwrap_or_default();
    let reader = Reader { file, broken: &broken };
    let mut folds = Vec::new();
    for (i, fold) in plan.folds.get(index).into_iter().flatten().enumerate() {
        let Some(scales) = reader.floats(&format!("fold.{i}"))? else { continue };
        let width = fold.consumers.first().and_then(|id| plan.sites.iter().find(|s| s.site == Some(*id)));
        if folds.len() != i || width.is_none_or(|site| site.in_features != scales.len()) {
            return Err(broken(format!("fold {i} has {} scales, which fit no input of the block", scales.len())));
        }
        folds.push(scales);
    }
    if !folds.is_empty() && folds.len() != plan.folds[index].len() {
        return Err(broken(format!("it has {} folds of {}", folds.len(), plan.folds[index].len())));
    }
    let (mut edits, mut cache) = (Vec::new(), Vec::new());
    let mut names = reader.file.names();
    names.sort_unstable();
    for name in names {
        if let Some(tensor) = name.strip_prefix("edit.") {
            let values = reader.floats(name)?.unwrap_or_default();
            edits.push(Edit { tensor: tensor.to_owned(), values });
        } else if let Some(tensor) = name.strip_prefix("cache.") {
            cache.push((tensor.to_owned(), reader.bytes(name, Dtype::U8)?.unwrap_or_default().to_vec()));
        }
    }
    let linears = plan.sites.iter().filter(|site| site.block == index).map(|site| {
        let fallback = fallbacks.get(&site.module).cloned();
        reader.linear(site, fallback)
    });
    Ok(Recorded { folds, edits, cache, linears: linears.collect::<Result<_, _>>()? })
}

struct Reader<'a> {
    file: SafeTensors<'a>,
    broken: &'a dyn Fn(String) -> JobError,
}

impl Reader<'_> {
    fn bytes(&self, name: &str, dtype: Dtype) -> Result<Option<&[u8]>, JobError> {
        let Ok(view) = self.file.tensor(name) else { return Ok(None) };
        if view.dtype() != dtype {
            return Err((self.broken)(format!("`{name}` is {:?}, not {dtype:?}", view.dtype())));
        }
        Ok(Some(view.data()))
    }

    fn floats(&self, name: &str) -> Result<Option<Vec<f32>>, JobError> {
        let values = |bytes: &[u8]| -> Vec<f32> {
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        };
        Ok(self.bytes(name, Dtype::F32)?.map(values))
    }

    fn one<const B: usize>(&self, name: &str, dtype: Dtype) -> Result<Option<[u8; B]>, JobError> {
        let Some(bytes) = self.bytes(name, dtype)? else { return Ok(None) };
        let one = bytes.try_into().map_err(|_| (self.broken)(format!("`{name}` is not one value")))?;
        Ok(Some(one))
    }

    fn codes(&self, site: &QuantSite) -> Result<Option<Vec<u8>>, JobError> {
        if let Some(codes) = self.bytes(&format!("{}.codes", site.module), Dtype::U8)? {
            return Ok(Some(codes.to_vec()));
        }
        let Some(pairs) = self.bytes(&format!("{}.codes4", site.module), Dtype::U8)? else { return Ok(None) };
        let count = site.out_features.saturating_mul(site.in_features);
        if pairs.len() != count.div_ceil(2) {
            return Err((self.broken)(format!("`{}` has {} pairs of codes for {count}", site.module, pairs.len())));
        }
        let mut codes: Vec<u8> = pairs.iter().flat_map(|pair| [pair & 15, pair >> 4]).collect();
        codes.truncate(count);
        Ok(Some(codes))
    }

    fn linear<'p>(&self, site: &'p QuantSite, fallback: Option<String>) -> Result<RecordedLinear<'p>, JobError> {
        let module = &site.module;
        let missing = |what: &str| (self.broken)(format!("`{module}` has no {what}"));
        let codes = self.codes(site)?.ok_or_else(|| missing("codes"))?;
        let scales = self.floats(&format!("{module}.scales"))?.ok_or_else(|| missing("scales"))?;
        let (out_features, in_features) = (site.out_features, site.in_features);
        let (weights, sound) = match site.scheme.weights {
            WeightScheme::Int(scheme) => {
                let zeros = self.bytes(&format!("{module}.zeros"), Dtype::U8)?.ok_or_else(|| missing("zero points"))?;
                let zeros = zeros.to_vec();
                let linear = QuantizedLinear { scheme, out_features, in_features, codes, scales, zeros };
                let sound = linear.check();
                (Weights::Int(linear), sound)
            }
            WeightScheme::Float(scheme) => {
                let global =
                    self.one(&format!("{module}.global"), Dtype::F64)?.ok_or_else(|| missing("global scale"))?;
                let global_scale = f64::from_le_bytes(global);
                let linear = FloatLinear { scheme, out_features, in_features, codes, scales, global_scale };
                let sound = linear.check();
                (Weights::Float(linear), sound)
            }
        };
        sound.map_err(|error| (self.broken)(format!("`{module}`: {error}")))?;
        let scale = self.one(&format!("{module}.input_scale"), Dtype::F32)?.map(f32::from_le_bytes);
        let zero = self.one(&format!("{module}.input_zero"), Dtype::I32)?.map(i32::from_le_bytes);
        let input = scale.zip(zero).map(|(scale, zero_point)| InputQuantization { scale, zero_point });
        let error = self.one(&format!("{module}.error"), Dtype::F64)?.map(f64::from_le_bytes);
        let tokens = self.one(&format!("{module}.tokens"), Dtype::U64)?.map(u64::from_le_bytes);
        Ok(RecordedLinear { site, weights, input, outcome: Outcome { error, fallback, tokens } })
    }
}
