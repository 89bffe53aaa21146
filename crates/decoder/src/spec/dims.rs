//! Sizes and attention windows from config.json.

use super::config::Section;
use super::families::{FamilyInfo, Positions, Window};
use super::mla::MlaDims;
use super::wrapper::Sizes;
use super::{Activation, QkvLayout};
use crate::DecoderError;

/// Largest width (hidden, intermediate, heads times head width) believed.
pub(super) const MAX_WIDTH: usize = 1 << 20;
/// Largest vocabulary believed.
const MAX_VOCAB: usize = 1 << 24;
/// Largest number of blocks believed.
const MAX_BLOCKS: usize = 10_000;
/// Largest number of positions believed.
pub(super) const MAX_POSITIONS: usize = 1 << 32;
/// Largest sum over blocks of the widths that folds list row by row (the 405B Llama has 2²³).
pub(super) const MAX_FOLD_ROWS: usize = 1 << 26;

/// The sizes of a decoder.
pub(super) struct Dims {
    pub(super) hidden: usize,
    pub(super) vocab: usize,
    pub(super) intermediate: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    /// The family's, but for models of its that do not group their heads.
    pub(super) qkv: QkvLayout,
    pub(super) head_dim: usize,
    pub(super) max_positions: usize,
    pub(super) eps: f32,
    pub(super) activation: Activation,
    /// Latent attention: then `head_dim` is the width of a query, and every head has its own keys.
    pub(super) mla: Option<MlaDims>,
}

impl Dims {
    /// `defaults` stand for sizes that are not there; without them every size must be.
    pub(super) fn read(config: &Section, family: &FamilyInfo, defaults: Option<Sizes>) -> Result<Self, DecoderError> {
        let contradiction = |reason: String| Err(DecoderError::Contradiction { reason });
        let size = |key: &str, most: usize, default: fn(Sizes) -> usize| match defaults.map(default) {
            Some(default) => Ok(config.size(key, 1..=most)?.unwrap_or(default)),
            None => config.required_size(key, 1..=most),
        };
        let hidden = size("hidden_size", MAX_WIDTH, |s| s.hidden)?;
        let intermediate = size("intermediate_size", MAX_WIDTH, |s| s.intermediate)?;
        let vocab = size("vocab_size", MAX_VOCAB, |s| s.vocab)?;
        let layers = size("num_hidden_layers", MAX_BLOCKS, |s| s.layers)?;
        let heads = size("num_attention_heads", MAX_WIDTH, |s| s.heads)?;
        let kv_default = if config.has("num_key_value_heads") { None } else { family.kv_heads };
        let grouped = match family.grouped_if {
            Some(key) => config.flag(key)?.unwrap_or(false),
            None => true,
        };
        let kv_heads = config.size("num_key_value_heads", 1..=MAX_WIDTH)?.or(kv_default).filter(|_| grouped);
        let kv_heads = kv_heads.unwrap_or(heads);
        // ChatGLM's code without `multi_query_attention`: the rows of one matrix are seen as (heads, 3 · head_dim).
        let qkv = match family.names.qkv {
            QkvLayout::Stacked if !grouped => QkvLayout::Grouped,
            known => known,
        };
        if !heads.is_multiple_of(kv_heads) {
            return contradiction(format!(
                "`num_attention_heads` is {heads}, which is not a multiple of `num_key_value_heads`, {kv_heads}"
            ));
        }
        let mla = family.mla.map(|_| MlaDims::read(config, heads)).transpose()?;
        let kv_heads = if mla.is_some() { heads } else { kv_heads };
        let head_dim = match (mla, config.size("head_dim", 1..=MAX_WIDTH)?.or(family.head_dim)) {
            (Some(mla), _) => mla.nope + mla.rope,
            (None, Some(head_dim)) => head_dim,
            (None, None) if hidden.is_multiple_of(heads) => hidden / heads,
            (None, None) => {
                return contradiction(format!(
                    "`hidden_size` is {hidden}, which is not a multiple of `num_attention_heads`, {heads}; give `head_dim` if that is intended"
                ));
            }
        };
        // In range: both factors are at most 2²⁰.
        if heads * head_dim > MAX_WIDTH {
            return contradiction(format!(
                "`num_attention_heads` times `head_dim` is {}, wanted at most {MAX_WIDTH}",
                heads * head_dim
            ));
        }
        let fold_rows = layers * (heads * head_dim + intermediate);
        if fold_rows > MAX_FOLD_ROWS {
            return contradiction(format!(
                "`num_hidden_layers` × (`num_attention_heads` × `head_dim` + `intermediate_size`) is {fold_rows}, wanted at most {MAX_FOLD_ROWS}: no decoder is this large"
            ));
        }
        let key = "max_position_embeddings";
        let max_positions = match (config.size(key, 1..=MAX_POSITIONS)?, family.max_positions) {
            (Some(found), _) | (None, Positions::Default(found)) => found,
            (None, Positions::OrElse(otherwise)) => return Err(config.unsupported(key, otherwise)),
        };
        let eps = config.number(family.norm.eps_key, 0.0..=1.0)?.unwrap_or(family.norm.eps) as f32;
        let activation = activation(config, family)?;
        Ok(Self {
            hidden,
            vocab,
            intermediate,
            layers,
            heads,
            kv_heads,
            qkv,
            head_dim,
            max_positions,
            eps,
            activation,
            mla,
        })
    }
}

/// The nonlinearity that the family's key names.
fn activation(config: &Section, family: &FamilyInfo) -> Result<Activation, DecoderError> {
    let (key, default) = family.activation;
    match config.text(key)? {
        None => Ok(default),
        Some("silu" | "swish") => Ok(Activation::Silu),
        // All three are the same formula.
        Some("gelu_pytorch_tanh" | "gelu_new" | "gelu_fast") => Ok(Activation::GeluTanh),
        Some(_) => Err(config.unsupported(key, "`silu`, `gelu_pytorch_tanh`")),
    }
}

/// The attention window of each layer.
pub(super) fn windows(
    config: &Section,
    family: &FamilyInfo,
    layers: usize,
) -> Result<Vec<Option<usize>>, DecoderError> {
    let size = |default: Option<usize>| -> Result<Option<usize>, DecoderError> {
        let default = if config.has("sliding_window") { None } else { default };
        Ok(config.size("sliding_window", 1..=MAX_POSITIONS)?.or(default))
    };
    let types = config.texts("layer_types")?;
    if let Some(types) = &types {
        if types.len() != layers {
            return Err(config.wrong("layer_types", &format!("one entry for each of the {layers} layers")));
        }
        if types.iter().any(|t| !["full_attention", "sliding_attention", "attention"].contains(t)) {
            return Err(config.unsupported("layer_types", "`full_attention`, `sliding_attention`"));
        }
    }
    let sliding = |i: usize| types.as_ref().map(|types| types[i] == "sliding_attention");
    let windows: Vec<Option<usize>> = match family.window {
        Window::Never => vec![None; layers],
        Window::Refused if config.flag("use_sliding_window")?.unwrap_or(false) => {
            return Err(config.unsupported("use_sliding_window", "false in this family"));
        }
        Window::Refused => vec![None; layers],
        Window::AllLayers(default) => vec![size(default)?; layers],
        Window::SomeLayers { first } => {
            let window = if config.flag("use_sliding_window")?.unwrap_or(false) { size(Some(4096))? } else { None };
            let first = config.size("max_window_layers", 0..=MAX_POSITIONS)?.unwrap_or(first);
            (0..layers).map(|i| window.filter(|_| sliding(i).unwrap_or(i >= first))).collect()
        }
        Window::Alternating { period, period_key, default } => {
            let window = size(Some(default))?;
            let period =
                period_key.map(|key| config.size(key, 1..=MAX_BLOCKS)).transpose()?.flatten().unwrap_or(period);
            (0..layers).map(|i| window.filter(|_| sliding(i).unwrap_or(!(i + 1).is_multiple_of(period)))).collect()
        }
    };
    match (0..layers).find(|&i| sliding(i).is_some_and(|sliding| sliding != windows[i].is_some())) {
        None => Ok(windows),
        Some(i) => Err(DecoderError::Contradiction {
            reason: format!(
                "`layer_types[{i}]` is `{}`, but {} {} `sliding_window`",
                types.as_ref().map_or("", |types| types[i]),
                family.architecture,
                if windows[i].is_some() { "attends everywhere within" } else { "gives that layer no" },
            ),
        }),
    }
}
