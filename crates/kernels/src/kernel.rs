//! Which instruction set runs, and the loops compiled for it.

use crate::matrix::{MAX_VECTORS, Matrix, Storage};
use crate::portable::Portable;
use crate::rows::{ByteRow, F32Row, NibbleRow, Row, WordRow, dot, expand};
use crate::simd::{Block, SEGMENTS, Simd};
#[cfg(target_arch = "x86_64")]
use crate::x86::{Avx2, Avx512};

/// An instruction set that the loops are compiled for, present on this machine.
#[derive(Debug, Clone, Copy)]
pub struct Kernel(Set);

#[derive(Debug, Clone, Copy)]
enum Set {
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    Portable(Portable),
}

impl Kernel {
    /// Every kernel that this machine can run, the best first.
    pub fn available() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            found.extend(Avx512::detect().map(|simd| Self(Set::Avx512(simd))));
            found.extend(Avx2::detect().map(|simd| Self(Set::Avx2(simd))));
        }
        found.push(Self(Set::Portable(Portable)));
        found
    }

    /// The best kernel of this machine.
    pub fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(simd) = Avx512::detect() {
                return Self(Set::Avx512(simd));
            }
            if let Some(simd) = Avx2::detect() {
                return Self(Set::Avx2(simd));
            }
        }
        Self(Set::Portable(Portable))
    }

    /// `AVX-512`, `AVX2` or `portable`.
    pub fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Set::Avx512(_) => "AVX-512",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2(_) => "AVX2",
            Set::Portable(_) => "portable",
        }
    }

    /// Products of the rows from `first` on with `vectors` vectors in `x`: `out[row · vectors + vector]`. `vectors` is a
    /// power of two up to [`MAX_VECTORS`].
    pub(crate) fn band(self, matrix: &Matrix, first: usize, x: &[Block<f32>], vectors: usize, out: &mut [f32]) {
        match self.0 {
            // SAFETY: the value exists only if the instructions were found.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512(simd) => unsafe { band_avx512(simd, matrix, first, x, vectors, out) },
            // SAFETY: the value exists only if the instructions were found.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2(simd) => unsafe { band_avx2(simd, matrix, first, x, vectors, out) },
            Set::Portable(simd) => band(simd, matrix, first, x, vectors, out),
        }
    }

    /// The values of the rows from `first` on, `out.len() / cols` of them.
    pub(crate) fn expand(self, matrix: &Matrix, first: usize, out: &mut [f32]) {
        match self.0 {
            // SAFETY: the value exists only if the instructions were found.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512(simd) => unsafe { expand_avx512(simd, matrix, first, out) },
            // SAFETY: the value exists only if the instructions were found.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2(simd) => unsafe { expand_avx2(simd, matrix, first, out) },
            Set::Portable(simd) => expand_rows(simd, matrix, first, out),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn band_avx512(simd: Avx512, matrix: &Matrix, first: usize, x: &[Block<f32>], vectors: usize, out: &mut [f32]) {
    band(simd, matrix, first, x, vectors, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn band_avx2(simd: Avx2, matrix: &Matrix, first: usize, x: &[Block<f32>], vectors: usize, out: &mut [f32]) {
    band(simd, matrix, first, x, vectors, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn expand_avx512(simd: Avx512, matrix: &Matrix, first: usize, out: &mut [f32]) {
    expand_rows(simd, matrix, first, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn expand_avx2(simd: Avx2, matrix: &Matrix, first: usize, out: &mut [f32]) {
    expand_rows(simd, matrix, first, out);
}

/// A visitor of rows, whatever their type.
trait Visit<S: Simd> {
    fn visit<R: Row<S>>(self, rows: R);
}

/// Calls `visit` with all rows of `matrix` in their own type.
#[inline(always)]
fn with_rows<S: Simd>(matrix: &Matrix, visit: impl Visit<S>) {
    match matrix.storage() {
        Storage::F32(values) => visit.visit(F32Row(values)),
        Storage::Bf16(values) => visit.visit(WordRow::<'_, false>(values)),
        Storage::F16(values) => visit.visit(WordRow::<'_, true>(values)),
        Storage::Int8 { codes, grid } if grid.is_fine() => {
            visit.visit(ByteRow::<'_, true> { codes, groups: grid.groups() })
        }
        Storage::Int8 { codes, grid } => visit.visit(ByteRow::<'_, false> { codes, groups: grid.groups() }),
        Storage::Int4 { codes, grid } if grid.is_fine() => {
            visit.visit(NibbleRow::<'_, true> { codes, groups: grid.groups() })
        }
        Storage::Int4 { codes, grid } => visit.visit(NibbleRow::<'_, false> { codes, groups: grid.groups() }),
    }
}

struct Products<'a, S> {
    simd: S,
    first: usize,
    blocks: usize,
    x: &'a [Block<f32>],
    vectors: usize,
    out: &'a mut [f32],
}

impl<S: Simd> Visit<S> for Products<'_, S> {
    #[inline(always)]
    fn visit<R: Row<S>>(self, rows: R) {
        // Few vectors leave registers for more partial sums each, and 32 wide registers for a second row.
        match self.vectors {
            1 => self.run::<R, 1, 1, 4>(rows),
            2 => self.run::<R, 1, 2, 2>(rows),
            4 if S::WIDE => self.run::<R, 2, 4, 1>(rows),
            4 => self.run::<R, 1, 4, 1>(rows),
            _ if S::WIDE => self.run::<R, 2, MAX_VECTORS, 1>(rows),
            _ => self.run::<R, 1, MAX_VECTORS, 1>(rows),
        }
    }
}

impl<S: Simd> Products<'_, S> {
    #[inline(always)]
    fn run<R: Row<S>, const N: usize, const T: usize, const A: usize>(self, rows: R) {
        const { assert!(SEGMENTS.is_multiple_of(A) && N <= 2) };
        let mut at = self.first;
        let mut chunks = self.out.chunks_exact_mut(N * T);
        for out in &mut chunks {
            let mut both = [rows.at(at, self.blocks); N];
            if N == 2 {
                both[N - 1] = rows.at(at + 1, self.blocks);
            }
            dot::<S, R, N, T, A>(self.simd, both, self.x, self.blocks, out);
            at += N;
        }
        let last = chunks.into_remainder();
        if !last.is_empty() {
            dot::<S, R, 1, T, A>(self.simd, [rows.at(at, self.blocks)], self.x, self.blocks, last);
        }
    }
}

#[inline(always)]
fn band<S: Simd>(simd: S, matrix: &Matrix, first: usize, x: &[Block<f32>], vectors: usize, out: &mut [f32]) {
    with_rows(matrix, Products { simd, first, blocks: matrix.blocks(), x, vectors, out });
}

struct Values<'a, S> {
    simd: S,
    first: usize,
    blocks: usize,
    cols: usize,
    out: &'a mut [f32],
}

impl<S: Simd> Visit<S> for Values<'_, S> {
    #[inline(always)]
    fn visit<R: Row<S>>(self, rows: R) {
        for (index, out) in self.out.chunks_exact_mut(self.cols).enumerate() {
            expand(self.simd, rows.at(self.first + index, self.blocks), out);
        }
    }
}

#[inline(always)]
fn expand_rows<S: Simd>(simd: S, matrix: &Matrix, first: usize, out: &mut [f32]) {
    with_rows(matrix, Values { simd, first, blocks: matrix.blocks(), cols: matrix.cols(), out });
}
