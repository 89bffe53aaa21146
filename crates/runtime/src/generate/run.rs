//! Prompt in, tokens out.

use std::time::{Duration, Instant};

use super::{KvCache, KvPrecision, ResidentModel, Sampler, SamplerSettings, Wanted};
use crate::RuntimeError;

/// What to generate, and how.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GenerateSettings {
    /// The most tokens to make.
    pub max_new_tokens: usize,
    /// How tokens are chosen; greedy by default.
    pub sampler: SamplerSettings,
    /// How keys and values are rounded.
    pub kv: KvPrecision,
    /// Go on past end tokens.
    pub ignore_eos: bool,
}

impl Default for GenerateSettings {
    /// 256 tokens, greedy, with a float cache.
    fn default() -> Self {
        Self { max_new_tokens: 256, sampler: SamplerSettings::default(), kv: KvPrecision::Float, ignore_eos: false }
    }
}

/// Why a text ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The model gave an end token.
    Stop,
    /// `max_new_tokens` are there.
    Length,
    /// The model's context is full.
    Context,
    /// The caller said so.
    Cancelled,
}

impl FinishReason {
    /// `stop`, `length`, `context` or `cancelled`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Context => "context",
            Self::Cancelled => "cancelled",
        }
    }
}

/// A generated text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generation {
    /// The new tokens, with the end token if there is one.
    pub tokens: Vec<u32>,
    /// Why it ends.
    pub finish: FinishReason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Time from the start to the first token.
    pub prefill: Duration,
    /// Time from the first token to the last.
    pub decode: Duration,
}

impl Generation {
    /// Tokens of the prompt per second.
    pub fn prefill_rate(&self) -> f64 {
        self.prompt_tokens as f64 / self.prefill.as_secs_f64().max(1e-9)
    }

    /// Tokens per second after the first; 0 if there is only one.
    pub fn decode_rate(&self) -> f64 {
        self.tokens.len().saturating_sub(1) as f64 / self.decode.as_secs_f64().max(1e-9)
    }
}

/// Continues `prompt`. `on_token` is told of every new token but the end token, as it is made, and says whether to go on.
///
/// # Errors
/// [`RuntimeError::GenerateSetting`]; an empty prompt, one that does not fit the context, or tokens outside of the
/// vocabulary; NaN or Inf on the way.
pub fn generate(
    model: &ResidentModel,
    prompt: &[u32],
    settings: &GenerateSettings,
    on_token: &mut dyn FnMut(u32) -> bool,
) -> Result<Generation, RuntimeError> {
    let mut sampler = Sampler::new(settings.sampler)?;
    let mut cache = KvCache::new(model.spec(), settings.kv);
    let mut tokens: Vec<u32> = Vec::new();
    let start = Instant::now();
    let mut logits = model.forward(&mut cache, prompt, Wanted::Last)?;
    let prefill = start.elapsed();
    let decoding = Instant::now();
    let mut seen = prompt.to_vec();
    let finish = loop {
        if tokens.len() >= settings.max_new_tokens {
            break FinishReason::Length;
        }
        let token = sampler.pick(&mut logits, &seen);
        tokens.push(token);
        seen.push(token);
        if !settings.ignore_eos && model.stop_tokens().contains(&token) {
            break FinishReason::Stop;
        }
        if !on_token(token) {
            break FinishReason::Cancelled;
        }
        if tokens.len() >= settings.max_new_tokens {
            break FinishReason::Length;
        }
        if model.context().is_some_and(|context| seen.len() > context) {
            break FinishReason::Context;
        }
        logits = model.forward(&mut cache, &[token], Wanted::Last)?;
    };
    Ok(Generation { tokens, finish, prompt_tokens: prompt.len(), prefill, decode: decoding.elapsed() })
}
