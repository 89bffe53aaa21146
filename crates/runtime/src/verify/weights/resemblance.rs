//! Which weight of the original a wrong one resembles.

use lite_model::printable;
use rayon::prelude::*;

use super::super::Judged;
use super::super::folds::Pair;
use super::super::original::Original;
use crate::RuntimeError;

/// Weights of the original that are looked at.
const LOOKED_AT: usize = 256;
/// Cosine from which on two weights are the same one: folds leave more, others have about 0.
const SAME: f64 = 0.7;

/// The end of a message: what the weight of `module` looks like instead.
pub(super) fn find(
    judged: &Judged<'_>,
    original: &Original,
    module: &str,
    pair: &Pair,
) -> Result<String, RuntimeError> {
    if pair.n == pair.k && cosine(&pair.ours, &transposed(&pair.theirs, pair.n)) > SAME {
        return Ok(": it is transposed".to_owned());
    }
    let same_shape = judged.linears.iter().filter(|l| l.module != module && (l.n, l.k) == (pair.n, pair.k));
    for other in same_shape.take(LOOKED_AT) {
        let Some((_, theirs)) = original.load(&format!("{}.weight", other.module))? else { continue };
        if theirs.len() == pair.ours.len() && cosine(&pair.ours, &theirs) > SAME {
            return Ok(format!(": it is that of `{}`", printable(&other.module)));
        }
    }
    Ok(": it was not made from this original, its codes are in another order, or its scales are damaged".to_owned())
}

fn transposed(values: &[f32], side: usize) -> Vec<f32> {
    (0..values.len()).into_par_iter().map(|at| values[at % side * side + at / side]).collect()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let (mut dot, mut aa, mut bb) = (0f64, 0f64, 0f64);
    for (a, b) in a.iter().zip(b) {
        let (a, b) = (f64::from(*a), f64::from(*b));
        dot += a * b;
        aa += a * a;
        bb += b * b;
    }
    dot / (aa * bb).sqrt()
}
