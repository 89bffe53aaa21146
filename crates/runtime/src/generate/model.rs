//! A checkpoint in memory.

use std::path::Path;

use lite_decoder::{
    Activation, AttnSpec, BlockSpec, DecoderError, DecoderSpec, GqaSpec, MlpSpec, NormKind, NormSpec, Role, Stream,
    WeightSource,
};
use lite_kernels::Matrix;
use lite_model::Checkpoint;
use lite_pack::detect;
use lite_quant::Weights;

use super::linear::Linear;
use super::stop;
use crate::{FloatSource, QuantizedCheckpoint, QuantizedSource, RuntimeError};

/// A model whose weights are all in memory, ready to generate.
///
/// Plain weights are kept in bf16, f16 or f32, whichever holds them exactly; packed linears keep their codes, in 4 bits
/// up to 4-bit schemes and in 8 above; fp8 and fp4 weights are kept as the values they stand for. Activations are f32, also
/// where the scheme quantizes them.
#[derive(Debug)]
pub struct ResidentModel {
    pub(super) spec: DecoderSpec,
    /// `[vocab, hidden]`
    pub(super) embed: Matrix,
    pub(super) blocks: Vec<ResidentBlock>,
    pub(super) final_norm: Vec<f32>,
    /// `[vocab, hidden]`; `None`: the embedding.
    head: Option<Matrix>,
    pub(super) head_bias: Option<Vec<f32>>,
    stop: Vec<u32>,
}

/// One block's weights.
#[derive(Debug)]
pub(super) struct ResidentBlock {
    linears: Vec<(Role, Stream, Linear)>,
    pub(super) attn_norm: Vec<f32>,
    pub(super) mlp_norm: Vec<f32>,
    pub(super) q_norm: Option<Vec<f32>>,
    pub(super) k_norm: Option<Vec<f32>>,
    /// Scales of an fp8 cache for keys and values.
    pub(super) kv_scales: [f32; 2],
}

/// The weight of a packed linear `[n, k]` by module name; `None`: it is not packed.
pub(super) type Packed<'a> = &'a dyn Fn(&str, usize, usize) -> Result<Option<Weights>, RuntimeError>;

impl ResidentModel {
    /// Reads a checkpoint folder, plain or packed, and the end tokens of its `generation_config.json` or `config.json`.
    ///
    /// # Errors
    /// Files that cannot be read, an unknown layout or architecture, tensors that are missing or do not fit.
    pub fn open(dir: &Path) -> Result<Self, RuntimeError> {
        let checkpoint = Checkpoint::open(dir)?;
        let spec = DecoderSpec::from_config(checkpoint.config())?;
        let ends = stop::end_tokens(checkpoint.root(), checkpoint.config())?;
        let float = FloatSource::new(&checkpoint);
        let known = match detect(checkpoint.config()) {
            Ok(found) => found.is_some(),
            // Codes under a config that is not understood are still values.
            Err(error) if float.check()? == 0 => return Err(error.into()),
            Err(_) => false,
        };
        let model = if known {
            let quantized = QuantizedCheckpoint::open(dir)?;
            let shape_of =
                |module: &str| spec.sites().find(|s| s.module == module).map(|s| (s.out_features, s.in_features));
            let source = QuantizedSource::new(&quantized, &shape_of);
            let packed = |module: &str, n, k| {
                let unpack = || Ok(quantized.linear(module, n, k)?.weights);
                quantized.is_packed(module).then(unpack).transpose()
            };
            Self::load_checked(&spec, &checkpoint, &source, &packed, &|module| quantized.is_packed(module))?
        } else {
            float.check()?;
            Self::load_checked(&spec, &checkpoint, &float, &|_, _, _| Ok(None), &|_| false)?
        };
        Ok(model.with_stop_tokens(ends))
    }

    /// Loads after a look at all headers, which names what is missing far better than the first tensor would.
    fn load_checked(
        spec: &DecoderSpec,
        checkpoint: &Checkpoint,
        source: &dyn WeightSource,
        packed: Packed,
        is_packed: &dyn Fn(&str) -> bool,
    ) -> Result<Self, RuntimeError> {
        let mut spec = spec.clone();
        let head = format!("{}.weight", spec.head.module);
        if spec.head.tied && !source.contains(&spec.embed.weight) && source.contains(&head) {
            // A tied matrix stored under the head's name only.
            spec.embed.weight.clone_from(&head);
            spec.head.weight = head;
        }
        let shape_of_packed = |name: &str| {
            let module = name.strip_suffix(".weight")?;
            let site = spec.sites().find(|site| site.module == module);
            let shape = match site {
                Some(site) => vec![site.out_features, site.in_features],
                None if module == spec.head.module => vec![spec.vocab, spec.hidden],
                None => return None,
            };
            is_packed(module).then_some(shape)
        };
        spec.check_tensors(&|name| {
            shape_of_packed(name).or_else(|| checkpoint.info(name).map(|info| info.shape.clone()))
        })?;
        Self::load(&spec, source, packed)
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
        let head = match spec.head.tied {
            true => None,
            false => Some(loader.matrix(&spec.head.weight, spec.vocab, spec.hidden)?),
        };
        let head_bias = spec.head.bias.as_ref().map(|name| loader.vector(name, spec.vocab)).transpose()?;
        let final_norm = loader.norm(&spec.final_norm, spec.hidden)?;
        release(None);
        let mut blocks = Vec::with_capacity(spec.blocks.len());
        for block in &spec.blocks {
            blocks.push(ResidentBlock::load(block, spec.hidden, &loader)?);
            release(Some(block.index));
        }
        Ok(Self { spec: spec.clone(), embed, blocks, final_norm, head, head_bias, stop: Vec::new() })
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

    /// Bytes of weights that decoding one token reads: all matrices but the embedding's other rows.
    pub fn decode_bytes(&self) -> usize {
        let linears = self.blocks.iter().flat_map(|block| &block.linears);
        linears.map(|(_, _, linear)| linear.weight.bytes()).sum::<usize>() + self.head().bytes()
    }

    pub(super) fn head(&self) -> &Matrix {
        self.head.as_ref().unwrap_or(&self.embed)
    }
}

impl ResidentBlock {
    fn load(spec: &BlockSpec, hidden: usize, loader: &Loader) -> Result<Self, RuntimeError> {
        let attn = gqa(spec)?;
        let MlpSpec::Gated(mlp) = &spec.mlp else { return Err(unsupported(spec, "feed-forward")) };
        let Activation::Silu = mlp.activation else { return Err(unsupported(spec, "activation")) };
        let mut linears = Vec::with_capacity(spec.sites.len());
        for site in &spec.sites {
            let weight = loader.matrix(&format!("{}.weight", site.module), site.out_features, site.in_features)?;
            let bias = site.bias.then(|| loader.vector(&format!("{}.bias", site.module), site.out_features));
            linears.push((site.id.role, site.input.stream, Linear { weight, bias: bias.transpose()? }));
        }
        let head_norm = |norm: &Option<NormSpec>| norm.as_ref().map(|n| loader.norm(n, attn.head_dim)).transpose();
        let o = spec.site(Role::O).and_then(|site| site.module.rsplit_once('.'));
        let kv_scale = |name: &str| match o {
            Some((parent, _)) => loader.scale(&format!("{parent}.{name}")),
            None => Ok(1.0),
        };
        Ok(Self {
            linears,
            attn_norm: loader.norm(&spec.norms.attn, hidden)?,
            mlp_norm: loader.norm(&spec.norms.mlp, hidden)?,
            q_norm: head_norm(&attn.q_norm)?,
            k_norm: head_norm(&attn.k_norm)?,
            kv_scales: [kv_scale("k_scale")?, kv_scale("v_scale")?],
        })
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
        _ => Err(unsupported(spec, "attention")),
    }
}

fn unsupported(spec: &BlockSpec, what: &str) -> RuntimeError {
    RuntimeError::Generate {
        reason: format!("block {} has a kind of {what} that generation does not know", spec.index),
    }
}

/// Where tensors come from.
struct Loader<'a> {
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

    fn vector(&self, name: &str, width: usize) -> Result<Vec<f32>, RuntimeError> {
        self.values(name, &[width])
    }

    fn norm(&self, norm: &NormSpec, width: usize) -> Result<Vec<f32>, RuntimeError> {
        let known = matches!(norm.kind, NormKind::Rms) && norm.bias.is_none();
        if !known {
            let reason = format!("`{}` belongs to a kind of norm that generation does not know", norm.weight);
            return Err(RuntimeError::Generate { reason });
        }
        self.vector(&norm.weight, width)
    }

    fn matrix(&self, name: &str, n: usize, k: usize) -> Result<Matrix, RuntimeError> {
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let matrix = match (self.packed)(module, n, k)? {
            Some(Weights::Int(q)) => Matrix::from_codes(q.scheme.bits, n, k, &q.codes, &q.scales, &q.zeros),
            Some(weights) => Matrix::from_f32(n, k, &weights.dequantize()),
            None => Matrix::from_f32(n, k, &self.values(name, &[n, k])?),
        };
        matrix.map_err(|source| RuntimeError::Matrix { tensor: name.to_owned(), source })
    }

    /// A positive scalar, 1 if there is none.
    fn scale(&self, name: &str) -> Result<f32, RuntimeError> {
        if !self.source.contains(name) {
            return Ok(1.0);
        }
        let (_, values) = self.source.load(name)?;
        match values.as_slice() {
            [scale] if scale.is_finite() && *scale > 0.0 => Ok(*scale),
            _ => {
                let reason = format!("holds {} values, wanted one positive scale", values.len());
                Err(DecoderError::Tensor { tensor: name.to_owned(), reason }.into())
            }
        }
    }
}
