//! What layouts and rules ask of a [`LinearScheme`].

use lite_quant::floats::{FloatScheme, ScaleKind};
use lite_quant::{ActivationScheme, InputQuantization, LinearScheme, QuantizedLinear, ScaleDtype, Scheme};
use lite_quant::{WeightScheme, Weights};

use crate::PackError;

/// The type of the scales, if it is one of the usual floats.
pub(crate) fn scale_dtype(scheme: &LinearScheme) -> Option<ScaleDtype> {
    match scheme.weights {
        WeightScheme::Int(scheme) => Some(scheme.scale_dtype),
        WeightScheme::Float(FloatScheme { scale: ScaleKind::Float(dtype), .. }) => Some(dtype),
        WeightScheme::Float(_) => None,
    }
}

/// The same scheme with scales of this type, where they are one of the usual floats.
pub(crate) fn with_scale_dtype(scheme: &LinearScheme, dtype: ScaleDtype) -> LinearScheme {
    let weights = match scheme.weights {
        WeightScheme::Int(scheme) => WeightScheme::Int(Scheme { scale_dtype: dtype, ..scheme }),
        WeightScheme::Float(scheme) if matches!(scheme.scale, ScaleKind::Float(_)) => {
            WeightScheme::Float(FloatScheme { scale: ScaleKind::Float(dtype), ..scheme })
        }
        other => other,
    };
    LinearScheme { weights, ..*scheme }
}

/// Whether a config tells two schemes apart: it does not know the type of scales.
pub(crate) fn same_codes(a: &LinearScheme, b: &LinearScheme) -> bool {
    with_scale_dtype(a, ScaleDtype::F32) == with_scale_dtype(b, ScaleDtype::F32)
}

/// The integer scheme of a layout that holds nothing else, and leaves inputs in 16 bits.
pub(crate) fn weight_only<'s>(layout: &'static str, scheme: &'s LinearScheme) -> Result<&'s Scheme, PackError> {
    let WeightScheme::Int(weights) = &scheme.weights else {
        return Err(PackError::Scheme { layout, what: "floating-point codes", wanted: INTEGERS });
    };
    match scheme.activations {
        Some(_) => Err(PackError::Scheme { layout, what: "quantized activations", wanted: INTEGERS }),
        None => Ok(weights),
    }
}

const INTEGERS: &str = "integer weights only";

/// The integer weight of a layout that holds nothing else.
pub(crate) fn weight_only_linear<'w>(
    layout: &'static str,
    weights: &'w Weights,
    activations: Option<&ActivationScheme>,
    input: Option<&InputQuantization>,
) -> Result<&'w QuantizedLinear, PackError> {
    match weights {
        Weights::Float(_) => Err(PackError::Scheme { layout, what: "floating-point codes", wanted: INTEGERS }),
        Weights::Int(_) if activations.is_some() || input.is_some() => {
            Err(PackError::Scheme { layout, what: "quantized activations", wanted: INTEGERS })
        }
        Weights::Int(linear) => Ok(linear),
    }
}
