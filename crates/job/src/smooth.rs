//! Scales that move outliers from activations to weights, folded into a block.

use lite_decoder::{Block, BlockSpec, Fold, NoTap, Producer};
use lite_smoothquant::{
    Algorithm, Constraints, Normalisation, Sample, SearchSettings, SmoothSettings, awq_act_scales, search_alpha,
    smooth_scales,
};

use crate::calibrate::{Pass, Sink, check_fold};
use crate::fold::{apply, frozen_channels, note_scales, storable};
use crate::hidden::HiddenStates;
use crate::inputs::Seen;
use crate::layer::{Folded, SEARCHED_ROWS, consumer_rows};
use crate::run::Runner;
use crate::{JobError, Method, SmoothScales};

impl Runner<'_> {
    /// Folds the scales of every fold of the plan into `block`, asserts on the first window that its float function did
    /// not change, and writes the vectors that did.
    ///
    /// # Errors
    /// [`JobError::Smooth`] where no scales can be found; [`JobError::Fold`].
    pub(crate) fn smooth(
        &self,
        pass: &Pass<'_>,
        block: &mut Block,
        spec: &BlockSpec,
        seen: &Seen,
        hidden: &HiddenStates,
        sink: &mut Sink<'_>,
    ) -> Result<Folded, JobError> {
        let mut folded = Folded::default();
        let Method::SmoothQuant { scales } = self.plan.method else { return Ok(folded) };
        let folds = &self.plan.folds[spec.index];
        if folds.is_empty() {
            return Ok(folded);
        }
        let probe = self.windows(hidden, 0, 1, pass.spec.hidden)?;
        let before = block.forward(&probe, &pass.rope, &mut NoTap)?;
        for fold in folds {
            self.go_on()?;
            let found = self.smoothing(block, spec, seen, fold, scales)?;
            let (effective, edits) = apply(block, spec, fold, &found, &|name| pass.storage(name))?;
            note_scales(&mut folded.scales, spec, fold, &effective);
            folded.edits.extend(edits);
            folded.found.push(found);
        }
        let after = block.forward(&probe, &pass.rope, &mut NoTap)?;
        check_fold(spec.index, &probe, &before, &after)?;
        self.write_edits(&folded.edits, sink)?;
        sink.record_folded(&folded);
        Ok(folded)
    }

    /// The scales of one fold, `[K]`.
    fn smoothing(
        &self,
        block: &Block,
        spec: &BlockSpec,
        seen: &Seen,
        fold: &Fold,
        scales: SmoothScales,
    ) -> Result<Vec<f32>, JobError> {
        let nothing = || JobError::Input(format!("nothing was gathered for {}", fold.input));
        let abs_max = seen.ranges.get(&fold.input).ok_or_else(nothing)?.abs_max();
        // No token came here: there is nothing to move.
        if seen.tokens.get(&fold.input).copied().unwrap_or(0) == 0 {
            return Ok(vec![1.0; abs_max.len()]);
        }
        // Formulas take the largest weight of each channel, so they see every row.
        let searched = matches!(scales, SmoothScales::SearchedAlpha | SmoothScales::Awq);
        let weights = consumer_rows(block, spec, fold, if searched { SEARCHED_ROWS } else { usize::MAX })?;
        let weights: Vec<(&[f32], usize)> = weights.iter().map(|(w, n)| (w.as_slice(), *n)).collect();
        let frozen = frozen_channels(block, fold)?;
        // Channels of one producer row share a scale; the first of them lends its number, for rows are not channels.
        let ties = match &fold.producer {
            Producer::Rows { rows, .. } => Some(first_of_each(rows)),
            Producer::Norm { .. } => None,
        };
        let constraints = Constraints { ties: ties.as_deref(), frozen: frozen.as_deref() };
        let formula = |algorithm| {
            let settings = SmoothSettings { algorithm, normalisation: Normalisation::Middle, constraints };
            smooth_scales(&abs_max, &weights, &settings)
        };
        // Consumers of one input share a scheme, or the first one's stands for all.
        let first = fold.consumers.first().and_then(|id| self.plan.sites.iter().find(|s| s.site == Some(*id)));
        let settings = || SearchSettings {
            constraints,
            ..SearchSettings::new(first.map_or(self.plan.scheme, |site| site.scheme))
        };
        let found = match scales {
            SmoothScales::Alpha(alpha) => formula(Algorithm::SmoothQuant { alpha }),
            SmoothScales::LogEqualization => formula(Algorithm::LogEqualization),
            SmoothScales::SearchedAlpha | SmoothScales::Awq => {
                let tokens = seen.samples.get(&fold.input).ok_or_else(nothing)?;
                let sample = Sample { tokens, abs_max: &abs_max };
                let search = if scales == SmoothScales::Awq {
                    awq_act_scales(&sample, &abs_mean(tokens, abs_max.len()), &weights, &settings())
                } else {
                    search_alpha(&sample, &weights, &settings())
                };
                search.map(|search| search.scales)
            }
        };
        found.map(|found| storable(fold, found)).map_err(|source| JobError::Smooth {
            block: spec.index,
            input: format!("{:?}", fold.input.stream),
            source,
        })
    }
}

/// For each entry, the position of the first equal one.
fn first_of_each(rows: &[u32]) -> Vec<u32> {
    let mut first = std::collections::BTreeMap::new();
    rows.iter().zip(0u32..).map(|(row, at)| *first.entry(*row).or_insert(at)).collect()
}

/// `[K]` mean |x| of the sampled tokens.
fn abs_mean(tokens: &[f32], width: usize) -> Vec<f32> {
    let mut sum = vec![0f64; width];
    let mut count = 0usize;
    for row in tokens.chunks_exact(width.max(1)) {
        sum.iter_mut().zip(row).for_each(|(s, v)| *s += f64::from(v.abs()));
        count += 1;
    }
    sum.into_iter().map(|s| (s / count.max(1) as f64) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_are_numbered_by_channel() {
        assert_eq!(first_of_each(&[40, 41, 40, 41, 7]), [0, 1, 0, 1, 4]);
        assert_eq!(abs_mean(&[1.0, -2.0, 3.0, -4.0], 2), [2.0, 3.0]);
    }
}
