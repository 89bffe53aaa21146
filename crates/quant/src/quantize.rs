//! Nearest rounding of a whole weight matrix.

use rayon::prelude::*;

use crate::range::{SearchBuffers, min_max, search_group};
use crate::{GroupGrid, QuantError, QuantizedLinear, Scheme, grid_for_range, nearest_code};

/// How the range of each group is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Range {
    /// The smallest and largest weight.
    MinMax,
    /// The shrink factor with the least output error: see [`crate::shrink_factor`].
    Search,
}

/// A weight matrix with what is known of its input.
#[derive(Debug, Clone, Copy)]
pub struct RangeContext<'a> {
    /// `[N, K]` row-major weights.
    pub weight: &'a [f32],
    /// N.
    pub out_features: usize,
    /// K.
    pub in_features: usize,
    /// The `[K, K]` Gram matrix of the input, both triangles; `None` without calibration.
    pub gram: Option<&'a [f32]>,
}

impl RangeContext<'_> {
    fn check(&self) -> Result<(), QuantError> {
        let (n, k) = (self.out_features, self.in_features);
        let wanted = n.saturating_mul(k);
        if self.weight.len() != wanted {
            return Err(QuantError::Length { what: "weight", found: self.weight.len(), wanted });
        }
        if let Some(gram) = self.gram
            && gram.len() != k.saturating_mul(k)
        {
            return Err(QuantError::Length { what: "Gram matrix", found: gram.len(), wanted: k.saturating_mul(k) });
        }
        let bad = |row: &[f32]| row.iter().filter(|v| !v.is_finite()).count();
        let count: usize = self.weight.par_chunks(k.max(1)).map(bad).sum();
        if count > 0 {
            let first = self.weight.iter().position(|v| !v.is_finite()).unwrap_or(0);
            return Err(QuantError::NotFinite { count, row: first / k.max(1), column: first % k.max(1) });
        }
        Ok(())
    }
}

/// Rows handled together by one thread: enough for the search's products to be real matrix products.
const ROWS: usize = 32;

/// Rounds every weight to the nearest code of its group's grid.
///
/// Deterministic for any number of threads: rows are independent.
///
/// # Errors
/// Shapes that do not fit, K not a multiple of the group, NaN or Inf in the weight.
pub fn quantize_nearest(context: &RangeContext, scheme: &Scheme, range: Range) -> Result<QuantizedLinear, QuantError> {
    context.check()?;
    let (n, k) = (context.out_features, context.in_features);
    let width = scheme.group_size.width(k)?;
    let groups = scheme.groups(k)?;
    let mut out = QuantizedLinear {
        scheme: *scheme,
        out_features: n,
        in_features: k,
        codes: vec![0; n * k],
        scales: vec![0.0; n * groups],
        zeros: vec![0; n * groups],
    };
    if n == 0 || k == 0 {
        return Ok(out);
    }
    let work = (
        context.weight.par_chunks(ROWS * k),
        out.codes.par_chunks_mut(ROWS * k),
        out.scales.par_chunks_mut(ROWS * groups),
        out.zeros.par_chunks_mut(ROWS * groups),
    );
    work.into_par_iter().for_each_init(SearchBuffers::default, |buffers, (rows, codes, scales, zeros)| {
        let count = rows.len() / k;
        let mut grids = [GroupGrid { scale: 1.0, zero: 0 }; ROWS];
        for group in 0..groups {
            let grids = &mut grids[..count];
            match range {
                Range::Search => search_group(rows, k, group, width, scheme, context.gram, buffers, grids),
                Range::MinMax => {
                    for (grid, row) in grids.iter_mut().zip(rows.chunks_exact(k)) {
                        let (min, max) = min_max(&row[group * width..(group + 1) * width]);
                        *grid = grid_for_range(scheme, min, max);
                    }
                }
            }
            for (r, grid) in grids.iter().enumerate() {
                scales[r * groups + group] = grid.scale;
                zeros[r * groups + group] = grid.zero;
                let at = r * k + group * width;
                round_group(&rows[at..at + width], *grid, f32::from(scheme.max_code()), &mut codes[at..at + width]);
            }
        }
    });
    Ok(out)
}

fn round_group(values: &[f32], grid: GroupGrid, top: f32, codes: &mut [u8]) {
    for (code, &value) in codes.iter_mut().zip(values) {
        *code = nearest_code(value, grid, top) as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{GroupSize, ScaleDtype, gram_loss};
    use lite_linalg::{gram_update, mirror_lower};
    use proptest::prelude::*;

    fn noise(len: usize, seed: u32) -> Vec<f32> {
        let mut state = u64::from(seed).wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u32 << 24) as f32
        };
        (0..len).map(|_| (0..6).map(|_| uniform()).sum::<f32>() - 3.0).collect()
    }

    fn gram(tokens: usize, k: usize, seed: u32) -> Vec<f32> {
        let mut x = noise(tokens * k, seed);
        // A few loud channels, as in real activations.
        for row in x.chunks_exact_mut(k) {
            for c in (0..k).step_by(17) {
                row[c] *= 8.0;
            }
        }
        let mut gram = vec![0.0; k * k];
        gram_update(&mut gram, &x, tokens, k);
        mirror_lower(&mut gram, k, 1.0 / tokens as f32);
        gram
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn codes_are_the_nearest_of_their_grid(bits in 2i64..=8, symmetric in any::<bool>(), group in prop::sample::select(vec![-1i64, 16, 32, 64]), n in 1usize..40, seed in any::<u32>()) {
            let k = 128;
            let scheme = Scheme::new(bits, group, symmetric, ScaleDtype::F16).unwrap();
            let weight = noise(n * k, seed);
            for range in [Range::MinMax, Range::Search] {
                let context = RangeContext { weight: &weight, out_features: n, in_features: k, gram: None };
                let q = quantize_nearest(&context, &scheme, range).unwrap();
                q.check().unwrap();
                let width = scheme.group_size.width(k).unwrap();
                let (groups, top) = (k / width, i32::from(scheme.max_code()));
                for row in 0..n {
                    for col in 0..k {
                        let scale = q.scales[row * groups + col / width];
                        let zero = i32::from(q.zeros[row * groups + col / width]);
                        prop_assert_eq!(half::f16::from_f32(scale).to_f32(), scale);
                        let error = |code: i32| (weight[row * k + col] - (code - zero) as f32 * scale).abs();
                        let found = i32::from(q.codes[row * k + col]);
                        prop_assert!((0..=top).all(|code| error(found) <= error(code) + 1e-6));
                    }
                }
            }
        }

        #[test]
        fn search_never_loses_to_min_max(bits in 2i64..=4, symmetric in any::<bool>(), seed in any::<u32>()) {
            let (n, k, tokens) = (33, 64, 200);
            let weight = noise(n * k, seed);
            let gram = gram(tokens, k, seed ^ 0x55);
            // One group per row: the sum over groups is then the exact loss.
            let scheme = Scheme { bits: bits as u8, group_size: GroupSize::Channel, symmetric, scale_dtype: ScaleDtype::F32 };
            let context = RangeContext { weight: &weight, out_features: n, in_features: k, gram: Some(&gram) };
            let loss = |range| {
                let q = quantize_nearest(&context, &scheme, range).unwrap();
                gram_loss(&weight, &q.dequantize(), &gram, n, k)
            };
            let (searched, plain) = (loss(Range::Search), loss(Range::MinMax));
            // The symmetric grid of min/max (divisor 2^(b−1) − 1/2) lies between two steps of the search.
            prop_assert!(searched <= plain * if symmetric { 1.05 } else { 1.000_01 }, "{searched} {plain}");
        }
    }

    #[test]
    fn threads_do_not_change_the_codes() {
        let (n, k) = (200, 256);
        let (weight, gram) = (noise(n * k, 3), gram(300, k, 4));
        let scheme = Scheme::new(4, 128, false, ScaleDtype::BF16).unwrap();
        let context = RangeContext { weight: &weight, out_features: n, in_features: k, gram: Some(&gram) };
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| quantize_nearest(&context, &scheme, Range::Search).unwrap())
        };
        assert_eq!(run(1), run(2));
    }

    #[test]
    fn bad_matrices_are_refused() {
        let scheme = Scheme::new(4, 64, false, ScaleDtype::F16).unwrap();
        let mut weight = vec![0.5; 4 * 128];
        let run = |weight: &[f32], k| {
            quantize_nearest(
                &RangeContext { weight, out_features: 4, in_features: k, gram: None },
                &scheme,
                Range::MinMax,
            )
        };
        assert!(run(&weight, 128).is_ok());
        assert!(matches!(
            run(&weight[..4 * 100], 100),
            Err(QuantError::NotDivisible { in_features: 100, group_size: 64 })
        ));
        assert!(matches!(run(&weight[1..], 128), Err(QuantError::Length { .. })));
        weight[130] = f32::NAN;
        assert_eq!(run(&weight, 128), Err(QuantError::NotFinite { count: 1, row: 1, column: 2 }));
    }
}
