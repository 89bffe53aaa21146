//! Sixteen lanes in plain Rust, for any machine.

use half::{bf16, f16};

use crate::simd::{LANES, Nibbles, Simd};

/// Plain Rust.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Portable;

impl Simd for Portable {
    type V = [f32; LANES];
    type Table = (f32, f32);
    type Words = Nibbles;
    const WIDE: bool = false;

    #[inline(always)]
    fn zero(self) -> Self::V {
        [0.0; LANES]
    }

    #[inline(always)]
    fn f32s(self, values: &[f32; LANES]) -> Self::V {
        *values
    }

    #[inline(always)]
    fn bf16s(self, values: &[u16; LANES]) -> Self::V {
        values.map(|bits| bf16::from_bits(bits).to_f32())
    }

    #[inline(always)]
    fn f16s(self, values: &[u16; LANES]) -> Self::V {
        values.map(|bits| f16::from_bits(bits).to_f32())
    }

    #[inline(always)]
    fn bytes(self, codes: &[u8; LANES], scale: f32, zero: f32) -> Self::V {
        codes.map(|code| (f32::from(code) - zero) * scale)
    }

    #[inline(always)]
    fn table(self, scale: f32, zero: f32) -> Self::Table {
        (scale, zero)
    }

    #[inline(always)]
    fn words(self, codes: &Nibbles) -> Self::Words {
        *codes
    }

    #[inline(always)]
    fn nibbles(self, words: Self::Words, segment: usize, (scale, zero): Self::Table) -> Self::V {
        let mut out = [0f32; LANES];
        for (lane, out) in out.iter_mut().enumerate() {
            let code = words.0[4 * lane + segment / 2] >> (4 * (segment % 2)) & 15;
            *out = (f32::from(code) - zero) * scale;
        }
        out
    }

    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, mut c: Self::V) -> Self::V {
        for i in 0..LANES {
            // A fused operation without hardware for it is a function call.
            c[i] += a[i] * b[i];
        }
        c
    }

    #[inline(always)]
    fn add(self, mut a: Self::V, b: Self::V) -> Self::V {
        for i in 0..LANES {
            a[i] += b[i];
        }
        a
    }

    #[inline(always)]
    fn sum(self, mut v: Self::V) -> f32 {
        let mut width = LANES / 2;
        while width > 0 {
            for i in 0..width {
                v[i] += v[i + width];
            }
            width /= 2;
        }
        v[0]
    }

    #[inline(always)]
    fn store(self, v: Self::V, out: &mut [f32; LANES]) {
        *out = v;
    }
}
