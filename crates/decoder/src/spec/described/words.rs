//! The keys of a file that describes an architecture; `configs/arch/README.md` explains each.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::usual::UsualKey;
use crate::spec::{Activation, GateUpLayout, NormKind, QkvLayout, RopePairing};

/// A decoder family in a file: a known one, and what is different. Read it with any serde format; unknown keys are errors.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Architecture {
    pub(super) architecture: String,
    pub(super) model_type: String,
    pub(super) extends: String,
    pub(super) title: Option<String>,
    pub(super) names: Option<NameRules>,
    pub(super) bias: Option<BiasRules>,
    pub(super) qk_norm: Option<QkNormRule>,
    pub(super) norm: Option<NormRule>,
    pub(super) activation: Option<ActivationRule>,
    pub(super) head_dim: Option<HeadDimRule>,
    pub(super) kv_heads: Option<KvHeadsRule>,
    pub(super) grouped_if: Option<String>,
    pub(super) tied: Option<bool>,
    pub(super) normalised_head: Option<bool>,
    pub(super) scales: Option<ScalesRule>,
    pub(super) max_positions: Option<usize>,
    pub(super) window: Option<WindowRule>,
    pub(super) rope: Option<RopeRule>,
    pub(super) moe: Option<MoeRule>,
    pub(super) mla: Option<MlaRule>,
    pub(super) mtp: Option<MtpRule>,
    pub(super) keys: Option<BTreeMap<UsualKey, String>>,
    pub(super) must: Option<BTreeMap<String, Wanted>>,
}

/// Where tensors are.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NameRules {
    pub(super) embed: Option<String>,
    pub(super) block: Option<String>,
    pub(super) final_norm: Option<String>,
    pub(super) head: Option<String>,
    pub(super) attn_norm: Option<PartOrNone>,
    pub(super) attn_out_norm: Option<PartOrNone>,
    pub(super) mlp_norm: Option<PartOrNone>,
    pub(super) mlp_out_norm: Option<PartOrNone>,
    pub(super) attn: Option<String>,
    pub(super) mlp: Option<String>,
    pub(super) q_norm: Option<String>,
    pub(super) k_norm: Option<String>,
    pub(super) qkv: Option<QkvRule>,
    pub(super) o: Option<String>,
    pub(super) gate_up: Option<GateUpRule>,
    pub(super) down: Option<String>,
}

/// A part of a name, or `none`.
#[derive(Debug, Clone, Deserialize)]
#[serde(from = "String")]
pub(super) struct PartOrNone(pub(super) Option<String>);

impl From<String> for PartOrNone {
    fn from(text: String) -> Self {
        Self((text != "none").then_some(text))
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum QkvRule {
    Separate([String; 3]),
    Stacked(String),
    Grouped(String),
}

impl QkvRule {
    pub(super) fn parts(self) -> (QkvLayout, Vec<String>) {
        match self {
            Self::Separate(names) => (QkvLayout::Separate, names.into()),
            Self::Stacked(name) => (QkvLayout::Stacked, vec![name]),
            Self::Grouped(name) => (QkvLayout::Grouped, vec![name]),
        }
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum GateUpRule {
    Separate([String; 2]),
    Stacked(String),
    UpOnly(String),
}

impl GateUpRule {
    pub(super) fn parts(self) -> (Option<GateUpLayout>, Vec<String>) {
        match self {
            Self::Separate(names) => (Some(GateUpLayout::Separate), names.into()),
            Self::Stacked(name) => (Some(GateUpLayout::Stacked), vec![name]),
            Self::UpOnly(name) => (None, vec![name]),
        }
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BiasRules {
    pub(super) qkv: Option<BiasRule>,
    pub(super) o: Option<BiasRule>,
    pub(super) mlp: Option<BiasRule>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum BiasRule {
    Never,
    Always,
    Key(FlagKey),
    AnyOf(Vec<String>),
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FlagKey {
    pub(super) name: String,
    pub(super) default: bool,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum QkNormRule {
    None,
    EachHead,
    EachHeadIf(String),
    AllHeads,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NormRule {
    pub(super) kind: Option<NormName>,
    pub(super) eps_key: Option<String>,
    pub(super) eps: Option<f64>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum NormName {
    Rms,
    RmsPlusOne,
    Layer,
}

impl From<NormName> for NormKind {
    fn from(name: NormName) -> Self {
        match name {
            NormName::Rms => Self::Rms,
            NormName::RmsPlusOne => Self::RmsPlusOne,
            NormName::Layer => Self::Layer,
        }
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ActivationRule {
    pub(super) key: Option<String>,
    pub(super) default: Option<ActivationName>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum ActivationName {
    Silu,
    GeluTanh,
}

impl From<ActivationName> for Activation {
    fn from(name: ActivationName) -> Self {
        match name {
            ActivationName::Silu => Self::Silu,
            ActivationName::GeluTanh => Self::GeluTanh,
        }
    }
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum HeadDimRule {
    HiddenOverHeads,
    Default(usize),
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum KvHeadsRule {
    AsHeads,
    Default(usize),
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum ScalesRule {
    Plain,
    Granite,
    Gemma(GemmaCaps),
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct GemmaCaps {
    pub(super) attn_cap: Option<f64>,
    pub(super) logits_cap: Option<f64>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum WindowRule {
    Never,
    Refused,
    SomeLayers,
    AllLayers(AllLayers),
    Alternating(Alternating),
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AllLayers {
    pub(super) default: Option<usize>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Alternating {
    pub(super) period: usize,
    pub(super) period_key: Option<String>,
    pub(super) default: usize,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RopeRule {
    pub(super) types: Option<Vec<RopeType>>,
    pub(super) aliases: Option<BTreeMap<String, RopeType>>,
    pub(super) partial: Option<f64>,
    pub(super) pairing: Option<PairingName>,
    pub(super) theta: Option<f64>,
    pub(super) local_theta: Option<f64>,
    pub(super) original_positions: Option<usize>,
    pub(super) ratio_key: Option<String>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum RopeType {
    Default,
    Linear,
    Dynamic,
    Llama3,
    Yarn,
    LongRope,
}

impl RopeType {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Linear => "linear",
            Self::Dynamic => "dynamic",
            Self::Llama3 => "llama3",
            Self::Yarn => "yarn",
            Self::LongRope => "longrope",
        }
    }
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum PairingName {
    Halves,
    Neighbours,
}

impl From<PairingName> for RopePairing {
    fn from(name: PairingName) -> Self {
        match name {
            PairingName::Halves => Self::Halves,
            PairingName::Neighbours => Self::Neighbours,
        }
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MoeRule {
    pub(super) module: Option<String>,
    pub(super) gate: Option<String>,
    pub(super) up: Option<String>,
    pub(super) down: Option<String>,
    pub(super) shared: Option<PartOrNone>,
    pub(super) shared_gate: Option<bool>,
    pub(super) experts_keys: Option<Vec<String>>,
    pub(super) intermediate_key: Option<String>,
    pub(super) shared_width: Option<SharedWidthRule>,
    pub(super) routing: Option<RoutingRule>,
    pub(super) layers: Option<SparseRule>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum SharedWidthRule {
    Key(String),
    Times(Times),
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Times {
    pub(super) key: String,
    pub(super) default: usize,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum RoutingRule {
    Softmax(SoftmaxRule),
    SoftmaxGroups,
    SigmoidGroups(SigmoidRule),
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SoftmaxRule {
    pub(super) normalize: Option<bool>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SigmoidRule {
    pub(super) groups: usize,
    pub(super) kept: usize,
    pub(super) scale: f64,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum SparseRule {
    All,
    Steps,
    AfterFirst(usize),
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MlaRule {
    pub(super) interleave: InterleaveRule,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum InterleaveRule {
    Always,
    Key(String),
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum MtpRule {
    None,
    Default(usize),
}

/// The one value of a key that is implemented.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged, expecting = "wanted true, false, a whole number or null")]
pub(super) enum Wanted {
    Flag(bool),
    Number(i64),
    Null(()),
}
