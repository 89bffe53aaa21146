//! The whole solve of one linear: nearest rounding, error feedback, refinement, and the better of them per row.

use std::borrow::Cow;

use lite_quant::{QuantError, RangeContext, Scheme, quantize_nearest};
use rayon::prelude::*;

use crate::chunk::{Grids, LANES, ROWS, load};
use crate::compensate::compensate;
use crate::loss::losses;
use crate::refine::{Descent, RefineBuffers};
use crate::{GptqError, GptqSettings, Hessian, Problem, Solution};

/// Quantizes one linear; [`Hessian::new`] then [`Hessian::solve`].
///
/// # Errors
/// As these two.
pub fn solve(problem: &Problem, settings: &GptqSettings) -> Result<Solution, GptqError> {
    Hessian::new(problem.gram, problem.in_features, settings)?.solve(
        problem.weight,
        problem.out_features,
        problem.scheme,
    )
}

/// The float target that makes a linear on the inputs it will really see reproduce the float linear on float inputs.
///
/// Layer by layer, the input X `[T, K]` of a quantized model drifts from the float model's X̃. Minimising
/// `‖W X̃ᵀ − W* Xᵀ‖²` over W* asks for `W* XᵀX = W X̃ᵀX`, so with `G = XᵀX / T` and `C = X̃ᵀX / T`
///
/// ```text
/// W* = W C G⁻¹ = W + W (C − G) G⁻¹
/// ```
///
/// The second form keeps W exactly where the inputs agree, and with `H = G + damp·mean(diag G)·I` in place of G it
/// shrinks towards W instead of towards 0. The result goes through [`solve`] with the same G.
///
/// `weight` is `[N, K]` row-major, `cross` (C: rows are channels of X̃, columns of X) and `gram` (G) are `[K, K]`.
/// If f32 cannot factor H, f64 does; the damping is never raised here. [`Hessian::error_aware_target`] shares the
/// factor with the solve.
///
/// # Errors
/// Lengths that do not fit, NaN or Inf, damping outside (0, 1], H that cannot be factored.
pub fn error_aware_target(
    weight: &[f32],
    in_features: usize,
    cross: &[f32],
    gram: &[f32],
    damp: f32,
) -> Result<Vec<f32>, GptqError> {
    let settings = GptqSettings { damp, act_order: false, ..GptqSettings::default() };
    let hessian = Hessian::with_ladder(gram, in_features, &settings, damp)?;
    hessian.error_aware_target(weight, cross)
}

/// What came of one chunk.
#[derive(Debug, Clone, Copy, Default)]
struct Outcome {
    loss: f64,
    nearest_loss: f64,
    nearest_rows: usize,
}

/// Scratch space of one thread: about five `[K, R]` matrices.
#[derive(Default)]
struct Buffers {
    weight: Vec<f32>,
    ordered: Vec<f32>,
    nearest: Vec<f32>,
    steps: Vec<f32>,
    errors: Vec<f32>,
    scratch: Vec<f32>,
    grids: Grids,
    refine: RefineBuffers,
}

impl Hessian<'_> {
    /// Quantizes one linear (`weight` `[N, K]` row-major) that reads this input.
    ///
    /// Dead channels are zeroed. Group parameters come from nearest rounding of the float target and are fixed before
    /// the solve; the refinement then re-fits scales. Rows on which nearest rounding has the smaller Gram loss keep it.
    /// `N·K²·(3 + 2 + 2·sweeps)` flops besides the range search; the same bits for any number of threads.
    ///
    /// # Errors
    /// [`GptqError::Quant`]: shapes that do not fit, K not a multiple of the group, NaN or Inf in the weight.
    pub fn solve(&self, weight: &[f32], out_features: usize, scheme: &Scheme) -> Result<Solution, GptqError> {
        let (n, k) = (out_features, self.in_features);
        let wanted = n.saturating_mul(k);
        if weight.len() != wanted {
            return Err(QuantError::Length { what: "weight", found: weight.len(), wanted }.into());
        }
        let target = self.without_dead(weight);
        let context = RangeContext { weight: &target, out_features: n, in_features: k, gram: Some(self.gram) };
        let mut quantized = quantize_nearest(&context, scheme, self.settings.range)?;
        let mut total = Outcome::default();
        if !quantized.codes.is_empty() {
            let groups = scheme.groups(k)?;
            let work = (
                target.par_chunks(ROWS * k),
                quantized.codes.par_chunks_mut(ROWS * k),
                quantized.scales.par_chunks_mut(ROWS * groups),
                quantized.zeros.par_chunks(ROWS * groups),
            );
            let outcomes: Vec<Outcome> = work
                .into_par_iter()
                .with_max_len(1)
                .map_init(Buffers::default, |buffers, (weight, codes, scales, zeros)| {
                    self.solve_chunk(weight, codes, scales, zeros, scheme, groups, buffers)
                })
                .collect();
            // In the order of the rows.
            for outcome in outcomes {
                total.loss += outcome.loss;
                total.nearest_loss += outcome.nearest_loss;
                total.nearest_rows += outcome.nearest_rows;
            }
        }
        Ok(Solution {
            quantized,
            loss: total.loss,
            nearest_loss: total.nearest_loss,
            fallback: self.fallback(),
            nearest_rows: total.nearest_rows,
            kept_nearest: n > 0 && total.nearest_rows == n,
        })
    }

    /// The weight with its dead columns zeroed; borrowed where there are none, or where all are: an input that no token
    /// reached says nothing about the weight.
    fn without_dead<'w>(&self, weight: &'w [f32]) -> Cow<'w, [f32]> {
        if self.factor.is_none() || !self.dead.contains(&true) {
            return Cow::Borrowed(weight);
        }
        let mut target = weight.to_vec();
        target.par_chunks_mut(self.in_features).for_each(|row| {
            row.iter_mut().zip(&self.dead).filter(|(_, dead)| **dead).for_each(|(w, _)| *w = 0.0);
        });
        Cow::Owned(target)
    }

    /// Solves row-major rows whose codes and scales are those of nearest rounding.
    fn solve_chunk(
        &self,
        rows: &[f32],
        codes: &mut [u8],
        scales: &mut [f32],
        zeros: &[u8],
        scheme: &Scheme,
        groups: usize,
        buffers: &mut Buffers,
    ) -> Outcome {
        let k = self.in_features;
        let count = rows.len() / k;
        let lanes = count.next_multiple_of(LANES);
        let Buffers { weight, ordered, nearest, steps, errors, scratch, grids, refine } = buffers;
        load(rows, k, lanes, weight, 0.0, |w| w);
        grids.load(scales, zeros, groups, k / groups, lanes, scheme);
        load(codes, k, lanes, nearest, 0.0, f32::from);
        for (column, nearest) in nearest.chunks_exact_mut(lanes).enumerate() {
            nearest.iter_mut().zip(grids.of_column(column).1).for_each(|(step, &zero)| *step -= f32::from(zero));
        }
        grids.errors_into(weight, nearest, errors);
        let nearest_losses = losses(errors, self.gram, k, lanes, scratch);
        let nearest_loss = nearest_losses[..count].iter().sum();
        let Some(factor) = &self.factor else {
            return Outcome { loss: nearest_loss, nearest_loss, nearest_rows: count };
        };

        ordered.clear();
        for &channel in &self.order {
            ordered.extend_from_slice(&weight[channel * lanes..(channel + 1) * lanes]);
        }
        steps.resize(k * lanes, 0.0);
        compensate(ordered, steps, grids, &self.order, factor, self.settings.block, errors);
        if self.settings.refine_sweeps > 0 {
            let descent = Descent { weight, gram: self.gram, ridge: self.ridge(), k, scheme };
            descent.run(steps, grids, self.settings.refine_sweeps, refine);
        }
        grids.errors_into(weight, steps, errors);
        let solved_losses = losses(errors, self.gram, k, lanes, scratch);

        let mut outcome = Outcome { nearest_loss, ..Outcome::default() };
        for row in 0..count {
            if solved_losses[row].is_nan() || solved_losses[row] > nearest_losses[row] {
                outcome.nearest_rows += 1;
                outcome.loss += nearest_losses[row];
                continue;
            }
            outcome.loss += solved_losses[row];
            for group in 0..groups {
                let zero = f32::from(zeros[row * groups + group]);
                scales[row * groups + group] = grids.scales[group * lanes + row];
                let width = grids.width;
                let codes = &mut codes[row * k + group * width..row * k + (group + 1) * width];
                for (code, step) in codes.iter_mut().zip(steps[group * width * lanes + row..].iter().step_by(lanes)) {
                    *code = (step + zero) as u8;
                }
            }
        }
        outcome
    }
}
