//! What a run will cost, from shapes alone.

use std::collections::BTreeMap;

use lite_decoder::{BATCH_TOKENS, BlockSpec, Role};
use lite_quant::WeightScheme;
use lite_stats::StatsTap;

use crate::batches::IN_FLIGHT;
use crate::layer::SEARCHED_ROWS;
use crate::{QuantSite, Rounding, Solver};

/// Memory of a run, bytes. The peak does not depend on the number of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryEstimate {
    /// Program, tokenizer and allocator.
    pub base: u64,
    /// One decoder block in f32, and its pages of the source.
    pub block: u64,
    /// Gram matrices of one block.
    pub grams: u64,
    /// Hidden states of all calibration windows, in memory or (see `spooled`) in a file.
    pub hidden: u64,
    /// The quantized model's input of down for all windows, kept from the pass that gathers it to the pass that leaves
    /// the block (of experts, both models', for one of them); 0 where it is computed again, for want of room.
    pub middle: u64,
    /// Whether the hidden states are in a file.
    pub spooled: bool,
    /// Activations of one batch while a block runs.
    pub activations: u64,
    /// Copies while scales are searched and codes are chosen.
    pub solve: u64,
    /// Tuning one block: its weights' shadows, gradients and moments, and what the way back needs of one step's windows.
    pub tune: u64,
    /// The final comparison: two blocks, two streams, two batches.
    pub check: u64,
}

impl MemoryEstimate {
    /// Peak of the whole run.
    pub fn peak(&self) -> u64 {
        let kept = self.middle + if self.spooled { SPOOL.min(self.hidden / 4) } else { self.hidden };
        // Long-lived blocks among short-lived ones: some room between them is lost.
        let kept = kept + kept / 8;
        // Tuning comes when codes are chosen; the allocator has not given back all that took.
        let tuned = if self.tune > 0 { self.tune + self.activations.max(self.solve / 2) } else { 0 };
        let work = self.block + self.grams + kept + self.activations.max(self.solve).max(tuned);
        self.base + work.max(self.check)
    }
}

/// Floating-point work of a run.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Work {
    /// Forward passes of the calibration windows.
    pub forward: f64,
    /// Gram updates (one triangle).
    pub gram: f64,
    /// Scale search, range search and losses.
    pub solve: f64,
    /// The final comparison.
    pub check: f64,
}

impl Work {
    /// All of it.
    pub fn total(&self) -> f64 {
        self.forward + self.gram + self.solve + self.check
    }
}

/// The share of all tokens that a linear sees: those of a routed expert see their part.
fn share(block: &BlockSpec, role: Role) -> f64 {
    match (block.moe(), role) {
        (Some(moe), Role::Expert(..)) => moe.top_k as f64 / moe.experts as f64,
        _ => 1.0,
    }
}

/// Program and thread stacks.
const BASE: u64 = 46 << 20;
/// What a forward pass brings besides: the tokenizer's tables, buffers of the products, and what the allocator keeps of
/// freed memory, which is little within a budget. Measured, on models of 6, 8 and 43 million parameters.
const PASSES: u64 = 70 << 20;
const PASSES_WITHIN_BUDGET: u64 = 11 << 20;

/// What is on its way to the file of hidden states, or back.
const SPOOL: u64 = 8 << 20;

/// Windows of one step of tuning.
const TUNED_WINDOWS: usize = 8;

/// Panels read ahead, panels in f32, parts of plain tensors of two files.
const STREAMED: u64 = 192 << 20;

/// The shapes that cost depends on.
#[derive(Clone, Copy)]
pub(crate) struct Costs<'a> {
    pub(crate) sites: &'a [QuantSite],
    pub(crate) blocks: &'a [BlockSpec],
    pub(crate) hidden: usize,
    pub(crate) vocab: usize,
    pub(crate) windows: usize,
    pub(crate) seqlen: usize,
    pub(crate) batch: usize,
    pub(crate) eval_windows: usize,
    pub(crate) eval_seqlen: usize,
    pub(crate) search: bool,
    /// Whether Gram matrices are made.
    pub(crate) grams: bool,
    /// Whether a budget was asked for, within which freed memory goes back to the system at once.
    pub(crate) budget: bool,
    /// Whether inputs of all linears of a block are looked at in one pass, experts' included.
    pub(crate) at_once: bool,
    pub(crate) solver: Solver,
    pub(crate) source_bytes_per_weight: u64,
}

impl Costs<'_> {
    fn by_block(&self) -> BTreeMap<usize, Vec<&QuantSite>> {
        let mut blocks: BTreeMap<usize, Vec<&QuantSite>> = BTreeMap::new();
        for site in self.sites {
            blocks.entry(site.block).or_default().push(site);
        }
        blocks
    }

    /// Bytes of the records of all blocks (see [`crate::record`]), and of those of the largest one.
    pub(crate) fn records(&self) -> (u64, u64) {
        let record = |sites: &Vec<&QuantSite>| -> u64 {
            let bytes = sites.iter().map(|site| {
                let weights = site.out_features as u64 * site.in_features as u64;
                let bits = match site.scheme.weights {
                    WeightScheme::Int(scheme) => scheme.bits,
                    WeightScheme::Float(scheme) => scheme.format.bits(),
                };
                // Scales and zero points of groups of 32 or more.
                weights / if bits <= 4 { 2 } else { 1 } + weights / 6
            });
            bytes.sum()
        };
        let blocks = self.by_block();
        (blocks.values().map(record).sum(), blocks.values().map(record).max().unwrap_or(0))
    }

    /// Bytes for a run that keeps hidden states in memory.
    pub(crate) fn memory(&self) -> MemoryEstimate {
        let weights =
            |sites: &[&QuantSite]| -> u64 { sites.iter().map(|s| s.out_features as u64 * s.in_features as u64).sum() };
        let block = self.by_block().values().map(|sites| weights(sites)).max().unwrap_or(0);
        let largest = self.sites.iter().map(|s| s.out_features as u64 * s.in_features as u64).max().unwrap_or(0);
        let calibrated = self.windows > 0;
        let grams = |block: &BlockSpec| {
            let (plain, expert) = StatsTap::gram_bytes_without_experts(block);
            if self.at_once { StatsTap::gram_bytes(block) } else { plain + expert }
        };
        let grams = if self.grams { self.blocks.iter().map(grams).max().unwrap_or(0) } else { 0 };
        let widest = self.sites.iter().map(|s| s.in_features as u64).max().unwrap_or(0);
        // Folding copies the consumers of one input twice; rounding holds a copy, codes, the way back and
        // the packed bytes of one linear. Either way two Gram matrices of the widest input.
        let consumers = self
            .blocks
            .iter()
            .flat_map(|b| &b.folds)
            .map(|fold| {
                let sites = fold.consumers.iter().filter_map(|id| self.blocks.get(id.block)?.site(id.role));
                let (mut rows, mut width) = (0, 0);
                sites.for_each(|s| (rows, width) = (rows + s.out_features, s.in_features));
                // Of more rows than that a search looks at a sample.
                rows.min(SEARCHED_ROWS) as u64 * width as u64
            })
            .max()
            .unwrap_or(0);
        // A solver without a fold before it copies no consumers.
        let folded = if self.search || !self.solver.error_aware { consumers * 13 } else { 0 };
        let solve = (largest * 15).max(folded) + if calibrated && self.grams { widest * widest * 4 } else { 0 };
        let tokens = |windows: usize, seqlen: usize| windows as u64 * seqlen as u64;
        let passes = if self.budget { PASSES_WITHIN_BUDGET } else { PASSES };
        let per_token = self.activation_values() * 4;
        let experts = self.blocks.iter().any(|b| b.moe().is_some());
        // Rows of experts differ in number, so that buffers which were freed seldom fit again.
        let per_pass = per_token * if experts { 2 } else { 1 };
        let check_tokens = tokens(self.eval_windows, self.eval_seqlen);
        let check = if self.blocks.is_empty() || check_tokens == 0 {
            0
        } else {
            block * (8 + self.source_bytes_per_weight)
                + largest * 5
                // Both streams, and the batches at work on them.
                + check_tokens * self.hidden as u64 * 10
                + self.check_batch().min(check_tokens) * per_pass
                + if calibrated { 0 } else { passes }
        };
        let solves = self.solver.rounding != Rounding::Nearest;
        // The factor, its order and two copies on the way to it; the float target.
        let solve = solve + if solves && calibrated { widest * widest * 16 + largest * 8 } else { 0 };
        // Two streams, and what each keeps between attention and o.
        let heads =
            self.blocks.iter().flat_map(|b| b.site(lite_decoder::Role::O)).map(|s| s.in_features).max().unwrap_or(0);
        // With experts a stream also keeps what its router sees.
        let stores = match (self.solver.error_aware, self.solver.tune) {
            (false, _) if experts && !self.at_once => 2 * self.hidden,
            (false, _) => self.hidden,
            (true, false) if experts => 2 * (2 * self.hidden + heads),
            (true, false) => 2 * (self.hidden + heads),
            (true, true) => 3 * self.hidden + 2 * heads,
        } as u64;
        let middle =
            self.blocks.iter().flat_map(|b| b.site(lite_decoder::Role::Down)).map(|s| s.in_features).max().unwrap_or(0);
        // After tuning the whole block runs again anyway.
        let middle = if self.solver.error_aware && !self.solver.tune { middle as u64 } else { 0 };
        let middle = tokens(self.windows, self.seqlen) * middle * 4;
        let middle = if self.solver.error_aware { middle.max(self.kept_of_expert()) } else { 0 };
        let in_flight = if self.solver.error_aware { IN_FLIGHT } else { 1 };
        let grams = if self.solver.error_aware { widest * widest * 8 } else { grams };
        // Shadow, gradient and two moments in f32, windows of one step.
        let tune = block * 16 + tokens(TUNED_WINDOWS.min(self.windows), self.seqlen) * per_token / 2;
        let tune = if self.solver.tune && calibrated { tune } else { 0 };
        // The quantized block beside the float one; of experts, one at a time.
        let coded = if self.solver.error_aware { self.coded_weights() } else { 0 };
        // What is recorded of a block, and the file that is made of it; or the source's pages while it is read.
        let block = (block * (4 + self.source_bytes_per_weight)).max((block + coded) * 4 + 2 * self.records().1);
        if !calibrated {
            // Codes of one linear, packed bytes of two, panels of floats and of the source; plain tensors go through in
            // parts. fp8 codes are read as a whole: their codes and values.
            let coded = if self.source_bytes_per_weight == 1 { 5 } else { 0 };
            return MemoryEstimate {
                base: BASE,
                solve: largest * (4 + coded) + STREAMED.min(largest * 16),
                check,
                ..MemoryEstimate::default()
            };
        }
        MemoryEstimate {
            base: BASE + passes,
            block,
            grams: if calibrated { grams } else { 0 },
            hidden: tokens(self.windows, self.seqlen) * stores * 4,
            middle,
            spooled: false,
            activations: tokens((self.batch * in_flight).min(self.windows), self.seqlen) * per_pass,
            solve,
            tune,
            check,
        }
    }

    /// Bytes of an expert's intermediate rows in both streams, if tokens are spread evenly.
    fn kept_of_expert(&self) -> u64 {
        let rows = |moe: &lite_decoder::MoeSpec| {
            self.windows as f64 * self.seqlen as f64 * moe.top_k as f64 / moe.experts as f64
        };
        let bytes = |moe: &lite_decoder::MoeSpec| (rows(moe) * 2.0 * moe.intermediate as f64 * 4.0) as u64;
        self.blocks.iter().filter_map(BlockSpec::moe).map(bytes).max().unwrap_or(0).min(crate::experts::KEPT as u64)
    }

    /// Most weights of a block that are there a second time while it is solved.
    fn coded_weights(&self) -> u64 {
        let weights = |sites: &Vec<&QuantSite>| -> u64 {
            let (mut plain, mut expert) = (0, 0);
            for site in sites {
                let weights = site.out_features as u64 * site.in_features as u64;
                match site.site.map(|id| id.role) {
                    Some(Role::Expert(0, _)) => expert += weights,
                    Some(Role::Expert(..)) => {}
                    _ => plain += weights,
                }
            }
            plain + expert
        };
        self.by_block().values().map(weights).max().unwrap_or(0)
    }

    /// Tokens that the final comparison works on at a time: two batches of [`crate::Plan::batch_for`].
    fn check_batch(&self) -> u64 {
        let usual = (self.batch * self.seqlen.max(1)).max(BATCH_TOKENS) as u64;
        let window = self.eval_seqlen.max(1) as u64;
        2 * window * usual.div_ceil(2 * window)
    }

    /// Values alive per token inside a block: residual, normed input, the widest pair of intermediates.
    fn activation_values(&self) -> u64 {
        let outputs: u64 = self.blocks.first().map_or(0, |block| {
            block.sites.iter().map(|s| (s.out_features as f64 * share(block, s.id.role)) as u64).sum::<u64>()
                + block.sites.iter().map(|s| s.in_features as u64).max().unwrap_or(0)
        });
        outputs + 4 * self.hidden as u64
    }

    /// Flops of each phase.
    pub(crate) fn work(&self) -> Work {
        let mut work = Work::default();
        let tokens = (self.windows * self.seqlen) as f64;
        let eval = (self.eval_windows * self.eval_seqlen) as f64;
        for site in self.sites {
            let (n, k) = (site.out_features as f64, site.in_features as f64);
            let role = site.site.map(|id| id.role);
            let share = role.zip(self.blocks.get(site.block)).map_or(1.0, |(role, block)| share(block, role));
            let (tokens, eval) = (tokens * share, eval * share);
            if tokens > 0.0 {
                // Once for the statistics, once through the quantized block.
                let passes = if self.solver.error_aware { 3.0 } else { 2.0 };
                work.forward += passes * tokens * 2.0 * n * k;
                if self.solver.rounding != Rounding::Nearest {
                    // Solve, nearest rounding beside it, losses, sweeps; a share of the factor; the target.
                    work.solve += 12.0 * n * k * k + 2.0 / 3.0 * k * k * k;
                }
                if self.solver.tune {
                    work.forward += 100.0 * (TUNED_WINDOWS * self.seqlen) as f64 * 6.0 * n * k;
                }
                // Range search over tiles of the Gram matrix, twice in the search and once at the end;
                // losses are full products.
                let tile = 2.0 * n * k * k.min(128.0) * lite_quant::SHRINK_STEPS as f64;
                let searches = if self.search { 4.0 } else { 1.0 };
                if self.grams {
                    work.solve += searches * (tile + 2.0 * n * k * k);
                }
            }
            if !self.blocks.is_empty() {
                work.check += 3.0 * eval * 2.0 * n * k;
            }
        }
        for block in self.blocks {
            let share_of = |s: &lite_decoder::Site| (s.in_features as f64, share(block, s.id.role));
            let widths: BTreeMap<_, (f64, f64)> = block.sites.iter().map(|s| (s.input, share_of(s))).collect();
            for (k, share) in widths.values().filter(|_| self.grams) {
                let tokens = tokens * share;
                work.gram += tokens * k * k * if self.solver.error_aware { 3.0 } else { 1.0 };
                if self.search && tokens > 0.0 {
                    work.solve += 39.0 * 2.0 * 512.0 * k * k;
                }
            }
            let window = self.seqlen as f64;
            work.forward += 2.0 * tokens * 2.0 * window * self.hidden as f64;
        }
        work.check += 2.0 * eval * 2.0 * self.vocab as f64 * self.hidden as f64;
        work
    }
}
