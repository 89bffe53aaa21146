//! What a recipe asks of each linear, as schemes.

use lite_pack::Layout;
use lite_quant::floats::{FloatScheme, ScaleKind};
use lite_quant::{ActivationScale, ActivationScheme, LinearScheme, ScaleDtype, Scheme, WeightScheme};

use crate::{JobError, Override, QuantSite, Recipe};

/// The scheme of every linear without an override.
///
/// # Errors
/// [`JobError::Quant`] for numbers that no scheme has.
pub(crate) fn common(recipe: &Recipe, scale_dtype: ScaleDtype) -> Result<LinearScheme, JobError> {
    match recipe.scheme {
        Some(scheme) => Ok(with_scale_dtype(scheme, scale_dtype)),
        None => Ok(Scheme::new(recipe.bits, recipe.group_size, recipe.symmetric, scale_dtype)?.into()),
    }
}

/// `scheme` as an override changes it.
///
/// # Errors
/// [`JobError::Quant`] for numbers that no scheme has; [`JobError::Usage`] where small floats are to have bits.
pub(crate) fn changed(scheme: LinearScheme, rule: &Override) -> Result<LinearScheme, JobError> {
    let base = rule.scheme.unwrap_or(scheme);
    let base = scale_dtype(&scheme).map_or(base, |dtype| with_scale_dtype(base, dtype));
    if rule.bits.is_none() && rule.group_size.is_none() && rule.symmetric.is_none() {
        return Ok(base);
    }
    let WeightScheme::Int(int) = base.weights else {
        return Err(JobError::Usage(format!(
            "--override `{}`: bits, group_size and symmetric belong to integer weights, and these are {}; name another scheme with scheme=NAME",
            lite_model::printable(&rule.pattern),
            words(&base)
        )));
    };
    let int = Scheme::new(
        rule.bits.unwrap_or(i64::from(int.bits)),
        rule.group_size.unwrap_or(int.group_size.to_flag()),
        rule.symmetric.unwrap_or(int.symmetric),
        int.scale_dtype,
    )?;
    Ok(LinearScheme { weights: int.into(), ..base })
}

/// The type of the scales, if it is one of the usual floats.
pub(crate) fn scale_dtype(scheme: &LinearScheme) -> Option<ScaleDtype> {
    match scheme.weights {
        WeightScheme::Int(scheme) => Some(scheme.scale_dtype),
        WeightScheme::Float(FloatScheme { scale: ScaleKind::Float(dtype), .. }) => Some(dtype),
        WeightScheme::Float(_) => None,
    }
}

/// The same scheme with scales of this type, where they are one of the usual floats.
pub(crate) fn with_scale_dtype(scheme: LinearScheme, dtype: ScaleDtype) -> LinearScheme {
    let weights = match scheme.weights {
        WeightScheme::Int(int) => Scheme { scale_dtype: dtype, ..int }.into(),
        WeightScheme::Float(float) if matches!(float.scale, ScaleKind::Float(_)) => {
            FloatScheme { scale: ScaleKind::Float(dtype), ..float }.into()
        }
        other => other,
    };
    LinearScheme { weights, ..scheme }
}

/// The type of scales in a layout: some have their own, others take that of the plain tensors.
pub(crate) fn layout_scale_dtype(layout: &dyn Layout, plain: ScaleDtype) -> ScaleDtype {
    match layout.name() {
        "lmdeploy-w8a8" | "fp8" | "modelopt" => ScaleDtype::F32,
        _ => plain,
    }
}

/// Whether the scales of the inputs are in the file, so that calibration has to find them.
pub(crate) fn is_static(scheme: &LinearScheme) -> bool {
    let fixed =
        |a: &ActivationScheme| matches!(a.scale, ActivationScale::StaticTensor | ActivationScale::StaticTensorLocal(_));
    scheme.activations.as_ref().is_some_and(fixed)
}

/// Whether something in the recipe cannot be found without running windows.
pub(crate) fn needs_windows(recipe: &Recipe) -> bool {
    let schemes = recipe.scheme.iter().chain(recipe.overrides.iter().filter_map(|rule| rule.scheme.as_ref()));
    recipe.kv_cache.is_some() || schemes.into_iter().any(is_static)
}

impl QuantSite {
    /// The integer scheme of its weight.
    ///
    /// # Errors
    /// [`JobError::Unsupported`] for small floats: the solver that asks chooses integer codes.
    pub(crate) fn int(&self) -> Result<&Scheme, JobError> {
        self.scheme.weights.int().ok_or_else(|| {
            JobError::Unsupported(format!(
                "`{}`: this method chooses integer codes, and its weight is to be {}; use --rounding nearest, or `lite rtn`",
                lite_model::printable(&self.module),
                words(&self.scheme)
            ))
        })
    }
}

/// A scheme in words: `4 bits, group size 128, asymmetric`, `fp8 e4m3, one scale per channel, inputs fp8 e4m3 per token`.
pub fn words(scheme: &LinearScheme) -> String {
    use lite_quant::floats::Grain;
    let weights = match scheme.weights {
        WeightScheme::Int(int) => format!(
            "{} bits, group size {}, {}",
            int.bits,
            int.group_size.to_flag(),
            if int.symmetric { "symmetric" } else { "asymmetric" }
        ),
        WeightScheme::Float(float) => {
            let grain = match float.grain {
                Grain::Tensor => "one scale".to_owned(),
                Grain::Channel => "one scale per channel".to_owned(),
                Grain::Group(width) => format!("groups of {width}"),
                Grain::Block { rows, columns } => format!("blocks of {rows}×{columns}"),
            };
            let scale = match float.scale {
                ScaleKind::Float(_) => "",
                ScaleKind::E8M0 => ", power-of-two scales",
                ScaleKind::E4M3WithGlobal => ", e4m3 scales under one for the tensor",
            };
            format!("{}, {grain}{scale}", format_name(float.format))
        }
    };
    let Some(inputs) = &scheme.activations else { return weights };
    let format = match inputs.format {
        lite_quant::ActivationFormat::Int { bits, symmetric } => {
            format!("{bits} bits{}", if symmetric { "" } else { " asymmetric" })
        }
        lite_quant::ActivationFormat::Float(format) => format_name(format).to_owned(),
    };
    let scale = match inputs.scale {
        ActivationScale::DynamicToken => "per token".to_owned(),
        ActivationScale::DynamicGroup(width) => format!("per token and {width} channels"),
        ActivationScale::DynamicMx(width) => format!("per token and {width} channels, power-of-two scales"),
        ActivationScale::StaticTensor => "with a calibrated scale".to_owned(),
        ActivationScale::StaticTensorLocal(width) => format!("per token and {width} channels under a calibrated scale"),
    };
    format!("{weights}; inputs {format} {scale}")
}

fn format_name(format: lite_quant::floats::FloatFormat) -> &'static str {
    use lite_quant::floats::FloatFormat;
    match format {
        FloatFormat::E4M3 => "fp8 e4m3",
        FloatFormat::E5M2 => "fp8 e5m2",
        FloatFormat::E2M1 => "fp4 e2m1",
    }
}
