use candle_core::Tensor;

use crate::{Block, DecoderError, InputId, KvTransform, Rope, with_cpu_slice};

/// What an engine makes of the inputs of linears before it multiplies: quantized activations.
pub trait InputTransform: Sync {
    /// Replaces `x` (`[tokens, width]` row-major), the input of the linears at `at`.
    ///
    /// # Errors
    /// An error ends the forward pass and is handed to its caller.
    fn apply(&self, at: InputId, x: &mut [f32], width: usize) -> Result<(), DecoderError>;
}

impl Block {
    /// [`Block::forward`] as an engine with quantized activations and a quantized cache computes it: linears read what
    /// `inputs` makes of their inputs, attention reads what `kv` makes of keys and values.
    ///
    /// # Errors
    /// As [`Block::forward`], and those of `inputs`.
    pub fn forward_as_engine(
        &self,
        x: &Tensor,
        rope: &Rope,
        inputs: Option<&dyn InputTransform>,
        kv: Option<&dyn KvTransform>,
    ) -> Result<Tensor, DecoderError> {
        let out = self.run(x, rope, kv, true, &mut |at, x| {
            let Some(inputs) = inputs else { return Ok(x) };
            let mut values = with_cpu_slice(&x, <[f32]>::to_vec)?;
            inputs.apply(at, &mut values, x.dim(1)?)?;
            Ok(Tensor::from_vec(values, x.dims(), x.device())?)
        })?;
        out.ok_or_else(|| DecoderError::input("a block gave no output"))
    }

    /// Shows `kv` the keys and values that `x` makes, without running the rest of the block.
    ///
    /// # Errors
    /// As [`Block::forward`].
    pub fn cached(&self, x: &Tensor, rope: &Rope, kv: &dyn KvTransform) -> Result<(), DecoderError> {
        let (windows, tokens, hidden) = self.check_input(x, rope)?;
        let residual = x.reshape((windows * tokens, hidden))?.contiguous()?;
        self.attend(&self.attn_in(&residual)?, rope, Some(kv), &mut |_, x| Ok(x)).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::{CheckpointSource, DecoderSpec, KvPart, NoTap, Stream};

    /// Multiplies the input of one stream.
    struct Scaled(Stream, f32);

    impl InputTransform for Scaled {
        fn apply(&self, at: InputId, x: &mut [f32], width: usize) -> Result<(), DecoderError> {
            assert!(x.len().is_multiple_of(width));
            if at.stream == self.0 {
                x.iter_mut().for_each(|v| *v *= self.1);
            }
            Ok(())
        }
    }

    struct Zero;

    impl KvTransform for Zero {
        fn apply(&self, _: KvPart, heads: &mut [f32], _: usize) {
            heads.fill(0.0);
        }
    }

    #[test]
    fn linears_read_what_the_engine_makes_of_their_inputs() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/novels-llama-6m");
        let checkpoint = lite_model::Checkpoint::open(&folder).unwrap();
        let spec = DecoderSpec::from_config(checkpoint.config()).unwrap();
        let block = Block::load(&spec, 1, &CheckpointSource::new(&checkpoint), &Device::Cpu).unwrap();
        let rope = Rope::new(&spec, 9, &Device::Cpu).unwrap();
        let x = Tensor::randn(0f32, 1f32, (2, 9, spec.hidden), &Device::Cpu).unwrap();
        let values = |y: Tensor| with_cpu_slice(&y, <[f32]>::to_vec).unwrap();
        let engine =
            |inputs: Option<&dyn InputTransform>| values(block.forward_as_engine(&x, &rope, inputs, None).unwrap());
        let plain = values(block.forward(&x, &rope, &mut NoTap).unwrap());
        assert_eq!(engine(None), plain);
        // A doubled input of a linear is a doubled weight.
        for (stream, roles) in [
            (Stream::AttnIn, &[crate::Role::Q, crate::Role::K, crate::Role::V][..]),
            (Stream::AttnOut, &[crate::Role::O]),
            (Stream::MlpIn, &[crate::Role::Gate, crate::Role::Up]),
            (Stream::MlpMid, &[crate::Role::Down]),
        ] {
            let mut doubled = block.clone();
            for role in roles {
                doubled.set_weight(*role, (block.weight(*role).unwrap() * 2.0).unwrap()).unwrap();
            }
            let wanted = values(doubled.forward(&x, &rope, &mut NoTap).unwrap());
            assert_eq!(engine(Some(&Scaled(stream, 2.0))), wanted, "{stream:?}");
            assert_ne!(wanted, plain);
        }
        let without_values = values(block.forward_as_engine(&x, &rope, None, Some(&Zero)).unwrap());
        assert_eq!(without_values, values(block.forward_through(&x, &rope, &Zero).unwrap()));
    }
}
