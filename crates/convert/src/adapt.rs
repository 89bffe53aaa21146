//! The same weights in another scheme: what can change without changing a single dequantized value.

use lite_pack::Layout;
use lite_quant::floats::{FloatLinear, FloatScheme, Grain, ScaleKind, e8m0};
use lite_quant::{GroupSize, LinearScheme, QuantizedLinear, ScaleDtype, Scheme, WeightScheme, Weights};

/// What the values of one linear allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Facts {
    /// Every zero point is in the middle, whatever the config says.
    pub(crate) middle: bool,
    /// All scales are the same.
    pub(crate) one_scale: bool,
    /// All scales fit f16 exactly.
    pub(crate) fits_f16: bool,
    /// All scales fit bf16 exactly.
    pub(crate) fits_bf16: bool,
    /// All scales are powers of two.
    pub(crate) powers: bool,
}

impl Facts {
    /// Looks at zero points and scales.
    pub(crate) fn of(weights: &Weights) -> Self {
        let scales = match weights {
            Weights::Int(linear) => &linear.scales,
            Weights::Float(linear) => &linear.scales,
        };
        let middle = match weights {
            Weights::Int(linear) => linear.zeros.iter().all(|zero| *zero == linear.scheme.middle_code()),
            Weights::Float(_) => true,
        };
        let fits = |dtype: ScaleDtype| scales.iter().all(|scale| dtype.round(*scale) == *scale);
        Self {
            middle,
            one_scale: scales.windows(2).all(|pair| pair[0] == pair[1]),
            fits_f16: fits(ScaleDtype::F16),
            fits_bf16: fits(ScaleDtype::BF16),
            powers: scales.iter().all(|scale| e8m0::encode(*scale).is_some()),
        }
    }

    fn fits(&self, dtype: ScaleDtype) -> bool {
        match dtype {
            ScaleDtype::F32 => true,
            ScaleDtype::F16 => self.fits_f16,
            ScaleDtype::BF16 => self.fits_bf16,
        }
    }
}

/// Whether zero points are preferred in the middle of the codes or stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Zeros {
    /// As the source declares them.
    AsDeclared,
    /// Symmetric wherever the values allow: layouts that always store zero points read back as asymmetric.
    Symmetric,
    /// Stored.
    Stored,
}

/// Schemes that hold the weights of `found` exactly, the best first: as it is, then with other zero points, another type
/// of scales, another grain. Activations stay as they are: they change what an engine computes.
pub(crate) fn exact(found: &LinearScheme, facts: &Facts, zeros: Zeros, n: usize, k: usize) -> Vec<LinearScheme> {
    let weights: Vec<WeightScheme> = match found.weights {
        WeightScheme::Int(scheme) => exact_ints(scheme, facts, zeros, k).into_iter().map(WeightScheme::Int).collect(),
        WeightScheme::Float(scheme) => exact_floats(scheme, facts, n, k).into_iter().map(WeightScheme::Float).collect(),
    };
    weights.into_iter().map(|weights| LinearScheme { weights, activations: found.activations }).collect()
}

fn exact_ints(scheme: Scheme, facts: &Facts, zeros: Zeros, k: usize) -> Vec<Scheme> {
    let symmetric: &[bool] = match (zeros, scheme.symmetric, facts.middle) {
        (_, false, false) => &[false],
        (Zeros::Stored, ..) | (Zeros::AsDeclared, false, true) => &[false, true],
        (Zeros::Symmetric, ..) | (Zeros::AsDeclared, true, _) => &[true, false],
    };
    let groups = match scheme.group_size {
        GroupSize::Channels(width) if width == k => vec![scheme.group_size, GroupSize::Channel],
        // A row is also one group as wide as itself.
        GroupSize::Channel => vec![scheme.group_size, GroupSize::Channels(k)],
        other => vec![other],
    };
    let mut found = Vec::new();
    for group_size in groups {
        for dtype in dtypes(scheme.scale_dtype, facts) {
            for &symmetric in symmetric {
                found.push(Scheme { bits: scheme.bits, group_size, symmetric, scale_dtype: dtype });
            }
        }
    }
    found
}

fn exact_floats(scheme: FloatScheme, facts: &Facts, n: usize, k: usize) -> Vec<FloatScheme> {
    let grains = match scheme.grain {
        Grain::Tensor => vec![Grain::Tensor, Grain::Channel],
        Grain::Channel if facts.one_scale => vec![Grain::Channel, Grain::Group(k), Grain::Tensor],
        Grain::Channel => vec![Grain::Channel, Grain::Group(k)],
        Grain::Group(width) if width == k => vec![scheme.grain, Grain::Channel],
        Grain::Group(width) => vec![scheme.grain, Grain::Block { rows: 1, columns: width }],
        Grain::Block { rows: 1, columns } => vec![scheme.grain, Grain::Group(columns)],
        Grain::Block { rows, columns } if rows >= n && columns >= k => vec![scheme.grain, Grain::Tensor],
        Grain::Block { .. } => vec![scheme.grain],
    };
    let scales = match scheme.scale {
        ScaleKind::E4M3WithGlobal => vec![ScaleKind::E4M3WithGlobal],
        ScaleKind::E8M0 => std::iter::once(ScaleKind::E8M0)
            .chain(dtypes(ScaleDtype::F32, facts).into_iter().map(ScaleKind::Float))
            .collect(),
        ScaleKind::Float(dtype) => dtypes(dtype, facts)
            .into_iter()
            .map(ScaleKind::Float)
            .chain(facts.powers.then_some(ScaleKind::E8M0))
            .collect(),
    };
    let mut found = Vec::new();
    for grain in grains {
        found.extend(scales.iter().map(|&scale| FloatScheme { format: scheme.format, grain, scale }));
    }
    found
}

/// Types that hold all scales exactly, that of the file first.
fn dtypes(own: ScaleDtype, facts: &Facts) -> Vec<ScaleDtype> {
    let others = [ScaleDtype::F32, ScaleDtype::BF16, ScaleDtype::F16].into_iter();
    std::iter::once(own).chain(others.filter(|dtype| *dtype != own && facts.fits(*dtype))).collect()
}

/// The first of `schemes` that `layout` holds.
pub(crate) fn held(layout: &dyn Layout, schemes: &[LinearScheme], n: usize, k: usize) -> Option<LinearScheme> {
    schemes.iter().copied().find(|scheme| layout.check(scheme, n, k).is_ok())
}

/// The codes of `weights` under a scheme of [`exact`]; `None` if it is none.
pub(crate) fn restate(weights: &Weights, scheme: &WeightScheme) -> Option<Weights> {
    match (weights, scheme) {
        (Weights::Int(linear), WeightScheme::Int(scheme)) => restate_ints(linear, scheme).map(Weights::Int),
        (Weights::Float(linear), WeightScheme::Float(scheme)) => restate_floats(linear, scheme).map(Weights::Float),
        _ => None,
    }
}

fn restate_ints(linear: &QuantizedLinear, scheme: &Scheme) -> Option<QuantizedLinear> {
    let groups = scheme.groups(linear.in_features).ok()?;
    let middle = linear.zeros.iter().all(|zero| *zero == linear.scheme.middle_code());
    let exact = scheme.bits == linear.scheme.bits
        && groups == linear.groups()
        && (!scheme.symmetric || middle)
        && linear.scales.iter().all(|scale| scheme.scale_dtype.round(*scale) == *scale);
    exact.then(|| QuantizedLinear { scheme: *scheme, ..linear.clone() })
}

fn restate_floats(linear: &FloatLinear, scheme: &FloatScheme) -> Option<FloatLinear> {
    let (n, k) = (linear.out_features, linear.in_features);
    let (rows, columns) = scheme.grain.grid(n, k).ok()?;
    let (tall, wide) = scheme.grain.cover(n, k);
    let (_, own_columns) = linear.scheme.grain.grid(n, k).ok()?;
    let (own_tall, own_wide) = linear.scheme.grain.cover(n, k);
    let cell = |at: usize, size: usize| at.checked_div(size).unwrap_or(0);
    let mut scales = Vec::with_capacity(rows.checked_mul(columns)?);
    for row in 0..rows {
        for column in 0..columns {
            let own = cell(row * tall, own_tall) * own_columns + cell(column * wide, own_wide);
            scales.push(*linear.scales.get(own)?);
        }
    }
    let fits = |scale: f32| match scheme.scale {
        ScaleKind::Float(dtype) => dtype.round(scale) == scale,
        ScaleKind::E8M0 => e8m0::encode(scale).is_some(),
        ScaleKind::E4M3WithGlobal => linear.scheme.scale == ScaleKind::E4M3WithGlobal,
    };
    let same_codes = scheme.format == linear.scheme.format && scales.iter().all(|scale| fits(*scale));
    let restated = FloatLinear { scheme: *scheme, scales, ..linear.clone() };
    // A coarser grain took one scale for several: only the values can tell.
    (same_codes && same_values(&restated.dequantize(), &linear.dequantize())).then_some(restated)
}

/// Equal bit by bit.
pub(crate) fn same_values(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

#[cfg(test)]
mod tests {
    use super::*;
    use lite_quant::floats::FloatFormat;

    fn float(grain: Grain, scale: ScaleKind, scales: Vec<f32>) -> FloatLinear {
        let scheme = FloatScheme { format: FloatFormat::E4M3, grain, scale };
        let codes = (0..24u8).map(|i| 0x30 + i).collect();
        FloatLinear { scheme, out_features: 4, in_features: 6, codes, scales, global_scale: 1.0 }
    }

    /// Every scheme offered for a weight gives back its values, and those that would not are not offered.
    #[test]
    fn every_exact_scheme_is_exact() {
        let f32_scale = ScaleKind::Float(ScaleDtype::F32);
        let cases = [
            (float(Grain::Tensor, f32_scale, vec![0.3]), 2),
            (float(Grain::Channel, f32_scale, vec![0.3; 4]), 3),
            (float(Grain::Channel, f32_scale, vec![0.5, 1.0, 2.0, 4.0]), 8),
            (float(Grain::Group(3), f32_scale, (0..8).map(|i| 0.1 + i as f32).collect()), 2),
            (float(Grain::Block { rows: 2, columns: 4 }, f32_scale, vec![0.1, 0.2, 0.3, 0.4]), 1),
            (float(Grain::Channel, ScaleKind::E8M0, vec![0.5, 1.0, 2.0, 4.0]), 8),
        ];
        for (linear, count) in cases {
            let weights = Weights::Float(linear);
            let offered = exact(&weights.scheme().into_linear(), &Facts::of(&weights), Zeros::AsDeclared, 4, 6);
            assert_eq!(offered.len(), count, "{offered:?}");
            for scheme in offered {
                let restated = restate(&weights, &scheme.weights).unwrap();
                assert!(same_values(&restated.dequantize(), &weights.dequantize()));
            }
        }
    }

    #[test]
    fn zero_points_in_the_middle_may_be_dropped_and_others_not() {
        let scheme = Scheme { bits: 4, group_size: GroupSize::Channel, symmetric: false, scale_dtype: ScaleDtype::F16 };
        let mut linear = QuantizedLinear {
            scheme,
            out_features: 2,
            in_features: 4,
            codes: (0..8).collect(),
            scales: vec![0.5, 0.25],
            zeros: vec![8, 8],
        };
        let offered = |linear: &QuantizedLinear, zeros| {
            let weights = Weights::Int(linear.clone());
            exact(&weights.scheme().into_linear(), &Facts::of(&weights), zeros, 2, 4)
        };
        let symmetric = |scheme: &LinearScheme| scheme.weights.int().is_some_and(|scheme| scheme.symmetric);
        assert!(symmetric(&offered(&linear, Zeros::Symmetric)[0]));
        assert!(!symmetric(&offered(&linear, Zeros::AsDeclared)[0]));
        assert!(offered(&linear, Zeros::AsDeclared).iter().any(symmetric));
        linear.zeros[1] = 7;
        assert!(!offered(&linear, Zeros::Symmetric).iter().any(symmetric));
        let forced = WeightScheme::Int(Scheme { symmetric: true, ..scheme });
        assert!(restate(&Weights::Int(linear), &forced).is_none());
    }

    trait IntoLinear {
        fn into_linear(self) -> LinearScheme;
    }

    impl IntoLinear for WeightScheme {
        fn into_linear(self) -> LinearScheme {
            LinearScheme { weights: self, activations: None }
        }
    }
}
