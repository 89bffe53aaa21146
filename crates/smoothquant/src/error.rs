use lite_quant::QuantError;
use lite_quant::floats::FloatScheme;
use thiserror::Error;

/// What can go wrong when scales are computed or searched.
#[derive(Debug, Error)]
pub enum SmoothQuantError {
    /// An exponent that is not a finite number in `[0, 1]`.
    #[error("alpha {found}: give a number from 0 (even out the weights) to 1 (even out the activations), such as 0.5")]
    Alpha {
        /// The exponent that was asked for.
        found: f64,
    },
    /// Nothing to work on.
    #[error("no {what} were given; at least one is needed")]
    Empty {
        /// What is missing.
        what: &'static str,
    },
    /// A slice does not have the length its shape says.
    #[error("{what} has {found} elements, its shape asks for {wanted}")]
    Length {
        /// Which slice.
        what: &'static str,
        /// Elements present.
        found: usize,
        /// Elements the shape asks for.
        wanted: usize,
    },
    /// A statistic of the activations that no activations can have.
    #[error(
        "channel {channel} of the activations has a largest or mean magnitude of {found}, wanted a finite number of 0 or more; check the model in float first, or leave these linears out"
    )]
    Statistic {
        /// The channel.
        channel: usize,
        /// Its value.
        found: f32,
    },
    /// NaN or Inf in a weight.
    #[error("weight {weight} of this input holds {found} at row {row}, column {column}; the checkpoint is damaged")]
    WeightNotFinite {
        /// Which weight, in the order they were given.
        weight: usize,
        /// The value.
        found: f32,
        /// Its row.
        row: usize,
        /// Its column.
        column: usize,
    },
    /// A tie that names no channel.
    #[error("channel {channel} is tied to {found}, wanted a number below {channels}")]
    Tie {
        /// The channel.
        channel: usize,
        /// Its tie.
        found: u32,
        /// K.
        channels: usize,
    },
    /// A scale that cannot be divided by.
    #[error("the scale of channel {channel} is {found}, wanted a positive normal number")]
    Scale {
        /// The channel.
        channel: usize,
        /// Its scale.
        found: f32,
    },
    /// Scales of a type that no file has for that grain.
    #[error(
        "float weights with one scale per {:?} of type {:?}: power-of-two scales go with groups and blocks, e4m3 scales with groups",
        .found.grain, .found.scale
    )]
    Scheme {
        /// The scheme that was asked for.
        found: FloatScheme,
    },
    /// The sampled tokens or the scheme are not usable.
    #[error(transparent)]
    Quant(#[from] QuantError),
    /// No candidate, not even leaving everything as it is, has a finite loss.
    #[error(
        "no scale has a finite loss: weights or activations of this input are too large for f32; check the model in float first, or leave these linears out"
    )]
    NoFiniteLoss,
}
