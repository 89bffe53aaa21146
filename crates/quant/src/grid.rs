//! Integer grids: the scale and zero point of one group, and rounding to its codes.

use crate::Scheme;

/// The grid of one group: `w ≈ (code − zero) · scale`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GroupGrid {
    /// Positive, exactly representable in the scheme's scale type.
    pub scale: f32,
    /// Unsigned zero point, `0 ..= max_code`.
    pub zero: u8,
}

/// The grid that covers `[min, max]`; zero is always inside the range.
///
/// * asymmetric: `scale = (max − min) / (2^b − 1)`, `zero = clamp(round(−min / scale))`;
/// * symmetric: `scale = max(|min|, |max|) / (2^(b−1) − 1/2)`, the divisor of compressed-tensors and
///   GPTQ: `−absmax` rounds to the lowest code, `+absmax` is clipped by half a step.
///
/// The scale is rounded to its storage type first, so codes are chosen for the scale the engine will
/// read. An all-zero group gets scale 1 and reproduces its zeros exactly.
pub fn grid_for_range(scheme: &Scheme, min: f32, max: f32) -> GroupGrid {
    let (min, max) = (min.min(0.0), max.max(0.0));
    if scheme.symmetric {
        let scale = stored(scheme, min.abs().max(max) / (f32::from(scheme.middle_code()) - 0.5));
        return GroupGrid { scale, zero: scheme.middle_code() };
    }
    let top = f32::from(scheme.max_code());
    // Halves first: max − min may overflow where neither end does.
    let scale = stored(scheme, (max / top) - (min / top));
    let zero = (-min / scale).round_ties_even().clamp(0.0, top) as u8;
    GroupGrid { scale, zero }
}

/// A positive scale in its storage type: never zero, never subnormal, never infinite.
fn stored(scheme: &Scheme, scale: f32) -> f32 {
    if scale == 0.0 {
        return 1.0;
    }
    let dtype = scheme.scale_dtype;
    dtype.round(scale.clamp(dtype.smallest_scale(), dtype.largest()))
}

/// The nearest code of `value`, ties to even, clamped to the grid.
#[inline(always)]
pub fn nearest_code(value: f32, grid: GroupGrid, max_code: f32) -> f32 {
    // Adding 1.5·2^23 rounds to an integer, ties to even, in any instruction set. The clamp keeps the
    // sum in the range where that holds, and maps huge quotients to the ends.
    const ROUND: f32 = 12_582_912.0;
    let steps = (value / grid.scale).clamp(-1024.0, 1024.0);
    ((steps + ROUND) - ROUND + f32::from(grid.zero)).clamp(0.0, max_code)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ScaleDtype;
    use proptest::prelude::*;

    fn scheme(bits: i64, symmetric: bool, dtype: ScaleDtype) -> Scheme {
        Scheme::new(bits, 128, symmetric, dtype).unwrap()
    }

    /// compressed-tensors' check: scale 1, int4.
    #[test]
    fn rounding_is_half_to_even_and_clamps() {
        let grid = GroupGrid { scale: 1.0, zero: 8 };
        let codes: Vec<f32> = [0.5, 1.5, 2.5, -0.5, -1.5, 7.6, -8.5, -9.0, 1e30, -1e30]
            .iter()
            .map(|&v| nearest_code(v, grid, 15.0) - 8.0)
            .collect();
        assert_eq!(codes, [0.0, 2.0, 2.0, 0.0, -2.0, 7.0, -8.0, -8.0, 7.0, -8.0]);
    }

    #[test]
    fn symmetric_four_bits_divide_by_seven_and_a_half() {
        assert_eq!(grid_for_range(&scheme(4, true, ScaleDtype::F32), -0.3, 1.5).scale, 1.5 / 7.5);
        // 1.0 / 7.5 in bfloat16, as compressed-tensors computes it.
        assert_eq!(grid_for_range(&scheme(4, true, ScaleDtype::BF16), -1.0, 0.2).scale, 0.133_789_06);
    }

    #[test]
    fn degenerate_groups_have_usable_scales() {
        for symmetric in [false, true] {
            for dtype in [ScaleDtype::F16, ScaleDtype::BF16, ScaleDtype::F32] {
                let scheme = scheme(4, symmetric, dtype);
                assert_eq!(grid_for_range(&scheme, 0.0, 0.0).scale, 1.0);
                for (min, max) in [(0.0, 1e-30), (-1e38, 3e38), (5.01, 6.0), (-6.0, -5.01)] {
                    let grid = grid_for_range(&scheme, min, max);
                    assert!(grid.scale.is_normal(), "{min} {max} {grid:?}");
                }
            }
        }
        // A range that excludes zero is widened to include it (LMDeploy collapses such a group to a constant).
        let grid = grid_for_range(&scheme(4, false, ScaleDtype::F32), 5.01, 6.0);
        assert_eq!((grid.zero, nearest_code(6.0, grid, 15.0)), (0, 15.0));
    }

    proptest! {
        #[test]
        fn values_inside_the_range_are_within_half_a_step(bits in 2i64..=8, a in -10f32..10.0, b in -10f32..10.0, t in 0f32..1.0) {
            let scheme = scheme(bits, false, ScaleDtype::F32);
            let (min, max) = (a.min(b).min(0.0), a.max(b).max(0.0));
            let grid = grid_for_range(&scheme, min, max);
            let value = min + t * (max - min);
            let code = nearest_code(value, grid, f32::from(scheme.max_code()));
            let back = (code - f32::from(grid.zero)) * grid.scale;
            // Half a step for the code, half a step for the rounded zero point.
            prop_assert!((back - value).abs() <= grid.scale * 1.001, "{value} {back} {grid:?}");
            prop_assert_eq!((nearest_code(0.0, grid, f32::from(scheme.max_code())) - f32::from(grid.zero)) * grid.scale, 0.0);
        }
    }
}
