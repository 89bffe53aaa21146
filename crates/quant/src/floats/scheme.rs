use super::FloatFormat;
use crate::{QuantError, ScaleDtype};

/// Which weights share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Grain {
    /// All of them.
    Tensor,
    /// Those of one output row.
    Channel,
    /// So many consecutive input channels of one output row.
    Group(usize),
    /// A block of rows and columns; blocks at the lower and right edge may be cut.
    Block {
        /// Output rows.
        rows: usize,
        /// Input channels.
        columns: usize,
    },
}

impl Grain {
    /// Rows and columns of the grid of scales of a weight `[n, k]`.
    ///
    /// # Errors
    /// [`QuantError::NotDivisible`] if `k` is not a whole number of groups, or a group or block is empty.
    pub fn grid(self, n: usize, k: usize) -> Result<(usize, usize), QuantError> {
        match self {
            Self::Tensor => Ok((1, 1)),
            Self::Channel => Ok((n, 1)),
            Self::Group(width) if width != 0 && k != 0 && k.is_multiple_of(width) => Ok((n, k / width)),
            Self::Group(group_size) => Err(QuantError::NotDivisible { in_features: k, group_size }),
            Self::Block { rows, columns } if rows != 0 && columns != 0 => Ok((n.div_ceil(rows), k.div_ceil(columns))),
            Self::Block { columns, .. } => Err(QuantError::NotDivisible { in_features: k, group_size: columns }),
        }
    }

    /// Rows and columns that one scale covers in a weight `[n, k]`.
    pub fn cover(self, n: usize, k: usize) -> (usize, usize) {
        match self {
            Self::Tensor => (n, k),
            Self::Channel => (1, k),
            Self::Group(width) => (1, width),
            Self::Block { rows, columns } => (rows, columns),
        }
    }
}

/// The type of the scales in the file. They are rounded to it before codes are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScaleKind {
    /// A float of the usual kind.
    Float(ScaleDtype),
    /// A power of two (MX).
    E8M0,
    /// fp8 e4m3, under one more scale in f32 for the whole tensor (NVFP4).
    E4M3WithGlobal,
}

/// A floating-point weight scheme.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FloatScheme {
    /// The type of the codes.
    pub format: FloatFormat,
    /// Which weights share a scale.
    pub grain: Grain,
    /// The type of the scales.
    pub scale: ScaleKind,
}
