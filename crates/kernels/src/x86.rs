//! Sixteen lanes on x86-64: one AVX-512 register, or two of AVX2.

use std::arch::x86_64::*;

use crate::simd::{LANES, Nibbles, Simd};

/// AVX-512 (the foundation instructions).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// The proof that this machine has them, if it has.
    pub(crate) fn detect() -> Option<Self> {
        is_x86_feature_detected!("avx512f").then_some(Self(()))
    }
}

/// AVX2 with FMA and F16C.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// The proof that this machine has them, if it has.
    pub(crate) fn detect() -> Option<Self> {
        let has =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        has.then_some(Self(()))
    }
}

// SAFETY, for every `unsafe` block of the two implementations: `self` exists only if `detect` found the instructions.
// Loads and stores go through references to arrays of exactly the bytes that they touch, and need no alignment.

impl Simd for Avx512 {
    type V = __m512;
    type Table = __m512;
    type Words = __m512i;
    const WIDE: bool = true;

    #[inline(always)]
    fn zero(self) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    fn f32s(self, values: &[f32; LANES]) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }

    #[inline(always)]
    fn bf16s(self, values: &[u16; LANES]) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(values.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
        }
    }

    #[inline(always)]
    fn f16s(self, values: &[u16; LANES]) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(values.as_ptr().cast())) }
    }

    #[inline(always)]
    fn bytes(self, codes: &[u8; LANES], scale: f32, zero: f32) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let codes = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().cast())));
            _mm512_mul_ps(_mm512_sub_ps(codes, _mm512_set1_ps(zero)), _mm512_set1_ps(scale))
        }
    }

    #[inline(always)]
    fn table(self, scale: f32, zero: f32) -> __m512 {
        const CODES: [f32; LANES] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
        // SAFETY: see above.
        unsafe {
            let codes = _mm512_loadu_ps(CODES.as_ptr());
            _mm512_mul_ps(_mm512_sub_ps(codes, _mm512_set1_ps(zero)), _mm512_set1_ps(scale))
        }
    }

    #[inline(always)]
    fn words(self, codes: &Nibbles) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_loadu_si512(codes.0.as_ptr().cast()) }
    }

    #[inline(always)]
    fn nibbles(self, words: __m512i, segment: usize, table: __m512) -> __m512 {
        // The permutation reads the low four bits of each lane: no mask is needed.
        // SAFETY: see above.
        unsafe {
            let index = _mm512_srlv_epi32(words, _mm512_set1_epi32(4 * segment as i32));
            _mm512_permutexvar_ps(index, table)
        }
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn sum(self, v: __m512) -> f32 {
        // SAFETY: see above.
        unsafe { _mm512_reduce_add_ps(v) }
    }

    #[inline(always)]
    fn store(self, v: __m512, out: &mut [f32; LANES]) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) }
    }
}

impl Simd for Avx2 {
    /// Lanes 0 to 7, and 8 to 15.
    type V = [__m256; 2];
    type Table = [__m256; 2];
    type Words = [__m256i; 2];
    const WIDE: bool = false;

    #[inline(always)]
    fn zero(self) -> [__m256; 2] {
        // SAFETY: see above.
        unsafe { [_mm256_setzero_ps(); 2] }
    }

    #[inline(always)]
    fn f32s(self, values: &[f32; LANES]) -> [__m256; 2] {
        // SAFETY: see above; the second half starts eight values in.
        unsafe { [_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values.as_ptr().add(8))] }
    }

    #[inline(always)]
    fn bf16s(self, values: &[u16; LANES]) -> [__m256; 2] {
        // SAFETY: see above; the second half starts eight values in.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(values.as_ptr().cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(values.as_ptr().add(8).cast()));
            [low, high].map(|half| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(half)))
        }
    }

    #[inline(always)]
    fn f16s(self, values: &[u16; LANES]) -> [__m256; 2] {
        // SAFETY: see above; the second half starts eight values in.
        unsafe {
            [
                _mm256_cvtph_ps(_mm_loadu_si128(values.as_ptr().cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(values.as_ptr().add(8).cast())),
            ]
        }
    }

    #[inline(always)]
    fn bytes(self, codes: &[u8; LANES], scale: f32, zero: f32) -> [__m256; 2] {
        // SAFETY: see above.
        unsafe {
            let all = _mm_loadu_si128(codes.as_ptr().cast());
            let low = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(all));
            let high = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128::<8>(all)));
            let (zero, scale) = (_mm256_set1_ps(zero), _mm256_set1_ps(scale));
            [_mm256_mul_ps(_mm256_sub_ps(low, zero), scale), _mm256_mul_ps(_mm256_sub_ps(high, zero), scale)]
        }
    }

    #[inline(always)]
    fn table(self, scale: f32, zero: f32) -> [__m256; 2] {
        // No permutation reaches sixteen values here: scale and zero point themselves.
        // SAFETY: see above.
        unsafe { [_mm256_set1_ps(scale), _mm256_set1_ps(zero)] }
    }

    #[inline(always)]
    fn words(self, codes: &Nibbles) -> [__m256i; 2] {
        // SAFETY: see above; the second half starts 32 bytes in.
        unsafe { [_mm256_loadu_si256(codes.0.as_ptr().cast()), _mm256_loadu_si256(codes.0.as_ptr().add(32).cast())] }
    }

    #[inline(always)]
    fn nibbles(self, words: [__m256i; 2], segment: usize, [scale, zero]: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: see above.
        unsafe {
            let (shift, mask) = (_mm256_set1_epi32(4 * segment as i32), _mm256_set1_epi32(15));
            let low = _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srlv_epi32(words[0], shift), mask));
            let high = _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srlv_epi32(words[1], shift), mask));
            [_mm256_mul_ps(_mm256_sub_ps(low, zero), scale), _mm256_mul_ps(_mm256_sub_ps(high, zero), scale)]
        }
    }

    #[inline(always)]
    fn fma(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: see above.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    fn add(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: see above.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn sum(self, v: [__m256; 2]) -> f32 {
        // SAFETY: see above.
        unsafe {
            let eight = _mm256_add_ps(v[0], v[1]);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }

    #[inline(always)]
    fn store(self, v: [__m256; 2], out: &mut [f32; LANES]) {
        // SAFETY: see above; the second half starts eight values in.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), v[1]);
        }
    }
}
