//! The feed-forward of a block with experts: routing, and each expert on its own rows.

use candle_core::{DType, Tensor};
use lite_linalg::Threads;
use rayon::prelude::*;

use crate::{Block, DecoderError, MlpSpec, MoeSpec, Part, Role, RouterSpec, Scoring, Stream, ops, with_cpu_slice};

/// Experts that run side by side. A constant, so that results and memory do not depend on the number of threads.
const TOGETHER: usize = 4;

/// Which experts each token passes through, and how much of each it takes.
#[derive(Debug, Clone, PartialEq)]
pub struct Routing {
    top_k: usize,
    /// `[tokens, top_k]`
    experts: Vec<u32>,
    /// `[tokens, top_k]`
    weights: Vec<f32>,
}

impl Routing {
    /// Rows of an input that go to `expert`, in their order, with their weights.
    pub fn rows(&self, expert: u32) -> (Vec<u32>, Vec<f32>) {
        let at = |(i, _): (usize, &u32)| ((i / self.top_k) as u32, self.weights[i]);
        self.experts.iter().enumerate().filter(|(_, e)| **e == expert).map(at).unzip()
    }

    /// Tokens of each of the first `experts` experts.
    pub fn counts(&self, experts: usize) -> Vec<usize> {
        let mut counts = vec![0; experts];
        for expert in &self.experts {
            if let Some(count) = counts.get_mut(*expert as usize) {
                *count += 1;
            }
        }
        counts
    }

    /// The tokens of `self`, then those of `more`.
    pub fn append(&mut self, more: Self) {
        self.experts.extend(more.experts);
        self.weights.extend(more.weights);
    }

    /// No tokens yet, of a router that picks `top_k` experts.
    pub fn empty(top_k: usize) -> Self {
        Self { top_k: top_k.max(1), experts: Vec::new(), weights: Vec::new() }
    }
}

/// Scores `[tokens, experts]` of logits, in place.
fn score(logits: &mut [f32], experts: usize, scoring: Scoring) {
    logits.par_chunks_mut(experts.max(1)).for_each(|row| match scoring {
        Scoring::Softmax => {
            let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            row.iter_mut().for_each(|v| *v = (*v - largest).exp());
            let sum: f32 = row.iter().sum();
            row.iter_mut().for_each(|v| *v /= sum);
        }
        Scoring::Sigmoid => row.iter_mut().for_each(|v| *v = 1.0 / (1.0 + (-*v).exp())),
    });
}

/// The experts of one token: the best `top_k` by `choice`, best first; of equals the first.
fn choose(choice: &mut [f32], router: &RouterSpec, top_k: usize) -> Vec<u32> {
    let best = |choice: &[f32], count: usize| -> Vec<u32> {
        let mut order: Vec<u32> = (0..choice.len() as u32).collect();
        let rank = |i: &u32| choice[*i as usize];
        order.sort_by(|a, b| rank(b).total_cmp(&rank(a)).then(a.cmp(b)));
        order.truncate(count);
        order
    };
    let (groups, kept) = router.groups;
    if kept < groups {
        let size = choice.len() / groups;
        let ranks: Vec<f32> = choice
            .chunks_exact(size)
            .map(|group| {
                let two = best(group, if router.rank_by_two { 2 } else { 1 });
                two.iter().map(|i| group[*i as usize]).sum()
            })
            .collect();
        let allowed = best(&ranks, kept);
        for (group, values) in choice.chunks_exact_mut(size).enumerate() {
            if !allowed.contains(&(group as u32)) {
                values.fill(f32::NEG_INFINITY);
            }
        }
    }
    best(choice, top_k)
}

impl MoeSpec {
    /// Turns a router's logits `[tokens, experts]` into scores, in place.
    pub fn score(&self, logits: &mut [f32]) {
        score(logits, self.experts, self.router.scoring);
    }

    /// The experts of each token, from its scores `[tokens, experts]` and the correction `[experts]`, if there is one.
    pub fn pick(&self, scores: &[f32], correction: Option<&[f32]>) -> Routing {
        let router = &self.router;
        let picked: Vec<(Vec<u32>, Vec<f32>)> = scores
            .par_chunks(self.experts.max(1))
            .map(|scores| {
                let mut choice = scores.to_vec();
                choice.iter_mut().zip(correction.unwrap_or_default()).for_each(|(c, b)| *c += b);
                let experts = choose(&mut choice, router, self.top_k);
                let mut weights: Vec<f32> = experts.iter().map(|e| scores[*e as usize]).collect();
                if router.normalize {
                    let sum: f32 = weights.iter().sum();
                    // Sigmoids may all be zero; the published code adds this.
                    let sum = if router.scoring == Scoring::Sigmoid { sum + 1e-20 } else { sum };
                    weights.iter_mut().for_each(|w| *w /= sum);
                }
                weights.iter_mut().for_each(|w| *w *= router.scale);
                (experts, weights)
            })
            .collect();
        let mut routing = Routing::empty(self.top_k);
        for (experts, weights) in picked {
            routing.experts.extend(experts);
            routing.weights.extend(weights);
        }
        routing
    }
}

impl Block {
    fn moe_spec(&self) -> Result<&MoeSpec, DecoderError> {
        match &self.spec().mlp {
            MlpSpec::Moe(moe) => Ok(moe),
            _ => Err(DecoderError::input(format!("block {} has no experts", self.spec().index))),
        }
    }

    /// The router's scores `[tokens, experts]` of `normed` ([`Stream::MlpIn`]).
    ///
    /// # Errors
    /// If the block has no router, or `normed` does not fit.
    pub fn router_scores(&self, normed: &Tensor) -> Result<Vec<f32>, DecoderError> {
        let moe = self.moe_spec()?;
        let weight = self.plain(&moe.router.weight)?;
        let bias = moe.router.bias.as_ref().map(|name| self.plain(name)).transpose()?;
        let logits = ops::linear(normed, weight, bias, self.compute().is_composed())?;
        let mut scores = with_cpu_slice(&logits, <[f32]>::to_vec)?;
        moe.score(&mut scores);
        Ok(scores)
    }

    /// Which experts each row of `normed` ([`Stream::MlpIn`]) goes to.
    ///
    /// # Errors
    /// As [`Block::router_scores`].
    pub fn route(&self, normed: &Tensor) -> Result<Routing, DecoderError> {
        let (moe, scores) = (self.moe_spec()?, self.router_scores(normed)?);
        let correction = moe.router.correction.as_ref().map(|name| self.plain(name)).transpose()?;
        let correction = correction.map(|tensor| with_cpu_slice(tensor, <[f32]>::to_vec)).transpose()?;
        Ok(moe.pick(&scores, correction.as_deref()))
    }

    /// Gate and up of an expert, joined ([`crate::Glu`]): rows of its input to rows of its down's input.
    ///
    /// # Errors
    /// If the block has no such expert, or `x` does not fit.
    pub fn expert_mid(&self, expert: u32, x: &Tensor) -> Result<Tensor, DecoderError> {
        self.gated_parts(Threads::All, [Role::Expert(expert, Part::Gate), Role::Expert(expert, Part::Up)], x)
    }

    /// Down of an expert, not yet weighted.
    ///
    /// # Errors
    /// As [`Block::expert_mid`].
    pub fn expert_out(&self, expert: u32, middle: &Tensor) -> Result<Tensor, DecoderError> {
        self.linear(Role::Expert(expert, Part::Down), middle)
    }

    /// The input of the shared expert's down; `None` without one.
    ///
    /// # Errors
    /// If `normed` does not fit.
    pub fn shared_mid(&self, normed: &Tensor) -> Result<Option<Tensor>, DecoderError> {
        if self.moe_spec()?.shared.is_none() {
            return Ok(None);
        }
        self.gated_parts(Threads::All, [Role::Shared(Part::Gate), Role::Shared(Part::Up)], normed).map(Some)
    }

    /// What the shared expert adds to the residual stream.
    ///
    /// # Errors
    /// If there is none, or the inputs do not fit.
    pub fn shared_out(&self, normed: &Tensor, middle: &Tensor) -> Result<Tensor, DecoderError> {
        let out = self.linear(Role::Shared(Part::Down), middle)?;
        let Some(gate) = self.moe_spec()?.shared.as_ref().and_then(|shared| shared.gate.as_ref()) else {
            return Ok(out);
        };
        let gate = ops::linear(normed, self.plain(gate)?, None, self.compute().is_composed())?;
        Ok(out.broadcast_mul(&sigmoid(&gate)?)?)
    }

    fn gated_parts(&self, threads: Threads, roles: [Role; 2], x: &Tensor) -> Result<Tensor, DecoderError> {
        let moe = self.moe_spec()?;
        let parts = [self.linear_on(threads, roles[0], x)?, self.linear_on(threads, roles[1], x)?];
        let width = parts[0].dim(1)?;
        ops::gated(&parts, width, moe.glu, self.compute().is_composed())
    }

    /// The feed-forward with experts: `normed` ([`Stream::MlpIn`]) to what is added to the residual stream. `see` is
    /// shown the input of every linear and gives what the linear reads; the last outputs are made only if `output`.
    pub(crate) fn experts(
        &self,
        normed: &Tensor,
        output: bool,
        see: &mut dyn FnMut(Stream, Tensor) -> Result<Tensor, DecoderError>,
    ) -> Result<Option<Tensor>, DecoderError> {
        let moe = self.moe_spec()?;
        let routing = self.route(normed)?;
        let read = see(Stream::MlpIn, normed.clone())?;
        let mut sum = Sum::new(normed.dims2()?);
        if let Some(middle) = self.shared_mid(&read)? {
            let middle = see(Stream::SharedMid, middle)?;
            if output {
                sum.start(&self.shared_out(normed, &middle)?)?;
            }
        }
        let used: Vec<u32> =
            routing.counts(moe.experts).iter().zip(0u32..).filter(|(n, _)| **n > 0).map(|(_, e)| e).collect();
        // Where an expert is one thread's, nobody waits for a product that is cut in small pieces.
        let threads = if rayon::current_num_threads() <= TOGETHER { Threads::One } else { Threads::All };
        for some in used.chunks(TOGETHER) {
            let rows: Vec<(Vec<u32>, Vec<f32>)> = some.par_iter().map(|e| routing.rows(*e)).collect();
            let mut inputs = Vec::with_capacity(some.len());
            for (expert, (rows, _)) in some.iter().zip(&rows) {
                inputs.push(see(Stream::ExpertIn(*expert), gather(normed, rows)?)?);
            }
            let middles: Vec<Tensor> = some
                .par_iter()
                .zip(&inputs)
                .map(|(e, x)| self.gated_parts(threads, [Role::Expert(*e, Part::Gate), Role::Expert(*e, Part::Up)], x))
                .collect::<Result<_, DecoderError>>()?;
            let mut seen = Vec::with_capacity(some.len());
            for (expert, middle) in some.iter().zip(middles) {
                seen.push(see(Stream::ExpertMid(*expert), middle)?);
            }
            if !output {
                continue;
            }
            let outs: Vec<Tensor> = some
                .par_iter()
                .zip(&seen)
                .map(|(e, middle)| self.linear_on(threads, Role::Expert(*e, Part::Down), middle))
                .collect::<Result<_, DecoderError>>()?;
            for (out, (rows, weights)) in outs.iter().zip(&rows) {
                sum.add(out, rows, weights)?;
            }
        }
        if !output {
            return Ok(None);
        }
        Ok(Some(Tensor::from_vec(sum.values, normed.dims(), &candle_core::Device::Cpu)?.to_device(normed.device())?))
    }
}

/// Rows of `x` `(tokens, width)`, in the order asked for: `(rows.len(), width)`, also of no rows.
///
/// # Errors
/// If a row is outside of `x`, or the device fails.
pub fn gather(x: &Tensor, rows: &[u32]) -> Result<Tensor, DecoderError> {
    let (_, width) = x.dims2()?;
    if !x.device().is_cpu() {
        let index = Tensor::new(rows, x.device())?;
        return Ok(x.index_select(&index, 0)?);
    }
    let values = with_cpu_slice(x, |values| {
        let mut out = Vec::with_capacity(rows.len() * width);
        for row in rows {
            let start = *row as usize * width;
            out.extend_from_slice(values.get(start..start + width)?);
        }
        Some(out)
    })?;
    let values = values.ok_or_else(|| DecoderError::input("a row outside of an input was asked for"))?;
    Ok(Tensor::from_vec(values, (rows.len(), width), x.device())?)
}

/// The sum of the experts' outputs, `(tokens, hidden)`, formed on the host in the order of the experts.
struct Sum {
    values: Vec<f32>,
    width: usize,
}

impl Sum {
    fn new((tokens, width): (usize, usize)) -> Self {
        Self { values: vec![0f32; tokens * width], width }
    }

    fn start(&mut self, first: &Tensor) -> Result<(), DecoderError> {
        with_cpu_slice(first, |first| self.values.copy_from_slice(first))
    }

    fn add(&mut self, out: &Tensor, rows: &[u32], weights: &[f32]) -> Result<(), DecoderError> {
        with_cpu_slice(out, |out| scatter(&mut self.values, self.width, out, rows, weights))
    }
}

/// `sum[rows[i]] += weights[i] · out[i]`: `sum` and `out` are rows of `width` values, f32.
///
/// # Panics
/// If a row is outside of `sum`.
pub fn scatter(sum: &mut [f32], width: usize, out: &[f32], rows: &[u32], weights: &[f32]) {
    for ((out, row), weight) in out.chunks_exact(width.max(1)).zip(rows).zip(weights) {
        let start = *row as usize * width;
        for (s, v) in sum[start..start + width].iter_mut().zip(out) {
            *s += weight * v;
        }
    }
}

/// `1 / (1 + exp(−x))`.
fn sigmoid(x: &Tensor) -> Result<Tensor, DecoderError> {
    Ok((x.to_dtype(DType::F32)?.neg()?.exp()? + 1.0)?.recip()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn router(groups: (usize, usize), rank_by_two: bool) -> RouterSpec {
        RouterSpec {
            weight: String::new(),
            bias: None,
            correction: None,
            scoring: Scoring::Softmax,
            groups,
            rank_by_two,
            normalize: false,
            scale: 1.0,
        }
    }

    #[test]
    fn the_best_are_chosen_and_of_equals_the_first() {
        let mut scores = [0.1, 0.5, 0.2, 0.5, 0.3];
        assert_eq!(choose(&mut scores, &router((1, 1), false), 3), [1, 3, 4]);
    }

    #[test]
    fn groups_are_ranked_by_their_best_or_their_two_best() {
        let scores = [0.9, 0.0, 0.5, 0.6, 0.1, 0.2];
        assert_eq!(choose(&mut scores.clone(), &router((3, 1), false), 2), [0, 1]);
        assert_eq!(choose(&mut scores.clone(), &router((3, 1), true), 2), [3, 2]);
        assert_eq!(choose(&mut scores.clone(), &router((3, 2), true), 2), [0, 3]);
    }

    #[test]
    fn rows_and_counts_follow_the_tokens() {
        let mut routing = Routing { top_k: 2, experts: vec![0, 2, 2, 1], weights: vec![0.7, 0.3, 0.6, 0.4] };
        routing.append(Routing { top_k: 2, experts: vec![1, 2], weights: vec![0.5, 0.5] });
        assert_eq!(routing.counts(4), [1, 2, 3, 0]);
        assert_eq!(routing.rows(2), (vec![0, 1, 2], vec![0.3, 0.6, 0.5]));
        assert_eq!(routing.rows(3), (vec![], vec![]));
    }

    #[test]
    fn outputs_are_added_where_they_came_from() {
        let mut sum = vec![1f32; 6];
        scatter(&mut sum, 2, &[1.0, 2.0, 3.0, 4.0], &[2, 0], &[0.5, 2.0]);
        assert_eq!(sum, [7.0, 9.0, 1.0, 1.0, 1.5, 2.0]);
    }

    #[test]
    fn rows_are_gathered_in_order_and_none_is_no_error() {
        let x = Tensor::arange(0f32, 6.0, &candle_core::Device::Cpu).unwrap().reshape((3, 2)).unwrap();
        assert_eq!(gather(&x, &[2, 0]).unwrap().to_vec2::<f32>().unwrap(), [[4.0, 5.0], [0.0, 1.0]]);
        let none = gather(&x, &[]).unwrap();
        assert_eq!(none.dims(), [0, 2]);
        // An expert that only one of two models sends tokens to.
        assert_eq!(gather(&none, &[]).unwrap().dims(), [0, 2]);
        assert!(gather(&x, &[3]).is_err());
    }

    #[test]
    fn scores_of_a_token_sum_to_one() {
        let mut logits = vec![1000.0, 1001.0, -5.0, 0.0, 0.0, 0.0];
        score(&mut logits, 3, Scoring::Softmax);
        assert!((logits[..3].iter().sum::<f32>() - 1.0).abs() < 1e-6 && (logits[3] - 1.0 / 3.0).abs() < 1e-6);
        let mut logits = vec![0.0, 100.0, -100.0];
        score(&mut logits, 3, Scoring::Sigmoid);
        assert_eq!(logits[0], 0.5);
        assert!(logits[1] == 1.0 && logits[2] < 1e-30);
    }
}
