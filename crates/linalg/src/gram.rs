//! Gram matrices `G += XᵀX`, one triangle, by column panels.
//!
//! A full product does twice the work that symmetry asks for; a panel loop over the lower triangle
//! keeps the speed of `gemm` and saves most of it: panel `j` computes rows `j..K` of columns
//! `j..j+w`. With w = 512 the overhead over the exact triangle is `w/K`.

use rayon::prelude::*;

use crate::{Mat, Threads, gemm_into};

/// Widest panel; narrower ones are used until every thread has work.
const PANEL: usize = 512;

/// Adds `XᵀX` of `x` (`(tokens, k)` row-major) to the lower triangle of `gram` (`[k, k]`).
/// What lies above the diagonal is unspecified until [`mirror_lower`].
///
/// # Panics
/// If the slices do not fit their shapes.
pub fn gram_update(gram: &mut [f32], x: &[f32], tokens: usize, k: usize) {
    assert_eq!(gram.len(), k * k, "Gram matrix does not fit its shape");
    assert_eq!(x.len(), tokens * k, "activations do not fit their shape");
    // The cut depends on the shape alone, never on the number of threads.
    let width = if k >= 4 * PANEL { PANEL } else { k.div_ceil(4).next_multiple_of(16).max(16) };
    // Row bands of G: band [r, r + width) × columns [0, r + width) are contiguous rows, so bands
    // can be handed to threads as disjoint slices. Largest bands first, for balance.
    let mut bands: Vec<(usize, &mut [f32])> = gram.chunks_mut(width * k).enumerate().collect();
    bands.reverse();
    bands.into_par_iter().with_max_len(1).for_each(|(band, rows)| {
        let start = band * width;
        let height = rows.len() / k;
        let left = Mat::window(x, start, tokens, height, k).t();
        let right = Mat::window(x, 0, tokens, start + height, k);
        gemm_into(rows, k, 1.0, 1.0, left, right, Threads::One);
    });
}

/// Copies the lower triangle of `gram` (`[k, k]`) to the upper one, scaling everything by `factor`.
///
/// # Panics
/// If the slice does not fit its shape.
pub fn mirror_lower(gram: &mut [f32], k: usize, factor: f32) {
    assert_eq!(gram.len(), k * k, "Gram matrix does not fit its shape");
    const TILE: usize = 64;
    for row_tile in (0..k).step_by(TILE) {
        for col_tile in (0..=row_tile).step_by(TILE) {
            for i in row_tile..(row_tile + TILE).min(k) {
                for j in col_tile..(col_tile + TILE).min(i + 1) {
                    let value = gram[i * k + j] * factor;
                    gram[i * k + j] = value;
                    gram[j * k + i] = value;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn panels_give_the_gram_matrix(tokens in 1usize..40, k in 1usize..150, seed in any::<u32>()) {
            let x: Vec<f32> = (0..tokens * k)
                .map(|i| ((i as u32).wrapping_mul(747_796_405).wrapping_add(seed) >> 9) as f32 / 4e6 - 1.0)
                .collect();
            let mut gram = vec![0f32; k * k];
            // Two halves: updates accumulate.
            let cut = tokens / 2;
            gram_update(&mut gram, &x[..cut * k], cut, k);
            gram_update(&mut gram, &x[cut * k..], tokens - cut, k);
            mirror_lower(&mut gram, k, 0.5);
            for i in 0..k {
                for j in 0..k {
                    let wanted: f64 = (0..tokens).map(|t| f64::from(x[t * k + i]) * f64::from(x[t * k + j])).sum();
                    prop_assert!((f64::from(gram[i * k + j]) - 0.5 * wanted).abs() < 1e-4);
                }
            }
        }
    }
}
