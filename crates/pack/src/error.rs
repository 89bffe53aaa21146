use lite_quant::QuantError;
use safetensors::Dtype;
use thiserror::Error;

/// Whose fault an error is, and thereby the exit code of the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// A file or value is damaged or contradicts itself.
    Input,
    /// A sound request that the layout, or this program, cannot serve.
    Unsupported,
}

impl ErrorKind {
    /// The exit code: 3 for bad input, 4 for something unsupported.
    pub fn exit_code(self) -> i32 {
        match self {
            Self::Input => 3,
            Self::Unsupported => 4,
        }
    }
}

/// What can be wrong with a scheme for a layout, with a tensor of a checkpoint, or with its config.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum PackError {
    /// The scheme or the quantized weight contradicts itself.
    #[error(transparent)]
    Quant(#[from] QuantError),
    /// The layout has no code of this width.
    #[error("layout `{layout}` cannot hold {found}-bit codes, it takes {wanted}; choose other bits or another layout")]
    Bits {
        /// The layout.
        layout: &'static str,
        /// Bits of the scheme.
        found: u8,
        /// What the layout takes, in words.
        wanted: &'static str,
    },
    /// The layout has no room for codes or activations of this kind.
    #[error("layout `{layout}` cannot hold {what}, it takes {wanted}; choose another scheme or layout")]
    Scheme {
        /// The layout.
        layout: &'static str,
        /// What was asked for, in words.
        what: &'static str,
        /// What the layout takes, in words.
        wanted: &'static str,
    },
    /// Static activations without the scale that calibration finds, or a scale that nothing asks for.
    #[error("the linear has {found} for its inputs, {wanted}")]
    Input {
        /// What was given, in words.
        found: &'static str,
        /// What the activation scheme asks for and what to do, in words.
        wanted: &'static str,
    },
    /// The layout cannot hold a matrix of this shape.
    #[error(
        "layout `{layout}` cannot hold a weight [{n}, {k}]: {rule}; leave this layer unquantized or use another layout"
    )]
    Shape {
        /// The layout.
        layout: &'static str,
        /// Output features.
        n: usize,
        /// Input features.
        k: usize,
        /// The rule that is broken, in words.
        rule: &'static str,
    },
    /// The number of elements or bytes does not fit the address space.
    #[error("a weight [{n}, {k}] is too large to address; the shape in the file or config is damaged")]
    TooLarge {
        /// Output features.
        n: usize,
        /// Input features.
        k: usize,
    },
    /// A tensor that the layout needs is absent.
    #[error("tensor `{suffix}` of layout `{layout}` is missing; the checkpoint is incomplete or has another layout")]
    Missing {
        /// The layout.
        layout: &'static str,
        /// The name after the module's.
        suffix: &'static str,
    },
    /// A tensor is present that changes the meaning of the others.
    #[error("tensor `{suffix}` found beside a layer of layout `{layout}`: {why}")]
    Unexpected {
        /// The layout.
        layout: &'static str,
        /// The name after the module's.
        suffix: &'static str,
        /// What it means and what to do.
        why: &'static str,
    },
    /// A tensor has the wrong element type.
    #[error("tensor `{suffix}` has dtype {found:?}, wanted {wanted}")]
    Dtype {
        /// The name after the module's.
        suffix: &'static str,
        /// The type in the file.
        found: Dtype,
        /// The types that are read, in words.
        wanted: &'static str,
    },
    /// A tensor has the wrong shape for the layer.
    #[error(
        "tensor `{suffix}` has shape {found:?}, wanted {wanted:?}; check the model's dimensions, bits and group size"
    )]
    TensorShape {
        /// The name after the module's.
        suffix: &'static str,
        /// The shape in the file.
        found: Vec<usize>,
        /// The shape that the layer and the scheme ask for.
        wanted: Vec<usize>,
    },
    /// The padded packing of 3, 5, 6 and 7 bits that compressed-tensors wrote before it packed densely.
    #[error(
        "tensor `{suffix}` has {found} words per row, dense packing has {wanted}: the padded {bits}-bit packing of old \
         compressed-tensors releases is not read; load and save the checkpoint again with 0.18 or newer"
    )]
    PaddedPacking {
        /// The name after the module's.
        suffix: &'static str,
        /// Bits per code.
        bits: u8,
        /// Words per row in the file.
        found: usize,
        /// Words per row of the dense packing.
        wanted: usize,
    },
    /// A tensor's bytes do not match its shape.
    #[error("tensor `{suffix}` holds {found} bytes, its shape asks for {wanted}; the file is damaged")]
    ByteLength {
        /// The name after the module's.
        suffix: &'static str,
        /// Bytes present.
        found: usize,
        /// Bytes the shape asks for.
        wanted: usize,
    },
    /// Zero points that can be read in two ways, of which one is wrong.
    #[error("tensor `{suffix}` can be read in two ways: {why}")]
    AmbiguousZeros {
        /// The name after the module's.
        suffix: &'static str,
        /// Which two, and how to decide.
        why: String,
    },
    /// A module has another scheme than the others, and the layout takes one only.
    #[error(
        "layout `{layout}` cannot hold `{module}` with a scheme of its own: {why}; use one scheme, or layout \
         `compressed-tensors`"
    )]
    Override {
        /// The layout.
        layout: &'static str,
        /// The full name of the module.
        module: String,
        /// What is in the way.
        why: &'static str,
    },
    /// One element of a tensor is out of range.
    #[error("`{what}` is {found} at row {row}, column {column}, wanted {wanted}")]
    Value {
        /// Which tensor.
        what: &'static str,
        /// The value.
        found: String,
        /// Row, an output channel.
        row: usize,
        /// Column: an input channel of codes, a group of scales and zeros.
        column: usize,
        /// What is allowed.
        wanted: String,
    },
    /// A key of the config is absent, has the wrong type or an impossible value.
    #[error("`{key}` in `quantization_config` is {found}, wanted {wanted}")]
    Config {
        /// The key, dotted from `quantization_config`.
        key: String,
        /// The value, or "missing".
        found: String,
        /// What is allowed.
        wanted: String,
    },
    /// A key of the config asks for something that is not read.
    #[error("`{key}` in `quantization_config` is {found}, which is not supported: wanted {wanted}")]
    UnsupportedConfig {
        /// The key, dotted from `quantization_config`.
        key: String,
        /// The value.
        found: String,
        /// What is supported.
        wanted: String,
    },
}

impl PackError {
    /// Whether the input is bad or the request is not supported.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Quant(QuantError::Bits { .. } | QuantError::GroupSize { .. } | QuantError::NotDivisible { .. })
            | Self::Bits { .. }
            | Self::Scheme { .. }
            | Self::Shape { .. }
            | Self::Unexpected { .. }
            | Self::PaddedPacking { .. }
            | Self::Override { .. }
            | Self::UnsupportedConfig { .. } => ErrorKind::Unsupported,
            Self::Quant(_)
            | Self::Input { .. }
            | Self::TooLarge { .. }
            | Self::Missing { .. }
            | Self::Dtype { .. }
            | Self::TensorShape { .. }
            | Self::ByteLength { .. }
            | Self::AmbiguousZeros { .. }
            | Self::Value { .. }
            | Self::Config { .. } => ErrorKind::Input,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_have_the_documented_exit_codes() {
        let shape = PackError::Quant(QuantError::NotDivisible { in_features: 10, group_size: 4 });
        assert_eq!(shape.kind().exit_code(), 4);
        let length = PackError::Quant(QuantError::Length { what: "codes", found: 1, wanted: 2 });
        assert_eq!(length.kind().exit_code(), 3);
        assert_eq!(PackError::Missing { layout: "awq", suffix: "qzeros" }.kind(), ErrorKind::Input);
        let message = PackError::Missing { layout: "awq", suffix: "qzeros" }.to_string();
        assert!(message.contains("`qzeros`") && message.contains("`awq`"), "{message}");
    }
}
