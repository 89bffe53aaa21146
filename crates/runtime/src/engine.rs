//! What an engine computes with besides the weights: quantized activations and a quantized cache, simulated in f32.

use std::collections::BTreeMap;

use lite_decoder::{
    AttnSpec, BlockSpec, DecoderError, DecoderSpec, InputId, InputTransform, KvPart, KvTransform, LATENT_ATTENTION,
    Role,
};
use lite_quant::floats::FloatFormat;
use lite_quant::{ActivationScale, ActivationScheme, InputQuantization, fake_quantize_tokens};
use rayon::prelude::*;

use crate::{QuantizedCheckpoint, RuntimeError};

/// What a checkpoint tells engines to do at run time, by place.
#[derive(Debug, Clone, Default)]
pub struct Engine {
    inputs: BTreeMap<InputId, (ActivationScheme, Option<InputQuantization>)>,
    caches: BTreeMap<usize, CacheScales>,
    mixed: usize,
}

impl Engine {
    /// What the config and the tensors of `quantized` say.
    ///
    /// # Errors
    /// Tensors that cannot be unpacked; cache scales that are missing, misshapen or not positive.
    pub fn of(quantized: &QuantizedCheckpoint, spec: &DecoderSpec) -> Result<Self, RuntimeError> {
        let mut engine = Self::default();
        for block in &spec.blocks {
            engine.add_inputs(quantized, block)?;
            if quantized.config().kv_cache.is_some() {
                engine.caches.insert(block.index, CacheScales::read(quantized, block)?);
            }
        }
        Ok(engine)
    }

    fn add_inputs(&mut self, quantized: &QuantizedCheckpoint, block: &BlockSpec) -> Result<(), RuntimeError> {
        let mut readers: BTreeMap<InputId, Vec<&lite_decoder::Site>> = BTreeMap::new();
        for site in &block.sites {
            readers.entry(site.input).or_default().push(site);
        }
        for (input, sites) in readers {
            let scheme = |site: &&lite_decoder::Site| {
                let packed = quantized.is_packed(&site.module);
                packed.then(|| quantized.config().scheme_of(&site.module).activations).flatten()
            };
            let Some(first) = sites.first() else { continue };
            let Some(activations) = scheme(first) else {
                self.mixed += usize::from(sites.iter().any(|site| scheme(site).is_some()));
                continue;
            };
            if sites.iter().any(|site| scheme(site) != Some(activations)) {
                self.mixed += 1;
                continue;
            }
            let fixed =
                matches!(activations.scale, ActivationScale::StaticTensor | ActivationScale::StaticTensorLocal(_));
            let found = if fixed {
                quantized.linear(&first.module, first.out_features, first.in_features)?.input
            } else {
                None
            };
            self.inputs.insert(input, (activations, found));
        }
        Ok(())
    }

    /// Whether there is nothing to simulate.
    pub fn is_empty(&self) -> bool {
        self.inputs.is_empty() && self.caches.is_empty()
    }

    /// Number of inputs whose readers differ in what they make of it; those are left in f32.
    pub fn mixed(&self) -> usize {
        self.mixed
    }

    /// Whether inputs of linears are quantized.
    pub fn quantizes_activations(&self) -> bool {
        !self.inputs.is_empty()
    }

    /// Whether keys and values are quantized.
    pub fn quantizes_cache(&self) -> bool {
        !self.caches.is_empty()
    }

    /// The cache of one block, if it is quantized.
    pub fn cache(&self, block: usize) -> Option<&CacheScales> {
        self.caches.get(&block)
    }
}

impl InputTransform for Engine {
    fn apply(&self, at: InputId, x: &mut [f32], width: usize) -> Result<(), DecoderError> {
        let Some((scheme, found)) = self.inputs.get(&at) else { return Ok(()) };
        fake_quantize_tokens(x, width, scheme, found.as_ref())
            .map_err(|error| DecoderError::Input { reason: format!("the input at {at}: {error}") })
    }
}

/// Scales of an e4m3 cache: one for all heads, or one for each.
#[derive(Debug, Clone, PartialEq)]
pub struct CacheScales {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl CacheScales {
    fn read(quantized: &QuantizedCheckpoint, block: &BlockSpec) -> Result<Self, RuntimeError> {
        let kv_heads = kv_heads(block)?;
        let module = attention_module(block);
        let part = |name: &str| -> Result<Vec<f32>, RuntimeError> {
            let name = format!("{module}.{name}");
            let scales = quantized.checkpoint().tensor_f32(&name)?;
            // Written so that NaN fails.
            let sound = scales.iter().all(|scale| *scale > 0.0 && scale.is_normal());
            if sound && (scales.len() == 1 || scales.len() == kv_heads) {
                return Ok(scales);
            }
            let wanted = format!("1 or {kv_heads} positive scales");
            let reason = format!("holds {} values {:?}, wanted {wanted}", scales.len(), &scales[..scales.len().min(4)]);
            Err(DecoderError::Tensor { tensor: lite_model::printable(&name), reason }.into())
        };
        Ok(Self { keys: part("k_scale")?, values: part("v_scale")? })
    }

    fn of(&self, part: KvPart) -> &[f32] {
        match part {
            KvPart::Keys => &self.keys,
            KvPart::Values => &self.values,
        }
    }

    /// Rounds keys or values of head `head` alone, `(tokens, head_dim)`, in place.
    pub fn apply_to_head(&self, part: KvPart, head: usize, values: &mut [f32]) {
        let scales = self.of(part);
        // One for all, or one for each.
        if let Some(scale) = scales.get(head).or(scales.first()) {
            round(values, *scale);
        }
    }
}

/// Rounds to e4m3 in units of `scale`; NaN stays.
fn round(values: &mut [f32], scale: f32) {
    values.iter_mut().filter(|v| !v.is_nan()).for_each(|v| *v = FloatFormat::E4M3.round(*v / scale) * scale);
}

impl KvTransform for CacheScales {
    /// `heads` are whole tokens, each with all of its heads in order, as on the CPU.
    fn apply(&self, part: KvPart, heads: &mut [f32], head_dim: usize) {
        let scales = self.of(part);
        heads.par_chunks_mut((head_dim * scales.len()).max(1)).for_each(|token| {
            for (head, scale) in token.chunks_mut(head_dim.max(1)).zip(scales) {
                round(head, *scale);
            }
        });
    }
}

/// Key and value heads of a block.
///
/// # Errors
/// Attention of a kind that has none.
pub fn kv_heads(block: &BlockSpec) -> Result<usize, DecoderError> {
    match &block.attn {
        AttnSpec::Gqa(attn) => Ok(attn.kv_heads),
        _ => Err(DecoderError::Unimplemented {
            block: block.index,
            part: LATENT_ATTENTION,
            what: "quantizing the cache of keys and values is",
            instead: "leave the cache in floats",
        }),
    }
}

/// The module that holds a block's attention: where the scales of its cache are stored.
pub fn attention_module(block: &BlockSpec) -> String {
    let keys = block.site(Role::K).or_else(|| block.site(Role::Qkv)).or_else(|| block.sites.first());
    let module = keys.map_or("", |site| site.module.as_str());
    module.rsplit_once('.').map_or(module, |(parent, _)| parent).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_head_has_its_scale() {
        let scales = CacheScales { keys: vec![1.0], values: vec![1.0, 0.5] };
        // 17 lies between 16 and 18; 449 is beyond e4m3's largest.
        let mut x = vec![17.0, 449.0, 17.0, 449.0];
        scales.apply(KvPart::Keys, &mut x, 2);
        assert_eq!(x, [16.0, 448.0, 16.0, 448.0]);
        let mut x = vec![17.0, 449.0, 17.0, 449.0];
        scales.apply(KvPart::Values, &mut x, 2);
        assert_eq!(x, [16.0, 448.0, 16.0, 224.0]);
        // Head by head: of all tokens, and the one scale for every head.
        let mut x = vec![17.0, 449.0, f32::NAN];
        scales.apply_to_head(KvPart::Values, 1, &mut x);
        assert!(x[..2] == [16.0, 224.0] && x[2].is_nan());
        let mut x = vec![17.0, 449.0];
        scales.apply_to_head(KvPart::Keys, 1, &mut x);
        assert_eq!(x, [16.0, 448.0]);
    }
}
