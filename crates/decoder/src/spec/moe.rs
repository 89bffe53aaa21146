//! Mixtures of experts: what config.json says of routers and experts, and the linears and folds that follow.

use std::sync::Arc;

use super::config::Section;
use super::{Activation, Fold, Glu, InputId, Part, Producer, Role, Site, SiteId, Stream};
use crate::DecoderError;

/// Most experts of a layer that are believed.
const MAX_EXPERTS: usize = 1 << 14;
/// Most experts of all layers that are believed (DeepSeek-V3 has about 2¹⁴).
pub(super) const MAX_ALL_EXPERTS: usize = 1 << 18;
/// Largest width of an expert that is believed.
const MAX_WIDTH: usize = 1 << 20;

/// A feed-forward of which every token passes through a few experts: `Σ w_e · down_e(glu(gate_e(x), up_e(x)))` over the
/// experts that the router picks, and a shared expert beside them.
#[derive(Debug, Clone, PartialEq)]
pub struct MoeSpec {
    /// Routed experts.
    pub experts: usize,
    /// Experts of one token.
    pub top_k: usize,
    /// Width between up and down of a routed expert.
    pub intermediate: usize,
    /// Who picks.
    pub router: RouterSpec,
    /// The expert of all tokens.
    pub shared: Option<SharedSpec>,
    /// How gates and ups are joined.
    pub glu: Glu,
}

/// A router: scores of all experts, the `top_k` best of them, and their weights.
#[derive(Debug, Clone, PartialEq)]
pub struct RouterSpec {
    /// Tensor `[experts, hidden]`; it is never quantized.
    pub weight: String,
    /// Tensor `[experts]`, added to the logits.
    pub bias: Option<String>,
    /// Tensor `[experts]`, added to the scores for the choice only (DeepSeek-V3, arXiv:2412.19437, §2.1.2).
    pub correction: Option<String>,
    /// Logits to scores.
    pub scoring: Scoring,
    /// Groups of experts, and how many of them a token may use; `(1, 1)` without groups.
    pub groups: (usize, usize),
    /// Whether a group's rank is the sum of its two best scores (DeepSeek-V3) and not its best one (V2).
    pub rank_by_two: bool,
    /// Whether the chosen weights are divided by their sum.
    pub normalize: bool,
    /// Then they are multiplied by this.
    pub scale: f32,
}

impl RouterSpec {
    /// Its tensors `[experts]`.
    pub fn vectors(&self) -> impl Iterator<Item = &String> {
        self.bias.iter().chain(&self.correction)
    }
}

/// A router's logits to scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scoring {
    /// Softmax over all experts.
    Softmax,
    /// Of each logit.
    Sigmoid,
}

/// The expert that every token passes through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedSpec {
    /// Width between its up and down.
    pub intermediate: usize,
    /// Tensor `[1, hidden]`: its output is multiplied by `sigmoid(gate · x)`; never quantized.
    pub gate: Option<String>,
}

/// What a family knows of its experts.
#[derive(Debug, Clone)]
pub(super) struct MoeRules {
    /// Module of the feed-forward in layers with experts.
    pub(super) module: &'static str,
    /// Gate, up and down of a routed expert, as `{module}.experts.{e}.{name}`.
    pub(super) parts: [&'static str; 3],
    /// Whether these have biases.
    pub(super) bias: bool,
    /// The router inside the feed-forward, and whether it has a bias.
    pub(super) router: (&'static str, bool),
    pub(super) joined: Joined,
    /// Module of the shared expert inside the feed-forward.
    pub(super) shared: Option<&'static str>,
    /// Whether the shared expert has a gate of its own, `{shared}_gate`.
    pub(super) shared_gate: bool,
    /// Keys of the number of routed experts.
    pub(super) experts: &'static [&'static str],
    /// Key of the width of an expert.
    pub(super) intermediate: &'static str,
    /// How the width of the shared expert is found.
    pub(super) shared_width: SharedWidth,
    pub(super) routing: Routing,
    pub(super) sparse: Sparse,
}

/// How a family joins gates and ups.
#[derive(Debug, Clone, Copy)]
pub(super) enum Joined {
    /// [`Glu::Product`].
    Product,
    /// [`Glu::Clamped`] with this slope; the limit is under this key, or this.
    Clamped { slope: f32, limit: (&'static str, f64) },
}

/// How the width of the shared expert is found.
#[derive(Debug, Clone, Copy)]
pub(super) enum SharedWidth {
    /// This key holds it.
    Key(&'static str),
    /// This key holds how many routed experts wide it is; the number stands for an absent key.
    Times(&'static str, usize),
}

/// How a family's routers choose.
#[derive(Debug, Clone, Copy)]
pub(super) enum Routing {
    /// Softmax; `norm_topk_prob`, or this.
    Softmax { normalize: Option<bool> },
    /// DeepSeek-V2: softmax, groups by their best expert if `topk_method` says so, `routed_scaling_factor`.
    SoftmaxGroups,
    /// DeepSeek-V3: sigmoid, correction bias, groups by their two best experts, `routed_scaling_factor`; `n_group`,
    /// `topk_group` and the factor if absent.
    SigmoidGroups { groups: (usize, usize), scale: f64 },
}

/// Which layers have experts.
#[derive(Debug, Clone, Copy)]
pub(super) enum Sparse {
    All,
    /// Every `decoder_sparse_step`th, without `mlp_only_layers`.
    Steps,
    /// From `first_k_dense_replace` on, or this.
    AfterFirst(usize),
}

impl MoeSpec {
    /// The experts of one layer, with names under `prefix` (the layer's module).
    pub(super) fn read(config: &Section, rules: &MoeRules, activation: Activation) -> Result<Self, DecoderError> {
        let wrong = |reason: String| DecoderError::Contradiction { reason };
        let key = rules.experts.iter().copied().find(|key| config.get(key).is_some()).unwrap_or(rules.experts[0]);
        let experts = config.required_size(key, 1..=MAX_EXPERTS)?;
        let top_k = config.required_size("num_experts_per_tok", 1..=MAX_EXPERTS)?;
        if top_k > experts {
            return Err(wrong(format!("`num_experts_per_tok` is {top_k}, and there are {experts} experts (`{key}`)")));
        }
        let intermediate = config.required_size(rules.intermediate, 1..=MAX_WIDTH)?;
        let flag = |default| config.flag("norm_topk_prob").map(|found| found.unwrap_or(default));
        let scale = |default| -> Result<f32, DecoderError> {
            Ok(config.number("routed_scaling_factor", 1e-6..=1e6)?.unwrap_or(default) as f32)
        };
        let scored = |by: &str| match config.text("scoring_func")? {
            Some(found) if found != by => Err(config.unsupported("scoring_func", &format!("`{by}` in this family"))),
            _ => Ok(()),
        };
        let groups = |default: (usize, usize)| -> Result<(usize, usize), DecoderError> {
            let groups = config.size("n_group", 1..=experts)?.unwrap_or(default.0);
            let kept = config.size("topk_group", 1..=groups)?.unwrap_or(default.1.min(groups));
            if !experts.is_multiple_of(groups) || kept * (experts / groups) < top_k {
                return Err(wrong(format!(
                    "{experts} experts (`{key}`) in `n_group` {groups} groups, `topk_group` {kept} of them for `num_experts_per_tok` {top_k} experts: wanted equal groups with room for them"
                )));
            }
            Ok((groups, kept))
        };
        let plain = RouterSpec {
            weight: String::new(),
            bias: rules.router.1.then(String::new),
            correction: None,
            scoring: Scoring::Softmax,
            groups: (1, 1),
            rank_by_two: false,
            normalize: false,
            scale: 1.0,
        };
        let router = match rules.routing {
            Routing::Softmax { normalize } => {
                RouterSpec { normalize: normalize.map_or_else(|| flag(false), Ok)?, ..plain }
            }
            Routing::SoftmaxGroups => {
                let grouped = match config.text("topk_method")?.unwrap_or("greedy") {
                    "greedy" => false,
                    "group_limited_greedy" => true,
                    _ => return Err(config.unsupported("topk_method", "`greedy`, `group_limited_greedy`")),
                };
                let normalize = top_k > 1 && flag(false)?;
                // Published code scales only what it does not normalise.
                let scale = if normalize { 1.0 } else { scale(1.0)? };
                scored("softmax")?;
                RouterSpec { groups: if grouped { groups((1, 1))? } else { (1, 1) }, normalize, scale, ..plain }
            }
            Routing::SigmoidGroups { groups: default, scale: factor } => {
                scored("sigmoid")?;
                if config.text("topk_method")?.is_some_and(|found| found != "noaux_tc") {
                    return Err(config.unsupported("topk_method", "`noaux_tc` in this family"));
                }
                let (groups, kept) = groups(default)?;
                if experts / groups < 2 {
                    return Err(wrong(format!(
                        "`n_group` is {groups} for {experts} experts: groups are ranked by their two best, wanted two or more in each"
                    )));
                }
                RouterSpec {
                    correction: Some(String::new()),
                    scoring: Scoring::Sigmoid,
                    groups: (groups, kept),
                    rank_by_two: true,
                    normalize: flag(true)?,
                    scale: scale(factor)?,
                    ..plain
                }
            }
        };
        let shared = match rules.shared {
            None => None,
            Some(_) => {
                let width = match rules.shared_width {
                    SharedWidth::Key(key) => config.required_size(key, 1..=MAX_WIDTH)?,
                    // At most 2³⁴.
                    SharedWidth::Times(key, default) => {
                        config.size(key, 0..=MAX_EXPERTS)?.unwrap_or(default) * intermediate
                    }
                };
                if width > MAX_WIDTH {
                    return Err(wrong(format!("the shared expert is {width} wide, wanted at most {MAX_WIDTH}")));
                }
                (width > 0).then_some(SharedSpec { intermediate: width, gate: None })
            }
        };
        let glu = match rules.joined {
            Joined::Product => Glu::Product(activation),
            Joined::Clamped { slope, limit: (key, default) } => {
                if activation != Activation::Silu {
                    return Err(config.unsupported("hidden_act", "`silu` in this family"));
                }
                let limit = config.number(key, 1e-3..=1e6)?.unwrap_or(default) as f32;
                Glu::Clamped { slope, limit }
            }
        };
        Ok(Self { experts, top_k, intermediate, router, shared, glu })
    }

    /// The same experts in the layer whose module is `prefix`.
    pub(super) fn named(&self, prefix: &str, rules: &MoeRules) -> Self {
        let mut named = self.clone();
        let module = format!("{prefix}.{}", rules.module);
        let router = format!("{module}.{}", rules.router.0);
        named.router.weight = format!("{router}.weight");
        if let Some(bias) = &mut named.router.bias {
            *bias = format!("{router}.bias");
        }
        if let Some(correction) = &mut named.router.correction {
            *correction = format!("{router}.e_score_correction_bias");
        }
        if let (Some(shared), Some(name), true) = (&mut named.shared, rules.shared, rules.shared_gate) {
            shared.gate = Some(format!("{module}.{name}_gate.weight"));
        }
        named
    }

    /// The linears, in the order of execution: gate, up and down of the shared expert, then of each routed one.
    pub(super) fn sites(&self, index: usize, prefix: &str, hidden: usize, rules: &MoeRules) -> Vec<Site> {
        let module = format!("{prefix}.{}", rules.module);
        let mut sites = Vec::with_capacity(3 * (self.experts + 1));
        let mut expert = |module: String, names: [&str; 3], width: usize, roles: [Role; 3], streams: [Stream; 2]| {
            let group = format!("{module}.gate_up");
            let shapes = [(width, hidden), (width, hidden), (hidden, width)];
            for (i, (name, (out_features, in_features))) in names.into_iter().zip(shapes).enumerate() {
                let module = format!("{module}.{name}");
                sites.push(Site {
                    id: SiteId { block: index, role: roles[i] },
                    out_features,
                    in_features,
                    input: InputId { block: index, stream: streams[i / 2] },
                    bias: rules.bias,
                    fused_group: if i < 2 { group.clone() } else { module.clone() },
                    module,
                });
            }
        };
        if let (Some(shared), Some(name)) = (&self.shared, rules.shared) {
            let names = ["gate_proj", "up_proj", "down_proj"];
            let streams = [Stream::MlpIn, Stream::SharedMid];
            expert(format!("{module}.{name}"), names, shared.intermediate, PARTS.map(Role::Shared), streams);
        }
        for e in 0..self.experts as u32 {
            let roles = PARTS.map(|part| Role::Expert(e, part));
            let streams = [Stream::ExpertIn(e), Stream::ExpertMid(e)];
            expert(format!("{module}.experts.{e}"), rules.parts, self.intermediate, roles, streams);
        }
        sites
    }

    /// The rescalings that leave the feed-forward unchanged. `norm` makes its input, if there is one.
    pub(super) fn folds(&self, index: usize, sites: &[Site], norm: Option<Producer>) -> Vec<Fold> {
        let input = |stream| InputId { block: index, stream };
        let reads_norm = |site: &&Site| matches!(site.input.stream, Stream::MlpIn | Stream::ExpertIn(_));
        let router = std::iter::once(self.router.weight.clone());
        let of_norm = |producer| Fold {
            input: input(Stream::MlpIn),
            consumers: sites.iter().filter(reads_norm).map(|s| s.id).collect(),
            plain_consumers: router.chain(self.shared.iter().filter_map(|s| s.gate.clone())).collect(),
            producer,
        };
        let mut folds: Vec<Fold> = norm.map(of_norm).into_iter().collect();
        if !self.glu.is_proportional_to_up() {
            return folds;
        }
        let mut own = |stream, up, down, rows: &Arc<[u32]>| {
            let site = |role| SiteId { block: index, role };
            folds.push(Fold {
                input: input(stream),
                consumers: vec![site(down)],
                plain_consumers: Vec::new(),
                producer: Producer::Rows { site: site(up), rows: rows.clone() },
            });
        };
        if let Some(shared) = &self.shared {
            let rows = (0..shared.intermediate as u32).collect();
            own(Stream::SharedMid, Role::Shared(Part::Up), Role::Shared(Part::Down), &rows);
        }
        let rows: Arc<[u32]> = (0..self.intermediate as u32).collect();
        for e in 0..self.experts as u32 {
            own(Stream::ExpertMid(e), Role::Expert(e, Part::Up), Role::Expert(e, Part::Down), &rows);
        }
        folds
    }
}

const PARTS: [Part; 3] = [Part::Gate, Part::Up, Part::Down];

/// Which of `layers` layers have experts.
pub(super) fn sparse_layers(config: &Section, rules: &MoeRules, layers: usize) -> Result<Vec<bool>, DecoderError> {
    Ok(match rules.sparse {
        Sparse::All => vec![true; layers],
        Sparse::Steps => {
            let step = config.size("decoder_sparse_step", 1..=layers.max(1))?.unwrap_or(1);
            let dense = config.indices("mlp_only_layers")?;
            (0..layers).map(|i| (i + 1).is_multiple_of(step) && !dense.contains(&i)).collect()
        }
        Sparse::AfterFirst(default) => {
            if config.size("moe_layer_freq", 1..=layers.max(1))?.is_some_and(|freq| freq != 1) {
                return Err(config.unsupported("moe_layer_freq", "1"));
            }
            let first = config.size("first_k_dense_replace", 0..=layers)?.unwrap_or(default);
            (0..layers).map(|i| i >= first).collect()
        }
    })
}
