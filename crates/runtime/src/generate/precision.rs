//! How keys and values are rounded on their way into the cache.

use lite_quant::floats::FloatFormat;

/// Precision of cached keys and values.
///
/// Keys are rounded after the rotation, so a cached key is what attention reads. Integers are chosen online, as
/// LMDeploy's engines do for `--quant-policy 8` and `4`: asymmetric, for each token and head by itself, with
/// `scale = (max − min) / (2^bits − 1)` and the smallest value as the zero point; scale and zero point are f32 here.
/// `Fp8` is e4m3 (4 bits of exponent, 3 of mantissa, largest 448, values beyond saturate) with the scale 1; scales of a
/// checkpoint are [`CacheScales`](crate::CacheScales).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvPrecision {
    /// As the checkpoint says: e4m3 with its scales if it declares such a cache, else f32, where nothing is rounded.
    #[default]
    Float,
    /// 8-bit integers.
    Int8,
    /// 4-bit integers.
    Int4,
    /// fp8 e4m3.
    Fp8,
}

impl KvPrecision {
    /// Bits per value, without scales and zero points; 16 for `Float`, which stands for the engine's half precision.
    pub fn bits(self) -> u8 {
        match self {
            Self::Float => 16,
            Self::Int8 | Self::Fp8 => 8,
            Self::Int4 => 4,
        }
    }

    /// Rounds keys or values `(tokens, heads, head_dim)` in place to what the cache gives back, with scale 1 for `Fp8`.
    /// A length that is no whole number of heads leaves a shorter last head.
    ///
    /// NaN and Inf make their whole head NaN for integers (there is no scale for them), and stay NaN for `Fp8`.
    pub fn apply(self, values: &mut [f32], head_dim: usize) {
        match self {
            Self::Float => {}
            Self::Int8 => values.chunks_mut(head_dim.max(1)).for_each(|head| round_to_grid(head, 255.0)),
            Self::Int4 => values.chunks_mut(head_dim.max(1)).for_each(|head| round_to_grid(head, 15.0)),
            Self::Fp8 => values.iter_mut().for_each(|v| *v = to_e4m3(*v)),
        }
    }
}

/// Rounds one head of one token to `top + 1` evenly spaced values from its smallest to its largest.
fn round_to_grid(head: &mut [f32], top: f32) {
    let (mut min, mut max) = (f32::INFINITY, f32::NEG_INFINITY);
    for v in head.iter() {
        (min, max) = (min.min(*v), max.max(*v));
    }
    // `min` and `max` pass over NaN, but not over Inf.
    if !head.iter().all(|v| v.is_finite()) {
        head.fill(f32::NAN);
        return;
    }
    // Quotients first: max − min may overflow where neither end does.
    let scale = max / top - min / top;
    if scale == 0.0 {
        return;
    }
    for v in head.iter_mut() {
        // Half up, as the engines' `(x + 0.5)` truncated to an unsigned byte.
        let code = (*v / scale - min / scale + 0.5).floor().clamp(0.0, top);
        *v = code * scale + min;
    }
}

/// The nearest value of e4m3, ties to even, saturating; NaN stays.
fn to_e4m3(value: f32) -> f32 {
    if value.is_nan() { value } else { FloatFormat::E4M3.round(value) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// All finite non-negative values of e4m3, by the definition of the format.
    fn e4m3() -> Vec<f32> {
        let value = |bits: u32| {
            let (exponent, mantissa) = (bits >> 3, (bits & 7) as f32);
            if exponent == 0 {
                mantissa / 8.0 * 2f32.powi(-6)
            } else {
                (1.0 + mantissa / 8.0) * 2f32.powi(exponent as i32 - 7)
            }
        };
        (0..127).map(value).collect()
    }

    #[test]
    fn e4m3_keeps_its_own_values_and_rounds_halves_to_even() {
        let values = e4m3();
        assert_eq!(values[126], 448.0);
        for (index, pair) in values.windows(2).enumerate() {
            assert_eq!(to_e4m3(pair[0]), pair[0]);
            assert_eq!(to_e4m3(-pair[0]), -pair[0]);
            let middle = (pair[0] + pair[1]) / 2.0;
            assert_eq!(to_e4m3(middle), pair[index % 2], "{middle}");
            assert_eq!(to_e4m3(middle.next_down()), pair[0]);
            assert_eq!(to_e4m3(middle.next_up()), pair[1]);
        }
        assert_eq!((to_e4m3(1e9), to_e4m3(-1e9), to_e4m3(f32::INFINITY)), (448.0, -448.0, 448.0));
        assert!(to_e4m3(f32::NAN).is_nan());
    }

    #[test]
    fn hand_computed_heads() {
        // Scale 1: codes are the values less the smallest.
        let mut x = [0.0, 15.0, 7.4, 7.6, -3.0, 12.0, 4.5, -2.6];
        KvPrecision::Int4.apply(&mut x, 4);
        assert_eq!(x, [0.0, 15.0, 7.0, 8.0, -3.0, 12.0, 5.0, -3.0]);
        // A constant head stays as it is, and so does the whole float cache.
        let mut x = [2.7f32; 4];
        KvPrecision::Int4.apply(&mut x, 4);
        assert_eq!(x, [2.7; 4]);
        let mut x = [0.1, 0.2];
        KvPrecision::Float.apply(&mut x, 2);
        assert_eq!(x, [0.1, 0.2]);
        let mut x = [1.0, f32::NAN, 1.0, 2.0];
        KvPrecision::Int8.apply(&mut x, 2);
        assert!(x[0].is_nan() && x[1].is_nan() && x[2..] == [1.0, 2.0]);
    }

    proptest! {
        #[test]
        fn errors_are_at_most_half_a_step(mut x in prop::collection::vec(-50f32..50.0, 1..200), dim in 1usize..70) {
            let before = x.clone();
            for (precision, top) in [(KvPrecision::Int8, 255.0), (KvPrecision::Int4, 15.0)] {
                x.copy_from_slice(&before);
                precision.apply(&mut x, dim);
                for (head, before) in x.chunks(dim).zip(before.chunks(dim)) {
                    let max = before.iter().copied().fold(f32::MIN, f32::max);
                    let min = before.iter().copied().fold(f32::MAX, f32::min);
                    for (a, b) in head.iter().zip(before) {
                        prop_assert!((a - b).abs() <= (max - min) / top * 0.501 + 1e-5, "{a} {b}");
                    }
                }
            }
            x.copy_from_slice(&before);
            KvPrecision::Fp8.apply(&mut x, dim);
            for (a, b) in x.iter().zip(&before) {
                prop_assert!((a - b).abs() <= b.abs() / 16.0 + 2f32.powi(-10), "{a} {b}");
            }
        }
    }
}
