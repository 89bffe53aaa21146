use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use lite_linalg::Threads;

use crate::norm::{Norm, load_norm};
use crate::{
    AttnSpec, BlockSpec, Compute, DecoderError, DecoderSpec, InputId, KvTransform, MlpSpec, NormSpec, Role, Rope,
    Stream, Tap, WeightSource, ops,
};

/// One decoder block with its weights, all f32 on one device.
#[derive(Debug, Clone)]
pub struct Block {
    spec: BlockSpec,
    hidden: usize,
    compute: Compute,
    linears: BTreeMap<Role, Linear>,
    /// Weights and biases of norms, attention's sinks, and what belongs to a router, by tensor name.
    vectors: BTreeMap<String, Tensor>,
}

#[derive(Debug, Clone)]
struct Linear {
    module: String,
    /// `[out, in]`
    weight: Tensor,
    /// `[out]`
    bias: Option<Tensor>,
}

impl Block {
    /// Reads block `index` of `spec`; `compute` is a [`Compute`], or a [`Device`] for its usual way.
    ///
    /// # Errors
    /// If there is no such block, a tensor cannot be read, or its shape is not the one in `spec`.
    pub fn load(
        spec: &DecoderSpec,
        index: usize,
        source: &dyn WeightSource,
        compute: impl Into<Compute>,
    ) -> Result<Self, DecoderError> {
        let compute = compute.into();
        let device = compute.device();
        let block = spec.blocks.get(index).ok_or_else(|| {
            DecoderError::input(format!("block {index} was asked for, the decoder has {}", spec.blocks.len()))
        })?;
        let mut linears = BTreeMap::new();
        for site in &block.sites {
            let weight = format!("{}.weight", site.module);
            let weight = load(source, &weight, &[site.out_features, site.in_features], device)?;
            let bias = format!("{}.bias", site.module);
            let bias = if site.bias { Some(load(source, &bias, &[site.out_features], device)?) } else { None };
            linears.insert(site.id.role, Linear { module: site.module.clone(), weight, bias });
        }
        let mut vectors = BTreeMap::new();
        for norm in block.norms.all() {
            vectors.extend(load_norm(source, norm, spec.hidden, device)?);
        }
        for (norm, width) in block.attn.norms() {
            vectors.extend(load_norm(source, norm, width, device)?);
        }
        if let AttnSpec::Gqa(attn) = &block.attn
            && let Some(sinks) = &attn.sinks
        {
            vectors.insert(sinks.clone(), load(source, sinks, &[attn.heads], device)?);
        }
        if let Some(moe) = block.moe() {
            let mut plain = |name: &String, shape: &[usize]| -> Result<(), DecoderError> {
                vectors.insert(name.clone(), load(source, name, shape, device)?);
                Ok(())
            };
            plain(&moe.router.weight, &[moe.experts, spec.hidden])?;
            for vector in moe.router.vectors() {
                plain(vector, &[moe.experts])?;
            }
            if let Some(gate) = moe.shared.iter().find_map(|shared| shared.gate.as_ref()) {
                plain(gate, &[1, spec.hidden])?;
            }
        }
        Ok(Self { spec: block.clone(), hidden: spec.hidden, compute, linears, vectors })
    }

    /// What this block is.
    pub fn spec(&self) -> &BlockSpec {
        &self.spec
    }

    /// Where it runs, and how.
    pub fn compute(&self) -> &Compute {
        &self.compute
    }

    /// Where its weights are.
    pub fn device(&self) -> &Device {
        self.compute.device()
    }

    /// The weight `[out, in]` of a linear.
    pub fn weight(&self, role: Role) -> Option<&Tensor> {
        self.linears.get(&role).map(|linear| &linear.weight)
    }

    /// The bias `[out]` of a linear, if it has one.
    pub fn bias(&self, role: Role) -> Option<&Tensor> {
        self.linears.get(&role)?.bias.as_ref()
    }

    /// The weight or bias of a norm, sinks `[heads]`, or what belongs to a router, by its tensor name.
    pub fn vector(&self, tensor: &str) -> Option<&Tensor> {
        self.vectors.get(tensor)
    }

    /// Replaces the weight of a linear.
    ///
    /// # Errors
    /// If the block has no such linear, or `weight` is not f32 of the same shape.
    pub fn set_weight(&mut self, role: Role, weight: Tensor) -> Result<(), DecoderError> {
        let index = self.spec.index;
        let linear = self.linears.get_mut(&role).ok_or_else(|| no_linear(index, role))?;
        linear.weight = fit(&format!("{}.weight", linear.module), weight, &linear.weight)?;
        Ok(())
    }

    /// Replaces the bias of a linear that has one.
    ///
    /// # Errors
    /// If the block has no such linear or it has no bias, or `bias` is not f32 of the same shape.
    pub fn set_bias(&mut self, role: Role, bias: Tensor) -> Result<(), DecoderError> {
        let index = self.spec.index;
        let linear = self.linears.get_mut(&role).ok_or_else(|| no_linear(index, role))?;
        let name = format!("{}.bias", linear.module);
        let old = linear.bias.as_ref().ok_or_else(|| DecoderError::tensor(&name, "this linear has no bias"))?;
        linear.bias = Some(fit(&name, bias, old)?);
        Ok(())
    }

    /// Replaces what [`Block::vector`] gives.
    ///
    /// # Errors
    /// If the block has no such tensor, or `value` is not f32 of the same shape.
    pub fn set_vector(&mut self, tensor: &str, value: Tensor) -> Result<(), DecoderError> {
        let index = self.spec.index;
        let old = self
            .vectors
            .get_mut(tensor)
            .ok_or_else(|| DecoderError::tensor(tensor, format!("block {index} has no norm or router of this name")))?;
        *old = fit(tensor, value, old)?;
        Ok(())
    }

    /// Runs `x` `(windows, tokens, hidden)` through the block; every window starts at position 0 and sees
    /// only itself. `tap` sees the input of every linear and changes nothing.
    ///
    /// # Errors
    /// If `x` or `rope` do not fit, the device fails, or the tap does.
    pub fn forward<T: Tap>(&self, x: &Tensor, rope: &Rope, tap: &mut T) -> Result<Tensor, DecoderError> {
        let out = self.run(x, rope, None, true, &mut |at, x| tap.input(at, &x).map(|()| x))?;
        out.ok_or_else(|| DecoderError::input("a block gave no output"))
    }

    /// [`Block::forward`] with a cache between the projections and attention: keys and values are what `kv` makes of
    /// them.
    ///
    /// # Errors
    /// As [`Block::forward`].
    pub fn forward_through(&self, x: &Tensor, rope: &Rope, kv: &dyn KvTransform) -> Result<Tensor, DecoderError> {
        let out = self.run(x, rope, Some(kv), true, &mut |_, x| Ok(x))?;
        out.ok_or_else(|| DecoderError::input("a block gave no output"))
    }

    /// [`Block::forward`] up to the inputs of its last linears: all that a tap sees, without the output.
    ///
    /// # Errors
    /// As [`Block::forward`].
    pub fn observe<T: Tap>(&self, x: &Tensor, rope: &Rope, tap: &mut T) -> Result<(), DecoderError> {
        self.run(x, rope, None, false, &mut |at, x| tap.input(at, &x).map(|()| x)).map(drop)
    }

    /// The whole block; `see` is shown the input of every linear and gives what the linear reads. The output is made
    /// only if `output`.
    pub(crate) fn run(
        &self,
        x: &Tensor,
        rope: &Rope,
        kv: Option<&dyn KvTransform>,
        output: bool,
        see: &mut dyn FnMut(InputId, Tensor) -> Result<Tensor, DecoderError>,
    ) -> Result<Option<Tensor>, DecoderError> {
        let shape = self.check_input(x, rope)?;
        let mut see = |stream, x| see(InputId { block: self.spec.index, stream }, x);
        let (residual, normed) = self.run_attention(x, rope, kv, &mut see)?;
        let out = match &self.spec.mlp {
            MlpSpec::Moe(_) => match self.experts(&normed, output, &mut see)? {
                Some(out) => self.add_mlp(&residual, &out)?,
                None => return Ok(None),
            },
            _ => {
                let normed = see(Stream::MlpIn, normed)?;
                let middle = see(Stream::MlpMid, self.mlp_mid(&normed)?)?;
                if !output {
                    return Ok(None);
                }
                self.after_mlp(&residual, &middle)?
            }
        };
        Ok(Some(out.reshape(shape)?))
    }

    pub(crate) fn check_input(&self, x: &Tensor, rope: &Rope) -> Result<(usize, usize, usize), DecoderError> {
        let fits = matches!(x.dims(), &[windows, tokens, hidden]
            if windows > 0 && tokens == rope.tokens() && hidden == self.hidden && x.dtype() == DType::F32);
        if !fits {
            return Err(DecoderError::input(format!(
                "block {} was given {:?} {:?}, wanted F32 (windows, {}, {})",
                self.spec.index,
                x.dtype(),
                x.dims(),
                rope.tokens(),
                self.hidden
            )));
        }
        Ok(x.dims3()?)
    }

    /// `residual + scale · norm(output)`.
    pub(crate) fn add(
        &self,
        residual: &Tensor,
        output: &Tensor,
        norm: Option<&NormSpec>,
    ) -> Result<Tensor, DecoderError> {
        let composed = self.compute.is_composed();
        let output = self.norm(output, norm)?;
        ops::add(residual, &ops::scaled(&output, self.spec.residual_scale, composed)?, composed)
    }

    /// `x` itself without a norm.
    pub(crate) fn norm(&self, x: &Tensor, norm: Option<&NormSpec>) -> Result<Tensor, DecoderError> {
        match norm {
            Some(norm) => self.tensors_of(norm)?.apply(x, self.compute.is_composed()),
            None => Ok(x.contiguous()?),
        }
    }

    /// A norm with its tensors.
    pub(crate) fn tensors_of<'a>(&'a self, spec: &'a NormSpec) -> Result<Norm<'a>, DecoderError> {
        let bias = spec.bias.as_ref().map(|bias| self.plain(bias)).transpose()?;
        Ok(Norm { spec, weight: self.plain(&spec.weight)?, bias })
    }

    /// A tensor that is not a linear's.
    pub(crate) fn plain(&self, tensor: &str) -> Result<&Tensor, DecoderError> {
        self.vector(tensor).ok_or_else(|| DecoderError::tensor(tensor, "is not loaded"))
    }

    pub(crate) fn linear(&self, role: Role, x: &Tensor) -> Result<Tensor, DecoderError> {
        self.linear_on(Threads::All, role, x)
    }

    /// [`Self::linear`], on the CPU by the threads given.
    pub(crate) fn linear_on(&self, threads: Threads, role: Role, x: &Tensor) -> Result<Tensor, DecoderError> {
        let linear = self.linears.get(&role).ok_or_else(|| no_linear(self.spec.index, role))?;
        ops::linear_on(threads, x, &linear.weight, linear.bias.as_ref(), self.compute.is_composed())
    }

    /// All linears that read `stream`, in order.
    pub(crate) fn apply(&self, stream: Stream, x: &Tensor) -> Result<Vec<(Role, Tensor)>, DecoderError> {
        let sites = self.spec.sites.iter().filter(|site| site.input.stream == stream);
        sites.map(|site| Ok((site.id.role, self.linear(site.id.role, x)?))).collect()
    }
}

fn no_linear(block: usize, role: Role) -> DecoderError {
    DecoderError::input(format!("block {block} has no {role:?} linear"))
}

/// A tensor of `source`, which must have shape `wanted`.
pub(crate) fn load(
    source: &dyn WeightSource,
    name: &str,
    wanted: &[usize],
    device: &Device,
) -> Result<Tensor, DecoderError> {
    let (found, values) = source.load(name)?;
    if found != wanted {
        return Err(DecoderError::tensor(name, format!("has shape {found:?}, wanted {wanted:?}")));
    }
    Ok(Tensor::from_vec(values, wanted, device)?)
}

/// `new`, contiguous and on the device of `old`, if it can stand in for it.
fn fit(name: &str, new: Tensor, old: &Tensor) -> Result<Tensor, DecoderError> {
    if new.dtype() != DType::F32 || new.dims() != old.dims() {
        let reason = format!("was given {:?} {:?}, wanted F32 {:?}", new.dtype(), new.dims(), old.dims());
        return Err(DecoderError::tensor(name, reason));
    }
    Ok(new.to_device(old.device())?.contiguous()?)
}
