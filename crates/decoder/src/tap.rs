use candle_core::Tensor;

use crate::{DecoderError, InputId};

/// Sees the input of every linear while a [`crate::Block`] runs. Linears that read one tensor (q, k and v;
/// gate and up) share one call. A tap cannot change the forward pass.
pub trait Tap {
    /// Called with the input `x` of the linears at `at`: `(windows·tokens, in)`, f32, contiguous.
    ///
    /// # Errors
    /// An error ends the forward pass and is handed to its caller.
    fn input(&mut self, at: InputId, x: &Tensor) -> Result<(), DecoderError>;
}

/// The tap that looks at nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoTap;

impl Tap for NoTap {
    fn input(&mut self, _: InputId, _: &Tensor) -> Result<(), DecoderError> {
        Ok(())
    }
}
