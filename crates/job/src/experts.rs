//! The experts of a block, one after the other: each is solved on the rows that its router sends it, and run in both
//! streams. Besides the block itself only one expert's statistics and outputs are in memory, whatever their number.

use std::collections::BTreeMap;

use candle_core::Tensor;
use lite_decoder::{Block, InputId, MoeSpec, Role, Stream, gather, with_cpu_slice};
use lite_quant::Weights;
use lite_stats::CrossStats;

use crate::batches::in_order;
use crate::calibrate::{Pass, Sink, by_input};
use crate::entrance::Entrance;
use crate::expert_rows::{Chunk, Members, chunks};
use crate::fold::tensor;
use crate::lanes::{Lane, Lanes};
use crate::layer::{Drift, Solved, nearest, solve_input};
use crate::poor::Poor;
use crate::run::{LayerClock, Runner};
use crate::{ExpertPolicy, JobError, QuantSite};

/// Tokens per input channel from which on drift between the streams is made up for.
const TOKENS_PER_CHANNEL: u64 = 4;

/// Bytes of an expert's intermediate rows that are kept from its statistics to its outputs, where there is room for any.
pub(crate) const KEPT: usize = 256 << 20;

/// An expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expert {
    Shared,
    Routed(u32),
}

impl Expert {
    fn number(self) -> Option<u32> {
        match self {
            Self::Shared => None,
            Self::Routed(e) => Some(e),
        }
    }

    fn inputs(self, block: usize) -> [InputId; 2] {
        let streams = match self {
            Self::Shared => [Stream::MlpIn, Stream::SharedMid],
            Self::Routed(e) => [Stream::ExpertIn(e), Stream::ExpertMid(e)],
        };
        streams.map(|stream| InputId { block, stream })
    }

    fn mid(self, block: &Block, x: &Tensor) -> Result<Tensor, JobError> {
        match self {
            Self::Shared => block.shared_mid(x)?.ok_or_else(|| JobError::Input("there is no shared expert".to_owned())),
            Self::Routed(e) => Ok(block.expert_mid(e, x)?),
        }
    }

    fn out(self, block: &Block, x: &Tensor, middle: &Tensor) -> Result<Tensor, JobError> {
        Ok(match self {
            Self::Shared => block.shared_out(x, middle)?,
            Self::Routed(e) => block.expert_out(e, middle)?,
        })
    }

    /// Its rows among `tokens`, with their weights.
    fn rows(self, entrance: &Entrance) -> Members {
        match self {
            Self::Shared => every(entrance.tokens),
            Self::Routed(e) => entrance.routing.rows(e),
        }
    }
}

/// The float and the quantized stream at the experts' input.
type Entrances = [Entrance; 2];

/// What the rows of a chunk become, in the float and in the quantized stream.
type Pair = (Tensor, Tensor);

impl Runner<'_> {
    /// Solves the feed-forward of a block with experts, whose attention is solved in `coded` and whose lanes are at the
    /// heads' outputs, writes it, and moves both lanes behind the block; returns the linears' relative errors.
    pub(crate) fn solve_experts(
        &self,
        pass: &Pass<'_>,
        original: &Block,
        mut coded: Block,
        lanes: &mut Lanes,
        sink: &mut Sink<'_>,
        clock: &LayerClock<'_>,
    ) -> Result<Vec<f64>, JobError> {
        let index = original.spec().index;
        let moe = original.spec().moe().ok_or_else(|| JobError::Input(format!("block {index} has no experts")))?;
        clock.step(index, "route");
        let stage = self.enter_experts(pass, moe, original, &coded, lanes)?;
        let poor = self.poor_experts(index, &stage[1].routing.counts(moe.experts))?;
        let roots = stage[1].score_roots(&coded, poor.weighted())?;
        clock.step(index, "solve");
        let groups: BTreeMap<InputId, Vec<&QuantSite>> = by_input(self.plan, index).into_iter().collect();
        let last_block = index + 1 == pass.spec.blocks.len();
        let mut errors = Vec::new();
        for expert in all_experts(moe) {
            self.go_on()?;
            let [float, quantized] = [0, 1].map(|i| expert.rows(&stage[i]));
            let own = chunks(&float, &quantized);
            let roots = expert.number().and_then(|e| roots.get(&e)).map(Vec::as_slice);
            let poor = poor.of(expert.number());
            let work = Work { runner: self, stage: &stage, expert, own: &own, moe, poor, roots };
            let mut kept = Vec::new();
            for (mid, input) in expert.inputs(index).into_iter().enumerate() {
                let Some(sites) = groups.get(&input) else { continue };
                for (site, solved) in sites.iter().zip(work.solve(original, &coded, sites, mid == 1, &mut kept)?) {
                    self.place(&mut coded, site, &solved.quantized.dequantize())?;
                    self.finish_site(site, &solved, sink)?;
                    errors.extend(solved.error);
                }
            }
            // The last block's outputs feed nothing.
            if !last_block {
                work.add_outputs(original, &coded, kept, lanes)?;
            }
            let sites = expert.inputs(index).into_iter().filter_map(|input| groups.get(&input)).flatten();
            put_back(original, &mut coded, sites.copied())?;
        }
        Ok(errors)
    }

    /// Moves both lanes behind a solved block, from the heads' outputs: the same products of the same rows as in
    /// [`Self::solve_experts`], and so the same bits. `linears` are the solved ones; those of experts are not in `coded` yet,
    /// and are there one expert at a time.
    pub(crate) fn pass_experts(
        &self,
        pass: &Pass<'_>,
        original: &Block,
        mut coded: Block,
        linears: &[(&QuantSite, Weights)],
        lanes: &mut Lanes,
    ) -> Result<(), JobError> {
        let Some(moe) = original.spec().moe() else { return Ok(()) };
        let index = original.spec().index;
        let groups: BTreeMap<InputId, Vec<&QuantSite>> = by_input(self.plan, index).into_iter().collect();
        let solved: BTreeMap<&str, &Weights> = linears.iter().map(|(site, w)| (site.module.as_str(), w)).collect();
        let stage = self.enter_experts(pass, moe, original, &coded, lanes)?;
        for expert in all_experts(moe) {
            self.go_on()?;
            let sites = || expert.inputs(index).into_iter().filter_map(|input| groups.get(&input)).flatten().copied();
            for site in sites() {
                if let Some(weights) = solved.get(site.module.as_str()) {
                    self.place(&mut coded, site, &weights.dequantize())?;
                }
            }
            let [float, quantized] = [0, 1].map(|i| expert.rows(&stage[i]));
            let own = chunks(&float, &quantized);
            let work = Work { runner: self, stage: &stage, expert, own: &own, moe, poor: None, roots: None };
            work.add_outputs(original, &coded, Vec::new(), lanes)?;
            put_back(original, &mut coded, sites())?;
        }
        Ok(())
    }

    /// Moves both lanes behind attention, and both routers' choices.
    fn enter_experts(
        &self,
        pass: &Pass<'_>,
        moe: &MoeSpec,
        original: &Block,
        coded: &Block,
        lanes: &mut Lanes,
    ) -> Result<Entrances, JobError> {
        let windows = lanes.float.residual.windows();
        let hidden = pass.spec.hidden;
        let entrance =
            |name: &str| Ok::<_, JobError>(Entrance::new(self.store(name, windows, hidden)?, moe.top_k, hidden));
        let mut state = (lanes, [entrance("experts-in")?, entrance("experts-in-quantized")?]);
        let side = |block: &Block, lane: &Lane, (first, count): (usize, usize)| {
            let rows = count * self.plan.seqlen;
            let width = lane.heads.window_values() / self.plan.seqlen.max(1);
            let residual = lane.residual.tensor((first, count), &[rows, hidden], &self.plan.device)?;
            let heads = lane.heads.tensor((first, count), &[rows, width], &self.plan.device)?;
            let residual = block.after_attn(&residual, &heads)?;
            let normed = block.mlp_in(&residual)?;
            let routing = block.route(&normed)?;
            Ok::<_, JobError>((residual, normed, routing))
        };
        in_order(
            &mut state,
            self.batches(windows),
            |(lanes, _), batch| Ok([side(original, &lanes.float, batch)?, side(coded, &lanes.quantized, batch)?]),
            |(lanes, stage), (first, _), sides| {
                self.go_on()?;
                for (i, (residual, normed, routing)) in sides.into_iter().enumerate() {
                    let lane = if i == 0 { &mut lanes.float } else { &mut lanes.quantized };
                    lane.residual.keep(first, &residual)?;
                    stage[i].push(first, &normed, routing)?;
                }
                Ok(())
            },
        )?;
        Ok(state.1)
    }
}

/// The float weights of linears whose coded ones have served.
fn put_back<'s>(
    original: &Block,
    coded: &mut Block,
    sites: impl Iterator<Item = &'s QuantSite>,
) -> Result<(), JobError> {
    for site in sites {
        let role = crate::calibrate::role(site)?;
        if let Some(weight) = original.weight(role) {
            coded.set_weight(role, weight.clone())?;
        }
    }
    Ok(())
}

/// Whether a linear belongs to an expert, routed or shared.
pub(crate) fn is_experts(site: &QuantSite) -> bool {
    site.site.is_some_and(|id| matches!(id.role, Role::Expert(..) | Role::Shared(_)))
}

/// In the order in which their outputs are added.
fn all_experts(moe: &MoeSpec) -> impl Iterator<Item = Expert> {
    let shared = moe.shared.iter().map(|_| Expert::Shared);
    shared.chain((0..moe.experts as u32).map(Expert::Routed))
}

/// One expert at work.
struct Work<'a> {
    runner: &'a Runner<'a>,
    stage: &'a Entrances,
    expert: Expert,
    own: &'a [Chunk],
    moe: &'a MoeSpec,
    /// Its tokens, if they are too few.
    poor: Option<Poor>,
    /// What all tokens are weighted by then, unless it is rounded to nearest.
    roots: Option<&'a [f32]>,
}

impl Work<'_> {
    /// The inputs of a chunk: all its rows of the float stream, those of the quantized one that its router sends.
    fn inputs(&self, chunk: &Chunk) -> Result<Pair, JobError> {
        let device = &self.runner.plan.device;
        Ok((self.stage[0].rows(&chunk.rows, device)?, self.stage[1].rows(&chunk.rows_at(&chunk.coded.0), device)?))
    }

    fn mids(&self, original: &Block, coded: &Block, (float, quantized): &Pair) -> Result<Pair, JobError> {
        let expert = self.expert;
        let mid = |block: &Block, x: &Tensor| if x.dims()[0] > 0 { expert.mid(block, x) } else { Ok(x.clone()) };
        let (float, quantized) = rayon::join(|| mid(original, float), || mid(coded, quantized));
        Ok((float?, quantized?))
    }

    /// Solves the linears that read one input of the expert: that of gate and up, or, if `mid`, that of down.
    fn solve(
        &self,
        original: &Block,
        coded: &Block,
        sites: &[&QuantSite],
        mid: bool,
        kept: &mut Vec<Pair>,
    ) -> Result<Vec<Solved>, JobError> {
        let weights = self.runner.weights(original, sites)?;
        let plan = self.runner.plan;
        let mut solved = match self.poor {
            Some(poor) if poor.policy == ExpertPolicy::Nearest => nearest(&weights, plan)?,
            _ => {
                let Some(width) = sites.first().map(|site| site.in_features) else { return Ok(Vec::new()) };
                let stats = self.statistics(original, coded, width, mid, kept)?;
                // Fitted on few tokens, a target follows their noise.
                let enough = stats.input.tokens >= TOKENS_PER_CHANNEL * width as u64;
                let drift = if enough { Drift::Inputs(stats.cross()) } else { Drift::None };
                solve_input(&weights, stats.input.gram(), drift, plan)?
            }
        };
        for solved in &mut solved {
            // What was made for tuning is not needed: experts are not tuned.
            solved.target = None;
            if let Expert::Routed(_) = self.expert {
                solved.tokens = Some(self.own.iter().map(|chunk| chunk.coded.0.len() as u64).sum());
            }
            if let Some(poor) = self.poor {
                solved.fallback = Some(poor.words());
            }
        }
        Ok(solved)
    }

    /// The statistics of one input over the expert's own rows, or over all tokens as the router weights them.
    fn statistics(
        &self,
        original: &Block,
        coded: &Block,
        width: usize,
        mid: bool,
        kept: &mut Vec<Pair>,
    ) -> Result<CrossStats, JobError> {
        let all;
        let weighted = self.roots.is_some();
        let seen = if weighted {
            let every = every(self.stage[1].tokens);
            all = chunks(&every, &every);
            &all
        } else {
            self.own
        };
        let room = |chunks: &[Chunk]| {
            let rows: usize = chunks.iter().map(|chunk| chunk.rows.len() + chunk.coded.0.len()).sum();
            self.runner.plan.memory.middle > 0 && rows * self.moe.intermediate * 4 <= KEPT
        };
        let keeps = mid && !weighted && self.expert != Expert::Shared && room(seen);
        let mut stats = CrossStats::new(width, width);
        for chunk in seen {
            self.runner.go_on()?;
            let inputs = self.inputs(chunk)?;
            let emphasis = self.roots.map(|roots| pick(roots, &chunk.rows_at(&chunk.coded.0)));
            let (float, quantized) = if mid { self.mids(original, coded, &inputs)? } else { inputs };
            if !chunk.coded.0.is_empty() {
                let other = weighted_rows(gather(&float, &chunk.coded.0)?, emphasis.as_deref())?;
                stats.update(&other, &weighted_rows(quantized.clone(), emphasis.as_deref())?)?;
            }
            if keeps {
                kept.push((float, quantized));
            }
        }
        stats.finish()?;
        let channels = stats.input.broken_channels();
        if channels > 0 {
            let input = format!("{:?} {}", self.expert, if mid { "down" } else { "gate and up" });
            let block = original.spec().index;
            return Err(lite_stats::StatsError::NotFinite { block, input, channels, total: width }.into());
        }
        Ok(stats)
    }

    /// Adds the expert's weighted outputs to both residual streams.
    fn add_outputs(&self, original: &Block, coded: &Block, kept: Vec<Pair>, lanes: &mut Lanes) -> Result<(), JobError> {
        let mut kept = kept.into_iter();
        for chunk in self.own {
            let inputs = self.inputs(chunk)?;
            let mids = match kept.next() {
                Some(mids) => mids,
                None => self.mids(original, coded, &inputs)?,
            };
            let float = [gather(&inputs.0, &chunk.float.0)?, gather(&mids.0, &chunk.float.0)?];
            let sides = [
                (original, &float[0], &float[1], &chunk.float, &mut lanes.float.residual),
                (coded, &inputs.1, &mids.1, &chunk.coded, &mut lanes.quantized.residual),
            ];
            for (block, x, middle, (places, weights), residual) in sides {
                if places.is_empty() {
                    continue;
                }
                let out = self.expert.out(block, x, middle)?;
                let rows = chunk.rows_at(places);
                with_cpu_slice(&out, |out| residual.add_rows(&rows, weights, out))??;
            }
        }
        Ok(())
    }
}

/// All tokens.
fn every(tokens: usize) -> Members {
    ((0..tokens as u32).collect(), vec![1.0; tokens])
}

/// The values at some places.
pub(crate) fn pick(values: &[f32], places: &[u32]) -> Vec<f32> {
    places.iter().map(|place| values[*place as usize]).collect()
}

/// `√` of one expert's scores, from those of the router, `[tokens, experts]`.
pub(crate) fn score_roots(scores: &[f32], expert: u32, experts: usize) -> Vec<f32> {
    scores.chunks_exact(experts.max(1)).map(|row| row[expert as usize].max(0.0).sqrt()).collect()
}

/// Rows times factors.
pub(crate) fn weighted_rows(x: Tensor, factors: Option<&[f32]>) -> Result<Tensor, JobError> {
    let Some(factors) = factors else { return Ok(x) };
    let column = tensor(factors.to_vec(), &[factors.len(), 1], x.device())?;
    Ok(x.broadcast_mul(&column).map_err(lite_decoder::DecoderError::from)?)
}
