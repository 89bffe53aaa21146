//! What a checkpoint says of a tensor, and what it hands out.

use std::borrow::Cow;
use std::fmt;

use safetensors::Dtype;

use crate::place::Place;

/// What the header says of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name in the file; of an expert that is stored with all others in one tensor, the name it has alone.
    pub name: String,
    /// Type of one element.
    pub dtype: Dtype,
    /// Dimensions, outermost first (C order); empty for a scalar.
    pub shape: Vec<usize>,
    /// Length of its data in bytes.
    pub bytes: u64,
    /// Its shard, a position in [`crate::Checkpoint::shards`].
    pub shard: usize,
    /// Where its data lies in the shard's file.
    pub(crate) place: Place,
    /// Whether it is part of a tensor of all experts.
    pub(crate) fused: bool,
}

impl TensorInfo {
    /// Whether the file holds it together with those of other experts, under another name.
    #[must_use]
    pub fn is_fused(&self) -> bool {
        self.fused
    }

    /// Number of elements: the product of the shape, 1 for a scalar.
    #[must_use]
    pub fn elements(&self) -> usize {
        // Checked against 64 bits when the header was read.
        self.shape.iter().product()
    }
}

/// One tensor: in the mapped file where its elements lie there in their order, else copied out of it.
#[derive(Clone)]
pub struct TensorView<'a> {
    /// Type of one element.
    pub dtype: Dtype,
    /// Dimensions, outermost first (C order).
    pub shape: &'a [usize],
    /// Little-endian elements; the address need not be aligned to them. Copied for experts that lie transposed or
    /// interleaved in a tensor of all experts.
    pub data: Cow<'a, [u8]>,
}

/// Dtype, shape and length: the data may be gigabytes.
impl fmt::Debug for TensorView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}, {} bytes", self.dtype, self.shape, self.data.len())
    }
}

/// How much of a checkpoint has one dtype.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DtypeCount {
    /// Number of tensors.
    pub tensors: usize,
    /// Their data in bytes.
    pub bytes: u64,
}
