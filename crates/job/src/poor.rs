//! Experts that few calibration tokens reach.

use std::collections::BTreeMap;

use lite_decoder::{Block, InputId, Stream};
use lite_stats::{BlockStats, InputStats};

use crate::calibrate::Pass;
use crate::experts::{score_roots, weighted_rows};
use crate::hidden::HiddenStates;
use crate::run::Runner;
use crate::{Event, ExpertPolicy, JobError};

/// Experts that a message names.
const NAMED: usize = 8;

/// An expert with too few tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Poor {
    pub(crate) tokens: u64,
    pub(crate) policy: ExpertPolicy,
}

impl Poor {
    /// What was done instead, for the report.
    pub(crate) fn words(self) -> String {
        let tokens = self.tokens;
        match self.policy {
            ExpertPolicy::Nearest => format!("rounded to nearest: only {tokens} tokens reached this expert"),
            _ => format!("used all tokens as the router weights them: only {tokens} reached this expert"),
        }
    }
}

/// The poor experts of one block.
#[derive(Debug, Default)]
pub(crate) struct PoorExperts(BTreeMap<u32, Poor>);

impl PoorExperts {
    pub(crate) fn of(&self, expert: Option<u32>) -> Option<Poor> {
        self.0.get(&expert?).copied()
    }

    /// Those for which all tokens stand, as the router weights them.
    pub(crate) fn weighted(&self) -> impl Iterator<Item = u32> {
        self.0.iter().filter(|(_, poor)| poor.policy == ExpertPolicy::Weighted).map(|(e, _)| *e)
    }

    /// That of the expert which an input belongs to.
    pub(crate) fn at(&self, input: InputId) -> Option<Poor> {
        match input.stream {
            Stream::ExpertIn(e) | Stream::ExpertMid(e) => self.of(Some(e)),
            _ => None,
        }
    }
}

impl Runner<'_> {
    /// The experts with too few of the `tokens` that reached each, said aloud.
    ///
    /// # Errors
    /// [`JobError::PoorExperts`] if there are any, and the plan has no way to go on with them.
    pub(crate) fn poor_experts(&self, block: usize, tokens: &[usize]) -> Result<PoorExperts, JobError> {
        let settings = self.plan.experts;
        let poor: BTreeMap<u32, Poor> = tokens
            .iter()
            .zip(0u32..)
            .filter(|(tokens, _)| (**tokens as u64) < settings.min_tokens)
            .map(|(tokens, e)| (e, Poor { tokens: *tokens as u64, policy: settings.policy }))
            .collect();
        if poor.is_empty() {
            return Ok(PoorExperts::default());
        }
        let mut named: Vec<String> =
            poor.iter().take(NAMED).map(|(e, poor)| format!("expert {e}: {}", poor.tokens)).collect();
        if poor.len() > NAMED {
            named.push("…".to_owned());
        }
        let (count, experts, wanted) = (poor.len(), tokens.len(), settings.min_tokens);
        let named = named.join(", ");
        if settings.policy == ExpertPolicy::Fail || !self.plan.solver.fallback {
            return Err(JobError::PoorExperts { block, count, experts, wanted, named });
        }
        let instead = match settings.policy {
            ExpertPolicy::Nearest => "they are rounded to nearest",
            _ => "all tokens stand for theirs, as the router weights them",
        };
        self.observer.event(Event::Warning(&format!(
            "block {block}: {count} of {experts} experts got fewer than {wanted} tokens ({named}); {instead}; more or longer calibration windows reach more experts"
        )));
        Ok(PoorExperts(poor))
    }

    /// Puts statistics of all tokens, as the router weights them, in the place of those of experts that few tokens
    /// reached. `hidden` are the block's inputs, `block` is the one that `stats` were gathered on.
    pub(crate) fn enrich(
        &self,
        pass: &Pass<'_>,
        block: &Block,
        hidden: &HiddenStates,
        stats: &mut BlockStats,
    ) -> Result<PoorExperts, JobError> {
        let Some(moe) = block.spec().moe() else { return Ok(PoorExperts::default()) };
        let index = block.spec().index;
        let at = |stream| InputId { block: index, stream };
        let tokens: Vec<usize> = (0..moe.experts as u32)
            .map(|e| stats.get(at(Stream::ExpertIn(e))).map_or(0, |stats| stats.tokens as usize))
            .collect();
        let poor = self.poor_experts(index, &tokens)?;
        if self.plan.experts.policy != ExpertPolicy::Weighted {
            return Ok(poor);
        }
        let mut gathered: BTreeMap<u32, [InputStats; 2]> =
            poor.0.keys().map(|e| (*e, [pass.spec.hidden, moe.intermediate].map(InputStats::new))).collect();
        if gathered.is_empty() {
            return Ok(poor);
        }
        for (first, count) in self.batches(hidden.windows()) {
            self.go_on()?;
            let x = self.windows(hidden, first, count, pass.spec.hidden)?;
            let normed = block.feed_forward_input(&x, &pass.rope)?;
            let scores = block.router_scores(&normed)?;
            for (e, [inputs, middles]) in &mut gathered {
                let roots = score_roots(&scores, *e, moe.experts);
                inputs.update_tensor(&weighted_rows(normed.clone(), Some(&roots))?)?;
                middles.update_tensor(&weighted_rows(block.expert_mid(*e, &normed)?, Some(&roots))?)?;
            }
        }
        for (e, found) in gathered {
            for (stream, mut found) in [Stream::ExpertIn(e), Stream::ExpertMid(e)].into_iter().zip(found) {
                found.collect()?;
                found.finish();
                stats.replace(at(stream), found);
            }
        }
        Ok(poor)
    }
}
