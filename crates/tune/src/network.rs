//! A block as slices: linears that share an input are one matrix, and every head is a column offset.

use std::ops::Range;

use lite_decoder::{AttnSpec, Block, GqaSpec, MlpSpec, NormSpec, Role, Rope, RopePairing, with_cpu_slice};
use lite_linalg::{Mat, Threads, gemm_into};

use crate::TuneError;
use crate::activation::Nonlinearity;
use crate::kernels::add_row;
use crate::norm::Norm;
use crate::rotate::{HeadNorm, Rotation};

/// The linears that read one input, as one matrix.
pub(crate) struct Fused {
    /// Rows of each linear.
    pub(crate) parts: Vec<(Role, Range<usize>)>,
    /// Outputs of all together.
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
    /// `[outputs, inputs]`
    pub(crate) weight: Vec<f32>,
    /// `[outputs]`, 0 where a linear has none; `None` if none has one.
    bias: Option<Vec<f32>>,
}

impl Fused {
    fn new(block: &Block, choices: &[&[Role]]) -> Result<Self, TuneError> {
        let found = choices.iter().find(|roles| roles.iter().all(|role| block.weight(*role).is_some()));
        let roles = *found.ok_or_else(|| TuneError::Unsupported { what: format!("a block without {choices:?}") })?;
        let (mut parts, mut weight, mut biases, mut inputs) = (Vec::new(), Vec::new(), Vec::new(), 0);
        let mut biased = false;
        for &role in roles {
            let Some(tensor) = block.weight(role) else { continue };
            let (n, k) = tensor.dims2()?;
            parts.push((role, biases.len()..biases.len() + n));
            with_cpu_slice(tensor, |values| weight.extend_from_slice(values))?;
            match block.bias(role) {
                Some(bias) => {
                    biased = true;
                    with_cpu_slice(bias, |values| biases.extend_from_slice(values))?;
                }
                None => biases.resize(biases.len() + n, 0.0),
            }
            inputs = k;
        }
        let outputs = biases.len();
        Ok(Self { parts, outputs, inputs, weight, bias: biased.then_some(biases) })
    }

    fn start_of(&self, role: Role) -> usize {
        self.parts.iter().find(|(r, _)| *r == role).map_or(0, |(_, rows)| rows.start)
    }

    fn matrix(&self) -> Mat<'_> {
        Mat::new(&self.weight, self.outputs, self.inputs)
    }

    /// `out = beta · out + x · weightᵀ + bias` for whole rows, on the calling thread.
    pub(crate) fn forward(&self, out: &mut [f32], beta: f32, x: &[f32]) {
        let rows = Mat::new(x, x.len() / self.inputs, self.inputs);
        gemm_into(out, self.outputs, beta, 1.0, rows, self.matrix().t(), Threads::One);
        if let Some(bias) = &self.bias {
            add_row(out, bias);
        }
    }

    /// `dx = dy · weight` for whole rows, on the calling thread.
    pub(crate) fn backward(&self, dx: &mut [f32], dy: &[f32]) {
        let rows = Mat::new(dy, dy.len() / self.outputs, self.outputs);
        gemm_into(dx, self.inputs, 0.0, 1.0, rows, self.matrix(), Threads::One);
    }
}

/// The four matrices of a [`Network`], in order of execution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    Qkv,
    O,
    GateUp,
    Down,
}

impl Stage {
    pub(crate) const ALL: [Self; 4] = [Self::Qkv, Self::O, Self::GateUp, Self::Down];
}

/// A block's weights on the CPU, and the rotary tables.
pub(crate) struct Network {
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    pub(crate) tokens: usize,
    pub(crate) attn: GqaSpec,
    /// Offsets of the heads of q, k and v in a row of the projection.
    pub(crate) columns: [Vec<usize>; 3],
    /// In the order of [`Stage`].
    stages: [Fused; 4],
    pub(crate) nonlinearity: Nonlinearity,
    pub(crate) attn_norm: Option<Norm>,
    pub(crate) attn_out_norm: Option<Norm>,
    pub(crate) mlp_norm: Option<Norm>,
    pub(crate) mlp_out_norm: Option<Norm>,
    q_norm: Option<Norm>,
    k_norm: Option<Norm>,
    /// On what attention and feed-forward add to the residual stream.
    pub(crate) residual_scale: f32,
    cos: Vec<f32>,
    sin: Vec<f32>,
    pairing: RopePairing,
}

impl Network {
    pub(crate) fn new(block: &Block, rope: &Rope) -> Result<Self, TuneError> {
        let unsupported = |what: &str| TuneError::Unsupported { what: what.to_owned() };
        let spec = block.spec();
        let AttnSpec::Gqa(attn) = &spec.attn else { return Err(unsupported("this kind of attention")) };
        if attn.sinks.is_some() {
            return Err(unsupported("attention with sinks"));
        }
        let (intermediate, nonlinearity) = match &spec.mlp {
            MlpSpec::Gated(mlp) => (mlp.intermediate, Nonlinearity::new(mlp.activation, true)?),
            MlpSpec::Plain(mlp) => (mlp.intermediate, Nonlinearity::new(mlp.activation, false)?),
            _ => return Err(unsupported("this kind of feed-forward")),
        };
        let norm = |norm: &Option<NormSpec>| norm.as_ref().map(|norm| Norm::new(block, norm)).transpose();
        let (q_norm, k_norm) = (norm(&attn.q_norm)?, norm(&attn.k_norm)?);
        if [&q_norm, &k_norm].into_iter().flatten().any(|norm| norm.rms().is_none()) {
            return Err(unsupported("this kind of norm over heads"));
        }
        let stages = [
            Fused::new(block, &[&[Role::Qkv], &[Role::Q, Role::K, Role::V]])?,
            Fused::new(block, &[&[Role::O]])?,
            Fused::new(block, &[&[Role::GateUp], &[Role::Gate, Role::Up], &[Role::Up]])?,
            Fused::new(block, &[&[Role::Down]])?,
        ];
        let columns = attn.columns().map(|(role, columns)| {
            let start = stages[Stage::Qkv as usize].start_of(role);
            columns.into_iter().map(|column| start + column).collect()
        });
        let tables = rope.tables(attn)?;
        Ok(Self {
            hidden: stages[Stage::Qkv as usize].inputs,
            intermediate,
            nonlinearity,
            tokens: rope.tokens(),
            columns,
            stages,
            attn_norm: norm(&spec.norms.attn)?,
            attn_out_norm: norm(&spec.norms.attn_out)?,
            mlp_norm: norm(&spec.norms.mlp)?,
            mlp_out_norm: norm(&spec.norms.mlp_out)?,
            q_norm,
            k_norm,
            residual_scale: spec.residual_scale,
            attn: attn.clone(),
            cos: with_cpu_slice(tables.cos(), <[f32]>::to_vec)?,
            sin: with_cpu_slice(tables.sin(), <[f32]>::to_vec)?,
            pairing: tables.pairing(),
        })
    }

    /// The norms of queries and keys before the rotation.
    pub(crate) fn head_norms(&self) -> [HeadNorm<'_>; 2] {
        [&self.q_norm, &self.k_norm].map(|norm| match norm.as_ref().and_then(Norm::rms) {
            None => HeadNorm::None,
            Some((factors, eps)) if self.attn.norm_all_heads => HeadNorm::All(factors, eps),
            Some((factors, eps)) => HeadNorm::Each(factors, eps),
        })
    }

    pub(crate) fn stage(&self, stage: Stage) -> &Fused {
        &self.stages[stage as usize]
    }

    pub(crate) fn stage_mut(&mut self, stage: Stage) -> &mut Fused {
        &mut self.stages[stage as usize]
    }

    /// Where the rows of `role` are.
    pub(crate) fn find(&self, role: Role) -> Option<(Stage, Range<usize>)> {
        Stage::ALL.into_iter().find_map(|stage| {
            let (_, rows) = self.stage(stage).parts.iter().find(|(r, _)| *r == role)?;
            Some((stage, rows.clone()))
        })
    }

    pub(crate) fn rotation(&self) -> Rotation<'_> {
        let half = self.cos.len() / self.tokens.max(1);
        Rotation { cos: &self.cos, sin: &self.sin, half, tokens: self.tokens, pairing: self.pairing }
    }
}
