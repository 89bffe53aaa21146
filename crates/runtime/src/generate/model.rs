//! A checkpoint in memory.

use std::path::Path;

use lite_decoder::{
    AttnSpec, BlockSpec, DecoderError, DecoderSpec, GqaSpec, LATENT_ATTENTION, NormSpec, QkvLayout, Role, Stream,
    WeightSource,
};
use lite_kernels::Matrix;
use lite_quant::Weights;

use super::linear::Linear;
use super::mixture::Mixture;
use super::norm::Norm;
use super::stop;
use crate::eval::EvalModel;
use crate::{Engine, RuntimeError};

/// A model whose weights are all in memory, ready to generate.
///
/// Plain weights are kept in bf16, f16 or f32, whichever holds them exactly; packed linears keep their codes, in 4 bits
/// up to 4-bit schemes and in 8 above; fp8 and fp4 weights are kept as the values they stand for. Where the checkpoint tells
/// engines to quantize activations or the cache, both are rounded as [`Engine`] does, in f32.
#[derive(Debug)]
pub struct ResidentModel {
    pub(super) spec: DecoderSpec,
    /// `[vocab, hidden]`
    pub(super) embed: Matrix,
    pub(super) blocks: Vec<ResidentBlock>,
    pub(super) final_norm: Norm,
    /// `[vocab, hidden]`; `None`: the embedding.
    head: Option<Matrix>,
    pub(super) head_bias: Option<Vec<f32>>,
    stop: Vec<u32>,
    pub(super) engine: Option<Engine>,
}

/// One block's weights.
#[derive(Debug)]
pub(super) struct ResidentBlock {
    linears: Vec<(Role, Stream, Linear)>,
    pub(super) attn_norm: Option<Norm>,
    pub(super) attn_out_norm: Option<Norm>,
    pub(super) mlp_norm: Option<Norm>,
    pub(super) mlp_out_norm: Option<Norm>,
    pub(super) q_norm: Option<Norm>,
    pub(super) k_norm: Option<Norm>,
    /// `[heads]`
    pub(super) sinks: Option<Vec<f32>>,
    /// Where the feed-forward has experts.
    pub(super) mixture: Option<Mixture>,
}

/// The weight of a packed linear `[n, k]` by module name; `None`: it is not packed.
pub(super) type Packed<'a> = &'a dyn Fn(&str, usize, usize) -> Result<Option<Weights>, RuntimeError>;

impl ResidentModel {
    /// Reads a checkpoint folder, plain or packed, and the end tokens of its `generation_config.json` or `config.json`.
    ///
    /// # Errors
    /// Files that cannot be read, an unknown layout or architecture, tensors that are missing or do not fit.
    pub fn open(dir: &Path) -> Result<Self, RuntimeError> {
        Self::from_checkpoint(&EvalModel::open(dir)?)
    }

    /// Reads the weights of an opened checkpoint, and the end tokens as [`open`](Self::open) does.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_checkpoint(files: &EvalModel) -> Result<Self, RuntimeError> {
        let ends = stop::end_tokens(files.checkpoint().root(), files.checkpoint().config())?;
        let packed = |module: &str, n, k| files.codes(module, n, k);
        let model = Self::load(files.spec(), &files.source(), &packed)?;
        Ok(Self { engine: files.engine().cloned(), stop: ends, ..model })
    }

    /// Loads a model from weights as values: every matrix is kept as float. There are no end tokens; see
    /// [`with_stop_tokens`](Self::with_stop_tokens).
    ///
    /// # Errors
    /// Tensors that are missing or do not fit.
    pub fn from_source(spec: &DecoderSpec, source: &dyn WeightSource) -> Result<Self, RuntimeError> {
        Self::load(spec, source, &|_, _, _| Ok(None))
    }

    pub(super) fn load(spec: &DecoderSpec, source: &dyn WeightSource, packed: Packed) -> Result<Self, RuntimeError> {
        let loader = Loader { source, packed };
        let tensors = spec.tensors();
        let release = |block| {
            let names: Vec<String> = tensors.iter().filter(|t| t.block == block).map(|t| t.name.clone()).collect();
            source.release(&names);
        };
        let embed = loader.matrix(&spec.embed.weight, spec.vocab, spec.hidden)?;
        let head = (!spec.head.tied || spec.head.normalised).then(|| loader.head(spec)).transpose()?;
        let head_bias = spec.head.bias.as_ref().map(|name| loader.vector(name, spec.vocab)).transpose()?;
        let final_norm = loader.norm(&spec.final_norm, spec.hidden)?;
        release(None);
        let mut blocks = Vec::with_capacity(spec.blocks.len());
        for block in &spec.blocks {
            blocks.push(ResidentBlock::load(block, spec.hidden, &loader)?);
            release(Some(block.index));
        }
        Ok(Self { spec: spec.clone(), embed, blocks, final_norm, head, head_bias, stop: Vec::new(), engine: None })
    }

    /// The same model with activations and cache in f32, whatever the checkpoint tells engines to make of them.
    #[must_use]
    pub fn with_float_activations(mut self) -> Self {
        self.engine = None;
        self
    }

    /// What is made of activations and of the cache besides, as engines do for this checkpoint; `None`: nothing.
    pub fn engine(&self) -> Option<&Engine> {
        self.engine.as_ref()
    }

    /// The same model with these end tokens.
    #[must_use]
    pub fn with_stop_tokens(mut self, ids: Vec<u32>) -> Self {
        self.stop = ids;
        self
    }

    /// Tokens that end a text.
    pub fn stop_tokens(&self) -> &[u32] {
        &self.stop
    }

    /// The decoder.
    pub fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    /// Bytes of weights that decoding one token reads: all matrices but the embedding's other rows and the experts that
    /// the token does not pass through.
    pub fn decode_bytes(&self) -> usize {
        self.linear_bytes(|block| block.moe().map_or((1, 1), |moe| (moe.top_k, moe.experts))) + self.head().bytes()
    }

    /// Bytes of all linears inside blocks, of routed experts the share that `used` says.
    fn linear_bytes(&self, used: impl Fn(&BlockSpec) -> (usize, usize)) -> usize {
        let of_block = |(spec, block): (&BlockSpec, &ResidentBlock)| {
            let (part, whole) = used(spec);
            let bytes = |(role, _, linear): &(Role, Stream, Linear)| match role {
                Role::Expert(..) => linear.weight.bytes() * part / whole.max(1),
                _ => linear.weight.bytes(),
            };
            block.linears.iter().map(bytes).sum::<usize>() + block.mixture.as_ref().map_or(0, Mixture::bytes)
        };
        self.spec.blocks.iter().zip(&self.blocks).map(of_block).sum()
    }

    /// Bytes of all matrices.
    pub fn weight_bytes(&self) -> usize {
        let others = if self.head.is_some() { self.embed.bytes() } else { 0 };
        self.linear_bytes(|_| (1, 1)) + self.head().bytes() + others
    }

    pub(super) fn head(&self) -> &Matrix {
        self.head.as_ref().unwrap_or(&self.embed)
    }
}

impl ResidentBlock {
    fn load(spec: &BlockSpec, hidden: usize, loader: &Loader) -> Result<Self, RuntimeError> {
        let attn = gqa(spec)?;
        if attn.norm_all_heads && attn.qkv != QkvLayout::Separate {
            return Err(unsupported(spec, "norm over heads"));
        }
        let mut linears = Vec::with_capacity(spec.sites.len());
        for site in &spec.sites {
            let weight = loader.matrix(&format!("{}.weight", site.module), site.out_features, site.in_features)?;
            let bias = site.bias.then(|| loader.vector(&format!("{}.bias", site.module), site.out_features));
            linears.push((site.id.role, site.input.stream, Linear { weight, bias: bias.transpose()? }));
        }
        let norm = |norm: &Option<NormSpec>, width| norm.as_ref().map(|n| loader.norm(n, width)).transpose();
        let [q_width, k_width] = attn.norm_widths();
        let mixture = spec.moe().map(|moe| Mixture::load(moe, hidden, loader)).transpose()?;
        Ok(Self {
            linears,
            mixture,
            attn_norm: norm(&spec.norms.attn, hidden)?,
            attn_out_norm: norm(&spec.norms.attn_out, hidden)?,
            mlp_norm: norm(&spec.norms.mlp, hidden)?,
            mlp_out_norm: norm(&spec.norms.mlp_out, hidden)?,
            q_norm: norm(&attn.q_norm, q_width)?,
            k_norm: norm(&attn.k_norm, k_width)?,
            sinks: attn.sinks.as_ref().map(|name| loader.vector(name, attn.heads)).transpose()?,
        })
    }

    /// The linear of this role.
    pub(super) fn linear(&self, role: Role) -> Option<&Linear> {
        self.linears.iter().find(|(r, _, _)| *r == role).map(|(_, _, linear)| linear)
    }

    /// The linears that read `stream`, in order.
    pub(super) fn reading(&self, stream: Stream) -> impl Iterator<Item = (Role, &Linear)> {
        self.linears.iter().filter(move |(_, s, _)| *s == stream).map(|(role, _, linear)| (*role, linear))
    }
}

/// The attention of a block, if it is of the kind that is implemented.
pub(super) fn gqa(spec: &BlockSpec) -> Result<&GqaSpec, RuntimeError> {
    match &spec.attn {
        AttnSpec::Gqa(attn) => Ok(attn),
        _ => Err(unimplemented(spec, LATENT_ATTENTION)),
    }
}

/// The error for a part that only whole windows can be run through.
fn unimplemented(spec: &BlockSpec, part: &'static str) -> RuntimeError {
    let (what, instead) = ("generating text is", "judge the model with `lite eval`");
    DecoderError::Unimplemented { block: spec.index, part, what, instead }.into()
}

fn unsupported(spec: &BlockSpec, what: &str) -> RuntimeError {
    RuntimeError::Generate {
        reason: format!("block {} has a kind of {what} that generation does not know", spec.index),
    }
}

/// Where tensors come from.
pub(super) struct Loader<'a> {
    source: &'a dyn WeightSource,
    packed: Packed<'a>,
}

impl Loader<'_> {
    fn values(&self, name: &str, wanted: &[usize]) -> Result<Vec<f32>, RuntimeError> {
        let (found, values) = self.source.load(name)?;
        if found == wanted {
            return Ok(values);
        }
        let reason = format!("has shape {found:?}, wanted {wanted:?}");
        Err(DecoderError::Tensor { tensor: name.to_owned(), reason }.into())
    }

    pub(super) fn vector(&self, name: &str, width: usize) -> Result<Vec<f32>, RuntimeError> {
        self.values(name, &[width])
    }

    fn norm(&self, norm: &NormSpec, width: usize) -> Result<Norm, RuntimeError> {
        let weight = self.vector(&norm.weight, width)?;
        let bias = norm.bias.as_ref().map(|bias| self.vector(bias, width)).transpose()?;
        let unknown = || RuntimeError::Generate {
            reason: format!("`{}` belongs to a kind of norm that generation does not know", norm.weight),
        };
        Norm::new(norm, &weight, bias).ok_or_else(unknown)
    }

    /// The head's matrix, as it is multiplied.
    fn head(&self, spec: &DecoderSpec) -> Result<Matrix, RuntimeError> {
        let (head, n, k) = (&spec.head, spec.vocab, spec.hidden);
        if !head.normalised {
            return self.matrix(&head.weight, n, k);
        }
        let mut values = self.values(&head.weight, &[n, k])?;
        head.prepare(&mut values, k);
        Matrix::from_f32(n, k, &values).map_err(|source| RuntimeError::Matrix { tensor: head.weight.clone(), source })
    }

    pub(super) fn matrix(&self, name: &str, n: usize, k: usize) -> Result<Matrix, RuntimeError> {
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let matrix = match (self.packed)(module, n, k)? {
            Some(Weights::Int(q)) => Matrix::from_codes(q.scheme.bits, n, k, &q.codes, &q.scales, &q.zeros),
            Some(weights) => Matrix::from_f32(n, k, &weights.dequantize()),
            None => Matrix::from_f32(n, k, &self.values(name, &[n, k])?),
        };
        matrix.map_err(|source| RuntimeError::Matrix { tensor: name.to_owned(), source })
    }
}
