//! A block's forward pass cut at the inputs of its linears, so that a caller can change weights between two of them and
//! go on from what it kept. [`Block::forward`] is these segments in order.

use candle_core::Tensor;

use crate::{Block, DecoderError, InputId, KvTransform, MlpSpec, Role, Rope, Stream, Tap, ops};

impl Block {
    /// The first segment of [`Block::forward`]: the residual stream `(windows·tokens, hidden)` to the input of
    /// q, k and v ([`Stream::AttnIn`]).
    ///
    /// # Errors
    /// If `residual` does not fit, or the device fails.
    pub fn attn_in(&self, residual: &Tensor) -> Result<Tensor, DecoderError> {
        self.norm(residual, self.spec().norms.attn.as_ref())
    }

    /// The second segment: q, k, v and attention, to the input of o ([`Stream::AttnOut`]). `normed` holds whole
    /// windows of `rope.tokens()` rows.
    ///
    /// # Errors
    /// If `normed` does not fit, or the device fails.
    pub fn attn_out(&self, normed: &Tensor, rope: &Rope) -> Result<Tensor, DecoderError> {
        self.attend(normed, rope, None, &mut |_, x| Ok(x))
    }

    /// The third segment: o and the residual sum, to the residual stream between attention and feed-forward.
    ///
    /// # Errors
    /// If the inputs do not fit, or the device fails.
    pub fn after_attn(&self, residual: &Tensor, heads: &Tensor) -> Result<Tensor, DecoderError> {
        self.add(residual, &self.linear(Role::O, heads)?, self.spec().norms.attn_out.as_ref())
    }

    /// The fourth segment: to the input of gate and up ([`Stream::MlpIn`]).
    ///
    /// # Errors
    /// If `residual` does not fit, or the device fails.
    pub fn mlp_in(&self, residual: &Tensor) -> Result<Tensor, DecoderError> {
        self.norm(residual, self.spec().norms.mlp.as_ref())
    }

    /// The fifth segment: gate, up and the nonlinearity, to the input of down ([`Stream::MlpMid`]).
    ///
    /// # Errors
    /// If `normed` does not fit, or the device fails.
    pub fn mlp_mid(&self, normed: &Tensor) -> Result<Tensor, DecoderError> {
        let composed = self.compute().is_composed();
        match &self.spec().mlp {
            MlpSpec::Gated(mlp) => {
                let parts: Vec<Tensor> = self.apply(Stream::MlpIn, normed)?.into_iter().map(|(_, out)| out).collect();
                ops::gated(&parts, mlp.intermediate, mlp.activation, composed)
            }
            MlpSpec::Plain(mlp) => ops::activated(&self.linear(Role::Up, normed)?, mlp.activation, composed),
            MlpSpec::Moe(_) => {
                let reason = format!("block {} has experts, and was asked for one feed-forward", self.spec().index);
                Err(DecoderError::input(reason))
            }
        }
    }

    /// The last segment: down and the residual sum, to the block's output `(windows·tokens, hidden)`.
    ///
    /// # Errors
    /// If the inputs do not fit, or the device fails.
    pub fn after_mlp(&self, residual: &Tensor, middle: &Tensor) -> Result<Tensor, DecoderError> {
        Ok(self.after_mlp_with_output(residual, middle)?.0)
    }

    /// [`Block::after_mlp`], and beside it what down itself made, its bias included.
    ///
    /// # Errors
    /// As [`Block::after_mlp`].
    pub fn after_mlp_with_output(&self, residual: &Tensor, middle: &Tensor) -> Result<(Tensor, Tensor), DecoderError> {
        let output = self.linear(Role::Down, middle)?;
        Ok((self.add_mlp(residual, &output)?, output))
    }

    /// The block's output: what the feed-forward made, added to the residual stream.
    ///
    /// # Errors
    /// If the inputs do not fit, or the device fails.
    pub fn add_mlp(&self, residual: &Tensor, output: &Tensor) -> Result<Tensor, DecoderError> {
        self.add(residual, output, self.spec().norms.mlp_out.as_ref())
    }

    /// `x` `(windows, tokens, hidden)`, of a shape that fits, to the residual stream behind attention and the input of the
    /// feed-forward.
    pub(crate) fn run_attention(
        &self,
        x: &Tensor,
        rope: &Rope,
        kv: Option<&dyn KvTransform>,
        see: &mut dyn FnMut(Stream, Tensor) -> Result<Tensor, DecoderError>,
    ) -> Result<(Tensor, Tensor), DecoderError> {
        let (windows, tokens, hidden) = x.dims3()?;
        let residual = x.reshape((windows * tokens, hidden))?.contiguous()?;
        let normed = see(Stream::AttnIn, self.attn_in(&residual)?)?;
        let heads = self.attend(&normed, rope, kv, see)?;
        let heads = see(Stream::AttnOut, heads)?;
        let residual = self.after_attn(&residual, &heads)?;
        let normed = self.mlp_in(&residual)?;
        Ok((residual, normed))
    }

    /// [`Block::observe`] of a block with experts up to where the router parts the tokens: `tap` sees the inputs of
    /// attention's linears, that of the feed-forward, and those of the shared expert. Returns the input of the
    /// feed-forward ([`Stream::MlpIn`]), `(windows·tokens, hidden)`.
    ///
    /// # Errors
    /// As [`Block::forward`]; if the block has no experts.
    pub fn observe_entrance<T: Tap>(&self, x: &Tensor, rope: &Rope, tap: &mut T) -> Result<Tensor, DecoderError> {
        self.check_input(x, rope)?;
        let at = |stream| InputId { block: self.spec().index, stream };
        let (_, normed) = self.run_attention(x, rope, None, &mut |stream, x| tap.input(at(stream), &x).map(|()| x))?;
        tap.input(at(Stream::MlpIn), &normed)?;
        if let Some(middle) = self.shared_mid(&normed)? {
            tap.input(at(Stream::SharedMid), &middle)?;
        }
        Ok(normed)
    }

    /// The input of the feed-forward ([`Stream::MlpIn`]) that `x` `(windows, tokens, hidden)` leads to.
    ///
    /// # Errors
    /// As [`Block::forward`].
    pub fn feed_forward_input(&self, x: &Tensor, rope: &Rope) -> Result<Tensor, DecoderError> {
        self.check_input(x, rope)?;
        Ok(self.run_attention(x, rope, None, &mut |_, x| Ok(x))?.1)
    }
}
