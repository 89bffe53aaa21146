use candle_core::Tensor;

use crate::attention::{Inputs, composed};
use crate::{AttnSpec, Block, DecoderError, MlpSpec, NormSpec, Role, Rope, Stream, ops};

impl Block {
    /// [`Block::forward`] by candle operations on any device, the CPU included: slower, a little different in the
    /// last bits, but candle's autograd can follow it. Gradients reach weights that [`Block::set_weight`] was
    /// given as variables, and `x`.
    ///
    /// # Errors
    /// If `x` `(windows, tokens, hidden)` or `rope` do not fit, or the device fails.
    pub fn forward_differentiable(&self, x: &Tensor, rope: &Rope) -> Result<Tensor, DecoderError> {
        let (windows, tokens, hidden) = x.dims3()?;
        if tokens != rope.tokens() {
            let reason = format!("windows of {tokens} tokens meet a rotary table of {}", rope.tokens());
            return Err(DecoderError::input(reason));
        }
        let spec = self.spec();
        let residual = x.reshape((windows * tokens, hidden))?;
        let normed = self.norm_differentiable(&residual, &spec.norms.attn)?;
        let AttnSpec::Gqa(attn) = &spec.attn;
        let inputs = Inputs {
            projections: &self.project(Stream::AttnIn, &normed)?,
            windows,
            q_norm: attn.q_norm.as_ref().map(|norm| self.weight_of(norm).map(|w| (norm, w))).transpose()?,
            k_norm: attn.k_norm.as_ref().map(|norm| self.weight_of(norm).map(|w| (norm, w))).transpose()?,
            kv: None,
        };
        let heads = composed(&inputs, attn, rope)?;
        let residual = (residual + self.linear_differentiable(Role::O, &heads)?)?;
        let normed = self.norm_differentiable(&residual, &spec.norms.mlp)?;
        let MlpSpec::Gated(mlp) = &spec.mlp;
        let parts = self.project(Stream::MlpIn, &normed)?;
        let middle = match parts.as_slice() {
            [(_, both)] => ops::gated_composed(both, both, mlp.intermediate, mlp.intermediate)?,
            [(_, gate), (_, up)] => ops::gated_composed(gate, up, 0, mlp.intermediate)?,
            _ => return Err(DecoderError::input(format!("{} gate and up projections, wanted 1 or 2", parts.len()))),
        };
        let out = (residual + self.linear_differentiable(Role::Down, &middle)?)?;
        Ok(out.reshape((windows, tokens, hidden))?)
    }

    fn norm_differentiable(&self, x: &Tensor, norm: &NormSpec) -> Result<Tensor, DecoderError> {
        let crate::NormKind::Rms = norm.kind;
        ops::norm_composed(x, norm, self.weight_of(norm)?)
    }

    fn weight_of(&self, norm: &NormSpec) -> Result<&Tensor, DecoderError> {
        self.vector(&norm.weight).ok_or_else(|| DecoderError::tensor(&norm.weight, "is not loaded"))
    }

    fn linear_differentiable(&self, role: Role, x: &Tensor) -> Result<Tensor, DecoderError> {
        let missing = || DecoderError::input(format!("block {} has no {role:?} linear", self.spec().index));
        let out = x.matmul(&self.weight(role).ok_or_else(missing)?.t()?)?;
        Ok(match self.bias(role) {
            Some(bias) => out.broadcast_add(bias)?,
            None => out,
        })
    }

    fn project(&self, stream: Stream, x: &Tensor) -> Result<Vec<(Role, Tensor)>, DecoderError> {
        let sites = self.spec().sites.iter().filter(|site| site.input.stream == stream);
        sites.map(|site| Ok((site.id.role, self.linear_differentiable(site.id.role, x)?))).collect()
    }
}
