//! What the kernels need of an instruction set: sixteen f32 at a time.

/// Elements decoded together.
pub(crate) const LANES: usize = 16;

/// Segments of [`LANES`] in a block.
pub(crate) const SEGMENTS: usize = 8;

/// Elements of a block; rows are padded to whole blocks.
pub(crate) const BLOCK: usize = LANES * SEGMENTS;

/// One block of elements of one or more bytes.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Block<T>(pub(crate) [[T; LANES]; SEGMENTS]);

/// One block of 4-bit codes: byte `4·lane + b` holds the codes of segments `2b` (low half) and `2b + 1` of that lane, so
/// that the 32-bit word of a lane has segment `j` in bits `4j..4j+4`.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Nibbles(pub(crate) [u8; BLOCK / 2]);

/// Sixteen lanes of f32 in some instruction set. A value of an implementor is the proof that this machine has it.
pub(crate) trait Simd: Copy + Send + Sync {
    /// Sixteen f32.
    type V: Copy;
    /// The sixteen values of a 4-bit code under one scale and zero point, or what makes them.
    type Table: Copy;
    /// A block of 4-bit codes in registers.
    type Words: Copy;
    /// Whether there are 32 registers of sixteen lanes.
    const WIDE: bool;

    fn zero(self) -> Self::V;
    fn f32s(self, values: &[f32; LANES]) -> Self::V;
    fn bf16s(self, values: &[u16; LANES]) -> Self::V;
    fn f16s(self, values: &[u16; LANES]) -> Self::V;
    /// `(code − zero) · scale`.
    fn bytes(self, codes: &[u8; LANES], scale: f32, zero: f32) -> Self::V;
    fn table(self, scale: f32, zero: f32) -> Self::Table;
    fn words(self, codes: &Nibbles) -> Self::Words;
    /// `(code − zero) · scale` of segment `segment`.
    fn nibbles(self, words: Self::Words, segment: usize, table: Self::Table) -> Self::V;
    /// `a · b + c`.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// The sum of all lanes, in a fixed order.
    fn sum(self, v: Self::V) -> f32;
    fn store(self, v: Self::V, out: &mut [f32; LANES]);
}
