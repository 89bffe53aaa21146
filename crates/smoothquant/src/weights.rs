//! Sampled weight rows, scaled and quantized.

use lite_quant::floats::{FloatScheme, Grain, ScaleKind};
use lite_quant::{
    ActivationFormat, ActivationScale, ActivationScheme, QuantError, Range, RangeContext, StaticRange, WeightScheme,
    fake_quantize_tokens, quantize_nearest,
};
use rayon::prelude::*;

use crate::SmoothQuantError;
use crate::channels::column_maxima;

/// Rows of one weight that share their scales if the scheme has scales per block, else all its sampled rows.
struct Run {
    /// Which weight.
    weight: usize,
    /// Number of rows.
    height: usize,
}

/// Evenly spaced rows of all weights that share an input, or evenly spaced runs of rows where those share scales.
pub(crate) struct RowSample {
    /// `[n, K]` row-major.
    pub(crate) rows: Vec<f32>,
    /// In the order of `rows`.
    runs: Vec<Run>,
    /// `max|W_j|` over all rows of each weight, sampled or not, for scales per tensor.
    maxima: Vec<Vec<f32>>,
    scheme: WeightScheme,
}

impl RowSample {
    /// At most `max_rows` rows, at least one run, of inputs that were checked.
    ///
    /// # Errors
    /// [`SmoothQuantError::Scheme`] for scales that cannot be simulated.
    pub(crate) fn new(
        weights: &[(&[f32], usize)],
        k: usize,
        scheme: WeightScheme,
        max_rows: usize,
    ) -> Result<Self, SmoothQuantError> {
        let unit = match scheme {
            WeightScheme::Float(FloatScheme { grain: Grain::Block { rows, .. }, .. }) => rows.max(1),
            _ => 1,
        };
        let total: usize = weights.iter().map(|(_, n)| n.div_ceil(unit)).sum();
        let step = total.div_ceil((max_rows / unit).max(1)).max(1);
        let (mut rows, mut runs) = (Vec::new(), Vec::<Run>::new());
        // The middle of each `step` runs, counted on across the weights.
        let all = weights
            .iter()
            .enumerate()
            .flat_map(|(index, (weight, _))| weight.chunks(unit.saturating_mul(k)).map(move |values| (index, values)));
        for (index, values) in all.skip(step / 2).step_by(step) {
            let height = values.len() / k;
            rows.extend_from_slice(values);
            match runs.last_mut() {
                Some(last) if unit == 1 && last.weight == index => last.height += height,
                _ => runs.push(Run { weight: index, height }),
            }
        }
        if let WeightScheme::Float(scheme) = scheme {
            check(&scheme, k)?;
        }
        let needs_maxima = matches!(
            scheme,
            WeightScheme::Float(
                FloatScheme { grain: Grain::Tensor, .. } | FloatScheme { scale: ScaleKind::E4M3WithGlobal, .. }
            )
        );
        let maxima = if needs_maxima { weights.iter().map(|(w, _)| column_maxima(w, k)).collect() } else { Vec::new() };
        Ok(Self { rows, runs, maxima, scheme })
    }

    /// `W · diag(s)`, quantized by nearest rounding over the whole range, `[n, K]`.
    ///
    /// # Errors
    /// Scaled weights that overflow; a group size that does not divide K.
    pub(crate) fn quantized(&self, scales: &[f32]) -> Result<Vec<f32>, QuantError> {
        let k = scales.len();
        let mut scaled = lite_linalg::scale_columns(&self.rows, scales);
        let scheme = match self.scheme {
            WeightScheme::Int(scheme) => {
                let n = scaled.len() / k;
                let context = RangeContext { weight: &scaled, out_features: n, in_features: k, gram: None };
                return Ok(quantize_nearest(&context, &scheme, Range::MinMax)?.dequantize());
            }
            WeightScheme::Float(scheme) => scheme,
        };
        let mut rest = scaled.as_mut_slice();
        for run in &self.runs {
            let (rows, tail) = rest.split_at_mut(run.height * k);
            rest = tail;
            let largest = self
                .maxima
                .get(run.weight)
                .map(|maxima| maxima.iter().zip(scales).fold(0f32, |largest, (m, s)| largest.max(m * s)));
            quantize_run(rows, k, &scheme, largest)?;
        }
        Ok(scaled)
    }
}

/// Combinations of grain and scale type that files have.
fn check(scheme: &FloatScheme, k: usize) -> Result<(), SmoothQuantError> {
    scheme.grain.grid(1, k)?;
    match (scheme.grain, scheme.scale) {
        (Grain::Group(_), _) | (_, ScaleKind::Float(_)) | (Grain::Block { .. }, ScaleKind::E8M0) => Ok(()),
        _ => Err(SmoothQuantError::Scheme { found: *scheme }),
    }
}

/// The run-time quantizers of activations do for weights too: the formulas are the same, per row instead of per token.
fn quantize_run(rows: &mut [f32], k: usize, scheme: &FloatScheme, largest: Option<f32>) -> Result<(), QuantError> {
    let scale = match (scheme.grain, scheme.scale) {
        (Grain::Block { columns, .. }, kind) => {
            quantize_block_rows(rows, k, columns, scheme, kind);
            return Ok(());
        }
        (Grain::Tensor, _) => ActivationScale::StaticTensor,
        (Grain::Channel, _) => ActivationScale::DynamicGroup(k),
        (Grain::Group(width), ScaleKind::Float(_)) => ActivationScale::DynamicGroup(width),
        (Grain::Group(width), ScaleKind::E8M0) => ActivationScale::DynamicMx(width),
        (Grain::Group(width), ScaleKind::E4M3WithGlobal) => ActivationScale::StaticTensorLocal(width),
    };
    let as_tokens = ActivationScheme { format: ActivationFormat::Float(scheme.format), scale };
    let largest = largest.unwrap_or(0.0);
    let found = StaticRange::from_bounds(-largest, largest)?.quantization(&as_tokens)?;
    fake_quantize_tokens(rows, k, &as_tokens, found.as_ref())
}

/// One row of blocks: `absmax / largest` for each block of `columns`, as LMDeploy and DeepSeek have it; E8M0 scales are
/// rounded up to a power of two.
fn quantize_block_rows(rows: &mut [f32], k: usize, columns: usize, scheme: &FloatScheme, kind: ScaleKind) {
    let mut scales = vec![0f32; k.div_ceil(columns)];
    for row in rows.chunks_exact(k) {
        for (scale, values) in scales.iter_mut().zip(row.chunks(columns)) {
            *scale = values.iter().fold(*scale, |m, v| m.max(v.abs()));
        }
    }
    for scale in &mut scales {
        *scale = scale.max(1e-6) / scheme.format.largest();
        *scale = match kind {
            ScaleKind::E8M0 => scale.log2().ceil().exp2(),
            ScaleKind::Float(dtype) => dtype.round(scale.clamp(dtype.smallest_scale(), dtype.largest())),
            ScaleKind::E4M3WithGlobal => *scale,
        };
    }
    rows.par_chunks_mut(k).for_each(|row| {
        for (scale, values) in scales.iter().zip(row.chunks_mut(columns)) {
            values.iter_mut().for_each(|v| *v = scheme.format.round(*v / scale) * scale);
        }
    });
}
