//! config.json to [`DecoderSpec`].

use std::sync::Arc;

use lite_model::Checkpoint;
use serde_json::{Map, Value};

use super::config::Section;
use super::dims::{Dims, MAX_FOLD_ROWS, windows};
use super::families::{Bias, FamilyInfo, QkNorm};
use super::mla::MlaSpec;
use super::moe::{MAX_ALL_EXPERTS, MoeRules, MoeSpec, sparse_layers};
use super::must::check_musts;
use super::scales::Factors;
use super::wrapper::{Place, Style};
use super::{
    AttnSpec, BlockNorms, BlockSpec, DecoderSpec, EmbedSpec, Fold, GateUpLayout, GatedSpec, GqaSpec, HeadSpec, InputId,
    MlpSpec, NormKind, NormSpec, PlainSpec, Producer, QkvLayout, Role, RopeSpec, Site, SiteId, Stream,
};
use crate::DecoderError;

/// Most layers of multi-token prediction that are believed.
const MAX_MTP_LAYERS: usize = 64;

impl DecoderSpec {
    /// Reads the top-level object of config.json, old style (`rope_theta` and `rope_scaling`) or that of
    /// transformers 5 (`rope_parameters`).
    ///
    /// # Errors
    /// [`DecoderError::UnknownArchitecture`] and [`DecoderError::UnsupportedConfig`] for what is not
    /// implemented; [`DecoderError::Config`] and [`DecoderError::Contradiction`] for values that make no sense.
    pub fn from_config(config: &Map<String, Value>) -> Result<Self, DecoderError> {
        Self::from_config_for(config, &|_| false)
    }

    /// [`DecoderSpec::from_config`] for a checkpoint that holds the tensors that `contains` knows: where decoders inside
    /// larger models are named in several ways, its way is found.
    ///
    /// # Errors
    /// As [`DecoderSpec::from_config`].
    pub fn from_config_for(config: &Map<String, Value>, contains: &dyn Fn(&str) -> bool) -> Result<Self, DecoderError> {
        let place = Place::find(Section::root(config))?;
        let embed = format!("{}.weight", place.family.names.embed);
        let style = place.styles.iter().find(|style| contains(&style.name(&embed))).or(place.styles.first());
        Self::read(&place, style.copied().unwrap_or(Style::Alone), contains)
    }

    /// The decoder of an open checkpoint.
    ///
    /// # Errors
    /// As [`DecoderSpec::from_config`].
    pub fn of(checkpoint: &Checkpoint) -> Result<Self, DecoderError> {
        Self::from_config_for(checkpoint.config(), &|name| checkpoint.info(name).is_some())
    }

    fn read(place: &Place, style: Style, contains: &dyn Fn(&str) -> bool) -> Result<Self, DecoderError> {
        let (family, config) = (place.family, place.config);
        check_musts(&config, family)?;
        let dims = Dims::read(&config, family, place.sizes)?;
        let (rope_rules, rotated) = match (&family.mla, &dims.mla) {
            (Some(rules), Some(mla)) => (rules.rope(&config, family.rope)?, mla.rope),
            _ => (family.rope, dims.head_dim),
        };
        let (rope, local_rope) = RopeSpec::read(&config, rope_rules, rotated, dims.max_positions)?;
        let factors = Factors::read(place, &dims)?;
        let windows = windows(&config, family, dims.layers)?;
        let mtp_layers = match family.mtp {
            Some(default) => mtp_layers(&config)?.unwrap_or(default),
            None => 0,
        };
        let builder = Builder::new(&config, family, style, &dims, &factors, &rope)?;
        let blocks = windows.into_iter().enumerate().map(|(index, window)| builder.block(index, window)).collect();
        let names = &family.names;
        let embed = format!("{}.weight", style.name(names.embed));
        let own = format!("{}.weight", style.name(names.head));
        let tied = place.tied(contains(&own))?;
        Ok(Self {
            arch: family.architecture.to_owned(),
            definition: family.definition.map(str::to_owned),
            hidden: dims.hidden,
            vocab: dims.vocab,
            max_positions: dims.max_positions,
            blocks,
            head: HeadSpec {
                module: style.name(names.head),
                weight: if tied { embed.clone() } else { own },
                tied,
                bias: None,
                normalised: family.normalised_head,
                scale: factors.logits,
                softcap: factors.logits_cap,
            },
            embed: EmbedSpec { weight: embed, scale: factors.embed },
            final_norm: builder.norm(style.name(names.final_norm)),
            rope,
            local_rope,
            mtp_layers,
        })
    }
}

/// Layers of multi-token prediction, as older and newer files write their number.
fn mtp_layers(config: &Section) -> Result<Option<usize>, DecoderError> {
    match config.size("num_nextn_predict_layers", 0..=MAX_MTP_LAYERS)? {
        Some(found) => Ok(Some(found)),
        None => config.size("num_mtp_layers", 0..=MAX_MTP_LAYERS),
    }
}

/// What all blocks of a decoder have in common.
struct Builder<'a> {
    family: &'a FamilyInfo,
    style: Style,
    dims: &'a Dims,
    factors: &'a Factors,
    qkv_bias: bool,
    o_bias: bool,
    mlp_bias: bool,
    qk_norm: QkNorm,
    v_rows: Arc<[u32]>,
    up_rows: Arc<[u32]>,
    /// What all layers with experts have in common, and which they are.
    moe: Option<(MoeSpec, &'a MoeRules, Vec<bool>)>,
    /// Latent attention, without names.
    mla: Option<MlaSpec>,
}

impl<'a> Builder<'a> {
    fn new(
        config: &Section,
        family: &'a FamilyInfo,
        style: Style,
        dims: &'a Dims,
        factors: &'a Factors,
        rope: &RopeSpec,
    ) -> Result<Self, DecoderError> {
        let bias = |rule: Bias| match rule {
            Bias::Never => Ok(false),
            Bias::Always => Ok(true),
            Bias::Key(key, default) => Ok::<_, DecoderError>(config.flag(key)?.unwrap_or(default)),
            Bias::AnyOf(keys) => {
                keys.iter().try_fold(false, |any, key| Ok::<_, DecoderError>(config.flag(key)?.unwrap_or(false) || any))
            }
        };
        let mut builder = Self {
            family,
            style,
            dims,
            factors,
            qkv_bias: bias(family.qkv_bias)?,
            o_bias: bias(family.o_bias)?,
            mlp_bias: bias(family.mlp_bias)?,
            qk_norm: match family.qk_norm {
                QkNorm::EachHeadIf(key) if config.flag(key)?.unwrap_or(false) => QkNorm::EachHead,
                QkNorm::EachHeadIf(_) => QkNorm::None,
                known => known,
            },
            v_rows: Arc::default(),
            up_rows: Arc::default(),
            moe: None,
            mla: dims.mla.map(|mla| MlaSpec::read(config, mla, dims.heads, rope)).transpose()?,
        };
        if let Some(rules) = &family.moe {
            if builder.mlp_bias {
                return Err(config.unsupported("mlp_bias", "false in this family"));
            }
            let moe = MoeSpec::read(config, rules, dims.activation)?;
            if moe.experts.saturating_mul(dims.layers) > MAX_ALL_EXPERTS {
                return Err(DecoderError::Contradiction {
                    reason: format!(
                        "{} experts in each of {} layers, wanted at most {MAX_ALL_EXPERTS} in all: no decoder is this large",
                        moe.experts, dims.layers
                    ),
                });
            }
            builder.moe = Some((moe, rules, sparse_layers(config, rules, dims.layers)?));
        }
        // In range: every width is at most 2²⁰.
        let rows = builder
            .moe
            .as_ref()
            .map_or(0, |(moe, ..)| moe.intermediate + moe.shared.as_ref().map_or(0, |shared| shared.intermediate))
            + builder.mla.as_ref().map_or(0, |mla| mla.heads * mla.value);
        if rows * dims.layers > MAX_FOLD_ROWS {
            return Err(DecoderError::Contradiction {
                reason: format!(
                    "`num_hidden_layers` × (the widths of an expert, of the shared expert and of all heads' values) is {}, wanted at most {MAX_FOLD_ROWS}: no decoder is this large",
                    rows * dims.layers
                ),
            });
        }
        let (group, d) = (dims.heads / dims.kv_heads, dims.head_dim);
        let [_, _, (_, v_columns)] = builder.attn(0, None).columns();
        // An output column of a projection is a row of its weight. All fit u32: widths are at most 2²².
        builder.v_rows = (0..dims.heads * d).map(|c| (v_columns[c / d / group] + c % d) as u32).collect();
        let up_start = if family.names.gate_up == Some(GateUpLayout::Stacked) { dims.intermediate } else { 0 };
        builder.up_rows = (0..dims.intermediate).map(|c| (up_start + c) as u32).collect();
        Ok(builder)
    }

    fn norm(&self, module: String) -> NormSpec {
        let kind = self.family.norm.kind;
        let bias = (kind == NormKind::Layer).then(|| format!("{module}.bias"));
        NormSpec { weight: format!("{module}.weight"), bias, eps: self.dims.eps, kind }
    }

    fn attn(&self, index: usize, window: Option<usize>) -> GqaSpec {
        let (names, dims) = (&self.family.names, self.dims);
        let head_norm = |name: &str| {
            let module = format!("{}.{index}.{}.{name}", self.style.name(names.blocks), names.attn);
            (self.qk_norm != QkNorm::None).then(|| self.norm(module))
        };
        GqaSpec {
            heads: dims.heads,
            kv_heads: dims.kv_heads,
            head_dim: dims.head_dim,
            qkv: dims.qkv,
            q_norm: head_norm(names.qk_norms[0]),
            k_norm: head_norm(names.qk_norms[1]),
            norm_all_heads: self.qk_norm == QkNorm::AllHeads,
            window,
            scale: self.factors.attn,
            softcap: self.factors.attn_cap,
            sinks: self.family.sinks.then(|| format!("{}.{index}.{}.sinks", self.style.name(names.blocks), names.attn)),
            local_rope: self.family.rope.local_theta.is_some() && window.is_some(),
        }
    }

    fn block(&self, index: usize, window: Option<usize>) -> BlockSpec {
        let (names, dims) = (&self.family.names, self.dims);
        let prefix = format!("{}.{index}", self.style.name(names.blocks));
        let (attn, mlp) = (format!("{prefix}.{}", names.attn), format!("{prefix}.{}", names.mlp));
        let norm = |name: Option<&str>| name.map(|name| self.norm(format!("{prefix}.{name}")));
        let norms = BlockNorms {
            attn: norm(names.attn_norm),
            attn_out: norm(names.attn_out_norm),
            mlp: norm(names.mlp_norm),
            mlp_out: norm(names.mlp_out_norm),
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
        let qkv: Vec<(Role, usize)> = match dims.qkv {
            QkvLayout::Separate => vec![(Role::Q, q_width), (Role::K, kv_width), (Role::V, kv_width)],
            QkvLayout::Stacked | QkvLayout::Grouped => vec![(Role::Qkv, q_width + 2 * kv_width)],
        };
        let moe = self.moe.as_ref().filter(|(_, _, sparse)| sparse.get(index) == Some(&true));
        let gate_up: Vec<(Role, usize)> = match names.gate_up {
            Some(GateUpLayout::Separate) => vec![(Role::Gate, m), (Role::Up, m)],
            Some(GateUpLayout::Stacked) => vec![(Role::GateUp, 2 * m)],
            None => vec![(Role::Up, m)],
        };
        let (qkv_group, gate_up_group) = (format!("{attn}.qkv"), format!("{mlp}.gate_up"));
        let mla = self.mla.as_ref().map(|mla| mla.named(&attn));
        let mut sites = Vec::with_capacity(7);
        if let Some(mla) = &mla {
            sites.extend(mla.sites(index, &attn, h, self.o_bias));
        } else {
            for (&(role, out), name) in qkv.iter().zip(names.qkv_names) {
                let group = (qkv.len() > 1).then_some(qkv_group.as_str());
                sites.push(site(role, Stream::AttnIn, format!("{attn}.{name}"), (out, h), self.qkv_bias, group));
            }
            sites.push(site(Role::O, Stream::AttnOut, format!("{attn}.{}", names.o), (h, q_width), self.o_bias, None));
        }
        if let Some((moe, rules, _)) = moe {
            sites.extend(moe.sites(index, &prefix, h, rules));
        } else {
            for (&(role, out), name) in gate_up.iter().zip(names.gate_up_names) {
                let group = (gate_up.len() > 1).then_some(gate_up_group.as_str());
                sites.push(site(role, Stream::MlpIn, format!("{mlp}.{name}"), (out, h), self.mlp_bias, group));
            }
            sites.push(site(Role::Down, Stream::MlpMid, format!("{mlp}.{}", names.down), (h, m), self.mlp_bias, None));
        }

        let id = |role| SiteId { block: index, role };
        let fold = |stream, producer| Fold {
            input: InputId { block: index, stream },
            consumers: sites.iter().filter(|s| s.input.stream == stream).map(|s| s.id).collect(),
            plain_consumers: Vec::new(),
            producer,
        };
        let from_norm = |norm: &NormSpec| {
            let (weight, bias) = (norm.weight.clone(), norm.bias.clone());
            Producer::Norm { weight, bias, kind: norm.kind }
        };
        // The last of q, k, v and of gate, up: the one matrix if they are fused.
        let (v, up) = (qkv[qkv.len() - 1].0, gate_up[gate_up.len() - 1].0);
        // Without a norm the input is the residual stream itself, which nothing can rescale.
        let mut folds: Vec<Fold> = norms.attn.iter().map(|norm| fold(Stream::AttnIn, from_norm(norm))).collect();
        match &mla {
            Some(mla) => folds.extend(mla.folds(index)),
            None => folds.push(fold(Stream::AttnOut, Producer::Rows { site: id(v), rows: self.v_rows.clone() })),
        }
        let mlp_norm = norms.mlp.as_ref().map(from_norm);
        let mlp = match (moe, names.gate_up) {
            (Some((moe, rules, _)), _) => {
                let moe = moe.named(&prefix, rules);
                folds.extend(moe.folds(index, &sites, mlp_norm));
                MlpSpec::Moe(moe)
            }
            (None, gate_up) => {
                folds.extend(mlp_norm.map(|norm| fold(Stream::MlpIn, norm)));
                let activation = dims.activation;
                match gate_up {
                    Some(layout) => {
                        folds.push(fold(Stream::MlpMid, Producer::Rows { site: id(up), rows: self.up_rows.clone() }));
                        MlpSpec::Gated(GatedSpec { intermediate: m, layout, activation })
                    }
                    // The nonlinearity stands between up and down: no fold there is exact.
                    None => MlpSpec::Plain(PlainSpec { intermediate: m, activation }),
                }
            }
        };
        BlockSpec {
            index,
            sites,
            folds,
            attn: mla.map_or_else(|| AttnSpec::Gqa(self.attn(index, window)), AttnSpec::Mla),
            mlp,
            norms,
            residual_scale: self.factors.residual,
        }
    }
}
