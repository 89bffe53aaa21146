//! Where the elements of a tensor lie in the file of its shard.

use std::borrow::Cow;
use std::collections::TryReserveError;
use std::ops::Range;

use rayon::prelude::*;

/// Rows and columns of a tile that is transposed in the innermost cache.
const TILE: usize = 32;
/// Bytes of output per task.
const TASK: usize = 1 << 18;

/// A matrix of units inside a file, row-major when read: unit `(r, c)` is at `start + (r · row_stride + c ·
/// column_stride) · unit`. A tensor that lies in one piece is one row of bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// Offset of the first unit in bytes.
    start: usize,
    /// Bytes that stay together.
    unit: usize,
    rows: usize,
    columns: usize,
    /// In units.
    row_stride: usize,
    /// In units.
    column_stride: usize,
}

impl Place {
    /// `bytes` bytes in one piece. Their end must be in range; it is where headers were checked.
    pub(crate) fn whole(start: usize, bytes: usize) -> Self {
        Self { start, unit: 1, rows: 1, columns: bytes, row_stride: bytes, column_stride: 1 }
    }

    /// The part `[rows, columns]` of this tensor, which lies in one piece, from unit `first` on; `None` if it does not lie
    /// inside, or is empty.
    pub(crate) fn part(
        &self,
        unit: usize,
        first: usize,
        (rows, columns): (usize, usize),
        (row_stride, column_stride): (usize, usize),
    ) -> Option<Self> {
        let last = rows.checked_sub(1)?.checked_mul(row_stride)?;
        let last = last.checked_add(columns.checked_sub(1)?.checked_mul(column_stride)?)?;
        let end = last.checked_add(first)?.checked_add(1)?.checked_mul(unit)?;
        // Below `end`, which did not overflow.
        let start = self.start.checked_add(first * unit)?;
        let inside = self.is_whole() && unit > 0 && end <= self.bytes();
        inside.then_some(Self { start, unit, rows, columns, row_stride, column_stride })
    }

    /// Whether it lies in one piece.
    pub(crate) fn is_whole(&self) -> bool {
        let rows = self.rows == 1 || self.row_stride == self.columns;
        (self.column_stride == 1 || self.columns == 1) && rows
    }

    /// Length in bytes.
    pub(crate) fn bytes(&self) -> usize {
        // No more than the file holds.
        self.rows * self.columns * self.unit
    }

    /// From its first byte in the file to its last one.
    pub(crate) fn span(&self) -> Range<usize> {
        let units = self.rows.saturating_sub(1) * self.row_stride + self.columns.saturating_sub(1) * self.column_stride;
        let length = if self.bytes() == 0 { 0 } else { (units + 1) * self.unit };
        // Inside the file, as its parts were found to be.
        self.start..self.start + length
    }

    /// Its bytes: those of the file where they lie in one piece, else gathered. `Ok(None)` if the file is too short.
    pub(crate) fn read<'a>(&self, file: &'a [u8]) -> Result<Option<Cow<'a, [u8]>>, TryReserveError> {
        if self.is_whole() {
            return Ok(file.get(self.span()).map(Cow::Borrowed));
        }
        Vec::<u8>::new().try_reserve_exact(self.bytes())?;
        let mut out = vec![0; self.bytes()];
        Ok(self.gather(file, 0, &mut out).map(|()| Cow::Owned(out)))
    }

    /// Units that [`Place::gather`] takes at a time at least to be fast: a few rows.
    pub(crate) fn stretch(&self) -> usize {
        self.columns.max(1).saturating_mul(TILE)
    }

    /// Copies units from `first` on, as many as `out` holds. `None` if it does not reach that far, or the file is too
    /// short. The result does not depend on the number of threads.
    pub(crate) fn gather(&self, file: &[u8], first: usize, mut out: &mut [u8]) -> Option<()> {
        let (mut at, units) = (first, out.len() / self.unit);
        if first.checked_add(units)? > self.rows * self.columns {
            return None;
        }
        while !out.is_empty() {
            let (row, column) = (at / self.columns, at % self.columns);
            let left = out.len() / self.unit;
            // The rest of a row, whole rows, the start of a row.
            let (rows, columns) = match column {
                0 if left >= self.columns => (left / self.columns, self.columns),
                _ => (1, left.min(self.columns - column)),
            };
            let (now, rest) = out.split_at_mut(rows * columns * self.unit);
            let tall = (TASK / (columns * self.unit)).max(1).next_multiple_of(TILE);
            now.par_chunks_mut(tall * columns * self.unit)
                .enumerate()
                .try_for_each(|(task, out)| self.window(file, row + task * tall, column, columns, out))?;
            at += rows * columns;
            out = rest;
        }
        Some(())
    }

    /// Copies columns `column..column + columns` of rows from `row` on.
    fn window(&self, file: &[u8], row: usize, column: usize, columns: usize, out: &mut [u8]) -> Option<()> {
        let width = columns * self.unit;
        let start =
            |row: usize, column: usize| self.start + (row * self.row_stride + column * self.column_stride) * self.unit;
        if self.column_stride == 1 {
            for (i, out) in out.chunks_exact_mut(width).enumerate() {
                let from = start(row + i, column);
                out.copy_from_slice(file.get(from..from + width)?);
            }
            return Some(());
        }
        // Rows of the output are often a power of two apart and would evict each other: a tile is turned in a buffer.
        let (rows, unit) = (out.len() / width, self.unit);
        let mut tile = vec![0; TILE * TILE * unit];
        for tile_row in (0..rows).step_by(TILE) {
            let tall = TILE.min(rows - tile_row);
            for tile_column in (0..columns).step_by(TILE) {
                let wide = TILE.min(columns - tile_column);
                for c in 0..wide {
                    // Rows are near each other in the file.
                    let from = start(row + tile_row, column + tile_column + c);
                    let length = ((tall - 1) * self.row_stride + 1) * unit;
                    let units = file.get(from..from + length)?.chunks(self.row_stride * unit);
                    let into = tile[c * unit..].chunks_mut(wide * unit);
                    match unit {
                        2 => units.zip(into).for_each(|(from, into)| into[..2].copy_from_slice(&from[..2])),
                        unit => units.zip(into).for_each(|(from, into)| into[..unit].copy_from_slice(&from[..unit])),
                    }
                }
                let into = out[tile_row * width + tile_column * unit..].chunks_mut(width);
                for (into, from) in into.zip(tile.chunks(wide * unit)).take(tall) {
                    into[..wide * unit].copy_from_slice(from);
                }
            }
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_whole_tensor_is_borrowed() {
        let file: Vec<u8> = (0..10).collect();
        let place = Place::whole(3, 4);
        assert!(matches!(place.read(&file), Ok(Some(Cow::Borrowed([3, 4, 5, 6])))));
        assert_eq!((place.bytes(), place.span()), (4, 3..7));
        assert!(matches!(Place::whole(8, 4).read(&file), Ok(None)));
        assert_eq!(Place::whole(2, 0).span(), 2..2);
        // A part whose rows follow each other is in one piece too.
        let part = place.part(2, 0, (2, 1), (1, 1)).unwrap();
        assert!(part.is_whole() && part.span() == (3..7));
    }

    #[test]
    fn parts_outside_are_none() {
        let whole = Place::whole(100, 24);
        assert!(whole.part(2, 0, (3, 4), (4, 1)).is_some() && whole.part(2, 0, (3, 4), (1, 3)).is_some());
        for (unit, first, shape, strides) in [
            (2, 1, (3, 4), (4, 1)),
            (2, 0, (3, 5), (4, 1)),
            (4, 0, (3, 4), (4, 1)),
            (2, 0, (0, 4), (4, 1)),
            (2, 0, (3, 0), (4, 1)),
            (0, 0, (3, 4), (4, 1)),
            (2, usize::MAX, (1, 1), (1, 1)),
            (2, 0, (usize::MAX, 2), (usize::MAX, 1)),
            (usize::MAX, 1, (1, 1), (1, 1)),
        ] {
            assert!(whole.part(unit, first, shape, strides).is_none(), "{unit} {first} {shape:?} {strides:?}");
        }
    }

    proptest! {
        /// Against the definition, unit by unit, for any stretch of units.
        #[test]
        fn gathers_by_definition(
            (rows, columns) in (1usize..70, 1usize..70),
            (row_stride, column_stride) in prop_oneof![Just((1usize, 80usize)), Just((2, 160)), Just((80, 1)), Just((3, 7))],
            unit in prop_oneof![Just(1usize), Just(2), Just(4)],
            first in 0usize..5,
            (skip, take) in (0.0f64..1.0, 0.0f64..1.0),
        ) {
            let length = (first + rows * row_stride.max(2) + columns * column_stride + 1) * unit;
            let file: Vec<u8> = (0..length + 9).map(|i| (i * 31 % 251) as u8).collect();
            let place = Place::whole(9, length).part(unit, first, (rows, columns), (row_stride, column_stride)).unwrap();
            let wanted: Vec<u8> = (0..rows * columns)
                .flat_map(|i| {
                    let at = 9 + (first + i / columns * row_stride + i % columns * column_stride) * unit;
                    file[at..at + unit].to_vec()
                })
                .collect();
            prop_assert_eq!(place.read(&file).unwrap().unwrap().into_owned(), wanted.clone());
            let from = (skip * (rows * columns) as f64) as usize;
            let count = (take * (rows * columns - from) as f64) as usize;
            let mut some = vec![0; count * unit];
            place.gather(&file, from, &mut some).unwrap();
            prop_assert_eq!(&some[..], &wanted[from * unit..][..count * unit]);
            prop_assert!(place.gather(&file, rows * columns - from, &mut vec![0; (from + 1) * unit]).is_none());
            // The last byte that it needs is the last one of its span.
            let span = place.span();
            prop_assert!(place.read(&file[..span.end]).unwrap().is_some());
            prop_assert!(place.read(&file[..span.end - 1]).unwrap().is_none());
        }
    }

    #[test]
    fn large_ones_are_cut_into_tasks() {
        let (rows, columns) = (700, 900);
        let units: Vec<u16> = (0..rows * columns).map(|i| i as u16).collect();
        let file: Vec<u8> = units.iter().flat_map(|v| v.to_le_bytes()).collect();
        // [rows, columns] on disk, read as [columns, rows].
        let place = Place::whole(0, file.len()).part(2, 0, (columns, rows), (1, columns)).unwrap();
        let found = place.read(&file).unwrap().unwrap();
        for (i, found) in found.chunks_exact(2).enumerate() {
            assert_eq!(u16::from_le_bytes([found[0], found[1]]), units[i % rows * columns + i / rows]);
        }
    }
}
