use candle_core::Tensor;

use crate::attention::{Inputs, composed};
use crate::spec::LATENT_ATTENTION;
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
        let normed = self.norm_differentiable(&residual, spec.norms.attn.as_ref())?;
        let AttnSpec::Gqa(attn) = &spec.attn else {
            return Err(DecoderError::Unimplemented {
                block: spec.index,
                part: LATENT_ATTENTION,
                what: "gradients are",
                instead: "quantize without tuning",
            });
        };
        let inputs = Inputs {
            projections: &self.project(Stream::AttnIn, &normed)?,
            windows,
            q_norm: attn.q_norm.as_ref().map(|norm| self.tensors_of(norm)).transpose()?,
            k_norm: attn.k_norm.as_ref().map(|norm| self.tensors_of(norm)).transpose()?,
            sinks: attn.sinks.as_ref().map(|name| self.plain(name)).transpose()?,
            kv: None,
        };
        let heads = composed(&inputs, attn, rope)?;
        let residual = self.add_differentiable(residual, Role::O, &heads, spec.norms.attn_out.as_ref())?;
        let normed = self.norm_differentiable(&residual, spec.norms.mlp.as_ref())?;
        let parts = self.project(Stream::MlpIn, &normed)?;
        let middle = match (&spec.mlp, parts.as_slice()) {
            (MlpSpec::Gated(mlp), [(_, both)]) => {
                ops::gated_composed(both, both, mlp.intermediate, mlp.intermediate, mlp.activation)?
            }
            (MlpSpec::Gated(mlp), [(_, gate), (_, up)]) => {
                ops::gated_composed(gate, up, 0, mlp.intermediate, mlp.activation)?
            }
            (MlpSpec::Plain(mlp), [(_, up)]) => ops::activated_composed(up, mlp.activation)?,
            (MlpSpec::Moe(_), _) => {
                let reason = format!("block {} has experts, which have no gradients here", spec.index);
                return Err(DecoderError::input(reason));
            }
            _ => return Err(DecoderError::input(format!("{} gate and up projections, wanted 1 or 2", parts.len()))),
        };
        let out = self.add_differentiable(residual, Role::Down, &middle, spec.norms.mlp_out.as_ref())?;
        Ok(out.reshape((windows, tokens, hidden))?)
    }

    /// `residual + scale · norm(linear(x))`.
    fn add_differentiable(
        &self,
        residual: Tensor,
        role: Role,
        x: &Tensor,
        norm: Option<&NormSpec>,
    ) -> Result<Tensor, DecoderError> {
        let output = self.norm_differentiable(&self.linear_differentiable(role, x)?, norm)?;
        Ok((residual + (output * f64::from(self.spec().residual_scale))?)?)
    }

    fn norm_differentiable(&self, x: &Tensor, norm: Option<&NormSpec>) -> Result<Tensor, DecoderError> {
        norm.map_or_else(|| Ok(x.clone()), |norm| self.tensors_of(norm)?.composed(x))
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
