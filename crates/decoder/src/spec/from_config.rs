//! config.json to [`DecoderSpec`].

use serde_json::{Map, Value};

use super::config::Section;
use super::families::{Bias, FAMILIES, FamilyInfo, Window, known};
use super::{
    Activation, AttnSpec, BlockNorms, BlockSpec, DecoderSpec, EmbedSpec, Fold, GateUpLayout, GatedSpec, GqaSpec,
    HeadSpec, InputId, MlpSpec, NormKind, NormSpec, Producer, QkvLayout, Role, RopeSpec, Site, SiteId, Stream,
};
use crate::DecoderError;
use crate::error::clean;

/// Largest width (hidden, intermediate, heads times head width) believed.
const MAX_WIDTH: usize = 1 << 20;
/// Largest vocabulary believed.
const MAX_VOCAB: usize = 1 << 24;
/// Largest number of blocks believed.
const MAX_BLOCKS: usize = 10_000;
/// Largest number of positions believed.
pub(super) const MAX_POSITIONS: usize = 1 << 32;
/// Largest sum over blocks of the widths that folds list row by row (the 405B Llama has 2²³).
const MAX_FOLD_ROWS: usize = 1 << 26;

impl DecoderSpec {
    /// Reads the top-level object of config.json, old style (`rope_theta` and `rope_scaling`) or that of
    /// transformers 5 (`rope_parameters`).
    ///
    /// # Errors
    /// [`DecoderError::UnknownArchitecture`] and [`DecoderError::UnsupportedConfig`] for what is not
    /// implemented; [`DecoderError::Config`] and [`DecoderError::Contradiction`] for values that make no sense.
    pub fn from_config(config: &Map<String, Value>) -> Result<Self, DecoderError> {
        let config = Section::root(config);
        let family = family(&config)?;
        let dims = Dims::read(&config, family)?;
        let rope = RopeSpec::read(&config, family.rope, dims.head_dim, dims.max_positions)?;
        let windows = windows(&config, family, dims.layers)?;
        let builder = Builder::new(&config, family, &dims)?;
        let blocks = windows.into_iter().enumerate().map(|(index, window)| builder.block(index, window)).collect();
        let names = &family.names;
        let tied = config.flag("tie_word_embeddings")?.unwrap_or(false);
        let embed = format!("{}.weight", names.embed);
        let own = format!("{}.weight", names.head);
        Ok(Self {
            arch: family.architecture.to_owned(),
            hidden: dims.hidden,
            vocab: dims.vocab,
            max_positions: dims.max_positions,
            blocks,
            head: HeadSpec {
                module: names.head.to_owned(),
                weight: if tied { embed.clone() } else { own },
                tied,
                bias: None,
            },
            embed: EmbedSpec { weight: embed },
            final_norm: builder.norm(names.final_norm.to_owned()),
            rope,
        })
    }
}

/// The family that `architectures` names, or if that is absent `model_type`.
fn family(config: &Section) -> Result<&'static FamilyInfo, DecoderError> {
    let unclear = |reason: String| DecoderError::UnclearArchitecture { reason, known: known() };
    let by_type = |name: &str| FAMILIES.iter().find(|f| f.model_type == name);
    let model_type = config.text("model_type")?;
    let found = match config.texts("architectures")?.as_deref() {
        None | Some([]) => {
            let Some(name) = model_type else {
                return Err(unclear(
                    "neither `architectures` nor `model_type` is there, wanted `architectures`".into(),
                ));
            };
            return by_type(name).ok_or_else(|| {
                unclear(format!("`architectures` is empty and `model_type` is `{}`, which is unknown", clean(name)))
            });
        }
        Some([one]) => *one,
        Some(many) => {
            let list = clean(&many.join(", "));
            return Err(unclear(format!("`architectures` holds {} names ({list}), wanted one", many.len())));
        }
    };
    let family = FAMILIES
        .iter()
        .find(|f| f.architecture == found)
        .ok_or_else(|| DecoderError::UnknownArchitecture { found: format!("`{}`", clean(found)), known: known() })?;
    match model_type.and_then(by_type) {
        Some(other) if other.architecture != family.architecture => Err(unclear(format!(
            "`architectures` is `{}`, but `model_type` is `{}`, which belongs to `{}`; correct one of them",
            family.architecture, other.model_type, other.architecture
        ))),
        _ => Ok(family),
    }
}

struct Dims {
    hidden: usize,
    vocab: usize,
    intermediate: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    max_positions: usize,
    eps: f32,
}

impl Dims {
    fn read(config: &Section, family: &FamilyInfo) -> Result<Self, DecoderError> {
        let contradiction = |reason: String| Err(DecoderError::Contradiction { reason });
        let hidden = config.required_size("hidden_size", 1..=MAX_WIDTH)?;
        let intermediate = config.required_size("intermediate_size", 1..=MAX_WIDTH)?;
        let vocab = config.required_size("vocab_size", 1..=MAX_VOCAB)?;
        let layers = config.required_size("num_hidden_layers", 1..=MAX_BLOCKS)?;
        let heads = config.required_size("num_attention_heads", 1..=MAX_WIDTH)?;
        let kv_default = if config.has("num_key_value_heads") { None } else { family.kv_heads };
        let kv_heads = config.size("num_key_value_heads", 1..=MAX_WIDTH)?.or(kv_default).unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            return contradiction(format!(
                "`num_attention_heads` is {heads}, which is not a multiple of `num_key_value_heads`, {kv_heads}"
            ));
        }
        let head_dim = match config.size("head_dim", 1..=MAX_WIDTH)?.or(family.head_dim) {
            Some(head_dim) => head_dim,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => {
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
        let max_positions = config.size("max_position_embeddings", 1..=MAX_POSITIONS)?.unwrap_or(family.max_positions);
        let eps = config.number("rms_norm_eps", 0.0..=1.0)?.unwrap_or(family.eps) as f32;
        let activation = config.text("hidden_act")?.unwrap_or("silu");
        if !["silu", "swish"].contains(&activation) {
            return Err(config.unsupported("hidden_act", "`silu`"));
        }
        Ok(Self { hidden, vocab, intermediate, layers, heads, kv_heads, head_dim, max_positions, eps })
    }
}

/// The attention window of each layer.
fn windows(config: &Section, family: &FamilyInfo, layers: usize) -> Result<Vec<Option<usize>>, DecoderError> {
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
        Window::AllLayers(default) => vec![size(default)?; layers],
        Window::SomeLayers => {
            let window = if config.flag("use_sliding_window")?.unwrap_or(false) { size(Some(4096))? } else { None };
            let first = config.size("max_window_layers", 0..=MAX_POSITIONS)?.unwrap_or(28);
            (0..layers).map(|i| window.filter(|_| sliding(i).unwrap_or(i >= first))).collect()
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

/// What all blocks of a decoder have in common.
struct Builder<'a> {
    family: &'a FamilyInfo,
    dims: &'a Dims,
    qkv_bias: bool,
    o_bias: bool,
    mlp_bias: bool,
    v_rows: Vec<u32>,
    up_rows: Vec<u32>,
}

impl<'a> Builder<'a> {
    fn new(config: &Section, family: &'a FamilyInfo, dims: &'a Dims) -> Result<Self, DecoderError> {
        let bias = |rule: Bias| match rule {
            Bias::Never => Ok(false),
            Bias::Always => Ok(true),
            Bias::Key(key, default) => Ok::<_, DecoderError>(config.flag(key)?.unwrap_or(default)),
        };
        let mut builder = Self {
            family,
            dims,
            qkv_bias: bias(family.qkv_bias)?,
            o_bias: bias(family.o_bias)?,
            mlp_bias: bias(family.mlp_bias)?,
            v_rows: Vec::new(),
            up_rows: Vec::new(),
        };
        let (group, d) = (dims.heads / dims.kv_heads, dims.head_dim);
        let [_, _, (_, v_columns)] = builder.attn(0, None).columns();
        // An output column of a projection is a row of its weight. All fit u32: widths are at most 2²².
        builder.v_rows = (0..dims.heads * d).map(|c| (v_columns[c / d / group] + c % d) as u32).collect();
        let up_start = if family.names.gate_up == GateUpLayout::Stacked { dims.intermediate } else { 0 };
        builder.up_rows = (0..dims.intermediate).map(|c| (up_start + c) as u32).collect();
        Ok(builder)
    }

    fn norm(&self, module: String) -> NormSpec {
        NormSpec { weight: format!("{module}.weight"), bias: None, eps: self.dims.eps, kind: NormKind::Rms }
    }

    fn attn(&self, index: usize, window: Option<usize>) -> GqaSpec {
        let (names, dims) = (&self.family.names, self.dims);
        let head_norm = |name: &str| {
            let module = format!("{}.{index}.{}.{name}", names.blocks, names.attn);
            self.family.qk_norm.then(|| self.norm(module))
        };
        GqaSpec {
            heads: dims.heads,
            kv_heads: dims.kv_heads,
            head_dim: dims.head_dim,
            qkv: names.qkv,
            q_norm: head_norm("q_norm"),
            k_norm: head_norm("k_norm"),
            window,
            scale: (dims.head_dim as f64).sqrt().recip() as f32,
        }
    }

    fn block(&self, index: usize, window: Option<usize>) -> BlockSpec {
        let (names, dims) = (&self.family.names, self.dims);
        let prefix = format!("{}.{index}", names.blocks);
        let (attn, mlp) = (format!("{prefix}.{}", names.attn), format!("{prefix}.{}", names.mlp));
        let norms = BlockNorms {
            attn: self.norm(format!("{prefix}.{}", names.attn_norm)),
            mlp: self.norm(format!("{prefix}.{}", names.mlp_norm)),
        };
        let (q_width, kv_width) = (dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim);
        let (h, m) = (dims.hidden, dims.intermediate);

        let site = |role, stream, module: String, shape: (usize, usize), bias, group: Option<&str>| Site {
            id: SiteId { block: index, role },
            out_features: shape.0,
            in_features: shape.1,
            input: InputId { block: index, stream },
            bias,
            fused_group: group.map_or_else(|| module.clone(), str::to_owned),
            module,
        };
        let qkv: Vec<(Role, usize)> = match names.qkv {
            QkvLayout::Separate => vec![(Role::Q, q_width), (Role::K, kv_width), (Role::V, kv_width)],
            QkvLayout::Stacked | QkvLayout::Grouped => vec![(Role::Qkv, q_width + 2 * kv_width)],
        };
        let gate_up: Vec<(Role, usize)> = match names.gate_up {
            GateUpLayout::Separate => vec![(Role::Gate, m), (Role::Up, m)],
            GateUpLayout::Stacked => vec![(Role::GateUp, 2 * m)],
        };
        let (qkv_group, gate_up_group) = (format!("{attn}.qkv"), format!("{mlp}.gate_up"));
        let mut sites = Vec::with_capacity(7);
        for (&(role, out), name) in qkv.iter().zip(names.qkv_names) {
            let group = (qkv.len() > 1).then_some(qkv_group.as_str());
            sites.push(site(role, Stream::AttnIn, format!("{attn}.{name}"), (out, h), self.qkv_bias, group));
        }
        sites.push(site(Role::O, Stream::AttnOut, format!("{attn}.{}", names.o), (h, q_width), self.o_bias, None));
        for (&(role, out), name) in gate_up.iter().zip(names.gate_up_names) {
            let group = (gate_up.len() > 1).then_some(gate_up_group.as_str());
            sites.push(site(role, Stream::MlpIn, format!("{mlp}.{name}"), (out, h), self.mlp_bias, group));
        }
        sites.push(site(Role::Down, Stream::MlpMid, format!("{mlp}.{}", names.down), (h, m), self.mlp_bias, None));

        let id = |role| SiteId { block: index, role };
        let fold = |stream, producer| Fold {
            input: InputId { block: index, stream },
            consumers: sites.iter().filter(|s| s.input.stream == stream).map(|s| s.id).collect(),
            producer,
        };
        let from_norm = |norm: &NormSpec| Producer::Norm { weight: norm.weight.clone(), bias: norm.bias.clone() };
        // The last of q, k, v and of gate, up: the one matrix if they are fused.
        let (v, up) = (qkv[qkv.len() - 1].0, gate_up[gate_up.len() - 1].0);
        let folds = vec![
            fold(Stream::AttnIn, from_norm(&norms.attn)),
            fold(Stream::AttnOut, Producer::Rows { site: id(v), rows: self.v_rows.clone() }),
            fold(Stream::MlpIn, from_norm(&norms.mlp)),
            fold(Stream::MlpMid, Producer::Rows { site: id(up), rows: self.up_rows.clone() }),
        ];
        BlockSpec {
            index,
            sites,
            folds,
            attn: AttnSpec::Gqa(self.attn(index, window)),
            mlp: MlpSpec::Gated(GatedSpec { intermediate: m, layout: names.gate_up, activation: Activation::Silu }),
            norms,
        }
    }
}
