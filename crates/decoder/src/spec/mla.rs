//! Multi-head latent attention: what config.json says of it, and the linears and folds that follow.

use super::config::Section;
use super::dims::MAX_WIDTH;
use super::families::RopeRules;
use super::{
    Fold, GqaSpec, InputId, NormKind, NormSpec, Producer, QkvLayout, Role, RopePairing, RopeScaling, RopeSpec, Site,
    SiteId, Stream,
};
use crate::DecoderError;

/// ε of the latents' norms; the published code and transformers ignore `rms_norm_eps` there.
const LATENT_EPS: f32 = 1e-6;
/// What the shapes of the attention's linears come from.
pub(super) const KEYS: &str = "`num_attention_heads`, `q_lora_rank`, `kv_lora_rank`, `qk_nope_head_dim`, `qk_rope_head_dim`, `v_head_dim`, `hidden_size`";

/// What messages call [`MlaSpec`].
pub const LATENT_ATTENTION: &str = "multi-head latent attention (DeepSeek's)";

/// Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, §2.1): keys and values of all heads are made from one
/// narrow vector per token, which is what an engine caches, beside a rotated piece of the keys that all heads share.
///
/// ```text
/// q      = q_b(norm(q_a(x)))                     or q_proj(x), [heads][nope | rope]
/// c | kr = kv_a(x)                               [latent | rope]
/// k | v  = kv_b(norm(c))                         [heads][nope | value]
/// out    = softmax(scale · (q_nope·k + rotated(q_rope)·rotated(kr))) · v
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct MlaSpec {
    /// Heads.
    pub heads: usize,
    /// Width of the part of a query and key without positions.
    pub nope: usize,
    /// Width of the rotated part; even. The keys' is shared by all heads.
    pub rope: usize,
    /// Width of a value.
    pub value: usize,
    /// The latent of queries; `None`: they are made from the input directly.
    pub q_latent: Option<LatentSpec>,
    /// The latent of keys and values.
    pub kv_latent: LatentSpec,
    /// Scores are multiplied by this.
    pub scale: f32,
}

/// A narrow vector per token, normalised before it is used.
#[derive(Debug, Clone, PartialEq)]
pub struct LatentSpec {
    /// Its width.
    pub width: usize,
    /// Its norm.
    pub norm: NormSpec,
}

/// What a family knows of its latent attention.
#[derive(Debug, Clone, Copy)]
pub(super) struct MlaRules {
    /// The key that tells whether neighbouring dimensions are rotated together, true if absent; `None`: they are.
    pub(super) interleave: Option<&'static str>,
}

impl MlaRules {
    /// What `rules` are for this config.
    pub(super) fn rope(&self, config: &Section, rules: RopeRules) -> Result<RopeRules, DecoderError> {
        let together = match self.interleave {
            Some(key) => config.flag(key)?.unwrap_or(true),
            None => true,
        };
        let pairing = if together { RopePairing::Neighbours } else { RopePairing::Halves };
        Ok(RopeRules { pairing, ..rules })
    }
}

/// The widths of latent attention.
#[derive(Debug, Clone, Copy)]
pub(super) struct MlaDims {
    pub(super) nope: usize,
    pub(super) rope: usize,
    pub(super) value: usize,
    q_rank: Option<usize>,
    kv_rank: usize,
}

impl MlaDims {
    pub(super) fn read(config: &Section, heads: usize) -> Result<Self, DecoderError> {
        let size = |key, default| Ok::<_, DecoderError>(config.size(key, 1..=MAX_WIDTH)?.unwrap_or(default));
        let wrong = |reason: String| Err(DecoderError::Contradiction { reason });
        let rope = size("qk_rope_head_dim", 64)?;
        if !rope.is_multiple_of(2) {
            return wrong(format!("`qk_rope_head_dim` is {rope}, wanted an even number"));
        }
        if let Some(found) = config.size("num_key_value_heads", 1..=MAX_WIDTH)?.filter(|found| *found != heads) {
            return wrong(format!(
                "`num_key_value_heads` is {found} and `num_attention_heads` is {heads}: with latent attention every head has keys of its own, wanted equal numbers"
            ));
        }
        // null: no latent; absent: that of the configuration class.
        let default = if config.has("q_lora_rank") { None } else { Some(1536) };
        let dims = Self {
            nope: size("qk_nope_head_dim", 128)?,
            rope,
            value: size("v_head_dim", 128)?,
            q_rank: config.size("q_lora_rank", 1..=MAX_WIDTH)?.or(default),
            kv_rank: size("kv_lora_rank", 512)?,
        };
        // In range: all factors are at most 2²⁰.
        let widest = heads * (dims.nope + dims.rope).max(dims.nope + dims.value);
        if widest > MAX_WIDTH {
            return wrong(format!(
                "`num_attention_heads` times the width of a head (`qk_nope_head_dim`, `qk_rope_head_dim`, `v_head_dim`) is {widest}, wanted at most {MAX_WIDTH}"
            ));
        }
        Ok(dims)
    }
}

impl MlaSpec {
    /// The attention of all layers; [`MlaSpec::named`] gives it its tensors.
    pub(super) fn read(config: &Section, dims: MlaDims, heads: usize, rope: &RopeSpec) -> Result<Self, DecoderError> {
        let latent = |width| LatentSpec {
            width,
            norm: NormSpec { weight: String::new(), bias: None, eps: LATENT_EPS, kind: NormKind::Rms },
        };
        // YaRN's temperature, on scores here and not on cosines and sines (`yarn_apply_mscale` of transformers).
        let factor = match &rope.scaling {
            RopeScaling::Linear { factor } | RopeScaling::Dynamic { factor } | RopeScaling::Yarn { factor, .. } => {
                *factor
            }
            _ => 1.0,
        };
        let all = match RopeSpec::section(config)? {
            Some(section) => section.number("mscale_all_dim", 0.0..=1e6)?.unwrap_or(0.0),
            None => 0.0,
        };
        let temperature = if factor > 1.0 { 0.1 * all * factor.ln() + 1.0 } else { 1.0 };
        let plain = ((dims.nope + dims.rope) as f64).sqrt().recip();
        Ok(Self {
            heads,
            nope: dims.nope,
            rope: dims.rope,
            value: dims.value,
            q_latent: dims.q_rank.map(latent),
            kv_latent: latent(dims.kv_rank),
            scale: (plain * temperature * temperature) as f32,
        })
    }

    /// The same attention with its tensors under the module `attn`.
    pub(super) fn named(&self, attn: &str) -> Self {
        let mut named = self.clone();
        if let Some(latent) = &mut named.q_latent {
            latent.norm.weight = format!("{attn}.q_a_layernorm.weight");
        }
        named.kv_latent.norm.weight = format!("{attn}.kv_a_layernorm.weight");
        named
    }

    /// Width of a head in [`MlaSpec::expanded`]: room for a query and for a value.
    pub fn head_width(&self) -> usize {
        (self.nope + self.rope).max(self.value)
    }

    /// The same attention once queries, keys and values are made: each head `[rope | nope | zeros]`, each value
    /// `[value | zeros]`, [`MlaSpec::head_width`] wide.
    pub fn expanded(&self) -> GqaSpec {
        GqaSpec {
            heads: self.heads,
            kv_heads: self.heads,
            head_dim: self.head_width(),
            qkv: QkvLayout::Separate,
            q_norm: None,
            k_norm: None,
            norm_all_heads: false,
            window: None,
            scale: self.scale,
            softcap: None,
            sinks: None,
            local_rope: false,
        }
    }

    /// The linears under the module `attn`, in order of execution. `bias`: of all that read the block's input from one
    /// latent's side, and of o (`attention_bias`).
    pub(super) fn sites(&self, index: usize, attn: &str, hidden: usize, bias: bool) -> Vec<Site> {
        let site = |role, name: &str, stream, shape: (usize, usize), bias| {
            let module = format!("{attn}.{name}");
            Site {
                id: SiteId { block: index, role },
                out_features: shape.0,
                in_features: shape.1,
                input: InputId { block: index, stream },
                bias,
                fused_group: module.clone(),
                module,
            }
        };
        let (heads, rank) = (self.heads, self.kv_latent.width);
        let queries = heads * (self.nope + self.rope);
        let kv_a = site(Role::KvA, "kv_a_proj_with_mqa", Stream::AttnIn, (rank + self.rope, hidden), bias);
        let mut sites = match &self.q_latent {
            Some(q) => {
                let q_a = site(Role::QA, "q_a_proj", Stream::AttnIn, (q.width, hidden), bias);
                // Engines run these two as one matrix.
                let group = format!("{attn}.qkv_a");
                let [q_a, kv_a] = [q_a, kv_a].map(|site| Site { fused_group: group.clone(), ..site });
                let q_b = site(Role::QB, "q_b_proj", Stream::QLatent, (queries, q.width), false);
                vec![q_a, kv_a, q_b]
            }
            None => vec![site(Role::Q, "q_proj", Stream::AttnIn, (queries, hidden), false), kv_a],
        };
        let kv_b = (heads * (self.nope + self.value), rank);
        sites.push(site(Role::KvB, "kv_b_proj", Stream::KvLatent, kv_b, false));
        sites.push(site(Role::O, "o_proj", Stream::AttnOut, (hidden, heads * self.value), bias));
        sites
    }

    /// The rescalings behind the block's input: of the latents by their norms, of the heads' outputs by the rows of
    /// kv_b that make the values.
    pub(super) fn folds(&self, index: usize) -> Vec<Fold> {
        let id = |role| SiteId { block: index, role };
        let fold = |stream, consumer, producer| Fold {
            input: InputId { block: index, stream },
            consumers: vec![id(consumer)],
            plain_consumers: Vec::new(),
            producer,
        };
        let norm = |latent: &LatentSpec| {
            let NormSpec { weight, bias, kind, .. } = latent.norm.clone();
            Producer::Norm { weight, bias, kind }
        };
        let head = self.nope + self.value;
        // All fit u32: the width of kv_b is at most 2²⁰.
        let row = |c: usize| (c / self.value * head + self.nope + c % self.value) as u32;
        let values = Producer::Rows { site: id(Role::KvB), rows: (0..self.heads * self.value).map(row).collect() };
        let mut folds: Vec<Fold> =
            self.q_latent.iter().map(|latent| fold(Stream::QLatent, Role::QB, norm(latent))).collect();
        folds.push(fold(Stream::KvLatent, Role::KvB, norm(&self.kv_latent)));
        folds.push(fold(Stream::AttnOut, Role::O, values));
        folds
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, Value, json};

    use super::*;
    use crate::{AttnSpec, DecoderSpec};

    /// DeepSeek-V2-Lite's own numbers (config.json of the published model).
    fn lite() -> Map<String, Value> {
        let config = json!({
            "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "first_k_dense_replace": 1,
            "hidden_size": 2048, "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840,
            "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64,
            "n_shared_experts": 2, "norm_topk_prob": false, "num_attention_heads": 16, "num_experts_per_tok": 6,
            "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": null, "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000, "routed_scaling_factor": 1.0,
            "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                "original_max_position_embeddings": 4096, "type": "yarn"},
            "scoring_func": "softmax", "topk_group": 1, "topk_method": "greedy", "v_head_dim": 128, "vocab_size": 102400,
        });
        config.as_object().unwrap().clone()
    }

    fn mla(config: &Map<String, Value>) -> MlaSpec {
        match DecoderSpec::from_config(config).unwrap().blocks.remove(0).attn {
            AttnSpec::Mla(mla) => mla,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_temperature_is_on_the_scores() {
        let config = lite();
        let spec = DecoderSpec::from_config(&config).unwrap();
        assert_eq!((spec.rope.rotary_dim, spec.rope.pairing), (64, RopePairing::Neighbours));
        // mscale is mscale_all_dim: nothing is left for cosines and sines.
        assert!(matches!(spec.rope.scaling, RopeScaling::Yarn { attention_factor: 1.0, .. }));
        // 0.1 · 0.707 · ln 40 + 1 = 1.26080…, squared, over √192.
        let wanted = 1.260_804_6f64.powi(2) / 192f64.sqrt();
        assert!((f64::from(mla(&config).scale) - wanted).abs() < 1e-6, "{}", mla(&config).scale);
        let mut plain = config;
        plain.remove("rope_scaling");
        assert_eq!(mla(&plain).scale, (192f64.sqrt().recip()) as f32);
    }

    #[test]
    fn dimensions_are_paired_as_the_key_says() {
        let mut config = lite();
        config.insert("architectures".into(), json!(["DeepseekV3ForCausalLM"]));
        config.insert("model_type".into(), json!("deepseek_v3"));
        config.insert("scoring_func".into(), json!("sigmoid"));
        config.insert("topk_method".into(), json!("noaux_tc"));
        for (found, wanted) in [
            (json!(null), RopePairing::Neighbours),
            (json!(true), RopePairing::Neighbours),
            (json!(false), RopePairing::Halves),
        ] {
            config.insert("rope_interleave".into(), found);
            assert_eq!(DecoderSpec::from_config(&config).unwrap().rope.pairing, wanted);
        }
    }

    #[test]
    fn an_absent_rank_is_not_null() {
        let mut config = lite();
        assert_eq!(mla(&config).q_latent, None);
        config.remove("q_lora_rank");
        assert_eq!(mla(&config).q_latent.unwrap().width, 1536);
    }
}
