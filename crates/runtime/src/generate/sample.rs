//! From logits to a token, as transformers' `generate` does it.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::RuntimeError;

/// How tokens are chosen. The defaults are greedy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplerSettings {
    /// Logits are divided by this; 0: the most likely token, without chance.
    pub temperature: f32,
    /// Only this many of the most likely tokens stay, and those that tie with the last of them; 0: all.
    pub top_k: usize,
    /// Only the most likely tokens that together have this probability stay, at least one; 1: all.
    pub top_p: f32,
    /// Logits of tokens already there are divided by this if positive, multiplied if negative (Keskar et al. 2019,
    /// arXiv:1909.05858); 1: nothing happens. The prompt counts.
    pub repetition_penalty: f32,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for SamplerSettings {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, repetition_penalty: 1.0, seed: 0 }
    }
}

/// Chooses tokens; the same settings and logits give the same tokens on every machine.
#[derive(Debug, Clone)]
pub struct Sampler {
    settings: SamplerSettings,
    random: ChaCha8Rng,
}

impl Sampler {
    /// A sampler at the start of its random numbers.
    ///
    /// # Errors
    /// [`RuntimeError::GenerateSetting`] for values out of range.
    pub fn new(settings: SamplerSettings) -> Result<Self, RuntimeError> {
        let SamplerSettings { temperature, top_p, repetition_penalty, seed, .. } = settings;
        let wrong = |setting, found: f32, wanted| {
            Err(RuntimeError::GenerateSetting { setting, found: found.to_string(), wanted })
        };
        if !(temperature >= 0.0 && temperature.is_finite()) {
            return wrong("temperature", temperature, "a number from 0 on");
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return wrong("top-p", top_p, "a number above 0, at most 1");
        }
        if !(repetition_penalty > 0.0 && repetition_penalty.is_finite()) {
            return wrong("repetition-penalty", repetition_penalty, "a number above 0 (1: no penalty)");
        }
        Ok(Self { settings, random: ChaCha8Rng::seed_from_u64(seed) })
    }

    /// The next token from finite `logits` `(vocab)`, which are changed, after the tokens in `seen`.
    pub fn pick(&mut self, logits: &mut [f32], seen: &[u32]) -> u32 {
        if self.settings.temperature == 0.0 {
            penalize(logits, seen, self.settings.repetition_penalty);
            // The first of equals, as torch.argmax.
            let best = logits.iter().enumerate().fold((0, f32::NEG_INFINITY), |best, (index, logit)| {
                if *logit > best.1 { (index, *logit) } else { best }
            });
            return best.0 as u32;
        }
        let probabilities = self.probabilities(logits, seen);
        let total: f64 = probabilities.iter().map(|p| f64::from(*p)).sum();
        // 53 bits: evenly spaced in [0, 1).
        let draw = (self.random.next_u64() >> 11) as f64 / (1u64 << 53) as f64 * total;
        let mut sum = 0.0;
        let mut last = 0;
        for (index, p) in probabilities.iter().enumerate().filter(|(_, p)| **p > 0.0) {
            sum += f64::from(*p);
            last = index;
            if draw < sum {
                break;
            }
        }
        last as u32
    }

    /// What is sampled from: repetition penalty, temperature, top-k and top-p, in this order, then softmax.
    fn probabilities(&self, logits: &mut [f32], seen: &[u32]) -> Vec<f32> {
        let settings = &self.settings;
        penalize(logits, seen, settings.repetition_penalty);
        logits.iter_mut().for_each(|v| *v /= settings.temperature);
        keep_top_k(logits, settings.top_k);
        keep_top_p(logits, settings.top_p);
        softmax(logits)
    }
}

fn penalize(logits: &mut [f32], seen: &[u32], penalty: f32) {
    if penalty == 1.0 {
        return;
    }
    let mut ids = seen.to_vec();
    ids.sort_unstable();
    ids.dedup();
    for id in ids {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
        }
    }
}

fn keep_top_k(logits: &mut [f32], k: usize) {
    if k == 0 || k >= logits.len() {
        return;
    }
    let mut sorted = logits.to_vec();
    let (_, least, _) = sorted.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
    let least = *least;
    for logit in logits.iter_mut().filter(|v| **v < least) {
        *logit = f32::NEG_INFINITY;
    }
}

fn keep_top_p(logits: &mut [f32], p: f32) {
    if p >= 1.0 {
        return;
    }
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*a].total_cmp(&logits[*b]));
    let probabilities = softmax(logits);
    let mut sum = 0f32;
    // From the least likely on, all but one, while together they are what may go.
    for index in order.into_iter().take(logits.len().saturating_sub(1)) {
        sum += probabilities[index];
        if sum > 1.0 - p {
            break;
        }
        logits[index] = f32::NEG_INFINITY;
    }
}

fn softmax(logits: &[f32]) -> Vec<f32> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut out: Vec<f32> = logits.iter().map(|v| (v - largest).exp()).collect();
    let total: f32 = out.iter().sum();
    out.iter_mut().for_each(|v| *v /= total);
    out
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    /// A case of `tests/generators/sampling_golden.py`.
    #[derive(Deserialize)]
    struct Case {
        logits: Vec<f32>,
        seen: Vec<u32>,
        temperature: f32,
        top_k: usize,
        top_p: f32,
        repetition_penalty: f32,
        probabilities: Vec<f32>,
    }

    #[test]
    fn probabilities_are_those_of_transformers() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/generate/sampling.json");
        let cases: Vec<Case> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert!(cases.len() > 15);
        for (index, case) in cases.into_iter().enumerate() {
            let Case { temperature, top_k, top_p, repetition_penalty, .. } = case;
            let settings = SamplerSettings { temperature, top_k, top_p, repetition_penalty, seed: 0 };
            let found = Sampler::new(settings).unwrap().probabilities(&mut case.logits.clone(), &case.seen);
            for (token, (a, b)) in found.iter().zip(&case.probabilities).enumerate() {
                assert_eq!(*a == 0.0, *b == 0.0, "case {index}, token {token}: {a} {b}");
                assert!((a - b).abs() < 1e-6, "case {index}, token {token}: {a} {b}");
            }
        }
    }

    #[test]
    fn draws_follow_the_probabilities_and_the_seed() {
        // Softmax of these at temperature 0.5 is proportional to 1, 4, 16.
        let logits = [0.0, 2f32.ln(), 4f32.ln()];
        let settings = SamplerSettings { temperature: 0.5, seed: 11, ..SamplerSettings::default() };
        let draw = |seed| {
            let mut sampler = Sampler::new(SamplerSettings { seed, ..settings }).unwrap();
            (0..21_000).map(|_| sampler.pick(&mut logits.clone(), &[])).collect::<Vec<u32>>()
        };
        let drawn = draw(11);
        for (token, wanted) in [(0, 1000.0), (1, 4000.0), (2, 16_000.0)] {
            let count = drawn.iter().filter(|t| **t == token).count() as f64;
            assert!((count - wanted).abs() < 5.0 * f64::sqrt(wanted), "{token}: {count}");
        }
        assert_eq!(drawn, draw(11));
        assert_ne!(drawn, draw(12));
        // A release that draws other numbers is a change that users see.
        assert_eq!(drawn[..10], [2, 1, 2, 2, 1, 2, 1, 2, 2, 1]);
    }

    #[test]
    fn greedy_takes_the_first_of_the_best_and_heeds_the_penalty() {
        let mut sampler = Sampler::new(SamplerSettings::default()).unwrap();
        assert_eq!(sampler.pick(&mut [0.0, 2.0, 2.0], &[1]), 1);
        let settings = SamplerSettings { repetition_penalty: 2.0, ..SamplerSettings::default() };
        let mut sampler = Sampler::new(settings).unwrap();
        assert_eq!(sampler.pick(&mut [0.0, 2.0, 1.5], &[1, 1, 900]), 2);
        assert_eq!(sampler.pick(&mut [-3.0, -2.0, -3.5], &[1]), 0);
    }

    #[test]
    fn settings_out_of_range_are_named() {
        let check = |settings| Sampler::new(settings).unwrap_err().to_string();
        let base = SamplerSettings::default();
        assert!(check(SamplerSettings { temperature: -1.0, ..base }).contains("`temperature` is -1"));
        assert!(check(SamplerSettings { top_p: 0.0, ..base }).contains("`top-p` is 0"));
        assert!(check(SamplerSettings { top_p: f32::NAN, ..base }).contains("`top-p` is NaN"));
        assert!(check(SamplerSettings { repetition_penalty: 0.0, ..base }).contains("`repetition-penalty` is 0"));
    }
}
