//! Plain weights that hold the values of codes: quantized models saved as floats ("fake quantized", dequantized).

use rayon::prelude::*;

/// Columns that may share a scale.
const WIDTHS: [usize; 4] = [128, 64, 32, 16];
/// Side of blocks that may share a scale.
const BLOCK: usize = 128;
/// Most values of a code: of 8 bits.
const MOST: usize = 256;

/// Bits of the codes that a matrix `[n, k]` may have been dequantized from, 8 at most; `None`: it has too many different
/// values under what could be one scale.
///
/// Weights of a model that was not quantized are nearly all different, so that half as many values as places, at most,
/// tell enough.
pub(super) fn bits(values: &[f32], n: usize, k: usize) -> Option<u8> {
    if k == 0 || n == 0 || values.len() != n.saturating_mul(k) {
        return None;
    }
    let groups = WIDTHS.into_iter().filter(|width| k.is_multiple_of(*width)).map(|width| (1, width));
    let wide = [(1, k), (BLOCK.min(n), BLOCK.min(k))];
    let found =
        groups.chain(wide).filter_map(|(tall, wide)| most_levels(values, k, tall, wide, MOST.min(tall * wide / 2)));
    found.min().map(|levels| (usize::BITS - levels.saturating_sub(1).leading_zeros()).max(1) as u8)
}

/// The most different values in any cell of `tall` rows and `wide` columns; `None` if that is more than `limit`.
fn most_levels(values: &[f32], k: usize, tall: usize, wide: usize, limit: usize) -> Option<usize> {
    let band = |rows: &[f32]| -> Option<usize> {
        let mut levels: Vec<u32> = Vec::new();
        let mut most = 0;
        for first in (0..k).step_by(wide.max(1)) {
            levels.clear();
            for row in rows.chunks(k) {
                for value in &row[first..(first + wide).min(k)] {
                    // Both zeros are one.
                    let value = if *value == 0.0 { 0 } else { value.to_bits() };
                    if let Err(at) = levels.binary_search(&value) {
                        if levels.len() == limit {
                            return None;
                        }
                        levels.insert(at, value);
                    }
                }
            }
            most = most.max(levels.len());
        }
        Some(most)
    };
    // The first rows settle it for nearly every weight.
    band(&values[..(k * tall).min(values.len())])?;
    values.par_chunks(k * tall).map(band).try_reduce(|| 0, |a, b| Some(a.max(b)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Normal enough, rounded to bf16.
    fn natural(n: usize, k: usize) -> Vec<f32> {
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u32 << 24) as f32
        };
        let mut value = || (next() + next() + next() + next() - 2.0) * 0.05;
        (0..n * k).map(|_| f32::from_bits(value().to_bits() & 0xffff_0000)).collect()
    }

    fn rounded(values: &[f32], tile: usize, levels: f32) -> Vec<f32> {
        let round = |group: &[f32]| {
            let scale = group.iter().fold(0f32, |most, v| most.max(v.abs())) / levels;
            // Rounded to the file's type again: equal codes stay equal.
            group
                .iter()
                .map(|v| f32::from_bits(((v / scale).round() * scale).to_bits() & 0xffff_0000))
                .collect::<Vec<_>>()
        };
        values.chunks(tile).flat_map(round).collect()
    }

    #[test]
    fn codes_leave_few_values() {
        let plain = natural(96, 768);
        assert_eq!(bits(&plain, 96, 768), None);
        for (tile, levels, wanted) in [(128, 7.0, 4), (32, 3.0, 3), (64, 1.0, 2), (768, 127.0, 8), (768, 7.0, 4)] {
            assert_eq!(bits(&rounded(&plain, tile, levels), 96, 768), Some(wanted), "{tile} {levels}");
        }
        // Groups of 128 and 8 bits leave as many values as places.
        assert_eq!(bits(&rounded(&plain, 128, 127.0), 96, 768), None);
        // Blocks: one scale over all, seen in rows too short to tell.
        assert_eq!(bits(&rounded(&plain[..128 * 128], 128 * 128, 127.0), 128, 128), Some(8));
        // A single group that is not on a grid is enough.
        let mut damaged = rounded(&plain, 128, 7.0);
        damaged[95 * 768..].copy_from_slice(&plain[95 * 768..]);
        assert_eq!(bits(&damaged, 96, 768), None);
        assert_eq!(bits(&[0.0; 256], 2, 128), Some(1));
        assert_eq!((bits(&[], 0, 0), bits(&[1.0], 2, 2)), (None, None));
    }
}
