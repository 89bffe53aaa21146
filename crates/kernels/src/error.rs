use thiserror::Error;

/// Why a matrix cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum KernelError {
    /// A slice has the wrong length.
    #[error("a matrix [{rows}, {cols}] was given {found} {what}, wanted {wanted}")]
    Length {
        /// What the slice holds.
        what: &'static str,
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
        /// Length found.
        found: usize,
        /// Length wanted.
        wanted: usize,
    },
    /// A matrix without elements, or one whose size overflows.
    #[error("a matrix [{rows}, {cols}] is empty or too large; wanted at least one row and one column")]
    Shape {
        /// Rows found.
        rows: usize,
        /// Columns found.
        cols: usize,
    },
    /// A width of groups that the kernels do not step by.
    #[error("groups of {width} columns are not supported; wanted one group per row, or a power of two from 16")]
    GroupWidth {
        /// Columns per group.
        width: usize,
    },
    /// Codes wider than a byte, or codes that do not fit their bits.
    #[error(
        "codes of {bits} bits are not supported or hold larger values; wanted 1 to 8 bits, every code below 2^bits"
    )]
    Bits {
        /// Bits found.
        bits: u8,
    },
}
