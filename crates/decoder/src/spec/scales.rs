//! Fixed factors and caps that some families put into the forward pass.

use half::{bf16, f16};

use super::dims::Dims;
use super::families::Scales;
use super::wrapper::Place;
use crate::DecoderError;

/// Bounds of what is believed about factors and caps.
const RANGE: std::ops::RangeInclusive<f64> = 1e-6..=1e6;

/// What a family's config says beside sizes and rotary embedding.
#[derive(Debug)]
pub(super) struct Factors {
    /// On rows of the embedding.
    pub(super) embed: f32,
    /// On what attention and feed-forward add to the residual stream.
    pub(super) residual: f32,
    /// On attention scores.
    pub(super) attn: f32,
    /// `cap · tanh(score / cap)`.
    pub(super) attn_cap: Option<f32>,
    /// On logits.
    pub(super) logits: f32,
    /// `cap · tanh(logit / cap)`.
    pub(super) logits_cap: Option<f32>,
}

impl Factors {
    pub(super) fn read(place: &Place, dims: &Dims) -> Result<Self, DecoderError> {
        let config = &place.config;
        let plain = Self {
            embed: 1.0,
            residual: 1.0,
            attn: (dims.head_dim as f64).sqrt().recip() as f32,
            attn_cap: None,
            logits: 1.0,
            logits_cap: None,
        };
        let factor = |key| Ok::<_, DecoderError>(config.number(key, RANGE)?.unwrap_or(1.0));
        let cap = |key, default: Option<f64>| {
            let default = if config.has(key) { None } else { default };
            Ok::<_, DecoderError>(config.number(key, RANGE)?.or(default).map(|cap| cap as f32))
        };
        match place.family.scales {
            Scales::Plain => Ok(plain),
            Scales::Granite => Ok(Self {
                embed: factor("embedding_multiplier")? as f32,
                residual: factor("residual_multiplier")? as f32,
                attn: factor("attention_multiplier")? as f32,
                logits: (1.0 / factor("logits_scaling")?) as f32,
                ..plain
            }),
            Scales::Gemma { attn_cap, logits_cap } => {
                if config.flag("use_bidirectional_attention")?.unwrap_or(false) {
                    return Err(config.unsupported("use_bidirectional_attention", "false"));
                }
                let scalar = config.number("query_pre_attn_scalar", RANGE)?.unwrap_or(256.0);
                let attn_cap_key = "attn_logit_softcapping";
                let attn_cap = match attn_cap {
                    Some(default) => cap(attn_cap_key, Some(default))?,
                    // Read by the config of this family, used by nobody.
                    None if config.get(attn_cap_key).is_some() => {
                        return Err(config.unsupported(attn_cap_key, "null in this family"));
                    }
                    None => None,
                };
                Ok(Self {
                    embed: in_type(place, (dims.hidden as f64).sqrt() as f32)?,
                    attn: scalar.sqrt().recip() as f32,
                    attn_cap,
                    logits_cap: cap("final_logit_softcapping", logits_cap)?,
                    ..plain
                })
            }
        }
    }
}

/// `value` in the type the model runs in, which is where Gemma's code rounds it.
fn in_type(place: &Place, value: f32) -> Result<f32, DecoderError> {
    let dtype = match place.holder("dtype").text("dtype")? {
        Some(dtype) => Some(dtype),
        None => place.holder("torch_dtype").text("torch_dtype")?,
    };
    Ok(match dtype {
        Some("bfloat16") => bf16::from_f32(value).to_f32(),
        Some("float16") => f16::from_f32(value).to_f32(),
        _ => value,
    })
}
