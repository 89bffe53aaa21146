//! Rows of every element type, as sixteen f32 at a time.

use crate::simd::{BLOCK, Block, LANES, Nibbles, SEGMENTS, Simd};

/// A row of a matrix, or all of them.
pub(crate) trait Row<S: Simd>: Copy {
    /// What is read once per block.
    type State: Copy;
    /// Of all rows of `blocks` blocks each, the one at `index`.
    fn at(self, index: usize, blocks: usize) -> Self;
    fn block(self, simd: S, index: usize) -> Self::State;
    fn segment(self, simd: S, state: Self::State, segment: usize) -> S::V;
}

/// A row of f32.
#[derive(Clone, Copy)]
pub(crate) struct F32Row<'a>(pub(crate) &'a [Block<f32>]);

impl<'a, S: Simd> Row<S> for F32Row<'a> {
    type State = &'a Block<f32>;

    #[inline(always)]
    fn at(self, index: usize, blocks: usize) -> Self {
        Self(&self.0[index * blocks..(index + 1) * blocks])
    }

    #[inline(always)]
    fn block(self, _: S, index: usize) -> &'a Block<f32> {
        &self.0[index]
    }

    #[inline(always)]
    fn segment(self, simd: S, block: &'a Block<f32>, segment: usize) -> S::V {
        simd.f32s(&block.0[segment])
    }
}

/// A row of 16-bit floats: bf16, or f16 if `HALF`.
#[derive(Clone, Copy)]
pub(crate) struct WordRow<'a, const HALF: bool>(pub(crate) &'a [Block<u16>]);

impl<'a, S: Simd, const HALF: bool> Row<S> for WordRow<'a, HALF> {
    type State = &'a Block<u16>;

    #[inline(always)]
    fn at(self, index: usize, blocks: usize) -> Self {
        Self(&self.0[index * blocks..(index + 1) * blocks])
    }

    #[inline(always)]
    fn block(self, _: S, index: usize) -> &'a Block<u16> {
        &self.0[index]
    }

    #[inline(always)]
    fn segment(self, simd: S, block: &'a Block<u16>, segment: usize) -> S::V {
        if HALF { simd.f16s(&block.0[segment]) } else { simd.bf16s(&block.0[segment]) }
    }
}

/// Scales and zero points of rows, `count` for each: column `c` belongs to group `c >> shift` of its row.
#[derive(Clone, Copy)]
pub(crate) struct Groups<'a> {
    pub(crate) scales: &'a [f32],
    pub(crate) zeros: &'a [u8],
    pub(crate) count: usize,
    pub(crate) shift: u32,
}

impl Groups<'_> {
    #[inline(always)]
    fn at(self, row: usize) -> Self {
        let range = row * self.count..(row + 1) * self.count;
        Self { scales: &self.scales[range.clone()], zeros: &self.zeros[range], ..self }
    }

    #[inline(always)]
    fn of(self, column: usize) -> (f32, f32) {
        let group = column >> self.shift;
        (self.scales[group], f32::from(self.zeros[group]))
    }
}

/// A row of 8-bit codes. `FINE`: groups are narrower than a block.
#[derive(Clone, Copy)]
pub(crate) struct ByteRow<'a, const FINE: bool> {
    pub(crate) codes: &'a [Block<u8>],
    pub(crate) groups: Groups<'a>,
}

impl<'a, S: Simd, const FINE: bool> Row<S> for ByteRow<'a, FINE> {
    type State = (&'a Block<u8>, usize, (f32, f32));

    #[inline(always)]
    fn at(self, index: usize, blocks: usize) -> Self {
        Self { codes: &self.codes[index * blocks..(index + 1) * blocks], groups: self.groups.at(index) }
    }

    #[inline(always)]
    fn block(self, _: S, index: usize) -> Self::State {
        let grid = if FINE { (0.0, 0.0) } else { self.groups.of(index * BLOCK) };
        (&self.codes[index], index, grid)
    }

    #[inline(always)]
    fn segment(self, simd: S, (block, index, grid): Self::State, segment: usize) -> S::V {
        let (scale, zero) = if FINE { self.groups.of(index * BLOCK + segment * LANES) } else { grid };
        simd.bytes(&block.0[segment], scale, zero)
    }
}

/// A row of 4-bit codes. `FINE`: groups are narrower than a block.
#[derive(Clone, Copy)]
pub(crate) struct NibbleRow<'a, const FINE: bool> {
    pub(crate) codes: &'a [Nibbles],
    pub(crate) groups: Groups<'a>,
}

impl<S: Simd, const FINE: bool> Row<S> for NibbleRow<'_, FINE> {
    type State = (S::Words, usize, S::Table);

    #[inline(always)]
    fn at(self, index: usize, blocks: usize) -> Self {
        Self { codes: &self.codes[index * blocks..(index + 1) * blocks], groups: self.groups.at(index) }
    }

    #[inline(always)]
    fn block(self, simd: S, index: usize) -> Self::State {
        let (scale, zero) = if FINE { (0.0, 0.0) } else { self.groups.of(index * BLOCK) };
        (simd.words(&self.codes[index]), index, simd.table(scale, zero))
    }

    #[inline(always)]
    fn segment(self, simd: S, (words, index, table): Self::State, segment: usize) -> S::V {
        if !FINE {
            return simd.nibbles(words, segment, table);
        }
        let (scale, zero) = self.groups.of(index * BLOCK + segment * LANES);
        simd.nibbles(words, segment, simd.table(scale, zero))
    }
}

/// Products of `N` rows with `T` vectors of `blocks` blocks each, one after the other in `x`: `out[row · T + vector]`.
///
/// Several rows share what is read of many vectors, which are more than the first cache holds. `A` partial sums for each
/// product keep the multipliers busy: it divides [`SEGMENTS`].
#[inline(always)]
pub(crate) fn dot<S: Simd, R: Row<S>, const N: usize, const T: usize, const A: usize>(
    simd: S,
    rows: [R; N],
    x: &[Block<f32>],
    blocks: usize,
    out: &mut [f32],
) {
    let mut sums = [[[simd.zero(); A]; T]; N];
    for index in 0..blocks {
        // Loops, not closures: nothing makes the compiler inline those into the functions that have the instructions.
        let mut states = [rows[0].block(simd, index); N];
        for r in 1..N {
            states[r] = rows[r].block(simd, index);
        }
        let mut vectors = [&x[index]; T];
        for t in 1..T {
            vectors[t] = &x[t * blocks + index];
        }
        for segment in 0..SEGMENTS {
            for r in 0..N {
                let w = rows[r].segment(simd, states[r], segment);
                for t in 0..T {
                    let sum = &mut sums[r][t][segment % A];
                    *sum = simd.fma(w, simd.f32s(&vectors[t].0[segment]), *sum);
                }
            }
        }
    }
    for (out, sums) in out.iter_mut().zip(sums.as_flattened()) {
        let mut total = sums[0];
        for sum in &sums[1..] {
            total = simd.add(total, *sum);
        }
        *out = simd.sum(total);
    }
}

/// The values of a row; `out` may end inside the last block.
#[inline(always)]
pub(crate) fn expand<S: Simd, R: Row<S>>(simd: S, row: R, out: &mut [f32]) {
    for (index, out) in out.chunks_mut(BLOCK).enumerate() {
        let state = row.block(simd, index);
        let (whole, rest) = out.as_chunks_mut::<LANES>();
        for (segment, out) in whole.iter_mut().enumerate() {
            simd.store(row.segment(simd, state, segment), out);
        }
        if !rest.is_empty() {
            let mut last = [0f32; LANES];
            simd.store(row.segment(simd, state, whole.len()), &mut last);
            let count = rest.len();
            rest.copy_from_slice(&last[..count]);
        }
    }
}
