use crate::floats::{FloatLinear, FloatScheme};
use crate::{QuantizedLinear, Scheme};

/// How weights are coded: integers or small floats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightScheme {
    /// Integer codes.
    Int(Scheme),
    /// fp8 or fp4 codes.
    Float(FloatScheme),
}

impl From<Scheme> for WeightScheme {
    fn from(scheme: Scheme) -> Self {
        Self::Int(scheme)
    }
}

impl From<FloatScheme> for WeightScheme {
    fn from(scheme: FloatScheme) -> Self {
        Self::Float(scheme)
    }
}

impl WeightScheme {
    /// The integer scheme, if it is one.
    pub fn int(&self) -> Option<&Scheme> {
        match self {
            Self::Int(scheme) => Some(scheme),
            Self::Float(_) => None,
        }
    }
}

/// A quantized weight of either kind: what layouts pack and unpack.
#[derive(Debug, Clone, PartialEq)]
pub enum Weights {
    /// Integer codes.
    Int(QuantizedLinear),
    /// fp8 or fp4 codes.
    Float(FloatLinear),
}

impl Weights {
    /// How it is coded.
    pub fn scheme(&self) -> WeightScheme {
        match self {
            Self::Int(linear) => linear.scheme.into(),
            Self::Float(linear) => linear.scheme.into(),
        }
    }

    /// `[N, K]`.
    pub fn shape(&self) -> (usize, usize) {
        match self {
            Self::Int(linear) => (linear.out_features, linear.in_features),
            Self::Float(linear) => (linear.out_features, linear.in_features),
        }
    }

    /// The weights in f32, `[N, K]` row-major.
    pub fn dequantize(&self) -> Vec<f32> {
        match self {
            Self::Int(linear) => linear.dequantize(),
            Self::Float(linear) => linear.dequantize(),
        }
    }
}

impl From<QuantizedLinear> for Weights {
    fn from(linear: QuantizedLinear) -> Self {
        Self::Int(linear)
    }
}

impl From<FloatLinear> for Weights {
    fn from(linear: FloatLinear) -> Self {
        Self::Float(linear)
    }
}

/// How one linear is quantized: its weight, and its inputs if the engine quantizes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LinearScheme {
    /// The weight.
    pub weights: WeightScheme,
    /// The inputs; `None` leaves them in 16 bits.
    pub activations: Option<ActivationScheme>,
}

impl<S: Into<WeightScheme>> From<S> for LinearScheme {
    fn from(weights: S) -> Self {
        Self { weights: weights.into(), activations: None }
    }
}

/// How the inputs of a linear are quantized by the engine that runs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ActivationScheme {
    /// The type of the codes.
    pub format: ActivationFormat,
    /// Which values share a scale, and who finds it.
    pub scale: ActivationScale,
}

/// The type of quantized activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ActivationFormat {
    /// Integers of `bits`, 4 or 8.
    Int {
        /// Bits per code.
        bits: u8,
        /// Whether the zero point is fixed at zero.
        symmetric: bool,
    },
    /// fp8 or fp4.
    Float(crate::floats::FloatFormat),
}

/// Which activations share a scale, and who finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ActivationScale {
    /// The engine, for every token.
    DynamicToken,
    /// The engine, for every so many channels of a token.
    DynamicGroup(usize),
    /// The engine with E8M0 scales, for every so many channels of a token (MX).
    DynamicMx(usize),
    /// Calibration: one scale (and zero point) in the file.
    StaticTensor,
    /// Calibration finds one scale for the tensor; under it the engine finds e4m3 scales for every so many channels
    /// (NVFP4's "local").
    StaticTensorLocal(usize),
}

/// What calibration found for the inputs of one linear. Multipliers: `x ≈ (code − zero_point) · scale`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct InputQuantization {
    /// The scale of [`ActivationScale::StaticTensor`] or the outer scale of
    /// [`ActivationScale::StaticTensorLocal`] (absmax / 2688 by convention).
    pub scale: f32,
    /// Signed zero point; 0 when symmetric or float.
    pub zero_point: i32,
}
