//! What happens to each tensor of the source.

use lite_decoder::{DecoderSpec, SiteId};
use lite_model::{Checkpoint, OutputTensor};
use lite_quant::LinearScheme;

use crate::names::{fused_group, linears};

/// A linear that is quantized.
#[derive(Debug, Clone)]
pub struct QuantSite {
    /// Full module name, without `.weight`.
    pub module: String,
    /// Decoder block it belongs to.
    pub block: usize,
    /// N.
    pub out_features: usize,
    /// K.
    pub in_features: usize,
    /// Linears that an engine fuses share this name.
    pub fused_group: String,
    /// How its weight, and possibly its input, is coded.
    pub scheme: LinearScheme,
    /// Its place in the decoder; `None` for architectures that are only known by tensor names.
    pub site: Option<SiteId>,
}

/// The fate of one source tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Replaced by the packed tensors of a quantized linear.
    Quantize {
        /// Index into [`crate::Plan::sites`].
        site: usize,
    },
    /// A norm weight or a bias that absorbs scales.
    Rescale,
    /// Written unchanged.
    Copy,
    /// Written in another float type.
    Convert,
    /// Not written.
    Drop {
        /// The rule.
        reason: &'static str,
    },
}

/// One row of the plan: every source tensor has exactly one.
#[derive(Debug, Clone)]
pub struct TensorPlan {
    /// Name in the source.
    pub source: String,
    /// What happens to it.
    pub action: Action,
    /// What is written for it.
    pub outputs: Vec<OutputTensor>,
}

/// The linears of a known decoder.
pub(crate) fn sites_of(spec: &DecoderSpec, scheme: LinearScheme) -> Vec<QuantSite> {
    spec.sites()
        .map(|site| QuantSite {
            module: site.module.clone(),
            block: site.id.block,
            out_features: site.out_features,
            in_features: site.in_features,
            fused_group: site.fused_group.clone(),
            scheme,
            site: Some(site.id),
        })
        .collect()
}

/// The linears of a decoder that is known by its tensor names alone: see [`crate::names`].
pub(crate) fn guess_sites(checkpoint: &Checkpoint, scheme: LinearScheme, notes: &mut Vec<String>) -> Vec<QuantSite> {
    let site = |(module, block, n, k): (String, usize, usize, usize)| QuantSite {
        fused_group: fused_group(&module),
        module,
        block,
        out_features: n,
        in_features: k,
        scheme,
        site: None,
    };
    linears(checkpoint, notes).into_iter().map(site).collect()
}
