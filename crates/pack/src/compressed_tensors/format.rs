//! Which of the library's formats a scheme is stored in, and the tensors of those of a byte or a pair of codes each.

use lite_quant::floats::{FloatFormat, FloatScheme, Grain, ScaleKind};
use lite_quant::{ActivationFormat, ActivationScale, LinearScheme, WeightScheme};

use super::NAME;
use crate::PackError;
use crate::floats::grid;
use crate::form::{Form, Single, is_static};
use crate::tensors::groups;

/// The formats of compressed-tensors 0.18 (`config/base.py`: `CompressionFormat`) that hold quantized weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Format {
    Pack,
    Int,
    Float,
    Naive,
    Nvfp4,
    Mxfp4,
    Mxfp8,
}

impl Format {
    const ALL: [Self; 7] = [Self::Pack, Self::Int, Self::Float, Self::Naive, Self::Nvfp4, Self::Mxfp4, Self::Mxfp8];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Pack => "pack-quantized",
            Self::Int => "int-quantized",
            Self::Float => "float-quantized",
            Self::Naive => "naive-quantized",
            Self::Nvfp4 => "nvfp4-pack-quantized",
            Self::Mxfp4 => "mxfp4-pack-quantized",
            Self::Mxfp8 => "mxfp8-quantized",
        }
    }

    pub(super) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name)
    }

    /// The format that is written: the library's own choice (`compressors/format.py`: `infer_module_format`), but
    /// four-bit integers under fp8 activations are packed, as vLLM's kernel for them (and llm-compressor's example) wants.
    pub(super) fn of(scheme: &LinearScheme) -> Self {
        match (&scheme.weights, scheme.activations) {
            (WeightScheme::Int(_), None) => Self::Pack,
            (WeightScheme::Int(int), Some(inputs)) => match inputs.format {
                ActivationFormat::Float(_) if int.bits == 4 => Self::Pack,
                _ => Self::Int,
            },
            (WeightScheme::Float(float), inputs) => match (float.scale, float.format) {
                (ScaleKind::E4M3WithGlobal, _) => Self::Nvfp4,
                (ScaleKind::E8M0, FloatFormat::E2M1) => Self::Mxfp4,
                (ScaleKind::E8M0, _) => Self::Mxfp8,
                _ if inputs.is_some() => Self::Float,
                _ => Self::Naive,
            },
        }
    }

    /// Whether a scheme may be stored in this format, however it is written here.
    pub(super) fn holds(self, scheme: &LinearScheme) -> bool {
        let integers = scheme.weights.int().is_some();
        match self {
            Self::Pack | Self::Int => integers,
            Self::Naive => integers || matches!(Self::of(scheme), Self::Float | Self::Naive),
            Self::Float => matches!(Self::of(scheme), Self::Float | Self::Naive),
            Self::Nvfp4 | Self::Mxfp4 | Self::Mxfp8 => Self::of(scheme) == self,
        }
    }
}

/// Refuses what no format of the library holds.
pub(super) fn check_scheme(scheme: &LinearScheme) -> Result<(), PackError> {
    let refused = |what, wanted| Err(PackError::Scheme { layout: NAME, what, wanted });
    if let WeightScheme::Float(FloatScheme { format, grain, scale }) = scheme.weights {
        let known = match (format, scale) {
            (FloatFormat::E4M3, ScaleKind::Float(_)) => true,
            (FloatFormat::E2M1, ScaleKind::E4M3WithGlobal) => grain == Grain::Group(16),
            (FloatFormat::E4M3 | FloatFormat::E2M1, ScaleKind::E8M0) => grain == Grain::Group(32),
            _ => false,
        };
        if !known {
            let wanted = "e4m3 codes with plain scales, NVFP4 with groups of 16, MXFP4 and MXFP8 with groups of 32";
            return refused("floats of this kind", wanted);
        }
    }
    let Some(inputs) = scheme.activations else { return Ok(()) };
    let fits = match (inputs.format, inputs.scale) {
        (ActivationFormat::Int { bits, .. }, scale) => {
            matches!(bits, 4 | 8)
                && scheme.weights.int().is_some()
                && !matches!(scale, ActivationScale::DynamicMx(_) | ActivationScale::StaticTensorLocal(_))
        }
        (ActivationFormat::Float(FloatFormat::E5M2), _) => false,
        (ActivationFormat::Float(FloatFormat::E2M1), scale) => {
            matches!(scale, ActivationScale::DynamicMx(32) | ActivationScale::StaticTensorLocal(16))
        }
        (ActivationFormat::Float(FloatFormat::E4M3), scale) => !matches!(scale, ActivationScale::StaticTensorLocal(_)),
    };
    if !fits {
        let wanted = "int8, int4 or e4m3 inputs per token, group or (static) tensor, and MX or NVFP4 inputs";
        return refused("activations of this kind", wanted);
    }
    if Format::of(scheme) == Format::Pack && is_static(Some(&inputs)) {
        return refused("packed integers under static activations", "dynamic ones");
    }
    Ok(())
}

/// The tensors of a scheme that is not packed; also those of a packed one, as some tools store it.
pub(super) fn form(scheme: &LinearScheme, n: usize, k: usize) -> Result<Form, PackError> {
    check_scheme(scheme)?;
    let (rows, columns) = match &scheme.weights {
        WeightScheme::Int(int) => (n, groups(NAME, int, n, k)?),
        WeightScheme::Float(float) => grid(NAME, float, n, k)?,
    };
    let shapes = match scheme.weights {
        WeightScheme::Float(FloatScheme { grain: Grain::Tensor, .. }) => vec![vec![1], Vec::new(), vec![1, 1]],
        _ if columns == 1 => vec![vec![rows, 1], vec![rows]],
        _ => vec![vec![rows, columns]],
    };
    let paired = matches!(Format::of(scheme), Format::Nvfp4 | Format::Mxfp4);
    let global = |suffix| Single { suffix, scalar: false, divisor: true };
    let input = scheme.activations.filter(|inputs| is_static(Some(inputs)));
    Ok(Form {
        layout: NAME,
        n,
        k,
        codes: if paired { "weight_packed" } else { "weight" },
        scales: "weight_scale",
        shapes,
        wide: None,
        zeros: "weight_zero_point",
        global: global("weight_global_scale"),
        input: input.map(|inputs| match inputs.scale {
            ActivationScale::StaticTensorLocal(_) => global("input_global_scale"),
            _ => Single { suffix: "input_scale", scalar: false, divisor: false },
        }),
        input_zero: input.and_then(|inputs| match inputs.format {
            ActivationFormat::Int { symmetric: false, .. } => Some("input_zero_point"),
            _ => None,
        }),
    })
}
