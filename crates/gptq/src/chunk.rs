//! Rows of a weight that are solved together, stored by columns.
//!
//! A chunk is `[K, R]`: element `(k, r)` is column `k` of row `r`, so that all rows of one column are contiguous. What
//! the algorithms do to a column is then a plain vector loop, and blocks of columns are matrices without gaps.

use lite_quant::Scheme;

/// Rows are padded to a multiple of this with all-zero rows.
pub(crate) const LANES: usize = 16;

/// Rows solved together: wide enough for fast products, narrow enough for a chunk to stay in a core's cache and for every
/// thread to get some.
pub(crate) const ROWS: usize = 64;

/// Copies row-major `[count, width]` rows to `[width, lanes]`.
pub(crate) fn load<T: Copy, U>(
    rows: &[T],
    width: usize,
    lanes: usize,
    out: &mut Vec<U>,
    fill: U,
    convert: impl Fn(T) -> U,
) where
    U: Copy,
{
    out.clear();
    out.resize(width * lanes, fill);
    for (tile, rows) in rows.chunks(LANES * width).enumerate() {
        for (r, row) in rows.chunks_exact(width).enumerate() {
            for (k, &value) in row.iter().enumerate() {
                out[k * lanes + tile * LANES + r] = convert(value);
            }
        }
    }
}

/// The grids of a chunk's groups.
#[derive(Debug, Default, Clone)]
pub(crate) struct Grids {
    /// `[G, R]`, positive, exact in the storage type.
    pub(crate) scales: Vec<f32>,
    /// `[G, R]`.
    pub(crate) zeros: Vec<u8>,
    /// Columns per group.
    pub(crate) width: usize,
    /// R, padded.
    pub(crate) lanes: usize,
    /// The largest code.
    pub(crate) top: f32,
}

impl Grids {
    /// Loads row-major `[rows, G]` parameters.
    pub(crate) fn load(
        &mut self,
        scales: &[f32],
        zeros: &[u8],
        groups: usize,
        width: usize,
        lanes: usize,
        scheme: &Scheme,
    ) {
        load(scales, groups, lanes, &mut self.scales, 1.0, |s| s);
        load(zeros, groups, lanes, &mut self.zeros, 0, |z| z);
        self.width = width;
        self.lanes = lanes;
        self.top = f32::from(scheme.max_code());
    }

    /// Scales and zero points of the group of `column`, `[R]` each.
    pub(crate) fn of_column(&self, column: usize) -> (&[f32], &[u8]) {
        let group = column / self.width;
        let range = group * self.lanes..(group + 1) * self.lanes;
        (&self.scales[range.clone()], &self.zeros[range])
    }

    /// `out = weight − steps · scale`, all `[K, R]`.
    pub(crate) fn errors_into(&self, weight: &[f32], steps: &[f32], out: &mut Vec<f32>) {
        out.clear();
        out.extend_from_slice(weight);
        for (column, (out, steps)) in out.chunks_exact_mut(self.lanes).zip(steps.chunks_exact(self.lanes)).enumerate() {
            let (scales, _) = self.of_column(column);
            for ((o, u), s) in out.iter_mut().zip(steps).zip(scales) {
                *o -= u * s;
            }
        }
    }
}

/// `column −= Σ_i coefficients[i] · columns[i]` for `[R]` columns; `columns` is `[coefficients.len(), R]`.
pub(crate) fn subtract_combination(column: &mut [f32], columns: &[f32], coefficients: &[f32]) {
    let lanes = column.len();
    for (tile, out) in column.chunks_exact_mut(LANES).enumerate() {
        let mut sum = [0f32; LANES];
        for (c, values) in coefficients.iter().zip(columns.chunks_exact(lanes)) {
            let values = &values[tile * LANES..(tile + 1) * LANES];
            for l in 0..LANES {
                sum[l] += c * values[l];
            }
        }
        for l in 0..LANES {
            out[l] -= sum[l];
        }
    }
}
