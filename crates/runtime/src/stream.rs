//! The two ends of the model and what runs between them: embedding, blocks, and the head in slices of the vocabulary.

use candle_core::{Device, Tensor};
use lite_decoder::{
    Block, Compute, DecoderError, DecoderSpec, Embedding, FinalNorm, KvTransform, NoTap, Rope, WeightSource,
    with_cpu_slice,
};
use lite_linalg::{Mat, Threads, gemm};
use rayon::prelude::*;

use crate::compare::CompareProgress;
use crate::divergence::Sums;
use crate::{Divergence, Engine, RuntimeError, TokenScore};

/// Entries of the vocabulary whose logits are computed together.
const SLICE: usize = 8192;

/// Tokens whose logits are computed together.
const TOKENS: usize = 512;

/// A model to run.
#[derive(Clone, Copy)]
pub struct Subject<'a> {
    /// What messages call it: "original", "quantized", "evaluated".
    pub name: &'static str,
    /// The decoder.
    pub spec: &'a DecoderSpec,
    /// Its weights.
    pub source: &'a dyn WeightSource,
    /// What its cache makes of keys and values; `None`: they stay f32.
    pub kv: Option<&'a dyn KvTransform>,
    /// What engines do with its activations and, unless `kv` is given, with its cache.
    pub engine: Option<&'a Engine>,
}

impl std::fmt::Debug for Subject<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Subject").field("name", &self.name).field("kv", &self.kv.is_some()).finish_non_exhaustive()
    }
}

impl Subject<'_> {
    /// Reads block `index`, and lets go of the mapped pages it came from: they would make memory grow with depth.
    pub(crate) fn block(&self, index: usize, compute: &Compute) -> Result<Block, RuntimeError> {
        let block = Block::load(self.spec, index, self.source, compute)?;
        let names: Vec<String> =
            self.spec.tensors().into_iter().filter(|t| t.block == Some(index)).map(|t| t.name).collect();
        self.source.release(&names);
        Ok(block)
    }

    /// How activations go through its blocks.
    pub(crate) fn way(&self) -> Way<'_> {
        Way { hidden: self.spec.hidden, kv: self.kv, engine: self.engine }
    }

    /// [`Way::run`].
    pub(crate) fn run(&self, block: &Block, rope: &Rope, values: &[f32]) -> Result<Vec<f32>, RuntimeError> {
        self.way().run(block, rope, values)
    }
}

/// How activations go through the blocks of a [`Subject`]; unlike its weights, threads can share it.
#[derive(Clone, Copy)]
pub(crate) struct Way<'a> {
    hidden: usize,
    kv: Option<&'a dyn KvTransform>,
    engine: Option<&'a Engine>,
}

impl Way<'_> {
    /// `values` `(windows, rope.tokens(), hidden)` through a block of the model.
    pub(crate) fn run(&self, block: &Block, rope: &Rope, values: &[f32]) -> Result<Vec<f32>, RuntimeError> {
        let windows = values.len() / (rope.tokens() * self.hidden).max(1);
        let x = Tensor::from_slice(values, (windows, rope.tokens(), self.hidden), block.device());
        let x = x.map_err(DecoderError::from)?;
        let cache = || self.engine.and_then(|engine| engine.cache(block.spec().index)).map(|scales| scales as _);
        let kv = self.kv.or_else(cache);
        let y = match (self.engine.filter(|engine| engine.quantizes_activations()), kv) {
            (None, None) => block.forward(&x, rope, &mut NoTap)?,
            (None, Some(kv)) => block.forward_through(&x, rope, kv)?,
            (Some(engine), kv) => block.forward_as_engine(&x, rope, Some(engine), kv)?,
        };
        Ok(with_cpu_slice(&y, <[f32]>::to_vec)?)
    }
}

/// Hidden states of one window after the embedding, `(tokens, hidden)` row-major. Only the rows of the table
/// that occur are read.
///
/// # Errors
/// A table that cannot be read, or ids outside of it.
pub fn embed(spec: &DecoderSpec, source: &dyn WeightSource, window: &[u32]) -> Result<Vec<f32>, DecoderError> {
    let windows = [window.to_vec()];
    let embedding = Embedding::load_rows(spec, source, &windows, &Device::Cpu)?;
    with_cpu_slice(&embedding.embed(&windows)?, <[f32]>::to_vec)
}

/// Windows of one length on their way through the blocks.
#[derive(Debug)]
pub(crate) struct Batch {
    tokens: usize,
    /// `(windows, tokens, hidden)`
    pub(crate) hidden: Vec<f32>,
}

impl Batch {
    /// Embeds windows, all of one length.
    pub(crate) fn embed(subject: &Subject<'_>, windows: &[Vec<u32>]) -> Result<Self, RuntimeError> {
        let tokens = windows.first().map_or(0, Vec::len);
        let mut hidden = Vec::with_capacity(windows.len() * tokens * subject.spec.hidden);
        for window in windows {
            hidden.extend(embed(subject.spec, subject.source, window)?);
        }
        Ok(Self { tokens, hidden })
    }
}

/// Runs `batches` through all blocks of one model, one block in memory at a time.
pub(crate) fn run_blocks(
    subject: &Subject<'_>,
    batches: &mut [Batch],
    compute: &Compute,
    progress: CompareProgress<'_>,
) -> Result<(), RuntimeError> {
    let blocks = subject.spec.blocks.len();
    for index in 0..blocks {
        if !progress("layers", index, blocks) {
            return Err(RuntimeError::Interrupted);
        }
        let block = subject.block(index, compute)?;
        let mut rope: Option<Rope> = None;
        for batch in &mut *batches {
            // Neighbouring batches mostly share a length.
            let rope = match rope.take().filter(|rope| rope.tokens() == batch.tokens) {
                Some(same) => rope.insert(same),
                None => rope.insert(Rope::new(subject.spec, batch.tokens, compute.device())?),
            };
            batch.hidden = subject.run(&block, rope, &batch.hidden)?;
            if !batch.hidden.par_iter().all(|v| v.is_finite()) {
                return Err(RuntimeError::NotFinite { block: index, which: subject.name });
            }
        }
    }
    Ok(())
}

/// The end of a model: final norm and head, in slices of the vocabulary.
struct Output<'a> {
    subject: &'a Subject<'a>,
    compute: &'a Compute,
    norm: FinalNorm,
    /// `[vocab]`
    bias: Option<Vec<f32>>,
}

/// The head's rows of some vocabulary entries.
struct Slice {
    first: usize,
    len: usize,
    /// `(len, hidden)`
    weight: SliceWeight,
}

/// Where the head's rows are multiplied.
enum SliceWeight {
    Host(Vec<f32>),
    Device(Tensor),
}

impl<'a> Output<'a> {
    fn load(subject: &'a Subject<'a>, compute: &'a Compute) -> Result<Self, RuntimeError> {
        let spec = subject.spec;
        let norm = FinalNorm::load(spec, subject.source, compute)?;
        let bias = spec.head.bias.as_ref().map(|name| subject.source.load(name).map(|(_, bias)| bias)).transpose()?;
        if let Some((name, bias)) = spec.head.bias.as_ref().zip(bias.as_ref())
            && bias.len() != spec.vocab
        {
            let reason = format!("has {} values, wanted {}", bias.len(), spec.vocab);
            return Err(DecoderError::Tensor { tensor: name.clone(), reason }.into());
        }
        Ok(Self { subject, compute, norm, bias })
    }

    fn slices(&self) -> usize {
        self.subject.spec.vocab.div_ceil(SLICE)
    }

    fn slice(&self, index: usize) -> Result<Slice, RuntimeError> {
        let spec = self.subject.spec;
        let first = index * SLICE;
        let ids: Vec<u32> = (first..(first + SLICE).min(spec.vocab)).map(|id| id as u32).collect();
        let mut weight = self.subject.source.rows(&spec.head.weight, &ids)?;
        spec.head.prepare(&mut weight, spec.hidden);
        self.subject.source.release(std::slice::from_ref(&spec.head.weight));
        let len = ids.len();
        let weight = if self.compute.is_composed() {
            let weight = Tensor::from_vec(weight, (len, spec.hidden), self.compute.device());
            SliceWeight::Device(weight.map_err(DecoderError::from)?)
        } else {
            SliceWeight::Host(weight)
        };
        Ok(Slice { first, len, weight })
    }

    /// Logits `(rows, slice.len)` of hidden states `(rows, hidden)`, on the host. The norm is applied anew for each slice: cheap
    /// beside the head, and no second copy of all hidden states.
    fn logits(&self, hidden: &[f32], slice: &Slice) -> Result<Vec<f32>, RuntimeError> {
        let width = self.subject.spec.hidden;
        let rows = hidden.len() / width.max(1);
        let x = Tensor::from_slice(hidden, (rows, width), self.compute.device()).map_err(DecoderError::from)?;
        let normed = self.norm.forward(&x)?;
        let mut logits = match &slice.weight {
            SliceWeight::Host(weight) => {
                let normed = with_cpu_slice(&normed, <[f32]>::to_vec)?;
                let weight = Mat::new(weight, slice.len, width);
                gemm(Mat::new(&normed, rows, width), weight.t(), Threads::All)
            }
            SliceWeight::Device(weight) => {
                let product = || normed.matmul(&weight.t()?);
                with_cpu_slice(&product().map_err(DecoderError::from)?, <[f32]>::to_vec)?
            }
        };
        if let Some(bias) = &self.bias {
            let bias = &bias[slice.first..][..slice.len];
            for row in logits.chunks_mut(slice.len) {
                row.iter_mut().zip(bias).for_each(|(logit, bias)| *logit += bias);
            }
        }
        self.subject.spec.head.finish(&mut logits);
        Ok(logits)
    }
}

/// Compares the two models' next-token distributions at every position.
pub(crate) fn score(
    original: &Subject<'_>,
    quantized: &Subject<'_>,
    windows: &[Vec<u32>],
    float: &[f32],
    coded: &[f32],
    compute: &Compute,
    progress: CompareProgress<'_>,
) -> Result<Vec<TokenScore>, RuntimeError> {
    let (first, second) = (Output::load(original, compute)?, Output::load(quantized, compute)?);
    let targets = windows.iter().flat_map(|w| w.iter().skip(1).map(|&t| Some(t)).chain([None]));
    let mut tokens: Vec<Divergence> = targets.map(Divergence::new).collect();
    let slices = first.slices();
    for index in 0..slices {
        if !progress("head", index, slices) {
            return Err(RuntimeError::Interrupted);
        }
        let (slice, coded_slice) = (first.slice(index)?, second.slice(index)?);
        let h = original.spec.hidden;
        for (chunk, tokens) in tokens.chunks_mut(TOKENS).enumerate() {
            let rows = chunk * TOKENS * h..(chunk * TOKENS + tokens.len()) * h;
            let l = first.logits(&float[rows.clone()], &slice)?;
            let m = second.logits(&coded[rows], &coded_slice)?;
            let rows = l.par_chunks(slice.len).zip(m.par_chunks(slice.len));
            tokens.par_iter_mut().zip(rows).for_each(|(token, (l, m))| token.update(slice.first as u32, l, m));
        }
    }
    let scores: Vec<TokenScore> = tokens.iter().map(Divergence::finish).collect();
    for score in &scores {
        let (a, b) = score.nll.unwrap_or((0.0, 0.0));
        if !a.is_finite() {
            return Err(RuntimeError::LogitsNotFinite { which: original.name });
        }
        if !(b + score.kl).is_finite() {
            return Err(RuntimeError::LogitsNotFinite { which: quantized.name });
        }
    }
    Ok(scores)
}

/// Log-probability of `targets[i].1` after the hidden state `row_of(targets[i].0)`.
pub(crate) fn log_probs<'h>(
    subject: &Subject<'_>,
    row_of: &dyn Fn(usize) -> &'h [f32],
    targets: &[(usize, u32)],
    compute: &Compute,
    progress: CompareProgress<'_>,
) -> Result<Vec<f64>, RuntimeError> {
    let output = Output::load(subject, compute)?;
    let mut tokens = vec![Sums::EMPTY; targets.len()];
    let (slices, width) = (output.slices(), subject.spec.hidden);
    let mut gathered = Vec::with_capacity(TOKENS * width);
    for index in 0..slices {
        if !progress("head", index, slices) {
            return Err(RuntimeError::Interrupted);
        }
        let slice = output.slice(index)?;
        for (targets, tokens) in targets.chunks(TOKENS).zip(tokens.chunks_mut(TOKENS)) {
            gathered.clear();
            for &(row, _) in targets {
                gathered.extend_from_slice(row_of(row));
            }
            let logits = output.logits(&gathered, &slice)?;
            let rows = targets.par_iter().zip(logits.par_chunks(slice.len));
            tokens.par_iter_mut().zip(rows).for_each(|(sums, (&(_, target), logits))| {
                sums.update(slice.first as u32, logits, Some(target));
            });
        }
    }
    let found: Vec<f64> = tokens.iter().map(|sums| sums.log_prob()).collect();
    if found.iter().any(|p| !p.is_finite()) {
        return Err(RuntimeError::LogitsNotFinite { which: subject.name });
    }
    Ok(found)
}
