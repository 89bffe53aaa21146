//! Greedy continuations side by side: log-likelihoods can look well while generation does not.

use std::cell::Cell;
use std::path::Path;

use crate::RuntimeError;
use crate::generate::{GenerateSettings, KvPrecision, ResidentModel, generate};

/// Longest cycle looked for, tokens.
const LONGEST_CYCLE: usize = 8;
/// Repetitions that make a cycle a degenerate one.
const REPEATS: usize = 8;

/// A degenerate ending: `cycle` tokens over and over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Repetition {
    /// Where the cycle begins, tokens from the start of the continuation.
    pub start: usize,
    /// Length of the cycle, tokens.
    pub cycle: usize,
}

/// Two greedy continuations of one prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Canary {
    /// The prompt.
    pub prompt: Vec<u32>,
    /// Tokens asked for.
    pub length: usize,
    /// Tokens before the first that differs; `length`, or less if both stopped together, if none does.
    pub matching: usize,
    /// Whether nothing differs.
    pub identical: bool,
    /// The quantized model's loop, if it fell into one.
    pub quantized: Option<Repetition>,
    /// The original's loop, if it fell into one.
    pub original: Option<Repetition>,
}

/// Continues a prompt greedily: calls the sink with each new token, and stops when the sink returns false.
pub type Continue<'a> = dyn FnMut(&[u32], &mut dyn FnMut(u32) -> bool) -> Result<(), RuntimeError> + 'a;

/// Continues `prompt` by both models, at most `length` tokens.
///
/// # Errors
/// Those of the models.
pub fn canary(
    prompt: &[u32],
    length: usize,
    original: &mut Continue<'_>,
    quantized: &mut Continue<'_>,
) -> Result<Canary, RuntimeError> {
    let run = |model: &mut Continue<'_>| {
        let mut found: Vec<u32> = Vec::with_capacity(length);
        if length > 0 {
            model(prompt, &mut |token| {
                found.push(token);
                found.len() < length
            })?;
        }
        found.truncate(length);
        Ok::<_, RuntimeError>(found)
    };
    let (a, b) = (run(original)?, run(quantized)?);
    Ok(Canary {
        prompt: prompt.to_vec(),
        length,
        matching: a.iter().zip(&b).take_while(|(a, b)| a == b).count(),
        identical: a == b,
        quantized: repetition(&b),
        original: repetition(&a),
    })
}

/// The canaries of several prompts, greedy and past end tokens, on checkpoints on disk. Each model is in memory alone.
///
/// `kv` is how the quantized model's cache is rounded. `go_on` is told how many continuations are done, of how many, and
/// says whether to go on.
///
/// # Errors
/// Models that cannot be read, prompts that do not fit, NaN or Inf, or a stop asked for by `go_on`.
pub fn canaries(
    original: &Path,
    quantized: &Path,
    prompts: &[Vec<u32>],
    length: usize,
    kv: KvPrecision,
    go_on: &dyn Fn(usize, usize) -> bool,
) -> Result<Vec<Canary>, RuntimeError> {
    let done = Cell::new(0);
    let all = 2 * prompts.len();
    let step = || if go_on(done.replace(done.get() + 1), all) { Ok(()) } else { Err(RuntimeError::Interrupted) };
    let settings =
        |kv| GenerateSettings { max_new_tokens: length, kv, ignore_eos: true, ..GenerateSettings::default() };
    let wanted: Vec<Vec<u32>> = {
        let model = ResidentModel::open(original)?;
        let run = |prompt: &Vec<u32>| -> Result<Vec<u32>, RuntimeError> {
            step()?;
            Ok(generate(&model, prompt, &settings(KvPrecision::Float), &mut |_| true)?.tokens)
        };
        prompts.iter().map(run).collect::<Result<_, _>>()?
    };
    let model = ResidentModel::open(quantized)?;
    let compare = |(prompt, wanted): (&Vec<u32>, &Vec<u32>)| {
        step()?;
        let mut recorded = |_: &[u32], sink: &mut dyn FnMut(u32) -> bool| {
            let _ = wanted.iter().all(|token| sink(*token));
            Ok(())
        };
        let mut live =
            |prompt: &[u32], sink: &mut dyn FnMut(u32) -> bool| generate(&model, prompt, &settings(kv), sink).map(drop);
        canary(prompt, length, &mut recorded, &mut live)
    };
    prompts.iter().zip(&wanted).map(compare).collect()
}

/// The first cycle of at most 8 tokens that is repeated at least 8 times, anywhere in `tokens`; of several at one
/// place the shortest.
pub fn repetition(tokens: &[u32]) -> Option<Repetition> {
    let found = (1..=LONGEST_CYCLE).filter_map(|cycle| {
        // Tokens in a row that equal the one a cycle before.
        let mut run = 0;
        for at in cycle..tokens.len() {
            run = if tokens[at] == tokens[at - cycle] { run + 1 } else { 0 };
            if run == cycle * (REPEATS - 1) {
                return Some(Repetition { start: at + 1 - cycle * REPEATS, cycle });
            }
        }
        None
    });
    found.min_by_key(|r| (r.start, r.cycle))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loops_are_found_from_eight_turns_on() {
        let text = |head: &[u32], cycle: &[u32], turns: usize| [head.to_vec(), cycle.repeat(turns)].concat();
        assert_eq!(repetition(&text(&[1, 2], &[7], 8)), Some(Repetition { start: 2, cycle: 1 }));
        assert_eq!(repetition(&text(&[1, 2], &[7], 7)), None);
        let long = [1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(repetition(&text(&[9; 3], &long, 8)), Some(Repetition { start: 3, cycle: 8 }));
        assert_eq!(repetition(&text(&[9; 3], &long, 7)), None);
        let too_long = [1, 2, 3, 4, 5, 6, 7, 8, 9];
        assert_eq!(repetition(&text(&[], &too_long, 20)), None);
        // In the middle, and the earlier of two.
        let both = [text(&[1], &[5, 6], 8), text(&[1, 2, 3], &[4], 30)].concat();
        assert_eq!(repetition(&both), Some(Repetition { start: 1, cycle: 2 }));
        assert_eq!(repetition(&[]), None);
    }

    #[test]
    fn the_first_difference_is_counted() {
        let stream = |tokens: Vec<u32>| {
            move |_: &[u32], sink: &mut dyn FnMut(u32) -> bool| {
                let _ = tokens.iter().all(|t| sink(*t));
                Ok(())
            }
        };
        let found = canary(&[1], 5, &mut stream(vec![1, 2, 3, 4, 5, 6]), &mut stream(vec![1, 2, 9, 4, 5])).unwrap();
        assert_eq!((found.matching, found.identical, found.quantized), (2, false, None));
        let found = canary(&[1], 5, &mut stream(vec![1, 2]), &mut stream(vec![1, 2])).unwrap();
        assert_eq!((found.matching, found.identical), (2, true));
        let found = canary(&[1], 5, &mut stream(vec![1, 2, 3]), &mut stream(vec![1, 2])).unwrap();
        assert_eq!((found.matching, found.identical), (2, false));
        let found = canary(&[1], 8, &mut stream(vec![3; 9]), &mut stream(vec![4; 9])).unwrap();
        assert_eq!((found.matching, found.quantized), (0, Some(Repetition { start: 0, cycle: 1 })));
        let fails = canary(&[1], 5, &mut stream(vec![]), &mut |_, _| Err(RuntimeError::Interrupted));
        assert!(matches!(fails, Err(RuntimeError::Interrupted)));
    }
}
