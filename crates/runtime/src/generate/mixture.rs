//! A feed-forward with experts: each token runs through the few that its router picks.

use lite_decoder::{BlockSpec, MoeSpec, Part, Role, Stream, scatter};
use lite_kernels::Matrix;

use super::forward::no_part;
use super::linear::{Linear, multiply};
use super::model::{Loader, ResidentBlock};
use super::ops::gated;
use crate::RuntimeError;

/// What is never quantized of a mixture.
#[derive(Debug)]
pub(super) struct Mixture {
    /// `[experts, hidden]`
    router: Linear,
    /// `[experts]`
    correction: Option<Vec<f32>>,
    /// `[1, hidden]`
    shared_gate: Option<Matrix>,
}

impl Mixture {
    pub(super) fn load(moe: &MoeSpec, hidden: usize, loader: &Loader) -> Result<Self, RuntimeError> {
        let vector = |name: &Option<String>| name.as_ref().map(|name| loader.vector(name, moe.experts)).transpose();
        let weight = loader.matrix(&moe.router.weight, moe.experts, hidden)?;
        let gate = moe.shared.iter().find_map(|shared| shared.gate.as_ref());
        Ok(Self {
            router: Linear { weight, bias: vector(&moe.router.bias)? },
            correction: vector(&moe.router.correction)?,
            shared_gate: gate.map(|name| loader.matrix(name, 1, hidden)).transpose()?,
        })
    }

    /// Bytes that one token reads.
    pub(super) fn bytes(&self) -> usize {
        self.router.weight.bytes() + self.shared_gate.as_ref().map_or(0, Matrix::bytes)
    }
}

/// Makes of an input `(tokens, width)` of linears what the engine makes of it.
pub(super) type Seen<'a> = &'a dyn Fn(Stream, &mut [f32], usize) -> Result<(), RuntimeError>;

/// `normed` `(tokens, hidden)` to what is added to the residual stream.
pub(super) fn forward(
    spec: &BlockSpec,
    block: &ResidentBlock,
    normed: &[f32],
    hidden: usize,
    seen: Seen<'_>,
) -> Result<Vec<f32>, RuntimeError> {
    let missing = || no_part(spec.index, "experts");
    let (moe, mixture) = spec.moe().zip(block.mixture.as_ref()).ok_or_else(missing)?;
    let run = |roles: [Role; 3], middle: Stream, width, x: &[f32]| -> Result<Vec<f32>, RuntimeError> {
        let linear = |role| block.linear(role).ok_or_else(missing);
        let (mut gate, up) = (linear(roles[0])?.forward(x), linear(roles[1])?.forward(x));
        gated(moe.glu, &mut gate, &up);
        seen(middle, &mut gate, width)?;
        Ok(linear(roles[2])?.forward(&gate))
    };
    let mut scores = mixture.router.forward(normed);
    moe.score(&mut scores);
    let routing = moe.pick(&scores, mixture.correction.as_deref());
    let mut sum = vec![0f32; normed.len()];
    if let Some(shared) = &moe.shared {
        let mut x = normed.to_vec();
        seen(Stream::MlpIn, &mut x, hidden)?;
        let roles = [Part::Gate, Part::Up, Part::Down].map(Role::Shared);
        sum = run(roles, Stream::SharedMid, shared.intermediate, &x)?;
        if let Some(gate) = &mixture.shared_gate {
            for (row, logit) in sum.chunks_exact_mut(hidden).zip(multiply(gate, normed)) {
                let factor = 1.0 / (1.0 + (-logit).exp());
                row.iter_mut().for_each(|v| *v *= factor);
            }
        }
    }
    for (expert, count) in (0u32..).zip(routing.counts(moe.experts)) {
        if count == 0 {
            continue;
        }
        let (rows, weights) = routing.rows(expert);
        let mut x: Vec<f32> = Vec::with_capacity(count * hidden);
        rows.iter().for_each(|row| x.extend_from_slice(&normed[*row as usize * hidden..][..hidden]));
        seen(Stream::ExpertIn(expert), &mut x, hidden)?;
        let roles = [Part::Gate, Part::Up, Part::Down].map(|part| Role::Expert(expert, part));
        let out = run(roles, Stream::ExpertMid(expert), moe.intermediate, &x)?;
        scatter(&mut sum, hidden, &out, &rows, &weights);
    }
    Ok(sum)
}
