//! A weight matrix in memory.

use half::{bf16, f16};
use rayon::prelude::*;

use crate::rows::Groups;
use crate::simd::{BLOCK, Block, LANES, Nibbles, SEGMENTS};
use crate::{Kernel, KernelError};

/// The most vectors that [`Matrix::multiply`] takes.
pub const MAX_VECTORS: usize = 8;

/// Elements of the rows that one task computes, about: enough to outweigh handing the task over.
const TASK: usize = 1 << 18;

/// How the elements of a [`Matrix`] are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ElementType {
    /// IEEE single.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
    /// Codes of up to 8 bits, one per byte.
    Int8,
    /// Codes of up to 4 bits, two per byte.
    Int4,
}

/// A weight `[rows, cols]`, kept in blocks; rows are padded with zeros to whole blocks of 128 elements.
#[derive(Debug, Clone)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    storage: Storage,
}

#[derive(Debug, Clone)]
pub(crate) enum Storage {
    F32(Vec<Block<f32>>),
    Bf16(Vec<Block<u16>>),
    F16(Vec<Block<u16>>),
    Int8 { codes: Vec<Block<u8>>, grid: Grid },
    Int4 { codes: Vec<Nibbles>, grid: Grid },
}

/// Scales and zero points.
#[derive(Debug, Clone)]
pub(crate) struct Grid {
    /// `[rows, count]`; 0 for groups that are padding.
    scales: Vec<f32>,
    /// `[rows, count]`
    zeros: Vec<u8>,
    count: usize,
    shift: u32,
}

impl Grid {
    pub(crate) fn groups(&self) -> Groups<'_> {
        Groups { scales: &self.scales, zeros: &self.zeros, count: self.count, shift: self.shift }
    }

    /// Whether a block holds several groups.
    pub(crate) fn is_fine(&self) -> bool {
        self.shift < BLOCK.trailing_zeros()
    }
}

impl Matrix {
    /// A matrix `[rows, cols]` from row-major values, kept in the smallest of bf16, f16 and f32 that holds every one of
    /// them exactly.
    ///
    /// # Errors
    /// [`KernelError::Shape`] or [`KernelError::Length`].
    pub fn from_f32(rows: usize, cols: usize, values: &[f32]) -> Result<Self, KernelError> {
        check(rows, cols, "values", values.len(), checked(rows, cols)?)?;
        let is_bf16 = |v: &f32| v.to_bits() & 0xffff == 0;
        let is_f16 = |v: &f32| f16::from_f32(*v).to_f32().to_bits() == v.to_bits();
        let storage = if values.par_iter().all(is_bf16) {
            Storage::Bf16(blocks(values, cols, 0, |v| bf16::from_f32(v).to_bits()))
        } else if values.par_iter().all(is_f16) {
            Storage::F16(blocks(values, cols, 0, |v| f16::from_f32(v).to_bits()))
        } else {
            Storage::F32(blocks(values, cols, 0.0, |v| v))
        };
        Ok(Self { rows, cols, storage })
    }

    /// A matrix `[rows, cols]` of `(code − zero) · scale` from row-major codes of `bits` bits, and `[rows, G]` scales and
    /// zero points for G groups of equal width. Up to 4 bits are kept in 4, up to 8 in 8.
    ///
    /// # Errors
    /// [`KernelError::Shape`], [`KernelError::Length`], [`KernelError::Bits`], or [`KernelError::GroupWidth`] if the
    /// groups are neither whole rows nor a power of two from 16 columns wide.
    pub fn from_codes(
        bits: u8,
        rows: usize,
        cols: usize,
        codes: &[u8],
        scales: &[f32],
        zeros: &[u8],
    ) -> Result<Self, KernelError> {
        check(rows, cols, "codes", codes.len(), checked(rows, cols)?)?;
        let groups = (scales.len() / rows).max(1);
        check(rows, cols, "scales", scales.len(), rows * groups)?;
        check(rows, cols, "zero points", zeros.len(), rows * groups)?;
        let width = cols / groups;
        if width * groups != cols || groups > 1 && !(width >= LANES && width.is_power_of_two()) {
            return Err(KernelError::GroupWidth { width });
        }
        let fits = |code: &u8| bits >= 8 || code >> bits == 0;
        if !(1..=8).contains(&bits) || !codes.par_iter().all(fits) {
            return Err(KernelError::Bits { bits });
        }
        let shift = if groups == 1 { usize::BITS - 1 } else { width.trailing_zeros() };
        let padded = cols.div_ceil(BLOCK) * BLOCK;
        let count = ((padded - 1) >> shift) + 1;
        let mut grid = Grid { scales: vec![0.0; rows * count], zeros: vec![0; rows * count], count, shift };
        for row in 0..rows {
            grid.scales[row * count..][..groups].copy_from_slice(&scales[row * groups..][..groups]);
            grid.zeros[row * count..][..groups].copy_from_slice(&zeros[row * groups..][..groups]);
        }
        let storage = if bits <= 4 {
            Storage::Int4 { codes: nibbles(codes, cols), grid }
        } else {
            Storage::Int8 { codes: blocks(codes, cols, 0, |code| code), grid }
        };
        Ok(Self { rows, cols, storage })
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How the elements are kept.
    pub fn element_type(&self) -> ElementType {
        match self.storage {
            Storage::F32(_) => ElementType::F32,
            Storage::Bf16(_) => ElementType::Bf16,
            Storage::F16(_) => ElementType::F16,
            Storage::Int8 { .. } => ElementType::Int8,
            Storage::Int4 { .. } => ElementType::Int4,
        }
    }

    /// Bytes in memory: what one product reads.
    pub fn bytes(&self) -> usize {
        let grid = |grid: &Grid| size_of_val(grid.scales.as_slice()) + grid.zeros.len();
        match &self.storage {
            Storage::F32(values) => size_of_val(values.as_slice()),
            Storage::Bf16(values) | Storage::F16(values) => size_of_val(values.as_slice()),
            Storage::Int8 { codes, grid: g } => size_of_val(codes.as_slice()) + grid(g),
            Storage::Int4 { codes, grid: g } => size_of_val(codes.as_slice()) + grid(g),
        }
    }

    /// [`bytes`](Self::bytes) of a matrix that is not made yet: `[rows, cols]` of `kind`; of codes with `groups` groups
    /// in a row.
    pub fn bytes_of(kind: ElementType, rows: usize, cols: usize, groups: usize) -> u64 {
        let padded = cols.div_ceil(BLOCK).saturating_mul(BLOCK);
        let per_row = |bits: u64| (padded as u64).saturating_mul(bits) / 8;
        // A scale and a zero point for each group, also for those of the padding.
        let width = cols.div_ceil(groups.max(1)).max(1);
        let count = if groups <= 1 { 1 } else { padded.div_ceil(width) as u64 };
        let row = match kind {
            ElementType::F32 => per_row(32),
            ElementType::Bf16 | ElementType::F16 => per_row(16),
            ElementType::Int8 => per_row(8).saturating_add(5 * count),
            ElementType::Int4 => per_row(4).saturating_add(5 * count),
        };
        row.saturating_mul(rows as u64)
    }

    pub(crate) fn storage(&self) -> &Storage {
        &self.storage
    }

    pub(crate) fn blocks(&self) -> usize {
        self.cols.div_ceil(BLOCK)
    }

    /// `out = x · selfᵀ`: `x` is `(vectors, cols)`, `out` `(vectors, rows)`, both row-major, with one to [`MAX_VECTORS`]
    /// vectors. Runs on the rayon pool.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn multiply(&self, x: &[f32], out: &mut [f32]) {
        self.multiply_with(Kernel::best(), x, out);
    }

    /// [`multiply`](Self::multiply) by a certain kernel.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn multiply_with(&self, kernel: Kernel, x: &[f32], out: &mut [f32]) {
        let vectors = x.len() / self.cols;
        assert!((1..=MAX_VECTORS).contains(&vectors), "{vectors} vectors, wanted 1 to {MAX_VECTORS}");
        assert_eq!(x.len(), vectors * self.cols, "the vectors do not fit the matrix");
        assert_eq!(out.len(), vectors * self.rows, "the result does not fit the matrix");
        // The loops exist for 1, 2, 4 and 8 vectors; the rest are zeros.
        let padded = vectors.next_power_of_two();
        let mut x = blocks(x, self.cols, 0.0, |v: f32| v);
        x.resize(padded * self.blocks(), Block([[0.0; LANES]; SEGMENTS]));
        let band = (TASK / self.cols).clamp(1, self.rows);
        if padded == 1 {
            out.par_chunks_mut(band).enumerate().for_each(|(i, out)| kernel.band(self, i * band, &x, 1, out));
            return;
        }
        let mut by_row = vec![0f32; self.rows * padded];
        let bands = by_row.par_chunks_mut(band * padded).enumerate();
        bands.for_each(|(i, out)| kernel.band(self, i * band, &x, padded, out));
        for (vector, out) in out.chunks_exact_mut(self.rows).enumerate() {
            for (out, row) in out.iter_mut().zip(by_row.chunks_exact(padded)) {
                *out = row[vector];
            }
        }
    }

    /// The values of the rows from `first` on, as many as `out` (`(rows, cols)`, row-major) holds. Runs on the rayon
    /// pool.
    ///
    /// # Panics
    /// If the rows leave the matrix, or `out` does not hold whole rows.
    pub fn expand_rows(&self, first: usize, out: &mut [f32]) {
        self.expand_rows_with(Kernel::best(), first, out);
    }

    /// [`expand_rows`](Self::expand_rows) by a certain kernel.
    ///
    /// # Panics
    /// If the rows leave the matrix, or `out` does not hold whole rows.
    pub fn expand_rows_with(&self, kernel: Kernel, first: usize, out: &mut [f32]) {
        assert!(out.len().is_multiple_of(self.cols), "the result does not hold whole rows");
        let last = first.checked_add(out.len() / self.cols);
        assert!(last.is_some_and(|last| last <= self.rows), "the rows leave the matrix");
        let band = (TASK / self.cols).clamp(1, self.rows);
        out.par_chunks_mut(band * self.cols)
            .enumerate()
            .for_each(|(i, out)| kernel.expand(self, first + i * band, out));
    }
}

/// `rows · cols`, if a padded matrix of that shape can exist.
fn checked(rows: usize, cols: usize) -> Result<usize, KernelError> {
    let shape = KernelError::Shape { rows, cols };
    if rows == 0 || cols == 0 {
        return Err(shape);
    }
    let padded = cols.checked_next_multiple_of(BLOCK).and_then(|padded| padded.checked_mul(rows)?.checked_mul(4));
    padded.filter(|bytes| isize::try_from(*bytes).is_ok()).map(|_| rows * cols).ok_or(shape)
}

fn check(rows: usize, cols: usize, what: &'static str, found: usize, wanted: usize) -> Result<(), KernelError> {
    if found == wanted { Ok(()) } else { Err(KernelError::Length { what, rows, cols, found, wanted }) }
}

/// Row-major values as blocks, padded with `zero`.
fn blocks<A: Copy + Sync, B: Copy + Send + Sync>(
    values: &[A],
    cols: usize,
    zero: B,
    convert: impl Fn(A) -> B + Sync,
) -> Vec<Block<B>> {
    let per_row = cols.div_ceil(BLOCK);
    let mut out = vec![Block([[zero; LANES]; SEGMENTS]); values.len() / cols * per_row];
    out.par_chunks_mut(per_row).zip(values.par_chunks(cols)).with_min_len(TASK / cols + 1).for_each(|(out, row)| {
        for (block, values) in out.iter_mut().zip(row.chunks(BLOCK)) {
            for (out, value) in block.0.as_flattened_mut().iter_mut().zip(values) {
                *out = convert(*value);
            }
        }
    });
    out
}

/// Row-major 4-bit codes as blocks.
fn nibbles(codes: &[u8], cols: usize) -> Vec<Nibbles> {
    let per_row = cols.div_ceil(BLOCK);
    let mut out = vec![Nibbles([0; BLOCK / 2]); codes.len() / cols * per_row];
    out.par_chunks_mut(per_row).zip(codes.par_chunks(cols)).for_each(|(out, row)| {
        for (block, codes) in out.iter_mut().zip(row.chunks(BLOCK)) {
            for (column, code) in codes.iter().enumerate() {
                let (segment, lane) = (column / LANES, column % LANES);
                block.0[4 * lane + segment / 2] |= code << (4 * (segment % 2));
            }
        }
    });
    out
}

#[cfg(test)]
#[path = "matrix_tests.rs"]
mod tests;
